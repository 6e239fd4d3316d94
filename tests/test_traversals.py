"""Traversals, the latent explorer and the attack playground, by their Python side;
tests/test_e2e.py has the browser's."""
import io, re, time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from vae_robust import explorer as explorer_module
from vae_robust.attacks import attack
from vae_robust.play import AttackPlayground, coloured, curve, bars
from vae_robust.data import load, pixels
from vae_robust.settings import preset
from vae_robust.training import pretrained
from vae_robust.explorer import LatentExplorer
from vae_robust.traversals import (across, along, categories, grid, kl_per_latent, png,
                                   prior_codes, stacked, strip, traversal, traversals)
from vae_robust.vae import VAE

DATA = load('digits', 'test')
decoded = lambda data: np.asarray(Image.open(io.BytesIO(data)))


def test_traversals_move_one_coordinate_and_nothing_else():
    mirror = SimpleNamespace(decode=lambda code: code, n_z=3, n_c=4)  # decodes a code into itself
    code = torch.tensor([[.1, .2, .3, 0, 1, 0, 0]])
    walk = along(mirror, code, 1, [-3, 0, 3])
    assert walk[:, 1].tolist() == [-3, 0, 3]
    assert (walk[:, [0, 2, 3, 4, 5, 6]] == code[:, [0, 2, 3, 4, 5, 6]]).all()
    assert_close(across(mirror, code), torch.cat([code[:, :3].expand(4, 3), torch.eye(4)], 1))


def test_each_of_several_categoricals_moves_by_itself():
    mirror = SimpleNamespace(decode=lambda code: code, n_z=1, n_c=3)
    code = torch.tensor([[.1, 0, 1, 0, 0, 0, 1]])
    first, second = (across(mirror, code, g)[:, 1:].view(3, 2, 3) for g in (0, 1))
    assert torch.equal(first[:, 0], torch.eye(3)) and torch.equal(second[:, 1], torch.eye(3))
    assert first[:, 1].argmax(1).tolist() == [2]*3 and second[:, 0].argmax(1).tolist() == [1]*3
    several = VAE(2, 10, categoricals=2).eval()
    assert len(traversals(several, torch.rand(1, 1, 32, 32)).get_yticks()) == 2 + 2


@pytest.mark.parametrize('K', [0, 3, 12])
def test_categories_have_their_row_however_many_there_are(K):
    model, x = VAE(2, K).eval(), torch.rand(1, 1, 32, 32)
    ax = traversals(model, x, n=5)
    drawn, columns = ax.images[0].get_array(), max(5, K)
    assert len(ax.get_yticks()) == 2 + (K > 0) and drawn.shape == (32*(2 + (K > 0)), 32*columns)
    if K:
        with torch.no_grad():
            expected = grid(across(model, model.posterior(x).mode)[None])[..., 0].numpy()
        assert np.allclose(drawn[64:, :32*K], expected) and (drawn[64:, 32*K:] == 1).all()


def test_priors_of_several_categoricals():
    several = VAE(2, 10, categoricals=2).eval()
    codes = prior_codes(several, 500)[:, 2:].view(500, 2, 10)
    assert codes.sum(-1).eq(1).all() and (codes[:, 0] != codes[:, 1]).any()
    with torch.no_grad():
        assert several.decode(prior_codes(several, 3)).shape == (3, 1, 32, 32)


def test_traversals_pass_through_the_reconstruction(model, digits):
    x, own = digits[:1], model.posterior(digits[:1]).mode[0]
    assert_close(traversal(model, x, 2, [own[2].item()]), model(x))
    assert_close(categories(model, x)[own[5:].argmax()], model(x)[0])


def test_pictures_keep_their_grey_values(digits):
    a = decoded(png(stacked([strip(digits[:2], 3), strip(digits[2:5])], gap=2)))
    assert a.shape == (96 + 2 + 32, 192) and (a[96:98] == 255).all() and (a[98:, 96:] == 255).all()
    assert_close(torch.tensor(a[1:96:3, 1:192:3]/255).float(),
                 torch.cat([*digits[:2, 0]], 1), atol=.51/255, rtol=0)
    both = decoded(png(stacked([strip(digits[:1]), strip(digits[:1].expand(1, 3, 32, 32))],
                               across=True, gap=0)))
    assert both.shape == (32, 64, 3) and (both[:, :32] == both[:, 32:]).all()


