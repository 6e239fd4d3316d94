"""Seconds that each metric of chapter 11 takes, its error included,
for 10,000 points with ten latents and the factor sizes of dSprites: `make bench`
(see README). Each metric and repeat in a process of its own, on one thread and one pinned core;
medians go to figures/bench_metrics.csv and .md."""
import sys, time

import numpy as np, pandas as pd

from bench import in_a_process, machine
from vae_robust.metrics import METRICS, Code
from vae_robust.settings import save_table

N, D, SIZES, REPEATS = 10_000, 10, (3, 6, 40, 32, 32), 3


def seconds(name):
    "Seconds of a metric on random factors and latents that know nothing of them."
    rng = np.random.default_rng(0)
    v = np.stack([rng.integers(n, size=N) for n in SIZES], 1)
    q, began = Code(rng.normal(size=(N, D)), np.ones((N, D))), time.perf_counter()
    METRICS[name](q, v)
    return time.perf_counter() - began


def main():
    taken = pd.DataFrame([{name: in_a_process(name, script=__file__)[0] for name in METRICS}
                          for _ in range(REPEATS)])
    table = pd.DataFrame({'metric': taken.columns, 'seconds': taken.median().values,
                          'lowest': taken.min().values, 'highest': taken.max().values})
    save_table(table, 'bench_metrics', points=N, latents=D, repeats=REPEATS, machine=machine())
    print(table.to_markdown(index=False, floatfmt='.2f'))


if __name__ == '__main__':
    if sys.argv[1:]:
        print(seconds(sys.argv[1]))
    else:
        main()
