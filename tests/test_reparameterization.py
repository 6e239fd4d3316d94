"""Chapter 03's exports against exact oracles: Gauss-Hermite quadrature (exact for polynomials),
enumeration, loops."""
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import roots_hermitenorm
from torch.distributions import Gamma, Independent, Normal, OneHotCategorical
from torch.testing import assert_close

from vae_robust import reparameterization
from vae_robust.reparameterization import (gradient_variance, leave_one_out,
                                           minibatch_bound, optimal_baseline,
                                           pathwise_gradient, pathwise_variance,
                                           score_gradient, score_variance,
                                           surrogate_gradient, variance_parts)



@pytest.fixture(autouse=True, scope='module')
def double_precision():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def tensor(v): return torch.tensor(v, dtype=torch.double)  # fixtures do not act while a module loads

quick = settings(max_examples=50, deadline=None, derandomize=True)
number = st.floats(-2, 2, width=32)
def vector(n): return st.lists(number, min_size=n, max_size=n).map(tensor)
widths = st.lists(st.floats(.25, 2, width=32), min_size=2, max_size=2).map(tensor)

# Quadrature: two independent standard normals at 10 x 10 nodes;
# exact for polynomials of degree 19 in each.
t, w = roots_hermitenorm(10)
EPS = tensor(np.stack(np.meshgrid(t, t), -1).reshape(-1, 2))
P = tensor(np.outer(w, w).ravel() / w.sum()**2)


class AtNodes:
    """A diagonal Gaussian whose 'samples' are the quadrature nodes:
    row sums weighted by P are exact expectations."""
    def __init__(self, mu, sigma):
        self.mu, self.sigma = mu, sigma
        self.log_prob = Independent(Normal(mu, sigma), 1).log_prob
    def rsample(self): return self.mu + self.sigma*EPS
    def sample(self): return self.rsample().detach()


def rows(v, n=len(P)): return v.expand(n, *v.shape).clone().requires_grad_()
def quadratic(a, b, H, mu): return lambda z: a + (z - mu) @ b + (((z - mu) @ H)*(z - mu)).sum(-1)/2
def symmetric(v): return torch.stack([v[:2], v[1:]])

TABLE = [  # a, b, H (three numbers), sigma
    (0., [1., 0.], [0., 0., 0.], [1., 1.]),            # linear
    (-100., [.5, -1.], [-1., 0., -2.], [.1, .7]),      # a log likelihood of -100 nats
    (3., [2., 1.], [1., -.8, .3], [.5, 1.5]),          # coordinates that interact
    (0., [0., 0.], [0., 1., 0.], [2., .3])]            # nothing but the interaction
TABLE = [(a, tensor(b), symmetric(tensor(H)), tensor(s)) for a, b, H, s in TABLE]


def test_every_export_is_tested():
    assert set(reparameterization.__all__) <= set(globals())


# --------------------------------------------------------------------------- the closed forms

@pytest.mark.parametrize('a, b, H, sigma', TABLE)
@pytest.mark.parametrize('baseline', [0., -7., tensor([1., -2.])])
def test_score_variance(a, b, H, sigma, baseline):
    y = (quadratic(a, b, H, 0.)(sigma*EPS)[:, None] - baseline) * EPS/sigma
    assert_close(score_variance(a, b, H, sigma, baseline), P @ y**2 - (P @ y)**2)


@pytest.mark.parametrize('a, b, H, sigma', TABLE)
def test_pathwise_variance(a, b, H, sigma):
    y = b + (sigma*EPS) @ H
    assert_close(pathwise_variance(H, sigma), P @ y**2 - b**2)


@pytest.mark.parametrize('a, b, H, sigma', TABLE)
def test_optimal_baseline(a, b, H, sigma):
    s2 = (EPS/sigma)**2
    assert_close(optimal_baseline(a, H, sigma),
                 (P*quadratic(a, b, H, 0.)(sigma*EPS)) @ s2 / (P @ s2))


@quick
@given(number, vector(2), vector(3).map(symmetric), widths, vector(2))
def test_no_baseline_beats_the_optimal_one_and_none_the_path(a, b, H, sigma, other):
    r = optimal_baseline(a, H, sigma).requires_grad_()
    best = score_variance(a, b, H, sigma, r)
    assert_close(torch.autograd.grad(best.sum(), r)[0], torch.zeros(2))
    assert (best <= score_variance(a, b, H, sigma, other) + 1e-9).all()
    assert (pathwise_variance(H, sigma) <= best + 1e-9).all()


