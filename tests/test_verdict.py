import pandas as pd, pytest, torch

from vae_robust import verdict
from vae_robust.data import load
from vae_robust.settings import preset
from vae_robust.sweep import collected, sweep
from vae_robust.verdict import by_seed, cells, compare, compute, publish, results, slopes, tidy


def test_a_cell_says_all_that_its_answer_depends_on():
    one, two = cells(preset('study.smoke'))[:2]
    assert (one['set'], two['set']) == ({'lam': '0', 'steps': '2'}, {'lam': '1', 'steps': '2'})
    assert (one['values']['steps'], one['values']['pairs'], one['values']['optimiser'], two['values']['lam']) == (2, 1, 'pgd', 1)
    assert len(one['weights']) == 12 and list(one['judges']) == ['judge.residual'] and one['judges']['judge.residual']


def test_models_that_are_not_shipped_have_no_cells():
    assert cells(preset('study.smoke', models='digits.entangled')) == []
    assert {c['seed'] for c in cells(preset('study.smoke', seeds='0, 99'))} == {0}


def test_a_cell_is_a_trial_and_a_sweep_collects_it(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, 'load', lambda name, split: load('digits', split))                  # no download
    grid = cells(preset('study.smoke'))[:2]
    rows = compute(grid[0])
    assert len(rows) == 90 and {'residual_before', 'residual_after', 'image', 'aim'} <= set(rows)
    table = sweep(grid, compute, tmp_path, progress=False, jobs=1)
    pd.testing.assert_frame_equal(table[table.set == table.set.iloc[0]][rows.columns], rows, check_dtype=False)
    assert len(collected(grid, tmp_path)) == 180


def rows(after, before=(3, 3, 5, 5)):
    return pd.DataFrame({'source': [3, 3, 5, 5], 'target': [8, 8, 1, 1], 'residual_before': before, 'residual_after': after, 'objective_before': 2., 'objective_after': 1., 'l2': .5})


@pytest.fixture
def study(monkeypatch):
    "Two models, one seed, three attacks, and an answer for each: the disentangled model fails on one source, the other never under the first attack."
    monkeypatch.setattr(verdict, 'short_hash', lambda name, seed=0: 'abc')
    s = preset('study.primary', models='mnist.disentangled, mnist.entangled', seeds='0', judges='judge.residual')
    answers = {('mnist.disentangled', 'attack.strong'): rows([8, 3, 1, 5], [3, 3, 5, 9]), ('mnist.entangled', 'attack.strong'): rows([3, 3, 5, 5]),
               ('mnist.entangled', 'attack.noise'): rows([3, 8, 5, 7])}
    return s, lambda c: answers.get((c['model'], c['attack']), rows([3, 3, 5, 5], [3, 3, 5, 9] if 'dis' in c['model'] else (3, 3, 5, 5)))


def test_tidy_counts_own_and_common_pairs_and_the_worst_case(study):
    t = tidy(*study)
    pick = lambda **kw: t.loc[(t[list(kw)] == pd.Series(kw)).all(axis=1), ['source', 'kept', 'missed', 'hit']].values.tolist()
    assert pick(model='disentangled', attack='strong', rule='own') == [[3, 2, 1, 1], [5, 1, 1, 1]]
    assert pick(model='entangled', attack='strong', rule='own') == [[3, 2, 0, 0], [5, 2, 0, 0]]
    assert pick(model='entangled', attack='strong', rule='all') == [[3, 2, 0, 0], [5, 1, 0, 0]]
    assert pick(model='entangled', attack='worst', rule='own') == [[3, 2, 1, 1], [5, 2, 1, 0]]
    assert pick(model='entangled', attack='none', rule='own') == [[3, 2, 0, 0], [5, 2, 0, 0]]


def test_unfinished_cells_are_left_out_and_common_pairs_need_all_models(study):
    s, rows_of = study
    t = tidy(s, lambda c: None if c['model'] == 'mnist.entangled' else rows_of(c))
    assert set(t.model) == {'disentangled'} and set(t.rule) == {'own'}


def test_published_is_what_results_reads(study, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, 'preset', lambda name, **kw: study[0] if name.startswith('study') else preset(name, **kw))
    t = publish('toy', study[1], tmp_path)
    pd.testing.assert_frame_equal(results('toy', tmp_path), t, check_dtype=False)
    assert '"weights"' in (tmp_path/'study_toy.csv').read_text().splitlines()[0]


def test_compare_two_models():
    t = pd.DataFrame([{'model': m, 'seed': s, 'source': k, 'kept': 10, 'missed': miss + s} for m, miss in (('disentangled', 2), ('entangled', 5)) for s in range(3) for k in range(10)])
    c = compare(t)
    assert abs(c['difference'] + 30) < 1e-9 and c['low'] < -30 < c['high'] < 0 and c['low_boot'] <= -30 <= c['high_boot'] and c['seeds'] == 3
    assert by_seed(t).rate.tolist() == [20, 30, 40, 50, 60, 70]


def test_slopes_of_a_linear_encoder():
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    x, x_t = torch.rand(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    d = ((x - x_t).flatten(1) @ w)
    torch.testing.assert_close(slopes(lambda x: x.flatten(1) @ w, x, x_t, preset('attack.strong')), ((d/d.norm(dim=1, keepdim=True)) @ w.T).norm(dim=1))
