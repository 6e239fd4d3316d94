import numpy as np, pandas as pd, pytest, torch

from torch.distributions import Normal

from vae_robust import verdict
from vae_robust.data import ImageData, load
from vae_robust.settings import preset, read_table, save_csv
from vae_robust.sweep import collected, sweep
from vae_robust.training import pretrained
from vae_robust.vae import Posterior
from vae_robust.verdict import (association, beside, by_seed, cells, circumstances, compare, compute, dosed, folder_of, gaps, inherited, likeness, model_of, partial_rank, publish, publish_doses, respond, results, slopes,
                                tidy, varied)


def test_a_cell_says_all_that_its_answer_depends_on():
    one, two = cells(preset('study.smoke'))[:2]
    assert (one['set'], two['set']) == ({'lam': '0', 'steps': '2'}, {'lam': '1', 'steps': '2'})
    assert (one['values']['steps'], one['values']['pairs'], one['values']['optimiser'], two['values']['lam']) == (2, 1, 'rmsprop', 1)
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


@pytest.fixture
def grown(study, tmp_path, monkeypatch):
    "A published study of two attacks, and (its preset, what `inherited` sees in it)."
    monkeypatch.setattr(verdict, 'preset', lambda name, **kw: study[0] if name.startswith('study') else preset(name, **kw))
    publish('toy', study[1], tmp_path)
    return study[0], tmp_path/'study_toy.csv'


def test_a_table_that_grows_keeps_what_it_has(grown):
    s, path = grown
    now, old = circumstances(s), results('toy', path.parent)
    pd.testing.assert_frame_equal(inherited(path, now, set()), old)
    assert set(inherited(path, now, {('disentangled', 0, 'strong')}).groupby(['model', 'attack']).size().index) == set(old.groupby(['model', 'attack']).size().index) - {('disentangled', 'strong')}
    assert len(inherited(path.with_name('none.csv'), now, set())) == 0


@pytest.mark.parametrize('change, left', [({'study': {}}, set()), ({'weights': {'mnist.disentangled/0': 'other'}}, {'entangled'}),
                                          ({'attacks': dict.fromkeys(preset('study.primary').attacks, {})}, {'disentangled', 'entangled'})])
def test_nothing_is_taken_over_from_other_circumstances(grown, change, left):
    s, path = grown
    rows = inherited(path, circumstances(s) | change, set())
    assert set(rows.model) == left if len(rows) else not left
    if 'attacks' in change: assert set(rows.attack) == {'worst'}


def test_a_series_trains_its_models_once_and_tells_them_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, 'load', lambda name, split: load('digits', split))
    monkeypatch.setattr(verdict, 'portrait', lambda *a, **kw: {'rec': 1.})
    d = preset('dose.beta', train='train.smoke', seeds='0, 1', beta='1, 4', attacks='attack.noise', pairs=1)
    monkeypatch.setattr(verdict, 'preset', lambda name, *a, **kw: d if name == 'dose.beta' else preset(name, *a, **kw | ({'data': 'digits'} if name == 'mnist.beta' else {})))
    series = varied(d)
    assert [(c['seed'], c['set']['beta'], c['values'].get('beta', 1)) for c in series] == [(0, '1', 1), (0, '4', 4), (1, '1', 1), (1, '4', 4)]
    answers = {folder_of(c, tmp_path): respond(c, tmp_path) for c in series}
    assert len(answers) == 4 and all((f/'weights.safetensors').exists() for f in answers)
    table = dosed(['beta'], lambda c: answers.get(folder_of(c, tmp_path)), tmp_path)
    assert table[['dose', 'key', 'value', 'seed']].values.tolist() == [['beta', 'beta', v, s] for v in (1, 4) for s in (0, 1)]
    assert table.udr.between(0, 1).all() and {'as_noise', 'J_noise', 'slope', 'margin', 'error', 'tc'} <= set(table)
    monkeypatch.setattr(verdict, 'train', None)
    with pytest.raises(TypeError): respond(series[0], tmp_path)                        # the model comes from train and nowhere else


def test_a_series_takes_shipped_models_whose_settings_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, 'train', lambda p, folder, seed, **kw: (folder, seed))
    cell = varied(preset('dose.slow'))[1]
    assert all(map(torch.equal, model_of(cell, tmp_path).parameters(), pretrained('mnist/entangled_slow', 1).parameters())) and not model_of(cell, tmp_path).training
    assert not all(map(torch.equal, model_of(cell, tmp_path).parameters(), pretrained('mnist/entangled_slow', 0).parameters()))
    for other in varied(preset('dose.slow', beta='2'))[1], varied(preset('dose.slow', train='train.quick'))[1], varied(preset('dose.slow', seeds='5'))[0]:
        assert model_of(other, tmp_path) == (folder_of(other, tmp_path), other['seed'])


