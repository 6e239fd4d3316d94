"""Attackers who know the discrete code: oracles with a known optimum (chapter 15, `When the code
hides the way`)."""
import itertools
from types import SimpleNamespace

import pytest, torch
from torch.distributions import Normal, OneHotCategorical

from vae_robust.attacks import attack, attack_batch, smallest_radius, starts
from vae_robust.concrete import Rounded, level_logits, levels, on_levels
from vae_robust.discrete import (FIRST, SLACK, WithCode, annealed, another_code, code_first,
                                 forced, free, hard, most_likely, nearby, planned)
from vae_robust.objectives import Softened, behind, expected, margin, squared
from vae_robust.optimisers import Watched, pgd
from vae_robust.settings import preset
from vae_robust.vae import VAE, Posterior


class Linear(torch.nn.Module):
    """Images of `n` pixels; means A x, logits W x (in G categoricals of K), a decoder B (z, c).
    The code is read by the decoder unless B ignores it."""
    def __init__(self, A, W, B, b=0.):
        super().__init__()
        self.A, self.W, self.B, self.b = A, W, B, b
    def encode(self, x):
        x = x.flatten(1)
        mu = x @ self.A
        return mu, torch.zeros_like(mu), torch.einsum('bn,n...k->b...k', x, self.W) + self.b
    def posterior(self, x):
        mu, lv, l = self.encode(x)
        return Posterior(Normal(mu, (lv/2).exp()), OneHotCategorical(logits=l, validate_args=False))
    def decode(self, code):
        return (code @ self.B).view(len(code), 1, 1, -1)
    def forward(self, x):
        q = self.posterior(x)
        return self.decode(torch.cat([q.z.mean, most_likely(q.c.logits).flatten(1)], 1))


def linear(n=16, D=2, K=4, G=None, seed=0, scale=1.):
    g = torch.Generator().manual_seed(seed)
    shape = (n, K) if G is None else (n, G, K)
    return Linear(torch.randn(n, D, generator=g), scale*torch.randn(shape, generator=g),
                  torch.randn(D + K*(G or 1), n, generator=g)).eval()


@pytest.mark.parametrize('optimiser, step, steps',
                         [('pgd', 1, 60), ('apgd', 2, 100), ('rmsprop', .3, 100), ('lbfgs', 1, 60),
                          ('square', .3, 400)])
def test_the_smallest_change_that_flips_a_code(optimiser, step, steps):
    """From code a to code b a linear head is flipped at margin/||w_a - w_b||_1 and not before,
    when the box is far and no third code is in the way."""
    m = linear(K=2)
    x = torch.full((1, 1, 4, 4), .5)
    W = m.W
    a = int(m.encode(x)[2].argmax())
    x_t = (x + .45*(W[:, 1 - a] - W[:, a]).sign().view(1, 1, 4, 4)).clamp(0, 1)
    assert m.encode(x_t)[2].argmax() == 1 - a
    exact = (m.encode(x)[2][0, a] - m.encode(x)[2][0, 1 - a])/(W[:, a] - W[:, 1 - a]).abs().sum()
    p = preset('attack.signs', objective='code', optimiser=optimiser, step=step, steps=steps,
               eps=.4)
    found = smallest_radius(m, x, x_t, p, lambda xs: m.encode(xs)[2].argmax(1) == 1 - a,
                            halvings=10)
    assert exact*(1 - 1e-4) <= found.value.item() <= exact*1.01 + .4/2**10 + (optimiser == 'square')*.1*exact


def test_a_forced_code_is_reached_at_the_exact_radius():
    """The first-order law is exact for a linear encoder: (15.3) reaches the code just above
    margin/||w_a - w_b||_1 (and the slack), and not below."""
    m, x = linear(K=2), torch.full((1, 1, 4, 4), .5)
    l = m.encode(x)[2]
    a = int(l.argmax())
    dual = (m.W[:, a] - m.W[:, 1 - a]).abs().sum()
    x_t = (x + .45*(m.W[:, 1 - a] - m.W[:, a]).sign().view(1, 1, 4, 4)).clamp(0, 1)
    gap = (l[0, a] - l[0, 1 - a]).item()
    for eps, agrees in (((gap + SLACK)/dual*1.01, True), ((gap + SLACK)/dual*.99, False)):
        p = preset('attack.latent_code', eps=float(eps), restarts=1)
        f = Watched(planned(p, m, x, x_t).runs[0](torch.arange(1))[0])
        pgd(f, x, x, float(eps), 40, 1.)
        assert (f.lowest < FIRST).item() == agrees


