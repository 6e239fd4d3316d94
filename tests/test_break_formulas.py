import ast, re, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest

from break_formulas import EXCEPTIONS, MUTATIONS, cells, where

HERE = Path(__file__).parent


@pytest.mark.parametrize('chapter, right, wrong', MUTATIONS)
def test_a_formula_to_break_stands_once_in_its_chapter_and_in_what_is_exported(
    chapter, right, wrong):
    assert right != wrong and cells(chapter)[where(chapter, right)].startswith('#| export')


def test_there_are_sixty_and_three_may_go_unnoticed():
    assert len(MUTATIONS) == 60 == len({m[:2] for m in MUTATIONS})
    assert {'02', '03', '04', '05', '06', '07', '08'} <= Counter(m[0] for m in MUTATIONS).keys()
    assert len(EXCEPTIONS) <= 3 and EXCEPTIONS.keys() <= {m[1] for m in MUTATIONS}


ASKS = {'smoke', 'VAE_ROBUST_SMOKE'}


def asks(node):
    "Whether a piece of code asks if this is a smoke run."
    return any(getattr(n, 'id', getattr(n, 'value', None)) in ASKS for n in ast.walk(node)
               if isinstance(n, (ast.Name, ast.Constant)))


def asserts(node): return [n for n in ast.walk(node) if isinstance(n, ast.Assert)]


def read(node, hidden=frozenset()):
    "The names that a piece of code reads, but for the arguments of its functions."
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        hidden = hidden | {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from read(child, hidden)


def used(nodes): return Counter(name for n in nodes for name in read(n))


def tolerances(trees):
    "The names that a smoke run gives another value, and that only assertions read."
    given = {n.id for t in trees for a in ast.walk(t) if isinstance(a, ast.Assign) and asks(a.value)
             for m in a.targets for n in ast.walk(m) if isinstance(n, ast.Name)}
    tests = [a for t in trees for a in asserts(t)]
    return {name for name in given if 0 < used(trees)[name] == used(tests)[name]}


def weakened(sources):
    """The assertions of some cells that a smoke run leaves out or weakens: they ask for it, or
    stand where it is asked for, or use a tolerance that only a smoke run has."""
    trees = [ast.parse(re.sub('^[%!].*', '', s, flags=re.M)) for s in sources]
    loose, found = tolerances(trees), []
    for tree in trees:
        found += [a for a in asserts(tree) if asks(a) or loose & used([a]).keys()]
        found += [a for n in ast.walk(tree)
                  if isinstance(n, (ast.If, ast.IfExp, ast.While)) and asks(n.test)
                  or isinstance(n, (ast.For, ast.comprehension)) and asks(n.iter)
                  for a in asserts(n)]
    return [ast.unparse(a) for a in found]


NOTEBOOKS = sorted(p.stem[:2] for p in (HERE.parent/'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('chapter', NOTEBOOKS)
def test_a_smoke_run_asserts_what_a_full_run_does(chapter):
    assert weakened(cells(chapter)) == []


def test_what_weakens_an_assertion():
    for source in ('assert smoke() or x < 1', 'assert x and (y or smoke())',
                   'if not smoke(): assert x', 'assert not smoke() and x',
                   'assert x < (1 if smoke() else 2)', 'if smoke():\n    y\nelse:\n    assert x',
                   'for m in () if smoke() else models:\n    assert m',
                   "if not os.environ.get('VAE_ROBUST_SMOKE'): assert x",
                   'slack = 1 if smoke() else 0\nassert x < slack',
                   'def f(x): assert x < (1 if smoke() else 2)'):
        assert weakened([source]), source
    assert weakened(['more = 1 if smoke() else 0', 'assert x < y + more', 'f = lambda more: more'])
    for source in ('n = 1 if smoke() else 2\nx = f(n)\nassert x < n', 'if smoke(): print(1)',
                   'assert x', 'xs = load(1 if smoke() else 2)\nx = g(xs)\nassert x'):
        assert not weakened([source]), source


def test_broken_formulas_are_noticed():
    command = [sys.executable, HERE/'break_formulas.py', '--sample', '6', '--seed', '1654']
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and '6 of 6 noticed' in done.stdout, done.stdout + done.stderr


def test_an_unbroken_formula_is_not_noticed(monkeypatch):
    "The cells themselves pass: what a broken formula sets off is not there without it."
    monkeypatch.setattr('break_formulas.WITHIN', 3)
    from break_formulas import chapter, forked
    right = MUTATIONS[0][1]
    assert forked(chapter, MUTATIONS[0][0], [(right, right)]) == [[right, right, None]]
