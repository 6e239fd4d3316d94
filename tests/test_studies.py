import os, signal
from functools import partial
from pathlib import Path

import pandas as pd, pytest, torch

from vae_robust import studies
from vae_robust.settings import SettingsError, Study, facts_of, preset, read_table
from vae_robust.studies import (Cell, Makers, Weights, answered, ask, cells_of, judges_of, keys_of,
                                label_of, looks_of, merged, models_of, prepare, publish,
                                restore, table_of, trials, untrained)
from vae_robust.sweep import SweepError, key, missing, path_of
from vae_robust.training import TrainingError, pretrained, train


def grid(**changes):
    "The smallest study that has every kind of axis."
    words = dict(models='digits.entangled', train='train.smoke', seeds='0, 1', judges='judge.smoke',
                 attacks='attack.none, attack.noise', pairs='1')
    return Study(**words | {'model.beta': '1, 4', 'attack.eps': '.1, .2'} | changes)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A study of two models and two attacks, answered: (study, runs folder, answers)."
    runs = tmp_path_factory.mktemp('runs')
    study = Study(models='digits.entangled, digits.disentangled', train='train.smoke', seeds='0',
                  judges='judge.smoke', attacks='attack.none, attack.noise', pairs='1')
    return study, runs, trials(study, runs, jobs=1, progress=False)


# ------------------------------------------------------------------ the question
def test_a_question_says_all_that_its_answer_depends_on_and_no_label():
    w = Weights('mnist.entangled', preset('mnist.entangled'), 0, 'abc', '')
    j = Weights('judge.wide', preset('judge.wide'), 0, 'def', '')
    one = Cell('trial', w, {'wide': j}, preset('attack.none'))
    for same in (one._replace(model=w._replace(name='mnist.other', home='elsewhere')),
                 Cell('trial', w, {'wide': j._replace(home='x')}, preset('attack.none'))):
        assert key(same) == key(one)
    others = [one._replace(measure='faces'), one._replace(attack=None),
              one._replace(attack=preset('attack.none', pairs=3)), one._replace(options={'n': 1}),
              one._replace(images='digest'),
              one._replace(judges={}), one._replace(judges={'wide': j._replace(hash='x')}),
              one._replace(judges={'narrow': j})]
    shorter = w._replace(preset=preset('mnist.entangled', steps=7))
    others += [one._replace(model=m) for m in (w._replace(hash='x'), w._replace(seed=1), shorter)]
    assert len({key(c) for c in [one, *others]}) == 1 + len(others)


def test_the_grid_is_every_combination_models_first_with_last_words_as_labels():
    asked = cells_of(grid(), Path('nowhere'))
    assert [tuple(labels.values()) for labels,
            _ in asked[:5]] == [('entangled', 0, '1', 'none', '.1'),
                                ('entangled', 0, '1', 'none', '.2'),
                                ('entangled', 0, '1', 'noise', '.1'),
                                ('entangled', 0, '1', 'noise', '.2'),
                                ('entangled', 0, '4', 'none', '.1')]
    assert len(asked) == 16 and [*asked[0][0]] == ['model', 'seed', 'beta', 'attack', 'eps']
    for labels, c in asked:
        assert (c.model.preset.beta, c.attack.eps, c.attack.pairs,
                c.model.preset.steps) == (float(labels['beta']), float(labels['eps']), 1, 20)


def test_of_shipped_models_a_study_takes_those_that_there_are():
    found = models_of(preset('study.smoke', models='mnist.entangled', seeds='0, 99'),
                      Path('nowhere'))
    assert [(labels, w.home) for labels, w in found] == [({'model': 'entangled', 'seed': 0}, '')]
    assert cells_of(preset('study.smoke', models='digits.entangled', judges='judge.smoke'),
                    Path('nowhere')) == []
    assert len(models_of(grid(seeds='0, 99'), Path('nowhere'))) == 4


def test_a_judge_of_other_images_is_refused():
    with pytest.raises(SettingsError,
                       match='judge.residual judges mnist, the models are of digits: name another '
                             'judge'):
        judges_of(grid(judges='judge.residual'), 'nowhere')
    faces = grid(models='faces.entangled', judges='judge.faces')
    with pytest.raises(SettingsError, match='grey images'):
        judges_of(faces, 'nowhere')
    assert [*judges_of(faces, 'nowhere', Makers(train, lambda *a, **kw: None))] == ['faces']


