import os
os.environ['VAE_ROBUST_SMOKE'] = '1'

from jaxtyping import install_import_hook
install_import_hook('vae_robust', 'beartype.beartype')  # types and shapes of all calls are checked

import pytest, torch
from vae_robust.data import load, pixels
from vae_robust.vae import VAE

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def digits():
    "16 real images of digits, float32 (16, 1, 32, 32)."
    return pixels(load('digits').x[:16])


@pytest.fixture
def model():
    "An untrained VAE with 5 Gaussian latents and a 4-way categorical."
    return VAE(5, 4).eval()
