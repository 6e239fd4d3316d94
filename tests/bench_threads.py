"""How many threads a process should have: seconds of four programs on one thread and on two, with
idle cores and beside processes that hold them, to figures/bench_threads.csv and .md."""
import os, subprocess, sys, time
from contextlib import contextmanager
from functools import partial
from itertools import product

import numpy as np, pandas as pd, torch
from torch.optim import Adam

from bench import machine
from vae_robust.attacks import attack
from vae_robust.data import load, pixels
from vae_robust.robustness import pairs
from vae_robust.settings import preset, save_table
from vae_robust.training import build, fit, pretrained
from vae_robust.vae import elbo

REPEATS, BUSY = 3, 'while True: pass'


def training():
    "100 steps of a training."
    model, x = build(preset('mnist.entangled')), load('mnist').x
    fit(model, elbo, x, 100, 64, partial(Adam, lr=5e-4), progress=False)


def attacking():
    "90 pairs of images, 20 steps."
    test = load('mnist', 'test')
    x, x_t = pixels(test.x[pairs(test.y, 1)]).unbind(1)
    p = preset('attack.latent_code', steps=20, restarts=1)
    attack(pretrained('mnist/disentangled'), x, x_t, p, progress=False)


@torch.no_grad()
def rebuilding():
    "5,000 reconstructions."
    model = pretrained('mnist/entangled')
    for x in pixels(load('mnist', 'test').x[:5000]).split(500):
        model(x)


def products():
    "Many small products of matrices by numpy."
    a = np.random.default_rng(0).random((720, 720))
    for _ in range(300):
        a @ a[:, :40]


PROGRAMS = {f.__name__: f for f in (training, attacking, rebuilding, products)}


@contextmanager
def beside(n):
    "With `n` processes that hold a core each."
    busy = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds(name, threads, others):
    "Seconds that a program takes in a process of its own, the loading of libraries aside."
    env = {f'{library}_NUM_THREADS': str(threads) for library in ('OMP', 'OPENBLAS', 'MKL')}
    with beside(others):
        run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                             env=os.environ | env)
    if run.returncode: raise SystemExit(f'{name} failed:\n{run.stderr}')
    return float(run.stdout.split()[-1])


def main():
    asked = [*product(PROGRAMS, (0, os.cpu_count() - 1), (1, 2))] * REPEATS
    rows = [dict(zip(('program', 'others', 'threads'), a)) | {'s': seconds(a[0], a[2], a[1])}
            for a in asked]
    by = pd.DataFrame(rows).groupby(['program', 'others', 'threads'], sort=False).s
    table = by.median().unstack('threads').rename(columns={1: 'one thread, s', 2: 'two, s'})
    highest = by.max().unstack('threads').add_prefix('highest of ')
    table = table.join(highest.rename(columns=lambda c: f'{c}, s')).reset_index()
    table['two to one'] = table['two, s']/table['one thread, s']
    save_table(table, 'bench_threads', repeats=REPEATS, machine=machine('all cores'))
    print(table.to_markdown(index=False, floatfmt='.2f'))


if __name__ == '__main__':
    if sys.argv[1:]:
        PROGRAMS[sys.argv[1]]()  # libraries warm up
        began = time.perf_counter()
        PROGRAMS[sys.argv[1]]()
        print(time.perf_counter() - began)
    else:
        main()
