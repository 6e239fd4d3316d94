"""Code that can be read at normal width: lines, statements, cells of notebooks, package, tests."""
import ast, io, json, re, tokenize, tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDE, WIDEST, SHARE = 100, 110, .01  # columns; the share of lines that may be over WIDE
MEDIAN, P90, LONGEST = 4, 12, 30     # lines of code in a cell
FUNCTION = 25                        # lines of code in a function of the package
KINDS = {'nbs': '*.ipynb', 'vae_robust': '*.py', 'tests': '*.py', 'tools': '*.py'}
FILES = [f.relative_to(ROOT).as_posix() for d in KINDS for f in sorted((ROOT/d).rglob(KINDS[d]))
         if f.name != '_modidx.py']  # written by nbdev


def sources(file):
    "What is code in a file: its cells, or one text without `__all__`, which nbdev wraps."
    text = (ROOT/file).read_text()
    if file.endswith('.ipynb'):
        cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
        return [re.sub('^%', '# %', ''.join(c['source']), flags=re.M) for c in cells]  # no magics
    return [re.sub(r'^__all__ = \[.*?\]\n', '', text, count=1, flags=re.M | re.S)]


def code_lines(text):
    "The lines of code: no blank ones, no comments, no directives."
    return [line for line in text.split('\n') if line.strip() and not line.strip().startswith('#')]


def too_wide(texts):
    "The lines over WIDEST, and those over WIDE if too many; nbdev's list of modules apart."
    lines = [line for t in texts for line in t.split('\n')
             if line.strip() and not line.startswith('- `vae_robust.')]
    widest, wide = ([line for line in lines if len(line) > n] for n in (WIDEST, WIDE))
    many = wide if len(wide) > SHARE*len(lines) else []
    return [f'{len(line)} columns: {line.strip()[:60]}' for line in widest or many]


def bodies(tree):
    "All lists of statements in a tree, each with the statement that it belongs to."
    for node in ast.walk(tree):
        for name in ('body', 'orelse', 'finalbody'):
            body = getattr(node, name, None)
            if isinstance(body, list) and body:
                yield node, name, body


def may_share(node, name, body):
    "Whether a body may stand on the line of its head: guards, and short functions and classes."
    simple = len(body) == 1 and not hasattr(body[0], 'body')
    leaves = isinstance(body[0], (ast.Raise, ast.Return, ast.Continue, ast.Break))
    if isinstance(node, ast.If): return simple and name == 'body' and leaves
    return simple and isinstance(node, (ast.FunctionDef, ast.ClassDef))


def packed(text, cell=False):
    "The lines of a text that hold more than one statement; the last of a `cell` may be its value."
    tree, lines, found = ast.parse(text), text.split('\n'), []
    for node, name, body in bodies(tree):
        head = lines[body[0].lineno - 1].encode()[:body[0].col_offset].decode().strip()
        if head and head != 'el' and not may_share(node, name, body):
            found.append(body[0])
        found += [b for a, b in zip(body, body[1:]) if b.lineno == a.end_lineno]
        found += [s for s in body if is_calls(s)]
    if cell and tree.body and is_calls(tree.body[-1]) and not text.rstrip().endswith(';'):
        found.remove(tree.body[-1])
    rows = {s.lineno for s in found} | semicolons(text)
    return [f'several statements: {lines[i - 1].strip()[:60]}' for i in sorted(rows)]


def is_calls(statement):
    "Whether a statement is several calls, separated by commas."
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Tuple) and sum(isinstance(e, ast.Call) for e in value.elts) > 1


def semicolons(text):
    "The rows with a `;`, but for one at the very end, which hides the value of a cell."
    tokens = tokenize.generate_tokens(io.StringIO(text.rstrip()).readline)
    tokens = [t for t in tokens if t.string.strip()]
    return {t.start[0] for t in tokens[:-1] if t.type == tokenize.OP and t.string == ';'}


