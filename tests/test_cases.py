"""What users met, each as a small case: odd inputs, damaged files, killed runs."""
import errno, gzip, hashlib, http.client, io, json, math, os, platform, random, shutil, signal
import tarfile, zipfile
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F
from torch.testing import assert_close
from typer.testing import CliRunner

from vae_robust import cli, data as data_module, judges, training
from vae_robust.attacks import attack, relative_weights, verify
from vae_robust.crossed import two_sided, weighted_median
from vae_robust.data import DataError, ImageData, as_images, load
from vae_robust.metrics import (Code, DisentanglementError, beta_score, dci, score_all, mig,
                                mig_samples, sap, udr)
from vae_robust.diagnosis import (blind_is_better, diagnose, left_the_ball, no_better_than_noise,
                                  not_converged, not_monotone)
from vae_robust.explorer import LatentExplorer
from vae_robust.joint_vae import purity
from vae_robust.judges import judged, lenet, train_judge
from vae_robust.objectives import AttackError
from vae_robust.optimisers import OPTIMISERS, Watched, square
from vae_robust.play import AttackPlayground
from vae_robust.robustness import (auddc, counts, evaluate, pairs, reconstruct, ssim, stays_within,
                                   together, worst)
from vae_robust.settings import (DiskError, SettingsError, TableError, facts_of, keep_table,
                                 kept_table, preset, read_table, save_csv, write)
from vae_robust.studies import publish
from vae_robust.sweep import SweepError, answer, path_of, plan, sweep
from vae_robust.training import (TrainingError, build, fit, load_checkpoint, load_weights,
                                 objective, own_images, train)
from vae_robust.vae import LIKELIHOODS, VAE

TINY, TINY_ATTACK = preset('digits.entangled', steps=2, batch=8), preset('attack.strong')
X = load('digits').x[:60]


def one_sentence(error):
    "The words of an error, which are a sentence or several in one line."
    words = str(error)
    assert words and '\n' not in words and words[-1] in '.?)', words
    return words


def flipped(data, bit):
    "Bytes in which one `bit` is another."
    data = bytearray(data)
    data[bit//8] ^= 1 << bit % 8
    return bytes(data)


def same(one, other):
    "Whether two modules have the same numbers."
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


LABELS, JUDGE = torch.arange(60) % 3, nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()


# ------------------------------------------------------------------ folders of pictures
@pytest.fixture
def album(tmp_path, monkeypatch):
    "A folder with twelve pictures of noise, and a data folder of its own."
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path/'data'))
    (tmp_path/'album').mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path/'album'/f'{i:02d}.png')
    return tmp_path/'album'


def pictures(album):
    "All pictures of an album, as `load` gives them."
    return torch.cat([load(f'faces:{album}', part).x for part in ('train', 'test')])


def cache_of(album):
    return next((album.parent/'data'/'faces').glob('*.npy'))


def test_a_note_without_its_pictures_is_not_believed(album):
    first = pictures(album).clone()
    cache_of(album).unlink()
    assert torch.equal(pictures(album), first) and first.float().mean() > 100


@pytest.mark.parametrize('suffix, damage', [
    ('.npy', lambda b: b[:-700]), ('.npy', lambda b: b[9:]), ('.npy', lambda b: b''),
    ('.npy', lambda b: b[:4000] + bytes(999) + b[4999:]),
    ('.json', lambda b: b[:30]), ('.json', lambda b: b'')])
def test_a_damaged_cache_is_made_again(album, suffix, damage, capsys):
    first = pictures(album).clone()
    file = cache_of(album).with_suffix(suffix)
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(pictures(album), first)
    assert 'is decoded again' in capsys.readouterr().out


def test_a_rest_of_a_killed_decoding_is_not_in_the_way(album):
    first = pictures(album).clone()
    part = cache_of(album).with_suffix('.part')
    for file in (cache_of(album), cache_of(album).with_suffix('.json')):
        file.unlink()
    part.write_bytes(b'nothing of the kind')
    assert torch.equal(pictures(album), first) and not part.exists()


