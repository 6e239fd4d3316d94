import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from pydantic import BaseModel
from scipy.stats import t as student
from torch import nn
from torch.distributions import Normal

from vae_robust import diagnosis, robustness
from vae_robust.data import ImageData, load, pixels
from vae_robust.objectives import AttackError, logits, means
from vae_robust.diagnosis import (blind_is_better, diagnose, hidden_by_code, in_training_mode,
                                  knowing, left_the_ball, masked_by_code, no_better_than_noise,
                                  not_converged, not_monotone, stochastic, trials_of,
                                  without_slope)
from vae_robust.judges import agreement
from vae_robust.robustness import (against_radius, auddc, jacobians, kept, margins, spectrum, ssim,
                                   stays_within, tally, together, transfer, worst)
from vae_robust.statistics import bootstrap, interval, t_interval, welch
from vae_robust.judges import JUDGE_NETWORKS, pretrained_judge, shifted, judged, lenet, train_judge
from vae_robust.attacks import attack, relative_weights
from vae_robust.robustness import trial, counts, cut, evaluate, pairs, rates, reconstruct
from vae_robust.statistics import mean_rate, wilson
from vae_robust.settings import preset
from vae_robust.training import pretrained
from vae_robust.vae import Posterior


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
    # source, target, before, after
    t = table((3, 8, 3, 8), (3, 8, 3, 3), (3, 8, 3, 1), (3, 8, 5, 8), (3, 8, 8, 8))
    assert t.values.tolist() == [[3, 8, 3, 2, 1]]
    r = rates(t).iloc[0]
    np.testing.assert_allclose([r.as_ignore, r.as_target], [100*2/3, 100/3])
    np.testing.assert_allclose([r.as_ignore_low, r.as_ignore_high], 100*np.array(wilson(2, 3)))


def test_a_pair_of_classes_with_nothing_kept_has_no_rate():
    r = rates(table((1, 2, 5, 2)))
    assert r.as_ignore.isna().all() and (r.as_ignore_low[0], r.as_ignore_high[0]) == (0, 100)


def test_target_rate_never_exceeds_ignore_target():
    rng = np.random.default_rng(0)
    s = rng.integers(10, size=5000)
    t = (s + rng.integers(1, 10, size=5000)) % 10
    r = counts(*map(torch.tensor, (s, t, rng.integers(10, size=5000), rng.integers(10, size=5000))))
    assert len(r) == 90 and (r.hit <= r.missed).all() and (r.missed <= r.kept).all()


def test_mean_rate_is_the_mean_of_cells_not_of_pairs():
    mean, low, high = mean_rate([10, 0, 0], [10, 90, 0])
    assert abs(mean - 50) < 1e-9 and low < 50 < high


@pytest.mark.parametrize('cells', [1, 4, 25])
def test_the_interval_of_a_mean_rate_is_that_of_independent_cells(cells):
    "1.96 standard deviations of a mean of `cells` proportions, each of 1,000 coins."
    mean, low, high = mean_rate([500]*cells, [1000]*cells)
    half = 100*1.96*(.25/1000/cells)**.5
    assert mean == 50 and [mean - low, high - mean] == pytest.approx([half]*2, rel=1e-3)


@pytest.mark.parametrize('n', [1, 4, 10**6])
def test_pairs(n):
    y = load('digits', 'test').y
    p = pairs(y, n)
    source, target = y[p].T
    cells = pd.DataFrame({'s': source, 't': target}).value_counts()
    most = {(s, t): min(n, (y == s).sum().item(), (y == t).sum().item()) for s in range(10)
            for t in range(10) if s != t}
    assert {k: v for k, v in cells.items()} == most
    assert len(set(map(tuple, p.tolist()))) == len(p)
    assert torch.equal(p, pairs(y, n)) and not torch.equal(p, pairs(y, n, seed=1))


def test_cut():
    assert cut([1, 2, 3], 'ab') == ([1, 2], 'ab')


class Exact:
    """A model whose code is the image itself and whose reconstruction is perfect; classes are
    the pixel that is brightest."""
    def encode(self, x): return x.flatten(1), None, x.new_zeros(len(x), 0)
    def posterior(self, x): return self
    def decode(self, code): return code
    def __call__(self, x): return x