@pytest.mark.parametrize('name', ['latent_code', 'output_code', 'damage_code'])
def test_a_code_that_never_changes_and_one_category_are_no_code(name):
    """Equal logits for all images (K = 4), or one category: forced and free runs are those of
    the model without a categorical."""
    m = linear(K=4)
    m.W.zero_()
    m.b = torch.tensor([1., 0, -40, -50])
    single = Linear(m.A, torch.zeros(16, 1), m.B[:3]).eval()
    without = SimpleNamespace(posterior=lambda x: Posterior(m.posterior(x).z),
                              decode=lambda z: m.decode(torch.cat([z, torch.eye(4)[[0]*len(z)]], 1)),
                              encode=lambda x: (*m.encode(x)[:2], x.new_zeros(len(x), 0)))
    x, x_t = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    p = preset(f'attack.{name}', restarts=1, select='hard')
    if p.goal == 'away':
        p = p.model_copy(update={'forced': False})  # it would force codes that are not there
    one, own, none = (attack(a, x, None if p.goal == 'away' else x_t, p, progress=False)
                      for a in (single, m, without))
    for found in (one, own):
        torch.testing.assert_close(found.after, none.after, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.x, none.x, rtol=0, atol=1e-3)
        assert torch.equal(found.evaluations, none.evaluations)  # the same budget


