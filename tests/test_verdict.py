import numpy as np, pandas as pd, pytest, torch

from torch.distributions import Normal

from vae_robust import studies
from vae_robust.experiments import digits, series, tables
from vae_robust.data import ImageData
from vae_robust.settings import preset, read_table
from vae_robust.sweep import SweepError
from vae_robust.vae import Posterior
from vae_robust.experiments.series import association, model_diagnostics, partial_rank
from vae_robust.experiments.series import publish_doses, respond, sweep_table
from vae_robust.experiments.tables import compare_rates, gaps, publish_study, published
from vae_robust.experiments.tables import rates_by_seed, tidy
from vae_robust.experiments.verdict import slopes


def rows(after, before=(3, 3, 5, 5)):
    return pd.DataFrame({'source': [3, 3, 5, 5], 'target': [8, 8, 1, 1], 'residual_before': before,
                         'residual_after': after, 'objective_before': 2., 'objective_after': 1.,
                         'l2': .5})


@pytest.fixture
def study():
    """Two models, one seed, four attacks, and an answer for each: the disentangled model fails
    on one source, the other never under the first attack."""
    s = preset('study.primary', models='mnist.disentangled, mnist.entangled', seeds='0',
               judges='judge.residual')
    answers = {('disentangled', 'strong'): rows([8, 3, 1, 5], [3, 3, 5, 9]),
               ('entangled', 'strong'): rows([3, 3, 5, 5]),
               ('entangled', 'noise'): rows([3, 8, 5, 7])}
    plain = {'disentangled': rows([3, 3, 5, 5], [3, 3, 5, 9]), 'entangled': rows([3, 3, 5, 5])}
    grid = [(m, a.split('.')[1]) for m in plain for a in s.attacks]
    return s, [({'model': m, 'seed': 0, 'attack': a}, answers.get((m, a), plain[m]))
               for m, a in grid]


def test_tidy_counts_own_and_common_pairs_and_the_worst_case(study):
    t = tidy(*study)
    counts = ['source', 'kept', 'missed', 'hit']
    pick = lambda **kw: t.loc[(t[list(kw)] == pd.Series(kw)).all(axis=1), counts].values.tolist()
    assert pick(model='disentangled', attack='strong', rule='own') == [[3, 2, 1, 1], [5, 1, 1, 1]]
    assert pick(model='entangled', attack='strong', rule='own') == [[3, 2, 0, 0], [5, 2, 0, 0]]
    assert pick(model='entangled', attack='strong', rule='all') == [[3, 2, 0, 0], [5, 1, 0, 0]]
    assert pick(model='entangled', attack='worst', rule='own') == [[3, 2, 1, 1], [5, 2, 1, 0]]
    assert pick(model='entangled', attack='none', rule='own') == [[3, 2, 0, 0], [5, 2, 0, 0]]


def test_unfinished_cells_are_left_out_and_common_pairs_and_the_worst_case_need_all(study):
    s, answers = study
    t = tidy(s, [a for a in answers if a[0]['model'] == 'disentangled'])
    assert set(t.model) == {'disentangled'} and set(t.rule) == {'own'} and 'worst' in set(t.attack)
    t = tidy(s, answers[1:])
    assert set(t[t.attack == 'worst'].model) == {'entangled'}


def test_axes_are_columns_of_numbers_words_and_truths(study):
    s = preset('study.relative', models='mnist.entangled', judges='judge.residual')
    labels = {'model': 'entangled', 'seed': 0, 'attack': 'strong', 'features': 'logits',
              'relative': 'true'}
    t = tidy(s, [(labels | {'lam': v}, study[1][0][1]) for v in ('0.1', '2')])
    assert set(t.lam) == {.1, 2} and set(t.relative) == {True} and set(t.features) == {'logits'}
    assert 'worst' not in set(t.attack)


def test_what_is_published_can_be_read_and_keeps_what_another_machine_has(study, tmp_path,
                                                                          monkeypatch):
    s, answers = study
    toy = lambda name, **kw: s if name.startswith('study') else preset(name, **kw)
    monkeypatch.setattr(tables, 'preset', toy)
    monkeypatch.setattr(tables, 'answered', lambda asked, runs: answers)
    t = publish_study('toy', tmp_path, tmp_path)
    pd.testing.assert_frame_equal(published('toy', tmp_path), t, check_dtype=False)
    monkeypatch.setattr(tables, 'answered', lambda asked, runs: answers[:1])
    again = publish_study('toy', tmp_path, tmp_path)
    by = [*t.columns[:6]]
    assert again.set_index(by).sort_index().equals(t.set_index(by).sort_index())


