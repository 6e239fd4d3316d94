"""The comparison on dSprites: its arithmetic against other ways to compute it,
its tables against the shipped weights."""
import json, math
from itertools import combinations
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from scipy import stats

from vae_robust import data, training
from vae_robust.experiments import comparison
from vae_robust.experiments.comparison import (agreements, best, cells, compare, costs, differences,
                                   frames, heat, mean_costs, publish_comparison, rank_correlations, sample,
                                   save_gif, scores, shipped_models, over_seeds)
from vae_robust.data import pixels
from vae_robust.metrics import mig, udr
from vae_robust.settings import preset, read_table, write
from vae_robust.training import WEIGHTS, build, hashes
from vae_robust.vae import VAE, Posterior

FIGURES = Path(__file__).parent.parent/'figures'
TABLE = read_table(FIGURES/'comparison.csv')


# ---------------------------------------------------------------- the images
def test_the_sample_is_what_its_factors_say():
    d, again = sample(40, seed=3), sample(40, seed=3)
    assert d.x.shape == (40, 1, 64, 64)
    assert d.x.dtype == torch.uint8
    assert d.y.shape == (40, 5)
    assert torch.equal(d.x, again.x)
    assert not torch.equal(d.y, sample(40, seed=4).y)
    for x, (shape, scale, o, i, j) in zip(d.x[:, 0].numpy(), d.y.tolist()):
        ys, xs = np.nonzero(x)
        area = {0: 4*9.598**2, 1: math.pi*12.767*7.214}.get(shape)
        if area:
            assert abs(len(xs)/(area*(.5 + .1*scale)**2) - 1) < .08
        if shape < 2:
            assert abs(xs.mean() + .5 - 16 - 32*i/31) < .5
            assert abs(ys.mean() + .5 - 16 - 32*j/31) < .5
    assert set(d.x.unique().tolist()) == {0, 255}

def test_factors_are_uniform():
    v = sample(3000).y.numpy()
    for y, n in zip(v.T, (3, 6, 40, 32, 32)):
        assert stats.chisquare(np.bincount(y, minlength=n)).pvalue > 1e-4

def test_the_sample_is_that_of_the_whole_set():
    if not (data.raw_folder('dsprites')/data.BITS).exists():
        pytest.skip('dSprites has not been drawn on this machine: vae-robust data dsprites')
    d, (x, y) = sample(50), data.load('dsprites')
    row = torch.tensor(np.ravel_multi_index(d.y.numpy().T, (3, 6, 40, 32, 32)))
    assert torch.equal(y[row, 1:], d.y) and torch.equal(x[row], d.x)


# ---------------------------------------------------------------- what a model costs
@pytest.mark.parametrize('n_c', [0, 3])
def test_costs_by_the_bound_itself(n_c):
    torch.manual_seed(0)
    model, x = VAE(2, n_c, size=64).eval(), pixels(sample(6).x)
    rec, kl, total = np.mean([costs(model, x).numpy() for _ in range(20)], 0).T
    q = model.posterior(x)
    log_c = lambda c: 0 if q.c is None else q.c.log_prob(c) + math.log(3)
    draws = []
    for _ in range(4000):
        z, c = q.z.sample(), None if q.c is None else q.c.sample()
        prior = torch.distributions.Normal(0., 1.)
        draws.append((q.z.log_prob(z) - prior.log_prob(z)).sum(1) + log_c(c))
    draws = torch.stack(draws).detach()
    assert (abs(draws.mean(0).numpy() - kl) < 5*draws.std(0).numpy()/4000**.5).all()
    assert np.allclose(total, rec + kl, atol=1e-2)
    logits = model.decoder(q.mode)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction='none')
    assert np.allclose(rec, bce.sum((1, 2, 3)).detach(), rtol=.02)

