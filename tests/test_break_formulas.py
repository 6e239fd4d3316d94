import ast, subprocess, sys
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


def switched_off(source):
    "The assertions of a cell that a smoke run leaves out."
    asks = lambda node: any(isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'smoke'
                            for n in ast.walk(node))
    tree = ast.parse(source)
    either = [n for n in ast.walk(tree) if isinstance(n, ast.Assert)
              for b in ast.walk(n.test) if isinstance(b, ast.BoolOp)
              and any(asks(v) and isinstance(v, (ast.Call, ast.UnaryOp)) for v in b.values)]
    inside = [n for i in ast.walk(tree) if isinstance(i, ast.If) and asks(i.test)
              for n in ast.walk(i) if isinstance(n, ast.Assert)]
    return either + inside


NOT_YET = ['10', '16', '18', '21']  # some of their assertions need what a smoke run has not
CHAPTERS = [f'{n:02}' for n in range(1, 23) if f'{n:02}' not in NOT_YET]


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_a_smoke_run_leaves_no_assertion_out(chapter):
    assert [source for source in cells(chapter) if switched_off(source)] == []


def test_what_leaves_an_assertion_out():
    for source in ('assert smoke() or x < 1', 'assert x and (y or smoke())',
                   'if not smoke(): assert x', 'assert not smoke() and x'):
        assert switched_off(source)
    for source in ('assert x < (1 if smoke() else 2)', 'n = 1 if smoke() else 2\nassert n',
                   'if smoke(): print(1)'):
        assert not switched_off(source)


def test_broken_formulas_are_noticed():
    command = [sys.executable, HERE/'break_formulas.py', '--sample', '6', '--seed', '8']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and '6 of 6 noticed' in done.stdout, done.stdout + done.stderr


def test_an_unbroken_formula_is_not_noticed(monkeypatch):
    "The cells themselves pass: what a broken formula sets off is not there without it."
    monkeypatch.setattr('break_formulas.WITHIN', 3)
    from break_formulas import chapter, forked
    right = MUTATIONS[0][1]
    assert forked(chapter, MUTATIONS[0][0], [(right, right)]) == [[right, right, None]]
