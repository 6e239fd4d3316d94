"""What other people's models, pictures and programs look like: numbers that were silently wrong, and
errors that came from far below."""
import pickle
from collections import namedtuple

import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.nn.utils import prune
from typer.testing import CliRunner

from vae_robust import adapt, attack, evaluate, preset
from vae_robust.attacks import smallest_radius
from vae_robust.cli import app
from vae_robust.data import DataError, ImageData, images, labels_of, load
from vae_robust.defences import certified_radius, is_certified
from vae_robust.judges import JudgeError, pretrained_judge
from vae_robust.metrics import encode
from vae_robust.objectives import AttackError
from vae_robust.optimisers import quick
from vae_robust.robustness import reconstruct
from vae_robust.training import TrainingError, build, pretrained, train
from vae_robust.vae import VAE, reached
from vae_robust.yours import ModelError, load_model, save_model

from test_cli import invoked
from test_strangers import TEST, auto, knows

BIG, SMALL = (torch.rand(8, 1, n, n, generator=torch.Generator().manual_seed(0)) for n in (32, 8))


# ------------------------------------------------------------------ the copy that is attacked
def changed_first(change, *sizes):
    model = VAE(*sizes or (4, 0)).eval()
    change(model)
    return model.eval()


def first(layer): return lambda m: m.encoder.__setitem__(0, layer)


CHANGES = {
    'a hook': lambda m: m.encoder[0].register_forward_pre_hook(
        lambda _, a: (F.avg_pool2d(a[0], 5, 1, 2),)),
    'spectral norm': lambda m: nn.utils.spectral_norm(m.encoder[0]),
    'a parametrisation': lambda m: nn.utils.parametrizations.weight_norm(m.encoder[0]),
    'pruning': lambda m: prune.l1_unstructured(m.encoder[2], 'weight', .5),
    'reflections': first(nn.Conv2d(1, 32, 4, 2, 1, padding_mode='reflect')),
    'an odd kernel': first(nn.Conv2d(1, 32, 3, 2, 1)),
    'a long kernel': first(nn.Conv2d(1, 32, (4, 2), 2, (1, 0))),
    'a wide kernel': first(nn.Conv2d(1, 32, 4, 2, 4, dilation=3)),
    'no bias': lambda m: m.decoder.__setitem__(-1, nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False)),
    'a hook at the end': lambda m: m.decoder[-1].register_forward_hook(lambda _, a, y: y/3),
    'another encoder': lambda m: setattr(
        m, 'encoder', nn.Sequential(nn.Flatten(), nn.Linear(1024, 8)))}


@pytest.mark.parametrize('name', CHANGES)
def test_what_is_attacked_is_the_model(name):
    torch.manual_seed(0)
    model = changed_first(CHANGES[name])
    far = lambda a: (model.encode(a)[0] - model.encode(BIG[4:])[0]).norm(dim=1)
    found = attack(model, BIG[:4], BIG[4:], preset('attack.means', steps=5), progress=False)
    torch.testing.assert_close(found.before, far(BIG[:4]).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.after, far(found.x).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reconstruct(quick(model), BIG), reconstruct(model, BIG))


def test_the_models_own_layers_are_exchanged_still():
    fast = quick(VAE(4, 0).eval())
    ends = [type(layer).__name__ for layer in (fast.encoder[0], fast.decoder[-1])]
    assert ends == ['Folded', 'Unfolded']
    assert quick(fast) is fast


# ------------------------------------------------------------------ modes
@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: lambda x: m(x), lambda m: [m, m.forward]])
def test_a_model_of_thousands_of_layers_is_reached_to_the_last(wrap):
    deep = nn.Sequential(nn.Dropout(.5), nn.BatchNorm2d(1), *(nn.Identity() for _ in range(3000)))
    assert len(reached(wrap(deep), knows(4))) == 3003 + 3


def test_what_only_looks_leaves_the_averages_of_a_deep_model():
    deep = nn.Sequential(nn.BatchNorm2d(1), *(nn.Identity() for _ in range(3000))).train()
    before = deep[0].running_mean.clone()
    reconstruct(deep, SMALL)
    assert torch.equal(before, deep[0].running_mean) and deep[0].training


# ------------------------------------------------------------------ adapt
class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.book, self.encoder = nn.Embedding(16, 4), nn.Conv2d(1, 4, 2, 2)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 1, 2, 2), nn.Sigmoid())
    def forward(self, x):
        z = self.encoder(x).permute(0, 2, 3, 1)
        nearest = torch.cdist(z.flatten(0, 2), self.book.weight).argmin(1)
        return self.decoder(self.book(nearest).view_as(z).permute(0, 3, 1, 2))