def test_dw_of_a_mixture_by_quadrature():
    # half of the images at -1, half at 1; the second latent always at 2
    means = torch.tensor([[-1., 2.], [1., 2.]]).repeat(200, 1)
    class Model:
        def posterior(self, x):
            return Posterior(torch.distributions.Normal(means, torch.tensor([.5, 1.])))
    line = np.linspace(-8, 8, 8001)
    p = (stats.norm.pdf(line, -1, .5) + stats.norm.pdf(line, 1, .5))/2
    exact = np.trapezoid(p*(np.log(p + 1e-300) - stats.norm.logpdf(line)), line) + 2**2/2
    value, error = comparison.dw(Model(), means)
    assert abs(value - exact) < 5*error < 1

def test_mean_costs_do_not_depend_on_batches_or_touch_random_numbers():
    model, x = VAE(2, size=64).eval(), sample(12).x
    state = torch.get_rng_state()
    t = mean_costs(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert t.equals(mean_costs(model, x))
    assert list(t.index) == ['reconstruction', 'KL', '-ELBO']
    assert t.value['KL'] == pytest.approx(mean_costs(model, x, batch=5).value['KL'], rel=1e-5)

@pytest.mark.parametrize('name, extra', [('tc', []), ('joint', ['shape accuracy'])])
def test_scores_of_a_network(name, extra):
    d = sample(60)
    t = scores(build(preset(f'dsprites.{name}')).eval(), d.x, d.y.numpy(), halves=0)
    assert list(t.columns) == ['measure', 'value', 'error']
    assert t.measure.is_unique
    assert np.isfinite(t.value).all()
    assert {'MIG', 'MIG, no shape', 'SAP', 'DCI disentanglement', 'FactorVAE', 'reconstruction',
            'KL', *extra} <= set(t.measure)
    assert ('shape accuracy' in set(t.measure)) == bool(extra)

def test_mig_without_shape_does_not_look_at_the_shape():
    v = sample(400).y.numpy()
    z = v[:, 1:] + .0
    assert comparison.mig_no_shape(z, v, halves=0) == mig(z, v[:, 1:], halves=0)
    assert comparison.mig_no_shape(z, v, halves=0).value > mig(z, v, halves=0).value + .1


# ---------------------------------------------------------------- tables
def toy(values):
    "Scores {model: [value per seed]} as a tidy table."
    return pd.DataFrame([(m, s, 'MIG', x, 0.)
                         for m, xs in values.items() for s, x in enumerate(xs)],
                        columns=['model', 'seed', 'measure', 'value', 'error'])

def test_the_interval_is_that_of_the_t_test():
    xs = [.1, .25, .13]
    row = over_seeds(toy({'vae': xs, 'tc': [.3]})).set_index('model')
    low, high = stats.ttest_1samp(xs, 0).confidence_interval(.95)
    assert row.loc['vae', 'mean'] == pytest.approx(np.mean(xs))
    assert row.half['vae'] == pytest.approx((high - low)/2)
    assert math.isnan(row.half['tc']) and row.n.tolist() == [3, 1]

def test_differences_are_taken_seed_by_seed():
    d = differences(toy({'vae': [.1, .2], 'tc': [.4, .2], 'beta': [.1]}))
    assert d.tc.tolist() == pytest.approx([.3, 0])
    assert d.beta[0] == 0
    assert math.isnan(d.beta[1])
    assert 'vae' not in d

def test_best_is_the_largest():
    assert best(toy({'vae': [.1, .3, .2], 'tc': [.4, .2]})) == {'vae': 1, 'tc': 0}

def test_rank_correlations_by_counting_pairs_of_ranks():
    rng = np.random.default_rng(0)
    names = ['a', 'b', 'c', 'same', 'some']
    t = pd.DataFrame([(m, 0, k, float(rng.normal()) if k != 'same' else 1.)
                      for m in range(8) for k in names if k != 'some' or m < 3],
                     columns=['model', 'seed', 'measure', 'value'])
    rho, n = rank_correlations(t)
    assert n == 8  # neither what never varies nor what not all have
    assert list(rho) == ['a', 'b', 'c']
    for a, b in combinations('abc', 2):
        x, y = (t[t.measure == k].sort_values('model').value.values for k in (a, b))
        rank = lambda z: np.array([(z < u).sum() for u in z])
        assert rho.loc[a, b] == pytest.approx(1 - 6*((rank(x) - rank(y))**2).sum()/(8*63))


# ---------------------------------------------------------------- computed once
@pytest.fixture
def small(monkeypatch):
    """The comparison of two objectives on 60 images,
    with untrained models in the place of trained ones; a list of the trainings asked for."""
    asked = []
    def train(p, folder, seed, every):
        asked.append((p.objective, seed))
        write(Path(folder)/'curves.csv', 'step,loss,rec,kl_z0,kl_z1,kl_c\n100,9,7,1,.5,.25\n')
        return build(p, seed=seed).eval()
    monkeypatch.setattr(comparison, 'train', train)
    monkeypatch.setattr(comparison, 'sample', lambda n=60, seed=0: sample(60))
    monkeypatch.setattr(comparison, 'NAMES', {'vae': 'VAE', 'factor': 'FactorVAE'})
    return asked

def test_compare_trains_scores_and_resumes(small, tmp_path, monkeypatch):
    t = compare(tmp_path/'runs', (0, 1), tmp_path/'figures')
    files = [tmp_path/'figures'/f'{n}.csv' for n in ('comparison', 'comparison_curves')]
    assert small[:4] == [('elbo', 0), ('factor', 0), ('elbo', 1), ('factor', 1)]
    assert all(f.read_text().startswith('# {"commit"') for f in files)
    assert json.loads(files[0].read_text().split('\n')[0][2:])['seeds'] == [0, 1]
    pd.testing.assert_frame_equal(read_table(files[0]), t.reset_index(drop=True), check_dtype=False)
    assert read_table(files[1])[['reconstruction', 'KL']].values.tolist() == 4*[[7, 1.75]]
    assert (set(map(tuple, t[['model', 'seed']].values))
            == {(n, s) for n in ('vae', 'factor') for s in (0, 1)})
    assert (t.measure == 'UDR').sum() == 4
    assert not t.duplicated(['model', 'seed', 'measure']).any()
    def never(cell, runs): raise AssertionError('computed twice')
    monkeypatch.setattr(comparison, 'compute', never)
    pd.testing.assert_frame_equal(compare(tmp_path/'runs', (0, 1), tmp_path/'again'), t)

def test_publish_takes_what_is_there(small, tmp_path):
    compare(tmp_path, (0,), tmp_path/'figures')
    t = publish_comparison(tmp_path, tmp_path/'figures', (0, 1, 2))
    assert set(t.seed) == {0} and 'UDR' not in set(t.measure)

def test_agreements_are_udr_of_all_seeds(monkeypatch):
    models = {s: VAE(3, size=64).eval() for s in range(3)}
    monkeypatch.setattr(comparison, 'model_of', lambda name, seed, runs: models[seed])
    d = sample(100)
    monkeypatch.setattr(comparison, 'sample', lambda n: d)
    with torch.no_grad():
        want = udr([m.posterior(pixels(d.x)) for m in models.values()], halves=0).value
    assert np.allclose(agreements('vae', [0, 1, 2], None).value, want, atol=1e-5)

def test_a_changed_preset_is_another_cell(monkeypatch):
    before, whole = cells((0,)), comparison.preset
    monkeypatch.setattr(comparison, 'preset', lambda name: whole(name, steps=7))
    assert len(before) == 6 and not [c for c in cells((0,)) if c in before]


# ---------------------------------------------------------------- what is shipped
@pytest.mark.slow
def test_committed_scores_are_those_of_the_shipped_weights():
    models, d = shipped_models(), sample()
    assert set(models) == set(TABLE.model)
    seeds = {f.split('/')[1]: int(f.split('seed')[1].split('.')[0])
             for f in hashes() if f.startswith('dsprites/')}
    assert seeds == best(TABLE)
    for n in models:
        mine = TABLE[(TABLE.model == n) & (TABLE.seed == seeds[n])]
        row = lambda k: mine[mine.measure == k].value.item()
        with torch.no_grad():
            q = models[n].posterior(pixels(d.x[:1500]))
        found = mig(q, d.y[:1500].numpy(), halves=0).value
        assert abs(found - row('MIG')) < .03  # fewer images: the histograms' bias is larger
        t = mean_costs(models[n], d.x[:1500])
        assert abs(t.value['KL'] - row('KL')) < 5*t.error['KL']
        assert abs(t.value['reconstruction'] - row('reconstruction')) < 5*t.error['reconstruction']

def test_shipped_files_are_small_and_have_no_discriminator():
    files = sorted((WEIGHTS/'dsprites').rglob('*.safetensors'))
    assert len(files) == TABLE.model.nunique()
    for f in files:
        assert f.stat().st_size <= 2e6
        assert not [k for k in training.read_weights(f)[0] if 'discriminator' in k]

def test_every_row_of_the_table_is_there_once():
    assert not TABLE.duplicated(['model', 'seed', 'measure']).any()
    assert np.isfinite(TABLE.value).all()
    done = TABLE[['model', 'seed']].drop_duplicates()
    for k in ('MIG', 'MIG, samples', 'DCI completeness', 'SAP', 'FactorVAE', 'beta-VAE',
              'modularity', 'TC', 'reconstruction'):
        assert (TABLE.measure == k).sum() == len(done)
    bounds = TABLE.pivot(index=['model', 'seed'], columns='measure', values='value')
    assert np.allclose(bounds['-ELBO'], bounds['KL'] + bounds['reconstruction'], atol=1e-3)


# ---------------------------------------------------------------- pictures
class Stub:
    "Decodes a code into an image whose first pixels are the code; latent 1 has the larger KL."
    n_z, n_c = 3, 0
    def posterior(self, x):
        mu = torch.tensor([[.1, 3., .5]]).expand(len(x), 3)
        return Posterior(torch.distributions.Normal(mu, torch.ones_like(mu)))
    def decode(self, code):
        image = torch.zeros(len(code), 1, 64, 64)
        image[:, 0, 0, :3] = code/4
        return image

def test_frames_move_one_latent_at_a_time_the_most_informative_first():
    shown = frames(Stub(), torch.zeros(2, 1, 64, 64), torch.tensor([0., 2.]))
    assert len(shown) == 2 and shown[0].shape == (128, 192) and shown[0].dtype == np.uint8
    base = np.array([.1, 3, .5])
    for value, picture in zip((0, 2), shown):
        for column, j in enumerate((1, 2, 0)):
            want = base.copy()
            want[j] = value
            for row in (0, 64):
                assert np.allclose(picture[row, 64*column:64*column + 3],
                                   np.round(want/4*255), atol=1)

def test_heat_is_the_information_of_sorted_latents():
    d = sample(200)
    model = build(preset('dsprites.joint')).eval()
    I, names = heat(model, d)
    assert I.shape == (7, 5)
    assert names[-1] == 'c'
    assert sorted(names[:-1]) == [f'z{j}' for j in range(6)]
    assert (I >= 0).all()

def test_a_gif_goes_there_and_back_and_says_where_it_comes_from(tmp_path):
    pictures = [np.full((8, 8), v, np.uint8) for v in (0, 100, 255)]
    save_gif(pictures, 'toy', tmp_path, preset='x')
    with Image.open(tmp_path/'toy.gif') as g:
        assert json.loads(g.info['comment'])['preset'] == 'x'
        assert g.n_frames == 4
        assert g.info['loop'] == 0
        shown = [(g.seek(i), np.array(g.convert('L')).mean())[1] for i in range(4)]
    assert shown[1] == shown[3] and shown[0] < 12 and shown[2] > 243 and abs(shown[1] - 100) <= 12

def test_committed_gifs():
    for n in set(TABLE.model):
        f = FIGURES/f'dsprites_{n}.gif'
        with Image.open(f) as g:
            assert 'commit' in json.loads(g.info['comment']) and g.n_frames > 10
        assert f.stat().st_size <= 300e3
