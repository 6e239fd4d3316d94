"""Oracles are written from the papers' definitions, with plain counting, quadrature,
a regression forest of our own and brute force:
nothing that the library uses to get its numbers."""
import inspect, itertools, math, statistics
from collections import Counter
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, optimize, special, stats
from torch import nn
from torch.distributions import Normal, OneHotCategorical

from vae_robust import metrics
from vae_robust.metrics import (METRICS, Code, DisentanglementError, Score, active_units,
                                        agreement, beta_score, checked, class_accuracy, code,
                                        concentration, dci, encode, entropies, score_all,
                                        explained, factor_score, gap, gaussian_tc, importances,
                                        infomec, lead, metric, mig,
                                        mig_samples, modularity, mutual_information,
                                        sampled_information, sap, table, udr)
from vae_robust.vae import VAE, Posterior

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
once = dict(halves=0)
pytestmark = pytest.mark.filterwarnings('error')  # no metric may warn

V, K = 6, 4
GRID = np.array(list(itertools.product(range(V), repeat=K)))
UNIT = (GRID - GRID.mean(0))/GRID.std(0)
TURN = np.kron(np.eye(2), np.array([[1, 1], [-1, 1]])/2**.5)
CODES = {'perfect': UNIT, 'permuted': UNIT[:, [3, 1, 0, 2]], 'flipped': UNIT*[1, -1, -1, 1],
         'rotated': UNIT @ TURN, 'duplicated': np.repeat(UNIT, 2, 1),
         'constant': 0*UNIT + .1, 'noise': np.random.default_rng(0).uniform(-1, 1, UNIT.shape),
         'missing': UNIT*[1, 0, 1, 1]}

def posterior(z):
    return Normal(torch.tensor(z), torch.tensor(np.where(z.std(0) > 0, .06, 1.) + 0*z))

def random_code(seed, n=900, sizes=(4, 7, 3), D=5):
    "Factors, and latents that mix them nonlinearly, with noise."
    rng = np.random.default_rng(seed)
    v = np.stack([rng.integers(s, size=n) for s in sizes], 1)
    z = np.tanh(v @ rng.normal(size=(len(sizes), D))*.4)
    return z + rng.uniform(.05, 1, D)*rng.normal(size=(n, D)), v


# ---------------------------------------------------------------- known scores
BY_HAND = {  # perfect, rotated, duplicated, constant, noise, one missing
    mig: (1, 0, 0, 0, 0, .75), sap: (1, 0, 0, 0, 0, .75), factor_score: (1, .5, 1, 0, .25, .75),
    beta_score: (1, .5, 1, 0, .25, 1),
    active_units: (4, 4, 8, 0, 4, 3), modularity: (1, 2/3, 1, 0, None, 1),
    gaussian_tc: (0, 0, math.inf, 0, 0, 0), mig_samples: (1, 0, 0, 0, 0, .75)}
KNOWN = [(m, c, value) for m, values in BY_HAND.items()
         for c, value in zip(('perfect', 'rotated', 'duplicated', 'constant', 'noise', 'missing'),
                             values) if value is not None]
KNOWN += [(m, c, BY_HAND[m][0]) for m in BY_HAND for c in ('permuted', 'flipped')]

@pytest.mark.parametrize('m, name, value', KNOWN, ids=lambda x: getattr(x, '__name__', str(x)))
def test_scores_known_by_hand(m, name, value):
    found = m(posterior(CODES[name]) if m is mig_samples else CODES[name], GRID, **once).value
    if m in (factor_score, beta_score) and name in ('noise', 'rotated', 'missing'):
        assert abs(found - value) < 5*(.25/1000)**.5
    else:
        assert found == value or abs(found - value) < .03
    if name == 'constant':
        assert found == 0
    if name in ('perfect', 'permuted', 'flipped'):
        assert m in (active_units, gaussian_tc) or found > .98
    if name == 'rotated' and m in (mig, mig_samples):
        assert found < .05

@pytest.mark.parametrize('name, values', [
    ('perfect', (1, 1, 1)), ('permuted', (1, 1, 1)), ('flipped', (1, 1, 1)),
    ('rotated', (.5, .5, None)), ('duplicated', (1, 2/3, 1)), ('constant', (0, 0, 0)),
    ('noise', (0, 0, 0)),
    ('missing', (1 - stats.entropy([3, 1], base=4), .75 + (1 - math.log(3, 4))/4, .75))])
@pytest.mark.parametrize('nominal', [(), (0, 1, 2, 3)])
def test_dci_known_by_hand(name, values, nominal):
    found = dci(CODES[name], GRID, nominal=nominal, **once)
    for score, value in zip(found, values):
        assert value is None or abs(score.value - value) < .05
    if name in ('perfect', 'permuted', 'flipped'):
        assert min(s.value for s in found) > .99
    if name == 'constant':
        assert [s.value for s in found] == [0, 0, 0]

@pytest.mark.parametrize('name, values', [
    ('perfect', (1, 1, 1)), ('permuted', (1, 1, 1)), ('flipped', (1, 1, 1)),
    ('rotated', (1/3, 1/3, 1)), ('duplicated', (1, 3/7, 1)), ('constant', (0, 0, 0)),
    ('missing', (1, .75, .75))])
@pytest.mark.parametrize('nominal', [(), (0, 1, 2, 3)])
def test_infomec_known_by_hand(name, values, nominal):
    found = [s.value for s in infomec(CODES[name], GRID, nominal=nominal, **once)]
    assert np.allclose(found, values, atol=.01), found
    if name == 'constant':
        assert found == [0, 0, 0]

