"""Defences, on models whose right answer is known (chapter 30)."""
import math
from copy import deepcopy

import pytest, torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, OneHotCategorical, kl_divergence

from vae_robust.attacks import attack
from vae_robust.data import load, pixels
from vae_robust.defences import (Corrected, averaged, borders, bounds, boxed, certified_radius,
                                 coupled_kl, coupled_kl_c, farthest, heights, is_certified,
                                 overshoot, rounded, smooth, steady, step_sizes)
from vae_robust.objectives import AttackError, squared
from vae_robust.settings import preset
from vae_robust.training import build, fit, pretrained
from vae_robust.vae import Posterior, elbo, kl


class Linear(nn.Module):
    "p(z) = N(0, I), p(x|z) = N(Wz, s^2 I); the encoder says N(Ax, 0.1^2 I)."
    def __init__(self, A, W, s):
        super().__init__()
        self.A, self.W, self.s = A, W, s

    def encode(self, x): return self.posterior(x).z.mean, torch.zeros(len(x), len(self.A)), None
    def posterior(self, x): return Posterior(Normal(x.flatten(1) @ self.A.T, .1))
    def decode(self, code): return (code @ self.W.T).view(-1, 1, 4, 4)

    def log_likelihood(self, x, code):
        return Normal(self.decode(code), self.s).log_prob(x).flatten(1).sum(1)


@pytest.fixture
def linear():
    g = torch.Generator().manual_seed(0)
    A, W = (torch.randn(shape, generator=g, dtype=torch.double) for shape in ((2, 16), (16, 2)))
    return Linear(A, W, 2.).eval()


@pytest.fixture(scope='module')
def worded():
    "A small model whose code is rounded scalars, trained for its certificates, and eight digits."
    digits, x = pixels(load('digits', size=32).x), pixels(load('digits', 'test', size=32).x[:8])
    model = build(preset('mnist.fsq', n_c=4))
    fit(model, elbo, digits, 200, 24, progress=False)
    objective = lambda m, b, step: boxed(m, b, step, weight=3, eps=.05, eps_steps=40)
    fit(model, objective, digits, 40, 24, progress=False)
    return model.eval(), x


# ------------------------------------------------------------------ correct the code
@pytest.mark.parametrize('change', [lambda m: m.train().eval(), deepcopy,
                                    lambda m: m.to('cpu').requires_grad_(False)])
def test_a_corrected_model_stays_one(change):
    model, x = pretrained('mnist/entangled'), torch.rand(2, 1, 32, 32)
    defended = Corrected(model, 3, seed=0)
    after = change(Corrected(model, 3, seed=0))
    torch.testing.assert_close(after(x), defended(x))
    assert isinstance(after, Corrected) and not torch.equal(after(x), model(x))
    assert after.shape == model.shape and not after.training
    with pytest.raises(AttributeError, match='wings'):
        after.wings


def test_without_noise_the_correction_ends_at_the_mode_of_the_posterior(linear):
    x = torch.rand(3, 1, 4, 4, dtype=torch.double)
    precision = torch.eye(2) + linear.W.T @ linear.W/4
    mode = torch.linalg.solve(precision, linear.W.T @ x.flatten(1).T/4).T
    found = Corrected(linear, 400, .05, heat=0.).posterior(x).z.mean
    torch.testing.assert_close(found, mode)


@pytest.mark.parametrize('heat', (.5, 1.))
def test_the_spread_after_one_step_is_that_of_its_noise(linear, heat):
    x = torch.rand(1, 1, 4, 4, dtype=torch.double).expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    spread = Corrected(linear, 1, .02, heat).posterior(x).z.mean.std(0)
    assert (spread/(heat*math.sqrt(2*.02)) - 1).abs().max() < 5/math.sqrt(2*4000)


def test_each_latent_takes_its_own_steps(linear):
    x, eta = torch.rand(4, 1, 4, 4, dtype=torch.double), torch.tensor([.05, 0.], dtype=torch.double)
    before = linear.posterior(x).z.mean
    after = Corrected(linear, 3, eta, seed=0).posterior(x).z.mean
    assert torch.equal(after[:, 1], before[:, 1]) and (after[:, 0] != before[:, 0]).all()
    torch.testing.assert_close(Corrected(linear, 3, [.05, 0.], seed=0).posterior(x).z.mean, after)


def test_step_sizes_are_a_share_of_the_mean_variance_and_do_not_depend_on_the_image_in_hand():
    model, x = pretrained('mnist/entangled'), pixels(load('digits', size=32).x[:50])
    found = step_sizes(model, x, .1)
    torch.testing.assert_close(found, model.posterior(x).z.scale.square().sum(0)/500)
    assert found.shape == (model.n_z,) and not found.requires_grad


