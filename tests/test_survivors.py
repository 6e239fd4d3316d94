"""Lines of the package that could once be changed without a test that noticed: a wrong split, the
other rate, an interval that was not the one, a draw that was another."""
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from torch import nn

from vae_robust import cli, diagnosis, judges, robustness
from vae_robust.experiments import board
from vae_robust.data import ImageData, attributes, cartoons, load, pixels, resize
from vae_robust.discrete import FIRST, SELECT, SLACK, nearby, planned
from vae_robust.experiments import confirm, faces, interchange, series, tables
from vae_robust.experiments.confirm import JUDGES, TARGETED, goal_table, six_tests, worded
from vae_robust.judges import judge_loss, judge_optimiser, pretrained_judge, shifted_judge_loss
from vae_robust.judges import train_judge
from vae_robust.objectives import margin
from vae_robust.robustness import against_radius, counts, pairs, transfer, verdicts
from vae_robust.settings import Study, preset
from vae_robust.studies import judges_of, trials
from vae_robust.training import pretrained

from test_board import NONE
from test_cli import invoked
from test_confirm import FRAME, seen
from test_robustness import Brightest
from test_verdict import rows as verdict_rows

ARMS = [(m, s) for m in ('arm_a', 'arm_b') for s in range(3)]


def counted(*verdicts): return counts(*map(torch.tensor, verdicts))


# ------------------------------------------------------------------ which images
def test_pairs_of_a_study_are_of_test_images(tmp_path):
    study = Study(models='digits.entangled', train='train.smoke', seeds='0', judges='judge.smoke',
                  attacks='attack.none', pairs='1')
    (_, rows), = trials(study, tmp_path, jobs=1, progress=False)
    assert (load('digits', 'test').y[rows.image.tolist()].numpy() == rows.source).all()


@pytest.mark.parametrize('name', ['mnist.entangled', 'its file'])
def test_the_command_attacks_test_images(monkeypatch, name):
    used, found = [], counted([3], [8], [3], [5])
    stub = lambda model, judge, a, test, *_, **kw: used.append(test) or found
    monkeypatch.setattr('vae_robust.robustness.evaluate', stub)
    file = cli.root()/'vae_robust/weights/mnist/entangled/seed0.safetensors'
    invoked('attack', file if name == 'its file' else name, 'attack.none')
    assert torch.equal(used[0].y, load('mnist', 'test').y)


def test_no_digit_is_in_both_parts():
    parts = (load('digits', part, 8).x.flatten(1).numpy() for part in ('train', 'test'))
    train, test = ({bytes(x) for x in part} for part in parts)
    assert not train & test


def test_targets_are_drawn_as_sources_are():
    y = load('digits', 'test').y
    a, b = (pairs(y, 1, seed)[:, 1] for seed in (0, 1))
    assert (a != b).float().mean() > .8


@pytest.mark.parametrize('module, ask', [(confirm, confirm.rungs_of),
                                         (interchange, interchange.swaps_of)])
def test_the_pairs_are_those_of_the_draw(module, ask, monkeypatch, smoke_job):
    def stop(y, n, seed=0): raise KeyError(seed)
    monkeypatch.setattr(module, 'pairs', stop)
    study = preset('study.rehearsal', draw=7, train='train.smoke', models='digits.entangled',
                   judges='judge.smoke')
    (_, cell), = confirm.radius_cells(study, smoke_job/'runs')
    with pytest.raises(KeyError, match='7'):
        ask(cell, smoke_job/'runs')


def test_pictures_that_are_wide_enough_are_made_high_enough():
    assert resize(torch.zeros(3, 1, 28, 32, dtype=torch.uint8), 32).shape == (3, 1, 32, 32)


# ------------------------------------------------------------------ which rate
def test_the_command_prints_the_rate_of_any_other_class(monkeypatch):
    found = counted([3, 3], [8, 8], [3, 3], [5, 8])  # both missed, one hit
    monkeypatch.setattr('vae_robust.robustness.evaluate', lambda *a, **kw: found)
    said = invoked('attack', 'mnist.entangled', 'attack.none')
    assert 'mean AS ignore-target 100.0 %' in said


def test_both_rates_against_the_radius(monkeypatch):
    found = counted([3]*4, [8]*4, [3]*4, [5, 8, 3, 3])
    monkeypatch.setattr(robustness, 'evaluate', lambda *a, **kw: found)
    table = against_radius(None, None, preset('attack.strong'), None, [.1])
    assert table.values.tolist() == [[.1, 50, 25]]