def exact(monkeypatch, decode):
    """Evaluate an attack on 10 one-hot images with a judge that names the brightest pixel,
    reconstructing by `decode`."""
    monkeypatch.setattr(robustness, 'reconstruct', lambda model, x, sample=False: decode(x))
    judge = nn.Sequential(nn.Flatten(), nn.Identity()).eval()
    test = ImageData((255*torch.eye(10)).byte().view(10, 1, 1, 10), torch.arange(10))
    return lambda **kw: evaluate(Exact(), judge, preset('attack.strong', features='means', **kw),
                                 test, progress=False)


def test_an_attack_with_room_for_everything_always_succeeds_and_one_without_never(monkeypatch):
    run = exact(monkeypatch, lambda x: x)
    everything, nothing = run(eps=1), run(eps=.4)
    assert (everything.hit == everything.kept).all() and everything.kept.sum() == 90
    assert nothing.missed.sum() == 0 and nothing.kept.sum() == 90


def test_a_constant_decoder_keeps_only_its_own_class_and_cannot_be_moved(monkeypatch):
    t = exact(monkeypatch,
              lambda x: torch.eye(10)[torch.full((len(x),), 7)].view(-1, 1, 1, 10))(eps=1)
    assert t[t.source == 7].kept.eq(1).all() and t[t.source != 7].kept.eq(0).all()
    assert t.missed.sum() == 0


def test_the_zero_attack_scores_zero_on_an_untrained_model(model):
    t = evaluate(model, lenet().eval(), preset('attack.none', pairs=2), load('digits', 'test'),
                 progress=False)
    assert t.missed.sum() == t.hit.sum() == 0


def test_the_thesis_s_switches_are_off_unless_asked_for(model, digits):
    judge = lenet().eval()
    assert torch.equal(judged(judge, digits), judged(judge, digits))
    assert torch.equal(reconstruct(model, digits), reconstruct(model, digits))
    assert not torch.equal(judged(judge, digits.repeat(9, 1, 1, 1), dropout=True),
                           judged(judge, digits.repeat(9, 1, 1, 1), dropout=True))
    assert not torch.equal(reconstruct(model, digits, sample=True),
                           reconstruct(model, digits, sample=True))
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
    one, two = ((tmp_path/run/'weights.safetensors').read_bytes() for run in 'ab')
    assert one == two


def test_a_trial_has_a_row_for_each_pair_and_its_counts_are_evaluate_s(model):
    test, judges = load('digits', 'test'), {'one': lenet().eval(), 'two': lenet().eval()}
    a = preset('attack.strong', pairs=2, steps=3)
    t = trial(model, judges, a, test, progress=False)
    assert len(t) == 180 and (t.source != t.target).all()
    assert (test.y[t.image.tolist()].numpy() == t.source).all()
    assert (t.objective_after <= t.objective_before).all() and (t.linf <= a.eps + 1e-6).all()
    assert (t.l2 >= t.linf - 1e-6).all()
    for name, judge in judges.items():
        mine = counts(t.source, t.target, t[f'{name}_before'], t[f'{name}_after'])
        pd.testing.assert_frame_equal(mine, evaluate(model, judge, a, test, progress=False))


def test_a_trial_in_portions_is_the_same_trial(model, monkeypatch):
    test, judges = load('digits', 'test'), {'j': lenet().eval()}
    a = preset('attack.strong', pairs=2, steps=3, relative=True, lam=.3)
    whole, sizes, attack = trial(model, judges, a, test, progress=False), [], robustness.attack
    monkeypatch.setattr(robustness, 'PORTION', 70)
    monkeypatch.setattr(robustness, 'attack', lambda m, x, *args,
                        **kw: sizes.append(len(x)) or attack(m, x, *args, **kw))
    pd.testing.assert_frame_equal(trial(model, judges, a, test, progress=False), whole, rtol=1e-4)
    assert sizes == [70, 70, 40]


def test_each_portion_of_a_trial_has_noise_of_its_own(model, monkeypatch):
    test, judges = load('digits', 'test'), {'j': lenet().eval()}
    a, seeds, drawn = preset('attack.none', pairs=2, noise=1., sample=True), [], []
    attack, verdicts = robustness.attack, robustness.verdicts
    monkeypatch.setattr(robustness, 'PORTION', 70)
    monkeypatch.setattr(robustness, 'attack',
                        lambda *args, seed, **kw: seeds.append(seed) or attack(*args, seed=seed, **kw))
    monkeypatch.setattr(robustness, 'verdicts',
                        lambda *args: drawn.append(args[-1]) or verdicts(*args))
    trial(model, judges, a, test, seed=5, progress=False)
    assert seeds == drawn == [5, 6, 7]


