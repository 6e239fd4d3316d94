"""Sentences of chapters 0 to 25 are short enough for readers whose language is another one."""
import json, re
from pathlib import Path
from statistics import median

import pytest

NBS = Path(__file__).parent.parent/'nbs'
CHAPTERS = [next(NBS.glob(f'{n:02}_*.ipynb')) for n in range(26)]
LONGEST, PARAGRAPH, CHAPTER = 40, 30, 18  # words of a sentence; medians

BREAKS = r'```.*?```|^#+ [^\n]*$|^\|[^\n]*$'     # code, headings and rows of tables
DISPLAYED, FORMULA, LINK = r'\$\$.*?\$\$', r'\$[^$\n]+\$|`[^`\n]+`', r'\[([^]]*)\]\([^)\s]*\)'
ABBREVIATION = r'\b(et al|e\.g|i\.e|vs|[A-Z])\.|(?<=\d)\.(?=\d)'


def paragraphs(text):
    "The paragraphs of a chapter's markdown and the points of its lists, a formula as one word."
    text = re.sub(r'^## References$.*?(?=^## |\Z)', '', text, flags=re.S | re.M)
    text = re.sub(BREAKS, '\n\n', text, flags=re.S | re.M)
    words = {DISPLAYED: ' Formula ', FORMULA: 'Formula', LINK: r'\1', r'<[^>]+>': ''}
    for pattern, word in words.items():
        text = re.sub(pattern, word, text, flags=re.S)
    parts = re.split(r'\n\s*\n|^\s*(?:[*-]|\d+\.|>) ', text, flags=re.M)
    return [' '.join(p.split()) for p in parts if p.strip()]


def sentences(paragraph):
    "The lengths of the sentences of a paragraph, in words."
    whole = re.sub(ABBREVIATION, lambda m: m[0].replace('.', ''), paragraph)
    parts = re.split(r'(?<=[.!?:])[")*]*\s+(?=["(*\[]*[A-Z\d★])', whole)
    counts = [len(re.findall(r"\w+(?:['’-]\w+)*", s)) for s in parts]
    return [n for n in counts if n]


def complaints(text):
    "What is too long in a chapter."
    found = [(p, sentences(p)) for p in paragraphs(text)]
    found = [(p, n) for p, n in found if n]
    middle = median([k for _, n in found for k in n])
    if middle > CHAPTER:
        yield f'half of the sentences have more than {middle} words'
    for p, n in found:
        if max(n) > LONGEST:
            yield f'a sentence of {max(n)} words in "{p[:60]}..."'
        if median(n) > PARAGRAPH:
            yield f'a median of {median(n)} words in "{p[:60]}..."'


@pytest.mark.parametrize('file', CHAPTERS, ids=lambda f: f.stem)
def test_sentences_are_short(file):
    cells = json.loads(file.read_text())['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert list(complaints(text)) == []


def test_sentences_are_counted():
    text = ('# No sentence\n\nBy [(4.7)](#eq-4-7), a code of $z = 1$ has 1.5 nats (Chen et al. '
            '2018). *It is short.*\n$$x \\tag{4.7}$$\n'
            '* a point\n\n| a | table |\n\n```\nprint()\n```')
    assert [sentences(p) for p in paragraphs(text)] == [[13, 3, 1], [2]]


def test_long_sentences_are_found():
    words = lambda n: 'Word' + ' word'*(n - 1) + '. '
    assert list(complaints(words(40) + words(1)*2)) == []
    assert list(complaints(words(41) + words(1)*2))[0].startswith('a sentence of 41 words')
    assert list(complaints(words(31) + '\n\n' + words(1)*2))[0].startswith('a median of 31 words')
    assert list(complaints(words(19)))[0] == 'half of the sentences have more than 19 words'