# --------------------------------------------------------------------------- unbiasedness, exactly

@quick
@given(vector(6), vector(2), widths)
def test_gradients_are_unbiased(k, mu, sigma):
    """For a quartic, in the mean and in the log variance,
    against the derivative of the quadrature itself."""
    f = lambda z: (k[0] + k[1]*z[..., 0] + k[2]*z.prod(-1) + k[3]*z[..., 1]**2
                   + k[4]*z[..., 0]**3 + k[5]*(z**2).prod(-1))
    for i, leaf in enumerate([mu, 2*sigma.log()]):
        build = lambda v, c=AtNodes: c(v, sigma) if i == 0 else c(mu, (v/2).exp())
        one = leaf.clone().requires_grad_()
        exact = torch.autograd.grad(P @ f(build(one).rsample()), one)[0]
        many = rows(leaf)
        for estimate in (score_gradient(f, build(many), many),
                         score_gradient(f, build(many), many, baseline=11.),
                         pathwise_gradient(f, build(many), many)):
            assert_close(P @ estimate, exact, rtol=1e-8, atol=1e-8)


@quick
@given(vector(3), vector(4), vector(2), widths)
def test_surrogate_gradient_is_unbiased_for_any_surrogate(k, c, mu, sigma):
    f = lambda z: k[0]*z[..., 0]**2 + k[1]*z.prod(-1) + k[2]
    h = lambda z: c[0] + c[1]*z[..., 0] + c[2]*z[..., 1]**3 + c[3]*z.prod(-1)
    m = rows(mu)
    q = AtNodes(m, sigma)
    exact = torch.stack([2*k[0]*mu[0] + k[1]*mu[1], k[1]*mu[0]])
    assert_close(P @ surrogate_gradient(f, h, q, m), exact, rtol=1e-8, atol=1e-8)
    assert_close(surrogate_gradient(f, f, q, m), pathwise_gradient(f, q, m))
    assert_close(surrogate_gradient(f, lambda z: 0*z[..., 0], q, m), score_gradient(f, q, m))


def test_surrogate_may_follow_an_integrand_without_a_gradient():
    m = rows(torch.zeros(2))
    f, h = lambda z: (z[..., 0].detach() > 0).double(), lambda z: z[..., 0].sigmoid()
    g = surrogate_gradient(f, h, AtNodes(m, torch.ones(2)), m)
    assert g.shape == m.shape and g.isfinite().all()


@quick
@given(vector(3), vector(3), st.integers(2, 4))
def test_leave_one_out_is_unbiased(values, logits, L):
    """Over all 3^L outcomes of L categorical draws;
    the plain mean loses the fraction 1/L of the gradient."""
    p = logits.softmax(0)
    score = torch.eye(3) - p  # row k: gradient of log p_k in the logits
    loo, plain = torch.zeros(3), torch.zeros(3)
    for ks in product(range(3), repeat=L):
        f, chance = values[list(ks)], p[list(ks)].prod()
        loo += chance * (f - leave_one_out(f)) @ score[list(ks)] / L
        plain += chance * (f - f.mean()) @ score[list(ks)] / L
    exact = p * (values - p @ values)
    assert_close(loo, exact)
    assert_close(plain, (1 - 1/L)*exact)


def test_leave_one_out():
    f = torch.tensor([[1., 10.], [2., 20.], [6., 60.]])
    assert_close(leave_one_out(f), torch.tensor([[4., 40.], [3.5, 35.], [1.5, 15.]]))
    with pytest.raises(ValueError, match='at least 2'):
        leave_one_out(f[:1])


# ------------------------------------------------------------------ unbiasedness, by sampling

N_DRAWS = 40_000
PRICE = tensor([1., 2., 3.])
SAMPLED = {  # name: parameter, distribution of its rows, f, exact gradient
    'normal mean': (tensor(.7), lambda m: Normal(m, 2.), lambda z: z**3, 3*(.7**2 + 4)),
    'normal log variance': (tensor(.4), lambda lv: Normal(1., (lv/2).exp()),
                            lambda z: z**2, np.exp(.4)),
    'gamma shape': (tensor(2.), lambda a: Gamma(a, 1.), lambda z: z**2, 5.),
    'categorical': (tensor([0., 0., 0.]), lambda c: OneHotCategorical(logits=c),
                    lambda z: z @ PRICE, (PRICE - 2)/3)}


