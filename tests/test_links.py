"""Links in the prose of the notebooks: those to files and places lead somewhere, and every mention
of an equation or of another chapter is one. They work in JupyterLab, on a code host and in the
site, because the places are written down where they are: `<a id="eq-4-7"></a>` before (4.7)."""
import json, re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))

LINK = r'\[[^]]*\]\(([^)\s]+)\)'
NO_PROSE = r'\$\$.*?\$\$|\$[^$\n]+\$|```.*?```|`[^`\n]+`|https?://\S+|^#+ [^\n]*$|^> [^\n]*$'
EQUATION = r'\((A?[1-9]\d*\.\d+[a-z]?)(?=\)|, [a-z])'
CHAPTER = r'\b(?:[Cc]hapters?|[Aa]ppendi(?:x|ces)) A?\d+'
NUMBERS = {'25_comparison': {'0.335'}}  # numbers in brackets that are no equation's


def prose(file):
    "The markdown of a notebook without its references."
    cells = json.loads(file.read_text())['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.sub(r'^## References$.*?(?=^## |\Z)', '', text, flags=re.S | re.M)


def anchor(tag): return f'eq-{tag.replace(".", "-")}'


def places(text):
    "The places in a text that a link may name: its anchors and headings."
    headings = re.findall(r'^#+ (.+)$', text, re.M)
    return set(re.findall(r'<a id="(.+?)"></a>', text)) | {h.replace(' ', '-') for h in headings}


def lost(name, texts, folder):
    "The relative links of one of the `texts` (name -> prose) that lead nowhere."
    for link in re.findall(LINK, re.sub(r'`[^`\n]+`', '', texts[name])):
        file, _, place = unquote(link).partition('#')
        there = texts.get(Path(file).stem if file else name)
        if link.startswith('http'): continue
        if file and not (folder/file).exists() or place and place not in places(there or ''):
            yield link


def unlinked(name, text):
    "The mentions of equations and of other chapters that are no links."
    bare = re.sub(NO_PROSE, ' ', re.sub(LINK, ' ', text), flags=re.S | re.M)
    yield from (m[0] for m in re.finditer(EQUATION, bare) if m[1] not in NUMBERS.get(name, ()))
    mine = (name.split('_')[0].lstrip('0'), 'chapter')
    yield from (m for m in re.findall(CHAPTER, bare) if m.split()[1] not in mine)


def misled(text, tags):
    "The links whose text is the number of an equation, but which lead to another or to none."
    for tag, link in re.findall(r'\[\(?(A?\d+\.\d+[a-z]?)\)?\]\(([^)]+)\)', text):
        if tag not in tags or not link.endswith(f'#{anchor(tag)}'):
            yield tag


def misplaced(text):
    "The tags whose equation does not have its anchor, alone and just before it."
    for before, block in re.findall(r'((?:<a id="[^"]+"></a>)*)(\$\$.*?\$\$)', text, re.S):
        ids = [anchor(t) for t in re.findall(r'\\tag\{(.+?)\}', block)]
        if re.findall('id="(.+?)"', before) != ids:
            yield ids


TEXTS = {f.stem: prose(f) for f in NOTEBOOKS}
TAGS = re.findall(r'\\tag\{(.+?)\}', '\n'.join(TEXTS.values()))


@pytest.mark.parametrize('name', TEXTS)
def test_links_lead_to_what_they_name(name):
    assert list(lost(name, TEXTS, ROOT/'nbs')) == []
    assert list(misled(TEXTS[name], TAGS)) == []


@pytest.mark.parametrize('name', TEXTS)
def test_equations_and_chapters_are_linked_where_they_are_mentioned(name):
    assert list(unlinked(name, TEXTS[name])) == []


@pytest.mark.parametrize('name', TEXTS)
def test_every_numbered_equation_has_its_anchor(name):
    assert list(misplaced(TEXTS[name])) == []


def test_there_are_many_links():
    assert len(set(TAGS)) == len(TAGS) > 150
    assert len(re.findall('#eq-', '\n'.join(TEXTS.values()))) > 600


def test_wrong_links_are_found():
    one = ('See <a id="eq-1-2"></a>$$x \\tag{1.2}$$ and [(1.2)](#eq-1-2), '
           '[there](02_two.ipynb#A-heading).')
    texts = {'01_one': one, '02_two': '## A heading\n\n[back](01_one.ipynb)'}
    assert list(lost('01_one', texts, Path('/'))) == ['02_two.ipynb#A-heading']  # no such file
    wrong = texts | {'01_one': one.replace('(#eq-1-2)', '(#eq-1-3)').replace('02_two.ipynb', '')}
    assert list(lost('01_one', wrong, Path('/'))) == ['#eq-1-3', '#A-heading']
    assert list(misled(one, ['1.2'])) == [] and list(misled(one, [])) == ['1.2']
    assert list(misled(wrong['01_one'], ['1.2'])) == ['1.2']
    assert list(misplaced(one)) == []
    assert list(misplaced(one.replace('</a>$', '</a> $'))) == [['eq-1-2']]


@pytest.mark.parametrize('text, mentions', [
    ('by (2.5a) and $(2.5)$', ['(2.5a']), ('(5.5, below)', ['(5.5']), ('(0.5), (2.5 points)', []),
    ('in chapter 7, this chapter', ['chapter 7']), ('Chapters 4 to 8', ['Chapters 4']),
    ('appendix A9 and chapter 1', ['appendix A9']), ('# Chapter 3\n\n`chapter 3`', []),
    ('[chapter 3](a) and chapters [4](b), [(4.1)](c)', [])])
def test_what_is_a_mention(text, mentions):
    assert list(unlinked('01_data', text)) == mentions
