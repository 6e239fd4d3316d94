import json

import numpy as np, pandas as pd, pytest, torch
from statistics import NormalDist
from torch import nn

from vae_robust import robustness
from vae_robust.data import ImageData, load
from vae_robust.attacks import logits
from vae_robust.robustness import NETWORKS, exchange_rates, shifted, trial, cell, counts, cut, evaluate, judged, lenet, mean_rate, pairs, rates, reconstruct, train_judge, wilson
from vae_robust.settings import preset


@pytest.mark.parametrize('k, n', [(0, 10), (10, 10), (3, 17), (812, 1000)])
def test_wilson_interval_by_its_formula(k, n):
    z = NormalDist().inv_cdf(.975)
    centre, half = (k + z*z/2)/(n + z*z), z/(n + z*z)*(k*(n - k)/n + z*z/4)**.5
    np.testing.assert_allclose(wilson(k, n), (centre - half, centre + half), atol=1e-9)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0, 1)


def table(*rows):
    return counts(*map(torch.tensor, zip(*rows)))


def test_rates_count_kept_pairs_only():
    t = table((3, 8, 3, 8), (3, 8, 3, 3), (3, 8, 3, 1), (3, 8, 5, 8), (3, 8, 8, 8))      # source, target, before, after
    assert t.values.tolist() == [[3, 8, 3, 2, 1]]
    r = rates(t).iloc[0]
    np.testing.assert_allclose([r.as_ignore, r.as_target], [100*2/3, 100/3])
    np.testing.assert_allclose([r.as_ignore_low, r.as_ignore_high], 100*np.array(wilson(2, 3)))


def test_a_pair_of_classes_with_nothing_kept_has_no_rate():
    r = rates(table((1, 2, 5, 2)))
    assert r.as_ignore.isna().all() and (r.as_ignore_low[0], r.as_ignore_high[0]) == (0, 100)


def test_target_rate_never_exceeds_ignore_target():
    rng = np.random.default_rng(0)
    s = rng.integers(10, size=5000); t = (s + rng.integers(1, 10, size=5000)) % 10
    r = counts(*map(torch.tensor, (s, t, rng.integers(10, size=5000), rng.integers(10, size=5000))))
    assert len(r) == 90 and (r.hit <= r.missed).all() and (r.missed <= r.kept).all()


def test_mean_rate_is_the_mean_of_cells_not_of_pairs():
    mean, low, high = mean_rate([10, 0, 0], [10, 90, 0])
    assert abs(mean - 50) < 1e-9 and low < 50 < high


@pytest.mark.parametrize('n', [1, 4, 10**6])
def test_pairs(n):
    y = load('digits', 'test').y
    p = pairs(y, n)
    source, target = y[p].T
    cells = pd.DataFrame({'s': source, 't': target}).value_counts()
    most = {(s, t): min(n, (y == s).sum().item(), (y == t).sum().item()) for s in range(10) for t in range(10) if s != t}
    assert {k: v for k, v in cells.items()} == most
    assert len(set(map(tuple, p.tolist()))) == len(p)
    assert torch.equal(p, pairs(y, n)) and not torch.equal(p, pairs(y, n, seed=1))


def test_cut():
    assert cut([1, 2, 3], 'ab') == ([1, 2], 'ab')


class Exact:
    "A model whose code is the image itself and whose reconstruction is perfect; classes are the pixel that is brightest."
    def encode(self, x): return x.flatten(1), None, x.new_zeros(len(x), 0)
    def posterior(self, x): return self
    def decode(self, code): return code
    def __call__(self, x): return x


def exact(monkeypatch, decode):
    "Evaluate an attack on 10 one-hot images with a judge that names the brightest pixel, reconstructing by `decode`."
    monkeypatch.setattr(robustness, 'reconstruct', lambda model, x, sample=False: decode(x))
    judge = nn.Sequential(nn.Flatten(), nn.Identity()).eval()
    test = ImageData((255*torch.eye(10)).byte().view(10, 1, 1, 10), torch.arange(10))
    return lambda **kw: evaluate(Exact(), judge, preset('attack.strong', features='means', **kw), test, progress=False)


def test_an_attack_with_room_for_everything_always_succeeds_and_one_without_never(monkeypatch):
    run = exact(monkeypatch, lambda x: x)
    everything, nothing = run(eps=1), run(eps=.4)
    assert (everything.hit == everything.kept).all() and everything.kept.sum() == 90
    assert nothing.missed.sum() == 0 and nothing.kept.sum() == 90


def test_a_constant_decoder_keeps_only_its_own_class_and_cannot_be_moved(monkeypatch):
    t = exact(monkeypatch, lambda x: torch.eye(10)[torch.full((len(x),), 7)].view(-1, 1, 1, 10))(eps=1)
    assert t[t.source == 7].kept.eq(1).all() and t[t.source != 7].kept.eq(0).all() and t.missed.sum() == 0


