import hypothesis.strategies as st
import pytest, torch
from hypothesis import given, settings

from vae_robust.attacks import (AttackError, adam, attack, latent, log_probs, logits, means, norm, penalised, pgd, project, value_and_gradient)
from vae_robust.settings import preset

images = lambda n, seed: torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.floats(1e-3, 1), st.sampled_from([0., 1., 1e6, float('inf')]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_projection_is_inside_ball_and_box_and_the_nearest_point(n, eps, scale, seed):
    x, far = images(n, seed), (torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))*scale).nan_to_num(0)
    p = project(far, x, eps)
    assert (p - x).abs().max() <= eps*(1 + 1e-5) + 1e-7 and p.min() >= 0 and p.max() <= 1
    low, high = (x - eps).clamp(0), (x + eps).clamp(max=1)
    nearest = torch.where(far < low, low, torch.where(far > high, high, far))                     # pixel by pixel
    torch.testing.assert_close(p, nearest)


@given(st.sampled_from(['pgd', 'adam']), st.floats(.01, 1), st.floats(0, 2), st.integers(0, 5), st.floats(.01, 3), st.booleans(), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_attack_leaves_ball_or_box(optimiser, eps, noise, steps, step, accumulate, seed):
    x, x_t = images(4, seed), images(4, seed + 1)
    a = preset('attack.strong', optimiser=optimiser, eps=eps, noise=noise, steps=steps, step=step, accumulate=accumulate, lam=.5)
    found = attack(lambda x: x.flatten(1)[:, :3], x, x_t, a, progress=False)
    assert (found.x - x).abs().max() <= eps*(1 + 1e-5) + 1e-7 and found.x.min() >= 0 and found.x.max() <= 1


def linear(seed=0, latents=1):
    w = torch.randn(64, latents, generator=torch.Generator().manual_seed(seed))
    return w, lambda x: x.flatten(1) @ w


@pytest.mark.parametrize('optimiser, kw', [(pgd, {}), (adam, {}), (adam, {'accumulate': True})])
def test_the_optimum_on_a_linear_encoder_with_a_far_target(optimiser, kw):
    w, phi = linear()
    x = torch.full((2, 1, 8, 8), .5)
    x_t = .5 + .4*torch.stack([w, -w]).view(2, 1, 8, 8).sign()
    optimum = (phi(x_t) - phi(x)).abs()[:, 0] - .1*w.abs().sum()
    loss = latent(phi, x_t)
    torch.testing.assert_close(loss(optimiser(loss, x, x, .1, 200, .5, **kw)), optimum, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('optimiser', [pgd, adam])
def test_a_target_within_reach_is_reached(optimiser):
    _, phi = linear(latents=3)
    x = torch.full((4, 1, 8, 8), .5)
    loss = latent(phi, x + .05*torch.randn(4, 1, 8, 8).sign())
    assert (loss(optimiser(loss, x, x, .1, 400, .01)) < .05*loss(x)).all()


def test_a_constant_encoder_gives_nothing_to_gain():
    x = images(4, 0)
    found = attack(lambda x: x.flatten(1)[:, :2]*0 + 1, x, images(4, 1), preset('attack.strong'), progress=False)
    assert found.before.eq(0).all() and found.after.eq(0).all() and found.x.isfinite().all()


def test_pgd_never_returns_worse_than_the_start_and_more_steps_are_no_worse(model, digits):
    phi, x, x_t = logits(model), digits[:8], digits[8:]
    loss = latent(phi, x_t)
    reached = [loss(pgd(loss, x, x, .1, n, .5)) for n in (0, 5, 20, 40)]
    assert torch.equal(reached[0], loss(x)) and (reached[1] < reached[0]).all()
    assert reached[1].mean() > reached[2].mean() >= reached[3].mean() - 1e-4


def test_strong_gets_as_near_as_1000_steps_of_the_repaired_thesis_attack(model, digits):
    phi, x, x_t = logits(model), digits[:4], digits[4:8]
    strong = attack(phi, x, x_t, preset('attack.strong'), progress=False)
    thesis = attack(phi, x, x_t, preset('attack.thesis_repaired', lam=0, noise=0), progress=False)
    assert strong.after.mean() <= thesis.after.mean()*1.001 + 1e-4


def test_images_of_a_batch_do_not_know_of_each_other(model, digits):
    phi, x, x_t = logits(model), digits[:6], digits[6:12]
    for name in ('attack.strong', 'attack.thesis'):
        a = preset(name, steps=5, noise=0)
        together = attack(phi, x, x_t, a, progress=False).x
        alone = torch.cat([attack(phi, x[i:i + 1], x_t[i:i + 1], a, progress=False).x for i in range(6)])
        torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_the_gradient_is_that_of_finite_differences():
    _, phi = linear(latents=3)
    w = phi(torch.eye(64).view(64, 1, 8, 8)).double()
    x, x_t = images(1, 0).double(), images(1, 1).double()
    loss = penalised(latent(lambda x: x.flatten(1) @ w, x_t), images(1, 2).double(), lam=.7)
    value, g = value_and_gradient(loss, x)
    for i in range(0, 64, 13):
        d = torch.zeros(64, dtype=torch.double); d[i] = 1e-6; d = d.view(1, 1, 8, 8)
        torch.testing.assert_close((loss(x + d) - loss(x - d))[0]/2e-6, g.flatten()[i], rtol=1e-5, atol=1e-6)


def test_accumulation_is_a_running_sum_of_gradients():
    loss = lambda xs: xs.flatten(1).sum(1)*torch.tensor([1.])
    x = torch.full((1, 1, 2, 2), .5)
    plain, running = (adam(loss, x, x, .5, 3, .01, accumulate=a) for a in (False, True))
    opt_x = x.clone().requires_grad_(); opt = torch.optim.Adam([opt_x], .005)
    for t in range(3):
        opt_x.grad = torch.full_like(x, t + 1.)                                                   # 1, 1 + 1, 1 + 1 + 1
        opt.step()
    torch.testing.assert_close(running, opt_x.detach())
    assert not torch.equal(plain, running)


def test_the_pixel_norm_is_what_lambda_weighs():
    loss = penalised(lambda xs: torch.zeros(len(xs)), images(2, 0), lam=3.)
    torch.testing.assert_close(loss(images(2, 1)), 3*torch.stack([d.norm() for d in images(2, 1) - images(2, 0)]))
    assert penalised(norm, None, 0) is norm


def test_features_are_what_they_are_called(model, digits):
    mu, lv, raw = model.encode(digits)
    assert torch.equal(means(model)(digits), mu)
    assert torch.equal(logits(model)(digits), torch.cat([mu, raw], 1))
    torch.testing.assert_close(log_probs(model)(digits)[:, 5:].exp().sum(1), torch.ones(16))


def test_the_same_seed_gives_the_same_noise(model, digits):
    a = preset('attack.noise')
    one, same, other = (attack(means(model), digits[:4], digits[4:8], a, seed=s, progress=False).x for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_model_s_parameters_get_no_gradient(model, digits):
    attack(logits(model), digits[:4], digits[4:8], preset('attack.strong', steps=2), progress=False)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('x, x_t, words', [
    (images(0, 0), images(0, 0), 'empty'),
    (images(3, 0), images(2, 0), 'same shape'),
    (images(3, 0)*2, images(3, 0), r'\[0, 1\]'),
    (images(3, 0)*float('nan'), images(3, 0), 'NaN'),
    (images(3, 0), images(3, 0) - 1, r'\[0, 1\]'),
])
def test_unusable_images_get_one_sentence(x, x_t, words):
    with pytest.raises(AttackError, match=words): attack(lambda x: x.flatten(1), x, x_t, preset('attack.strong'))
