import itertools, math
from copy import deepcopy
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats
from torch import nn
from torch.distributions import (Bernoulli, Independent, MultivariateNormal, Normal,
                                 OneHotCategorical, RelaxedOneHotCategorical, kl_divergence)
from torch.testing import assert_close

from vae_robust.concrete import on_levels
from vae_robust.vae import (LIKELIHOODS, VAE, Posterior, decoder, elbo, encoder, evaluating,
                            gaussian_kl, kl, log_density, log_importance_weights, log_marginal,
                            parts, pixel_entropy, reached)

examples = settings(max_examples=50, deadline=None)
number, log_var = st.floats(-4, 4), st.floats(-6, 3)


def double(*values): return torch.tensor(values, dtype=torch.float64)


def gaussian(mu, lv):
    return Posterior(Normal(torch.as_tensor(mu), torch.as_tensor(lv).div(2).exp()))


@pytest.mark.parametrize('mu, lv, total',
                         [(0., 0., 0.), (1., 0., 5.), (1., 1., 10*(1 + math.e - 1 - 1)/2),
                          (0., -2., 10*(math.exp(-2) + 1)/2)])
def test_gaussian_kl_is_summed_over_latents_and_positive(mu, lv, total):
    kl_z, kl_c = kl(gaussian(torch.full((3, 10), mu), torch.full((3, 10), lv)))
    torch.testing.assert_close(kl_z.sum(-1), torch.full((3,), total))
    assert kl_c.tolist() == [0, 0, 0]


@examples
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12))
def test_the_categorical_kl_is_log_k_minus_the_entropy(logits):
    q = Posterior(Normal(torch.zeros(1, 2), 1.), OneHotCategorical(logits=torch.tensor([logits])))
    kl_c, entropy = kl(q)[1].item(), stats.entropy(special.softmax(logits))
    assert kl_c == pytest.approx(math.log(len(logits)) - entropy, abs=1e-5)
    assert -1e-5 <= kl_c <= math.log(len(logits)) + 1e-5


def test_the_categorical_kl_of_a_known_case():
    q = Posterior(Normal(torch.zeros(1, 2), 1.),
                  OneHotCategorical(logits=torch.tensor([[3.] + [0.]*9])))
    assert kl(q)[1].item() == pytest.approx(1.004, abs=5e-4)



@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('seed', range(10))
def test_kl_of_ordinary_posteriors_is_torch_s_to_the_last_bit_and_so_are_its_gradients(seed, dtype):
    noise = torch.Generator().manual_seed(seed)
    spread = torch.tensor([3., 8.]).view(2, 1, 1)
    start = torch.randn(2, 64, 10, generator=noise, dtype=dtype)*spread
    weights = torch.rand(64, 10, generator=noise, dtype=dtype)

    def bits(divergence):
        mu, lv = start.clone().requires_grad_()
        q, _ = Normal(mu, (lv/2).exp()), torch.manual_seed(seed)
        value = divergence(q)
        total = (weights*value).sum() + q.rsample().sin().sum()
        return value, *torch.autograd.grad(total, (mu, lv))
    ours = bits(lambda q: kl(Posterior(q))[0])
    prior = lambda q: Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))
    torchs = bits(lambda q: kl_divergence(q, prior(q)))
    assert start[1].min() > -60 and all(torch.equal(a, b) for a, b in zip(ours, torchs))


@pytest.mark.parametrize('lv', (-80., -105., -150.))
def test_kl_of_a_posterior_whose_variance_is_no_number_of_single_precision(lv):
    lv = torch.tensor([[lv]], requires_grad=True)
    kl_z, _ = kl(Posterior(Normal(torch.full((1, 1), 3.), (lv/2).exp())))
    slope, = torch.autograd.grad(kl_z.sum(), lv)
    assert kl_z.item() == pytest.approx((9 - 1 - lv.item())/2)
    assert slope.item() == pytest.approx(-.5)


ENDS = [1e-37, 1e-25, 1e-15, 1e-3, 1., 1e3, 1e15, 1e19]

