"""Chapter 02: every exported formula against an oracle of its own,
and what must hold for any numbers."""
import itertools, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, special, stats
from torch.distributions import Categorical, MultivariateNormal, Normal
from torch.testing import assert_close
from vae_robust.elbo import (exact_elbo, iwae_bound, log_integral, log_weights,
                             mixture_log_joint, mixture_step, ppca_elbo,
                             ppca_marginal, ppca_posterior, ppca_step, responsibilities)

examples = settings(max_examples=50, deadline=None)
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)

@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

def logs(n, lo=-30, hi=30):
    return arrays(np.float64, n, elements=st.floats(lo, hi)).map(torch.tensor)
def random_ppca(seed, N=7, P=5, D=2):
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(N, P, generator=g), torch.randn(P, D, generator=g)
    return x, W, torch.rand((), generator=g) + .2
def random_mixture(seed, N=60, P=2, K=3):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(N, P, generator=g)*torch.tensor([2., .5])
         + 3*torch.randint(0, 2, (N, 1), generator=g))
    A = torch.randn(K, P, P, generator=g)
    return (x, (torch.rand(K, generator=g) + .1).softmax(0), torch.randn(K, P, generator=g),
            A @ A.mT + torch.eye(P))

# ------------------------------------ (2.1): least squares, by a maximiser that does not know of it
def test_gaussian_noise_is_least_squares():
    A, t = torch.randn(50, 3), torch.randn(50)
    theta = torch.zeros(3, requires_grad=True)
    opt = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16,
                            line_search_fn='strong_wolfe')
    def loss():
        opt.zero_grad()
        out = -Normal(A @ theta, .3).log_prob(t).sum()
        out.backward()
        return out
    opt.step(loss)
    expected = np.linalg.lstsq(A.numpy(), t.numpy(), rcond=None)[0]
    assert_close(theta.detach(), torch.tensor(expected), atol=1e-7, rtol=0)

# ---------------------------------------- the integral
@pytest.mark.parametrize('log_f, lo, hi, exact', [
    (lambda z: -z**2/2, -12, 12, .5*math.log(2*math.pi)),
    (lambda z: -z**2/2 - 2000, -12, 12, .5*math.log(2*math.pi) - 2000),
    (lambda z: -z**2/2 + 2000, -12, 12, .5*math.log(2*math.pi) + 2000),
    (lambda z: z, 0, 1, math.log(math.e - 1)),
    (lambda z: 3*z.log(), 1e-9, 2, math.log(4)),
    (lambda z: (z > -9)*0., 0, 5, math.log(5))])
def test_log_integral(log_f, lo, hi, exact):
    z = torch.linspace(lo, hi, 4001)
    assert_close(log_integral(log_f(z), z).item(), exact, atol=2e-6, rtol=0)

def test_log_integral_over_any_dimension_and_uneven_grid():
    z = torch.linspace(0, 1, 801)**2*4
    f = torch.stack([z.sin().abs() + 1, z.cos().abs() + .5])
    expected = torch.tensor(integrate.trapezoid(f.numpy(), z.numpy(), axis=1)).log()
    assert_close(log_integral(f.log(), z), expected)
    assert_close(log_integral(f.log().T, z, dim=0), expected)

# ---------------------------------------- weights
def test_log_weights_have_the_integral_as_mean():
    """z of shape (3, 2): three batches of a two-dimensional latent;
    the joint integrates to 7 whatever q."""
    q = MultivariateNormal(torch.randn(3, 2), 4*torch.eye(2))
    log_w = log_weights(lambda z: Normal(0., 1.).log_prob(z).sum(-1) + math.log(7), q, 40_000)
    assert log_w.shape == (40_000, 3)
    w = log_w.exp()
    assert ((w.mean(0) - 7).abs() < 5*w.std(0)/200).all()

@few
@given(logs(4, -3, 3), logs(4, -3, 3))
def test_weights_are_unbiased_for_any_q(a, b):
    "Exactly: the average of w over all outcomes, weighted by q, is the marginal."
    q = Categorical(logits=b)
    log_w = log_weights(lambda z: a[z], q, 400)
    w = {round(v, 9) for v in log_w.exp().tolist()}
    table = (a - q.logits).exp()
    assert w <= {round(v, 9) for v in table.tolist()}
    assert_close((q.probs*table).sum().log(), torch.logsumexp(a, 0))

@pytest.mark.parametrize('shape, dim', [((5,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 5, 3), -2)])
def test_iwae_bound_is_scipys_logsumexp_with_weights_1_over_K(shape, dim):
    log_w = torch.randn(shape)*4 - 900
    expected = special.logsumexp(log_w.numpy(), axis=dim, b=1/5)
    assert_close(iwae_bound(log_w, dim=dim), torch.as_tensor(expected))

def test_iwae_bound_keeps_single_precision():
    assert iwae_bound(torch.full((4, 2), -500., dtype=torch.float32)).dtype == torch.float32

