"The files around the package say what is true."
import re, subprocess
from pathlib import Path

import nbformat, pytest, tomllib, yaml

import vae_robust
from vae_robust.data import LOADERS
from vae_robust.settings import KINDS, preset, read_settings

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()
MAKEFILE = (ROOT/'Makefile').read_text()
PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
WORKFLOW = yaml.safe_load((ROOT/'.github'/'workflows'/'ci.yml').read_text())
fences = lambda kind: re.findall(rf'```{kind}\n(.*?)```', README, re.S)


def test_environment_yml_cannot_drift():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    assert ([d if isinstance(d, str) else d['pip'] for d in env['dependencies']]
            == ['python=3.11', 'pip', ['-c requirements.lock', '-e .[dev]']])


def test_every_dependency_is_pinned_without_addresses():
    lock = (ROOT/'requirements.lock').read_text()
    for d in PROJECT['dependencies'] + sum(PROJECT['optional-dependencies'].values(), []):
        assert re.search(rf'^{re.split("[=<>]", d)[0].replace("_", "-")}==', lock, re.M), d
    assert '://' not in lock


def test_libraries_of_others_are_an_extra_that_ci_installs():
    tests = '\n'.join(f.read_text() for f in (ROOT/'tests').glob('test_*.py'))
    named = {*re.findall(r"library\('(\w+)", tests)} - {'pyarrow'}  # a part of datasets
    assert named == {*PROJECT['optional-dependencies']['yours']}
    steps = [step for job in WORKFLOW['jobs'].values() for step in job['steps']]
    commands = [s.get('run', '') for s in steps] + (ROOT/'.ci'/'run').read_text().splitlines()
    installs = '.venv/bin/python -m pip install '
    assert sum(c.startswith(installs) and c.endswith("-e '.[yours]'") for c in commands) == 2
    assert 'yours' not in MAKEFILE


def test_named_packages_are_there():
    have = {re.split('[=<>]', d)[0]
            for d in PROJECT['dependencies'] + PROJECT['optional-dependencies']['dev']}
    assert {'torch', 'torchvision', 'jupyterlab', 'nbdev', 'matplotlib', 'ipywidgets',
            'numpy', 'pytest'} <= have


def test_commands_of_the_readme_exist():
    from vae_robust.cli import app
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    shell = '\n'.join(fences('sh') + re.findall('`([^`\n]+)`', README))
    assert re.findall(r'^make (\w+)', shell, re.M)
    assert set(re.findall(r'\bmake (\w+)', shell)) <= targets()
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
    for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        yield name, ROOT, (ROOT/name).read_text()
    for nb in sorted((ROOT/'nbs').glob('*.ipynb')):
        prose = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'markdown']
        yield nb.name, nb.parent, '\n'.join(prose)

def named(v): return v if isinstance(v, str) and v.endswith(('md', 'ipynb')) else ''

@pytest.mark.parametrize('page, folder, text', list(every_page()), ids=named)
def test_links_lead_somewhere(page, folder, text):
    for link in re.findall(r'\]\(([^)#\s]+)', text):
        assert link.startswith('https://') or (folder/link).exists(), link


@pytest.mark.parametrize('page', ['CONTRIBUTING.md', 'CHANGELOG.md'])
def test_files_and_commands_in_words_exist(page):
    words = re.findall('`([^`\n]+)`', (ROOT/page).read_text())
    files = [w for w in words if re.fullmatch(r'[\w.]+/[\w./]*|\w+\.(?:ini|md|yml)', w)]
    assert files and not [f for f in files if not (ROOT/f).exists()]
    assert {w.split()[1] for w in words if w.startswith('make ')} <= targets()


def targets(): return set(re.findall(r'^([\w-]+):', MAKEFILE, re.M))


def test_what_contributing_names_is_there():
    from vae_robust import metrics, objectives, training
    text = (ROOT/'CONTRIBUTING.md').read_text()
    assert objectives.OBJECTIVES and training.LOSSES and metrics.METRICS and LOADERS
    assert {'OBJECTIVES', 'METRICS', 'LOADERS'} <= {*re.findall('`([A-Z]+)`', text)}
    assert '@metric' in text and callable(metrics.metric)
    for section in re.findall(r'```ini\n(.*?)```', text, re.S):
        like = re.search(r'like = (\S+)', section)[1]
        keys = re.findall(r'^ *(?:attack\.)?(\w+) =', section, re.M)
        known = type(preset(like)).model_fields.keys() | type(preset('attack.strong')).model_fields.keys()
        assert {*keys} - {'like'} <= known


def test_the_citation_is_that_of_the_package_and_the_thesis():
    cite = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert (cite['version'], cite['license']) == (vae_robust.__version__, PROJECT['license'])
    assert [a['name'] for a in cite['authors']] == [a['name'] for a in PROJECT['authors']]
    assert cite['references'][0]['title'] in README


def test_the_workflow_tests_every_python_that_we_name():
    pythons = WORKFLOW['jobs']['test']['strategy']['matrix']['python']
    assert pythons == re.findall(r'Python :: (3\.\d+)', '\n'.join(PROJECT['classifiers']))
    assert PROJECT['requires-python'] == f'>={pythons[0]}' and len(pythons) >= 3
    runs = [s.get('run', '') for job in WORKFLOW['jobs'].values() for s in job['steps']]
    made = {m for r in runs for m in re.findall(r'make (\w+)', r)}
    assert {'lint', 'test', 'site'} <= made <= targets()
    assert {*WORKFLOW['jobs']['site']['needs']} == {'test', 'wheel'}


def test_issue_templates_ask_for_something():
    forms = [yaml.safe_load(f.read_text()) for f in (ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml')]
    forms = [f for f in forms if 'body' in f]
    assert len(forms) >= 3 and all(f['name'] and f['description'] and f['body'] for f in forms)


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
    kinds = {*KINDS, *LOADERS, 'faces', 'train'}
    assert [s for s in read_settings() if not re.fullmatch(rf'({"|".join(kinds)})\.\w+', s)] == []