@pytest.mark.parametrize('sigma', ENDS)
@pytest.mark.parametrize('mu', [0., *ENDS])
def test_divergence_and_density_are_right_to_the_ends_of_single_precision(mu, sigma):
    mu, sigma = torch.tensor([[mu]], requires_grad=True), torch.tensor([[sigma]], requires_grad=True)
    wide = Normal(mu.detach().double(), sigma.detach().double())
    standard = Normal(torch.zeros_like(wide.loc), torch.ones_like(wide.loc))
    kl_z = kl(Posterior(Normal(mu, sigma)))[0]
    assert_close(kl_z.double(), kl_divergence(wide, standard), rtol=1e-5, atol=1e-5)
    z = mu.detach() + sigma.detach()/2
    log_q = log_density(Normal(mu, sigma), z)
    assert_close(log_q.double(), wide.log_prob(z.double()), rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad((kl_z + log_q).sum(), (mu, sigma))
    assert not any(s.isnan().any() for s in slopes)


def test_two_narrow_gaussians_are_compared_where_no_variance_is_a_number():
    mu, lv = torch.tensor([1e-25]), torch.tensor([-115.])
    assert gaussian_kl(mu, lv, 0., -115.).item() == pytest.approx(1e-50*math.exp(115)/2)


def test_a_categorical_that_is_certain_beyond_all_numbers_costs_log_k():
    logits = torch.tensor([[3e38, -3e38, 0.]])
    q = Posterior(Normal(torch.zeros(1, 1), 1.), OneHotCategorical(logits=logits))
    assert kl(q)[1].item() == pytest.approx(math.log(3))


def test_kl_agrees_with_monte_carlo(model, digits):
    q = model.posterior(digits)
    z, c = q.z.sample((50_000,)), q.c.sample((50_000,))
    ratio_z = q.z.log_prob(z) - Normal(0, 1).log_prob(z)
    ratio_c = q.c.log_prob(c) + math.log(4)
    for ours, ratio in zip(kl(q), (ratio_z, ratio_c)):
        error = ratio.std(0)/50_000**.5
        assert ((ours - ratio.mean(0)).abs() <= 5*error + 1e-6).all()


@pytest.mark.parametrize('size, channels', [(32, 1), (32, 3), (64, 3)])
def test_shapes(size, channels):
    m, x = VAE(6, 3, channels, size), torch.rand(2, channels, size, size)
    assert m(x).shape == x.shape
    assert m.posterior(x).rsample().shape == (2, 9)
    assert encoder(channels, size, 7)(x).shape == (2, 7)
    assert decoder(channels, size, 5)(torch.rand(2, 5)).shape == x.shape


def test_number_of_parameters_is_the_thesis_s():
    assert sum(p.numel() for p in VAE(10, 10).parameters()) == 369_375


def test_bernoulli_likelihood_is_a_sum_over_pixels(model, digits):
    code, x = model.posterior(digits).mode, digits.round()
    oracle = Independent(Bernoulli(logits=model.decoder(code)), 3).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x, code), oracle)


def test_gaussian_likelihood_is_a_density(digits):
    m = VAE(4, 0, likelihood='gaussian')
    code = torch.zeros(16, 4)
    oracle = -.5*(digits - m.decode(code)).pow(2).sum((1, 2, 3)) - 512*math.log(2*math.pi)
    torch.testing.assert_close(m.log_likelihood(digits, code), oracle)


def test_the_bound_is_reconstruction_plus_kl_averaged_over_the_batch(model, digits):
    terms = elbo(model, digits)
    torch.testing.assert_close(terms.loss, (terms.rec + terms.kl_z.sum(1) + terms.kl_c).mean())
    assert terms.rec.shape == (16,) and terms.kl_z.shape == (16, 5) and terms.kl_c.shape == (16,)


def test_the_bound_does_not_depend_on_the_size_of_the_batch(model, digits):
    torch.manual_seed(1)
    once = torch.stack([elbo(model, digits).loss for _ in range(60)]).mean()
    twice = torch.stack([elbo(model, digits.repeat(2, 1, 1, 1)).loss for _ in range(60)]).mean()
    torch.testing.assert_close(once, twice, rtol=.02, atol=0)