def test_what_stands_between_encoder_and_decoder_is_not_left_out():
    torch.manual_seed(0)
    model = Quantised().eval()
    torch.testing.assert_close(adapt(model, SMALL)(SMALL), model(SMALL))
    model.encode, model.decode = model.encoder, model.decoder
    with pytest.raises(ModelError, match='something stands between them'):
        adapt(model, SMALL)


class Pair(nn.Module):
    "An encoder of two numbers an image, whose second part is `second` of them."
    def __init__(self, second, D=2):
        super().__init__()
        self.m, self.s, self.second = nn.Linear(64, D), nn.Linear(64, D), second
    def encode(self, x): return self.m(x.flatten(1)), self.second(self.s(x.flatten(1)))


@pytest.mark.parametrize('n', (1, 2, 8))
def test_a_deviation_is_not_taken_for_the_logarithm_of_a_variance(n):
    with pytest.raises(ModelError, match='positive everywhere'):
        adapt(Pair(lambda s: s.exp()*.1).eval(), SMALL[:n])


def test_a_logarithm_that_is_once_positive_stays_one():
    model = adapt(Pair(lambda s: 40*s - 1).eval(), SMALL)
    for x in (*SMALL.split(1), torch.ones_like(SMALL[:1])):
        torch.testing.assert_close(model.posterior(x).z.stddev, (model.model.encode(x)[1]/2).exp())


def test_a_named_tuple_is_read_by_its_names():
    Answer = namedtuple('Answer', 'logvar mu')
    class Swapped(Pair):
        def encode(self, x): return Answer(*super().encode(x)[::-1])
    model = Swapped(lambda s: s).eval()
    assert torch.equal(adapt(model, SMALL).posterior(SMALL).z.mean, model.encode(SMALL).mu)


class Last(nn.Module):
    "A model whose pictures have their channels last."
    def __init__(self):
        super().__init__()
        self.e, self.d = nn.Linear(192, 5), nn.Linear(5, 192)
    def encode(self, x): return self.e(x.flatten(1))
    def decode(self, z): return self.d(z).sigmoid().view(-1, 3, 8, 8).permute(0, 2, 3, 1)


def test_pictures_in_another_order_are_not_cut_up():
    model, x = Last().eval(), torch.rand(4, 3, 8, 8)
    with pytest.raises(ModelError, match='channels stand last, say after'):
        adapt(model, x)
    channels_first = lambda y: y.permute(0, 3, 1, 2)
    ours = adapt(model, x, after=channels_first)
    torch.testing.assert_close(ours(x), channels_first(model.decode(model.encode(x))))


def test_a_call_that_samples_is_refused():
    class Samples(type(auto())):
        encode = decode = None
        def forward(self, x):
            z = self.e(x.flatten(1))
            return self.d(z + torch.randn_like(z)).sigmoid().view_as(x)
    with pytest.raises(ModelError, match='it samples: decode the mean'):
        adapt(Samples().eval(), SMALL)


def test_numbers_about_a_reconstruction_are_no_code():
    model = adapt(lambda x: (x/2, x.mean(), x.std()), SMALL)
    torch.testing.assert_close(model(SMALL), SMALL/2)
    assert model.n_z == 0


def test_a_function_with_a_code_is_attacked_by_its_output():
    torch.manual_seed(0)
    e, c, d = (nn.Linear(*n).eval() for n in ((64, 4), (64, 3), (7, 64)))
    def both(x):
        h, l = e(x.flatten(1)), c(x.flatten(1))
        return d(torch.cat([h, l.softmax(1)], 1)).sigmoid().view_as(x), h, h - 9, l
    model = adapt(both, SMALL)
    for name in ('output', 'output_code', 'damage_code'):
        p = preset(f'attack.{name}', steps=3, restarts=1)
        aim = None if p.goal == 'away' else SMALL[4:]
        found = attack(model, SMALL[:4], aim, p, progress=False)
        assert (found.after <= found.before).all() and found.after.isfinite().all()


def test_what_adapt_returns_travels():
    model = adapt(auto(), SMALL)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(SMALL), model(SMALL))


# ------------------------------------------------------------------ the program's defaults
def far(a, b):
    return max((u - v).abs().max().item() for u, v in zip(a.parameters(), b.parameters()))


