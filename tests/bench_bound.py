"""How soon a training of the entangled VAE on MNIST comes to a test bound of 142.5 nats: recipes
that differ in rate, rise, batch and steps, each on one thread, to figures/bench_bound.csv and .md.

python tests/bench_bound.py            all of them: hours, resumable; writes the table
python tests/bench_bound.py 1 2 3      some of `RECIPES`: prints theirs, writes nothing"""
import json, sys
from pathlib import Path

import pandas as pd, torch

from bench import machine
from vae_robust.data import load, pixels
from vae_robust.settings import preset, save_table
from vae_robust.training import train
from vae_robust.vae import elbo

RUNS = Path(__file__).parent.parent/'runs'/'bench_bound'
def warm(steps, **others): return dict(schedule='warm', steps=steps) | others

RECIPES = [
    ('half the steps, slow start', warm(30_000), 0),
    *[('the same, twice the rate', warm(30_000, lr=2e-3), seed) for seed in range(3)],
    *[('the same, three times the rate', warm(30_000, lr=3e-3), seed) for seed in range(3)],
    *[('a third of the steps, three times the rate', warm(20_000, lr=3e-3), s) for s in range(3)],
    ('a sixth of the steps, slow start', warm(10_000), 0),
    ('the same, twice the rate', warm(10_000, lr=2e-3), 0),
    ('the same, three times the rate', warm(10_000, lr=3e-3), 0),
    ('as many images in batches of 32', warm(20_000, batch=32), 0),
    ('in batches of 128, twice the rate', warm(5000, batch=128, lr=2e-3), 0),
]


def left(folder):
    "What a finished training says of itself: its seconds, KL of the code and active latents."
    last = pd.read_csv(folder/'curves.csv').iloc[-1]
    return dict(seconds=json.loads((folder/'run.json').read_text())['seconds'], kl_c=last.kl_c,
                active=(last.filter(regex=r'kl_z') > .01).sum())


@torch.no_grad()
def bound(model, x):
    "Minus the bound (2.7) of bytes x, one sample an image, in nats."
    torch.manual_seed(0)
    return sum(elbo(model, pixels(b), 0).loss.item()*len(b) for b in x.split(500))/len(x)


def row(name, change, seed):
    "The training of a recipe, or what it left: a dict."
    p = preset('mnist.entangled', **change)
    folder = RUNS/'-'.join(map(str, [*change.values(), seed]))
    model = train(p, folder, seed)
    test, first = load('mnist', 'test').x, load('mnist').x[:10_000]
    recipe = {'recipe': name, 'seed': seed, '1000 lr': round(1000*p.lr), 'batch': p.batch}
    return recipe | dict(steps=p.steps, **left(folder), test=bound(model, test),
                         train=bound(model, first))


def main(some):
    table = pd.DataFrame([row(*RECIPES[i]) for i in some or range(len(RECIPES))])
    print(table.round(3).to_markdown(index=False))
    if not some:
        save_table(table, 'bench_bound', machine=machine(), target=142.5)


if __name__ == '__main__':
    main([int(i) for i in sys.argv[1:]])