def test_a_code_is_a_function_of_the_factors_too():
    assert mig(lambda v: v, GRID, **once).value > .98
    assert dci(lambda v: -v, GRID, **once).disentanglement.value > .99

def test_one_factor_or_one_latent_is_no_reason_to_fail():
    z, v = UNIT, GRID[:, :1]
    assert mig(z, v[:, 0], **once).value == pytest.approx(1) == mig(z[:, 0], v, **once).value
    assert modularity(z, v, **once).value == pytest.approx(1)
    assert sap(z[:, :1], v, **once).value == pytest.approx(1)
    assert dci(z[:, :1], v, **once).completeness.value == 1
    assert np.allclose([s.value for s in infomec(z[:, :1], v, **once)], 1)
    assert gaussian_tc(z[:, :1], v, **once).value == 0


# ---------------------------------------------------- MIG from its definition, by counting
def counted_information(x, y):
    n, joint, px, py = len(x), Counter(zip(x, y)), Counter(x), Counter(y)
    return sum(c/n*math.log(c*n/(px[a]*py[b])) for (a, b), c in joint.items())

def histogram_bin(c, bins):
    edges = np.linspace(c.min(), c.max(), bins + 1)
    return [int(np.searchsorted(edges[1:-1], x, side='right')) for x in c]

def oracle_mig(z, v, bins):
    total = 0
    for y in v.T.tolist():
        h = -sum(c/len(y)*math.log(c/len(y)) for c in Counter(y).values())
        known = (counted_information(histogram_bin(c, bins), y) for c in z.T)
        first, second, *_ = sorted(known, reverse=True)
        total += (first - second)/h
    return total/v.shape[1]

@pytest.mark.parametrize('bins', [5, 20, 33])
@pytest.mark.parametrize('seed', range(4))
def test_mig_by_counting(seed, bins):
    z, v = random_code(seed)
    assert abs(mig(z, v, bins=bins, **once).value - oracle_mig(z, v, bins)) < 1e-9

def test_information_and_entropies_by_counting():
    z, v = random_code(7, n=300)
    I = mutual_information(z, v, 11)
    assert I.shape == (5, 3)
    for (j, k), value in np.ndenumerate(I):
        assert abs(value - counted_information(histogram_bin(z[:, j], 11), v[:, k].tolist())) < 1e-9
    assert np.allclose(entropies(v),
                       [stats.entropy(list(Counter(y).values())) for y in v.T.tolist()])

def test_rounding_errors_at_the_edges_of_bins_are_no_information():
    """The difference of two factors, in 20 bins: all its values lie on edges,
    and rounding errors must not sort them."""
    triangle = np.convolve(np.ones(V), np.ones(V))/V**2
    jitter = 1e-13*np.random.default_rng(0).normal(size=UNIT.shape)
    I = mutual_information(UNIT @ TURN + jitter, GRID)
    share = np.full((2, 2), stats.entropy(triangle) - math.log(V))
    assert np.allclose(I, np.kron(np.eye(2), share))

def test_modularity_by_its_definition():
    z, v = random_code(3)
    I = np.array([[counted_information(histogram_bin(c, 20), y) for y in v.T.tolist()] for c in z.T])
    each = [1 - sum((I[j, k]/max(I[j]))**2 for k in range(3) if k != np.argmax(I[j]))/2
            for j in range(5)]
    assert abs(modularity(z, v, **once).value - np.mean(each)) < 1e-9


# ---------------------------------------------------------------- MIG from samples, by quadrature
def oracle_information(mean, std, y):
    "I(z; y) of one latent by integrating over z, value by value."
    line = np.linspace((mean - 8*std).min(), (mean + 8*std).max(), 2001)
    pdf = stats.norm.pdf(line[:, None], mean, std)
    whole, total = pdf.mean(1), 0
    for value, n in Counter(y.tolist()).items():
        given = pdf[:, y == value].mean(1)
        total += n/len(y)*integrate.trapezoid(special.rel_entr(given, whole), line)
    return total

def sampled_case(seed, n=400):
    z, v = random_code(seed, n)
    each = np.random.default_rng(seed).uniform(.08, .6, (1, z.shape[1]))
    return Code(z, each*np.random.default_rng(seed).uniform(.5, 2, z.shape)), v