def test_compare_two_models():
    t = pd.DataFrame([{'model': m, 'seed': s, 'source': k, 'kept': 10, 'missed': miss + s}
                      for m, miss in (('disentangled', 2), ('entangled', 5))
                      for s in range(3) for k in range(10)])
    c = compare_rates(t)
    assert abs(c['difference'] + 30) < 1e-9 and c['low'] < -30 < c['high'] < 0
    assert c['low_boot'] <= -30 <= c['high_boot'] and c['seeds'] == 3
    assert rates_by_seed(t).rate.tolist() == [20, 30, 40, 50, 60, 70]


def test_the_bootstrap_compares_the_first_seeds_if_one_model_has_more():
    "Of four seeds of one model, and two of the other, the first two: as if there were no more."
    rates = {'disentangled': (1, 3, 90, 95), 'entangled': (50, 54)}
    t = pd.DataFrame([{'model': m, 'seed': s, 'source': k, 'kept': 100, 'missed': r + k}
                      for m, each in rates.items() for s, r in enumerate(each) for k in range(3)])
    of = lambda c: (c['low_boot'], c['high_boot'], c['seeds'])
    assert of(compare_rates(t)) == of(compare_rates(t[t.seed < 2])) != of(compare_rates(
        t[(t.seed > 1) | (t.model == 'entangled')]))
    assert compare_rates(t)['high_boot'] < -40


def test_slopes_of_a_linear_encoder():
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    x, x_t = torch.rand(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    encoder = lambda x: x.flatten(1) @ w
    d = encoder(x - x_t)
    by_hand = ((d/d.norm(dim=1, keepdim=True)) @ w.T).norm(dim=1)
    torch.testing.assert_close(slopes(encoder, x, x_t, preset('attack.strong')), by_hand)


def test_a_series_trains_its_models_once_and_tells_them_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, 'portrait', lambda *a, **kw: {'rec': 1.})
    d = preset('dose.beta', models='digits.entangled', judges='judge.smoke', train='train.smoke',
               seeds='0, 1', attacks='attack.noise', pairs='1', **{'model.beta': '1, 4'})
    respond(d, tmp_path, jobs=1, progress=False)
    assert len({f.parent.parent for f in tmp_path.rglob('seed*/weights.safetensors')}) == 2
    table, keys = sweep_table({'beta': d}, tmp_path)
    labels = table[['dose', 'key', 'value', 'seed']].values.tolist()
    assert labels == [['beta', 'beta', v, s] for v in (1, 4) for s in (0, 1)]
    assert table.udr.between(0, 1).all()
    assert {'as_noise', 'J_noise', 'slope', 'margin', 'error', 'tc'} <= set(table)
    assert [*keys] == ['beta 1', 'beta 4']
    monkeypatch.setattr(studies, 'trial', None)
    respond(d, tmp_path, jobs=1, progress=False)  # nothing is left to do
    lost = next(f for f in (tmp_path/'cells').glob('*.csv') if '"noise": 1.0' in f.read_text())
    lost.unlink()
    table, _ = sweep_table({'beta': d}, tmp_path)
    assert len(table) == 3  # a model without all its answers has no row
    with pytest.raises(SweepError, match='1 of 4 cells failed'):
        respond(d, tmp_path, jobs=1, progress=False)


