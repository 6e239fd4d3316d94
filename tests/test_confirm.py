"The protocol's study, on tables and models whose answers are known."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from vae_robust.concrete import on_levels
from vae_robust.experiments import confirm
from vae_robust.experiments.confirm import (ALL, CONTRASTS, DOUBLED, JUDGES, TARGETED,
                                            Nearest, any_loses, arm_of, by_other_rules)
from vae_robust.experiments.confirm import arm_row, class_rates, is_lost, lost_cells, measures
from vae_robust.experiments.confirm import on_fewer_pairs, one_row_each, pairs_of, plainly_named, radii_of
from vae_robust.experiments.confirm import radius_cells, rate_contrast, six_tests, wide_table
from vae_robust.radius import ladder, lowest_rung
from vae_robust.settings import preset
from vae_robust.vae import VAE, Posterior

FRAME = pd.DataFrame([(s, t, 10*s + t) for s in range(10) for t in range(10) if s != t],
                     columns=['source', 'target', 'image'])


def seen(rng, model, seed, rate=.3):
    "A model's rows, each judge with a mind of its own."
    see = lambda: np.where(rng.random(90) < rate, FRAME.target, FRAME.source)
    return FRAME.assign(model=model, seed=seed,
                        **{f'{w}_{j}': see() for w in ('none', *TARGETED) for j in JUDGES})


@pytest.mark.parametrize('classes, yes', [
    ([3, 3, 3], False), ([3, 3, 8], False), ([3, 8, 5], True), ([8, 8, 3], True), ([3], False),
    ([4], True)])
def test_lost_is_what_most_judges_do_not_recognise(classes, yes):
    assert is_lost([classes], [3]).tolist() == [yes]


def test_the_nearest_images_vote_as_a_sorted_list_does():
    g = torch.Generator().manual_seed(0)
    x, y, q = torch.rand(50, 1, 3, 3,
                         generator=g), torch.arange(50) % 4, torch.rand(7, 1, 3, 3, generator=g)
    near = (q.flatten(1)[:, None] - x.flatten(1)).square().sum(-1).argsort(1)[:, :5]
    votes = torch.stack([torch.bincount(y[i], minlength=4) for i in near])/5
    assert torch.allclose(Nearest(x, y)(q).float(), votes)


def test_rates_by_a_loop_over_models_judges_and_classes():
    rng = np.random.default_rng(0)
    table = pd.concat([seen(rng, m, s) for m in ('arm_a', 'arm_b') for s in (101, 100)])
    rate = lambda r, w: sum(r[f'{w}_{j}'] != r.source for j in JUDGES) >= 2
    gaps = []
    for i in (100, 101):
        for j in (100, 101):
            a, b = (table[(table.model == m) & (table.seed == s)].reset_index(drop=True)
                    for m, s in (('arm_a', i), ('arm_b', j)))
            keep = ~rate(a, 'none') & ~rate(b, 'none')
            fell = [(rate(r, TARGETED[0]) | rate(r, TARGETED[1])).astype(float) for r in (a, b)]
            differ = (fell[0] - fell[1])[keep]
            gaps.append(100*differ.groupby(a.source[keep]).mean().mean())
    assert np.isclose(rate_contrast(table, 'arm_a', 'arm_b', n=20)[0].estimate, np.mean(gaps))


def test_other_rules_by_a_loop_over_models():
    rng = np.random.default_rng(4)
    arms = (('arm_a', .2), ('arm_b', .4))
    table = pd.concat([seen(rng, m, s, rate) for m, rate in arms for s in (0, 1)])
    found = by_other_rules(table, 'arm_a', 'arm_b', judges=['wide'], n=20).difference
    most = lambda r, w: sum(r[f'{w}_{j}'] != r.source for j in JUDGES) >= 2
    wide = lambda r, w: r[f'{w}_wide'] != r.source
    def gap(keeps, falls):
        a_0, a_1, b_0, b_1 = (r for _, r in table.groupby(['model', 'seed']))
        rates = []
        for a, b in ((a_0, b_0), (a_0, b_1), (a_1, b_0), (a_1, b_1)):
            k = keeps(a) & keeps(b)
            rates.append((falls(a)[k] - falls(b)[k]).groupby(a.source[k]).mean().mean())
        return 100*np.mean(rates)
    by = lambda see: lambda r: (see(r, TARGETED[0]) | see(r, TARGETED[1])).astype(float)
    assert np.isclose(found['wide alone'], gap(lambda r: ~wide(r, 'none'), by(wide)))
    lost = lambda r: np.maximum(by(most)(r), most(r, 'none').astype(float))
    assert np.isclose(found['not right counts as lost'], gap(lambda r: r.source >= 0, lost))
    own = [np.mean([100*by(most)(r)[~most(r, 'none')].groupby(r.source).mean().mean()
                    for _, r in t.groupby('seed')]) for _, t in table.groupby('model')]
    assert np.isclose(found['own kept pairs'], own[0] - own[1])