def test_a_seed_gives_every_image_the_same_noise_whatever_its_batch(linear):
    x, fixed = torch.rand(5, 1, 4, 4, dtype=torch.double), Corrected(linear, 4, .02, seed=1)
    whole = fixed.encode(x)[0]
    torch.testing.assert_close(torch.cat([fixed.encode(a)[0] for a in x.split(2)]), whole)
    other, free = Corrected(linear, 4, .02, seed=2), Corrected(linear, 4, .02)
    assert not torch.equal(other.encode(x)[0], whole)
    assert not torch.equal(free.encode(x)[0], free.encode(x)[0])


def test_the_gradient_through_the_correction_is_that_of_finite_differences(linear):
    x = torch.rand(1, 1, 4, 4, dtype=torch.double, requires_grad=True)
    fixed = Corrected(linear, 5, .05, seed=0)
    assert torch.autograd.gradcheck(lambda a: fixed.encode(a)[0], x)


@pytest.mark.parametrize('name', ('latent_code', 'output_code', 'damage_code'))
def test_no_steps_are_no_defence_to_the_last_bit(name):
    model = pretrained('mnist/disentangled')
    x, x_t = pixels(load('digits', 'test', size=32).x[:8]).split(4)
    p = preset(f'attack.{name}', steps=3)
    aim = None if p.goal == 'away' else x_t
    one, two = (attack(f, x, aim, p, progress=False) for f in (model, Corrected(model, steps=0)))
    assert torch.equal(one.x, two.x) and torch.equal(one.after, two.after)


def test_a_model_in_training_mode_is_still_refused():
    model, x = build(preset('digits.entangled')).train(), torch.rand(2, 1, 32, 32)
    with pytest.raises(AttackError, match='training mode'):
        attack(Corrected(model, 2), x, x, preset('attack.strong'), progress=False)


def test_an_objective_over_several_models_is_their_mean(linear):
    make = lambda model, x_t, name, judge: lambda xs: squared(model(xs), x_t)
    x, seeds = torch.rand(3, 1, 4, 4, dtype=torch.double), range(3)
    models = [Corrected(linear, 3, .05, seed=s) for s in seeds]
    J = averaged(make, models)(None, x, 'means', None)
    torch.testing.assert_close(J(x), sum(squared(m(x), x) for m in models)/3)


# ------------------------------------------------------------------ a smooth encoder, a steady one
@pytest.mark.parametrize('rho', (.1, .5, .95, .999))
def test_no_covariance_is_cheaper_than_the_one_in_closed_form(rho):
    q, p = (Normal(torch.tensor([m]), torch.tensor([sd])) for m, sd in ((.3, .2), (.5, .6)))
    k = torch.linspace(-.9999, .9999, 20001)*.2*.6
    v, w = q.variance.expand_as(k), p.variance.expand_as(k)
    S = torch.stack([torch.stack([v, k], -1), torch.stack([k, w], -1)], -2).double()
    pair = MultivariateNormal(torch.tensor([.3, .5]).double(), S)
    prior = MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1, rho], [rho, 1]]).double())
    excess = kl_divergence(pair, prior) - coupled_kl(q, p, rho).double()
    least = kl_divergence(pair, prior).min()
    assert -1e-3 < excess.min() < 1e-3*least.clamp(min=1)


def test_coupled_categoricals_are_the_divergence_of_their_joint_table():
    q, p = (OneHotCategorical(logits=torch.randn(1, 5)) for _ in range(2))
    joint = q.probs.T*p.probs
    prior = .7*torch.eye(5)/5 + .3/25
    torch.testing.assert_close((joint*(joint/prior).log()).sum()[None], coupled_kl_c(q, p, .7))


@pytest.mark.parametrize('n_c', (0, 10))
def test_a_smooth_objective_of_radius_zero_couples_an_image_with_itself(n_c):
    model, x = build(preset('digits.entangled', n_c=n_c)), torch.rand(4, 1, 32, 32)
    terms = smooth(model, x, rho=.9, eps=1e-9, inner=1)
    q = model.posterior(x)
    torch.testing.assert_close(terms.kl_z, coupled_kl(q.z, q.z, .9)/2, rtol=1e-3, atol=1e-4)
    if n_c:
        torch.testing.assert_close(terms.kl_c, coupled_kl_c(q.c, q.c, .9)/2, rtol=1e-3, atol=1e-4)
    assert (terms.kl_z.sum(1) < kl(q)[0].sum(1)).all()  # a pair costs less than two strangers


