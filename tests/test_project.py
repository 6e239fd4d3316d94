"The files around the package say what is true."
import re, subprocess
from pathlib import Path

import nbformat, pytest, tomllib, yaml

from vae_robust.settings import preset, read_settings

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()
MAKEFILE = (ROOT/'Makefile').read_text()
fences = lambda kind: re.findall(rf'```{kind}\n(.*?)```', README, re.S)


def test_environment_yml_cannot_drift():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    assert ([d if isinstance(d, str) else d['pip'] for d in env['dependencies']]
            == ['python=3.11', 'pip', ['-c requirements.lock', '-e .[dev]']])


def test_every_dependency_is_pinned_without_addresses():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    lock = (ROOT/'requirements.lock').read_text()
    for d in project['dependencies'] + project['optional-dependencies']['dev']:
        assert re.search(rf'^{re.split("[=<>]", d)[0]}==', lock, re.M), d
    assert '://' not in lock


def test_named_packages_are_there():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    have = {re.split('[=<>]', d)[0]
            for d in project['dependencies'] + project['optional-dependencies']['dev']}
    assert {'torch', 'torchvision', 'jupyterlab', 'nbdev', 'matplotlib', 'ipywidgets',
            'numpy', 'pytest'} <= have


def test_commands_of_the_readme_exist():
    from vae_robust.cli import app
    commands = {c.callback.__name__ for c in app.registered_commands}
    shell = '\n'.join(fences('sh') + re.findall('`([^`\n]+)`', README))
    assert re.findall(r'^make (\w+)', shell, re.M)
    assert set(re.findall(r'\bmake (\w+)', shell)) <= set(re.findall(r'^(\w+):', MAKEFILE, re.M))
    assert re.findall(r'vae-robust (\w+)', shell)
    assert set(re.findall(r'vae-robust (\w+)', shell)) <= commands
    for name in re.findall(r'\b(?:mnist|digits|attack|job|judge)\.[a-z_]+\b(?!\.py)', shell):
        preset(name)


@pytest.mark.parametrize('example', fences('python'))
def test_the_readme_s_examples_run(example, tmp_path, monkeypatch):
    assert len(example.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(example, 'README.md', 'exec'), scope := {})
    assert (scope['found'].after < scope['found'].before).all()


def every_page():
    yield 'README.md', ROOT, README
    for nb in sorted((ROOT/'nbs').glob('*.ipynb')):
        prose = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'markdown']
        yield nb.name, nb.parent, '\n'.join(prose)

def named(v): return v if isinstance(v, str) and v.endswith(('md', 'ipynb')) else ''

@pytest.mark.parametrize('page, folder, text', list(every_page()), ids=named)
def test_links_lead_somewhere(page, folder, text):
    for link in re.findall(r'\]\(([^)#\s]+)', text):
        assert link.startswith('https://') or (folder/link).exists(), link


def test_the_map_of_notebooks_is_complete():
    for nb in (ROOT/'nbs').glob('*.ipynb'):
        assert f'nbs/{nb.name}' in README, nb.name


def test_files_in_figures_say_where_they_come_from():
    from PIL import Image
    for f in (ROOT/'figures').iterdir():
        if f.suffix == '.png':
            assert 'commit' in Image.open(f).text['Description'], f.name
        if f.suffix == '.csv':
            assert f.read_text().startswith('# {'), f.name


def test_nothing_private_is_tracked():
    listing = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    tracked = listing.stdout.split()
    if not tracked:
        pytest.skip('not a git checkout')
    assert not [f for f in tracked if f.startswith(('runs/', '.venv/'))
                or f.endswith(('-ubyte', '.npz', '.pt'))]


def test_settings_have_no_orphans():
    kinds = 'mnist|fashion|digits|dsprites|faces|celeba|train|judge|attack|job|study|dose'
    assert all(re.fullmatch(rf'({kinds})\.\w+', s) for s in read_settings())
