"""What helps a reader through every chapter: the question and what one needs before at the head,
a summary and exercises at the end, solutions that run, links."""
import json, re
from pathlib import Path

import nbformat, pytest

import fold

NBS = Path(__file__).parent.parent/'nbs'
CHAPTERS = [f'{n:02}' for n in range(1, 23)]
EXERCISE = r'^\* \*\*\[(\w+)\]\(([\w.]*)#Exercise-(\w+)\)\*\* (★+) (.+)$'


def file(chapter): return next(NBS.glob(f'{chapter}_*.ipynb'))


def cells(path, kind='markdown'):
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def section(text, title):
    "What stands under a heading of the second level; '' without one."
    found = re.search(rf'^## {title}\n(.*?)(?=^##? |\Z)', text, re.S | re.M)
    return found[1].strip() if found else ''


def missing(head, text):
    "What a chapter lacks, given its first cell and all of its prose: a list of words."
    found = [f'{what}.' for what in ('The question', 'Before', 'After')
             if not re.search(rf'^\*\*{what}\.\*\* \S.{{19,}}[.?]', head, re.M)]
    words = len(section(text, 'Summary').split())
    found += [] if 60 <= words <= 450 else [f'a summary of half a page ({words} words)']
    grades = {len(m[4]) for m in re.finditer(EXERCISE, section(text, 'Exercises'), re.M)}
    return found + [f'an exercise with {"★"*g}' for g in (1, 2, 3) if g not in grades]


def exercises(chapter):
    "[(name, where its solution is, name there, text)] of a chapter."
    text = '\n'.join(cells(file(chapter)))
    return [(m[1], m[2] or file(chapter).name, m[3], m[5])
            for m in re.finditer(EXERCISE, section(text, 'Exercises'), re.M)]


def solutions(path):
    "The solutions of a notebook: name -> the code under its heading."
    found, name = {}, None
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == 'markdown':
            for level, title in re.findall(r'^(#+) (.+)$', c.source, re.M):
                name = title.removeprefix('Exercise ') if title.startswith('Exercise ') else None
                if name:
                    found[name] = ''
        elif name:
            found[name] += c.source + '\n'
    return found


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_a_chapter_has_a_question_a_summary_and_exercises(chapter):
    prose = cells(file(chapter))
    assert missing(prose[0], '\n'.join(prose)) == []


def test_what_is_missing_is_found():
    line = '* **[1a](A8.ipynb#Exercise-1a)** ★ Why? *Hint:* Because.'
    head = ''.join(f'**{what}.** A sentence that is long enough.\n\n'
                   for what in ('The question', 'Before', 'After'))
    summary = f'## Summary\n\n{"word "*60}\n\n'
    text = f'{summary}## Exercises\n\n{line}\n{line.replace("★", "★★")}\n'
    assert missing(head, text) == ['an exercise with ★★★']
    assert missing(head[20:], '') == ['The question.', 'a summary of half a page (0 words)',
                                      *(f'an exercise with {"★"*g}' for g in (1, 2, 3))]


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_an_exercise_has_a_hint_and_a_solution_that_asserts(chapter):
    mine = exercises(chapter)
    assert [name for name, *_ in mine] == [f'{int(chapter)}{"abcdef"[i]}' for i in range(len(mine))]
    for name, where, there, text in mine:
        assert name == there and re.search(r' \*Hint:\* \S.+[.?]$', text), name
        assert 'assert' in solutions(NBS/where).get(name, ''), f'{name}: no solution in {where}'


def test_every_solution_has_an_exercise():
    names = {name for chapter in CHAPTERS for name, *_ in exercises(chapter)}
    assert {*solutions(NBS/'A0_solutions.ipynb'), *solutions(file('09'))} == names


# ---------------------------------------------------------------- folded cells

@pytest.mark.parametrize('path', fold.chapters(), ids=lambda p: p.stem)
def test_the_cells_that_only_draw_or_set_up_are_folded_and_no_others(path):
    nb = json.loads(path.read_text())
    before = [fold.is_folded(c) for c in nb['cells']]
    assert before == [fold.is_folded(c) for c in fold.refolded(nb)['cells']], 'run make export'
    assert any(before) and not all(before)


def test_what_is_folded():
    drawing = 'fig, ax = plt.subplots()\nax.plot(x)'
    for source in ('import a', '#| default_exp a', '#| export\nimport a\nfrom b import c', drawing,
                   'torch.manual_seed(0)\nplt.rcParams.update({})', '%matplotlib inline'):
        assert fold.folds(source), source
    for source in ('#| export\ndef f(): pass', 'torch.manual_seed(0)\nx = 1', 'x = f(1)\nx',
                   f'{drawing}\nassert x', f'{drawing}\nprint(x)', f'#| export\n{drawing}',
                   'def show():\n    plt.subplots()'):
        assert not fold.folds(source), source
    assert not fold.folds(f'y = f()\n{drawing}', ['y + 1'])
    assert fold.folds(f'y = f()\n{drawing}', ['y = 2', 'y + 1 if (y := 3) else 0', 'lambda y: y'])