@pytest.mark.parametrize('seed', [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_mig_samples_by_quadrature(seed):
    q, v = sampled_case(seed)
    I = np.array([[oracle_information(q.mean[:, j], q.std[:, j], y) for y in v.T]
                  for j in range(5)])
    H = [stats.entropy(list(Counter(y).values())) for y in v.T.tolist()]
    exact = np.mean([(np.sort(c)[-1] - np.sort(c)[-2])/h for c, h in zip(I.T, H)])
    found = np.mean([mig_samples(q, v, seed=s, **once).value for s in range(4)])
    assert abs(found - exact) < .02
    rows = [sampled_information(q, v, np.random.default_rng(s)) for s in range(20)]
    assert (abs(np.mean(rows, 0) - I) < 5*np.std(rows, 0)/20**.5 + 1e-4).all()

def test_mig_samples_of_narrow_and_wide_posteriors():
    two = np.random.default_rng(0).integers(2, size=(2000, 1))
    for std in (.01, .5, 2., 30.):  # a binary input over a Gaussian channel
        q = Normal(torch.tensor(2.*two), std)
        line = np.linspace(-10, 10 + 2/std, 40001)
        p0, p1 = stats.norm.pdf(line) + 1e-300, stats.norm.pdf(line, 2/std) + 1e-300
        m = two.mean()
        mix = (1 - m)*p0 + m*p1
        told = (1 - m)*special.rel_entr(p0, mix) + m*special.rel_entr(p1, mix)
        exact = integrate.trapezoid(told, line)/stats.entropy([m, 1 - m])
        assert abs(mig_samples(q, two, samples=2000, **once).value - exact) < .04


# ------------------------------ DCI: a forest of our own, and entropies by the definition
def best_split(z, y, w, least):
    """The latent, threshold and removed squared error of the best split, by trying all;
    w: how often an image was drawn."""
    best = (0., None, None)
    n, total, mass, i = len(y), (w*y).sum(), w.sum(), np.arange(1, len(y))
    for j in range(z.shape[1]):
        order = np.argsort(z[:, j], kind='stable')
        s, left, heavy = z[order, j], np.cumsum((w*y)[order])[:-1], np.cumsum(w[order])[:-1]
        gain = left**2/heavy + (total - left)**2/(mass - heavy) - total**2/mass
        gain[(s[1:] <= s[:-1]) | (i < least) | (n - i < least)] = 0
        if len(gain) and gain.max() > best[0] + 1e-9:
            best = (gain.max(), j, (s[gain.argmax()] + s[gain.argmax() + 1])/2)
    return best

def grow(z, y, w, removed, least=5):
    """A regression tree (Breiman et al.) as nested tuples, at least five different images in a
    leaf; adds to `removed` the squared error removed by each latent."""
    gain, j, t = best_split(z, y, w, least) if len(y) >= 2*least else (0, None, None)
    if j is None: return (w*y).sum()/w.sum()
    removed[j] += gain
    left = z[:, j] <= t
    return (j, t, grow(z[left], y[left], w[left], removed, least),
            grow(z[~left], y[~left], w[~left], removed, least))

def ask(tree, x):
    while isinstance(tree, tuple):
        tree = tree[2 if x[tree[0]] <= tree[1] else 3]
    return tree

def oracle_dci(z, v, seed, trees=10):
    rng = np.random.default_rng(seed)
    D, K, train = z.shape[1], v.shape[1], rng.random(len(v)) < .5
    R, skill = np.zeros((D, K)), []
    for k in range(K):
        y, answers = v[:, k].astype(float), 0
        for _ in range(trees):
            removed = np.zeros(D)
            rows = Counter(rng.choice(np.flatnonzero(train), train.sum()).tolist())
            tree = grow(z[list(rows)], y[list(rows)], np.array([*rows.values()]), removed)
            R[:, k] += removed/removed.sum()/trees
            answers = answers + np.array([ask(tree, x) for x in z[~train]])/trees
        squares = ((y[~train] - y[~train].mean())**2).sum()
        skill.append(max(0, 1 - ((answers - y[~train])**2).sum()/squares))
    one_minus_entropy = lambda r, base: 1 + sum(p*math.log(p, base) for p in r/r.sum() if p > 0)
    d = sum(R[j].sum()/R.sum()*one_minus_entropy(R[j], K) for j in range(D))
    c = sum(R[:, k].sum()/R.sum()*one_minus_entropy(R[:, k], D) for k in range(K))
    return np.array([d, c, np.mean(skill)])

@pytest.mark.parametrize('seed', range(2))
def test_dci_by_a_forest_of_our_own(seed):
    z, v = random_code(seed, n=800, D=4)
    ours = np.mean([oracle_dci(z, v, s) for s in range(6)], 0)
    found = np.mean([[s.value for s in dci(z, v, seed=s, **once)] for s in range(12)], 0)
    assert (abs(found - ours) < .02).all(), (found, ours)

@pytest.mark.parametrize('R, value', [
    (np.eye(3), 1), (np.ones((2, 5)), 0), (np.zeros((3, 3)), 0), ([[1, 1, 0, 0], [0, 0, 3, 3]], .5),
    ([[1, 0], [0, 0]], 1), ([[3, 0], [1, 1]], .6), ([[2.], [1.]], 1)])
def test_concentration_by_hand(R, value):
    assert abs(concentration(np.array(R, float)) - value) < 1e-12

def test_importances_are_per_factor_and_unseen_images_judge():
    z, v = random_code(0)
    noise = np.random.default_rng(0).integers(5, size=(900, 3))
    R, skill = importances(z, v, np.random.default_rng(0))
    assert R.shape == (5, 3) and np.allclose(R.sum(0), 1)
    for nominal in ((), range(3)):
        assert (importances(z, noise, np.random.default_rng(0), nominal)[1] < .06).all()


# ------------------------------------------- InfoMEC: loops, least squares, a softmax of our own
def oracle_purities(z, v):
    "Modularity and compactness (11.15) as they stand in the paper."
    spread = [max(c) - min(c) for c in z.T]
    known = [[counted_information(histogram_bin(c, 20), y)/stats.entropy(list(Counter(y).values()))
              for y in v.T.tolist()] for c, s in zip(z.T, spread) if s > max(spread)/20]
    pure = lambda rows: np.mean([(max(r)/sum(r) - 1/len(r))/(1 - 1/len(r)) for r in rows])
    return pure(known), pure([*zip(*known)])

def least_squares(z, y, train):
    "R squared, on the images that are not in `train`."
    A = np.c_[z, np.ones(len(z))]
    w = np.linalg.lstsq(A[train], y[train])[0]
    return 1 - ((y - A @ w)[~train]**2).mean()/((y[~train] - y[train].mean())**2).mean()

def softmax(z, y, train):
    "One minus the quotient of log losses, by a gradient of our own and scipy's optimiser."
    A, Y = np.c_[(z - z.mean(0))/z.std(0), np.ones(len(z))], np.eye(y.max() + 1)[y]
    def loss(w):
        p = special.softmax(A[train] @ w.reshape(A.shape[1], -1), 1)
        return -np.log((p*Y[train]).sum(1)).mean(), (A[train].T @ (p - Y[train])/train.sum()).ravel()
    w = optimize.minimize(loss, np.zeros(A.shape[1]*Y.shape[1]), jac=True).x.reshape(A.shape[1], -1)
    told = special.log_softmax(A[~train] @ w, 1)
    return 1 - (told*Y[~train]).sum()/(np.log(Y[train].mean(0))*Y[~train]).sum()

@pytest.mark.parametrize('seed', range(3))
def test_infomec_by_its_definition(seed):
    z, v = random_code(seed)
    z = np.c_[z, .001*z[:, 0]]  # hardly moves
    found = infomec(z, v, **once)
    assert np.allclose([s.value for s in found[:2]], oracle_purities(z, v), atol=1e-8)

@pytest.mark.parametrize('nominal, oracle, near', [((), least_squares, 1e-9),
                                                   (range(3), softmax, .003)])
def test_explicitness_by_predictors_of_our_own(nominal, oracle, near):
    z, v = random_code(1)
    v = np.minimum(v, [1, 6, 2])  # one of two values, which is three times as frequent as the other
    for seed in range(3):
        half = np.isin(np.arange(900), np.random.default_rng(seed).permutation(900)[:450])
        found = explained(z, v, np.random.default_rng(seed), nominal)
        assert np.allclose(found, [oracle(z, y, half) for y in v.T], rtol=0, atol=near)
    score = infomec(z, v, nominal=nominal, seed=5, **once).explicitness.value
    assert score == pytest.approx(explained(z, v, np.random.default_rng(5), nominal).mean())

@pytest.mark.parametrize('R, value', [
    (np.eye(3), [1, 1, 1]), (np.ones((2, 5)), [0, 0]), (np.zeros((2, 3)), [0, 0]), ([[2.]], [1]),
    ([[1, 1, 0, 0], [0, 3, 1, 0]], [1/3, 2/3]), ([[5e-9, 0]], [1])])
def test_lead_by_hand(R, value): assert np.allclose(lead(np.array(R, float)), value)

def test_noise_is_judged_by_images_not_learnt_from():
    rng = np.random.default_rng(0)
    z, v = rng.normal(size=(300, 40)), rng.integers(5, size=(300, 4))
    for nominal in ((), range(4)):
        assert infomec(z, v, nominal=nominal, **once).explicitness.value < .02

def test_latents_that_hardly_move_do_not_count():
    rng = np.random.default_rng(0)
    dead = np.c_[UNIT @ TURN, np.full(len(UNIT), 3.), .01*rng.normal(size=len(UNIT))]
    whole, without = infomec(dead, GRID, **once), infomec(UNIT @ TURN, GRID, **once)
    assert [s.value for s in whole[:2]] == [s.value for s in without[:2]]
    assert infomec(dead, GRID, least=0, **once).modularity.value < without.modularity.value - .01

def test_a_value_that_occurs_once_is_no_reason_to_fail():
    z, v = random_code(2, n=60)
    v[7, 0], v[:, 1] = 99, np.arange(60) == 3
    for seed in range(6):
        parts = infomec(z, v, nominal=[0, 1], seed=seed, halves=3)
        assert all(0 <= s.value <= 1 and np.isfinite(s.error) for s in parts)
    assert 0 <= infomec(z, np.arange(60), nominal=[0], halves=2).explicitness.value <= 1


# ---------------------------------------------------------------- SAP from its definition
def oracle_sap(z, v, nominal=()):
    total = 0
    for k, y in enumerate(v.T):
        if k in nominal:
            cuts = lambda c: itertools.combinations(np.quantile(c, np.linspace(.02, .98, 25)),
                                                    len(set(y)) - 1)
            s = [max(balanced(c, y, t) for t in cuts(c)) for c in z.T]
        else:
            s = [stats.linregress(c, y).rvalue**2 for c in z.T]
        total += sorted(s)[-1] - sorted(s)[-2]
    return total/v.shape[1]

def balanced(c, y, thresholds):
    """The best mean recall, over values,
    when each interval between thresholds may be given any value."""
    values, part = sorted(set(y)), np.searchsorted(thresholds, c)
    shares = np.array([[(part[y == value] == i).mean() for i in range(len(thresholds) + 1)]
                       for value in values])
    return shares.max(0).sum()/len(values)

@pytest.mark.parametrize('seed', range(4))
def test_sap_by_regression(seed):
    z, v = random_code(seed)
    assert abs(sap(z, v, **once).value - oracle_sap(z, v)) < 1e-9

@pytest.mark.parametrize('seed', range(3))
def test_sap_of_nominal_factors_by_trying_all_thresholds(seed):
    z, v = random_code(seed, n=8000, sizes=(2, 5, 3), D=3)
    assert abs(sap(z, v, nominal=[0, 2], **once).value - oracle_sap(z, v, [0, 2])) < .02


def test_sap_weighs_rare_values_like_common_ones():
    rng = np.random.default_rng(0)
    y = (rng.random(3000) < .1).astype(int)
    z = rng.normal(size=(3000, 2)) + np.outer(y, [1.5, .7])
    best = lambda c: (1 + stats.ks_2samp(c[y == 1], c[y == 0]).statistic)/2  # in balanced accuracy
    S = [best(c) for c in z.T]
    assert abs(sap(z, y, nominal=[0], **once).value - (S[0] - S[1])) < .02


# -------------------------------------------- the two games, played one round at a time
def fixed_pairs(v, k, rng):
    a = rng.integers(len(v))
    return a, rng.choice(np.flatnonzero(v[:, k] == v[a, k]))

def oracle_factor_score(z, v, rng, votes=600, batch=64):
    z, said = z/z.std(0), []
    for _ in range(2*votes):
        k = int(rng.integers(v.shape[1]))
        rows = rng.choice(np.flatnonzero(v[:, k] == v[rng.integers(len(v)), k]), batch)
        said.append((k, int(np.argmin([np.var(c) for c in z[rows].T]))))
    majority = {d: Counter(k for k, e in said[:votes] if e == d).most_common(1)[0][0]
                for d in {d for _, d in said[:votes]}}
    return np.mean([majority.get(d) == k for k, d in said[votes:]])

def oracle_beta_score(z, v, rng, votes=500, batch=64):
    z, x, y = z/z.std(0), [], []
    for _ in range(2*votes):
        y.append(int(rng.integers(v.shape[1])))
        pairs = np.array([fixed_pairs(v, y[-1], rng) for _ in range(batch)])
        x.append(np.abs(z[pairs[:, 0]] - z[pairs[:, 1]]).mean(0))
    x, y = torch.tensor(np.array(x), dtype=torch.float), torch.tensor(y)
    x = (x - x[:votes].mean(0))/x[:votes].std(0)
    # multinomial regression by L-BFGS, with scikit-learn's ridge
    linear = nn.Linear(x.shape[1], v.shape[1])
    lbfgs = torch.optim.LBFGS(linear.parameters(), max_iter=200)
    def loss():
        lbfgs.zero_grad()
        value = (nn.functional.cross_entropy(linear(x[:votes]), y[:votes])
                 + (linear.weight**2).sum()/2/votes)
        value.backward()
        return value
    lbfgs.step(loss)
    return (linear(x[votes:]).argmax(1) == y[votes:]).float().mean().item()

@pytest.mark.parametrize('seed', [1, 2])
def test_games_by_playing_them(seed):
    torch.manual_seed(0)
    z, v = random_code(seed, n=1200)
    mean = lambda f: np.mean([f(z, v, seed=s, **once).value for s in range(3)])
    # 4 errors of 1200 votes, sd <= .012
    assert abs(mean(factor_score) - np.mean([oracle_factor_score(z, v, np.random.default_rng(s))
                                             for s in range(2)])) < .045
    assert abs(mean(beta_score) - oracle_beta_score(z, v, np.random.default_rng(0))) < .07

def test_the_majority_vote_is_scored_on_other_rounds():
    noise = np.random.default_rng(0).normal(size=(len(GRID), 12))
    scores = [factor_score(noise, GRID, votes=12, batch=8, seed=s, **once).value
              for s in range(100)]
    assert abs(np.mean(scores) - .25) < 5*(.25*.75/1200)**.5

def test_dead_latents_do_not_play_and_scales_do_not_matter():
    dead = np.hstack([UNIT, np.full((len(UNIT), 1), 3.), .001*CODES['noise'][:, :1]])
    for f in (factor_score, beta_score):
        assert f(dead, GRID, **once).value == 1 == f(UNIT*[1, 10, .1, 1000], GRID, **once).value
        assert f(.001*UNIT, GRID, **once).value == 0


# ---------------------------------------------------------------- without factors
@quick
@given(seeds, st.integers(1, 5))
def test_gaussian_tc_by_scipys_entropies(seed, D):
    rng = np.random.default_rng(seed)
    z, std = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)), rng.uniform(.1, 1, (200, D))
    C = np.cov(z.T, bias=True).reshape(D, D) + np.diag((std**2).mean(0))
    single = sum(stats.norm(scale=c**.5).entropy() for c in C.diagonal())
    assert abs(gaussian_tc(Code(z, std), np.arange(200) % 2, **once).value
               - (single - stats.multivariate_normal(cov=C).entropy())) < 1e-6

