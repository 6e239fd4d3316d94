import json, os, platform, subprocess, sys, threading, time
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from PIL import Image

from vae_robust import settings
from vae_robust.experiments import comparison
from vae_robust.experiments.board import TUNED
from vae_robust.judges import JUDGE_NETWORKS
from vae_robust.objectives import FEATURES, OBJECTIVES
from vae_robust.optimisers import BALLS, OPTIMISERS
from vae_robust.settings import AttackPreset, DefencePreset, JudgePreset, ModelPreset
from vae_robust.settings import (DiskError, SettingsError, TableError, facts_of, keep_table, locked,
                                 kept_table, preset, read_settings, read_table, root, save_csv,
                                 save_figure, save_table, temporary, write)
from vae_robust.training import LOSSES, SCHEDULES
from vae_robust.vae import LIKELIHOODS, NETWORKS


@pytest.fixture
def ini(tmp_path):
    "A function that writes a settings file and returns its path."
    def make(text):
        (tmp_path/'my.ini').write_text(text)
        return tmp_path/'my.ini'
    return make


def test_every_preset_of_the_shipped_file_is_valid():
    for name in read_settings():
        preset('mnist.disentangled', name) if name.startswith('train.') else preset(name)


def test_the_settings_that_people_edit_are_those_of_the_package():
    "One file under two names: a copy would be read, and the one at the top edited in vain."
    assert settings.settings_file().resolve() == root()/'settings.ini'


def test_settings_ini_has_no_default_section():
    assert 'DEFAULT' not in read_settings()


def test_later_words_win():
    p = preset('mnist.entangled_wd', 'train.quick', lr='3e-3')
    assert (p.objective, p.weight_decay, p.steps, p.lr) == ('elbo', 1e-4, 3000, 3e-3)


def test_presets_cannot_be_changed_by_accident():
    with pytest.raises(ValueError):
        preset('attack.strong').eps = .2


WHOLE = Path(settings.settings_file()).read_text()

@pytest.mark.parametrize('text, words', [
    (WHOLE.replace('gamma = 30', 'gama = 30', 1),
     ['my.ini [mnist.disentangled] gama', "did you mean 'gamma'?"]),
    (WHOLE.replace('lr = 1e-3', 'lr = -1e-3', 1),
     ['my.ini [mnist.entangled] lr = -1e-3', 'greater than 0']),
    (WHOLE.replace('lr = 1e-3', 'lr = nan', 1), ['lr = nan', 'finite']),
    (WHOLE.replace('n_z = 10', 'n_z = ten', 1),
     ['my.ini [mnist.entangled] n_z = ten', 'valid integer']),
    (WHOLE.replace('batch = 64', '', 1), ['my.ini [mnist.disentangled]', "'batch' is missing"]),
    (WHOLE.replace('objective = joint', 'objective = jiont', 1), ['objective = jiont', "'joint'"]),
    (WHOLE.replace('[mnist.disentangled]', '[mnist.disentagled]', 1),
     ['no section [mnist.disentangled]', "'mnist.disentagled'"]),
    (WHOLE + '\n[mnist.disentangled]\n', ['mnist.disentangled', 'already exists']),
    ('lr = 3', ['no section headers', 'my.ini']),
])
def test_a_mistake_gets_one_sentence_with_file_section_key_and_remedy(ini, text, words):
    with pytest.raises(SettingsError) as e:
        preset('mnist.disentangled', file=ini(text))
    assert '\n' not in str(e.value)
    for w in words:
        assert w in str(e.value)


