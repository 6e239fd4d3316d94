from math import log

import pytest, torch

from vae_robust import beta_vae, joint_vae, vae
from vae_robust.beta_vae import capacity, ramp
from vae_robust.joint_vae import joint_vae as joint

REC = torch.tensor([10., 20.])  # means 15, 6, 1
KL_Z = torch.tensor([[1., 2.], [3., 6.]])
KL_C = torch.tensor([.5, 1.5])


@pytest.fixture(autouse=True)
def known_parts(monkeypatch):
    for module in (beta_vae, joint_vae, vae):
        monkeypatch.setattr(module, 'parts', lambda model, x: (REC, KL_Z, KL_C))


class FourWay: n_c = 4


@pytest.mark.parametrize('loss, expected', [
    (lambda: vae.elbo(None, None), 15 + 6 + 1),
    (lambda: beta_vae.beta_vae(None, None, beta=4), 15 + 4*7),
    (lambda: capacity(None, None, 50, gamma=10, C_z=8, C_steps=100), 15 + 10*abs(7 - 4)),
    (lambda: capacity(None, None, 10**6, gamma=10, C_z=7, C_steps=100), 15),
    (lambda: joint(FourWay, None, 50, gamma=10, C_z=8, C_c=1, C_steps=100),
     15 + 10*(abs(6 - 4) + abs(1 - .5))),
    (lambda: joint(FourWay, None, 100, gamma=10, C_z=6, C_c=5, C_steps=100), 15 + 10*(log(4) - 1)),
])
def test_the_loss_by_hand(loss, expected):
    terms = loss()
    torch.testing.assert_close(terms.loss, torch.tensor(float(expected)))
    assert terms.rec is REC and terms.kl_z is KL_Z and terms.kl_c is KL_C


@pytest.mark.parametrize('step, C', [(0, 0), (25, 1.25), (100, 5), (10**9, 5)])
def test_ramp(step, C):
    assert ramp(5, step, 100) == C