def test_the_mode_is_deterministic_and_one_hot(model, digits):
    q = model.posterior(digits)
    assert torch.equal(model(digits), model(digits))
    assert q.mode[:, 5:].sum(1).eq(1).all() and set(q.mode[:, 5:].unique().tolist()) == {0., 1.}
    assert torch.equal(q.mode[:, :5], q.z.mean)


def test_samples_are_relaxed_for_training_and_exact_otherwise(model, digits):
    q = model.posterior(digits)
    relaxed, exact = q.rsample()[:, 5:], q.sample()[:, 5:]
    assert relaxed.sum(1).allclose(torch.ones(16))
    assert ((relaxed > 0) & (relaxed < 1)).any()
    assert relaxed.requires_grad
    assert set(exact.unique().tolist()) <= {0., 1.}


def test_every_parameter_gets_a_gradient(model, digits):
    elbo(model, digits).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_gradient_descent_step_lowers_the_bound(model, digits):
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        losses.append(elbo(model, digits).loss)
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < losses[0] - 50


# ---------------------------------------- the divergence in closed form

@pytest.mark.parametrize('mu, lv, m, lv_p',
                         [(0., 0., 0., 0.), (1., 0., 0., 0.), (1., 1., 0., 0.), (-2., -4., .5, 1.),
                          (.3, 2., 3., -1.), (0., 1e-9, 0., 0.)])