def test_relative_weights_do_not_depend_on_the_units_of_the_code(model):
    test = load('digits', 'test')
    x, x_t = (test.x[i:i + 6]/255 for i in (0, 6))
    a = preset('attack.strong', relative=True, lam=.3)
    lam = relative_weights(model, x, x_t, a)
    before = (logits(model)(x) - logits(model)(x_t)).norm(dim=1)
    torch.testing.assert_close(lam, .3*before/(x - x_t).flatten(1).norm(dim=1))


def test_an_attack_weighs_the_norm_by_pair_if_it_is_relative(model, digits):
    x, x_t = digits[:4], torch.cat([digits[:1], digits[5:8]])  # the first is its own target
    p = preset('attack.strong', steps=3, lam=.3)
    lam = relative_weights(model, x, x_t, p)
    assert lam[0] == 0 and (lam[1:] > 0).all()
    weighed = attack(model, x, x_t, p.model_copy(update={'relative': True}), progress=False)
    assert torch.equal(weighed.x, attack(model, x, x_t, p, lam=lam, progress=False).x)
    assert not torch.equal(weighed.x, attack(model, x, x_t, p, progress=False).x)
    assert weighed.nans.sum() == 0
    with pytest.raises(AttackError, match='relative = true weighs against a target'):
        away = BaseModel.model_copy(preset('attack.damage'), update={'relative': True})  # unchecked
        attack(model, x, None, away, progress=False)


@pytest.mark.parametrize('network', JUDGE_NETWORKS)
def test_judges_are_deterministic_and_know_ten_classes(network):
    judge, x = JUDGE_NETWORKS[network]().eval(), torch.rand(3, 1, 32, 32)
    assert judge(x).shape == (3, 10) and torch.equal(judge(x), judge(x))


def test_shifted_moves_all_images_by_at_most_two_pixels():
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 9, 9)
    x[..., 4, 4] = 1
    where = {tuple(shifted(x)[i, 0].nonzero()[0].tolist()) for _ in range(300) for i in (0, 1)}
    assert where == {(i, j) for i in range(2, 7) for j in range(2, 7)}


def rows(before, after, source=(3, 3, 3, 5), target=(8, 8, 1, 1)):
    return pd.DataFrame({'source': source, 'target': target, 'j_before': before, 'j_after': after})


def test_kept_pairs_of_one_model_and_of_all():
    one, two = rows([3, 3, 3, 9], [8, 3, 8, 1]), rows([3, 9, 3, 5], [3, 3, 1, 1])
    assert kept(one, 'j').tolist() == [True, True, True, False]
    both = together([one, two], 'j')
    assert both.tolist() == [True, False, True, False]
    assert tally(one, 'j')[['kept', 'missed', 'hit']].sum().tolist() == [3, 2, 1]
    assert tally(one, 'j', both)[['kept', 'missed', 'hit']].sum().tolist() == [2, 2, 1]


def test_the_worst_case_is_taken_for_each_pair():
    one, two = rows([3]*4, [8, 3, 3, 3], source=(3,)*4,
                    target=(8, 8, 1, 1)), rows([3]*4, [5, 3, 7, 1], source=(3,)*4,
                                               target=(8, 8, 1, 1))
    assert worst([one, two], 'j').j_after.tolist() == [8, 3, 7, 1]
    assert worst([two, one], 'j').j_after.tolist() == [8, 3, 7, 1]


def test_bootstrap_variance_is_unbiased():
    rng = np.random.default_rng(1)
    spread = [bootstrap(rng.normal(0, 1, (1, 4, 1)), classes=False, n=800, seed=s)[1].var()
              for s in range(400)]
    assert abs(np.mean(spread) - 1/4) < .03  # the naive bootstrap gives 3/16


def test_bootstrap_draws_classes_for_all_models_together():
    r = np.add.outer(np.zeros((2, 3)), np.arange(10.))  # two equal models, classes far apart
    mean, samples = bootstrap(r)
    assert mean.tolist() == [4.5, 4.5] and samples[:, 0].std() > .5
    assert np.abs(samples[:, 0] - samples[:, 1]).max() < 1e-9
    assert np.ptp(bootstrap(r, classes=False)[1]) < 1e-9
    low, high = interval(samples)
    assert (low < 4.5).all() and (high > 4.5).all()


def test_one_seed_has_no_spread_over_seeds():
    assert np.ptp(bootstrap(np.ones((2, 1, 10)))[1]) < 1e-12


