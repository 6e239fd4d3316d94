import math
from itertools import permutations

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats
from torch import nn
from torch.distributions import Normal

from vae_robust.total_correlation import (density_ratio_loss, discriminator, factor_vae,
                                          gaussian_decomposition, kl_terms, log_aggregate,
                                          measured_terms, parts_with_code, permute_latents,
                                          stratified_weights, tc_vae, with_discriminator)
from vae_robust.vae import VAE, Posterior, elbo, parts

close = torch.testing.assert_close
quick = settings(max_examples=30, deadline=None)
sizes = st.integers(2, 40)
seeds = st.integers(0, 10**6)


def posteriors(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return Normal(torch.randn(n, d, generator=g, dtype=torch.float64),
                  .1 + torch.rand(n, d, generator=g, dtype=torch.float64))


# ---------------------------------------------------------------- the closed form
def entropy(cov): return stats.multivariate_normal(cov=cov).entropy()

@pytest.mark.parametrize('S, v', [
    ([[1.]], [.1]),
    ([[.7, .5], [.5, .7]], [.3, .3]),
    ([[2., -1., 0.], [-1., 1., .3], [0., .3, .5]], [.05, 1., 2.]),
    (np.zeros((4, 4)), [1.]*4),
])
def test_gaussian_decomposition_by_scipys_entropies(S, v):
    mi, tc, dw = gaussian_decomposition(torch.tensor(S, dtype=torch.float64),
                                        torch.tensor(v, dtype=torch.float64))
    C = np.array(S) + np.diag(v)
    single = sum(entropy(c) for c in C.diagonal())
    cross = sum(integrate.quad(lambda z: -stats.norm.logpdf(z)*stats.norm.pdf(z, 0, c**.5),
                               -12*c**.5, 12*c**.5)[0] for c in C.diagonal())
    for term, expected in zip((mi, tc, dw), (entropy(C) - entropy(np.diag(v)),
                                             single - entropy(C), cross - single)):
        assert abs(term - expected) < 1e-8

@quick
@given(seeds, st.integers(1, 5))
def test_the_closed_form_is_never_negative_and_sums_to_the_divergence(seed, d):
    g = torch.Generator().manual_seed(seed)
    L = torch.randn(d, d, generator=g, dtype=torch.float64)
    v = .05 + torch.rand(d, generator=g, dtype=torch.float64)
    terms = torch.stack(gaussian_decomposition(L @ L.T, v))
    assert (terms > -1e-9).all()
    close(terms.sum(), ((L @ L.T).diagonal() + v - 1 - v.log()).sum()/2)
    if d == 1:
        assert terms[1].abs() < 1e-9


# ---------------------------------------------------------------- mixtures
@quick
@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_log_aggregate_by_plain_loops(seed, B, N, D):
    q = posteriors(N, D, seed)
    z = posteriors(B, D, seed + 1).loc
    w = posteriors(B, N, seed + 2).scale.numpy()
    p = [[[stats.norm.pdf(z[i, d], q.loc[j, d], q.scale[j, d]) for d in range(D)] for j in range(N)]
         for i in range(B)]
    joint, marginals = log_aggregate(z, q, torch.tensor(w).log())
    for i in range(B):
        density = sum(w[i, j]*math.prod(p[i][j]) for j in range(N))
        assert math.isclose(joint[i], math.log(density), abs_tol=1e-9)
        for d in range(D):
            density = sum(w[i, j]*p[i][j][d] for j in range(N))
            assert math.isclose(marginals[i, d], math.log(density), abs_tol=1e-9)

def test_log_aggregate_survives_underflow():
    q = Normal(torch.zeros(3, 200), .01)
    joint, marginals = log_aggregate(torch.ones(2, 200), q, torch.tensor(-math.log(3)))
    assert joint.isfinite().all() and marginals.isfinite().all()

@quick
@given(seeds, sizes, st.integers(1, 6))
def test_the_three_terms_sum_to_the_sampled_divergence(seed, B, D):
    q, w = posteriors(B, D, seed), posteriors(B, B, seed + 1).scale
    z = q.loc + q.scale*posteriors(B, D, seed + 2).loc
    sampled = stats.norm.logpdf(z, q.loc, q.scale).sum(1) - stats.norm.logpdf(z).sum(1)
    close(kl_terms(z, q, q, w.log()).sum(0), torch.tensor(sampled), atol=1e-8, rtol=0)

def test_the_terms_of_independent_latents_and_of_the_prior():
    mu = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)]*3)  # a product of marginals, exactly
    q = Normal(mu, .3)
    z = q.sample()
    tc = kl_terms(z, q, q, torch.tensor(-math.log(125)))[1]
    assert tc.abs().max() < 1e-4  # at each code, not only on average
    prior = Normal(torch.zeros(10, 3), 1.)
    close(kl_terms(prior.sample(), prior, prior, torch.tensor(-math.log(10))),
          torch.zeros(3, 10), atol=1e-5, rtol=0)

