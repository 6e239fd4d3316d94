import itertools, math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import special, stats
from torch.distributions import Normal, OneHotCategorical

from vae_robust.joint_vae import joint_vae, purity, unsupervised_accuracy
from vae_robust.vae import Posterior

examples = settings(max_examples=50, deadline=None)
codes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


class Given:
    "A model whose posteriors are given and whose reconstruction is perfect."
    def __init__(self, mu, lv, logits):
        self.q = Posterior(Normal(mu, (lv/2).exp()), OneHotCategorical(logits=logits))
        self.n_c = logits.shape[-1]
        if logits.ndim == 3:
            self.categoricals = logits.shape[1]
    def posterior(self, x): return self.q
    def log_likelihood(self, x, code): return torch.zeros(len(code))


def by_hand(mu, lv, logits, gamma, C_z, C_c, ramped):
    "(7.4) in numpy, without the reconstruction."
    D_z = ((mu**2 + np.exp(lv) - lv - 1)/2).sum(1).mean()
    K = logits.shape[1]
    D_c = (math.log(K) - stats.entropy(special.softmax(logits, 1), axis=1)).mean()
    return gamma*(abs(D_z - ramped*C_z) + abs(D_c - min(ramped*C_c, math.log(K))))


@examples
@given(st.integers(0, 10**6), st.floats(0, 100), st.floats(0, 8),
       st.floats(0, 8), st.integers(0, 40))
def test_the_loss_is_the_formula(seed, gamma, C_z, C_c, step):
    mu, lv, logits = (torch.randn(5, n, generator=torch.Generator().manual_seed(seed + n),
                                  dtype=torch.double) for n in (3, 4, 6))
    lv = lv[:, :3]
    loss = joint_vae(Given(mu, lv, logits), None, step, gamma=gamma, C_z=C_z,
                     C_c=C_c, C_steps=20).loss.item()
    arrays = (t.numpy() for t in (mu, lv, logits))
    assert loss == pytest.approx(by_hand(*arrays, gamma, C_z, C_c, min(step/20, 1)), abs=1e-4)


def test_one_image_above_and_one_below_the_capacity_cost_nothing():
    mu = torch.tensor([[1.], [3.]])  # KLs of 0.5 and 4.5 nats
    loss = joint_vae(Given(mu, torch.zeros(2, 1), torch.zeros(2, 4)), None, 1, gamma=30,
                     C_z=2.5, C_c=0, C_steps=1).loss
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_a_one_hot_code_has_met_every_capacity():
    loss = joint_vae(Given(torch.zeros(3, 2), torch.zeros(3, 2), 1e3*torch.eye(4)[:3]), None, 1,
                     gamma=30, C_z=0, C_c=50, C_steps=1).loss
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_several_categoricals_share_a_capacity_of_as_many_log_K():
    sure = 1e3*torch.eye(4)[:3].expand(3, 3, 4)
    loss = lambda C_c: joint_vae(Given(torch.zeros(3, 2), torch.zeros(3, 2), sure), None, 1,
                                 gamma=30, C_z=0, C_c=C_c, C_steps=1).loss.item()
    assert loss(50) == pytest.approx(0, abs=1e-3)
    assert loss(math.log(4)) == pytest.approx(30*2*math.log(4), rel=1e-4)


@examples
@given(codes)
def test_accuracy_is_the_best_of_all_namings(pairs):
    y, c = map(np.array, zip(*pairs))
    best = max((np.array(names)[c] == y).mean() for names in itertools.permutations(range(4)))
    assert unsupervised_accuracy(y, c) == pytest.approx(best)
    assert unsupervised_accuracy(y, c) <= purity(y, c) + 1e-12 <= 1 + 1e-9


@examples
@given(codes, st.permutations(range(4)))
def test_names_do_not_matter(pairs, names):
    y, c = map(np.array, zip(*pairs))
    assert unsupervised_accuracy(y, np.array(names)[c]) == unsupervised_accuracy(y, c)
    assert purity(y, np.array(names)[c]) == purity(y, c)


@pytest.mark.parametrize('y, c, accuracy, pure', [
    ([0, 0, 1, 1], [5, 5, 7, 7], 1, 1),
    ([0, 0, 1, 1], [0, 1, 2, 3], .5, 1),              # more codes than classes: two have no name
    ([0, 1, 2, 3], [0, 0, 1, 1], .5, .5),             # fewer: two classes get none
    ([0, 0, 0, 1], [3, 3, 3, 3], .75, .75),
    (torch.tensor([2, 2, 0]), torch.tensor([1, 1, 0]), 1, 1),
])
def test_scores_by_hand(y, c, accuracy, pure):
    assert unsupervised_accuracy(y, c) == accuracy and purity(y, c) == pure


@pytest.mark.parametrize('y, c', [([], []), ([0, 1], [0])])
def test_what_cannot_be_scored(y, c):
    with pytest.raises(ValueError, match='one code for each image'):
        unsupervised_accuracy(y, c)
