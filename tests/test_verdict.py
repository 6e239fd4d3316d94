import pandas as pd, pytest

from vae_robust import verdict
from vae_robust.robustness import trial
from vae_robust.settings import preset
from vae_robust.sweep import collected, sweep
from vae_robust.verdict import cells, compute


def test_a_cell_says_all_that_its_answer_depends_on():
    one, two = cells(preset('study.smoke'))[:2]
    assert (one['set'], two['set']) == ({'lam': '0', 'steps': '2'}, {'lam': '1', 'steps': '2'})
    assert (one['values']['steps'], one['values']['pairs'], one['values']['optimiser'], two['values']['lam']) == (2, 1, 'pgd', 1)
    assert len(one['weights']) == 12 and list(one['judges']) == ['judge.residual'] and one['judges']['judge.residual']


def test_models_that_are_not_shipped_have_no_cells():
    assert cells(preset('study.smoke', models='digits.entangled')) == []
    assert {c['seed'] for c in cells(preset('study.smoke', seeds='0, 99'))} == {0}


def test_a_cell_is_a_trial_and_a_sweep_collects_it(tmp_path):
    grid = cells(preset('study.smoke'))[:2]
    rows = compute(grid[0])
    assert len(rows) == 90 and {'residual_before', 'residual_after', 'image', 'aim'} <= set(rows)
    table = sweep(grid, compute, tmp_path, progress=False, jobs=1)
    pd.testing.assert_frame_equal(table[table.set == table.set.iloc[0]][rows.columns], rows, check_dtype=False)
    assert len(collected(grid, tmp_path)) == 180
