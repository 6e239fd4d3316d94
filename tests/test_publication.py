"What lies in figures/ was published: a run leaves it as it is, and tells how far it is from that."
import shutil

import matplotlib.pyplot as plt, pandas as pd, pytest

from vae_robust import cli, settings, studies
from vae_robust.settings import TableError, preset, read_table, save_figure, save_table

STAYS = 'figures/{} stays: here it is {}, see runs/figures/. VAE_ROBUST_PUBLISH=1 publishes it.\n'


@pytest.fixture
def top(tmp_path, monkeypatch):
    "A checkout's top folder, in which nothing is published yet."
    for module in (settings, studies, cli):
        monkeypatch.setattr(module, 'root', lambda: tmp_path)
    for name in ('VAE_ROBUST_SMOKE', 'VAE_ROBUST_PUBLISH'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path/'figures').mkdir()
    return tmp_path


def files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes()
            for f in folder.rglob('*') if f.is_file()}


def rate(r, name='t'):
    save_table(pd.DataFrame({'model': ['a'], 'rate': [r], 'n': [3]}), name, job='j')


def picture(grey, name='p'):
    save_figure(plt.figure(figsize=(1, 1), facecolor=str(grey)), name)
    plt.close()


@pytest.fixture
def published(top, monkeypatch):
    "The same, with a table and a picture; their bytes."
    with monkeypatch.context() as m:
        m.setenv('VAE_ROBUST_PUBLISH', '1')
        rate(36.6)
        picture(.5)
    assert {*files(top)} == {'figures/t.csv', 'figures/t.md', 'figures/p.png'}
    return files(top/'figures')


def test_what_is_found_again_is_not_written(top, published, capsys):
    rate(36.6)
    picture(.5)
    assert files(top/'figures') == published and not (top/'runs').exists()
    assert capsys.readouterr() == ('', '')


def test_what_is_found_otherwise_stays_and_is_told(top, published, capsys):
    rate(36.9)
    picture(.7)
    assert files(top/'figures') == published
    assert read_table(top/'runs'/'figures'/'t.csv').rate[0] == 36.9
    assert {*files(top/'runs'/'figures')} == {'t.csv', 't.md', 'p.png'}
    said = ('t.csv', 'up to 0.3 away (rate)'), ('p.png', 'another picture')
    assert capsys.readouterr().err == ''.join(STAYS.format(*words) for words in said)
    rate(36.6)
    picture(.5)
    assert files(top/'runs') == {} and files(top/'figures') == published


def test_another_table_a_damaged_and_a_new_one_are_told(top, published, capsys):
    save_table(pd.DataFrame({'model': ['a', 'b']}), 't', job='j')
    (top/'figures'/'t.csv').write_bytes(published['t.csv'].replace(b'36.6', b'99.9'))
    with pytest.raises(TableError):
        read_table(top/'figures'/'t.csv')
    rate(36.6)
    rate(36.6, 'u')
    said = [STAYS.format(*w) for w in (('t.csv', 'another table'),)*2 + (('u.csv', 'new'),)]
    assert capsys.readouterr().err == ''.join(said) and not (top/'figures'/'u.csv').exists()


def test_without_a_checkout_nobody_is_told_of_a_publication(top, capsys):
    (top/'figures').rmdir()
    rate(36.6)
    assert {*files(top)} == {'runs/figures/t.csv', 'runs/figures/t.md'}
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('value, written', [('1', True), ('0', False), ('', False)])
def test_who_publishes_says_so(top, published, monkeypatch, value, written):
    monkeypatch.setenv('VAE_ROBUST_PUBLISH', value)
    rate(36.9)
    assert (read_table(top/'figures'/'t.csv').rate[0] == 36.9) == written
    assert (top/'runs').exists() != written


def test_a_study_is_there_to_be_published(top):
    for missed in (3, 4):
        new = pd.DataFrame({'attack': ['strong'], 'missed': [missed]})
        studies.publish(new, 's', {'strong': 'key'}, ['attack'])
        assert read_table(top/'figures'/'s.csv').missed[0] == missed


def test_make_run_on_another_processor_leaves_figures(top, smoke_job, monkeypatch, capsys):
    shutil.copytree(smoke_job/'figures', top/'figures', dirs_exist_ok=True)
    shutil.copytree(smoke_job/'runs', top/'runs')
    monkeypatch.setattr(cli, 'read_preset', lambda name: preset('job.smoke'))
    monkeypatch.setenv('VAE_ROBUST_PUBLISH', '1')
    cli.report_job('job.main', top/'runs')
    assert 'runs/figures' not in capsys.readouterr().out
    monkeypatch.setenv('VAE_ROBUST_PUBLISH', '0')
    here = read_table(top/'figures'/'means.csv')
    there = here.assign(as_ignore=here.as_ignore + .3)
    facts = settings.facts_of(top/'figures'/'means.csv')
    save_table(there, 'means', top/'figures', **{k: v for k, v in facts.items() if k != 'commit'})
    before = files(top/'figures')
    cli.report_job('job.main', top/'runs')
    assert files(top/'figures') == before
    assert {*files(top/'runs'/'figures')} == {'means.csv', 'means.md'}
    assert read_table(top/'runs'/'figures'/'means.csv').equals(here)
    out, err = capsys.readouterr()
    assert 'up to 0.3 away (as_ignore)' in err and 'what differs here in runs/figures' in out