def test_attacks_on_fewer_pairs_have_a_table_of_their_own():
    rows = pd.DataFrame({'source': range(4)})
    answers = [({'attack': a}, rows[:n]) for a, n in (('noise', 4), ('thesis', 2), ('strong', 4))]
    assert [labels['attack'] for labels, _ in on_fewer_pairs(answers)] == ['thesis']
    assert on_fewer_pairs(answers[:1]) == []


def test_an_arm_is_sorted_by_seed_and_keeps_the_order_of_pairs():
    rng = np.random.default_rng(1)
    later, first = seen(rng, 'arm_a', 7), seen(rng, 'arm_a', 2)
    kept, fell = arm_of(pd.concat([later, first]), 'arm_a', TARGETED[:1])
    assert kept.shape == fell.shape == (2, 90)
    assert (kept[0] == ~is_lost(first[[f'none_{j}' for j in JUDGES]], first.source)).all()
    assert (fell[1] == is_lost(later[[f'latent_code_{j}' for j in JUDGES]], later.source)).all()


def test_a_class_weighs_as_much_as_another():
    classes = np.array([0, 0, 0, 1])
    kept, fell = np.array([[1, 1, 0, 1]], bool), np.array([[1, 0, 1, 1]], bool)
    assert class_rates((kept, fell), classes) == [75]


def test_the_tables_columns_are_attacks_and_judges():
    rows = pd.DataFrame({'source': [3, 5], 'target': [8, 3], 'image': [0, 1],
                         'objective_before': 0.,
                         'wide_before': [3, 9], 'wide_after': [8, 5]})
    table = one_row_each([('noise', rows), ('thesis', rows[:1])])
    assert table.columns.tolist() == ['source', 'target', 'image', 'none_wide', 'noise_wide']
    answers = [({'model': m, 'seed': s, 'attack': 'noise'}, rows) for m in 'ab' for s in (0, 1)]
    both = wide_table(answers)
    assert both.model.tolist() == list('aaaabbbb') and both.seed.tolist() == 2*[0, 0, 1, 1]


def test_an_attack_is_not_asked_again_about_what_another_has_lost(monkeypatch):
    asked = []
    def attack(model, x, x_t, p, eps, judge, progress):
        asked.append((p.goal, len(x), None if x_t is None else len(x_t), eps.tolist()))
        return SimpleNamespace(x=x + (1 if p.goal == 'away' else 0))
    monkeypatch.setattr(confirm, 'attack', attack)
    monkeypatch.setattr(confirm, 'reconstruct', lambda model, x: x)
    bright = nn.Module().eval()
    bright.forward = lambda x: nn.functional.one_hot((x.flatten(1).sum(1) > .5).long(), 2).float()
    x = torch.tensor([0., 1., 0.]).view(3, 1, 1, 1)
    targeted, away = preset('attack.output'), preset('attack.damage')
    of = any_loses(None, [bright], [targeted, away], None, x, x, torch.zeros(3, dtype=torch.long))
    assert of(torch.tensor([1, 2]), torch.tensor([.5, .25])).tolist() == [True, True]
    assert asked == [('target', 2, 2, [.5, .25]), ('away', 1, None, [.25])]


def test_the_smallest_radius_of_a_judge_that_compares_two_halves():
    halves = nn.Module().eval()
    halves.forward = lambda x: x.flatten(1)
    itself = SimpleNamespace(posterior=lambda x: Posterior(Normal(x.flatten(1), 1.), None),
                             decode=lambda code: code.view(-1, 1, 1, 2))
    x = torch.tensor([[.6, .5], [.7, .4], [.95, .05]]).view(3, 1, 1, 2)
    asked = any_loses(itself, 3*[halves], [preset('attack.judge_untargeted', steps=6)], halves, x,
                      None,
                      torch.zeros(3, dtype=torch.long))
    rung = lowest_rung(asked, 3, ladder())
    best = [(ladder() >= r).nonzero().max().item() for r in (.05, .15)]
    assert all(0 <= b - r <= 1 for b, r in zip(best, rung.tolist())) and rung[2] == -1