def test_gaussian_kl_is_the_integral_that_defines_it(mu, lv, m, lv_p):
    q, p = stats.norm(mu, math.exp(lv/2)), stats.norm(m, math.exp(lv_p/2))
    area, _ = integrate.quad(lambda z: q.pdf(z)*(q.logpdf(z) - p.logpdf(z)),
                             mu - 12*q.std(), mu + 12*q.std())
    assert_close(gaussian_kl(*double(mu, lv, m, lv_p)).item(), area, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize('mu, lv, total', [(1., 0., 5.), (1., 1., 8.591), (0., 0., 0.)])
def test_known_answers_in_ten_dimensions(mu, lv, total):
    assert abs(gaussian_kl(torch.full((10,), mu), torch.full((10,), lv)).sum() - total) < 5e-4
    assert (abs(kl(gaussian(torch.full((1, 10), mu), torch.full((1, 10), lv)))[0].sum() - total)
            < 5e-4)


@examples
@given(number, log_var, number, log_var)
def test_kl_is_positive_and_zero_only_for_equals(mu, lv, m, lv_p):
    assert gaussian_kl(*double(mu, lv, m, lv_p)) >= 0
    assert gaussian_kl(*double(mu, lv, mu, lv)) == 0
    if abs(mu - m) > .01 or abs(lv - lv_p) > .01:
        assert gaussian_kl(*double(mu, lv, m, lv_p)) > 1e-8


@examples
@given(number, log_var, number, log_var, number, log_var)
def test_kl_does_not_care_for_the_unit_of_z(mu, lv, m, lv_p, shift, log_scale):
    scale = math.exp(log_scale/2)
    moved = gaussian_kl(*double(scale*mu + shift, lv + log_scale,
                                scale*m + shift, lv_p + log_scale))
    assert_close(moved, gaussian_kl(*double(mu, lv, m, lv_p)), rtol=1e-9, atol=1e-9)


@examples
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_kl_of_many_latents_is_the_sum(seed, D):
    mu, lv, m, lv_p = torch.randn(4, D, generator=torch.Generator().manual_seed(seed),
                                  dtype=torch.float64)
    q, p = MultivariateNormal(mu, lv.exp().diag()), MultivariateNormal(m, lv_p.exp().diag())
    assert_close(gaussian_kl(mu, lv, m, lv_p).sum(), kl_divergence(q, p))


@examples
@given(number, log_var)
def test_the_forces_are_the_slopes(mu, lv):
    h, (a, b) = 1e-5, double(mu, lv)
    assert abs((gaussian_kl(a + h, b) - gaussian_kl(a - h, b))/(2*h) - mu) < 1e-4
    assert abs((gaussian_kl(a, b + h) - gaussian_kl(a, b - h))/(2*h) - (math.exp(lv) - 1)/2) < 1e-4


# ---------------------------------------- likelihoods

def coin(x, l):
    "The Bernoulli log likelihood of grey values x for logits l."
    return special.xlogy(x, special.expit(l)) + special.xlogy(1 - x, special.expit(-l))

ORACLES = {'bernoulli': coin,
           'continuous_bernoulli': lambda x, l: coin(x, l) + np.log(l/np.tanh(l/2)),
           'gaussian': lambda x, l: stats.norm(special.expit(l), 1).logpdf(x)}

@pytest.mark.parametrize('name', LIKELIHOODS)
@pytest.mark.parametrize('channels', [1, 3])
def test_likelihoods_are_sums_over_pixels_and_channels(name, channels):
    m = VAE(4, channels=channels, likelihood=name)
    x = torch.rand(2, channels, 32, 32)
    code = 20*torch.randn(2, 4)
    logits = m.decoder(code).detach().double().numpy()
    oracle = torch.tensor(ORACLES[name](x.double().numpy(), logits).sum((1, 2, 3)))
    assert_close(m.log_likelihood(x, code).double(), oracle, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize('name', LIKELIHOODS)
@pytest.mark.parametrize('logit', [-6., -.7, .01, 2.])
def test_what_is_decoded_is_the_mean(name, logit):
    if name == 'bernoulli':
        mean = special.expit(logit)
    else:
        mean, _ = integrate.quad(lambda x: x*math.exp(ORACLES[name](x, logit)),
                                 *((-9, 10) if name == 'gaussian' else (0, 1)))
    m = VAE(2, likelihood=name)
    for p in m.decoder.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.constant_(m.decoder[-1].bias, logit)
    assert_close(m.decode(torch.zeros(1, 2)), torch.full((1, 1, 32, 32), mean), atol=1e-3, rtol=0)


@pytest.mark.parametrize('channels', [1, 3])
def test_fair_coins_cost_one_bit_per_number(channels):
    m = VAE(4, channels=channels)
    for p in m.decoder.parameters():
        torch.nn.init.zeros_(p)
    expected = torch.full((2,), -channels*1024*math.log(2))
    assert_close(m.log_likelihood(torch.rand(2, channels, 32, 32), torch.zeros(2, 4)), expected)
    assert_close(-parts(m, torch.rand(2, channels, 32, 32))[0], expected)


@examples
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3),
       st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_a_grey_value_is_an_average_over_tosses(x, logits):
    p, average = LIKELIHOODS['bernoulli'](double(*logits)), 0.
    for b in itertools.product((0., 1.), repeat=3):
        chance = np.prod([v if bit else 1 - v for v, bit in zip(x, b)])
        average += chance*p.log_prob(double(*b)).sum().item()
    assert_close(p.log_prob(double(*x)).sum().item(), average, atol=1e-9, rtol=1e-9)


@examples
@given(st.integers(0, 10_000))
def test_no_decoder_gets_below_the_floor_and_the_truth_reaches_it(seed):
    x, logits = torch.rand(2, 3, 2, 4, 4,
                           generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = lambda l: -LIKELIHOODS['bernoulli'](l).log_prob(x).sum((1, 2, 3))
    assert (loss(8*logits - 4) >= pixel_entropy(x)).all()
    assert_close(loss(x.logit()), pixel_entropy(x))
    assert_close(pixel_entropy(x),
                 torch.tensor(stats.bernoulli(x.numpy()).entropy().sum((1, 2, 3))))


def test_black_and_white_has_no_floor():
    assert pixel_entropy(torch.tensor([0., 1., 1., 0.]).view(1, 1, 2, 2)).item() == 0
    assert pixel_entropy(torch.full((2, 3, 4, 4), .5)).tolist() == pytest.approx([48*math.log(2)]*2)


@pytest.mark.parametrize('bad, word',
                         [({'likelihood': 'gausian'}, 'gaussian'), ({'size': 28}, '28'),
                          ({'size': 16}, '16'), ({'size': 48}, '48')])
def test_what_cannot_be_built_is_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        VAE(2, **bad)


def test_the_encoder_emits_mean_and_log_variance(model, digits):
    mu, lv, logits = model.encode(digits)
    q = model.posterior(digits)
    assert torch.equal(q.z.mean, mu) and mu.shape == lv.shape == (16, 5) and logits.shape == (16, 4)
    assert_close(q.z.variance.log(), lv, atol=1e-5, rtol=1e-5)
    assert_close(q.c.probs, logits.softmax(-1))
    assert_close(kl(q)[0], gaussian_kl(mu, lv), atol=1e-5, rtol=1e-4)


# ---------------------------------------- no chance at test time

def test_the_mode_uses_no_random_numbers(model, digits):
    state = torch.get_rng_state()
    q = Posterior(Normal(torch.zeros(1, 2), 1.), OneHotCategorical(logits=torch.zeros(1, 3)))
    assert len(torch.cat([q.mode for _ in range(100)]).unique(dim=0)) == 1
    model(digits)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_s_code_does_not_depend_on_its_company(model, digits):
    for all_, one in zip(model.encode(digits), model.encode(digits[3:4])):
        assert_close(all_[3:4], one, atol=1e-5, rtol=1e-5)


# ---------------------------------------- log p(x)

def linear(W, s, widen):
    """A linear-Gaussian model with orthogonal columns, whose q is the exact posterior,
    `widen` times as wide."""
    w2 = W.pow(2).sum(0)
    return SimpleNamespace(
        posterior=lambda x: Posterior(Normal(x @ W/(w2 + s**2), widen*s/(w2 + s**2).sqrt())),
                           log_likelihood=lambda x, z: Normal(z @ W.T, s).log_prob(x).sum(-1))

def orthogonal(seed, P=6, D=3):
    g = torch.Generator().manual_seed(seed)
    columns = torch.linalg.qr(torch.randn(P, D, generator=g))[0]
    W = columns*(.5 + 2*torch.rand(D, generator=g))
    return W, .3 + torch.rand(1, generator=g).item()

def exact(W, s, x):
    cov = (W @ W.T + s**2*torch.eye(len(W))).double().numpy()
    return torch.tensor(stats.multivariate_normal(cov=cov).logpdf(x.double().numpy())).float()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 50))