def test_tc_of_a_latent_that_follows_from_others_is_infinite():
    z = np.random.default_rng(0).normal(size=(500, 3))
    y = z[:, 0] > 0
    for dependent in (z @ [.3, -2, .7], z[:, 1]/3, 1e-3*z[:, 0] + 5):
        assert gaussian_tc(np.column_stack([z, dependent]), y, **once).value == math.inf
    assert gaussian_tc(z, y, **once).value < .05

def test_active_units_counts_variances_of_means():
    z = np.random.default_rng(0).normal(size=(5000, 4))*[1, .15, .05, 0]
    assert active_units(Code(z, 0*z + 1), np.arange(5000) % 2, **once).value == 2
    assert active_units(z, np.arange(5000) % 2, least=1e-3, **once).value == 3

@pytest.mark.parametrize('R, value',
                         [(np.eye(3)[[2, 0, 1]], 1), (np.zeros((2, 3)), 0), (np.zeros((0, 3)), 0),
                          ([[.5, .5], [.5, .5]], .25), ([[1, 0], [.5, 0]], (1 + .5 + 1/1.5)/4)])
def test_agreement_by_hand(R, value): assert abs(agreement(np.array(R, float)) - value) < 1e-12

def test_udr_by_plain_loops():
    rng = np.random.default_rng(0)
    models = [rng.normal(size=(300, 2)) @ rng.normal(size=(2, D)) + .5*rng.normal(size=(300, D))
              for D in (3, 2, 4, 3)]
    models[2][:, 1] = 7.                                                                 # dead
    def pair(a, b):
        R = np.array([[abs(stats.spearmanr(x, y)[0]) for y in b.T if y.var() > .01]
                      for x in a.T if x.var() > .01])
        return (sum(max(r)**2/sum(r) for r in R) + sum(max(c)**2/sum(c) for c in R.T))/sum(R.shape)
    expected = [np.median([pair(a, b) for b in models if b is not a]) for a in models]
    found = udr(models)
    assert np.allclose(found.value, expected)
    assert found.error.shape == (4,)
    assert (found.error > 0).all()

