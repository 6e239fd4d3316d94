"""How speed grows: steps of attacks and trainings against images at a time, pairs, latents, image
side and processes, each beside what the processor can do (a roofline), to figures/bench_growth.
csv, .md and .png. Names of axes measure only these, and the others stay."""
import sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import in_a_process, machine
from bench_attacks import roof
from vae_robust.attacks import attack
from vae_robust.settings import preset, read_table, root, save_figure, save_table
from vae_robust.training import build, fit, keep_memory
from vae_robust.vae import elbo

REPEATS, STEPS = 3, 10
USUAL = {'batch': 64, 'images': 128, 'latents': 10, 'side': 32, 'processes': 1}
AXES = {'batch': (1, 4, 16, 64, 128), 'images': (64, 256, 1024, 4096), 'latents': (2, 10, 50, 200),
        'side': (32, 64, 128), 'processes': (1, 2)}
TITLES = {'batch': 'images at a time', 'images': 'pairs, or images', 'latents': 'latents',
          'side': 'image side, pixels', 'processes': 'processes, a core each'}


class Work(TorchDispatchMode):
    "Counts FLOP, and the bytes that operations read and write if no cache keeps any."
    flop = moved = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view: return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.moved += sum(t.numel()*t.element_size() for t in tensors)
        if count := flop_registry.get(func._overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def attacking(batch, images, latents, side):
    "A call that takes STEPS steps of `attack.strong` on so many pairs."
    model = build(preset('mnist.entangled', n_z=latents, n_c=0, size=side)).eval()
    x, x_t = torch.rand(2, images, 1, side, side)
    p = preset('attack.strong', steps=STEPS, restarts=1)
    return lambda: [attack(model, a, b, p, progress=False)
                    for a, b in zip(x.split(batch), x_t.split(batch))]


def training(batch, images, latents, side):
    "A call that takes the steps of a training in which so many images are seen STEPS times."
    model = build(preset('mnist.entangled', n_z=latents, n_c=0, size=side))
    x = torch.rand(images, 1, side, side)
    return lambda: fit(model, elbo, x, STEPS*images//batch, batch, partial(Adam, lr=5e-4),
                       progress=False)


PROGRAMS = {'attacking': attacking, 'training': training}


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(name, *sizes):
    "Seconds (median of REPEATS), FLOP and bytes of a program for the sizes that it takes."
    keep_memory()
    torch.manual_seed(0)
    run = PROGRAMS[name](*map(int, sizes))
    with Work() as work:
        run()
    return median(seconds(run) for _ in range(REPEATS)), work.flop, work.moved


def bandwidth(n=2**26, times=7):
    "GB/s of copying numbers that no cache holds."
    a, b = torch.rand(n), torch.empty(n)
    return [8*n/1e9/median(seconds(lambda: b.copy_(a)) for _ in range(times))]


TASKS = {'measure': measure, 'bandwidth': bandwidth, 'roof': roof}
child = partial(in_a_process, script=__file__)


def asked(name, axis, value):
    "A row of the table, for `USUAL` sizes but one; of several processes the mean."
    sizes = USUAL | {axis: value}
    k = sizes.pop('processes')
    with ThreadPoolExecutor(k) as pool:
        one = lambda core: child('measure', name, *sizes.values(), core=core)
        took, flop, moved = np.mean([*pool.map(one, range(k))], 0)
    return {'program': name, 'axis': axis, 'value': value,
            'examples*steps/s': k*STEPS*sizes['images']/took,
            'GFLOP/s of a core': flop/1e9/took, 'FLOP per byte': flop/moved}


def show(table, peak, gb):
    "Speed along each axis, and the roofline; the figure."
    fig, axs = plt.subplots(2, 3, figsize=(10, 5.6), layout='constrained')
    for ax, axis in zip(axs.flat, AXES):
        for name, rows in table[table.axis == axis].groupby('program'):
            ax.loglog(rows.value, rows['examples*steps/s'], 'o-', ms=4, label=name)
        ax.set(xlabel=TITLES[axis], ylabel='images·steps/s', ylim=(50, 10_000))
        ax.set_xticks(AXES[axis], AXES[axis])
        ax.minorticks_off()
    axs[0, 0].legend(fontsize=8)
    ax, reach = axs[1, 2], np.geomspace(1, 200)
    ax.loglog(reach, np.minimum(peak, gb*reach), 'k', lw=1)
    for name, rows in table.groupby('program'):
        ax.loglog(rows['FLOP per byte'], rows['GFLOP/s of a core'], 'o', ms=4, label=name)
    ax.set(xlabel='FLOP per byte, without caches', ylabel='GFLOP/s of a core',
           title=f'{peak:.0f} GFLOP/s, {gb:.1f} GB/s')
    return fig


def main(axes):
    path = root()/'figures'/'bench_growth.csv'
    known = read_table(path) if path.exists() else pd.DataFrame(columns=['axis'])
    rows = {axis: known[known.axis == axis] for axis in AXES}
    for axis in axes or AXES:
        asking = [(name, axis, value) for value in AXES[axis] for name in PROGRAMS]
        rows[axis] = pd.DataFrame([asked(*row) for row in asking])
    table, (peak,), (gb,) = pd.concat(rows.values()), child('roof'), child('bandwidth')
    roofs = np.minimum(peak, gb*table['FLOP per byte'])
    table['share of the roof'] = table['GFLOP/s of a core']/roofs
    facts = dict(usual=USUAL, repeats=REPEATS, steps=STEPS, GFLOPs=round(peak, 1),
                 GBs=round(gb, 1), machine=machine())
    save_table(table, 'bench_growth', **facts)
    save_figure(show(table, peak, gb), 'bench_growth', **facts)


if __name__ == '__main__':
    if sys.argv[1:] and sys.argv[1] in TASKS:
        print(*TASKS[sys.argv[1]](*sys.argv[2:]))
    else:
        main(sys.argv[1:])
