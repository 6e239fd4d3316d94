"""What people who see the package for the first time tried, and what it should have said."""
import math, re
import pytest, torch
from torch import nn

from vae_robust import adapt, attack, diagnose, evaluate, preset
from vae_robust.data import ImageData, load
from vae_robust.objectives import AttackError
from vae_robust.judges import JudgeError, pretrained_judge
from vae_robust import cli
from vae_robust.settings import DiskError, SettingsError
from vae_robust.training import TrainingError, pretrained, train
from vae_robust.vae import VAE
from vae_robust.yours import ModelError, load_model, save_model

X, Y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
TEST, SHORT = ImageData(X, Y), preset('attack.strong', steps=3, restarts=1, pairs=1)


class Auto(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.d = nn.Linear(64, 5), nn.Linear(5, 64)

    def encode(self, x): return self.e(x.flatten(1))
    def decode(self, z): return self.d(z).sigmoid().view(-1, 1, 8, 8)
    def forward(self, x): return self.decode(self.encode(x))


def auto():
    torch.manual_seed(0)
    return Auto().eval()


def knows(K):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, K)).eval()


def of_nan(f): return lambda x: f(x)*math.nan


@pytest.mark.parametrize('judge, words', [
    (knows(1), "judge' knows 1 classes, and there are labels up to 3"),
    (of_nan(knows(4)), 'Scores of the judge are not numbers'),
    (None, 'A judge is a function from images to scores'),
    (lambda x: (knows(4)(x), None), 'not with a tuple'),
    (lambda x: knows(4)(x).argmax(1), r'not with a tensor \(2,\)')])
def test_a_judge_that_cannot_judge_is_refused_before_the_attack(judge, words, monkeypatch):
    monkeypatch.setattr('vae_robust.robustness.attack', lambda *a, **kw: pytest.fail('attacked'))
    for ask in (evaluate, diagnose):
        with pytest.raises(JudgeError, match=words):
            ask(adapt(auto(), X), judge, SHORT, TEST)


def test_a_model_of_nan_is_not_robust():
    with pytest.raises(JudgeError, match='not numbers .NaN.: look at the model'):
        evaluate(of_nan(auto()), knows(4), SHORT, TEST, progress=False)


def test_a_model_that_has_not_been_adapted_reconstructs_by_itself():
    rates = [evaluate(m, knows(4), preset('attack.none', pairs=1), TEST, progress=False)
             for m in (auto(), adapt(auto(), X))]
    assert rates[0].equals(rates[1])
    with pytest.raises(AttackError, match='with a tuple.*adapt'):
        evaluate(lambda x: (x, x), knows(4), SHORT, TEST)


@pytest.mark.parametrize('test, words', [((X, Y), 'a tuple has not'), (X, 'a Tensor has not')])
def test_what_is_no_test_set_is_refused(test, words):
    for ask in (evaluate, diagnose):
        with pytest.raises(AttackError, match=words):
            ask(auto(), knows(4), SHORT, test)


def test_a_test_set_of_arrays_is_one_of_tensors():
    arrays = ImageData(X.numpy(), Y.numpy())
    same = [evaluate(auto(), knows(4), SHORT, t, progress=False) for t in (TEST, arrays)]
    assert same[0].equals(same[1])


def test_a_name_is_as_good_as_its_preset():
    f, name = lambda x: auto().encode(x), 'attack.fgsm'
    one, two = (attack(f, X[:2], X[2:4], p, progress=False).x for p in (name, preset(name)))
    assert torch.equal(one, two)
    for wrong, words in (('attack.strnog', 'attack.strong'),
                         (.1, 'class AttackPreset, or its name'),
                         ('mnist.entangled', 'class AttackPreset, or its name')):
        with pytest.raises(SettingsError, match=words):
            attack(f, X[:2], X[2:4], wrong, progress=False)


@pytest.mark.parametrize('keys, words', [({'esp': .5}, 'esp: unknown key.*eps'),
                                         ({'eps': 5}, 'eps = 5'), ({'optimiser': 'pdg'}, 'pdg'),
                                         ({'steps': -3}, 'steps = -3')])