def test_udr_of_dead_models_is_0_and_of_a_single_one_an_error():
    assert udr([0*UNIT, UNIT, 0*UNIT], halves=0).value.tolist() == [0, 0, 0]
    for codes in ([UNIT], [UNIT, UNIT[1:]]):
        with pytest.raises(DisentanglementError, match='two or more of the same images'):
            udr(codes)

def test_accuracy_of_a_code_and_of_a_posterior():
    y = np.random.default_rng(0).integers(4, size=200)
    logits = torch.eye(4)[torch.tensor((y + 1) % 4)]*5
    q = Posterior(Normal(torch.randn(200, 3), 1.), OneHotCategorical(logits=logits))
    assert class_accuracy(q, y).value == 1 == class_accuracy(lambda y: 3 - y, y).value
    assert class_accuracy(0*y, y, **once).value == np.bincount(y).max()/200
    with pytest.raises(DisentanglementError, match='not a category'):
        class_accuracy(y + .5, y)
    with pytest.raises(DisentanglementError, match='2 factors'):
        class_accuracy(y, np.stack([y, y], 1))


# ---------------------------------------------------------------- what may not matter
LAWS = {'mig': mig, 'sap': sap, 'modularity': modularity, 'samples': mig_samples,
        'dci': lambda *a, **kw: dci(*a, **kw).disentanglement, 'units': active_units,
        'InfoM': lambda *a, **kw: infomec(*a, **kw).modularity,
        'InfoC': lambda *a, **kw: infomec(*a, **kw).compactness,
        'InfoE': lambda *a, **kw: infomec(*a, nominal=[0], **kw).explicitness}