def test_with_the_exact_posterior_one_sample_is_enough(seed, K, at_once):
    (W, s), x = orthogonal(seed), torch.randn(4, 6)
    assert_close(log_marginal(linear(W, s, 1.), x, K, at_once),
                 exact(W, s, x), atol=1e-3, rtol=1e-4)


def test_weights_are_unbiased_and_the_bound_rises_with_K():
    (W, s), x = orthogonal(0), torch.randn(4, 6)
    log_w = log_importance_weights(linear(W, s, 1.7), x, 128*1000) - exact(W, s, x)
    assert ((log_w.exp().mean(0) - 1).abs() < 5*log_w.exp().std(0)/len(log_w)**.5).all()
    bounds = [torch.logsumexp(log_w.view(K, -1), 0) - math.log(K) for K in (1, 2, 8, 32, 128)]
    means, errors = ([f(b).item() for b in bounds]
                     for f in (torch.mean, lambda b: b.std()/len(b)**.5))
    assert all(a + 5*e < b for a, b, e in zip(means[:3], means[1:], errors))
    assert means == sorted(means)
    assert -.02 < means[-1] < 5*errors[-1]
    assert abs(means[0] + 3*(1.7**2 - 1 - 2*math.log(1.7))/2) < 5*errors[0]


def brute_force(model, x, side):
    """log p(x) of a VAE with one Gaussian latent and a categorical,
    by the trapezoidal rule and a sum over classes."""
    values = []
    for c in torch.eye(model.n_c):
        codes = torch.cat([side[:, None], c.expand(len(side), -1)], 1)
        ll = torch.stack([model.log_likelihood(i.expand(len(side), *i.shape), codes) for i in x])
        values.append(ll + Normal(0., 1.).log_prob(side) - math.log(model.n_c))
    return torch.logsumexp(torch.cat(values, 1), 1) + (side[1] - side[0]).log()


