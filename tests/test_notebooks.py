import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

from conftest import code
from forks import run_cells
from test_style import code_lines, too_long

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
names = lambda p: p.stem


UNEXPORTED = ['00_tour', 'A0_solutions']  # chapters without a module, which may use all others

# Where the appendices stand: the settings under everything, the explorer beside the traversals,
# studies and their tables between the library (chapters 1 to 22) and the experiments, what was
# explored after these, the command line on top of all.
RANK = {'A1': 0, 'A2': 22.1, 'A3': 22.2, 'A4': 22.3, 'A5': 12.1, 'A6': 22.4, 'A7': 99}
RANK |= {'A8': 22.5, 'A9': 28.5}

def text(nb):
    return '\n'.join(c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'markdown')


WIDGETS = ['A5_explorer', 'A6_play']  # whose widgets talk to a kernel


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_runs_from_top_to_bottom(nb, chapter):
    assert (chapter(nb.stem)/'wrong').read_text() == ''


@pytest.mark.parametrize('name', WIDGETS)
def test_runs_in_a_kernel(name, tmp_path):
    env = os.environ | {'VAE_ROBUST_SMOKE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    NotebookClient(nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4), timeout=300,
                   resources={'metadata': {'path': str(tmp_path)}}).execute(env=env)


ALONE = """import os, sys
assert os.getcwd() == os.environ['WHERE'] and 'vae_robust' not in sys.modules
import vae_robust.vae
assert not hasattr(vae_robust.vae.VAE.decode, '__wrapped__')  # by the tests, which check types"""
DRAWN = """from matplotlib import artist, pyplot as plt
class Stroke(artist.Artist):
    drawn = 0
    def draw(self, renderer): Stroke.drawn += 1
plt.figure().add_artist(Stroke());"""


def test_a_notebook_is_run_as_by_a_kernel_and_what_fails_is_found(tmp_path):
    def found(*cells): return run_cells(cells, tmp_path)
    where = f"import os\nos.environ['WHERE'] = '{tmp_path}'"
    assert found(where, ALONE, '1 + 1', 'assert _ == 2') == ''
    assert found('%%capture said\nprint(1)', "assert said.stdout == '1\\n'", '%pwd') == ''
    assert found(DRAWN, 'assert Stroke.drawn') == ''
    assert re.match("x\nTraceback(?s:.*)NameError: name 'x' is not", found('', 'x', 'x = 1'))
    assert 'SyntaxError' in found('x = (') and 'No module named' in found('import build_site')
    assert found('import os; os._exit(3)') == 'the interpreter died: 3'


@pytest.mark.parametrize('draw', ['torch.rand(2)', 'nn.Linear(1, 1)', 'np.random.rand()'])
def test_a_chapter_that_draws_without_a_seed_is_found(draw, tmp_path):
    start = 'import numpy as np, torch\nfrom torch import nn'
    assert 'no cell has seeded' in run_cells([start, draw], tmp_path)
    seeded = f'torch.manual_seed(0); {draw}', f'with torch.random.fork_rng(): {draw}'
    assert 'np' in draw or run_cells([start, *seeded], tmp_path) == ''


def export(copy):
    "Copies the project, and exports and cleans everything in the copy afresh."
    for name in ('nbs', 'vae_robust'):
        leave = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '*.ini', 'weights')
        shutil.copytree(ROOT/name, copy/name, ignore=leave)
    for f in (copy/'vae_robust').rglob('*.py'):
        f.name == '__init__.py' or f.unlink()
    shutil.copy(ROOT/'pyproject.toml', copy)
    command = 'from nbdev import clean, doclinks; doclinks.nbdev_export(); clean.nbdev_clean()'
    subprocess.run([sys.executable, '-c', command], cwd=copy, check=True, capture_output=True)


@pytest.fixture(scope='module')
def exported(once): return once('exported', export)


def test_package_and_notebooks_agree(exported):
    modules = lambda top: {f.name: f.read_text() for f in (top/'vae_robust').rglob('*.py')}
    fresh, here = modules(exported), modules(ROOT)
    assert sorted(fresh) == sorted(here)
    assert [f for f in fresh if fresh[f] != here[f]] == [], 'run make export'