def test_a_decoder_that_ignores_the_code_is_attacked_no_worse_for_forcing():
    "Codes are forced in vain there, and the free runs of the budget are what finds the best image."
    m = linear(K=4)
    m.B[2:] = 0
    x, x_t = torch.rand(2, 8, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    p = preset('attack.output_code')
    both, frees = attack(m, x, x_t, p,
                         progress=False), attack(m, x, x_t, p.model_copy(update={'forced': False}),
                                                 progress=False)
    assert (both.after <= frees.after*1.02 + 1e-4).all()
    J, code = hard(p, m, x, x_t), most_likely(m.encode(x)[2])
    torch.testing.assert_close(forced(p, m, code, x,
                                      x_t)(x)[(margin(m.encode(x)[2], code) < -SLACK)],
                               J(x)[margin(m.encode(x)[2], code) < -SLACK])


def saturated():
    """Three pixels; the second code is said where x_1 + x_2 > 1.04, with logits of +-30 and
    more; only x_3 moves z."""
    W = torch.zeros(3, 2)
    W[:2, 1], W[:2, 0] = 1000., -1000.
    m = Linear(torch.tensor([[0.], [0.], [1.]]), W,
               torch.tensor([[1., 0, 0], [0, 0, 0], [0, 5., 0]]), torch.tensor([1040., -1040.]))
    return m.eval()


@pytest.mark.parametrize('name', ['output_code', 'damage_code'])
def test_saturated_codes_whose_optimum_is_known_by_enumeration(name):
    m, x = saturated(), torch.tensor([[.47, .47, .3], [.5, .44, .9],
                                      [.45, .5, .5]]).view(3, 1, 1, 3)
    x_t = torch.tensor([[.9, .9, .35]]*3).view(3, 1, 1, 3)
    assert (m.encode(x)[2].diff(dim=1).abs() >= 30).all() and m.encode(x)[2].argmax(1).eq(0).all()
    p = preset(f'attack.{name}', restarts=2)
    J = hard(p, m, x, None if p.goal == 'away' else x_t)
    corners = torch.tensor(list(itertools.product((-.1, 0, .05, .1), repeat=3))).view(-1, 1, 1, 3)
    exact = torch.stack([J((x + d).clamp(0, 1)) for d in corners]).amin(0)
    for seed in range(5):  # from every start
        found = attack(m, x, None if p.goal == 'away' else x_t, p, seed=seed, progress=False)
        assert (found.after <= exact + 1e-3).all() and m.encode(found.x)[2].argmax(1).eq(1).all()
    soft = attack(m, x, None if p.goal == 'away' else x_t,
                  p.model_copy(update={'forced': False, 'restarts': 1, 'soften': 1,
                                       'anneal': False}), progress=False)
    assert (soft.after > exact + 1).any()  # what the softmax hides


@pytest.mark.parametrize('objective, goal', [('output', 'target'), ('output', 'away'),
                                             ('judge', 'away'), ('symmetric_kl', 'target'),
                                             ('w2', 'target')])
def test_choosing_by_the_hard_model_is_never_worse_than_by_the_surrogate(objective, goal, digits):
    torch.manual_seed(1)
    m = VAE(3, 4).eval()
    with torch.no_grad():
        m.encoder[-1].weight[6:] *= 40
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()
    x, x_t = digits[:8], digits[8:]
    p = preset('attack.signs', objective=objective, goal=goal, noise=.1, steps=15, features='codes')
    J = hard(p, m, x, x_t, judge)
    values = [J(attack(m, x, x_t, p.model_copy(update={'select': s}), judge=judge,
                       progress=False).x) for s in ('hard', 'surrogate')]
    assert (values[0] <= values[1] + 1e-5).all() and (values[0] < values[1]).any()


def test_hard_and_forced_objectives_are_what_they_say(model, digits):
    x, x_t, p = digits[:8], digits[8:], preset('attack.output')
    l = model.posterior(x).c.logits
    torch.testing.assert_close(hard(p, model, x, x_t)(x), squared(model(x), model(x_t)))
    code = most_likely(l).roll(1, 1)
    torch.testing.assert_close(forced(p, model, code, x, x_t)(x), FIRST + SLACK + margin(l, code))
    away = preset('attack.damage')
    torch.testing.assert_close(hard(away, model, x, None)(x_t), -squared(model(x_t), model(x)))


def test_several_categoricals():
    m = linear(K=3, G=2)
    x, x_t = torch.rand(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(3)).unbind(0)
    assert expected(WithCode(m).posterior(x)).shape == (4, 2 + 6)
    # (B, G), (5, B, G)
    own, codes = m.encode(x)[2].argmax(-1), torch.stack(list(nearby(m.encode(x)[2], 5))).argmax(-1)
    assert ((codes != own).sum(-1) == 1).all() and torch.equal(codes[4], codes[0])
    assert all(len({tuple(c) for c in codes[:4, b].flatten(1).tolist()}) == 4 for b in range(4))
    torch.testing.assert_close(hard(preset('attack.output'), m, x, x_t)(x), squared(m(x), m(x_t)))
    found = attack(m, x, x_t, preset('attack.output_code', eps=.5), progress=False)
    assert (behind(m.encode(found.x)[2], most_likely(m.encode(x_t)[2])) <= 0).float().mean() >= .5
    assert (found.after < found.before).all()


class Scalars(torch.nn.Module):
    "Images of 16 pixels; scalars W x + b, rounded to K levels; a decoder B of the levels."
    def __init__(self, W, b, K, B):
        super().__init__()
        self.W, self.b, self.K, self.B = W, b, K, B
    def scalars(self, x): return x.flatten(1) @ self.W + self.b
    def encode(self, x):
        none = x.new_zeros(len(x), 0)
        return none, none, level_logits(self.scalars(x), self.K)
    def posterior(self, x):
        none = x.new_zeros(len(x), 0)
        return Posterior(Normal(none, none), Rounded(logits=self.encode(x)[2]))
    def decode(self, code):
        v = code.unflatten(1, (-1, self.K)) @ levels(self.K, code)
        return (v @ self.B).view(len(code), 1, 4, 4)
    def forward(self, x): return self.decode(self.posterior(x).mode)


def scalars(G, K, b=0., seed=0):
    g = torch.Generator().manual_seed(seed)
    return Scalars(torch.randn(16, G, generator=g)/2, b, K, torch.randn(G, 16, generator=g)).eval()


@pytest.mark.parametrize('K', [4, 5])
@pytest.mark.parametrize('far', [0., 30.])
def test_a_level_is_forced_at_the_exact_radius_however_large_the_scalar(K, far):
    """A linear scalar reaches the next level at its distance from the border, over ||w||_1, and the
    slack. The bound, tanh, has no slope at 30, and the lines have one."""
    m, x, top = scalars(1, K), torch.full((1, 1, 4, 4), .5), (K - 1)/2
    m.W = m.W*(1 + 4*far)
    m.b = far - .07 - m.scalars(x)
    k = m.encode(x)[2].argmax(-1).item() - 1  # one level down
    border = torch.atanh((levels(K, x)[k] + .5)/top)
    needed = 2*top*(far - .07 - border) + SLACK
    want = torch.eye(K)[k:k + 1, None]
    for share, agrees in ((1.01, True), (.99, False)):
        eps = share*(needed/(2*top*m.W.abs().sum())).item()
        f = Watched(forced(preset('attack.output_code'), m, want, x, x))
        pgd(f, x, x, eps, 40, 1.)
        assert eps < .5 and (f.lowest < FIRST).item() == agrees


def test_nearby_levels_come_first():
    m = scalars(3, 5)
    x = torch.rand(6, 1, 4, 4)
    l = m.encode(x)[2]
    moved = torch.stack([c.argmax(-1) for c in nearby(l, 3)]) - l.argmax(-1)
    assert moved.abs().sum(-1).eq(1).all()
    every = torch.stack([c.argmax(-1) for c in nearby(l, 3*4)])
    assert all(len(every[:, b].unique(dim=0)) == 12 for b in range(6))


@pytest.mark.parametrize('name', ['latent_code', 'output_code', 'damage_code', 'strong'])
def test_rounded_scalars_are_attacked_and_chosen_by_the_hard_model(name):
    m = scalars(3, 5)
    x, x_t = torch.rand(2, 12, 1, 4, 4, generator=torch.Generator().manual_seed(3)).unbind(0)
    p = preset(f'attack.{name}', eps=.4, steps=40)
    aim = None if p.goal == 'away' else x_t
    found, least = attack(m, x, aim, p, progress=False), hard(p, m, x, aim)
    torch.testing.assert_close(found.after, least(found.x))
    own, now, goal = (m.encode(a)[2].argmax(-1) for a in (x, found.x, x_t))
    share = (now != own).any(1) if p.goal == 'away' else (now == goal).all(1)
    assert share.float().mean() > .7
    assert (found.after <= found.before).all() and (found.after < found.before).sum() > 9


KINDS = {'K = 2': (2, 1, False), 'K = 5': (5, 1, False), 'K = 20': (20, 1, False),
         'K = 50': (50, 1, False), 'three': (10, 3, False), 'levels': (6, 4, True)}

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['latent_code', 'output_code', 'damage_code',
                                  'judge_untargeted_code'])