def test_the_zero_attack_scores_zero_on_an_untrained_model(model):
    t = evaluate(model, lenet().eval(), preset('attack.none', pairs=2), load('digits', 'test'), progress=False)
    assert t.missed.sum() == t.hit.sum() == 0


def test_the_thesis_s_switches_are_off_unless_asked_for(model, digits):
    judge = lenet().eval()
    assert torch.equal(judged(judge, digits), judged(judge, digits)) and torch.equal(reconstruct(model, digits), reconstruct(model, digits))
    assert not torch.equal(judged(judge, digits.repeat(9, 1, 1, 1), dropout=True), judged(judge, digits.repeat(9, 1, 1, 1), dropout=True))
    assert not torch.equal(reconstruct(model, digits, sample=True), reconstruct(model, digits, sample=True))
    assert not judge.training
    for name in ('attack.strong', 'attack.thesis_repaired', 'attack.none', 'attack.noise'):
        p = preset(name)
        assert not (p.dropout or p.sample or p.accumulate)


def test_sampling_leaves_the_mean_of_z_alone(model, digits):
    seen = []
    model.decode = lambda code: seen.append(code) or code
    reconstruct(model, digits, sample=True)
    torch.testing.assert_close(seen[0][:, :5], model.encode(digits)[0])
    assert set(seen[0][:, 5:].unique().tolist()) == {0., 1.}


def test_a_judge_learns_and_is_reproducible(tmp_path):
    p = preset('judge.smoke', steps=300)
    judge, test = train_judge(p, tmp_path/'a', progress=False), load('digits', 'test')
    assert not judge.training and (judged(judge, test.x/255) == test.y).float().mean() > .8
    train_judge(p, tmp_path/'b', progress=False)
    assert (tmp_path/'a'/'weights.safetensors').read_bytes() == (tmp_path/'b'/'weights.safetensors').read_bytes()


def test_a_cell_is_computed_once_and_only_for_its_own_settings(tmp_path):
    asked = []
    def compute(): asked.append(1); return pd.DataFrame({'a': [len(asked)]})
    first, again, other = (cell(tmp_path/'c.csv', s, compute) for s in ({'n': 1}, {'n': 1}, {'n': 2}))
    assert [first.a[0], again.a[0], other.a[0]] == [1, 1, 2]
    assert json.loads((tmp_path/'c.csv').read_text().splitlines()[0][2:]) == {'n': 2}


def test_a_cell_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError): cell(tmp_path/'c.csv', {}, lambda: 1/0)
    assert not list(tmp_path.iterdir())


def test_a_trial_has_a_row_for_each_pair_and_its_counts_are_evaluate_s(model):
    test, judges = load('digits', 'test'), {'one': lenet().eval(), 'two': lenet().eval()}
    a = preset('attack.strong', pairs=2, steps=3)
    t = trial(model, judges, a, test, progress=False)
    assert len(t) == 180 and (t.source != t.target).all() and (test.y[t.image.tolist()].numpy() == t.source).all()
    assert (t.objective_after <= t.objective_before).all() and (t.linf <= a.eps + 1e-6).all() and (t.l2 >= t.linf - 1e-6).all()
    for name, judge in judges.items():
        mine = counts(t.source, t.target, t[f'{name}_before'], t[f'{name}_after'])
        pd.testing.assert_frame_equal(mine, evaluate(model, judge, a, test, progress=False))


def test_relative_weights_do_not_depend_on_the_units_of_the_code(model):
    test = load('digits', 'test')
    x, x_t = (test.x[i:i + 6]/255 for i in (0, 6))
    a = preset('attack.strong', relative=True, lam=.3)
    lam = exchange_rates(model, x, x_t, a)
    before = (logits(model)(x) - logits(model)(x_t)).norm(dim=1)
    torch.testing.assert_close(lam, .3*before/(x - x_t).flatten(1).norm(dim=1))


def test_a_trial_weighs_the_norm_by_pair_if_it_is_relative(model, monkeypatch):
    seen = []
    whole = robustness.attack
    monkeypatch.setattr(robustness, 'attack', lambda *args, **kw: seen.append(kw['lam']) or whole(*args, **kw))
    for relative in (True, False): trial(model, {'j': lenet().eval()}, preset('attack.strong', pairs=1, steps=1, lam=.3, relative=relative), load('digits', 'test'), progress=False)
    assert seen[0].shape == (90,) and seen[1] is None


@pytest.mark.parametrize('network', NETWORKS)
def test_judges_are_deterministic_and_know_ten_classes(network):
    judge, x = NETWORKS[network]().eval(), torch.rand(3, 1, 32, 32)
    assert judge(x).shape == (3, 10) and torch.equal(judge(x), judge(x))


def test_shifted_moves_all_images_by_at_most_two_pixels():
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 9, 9); x[..., 4, 4] = 1
    where = {tuple(shifted(x)[i, 0].nonzero()[0].tolist()) for _ in range(300) for i in (0, 1)}
    assert where == {(i, j) for i in range(2, 7) for j in range(2, 7)}
