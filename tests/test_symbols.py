"""The index of symbols at the end of the tour: one row for every symbol of the numbered
equations, with the equation in which it stands first."""
import json, re
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent/'nbs'
CHAPTERS = [next(NBS.glob(f'{n:02}_*.ipynb')) for n in range(2, 22)]

GREEK = '''alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma
    tau upsilon phi varphi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell'''.split()
WORDS = r'\\(?:text|mathrm|operatorname\*?|begin|end|tag)(?=\{)|\\rm (?=\w)'
SYMBOL = r'(?:\\(hat|bar|tilde|mathcal|mathbb|mathbf)\s*\{?\s*)?(\\[a-zA-Z]+|[a-zA-Z])'


def prose(file):
    cells = json.loads(file.read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def numbered(text):
    "The numbered equations of a text, in order: {tag: formula}."
    blocks = re.findall(r'\$\$(.*?)\$\$', text, re.S)
    return {tag: b for b in blocks for tag in re.findall(r'\\tag\{(.+?)\}', b)}


def letters(formula):
    r"A formula without its words: what stands in \text{}, \mathrm{} and the like, or after \rm."
    while m := re.search(WORDS, formula):
        depth, end = 0, m.end()
        while end < len(formula) and (depth := depth + {'{': 1, '}': -1}.get(formula[end], 0)):
            end += 1
        if m[0].startswith('\\rm'):
            end += re.match(r'\w+', formula[end:]).end() - 1
        formula = formula[:m.start()] + ' ' + formula[end + 1:]
    return formula


def symbols(formula, longer=()):
    r"""The symbols of a formula: `longer` ones, such as C_z, where they occur, and of the rest all
    letters, Latin or Greek, each with its accent or alphabet (\hat x, \mathcal L)."""
    found = set()
    for s in longer:
        if s in formula:
            found.add(s)
            formula = formula.replace(s, ' ')
    for mark, letter in re.findall(SYMBOL, letters(formula)):
        if letter[0] != '\\' or letter[1:] in GREEK:
            found.add(f'\\{mark} {letter}' if mark else letter)
    return found


def rows(text):
    "The rows of the index: [(symbol, meaning, unit, where)]."
    table = text.split('## Index of symbols\n')[-1]
    cells = [line.strip('| ').split(' | ') for line in table.split('\n') if line.startswith('| $')]
    return [(symbol.strip('$'), *rest) for symbol, *rest in cells]


def complaints(text, equations):
    "What is wrong with the index in a `text`, given all numbered `equations` in order."
    index = rows(text)
    names = [row[0] for row in index]
    longer = [s for s in names if len(symbols(s)) > 1 or '_' in s]
    of = {tag: symbols(formula, longer) for tag, formula in equations.items()}
    yield from (f'{s}: {names.count(s)} rows' for s in dict.fromkeys(names) if names.count(s) > 1)
    yield from (f'{s} of ({tag}) has no row' for tag in of for s in sorted(of[tag] - set(names)))
    for s, meaning, *_, where in index:
        first = next((tag for tag in of if s in of[tag]), None)
        named = re.findall(r'\[\((.+?)\)\]', meaning + where)
        if named[-1:] != [first]:
            yield f'{s}: first in ({first}), not in ({named[-1:]})'
        yield from (f'{s} is not in ({t})' for t in named if s not in of.get(t, ()))


def test_the_index_has_one_row_for_every_symbol_and_says_where_it_stands():
    equations = numbered('\n\n'.join(map(prose, CHAPTERS)))
    assert len(equations) > 150
    assert list(complaints(prose(NBS/'00_tour.ipynb'), equations)) == []


def test_rows_have_a_meaning():
    for row in rows(prose(NBS/'00_tour.ipynb')):
        assert len(row) == 4 and len(row[1]) > 4, row


def test_symbols_are_found():
    formula = r'''\begin{aligned}\mathbb E_x\,C_z + \hat x^{(i)} + \tilde\rho
        &\le \frac{\mathrm{AS_{a\text{-}b}}}{lv_d} + V_{\rm data} + \operatorname*{arg\,min}_j
        \mathcal{L} + \sin\tau\end{aligned}\tag{1.1}'''
    latin = {'x', r'\hat x', 'i', 'lv', 'd', 'V', 'j', 'C_z', r'\mathbb E', r'\mathcal L'}
    assert symbols(formula, ['C_z', 'lv']) == latin | {r'\tilde \rho', r'\tau'}


@pytest.mark.parametrize('change, complaint', [
    (('$x$', '$y$'), 'y: 2 rows'), (('$x$', '$y$'), 'x of (2.1) has no row'),
    (('| [(2.1)](a) |\n| $y$', '| [(2.2)](a) |\n| $y$'), "x: first in (2.1), not in (['2.2'])"),
    (('an image', 'an image; [(2.2)](a) a code'), 'x is not in (2.2)')])
def test_a_wrong_index_is_found(change, complaint):
    text = ('## Index of symbols\n\n| symbol | meaning | unit | where |\n|---|---|---|---|\n'
            '| $x$ | an image |  | [(2.1)](a) |\n| $y$ | a class |  | [(2.1)](a) |\n')
    equations = {'2.1': 'x + y', '2.2': 'y'}
    assert list(complaints(text, equations)) == []
    assert complaint in complaints(text.replace(*change), equations)