def test_every_explored_code_is_attacked_within_the_same_budget(digits, kind, name):
    K, G, rounds = KINDS[kind]
    m = VAE(0 if rounds else 3, K, categoricals=G)
    m = (on_levels(m) if rounds else m).eval()
    p, x, x_t = preset(f'attack.{name}', steps=2, stop=None), digits[:4], digits[4:8]
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()
    plan = planned(p, m, x, None if p.goal == 'away' else x_t, judge)
    assert len(plan.runs) == 2*p.restarts
    found = attack(m, x, None if p.goal == 'away' else x_t, p, judge=judge, progress=False)
    assert (found.evaluations == 3*2*p.restarts).all() and found.after.isfinite().all()
    if p.goal == 'away':
        l = m.posterior(x).c.logits
        codes = torch.stack([c.argmax(-1).view(4, -1) for c in nearby(l, p.restarts)])
        other = (codes != l.argmax(-1).view(4, -1)).sum(-1)
        assert other.eq(1).all()
        there = min(p.restarts, G*(K - 1))
        assert all(len(codes[:, b].unique(dim=0)) == there for b in range(4))


def test_nearby_codes_come_in_the_order_of_their_logits():
    l = torch.tensor([[3., 1, 2], [0., 5, 4]])
    assert torch.stack(list(nearby(l, 3))).argmax(-1).T.tolist() == [[2, 1, 2], [2, 0, 2]]