# ------------------------------------------------------------------ weights
def test_shipped_weights_are_taken_for_their_very_preset_only(tmp_path):
    study = partial(preset, 'study.damage', models='mnist.arm_b')
    arm = models_of(study(), tmp_path)[1][1]
    assert not arm.home and len(arm.hash) == 12
    assert all(map(torch.equal, restore(arm, tmp_path).parameters(),
                   pretrained('mnist/arm_b', 101).parameters()))
    assert not all(map(torch.equal, restore(arm, tmp_path).parameters(),
                       pretrained('mnist/arm_b', 100).parameters()))
    for change in ({'model.beta': '2'}, {'train': 'train.quick'}, {'seeds': '5'}, {'anew': True}):
        w = models_of(study(**{'seeds': '101'} | change), tmp_path)[0][1]
        assert w.home.endswith(f'/seed{w.seed}') and not w.hash, change
    assert not [*tmp_path.iterdir()]


def test_models_of_different_presets_are_trained_in_different_places():
    homes = [w.home for _, w in models_of(grid(), Path('nowhere'))]
    assert homes[:2] == ['train.smoke/digits.entangled-beta=1/seed0',
                         'train.smoke/digits.entangled-beta=4/seed0']
    assert len({*homes}) == 4


def test_a_run_folder_of_other_settings_is_refused_in_one_sentence(tmp_path):
    train(preset('digits.entangled', 'train.smoke', steps=3),
          tmp_path/'train.smoke/digits.entangled/seed0', progress=False)
    study = Study(models='digits.entangled', train='train.smoke', seeds='0', judges='judge.smoke',
                  attacks='attack.none', pairs='1')
    with pytest.raises(TrainingError, match='was trained with other settings') as e:
        cells_of(study, tmp_path)
    assert '\n' not in str(e.value)


# ------------------------------------------------------------------ answers
def test_every_cell_has_its_answer_and_its_labels(done):
    study, runs, answers = done
    assert [tuple(labels.values()) for labels,
            _ in answers] == [(m, 0, a) for m in ('entangled', 'disentangled')
                              for a in ('none', 'noise')]
    assert all(len(rows) == 90 and 'smoke_after' in rows for _, rows in answers)
    assert untrained(study, runs) == []
    t = table_of(answers, lambda rows: rows[['l2']].mean().to_frame().T)
    assert [*t.columns] == ['l2', 'model', 'seed', 'attack']
    assert (t[t.attack == 'none'].l2 == 0).all() and (t[t.attack == 'noise'].l2 > 1).all()


def test_another_study_that_asks_the_same_finds_it_answered(done, monkeypatch):
    study, runs, answers = done
    monkeypatch.setattr(studies, 'trial', None)
    part = Study(models='digits.disentangled', train='train.smoke', seeds='0', judges='judge.smoke',
                 attacks='attack.noise', pairs='1')
    ((_, rows),) = trials(part, runs, jobs=1, progress=False)
    assert rows.equals(answers[-1][1])
    with pytest.raises(SweepError, match='1 of 1 cells failed'):
        trials(part.model_copy(update={'pairs': (2,)}), runs, jobs=1, progress=False)


def test_what_is_torn_is_asked_again_and_nothing_else(done):
    study, runs, answers = done
    asked, seen = cells_of(study, runs), []
    path = path_of(asked[1][1], runs/'cells')
    path.write_bytes(path.read_bytes()[:-3])
    assert [labels for labels, _ in answered(asked,
                                             runs)] == [labels for labels,
                                                        _ in asked if labels != asked[1][0]]
    def compute(cell, runs):
        seen.append(cell)
        return answers[1][1]
    again = ask(asked, compute, runs, jobs=1, progress=False)
    assert [key(c) for c in seen] == [key(asked[1][1])]
    assert all(a.equals(b) for (_, a), (_, b) in zip(again, answers))


def named(cell, runs):
    "Its options; one of them takes the worker along."
    if cell.options['n'] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return pd.DataFrame([cell.options])

def test_a_lost_worker_costs_its_cell_and_no_other(tmp_path):
    w = Weights('mnist.entangled', preset('mnist.entangled'), 0, 'abc', '')
    asked = [({'n': n}, Cell('named', w, {}, options={'n': n})) for n in range(5)]
    with pytest.raises(SweepError, match='1 of 5 cells failed') as e:
        ask(asked, named, tmp_path, jobs=2, progress=False)
    assert '"n": 2' in str(e.value)
    assert [c.options['n'] for c in missing([c for _, c in asked], tmp_path/'cells')] == [2]