def test_a_copy_of_a_preset_is_checked(keys, words):
    with pytest.raises(SettingsError, match=words):
        SHORT.model_copy(update=keys)
    wider = preset('attack.strong', steps=3, restarts=1, pairs=1, eps=.2)
    assert SHORT.model_copy(update={'eps': .2}) == wider


def test_the_order_of_radii_does_not_accuse():
    one, two = (diagnose(adapt(auto(), X), knows(4), SHORT, TEST, radii=r)
                for r in ((.05, .4), (.4, .05)))
    assert one == two


def test_a_spread_below_zero_is_a_logarithm():
    class Named(Auto):
        def encode(self, x):
            h = super().encode(x)
            return {'mu': h, 'sigma': h}
    with pytest.raises(ModelError, match='log_var'):
        adapt(Named().eval(), X)


@pytest.mark.parametrize('shape', [(3, 8, 8), (1, 8, 8)])
def test_a_picture_without_a_batch_is_refused(shape):
    x = torch.rand(shape)
    with pytest.raises(AttackError, match=re.escape(f'{shape} lack an axis')):
        attack(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()).eval(), x, x, SHORT)


def test_pictures_between_minus_one_and_one_are_told_the_way():
    with pytest.raises(AttackError, match=re.escape('(a + 1)/2')):
        attack(auto(), 2*X[:2] - 1, X[2:4], SHORT)


def same(x): return torch.zeros(len(x), 3, requires_grad=True)


@pytest.mark.parametrize('model, words', [
    (same, 'does not depend on the images'),
    (nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval(), r'asked about images \(1, 8, 8\)'),
    (nn.Conv2d(3, 2, 3).eval(), r'asked about images \(1, 8, 8\)'),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 3).double()).eval(), 'of float32: '),
    (lambda x: x.flatten(1).sum(1), 'asked about images')])
def test_what_torch_says_is_said_of_the_model(model, words):
    with pytest.raises(AttackError, match=words) as e:
        attack(model, X[:2], X[2:4], SHORT.model_copy(update={'features': 'means'}), progress=False)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, words', [('mnist/disentagled', "did you mean 'mnist/disentangled'"),
                                         ('mnist/arm_c', 'there are seeds 100, 101, 102')])
def test_names_of_weights_are_told_as_they_can_be_used(name, words):
    with pytest.raises(TrainingError, match=words):
        pretrained(name)
    one, two = (pretrained(n).state_dict() for n in ('mnist/disentangled', 'mnist.disentangled'))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_model_is_not_saved_with_the_preset_of_another(tmp_path):
    for model in (auto(), VAE(3, 0)):
        with pytest.raises(TrainingError, match='other networks than its preset'):
            save_model(model, tmp_path, 'digits.entangled')
    assert not any(tmp_path.iterdir())
    with pytest.raises(TrainingError, match='There is no file'):
        load_model(tmp_path/'nowhere')


def test_a_folder_that_takes_no_files_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr('vae_robust.training.fit', lambda *a, **kw: pytest.fail('trained'))
    (tmp_path/'file').write_text('')
    with pytest.raises(DiskError, match='cannot be written'):
        train(preset('digits.entangled', steps=1), tmp_path/'file'/'run')


def test_weights_that_there_are_not_are_said_before_a_judge_is_trained(tmp_path):
    with pytest.raises(SettingsError, match='No weights are shipped for digits.entangled'):
        cli.chosen('digits.entangled', 'judge.smoke', preset('attack.strong'), 'shipped', 0,
                   attack='attack.strong', runs=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['l2', 'thesis', 'lbfgs', 'none', 'fgsm', 'damage'])
def test_every_kind_of_attack_can_be_diagnosed(name):
    "Squares know no ball but linf, and a model that samples keeps other pairs each time."
    digits = load('digits', 'test')
    test = ImageData(*(a[digits.y < 3] for a in digits))
    few = preset(f'attack.{name}', pairs=1, steps=0 if name == 'none' else 2)
    said = diagnose(pretrained('mnist/disentangled'), pretrained_judge('judge/residual'), few, test)
    assert all(isinstance(s, str) for s in said)
