"""Chapter 9 against oracles other than the notebook's: numpy, enumeration with plain loops,
torch.distributions, finite differences."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from vae_robust.disentangling import (AIR, Clamp, Controller, Dense, InfoGAN, air_loss,
                                      bit_dependence, bumps, clamped_elbo,
                                      controllable_loss, count_kl, discriminator_loss,
                                      generator_loss, information,
                                      information_bound, least_errors, log_count,
                                      log_fit, log_reach, play,
                                      prediction_errors, selectivity, stump_accuracy)


# ---------------------------------------------------------------- why, and the world

def test_stump_is_right_as_often_as_signs_agree():
    z = np.random.default_rng(0).multivariate_normal([0, 0], [[1, .6], [.6, 1]], 200_000)
    assert abs(stump_accuracy(.6) - (z[:, 0]*z[:, 1] > 0).mean()) < 5*.5/200_000**.5
    assert stump_accuracy(0.) == .5 and stump_accuracy(1.) == 1


def test_bumps_are_where_they_should_be():
    x = bumps(torch.tensor([[.5, -.25]]), torch.tensor([.3]), 9).view(9, 9).numpy()
    for row, column in itertools.product(range(9), repeat=2):
        right, down = -1 + column/4, -1 + row/4
        assert abs(x[row, column] - math.exp(-((right - .5)**2 + (down + .25)**2)/2/.09)) < 1e-6
    assert bumps(torch.zeros(2, 3, 2)).shape == (2, 3, 100)


# ---------------------------------------------------------------- predictability minimization

def test_least_errors_are_those_of_regression():
    z = np.random.default_rng(0).normal(size=(40, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    z -= z.mean(0)
    left = [np.linalg.lstsq(np.delete(z, d, 1), z[:, d], rcond=None)[1][0]/40 for d in range(4)]
    assert np.allclose(least_errors(torch.tensor(np.cov(z.T, bias=True))), left)


def test_prediction_errors_by_loops():
    z = torch.randn(2, 5, 3)
    w = torch.randn(2, 3, 3)
    b = torch.randn(2, 1, 3)
    p = torch.rand(5).softmax(0)
    found = prediction_errors(z, w, b, p)
    for s, d in itertools.product(range(2), range(3)):
        guess = [b[s, 0, d] + sum(w[s, d, e]*z[s, n, e] for e in range(3) if e != d)
                 for n in range(5)]
        assert torch.isclose(found[s, d],
                             sum(p[n]*(z[s, n, d] - guess[n])**2 for n in range(5)), atol=1e-5)


def test_game_makes_dependent_units_independent():
    x = torch.randn(300, 2) @ torch.linalg.cholesky(torch.tensor([[1., .7], [.7, 1.]])).T
    def normed(W):
        z = x @ W.mT
        return (z - z.mean(-2, keepdim=True))/z.std(-2, keepdim=True)
    W, V = play(normed, torch.eye(2)[None], torch.full((300,), 1/300), 400)
    assert abs(torch.corrcoef(normed(torch.eye(2)[None])[0].T)[0, 1]) > .6
    assert abs(torch.corrcoef(normed(W)[0].T)[0, 1]) < .03 and V.shape == (400, 1)


def test_bits_of_four_events():
    p = torch.tensor([1., 2., 2., 4.], dtype=torch.float64)/9
    good = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    bad = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]])
    H = -(p*p.log()).sum().item()
    assert np.allclose(bit_dependence(good, p), (0, H), atol=1e-9)
    sides = [(1/3, 2/3), (5/9, 4/9)]
    assert np.allclose(bit_dependence(bad, p),
                       (sum(-a*math.log(a) for s in sides for a in s) - H, H))
    assert np.allclose(bit_dependence(0*good, p), (0, 0))


# ---------------------------------------------------------------- DC-IGN

def test_clamp_forwards_and_backwards():
    z = torch.randn(6, 4, requires_grad=True)
    active = torch.tensor([0, 1, 0, 1]).bool()
    g = torch.randn(6, 4)
    out = Clamp.apply(z, active, 3.)
    assert torch.equal(out[:, active], z[:, active]) and out[:, ~active].var(0).max() < 1e-10
    assert torch.allclose(out.mean(0), z.mean(0), atol=1e-6)
    found, = torch.autograd.grad(out, z, g)
    assert torch.equal(found[:, active], g[:, active])
    assert torch.allclose(found[:, ~active], (3*(z - z.mean(0))/6)[:, ~active], atol=1e-6)


def test_clamped_bound_rebuilds_from_one_latent():
    model, x = Dense(3), bumps(torch.rand(5, 2) - .5)
    torch.manual_seed(1)
    found = clamped_elbo(model, x, 2)
    torch.manual_seed(1)
    q = model.posterior(x).z
    z = q.rsample()
    z = torch.cat([z[:, :2].mean(0).expand(5, 2), z[:, 2:]], 1)
    by_hand = (kl_divergence(q, Normal(0., 1.)).sum(-1).mean()
               - Normal(model.decoder(z), .1).log_prob(x).sum(-1).mean())
    assert torch.isclose(found, by_hand, rtol=1e-5)


# ---------------------------------------------------------------- InfoGAN

@pytest.fixture
def world():
    "p(c), p(x|c), and a guess Q(c|x)."
    return torch.rand(3).softmax(0), torch.randn(3, 4).softmax(1), torch.randn(3, 4).softmax(0)


def test_information_by_loops(world):
    p, channel, _ = world
    px = [sum(p[c]*channel[c, x] for c in range(3)) for x in range(4)]
    by_hand = sum(p[c]*channel[c, x]*math.log(channel[c, x]/px[x])
                  for c in range(3) for x in range(4))
    assert torch.isclose(information(p, channel), by_hand, atol=1e-6)


def test_bound_falls_short_by_the_divergence(world):
    p, channel, Q = world
    px, posterior = p @ channel, p[:, None]*channel/(p @ channel)
    gap = sum(px[x]*kl_divergence(Categorical(posterior[:, x]), Categorical(Q[:, x]))
              for x in range(4))
    assert torch.isclose(information_bound(p, channel, Q), information(p, channel) - gap, atol=1e-5)
    assert abs(information_bound(p, channel, p[:, None].expand(3, 4))) < 1e-6
    identity = torch.eye(3)
    assert torch.isclose(information_bound(p, identity, identity), Categorical(p).entropy())


def test_gan_losses():
    gan, x = InfoGAN(), torch.rand(8, 100)
    c, xf = gan.sample(8)
    assert c.shape == (8, 2) and c.abs().max() <= 1 and xf.shape == (8, 100)
    D = lambda images: gan.real(gan.body(images)).sigmoid()
    assert torch.isclose(discriminator_loss(gan, x, xf),
                         -D(x).log().mean() - (1 - D(xf)).log().mean(), atol=1e-5)
    guess = Normal(gan.mean(gan.body(xf)), gan.log_std.exp())
    bound = guess.log_prob(c).sum(-1).mean() + 2*math.log(2)
    assert torch.isclose(generator_loss(gan, c, xf), -D(xf).log().mean() - bound, atol=1e-5)


def test_who_hears_of_the_bound():
    gan = InfoGAN()
    c, xf = gan.sample(8)
    deaf = torch.autograd.grad(discriminator_loss(gan, torch.rand(8, 100), xf),
                               [*gan.generator.parameters()], allow_unused=True)
    assert deaf == (None,)*len(deaf)
    first = gan.generator[0][0].weight
    without = torch.nn.functional.softplus(-gan.real(gan.body(xf))).mean()
    silent = torch.autograd.grad(without, first, retain_graph=True)[0]
    told, untold = (torch.autograd.grad(generator_loss(gan, c, xf, t), first, retain_graph=True)[0]
                    for t in (True, False))
    assert torch.allclose(untold, silent) and not torch.allclose(told, silent)
    loss = generator_loss(gan, c, xf, False)
    assert torch.autograd.grad(loss, gan.mean.weight)[0].abs().sum() > 0


# ---------------------------------------------------------------- controllable factors

def test_selectivity():
    assert torch.allclose(selectivity(torch.tensor([[3., -1., 0.], [0., 0., 0.]])),
                          torch.tensor([[.75, .25, 0.], [0., 0., 0.]]))
    A = torch.randn(4, 4)
    assert torch.allclose(selectivity(A @ torch.linalg.inv(A.T).T), torch.eye(4), atol=1e-4)


def test_controllable_loss_by_loops():
    model, x = Controller(2, 2), torch.rand(3, 100)
    model.logits.data = torch.randn(2, 2)
    arrive = torch.tensor([[1, 0], [2, 0], [0, 1]])
    allowed = torch.tensor([[True, False], [True, True], [False, True]])
    z, pi = model.f(x), model.logits.softmax(-1)
    gain = 0.
    for k, a in itertools.product(range(2), repeat=2):
        moves = [(z[arrive[s, a]] - z[s]).abs() for s in range(3) if allowed[s, a]]
        sels = [m[k]/m.sum() for m in moves]
        gain += pi[k, a]*sum(sels)/len(sels)
    rec = ((model.g(z) - x)**2).sum(-1).mean()
    assert torch.isclose(controllable_loss(model, x, arrive, allowed, 2.), rec - 2*gain, rtol=1e-5)


# ---------------------------------------------------------------- attend, infer, repeat

def test_counts_by_loops():
    logit = torch.randn(4, dtype=torch.float64)
    pi = logit.sigmoid().tolist()
    q = [math.prod(pi[:n])*(1 - pi[n] if n < 4 else 1) for n in range(5)]
    assert np.allclose(log_count(logit).exp(), q) and abs(sum(q) - 1) < 1e-12
    assert np.allclose(log_reach(logit).exp(), [sum(q[i:]) for i in range(5)])
    assert torch.isfinite(log_count(torch.tensor([80., -80.]))).all()


@pytest.mark.parametrize('rho', [.05, .5, .9])
def test_count_kl_by_coins_and_by_enumeration(rho):
    logit = torch.randn(2, 3, dtype=torch.float64)
    q, prior = log_count(logit), [rho**n*(1 - rho if n < 3 else 1) for n in range(4)]
    assert torch.allclose(count_kl(logit, rho),
                          (q.exp()*(q - torch.tensor(prior, dtype=torch.float64).log())).sum(-1))
    pi = logit.sigmoid()
    coins = kl_divergence(Bernoulli(logits=logit),
                          Bernoulli(torch.tensor(rho, dtype=torch.float64)))
    assert torch.allclose(count_kl(logit, rho),
                          coins[:, 0] + pi[:, 0]*coins[:, 1] + pi[:, 0]*pi[:, 1]*coins[:, 2])


def test_fit_draws_the_first_n():
    x, z = torch.rand(3, 144), torch.rand(3, 2, 2) - .5
    found = log_fit(x, z, .3)
    for n in range(3):
        mean = sum((bumps(z[:, i], side=12) for i in range(n)), torch.zeros(3, 144))
        assert torch.allclose(found[:, n], Normal(mean, .3).log_prob(x).sum(-1), rtol=1e-5)


def test_glimpses_look_at_what_is_left():
    model, x = AIR(), torch.rand(2, 144)
    seen = model(x, 2)
    assert seen.logit.shape == (2, 2) and seen.z.shape == seen.where.loc.shape == (2, 2, 2)
    out = model.net(x - bumps(seen.z[:, 0], side=12))
    assert torch.allclose(seen.logit[:, 1], out[:, 0], atol=1e-5)
    assert torch.allclose(seen.where.loc[:, 1], out[:, 1:3], atol=1e-5)


def test_air_bound_is_below_the_evidence_and_its_two_forms_agree():
    model, x = AIR(), bumps(torch.tensor([[.3, -.2]]), side=12)
    with torch.no_grad():
        drawn, summed = (torch.stack([air_loss(model, x, 2, 64, 2., exact=e) for _ in range(60)])
                         for e in (False, True))
        assert abs(drawn.mean() - summed.mean()) < 5*((drawn.var() + summed.var())/60)**.5
        n = Categorical(logits=log_count(torch.zeros(2))).sample((20_000,))
        z = .5*torch.randn(20_000, 2, 2)
        fit = log_fit(x.expand(20_000, -1), z, 2.).gather(-1, n[:, None])
        evidence = fit.logsumexp(0) - math.log(20_000)
    assert -summed.mean() < evidence + .01


def test_air_gradient_is_that_of_the_sum():
    model, x = AIR(), bumps(torch.tensor([[.3, -.2], [0., .4]]), side=12)
    def gradients(exact):
        loss = lambda: air_loss(model, x, 2, 8, 2., exact=exact)
        bias = model.net[-1].bias
        return torch.stack([torch.autograd.grad(loss(), bias)[0] for _ in range(150)])
    drawn, summed = gradients(False), gradients(True)
    error = ((drawn.var(0) + summed.var(0))/150)**.5
    assert ((drawn.mean(0) - summed.mean(0)).abs() < 5*error).all()
    assert drawn.mean(0)[0].abs() > 5*error[0]
