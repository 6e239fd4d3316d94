"""What people wait for, in this checkout and at an earlier commit, with the same interpreter on one
machine: to figures/bench_waits.csv and .md. Names of rows measure only these; a row is written as
soon as it is measured, and the others stay."""
import os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd

from bench import machine
from vae_robust.settings import read_table, root, save_table

HERE = Path(__file__).parents[1]
BEFORE = 'd1f6288'  # the commit that was to become faster
IMPORT = ('import torch, time; t = time.perf_counter(); import vae_robust.attacks; '
          'print(time.perf_counter() - t)')
APP = 'import sys; from vae_robust.cli import app; sys.argv[0] = "vae-robust"; app()'


def said(top, *words, fine=(0,)):
    "What this interpreter prints for some words in the checkout `top`; it ends with a `fine` code."
    env = os.environ | {'PYTHONPATH': str(top), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run([sys.executable, *words], cwd=top, env=env, capture_output=True, text=True)
    if run.returncode in fine: return run.stdout
    raise SystemExit(f'{words} failed in {top}:\n{run.stderr[-2000:]}')


def took(top, *words, **fine):
    began = time.perf_counter()
    said(top, *words, **fine)
    return time.perf_counter() - began


def of_job(top):
    "Seconds of the main job in an empty folder."
    with tempfile.TemporaryDirectory() as runs:
        return took(top, '-c', APP, 'reproduce', '--job', 'job.main', '--runs', runs)


WAITS = {
    'import of attacks, after torch': lambda top: median(
        float(said(top, '-c', IMPORT)) for _ in range(5)),
    'vae-robust --help': lambda top: median(took(top, '-c', APP, '--help') for _ in range(5)),
    'make run': of_job,
    'make test': lambda top: took(top, '-m', 'pytest', '-q', '-n', 'auto', '--maxprocesses', '4',
                                  '--dist', 'worksteal', fine=(0, 1))}  # some may fail


def measured(name, before):
    "A row of the table: the earlier commit first, then this checkout."
    print(name)
    seconds = [WAITS[name](top) for top in (before, HERE)]
    return dict(zip(('what', 'before, s', 'here, s'), (name, *seconds)))


def main(names):
    path = root()/'figures'/'bench_waits.csv'
    rows = read_table(path).set_index('what').T.to_dict() if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        git = partial(subprocess.run, cwd=HERE, check=True, capture_output=True)
        git(['git', 'worktree', 'add', '--detach', f'{folder}/before', BEFORE])
        for name in names or WAITS:
            rows[name] = measured(name, f'{folder}/before')
            table = pd.DataFrame([rows[n] | {'what': n} for n in WAITS if n in rows])
            table['times as fast'] = table['before, s']/table['here, s']
            save_table(table, 'bench_waits', before=BEFORE, machine=machine('all cores'))
        git(['git', 'worktree', 'remove', '--force', f'{folder}/before'])
    print(table.to_markdown(index=False, floatfmt='.2f'))


if __name__ == '__main__':
    main(sys.argv[1:])