def test_log_marginal_of_a_network_with_a_categorical(digits):
    m = VAE(1, 3)
    with torch.no_grad():
        for p in m.decoder.parameters():
            p.mul_(1.5)
        truth = brute_force(m, digits[:4], torch.linspace(-6, 6, 301))
    estimate = torch.stack([log_marginal(m, digits[:4], 400) for _ in range(5)])
    assert ((estimate.mean(0) - truth).abs() < .01 + 6*estimate.std(0)/5**.5).all()
    assert not estimate.requires_grad


def test_chunks_do_not_matter(model, digits):
    results = []
    for at_once in (1, 40, 10_000):
        torch.manual_seed(3)
        results.append(log_marginal(model, digits, 10, at_once))
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])


def test_one_sample_is_the_bound_on_average(model, digits):
    log_w = log_importance_weights(model, digits, 400)
    rec = torch.stack([-model.log_likelihood(digits, model.posterior(digits).sample()).detach()
                       for _ in range(100)])
    kl_z, kl_c = kl(model.posterior(digits))
    error = 6*(log_w.std(0)/20 + rec.std(0)/10) + .01
    assert ((log_w.mean(0) + rec.mean(0) + kl_z.sum(1) + kl_c).abs() < error).all()


# ------------------------------------------------------------------ modes
class Holder:
    "An object that is no function and holds a model."
    def __init__(self, model): self.model = model
    def view(self, x): return self.model(x)

def inner(model):
    "A function in a function in a function that knows the model."
    return lambda x: (lambda y: (lambda z: model(z))(y))(x)

HIDDEN = VAE(3, network='large')

@pytest.mark.parametrize('view', [
    HIDDEN, HIDDEN.forward, HIDDEN.decoder, inner(HIDDEN), partial(inner(HIDDEN)), Holder(HIDDEN).view,
    lambda x: HIDDEN(x), lambda x: [HIDDEN(y) for y in x], lru_cache(inner(HIDDEN)),
    torch.nn.DataParallel(HIDDEN), torch.no_grad()(inner(HIDDEN)), {'a': [Holder(HIDDEN)]},
    lambda x, model=HIDDEN: model(x)])
def test_a_model_is_found_wherever_it_hides_and_left_in_its_mode(view):
    HIDDEN.train()
    HIDDEN.decoder[2].eval()
    modes = [m.training for m in HIDDEN.modules()]
    with pytest.raises(KeyError), evaluating(view):
        assert not any(m.training for m in HIDDEN.decoder.modules())
        raise KeyError
    assert modes == [m.training for m in HIDDEN.modules()]


def test_what_holds_no_model_reaches_none_and_circles_end():
    circle = [math.sin, torch.relu, np.zeros(3), torch.zeros(3), 'text', VAE, torch, None]
    circle.append(circle)
    assert reached(circle, lambda x: x + 1) == []


def test_importance_weights_do_not_move_the_averages_of_a_model_in_training_mode():
    model, x = VAE(3, network='large').train(), torch.rand(8, 1, 32, 32)
    before = model.encoder[1].running_mean.clone()
    log_marginal(model, x, K=2)
    assert torch.equal(model.encoder[1].running_mean, before) and model.training


@pytest.mark.parametrize('tau', [.1, .67, 2.])
def test_codes_are_relaxed_at_the_temperature_of_the_model(tau):
    vae, x = VAE(2, 4, tau=tau).eval(), torch.rand(3, 1, 32, 32)
    q = vae.posterior(x)
    assert q.tau == tau
    torch.manual_seed(3)
    drawn = q.rsample()[:, 2:]
    torch.manual_seed(3)
    q.z.rsample()
    want = RelaxedOneHotCategorical(torch.tensor(tau), logits=q.c.logits).rsample()
    torch.testing.assert_close(drawn, want)