@quick
@given(seeds, st.sampled_from(['mig', 'sap', 'modularity', 'samples', 'dci', 'InfoM', 'InfoC', 'InfoE']))
def test_scores_lie_between_0_and_1(seed, name):
    q, v = sampled_case(seed, n=120)
    assert 0 <= LAWS[name](q, v, **once).value <= 1 + 1e-9

@quick
@given(seeds, st.permutations(range(5)),
       st.lists(st.sampled_from([-3., -.5, 1., 10.]), min_size=5, max_size=5))
def test_order_sign_and_scale_of_latents_do_not_matter(seed, order, scale):
    z, v = random_code(seed, n=200)
    for m in (mig, sap, modularity):
        assert abs(m(z, v, **once).value - m((z*scale)[:, order], v, **once).value) < .02

@quick
@given(seeds, st.permutations(range(5)),
       st.lists(st.sampled_from([-3., -.5, 1., 10.]), min_size=5, max_size=5))
def test_order_sign_and_scale_of_latents_do_not_matter_to_infomec(seed, order, scale):
    z, v = random_code(seed, n=200)
    values = lambda z, **kw: np.array([s.value for s in infomec(z, v, nominal=[0], **kw, **once)])
    assert np.allclose(values(z), values(-7*z[:, order]), atol=.02)     # the same unit for all
    assert np.allclose(values(z, least=0), values((z*scale)[:, order], least=0), atol=.02)

@quick
@given(seeds)
def test_names_of_values_do_not_matter_to_information(seed):
    z, v = random_code(seed, n=200)
    names = np.random.default_rng(seed).permutation(100)[:7] - 50
    assert abs(mig(z, v, **once).value - mig(z, names[v], **once).value) < 1e-9
    q = Code(z, .2 + 0*z)
    assert abs(mig_samples(q, v, **once).value - mig_samples(q, names[v], **once).value) < 1e-4

def test_gap_ignores_the_order_of_rows():
    scores = np.random.default_rng(0).random((6, 4))
    assert np.allclose(gap(scores), np.sort(scores, 0)[-1] - np.sort(scores, 0)[-2])
    assert np.allclose(gap(scores[::-1]), gap(scores))


# ---------------------------------------------------------------- errors of scores
def test_the_error_of_a_mean_is_that_of_the_textbook():
    mean = metric(lambda q, v, rng, scale=1: scale*q.mean.mean())
    z = np.random.default_rng(0).exponential(size=500)
    value, error = mean(z, np.arange(500) % 2, halves=1000)
    assert value == z.mean() and abs(error/(z.std()/500**.5) - 1) < .12
    assert (mean(z, np.arange(500) % 2, scale=10)
            == pytest.approx(np.multiply(10, mean(z, np.arange(500) % 2))))

def test_the_error_is_the_deviation_of_a_sample_and_not_of_a_population():
    "The first value is that of the whole table, the next are those of its halves."
    for halves in ([1., 3.], [1., 2, 6]):
        values = iter([0., *halves])
        found = metric(lambda q, v, rng: next(values))(np.arange(40.), np.arange(40) % 2,
                                                       halves=len(halves))
        assert found.error == pytest.approx(statistics.stdev(halves))

@pytest.mark.parametrize('m', [mig, sap, factor_score], ids=lambda m: m.__name__)
def test_the_error_reported_is_the_spread_over_tables(m):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(3, 5))
    def drawn():
        v = rng.integers(5, size=(500, 3))
        return v @ A + rng.normal(size=(500, 5)), v
    scores = np.array([m(*drawn(), seed=i, halves=6) for i in range(16)])
    assert .5 < scores[:, 1].mean()/scores[:, 0].std(ddof=1) < 2