def test_every_model_has_the_same_budget(model, digits):
    p = preset('attack.damage_code', steps=2, restarts=3)
    plain = VAE(5).eval()
    n = [attack(m, digits[:2], None, p, progress=False).evaluations.tolist()
         for m in (model, plain)]
    assert n == [[2*3*3]*2]*2
    runs = planned(p, model, digits[:2], None).runs
    assert [run(torch.arange(2))[1] is None for run in runs] == [True]*3 + [False]*3


def test_each_forced_run_asks_for_its_own_code_and_of_the_rows_that_are_left(model, digits):
    x, p = digits[:5], preset('attack.damage_code', restarts=3)
    l, rows = model.posterior(x).c.logits, torch.tensor([1, 4])
    for run, code in zip(planned(p, model, x, None).runs, nearby(l, 3)):
        torch.testing.assert_close(run(rows)[0](x[rows]), (FIRST + SLACK + margin(l, code))[rows])
    output, x_t = preset('attack.output_code'), digits[5:10]
    missing = margin(l, most_likely(model.posterior(x_t).c.logits)) + SLACK
    want = torch.where(missing > 0, FIRST + missing, hard(output, model, x, x_t)(x))
    torch.testing.assert_close(planned(output, model, x, x_t).runs[0](rows)[0](x[rows]), want[rows])


@pytest.mark.parametrize('name', ['latent_code', 'output_code', 'damage_code', 'judge_code',
                                  'judge_untargeted_code'])
def test_a_function_can_be_attacked_by_those_who_know_the_code(name):
    "It has no code, so it is attacked as without a temperature, from as many starts."
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    x, x_t = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    f, judge = (lambda a: (a.flatten(1) @ w).view(a.shape)), lambda a: a.flatten(1)[:, :4]
    p = preset(f'attack.{name}', steps=4, restarts=1, stop=None)
    same = p.model_copy(update=dict(forced=False, restarts=2, soften=1, anneal=False,
                                    select='surrogate'))
    one, two = (attack(f, x, None if p.goal == 'away' else x_t, q, judge=judge, progress=False)
                for q in (p, same))
    assert torch.equal(one.x, two.x) and (one.after < one.before).all()
    assert one.evaluations.tolist() == [10]*3


def test_who_is_won_is_not_attacked_again(model, digits):
    """`stop`: images at or below it have no further runs, the others have them all, and nobody's
    image changes for that."""
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()
    with torch.no_grad():
        judge[1].weight.mul_(20)
    p, x = preset('attack.judge_untargeted_code', steps=4, restarts=3, stop=None), digits[:12]
    every = attack(model, x, None, p, judge=judge, progress=False)
    stop = every.after.median().item()
    some = attack(model, x, None, p.model_copy(update={'stop': stop}), judge=judge, progress=False)
    won = every.after <= stop
    assert won.any() and (~won).any()
    assert (some.evaluations[~won] == 30).all() and (some.evaluations[won] < 30).any()
    assert (some.evaluations[won] % 5 == 0).all()
    torch.testing.assert_close(some.after[~won], every.after[~won])
    torch.testing.assert_close(some.x[~won], every.x[~won])
    assert (some.after[won] <= stop).all()
    ticks = []  # the bar ends at its end all the same
    noises = [torch.Generator().manual_seed(i) for i in range(6)]
    q = p.model_copy(update={'stop': stop})
    attack_batch(planned(q, model, x, None, judge), x, q, noises, q.eps, q.lam, ticks.append)
    assert sum(ticks) == 12*6*5


