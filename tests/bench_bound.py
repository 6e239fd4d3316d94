"""How soon a training of the entangled VAE on MNIST comes to a test bound of 142.5 nats: recipes
that differ in rate, batch and steps, each on one thread, to figures/bench_bound.csv and .md.

python tests/bench_bound.py            those that are not there yet: hours; writes the table
taskset -c 1 python tests/bench_bound.py 1 2 3   some of `RECIPES`, on a core: writes nothing"""
import json, sys
from pathlib import Path

import pandas as pd, torch

from bench import machine
from vae_robust.data import load, pixels
from vae_robust.experiments.digits import bound_of
from vae_robust.settings import preset, save_table
from vae_robust.training import train

RUNS = Path(__file__).parent.parent/'runs'/'bench_bound'
def warm(steps, **others): return dict(schedule='warm', steps=steps) | others

RECIPES = [
    ('half the steps, slow start', warm(30_000), 0),
    *[('half, twice the rate', warm(30_000, lr=2e-3), seed) for seed in range(3)],
    *[('half, three times the rate', warm(30_000, lr=3e-3), seed) for seed in range(3)],
    *[('a third, three times the rate', warm(20_000, lr=3e-3), s) for s in range(3)],
    ('a sixth of the steps, slow start', warm(10_000), 0),
    ('a sixth, twice the rate', warm(10_000, lr=2e-3), 0),
    ('a sixth, three times the rate', warm(10_000, lr=3e-3), 0),
    ('a sixth in batches of 32', warm(20_000, batch=32), 0),
    ('a sixth in batches of 128, twice the rate', warm(5000, batch=128, lr=2e-3), 0),
]


def left(folder):
    "What a finished training says of itself: its seconds, KL of the code and latents that speak."
    last = pd.read_csv(folder/'curves.csv').iloc[-1]
    return dict(seconds=json.loads((folder/'run.json').read_text())['seconds'], kl_c=last.kl_c,
                spoken=(last.filter(regex='kl_z') > .01).sum())


def bound(model, x):
    "Minus the bound of bytes x in nats, with an exact sample of the code for each."
    torch.manual_seed(0)
    return bound_of(model, pixels(x))[0]['minus_elbo']


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
        where = machine('each of two trainings on a pinned core')
        save_table(table, 'bench_bound', machine=where, target=142.5)


if __name__ == '__main__':
    main([int(i) for i in sys.argv[1:]])
