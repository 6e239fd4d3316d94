"What carries a flip: reconstructions whose parts are known, and a category of a linear encoder."
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch.distributions import Normal, OneHotCategorical

from vae_robust.experiments.interchange import (category, flip_radius, interaction,
                                                interchange, swapped)
from vae_robust.vae import VAE, Posterior


class Reads(nn.Module):
    "The first pixel is the mean, the others score the category; `what` they say is decoded."
    def __init__(self, what):
        super().__init__()
        self.what = what

    def posterior(self, x):
        flat = x.flatten(1)
        return Posterior(Normal(flat[:, :1], 1.), OneHotCategorical(logits=9*flat[:, 1:]))

    def decode(self, code):
        "Two pixels of which the second is the brighter if `what` holds of mean and category."
        holds = self.what(code[:, 0] > .5, code[:, 1:].argmax(1) > 0).float()
        return torch.stack([1 - holds, holds], 1).view(-1, 1, 1, 2)


class Brighter(nn.Module):
    def forward(self, x): return x.flatten(1)


SOURCE, OTHER = (torch.tensor(a).view(1, 1, 2, 2) for a in ([.1, 1., 0, 0], [.9, 0, 1., 0]))


@pytest.mark.parametrize('what, code, means, both', [
    (lambda z, c: c, 1, 0, 1), (lambda z, c: z, 0, 1, 1), (lambda z, c: z | c, 1, 1, 1),
    (lambda z, c: z & c, 0, 0, 1), (lambda z, c: z ^ c, 1, 1, 0)])
def test_each_carrier_is_found(what, code, means, both):
    found = swapped(Reads(what).eval(), [Brighter().eval()], SOURCE, OTHER, torch.tensor([0]))
    assert found['kept'].item() and found['code_changed'].item()
    assert [found[k].item() for k in ('code', 'means', 'both')] == [code, means, both]
    assert found['interaction'].item() == both - code - means


def test_without_a_category_the_means_carry_everything():
    torch.manual_seed(0)
    model, (x, xs) = VAE(3).eval(), torch.rand(2, 4, 1, 32, 32)
    four = interchange(model, x, xs)
    assert torch.equal(four[:, 0], four[:, 1])
    with torch.no_grad():
        torch.testing.assert_close(four[0, 0], model(x))
        torch.testing.assert_close(four[1, 1], model(xs))
    assert category(model, x).tolist() == [0]*4


def test_the_number_of_a_code_of_several_categoricals_names_it():
    two = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    class Said(nn.Module):
        def posterior(self, x):
            return Posterior(None, OneHotCategorical(logits=9.*torch.eye(3)[two]))
    assert sorted(category(Said(), two).tolist()) == [*range(9)]


def test_the_interaction_of_all_outcomes():
    f = torch.cartesian_prod(*[torch.tensor([False, True])]*4).T.view(2, 2, 16)
    means, code = f[1].long() - f[0].long(), f[1, 0].long() - f[0, 0].long()
    assert torch.equal(interaction(f), means[1] - code)


def test_the_radius_of_a_linear_category_is_exact():
    """At (28.4) the leader changes, and just below it does not, whatever the corner of the ball;
    at the edge of the box only with what can still move."""
    torch.manual_seed(1)
    W, some = torch.randn(3, 4, dtype=torch.double), torch.rand(9, 1, 2, 2, dtype=torch.double)
    class Linear(nn.Module):
        def posterior(self, x):
            return Posterior(None, OneHotCategorical(logits=(x.flatten(1) - .45) @ W.T))
    corners = torch.cartesian_prod(*[torch.tensor([-1., 0, 1.], dtype=torch.double)]*4)
    leads, seen = lambda flat: ((flat - .45) @ W.T).argmax(1), 0
    for x in [*(.4 + .2*some).split(1), *some.round().split(1)]:
        r, flat = flip_radius(Linear(), x).item(), x.flatten(1)
        if r > .35: continue
        at = lambda eps: leads((flat + eps*corners).clamp(0, 1)) != leads(flat)
        assert at(1.001*r).any() and not at(.999*r).any()
        seen += 1
    assert seen > 5
    edges = some.round()
    assert (flip_radius(Linear(), edges, box=False) <= flip_radius(Linear(), edges)).all()


def test_of_several_categoricals_the_first_to_change_counts():
    torch.manual_seed(2)
    W, x = torch.randn(2, 3, 4), .1 + .8*torch.rand(40, 1, 2, 2)
    def said(W):
        answer = lambda x: torch.einsum('...kp,bp->b...k', W, x.flatten(1) - .5)
        q = lambda x: Posterior(None, OneHotCategorical(logits=answer(x)))
        return SimpleNamespace(posterior=q)
    alone = torch.stack([flip_radius(said(w), x) for w in W])
    torch.testing.assert_close(flip_radius(said(W), x), alone.amin(0))
    assert alone.argmin(0).unique().tolist() == [0, 1]  # either comes first somewhere