def test_the_farthest_image_is_in_the_ball_and_the_box_and_farther_than_chance():
    model, x = build(preset('digits.entangled')).eval(), torch.rand(6, 1, 32, 32)
    q = model.posterior(x)
    away = lambda xs: (model.posterior(xs).z.mean - q.z.mean).square().sum(1)
    far, chance = farthest(away, x, .1, 5), (x + .1*torch.randn_like(x).sign()).clamp(0, 1)
    assert (far - x).abs().max() <= .1 + 1e-6 and far.min() >= 0 and far.max() <= 1
    assert (away(far) > away(chance)).all()


def test_the_teacher_and_the_decoder_of_a_steady_encoder_get_no_gradient():
    model, original = (build(preset('digits.entangled'), seed=s) for s in (0, 1))
    steady(model, torch.rand(2, 1, 32, 32), original=original, eps=.1, inner=1).loss.backward()
    assert all(p.grad is None for p in original.parameters())
    assert all(p.grad is None for p in model.decoder.parameters())
    assert any(p.grad.abs().max() > 0 for p in model.encoder.parameters())


# ------------------------------------------------------------------ a code in a box
def test_bounds_of_one_convolution_are_reached_at_a_corner():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, 2, 1).double(), torch.rand(1, 2, 6, 6).double()
    low, high = bounds([layer], x - .1, x + .1)
    for i in range(high.numel()):
        row, = torch.autograd.grad(layer(x.requires_grad_()).flatten()[i], x)
        torch.testing.assert_close(layer(x + .1*row.sign()).flatten()[i], high.flatten()[i])
        torch.testing.assert_close(layer(x - .1*row.sign()).flatten()[i], low.flatten()[i])


def test_no_image_of_the_ball_leaves_the_bounds(worded):
    model, x = worded
    low, high = heights(model, (x - .1).clamp(0, 1), (x + .1).clamp(0, 1))
    for i in range(60):
        noise = torch.randn_like(x).sign() if i % 2 else 2*torch.rand_like(x) - 1
        inside = (x + .1*noise).clamp(0, 1)
        h, _ = heights(model, inside, inside)
        assert (low - 1e-4 <= h).all() and (h <= high + 1e-4).all()


def test_layers_without_bounds_are_named():
    with pytest.raises(TypeError, match='Tanh'):
        bounds([nn.Tanh()], torch.zeros(1, 2), torch.ones(1, 2))


def test_heights_are_rounded_as_the_model_rounds_them(worded):
    model, x = worded
    h, same = heights(model, x, x)
    assert torch.equal(h, same)
    code = model.posterior(x).mode.unflatten(1, (-1, model.n_c)).argmax(-1)
    assert torch.equal(rounded(h, model.n_c), code)


def test_attacks_never_succeed_inside_a_certificate_and_the_certificate_is_of_some_size(worded):
    model, x = worded
    radius = certified_radius(model, x)
    assert (radius > 1e-4).float().mean() > .5
    assert is_certified(model, x, radius).all()
    assert not is_certified(model, x, torch.full((len(x),), 1.)).any()
    away = preset('attack.signs', objective='code', goal='away', noise=.01, steps=20)
    eps = radius.clamp(min=1e-6)
    found = attack(model, x, None, away, eps=eps, progress=False).x
    same = (model.posterior(found).mode == model.posterior(x).mode).all(1)
    assert same[radius > 1e-6].all()
    wider = attack(model, x, None, away, eps=.4, progress=False).x
    assert not (model.posterior(wider).mode == model.posterior(x).mode).all()  # the attack can


def test_a_larger_ball_is_never_certified_where_a_smaller_one_is_not(worded):
    model, x = worded
    held = torch.stack([is_certified(model, x, e) for e in torch.linspace(0, .2, 9)])
    assert held[0].all() and (held[1:] <= held[:-1]).all()


def test_what_overshoots_a_cell_is_counted_on_both_sides():
    t = borders(5, torch.zeros(1))
    assert t.isinf().tolist() == [True] + [False]*4 + [True]
    h = t[2:3, None] + .01  # just above the second border
    out = overshoot(h - .03, h + .01, h, 5)
    torch.testing.assert_close(out, torch.tensor([.02]), rtol=0, atol=1e-6)
    out = overshoot(t[1:2, None] - 5, t[1:2, None] - .1, t[1:2, None] - 1, 5)
    assert out.item() == 0  # the outermost cell has no lower border


def test_the_loss_of_the_box_is_the_reconstruction_where_the_radius_is_zero(worded):
    model, x = worded
    terms = boxed(model, x, 0, weight=3, eps=.1, eps_steps=10)
    assert terms.kl_c.abs().max() < 1e-5 and not model.training
    torch.testing.assert_close(terms.loss, terms.rec.mean(), rtol=1e-5, atol=1e-3)
    later = boxed(model, x, 10, weight=3, eps=.1, eps_steps=10)
    torch.testing.assert_close(later.loss, (later.rec + 3*later.kl_c).mean())