def test_an_equal_question_under_two_labels_is_computed_once(tmp_path):
    w, seen = Weights('mnist.entangled', preset('mnist.entangled'), 0, 'abc', ''), []
    def compute(cell, runs):
        seen.append(1)
        return pd.DataFrame({'v': [3]})
    answers = ask([({'n': n}, Cell('x', w, {})) for n in range(3)], compute, tmp_path, jobs=1,
                  progress=False)
    assert seen == [1] and table_of(answers).n.tolist() == [0, 1, 2]


def test_looks_are_cells_without_an_attack(done):
    study, runs, _ = done
    (labels, one), _ = looks_of(study, runs, 'portrait', n=5)
    assert labels == {'model': 'entangled', 'seed': 0} and one.attack is None
    assert one.options == {'n': 5} and [*one.judges] == ['smoke']
    assert looks_of(study, runs, 'x', judged=False)[0][1].judges == {}


def test_judges_and_models_are_trained_once_before_anything_is_asked(tmp_path):
    calls = []
    def make(p, folder, seed, progress):
        calls.append((p, seed))
        folder.mkdir(parents=True, exist_ok=True)
        (folder/'weights.safetensors').touch()
    study, makers = grid(), Makers(make, make)
    assert len(untrained(study, tmp_path, makers)) == 5
    prepare(study, tmp_path, makers, jobs=1, progress=False)
    assert len(calls) == 5
    assert untrained(study, tmp_path, makers,
                     judged=False) == [] == untrained(study, tmp_path, makers)


# ------------------------------------------------------------------ published tables
def test_a_label_s_key_is_that_of_all_its_cells_and_does_not_wait_for_training(done, tmp_path):
    study, runs, _ = done
    before, after = (keys_of(cells_of(study, r), ['model']) for r in (tmp_path, runs))
    assert before == after and [*before] == ['entangled', 'disentangled']
    more = keys_of(cells_of(study.model_copy(update={'attacks': ('attack.none',)}), runs),
                   ['model'])
    assert not set(more.values()) & set(after.values())
    shipped = Weights('mnist.entangled', preset('mnist.entangled'), 0, 'abc', '')
    assert keys_of([({'model': 'm'}, Cell('x', shipped, {}))],
                   ['model']) != keys_of([({'model': 'm'},
                                           Cell('x', shipped._replace(hash='y'), {}))], ['model'])


def test_labels_are_the_same_from_a_table_and_from_settings():
    assert label_of(['entangled', 0, 'strong', '0.50',
                     'true']) == label_of(['Entangled', 0., 'strong', .5,
                                           True]) == 'entangled 0 strong 0.5 true'
    assert label_of(['1e-4']) == label_of([.0001]) != label_of([.001])


TABLE = pd.DataFrame({'attack': ['none', 'none', 'noise'], 'eps': [.1, .1, .2], 'rate': [1., 2, 3]})

@pytest.mark.parametrize('new, keys, rates', [
    (TABLE[:0], {}, [1, 2, 3]),  # nothing new: all stays
    (TABLE.assign(rate=9.), {}, [9, 9, 9]),  # as many rows: the new ones
    (TABLE[1:].assign(rate=9.), {}, [1, 2, 9]),  # fewer of one label: the old ones
    (TABLE[:0], {'none 0.1': 'other'}, [3]),  # asked otherwise now
    (TABLE[:1].assign(rate=9.), {'none 0.1': 'other'}, [3, 9]),
    (TABLE[:0], {'noise 0.2': None}, [1, 2])])  # not asked any more
def test_old_rows_stay_while_their_question_is_asked(tmp_path, new, keys, rates):
    now = {'none 0.1': 'a', 'noise 0.2': 'b'}
    publish(TABLE, 't', now, ['attack', 'eps'], tmp_path, study='s')
    asked = {k: v for k, v in (now | keys).items() if v}
    assert merged(new, tmp_path/'t.csv', asked, ['attack', 'eps']).rate.tolist() == rates
    t = publish(new, 't', asked, ['attack', 'eps'], tmp_path, order=['rate'])
    assert t.rate.tolist() == sorted(rates) and t.equals(read_table(tmp_path/'t.csv'))
    assert {*facts_of(tmp_path/'t.csv')['cells']} <= {*asked}


def test_a_table_without_keys_is_not_mixed_in(tmp_path):
    (tmp_path/'t.csv').write_text('# {"study": {}}\nattack,rate\nnone,1\n')
    assert len(merged(TABLE[:0][['attack', 'rate']], tmp_path/'t.csv', {'none': 'a'},
                      ['attack'])) == 0
    assert merged(TABLE, tmp_path/'absent.csv', {}, ['attack']).equals(TABLE)
