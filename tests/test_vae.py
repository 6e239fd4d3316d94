import math

import pytest, torch
from torch.distributions import Bernoulli, Independent, Normal

from vae_robust.vae import VAE, Posterior, decoder, elbo, encoder, kl, parts


def gaussian(mu, lv):
    return Posterior(Normal(torch.as_tensor(mu), torch.as_tensor(lv).div(2).exp()))


@pytest.mark.parametrize('mu, lv, total', [(0., 0., 0.), (1., 0., 5.), (1., 1., 10*(1 + math.e - 1 - 1)/2), (0., -2., 10*(math.exp(-2) + 1)/2)])
def test_gaussian_kl_is_summed_over_latents_and_positive(mu, lv, total):
    kl_z, kl_c = kl(gaussian(torch.full((3, 10), mu), torch.full((3, 10), lv)))
    torch.testing.assert_close(kl_z.sum(-1), torch.full((3,), total))
    assert kl_c.tolist() == [0, 0, 0]


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
    assert m(x).shape == x.shape and m.posterior(x).rsample().shape == (2, 9) and encoder(channels, size, 7)(x).shape == (2, 7)
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
    assert relaxed.sum(1).allclose(torch.ones(16)) and ((relaxed > 0) & (relaxed < 1)).any() and relaxed.requires_grad
    assert set(exact.unique().tolist()) <= {0., 1.}


def test_every_parameter_gets_a_gradient(model, digits):
    elbo(model, digits).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_gradient_descent_step_lowers_the_bound(model, digits):
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        losses.append(elbo(model, digits).loss)
        opt.zero_grad(); losses[-1].backward(); opt.step()
    assert losses[-1] < losses[0] - 50