def test_pictures_that_are_too_large_or_not_there_are_named(album, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    Image.new('L', (200, 200)).save(album/'03.png')
    with pytest.raises(DataError, match='03.png'):
        pictures(album)
    (album/'03.png').unlink()
    (album/'03.png').symlink_to('/nowhere/at/all')
    with pytest.raises(DataError, match='links to nothing: 03.png'):
        pictures(album)


def test_a_full_disk_gets_a_sentence_before_anything_is_mapped(album, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(DiskError, match='needs 147,456 bytes, and [0-9,]+ are free'):
        pictures(album)


def deep(album):
    "A ramp of 16 bits from black to white."
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(album/'own.png')
    return lambda x: assert_close(x[:, 20], torch.tensor(ramp//257).byte().expand(3, 64))


def clear(album):
    "A black square on nothing."
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48, 3] = 255
    Image.fromarray(rgba).save(album/'own.png')
    corners = torch.tensor([[255, 255], [255, 0]]).byte()
    return lambda x: assert_close(x[:, ::32, ::32], corners.expand(3, 2, 2))


def turned(album):
    "The upper half white, lying on its side."
    half, exif = np.zeros((64, 64), np.uint8), Image.Exif()
    half[:32], exif[0x0112] = 255, 6
    Image.fromarray(half).save(album/'own.png', exif=exif)
    return lambda x: assert_close(x[0], torch.tensor(half.T[:, ::-1].copy()))


@pytest.mark.parametrize('kind', [deep, clear, turned])
def test_pictures_are_decoded_as_people_see_them(album, kind):
    right = kind(album)
    right(load(f'faces:{album}').x[-1])  # own.png


def test_a_broken_source_gives_way_to_the_next(tmp_path, monkeypatch):
    right = {f: f.encode() for f in data_module.MD5['mnist']}
    def whole(name, folder):
        for f, b in right.items():
            (folder/f).write_bytes(b)
    def torn(name, folder):
        for f in right:
            (folder/f'{f}.gz').write_bytes(gzip.compress(bytes(5000))[:12] + b'\xff'*40)
    def page(name, folder):
        (folder/'x').write_bytes(b'<html>not here</html>')
        zipfile.ZipFile(folder/'x')
    def tape(name, folder):
        (folder/'x').write_bytes(b'<html>not here</html>')
        tarfile.open(folder/'x')
    def cut(name, folder): raise http.client.IncompleteRead(b'')
    monkeypatch.setattr(data_module, 'genuine', lambda name, file, b: right[file] == b)
    for i, bad in enumerate((torn, page, tape, cut)):
        monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path/str(i)))
        monkeypatch.setitem(data_module.SOURCES, 'mnist', (bad, whole))
        assert len(data_module.fetch('mnist')) == 4
    monkeypatch.setitem(data_module.SOURCES, 'mnist', (torn, page, tape, cut))
    with pytest.raises(DataError, match='torn: .*page: .*tape: .*cut: '):
        data_module.fetch('mnist')


# ------------------------------------------------------------------ one door for images
HALF = X.float()/255

@pytest.mark.parametrize('x, as_what', [
    (HALF, HALF), (HALF.double(), HALF), (HALF.half(), HALF.half().float()), (X, X),
    (X.long(), X), (X > 127, (X > 127).float()), (X.numpy(), X), (X[:, 0], X), ([*X], X),
    (X.numpy().astype('>u2'), X), (X.numpy()[::-1], X.flip(0)), (ImageData(X, None), X),
    ((HALF + 2e-4).half().clamp(max=1.0009), (HALF + 2e-4).half().float().clamp(max=1))])
def test_what_can_only_mean_one_thing_is_converted(x, as_what):
    y = as_images(x, (1, 32, 32))
    assert torch.equal(y, as_what) and y.dtype == as_what.dtype


@pytest.mark.parametrize('x, words', [
    (2*HALF - 1, r'from -1 to 1, .*take \(x \+ 1\)/2'), (X.float(), 'from 0 to [0-9]{3}, .*divide'),
    ((HALF - .13)/.31, 'undo what standardised'), (X.long()*257, 'int64, from 0 to [0-9]{5}'),
    ((X > 127).byte(), 'multiply them by 255'), (HALF/0, 'not finite, the first in image 0'),
    (HALF.expand(-1, 3, -1, -1), 'must be 1 x 32 x 32, not 3 x 32 x 32: average'),
    (HALF[..., 2:30, 2:30], 'not 1 x 28 x 28: resize'),
    (HALF.permute(0, 2, 3, 1), 'channels first'),
    (HALF[:0], 'none'), (HALF[0, 0], r'shape \(N, C, H, W\)'), ('mnist', 'not a str')])
def test_what_could_mean_anything_is_refused_with_a_remedy(x, words):
    for error in (DataError, TrainingError):
        with pytest.raises(error, match=f'^They .*{words}') as e:
            as_images(x, (1, 32, 32), 'They', error)
        one_sentence(e.value)


@pytest.mark.parametrize('change', [lambda x: x*2 - 1, lambda x: x*255, lambda x: (x - .13)/.31,
                                    lambda x: (x > .5).byte(), lambda x: x[..., :28, :28]])
def test_no_training_metric_or_explorer_takes_images_of_another_range(change):
    x, vae = change(HALF), VAE(4).eval()
    with pytest.raises(TrainingError) as e:
        fit(VAE(4), objective(TINY), x, 1, 8, progress=False)
    one_sentence(e.value)
    with pytest.raises((DisentanglementError, DataError)):
        score_all(vae.posterior, x, np.arange(60) % 3)
    with pytest.raises(DataError):
        LatentExplorer(vae, ImageData(x, None))


def test_a_model_reads_images_as_they_lie_in_memory():
    vae = VAE(4).eval()
    want = vae(HALF[:4])
    for x in (X[:4], X[:4].numpy(), X[:4, 0], X[:4].long(), HALF[:4].double()):
        assert_close(vae(x), want)
    code = vae.posterior(X[:4]).mode
    assert_close(vae.log_likelihood(X[:4], code), vae.log_likelihood(HALF[:4], code))


@pytest.mark.parametrize('optimiser', OPTIMISERS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_images_are_attacked_in_their_type_whatever_that_of_the_model(optimiser, dtype):
    p, x = preset('attack.strong', steps=3, optimiser=optimiser, step=.3, lam=0, best=True), HALF[:4]
    vae = VAE(4, 3).eval()
    run = lambda a: attack(vae, a, a.flip(0), p, progress=False, trace=True)
    single, found = run(x), run(x.to(dtype))
    assert found.x.dtype == dtype and found.before.dtype == found.after.dtype == torch.float32
    assert (found.after <= found.before).all() and (found.nans == 0).all()
    assert_close(found.trace[:, 0].float(), single.trace[:, 0], rtol=.1, atol=0)
    assert found.trace.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize('optimiser', OPTIMISERS)
@pytest.mark.parametrize('fails', [False, True])
def test_the_best_image_is_remembered_if_it_was_the_first(optimiser, fails):
    "Steps are far too long here, and with `fails` where nothing can be evaluated."
    x = torch.full((3, 1, 8, 8), .5)
    def loss(a):
        far = (a - .5).square().flatten(1).sum(1)
        return (.01 - far).sqrt() - .1 + far if fails else far
    f, keys = Watched(loss), {'adam': {'best': True}, 'square': {'seeds': [0, 1, 2]}}.get(optimiser, {})
    found = OPTIMISERS[optimiser](f, x + 1e-3, x, .1, 4, .9, **keys)
    if not fails:
        assert_close(loss(found), f.lowest)
        assert (loss(found) <= loss(x + 1e-3)).all()
    assert torch.equal(found, f.best) and found.isfinite().all() and loss(found).isfinite().all()


@pytest.mark.parametrize('wrong', [{'seed': 1.5}, {'seed': -1}, {'seed': 2**64}, {'seed': '1'},
                                   {'eps': '8/255'}, {'eps': [[.1], [.1, .2]]}, {'eps': {'a': 1}}])
def test_what_is_no_number_is_told(wrong):
    with pytest.raises(AttackError, match=[*wrong][0]) as e:
        attack(VAE(4).eval(), HALF[:2], HALF[2:4], TINY_ATTACK, progress=False, **wrong)
    one_sentence(e.value)


@pytest.mark.parametrize('seed', [np.int64(3), torch.tensor(3)])
def test_a_seed_may_be_of_any_whole_kind(seed):
    vae, p = VAE(4).eval(), TINY_ATTACK.model_copy(update={'noise': .5})
    run = lambda s: attack(vae, HALF[:2], HALF[2:4], p, progress=False, seed=s).x
    assert torch.equal(run(seed), run(3)) and not torch.equal(run(3), run(4))


@pytest.mark.parametrize('key', ['models', 'seeds', 'attack.eps'])
def test_a_list_with_a_hole_is_told(key):
    with pytest.raises(SettingsError, match='a word is missing') as e:
        preset('job.smoke', **({'models': 'digits.entangled'} | {key: '1,'}))
    one_sentence(e.value)


def test_images_are_attacked_one_at_a_time_at_least():
    for batch in (0, -1):
        with pytest.raises(AttackError, match=f'batch = {batch}: at least one image'):
            attack(VAE(4).eval(), HALF[:2], HALF[2:4], TINY_ATTACK, batch, progress=False)


def test_images_are_as_alike_as_their_grey_values_whatever_their_type():
    a, b = X[:4], X[4:8]
    want = ssim(a/255, b/255)
    assert (want.abs() < .9).all()
    for kind in (lambda x: x, lambda x: x.numpy(), lambda x: x.long(), lambda x: x.double()/255):
        assert_close(ssim(kind(a), kind(b)), want)
    with pytest.raises(DataError, match='divide them by 255'):
        ssim(a.float(), b.float())
    for other in (b[:1], b[..., :20], b.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match='others of their shape') as e:
            ssim(a, other)
        one_sentence(e.value)
    with pytest.raises(ValueError, match='at least 11 x 11'):
        ssim(a[..., :9], b[..., :9])


# ------------------------------------------------------------------ what no float32 may change
@pytest.mark.parametrize('a, b', [(100, 101), (254, 255), (252, 255), (255, 255), (0, 1)])
def test_no_two_images_are_more_alike_than_equal_ones(a, b):
    p, q = (torch.full((1, 1, 32, 32), grey/255) for grey in (a, b))
    m, n = a/255, b/255
    want = (2*m*n + 1e-4)/(m*m + n*n + 1e-4)
    assert want <= 1 and ssim(p, q).item() == pytest.approx(want, abs=1e-7) and ssim(p, q) <= 1


@pytest.mark.parametrize('optimiser, ball', [(o, b) for o in OPTIMISERS for b in ('linf', 'l2')
                                             if b == 'linf' or o not in ('lbfgs', 'square')])
def test_an_objective_of_any_unit_falls_by_the_same_share(optimiser, ball):
    eps = .1 if ball == 'linf' else .5
    p = preset('attack.signs', optimiser=optimiser, ball=ball, eps=eps, step=.3, steps=20, best=True)
    x, W = torch.rand(6, 1, 8, 8), torch.randn(64, 5)
    def share(unit):
        view = lambda a: (a.flatten(1) @ W)*unit
        found = attack(view, x[:3], x[3:], p, progress=False)
        return found.after/found.before
    want = share(1.)
    assert (want < .98).all()
    for unit in (1e6, 1e-4, 1e-6, 1e-14, 1e-18):
        assert_close(share(unit), want, atol=.01, rtol=0)


@pytest.mark.parametrize('logit', [1e-3, .5, 5., 16., 50., 200., 1e4, 1e20])
def test_a_sure_continuous_bernoulli_is_as_sure_as_its_logit_says(logit):
    p, l = LIKELIHOODS['continuous_bernoulli'](torch.tensor([logit, -logit])), np.float64(logit)
    high = 1/-np.expm1(-l) - 1/l
    assert p.mean[0].item() == pytest.approx(high, abs=1e-6)
    low = 1/l + np.exp(-l)/np.expm1(-l)
    assert p.mean[1].item() == pytest.approx(low, rel=1e-5)
    right = .3*l - l + np.log(l/-np.expm1(-l))
    assert p.log_prob(torch.tensor(.3))[0].item() == pytest.approx(right, rel=1e-5, abs=1e-5)


# ------------------------------------------------------------------ modes
def test_looking_at_a_model_in_training_mode_does_not_change_it():
    vae = VAE(4, network='large').train()
    vae.decoder.eval()
    modes, numbers = [m.training for m in vae.modules()], VAE(4, network='large')
    numbers.load_state_dict(vae.state_dict())
    explorer = LatentExplorer(vae, ImageData(X, None))
    explorer.sliders[0].value += 1
    score_all(lambda b: vae.posterior(b).z, X, np.arange(60) % 3, {'MIG': mig}, halves=0)
    assert same(vae, numbers) and modes == [m.training for m in vae.modules()]


def test_reconstructing_with_a_model_in_training_mode_does_not_change_it():
    vae = VAE(4, network='large').train()
    kept = {k: v.clone() for k, v in vae.state_dict().items()}
    found = reconstruct(vae, HALF[:8])
    stays_within(vae, HALF[:4], 1., n=2)
    assert vae.training and all(torch.equal(v, kept[k]) for k, v in vae.state_dict().items())
    assert torch.equal(found, vae.eval()(HALF[:8]))


@pytest.mark.parametrize('dropout', [False, True])
def test_a_judge_is_left_in_the_mode_it_was_in(dropout):
    judge = lenet().train()
    judge[0].eval()
    modes = [m.training for m in judge.modules()]
    judged(judge, HALF[:3], dropout)
    assert modes == [m.training for m in judge.modules()]


# ------------------------------------------------------------------ one number, or one for each image
def test_labels_of_several_factors_make_no_pairs():
    for labels in (torch.arange(60).view(30, 2) % 3, torch.zeros(30).long(), torch.empty(30, 0)):
        with pytest.raises(ValueError, match='Pairs need one label for each image'):
            pairs(labels, 2)
    assert len(pairs(np.arange(30) % 3, 2)) == 12  # as numpy has them, too


def test_what_belongs_together_has_one_length():
    three, four = torch.arange(3), torch.arange(4)
    for odd in (0, 1, 2, 3):
        with pytest.raises(ValueError, match='have the lengths'):
            counts(*(torch.arange(1) if i == odd else three for i in range(4)))
    with pytest.raises(ValueError, match='3 changes and 4 distances'):
        auddc(three/3, four/4)
    with pytest.raises(ValueError, match='60 images and 59 labels'):
        evaluate(VAE(4).eval(), JUDGE, TINY_ATTACK, ImageData(X, LABELS[:59]), progress=False)
    with pytest.raises(TrainingError, match='unequal lengths, .3, 4.'):
        fit(nn.Linear(1, 1), lambda *_: None, (three, four), 1, 2, progress=False)
    one = pd.DataFrame({'source': [1, 2], 'target': [3, 4], 'j_before': [1, 2], 'j_after': [1, 3]})
    for of in (together, worst):
        of([one, one], 'j')
        with pytest.raises(ValueError, match='different pairs'):
            of([one, one[::-1]], 'j')


def test_seeds_and_radii_are_one_for_each_image():
    loss = lambda x: x.flatten(1).sum(1)
    for seeds in ([3], [1, 2, 3]):
        with pytest.raises(AttackError, match=f'{len(seeds)} seeds for 2 images'):
            square(loss, HALF[:2], HALF[:2], .1, 3, seeds=seeds)
    for eps in (torch.tensor([.1]), torch.full((3,), .1), math.nan):
        with pytest.raises(AttackError, match='eps must be'):
            verify(HALF[:2], HALF[:2], eps)
    verify(HALF[:2], HALF[:2], torch.tensor(.1))
    p = preset('attack.relative')
    with pytest.raises(AttackError, match='3 sources and 2 targets'):
        relative_weights(VAE(4).eval(), HALF[:3], HALF[3:5], p)


def test_a_judge_sees_bytes_as_the_images_that_they_are():
    judge = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    want = judged(judge, HALF)
    for x in (X, X.numpy(), [*X]):
        assert torch.equal(judged(judge, x), want)


# ------------------------------------------------------------------ rates that are no numbers
@pytest.mark.parametrize('said', [
    lambda: not_converged(math.nan, 40.), lambda: not_converged(40., math.nan),
    lambda: not_monotone((.1, .2, .3), (1., math.nan, 2.)),
    lambda: no_better_than_noise(math.nan, 2.), lambda: no_better_than_noise(40., math.nan),
    lambda: blind_is_better(40., math.nan), lambda: left_the_ball(HALF/0, HALF, TINY_ATTACK)])
def test_no_rule_passes_on_what_is_no_number(said):
    assert one_sentence(said())


@pytest.mark.filterwarnings('error')
def test_a_diagnosis_without_a_source_that_is_recognised_says_so():
    blind = lambda x: F.one_hot(torch.full((len(x),), 9), 10).float()
    p = preset('attack.strong', steps=1, pairs=1)
    said, = diagnose(VAE(4).eval(), blind, p, ImageData(X, LABELS))
    assert 'recognises the reconstruction of no source' in one_sentence(said)


def test_no_draw_and_no_median_that_is_no_number_speaks_for_a_difference():
    assert math.isnan(two_sided(np.array([1., math.nan] + [2.]*99)))
    assert np.isnan(weighted_median([1., 2.], np.array([[0., 0]]))).all()
    assert np.isnan(weighted_median([1., math.nan], np.ones((1, 2)))).all()
    assert weighted_median([1., math.nan], np.array([[1., 0]])).tolist() == [1.]


# ------------------------------------------------------------------ trainings
@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run of a tiny model, and the checkpoint that it had on its way."
    folder, kept = tmp_path_factory.mktemp('run'), []
    with pytest.MonkeyPatch.context() as patch:
        save = training.save_checkpoint
        def keeping(path, **state):
            save(path, **state)
            kept.append(path.read_bytes())
        patch.setattr(training, 'save_checkpoint', keeping)
        train(TINY, folder, progress=False, every=1)
    return folder, kept[0]


def test_no_flipped_bit_of_a_checkpoint_is_believed(run, tmp_path):
    rng, file = random.Random(0), tmp_path/'checkpoint.pt'
    file.write_bytes(run[1])
    state = torch.load(file, weights_only=True)
    asked = state['settings'], state['data']
    assert load_checkpoint(file, *asked)['step'] == 1
    for _ in range(15):
        file.write_bytes(flipped(run[1], rng.randrange(8*len(run[1]))))
        with pytest.raises(TrainingError, match='damaged: delete it'):
            load_checkpoint(file, *asked)


def test_no_flipped_bit_of_weights_is_believed(run, tmp_path):
    shutil.copytree(run[0], tmp_path/'run')
    rng, file = random.Random(0), tmp_path/'run'/'weights.safetensors'
    whole, vae = file.read_bytes(), build(TINY)
    for _ in range(15):
        file.write_bytes(flipped(whole, rng.randrange(8*len(whole))))
        with pytest.raises(TrainingError, match='damaged'):
            load_weights(file, vae)


def test_another_set_of_images_does_not_get_the_model_of_the_first(tmp_path):
    first = train(TINY, tmp_path/'a', data=X, progress=False)
    with pytest.raises(TrainingError, match='other settings or images'):
        train(TINY, tmp_path/'a', data=255 - X, progress=False)
    assert not same(first, train(TINY, tmp_path/'b', data=255 - X, progress=False))
    assert same(first, train(TINY, tmp_path/'a', data=X, progress=False))


@pytest.mark.parametrize('n_c', [0, 10])
def test_a_training_that_diverges_says_so_and_names_no_file_that_is_not_there(tmp_path, n_c):
    wild = TINY.model_copy(update={'lr': 1e20, 'n_c': n_c, 'steps': 5})
    with pytest.raises(TrainingError, match='training diverged') as e:
        train(wild, tmp_path/'run', data=X, progress=False)
    assert 'checkpoint' not in one_sentence(e.value) and not (tmp_path/'run').exists()


def test_one_image_that_is_no_number_is_named(tmp_path):
    x = HALF.clone()
    x[3] = math.nan
    with pytest.raises(TrainingError, match='not finite, the first in image 3'):
        train(TINY, tmp_path, data=x, progress=False)


def test_the_published_sprites_are_other_images_than_those_that_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path))
    few = dict.fromkeys(data_module.FACTORS['dsprites'], 1) | {'x': 2, 'y': 2}
    monkeypatch.setitem(data_module.FACTORS, 'dsprites', few)
    p = preset('dsprites.vae', steps=1, batch=2)
    assert own_images(p) == ''
    imgs = (np.arange(4*64*64).reshape(4, 64, 64) % 2).astype(np.uint8)
    np.savez_compressed(tmp_path/data_module.NPZ, imgs=imgs)
    md5 = hashlib.md5((tmp_path/data_module.NPZ).read_bytes()).hexdigest()
    monkeypatch.setitem(data_module.MD5, 'published dsprites', {data_module.NPZ: md5})
    assert own_images(p) == data_module.digest(load('dsprites').x) != ''
    assert own_images(p, load('dsprites').x) == own_images(p)