def test_seeds_repeat_and_errors_can_be_left_out():
    z, v = random_code(0, n=300)
    for m in (factor_score, dci, beta_score):
        assert m(z, v, seed=3, halves=2) == m(z, v, seed=3, halves=2)
    assert mig(z, v, seed=3) == mig(z, v, seed=3) != mig(z, v, seed=4)
    assert math.isnan(mig(z, v, halves=0).error)
    assert math.isnan(dci(z, v, halves=0).completeness.error)
    assert isinstance(mig(z, v), Score) and math.isnan(gaussian_tc(CODES['duplicated'], GRID).error)

def test_every_metric_has_its_contract_in_help():
    for m in METRICS.values():
        assert m.__doc__ and [*inspect.signature(m).parameters][:2] == ['represent', 'factors']


# ---------------------------------------------------------------- any encoder
def test_what_may_be_a_code():
    a, s = np.arange(6.).reshape(3, 2), np.ones((3, 2))
    normal = Normal(torch.tensor(a).requires_grad_(), torch.tensor(s))
    for c in (a, torch.tensor(a), a.tolist(), lambda v: a):
        assert (code(c).mean == a).all() and (code(c).std == 0).all()
    for c in (normal, Code(a, s), Posterior(normal), lambda v: normal):
        assert (code(c).mean == a).all() and (code(c).std == 1).all()
    q = code(Posterior(normal, OneHotCategorical(logits=torch.eye(3)[[2, 0, 1]])))
    assert q.mean[:, 2].tolist() == [2, 0, 1]
    assert q.mean.shape == q.std.shape == (3, 3)
    assert (q.std > 0).all()

def test_encode_goes_in_batches_without_gradients():
    seen, linear = [], nn.Linear(2, 3)
    def represent(x):
        seen.append(len(x))
        return Normal(linear(x), 1.)
    x = torch.randn(25, 2)
    q = encode(represent, x, batch=10)
    assert seen == [10, 10, 5]
    assert np.allclose(q.mean, linear(x).detach(), atol=1e-6)
    assert q.std.shape == (25, 3)

def test_evaluate_a_network_and_a_function():
    v = np.array(list(itertools.product(range(5), range(6))))
    x, model = torch.rand(30, 1, 32, 32), VAE(3, n_c=2)
    table = score_all(model.posterior, x, v, halves=2)
    assert list(table.columns) == ['value', 'error']
    assert 'MIG, samples' in table.index
    assert 'DCI completeness' in table.index
    assert 'InfoMEC explicitness' in table.index
    assert len(table) == len(METRICS) + 4  # two of them have three parts
    plain = score_all(lambda x: x.reshape(len(x), -1)[:, :3].numpy(), x, v, halves=2)
    assert 'MIG, samples' not in plain.index and len(plain) == len(METRICS) + 3
    assert score_all(v, None, v, {'SAP': partial(sap, nominal=[0])}, halves=0).value.SAP > .5


# ---------------------------------------------------------------- one clear sentence
OK = np.arange(90).reshape(30, 3) % 7
@pytest.mark.parametrize('z, v, words', [
    (np.where(OK == 3, np.nan, OK), OK, 'codes are not finite, the first in row 1.'),
    (np.where(OK == 3, np.inf, OK), OK, 'not finite'),
    (Normal(torch.tensor(OK, dtype=torch.float), torch.full((30, 3), torch.inf),
            validate_args=False), OK, '30 of 30 codes are not finite'),
    (OK, OK*[1, 0, 1], 'Factor 1 has a single value: nothing can be learnt'),
    (OK, 0*OK[:, 0], 'Factor 0 has a single value'),
    (OK[:12], OK[:12], '12 samples are fewer than 20, the number of bins'),
    (OK[:29], OK, '29 codes, but 30 rows of factors'),
    (OK, dict(shape=OK[:, 0], size=OK[1:, 1]), r'Factors of unequal length: \[30, 29\]'),
    (OK, OK + .5, 'whole numbers'),
    (OK, np.where(OK == 3, np.nan, OK), 'whole numbers'),
    (OK[:0], OK[:0], 'no images'), (OK[:0], OK, '0 codes, but 30 rows')])
def test_what_cannot_be_scored_says_so(z, v, words):
    for m in [*METRICS.values()]:
        with pytest.raises(DisentanglementError, match=words) as e:
            m(z, v)
        assert str(e.value).count('. ') == 0 and str(e.value).endswith('.')

def test_other_sentences():
    with pytest.raises(DisentanglementError, match='30 samples are fewer than 31'):
        mig(OK, OK, bins=31)
    with pytest.raises(DisentanglementError, match='standard deviations above 0'):
        mig_samples(OK, OK)
    for rows in ([[1, 2]]*30 + [[1]], [['a'], ['b']]*15):
        with pytest.raises(DisentanglementError, match='rows of equal length'):
            mig(OK, rows)
    for f in (factor_score, beta_score):
        with pytest.raises(DisentanglementError, match='One factor only'):
            f(OK, OK[:, 0])
    with pytest.raises(ValueError):
        raise DisentanglementError

def test_factors_may_be_columns_with_names():
    assert (table(dict(a=OK[:, 0], b=OK[:, 1])) == OK[:, :2]).all()
    assert (table(pd.DataFrame(OK, columns=list('abc'))) == OK).all()
    assert (table(torch.tensor(OK)) == OK).all() and checked(OK, OK)[1].dtype.kind == 'i'