def test_notebooks_are_clean(exported):
    fresh = {nb: (exported/'nbs'/nb.name).read_text() for nb in NOTEBOOKS}
    assert [nb.name for nb in NOTEBOOKS if nb.read_text() != fresh[nb]] == [], 'run make export'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_cells_are_small(nb):
    assert [c for c in too_long(code(nb)) if not c.startswith('longest')] == []  # see test_style


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_no_widget_is_stored_that_nobody_sees(nb):
    "A notebook of pictures once carried six thousand lines about progress bars that had gone."
    stored, view = nbformat.read(nb, 4), 'application/vnd.jupyter.widget-view+json'
    outputs = [o for c in stored.cells for o in c.get('outputs', [])]
    assert 'widgets' not in stored.metadata or any(view in o.get('data', {}) for o in outputs)


def defined(cell):
    "The names that a cell binds at its top level, those of comprehensions aside."
    bound, inner = set(), set()
    for node in ast.parse(re.sub('^[%!].*', '', cell, flags=re.M)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
            continue
        for n in ast.walk(node):
            if isinstance(n, ast.comprehension):
                inner |= {m.id for m in ast.walk(n.target) if isinstance(m, ast.Name)}
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                bound.add(n.id)
    return bound - inner


def rebound(cells):
    "Exported functions and classes whose names a later cell takes for something else."
    exported, taken = set(), set()
    for cell in cells:
        if cell.startswith('#| export'):
            found = ast.parse(cell).body
            exported |= {n.name for n in found if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        else:
            taken |= defined(cell)
    return exported & taken


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_no_cell_takes_the_name_of_what_the_chapter_exports(nb):
    """What is exported is called by other functions of the chapter: they would call the cell's
    number."""
    assert rebound(code(nb)) == set()


def test_a_name_that_is_taken_is_found():
    export = '#| export\ndef hard(x): return x'
    assert rebound([export, 'hard = 3']) == rebound([export, 'with a as hard: pass']) == {'hard'}
    assert rebound([export, '[hard for hard in (1, 2)]', 'f = lambda hard: hard']) == set()


def rank(module):
    "The place of a module in the house: what it imports has a lower one."
    name, = [p.name[:2] for p in NOTEBOOKS if p.stem[3:] == module]
    return RANK[name] if name in RANK else int(name)


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_one_module_per_notebook_with_imports_from_lower_numbers_only(nb):
    source = '\n'.join(code(nb))
    modules = re.findall(r'^#\| default_exp ([\w.]+)$', source, re.M)
    assert [m.rpartition('.')[2] for m in modules] == [nb.stem[3:]]*(nb.stem not in UNEXPORTED)
    used = re.findall(r'from vae_robust\.([\w.]+) import', source)
    for package, line in re.findall(r'from vae_robust(\.experiments)? import (.+)', source):
        used += re.findall(r'\w+', line)
    used = {name.rpartition('.')[2] for name in used}
    used -= {'experiments', nb.stem[3:]}  # from its own module a chapter takes what its appendix has
    assert nb.stem in UNEXPORTED or [m for m in used if rank(m) >= rank(nb.stem[3:])] == []


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_starts_with_a_title_and_one_sentence(nb):
    "Of at most three lines: a longer one would be repeated in the package's docstring by nbdev."
    assert re.match(r'# .+\n\n(> .+(\n|$)){1,3}(?!>)', nbformat.read(nb, 4).cells[0].source)


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_outputs_are_committed_without_errors_or_private_paths(nb):
    outputs = [o for c in nbformat.read(nb, 4).cells if c.cell_type == 'code' for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == 'error' or o.get('name') == 'stderr']
    texts = [{k: v for k, v in o.get('data', o).items() if k != 'image/png'} for o in outputs]
    assert not re.search(r'/(root|home|work|tmp|Users)/\w', json.dumps(texts))


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=names)
def test_mathematics_is_balanced_and_tags_are_unique(nb):
    t = text(nb)
    assert t.count('$$') % 2 == 0
    for block in re.findall(r'\$\$(.*?)\$\$', t, re.S):
        for env in ('aligned', 'cases', 'pmatrix'):
            assert block.count(f'\\begin{{{env}}}') == block.count(f'\\end{{{env}}}')
        assert block.count('{') - block.count('\\{') == block.count('}') - block.count('\\}')
        for inside in re.findall(r'\\begin\{aligned\}(.*?)\\end\{aligned\}', block, re.S):
            assert '\\tag' not in inside
    tags = re.findall(r'\\tag\{(.+?)\}', t)
    assert len(tags) == len(set(tags))


# ---------------------------------------------------------------- experiments

EXPERIMENTS = ('23_digits', '24_faces', '25_comparison', '26_verdict', '27_confirm',
               '28_interchange')
FOUR = EXPERIMENTS[:4]  # where calling cells, models and files is plumbing as well
DRAWS = {'ax', 'plt', 'show_grid', 'Image'}
WRITES = {'save_csv', 'save_figure', 'save_table', 'save_weights', 'publish', 'write'}
ASKS = {'ask', 'cells_of', 'looks_of', 'models_of', 'prepare', 'restore', 'table_of', 'trials',
        'Cell', 'Weights', 'sweep', 'collected'}


def experiments(names):
    return [nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4).cells for name in names]