def test_a_changed_code_counts_half_as_much_again():
    """`select = code`: of the saturated model's images one with the other code is kept if it is
    two thirds as far away, and not otherwise."""
    m, x = saturated(), torch.tensor([[.47, .47, .3]]).view(1, 1, 1, 3)
    p, d = preset('attack.damage_code'), torch.tensor([.1, .1, 0])
    changed, same = x + d, x - d
    assert m.encode(changed)[2].argmax(1).item() == 1 and m.encode(same)[2].argmax(1).item() == 0
    rank = another_code(p, m, x, None)
    J = hard(p, m, x, None)
    torch.testing.assert_close(rank(changed), 1.5*J(changed))
    torch.testing.assert_close(rank(same), J(same))
    pair = linear(K=3, G=2)  # of several categoricals any will do
    a, b = torch.rand(2, 40, 1, 4, 4, generator=torch.Generator().manual_seed(3)).unbind(0)
    other = (pair.encode(a)[2].argmax(-1) != pair.encode(b)[2].argmax(-1)).sum(1)
    ratio = another_code(p, pair, a, None)(b)/hard(p, pair, a, None)(b)
    assert {0, 1, 2} == set(other.tolist()) and torch.equal(ratio > 1.25, other > 0)


def test_an_annealed_temperature_ends_at_one():
    reading, seen = Softened(SimpleNamespace(), 8.), []
    J = annealed(reading, lambda xs: seen.append(reading.T) or xs, 3)
    for _ in range(5):
        J(torch.zeros(1))
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([8., 4, 2, 1, 1]))


def test_the_hard_value_and_the_surrogate_are_both_returned(model, digits):
    p = preset('attack.output_code', steps=5)
    found = attack(model, digits[:4], digits[8:12], p, progress=False)
    torch.testing.assert_close(found.after, hard(p, model, digits[:4], digits[8:12])(found.x),
                               rtol=1e-4, atol=1e-4)
    assert found.surrogate.shape == (4,) and found.surrogate.isfinite().all()
    old = attack(model, digits[:4], digits[8:12],
                 preset('attack.output', steps=5, select='surrogate'), progress=False, trace=True)
    # chosen by what is descended on, as before
    torch.testing.assert_close(old.after, old.trace.amin(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(old.surrogate, old.after, rtol=1e-4, atol=1e-4)


def test_the_fourth_slip_starts_around_twice_the_image(digits):
    x, g = digits[:3], lambda: [torch.Generator().manual_seed(5)]
    noise = .2*torch.randn(x.shape, generator=g()[0])
    for name, times in (('thesis', 2), ('doubled', 2), ('thesis_repaired', 1), ('accumulate', 1)):
        torch.testing.assert_close(next(starts(x, preset(f'attack.{name}'), g())),
                                   (times*x + noise).clamp(0, 1))


# ------------------------------------------------------------------ lines that once could change
def test_every_categorical_that_disagrees_is_missing():
    "(15.3) sums over categoricals: with the first right and the second wrong, a code is wrong."
    logits = torch.tensor([[[5., 0, 0], [5., 0, 0]]])
    code = torch.eye(3)[torch.tensor([[0, 1]])]
    reading = SimpleNamespace(logits=logits)
    found = code_first(reading, code, lambda xs: xs.new_zeros(len(xs)))(torch.zeros(1, 2))
    assert found.item() == FIRST + 5 + SLACK
    found = code_first(reading, most_likely(logits), lambda xs: xs.new_zeros(len(xs)))
    assert found(torch.zeros(1, 2)).item() == 0


def test_a_free_run_anneals_if_its_preset_says_so():
    """In the end an annealed objective is that at the temperature 1, a constant one that at
    its own."""
    torch.manual_seed(0)
    model, (x, x_t) = VAE(2, 3).eval(), torch.rand(2, 4, 1, 32, 32)
    with torch.no_grad():
        model.encoder[-1].weight.mul_(50)
    at = lambda anneal: preset('attack.output_code', soften=10, anneal=anneal, steps=4)
    falling, still = (free(at(anneal), model, x, x_t) for anneal in (True, False))
    with torch.no_grad():
        values = [falling(x) for _ in range(6)]
        torch.testing.assert_close(values[0], still(x))
        torch.testing.assert_close(values[4], values[5])
        assert (values[0]/values[5] - 1).abs().min() > .05


def test_a_categorical_with_one_class_has_one_code():
    for logits in (torch.zeros(4, 1), torch.zeros(4, 2, 1)):
        codes = [*nearby(logits, 3)]
        assert len(codes) == 3 and all(torch.equal(c, torch.ones_like(logits)) for c in codes)