# ---------------------------------------------------------------- edges
def code_of_two():
    "Codes (600, 3) of two factors and noise, and the factors."
    rng = np.random.default_rng(0)
    v = np.stack([rng.integers(0, 5, 600), rng.permutation(np.arange(600) % 3)], 1)
    return np.c_[v + .1*rng.normal(size=v.shape), rng.normal(size=600)], v

def test_noise_is_scored_at_chance_by_the_thresholds_of_sap():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(200, 30)), rng.integers(10, size=200)
    assert abs(metrics.threshold_accuracies(z, y, rng).mean() - .1) < .02
    identity = np.repeat(np.arange(10), 50)
    assert (metrics.threshold_accuracies(identity[:, None].astype(float),
                                         identity, rng) == 1).all()


def test_the_error_is_the_sample_s_standard_deviation_over_halves():
    z, v = code_of_two()
    rng, values = np.random.default_rng(3), []
    rows = [rng.permutation(600)[:300] for _ in range(4)]
    for r in rows:
        values.append(mig(z[r], v[r], halves=0).value)
    deviation = np.sqrt(sum((x - np.mean(values))**2 for x in values)/3)
    assert mig(z, v, seed=3, halves=4).error == pytest.approx(deviation, rel=1e-12)


@pytest.mark.parametrize('std, shift', [(1e-40, 0), (1e-320, 0), (.1, 1e8), (1e-6, 5), (1e30, 0)])
def test_information_from_posteriors_is_a_number_and_knows_no_shift(std, shift):
    z, v = code_of_two()
    one, two = (mig_samples(Code(z + s, np.full_like(z, std)), v, halves=0).value
                for s in (0, shift))
    assert np.isfinite(one) and abs(one - two) < 1e-4


@pytest.mark.parametrize('score, words', [
    (lambda z, v: udr([z[:1], z[:1]]), '1 images are too few'),
    (lambda z, v: udr([z[:19], z[:19]]), '19 images'),
    (lambda z, v: mig({'z': z}, v), 'not a dict'), (lambda z, v: mig('code', v), 'not a str'),
    (lambda z, v: mig(torch.rand(600, 1, 4, 4), v), 'shape .N, D.'),
    (lambda z, v: mig(Code(z, z[:, :2]), v), 'deviations'),
    (lambda z, v: mig_samples(Code(z, -np.ones_like(z)), v), 'negative'),
    (lambda z, v: dci(z, v, nominal=[7]), 'nominal = .7.: there are 2 factors'),
    (lambda z, v: infomec(z, v, nominal=[2]), 'nominal = .2.: there are 2 factors'),
    (lambda z, v: infomec(z, v, bins=1), 'bins = 1'),
    (lambda z, v: infomec(z, v, least=-1), 'least = -1'),
    (lambda z, v: infomec(z[:, 0, None, None], v), 'shape .N, D.'),
    (lambda z, v: infomec(z[1:], v), 'of the same images'),
    (lambda z, v: sap(z, v, nominal=[-3]), 'nominal'),
    (lambda z, v: sap(z, v, nominal=['x']), 'nominal'),
    (lambda z, v: beta_score(z, v, votes=1), 'take more'),
    (lambda z, v: factor_score(z, v, votes=0), 'votes = 0'),
    (lambda z, v: mig(z, v, bins=0), 'bins = 0'),
    (lambda z, v: modularity(z, v, bins=1), 'bins = 1'),
    (lambda z, v: active_units(z, v, least=float('nan')), 'least = nan'),
    (lambda z, v: factor_score(z, v, least=float('nan')), 'least = nan'),
    (lambda z, v: mig_samples(Code(z, z*0 + 1), v, samples=0), 'samples = 0'),
    (lambda z, v: score_all(lambda x: x.flatten(1), torch.rand(0, 1, 4, 4), v[:0]), 'no images')])
def test_what_no_metric_can_do_gets_a_sentence(score, words):
    with pytest.raises(DisentanglementError, match=words) as e:
        score(*code_of_two())
    assert '\n' not in str(e.value)


def test_factors_without_order_may_be_counted_from_the_end():
    z, v = code_of_two()
    for m in (lambda n: dci(z, v[:, ::-1], nominal=n, halves=0).informativeness.value,
              lambda n: sap(z, v, nominal=n, halves=0).value,
              lambda n: infomec(z, v[:, ::-1], nominal=n, halves=0).explicitness.value):
        assert m([-1]) == m([1])


def test_an_independent_normal_is_a_normal():
    z, v = code_of_two()
    q = Normal(torch.tensor(z), .1)
    assert mig_samples(torch.distributions.Independent(q, 1), v) == mig_samples(q, v)


@pytest.mark.parametrize('G', [1, 2])
def test_the_numbers_of_categories_are_names(G):
    """Renumbering the classes changes no explicitness; as a code of plain numbers it would."""
    rng, N, K = np.random.default_rng(0), 2000, 6
    v = rng.integers(K, size=(N, G))
    swap = torch.tensor([3, 0, 4, 1, 5, 2])
    def said(classes):
        logits = 9*torch.nn.functional.one_hot(classes, K).float().squeeze(1)
        return Posterior(Normal(torch.zeros(N, 1), 1.), OneHotCategorical(logits=logits))
    c = torch.tensor(v).unsqueeze(1) if G == 1 else torch.tensor(v)
    explicit = lambda q: infomec(q, v, halves=0).explicitness.value
    assert explicit(said(c)) > .999 and explicit(said(swap[c])) > .999
    assert explicit(code(said(swap[c])).mean) < .2
    assert code(said(c)).classes == (0,) + G*(K,)
