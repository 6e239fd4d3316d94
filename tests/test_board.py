"""Defences, under attackers who know them (chapter 31)."""
import math
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from scipy import stats
from torch import nn
from torch.optim import Adam
from typer.testing import CliRunner

from vae_robust.experiments import board
from vae_robust.experiments.board import (attempts, before, board_cells, board_of, defended_of,
                                          deployed, makers, measured, nats_of, over_noise,
                                          numbers, publish_board, seen_by, share, sort_of,
                                          tuned)
from vae_robust.cli import app
from vae_robust.data import ImageData, load, pixels
from vae_robust.defences import Corrected
from vae_robust.diagnosis import diagnose
from vae_robust.judges import pretrained_judge
from vae_robust.objectives import OBJECTIVES
from vae_robust.robustness import pairs
from vae_robust.experiments.confirm import JUDGES, is_lost
from vae_robust.settings import SettingsError, preset, read_table, root
from vae_robust.studies import ask, restore, weights
from vae_robust.training import TrainingError, build, cosine, fit, pretrained
from vae_robust.vae import elbo
from vae_robust.yours import adapt

from test_cli import invoked

SMOKE = preset('board.smoke')
NONE, WALK = preset('defence.none'), preset('defence.one_step', data='digits')
PRICED = {'nats': 1., 'error': 2., 'seconds': 3.}


@pytest.fixture(scope='session')
def rehearsed(chapter):
    "The folder of runs in which chapter 31 computed the board of the rehearsal."
    return next(chapter('31_board').glob('*/figures/board.csv')).parents[1]


@pytest.fixture(scope='module')
def judge(): return pretrained_judge('judge/wide')


@pytest.fixture(scope='module')
def test(): return load('digits', 'test')


def of_digits(name, **keys):
    return preset(f'defence.{name}', data='digits', train='train.rehearsal', **keys)


# ------------------------------------------------------------------ the whole of it
def test_every_defence_has_a_row_and_every_column_says_what_it_should(rehearsed):
    table = read_table(rehearsed/'figures'/'board.csv').set_index('defence')
    assert [f'defence.{d}' for d in table.index] == [*SMOKE.models] and (table.n == 1).all()
    assert (table.gap == table.knows - table.suite).all() and (table.gap >= 0).all()
    assert table.certified.notna().tolist() == [d == 'boxed' for d in table.index]
    filled = table.drop(columns=['certified', 'low', 'high'])
    assert filled.notna().all().all() and (table.recognised > 20).all() and (table.knows > 20).all()
    assert (table.gap > 5).any() and table.nats.between(.5, 30).all()
    assert (rehearsed/'figures'/'board.md').read_text().count('\n|') == len(table) + 1


def test_what_is_computed_is_not_computed_again(rehearsed, monkeypatch, tmp_path):
    def never(*_, **__): raise AssertionError('computed again')
    for name in ('measured', 'fit'):
        monkeypatch.setattr(board, name, never)
    again = publish_board('board', SMOKE, rehearsed, tmp_path, jobs=1, progress=False)
    assert again.equals(read_table(rehearsed/'figures'/'board.csv'))


def test_the_command_says_what_is_to_do(rehearsed, tmp_path):
    dry = lambda *words: invoked('board', *words, '--dry-run')
    assert dry('board.smoke', '--runs', rehearsed) == 'board.smoke: 5 cells, 5 done\n'
    said = dry('--runs', tmp_path)
    assert said == 'board.main: 21 cells, 0 done, 24 models or judges to train\n'


@pytest.mark.parametrize('words, said', [(['--jobs', '0'], '--jobs 0: at least one process'),
                                         (['study.smoke'], 'one of kind board is needed'),
                                         (['board.mian'], "did you mean 'board.main'?")])
def test_mistakes_get_one_sentence(words, said):
    found = CliRunner().invoke(app, ['board', *words])
    assert found.exit_code == 1 and said in found.output and found.output.count('\n') == 1


def test_the_command_writes_the_table(rehearsed, tmp_path):
    invoked('board', 'board.smoke', '--runs', rehearsed, '--figures', tmp_path, '--jobs', 1)
    new = read_table(tmp_path/'board_smoke.csv')
    old = read_table(rehearsed/'figures'/'board.csv')
    assert new.equals(old)


# ------------------------------------------------------------------ oracles
def test_who_may_do_anything_loses_everything(rehearsed):
    study = preset('board.smoke', attacks='attack.judge_untargeted_code', **{'attack.eps': '1'})
    answers = ask(board_cells(study, rehearsed), defended_of, rehearsed, jobs=1, progress=False)
    table = board_of(answers)
    assert len(table) == 5 and (table.knows == 100).all()