@examples
@given(logs(6, -50, 50), st.floats(-1e3, 1e3))
def test_iwae_bound_is_a_mean(log_w, c):
    b = iwae_bound(log_w)
    assert log_w.mean() - 1e-9 <= b <= log_w.max() + 1e-9
    assert_close(iwae_bound(log_w + c), b + c)
    assert_close(iwae_bound(log_w.flip(0)), b)
    assert_close(iwae_bound(log_w[:1]), log_w[0])

@examples
@given(logs(6, -20, 20))
def test_iwae_bound_rises_over_subsets(log_w):
    "The lemma behind monotonicity: the average over all subsets of size M rises with M."
    mean = lambda M: np.mean([iwae_bound(log_w[list(i)]).item()
                              for i in itertools.combinations(range(6), M)])
    means = [mean(M) for M in range(1, 7)]
    assert (np.diff(means) >= -1e-9).all()

def test_iwae_bound_approaches_the_exact_value_of_a_linear_gaussian_model():
    s, x, q = .5, 1.3, stats.norm(.8, .6)
    exact = stats.norm(0, math.sqrt(1 + s*s)).logpdf(x)
    posterior = stats.norm(x/(1 + s*s), s/math.sqrt(1 + s*s))
    kl = integrate.quad(lambda z: q.pdf(z)*(q.logpdf(z) - posterior.logpdf(z)), -4, 6)[0]
    joint = lambda z: Normal(0., 1.).log_prob(z) + Normal(z, s).log_prob(torch.tensor(x))
    log_w = log_weights(joint, Normal(.8, .6), 64*4000)
    b1, b64 = log_w, iwae_bound(log_w.reshape(64, -1))
    assert (b1.mean() - exact + kl).abs() < 5*b1.std()/len(b1)**.5
    assert b1.mean() < b64.mean() and (b64.mean() - exact).abs() < 5*b64.std()/len(b64)**.5 + .01

# ---------------------------------------- the bound
@examples
@given(logs(5, -8, 8), logs(5, -8, 8))
def test_elbo_is_the_evidence_minus_the_divergence(a, b):
    log_q, top = b.log_softmax(0), special.logsumexp(a.numpy())
    expected = top - stats.entropy(log_q.exp().numpy(), special.softmax(a.numpy()))
    assert_close(exact_elbo(a, log_q).item(), expected, atol=1e-9, rtol=1e-9)
    assert exact_elbo(a, log_q) <= top + 1e-9
    assert_close(exact_elbo(a, a.log_softmax(0)).item(), top)

def test_elbo_with_zeros_in_q():
    assert_close(exact_elbo(torch.tensor([-1., -2.]), torch.tensor([0., -math.inf])), torch.tensor(-1.))
    assert exact_elbo(torch.tensor([-1., -math.inf]), torch.tensor([.5, .5]).log()) == -math.inf

@pytest.mark.parametrize('mu, sigma', [(.3, .4), (-1., 1.), (2., .2)])
def test_elbo_on_a_grid_is_the_closed_form(mu, sigma):
    z, s, x = torch.linspace(-12, 12, 6001), .7, .9
    joint = Normal(0., 1.).log_prob(z) + Normal(z, s).log_prob(torch.tensor(x))
    kl = (mu**2 + sigma**2 - 2*math.log(sigma) - 1)/2
    exact = -.5*math.log(2*math.pi*s*s) - ((x - mu)**2 + sigma**2)/(2*s*s) - kl
    q = Normal(mu, sigma).log_prob(z)
    assert_close(exact_elbo(joint, q, z[1] - z[0]).item(), exact)
    assert_close(exact_elbo(joint[:, None], q[:, None], z[1] - z[0], dim=0), torch.tensor([exact]))

# ---------------------------------------- the mixture
def test_mixture_log_joint_and_responsibilities_against_scipy():
    x, pi, mu, cov = random_mixture(3)
    density = lambda k: stats.multivariate_normal(mu[k].numpy(), cov[k].numpy()).pdf(x.numpy())
    joint = np.stack([pi[k].item()*density(k) for k in range(3)], 1)
    assert_close(mixture_log_joint(x, pi, mu, cov), torch.tensor(np.log(joint)))
    assert_close(responsibilities(x, pi, mu, cov), torch.tensor(joint/joint.sum(1, keepdims=True)))

def test_responsibilities_far_from_every_component():
    mu, cov = torch.tensor([[0., 0.], [1., 0.]]), torch.eye(2).expand(2, 2, 2)
    r = responsibilities(torch.tensor([[1e3, 0.]]), torch.tensor([.5, .5]), mu, cov)
    assert_close(r, torch.tensor([[0., 1.]]))

def test_mixture_step_is_a_weighted_fit():
    x, r = torch.randn(30, 3), torch.randn(30, 2).softmax(1)
    pi, mu, cov = mixture_step(x, r)
    assert_close(pi, r.mean(0))
    for k in range(2):
        assert_close(mu[k], torch.tensor(np.average(x.numpy(), axis=0, weights=r[:, k].numpy())))
        assert_close(cov[k], torch.tensor(np.cov(x.numpy().T, aweights=r[:, k].numpy(), ddof=0)))

