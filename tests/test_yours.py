"""Models of strangers: what is recognised, what is refused, and the same object in every chapter."""
import importlib, re
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, OneHotCategorical

from vae_robust.attacks import attack
from vae_robust.data import ImageData
from vae_robust.diagnosis import diagnose
from vae_robust.explorer import LatentExplorer
from vae_robust.metrics import mig
from vae_robust.objectives import AttackError
from vae_robust.play import AttackPlayground
from vae_robust.robustness import evaluate, rates, reconstruct
from vae_robust.settings import preset
from vae_robust.vae import VAE, kl
from vae_robust.yours import WRAPPER, ModelError, adapt

SHAPE = 1, 8, 8
QUICK = preset('attack.strong', steps=8, restarts=1, pairs=2, eps=.2)


def linear(*sizes): return nn.Linear(*sizes).requires_grad_(False)


def rebuilt(m, *parts):
    code = torch.cat([a.flatten(1) for a in parts], 1)
    return m.back(code).sigmoid().view(-1, *SHAPE)


def tanh(m, z): return m.back(z).tanh().view(-1, *SHAPE)


class Own(nn.Module):
    "A module with encode and decode, whose answers are functions of mu, log variance and logits."
    def __init__(self, answer, decode=None, n=4, K=0):
        super().__init__()
        self.mu, self.lv, self.c = linear(64, n), linear(64, n), linear(64, K)
        self.back, self.answer, self.how = linear(n + K, 64), answer, decode or rebuilt
        self.eval()

    def encode(self, x): return self.answer(self.mu(x.flatten(1)), self.lv(x.flatten(1)) - 1,
                                            self.c(x.flatten(1)))
    def decode(self, *z): return self.how(self, *z)


@pytest.fixture
def x():
    return torch.rand(6, *SHAPE)


def normal(mu, lv): return Normal(mu, (lv/2).exp())


ANSWERS = {  # that all say the same
    'pair': lambda mu, lv, c: (mu, lv), 'list': lambda mu, lv, c: [mu, lv],
    'distribution': lambda mu, lv, c: normal(mu, lv),
    'independent': lambda mu, lv, c: Independent(normal(mu, lv), 1),
    'named': lambda mu, lv, c: SimpleNamespace(mu=mu, logvar=lv),
    'std': lambda mu, lv, c: {'loc': mu, 'scale': (lv/2).exp()},
    'inner': lambda mu, lv, c: {'latent_dist': SimpleNamespace(mean=mu, std=(lv/2).exp())},
    'several': lambda mu, lv, c: [normal(mu[:, :1], lv[:, :1]), normal(mu[:, 1:], lv[:, 1:])]}


@pytest.mark.parametrize('name', ANSWERS)
def test_every_way_to_say_a_gaussian(name, x):
    model = Own(ANSWERS[name])
    mine = adapt(model, x)
    mu, lv = model.mu(x.flatten(1)), model.lv(x.flatten(1)) - 1
    q = mine.posterior(x)
    torch.testing.assert_close((q.z.mean, q.z.stddev), (mu, (lv/2).exp()))
    torch.testing.assert_close(mine.encode(x)[1], lv)
    torch.testing.assert_close(mine(x), model.back(mu).sigmoid().view_as(x))
    assert '4 Gaussian latents' in repr(mine) and 'images 1 x 8 x 8' in repr(mine)


def test_categoricals_of_any_number(x):
    triple = Own(lambda mu, lv, c: (mu, lv, c), K=3)
    mine = adapt(triple, x)
    assert (mine.n_z, mine.n_c, mine.categoricals) == (4, 3, 1)
    groups = lambda mu, lv, c: [Categorical(logits=c.view(-1, 2, 3)), normal(mu, lv)]
    several = Own(groups, lambda m, c, z: rebuilt(m, z, c), K=6)
    mine = adapt(several, x)
    assert (mine.n_z, mine.n_c, mine.categoricals) == (4, 3, 2)
    assert 'each part by itself' in repr(mine)
    q, code = mine.posterior(x), several.c(x.flatten(1)).view(-1, 2, 3)
    one_hot = nn.functional.one_hot(code.argmax(-1), 3).float()
    by_hand = several.back(torch.cat([several.mu(x.flatten(1)), one_hot.flatten(1)], 1)).sigmoid()
    torch.testing.assert_close(mine(x), by_hand.view_as(x))
    by_hand = (code.softmax(-1)*(code.log_softmax(-1) + torch.tensor(3.).log())).sum((1, 2))
    torch.testing.assert_close(kl(q)[1], by_hand)