def test_colours_of_a_change_differ_for_the_colour_blind():
    less, none, more = coloured(torch.tensor([-1., 0, 1]).view(3, 1, 1, 1))[..., 0, 0]
    # Machado et al. 2009
    blind = {'protanopia': [[.152, 1.053, -.205], [.115, .786, .099], [-.004, -.048, 1.052]],
             'deuteranopia': [[.367, .861, -.228], [.280, .673, .047], [-.012, .043, .969]]}
    for m in map(torch.tensor, blind.values()):
        for a, b in ((less, none), (none, more), (less, more)):
            assert (m @ a - m @ b).norm() > .4


def test_bars_and_curves_show_what_they_are_given():
    a = np.asarray(bars(torch.tensor([1., 0]), torch.tensor([0., 1]), 100))
    grey, blue = (a == (170, 170, 170)).all(-1), (a == (0, 114, 178)).all(-1)
    assert grey[:80, :50].sum() > 10*grey[:80, 50:].sum()
    assert blue[:80, 50:].sum() > 10*blue[:80, :50].sum()
    line = (np.asarray(curve([4, 3, 2, 1, 0], 100, 100)) == (0, 114, 178)).all(-1)
    assert line[:50, :50].sum() > 0
    assert line[50:, 50:].sum() > 0
    assert line[:40, 60:].sum() == line[60:, :40].sum() == 0
    curve([])
    curve([1.])
    curve([1., float('nan'), 1.])


@pytest.fixture
def explorer(model):
    torch.manual_seed(1)
    return LatentExplorer({'one': model, 'two': VAE(5, 4).eval()}, DATA)

def shown(e):
    "The right one of the upper pictures."
    return torch.tensor(decoded(e.image.value)[2:160:5, 162:320:5]/255).float()


def test_explorer_begins_with_the_reconstruction(explorer, model):
    x = pixels(DATA.x[:1])
    assert_close(explorer.code, model.posterior(x).mode)
    assert_close(shown(explorer), model(x)[0, 0].detach(), atol=.51/255, rtol=0)


def test_explorer_orders_latents_by_what_they_say(explorer, model):
    kl_z, _ = kl_per_latent(model, pixels(DATA.x))
    assert explorer.order == kl_z.argsort(descending=True).tolist()
    assert [s.description for s in explorer.sliders] == [f'z{j}: {kl_z[j]:.2f} nats'
                                                         for j in explorer.order]


@pytest.mark.parametrize('k', range(5))
def test_a_slider_moves_its_latent_alone(explorer, model, k):
    before, j = explorer.code, explorer.order[k]
    explorer.sliders[k].value = 2.5
    others = [i for i in range(9) if i != j]
    assert explorer.code[0, j] == 2.5 and torch.equal(explorer.code[:, others], before[:, others])
    assert_close(shown(explorer), model.decode(explorer.code)[0, 0].detach(), atol=.51/255, rtol=0)
    walk = strip(along(model, explorer.code, j, torch.linspace(-3, 3, 10)))
    assert (decoded(explorer.image.value)[-32:] == np.asarray(walk)).all()
    assert f'z{j} = -3 to 3' in explorer.note.value


def test_buttons_of_the_explorer(explorer, model, tmp_path, monkeypatch):
    rest = explorer.image.value
    explorer.category.value = next(k for k in range(4) if k != explorer.category.value)
    assert (decoded(explorer.image.value)[-32:, :128]
            == np.asarray(strip(across(model, explorer.code)))).all()
    explorer.sliders[0].value = 2
    explorer.reset.click()
    assert explorer.image.value == rest
    explorer.name.value = 'two'
    assert_close(explorer.code, explorer.models['two'].posterior(pixels(DATA.x[:1])).mode)
    explorer.name.value, explorer.index.value = 'one', 3
    assert_close(explorer.code, model.posterior(pixels(DATA.x[3:4])).mode)
    monkeypatch.setattr(explorer_module, 'root', lambda: tmp_path)
    explorer.save.click()
    assert (tmp_path/'runs'/'explorer.png').read_bytes() == explorer.image.value
    assert 'Saved' in explorer.note.value


def test_explorer_takes_a_digit_of_ones_own(explorer, model):
    own = png(strip(pixels(DATA.x[7:8])))
    explorer.upload.value = ({'name': 'own.png', 'type': 'image/png', 'size': len(own),
                              'content': own, 'last_modified': datetime.now(timezone.utc)},)
    assert_close(explorer.code, model.posterior(pixels(DATA.x[7:8])).mode, atol=1e-3, rtol=1e-3)
    explorer.upload.value = ({**explorer.upload.value[0], 'content': b'words'},)
    assert 'not a picture' in explorer.note.value
    explorer.index.value = 2
    assert_close(explorer.x, pixels(DATA.x[2:3]))