@few
@given(seeds)
def test_em_for_mixtures_never_falls(seed):
    x, *theta = random_mixture(seed)
    values = []
    for _ in range(8):
        r, joint = responsibilities(x, *theta), mixture_log_joint(x, *theta)
        values.append(exact_elbo(joint, r.log()).sum())
        assert_close(values[-1], torch.logsumexp(joint, -1).sum())
        theta = mixture_step(x, r)
        values.append(exact_elbo(mixture_log_joint(x, *theta), r.log()).sum())
    assert (torch.stack(values).diff() > -1e-8).all()

# ---------------------------------------- probabilistic PCA
@few
@given(seeds)
def test_ppca_marginal_against_scipy(seed):
    x, W, s2 = random_ppca(seed)
    full = stats.multivariate_normal(np.zeros(5), (W @ W.T + s2*torch.eye(5)).numpy())
    assert_close(ppca_marginal(W, s2).log_prob(x), torch.tensor(full.logpdf(x.numpy())))

@few
@given(seeds)
def test_ppca_posterior_is_the_curvature_and_the_maximum_of_the_joint(seed):
    x, W, s2 = random_ppca(seed)
    mean, cov = ppca_posterior(x, W, s2)
    log_prior = lambda z: Normal(0., 1.).log_prob(z).sum()
    joint = lambda z: log_prior(z) + Normal(z @ W.T, s2.sqrt()).log_prob(x[0]).sum()
    H = torch.autograd.functional.hessian(joint, mean[0])
    assert_close(torch.linalg.inv(-H), cov)
    assert_close(torch.autograd.functional.jacobian(joint, mean[0]),
                 torch.zeros(2), atol=1e-8, rtol=0)

@few
@given(seeds)
def test_ppca_elbo_in_the_form_of_2_3(seed):
    "E[log p(x, z)] + H(q), with the expectation by the exact Gauss-Hermite rule for quadratics."
    x, W, s2 = random_ppca(seed)
    m, _ = ppca_posterior(x + 1, W, s2)
    C = torch.tensor([[.5, -.1], [-.1, .3]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    e = torch.tensor(list(itertools.product(nodes, repeat=2)))
    w = torch.tensor([a*b for a, b in itertools.product(weights, repeat=2)])/(2*math.pi)
    z = m[:, None] + e @ torch.linalg.cholesky(C).T
    log_lik = Normal(z @ W.T, s2.sqrt()).log_prob(x[:, None]).sum(-1)
    joint = Normal(0., 1.).log_prob(z).sum(-1) + log_lik
    assert_close(ppca_elbo(x, m, C, W, s2),
                 joint @ w + MultivariateNormal(torch.zeros(2), C).entropy())

@few
@given(seeds, st.floats(.05, 2.))
def test_ppca_elbo_is_a_bound(seed, c):
    x, W, s2 = random_ppca(seed)
    m, C = ppca_posterior(x, W, s2)
    exact = ppca_marginal(W, s2).log_prob(x)
    assert_close(ppca_elbo(x, m, C, W, s2), exact)
    assert (ppca_elbo(x, m + 1, c*torch.eye(2), W, s2) < exact).all()

@few
@given(seeds)
def test_ppca_step_cannot_be_improved(seed):
    x, W, s2 = random_ppca(seed)
    m, C = ppca_posterior(x, W, s2)
    W1, s1 = ppca_step(x, m, C)
    best = ppca_elbo(x, m, C, W1, s1).sum()
    for eps in (-1e-3, 1e-3):
        assert ppca_elbo(x, m, C, W1, s1*(1 + eps)).sum() < best
        for i in itertools.product(range(5), range(2)):
            place = torch.tensor([i[0]]), torch.tensor([i[1]])
            nudge = torch.zeros(5, 2).index_put(place, torch.tensor(eps))
            assert ppca_elbo(x, m, C, W1 + nudge, s1).sum() < best

@few
@given(seeds)
def test_em_for_ppca_never_falls(seed):
    x, *theta = random_ppca(seed, N=20)
    values = []
    for _ in range(10):
        q = ppca_posterior(x, *theta)
        values.append(ppca_elbo(x, *q, *theta).sum())
        theta = ppca_step(x, *q)
        values.append(ppca_elbo(x, *q, *theta).sum())
    assert (torch.stack(values).diff() > -1e-8).all()

def test_ppca_optimum_is_the_eigenvalue_solution():
    x = torch.randn(200, 5) @ torch.randn(5, 5)
    x = x - x.mean(0)
    theta = (torch.randn(5, 2), torch.tensor(1.))
    for _ in range(3000):
        theta = ppca_step(x, *ppca_posterior(x, *theta))
    lam, U = np.linalg.eigh((x.T @ x / 200).numpy())
    s2 = lam[:3].mean()
    best = (U[:, 3:]*(lam[3:] - s2)) @ U[:, 3:].T + s2*np.eye(5)
    assert_close(theta[0] @ theta[0].T + theta[1]*torch.eye(5),
                 torch.tensor(best), atol=1e-6, rtol=1e-6)