def sine_surrogate(f, q, v): return surrogate_gradient(f, torch.sin, q, v)


@pytest.mark.parametrize('estimator', [score_gradient, pathwise_gradient, sine_surrogate])
@pytest.mark.parametrize('phi, q, f, exact', SAMPLED.values(), ids=SAMPLED)
def test_sampled_gradients(estimator, phi, q, f, exact):
    torch.manual_seed(0)
    v = rows(phi, N_DRAWS)
    if estimator is not score_gradient and not q(v).has_rsample:
        with pytest.raises(NotImplementedError):
            estimator(f, q(v), v)
        return
    g = estimator(f, q(v), v)
    assert g.shape == v.shape and not g.requires_grad
    assert ((g.mean(0) - exact).abs() < 5*g.std(0)/N_DRAWS**.5).all()


def test_a_moving_support_is_outside_the_score_function():
    v = rows(torch.tensor(2.), 1000)
    q = torch.distributions.Uniform(0., v)
    assert (score_gradient(lambda z: z, q, v).mean() < 0
            < pathwise_gradient(lambda z: z, q, v).mean())


def test_score_gradient_does_not_differentiate_f():
    """An f built from phi counts as a number: the score remains, mean 0;
    differentiating f would add E[log q] = -1.42."""
    torch.manual_seed(0)
    v = rows(tensor(1.), 1000)
    g = score_gradient(lambda z: v, Normal(v, 1.), v)
    assert abs(g.mean()) < 5*g.std()/1000**.5 and not g.requires_grad


# --------------------------------------------------------------------------- the minibatch

@pytest.mark.parametrize('L, M', [(1, 1), (1, 7), (4, 1), (3, 5)])
def test_minibatch_bound(L, M):
    torch.manual_seed(0)
    log_lik, kl = -100*torch.rand(L, M), 10*torch.rand(M)
    loop = sum(sum(log_lik[l, i].item() for l in range(L))/L - kl[i].item() for i in range(M)) / M
    assert_close(minibatch_bound(log_lik, kl).item(), loop)


def test_minibatch_bound_of_repeated_samples_is_the_same():
    log_lik, kl = torch.tensor([[-3., -5.]]), torch.tensor([1., 2.])
    # the KL is not divided by L
    assert_close(minibatch_bound(log_lik.expand(9, 2), kl), minibatch_bound(log_lik, kl))


MEAN = tensor([0., 1., 3., 8.])  # four images; noise +-SPREAD with equal chance
SPREAD = tensor([1., 2., .5, 0.])
V_DATA, V_NOISE = MEAN.var(correction=0), (SPREAD**2).mean()


def exact_variance(batches, L):
    "Variance of the minibatch mean over all batches and all signs of the noise, by enumeration."
    values = [MEAN[i] + SPREAD[i]*torch.tensor(signs).view(len(i), L).mean(1)
              for i in map(list, batches) for signs in product([-1., 1.], repeat=len(i)*L)]
    return torch.stack([v.mean() for v in values]).var(correction=0)


@pytest.mark.parametrize('M, L', [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_gradient_variance(M, L):
    assert_close(gradient_variance(V_DATA, V_NOISE, M, L),
                 exact_variance(product(range(4), repeat=M), L))


@pytest.mark.parametrize('M, L', [(1, 1), (2, 1), (2, 3), (3, 2), (4, 1), (4, 2)])
def test_gradient_variance_without_replacement(M, L):
    assert_close(gradient_variance(V_DATA, V_NOISE, M, L, N=4),
                 exact_variance(combinations(range(4), M), L))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(vector(3), vector(3), st.integers(2, 3))
def test_variance_parts_are_unbiased(mean, spread, S):
    "Over all signs of the noise of three images with S samples each."
    g = torch.tensor(list(product([-1., 1.], repeat=3*S))).T.reshape(3, S, -1)
    V_data, V_noise = variance_parts(mean[:, None, None] + spread[:, None, None]*g)
    assert_close(V_data.mean(), mean.var(correction=0))
    assert_close(V_noise.mean(), (spread**2).mean())


def test_variance_parts_shapes():
    V_data, V_noise = variance_parts(torch.randn(5, 2, 3, 4))
    assert V_data.shape == V_noise.shape == (3, 4)