def test_a_walk_of_no_steps_has_the_numbers_of_the_model_itself(judge, test):
    model, index = pretrained('mnist/entangled'), pairs(test.y, 1)[::9]
    attacks = {a: preset(f'attack.{a}', steps=3, restarts=1)
               for a in ('strong', 'output_code', 'judge_untargeted_code', 'judge_square')}
    walk = lambda n: preset('defence.langevin', data='digits', walk=n)
    none, still, walks = (measured(p, model, [judge, judge], attacks, test, index)
                          for p in (NONE, walk(0), walk(2)))
    bare, zero, two = ({k: v for k, v in numbers(rows).items() if k != 'seconds'}
                       for rows in (none, still, walks))
    assert zero.pop('certified') is not None and bare.pop('certified') is not None  # NaN both
    assert zero == pytest.approx(bare, rel=1e-6) and two['error'] != pytest.approx(bare['error'])


@pytest.mark.slow
def test_a_model_without_a_defence_has_the_numbers_of_the_study():
    "720 pairs of arm A under the study's attack, as figures/confirm_lost.csv has them."
    study, table = preset('study.confirm'), read_table(root()/'figures'/'confirm_lost.csv')
    known, test = table.query("model == 'arm_a' and seed == 100"), load('mnist', 'test')
    seeing = ['residual', *JUDGES]
    judges = [restore(weights(f'judge.{j}', preset(f'judge.{j}'), '', 0, ''), '') for j in seeing]
    index = pairs(test.y, 8, study.draw)
    rows = measured(NONE, pretrained('mnist/arm_a', 100), judges, {'strong': preset('attack.strong')},
                    test, index)
    said = lambda a: is_lost(known[[f'{a}_{j}' for j in JUDGES]].to_numpy(), known.source.to_numpy())
    assert rows.image.tolist() == known.image.tolist()
    assert rows.kept.tolist() == (~said('none')).tolist()
    assert rows['suite.strong'].tolist() == said('strong').tolist()


