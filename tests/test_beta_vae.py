import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from torch.distributions import Normal, OneHotCategorical, kl_divergence

from vae_robust.beta_vae import beta_vae, capacity, water_filling
from vae_robust.vae import VAE, elbo

x = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
variances = st.lists(st.floats(.01, 20), min_size=1, max_size=6)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    m = VAE(n_z=3, n_c=4)
    with torch.no_grad():
        m.encoder[-1].bias.copy_(torch.linspace(-1, 1, 10))  # posteriors away from the prior
    return m


def terms(f, model, **constants):
    torch.manual_seed(1)
    return f(model, x, **constants)


def joint_kl(model):
    "The KL of each image by torch.distributions, latent by latent."
    mu, lv, logits = model.encode(x)
    kl_z = sum(kl_divergence(Normal(m, s), Normal(0., 1.)) for m, s in zip(mu.T, (lv/2).exp().T))
    return kl_z + kl_divergence(OneHotCategorical(logits=logits),
                                OneHotCategorical(logits=torch.zeros(4)))


@pytest.mark.parametrize('beta', [.25, 1., 4., 100.])
def test_beta_weighs_the_summed_kl(model, beta):
    expected = terms(elbo, model).rec.mean() + beta*joint_kl(model).mean()
    torch.testing.assert_close(terms(beta_vae, model, beta=beta).loss, expected)


@pytest.mark.parametrize('C', [0., 1., 50.])
def test_capacity_takes_the_absolute_value_of_the_mean(model, C):
    expected = terms(elbo, model).rec.mean() + 7*abs(joint_kl(model).mean() - C)
    torch.testing.assert_close(terms(capacity, model, step=10, gamma=7, C_z=C, C_steps=10).loss,
                               expected)


@settings(max_examples=50, deadline=None)
@given(variances, st.floats(.01, 10))
def test_water_filling_is_the_best_rate_for_each_coordinate(variances, level):
    rates, errors = water_filling(torch.tensor(variances, dtype=torch.float64), level)
    for v, rate, error in zip(variances, rates, errors):
        cost = lambda r: v*np.exp(-2*r)/2 + level*r  # error/2 + level * rate
        best = minimize_scalar(cost, bounds=(0, 6), method='bounded', options=dict(xatol=1e-9))
        assert cost(rate.item()) <= best.fun + 1e-9
        assert error.item() == pytest.approx(v*np.exp(-2*rate.item()))


@settings(max_examples=50, deadline=None)
@given(variances, st.floats(.01, 10), st.floats(1.01, 5))
def test_a_higher_level_never_buys_more_rate(variances, level, factor):
    low, high = (water_filling(torch.tensor(variances), l) for l in (level, level*factor))
    assert (high[0] <= low[0]).all() and (high[1] >= low[1]).all() and (high[0] >= 0).all()