def test_the_section_that_is_wrong_is_named_even_when_inherited(ini):
    with pytest.raises(SettingsError, match=r'\[mnist.entangled\] objective = x'):
        preset('mnist.entangled_wd', file=ini(WHOLE.replace('objective = elbo', 'objective = x',
                                                            1)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match='absent.ini: cannot be read'):
        preset('x', file=tmp_path/'absent.ini')


def test_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path/'a', 'old')
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'):
        write(tmp_path/'a', 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and (tmp_path/'a').read_text() == 'old'


def test_figures_and_tables_carry_their_provenance(tmp_path):
    save_figure(plt.figure(figsize=(1, 1)), 'f', tmp_path, preset='p', seed=1)
    save_table(pd.DataFrame({'a': [1]}), 't', tmp_path, preset='p', n=90)
    said = json.loads(Image.open(tmp_path/'f.png').text['Description'])
    assert said['preset'] == 'p' and said['seed'] == 1
    first = (tmp_path/'t.csv').read_text().splitlines()[0]
    assert json.loads(first.removeprefix('# '))['n'] == 90 and 'commit' in first


def drawn(value):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, value])
    return fig


def saved(folder, value=1, n=3):
    "The times of the last change of a figure, a table and its page, drawn or written now, by name."
    fig = drawn(value)
    save_figure(fig, 'f', folder, n=n)
    save_table(pd.DataFrame({'a': [value, 2]}), 't', folder, n=n)
    plt.close(fig)
    return {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


def test_what_is_unchanged_is_not_written_again_whatever_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, 'commit', lambda: '1234567')
    first = saved(tmp_path)
    monkeypatch.setattr(settings, 'commit', lambda: '7654321+')
    assert saved(tmp_path) == first and b'7654321' not in (tmp_path/'t.csv').read_bytes()


@pytest.mark.parametrize('change', [{'value': 3}, {'n': 4}])
def test_what_is_changed_is_written(tmp_path, change):
    first, second = saved(tmp_path), saved(tmp_path, **change)
    assert {k: first[k] != second[k] for k in first} == dict.fromkeys(('f.png', 't.csv', 't.md'), True)