# ------------------------------------------------------------------ saboteurs
class Coarse(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.decode = model, model.decode

    def posterior(self, x): return self.model.posterior((x*16).round()/16)
    def encode(self, x): return self.model.encode((x*16).round()/16)
    def forward(self, x): return self.decode(self.posterior(x).mode)


class Dice(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.posterior, self.encode = model, model.posterior, model.encode

    def decode(self, code): return self.model.decode(code + 2*torch.randn_like(code))
    def forward(self, x): return self.decode(self.posterior(x).mode)


@pytest.mark.parametrize('saboteur, words', [(Coarse, 'no usable gradient'),
                                             (Dice, 'Two calls give two answers')])
def test_saboteurs_are_named_and_honest_models_are_not(judge, test, saboteur, words):
    low, attack = test.y < 3, preset('attack.output', steps=4, pairs=2)
    few, model = ImageData(test.x[low], test.y[low]), pretrained('mnist/entangled')
    said = lambda f: ' '.join(diagnose(f, judge, attack, few, radii=(.1,)))
    assert words in said(saboteur(model).eval()) and words not in said(model)


def test_random_squares_find_what_a_model_without_a_slope_hides(judge, test):
    attacks = {a: preset(f'attack.{a}', steps=n, restarts=1)
               for a, n in (('strong', 3), ('output_code', 3), ('judge_square', 100))}
    model = pretrained('mnist/entangled')
    half = pairs(test.y, 1)[::2]
    of = lambda f: numbers(measured(NONE, f, [judge, judge], attacks, test, half))
    coarse, honest = of(Coarse(model).eval()), of(model)
    assert coarse['gradient_free'] > coarse['knows'] + 20
    assert honest['knows'] > coarse['knows'] + 20


# ------------------------------------------------------------------ who tries what
def test_the_suite_sees_the_bare_model_and_who_knows_sees_what_is_deployed(monkeypatch):
    seen = []
    def attack(model, x, x_t, a, make, **_):
        seen.append((type(model), x_t is None))
        return type('Found', (), {'x': x})
    monkeypatch.setattr(board, 'attack', attack)
    attacks = {a: preset(f'attack.{a}') for a in ('strong', 'damage_code', 'judge_square')}
    model, judge = pretrained('mnist/entangled'), pretrained_judge('judge/wide')
    test = load('digits', 'test')
    measured(WALK, model, [judge, judge], attacks, test, pairs(test.y, 1)[:2])
    assert dict(zip([c for c, *_ in attempts(WALK, attacks)], seen)) == {
        'suite.strong': (type(model), False)} | {
        f'{c}.{w}': (Corrected, True) for c in ('knows.damage_code', 'free.judge_square')
        for w in ('fixed', 'fresh')}
    assert [c for c, *_ in attempts(NONE, attacks)] == ['suite.strong', 'knows.damage_code',
                                                        'free.judge_square']


def test_of_the_attacks_of_the_main_board_each_sort_is_there():
    sorts = [sort_of(preset(a)) for a in preset('board.main').attacks]
    assert {s: sorts.count(s) for s in sorts} == {'suite': 4, 'knows': 4, 'free': 1}


def test_the_suite_has_as_many_passes_as_those_who_know():
    presets = {a: preset(a) for a in preset('board.main').attacks}
    passes = {a: p.steps*p.restarts*(1 + p.forced) for a, p in presets.items()}
    for goal in ('latent', 'output', 'damage', 'judge'):
        own = [a for a in passes if f'.{goal}' in a and sort_of(presets[a]) != 'free']
        assert len(own) == 2 and len({passes[a] for a in own}) == 1, goal


@pytest.mark.parametrize('change', [{'attack.eps': '0.05, 0.1'}, {'model.heat': '1, 2'},
                                    {'draw': None}])
def test_settings_are_not_averaged_as_if_they_were_seeds(tmp_path, change):
    study = SMOKE.model_copy(update=change) if 'draw' in change else preset('board.smoke', **change)
    with pytest.raises(SettingsError, match='one draw of pairs and one value'):
        board_cells(study, tmp_path)


def test_verdicts_of_noisy_models_cannot_tie():
    for name in (*preset('board.main').models, *preset('board.walk').models, *SMOKE.models):
        assert preset(name).looks % 2 == 1 and (len(preset('board.main').judges) - 1) % 2 == 1


@pytest.mark.parametrize('n', (1, 3))
def test_fixed_noise_is_the_same_at_each_call_and_fresh_noise_is_not(n):
    model, x = deployed(WALK, pretrained('mnist/entangled')), torch.rand(3, 1, 32, 32)
    def of(seed):
        torch.manual_seed(9)  # the target is a draw, too
        return over_noise(OBJECTIVES['output'], n, seed)(model, x.flip(0), 'means', None)
    fixed, fresh = of(5), of(None)
    first = fixed(x)
    assert not torch.equal(fresh(x), fresh(x)) and torch.equal(fixed(x), first)
    torch.manual_seed(5)
    assert torch.equal(fresh(x), first)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    fixed(x)
    assert torch.equal(torch.get_rng_state(), state)  # who asks has their own chance still


def test_the_mean_over_draws_is_that_of_the_values():
    values = iter([1., 5., 2., 4.])
    make = lambda *_: lambda xs: torch.full((2,), next(values))
    J = over_noise(make, 4)(None, None, None, None)
    assert J(torch.zeros(2, 1)).tolist() == [3., 3.]


def test_a_noisy_picture_is_lost_if_most_draws_are():
    calls = iter([[0, 1, 1], [0, 1, 0], [1, 1, 0]])
    class Turns(nn.Module):
        def forward(self, x): return torch.tensor(next(calls)).float().view(3, 1, 1, 1)
    class Says(nn.Module):
        def forward(self, x): return nn.functional.one_hot(x.flatten().long(), 2).float()
    seen = seen_by(Turns().eval(), [Says().eval()], torch.rand(3, 1, 1, 1), draws=3)
    assert seen.tolist() == [[0, 0, 1], [1, 1, 1], [1, 0, 0]]
    assert board.is_lost(seen, [0, 0, 0]).tolist() == [False, True, False]


# ------------------------------------------------------------------ models
def test_a_defended_model_is_found_again_and_another_refused(rehearsed, tmp_path):
    p = of_digits('smooth', tuning=3, inner=1)
    make = lambda p, seed=0: tuned(p, tmp_path, seed, progress=False, runs=rehearsed)
    one, two = make(p), make(p)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    with pytest.raises(TrainingError, match='trained with other settings'):
        make(of_digits('smooth', tuning=4, inner=1))


def test_training_that_is_not_asked_for_changes_nothing_and_other_training_the_encoder(rehearsed):
    weights = lambda name: {k: v for k, v in board.restore(
        {labels['model']: w for labels, w in board_models(rehearsed)}[name], rehearsed,
        makers(rehearsed)).state_dict().items()}
    none, walk, steady = map(weights, ('none', 'one_step', 'steady'))
    assert all(torch.equal(none[k], walk[k]) for k in none)
    moved = {k.split('.')[0] for k in none if not torch.equal(none[k], steady[k])}
    assert moved == {'encoder'}  # (30.11) says nothing of the decoder


def test_the_control_is_trained_by_the_bound_alone(rehearsed, tmp_path):
    p = of_digits('longer', tuning=3)
    found = tuned(p, tmp_path, progress=False, runs=rehearsed)
    start = board.restore(board.base_of(p, 0, rehearsed), rehearsed)
    optimiser = partial(Adam, lr=p.lr)
    fit(start, elbo, load('digits').x, 3, p.batch, optimiser, cosine, 0, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), start.parameters()))