def test_independence_has_a_total_correlation_of_about_zero_from_a_minibatch():
    q = Normal(.8*torch.randn(1000, 3), .6)
    tc = kl_terms(q.sample(), q, q, stratified_weights(1000, 10**6).log())[1]
    assert abs(tc.mean()) < .05

@pytest.mark.parametrize('rho, var', [(0., .5), (.8, .3), (-.6, .5)])
def test_measured_terms_find_the_closed_form(rho, var):
    S = (1 - var)*torch.tensor([[1., rho], [rho, 1.]])
    L = torch.linalg.cholesky(S)
    found = measured_terms(Normal(torch.randn(4000, 2) @ L.T, var**.5), 1000)
    assert found.shape == (3, 1000)
    for term, exact in zip(found, gaussian_decomposition(S, torch.full((2,), var))):
        assert abs(term.mean() - exact) < 5*(term.std()/1000**.5 + 4000**-.5)

def test_measured_terms_of_few_images_use_them_all():
    q = Normal(torch.arange(7.)[:, None]*100, 1.)
    found = measured_terms(q, 1000, at_once=3)
    assert found.shape == (3, 7)
    close(found[0], torch.full((7,), math.log(7)))  # each image is known by its code


# ---------------------------------------------------------------- weights
@quick
@given(sizes, st.integers(0, 10**5))
def test_stratified_weights(B, more):
    N, M = B + more, B - 1
    W = stratified_weights(B, N).double()
    close(W.sum(1), torch.ones(B, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (W > 0).all()
    close(W.diagonal(), torch.full((B,), 1/N, dtype=torch.float64), atol=1e-7, rtol=1e-5)
    for i, row in enumerate(W):
        others = sorted(torch.cat([row[:i], row[i + 1:]]).tolist())
        assert np.allclose(others, [(N - M)/(N*M)] + [1/M]*(M - 1))

@pytest.mark.parametrize('B, N', [(2, 2), (2, 5), (3, 3), (3, 5), (4, 4), (4, 6)])
def test_the_stratified_estimate_is_unbiased_for_every_row_and_every_own_image(B, N):
    p, W = torch.rand(N, dtype=torch.float64)**4, stratified_weights(B, N).double()
    for row in range(B):
        for own in range(N):
            others = [n for n in range(N) if n != own]
            batches = [list(o[:row]) + [own] + list(o[row:]) for o in permutations(others, B - 1)]
            assert abs(np.mean([(W[row]*p[b]).sum() for b in batches]) - p.mean()) < 1e-7


@pytest.mark.parametrize('B, N', [(1, 5), (6, 5), (0, 0)])
def test_batches_that_cannot_be(B, N):
    with pytest.raises(ValueError, match='need 2 <= B <= N'):
        stratified_weights(B, N)


# ---------------------------------------------------------------- beta-TCVAE
@pytest.fixture
def model(digits):
    """An untrained VAE, its last layer scaled and shifted so that its posteriors are narrow and
    differ from image to image."""
    m = VAE(5, 4).eval()
    with torch.no_grad():
        m.encoder[-1].weight.mul_(400)
        m.encoder[-1].bias.sub_(m.encoder(digits).mean(0) + torch.tensor([0.]*5 + [3.]*5 + [0.]*4))
    return m

def seeded(f, *args, **kw):
    torch.manual_seed(3)
    return f(*args, **kw)

def test_parts_with_code_are_parts(model, digits):
    q, z, *rest = seeded(parts_with_code, model, digits)
    for a, b in zip(rest, seeded(parts, model, digits)):
        assert (a == b).all()
    assert z.shape == q.loc.shape == (16, 5)

def test_beta_one_is_the_evidence_bound(model, digits):
    for a, b in zip(seeded(tc_vae, model, digits, beta=1, n_data=500), seeded(elbo, model, digits)):
        assert (a == b).all()

@pytest.mark.parametrize('beta, n_data', [(0., 16), (2., 100), (6., 60_000)])
def test_tc_vae_by_loops(model, digits, beta, n_data):
    terms = seeded(tc_vae, model, digits, 7, beta=beta, n_data=n_data)
    q, z, rec, kl_z, kl_c = [t if isinstance(t, Normal) else t.detach()
                             for t in seeded(parts_with_code, model, digits)]
    tc, M = 0, 15
    for i in range(16):
        w = [1/n_data if j == i else (n_data - M)/(n_data*M) if j == (i + 1) % 16 else 1/M
             for j in range(16)]
        mean, sd = q.loc.detach().numpy().astype(float), q.scale.detach().numpy()
        p = stats.norm.pdf(z[i].numpy(), mean, sd)  # (16, 5)
        tc += (math.log(w @ p.prod(1)) - sum(math.log(w @ p[:, d]) for d in range(5)))/16
    assert abs(tc) > .1
    close(terms.loss, (rec + kl_z.sum(1) + kl_c).mean() + (beta - 1)*tc, atol=1e-3, rtol=1e-5)

def test_objectives_call_for_keywords_and_return_terms(model, digits):
    with_discriminator(model, width=16)
    for terms in (tc_vae(model, digits, 5, beta=2, n_data=100),
                  factor_vae(model, digits, 5, gamma=2)):
        assert terms._fields == ('loss', 'rec', 'kl_z', 'kl_c') and terms.loss.isfinite()
        assert [tuple(t.shape) for t in terms] == [(), (16,), (16, 5), (16,)]
    for f in (tc_vae, factor_vae):
        with pytest.raises(TypeError):
            f(model, digits, 5, 2)


# ---------------------------------------------------------------- density ratio
@quick
@given(seeds, sizes, st.integers(1, 5))
def test_permute_latents_keeps_each_marginal(seed, B, D):
    torch.manual_seed(seed)
    z = torch.randn(B, D)
    assert (permute_latents(z).sort(0).values == z.sort(0).values).all()

def test_permute_latents_breaks_dependence_and_not_only_the_order():
    z = torch.randn(5000, 1).expand(5000, 4) + torch.zeros(5000, 4)
    R = torch.corrcoef(permute_latents(z).T)
    assert (R - torch.eye(4)).abs().max() < 5/5000**.5

def test_density_ratio_loss_by_torch_and_its_signs():
    d, a, b = discriminator(3, width=16), torch.randn(10, 3), torch.randn(6, 3)
    bce = nn.functional.binary_cross_entropy_with_logits
    close(density_ratio_loss(d, a, b), (bce(d(a), torch.ones(10)) + bce(d(b), torch.zeros(6)))/2)
    close(density_ratio_loss(lambda z: 0*z[:, 0], a, b), torch.tensor(math.log(2)))
    assert density_ratio_loss(lambda z: z[:, 0], torch.full((4, 1), 9.),
                              torch.full((4, 1), -9.)) < .001
    assert density_ratio_loss(lambda z: 1e4*z[:, 0], -torch.ones(4, 1), torch.ones(4, 1)).isfinite()

def test_the_log_ratio_is_the_best_classifier():
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
    p, q = (Normal(m, s).log_prob(z[:, 0]).exp() for m, s in ((0., 1.), (.7, 1.4)))
    softplus = nn.functional.softplus
    def risk(logit): return (p*softplus(-logit) + q*softplus(logit)).sum()
    logit = (p/q).log().requires_grad_()
    gradient, = torch.autograd.grad(risk(logit), logit)
    assert gradient.abs().max() < 1e-12

@pytest.mark.parametrize('n_z, width, depth', [(1, 8, 1), (5, 32, 3)])
def test_discriminator_gives_one_logit_per_code(n_z, width, depth):
    d = discriminator(n_z, width, depth)
    assert d(torch.randn(9, n_z)).shape == (9,)
    assert sum(isinstance(m, nn.Linear) for m in d) == depth + 1

def test_a_trained_discriminator_finds_the_total_correlation():
    rho = .7
    L = torch.linalg.cholesky(torch.tensor([[1., rho], [rho, 1.]]))
    draw = lambda n: torch.randn(n, 2) @ L.T
    d = discriminator(2, 32, 2)
    adam = torch.optim.Adam(d.parameters(), 5e-3)
    for _ in range(400):
        adam.zero_grad()
        density_ratio_loss(d, draw(256), permute_latents(draw(256))).backward()
        adam.step()
    truth = -math.log(1 - rho**2)/2  # .337 nats; 0 if rows were permuted
    assert abs(d(draw(20_000)).mean() - truth) < .08


# ---------------------------------------------------------------- FactorVAE
class Tiny(nn.Module):
    "A model with a linear encoder and decoder, so that the tests do not lean on `VAE`."
    n_z = 3
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)
    def posterior(self, x):
        mu, lv = self.encoder(x).chunk(2, -1)
        return Posterior(Normal(mu, (lv/2).exp()))
    def log_likelihood(self, x, z): return Normal(self.decoder(z), 1.).log_prob(x).sum(-1)

def separate(model, x, gamma):
    """The gradients of two losses, each for its own parameters,
    by two backward passes and no detach."""
    d = [p for k, p in model.named_parameters() if k.startswith('discriminator')]
    rest = [p for k, p in model.named_parameters() if not k.startswith('discriminator')]
    _, z, rec, kl_z, kl_c = parts_with_code(model, x)
    one = (rec + kl_z.sum(1) + kl_c).mean() + gamma*model.discriminator(z).mean()
    n = -(-len(x)//2)
    bce = nn.functional.binary_cross_entropy_with_logits
    two = (bce(model.discriminator(z[:n]), torch.ones(n))
           + bce(model.discriminator(permute_latents(z[n:])), torch.zeros(len(x) - n)))/2
    g_rest = torch.autograd.grad(one, rest, retain_graph=True)
    return one + two, {id(p): g for p, g in zip(rest + d, g_rest + torch.autograd.grad(two, d))}

@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(4, 33), st.sampled_from([0., 1., 6., 35.]))
def test_one_backward_has_the_gradients_of_two(seed, B, gamma):
    torch.manual_seed(seed)
    model, x = with_discriminator(Tiny(), width=16), torch.randn(B, 6)
    loss, expected = seeded(separate, model, x, gamma)
    terms = seeded(factor_vae, model, x, gamma=gamma)
    terms.loss.backward()
    close(terms.loss, loss)
    for p in model.parameters():
        close(p.grad, expected[id(p)], atol=1e-5, rtol=1e-4)

def test_one_backward_has_the_gradients_of_two_with_a_categorical(digits):
    model = with_discriminator(VAE(5, 4), width=16)
    _, expected = seeded(separate, model, digits, 6)
    seeded(factor_vae, model, digits, gamma=6).loss.backward()
    for p in model.parameters():
        close(p.grad, expected[id(p)], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('objective', [lambda m, x: tc_vae(m, x, beta=6, n_data=100),
                                       lambda m, x: factor_vae(m, x, gamma=6)])
def test_the_objectives_run_in_bfloat16(model, digits, objective):
    with_discriminator(model, width=16)
    with torch.autocast('cpu', torch.bfloat16):
        terms = objective(model, digits)
    terms.loss.backward()
    assert terms.loss.dtype == torch.float32 and terms.loss.isfinite()


def test_the_discriminator_joins_the_model():
    model = VAE(5, 4)
    before = len(list(model.parameters()))
    assert with_discriminator(model, width=16, depth=2) is model
    assert len(list(model.parameters())) == before + 6
    assert any(k.startswith('discriminator.') for k in model.state_dict())
    assert model.discriminator[0].in_features == 5  # z alone: the categorical stays outside


@pytest.mark.parametrize('sigma', [1e-3, 1e-15, 1e-19, 1e-25, 1e-37])
def test_terms_of_posteriors_however_narrow(sigma):
    "As double precision has them, where the square of a deviation is no number of single precision."
    loc, e = torch.randn(6, 3), torch.randn(6, 3)
    scale, log_w = torch.full((6, 3), sigma), stratified_weights(6, 100).log()
    z = loc*(torch.arange(6) > 1)[:, None]  # two images with the same mean, drawn around it
    q = Normal(z, scale, validate_args=False)
    z = z + scale*e
    exact = Normal(q.loc.double(), scale.double(), validate_args=False)
    want = kl_terms(z.double(), exact, exact, log_w.double())
    torch.testing.assert_close(kl_terms(z, q, q, log_w), want.float(), rtol=1e-5, atol=1e-4)