def test_training_does_not_hang_on_what_the_program_has_set(tmp_path):
    def go(name): return train(preset('digits.entangled', steps=3), tmp_path/name, progress=False)
    plain = go('plain')
    with torch.autocast('cpu', torch.bfloat16):
        assert far(plain, go('autocast')) == 0
    with torch.no_grad():
        assert far(plain, go('no_grad')) == 0
    torch.set_default_dtype(torch.float64)
    try:
        double = go('double')
    finally:
        torch.set_default_dtype(torch.float32)
    assert far(plain, double) == 0 and next(double.parameters()).dtype == torch.float32
    with torch.inference_mode(), pytest.raises(TrainingError, match='inference_mode'):
        go('inference')


@pytest.mark.parametrize('name', ('square', 'noise', 'strong'))
def test_an_attack_does_not_hang_on_what_the_program_has_set(name):
    model, p = lambda a: a.flatten(1)[:, :3], preset(f'attack.{name}', steps=5)
    hit = lambda: attack(model, SMALL[:4], SMALL[4:], p, progress=False).x
    plain = hit()
    torch.set_default_dtype(torch.float64)
    try:
        double = hit()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device('meta'):
        elsewhere = hit()
    assert torch.equal(plain, double) and torch.equal(plain, elsewhere)


def test_a_model_is_adapted_whatever_the_default_device():
    model = auto()
    with torch.device('meta'):
        adapted = adapt(model, (1, 8, 8))
    assert adapted.n_z == 5


def test_looking_does_not_hang_on_autocast():
    model = pretrained('mnist/disentangled')
    seen, code = reconstruct(model, BIG), encode(model.posterior, BIG).mean
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(reconstruct(model, BIG), seen)
        assert np.array_equal(encode(model.posterior, BIG).mean, code)


def test_a_shipped_judge_leaves_chance_alone():
    state = torch.get_rng_state()
    pretrained_judge('judge/wide')
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------ doors
def test_pictures_in_black_and_white_are_one_set_in_every_form():
    d, p = load('digits', 'test'), preset('attack.none', pairs=1)
    model, judge, bits = pretrained('mnist/disentangled'), pretrained_judge('judge/wide'), d.x > 127
    kept = [evaluate(model, judge, p, ImageData(x, d.y), progress=False).kept
            for x in (bits.float(), bits)]
    assert kept[0].tolist() == kept[1].tolist() and kept[0].sum() > 20
    with pytest.raises(AttackError, match='multiply them by 255'):
        evaluate(model, judge, p, ImageData(bits.byte(), d.y))