def board_models(runs):
    "The labels and `Weights` of the rehearsal."
    return [(labels, c.model) for labels, c in board_cells(SMOKE, runs)]


def test_models_that_defences_start_from_are_trained_once():
    assert before(SMOKE).models == ('digits.entangled', 'digits.fsq', 'digits.disentangled')
    assert before(SMOKE).train == 'train.rehearsal' and before(SMOKE).seeds == (0,)
    main = before(preset('board.main'))
    assert main.models == ('mnist.entangled', 'mnist.fsq', 'mnist.disentangled')
    assert (main.train, main.seeds) == ('train.full', (0, 1, 2))


# ------------------------------------------------------------------ numbers
def rows_of(**columns):
    "Six pairs of two classes, of which one is not recognised."
    kept = [True, True, True, False, True, True]
    rows = {'source': [0, 0, 0, 0, 1, 1], 'kept': kept, 'certified': math.nan}
    return pd.DataFrame(rows | columns).assign(**PRICED)


def test_rates_by_hand():
    rows = rows_of(**{'suite.a': [1, 0, 0, 1, 0, 0], 'suite.b': [1, 0, 0, 0, 1, 0],
                      'knows.c': [0, 1, 0, 1, 0, 0], 'free.d': [0, 0, 1, 1, 0, 0]})
    said = numbers(rows.astype(dict.fromkeys(rows.filter(regex=r'\.'), bool)))
    assert math.isnan(said.pop('certified'))
    rate = lambda a, b: 100*(a/3 + b/2)/2
    wanted = {'suite': rate(1, 1), 'knows': rate(2, 1), 'gap': rate(1, 0)} | PRICED
    wanted |= {'gradient_free': rate(1, 0), 'recognised': 100*(3/4 + 1)/2}
    assert said == pytest.approx(wanted)


def test_certificates_count_among_the_pairs_that_are_kept():
    rows = rows_of().assign(certified=[True, False, False, True, True, True])
    assert share(rows, rows.certified) == pytest.approx(100*(1/3 + 1)/2)


def test_a_row_is_the_mean_over_seeds_with_students_interval():
    lost = ([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1])
    answers = [({'model': 'a', 'seed': s}, rows_of(**{'knows.x': np.array(v, bool)}))
               for s, v in enumerate(lost)]
    other = [({'model': 'b', 'seed': 0}, answers[0][1])]
    table = board_of([*answers[:2], *other, answers[2]]).set_index('defence')
    rates = [100*(sum(v[:3])/3 + sum(v[4:])/2)/2 for v in lost]
    ends = stats.t.interval(.95, 2, np.mean(rates), stats.sem(rates))
    found = table.loc['a', ['knows', 'low', 'high']].tolist()
    assert ends[0] < 0  # which no share is
    assert found == pytest.approx([np.mean(rates), 0, ends[1]])
    assert table.n.tolist() == [3, 1] and table.loc['b', ['low', 'high']].isna().all()


def test_nats_are_those_of_the_distribution_or_of_the_counted_codes(test):
    x, entangled = pixels(test.x[:50]), pretrained('mnist/entangled')
    kl_z, kl_c = board.kl(entangled.posterior(x))
    assert nats_of(entangled, x) == pytest.approx((kl_z.sum(1) + kl_c).mean().item())
    words = build(preset('mnist.fsq')).eval()
    codes = words.posterior(x).mode.unique(dim=0, return_counts=True)[1]/50
    assert nats_of(words, x) == pytest.approx(-(codes*codes.log()).sum().item(), abs=1e-5)
    assert math.isnan(nats_of(lambda x: x, x))
    assert math.isnan(nats_of(adapt(nn.Sequential(nn.Flatten(), nn.Linear(1024, 4)).eval(), x), x))


def test_a_strangers_model_gets_a_row(judge, test):
    class Half(nn.Module):
        def encode(self, x): return nn.functional.avg_pool2d(x, 2).flatten(1)
        def decode(self, z):
            return nn.functional.interpolate(z.view(-1, 1, 16, 16), scale_factor=2)
    x = pixels(test.x[:4])
    attacks = {a: preset(f'attack.{a}', steps=2, restarts=1) for a in ('output', 'output_code')}
    rows = measured(NONE, adapt(Half().eval(), x), [judge, judge], attacks, test,
                    pairs(test.y, 1)[::9])
    said = numbers(rows)
    assert said['recognised'] > 30 and math.isnan(said['nats']) and math.isnan(said['certified'])
