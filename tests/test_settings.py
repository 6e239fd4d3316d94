import json
from pathlib import Path

import matplotlib.pyplot as plt, pandas as pd, pytest
from PIL import Image

from vae_robust import settings
from vae_robust.settings import SettingsError, preset, read_settings, save_figure, save_table, write


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


def test_settings_ini_has_no_default_section():
    assert 'DEFAULT' not in read_settings()


def test_later_words_win():
    p = preset('mnist.entangled_wd', 'train.quick', lr='3e-3')
    assert (p.objective, p.weight_decay, p.steps, p.lr) == ('elbo', 1e-4, 3000, 3e-3)


def test_presets_cannot_be_changed_by_accident():
    with pytest.raises(ValueError): preset('attack.strong').eps = .2


WHOLE = Path(settings.settings_file()).read_text()

@pytest.mark.parametrize('text, words', [
    (WHOLE.replace('gamma = 30', 'gama = 30', 1), ['my.ini [mnist.disentangled] gama', "did you mean 'gamma'?"]),
    (WHOLE.replace('lr = 1e-3', 'lr = -1e-3', 1), ['my.ini [mnist.entangled] lr = -1e-3', 'greater than 0']),
    (WHOLE.replace('lr = 1e-3', 'lr = nan', 1), ['lr = nan', 'finite']),
    (WHOLE.replace('n_z = 10', 'n_z = ten', 1), ['my.ini [mnist.entangled] n_z = ten', 'valid integer']),
    (WHOLE.replace('batch = 64', '', 1), ['my.ini [mnist.disentangled]', "'batch' is missing"]),
    (WHOLE.replace('objective = joint', 'objective = jiont', 1), ['objective = jiont', "'joint'"]),
    (WHOLE.replace('[mnist.disentangled]', '[mnist.disentagled]', 1), ['no section [mnist.disentangled]', "'mnist.disentagled'"]),
    (WHOLE + '\n[mnist.disentangled]\n', ['mnist.disentangled', 'already exists']),
    ('lr = 3', ['no section headers', 'my.ini']),
])
def test_a_mistake_gets_one_sentence_with_file_section_key_and_remedy(ini, text, words):
    with pytest.raises(SettingsError) as e: preset('mnist.disentangled', file=ini(text))
    assert '\n' not in str(e.value)
    for w in words: assert w in str(e.value)


def test_the_section_that_is_wrong_is_named_even_when_inherited(ini):
    with pytest.raises(SettingsError, match=r'\[mnist.entangled\] objective = x'):
        preset('mnist.entangled_wd', file=ini(WHOLE.replace('objective = elbo', 'objective = x', 1)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match='absent.ini: cannot be read'): preset('x', file=tmp_path/'absent.ini')


def test_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path/'a', 'old')
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'): write(tmp_path/'a', 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and (tmp_path/'a').read_text() == 'old'


def test_figures_and_tables_carry_their_provenance(tmp_path):
    save_figure(plt.figure(figsize=(1, 1)), 'f', tmp_path, preset='p', seed=1)
    save_table(pd.DataFrame({'a': [1]}), 't', tmp_path, preset='p', n=90)
    assert json.loads(Image.open(tmp_path/'f.png').text['Description']) | {'preset': 'p', 'seed': 1} == json.loads(Image.open(tmp_path/'f.png').text['Description'])
    first = (tmp_path/'t.csv').read_text().splitlines()[0]
    assert json.loads(first.removeprefix('# '))['n'] == 90 and 'commit' in first


def test_a_study_takes_any_key_of_an_attack_and_no_other(tmp_path):
    s = preset('study.lambda')
    assert s.axes['lam'] == ('0', '0.1', '0.25', '0.5', '1', '2', '4') and set(s.axes) == {'lam', 'features'}
    with pytest.raises(SettingsError, match="lamb: no such key; did you mean 'lam'"): preset('study.lambda', lamb='1, 2')


def test_without_git_the_commit_is_none_and_nothing_fails(monkeypatch, tmp_path):
    assert settings.commit() != 'none' or not (settings.root()/'.git').exists()
    monkeypatch.setenv('PATH', str(tmp_path))
    assert settings.commit() == 'none'


def test_a_like_that_leads_in_a_circle_and_bytes_that_are_no_text_get_one_sentence(ini, tmp_path):
    with pytest.raises(SettingsError, match='`like` leads back to itself'): preset('mnist.a', file=ini('[mnist.a]\nlike = mnist.b\n[mnist.b]\nlike = mnist.a\n'))
    (tmp_path/'odd.ini').write_bytes(b'[mnist.a]\nlr = \xff\n')
    with pytest.raises(SettingsError, match='odd.ini'): preset('mnist.a', file=tmp_path/'odd.ini')


def test_models_that_a_table_could_not_tell_apart_are_refused():
    with pytest.raises(SettingsError, match='same last name'): preset('job.smoke', models='mnist.entangled, digits.entangled')