@pytest.mark.parametrize('size', [32, 64])
def test_large_networks_have_a_layer_for_each_halving(size):
    vae, halvings = VAE(10, 3, 3, size, network='large'), {32: 3, 64: 4}[size]
    layers = lambda net, kind: [m for m in net if isinstance(m, kind)]
    widths = [128, 256, 512, 1024][:halvings]
    down, up = layers(vae.encoder, nn.Conv2d), layers(vae.decoder, nn.Conv2d)
    assert [(c.in_channels, c.out_channels) for c in down] == [*zip([3, *widths], widths)]
    assert [(c.in_channels, c.out_channels) for c in up] == [*zip(widths[::-1], [*widths[-2::-1], 3])]
    assert len(layers(vae.encoder, nn.Linear)) == len(layers(vae.decoder, nn.Linear)) == 1
    assert len(layers(vae.encoder, nn.BatchNorm2d)) == len(down)


# ---------------------------------------- several categoricals

@pytest.mark.parametrize('G, K', [(1, 4), (2, 3), (3, 10)])
def test_several_categoricals_stand_side_by_side(digits, G, K):
    m = VAE(5, K, categoricals=G).eval()
    assert m.encoder[-1].out_features == 10 + G*K and m.decoder[0].in_features == 5 + G*K
    q, l = m.posterior(digits), m.encode(digits)[2]
    assert l.shape == ((16, K) if G == 1 else (16, G, K))
    parts = m.encoder(digits)[:, 10:].view(16, G, K).log_softmax(-1)
    torch.testing.assert_close(q.c.logits.view(16, G, K), parts)
    for code in (q.mode, q.sample(), q.rsample()):
        torch.testing.assert_close(code[:, 5:].view(16, G, K).sum(-1), torch.ones(16, G))
    each = sum(kl(Posterior(q.z, OneHotCategorical(logits=parts[:, g])))[1] for g in range(G))
    torch.testing.assert_close(kl(q)[1], each, atol=1e-5, rtol=1e-4)


def test_importance_weights_of_several_categoricals_average_to_the_sum_over_all_codes():
    "A likelihood that the posterior, a product, does not know: all 8 codes are added up."
    table, logits = torch.randn(8), torch.randn(1, 3, 2)
    place = lambda code: (code[:, 1::2] @ torch.tensor([4., 2., 1.])).long()
    toy = SimpleNamespace(
        posterior=lambda x: Posterior(Normal(torch.zeros(1, 0), 1.), OneHotCategorical(logits=logits)),
        log_likelihood=lambda x, code: table[place(code)])
    w = log_importance_weights(toy, torch.zeros(1, 1), 40_000).exp()[:, 0]
    assert abs(w.mean() - table.exp().mean()) < 5*w.std()/200
    assert w.std() > .1


@pytest.mark.parametrize('type_, tolerance', [(torch.float64, 1e-5), (torch.bfloat16, .03)])
@pytest.mark.parametrize('code', ['gaussian', 'categorical', 'rounded'])
def test_weights_of_another_type_give_the_same_answers(code, type_, tolerance):
    """Doubles stay doubles through the whole bound, so that its differences are its gradient."""
    torch.manual_seed(0)
    model, x = VAE(3, 0 if code == 'gaussian' else 4).eval(), torch.rand(2, 1, 32, 32)
    model = on_levels(model) if code == 'rounded' else model
    other = deepcopy(model).to(type_)
    with torch.no_grad():
        assert_close(other(x).float(), model(x), rtol=0, atol=tolerance)
        q = other.posterior(x)
        wide = torch.promote_types(type_, torch.float32)
        assert q.z.mean.dtype == wide and other.log_likelihood(x, q.mode).dtype == wide


def test_the_bound_of_doubles_has_its_differences_for_a_gradient():
    torch.manual_seed(0)
    model, x = VAE(3, 4).double().eval(), torch.rand(2, 1, 32, 32, dtype=torch.float64)
    def bound(b):
        torch.manual_seed(1)
        model.encoder[-1].bias.data.copy_(b)
        return elbo(model, x).loss
    b = model.encoder[-1].bias.detach().clone()
    bound(b).backward()
    d = torch.randn_like(b)
    with torch.no_grad():
        slope = (bound(b + 1e-5*d) - bound(b - 1e-5*d))/2e-5
    assert_close(slope, model.encoder[-1].bias.grad @ d, rtol=1e-7, atol=0)