def test_explorer_takes_one_model_and_one_without_a_categorical():
    explorer = LatentExplorer(VAE(3).eval(), DATA, index=5)
    explorer.sliders[2].value = 1
    assert explorer.code.shape == (1, 3) and explorer.code[0, explorer.order[2]] == 1


@pytest.fixture
def play():
    judge = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    return AttackPlayground({n: pretrained(f'mnist/{n}') for n in ('disentangled', 'entangled')},
                            {'linear': judge}, DATA)


KNOWS = {False: {}, True: dict(forced=True, features='codes')}
CASES = [('latent', 0, False), ('latent', 1, False), ('judge', 0, False),
         ('latent', 0, True), ('output', 0, True)]

@pytest.mark.parametrize('objective, lam, knows', CASES)
def test_playground_finds_what_the_attack_finds(play, objective, lam, knows):
    play.sliders['steps'].value = 12
    play.sliders['lam'].value = lam
    play.objective.value = objective
    play.knows.value = knows
    play.run.click()
    play.thread.join()
    select = ('decoded' if objective == 'latent' else 'hard') if knows else 'surrogate'
    keys = dict(objective=objective, lam=lam, steps=12, select=select)
    p, x, x_t = preset('attack.strong', **keys, **KNOWS[knows]), play.x, play.x_t
    assert (DATA.y[(pixels(DATA.x) == x).flatten(1).all(1)] == 3).all()
    assert (DATA.y[(pixels(DATA.x) == x_t).flatten(1).all(1)] == 8).all()
    judge = play.judges['linear']
    for (name, model), f, (before, after) in zip(play.models.items(), play.found, play.outcome):
        want = attack(model, x, x_t, p, judge=judge, progress=False).x
        assert_close(f.best, want)
        assert lam or (f.best - x).abs().max() > .09
        assert judge(model(x)).argmax().item() == before
        assert judge(model(want)).argmax().item() == after
        assert f'<b>{name}</b>: the judge saw {before}, now {after}.' in play.note.value
    assert play.bar.value == play.bar.max == 26*(1 + knows)


def test_playground_draws_the_final_state(play):
    rest = play.image.value
    play.run.click()
    play.thread.join()
    a = decoded(play.image.value)
    attacked = a[28:124:3, 306:402:3, 0][:32, :32]  # the fourth picture of the first row
    assert_close(torch.tensor(attacked/255).float(), play.found[0].best[0, 0], atol=.51/255, rtol=0)
    play.sliders['number'].value += 1
    assert play.found == [None, None]
    assert play.image.value not in (rest, '')
    assert decoded(play.image.value).shape == a.shape


def test_playground_stops_and_keeps_the_best_so_far(play):
    play.sliders['steps'].value = 1000
    play.knows.value = False
    play.run.click()
    assert play.run.disabled and play.sliders['source'].disabled and not play.stop.disabled
    while not (play.found[0] and len(play.found[0].trace) > 20):
        time.sleep(.005)
    play.stop.click()
    play.thread.join(20)
    f = play.found[0]
    assert not play.thread.is_alive()
    assert 20 < len(f.trace) < 900
    assert play.stop.disabled
    assert not play.run.disabled
    assert f.lowest == torch.stack(f.trace).min() and f.lowest < f.trace[0]
    assert (f.best - play.x).abs().max() <= .1 + 1e-6
    play.run.click()  # and it can be run again
    play.stop.click()
    play.thread.join(20)
    assert not play.thread.is_alive()


def test_playground_says_what_went_wrong(play):
    play.judges['linear'] = lambda x: 1/0
    play.objective.value = 'judge'
    play.run.click()
    play.thread.join(60)
    assert play.note.value.startswith('The attack failed: ZeroDivisionError')
    assert not play.run.disabled and play.stop.disabled


def test_playground_draws_while_it_runs(play):
    pictures = set()
    def seen(change):
        pictures.add(change.new)
        if len(pictures) == 3:  # the others would be no news
            play.stop.click()
    play.image.observe(seen, 'value')
    play.sliders['steps'].value = 400
    play.run.click()
    play.thread.join()
    assert len(pictures) >= 3


def test_what_the_readme_shows_can_be_played_with():
    readme = (Path(__file__).parent.parent/'README.md').read_text()
    example = re.search(r'```py\n(.*?)```', readme, re.S)[1]
    example = example.replace("load('mnist'", "load('digits'")
    *before, last = example.strip().splitlines()
    exec('\n'.join(before), scope := {})
    play = eval(last.removesuffix('.box'), scope)
    play.run.click()
    play.thread.join()
    assert len(play.outcome) == 2 and play.box.children
