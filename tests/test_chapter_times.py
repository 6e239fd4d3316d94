"""figures/chapters.csv, which tests/time_chapters.py writes, says how long the chapters take. The
first ones are read in a course, where whoever waits for a cell sees a bar. Of the others only the
times are limited, but for the chapter that trains the models of faces."""
import ast, re
from pathlib import Path

import nbformat, pytest

from time_chapters import SLOW, timed
from vae_robust.settings import read_table

ROOT = Path(__file__).parent.parent
COURSE = [f'{n:02}' for n in range(14)]
IN_ALL, IN_COURSE, EACH = 600, 120, 180  # seconds of CPU: all of the course, one of it, any other
TRAINS = '24_faces'
NOTEBOOKS = {f.stem: f for f in sorted((ROOT/'nbs').glob('*.ipynb'))}
MODULES = ('attacks', 'training')  # whose functions have bars


def complaints(table):
    "What is wrong with a table of times: a list of sentences."
    chapters, slow = table[table.cell == 'all'], table[table.cell != 'all']
    bare = slow[(slow.bar != 'yes') & (slow.seconds > SLOW) & slow.chapter.str[:2].isin(COURSE)]
    course = chapters.chapter.str[:2].isin(COURSE)
    most = course.map({True: IN_COURSE, False: EACH}).astype(float)
    most[chapters.chapter == TRAINS] = float('inf')
    found = [f'{r.chapter}: no bar for {r.seconds} s: {r.cell}' for r in bare.itertuples()]
    found += [f'{r.chapter} takes {r.CPU} s, not {most[r.Index]:.0f}'
              for r in chapters[chapters.CPU > most].itertuples()]
    total = chapters[course].CPU.sum()
    return found + [f'the course takes {total:.0f} s, not {IN_ALL}']*bool(total > IN_ALL)


def cells(file):
    "The sources of the code cells of a notebook: {id: source}."
    return {c.id: c.source for c in nbformat.read(file, 4).cells if c.cell_type == 'code'}


def parsed(source): return ast.parse(re.sub('^[%!].*', '', source, flags=re.M))


def functions(source):
    "The functions of a piece of code: {name: its tree}."
    return {f.name: f for f in parsed(source).body if isinstance(f, ast.FunctionDef)}


def silent(tree):
    "Whether a piece of code asks for no progress."
    keywords = [k for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == 'progress']
    return any(getattr(k.value, 'value', None) is False for k in keywords)


def may_show_bar(source, known):
    "Whether a piece of code, or a function in `known` that it comes to, names a bar."
    todo, seen = [parsed(source)], set()
    while todo:
        tree = todo.pop()
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        if silent(tree): continue
        if 'tqdm' in names: return True
        todo += [known[name] for name in names & known.keys() - seen]
        seen |= names
    return False


TABLE = read_table(ROOT/'figures'/'chapters.csv').fillna('')


def test_the_table_has_the_course_and_says_that_no_chapter_is_long_or_bare():
    found = TABLE[TABLE.cell == 'all'].chapter
    assert {*found} >= {name for name in NOTEBOOKS if name[:2] in COURSE}
    assert complaints(TABLE) == []


def test_what_the_table_must_not_say():
    def said(cell, what):
        changed = TABLE.copy()
        row = changed.index[(changed.cell == 'all') == (cell == 'all')][0]
        changed.loc[row, list(what)] = list(what.values())
        return ' '.join(complaints(changed))
    assert 'no bar for 5.1 s' in said('a cell', {'bar': 'no', 'seconds': 5.1})
    assert '00_tour takes 120.1 s, not 120' in said('all', {'CPU': 120.1})
    assert '23_digits takes 180.1 s, not 180' in said('all', {'CPU': 180.1, 'chapter': '23_digits'})
    assert 'the course takes' in said('all', {'CPU': 600.1})


TIMED = sorted({*TABLE[TABLE.id != '-'].chapter})


@pytest.mark.parametrize('chapter', [c for c in TIMED if c[:2] in COURSE])
def test_slow_cells_have_their_bars_still(chapter):
    "If a cell is gone, run tests/time_chapters.py again."
    here = cells(NOTEBOOKS[chapter])
    modules = [(ROOT/'vae_robust'/f'{m}.py').read_text() for m in MODULES]
    known = {k: f for text in [*modules, *here.values()] for k, f in functions(text).items()}
    slow = TABLE[(TABLE.chapter == chapter) & (TABLE.id != '-')]
    assert [r.cell for r in slow.itertuples() if not may_show_bar(here[r.id], known)] == []


def test_a_cell_without_a_bar_is_found():
    known = functions('def f(): return g()\ndef g(): return tqdm(x)\ndef h(): return 1')
    assert may_show_bar('f()', known) and may_show_bar('for x in tqdm(y): x', {})
    assert not may_show_bar('h("tqdm")', known) and not may_show_bar('f(progress=False)', known)


def test_cells_are_timed_and_their_bars_seen(tmp_path):
    wait = 'import time\ntime.sleep(.3)'
    shown = f"import sys\nprint(' 50%|#####     | 1/2', file=sys.stderr)\n{wait}"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ('1', wait, shown)])
    nbformat.write(nb, tmp_path/'00_a.ipynb')
    table = timed(tmp_path/'00_a.ipynb', slow=.2)
    assert table.bar.tolist() == ['-', 'no', 'yes'] and table.cell[0] == 'all'
    assert table.seconds[0] > .6 and (table.seconds > .3).all()