def test_student_s_interval_by_its_formula_and_of_one_seed():
    mean, low, high = t_interval([1., 2, 6], level=.9)
    assert mean == 3
    assert np.allclose([mean - low, high - mean], student.ppf(.95, 2)*(14/2)**.5/3**.5)
    assert t_interval([4])[0] == 4 and np.isnan(t_interval([4])[1:]).all()


def test_welch_by_its_formula():
    a, b = np.array([1., 2, 4, 4, 9]), np.array([2., 3, 3.5])
    va, vb = a.var(ddof=1)/5, b.var(ddof=1)/3
    df = (va + vb)**2/(va**2/4 + vb**2/2)
    half = student.ppf(.975, df)*(va + vb)**.5
    np.testing.assert_allclose(welch(a, b)[:3],
                               (a.mean() - b.mean(), a.mean() - b.mean() - half,
                                a.mean() - b.mean() + half))


@pytest.mark.parametrize('u, v, area', [([], [], .5), ([0], [0], 0), ([.5], [1], .75),
                                        ([.5, .2], [0, .4], .2*.7 + .3*.2),
                                        ([.3, .6], [.2, .9], .3*.6 + .3*.2 + .4*.1)])
def test_auddc_by_hand(u, v, area):
    assert abs(auddc(np.array(u, float), np.array(v, float)) - area) < 1e-12


def slow_ssim(a, b, c1=1e-4, c2=9e-4):
    "(21.3) one window at a time, with numpy's weighted covariance."
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None]**2 + i**2)/4.5)
    w /= w.sum()
    def one(y, x):
        p, q = (z[y:y + 11, x:x + 11] for z in (a, b))
        C = np.cov(p.ravel(), q.ravel(), aweights=w.ravel(), ddof=0)
        mp, mq = (p*w).sum(), (q*w).sum()
        return (2*mp*mq + c1)*(2*C[0, 1] + c2)/((mp**2 + mq**2 + c1)*(C[0, 0] + C[1, 1] + c2))
    return np.mean([one(y, x) for y in range(a.shape[0] - 10) for x in range(a.shape[1] - 10)])


def test_ssim_against_a_loop_over_windows():
    a, b = torch.rand(2, 3, 2, 14, 13, generator=torch.Generator().manual_seed(0))
    want = [np.mean([slow_ssim(p.double().numpy(), q.double().numpy()) for p, q in zip(x, y)])
            for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), want, rtol=1e-3)


def test_jacobians_by_finite_differences(model, digits):
    phi, x = means(model), digits[:3].float()
    d = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    J = jacobians(phi, x)
    with torch.no_grad():
        slope = (phi(x + 1e-2*d) - phi(x - 1e-2*d))/2e-2
    torch.testing.assert_close((J @ d.flatten(1)[..., None])[..., 0], slope, rtol=5e-2, atol=5e-3)
    torch.testing.assert_close(spectrum(phi, x).square().sum(1), J.square().sum((1, 2)), rtol=1e-3,
                               atol=1e-6)


class Linear(nn.Module):
    "mu = W x, unit variance scaled by s, decoded to itself."
    def __init__(self, W, s):
        super().__init__()
        self.W, self.s = W, s
    def encode(self, x):
        return x.flatten(1) @ self.W.T, torch.full((len(x), len(self.W)),
                                                   2*math.log(self.s)), x.new_zeros(len(x), 0)
    def posterior(self, x):
        mu, lv, _ = self.encode(x)
        return Posterior(Normal(mu, (lv/2).exp()))
    def decode(self, code): return code
    def forward(self, x): return self.decode(self.posterior(x).mode)


def test_margins_of_a_linear_gaussian_model():
    W = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    m, x = Linear(W, .5).eval(), torch.rand(2, 1, 4, 4)
    torch.manual_seed(0)
    # a chi-square with two degrees of freedom: 1 - exp(-r^2/2s^2)
    p = stays_within(m, x, 1., n=4000)
    assert (p - (1 - math.exp(-2))).abs().max() < .03
    R, bound = margins(m, x, torch.full((2,), .8))
    z, s = NormalDist().inv_cdf(.8), torch.linalg.svdvals(W)
    torch.testing.assert_close(R, (.5*z/s[0]).expand(2))
    torch.testing.assert_close(bound, (.5*z/s.norm()).expand(2))
    R, _ = margins(m, x, torch.tensor([1., 0.]))  # all, or none, of a few draws: no infinite radius
    most = .5*NormalDist().inv_cdf(.999)/s[0]
    torch.testing.assert_close(R, torch.stack([most, -most]))


