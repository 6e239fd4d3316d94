"""Pictures that are replaced, wrapped models and values at the ends: answers are about what is there
now, and about what is inside."""
import math

import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from torch.distributions import Normal, OneHotCategorical
from torch.optim.swa_utils import AveragedModel

from vae_robust.attacks import attack, relative_weights
from vae_robust.data import images, load
from vae_robust.diagnosis import diagnose
from vae_robust.discrete import has_code
from vae_robust.judges import judged, pretrained_judge, train_judge
from vae_robust.objectives import AttackError, divergence
from vae_robust.robustness import reconstruct
from vae_robust.settings import Study, preset, root
from vae_robust.studies import trials
from vae_robust.sweep import SweepError
from vae_robust.training import TrainingError, pretrained
from vae_robust.vae import VAE, Posterior
from vae_robust.yours import ModelError, own_judge

DIGITS = load('digits')
X = DIGITS.x[:8]/255


def drawn(top, invert=False):
    "A folder with 120 digits in folders of their classes, parts train and test."
    for part, here in (('train', slice(0, 100)), ('test', slice(100, 120))):
        for i, (x, y) in enumerate(zip(DIGITS.x[here], DIGITS.y[here])):
            file = top/part/str(y.item())/f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            a = x[0].numpy()
            Image.fromarray(255 - a if invert and part == 'test' else a).save(file)
    return f'images:{top}'


def test_a_study_asks_again_when_its_test_pictures_are_others(tmp_path, monkeypatch):
    name, runs = drawn(tmp_path/'pictures'), tmp_path/'runs'
    own = tmp_path/'own.ini'
    own.write_text((root()/'settings.ini').read_text() + f"""
[own.entangled]
like = digits.entangled
data = {name}
n_data = 100
[judge.own]
like = judge.smoke
data = {name}
""")
    monkeypatch.setenv('VAE_ROBUST_SETTINGS', str(own))
    study = Study(models='own.entangled', train='train.smoke', seeds='0', judges='judge.own',
                  attacks='attack.noise', pairs='1')
    ask = lambda: trials(study, runs, jobs=1, progress=False)[0][1]
    first = ask()
    assert first.equals(ask()) and len([*(runs/'cells').glob('*.csv')]) == 1
    drawn(tmp_path/'pictures', invert=True)
    assert not first.equals(ask()) and len([*(runs/'cells').glob('*.csv')]) == 2


def test_a_judge_of_other_pictures_is_refused(tmp_path):
    p = preset('judge.smoke').model_copy(update={'data': drawn(tmp_path/'pictures'), 'steps': 2})
    train_judge(p, tmp_path/'judge', progress=False)
    train_judge(p, tmp_path/'judge', progress=False)
    file = next((tmp_path/'pictures'/'train').rglob('*.png'))
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(TrainingError, match='other'):
        train_judge(p, tmp_path/'judge', progress=False)


def test_a_bit_of_an_own_judge_does_not_flip_unseen(tmp_path):
    data = images((DIGITS.x[:40], DIGITS.y[:40]))
    own_judge(data, tmp_path, steps=2, progress=False)
    file, = tmp_path.rglob('*.safetensors')
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 4
    file.write_bytes(damaged)
    with pytest.raises((TrainingError, ModelError)):
        own_judge(data, tmp_path, steps=2, progress=False)


def test_a_training_that_fails_leaves_the_others_attacked(tmp_path):
    study = Study(models='digits.entangled', train='train.smoke', seeds='0', judges='judge.smoke',
                  attacks='attack.noise', pairs='1', **{'model.lr': '1e-3, 1e25'})
    with pytest.raises(SweepError, match='diverged'):
        trials(study, tmp_path, jobs=1, progress=False)
    assert len([*(tmp_path/'cells').glob('*.csv')]) == 1


# ------------------------------------------------------------------ what is inside
@pytest.mark.parametrize('wrap', [AveragedModel, nn.DataParallel])
def test_a_wrapped_model_is_what_it_wraps(wrap):
    torch.manual_seed(0)
    model = VAE(4, 3).eval()
    outside = wrap(model).eval()
    p = preset('attack.strong', steps=3)
    ours, theirs = (attack(m, X[:4], X[4:], p, progress=False) for m in (model, outside))
    assert torch.equal(ours.before, theirs.before) and torch.equal(ours.x, theirs.x)
    p = preset('attack.relative')
    weights = [relative_weights(m, X[:4], X[4:], p) for m in (model, outside)]
    assert torch.equal(*weights) and (weights[0] > 0).all()
    assert has_code(outside, X) and torch.equal(reconstruct(outside, X), reconstruct(model, X))
    torch.manual_seed(1)
    one = reconstruct(model, X, sample=True)
    torch.manual_seed(1)
    assert torch.equal(reconstruct(outside, X, sample=True), one)


def test_verdicts_do_not_hang_on_autocast():
    judge, x = pretrained_judge('judge/wide'), torch.rand(300, 1, 32, 32)
    plain = judged(judge, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(judged(judge, x), plain)


def test_transparent_items_of_a_data_set_are_seen_on_white():
    clear = Image.new('RGBA', (32, 32), (0, 0, 0, 0))
    half = Image.new('LA', (32, 32), (0, 0))
    assert all((images([(i, 0)]*3, channels=1).x == 255).all() for i in (clear, half))


# ------------------------------------------------------------------ the ends
def test_a_divergence_of_a_very_sharp_posterior_is_finite():
    zero = torch.zeros(1, 1)
    wide, sharp = Normal(zero, 1.), Normal(zero, torch.tensor([[-55.]]).exp().requires_grad_())
    found = divergence(Posterior(sharp), Posterior(wide))
    torch.testing.assert_close(found, torch.tensor([54.5]))
    slope, = torch.autograd.grad(found.sum(), sharp.scale)
    torch.testing.assert_close(slope*sharp.scale, torch.tensor([[-1.]]))


def test_a_class_that_cannot_be_adds_nothing():
    z = Normal(torch.zeros(1, 1), 1.)
    sure = OneHotCategorical(logits=torch.tensor([[0., -math.inf]]))
    even = OneHotCategorical(logits=torch.zeros(1, 2))
    found = divergence(Posterior(z, sure), Posterior(z, even))
    torch.testing.assert_close(found, torch.tensor([math.log(2)]))


def test_images_that_miss_the_range_by_rounding_are_told_so():
    over = X[:2].clone()
    over[0, 0, 0, 0] = 1.0000001
    with pytest.raises(AttackError, match=r'1\.00000012\]: they miss it by rounding.*clamp'):
        attack(lambda a: a.flatten(1), over, X[2:4], preset('attack.noise'))


@pytest.mark.slow
def test_diagnose_says_that_a_code_masks_the_gradient():
    "Chapter 22's story, on the shipped models: the old attack is found out, the new one is not."
    test, judge = load('mnist', 'test'), pretrained_judge('judge/residual')
    model, said = pretrained('mnist/disentangled'), {}
    for name in ('output_soft', 'output_code'):
        found = diagnose(model, judge, preset(f'attack.{name}', pairs=1), test)
        said[name] = any('masks the gradient' in sentence for sentence in found)
    assert said == {'output_soft': True, 'output_code': False}
