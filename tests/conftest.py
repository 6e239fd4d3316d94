import json, os, subprocess
from pathlib import Path
os.environ['VAE_ROBUST_SMOKE'] = '1'

from jaxtyping import install_import_hook
install_import_hook('vae_robust', 'beartype.beartype')  # types and shapes of all calls are checked

import pytest, torch
from vae_robust.data import load, pixels
from vae_robust.settings import locked, write
from vae_robust.vae import VAE

from forks import run_cells

torch.set_num_threads(1)

FIRST = ['test_notebooks', 'test_e2e', 'test_break_formulas', 'test_sweep']  # where the longest are


def pytest_collection_modifyitems(config, items):
    """The tests marked as slow are for `make test-all`. The longest go first: else one process
    would be left with one of them when all others are done."""
    if 'VAE_ROBUST_DRAWS' not in os.environ:
        slow = [i for i in items if i.get_closest_marker('slow')]
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if i not in slow]
    items.sort(key=lambda i: FIRST.index(i.path.stem) if i.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def digits():
    "16 real images of digits, float32 (16, 1, 32, 32)."
    return pixels(load('digits').x[:16])


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "once(name, make): a folder that `make(folder)` fills once for all the processes of the tests."
    top = tmp_path_factory.getbasetemp()
    top = top.parent if 'PYTEST_XDIST_WORKER' in os.environ else top
    def made(name, make):
        with locked(top/f'{name}.lock'):
            if not (top/f'{name}.done').exists():
                make(top/name)
                (top/f'{name}.done').touch()
        return top/name
    return made


@pytest.fixture(scope='session')
def site_without_mathjax(once):
    "The folder of the site with an empty file in the place of MathJax: nothing is fetched."
    from build_site import build
    def make(folder):
        write(folder/'mathjax.js', '')
        assert build(folder) == folder/'index.html'
    return once('site', make)


ROOT = Path(__file__).parent.parent


def code(notebook):
    "The sources of its cells of code."
    cells = json.loads(notebook.read_text())['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def status():
    command = ['git', 'status', '--porcelain']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.fixture(scope='session')
def chapter(once):
    "chapter(name): the folder in which it was run, once for all tests; `wrong` says what failed."
    def run(name, folder):
        folder.mkdir()
        before = status()
        wrong = run_cells(code(ROOT/'nbs'/f'{name}.ipynb'), folder)
        left = '' if status() == before else f'It left something in the checkout:\n{status()}'
        write(folder/'wrong', wrong or left)
    return lambda name: once(f'chapter_{name}', lambda folder: run(name, folder))


@pytest.fixture(scope='session')
def smoke_job(chapter):
    "The folder with `runs` and `figures` of job.smoke as chapter 23 left it: to be copied only."
    return next(chapter('23_digits').glob('*/figures/means.csv')).parents[1]


@pytest.fixture(scope='session')
def library():
    "library(name): the module `name` of a library that only chapter 29 needs, or a skipped test."
    said = '{} is not installed: pip install -c requirements.lock -e ".[yours]" adds this test'
    return lambda name: pytest.importorskip(name, reason=said.format(name.split('.')[0]))


@pytest.fixture
def model():
    "An untrained VAE with 5 Gaussian latents and a 4-way categorical."
    return VAE(5, 4).eval()