def test_gaps_add_up_targets():
    def of(model, seed, source, rates):
        both = zip((2, 3), (1, 3), rates)
        return [dict(model=model, seed=seed, attack='x', source=source, target=t, kept=n,
                     missed=r*n, hit=0) for t, n, r in both]
    kinds = ('disentangled', (0, 1)), ('entangled', (1, 0))
    rows = [of(m, s, k, rates) for m, rates in kinds for s in range(3) for k in (0, 1)]
    assert tables.gaps(pd.DataFrame(sum(rows, []))).difference[0] == pytest.approx(50)


def test_the_worst_case_is_that_of_every_judge():
    one, two = verdict_rows([8, 3, 5, 5]), verdict_rows([3, 8, 5, 5])
    both = [t.assign(wide_before=t.residual_before, wide_after=t.residual_after) for t in (one, two)]
    found = tables.over_all(both)
    assert found.residual_after.tolist() == found.wide_after.tolist() == [8, 8, 5, 5]


def test_the_objective_of_a_series_is_that_after_the_attack():
    assert series.mean_success_rate(verdict_rows([8, 3, 5, 5]), 'residual') == (25, 1)


def test_the_last_goal_is_the_target(monkeypatch):
    rng = np.random.default_rng(0)
    t = pd.concat([seen(rng, m, s, .3) for m, s in ARMS if s < 2])
    for attack in ('latent_code', 'output_code'):
        t[[f'{attack}_{j}' for j in JUDGES]] = 99  # lost, and no target
    monkeypatch.setattr(confirm, 'GOALS', {'T1 or T2': TARGETED})
    assert goal_table(t, 'arm_a', 'arm_b', n=20).arm_a.tolist() == [100, 0]


# ------------------------------------------------------------------ which interval
def test_words_need_corrected_p_values_and_the_narrower_interval():
    tests = pd.DataFrame({'measure': ['rate', 'rate', 'radius'], 'p': [.03, .001, .9],
                          'estimate': [5.5, 5.5, 0.], 'low': -9., 'high': 9.,
                          'low_90': [1., 1, -.1], 'high_90': [9., 9, .1]})
    assert worded(tests).word.tolist() == ['undecided', 'differs', 'the same']


def test_the_narrower_interval_is_narrower_and_the_smaller_arm_is_counted():
    rng = np.random.default_rng(0)
    rates = pd.concat([seen(rng, m, s, .2 + .2*(m == 'arm_b')) for m, s in ARMS])
    rung = lambda m, s: FRAME.assign(model=m, seed=s, kept=True, rung=rng.integers(20, 30, 90))
    rungs = pd.concat([rung(m, s) for m, s in ARMS])
    t = six_tests(rates, rungs, {'Q': ('arm_a', 'arm_b')}, n=300)
    assert ((t.low < t.low_90) & (t.high_90 < t.high)).all() and t.p_welch.between(0, 1).all()
    few = rates[(rates.model == 'arm_a') | (rates.seed < 2)]
    assert six_tests(few, rungs, {'Q': ('arm_a', 'arm_b')}, n=50).n.tolist() == [2, 3]


# ------------------------------------------------------------------ which attack
def test_each_forced_run_asks_for_its_own_code_also_in_double_precision(model, digits):
    model, x = model.double(), digits[:5].double()  # a million and a margin: too much for float32
    l, rows = model.posterior(x).c.logits, torch.tensor([1, 4])
    runs = planned(preset('attack.damage_code', restarts=3), model, x, None).runs
    for run, code in zip(runs, nearby(l, 3)):
        missing = run(rows)[0](x[rows]) - FIRST
        torch.testing.assert_close(missing, (SLACK + margin(l, code))[rows])


@pytest.mark.parametrize('name, kind', [('latent_code', 'decoded'), ('damage_code', 'code'),
                                        ('output_code', 'hard')])
def test_iterates_are_chosen_as_the_preset_says(model, digits, name, kind):
    p, (x, xs, x_t) = preset(f'attack.{name}'), digits[:15].split(5)
    aim = None if p.goal == 'away' else x_t
    with torch.no_grad():
        model.encoder[-1].weight[10:] *= 50  # codes that change
    rank = planned(p, model, x, aim).rank(torch.arange(5))
    torch.testing.assert_close(rank(xs), SELECT[kind](p, model, x, aim)(xs))


def test_diagnose_asks_what_it_says(monkeypatch):
    digits, judge, made = load('digits', 'test'), pretrained_judge('judge/residual'), []
    test = ImageData(*(a[digits.y < 3] for a in digits))
    p = preset('attack.output_soft', pairs=1, steps=2, eps=.2)
    def noting(f): return lambda m, j, q, *a, **kw: (made.append(q), f(m, j, q, *a, **kw))[1]
    for name in ('attacked', 'trial'):
        monkeypatch.setattr(diagnosis, name, noting(getattr(diagnosis, name)))
    diagnosis.diagnose(pretrained('mnist/disentangled'), judge, p, test)
    wanted = dict(steps=4), dict(steps=0, noise=1.), dict(optimiser='square', step=.3, steps=20)
    assert {p.model_copy(update=c) for c in wanted} <= {*made}
    assert [q.eps for q in made if q.forced] == [.2, .2]