@pytest.mark.parametrize('objective', ['latent', 'kl', 'symmetric_kl', 'w2', 'output', 'code'])
@pytest.mark.parametrize('K', [3, 6])
def test_attacks_come_down_on_one_and_on_several_categoricals(x, objective, K):
    answer = lambda mu, lv, c: [normal(mu, lv), OneHotCategorical(logits=c.view(-1, K//3, 3))]
    mine = adapt(Own(answer, K=K), x)
    p = QUICK.model_copy(update={'objective': objective, 'features': 'codes'})
    found = attack(mine, x[:3], x[3:], p, progress=False)
    assert (found.after < found.before).all()


def test_features_have_no_divergence_and_everything_else(x):
    mine = adapt(Own(lambda mu, lv, c: mu), x)
    assert 'numbers without a distribution' in repr(mine)
    for objective in ('latent', 'w2', 'output'):
        p = QUICK.model_copy(update={'objective': objective})
        assert (attack(mine, x[:3], x[3:], p, progress=False).after > 0).all()
    with pytest.raises(AttackError, match='no distribution, so there is no divergence'):
        attack(mine, x[:3], x[3:], QUICK.model_copy(update={'objective': 'kl'}), progress=False)


def test_an_attack_on_the_adapted_is_one_on_the_function_by_hand(x):
    model = Own(ANSWERS['pair'])
    p = QUICK.model_copy(update={'objective': 'kl'})
    by_hand = lambda a: normal(*model.encode(a))
    a, b = (attack(m, x[:3], x[3:], p, progress=False) for m in (adapt(model, x), by_hand))
    torch.testing.assert_close(a.x, b.x)
    torch.testing.assert_close(a.after, b.after)


def test_functions(x):
    W = torch.randn(64, 5)
    mine = adapt(lambda a: a.flatten(1) @ W, x)
    assert mine.n_z == 5 and not hasattr(mine, 'decode') and 'no decoder' in repr(mine)
    with pytest.raises(ModelError, match='no decoder, so nothing is rebuilt'):
        mine(x)
    whole = adapt(lambda a: (a/2, a.flatten(1) @ W, torch.zeros(len(a), 5) - 1), x)
    torch.testing.assert_close(whole(x), x/2)
    torch.testing.assert_close(whole.posterior(x).z.mean, x.flatten(1) @ W)
    alone = adapt(lambda a: (a/2, torch.tensor(3.)), x)
    assert not hasattr(alone, 'posterior') and 'reconstructs' in repr(alone)
    torch.testing.assert_close(reconstruct(alone, x), x/2)
    p = QUICK.model_copy(update={'objective': 'output'})
    assert (attack(alone, x[:3], x[3:], p, progress=False).after > 0).all()


def test_an_encoder_that_reads_flat_images_and_a_decoder_that_writes_them(x):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = linear(64, 3), nn.Sequential(linear(3, 64), nn.Sigmoid())
    mine = adapt(Flat().eval(), x)
    assert 'flat' in repr(mine) and mine(x).shape == x.shape


def test_parts_that_do_not_fit_together_are_no_encoder_and_decoder(x):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.mu = linear(64, 9), linear(3, 64), linear(9, 3)
        def forward(self, x):
            mu = self.mu(self.encoder(x.flatten(1)).relu())
            return self.decoder(mu).sigmoid().view_as(x), mu, mu - 9
    mine = adapt(Half().eval(), x)
    assert 'a function that reconstructs and encodes' in repr(mine) and mine.n_z == 3


def test_wrapped_models_are_unwrapped(x):
    for inside in (VAE(3), Own(ANSWERS['pair'])):
        like = x if isinstance(inside, Own) else None
        for wrapped in (nn.DataParallel(inside), torch.compile(inside, backend='eager')):
            mine = adapt(wrapped, like)
            assert mine is inside or mine.model is inside
    assert adapt(mine) is mine


def test_grey_values_are_scaled_on_the_way_in_and_out(x):
    model = Own(lambda mu, lv, c: mu, tanh)
    mine = adapt(model, x, before=lambda a: 2*a - 1, after=lambda y: (y + 1)/2)
    by_hand = (tanh(model, model.mu((2*x - 1).flatten(1))) + 1)/2
    torch.testing.assert_close(mine(x), by_hand)
    half = adapt(Own(lambda mu, lv, c: mu).bfloat16(), x)
    assert half(x).dtype == torch.float32


def noisy(mu, lv, c): return mu + torch.randn_like(mu)


@pytest.mark.parametrize('model, words', [
    (Own(lambda mu, lv, c: mu, lambda m, z: 5*tanh(m, z)), 'after=torch.sigmoid'),
    (Own(lambda mu, lv, c: mu, tanh), r'before=lambda x: 2\*x - 1'),
    (Own(lambda mu, lv, c: (mu, (lv/2).exp())), 'positive everywhere'),
    (Own(lambda mu, lv, c: (mu, mu, lv)), r'a tuple of a Tensor \(2, 4\), a Tensor'),
    (Own(lambda mu, lv, c: SimpleNamespace(embedding=mu, log_concentration=lv)), 'how to read'),
    (Own(lambda mu, lv, c: 'codes'), 'how to read a str'),
    (Own(noisy), 'so it samples'), (Own(lambda mu, lv, c: mu, lambda m, z: z), 'gives no images'),
    (Own(lambda mu, lv, c: [Categorical(logits=mu), Categorical(logits=c)], K=3),
     'one number of classes, and have 4, 3'),
    (lambda x: 1/0, 'ZeroDivisionError'), (3.5, 'A float is not recognised: it is no function')])
def test_what_is_not_recognised_is_refused_with_what_was_found(model, words, x):
    with pytest.raises(ModelError, match=words) as e:
        adapt(model, x)
    assert str(e.value).endswith(WRAPPER)


def test_the_wrapper_that_is_proposed_works(x):
    lines = [line for line in WRAPPER.split('\n')[1:]]
    normal = 'return Normal(self.model(x.flatten(1)), 1.)  #'
    code = '\n'.join(lines).replace('...    # of', normal, 1)
    code = code.replace('...    # images', 'return (z @ self.model.weight).sigmoid()  #', 1)
    names = dict(torch=torch, adapt=adapt, model=linear(64, 3), x=x, Normal=Normal)
    body, _, call = code.rpartition('\n')
    exec(body, names)
    assert '3 Gaussian latents' in repr(eval(call, names)) and 'decodes' in repr(eval(call, names))


def test_a_shape_is_asked_for_where_nobody_says_it(x):
    with pytest.raises(ModelError, match=r'adapt\(model, \(3, 64, 64\)\)'):
        adapt(Own(ANSWERS['pair']))
    assert adapt(Own(ANSWERS['pair']), SHAPE).shape == SHAPE
    with pytest.raises(ModelError, match=r'cannot read a Tensor \(2, 3, 9, 9\)'):
        adapt(Own(ANSWERS['pair']), (3, 9, 9))


def test_a_model_in_training_mode_stays_there_and_is_not_attacked(x):
    model = Own(ANSWERS['pair']).train()
    mine = adapt(model, x)
    assert model.training and all(m.training for m in model.modules())
    with pytest.raises(AttackError, match='training mode'):
        attack(mine, x[:3], x[3:], QUICK, progress=False)
    mine.eval()
    assert not model.training and attack(mine, x[:3], x[3:], QUICK, progress=False)


@pytest.fixture
def task():
    """An autoencoder that keeps two halves of an image apart, images of three classes, and a judge
    of them."""
    y = torch.arange(30) % 3
    x = torch.rand(30, *SHAPE)*.2
    for k in range(3):
        x[y == k, 0, k:k + 3] += .6
    W = torch.linalg.qr(torch.randn(64, 6))[0]
    data = ImageData((x*255).byte(), y)
    mean = torch.stack([data.x[y == k].float().mean(0)/255 for k in range(3)]).flatten(1)
    judge = lambda a: -torch.cdist(a.flatten(1), mean)
    class Linear(nn.Module):
        def encode(self, x): return (x.flatten(1) - .4) @ W, torch.full((len(x), 6), -4.)
        def decode(self, z): return (z @ W.T + .4).clamp(0, 1).view(-1, *SHAPE)
    return Linear().eval(), judge, data


def test_the_same_object_everywhere(task):
    model, judge, data = task
    mine = adapt(model, data)
    table = rates(evaluate(mine, judge, QUICK, data, progress=False))
    assert len(table) == 6 and table.kept.sum() > 0
    assert all(isinstance(s, str) for s in diagnose(mine, judge, QUICK, data))
    assert 0 <= mig(mine.posterior(data.x), data.y.repeat(1), seed=0).value <= 1
    explorer = LatentExplorer(mine, data)
    torch.testing.assert_close(explorer.code, mine.posterior(explorer.x).mode, rtol=0, atol=.051)
    play = AttackPlayground({'mine': mine}, {'near': judge}, data, pair=(0, 1, 0))
    play.sliders['steps'].value = 5
    play.run.click()
    play.thread.join(60)
    assert len(play.outcome) == 2


def test_the_explorer_has_buttons_for_one_categorical(x):
    groups = lambda mu, lv, c: [normal(mu, lv), OneHotCategorical(logits=c.view(-1, 2, 3))]
    mine = adapt(Own(groups, K=6), x)
    with pytest.raises(ValueError, match='buttons for one categorical'):
        LatentExplorer(mine, x)


def test_what_an_objective_lacks_is_said(x):
    mine = adapt(Own(ANSWERS['pair']), x)
    with pytest.raises(AttackError, match='with .log_likelihood, and Yours has none'):
        attack(mine, x[:3], x[3:], QUICK.model_copy(update={'objective': 'l_vae'}), progress=False)
    with pytest.raises(AttackError, match='code needs a model with .encode'):
        p = QUICK.model_copy(update={'objective': 'code'})
        attack(lambda a: a.flatten(1), x[:3], x[3:], p, progress=False)


# ---------------------------------------------------- real strangers, where they are installed

TINY = dict(in_channels=3, out_channels=3, block_out_channels=(8, 16), latent_channels=2,
            norm_num_groups=4, down_block_types=('DownEncoderBlock2D',)*2,
            up_block_types=('UpDecoderBlock2D',)*2)
MORE = {'AutoencoderKL': dict(sample_size=16), 'VQModel': dict(num_vq_embeddings=16)}


@pytest.mark.parametrize('name', MORE)
def test_diffusers(name, library):
    diffusers = library('diffusers')
    model, x = getattr(diffusers, name)(**TINY, **MORE[name]).eval(), torch.rand(4, 3, 16, 16)
    mine = adapt(model, None if name == 'AutoencoderKL' else x)
    with torch.no_grad():
        answer = model.encode(2*x - 1)
        z = answer.latent_dist.mean if name == 'AutoencoderKL' else answer.latents
        by_hand = (model.decode(z).sample/2 + .5).clamp(0, 1)
    torch.testing.assert_close(mine(x), by_hand)
    assert mine.shape == (3, 16, 16) and '128' in repr(mine) and '2 x 8 x 8' in repr(mine)
    kinds = ('latent', 'output') + ('kl',)*(name == 'AutoencoderKL')
    for p in (QUICK.model_copy(update={'objective': o}) for o in kinds):
        found = attack(mine, x[:2], x[2:], p, progress=False)
        assert (found.after < found.before).all()


@pytest.mark.parametrize('name', ['VAE', 'BetaVAE', 'AE', 'VQVAE', 'FactorVAE', 'VAMP'])
def test_pythae(name, library):
    M = library('pythae.models')
    config = getattr(M, f'{name}Config')(input_dim=(1, 28, 28), latent_dim=4)
    model = getattr(M, name)(config).eval()
    mine, x = adapt(model), torch.rand(4, 1, 28, 28)
    if name in ('AE', 'VQVAE'):  # whose forward pass is deterministic
        torch.testing.assert_close(mine(x), model({'data': x}).recon_x)
    else:
        answer = model.encoder(x)
        torch.testing.assert_close(mine.posterior(x).z.stddev, (answer.log_covariance/2).exp())
        torch.testing.assert_close(mine(x), model.decoder(answer.embedding).reconstruction)
    found = attack(mine, x[:2], x[2:], QUICK, progress=False)
    assert (found.after < found.before).all()


@pytest.mark.parametrize('name, words', [('VAE_IAF', 'iaf_flow'), ('SVAE', 'log_concentration'),
                                         ('PoincareVAE', 'codes go through'), ('HVAE', 'eps_lf')])
def test_pythae_with_more_than_an_encoder_and_a_decoder_is_refused(name, words, library):
    M = library('pythae.models')
    config = next(c for c in (f'{name}_Config', f'{name}Config') if hasattr(M, c))
    with pytest.raises(ModelError, match=words):
        adapt(getattr(M, name)(getattr(M, config)(input_dim=(1, 28, 28), latent_dim=4)).eval())


def test_outputs_of_pythae_from_a_function(library):
    M = library('pythae.models')
    model, x = M.VAE(M.VAEConfig(input_dim=(1, 8, 8), latent_dim=4)).eval(), torch.rand(4, *SHAPE)
    mine = adapt(lambda x: model.encoder(x), x)
    q = model.encoder(x)
    torch.testing.assert_close(mine.posterior(x).z.mean, q.embedding)
    torch.testing.assert_close(mine.posterior(x).z.stddev, (q.log_covariance/2).exp())
    assert not hasattr(mine, 'decode')


def test_torchvision():
    x = torch.rand(4, 3, 32, 32)
    net = importlib.import_module('torchvision.models').squeezenet1_1().eval()
    mean = torch.tensor([.485, .456, .406]).view(3, 1, 1)
    std = torch.tensor([.229, .224, .225]).view(3, 1, 1)
    mine = adapt(net, x)
    torch.testing.assert_close(mine.posterior(x).z.mean, net((x - mean)/std))


def test_timm(library):
    timm, x = library('timm'), torch.rand(4, 3, 32, 32)
    net = timm.create_model('resnet10t', num_classes=0).eval()
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    mine = adapt(net, x)
    torch.testing.assert_close(mine.posterior(x).z.mean, net((x - mean)/std))
    found = attack(mine, x[:2], x[2:], QUICK, progress=False)
    assert re.search('512 numbers', repr(mine)) and (found.after < found.before).all()