def test_likeness_of_a_linear_model():
    "mu = Wx, sigma = 1/2, decoder W^T: slopes are singular values; orthonormal rows: the error is what the projection leaves out."
    W = torch.linalg.qr(torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)))[0].T
    class Linear:
        n_c = 0
        encode = lambda self, x: (x.flatten(1) @ W.T*4,)
        posterior = lambda self, x: Posterior(Normal(x.flatten(1) @ W.T*4, .5))
        decode = lambda self, code: (code/4 @ W).view(-1, 1, 32, 32)
        __call__ = lambda self, x: self.decode(self.posterior(x).mode)
    x = torch.randint(256, (1000, 1, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = likeness(Linear(), ImageData(x, torch.arange(1000) % 10), n=5)
    left = (x.flatten(1)/255) - (x.flatten(1)/255) @ W.T @ W
    assert abs(found['decoder_slope'] - 1/4) < 1e-4 and abs(found['slope'] - 4) < 1e-3 and abs(found['slope_sd'] - 8) < 1e-3 and found['sd'] == .5 and abs(found['error'] - left.norm(dim=1).mean()) < 1e-3
    assert found['tc'] < .02 and found['margin'] > 0


def test_gaps_of_a_job_are_compare_s_for_each_attack():
    rows = [{'model': m, 'seed': s, 'attack': a, 'source': k, 'target': (k + 1) % 10, 'kept': 10, 'missed': miss + s, 'hit': 0}
            for a, shift in (('x', 0), ('y', 2)) for m, miss in (('disentangled', 2 + shift), ('entangled', 5)) for s in range(3) for k in range(10)]
    t = gaps(pd.DataFrame(rows)).set_index('attack')
    assert abs(t.loc['x', 'difference'] + 30) < 1e-9 and abs(t.loc['y', 'difference'] + 10) < 1e-9 and (t.seeds == 3).all()
    assert len(gaps(pd.DataFrame([r for r in rows if r['seed'] == 0]))) == 0


def test_a_partial_correlation_finds_the_effect_behind_a_confounder():
    "y = x - 3c with x and c positively correlated: x and y go apart in general, and together once c is given."
    rng = np.random.default_rng(0)
    c = rng.normal(size=2000)
    x = c + rng.normal(size=2000)
    y = x - 3*c
    assert partial_rank(x, y) < -.2 and partial_rank(x, y, c) > .9
    assert abs(partial_rank(np.exp(x), y**3, c) - partial_rank(x, y, c)) < 1e-9                     # ranks do not care for units


def test_an_association_draws_settings_and_not_models():
    "Ten settings of three models each that are all alike: the interval is that of ten points, not of thirty."
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 10))
    t = pd.DataFrame({'dose': 'd', 'value': np.repeat(range(10), 3), 'a': np.repeat(a, 3), 'b': np.repeat(b, 3)})
    rho, low, high = association(t, 'a', 'b', n=300)
    alone = t.assign(value=range(30))
    _, low_30, high_30 = association(alone, 'a', 'b', n=300)
    assert abs(rho - pd.Series(a).corr(pd.Series(b), 'spearman')) < 1e-9 and low < rho < high and high - low > 1.3*(high_30 - low_30)


def of(dose, seeds, rate, value=1): return pd.DataFrame({'dose': dose, 'value': value, 'seed': range(seeds), 'rate': rate})


@pytest.mark.parametrize('new, now, left', [
    (of('b', 1, 9.), {}, {('a', 1): 1., ('b', 1): 9.}),                              # another series leaves the first as it was
    (of('a', 2, 9.), {}, {('a', 1): 1.}),                                            # fewer seeds than there were
    (of('a', 3, 9.), {}, {('a', 1): 9.}),
    (of('a', 3, 9., value=2), {}, {('a', 1): 1., ('a', 2): 9.}),
    (of('b', 1, 9.), {'a': {'beta': 2}}, {('b', 1): 9.}),                            # the preset was changed since
    (of('b', 1, 9.), {'a': None}, {('b', 1): 9.})])
def test_a_series_computed_again_does_not_cost_the_others_their_rows(tmp_path, new, now, left):
    save_csv(of('a', 3, 1.), 'dose', tmp_path, a={'beta': 1})
    t = beside(new, tmp_path/'dose.csv', {'a': {'beta': 1}, 'b': {}} | now)
    assert {k: g.rate.unique().item() for k, g in t.groupby(['dose', 'value'])} == left
    pd.testing.assert_frame_equal(beside(new, tmp_path/'none.csv', {}), new)


def test_publishing_one_series_keeps_the_published_others(tmp_path, monkeypatch):
    save_csv(of('beta', 3, 1.), 'dose', tmp_path, beta=preset('dose.beta').model_dump())
    monkeypatch.setattr(verdict, 'dosed', lambda names, row_of, runs: of('tc', 3, 2.))
    publish_doses(None, tmp_path, tmp_path)
    t = publish_doses(None, tmp_path, tmp_path)                                      # a second time: its own provenance is read back
    assert t.groupby('dose').rate.unique().explode().to_dict() == {'beta': 1, 'tc': 2}
    pd.testing.assert_frame_equal(read_table(tmp_path/'dose.csv'), t)