def test_what_is_damaged_is_written(tmp_path):
    saved(tmp_path)
    good = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    for name, data in good.items():
        (tmp_path/name).write_bytes(data[:len(data)//2] + b'\xff')
    saved(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == good


def test_a_moving_picture_is_compared_frame_by_frame(tmp_path, monkeypatch):
    frames = [np.full((4, 4), v, np.uint8) for v in (0, 90, 200)]
    times = []
    for commit, last in (('a', 200), ('b+', 200), ('b+', 20)):
        monkeypatch.setattr(settings, 'commit', lambda: commit)
        comparison.save_gif([*frames[:2], np.full((4, 4), last, np.uint8)], 'g', tmp_path, n=1)
        times.append((tmp_path/'g.gif').stat().st_mtime_ns)
    assert times[0] == times[1] != times[2]


def test_a_study_takes_any_key_of_an_attack_or_a_model_and_no_other(tmp_path):
    s = preset('study.lambda')
    assert s.axes['attack.lam'] == ('0', '0.1', '0.25', '0.5', '1', '2', '4')
    assert set(s.axes) == {'attack.lam', 'attack.features'}
    for wrong, right in {'attack.lamb': 'attack.lam', 'lam': 'attack.lam', 'gamma': 'model.gamma',
                         'lr': 'model.lr'}.items():
        with pytest.raises(SettingsError, match=f"{wrong}: no such key; did you mean '{right}'"):
            preset('study.lambda', **{wrong: '1, 2'})


def test_one_number_of_pairs_is_for_every_attack():
    assert preset('job.smoke', pairs='3').budget == {'attack.none': 3, 'attack.strong': 3}
    assert preset('job.smoke', pairs='3, 4').budget == {'attack.none': 3, 'attack.strong': 4}


def test_without_git_the_commit_is_none_and_nothing_fails(monkeypatch, tmp_path):
    assert settings.commit() != 'none' or not (settings.root()/'.git').exists()
    monkeypatch.setenv('PATH', str(tmp_path))
    assert settings.commit() == 'none'


def test_a_like_that_leads_in_a_circle_and_bytes_that_are_no_text_get_one_sentence(ini, tmp_path):
    with pytest.raises(SettingsError, match='`like` leads back to itself'):
        preset('mnist.a', file=ini('[mnist.a]\nlike = mnist.b\n[mnist.b]\nlike = mnist.a\n'))
    (tmp_path/'odd.ini').write_bytes(b'[mnist.a]\nlr = \xff\n')
    with pytest.raises(SettingsError, match='odd.ini'):
        preset('mnist.a', file=tmp_path/'odd.ini')


def test_models_that_a_table_could_not_tell_apart_are_refused():
    with pytest.raises(SettingsError, match='two models have the same last name'):
        preset('job.smoke', models='mnist.entangled, digits.entangled')
    with pytest.raises(SettingsError, match='two axes have the same last name'):
        preset('study.steps', **{'model.steps': '1, 2'})


# ------------------------------------------------------------------ tables
FRAMES = {
    'text': pd.DataFrame({'a': ['run #1', '# 2', None, ''], 'b': ['007', '1e3', '-0', '1_0'],
                          'c': ['None', 'NA', 'nan', 'null'],
                          'd': ['True', 'False', 'True', 'True']}),
    'layout': pd.DataFrame({'a': ['a\nb', 'c"d', 'e,f', 'g\r\nh'], 'b': [' x', 'x ', '', 'é'],
                            'c': [1, 2, 3, 4]}),
    'numbers': pd.DataFrame({'a': [.1 + .2, np.nan, -np.inf, 5e-324], 'b': [2**62, -1, 0, 3],
                             'c': [1., 2., 3., 4.], 'd': [True, False, True, True]}),
    'types': pd.DataFrame({'a': pd.array([1, None], 'Int64'), 'b': np.array([1, 3], 'float32')/3,
                           'c': pd.Categorical(['x', 'y']),
                           'd': pd.to_datetime(['2020-01-01', None]),
                           'e': np.array([0, 255], 'uint8')}),
    'gaps': pd.DataFrame({'a': ['', ''], 'b': [np.nan, np.nan]}),
    'no rows': pd.DataFrame({'a': pd.Series([], dtype='str'), 'b': pd.Series([], dtype='int64')}),
    'nothing': pd.DataFrame(),
    'other rows': pd.DataFrame({'a': ['x', 'y']}, index=[7, 3])}

@pytest.mark.parametrize('name', FRAMES)
def test_a_table_comes_back_as_it_went(tmp_path, name):
    table = FRAMES[name]
    save_csv(table, 't', tmp_path, n=3)
    keep_table(tmp_path/'k.csv', {'n': 3}, table)
    for back in (read_table(tmp_path/'t.csv'), kept_table(tmp_path/'k.csv', {'n': 3})):
        pd.testing.assert_frame_equal(back, table.reset_index(drop=True))
    assert facts_of(tmp_path/'t.csv')['n'] == 3


@pytest.mark.parametrize('file', sorted((root()/'figures').glob('*.csv')), ids=lambda f: f.stem)
def test_published_tables_read_as_before_and_would_be_written_alike(tmp_path, file):
    old, new = pd.read_csv(file, comment='#'), read_table(file)
    pd.testing.assert_frame_equal(new, old, check_exact=True)
    if file.stem.startswith('study_'):
        return  # their axes were texts, and are read as numbers
    save_csv(new, 't', tmp_path)
    head, rows = (tmp_path/'t.csv').read_text().split('\n', 1)
    assert rows == file.read_text().split('\n', 1)[1] and 'types' not in head


def test_numbers_in_a_mixed_frame_are_published_as_numbers(tmp_path):
    "A transposed frame holds objects; its columns of numbers need no note on how to read them."
    save_csv(pd.DataFrame({'a': ['x', 1.5], 'b': ['y', 2.5]}).T, 't', tmp_path)
    assert 'types' not in (tmp_path/'t.csv').read_text()
    assert read_table(tmp_path/'t.csv')['1'].dtype == 'float64'


def test_an_answer_that_is_not_whole_is_none(tmp_path):
    path, table = tmp_path/'a.csv', pd.DataFrame({'v': range(9), 'w': list('abcdefghi')})
    keep_table(path, {'a': 1}, table)
    whole = path.read_bytes()
    cut = [whole[:n] for n in range(len(whole))]
    flipped = [whole[:i] + bytes([b ^ 1 << i % 8]) + whole[i + 1:] for i, b in enumerate(whole)]
    for data in [*cut, *flipped, whole[:-5] + bytes(5)]:
        path.write_bytes(data)
        back = kept_table(path, {'a': 1})
        assert back is None or back.equals(table) and data.count(b'\n') == whole.count(b'\n')
    path.write_bytes(whole)
    assert kept_table(path, {'a': 1}).equals(table) and kept_table(path, {'a': 2}) is None
    assert kept_table(tmp_path/'b.csv', {}) is None


def test_an_answer_without_a_checksum_or_with_other_notes_is_none(tmp_path):
    path, table = tmp_path/'a.csv', pd.DataFrame({'v': ['007', '']})
    path.write_text('# {"a": 1}\nv\n3\n')
    assert kept_table(path, {'a': 1}) is None
    keep_table(path, {'a': 1}, table)
    whole = path.read_text()
    for note in ('"v": "str"', '"v": [1]'):
        assert note in whole
        path.write_text(whole.replace(note, note.replace('v', 'w')))
        assert kept_table(path, {'a': 1}) is None


@pytest.mark.parametrize('text', [b'', b'# {"n": 3}\n', b'\xff\xfe',
                                  b'# {"table": {"types": 3}}\na\n1\n',
                                  b'# {"table": {"odd": {}}}\na\n1\n',
                                  b'# {"table": 7}\na\n1\n', b'# {}\na\n1\n1,2\n',
                                  b'# {"table": {"types": {"a": "int64"}}}\na\nx\n',
                                  b'# {"table": {"sha256": "0"}}\na\n1\n'])
def test_a_damaged_table_gets_one_sentence(tmp_path, text):
    (tmp_path/'t.csv').write_bytes(text)
    with pytest.raises(TableError, match='t.csv is damaged.*[Dd]elete it') as e:
        read_table(tmp_path/'t.csv')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('head', ['', 'model,seed', '<<<<<<< HEAD', '# {', '# [1]', '# 3', '#'])
def test_a_damaged_first_line_says_nothing_of_the_origin(tmp_path, head):
    (tmp_path/'t.csv').write_text(head + '\na,b\n')
    assert facts_of(tmp_path/'t.csv') == {} and facts_of(tmp_path/'none.csv') == {}


# ------------------------------------------------------------------ the disk
def test_a_failed_write_leaves_nothing_and_says_where_and_how_much(tmp_path, monkeypatch):
    for name in ('replace', 'fsync'):
        with monkeypatch.context() as m:
            def full(*_): raise OSError(28, 'No space left on device')
            m.setattr(os, name, full)
            with pytest.raises(DiskError,
                               match='a.txt cannot be written .No space left on device.: it needs '
                                     '1,234 bytes, and [0-9,]+ are free') as e:
                write(tmp_path/'a.txt', 'x'*1234)
        assert not [*tmp_path.iterdir()] and '\n' not in str(e.value)
    write(tmp_path/'file', '')
    with pytest.raises(DiskError, match='file/a.txt cannot be written'):
        write(tmp_path/'file'/'a.txt', '')


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync',
                        lambda fd: (done.append(os.readlink(f'/proc/self/fd/{fd}').split('/')[-1]),
                                    sync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append('replace'), replace(a, b)))
    write(tmp_path/'a.txt', 'x')
    assert done == [temporary(tmp_path/'a.txt').name, 'replace', tmp_path.name]


KILLED_WHILE_WRITING = '''
import os, pathlib, sys
from vae_robust.settings import write
def half(self, data):
    open(self, 'wb').write(data)
    os.kill(os.getpid(), 9)
pathlib.Path.write_bytes = half
write(sys.argv[1], 'x')
'''

def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, '-c', KILLED_WHILE_WRITING, tmp_path/'a'])
    litter = [*tmp_path.iterdir()]
    names = ('.git', f'.a.{platform.node()}.{os.getppid()}-1', '.a.elsewhere.99999999-1', 'a.99999999-1')
    others = [tmp_path/n for n in names]
    assert len(litter) == 1 and litter[0].name.startswith('.a.')
    for f in others:
        f.touch()
    write(tmp_path/'b', 'x')
    assert {*tmp_path.iterdir()} == {*others, tmp_path/'b'}


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path, capsys):
    path, held = tmp_path/'a'/'.lock', tmp_path/'held'
    if not (child := os.fork()):
        with locked(path):
            held.touch()
            time.sleep(60)
    while not held.exists():
        time.sleep(.01)
    killing = threading.Timer(.3, os.kill, (child, 9))
    killing.start()
    with locked(path, 'Another is at work.'):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9  # before, it was held
    with locked(path, 'Another is at work.'):                            # a file, and no holder
        assert capsys.readouterr().out == 'Another is at work.\n'
    assert capsys.readouterr().out == ''