def test_diagnostics_of_a_linear_model():
    """mu = Wx, sigma = 1/2, decoder W^T: slopes are singular values; orthonormal rows: the error
    is what the projection leaves out."""
    W = torch.linalg.qr(torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)))[0].T
    class Linear:
        n_c = 0
        encode = lambda self, x: (x.flatten(1) @ W.T*4,)
        posterior = lambda self, x: Posterior(Normal(x.flatten(1) @ W.T*4, .5))
        decode = lambda self, code: (code/4 @ W).view(-1, 1, 32, 32)
        __call__ = lambda self, x: self.decode(self.posterior(x).mode)
    x = torch.randint(256, (1000, 1, 32, 32), generator=torch.Generator().manual_seed(1),
                      dtype=torch.uint8)
    found = model_diagnostics(Linear(), ImageData(x, torch.arange(1000) % 10), n=5)
    grey = x.flatten(1)/255
    left = grey - grey @ W.T @ W
    assert abs(found['decoder_slope'] - 1/4) < 1e-4 and abs(found['slope'] - 4) < 1e-3
    assert abs(found['slope_sd'] - 8) < 1e-3 and found['sd'] == .5
    assert abs(found['error'] - left.norm(dim=1).mean()) < 1e-3
    assert found['tc'] < .02 and found['margin'] > 0


def test_gaps_of_a_job_compare_rates_for_each_attack():
    rows = [{'model': m, 'seed': s, 'attack': a, 'source': k, 'target': (k + 1) % 10, 'kept': 10,
             'missed': miss + s, 'hit': 0}
            for a, shift in (('x', 0), ('y', 2))
            for m, miss in (('disentangled', 2 + shift), ('entangled', 5))
            for s in range(3) for k in range(10)]
    t = gaps(pd.DataFrame(rows)).set_index('attack')
    assert abs(t.loc['x', 'difference'] + 30) < 1e-9 and abs(t.loc['y', 'difference'] + 10) < 1e-9
    assert (t.seeds == 3).all()
    assert len(gaps(pd.DataFrame([r for r in rows if r['seed'] == 0]))) == 0


def test_a_partial_correlation_finds_the_effect_behind_a_confounder():
    """y = x - 3c with x and c positively correlated: x and y go apart in general, and together
    once c is given."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=2000)
    x = c + rng.normal(size=2000)
    y = x - 3*c
    assert partial_rank(x, y) < -.2 and partial_rank(x, y, c) > .9
    # ranks do not care for units
    assert abs(partial_rank(np.exp(x), y**3, c) - partial_rank(x, y, c)) < 1e-9


def test_an_association_draws_settings_and_not_models():
    """Ten settings of three models each that are all alike: the interval is that of ten points,
    not of thirty."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 10))
    t = pd.DataFrame({'dose': 'd', 'value': np.repeat(range(10), 3), 'a': np.repeat(a, 3),
                      'b': np.repeat(b, 3)})
    rho, low, high = association(t, 'a', 'b', n=300)
    alone = t.assign(value=range(30))
    _, low_30, high_30 = association(alone, 'a', 'b', n=300)
    assert abs(rho - pd.Series(a).corr(pd.Series(b), 'spearman')) < 1e-9 and low < rho < high
    assert high - low > 1.3*(high_30 - low_30)


def of(dose, seeds, rate, value=1):
    return pd.DataFrame({'dose': dose, 'value': value, 'seed': range(seeds), 'rate': rate})


@pytest.mark.parametrize('new, keys, left', [
    (of('b', 1, 9.), {}, {('a', 1): 1., ('b', 1): 9.}),  # another series leaves the first as it was
    (of('a', 2, 9.), {}, {('a', 1): 1.}),  # fewer seeds than there were
    (of('a', 3, 9.), {}, {('a', 1): 9.}),
    (of('a', 3, 9., value=2), {}, {('a', 1): 1., ('a', 2): 9.}),
    (of('b', 1, 9.), {'a 1': 'other'}, {('b', 1): 9.})])  # the question was changed since
def test_a_series_computed_again_does_not_cost_the_others_their_rows(tmp_path, monkeypatch, new,
                                                                     keys, left):
    now = {'a 1': 'x', 'a 2': 'y', 'b 1': 'z'}
    monkeypatch.setattr(series, 'sweep_table', lambda doses, runs: (of('a', 3, 1.), now))
    publish_doses(tmp_path, tmp_path)
    monkeypatch.setattr(series, 'sweep_table', lambda doses, runs: (new, now | keys))
    t = publish_doses(tmp_path, tmp_path)
    assert {k: g.rate.unique().item() for k, g in t.groupby(['dose', 'value'])} == left
    pd.testing.assert_frame_equal(read_table(tmp_path/'dose.csv'), t)