def test_a_certificate_of_bytes_is_that_of_grey_values():
    model = build(preset('digits.fsq')).eval()
    x = torch.randint(60, 200, (4, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(certified_radius(model, x), certified_radius(model, x/255))
    assert torch.equal(is_certified(model, x.numpy(), .3), is_certified(model, x/255, .3))


@pytest.mark.parametrize('judge, words', [(knows(1), r'not a tensor \(4, 1\)'),
                                          (lambda a: (a.flatten(1),), 'not a tuple'),
                                          (lambda a: a.detach().numpy(), 'not a ndarray')])
def test_an_attack_asks_its_judge_for_scores(judge, words):
    with pytest.raises(AttackError, match=words):
        attack(auto(), SMALL[:4], SMALL[4:], preset('attack.judge', steps=2), judge=judge)


def test_a_judge_or_a_model_of_another_size_is_named():
    d, p = load('digits', 'test'), preset('attack.none', pairs=1)
    with pytest.raises(JudgeError, match=r'judge cannot read images \(1, 32, 32\)'):
        evaluate(pretrained('mnist/disentangled'), knows(10), p, d)
    with pytest.raises(AttackError, match='model cannot be asked about images'):
        evaluate(auto(), pretrained_judge('judge/wide'), p, d)


@pytest.mark.parametrize('compiled', [False, True])
def test_nan_is_named(compiled, monkeypatch):
    "torch.compile tells all distributions of a program not to look at their arguments."
    monkeypatch.setattr(Distribution, '_validate_args', not compiled)
    model = pretrained('mnist/disentangled')
    model.encoder[-1].bias.data[:] = torch.nan
    judge, test = pretrained_judge('judge/wide'), load('digits', 'test')
    for ask in (lambda: attack(model, BIG[:4], BIG[4:], 'attack.fgsm', progress=False),
                lambda: evaluate(model, judge, 'attack.fgsm', test)):
        with pytest.raises(ValueError, match='answers with NaN: look at the weights'):
            ask()
    with pytest.raises(ModelError, match='decodes to NaN'):
        adapt(lambda a: a*torch.nan, SMALL)
    with pytest.raises(AttackError, match='contain infinite numbers: the first is image 2'):
        attack(auto(), SMALL[:3]/torch.tensor([1, 1, 0.]).view(3, 1, 1, 1), SMALL[:3], 'attack.fgsm')


def test_raw_errors_have_become_sentences(tmp_path):
    with pytest.raises(AttackError, match='no categorical'):
        attack(VAE(4, 0).eval(), BIG[:2], BIG[2:4], preset('attack.fgsm', objective='code'))
    with pytest.raises(AttackError, match=r'images \(B, C, H, W\), and these are \(2, 64\)'):
        attack(lambda a: a[:, :3], *SMALL[:4].flatten(1).split(2), 'attack.square')
    with pytest.raises(TrainingError, match='without labels'):
        train('digits.entangled', tmp_path, data=(BIG, torch.arange(8)))
    with pytest.raises(AttackError, match='0 or more, and not -1'):
        evaluate(auto(), knows(4), preset('attack.none', pairs=1), TEST, -1)
    always = lambda a: torch.ones(len(a)) > 0
    found = smallest_radius(auto(), SMALL[:2], SMALL[2:4], 'attack.fgsm', always)
    assert (found.value < .001).all()


# ------------------------------------------------------------------ labels and folders
def test_labels_of_any_type_are_numbers_still():
    assert labels_of(np.array([2, 10, 1, 11], dtype=object), 4).tolist() == [2, 10, 1, 11]
    assert labels_of(['b', 'a'], 2).tolist() == [1, 0]
    for missing in ([None, 0, 1, 2], [0, 1, 2, np.nan]):
        with pytest.raises(DataError, match='labels are missing'):
            labels_of(missing, 4)


def test_pictures_and_labels_that_are_none_are_named(tmp_path):
    (tmp_path/'a.png').write_bytes(b'no picture')
    pictures = np.zeros((3, 8, 8), np.uint8)
    for source, words in [(tmp_path, 'No picture in .* can be read, the first of them a.png'),
                          ((pictures, 3), 'one for each of 3 images, and not 3'),
                          ((pictures, [[1], [1, 2], [3]]), 'Labels are of several lengths'),
                          ({}, 'There are no names')]:
        with pytest.raises(DataError, match=words):
            images(source)


def test_a_part_for_validation_is_no_class(tmp_path):
    for d in ('train/a', 'train/b', 'val/a', 'val/b'):
        (tmp_path/d).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 40*i + 9, np.uint8)).save(tmp_path/d/f'{i}.png')
    with pytest.raises(DataError, match='parts train and val'):
        images(tmp_path)
    assert images(tmp_path/'train').y.tolist() == 3*[0] + 3*[1]


# ------------------------------------------------------------------ folders of models
def test_a_model_of_another_function_is_not_saved_as_the_presets(tmp_path):
    for change in ({'likelihood': 'continuous_bernoulli'}, {'tau': .01}):
        with pytest.raises(TrainingError, match='another likelihood, temperature or code'):
            save_model(VAE(10, 10, **change), tmp_path/'m', 'mnist.entangled')
    numbers = {'mig': np.float32(.5), 'bound': torch.tensor(142.)}
    model = build(preset('mnist.entangled'))
    save_model(model, tmp_path/'m', 'mnist.entangled', np.int64(1), **numbers)
    assert load_model(tmp_path/'m').likelihood == 'bernoulli'


def test_a_tilde_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    train(preset('digits.entangled', steps=1), '~/run', progress=False)
    assert load_model('~/run').n_z and (tmp_path/'run').is_dir()


def test_an_attack_on_a_folder_obeys_its_seed_and_knows_its_length(tmp_path):
    save_model(pretrained('mnist/disentangled'), tmp_path/'m', 'mnist.disentangled')
    noise = '--set', 'pairs=1', '--set', 'eps=0.4', '--set', 'noise=0.4'
    words = 'attack', tmp_path/'m', 'attack.noise', *noise, '--all', '--seed'
    said = [invoked(*words, seed) for seed in '005']
    assert said[0] == said[1] != said[2]
    done = CliRunner().invoke(app, ['attack', str(tmp_path/'m'), '--length', 'train.quick'])
    assert done.exit_code == 1 and 'leave out --length' in done.output