# ------------------------------------------------------------------ presets that cannot be
@pytest.mark.parametrize('name, change, words', [
    ('job.smoke', {'seeds': '0, 0'}, 'seeds = 0, 0: 0 is named twice'),
    ('job.smoke', {'attacks': 'attack.none, attack.none', 'pairs': '1, 1'},
     'attack.none is named twice'),
    ('study.primary', {'judges': 'judge.wide, judge.wide'}, 'judge.wide is named twice'),
    ('study.lambda', {'attack.lam': '1, 2, 1'}, '1 is named twice'),
    ('dose.beta', {'seeds': '3, 3'}, '3 is named twice'),
    ('job.smoke', {'attacks': 'attack.none', 'pairs': '1, 2'},
     '1 attacks need one number of pairs, or 1, not 2'),
    ('study.suite', {'pairs': '1, 2'}, 'need one number of pairs, or 16, not 2'),
    ('job.smoke', {'seeds': '4294967296'}, 'less than 4294967296'),
    ('mnist.entangled', {'n_z': 10**12}, 'less than or equal to 65536'),
    ('mnist.entangled', {'n_c': 10**12}, '65536'), ('mnist.entangled', {'size': 10**9}, '65536'),
    ('attack.l2', {'eps': '1e200'}, 'eps = 1e200'), ('attack.l2', {'eps': '1e20'}, 'can be apart'),
    ('attack.square', {'step': '1e308'}, 'step = 1e308'),
    ('attack.strong', {'stop': 'nan'}, 'finite'), ('attack.strong', {'lam': 'nan'}, 'finite')])
def test_what_no_model_and_no_table_could_have_is_refused_when_it_is_read(name, change, words):
    with pytest.raises(SettingsError, match=words) as e:
        preset(name, **change)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind, key, names', [
    (ModelPreset, 'likelihood', LIKELIHOODS), (ModelPreset, 'objective', LOSSES),
    (ModelPreset, 'schedule', SCHEDULES), (ModelPreset, 'network', NETWORKS),
    (JudgePreset, 'network', JUDGE_NETWORKS), (AttackPreset, 'objective', OBJECTIVES),
    (AttackPreset, 'features', FEATURES), (AttackPreset, 'ball', BALLS),
    (AttackPreset, 'optimiser', OPTIMISERS), (DefencePreset, 'objective', {'none': None} | TUNED)])
def test_a_choice_is_what_its_registry_has(kind, key, names):
    "`settings` imports nothing of the package: it says the names of each registry again."
    assert sorted(get_args(kind.model_fields[key].annotation)) == sorted(names)
