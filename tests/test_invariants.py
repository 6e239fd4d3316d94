"""What holds for every attack, whatever its parts: random objectives, balls, optimisers, types,
splits into batches and wrappers. VAE_ROBUST_DRAWS says how many are drawn (make test-all: 1,000)."""
import os
from functools import partial

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, OneHotCategorical

from vae_robust.attacks import attack
from vae_robust.objectives import NEEDS_JUDGE, OBJECTIVES, logits, reconstruction
from vae_robust.optimisers import BALLS, OPTIMISERS
from vae_robust.settings import preset
from vae_robust.vae import Posterior

DRAWS = int(os.environ.get('VAE_ROBUST_DRAWS', 60))
SIZE, LATENTS, CODES = 4, 3, 4


class Tiny(nn.Module):
    "An autoencoder of two linear maps, with a categorical or without, for images (B, 1, 4, 4)."
    def __init__(self, n_c):
        super().__init__()
        self.n_c, pixels = n_c, SIZE**2
        self.encoder = nn.Linear(pixels, 2*LATENTS + n_c)
        shape = nn.Unflatten(1, (1, SIZE, SIZE))
        self.decoder = nn.Sequential(nn.Linear(LATENTS + n_c, pixels), shape)

    def encode(self, x):
        return self.encoder(x.flatten(1)).split([LATENTS, LATENTS, self.n_c], -1)

    def posterior(self, x):
        mu, lv, l = self.encode(x)
        c = OneHotCategorical(logits=l, validate_args=False) if self.n_c else None
        return Posterior(Normal(mu, (lv/2).exp(), validate_args=False), c)

    def decode(self, code): return self.decoder(code).sigmoid()

    def log_likelihood(self, x, code):
        return Independent(Bernoulli(logits=self.decoder(code), validate_args=False), 3).log_prob(x)

    def forward(self, x): return self.decode(self.posterior(x).mode)


def images(n, seed, dtype):
    return torch.rand(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def tasks(draw):
    "A preset, a model (or what wraps one), and the type of its numbers."
    ball = draw(st.sampled_from([*BALLS]))
    optimisers = [o for o in OPTIMISERS if ball == 'linf' or o not in ('lbfgs', 'square')]
    n_c = draw(st.sampled_from([0, CODES]))
    objectives = [o for o in OBJECTIVES if n_c or o != 'code']
    keys = dict(ball=ball, optimiser=draw(st.sampled_from(optimisers)), best=True,
                objective=draw(st.sampled_from(objectives)), eps=draw(st.floats(.01, .5)),
                goal=draw(st.sampled_from(['target', 'away'])), lam=draw(st.sampled_from([0, .1])),
                features=draw(st.sampled_from(['means', 'logits', 'log_probs', 'codes'])),
                steps=draw(st.integers(0, 6)), restarts=draw(st.integers(1, 2)), step=.3, noise=.05,
                forced=draw(st.booleans()), stop=None)
    keys['relative'] = keys['goal'] == 'target' and draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 5)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    wrap = draw(st.sampled_from([lambda m: m, nn.DataParallel]))
    judge = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).to(dtype)
    width = SIZE**2 if keys['objective'] == 'judge' else LATENTS + n_c*(keys['features'] != 'means')
    judge(torch.rand(1, width, dtype=dtype))
    model = wrap(Tiny(n_c).to(dtype)).eval()
    return preset('attack.strong', **keys), model, judge.eval(), dtype


def same(found, other):
    "Whether two `Attacked` agree but for rounding that a step along a sign may have enlarged."
    tolerance = 1e-6 + 1e-4*found.after.abs()
    return ((found.after - other.after).abs() <= tolerance).all()


@settings(max_examples=DRAWS, deadline=None)
@given(tasks(), st.integers(1, 5), st.integers(0, 9))
def test_an_attack_of_any_kind_keeps_its_promises(task, n, seed):
    p, model, judge, dtype = task
    x, x_t = images(n, seed, dtype), images(n, seed + 100, dtype)
    kept = x.clone(), x_t.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    run = partial(attack, model, x, x_t if p.goal == 'target' else None, p, seed=seed,
                  progress=False, judge=judge if p.objective in NEEDS_JUDGE else None)
    found = run()
    assert found.x.shape == x.shape and found.x.dtype == dtype
    assert (BALLS[p.ball].size(found.x - x) <= p.eps*(1 + 1e-5) + 1e-6).all()
    assert found.x.min() >= 0 and found.x.max() <= 1 and found.x.isfinite().all()
    assert found.after.isfinite().all() and (found.nans == 0).all()
    assert (found.evaluations > 0).all()
    again = run(batch=1 + seed % n)
    assert torch.equal(found.x, run().x) and (dtype == torch.float32 or same(found, again))
    assert torch.equal(x, kept[0]) and torch.equal(x_t, kept[1]) and not x.requires_grad
    assert all(torch.equal(v, kept[2][k]) for k, v in model.state_dict().items())
    assert not model.training and all(q.grad is None for q in model.parameters())


@settings(max_examples=DRAWS//3, deadline=None)
@given(st.sampled_from([*OPTIMISERS]), st.sampled_from([*BALLS]), st.integers(0, 9),
       st.integers(0, 6))
def test_no_image_is_left_worse_than_it_was(optimiser, ball, seed, steps):
    "From the source itself, without a weight: the best iterate cannot be worse."
    if ball == 'l2' and optimiser in ('lbfgs', 'square'):
        optimiser = 'pgd'
    p = preset('attack.strong', optimiser=optimiser, ball=ball, steps=steps, noise=0, lam=0,
               eps=.1, step=.3, best=True, restarts=1)
    x, x_t = images(4, seed, torch.float64), images(4, seed + 9, torch.float64)
    found = attack(Tiny(0).double().eval(), x, x_t, p, progress=False)
    assert (found.after <= found.before).all()


@settings(max_examples=DRAWS//6, deadline=None)
@given(st.sampled_from([*OPTIMISERS]), st.integers(-14, 14))
def test_the_unit_of_the_objective_does_not_matter(optimiser, power):
    "An objective that is 10^power times as large finds the same images."
    torch.manual_seed(0)
    x, W = torch.rand(6, 1, 8, 8, dtype=torch.double), torch.randn(64, 5, dtype=torch.double)
    p = preset('attack.signs', optimiser=optimiser, step=.3, steps=30, best=True)
    one, other = (attack(lambda a, c=c: c*(a.flatten(1) @ W), x[:3], x[3:], p, progress=False)
                  for c in (1., 10.**power))
    assert (one.x - other.x).abs().max() <= 1e-3


@pytest.mark.parametrize('view', [
    lambda m: m, logits, reconstruction, lambda m: m.encoder.forward,
    lambda m: partial(lambda f, x: f(x), m), lambda m: lambda x: logits(m)(x)])
def test_a_module_in_training_mode_is_found_behind_any_view(view):
    model = Tiny(0)
    with pytest.raises(ValueError, match='is in training mode'):
        x = images(2, 0, torch.float32)
        attack(view(model), x, x, preset('attack.strong', steps=1), progress=False)
