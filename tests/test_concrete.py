"""Chapter 05 against oracles other than the notebook's: scipy densities and quadrature,
closed forms, autograd, torch.distributions."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats
from torch.distributions import (Categorical, OneHotCategorical, RelaxedOneHotCategorical,
                                 kl_divergence)

from vae_robust.concrete import (categorical_kl, concrete, concrete_kl, concrete_kl_exact,
                                 concrete_log_density, gumbel, gumbel_max,
                                 log_concrete, straight_through)

LOGITS = [[0., 0.], [2., -1.], [1., 0., -1.], [3.] + [0.]*9, [-4., 0., .5, 5.]]
PEAKED = torch.tensor([3.] + [0.]*9, dtype=torch.float64)
FLAT = torch.zeros(10, dtype=torch.float64)
many = settings(max_examples=50, deadline=None, derandomize=True)


def vectors(K, size=8):
    numbers = st.lists(st.floats(-size, size), min_size=K, max_size=K)
    return numbers.map(lambda v: torch.tensor(v, dtype=torch.float64))


one = st.integers(2, 8).flatmap(vectors)
two = st.integers(2, 8).flatmap(lambda K: st.tuples(vectors(K), vectors(K)))
temperature = st.floats(.05, 5)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def within(samples, truth, sigmas=5):
    "The mean of `samples` (n, ...) lies within so many standard errors of `truth`."
    se = samples.std(0)/len(samples)**.5
    return bool(((samples.mean(0) - truth).abs() <= sigmas*se + 1e-12).all())


# ---------------------------------------------------------------- noise and draws

def test_gumbel_moments():
    G = gumbel(torch.empty(200_000, dtype=torch.float64))
    assert within(G, np.euler_gamma)
    assert within((G - np.euler_gamma)**2, math.pi**2/6)
    assert within((G < 0).double(), math.exp(-1))


@pytest.mark.parametrize('dtype, out',
                         [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                          (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_gumbel_survives_zero_exponentials_in_every_dtype(monkeypatch, dtype, out):
    monkeypatch.setattr(torch.Tensor, 'exponential_', torch.Tensor.zero_)
    G = gumbel(torch.empty(2, 3, dtype=dtype))
    assert G.shape == (2, 3) and G.dtype == out and G.isfinite().all()


@pytest.mark.parametrize('logits', LOGITS)
@pytest.mark.parametrize('draw', [gumbel_max, lambda l: straight_through(l, .5)],
                         ids=['gumbel_max', 'straight_through'])
def test_hard_draws_are_one_hot_with_the_right_frequencies(draw, logits):
    n, q = 100_000, special.softmax(logits)
    c = draw(torch.tensor(logits).expand(n, -1))
    assert c.dtype == torch.float32 and ((c == 0) | (c == 1)).all() and (c.sum(-1) == 1).all()
    assert stats.chisquare(c.double().sum(0).numpy(), n*q).pvalue > 1e-4


@pytest.mark.parametrize('tau', [.1, .67, 3.])
@pytest.mark.parametrize('logits', LOGITS)
def test_log_ratios_of_concrete_draws_are_logistic(logits, tau):
    y = log_concrete(torch.tensor(logits, dtype=torch.float64).expand(20_000, -1), tau)
    w = tau*(y[:, 0] - y[:, 1])
    assert stats.kstest(w.numpy(), stats.logistic(loc=logits[0] - logits[1]).cdf).pvalue > 1e-4
    torch.testing.assert_close(y.logsumexp(-1), torch.zeros(20_000, dtype=torch.float64))


def test_concrete_is_the_exponential_of_log_concrete_and_cools_to_gumbel_max():
    draws = []
    for draw in (lambda l: concrete(l, .7), lambda l: log_concrete(l, .7).exp(),
                 lambda l: concrete(l, 1e-4), gumbel_max):
        torch.manual_seed(3)
        draws.append(draw(torch.tensor([1., 0., -1.]).expand(50, -1)))
    torch.testing.assert_close(draws[0], draws[1])
    torch.testing.assert_close(draws[2], draws[3])


@pytest.mark.parametrize('tau', [.3, 1., 2.])
def test_straight_through_has_the_gradient_of_the_relaxation(tau):
    "Finite differences of the soft draw, for each output."
    l, h = torch.tensor([.3, -.4, 1.], dtype=torch.float64), 1e-6

    def soft(l):
        torch.manual_seed(5)
        return concrete(l, tau)

    def hard(l):
        torch.manual_seed(5)
        return straight_through(l, tau)
    jacobian = torch.autograd.functional.jacobian(hard, l)
    numeric = torch.stack([(soft(l + h*e) - soft(l - h*e))/(2*h)
                           for e in torch.eye(3, dtype=torch.float64)], -1)
    torch.testing.assert_close(jacobian, numeric, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- density

def density_from_gumbels(z, logits, tau):
    """The density at z by scipy's Gumbel,
    one quadrature over the last coordinate and a numerical Jacobian."""
    z = torch.tensor(z, dtype=torch.float64)
    free = lambda z: tau*(z.log() - (1 - z.sum()).log())  # w of the first K - 1 coordinates
    w = np.append(free(z[:-1]).numpy(), 0)
    joint = lambda g: np.prod(stats.gumbel_r.pdf(g + w, loc=logits))
    mass = integrate.quad(joint, -40, 60, points=[max(logits - w)], limit=500,
                          epsabs=0, epsrel=1e-10)[0]
    return mass*abs(torch.linalg.det(torch.autograd.functional.jacobian(free, z[:-1])).item())


@pytest.mark.parametrize('z, logits, tau', [([.3, .7], [0., 0.], 1.), ([.9, .1], [2., -1.], .3),
                                            ([.01, .99], [2., -1.], 2.),
                                            ([.2, .3, .5], [1., 0., -1.], .67),
                                            ([.05, .9, .05], [1., 0., -1.], .2),
                                            ([.1, .2, .3, .4], [-2., 0., .5, 2.], 1.5)])
def test_density_from_first_principles(z, logits, tau):
    got = concrete_log_density(torch.tensor(z, dtype=torch.float64).log(),
                               torch.tensor(logits, dtype=torch.float64), tau)
    oracle = math.log(density_from_gumbels(z, np.array(logits), tau))
    assert got.item() == pytest.approx(oracle, abs=1e-7)


def test_density_of_equal_categories_at_temperature_one_is_uniform_for_two():
    z = torch.rand(20, 1, dtype=torch.float64)
    log_z = torch.cat([z, 1 - z], -1).log()
    torch.testing.assert_close(concrete_log_density(log_z, torch.zeros(2), 1.),
                               torch.zeros(20, dtype=torch.float64))


def test_density_integrates_to_one_on_the_triangle():
    """Two-dimensional quadrature, K = 3, in the coordinates log z_i - log z_3,
    whose Jacobian is the product of the z_i."""
    u = torch.linspace(-30, 30, 401, dtype=torch.float64)
    u = torch.stack([*torch.meshgrid(u, u, indexing='ij'),
                     torch.zeros(401, 401, dtype=torch.float64)], -1)
    log_z = u.log_softmax(-1)
    for tau in (.8, 2.):
        p = (concrete_log_density(log_z, torch.tensor([1., 0., -1.]), tau) + log_z.sum(-1)).exp()
        assert p.sum().item()*(60/400)**2 == pytest.approx(1, abs=1e-6)


@given(two, temperature)
@many
def test_density_is_torchs(pair, tau):
    logits, x = pair
    log_z = (x/2).log_softmax(-1)
    theirs = RelaxedOneHotCategorical(torch.tensor(tau, dtype=torch.float64),
                                      logits=logits, validate_args=False)
    torch.testing.assert_close(concrete_log_density(log_z, logits, tau),
                               theirs.log_prob(log_z.exp()), rtol=1e-8, atol=1e-8)


@given(two, temperature, st.floats(-50, 50), st.randoms(use_true_random=False))
@many
def test_density_ignores_a_shift_and_the_order_of_categories(pair, tau, shift, random):
    logits, x = pair
    log_z, order = x.log_softmax(-1), random.sample(range(len(x)), len(x))
    p = concrete_log_density(log_z, logits, tau)
    torch.testing.assert_close(concrete_log_density(log_z, logits + shift, tau),
                               p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(concrete_log_density(log_z[order], logits[order], tau),
                               p, rtol=1e-9, atol=1e-9)


def test_density_is_finite_where_z_underflows():
    log_z = log_concrete(PEAKED.float().expand(20_000, -1), .1)
    assert (log_z.exp() == 0).any()                                          # the trap is there
    assert log_z.isfinite().all()
    assert concrete_log_density(log_z, PEAKED.float(), .1).isfinite().all()


# ---------------------------------------------------------------- divergences

@pytest.mark.parametrize('logits, kl',
                         [([0.]*7, 0.), ([1000., 0., 0.], math.log(3)), ([3.] + [0.]*9, 1.004),
                          ([math.log(3), 0.], math.log(2) + .75*math.log(.75) + .25*math.log(.25))])
def test_categorical_kl_known_values(logits, kl):
    found = categorical_kl(torch.tensor(logits)).item()
    assert found == pytest.approx(kl, abs=6e-4 if kl == 1.004 else 1e-6)


@given(one, st.floats(-50, 50))
@many
def test_categorical_kl(logits, shift):
    K, kl = len(logits), categorical_kl(logits)
    assert -1e-12 <= kl <= math.log(K) + 1e-12
    by_scipy = special.rel_entr(special.softmax(logits.numpy()), 1/K).sum()
    by_torch = kl_divergence(Categorical(logits=logits), Categorical(logits=0*logits)).item()
    assert kl.item() == pytest.approx(by_scipy, abs=1e-10)
    assert kl.item() == pytest.approx(by_torch, abs=1e-10)
    torch.testing.assert_close(categorical_kl(logits + shift), kl, rtol=1e-9, atol=1e-9)


def test_categorical_kl_is_per_row_and_has_a_finite_gradient_at_confident_posteriors():
    logits = torch.tensor([[1000., 0., 0.], [0., 0., 0.], [1., 2., 3.]], requires_grad=True)
    kl = categorical_kl(logits)
    kl.sum().backward()
    assert kl.shape == (3,) and logits.grad.isfinite().all()


def closed_form(logits, prior):
    """For distinct lambda: the divided difference of t^(K-1) log t (Hermite-Genocchi),
    in long double."""
    lam = np.exp((np.asarray(prior) - np.asarray(logits)).astype(np.longdouble))
    K = len(lam)
    divided = sum(x**(K - 1)*np.log(x)/np.prod([x - y for j, y in enumerate(lam) if j != i])
                  for i, x in enumerate(lam))
    return float(-np.log(lam).sum() + K*(divided - sum(1/k for k in range(1, K))))


@pytest.mark.parametrize('logits, prior', [([1., 0.], [0., 0.]), ([2., 0., -1.], [0., 0., 0.]),
                                           ([0., 1., 2.], [2., 0., .5]),
                                           ([3., 1., 0., -2.], [0., 0., 0., 0.]),
                                           ([0., 1., 2., 3., 4.], [0.]*5)])
def test_exact_concrete_kl_is_the_closed_form(logits, prior):
    got = concrete_kl_exact(torch.tensor(logits, dtype=torch.float64),
                            torch.tensor(prior, dtype=torch.float64))
    assert got.item() == pytest.approx(closed_form(logits, prior), rel=1e-9)


@pytest.mark.parametrize('a', [.01, 1., 7., 40.])
def test_exact_concrete_kl_of_two_logistics_by_quadrature(a):
    p, q = stats.logistic(), stats.logistic(loc=a)
    kl = integrate.quad(lambda w: q.pdf(w)*(q.logpdf(w) - p.logpdf(w)), a - 60, a + 60,
                        points=[0, a], limit=500, epsabs=1e-13)[0]
    got = concrete_kl_exact(torch.tensor([a, 0.], dtype=torch.float64),
                            torch.zeros(2, dtype=torch.float64)).item()
    assert got == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert got == pytest.approx(a/math.tanh(a/2) - 2, abs=1e-11)


def test_exact_concrete_kl_with_a_thousand_categories():
    "One peaked logit: then (5.12) is an average over a Beta(1, K - 1) variable."
    K, a = 1000, 9.
    weighted = lambda y: (K - 1)*y**(K - 2)*math.log(math.exp(-a) + (1 - math.exp(-a))*y)
    mean = integrate.quad(weighted, 0, 1, points=[.99], epsabs=1e-14)[0]
    logits = torch.zeros(K, dtype=torch.float64)
    logits[0] = a
    found = concrete_kl_exact(logits, torch.zeros(K, dtype=torch.float64)).item()
    assert found == pytest.approx(a + K*mean, rel=1e-8)


@given(two, st.floats(-50, 50), st.randoms(use_true_random=False))
@many
def test_concrete_kl_is_at_least_the_categorical_one(pair, shift, random):
    l, p = pair
    kl, order = concrete_kl_exact(l, p), random.sample(range(len(l)), len(l))
    categorical = kl_divergence(OneHotCategorical(logits=l), OneHotCategorical(logits=p))
    assert kl >= categorical - 1e-10 and categorical >= -1e-10
    torch.testing.assert_close(concrete_kl_exact(l + shift, p), kl, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(concrete_kl_exact(l[order], p[order]), kl, rtol=1e-9, atol=1e-9)
    assert abs(concrete_kl_exact(l, l + shift)) < 1e-10


@pytest.mark.parametrize('tau', [.1, .67])
def test_reference_values_for_ten_categories(tau):
    "Categorical 1.004; Concrete about 1.95, the same at every temperature."
    exact = concrete_kl_exact(PEAKED, FLAT)
    mean, se = concrete_kl(PEAKED, FLAT, tau, 200_000)
    assert abs(mean - exact) < 5*se and .002 < se < .003
    assert exact.item() == pytest.approx(1.953, abs=.005)
    assert categorical_kl(PEAKED).item() == pytest.approx(1.004, abs=5e-4)


def test_monte_carlo_kl_does_not_depend_on_temperature_draw_by_draw():
    values = []
    for tau in (.1, .67, 5.):
        torch.manual_seed(7)
        values.append(concrete_kl(PEAKED, FLAT, tau, 100)[0])
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_standard_error_is_the_spread_of_repeated_estimates():
    mean, se = concrete_kl(PEAKED.expand(400, -1), FLAT, .67, 500)
    assert mean.shape == se.shape == (400,)
    assert mean.std().item() == pytest.approx(se.mean().item(), rel=.2)


@given(st.tuples(vectors(4, 3), vectors(4, 3)), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_monte_carlo_kl_and_its_gradient_are_unbiased(pair, seed):
    torch.manual_seed(seed)
    n, prior = 20_000, pair[1]
    l, e = pair[0].expand(n, -1).clone().requires_grad_(), pair[0].clone().requires_grad_()
    kl, exact = concrete_kl(l, prior, .67, 2)[0], concrete_kl_exact(e, prior)
    g, = torch.autograd.grad(kl.sum(), l)
    slope, = torch.autograd.grad(exact, e)
    assert within(kl.detach(), exact.detach(), 6) and within(g, slope, 6)


def test_exact_concrete_kl_gradient_batch_and_dtype():
    l, p = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(concrete_kl_exact, (l.requires_grad_(), p.requires_grad_()))
    assert concrete_kl_exact(l, p[0]).shape == (3,)
    torch.testing.assert_close(concrete_kl_exact(l.float(), p.float()).double(),
                               concrete_kl_exact(l, p), rtol=1e-4, atol=1e-5)