# ---- diagnostics: each fires on what it is for, and is silent on a sound model
def found(B=8, evaluations=10, zeros=0, nans=0):
    full = lambda v: torch.full((B,), v)
    return SimpleNamespace(evaluations=full(evaluations), zeros=full(zeros), nans=full(nans))


ball = preset('attack.strong')
x8 = torch.full((8, 1, 4, 4), .5)

@pytest.mark.parametrize('complaint, silence', [
    (lambda: in_training_mode(lenet()), lambda: in_training_mode(lenet().eval())),
    (lambda: stochastic(lenet().train(), lambda y: y, torch.rand(4, 1, 32, 32)),
     lambda: stochastic(lenet().eval(), lambda y: y, torch.rand(4, 1, 32, 32))),
    (lambda: without_slope(found(zeros=9)), lambda: without_slope(found(zeros=1))),
    (lambda: without_slope(found(nans=9)), lambda: without_slope(found())),
    (lambda: left_the_ball(x8 + .11, x8, ball), lambda: left_the_ball(x8 + .1, x8, ball)),
    (lambda: left_the_ball(x8*0 + 1.05, x8*0 + 1, ball),
     lambda: left_the_ball(x8*0 + 1, x8*0 + 1, ball)),
    (lambda: not_converged(50, 50.6), lambda: not_converged(50, 50.4)),
    (lambda: not_monotone([.1, .2, .3], [30, 50, 45]),
     lambda: not_monotone([.1, .2, .3], [30, 50, 49.5])),
    (lambda: no_better_than_noise(20, 19), lambda: no_better_than_noise(40, 19)),
    (lambda: blind_is_better(40, 50), lambda: blind_is_better(50, 40))])
def test_each_diagnosis_fires_and_is_silent(complaint, silence):
    assert complaint().endswith('.') and complaint()[0].isupper() or complaint()[0].isdigit()
    assert silence() == ''


class Brightest(nn.Module):
    """Codes are 32x32 images' ten column sums, decoded to themselves: a sound, deterministic
    model with a slope everywhere."""
    def encode(self, x):
        return self.see(x)[..., :10].sum(-2).flatten(1), None, x.new_zeros(len(x), 0)
    def see(self, x): return x
    def posterior(self, x): return Posterior(Normal(self.encode(x)[0], 1.))
    def decode(self, code): return code
    def forward(self, x): return self.decode(self.posterior(x).mode)


class Flat(Brightest):
    "The same, seen through ten grey levels: no slope."
    def see(self, x): return (10*x).round()/10


@pytest.mark.parametrize('model, complaints', [(Brightest(), 0), (Flat(), 2)])
def test_diagnose_a_sound_model_and_one_that_masks_its_gradient(model, complaints):
    x = torch.full((20, 1, 32, 32), .4)
    y = torch.arange(20) % 10
    for i, k in enumerate(y):
        x[i, ..., k] = .46
    test = ImageData((255*x).round().byte(), y)
    said = diagnose(model.eval(), nn.Identity().eval(),
                    preset('attack.strong', features='means', eps=.1, steps=20, pairs=1), test,
                    radii=(.05, .1))
    assert len(said) >= complaints and (complaints or not said), said
    if complaints:
        assert 'no usable gradient' in said[0] and any('masked' in s for s in said)


def test_a_code_that_hides_the_way_is_named():
    """Of 100 pairs 50 fall; five points more are not enough, six are, unless as many others
    hold, or luck explains them."""
    some = lambda *parts: np.concatenate([np.arange(a, b) for a, b in parts])
    falls = lambda *parts: np.isin(np.arange(100), some(*parts))
    missed, none = falls((0, 50)), falls((0, 0))
    assert hidden_by_code(missed, falls((0, 55)),
                          none) == hidden_by_code(missed, none, falls((0, 55))) == ''
    for known, carried in ((falls((0, 56)), none), (none, falls((0, 56)))):
        assert '50.0 %' in hidden_by_code(missed, known, carried)
    assert hidden_by_code(missed, falls((20, 76)), none) == ''  # 26 more and 20 less: luck
    assert hidden_by_code(missed[40:55], falls((0, 55))[40:55], none[:15]) == ''        # 5 of 15