def argument(cells):
    "The cells of a chapter up to its appendix."
    stops = [i for i, c in enumerate(cells) if re.search('^## Appendix', c.source, re.M)]
    return cells[:stops[0]] if stops else cells


def plumbing(cells, words=DRAWS | WRITES):
    "Lines of exported definitions: those in functions that say one of `words`, and all."
    lines = {False: 0, True: 0}
    for c in argument(cells):
        if c.cell_type != 'code' or not c.source.startswith('#| export'): continue
        for f in ast.parse(c.source).body:
            if isinstance(f, (ast.FunctionDef, ast.ClassDef)):
                names = {getattr(n, 'id', getattr(n, 'arg', None)) for n in ast.walk(f)}
                text = ast.get_source_segment(c.source, f)
                lines[bool(names & words)] += len(code_lines(text))
    return lines[True], sum(lines.values())


@pytest.mark.parametrize('cells', experiments(EXPERIMENTS), ids=EXPERIMENTS)
def test_an_experiment_is_an_argument_and_little_plumbing(cells):
    """At most a fifth of the lines of exported definitions before the appendix are plumbing. A
    definition is plumbing if it draws or writes files, that is, if it names something in DRAWS (an
    axis, a figure) or in WRITES (one of the functions that save). All others compute."""
    drawn, all_of_it = plumbing(cells)
    assert 5*drawn <= all_of_it > 0, f'{drawn} of {all_of_it} lines draw or write'


@pytest.mark.parametrize('cells', experiments(FOUR), ids=FOUR)
def test_an_experiment_seldom_speaks_of_cells(cells):
    "The same share, where asking cells and restoring models is plumbing too."
    asking, all_of_it = plumbing(cells, DRAWS | WRITES | ASKS)
    assert 5*asking <= all_of_it > 0, f'{asking} of {all_of_it} lines draw, write or ask'


@pytest.mark.parametrize('cells', experiments(EXPERIMENTS), ids=EXPERIMENTS)
def test_the_answer_comes_first(cells):
    """A table or a picture stands in one of the first five cells, and a picture in one of the first
    eight, or in the text of the answer."""
    shown = [o.get('data', {}) for c in cells[:5] for o in c.get('outputs', [])]
    assert any({'text/html', 'image/png'} & set(data) for data in shown)
    drawn = [o.get('data', {}) for c in cells[:8] for o in c.get('outputs', [])]
    assert '](../figures/' in cells[0].source or any('image/png' in data for data in drawn)


def test_plumbing_is_found():
    code = lambda text: nbformat.v4.new_code_cell('#| exporti\n' + text)
    appendix = nbformat.v4.new_markdown_cell('## Appendix: more')
    one, two = code('def f(x): return x'), code('def g(x, ax):\n    ax.plot(x)')
    three = code("def h(t):\n    # why\n    save_csv(t, 'name')")
    assert plumbing([one]) == (0, 1) and plumbing([one, two]) == (2, 3)
    assert plumbing([one, two, three]) == (4, 5) and plumbing([one, appendix, two]) == (0, 1)
