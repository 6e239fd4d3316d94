"""Chapter 05 against oracles other than the notebook's: scipy densities and quadrature,
closed forms, autograd, torch.distributions."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats
from torch.distributions import (Categorical, Normal, OneHotCategorical, RelaxedOneHotCategorical,
                                 kl_divergence)

from vae_robust.concrete import (Rounded, categorical_kl, code_entropy, concrete, concrete_kl,
                                 concrete_kl_exact, concrete_log_density, gumbel, gumbel_max,
                                 level_logits, levels, log_concrete, on_levels, straight_through)
from vae_robust.vae import VAE, Posterior, elbo, kl, log_marginal

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


# ---------------------------------------------------------------- levels

def published(h, K):
    """The quantiser of Mentzer et al. (arXiv:2309.15505, appendix A.1) without its eps and its
    shift of h: whole numbers, of which the lowest is -(K // 2)."""
    offset = .5 if K % 2 == 0 else 0.
    bounded = torch.tanh(h)*(K - 1)/2 - offset
    return bounded + (bounded.round() - bounded).detach()


def rounded(h, K): return Rounded(logits=level_logits(h, K))


def spread(K, n=3001):
    "Scalars that miss all borders of K levels."
    h = torch.linspace(-4, 4, n, dtype=torch.float64)
    borders = torch.atanh((torch.arange(1, K) - K/2)/((K - 1)/2)) if K > 2 else torch.zeros(1)
    return h[(h[:, None] - borders).abs().amin(1) > 1e-6]


@pytest.mark.parametrize('K', [2, 3, 4, 5, 6, 7, 8, 38])
def test_levels_and_their_gradient_are_those_of_the_published_quantiser(K):
    h = spread(K).requires_grad_()
    theirs, mine = published(h, K), rounded(h, K).mean @ levels(K, h)
    torch.testing.assert_close(mine, theirs + (.5 if K % 2 == 0 else 0.))
    assert torch.equal(rounded(h, K).mode.argmax(-1), (theirs + K//2).round().long())
    assert len(mine.detach().round(decimals=6).unique()) == K
    f = lambda v: (v**3 - v*1.7).sin().sum()
    slopes = [torch.autograd.grad(f(v - (0 if v is mine else -.5*(K % 2 == 0))), h)[0]
              for v in (theirs, mine)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize('G, K', [(1, 6), (2, 5), (4, 3)])
def test_every_code_is_reached(G, K):
    v = torch.atanh(levels(K, torch.zeros(()))*1.999/(K - 1 + 1e-6))
    h = torch.cartesian_prod(*[v]*G).view(-1, G)
    codes = rounded(h, K).mode
    assert len(codes.flatten(1).unique(dim=0)) == K**G
    assert code_entropy(codes).item() == pytest.approx(G*math.log(K), abs=1e-4)


@many
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5), st.integers(2, 40))
def test_a_rounded_code_costs_log_K_a_scalar_and_is_certain(h, K):
    h = torch.tensor([h], requires_grad=True)
    q = Posterior(Normal(torch.zeros(1, 0), 1.), rounded(h, K))
    kl_c = kl(q)[1]
    assert kl_c.item() == pytest.approx(h.numel()*math.log(K), rel=1e-6)
    assert not torch.autograd.grad(kl_c.sum(), h, retain_graph=True)[0].any()
    assert torch.equal(q.sample(), q.mode) and torch.equal(q.rsample(), q.mode)
    assert q.mode.view(-1, K).sum(1).eq(1).all() and not q.c.log_prob(q.c.sample((3,))).any()


def test_lines_have_a_slope_where_the_bound_has_none():
    h = torch.tensor([20.], requires_grad=True)
    value, margin = rounded(h, 6).mean @ levels(6, h), level_logits(h, 6).diff()
    assert torch.autograd.grad(value.sum(), h)[0] == 0
    assert torch.autograd.grad(margin.sum(), h)[0] == 5*5


def test_the_gradient_of_a_cubic_is_half_too_large_on_average():
    "(5.24), whose third line is exact for it: 6/12."
    u = torch.arange(-2, 2, .01, dtype=torch.float64) + .005
    h = (u/2).atanh().requires_grad_()
    v = rounded(h, 5).mean @ levels(5, h)
    g = torch.autograd.grad((v**3).sum(), h)[0]/(2 - u**2/2)
    k = u.floor()
    excess = (g - ((k + 1)**3 - k**3)).view(4, 100).mean(1)
    torch.testing.assert_close(excess, torch.full((4,), .5, dtype=torch.float64))


def test_entropy_is_that_of_the_counts():
    joint = np.random.default_rng(0).integers(1, 9, (3, 3))
    a, b = (torch.from_numpy(i).flatten() for i in np.indices((3, 3)))
    pairs = torch.stack([a, b], 1).repeat_interleave(torch.from_numpy(joint).flatten(), 0)
    c = torch.eye(3)[pairs]
    both, first, second = code_entropy(c), code_entropy(c[:, 0]), code_entropy(c[:, 1])
    for found, n in ((both, joint), (first, joint.sum(1)), (second, joint.sum(0))):
        assert found.item() == pytest.approx(stats.entropy(n.ravel()), abs=1e-6)
    assert both < first + second


@pytest.mark.parametrize('size, network', [(32, 'small'), (32, 'large'), (64, 'small')])
def test_a_vae_on_levels_decodes_numbers(size, network):
    m = on_levels(VAE(2, 5, 1, size, network=network, categoricals=3)).eval()
    m.encoder[-2].weight.data.mul_(100)
    x = torch.rand(6, 1, size, size)
    mu, _, h = m.encoder[:-1](x).split([2, 2, 3], 1)
    v = (published(h, 5)/2).detach()  # from -1 to 1
    assert len(v.unique()) > 2
    torch.testing.assert_close(m(x), m.decoder[1:](torch.cat([mu, v], 1)).sigmoid())
    assert m.posterior(x).mode.shape == (6, 2 + 3*5) and m.encode(x)[2].shape == (6, 3, 5)


def test_scalars_that_all_images_push_one_way_are_spread_all_the_same():
    m = on_levels(VAE(1, 6, categoricals=4))
    m.encoder[-2].bias.data.fill_(50)
    m.encoder[-2].weight.data.mul_(100)
    x = torch.rand(200, 1, 32, 32)
    c = m.train().posterior(x).c.mode
    assert all(code_entropy(d) > .9*math.log(6) for d in c.unbind(1))
    mu = m.encoder[:-1](x)[:, :1]
    torch.testing.assert_close(m.encode(x)[0], mu)  # the Gaussians are not touched
    assert len(m.eval().posterior(x).c.mode.flatten(1).unique(dim=0)) == 1  # running means


def test_training_on_levels_moves_every_weight_and_asks_for_reconstruction_alone(digits):
    m = on_levels(VAE(0, 6, categoricals=4))
    terms = elbo(m, digits)
    terms.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in m.parameters())
    grads = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    elbo(m, digits).rec.mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(m.parameters(), grads))
    assert terms.kl_z.shape == (16, 0)
    torch.testing.assert_close(terms.kl_c, torch.full((16,), 4*math.log(6)))


def test_the_bound_on_levels_is_below_the_sum_over_all_codes(digits):
    m = on_levels(VAE(0, 3, categoricals=2)).eval()
    codes = torch.eye(3)[torch.cartesian_prod(*[torch.arange(3)]*2)].flatten(1)
    with torch.no_grad():
        each = torch.stack([m.log_likelihood(digits, c.expand(16, -1)) for c in codes])
        own, exact = log_marginal(m, digits, 5), each.logsumexp(0) - math.log(9)
        terms = elbo(m, digits)
    torch.testing.assert_close(own, -terms.rec - terms.kl_c)
    assert (own < exact).all() and (own >= each.amin(0) - math.log(9) - 1e-3).all()