def too_long(cells):
    "What is wrong with the lengths of a notebook's cells."
    n = sorted(len(code_lines(c)) for c in cells)
    found = [(n[len(n)//2], MEDIAN, 'median'), (n[int(.9*len(n))], P90, '90 %'),
             (n[-1], LONGEST, 'longest')]
    return [f'{what} cell: {n} lines of code, not {most}' for n, most, what in found if n > most]


def long_functions(text):
    "The functions of a module that are too long."
    lines = text.split('\n')
    for f in ast.walk(ast.parse(text)):
        if isinstance(f, ast.FunctionDef):
            n = len(code_lines('\n'.join(lines[f.lineno - 1:f.end_lineno])))
            if n > FUNCTION:
                yield f'{f.name}: {n} lines of code, not {FUNCTION}'


def complaints(file):
    "All that is wrong with a file, one line each."
    texts, cells = sources(file), file.endswith('.ipynb')
    found = too_wide(texts) + [line for t in texts for line in packed(t, cells)]
    if cells:
        found += too_long(texts)
    if file.startswith('vae_robust/'):
        found += long_functions(texts[0])
    return found


@pytest.mark.parametrize('file', FILES)
def test_style(file):
    found = complaints(file)
    assert not found, '\n'.join([f'{file}:', *found])


def test_the_linter_knows_the_width_and_leaves_out_no_file():
    ruff = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['ruff']
    assert ruff['line-length'] == WIDEST and 'per-file-ignores' not in ruff['lint']


def test_wide_lines_are_found():
    line = lambda n: f'x = {"1"*(n - 4)}'
    assert too_wide([line(110)] + [line(100)]*99) == []
    assert len(too_wide([line(111)] + [line(100)]*99)) == 1
    assert len(too_wide([line(101)] + [line(100)]*98)) == 1
    assert len(too_wide([line(101)]*2 + [line(100)]*98)) == 2


@pytest.mark.parametrize('text', [
    'a; b', 'a; b;', 'a;\nb', 'if a: b', 'if a: return b; c', 'for a in b: c', 'with a: b',
    'while a: b', 'if a:\n    b\nelse: c', 'if a:\n    b\nelif c: d', 'try: a\nexcept B:\n    c',
    'try:\n    a\nexcept B: c', 'try:\n    a\nfinally: c', 'def f(): a; b', 'a(), b()\nc',
    'def f():\n    a(), b()', 'a(), b();', 'for a in b:\n    c(), d()',
    'def f(): return (a,\n  b); c', 'class A: x = 1; y = 2',
    'def f():\n    if a: return b\n    for c in d: e'])
def test_packed_lines_are_found(text):
    assert packed(text, cell=True)


@pytest.mark.parametrize('text', [
    'a', 'a;', 'a\nb;', 'a(), b()', 'a = b(), c()', 'if a: return b', 'if a: raise B', '',
    'for a in b:\n    if c: break', 'for a in b:\n    if c: continue', 'class A(B): pass',
    'def f(x): return x', 'def f(x): assert x', 'if a:\n    b\nelif c:\n    d\nelse:\n    e',
    'a = [b for c in d if e]', "a = 'b; c'  # d; e", 'a = lambda: b',
    'def f():\n    if a: return b\n    return c',
    'try:\n    a\nexcept B:\n    c\nfinally:\n    d'])
def test_what_is_not_packed(text):
    assert packed(text, cell=True) == []


def test_long_cells_are_found():
    cell = lambda n: '\n'.join(['#| export', '', '# why', *['a']*n])
    assert too_long([cell(4)]*90 + [cell(12)]*9 + [cell(30)]) == []
    assert too_long([cell(4)]*99 + [cell(31)]) == ['longest cell: 31 lines of code, not 30']
    assert too_long([cell(5)]*50 + [cell(1)]*49) == ['median cell: 5 lines of code, not 4']
    assert too_long([cell(4)]*89 + [cell(13)]*10) == ['90 % cell: 13 lines of code, not 12']


def test_long_functions_are_found():
    function = lambda n: 'def f():\n' + '    a\n'*(n - 1)
    assert list(long_functions(function(25))) == []
    assert list(long_functions(function(26))) == ['f: 26 lines of code, not 25']


# ---------------------------------------------------------------- public names

PUBLIC, EACH = 270, 30  # in all, and in a module


def public():
    "The names that each module exports: {module: names}."
    found = {}
    for f in FILES:
        if f.startswith('vae_robust/') and '__all__' in (text := (ROOT/f).read_text()):
            tree = ast.parse(text).body
            is_all = lambda n: isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
            names = [n.value for n in tree if is_all(n)]
            found[f] = [e.value for e in names[0].elts] if isinstance(names[0], ast.List) else []
    return {f: names for f, names in found.items() if f != 'vae_robust/__init__.py'}


def defined():
    "The names that each module defines at its top level: [(name, file)]."
    for f in FILES:
        if not f.startswith('vae_robust/') or f.endswith(('_modidx.py', '__init__.py')): continue
        for n in ast.parse((ROOT/f).read_text()).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                yield n.name, f
            for target in getattr(n, 'targets', []):
                if isinstance(target, ast.Name) and target.id != '__all__':
                    yield target.id, f


def test_no_public_name_has_another_meaning_elsewhere():
    home = {name: f for f, names in public().items() for name in names}
    assert [(name, f) for name, f in defined() if home.get(name, f) != f] == []


def test_there_are_few_public_names_and_each_has_one_meaning():
    names = public()
    where = {n: [f for f in names if n in names[f]] for n in sum(names.values(), [])}
    assert {n: files for n, files in where.items() if len(files) > 1} == {}
    assert sum(map(len, names.values())) <= PUBLIC
    assert {f: len(n) for f, n in names.items() if len(n) > EACH} == {}
