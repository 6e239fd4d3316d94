"""Interpreters that have torch and the like already: forks of a server that imported them once,
which takes a new interpreter, or a kernel, some five seconds. Nothing of the tests is in them."""
import multiprocessing, os, secrets, sys, tempfile, traceback
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

# What chapters and the package import from others; nothing of the package itself.
OTHERS = ['torch', 'torchvision.datasets', 'pytest', 'sklearn.cluster', 'sklearn.datasets',
          'sklearn.decomposition', 'sklearn.ensemble', 'sklearn.linear_model', 'sklearn.mixture',
          'scipy.optimize', 'scipy.stats', 'pandas', 'matplotlib.pyplot',
          'matplotlib_inline.backend_inline', 'ipywidgets', 'jaxtyping', 'pydantic', 'joblib',
          'safetensors.torch', 'torch._dynamo', 'tqdm.auto']
SETTINGS = {'VAE_ROBUST_SMOKE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


@cache
def server():
    "What forks, with the settings of a small run."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(OTHERS)
    with pytest.MonkeyPatch.context() as here:
        for name, value in SETTINGS.items():
            here.setenv(name, value)
        ensure_running()
    return context


def forget_tests():
    "Nothing is imported from the folders that only tests know."
    tests = Path(__file__).parent
    sys.path[:] = ['', *[p for p in sys.path if p and Path(p) not in (tests, tests.parent/'tools')]]


def perform(program, arguments, said):
    "A program with its arguments, as by `python -c`; what it says is written to a file."
    forget_tests()
    sys.stdout = sys.stderr = open(said, 'w', buffering=1)
    sys.argv = ['-c', *arguments]
    exec(program, vars(sys.modules['__main__']))


def started(program, *arguments, said=os.devnull):
    "A process, started, that runs a program with its arguments."
    fork = server().Process(target=perform, args=(program, [*map(str, arguments)], said))
    fork.start()
    return fork


def shell():
    "IPython without a front end: magics work, pictures and widgets are made as in a kernel."
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    class Shell(InteractiveShell):
        def enable_gui(self, gui=None): pass
    made = Shell.instance(config=Config({'HistoryManager': {'enabled': False}}))
    made.display_formatter.active = True
    made.run_line_magic('matplotlib', 'inline')
    return made


def drawing():
    """unseeded(): did somebody draw from torch's generator and leave it unseeded, or touch numpy's
    common one? Chapters have numpy generators of their own, with seeds."""
    import numpy as np, torch
    seed = torch.manual_seed(secrets.randbits(60)).initial_seed()
    fresh, numpys = torch.get_rng_state(), np.random.get_state()[1:3]
    torchs = lambda: torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), fresh)
    same = lambda: all(map(np.array_equal, np.random.get_state()[1:3], numpys))
    return lambda: torchs() or not same()


def perform_cells(cells, folder, answer):
    "Runs cells in a folder until one fails. `answer` is sent the complaint, or ''."
    from IPython.utils.capture import capture_output
    forget_tests()
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    run, unseeded, complaint = shell().run_cell, drawing(), ''
    for cell in cells:
        with capture_output() as said:
            done = run(cell, store_history=True)
        if error := done.error_before_exec or done.error_in_exec:
            complaint = '\n'.join([cell, *traceback.format_exception(error), said.stderr[-2000:]])
            break
        if unseeded():
            complaint = f'{cell}\nThis cell draws from a generator that no cell has seeded.'
            break
    answer.send(complaint)


def run_cells(cells, folder, patience=1200):
    "What is wrong with cells (sources) that are run in a folder, one after the other; or ''."
    hear, answer = server().Pipe(duplex=False)
    fork = server().Process(target=perform_cells, args=(cells, folder, answer))
    fork.start()
    answer.close()
    try:
        return hear.recv() if hear.poll(patience) else f'no end after {patience} s'
    except EOFError:
        fork.join()
        return f'the interpreter died: {fork.exitcode}'
    finally:
        fork.kill()
        fork.join()