def test_the_attacker_who_knows_the_code_keeps_the_rest_of_the_preset():
    soft = preset('attack.damage_soft')
    assert knowing(soft, 10) == soft.model_copy(update=dict(forced=True, soften=1., select='code',
                                                            restarts=9))
    assert knowing(preset('attack.output_soft'), 10).restarts == 1
    assert knowing(preset('attack.output_soft'), 10).select == 'hard'
    assert knowing(preset('attack.judge_untargeted_soft'), 10).select == 'hard'


def test_a_short_attack_is_not_the_code_s_fault():
    "Two steps find little on a model whose category says nothing, and so do two that know it."
    judge, digits = pretrained_judge('judge/residual'), load('digits', 'test')
    test, short = ImageData(*(a[digits.y < 6] for a in digits)), preset('attack.strong', pairs=1, steps=2)
    model = pretrained('mnist/entangled')
    assert masked_by_code(model, short, pixels(test.x[:1]), trials_of(model, judge, test)) == ''


def test_the_rule_fires_where_a_code_masks_and_not_without_one():
    judge, digits = pretrained_judge('judge/residual'), load('digits', 'test')
    test = ImageData(*(a[digits.y < 6] for a in digits))  # 30 pairs
    soft = preset('attack.damage_soft', pairs=1, steps=5)
    models = [pretrained(f'mnist/{m}') for m in ('disentangled', 'entangled')]
    said = [masked_by_code(m, soft, pixels(test.x[:1]), trials_of(m, judge, test)) for m in models]
    assert said[0].startswith('The categorical masks the gradient') and said[1] == ''


def test_diagnose_makes_each_attack_once(monkeypatch):
    digits, judge, made = load('digits', 'test'), pretrained_judge('judge/residual'), []
    test = ImageData(*(a[digits.y < 3] for a in digits))
    model, p = pretrained('mnist/disentangled'), preset('attack.output_soft', pairs=1, steps=2)
    def noting(f):
        return lambda model, judge, preset, *more, **kw: (
            made.append(preset), f(model, judge, preset, *more, **kw))[1]
    for name in ('attacked', 'trial'):
        monkeypatch.setattr(diagnosis, name, noting(getattr(diagnosis, name)))
    diagnose(model, judge, p, test)
    assert len(made) == len({*made}) and p in made  # three radii of four, and five more


def test_diagnose_stops_at_a_model_in_training_mode(model):
    assert [s.split()[0] for s in diagnose(model.train(), lenet().eval(), ball,
                                           load('digits', 'test'))] == ['VAE']


def test_transfer_and_radius_on_a_model_that_always_falls():
    x = torch.full((20, 1, 32, 32), .4)
    y = torch.arange(20) % 10
    for i, k in enumerate(y):
        x[i, ..., k] = .46
    test, a = ImageData((255*x).round().byte(), y), preset('attack.strong', features='means',
                                                           pairs=1)
    table = transfer({'one': Brightest().eval(), 'two': Brightest().eval()}, nn.Identity().eval(),
                     a, test)
    assert (table.values == 100).all()
    r = against_radius(Brightest().eval(), nn.Identity().eval(), a, test, [.005, .1])
    assert r.as_ignore.tolist() == [0, 100] and r.as_target.tolist() == [0, 100]


def test_agreement_of_judges():
    class Says(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = torch.tensor(y)
        def forward(self, x): return nn.functional.one_hot(self.y[:len(x)], 3)
    t = agreement({'a': Says([0, 1, 2, 2]), 'b': Says([0, 1, 1, 2]), 'c': Says([1, 0, 0, 1])},
                  torch.zeros(4, 1, 1, 1))
    assert t.loc['a', 'b'] == t.loc['b', 'a'] == 75 and t.loc['a', 'c'] == 0
    assert (np.diag(t) == 100).all()


def test_only_dropout_is_switched_on():
    """A judge with batch normalisation is the same judge before and after, and the same with the
    switch on if it has no dropout."""
    torch.manual_seed(0)
    x = torch.rand(50, 1, 32, 32)
    for network, changes in (('residual', False), ('strided', True)):
        judge = JUDGE_NETWORKS[network]()
        before = {k: v.clone() for k, v in judge.state_dict().items()}
        plain, dropped = judged(judge, x), [judged(judge, x, dropout=True) for _ in range(4)]
        assert all(torch.equal(v, before[k]) for k, v in judge.state_dict().items())
        assert all(m.training for m in judge.modules())  # left as it was found
        assert any(not torch.equal(d, plain) for d in dropped) == changes