# ------------------------------------------------------------------ what judges see
def test_verdicts_sample_and_drop_out_if_the_preset_says_so(monkeypatch):
    asked = []
    rebuild = lambda m, x, sample=False: asked.append(sample) or x
    judge = lambda j, x, dropout=False: asked.append(dropout) or x
    monkeypatch.setattr(robustness, 'reconstruct', rebuild)
    monkeypatch.setattr(robustness, 'judged', judge)
    p = preset('attack.none', sample=True, dropout=True)
    verdicts(None, {'j': None}, p, {'after': torch.zeros(2, 3)})
    assert asked == [True, True]


class Sevens(Brightest):
    def see(self, x): return 0*x + torch.eye(32)[7]


def test_transfer_is_of_pairs_that_all_keep_and_from_one_model_to_another():
    x, y = torch.full((20, 1, 32, 32), .4), torch.arange(20) % 10
    x[range(20), ..., y] = .46
    models = {'sound': Brightest().eval(), 'sevens': Sevens().eval()}
    a = preset('attack.strong', features='means', pairs=1)
    table = transfer(models, nn.Identity().eval(), a, ImageData((255*x).round().byte(), y))
    assert table.values.tolist() == [[100, 0], [0, 0]]


@pytest.mark.parametrize('shift', [False, True])
def test_a_judge_learns_what_its_preset_says(tmp_path, monkeypatch, shift):
    learnt = []
    fit = lambda model, objective, *a, **kw: learnt.append(objective) or pd.DataFrame()
    monkeypatch.setattr(judges, 'fit', fit)
    train_judge(preset('judge.smoke', shift=shift), tmp_path)
    assert learnt == [shifted_judge_loss if shift else judge_loss]
    assert judge_optimiser(preset('judge.thesis'))[0].keywords == dict(lr=.01, momentum=.5)


def test_judges_are_trained_anew_too(tmp_path):
    w = judges_of(preset('job.scratch'), tmp_path)['residual']
    assert (w.home, w.hash, w.seed) == ('judge.residual', '', 0)


# ------------------------------------------------------------------ boards and faces
def test_the_verdict_is_of_what_is_deployed(monkeypatch):
    judge, test = pretrained_judge('judge/wide'), load('digits', 'test')
    monkeypatch.setattr(board, 'deployed', lambda p, m: torch.zeros_like)
    attacks = {'none': preset('attack.none')}
    rows = board.measured(NONE, pretrained('mnist/entangled'), [judge]*2, attacks, test,
                          pairs(test.y, 1))
    assert rows.kept.mean() == .1  # black is one class for ever


def test_certificates_are_asked_at_the_largest_radius_and_attackers_do_not_judge(monkeypatch):
    judge, test, asked = pretrained_judge('judge/wide'), load('digits', 'test'), []
    none = lambda m, x, eps: asked.append(eps) or torch.zeros(len(x))
    monkeypatch.setattr(board, 'certified', none)
    attacks = {k: preset('attack.none', eps=eps) for k, eps in (('a', .05), ('b', .2))}
    board.measured(NONE, pretrained('mnist/entangled'), [lambda x: 1/0, judge], attacks, test,
                   pairs(test.y, 1)[::9])
    assert asked == [.2]


def test_the_error_of_a_board_is_per_image():
    model, x = pretrained('mnist/entangled'), pixels(load('digits', 'test').x[:7])
    with torch.no_grad():
        by_hand = (model(x) - x).square().sum().item()/7
    assert board.price(model, model, x)['error'] == pytest.approx(by_hand, rel=1e-4)


def test_disagreement_by_hand():
    says = torch.tensor([[9., -9.]])
    same, other = (faces.disagreement(says, a).item() for a in (says/9, -says))
    assert same < .01 < 17 < other


def test_kept_is_what_is_true_of_the_source(monkeypatch):
    test, a = cartoons('test', {'test': 12}), preset('attack.none', pairs=4)
    truth = attributes('cartoons', test.y[faces.face_pairs(4, 12)[0]])[1]
    stubs = {'sees': lambda judge, x: truth, 'ratios': lambda *a: {},
             'attacked_faces': lambda m, j, a, x, x_t, seed: x, 'reconstruct': lambda m, x: x}
    for name, f in stubs.items():
        monkeypatch.setattr(faces, name, f)
    assert faces.attribute_trial(SimpleNamespace(), None, a, 'cartoons', test).kept.all()