def test_both_measures_name_whole_presets_the_draw_and_all_attacks_that_count(tmp_path):
    study = preset('study.rehearsal')
    cells = [c for _, c in lost_cells(study, tmp_path)]
    assert {c.options['draw'] for c in cells} == {1} and preset('study.confirm').draw == 20261201
    assert {c.measure for c in cells} == {'lost'}
    radii = [c for _, c in radius_cells(study.model_copy(update={'draw': 5}), tmp_path)]
    assert len(radii) == 2 and all(c.options['draw'] == 5 for c in radii)
    assert [p['steps'] for p in radii[0].options['attacks']] == [1, 1]


def test_the_arms_are_those_of_the_protocol():
    arms = {a: preset(f'mnist.arm_{a}') for a in 'abcde'}
    assert {a: (p.n_c or 0, p.steps) for a, p in arms.items()} == {
        'a': (10, 40_000), 'b': (10, 60_000), 'c': (0, 40_000), 'd': (10, 60_000), 'e': (0, 60_000)}
    assert {p.schedule for p in arms.values()} == {'warm'}
    assert {p.batch for p in arms.values()} == {64}
    assert [(arms[a].C_z, arms[a].C_steps, arms[a].gamma) for a in 'acde'] == [
        (5, 25_000, 30), (7.3, 25_000, 30), (19, 50_000, 30), (21.3, 50_000, 30)]
    s = preset('study.confirm')
    assert s.models == tuple(f'mnist.arm_{a}' for a in 'abcde')
    assert s.seeds == tuple(range(100, 106))  # a deviation, chapter 27
    assert {f'attack.{a}' for a in (*ALL[2:], *DOUBLED)} <= set(s.attacks)
    assert not {f'attack.{a}' for a in TARGETED} & set(s.attacks)
    assert list(s.judges) == ['judge.residual', *(f'judge.{j}' for j in JUDGES)]


def test_six_tests_are_corrected_together():
    rng = np.random.default_rng(2)
    arms = {m for pair in CONTRASTS.values() for m in pair}
    rates = pd.concat([seen(rng, m, s, .1 if m == 'arm_a' else .6) for m in sorted(arms)
                       for s in range(3)])
    rungs = pd.concat([FRAME.assign(model=m, seed=s, kept=True, rung=rng.integers(20, 30, 90))
                       for m in sorted(arms) for s in range(3)])
    found = six_tests(rates, rungs, n=400)
    assert len(found) == 6 and (found.p_holm >= found.p).all() and (found.p_holm <= 6*found.p).all()
    assert found.estimate[0] < -30 and found.estimate[2] > 30
    ratios = found[found.measure == 'radius']
    assert ((ratios.low < ratios.estimate) & (ratios.estimate < ratios.high)).all()
    assert (ratios.low > 0).all()


def test_an_image_that_is_never_lost_has_an_infinite_radius():
    kept, values = radii_of(FRAME.assign(model='m', seed=0, kept=True, rung=-1), 'm')
    assert kept.all() and np.isinf(values).all() and values.shape == (1, 90)


@pytest.mark.parametrize('arm, seed, attack', [
    ('arm_c', 101, 'noise'), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in [
        ('arm_a', 102, 'latent_code_starts'), ('arm_b', 100, 'judge_untargeted_code'),
        ('arm_d', 102, 'output_code_starts'), ('arm_e', 101, 'damage_code'),
        ('arm_a', 103, 'strong')])])
def test_published_cells_are_found_again(tmp_path, arm, seed, attack):
    study = preset('study.confirm', models=(f'mnist.{arm}',), seeds=(seed,), pairs=(8,),
                   attacks=(f'attack.{attack}',))
    (_, cell), = lost_cells(study, tmp_path)
    published = measures('confirm')[0].query('model == @arm and seed == @seed')
    again = plainly_named(wide_table([({'model': arm, 'seed': seed, 'attack': attack},
                                       pairs_of(cell, tmp_path))]))
    for column in again.columns:
        assert (again[column].to_numpy() == published[column].to_numpy()).mean() > .99


def test_the_nats_of_rounded_scalars_are_counted():
    torch.manual_seed(0)
    model, x = on_levels(VAE(0, 3, categoricals=2)), torch.rand(500, 1, 32, 32)
    model.encoder[-1].norm.momentum = 1.
    with torch.no_grad():
        model.encoder(x)  # so that the normalisation has seen them
        model.eval()
        codes = model.posterior(x).c.mode.flatten(1)
    n = torch.tensor([(codes == c).all(1).sum() for c in codes.unique(dim=0)])/500.
    row = arm_row(model, x)
    assert len(n) > 2 and row['kl_z'] == 0
    assert row['kl_c'] == pytest.approx(-(n*n.log()).sum().item(), rel=1e-5)
