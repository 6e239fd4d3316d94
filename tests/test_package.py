"""The wheel, installed alone into an empty folder: names, data, the README's examples."""
import ast, importlib, re, shutil, subprocess, sys, zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from os import environ
from pathlib import Path

import pytest, tomllib, yaml

import addresses, vae_robust
from vae_robust import NAMES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT/'vae_robust'
EXAMPLES = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
NOT_IN_THE_WHEEL = 'weights/dsprites/', 'weights/mnist/arm_'
LARGEST = 25e6  # bytes of the wheel


def said(*command, **options):
    "What a command prints; its complaint if it fails."
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python(*words, path, cwd):
    "What Python prints with `path` instead of the checkout, in the folder `cwd`."
    env = environ | {'PYTHONPATH': str(path), 'OMP_NUM_THREADS': '1'}
    return said(sys.executable, *words, cwd=cwd, env=env)


def need_backend():
    "Skip what needs a wheel where none can be built."
    try:
        have = int(version('setuptools').split('.')[0])
    except PackageNotFoundError:
        have = 0
    if have < 77:
        pytest.skip('No wheel can be built: it needs setuptools 77 or newer (make setup).')


def build(source, to):
    "The wheel of the project in `source`, built in a copy of it; no network is needed."
    copy, dist = to/'copy', to/'dist'
    leave = shutil.ignore_patterns('__pycache__')
    shutil.copytree(source/'vae_robust', copy/'vae_robust', ignore=leave)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(source/name, copy)
    said(sys.executable, '-m', 'pip', 'wheel', str(copy), '--no-deps', '--no-index',
         '--no-build-isolation', '--disable-pip-version-check', '-w', str(dist))
    return next(dist.glob('*.whl'))


@pytest.fixture(scope='module')
def wheel(once):
    need_backend()
    return next(once('wheel', lambda folder: build(ROOT, folder)).glob('dist/*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, once):
    "An otherwise empty folder with the wheel."
    return once('installed', lambda to: said(
        sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--no-compile',
        '--disable-pip-version-check', '--target', str(to), str(wheel)))


def test_the_wheel_holds_the_package_but_rare_weights(wheel):
    names = {n.removeprefix('vae_robust/') for n in zipfile.ZipFile(wheel).namelist()}
    files = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob('*')
             if f.is_file() and '__pycache__' not in f.parts}
    assert {f for f in files - names if not f.startswith(NOT_IN_THE_WHEEL)} == set()
    assert not [n for n in names if n.startswith(NOT_IN_THE_WHEEL)]
    assert wheel.stat().st_size <= LARGEST


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('/METADATA'))
        meta = Parser().parsestr(z.read(name).decode())
    assert meta['Version'] == vae_robust.__version__ and meta['License-Expression'] == 'MIT'
    assert meta['Author'] == 'the vae_robust authors' and 'disentanglement' in meta['Keywords']
    classifiers = {'Typing :: Typed', 'Programming Language :: Python :: 3.13'}
    assert classifiers <= {*meta.get_all('Classifier')}
    assert meta.get_payload().startswith('# vae_robust')


def test_a_public_wheel_has_whole_addresses():
    text = (ROOT/'README.md').read_text()
    found = addresses.absolute(text, 'someone/vae_robust')
    links = re.findall(r'(!?)\[[^]]*\]\(([^)]+)\)', found)
    assert len(links) > 50 and all(link.startswith('https://') for _, link in links)
    ours = [(bang, link) for bang, link in links if 'someone' in link]
    parts = [(bang, *link.removeprefix('https://github.com/someone/vae_robust/').split('/', 2))
             for bang, link in ours]
    assert all((ROOT/file).exists() for *_, file in parts)
    assert {(bang, kind, branch) for bang, kind, branch, _ in parts} == {
        ('!', 'raw', 'main'), ('', 'blob', 'main')}
    urls = addresses.with_urls((ROOT/'pyproject.toml').read_text(), 'someone/vae_robust')
    project = tomllib.loads(urls)['project']
    assert project['urls']['Documentation'] == 'https://someone.github.io/vae_robust/'
    assert project['scripts']
    workflow = yaml.safe_load((ROOT/'.github'/'workflows'/'ci.yml').read_text())
    runs = [s['run'] for s in workflow['jobs']['wheel']['steps'] if 'run' in s]
    assert runs[:2] == ['python tools/addresses.py ${{ github.repository }}',
                        'python -m pip wheel . --no-deps -w dist']


FIRST_HOUR = """
import sys, vae_robust
from pathlib import Path
assert Path(vae_robust.__file__).is_relative_to(sys.argv[1]), vae_robust.__file__
assert 'torch' not in sys.modules and 'pandas' not in sys.modules
from vae_robust import *
assert set(vae_robust.NAMES) <= set(globals()) & set(dir(vae_robust))
from vae_robust.training import hashes
for file in hashes():
    kind, name, seed = file.removesuffix('.safetensors').split('/')
    if f'weights/{kind}/{name}/'.startswith(tuple(sys.argv[2:])): continue
    (pretrained_judge if kind == 'judge' else pretrained)(f'{kind}/{name}', int(seed[4:]))
from vae_robust.claims import study_table
assert len(study_table('thesis')) and preset('job.main').models
"""


def test_names_data_and_readme_without_the_checkout(installed, tmp_path):
    code = '\n'.join([FIRST_HOUR, *EXAMPLES])
    python('-c', code, str(installed), *NOT_IN_THE_WHEEL, path=installed, cwd=tmp_path)
    assert EXAMPLES and not list(tmp_path.iterdir())


def test_the_command_without_the_checkout(installed, tmp_path):
    text = python(str(installed/'bin'/'vae-robust'), '--help', path=installed, cwd=tmp_path)
    assert 'attack' in text and 'reproduce' in text


def defined(module):
    "The names that a module of the package defines at its top."
    tree = ast.parse((PACKAGE/f'{module}.py').read_text())
    return {getattr(node, 'name', '') for node in tree.body}


@pytest.mark.parametrize('name, module', NAMES.items())
def test_a_name_leads_to_the_module_that_defines_it(name, module):
    assert name in defined(module)
    assert getattr(vae_robust, name) is vars(importlib.import_module(f'vae_robust.{module}'))[name]


def test_names_are_shown_and_are_no_modules():
    assert vae_robust.__all__ == [*NAMES] and {*NAMES, '__version__'} <= {*dir(vae_robust)}
    assert not {*NAMES} & {f.stem for f in PACKAGE.iterdir()}


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="'vae_robust' has no attribute 'atack'"):
        vae_robust.atack
    with pytest.raises(ImportError):
        exec('from vae_robust import atack')


def test_importing_the_package_imports_nothing_else(tmp_path):
    code = 'import sys; old = {*sys.modules}; import vae_robust; print(*{*sys.modules} - old)'
    assert python('-c', code, path=ROOT, cwd=tmp_path).split() == ['vae_robust']


def test_the_sdist_is_the_repository(tmp_path):
    need_backend()
    listing = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    files = listing.stdout.split()
    if not files:
        pytest.skip('not a git checkout')
    said(sys.executable, '-c', 'from setuptools import setup; setup()', '-q', 'egg_info',
         '--egg-base', str(tmp_path), cwd=ROOT)
    listed = next(tmp_path.glob('*.egg-info')).joinpath('SOURCES.txt').read_text().split('\n')
    assert {f for f in files if (ROOT/f).exists()} - {*listed} == set()