def test_what_a_killed_fetching_left_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path))
    def killed(name, folder):
        (folder/'half').write_bytes(b'of a file')
        os.kill(os.getpid(), signal.SIGKILL)
    if not (child := os.fork()):
        data_module.fetched('mnist', killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 1
    def none(name, folder): assert folder.is_dir() and not [*folder.iterdir()]
    assert 'not the published ones' in data_module.fetched('mnist', none)[1]
    assert not [*tmp_path.iterdir()]


def test_a_process_of_somebody_else_is_running(tmp_path, monkeypatch):
    name = tmp_path/f'.a.{platform.node()}.1-1'
    name.write_text('written by another user')
    def forbidden(*_): raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'kill', forbidden)
    write(tmp_path/'b', 'mine')
    assert name.exists() and (tmp_path/'b').read_text() == 'mine'


@pytest.mark.parametrize('where', ['write_bytes', 'unlink'])
def test_what_a_killed_training_left_is_swept_away(tmp_path, where):
    if not (child := os.fork()):
        def killed(self, *args, do=getattr(Path, where), **kw):
            if 'checkpoint' not in self.name: return do(self, *args, **kw)
            if where == 'write_bytes':
                do(self, args[0][:len(args[0])//2])
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(Path, where, killed)
        train(TINY, tmp_path, progress=False, every=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(TINY, tmp_path, progress=False, every=1)
    assert {f.name for f in tmp_path.iterdir()} == {'curves.csv', 'run.json', 'weights.safetensors'}


@pytest.mark.parametrize('last', ['run.json', 'curves.csv', 'weights.safetensors'])
def test_an_extension_that_is_killed_between_two_files_goes_on(tmp_path, monkeypatch, last):
    "Until the new weights are there the old ones are sound, and damage to them is still noticed."
    first, longer = train(TINY, tmp_path, progress=False), TINY.model_copy(update={'steps': 4})
    whole = train(longer, shutil.copytree(tmp_path, tmp_path/'other'), progress=False, extend=True)
    file = tmp_path/'weights.safetensors'
    def killed(path, data, do=training.write):
        do(path, data)
        if path.name == last: raise KeyboardInterrupt
    for _ in range(1 if last == file.name else 2):  # and again, unless it is finished
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, 'write', killed)
            train(longer, tmp_path, progress=False, extend=True)
    sound = file.read_bytes()
    assert same(load_weights(file, build(TINY)), whole if last == file.name else first)
    file.write_bytes(flipped(sound, 8*len(sound) - 1))
    with pytest.raises(TrainingError, match='damaged'):
        load_weights(file, build(TINY))
    file.write_bytes(sound)
    assert same(train(longer, tmp_path, progress=False, extend=True), whole)
    assert not (tmp_path/'checkpoint.pt').exists()


# ------------------------------------------------------------------ presets and the command line
IMPOSSIBLE = {
    'digits.entangled': [{'size': 48}, {'size': 33}, {'network': 'large', 'size': 128},
                         {'channels': 3}, {'n_z': 10**12}],
    'digits.disentangled': [{'n_c': 0}],
    'mnist.tc': [{'data': 'digits'} | more for more in ({}, {'n_data': 10}, {'batch': 1})],
    'mnist.factor': [{'data': 'digits', 'batch': 1}]}

@pytest.mark.parametrize('name, change', [(n, c) for n, cs in IMPOSSIBLE.items() for c in cs])
def test_presets_that_no_model_can_have_end_in_a_sentence(tmp_path, name, change):
    words = [w for k, v in {'steps': 2, **change}.items() for w in ('--set', f'{k}={v}')]
    asked = CliRunner().invoke(cli.app, ['train', name, '--runs', str(tmp_path/'runs'), *words])
    assert asked.exit_code == 1 and isinstance(asked.exception, SystemExit)
    one_sentence(asked.output.strip())
    assert not (tmp_path/'runs').exists()
    with pytest.raises(SettingsError, match=r'^settings.ini \['):
        preset(name, **change)
    with pytest.raises(SettingsError):
        build(preset(name, n_data=1500).model_copy(update={'n_data': 10**9, 'batch': 0} | change))


IMPOSSIBLE_ATTACKS = [
    ('attack.l2', {'optimiser': 'square'}), ('attack.l2', {'optimiser': 'lbfgs'}),
    ('attack.untargeted', {'noise': 0}), ('attack.untargeted', {'relative': True}),
    ('attack.l2', {'eps': 1e200}), ('attack.strong', {'eps': 8}), ('attack.square', {'step': 1e308})]

@pytest.mark.parametrize('name, change', IMPOSSIBLE_ATTACKS)
def test_attacks_that_nothing_can_do_are_refused_when_they_are_read(name, change):
    with pytest.raises(SettingsError) as e:
        preset(name, **change)
    one_sentence(e.value)


def test_images_of_ones_own_may_be_of_any_kind_and_number():
    assert preset('digits.entangled', data='mine', channels=3, size=64).channels == 3
    assert preset('mnist.tc', data='mine', n_data=100).n_data == 100
    assert preset('mnist.tc', n_data=100).n_data == 100  # a part of them


def test_a_judge_of_images_is_not_shown_features():
    p = preset('attack.strong', objective='classifier', steps=1, pairs=1)
    judge, vae = nn.Conv2d(1, 2, 32).eval(), VAE(4).eval()
    with pytest.raises(AttackError, match='judge features of the shape .2, 4., and it cannot'):
        attack(vae, X[:2], X[2:4], p.model_copy(update={'features': 'means'}), progress=False,
               judge=judge)
    with pytest.raises(AttackError, match='the judges here see images'):
        evaluate(vae, judge, p, ImageData(X, torch.arange(60) % 3), progress=False)
    asked = CliRunner().invoke(cli.app, ['attack', 'mnist.entangled', 'attack.strong', '--set',
                                         'objective=classifier'])
    assert asked.exit_code == 1 and 'judges here see images' in one_sentence(asked.output.strip())


@pytest.mark.parametrize('data', ['cartoons', 'blobs'])
def test_a_judge_learns_only_what_it_can_see(tmp_path, monkeypatch, data):
    few = {'cartoons': ImageData(torch.zeros(9, 3, 64, 64).byte(), torch.zeros(9, 10).long()),
           'blobs': ImageData(torch.zeros(9, 1, 32, 32).byte(), torch.zeros(9, 2).long())}
    monkeypatch.setattr(judges, 'load', few.get)
    with pytest.raises(SettingsError, match=f'data = {data}: these judges see'):
        train_judge(preset('judge.smoke', data=data), tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()


def test_no_flipped_bit_of_a_judge_is_believed(tmp_path):
    p = preset('judge.smoke', steps=1, batch=4)
    train_judge(p, tmp_path, progress=False)
    rng, file = random.Random(0), tmp_path/'weights.safetensors'
    whole = file.read_bytes()
    for _ in range(10):
        file.write_bytes(flipped(whole, rng.randrange(8*len(whole))))
        with pytest.raises(TrainingError, match='damaged'):
            train_judge(p, tmp_path, progress=False)


def test_a_seed_that_torch_does_not_take_ends_in_a_sentence(tmp_path):
    with pytest.raises(SettingsError, match='less than 2'):
        train(TINY, tmp_path, seed=2**32, progress=False)


@pytest.mark.parametrize('change', [
    {'seeds': '0, 0'}, {'seeds': '0, 00'},
    {'pairs': '1, 1, 1', 'attacks': 'attack.none, attack.strong, attack.strong'},
    {'attack.eps': '0.1, 0.10'}, {'attack.eps': '1e-1, 0.1'}, {'attack.eps': (.1, .1)},
    {'attack.sample': 'true, True'}, {'model.beta': '1, 1.0'}])
def test_nothing_counts_twice(change):
    with pytest.raises(SettingsError, match='is named twice'):
        preset('job.smoke', models='digits.entangled', **change)


def test_the_number_of_pairs_is_no_axis():
    with pytest.raises(SettingsError, match='attack.pairs is no axis') as e:
        preset('job.smoke', models='digits.entangled', **{'attack.pairs': '1, 2'})
    one_sentence(e.value)
    assert preset('job.smoke', models='digits.entangled', **{'attack.eps': .1}).axes == {'attack.eps': (.1,)}


# ------------------------------------------------------------------ sweeps and tables
def test_a_torn_line_of_the_clock_does_not_stop_the_next_plan(tmp_path):
    cells, one = [{'a': i} for i in range(4)], lambda cell: pd.DataFrame({'v': [cell['a']]})
    go = partial(sweep, compute=one, folder=tmp_path, progress=False, jobs=1)
    go(cells[:2])
    clock = tmp_path/'seconds.jsonl'
    clock.write_bytes(clock.read_bytes()[:-15])
    go(cells[:3])
    found = plan(cells, tmp_path)
    assert found['done'] == 3 and math.isfinite(found['seconds'])


def test_an_answer_that_was_cut_short_is_computed_again(tmp_path):
    cell, fifty = {'a': 1}, lambda _: pd.DataFrame({'v': range(50)})
    sweep([cell], fifty, tmp_path, progress=False, jobs=1)
    file = path_of(cell, tmp_path)
    file.write_text(file.read_text()[:-20])
    assert answer(cell, tmp_path) is None
    assert len(sweep([cell], fifty, tmp_path, progress=False, jobs=1)) == 50


def test_a_cell_whose_process_dies_takes_no_other_with_it(tmp_path):
    def compute(cell):
        import os, pandas
        if cell.get('die'):
            os._exit(9)
        return pandas.DataFrame({'v': [1]})
    cells = [{'a': 0}, {'a': 1, 'die': True}, {'a': 2}]
    with pytest.raises(SweepError, match='1 of 3 cells failed, the others are done') as e:
        sweep(cells, compute, tmp_path, progress=False, jobs=2)
    assert json.dumps(cells[1]) in str(e.value)
    assert [answer(c, tmp_path) is not None for c in cells] == [True, False, True]


def test_odd_cells_and_backends_get_a_sentence(tmp_path):
    one = lambda _: pd.DataFrame({'v': [1]})
    assert sweep([], one, tmp_path, progress=False, jobs=1).empty
    odd = [{'a': np.int64(1)}, {'a': (1, 2)}]
    assert len(sweep(odd, one, tmp_path, progress=False, jobs=1)) == 2
    for cell, backend in (({'a': object()}, 'local'), ({'b': 1}, 'dask')):
        with pytest.raises(SweepError) as e:
            sweep([cell], one, tmp_path, backend, progress=False)
        one_sentence(e.value)


def test_a_table_comes_back_as_it_went(tmp_path):
    table = pd.DataFrame({'name': ['run #1', 'None', 'NA', '007', ''],
                          'n': ['007', '1', '2', '3', '4'], 'rate': [.5, 1, 2, math.nan, 4]})
    keep_table(tmp_path/'kept.csv', {'a': 1}, table)
    save_csv(table, 'saved', tmp_path)
    for back in (kept_table(tmp_path/'kept.csv', {'a': 1}), read_table(tmp_path/'saved.csv')):
        pd.testing.assert_frame_equal(back, table)


@pytest.mark.parametrize('text', ['', 'model,seed\n', '<<<<<<< HEAD\n# {}\n',
                                  '# {"cells": \n', '\xff'])
def test_a_damaged_table_in_the_way_of_a_publication_gets_a_sentence_at_most(tmp_path, text):
    path, new = tmp_path/'t.csv', pd.DataFrame({'model': ['a'], 'v': [1.]})
    path.write_text(text, 'latin1')
    assert facts_of(path) == {}
    try:
        publish(new, 't', {'a': 'key'}, ['model'], tmp_path)
    except TableError as e:
        assert 't.csv is damaged' in one_sentence(e)
        path.unlink()
        publish(new, 't', {'a': 'key'}, ['model'], tmp_path)
    pd.testing.assert_frame_equal(read_table(path), new)


# ------------------------------------------------------------------ metrics
RNG = np.random.default_rng(0)
V = np.stack([RNG.integers(0, 5, 600), RNG.permutation(np.arange(600) % 3)], 1)
Z = np.c_[V + .1*RNG.normal(size=V.shape), RNG.normal(size=600)]
WIDTH = np.full_like(Z, .1)

def test_metrics_care_for_no_unit_and_no_wrapping():
    sharp = mig_samples(Code(Z, np.full_like(Z, 1e-40)), V, halves=0).value
    assert 0 <= sharp <= 1
    shifted = [mig_samples(Code(Z + by, WIDTH), V, halves=0).value for by in (0, 1e8)]
    assert shifted[0] == pytest.approx(shifted[1], abs=1e-4)
    z = torch.tensor(Z)
    assert mig(Independent(Normal(z, .1), 1), V) == mig(Normal(z, .1), V)
    last, second = (dci(Z, V, nominal=[k], halves=0) for k in (-1, 1))
    assert [score.value for score in last] == [score.value for score in second]


@pytest.mark.parametrize('score', [
    lambda: udr([Z[:1], Z[:1]]), lambda: udr([Z[:2], -Z[:2]]), lambda: mig({'z': Z}, V),
    lambda: dci(Z, V, nominal=[7], halves=0), lambda: sap(Z, V, nominal=[7]),
    lambda: beta_score(Z, V, votes=1, halves=0), lambda: mig(Z, V, bins=0),
    lambda: mig(torch.rand(600, 1, 4, 4), V),
    lambda: score_all(lambda x: x.flatten(1), torch.rand(0, 1, 4, 4), V[:0]),
    lambda: purity([], []), lambda: purity([1, 2, 3], [1, 2])])
def test_what_no_metric_can_score_gets_a_sentence(score):
    with pytest.raises(ValueError) as e:
        score()
    assert type(e.value) in (DisentanglementError, ValueError) and 'array' not in str(e.value)
    one_sentence(e.value)


# ------------------------------------------------------------------ the explorer
def file_of(picture, name='own.png'):
    "A PIL image, or bytes, as the widget hands it over."
    if not isinstance(picture, bytes):
        picture.save(file := io.BytesIO(), 'PNG')
        picture = file.getvalue()
    return {'name': name, 'type': 'image/png', 'size': len(picture), 'content': memoryview(picture),
            'last_modified': pd.Timestamp(0)},


@pytest.fixture
def explorer():
    return LatentExplorer(VAE(3, 3).eval(), ImageData(X, None))


def test_the_same_file_can_come_again(explorer):
    white = Image.new('L', (28, 28), 255)
    explorer.upload.value = file_of(white)
    explorer.index.value = 5
    assert torch.equal(explorer.x, HALF[5:6])
    explorer.upload.value = file_of(white)
    assert explorer.x.min() == 1


def test_an_upload_lies_on_black_and_is_turned(explorer):
    a, exif = np.full((32, 32, 4), 255, np.uint8), Image.Exif()
    a[..., 3], exif[0x0112] = 0, 6
    a[:16, :, 3] = 255
    Image.fromarray(a).save(file := io.BytesIO(), 'PNG', exif=exif)
    explorer.upload.value = file_of(file.getvalue())
    assert explorer.x[0, 0, :, 16:].min() == 1 and explorer.x[0, 0, :, :16].max() == 0
    deep = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    explorer.upload.value = file_of(Image.fromarray(deep))
    assert_close(explorer.x[0, 0, 0], torch.tensor(deep[0]//257)/255)


@pytest.mark.parametrize('content', [b'', b'words', 'cut', 'bomb'])
def test_what_is_no_picture_gets_a_sentence_and_the_sliders_live(explorer, content, monkeypatch):
    whole = bytes(file_of(Image.new('L', (99, 99), 255))[0]['content'])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    content = {'cut': whole[:50], 'bomb': whole}.get(content, content)
    explorer.upload.value = file_of(content, 'mine.png')
    assert 'mine.png is not a picture' in explorer.note.value
    before = explorer.image.value
    explorer.sliders[0].value += 1
    assert explorer.image.value != before


def test_a_grey_picture_is_taken_by_a_colour_model():
    noise = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    explorer = LatentExplorer(VAE(4, 0, 3, 64).eval(), ImageData(noise, None))
    explorer.upload.value = file_of(Image.new('L', (28, 28), 255))
    assert explorer.x.shape == (1, 3, 64, 64) and explorer.x.min() == 1


def test_what_is_decoded_is_the_code_however_far_out(explorer):
    vae = VAE(3, 3).eval()
    with torch.no_grad():
        vae.encoder[-1].bias[:3] = torch.tensor([9., -8., 0.])
    explorer = LatentExplorer(vae, ImageData(X, None))
    assert_close(explorer.code, vae.posterior(HALF[:1]).mode)
    assert {(s.min <= -5, s.max >= 5) for s in explorer.sliders} == {(True, True)}


def test_the_explorer_counts_its_categories(explorer):
    explorer.category.index = (explorer.category.index + 1) % 3
    assert 'c = 0 to 2' in explorer.note.value


def test_models_that_cannot_share_an_explorer_are_named():
    with pytest.raises(ValueError, match='a: n_z = 3.*b: n_z = 4'):
        LatentExplorer({'a': VAE(3), 'b': VAE(4)}, ImageData(X, None))


# ------------------------------------------------------------------ the playground
class Foreign(nn.Module):
    "An autoencoder as others have it: no posterior, no categorical."
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(1024, 4), nn.Linear(4, 1024)
    def forward(self, x): return self.up(self.down(x.flatten(1))).sigmoid().view_as(x)


def test_the_playground_takes_foreign_models_and_the_classes_that_there_are():
    models = {'foreign': Foreign().eval(), 'wrapped': nn.DataParallel(VAE(4).eval()).eval()}
    play = AttackPlayground(models, {'judge': JUDGE}, ImageData(X, 3*LABELS + 1))  # 1, 4, 7
    play.sliders['steps'].value = 2
    for value, goes_to in ((9, 7), (5, 4), (0, 1)):
        play.sliders['target'].value = value
        assert play.sliders['target'].value == goes_to
    for seen in ('latent', 'output', 'judge'):
        play.objective.value = seen
        play.run.click()
        play.thread.join(60)
        assert 'foreign</b>: the judge saw' in play.note.value
    play.objective.value = 'kl'
    play.run.click()
    play.thread.join(60)
    assert 'AttackError: A distribution is needed' in play.note.value


@pytest.mark.parametrize('model, judge, data, words', [
    (VAE(4), JUDGE, (X, LABELS), 'VAE is in training mode'),
    (VAE(4).eval(), nn.Dropout(), (X, LABELS), 'Dropout is in training mode'),
    (VAE(4, 0, 1, 64).eval(), JUDGE, (X, LABELS), 'model own cannot take images .1, 32, 32.'),
    (VAE(4).eval(), nn.Linear(1024, 10).eval(), (X, LABELS), 'judge own cannot take images'),
    (lambda x: x[:, :, 1:], JUDGE, (X, LABELS), r'model own makes \(1, 1, 31, 32\)'),
    (lambda x: x, lambda x: x, (X, LABELS), 'judge own makes'),
    (VAE(4).eval(), JUDGE, (X, LABELS[:, None].expand(-1, 2)), 'one class, not labels'),
    (VAE(4).eval(), JUDGE, (X/127.5 - 1, LABELS), r'take \(x \+ 1\)/2')])
def test_what_cannot_be_played_with_gets_a_sentence(model, judge, data, words):
    with pytest.raises(AttackError, match=words):
        AttackPlayground({'own': model}, {'own': judge}, ImageData(*data))
