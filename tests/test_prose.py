"""A decimal in a chapter's prose must be the decimal of an output of the same chapter,
or of its code."""
import io, json, re, tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = [f'{n:02}' for n in range(1, 23)]

EXCEPTIONS = {chapter: {} for chapter in CHAPTERS} | {  # decimal: where it comes from
    '09': {'2.3': 'a section of the thesis'},
    '14': {'0.03': 'APGD, arXiv:2003.01690: in percent in the code'}}

DECIMAL = re.compile(r'(?<![\w.,:/])(\d[\d,]*\.\d+)(?![\w])')
NUMBER = re.compile(r'(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?|(?<![\w.])\.\d+')
NOT_MEASURED = re.compile(
    r'''\$\$.*?\$\$                                # displayed equations have constants of their own
    | `[^`]*` | \[[^\]]*\]\([^)]*\) | https?://\S+ | arXiv:\S+
    | \(\d+\.\d+[a-z]?(?:,[^)]*)?\)                # numbers of equations and figures
    | [Ff]igures?\ \d+\.\d+ (?:\ (?:and|to)\ \d+\.\d+)?''', re.S | re.X)


def load(chapter):
    return json.loads(next((ROOT/'nbs').glob(f'{chapter}_*.ipynb')).read_text())['cells']


def prose(cells):
    "The markdown of a chapter without its references."
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return NOT_MEASURED.sub(' ', text.split('\n## References')[0].replace('{,}', ''))


def decimals(text): return [m.replace(',', '') for m in DECIMAL.findall(text)]


def outputs(cells):
    "All numbers that the chapter prints."
    texts = [''.join(o.get('text') or o.get('data', {}).get('text/plain', ''))
             for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    return [float(n.replace(',', '').replace('_', '')) for n in NUMBER.findall('\n'.join(texts))]


def settings(cells):
    "All numbers that stand in the chapter's code: what is set there, and what is asserted."
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    tokens = [t for source in code for t in tokenize.generate_tokens(io.StringIO(source).readline)]
    numbers = [t.string for t in tokens if t.type == tokenize.NUMBER]
    return [float(n.replace('_', '')) for n in numbers if re.fullmatch(r'[\d._]+(e[+-]?\d+)?', n)]


def unbound(cells, exceptions=()):
    "The decimals of the prose that neither an output, rounded as they are, nor the code contains."
    said, printed, fixed = decimals(prose(cells)), outputs(cells), settings(cells)
    rounding = lambda d: .5001*10.**-len(d.split('.')[1])
    near = lambda d: any(abs(p - float(d)) <= rounding(d) for p in printed)
    here = lambda d: near(d) or float(d) in fixed
    return [d for d in dict.fromkeys(said) if d not in exceptions and not here(d)]


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_decimals_in_prose_are_printed(chapter):
    assert unbound(load(chapter), EXCEPTIONS[chapter]) == []


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_exceptions_are_needed(chapter):
    assert set(EXCEPTIONS[chapter]) <= set(unbound(load(chapter)))


def test_a_wrong_decimal_is_found():
    markdown = lambda text: {'cell_type': 'markdown', 'source': [text]}
    code = {'cell_type': 'code', 'source': ['tau = .67'],
            'outputs': [{'text': ['leads [0.66 1.38]\n']}]}
    assert unbound([markdown('At 0.67 the leads are 0.66 and $1.4$ nats, (6.16).'), code]) == []
    wrong = markdown('At 0.68 the leads are 0.66 and 1.39 nats.')
    assert unbound([wrong, code]) == ['0.68', '1.39']
