import json, os, threading, time
from hashlib import md5
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from scipy.stats import ttest_ind

from forks import run_cells

from vae_robust import data, studies
from vae_robust.experiments import faces as ch15
from vae_robust.objectives import norm
from vae_robust.data import (ATTR, ATTRIBUTES, CARTOON, GROUNDS, PARTITION, PICTURES, DataError,
                             attributes, cartoon, cartoon_attributes, cartoons, celeba_folder,
                             face_square, load, pixels)
from vae_robust.settings import preset
from vae_robust.training import build, pretrained, train
from vae_robust.vae import VAE, elbo

LONDON = Path(__file__).parents[2]/'shared'/'data'/'london_64.npz'
BASE = dict(turn=4, width=2, skin=1, hair_colour=1, hair=1, smile=4, eyes=3,
            glasses=0, background=1, light=3)

def drawn(**changes):
    "The cartoon BASE with changed classes, (3, 64, 64)."
    return cartoon(torch.tensor([[*(BASE | changes).values()]]))[0]

def classes(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(v, (n,), generator=g) for v in CARTOON.values()], 1)


# ------------------------------------------------------------------ cartoons
def test_a_cartoon_is_what_its_factors_say():
    assert list(BASE) == list(CARTOON)
    corner = lambda **kw: drawn(**kw)[:, 0, 0]
    for k in range(CARTOON['background']):
        torch.testing.assert_close(corner(background=k), (GROUNDS[k]*(1.08 - .0025)).clamp(0, 1))
    # lips are the reddest thing below the nose
    rows = lambda x: [(w*torch.arange(44., 56)).sum()/w.sum() for column in (27, 32, 37)
                      for w in [((x[0] - x[1])[44:56, column] - .3).clamp(min=0)]]
    left, middle, right = rows(drawn(smile=6))
    assert left < middle > right  # corners up
    left, middle, right = rows(drawn(smile=0))
    assert left > middle < right  # corners down
    white = lambda x: (x[:, 26:40, 16:48].amin(0) > .9).sum()
    whites = [white(drawn(eyes=k)) for k in range(5)]
    assert whites == sorted(whites)
    assert white(drawn(eyes=4)) > white(drawn(eyes=0))
    side = lambda k: drawn(light=k)[:, 40:44, 20:24].mean() - drawn(light=k)[:, 40:44, 40:44].mean()
    assert side(0) > .05 and abs(side(3)) < .01 and side(6) < -.05
    dark = lambda x: (x[:, 25:41, 14:50].amax(0) < .3).sum()
    assert dark(drawn(glasses=1)) > dark(drawn(glasses=0)) + 30
    brightness = [drawn(skin=k)[:, 43, 32].mean().item() for k in range(6)]
    assert brightness == sorted(brightness, reverse=True)


def test_eyes_lie_where_celeba_has_them():
    "(69, 112) and (109, 112) of 178 x 218 in the thesis's crop."
    x = drawn(eyes=4)
    for ex in (69, 109):
        column, row = round(ex*64/178), round(112*78/218 - 7)
        assert x[:, row - 1:row + 1, column - 2:column + 2].amin(0).amin() < .2


def test_every_factor_is_visible_and_the_mirror_is_exact():
    k = classes(100)
    for j, n in enumerate(CARTOON.values()):
        other = k.clone()
        other[:, j] = (k[:, j] + 1) % n
        assert (cartoon(k) - cartoon(other)).abs().flatten(1).amax(1).min() > .03, j
    mirrored = k.clone()
    mirrored[:, 0], mirrored[:, 9] = 8 - k[:, 0], 6 - k[:, 9]
    torch.testing.assert_close(cartoon(mirrored), cartoon(k).flip(-1), atol=1e-4, rtol=0)


def test_turned_features_move_as_on_a_cylinder():
    "(1.11): the middle of the mouth is at 32 + a sin(turn)."
    for k, turn in ((0, -.42), (4, 0.), (8, .42)):
        x = drawn(turn=k, smile=2)[:, 44:52]
        red = (x[0] - x[1] - .3).clamp(min=0).sum(0)
        assert abs((red*(torch.arange(64) + .5)).sum()/red.sum() - (32 + 18*np.sin(turn))) < 1.2


def test_the_set_is_the_same_every_time_and_the_parts_differ():
    n = {'train': 400, 'test': 300}
    a, b, test = cartoons('train', n), cartoons('train', n), cartoons('test', n)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.y, b.y)
    assert a.x.shape == (400, 3, 64, 64)
    assert a.x.dtype == torch.uint8
    assert not {tuple(k) for k in a.y.tolist()} & {tuple(k) for k in test.y.tolist()}
    assert (pixels(a.x) - cartoon(a.y)).abs().max() <= .5/255 + 1e-6
    y = cartoons('train', {'train': 400, 'test': 1}).y
    for j, v in enumerate(CARTOON.values()):
        assert sorted(set(y[:, j].tolist())) == list(range(v))


def test_attributes_by_hand():
    changes = (dict(hair=0, hair_colour=0), dict(hair=3, hair_colour=3, glasses=1),
               dict(skin=0, eyes=1, smile=3, width=4))
    rows = torch.tensor([[*(BASE | c).values()] for c in changes])
    said = [[n for n, a in zip(ATTRIBUTES, row) if a] for row in cartoon_attributes(rows).tolist()]
    assert said == [['Bald', 'Smiling'], ['Bangs', 'Gray_Hair', 'Eyeglasses', 'Smiling'],
                    ['Brown_Hair', 'Chubby', 'Narrow_Eyes', 'Pale_Skin']]
    names, a = attributes('cartoons', rows)
    assert names == [*ATTRIBUTES] and torch.equal(a, cartoon_attributes(rows))


# ------------------------------------------------------------------ CelebA's layout
def portrait(k, size=(178, 218)):
    x = Image.fromarray((255*cartoon(k[None])[0]).byte().permute(1, 2, 0).numpy())
    canvas = Image.new('RGB', (178, 218))
    canvas.paste(x.resize((178, 179), Image.BILINEAR), (0, 19))
    return canvas if size == (178, 218) else canvas.resize(size)

def lay_out(n=24, part=lambda i: (0, 0, 1, 2)[i % 4]):
    "A folder in CelebA's layout below the data folder; the classes of its faces."
    folder, k = celeba_folder(), classes(n, 7)
    (folder/PICTURES).mkdir(parents=True)
    for i in range(n):
        portrait(k[i]).save(folder/PICTURES/f'{i + 1:06}.jpg', quality=95)
    rows = [f'{i + 1:06}.jpg ' + ' '.join(f'{2*a - 1:2}' for a in row)
            for i, row in enumerate(cartoon_attributes(k).tolist())]
    (folder/ATTR).write_text('\n'.join([str(n), ' '.join(ATTRIBUTES), *rows]) + '\n')
    (folder/PARTITION).write_text(''.join(f'{i + 1:06}.jpg {part(i)}\n' for i in range(n)))
    return k

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path))
    monkeypatch.setattr(data, 'BLOCK', 4)
    return tmp_path

@pytest.fixture
def celeba(folder):
    return lay_out()

def reference(path):
    "The thesis's preprocessing: all of the picture to 64 x 78, then rows 7 to 70."
    small = Image.open(path).convert('RGB').resize((64, 78), Image.BILINEAR)
    return torch.tensor(np.asarray(small)[7:71]).permute(2, 0, 1)

def complaint(name='celeba', part='train'):
    with pytest.raises(DataError) as e:
        load(name, part)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_celebas_layout_is_read_as_the_thesis_did(celeba):
    train, test = load('celeba'), load('celeba', 'test')
    a, parts = cartoon_attributes(celeba), torch.tensor([(0, 0, 1, 2)[i % 4] for i in range(24)])
    assert train.x.shape == (18, 3, 64, 64)
    assert test.x.shape == (6, 3, 64, 64)
    assert train.x.dtype == torch.uint8
    assert torch.equal(train.y, a[parts < 2]) and torch.equal(test.y, a[parts == 2])
    for x, i in zip([*train.x, *test.x], [*np.flatnonzero(parts < 2), *np.flatnonzero(parts == 2)]):
        assert torch.equal(x, reference(celeba_folder()/PICTURES/f'{i + 1:06}.jpg'))
    assert attributes('celeba', train.y)[0] == [*ATTRIBUTES]
    assert load('celeba', 'test', 32).x.shape == (6, 3, 32, 32)


def test_pictures_are_mapped_and_decoded_once(celeba, monkeypatch):
    x = load('celeba').x
    if os.path.exists('/proc/self/maps'):
        assert str(celeba_folder()/'aligned_64.npy') in Path('/proc/self/maps').read_text()
    monkeypatch.setattr(data, 'decode_block', lambda *a: pytest.fail('decoded again'))
    assert torch.equal(load('celeba').x, x)
    x[0] = 0  # a private copy: the file is not touched
    assert load('celeba').x[0].any()


def test_a_corrupt_picture_is_named_and_the_rest_is_kept(celeba, monkeypatch):
    good = (celeba_folder()/PICTURES/'000007.jpg').read_bytes()
    (celeba_folder()/PICTURES/'000007.jpg').write_bytes(good[:len(good)//2])
    said = complaint()
    assert '1 of 24' in said and '000007.jpg' in said and 'truncated' in said and 'Replace' in said
    assert not (celeba_folder()/'aligned_64.npy').exists()
    done, whole = [], data.decode_block
    monkeypatch.setattr(data, 'decode_block',
                        lambda files, *to: (done.extend(files), whole(files, *to))[1])
    assert '000007.jpg' in complaint()  # still there, and nothing else is decoded again
    assert len(done) == 4
    (celeba_folder()/PICTURES/'000007.jpg').write_bytes(good)
    load('celeba')
    assert torch.equal(load('celeba').x[5], reference(celeba_folder()/PICTURES/'000007.jpg'))


def test_no_picture_at_all(celeba):
    sorry = b'<html>Too many users have downloaded this file</html>'
    (celeba_folder()/PICTURES/'000003.jpg').write_bytes(sorry)
    (celeba_folder()/PICTURES/'000009.jpg').write_bytes(b'')
    said = complaint()
    assert '2 of 24' in said and '000003.jpg (no picture)' in said and '000009.jpg' in said


def test_a_picture_of_another_size_is_named(celeba):
    portrait(celeba[0], (100, 120)).save(celeba_folder()/PICTURES/'000001.jpg')
    said = complaint()
    assert '000001.jpg' in said and '100 x 120' in said and '178 x 218' in said


def test_a_missing_picture_is_named_before_anything_is_decoded(celeba, monkeypatch):
    monkeypatch.setattr(data, 'decode_block', lambda *a: pytest.fail('decoded'))
    for i in (2, 5, 11, 20):
        (celeba_folder()/PICTURES/f'{i:06}.jpg').unlink()
    said = complaint()
    assert '4 of 24' in said
    assert '000002.jpg, 000005.jpg, 000011.jpg, ...' in said
    assert not list(celeba_folder().glob('*.part'))


@pytest.mark.parametrize('damage, words', [
    (lambda t: t[:len(t)*2//3], 'line'),  # cut in the middle of a line
    (lambda t: ''.join(t.splitlines(True)[:-5]), 'announces 24 pictures and lists 19'),
    (lambda t: t.replace(' -1 ', '  0 ', 1), 'line 3'),
    (lambda t: '', 'does not begin with'), (lambda t: t.split('\n', 1)[1], 'does not begin with')])
def test_a_damaged_attribute_file(celeba, damage, words):
    f = celeba_folder()/ATTR
    f.write_text(damage(f.read_text()))
    said = complaint()
    assert ATTR in said and words in said and 'get it again' in said


def test_a_cut_partition_file(celeba):
    f = celeba_folder()/PARTITION
    f.write_text(f.read_text()[:-60])
    assert PARTITION in complaint() and 'get it again' in complaint()


def test_text_files_of_the_published_length_must_be_the_published_ones(celeba, monkeypatch):
    monkeypatch.setattr(data, 'CELEBA_SIZE', 24)
    assert 'md5' in complaint() and data.MD5['celeba'][ATTR] in complaint()
    for f in (ATTR, PARTITION):
        monkeypatch.setitem(data.MD5['celeba'], f,
                            md5((celeba_folder()/f).read_bytes()).hexdigest())
    assert len(load('celeba').x) == 18


def test_what_is_missing_and_where_to_get_it(folder):
    said = complaint()
    assert all(f in said for f in (PICTURES, ATTR, PARTITION, 'mmlab.ie.cuhk.edu.hk',
                                   str(folder/'celeba'), 'VAE_ROBUST_DATA'))
    lay_out()
    (celeba_folder()/PARTITION).unlink()
    assert f'there is no {PARTITION}.' in complaint()
    (celeba_folder()/PICTURES).rename(celeba_folder()/'elsewhere')
    (celeba_folder()/f'{PICTURES}.zip').touch()
    assert 'waits to be unpacked' in complaint()


def test_an_interrupted_decoding_goes_on(celeba, monkeypatch):
    whole, done = data.decode_block, []
    def one_then_stop(files, *to):
        done.append(files[0].name)
        if len(done) == 4: raise KeyboardInterrupt
        return whole(files, *to)
    monkeypatch.setattr(data, 'ThreadPoolExecutor', partial(data.ThreadPoolExecutor, 1))
    monkeypatch.setattr(data, 'decode_block', one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        load('celeba')
    assert json.loads((celeba_folder()/'aligned_64.json').read_text())['done']
    assert not (celeba_folder()/'aligned_64.npy').exists()
    kept = len(json.loads((celeba_folder()/'aligned_64.json').read_text())['done'])
    done.clear()
    monkeypatch.setattr(data, 'decode_block',
                        lambda files, *to: (done.append(files[0].name), whole(files, *to))[1])
    x = load('celeba').x
    assert len(done) == 6 - kept
    assert torch.equal(x[0], reference(celeba_folder()/PICTURES/'000001.jpg'))
    for i, name in enumerate(['000001', '000002', '000003', '000005']):
        assert torch.equal(x[i], reference(celeba_folder()/PICTURES/f'{name}.jpg'))


def test_other_pictures_are_decoded_again(celeba):
    old = load('celeba').x[0].clone()
    portrait(celeba[3]).save(celeba_folder()/PICTURES/'000001.jpg', quality=80)
    new = load('celeba').x[0]
    assert not torch.equal(old, new)
    assert torch.equal(new, reference(celeba_folder()/PICTURES/'000001.jpg'))


# ------------------------------------------------------------------ any folder
def test_a_folder_of_faces(folder, tmp_path):
    own = tmp_path/'own'
    (own/'more').mkdir(parents=True)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8))
              for i in range(20)]
    for i, image in enumerate(images):
        image.save(own/('more' if i > 15 else '.')/f'{i:02}.png')
    train, test = load(f'faces:{own}'), load(f'faces:{own}', 'test')
    assert train.x.shape == (18, 3, 64, 64) and train.y.shape == (18, 0) and len(test.x) == 2
    assert torch.equal(test.x[0], torch.tensor(np.asarray(images[0])).permute(2, 0, 1))
    assert torch.equal(train.x[-1], torch.tensor(np.asarray(images[19])).permute(2, 0, 1))
    files = sorted(p.suffix for p in own.rglob('*') if p.is_file())
    assert files == ['.png']*20  # nothing of ours among them
    with pytest.raises(DataError, match='attributes'):
        attributes(f'faces:{own}', train.y)


# ------------------------------------------------------------------ pictures as people see them
RAMP = np.linspace(0, 65535, 64).astype(np.uint16)

def made(kind):
    "A square picture of 64 x 64 pixels and what one should see of it, uint8 (64, 64, 3)."
    half = np.zeros((64, 64), np.uint8)
    half[:32] = 255
    grey = lambda a: np.repeat(np.asarray(a, np.uint8)[..., None], 3, -1)
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[16:48, 16:48, 3] = 255  # a black square on nothing
    black = np.full((64, 64), 255)
    black[16:48, 16:48] = 0
    palette = Image.fromarray(half).convert('P', palette=Image.ADAPTIVE)
    colours = Image.fromarray(grey(half) ^ np.array([0, 255, 0], np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {'16 bit': (Image.fromarray(np.tile(RAMP, (64, 1))), {},
                       grey(np.tile(RAMP//257, (64, 1)))),
            'alpha': (Image.fromarray(clear), {}, grey(black)),
            'grey and alpha': (Image.fromarray(clear).convert('LA'), {}, grey(black)),
            'transparent colour': (Image.fromarray(255 - half),
                                   {'transparency': 0}, grey(255 + 0*half)),
            'transparent palette': (palette, {'transparency': int(np.asarray(palette)[-1, 0])},
                                    grey(255 + 0*half)),
            'palette': (colours.convert('P', palette=Image.ADAPTIVE), {}, np.asarray(colours)),
            'one bit': (Image.fromarray(half).convert('1'), {}, grey(half)),
            'turned': (Image.fromarray(half), {'exif': turned}, grey(np.rot90(half, -1))),
            'half clear': (Image.new('LA', (64, 64), (0, 51)), {},
                           grey(np.full((64, 64), 204)))}[kind]

@pytest.mark.parametrize('kind',
                         ['16 bit', 'alpha', 'grey and alpha', 'transparent colour',
                          'transparent palette', 'palette', 'one bit', 'turned', 'half clear'])
def test_a_picture_is_decoded_as_people_see_it(folder, tmp_path, kind):
    own = tmp_path/'own'
    own.mkdir()
    image, options, want = made(kind)
    for i in range(10):
        image.save(own/f'{i}.png', **options)
    assert np.abs(load(f'faces:{own}').x[0].permute(1, 2, 0).numpy().astype(int) - want).max() <= 1
    if 'alpha' in kind:
        assert np.asarray(data.opened(own/'0.png', 'L', 'black')).max() == 0


def test_pictures_that_nobody_can_see_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), .5, np.float32)).save(tmp_path/'f.tiff')
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path/'i.tiff')
    for f in ('f.tiff', 'i.tiff'):
        with pytest.raises(ValueError, match='no 8 or 16 bits'):
            data.opened(tmp_path/f)
    Image.fromarray(np.full((8, 8), 65_535, np.int32)).save(tmp_path/'k.tiff')
    assert np.asarray(data.opened(tmp_path/'k.tiff')).min() == 255


def test_a_picture_whose_exif_is_broken_is_taken_as_it_is(tmp_path):
    Image.new('L', (8, 8), 77).save(tmp_path/'a.jpg', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff')
    assert abs(int(np.asarray(data.opened(tmp_path/'a.jpg'))[0, 0, 0]) - 77) < 2


@pytest.fixture
def own(folder, tmp_path):
    "A folder of 12 pictures, the data set's name, and the files of its cache by suffix."
    top = tmp_path/'own'
    top.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(top/f'{i:03}.png')
    load(f'faces:{top}')
    npy, = (folder/'faces').glob('*.npy')
    return top, f'faces:{top}', lambda suffix: npy.with_suffix(suffix)

SPOILT = {'.npy': [lambda b: b[:-500], lambda b: b'', lambda b: b[10:],
                   lambda b: b[:5000] + bytes(3000) + b[8000:], lambda b: b + b'x',
                   lambda b: b.replace(b'|u1', b'|i1'), lambda b: b.replace(b'False', b'True '),
                   lambda b: b[:9000] + bytes([b[9000] ^ 1]) + b[9001:],
                   lambda b: b.replace(b'(12, 3', b'(36, 1'), lambda b: b'not at all', None],
          '.json': [lambda b: b'', lambda b: b[:20], lambda b: b'{"files": "x", "done": [0]}',
                    lambda b: b'[]', lambda b: b'{"done": {"x": 3}}',
                    lambda b: b'{"done": {"0": null}}', lambda b: b'\xff', None]}

@pytest.mark.parametrize('suffix, spoil', [(s, f) for s, each in SPOILT.items() for f in each])
def test_a_damaged_cache_is_made_again_and_says_so(own, suffix, spoil, capsys):
    _, name, file = own
    want, whole = load(name).x.clone(), file(suffix).read_bytes()
    file(suffix).unlink()
    if spoil:
        file(suffix).write_bytes(spoil(whole))
    assert torch.equal(load(name).x, want) and len(load(name, 'test').x) == 2
    said = capsys.readouterr().out
    if suffix == '.npy' and spoil and spoil(whole) != whole and len(spoil(whole)) != len(whole) + 1:
        assert f'{file(".npy")} is damaged' in said and said.count('decoded again') == 1
    load(name)
    assert capsys.readouterr().out == '' and not file('.part').exists()


@pytest.mark.parametrize('junk', [b'junk', b''])
def test_a_damaged_part_of_a_cache_is_begun_again(own, junk):
    _, name, file = own
    want = load(name).x.clone()
    file('.part').write_bytes(junk)
    file('.npy').unlink()
    assert torch.equal(load(name).x, want)
    file('.part').write_bytes(file('.npy').read_bytes()[:-9] + bytes(9))
    file('.npy').unlink()  # as long, and not as good
    assert torch.equal(load(name).x, want)


def test_a_replaced_picture_is_seen_and_a_reader_of_the_old_one_is_left_alone(own):
    top, name, _ = own
    old, f = load(name).x, top/'005.png'
    kept, when = old.clone(), f.stat().st_mtime_ns
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (64, 64, 3), np.uint8)).save(f)
    os.utime(f, ns=(when, when))  # as old as the old one
    new = load(name).x
    assert (new != kept).flatten(1).any(1).nonzero().tolist() == [[4]] and torch.equal(old, kept)


def test_a_folder_that_changed_while_it_was_half_decoded(own, monkeypatch):
    top, name, file = own
    file('.npy').unlink()
    file('.json').unlink()
    with monkeypatch.context() as m:
        m.setattr(data, 'as_completed', lambda jobs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(name)
    for i in range(12, 15):
        Image.new('RGB', (64, 64), (i, i, i)).save(top/f'{i:03}.png')
    x = load(name).x
    assert len(x) == 13 and x.flatten(1).float().mean(1).min() > 10


def test_huge_dangling_and_odd_files_are_named_or_passed_over(own):
    top, name, _ = own
    (top/'folder.png').mkdir()
    os.mkfifo(top/'pipe.png')
    assert len(load(name).x) == 10
    (top/'x.png').symlink_to('/nowhere')
    assert 'x.png' in complaint(name) and 'links to nothing' in complaint(name)
    (top/'x.png').unlink()
    Image.new('L', (14_000, 14_000)).save(top/'x.png')
    assert '1 of 13' in complaint(name) and 'x.png (' in complaint(name)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Image, 'MAX_IMAGE_PIXELS', 150_000_000)  # PIL itself would only warn
        with pytest.warns(Image.DecompressionBombWarning):
            assert 'too large, 14000 x 14000' in complaint(name)


def test_a_disk_without_room_gets_a_sentence_before_anything_is_mapped(own, monkeypatch):
    _, name, file = own
    file('.npy').unlink()
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    monkeypatch.setattr(data, 'decode_block', lambda *_: pytest.fail('decoded'))
    with pytest.raises(data.DiskError, match=r'part cannot be written .No space left.*: '
                       r'it needs 147,456 bytes, and [0-9,]+ are free'):
        load(name)


def test_two_callers_decode_once(own, monkeypatch):
    _, name, file = own
    file('.npy').unlink()
    done, whole = [], data.decode_block
    def slow(files, *to):
        done.append(files[0].name)
        time.sleep(.5)
        return whole(files, *to)
    monkeypatch.setattr(data, 'decode_block', slow)
    threads = [threading.Thread(target=load, args=(name,)) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(done) == len(range(0, 12, data.BLOCK))


def test_folders_that_will_not_do(folder, tmp_path):
    assert 'at least 10 pictures' in complaint(f'faces:{tmp_path}/nowhere')
    own = tmp_path/'own'
    own.mkdir()
    for i in range(12):
        Image.new('L', (50, 40 if i == 4 else 50)).save(own/f'{i}.png')
    assert '4.png' in complaint(f'faces:{own}') and '50 x 40' in complaint(f'faces:{own}')
    assert 'no data set' in complaint('faces') and 'no data set' in complaint('faces:')


def test_square():
    assert face_square(Image.new('L', (100, 100), 77)).tolist() == np.full((3, 64, 64), 77).tolist()
    with pytest.raises(ValueError, match='218 x 178'):
        face_square(Image.new('RGB', (218, 178)))


# ------------------------------------------------------------------ models
def test_gaussian_likelihood_is_half_the_sum_of_squares():
    model = VAE(4, 3, 3, 64, likelihood='gaussian')
    x = torch.rand(5, 3, 64, 64)
    code = torch.randn(5, 7)
    a, b = model.log_likelihood(x, code), model.log_likelihood(x.flip(0), code)
    half = lambda y: .5*((y - model.decode(code))**2).sum((1, 2, 3))
    torch.testing.assert_close(a - b, half(x.flip(0)) - half(x), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize('size, channels', [(32, 1), (64, 3)])
def test_the_large_network(size, channels):
    m = VAE(6, 3, channels, size, likelihood='gaussian', network='large')
    x = torch.rand(4, channels, size, size)
    terms = elbo(m, x)
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    m.eval()
    assert m(x).shape == x.shape  # in evaluation an image stands alone
    assert torch.allclose(m(x)[:1], m(x[:1]), atol=1e-5)
    assert ([c.out_channels for c in m.encoder if hasattr(c, 'out_channels')]
            == [128, 256, 512, 1024][:len(bin(size)) - 5])


@pytest.mark.parametrize('kw', [{'network': 'huge'}, {'network': 'large', 'size': 128}])
def test_networks_that_do_not_exist(kw):
    with pytest.raises(ValueError, match='small'):
        VAE(**kw)


def test_presets_of_faces_and_those_of_mnist():
    p = preset('celeba.disentangled')
    assert ((p.C_z, p.C_c, p.C_steps, p.gamma, p.n_z, p.n_c, p.steps)
            == (50, 10, 100_000, 100, 32, 10, 100_000))
    m = build(preset('faces.entangled'))
    assert m(torch.rand(2, 3, 64, 64)).shape == (2, 3, 64, 64) and m.n_z == 32
    assert build(preset('celeba.entangled_large', n_z=4)).encoder[0].out_channels == 128
    pretrained('mnist/entangled', 0)  # identities of shipped weights have not changed


def test_a_training_on_the_layout_resumes_and_is_reproducible(celeba, tmp_path):
    p = preset('celeba.disentangled', 'train.smoke', steps=4, batch=8)
    one, two = (train(p, tmp_path/name, progress=False) for name in 'ab')
    assert ((tmp_path/'a/weights.safetensors').read_bytes()
            == (tmp_path/'b/weights.safetensors').read_bytes())
    again = train(p, tmp_path/'a', progress=False)
    shape = lambda m: m(torch.rand(1, 3, 64, 64)).shape
    torch.testing.assert_close(shape(again), shape(two))


# ------------------------------------------------------------------ chapter 24

def test_flips_by_hand():
    source, target = torch.tensor([[1, 1, 0, 0, 1]]), torch.tensor([[0, 1, 1, 0, 0]])
    before, after = torch.tensor([[1, 1, 0, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1]])
    f = {k: v.int().tolist()[0] for k, v in ch15.flips(source, target, before, after).items()}
    assert f == {'kept': [1, 1, 1, 0, 1], 'lost': [1, 1, 0, 0, 0], 'differ': [1, 0, 1, 0, 1],
                 'flipped': [1, 0, 0, 0, 0]}


def small():
    torch.manual_seed(1)
    return VAE(6, 3, 3, 64, likelihood='gaussian').eval()


def test_ratios_of_images_on_the_way_to_the_target():
    m, (x, x_t) = small(), cartoon(classes(8, 3)).unflatten(0, (2, 4))
    with torch.no_grad():
        xs = x + .3*(x_t - x)
        r = ch15.ratios(m, x, x_t, xs)
        phi = lambda a: torch.cat([m.encode(a)[0], m.encode(a)[2]], 1)
        torch.testing.assert_close(r['l2'], .3*norm(x_t - x))
        torch.testing.assert_close(r['ratio'], norm(phi(xs) - phi(x_t))/norm(phi(x) - phi(x_t)))
        torch.testing.assert_close(r['to_target'], norm(m(xs) - m(x_t))/norm(m(x) - m(x_t)))
        torch.testing.assert_close(r['from_source'], norm(m(xs) - m(x))/norm(m(x) - m(x_t)))


def test_pairs_are_of_different_images():
    s, t = ch15.face_pairs(40, 100)
    assert len({*s.tolist(), *t.tolist()}) == 80
    assert torch.equal(ch15.face_pairs(40, 100)[0], s)
    assert not torch.equal(ch15.face_pairs(40, 100, 1)[0], s)


def test_the_attack_through_the_judge_brings_the_judge_to_the_targets_attributes():
    m, judge = small(), ch15.attribute_judge(5).eval()
    x, x_t = cartoon(classes(8, 3)).unflatten(0, (2, 4))
    torch.nn.init.normal_(m.decoder[2].weight, std=.1)
    torch.nn.init.normal_(m.encoder[-1].weight, std=.5)
    xs = ch15.attacked_faces(m, judge, preset('attack.judge', steps=10), x, x_t)
    J = ch15.through_judge(m, x_t, 'logits', judge)
    with torch.no_grad():
        assert (J(xs) <= J(x) + 1e-6).all()
        assert J(xs).mean() < J(x).mean()
        assert (xs - x).abs().max() <= .1 + 1e-6


def rows(**kw):
    base = {'model': 'disentangled', 'seed': 0, 'attack': 'strong', 'pair': 0, 'attribute': 'Bald',
            'kept': 1, 'lost': 0, 'differ': 1, 'flipped': 0,
            'ratio': .5, 'ratio_kl': .5, 'to_target': .5, 'from_source': .5, 'l2': 2.}
    return base | kw

def test_shares_and_the_worst_case_by_hand():
    t = pd.DataFrame([rows(), rows(pair=1, lost=1, flipped=1), rows(pair=2, kept=0, differ=0),
                      rows(pair=3, differ=0, lost=1),
                      rows(attack='output', lost=1, flipped=1, to_target=.1),
                      rows(attack='output', pair=1),
                      rows(attack='output', pair=2, kept=0, differ=0),
                      rows(attack='output', pair=3, differ=0),
                      rows(attack='noise', lost=1, pair=2, kept=1, differ=1, flipped=1)])
    s = ch15.shares_by_seed(ch15.add_worst_attributes(t)).set_index('attack')
    assert s.loc['strong', 'lost'] == pytest.approx(200/3) and s.loc['strong', 'flipped'] == 50
    assert s.loc['output', 'lost'] == pytest.approx(100/3)
    assert s.loc['worst', 'lost'] == 100
    assert s.loc['worst', 'flipped'] == 100
    assert s.loc['worst', 'to_target'] == pytest.approx((.1 + 3*.5)/4)  # noise is no attack


def test_differences_are_welchs():
    u, v = [10., 12., 11.], [20., 25., 21.]
    t = pd.DataFrame([{'model': m, 'seed': i, 'attack': 'strong', 'lost': x}
                      for m, values in (('disentangled', u), ('entangled', v))
                      for i, x in enumerate(values)])
    d = ch15.differences_by_attack(t, 'lost').loc['strong']
    low, high = ttest_ind(u, v, equal_var=False).confidence_interval()
    assert d.difference == pytest.approx(-11)
    assert (d.low, d.high) == (pytest.approx(low), pytest.approx(high))


def test_the_notebook_can_send_its_trainings_to_other_processes(tmp_path):
    chapter = json.loads((Path(__file__).parents[1]/'nbs'/'24_faces.ipynb').read_text())
    cells = [c['source'] for c in chapter['cells'] if c['cell_type'] == 'code']
    cells = [''.join(c) for c in cells]
    last = [i for i, c in enumerate(cells) if 'def train_faces(' in c][0]
    begin = '\n'.join(c for c in cells[:last + 1] if c.startswith('#| export'))
    packed = tmp_path/'packed'
    send = (f'{begin}\nfrom joblib.externals.loky.backend.reduction import dumps\n'
            f'Path({str(packed)!r}).write_bytes(dumps(train_faces))')
    receive = (f'import pickle, pathlib\nf = pickle.loads(pathlib.Path({str(packed)!r}).read_bytes())\n'
               "assert f.__name__ == 'train_faces'")
    for program in (send, receive):
        assert run_cells([program], tmp_path) == ''


def test_dead_trainings_are_left_out(monkeypatch):
    monkeypatch.setattr(ch15, 'faces_of', lambda name, part: cartoons('test', {'test': 8}))
    monkeypatch.setattr(ch15, 'dead', lambda model, x: model == 'dead')
    labels = ('faces.entangled', 0), ('faces.entangled', 1)
    monkeypatch.setattr(ch15, 'face_models', lambda job, runs: dict(zip(labels, runs)))
    assert [*ch15.living(preset('job.faces'), ('dead', 'alive'))] == [('faces.entangled', 1)]
    with pytest.raises(ValueError, match='are dead: lower lr'):
        ch15.living(preset('job.faces'), ('dead', 'dead'))


def test_a_folder_in_celebas_layout_goes_through_the_whole_path(celeba, tmp_path, monkeypatch):
    "Models, judge, attacks, tables and pictures of the job for CelebA, made small."
    small_job = preset('job.celeba', train='train.smoke', judges='judge.celeba',
                       attacks='attack.none, attack.strong, attack.judge',
                       pairs='3, 3, 3', seeds='0')
    whole = preset
    def shorter(name, *overlays, **kw):
        if name == 'job.celeba': return small_job
        if name == 'judge.celeba': return whole(name, steps=3, batch=8)
        if name.startswith('celeba.'): return whole(name, *overlays, steps=3, batch=8)
        if name in ('attack.strong', 'attack.judge'): return whole(name, **kw, steps=2)
        return whole(name, *overlays, **kw)
    for module in (ch15, studies):
        monkeypatch.setattr(module, 'preset', shorter)
    monkeypatch.setattr(ch15, 'dead', lambda model, x: False)                            # three steps
    ch15.faces_of.cache_clear()
    seeds = ch15.report_faces('job.celeba', tmp_path/'runs', tmp_path/'out')
    again = ch15.report_faces('job.celeba', tmp_path/'runs', tmp_path/'out')  # taken up: the same numbers
    pd.testing.assert_frame_equal(again, seeds, check_exact=True)
    ch15.faces_of.cache_clear()
    assert sorted(f.name for f in (tmp_path/'out').iterdir()) == [
        'celeba.csv', 'celeba.md', 'celeba_adversarial_disentangled.png',
        'celeba_adversarial_entangled.png', 'celeba_differences.csv', 'celeba_differences.md']
    none = seeds[seeds.attack == 'none']
    assert len(none) == 2
    assert (none.lost == 0).all()
    assert (none.to_target == 1).all()
    assert (none.ratio == 1).all()
    assert (none.l2 == 0).all()


@pytest.mark.skipif(not LONDON.exists(),
                    reason='the London faces lie beside the project, not in it')
def test_photographs_go_through_the_whole_path(folder, tmp_path):
    """204 real faces: decoded, trained on, attacked;
    the latent attack brings codes and reconstructions closer to the target's."""
    own = tmp_path/'london'
    own.mkdir()
    photographs = np.load(LONDON)['images']
    for i, x in enumerate(photographs):
        Image.fromarray(x).save(own/f'{i:03}.png')
    name = f'faces:{own}'
    d, test = load(name), load(name, 'test')
    assert len(d.x) == 183 and len(test.x) == 21
    assert torch.equal(test.x[1], torch.tensor(photographs[10]).permute(2, 0, 1))
    # faster, and a layer dies in some precision
    p = preset('faces.entangled', 'train.smoke', data=name, steps=60, batch=16, schedule='warm')
    m = train(p, tmp_path/'run', progress=False)
    x = pixels(test.x)
    error = lambda y: .5*norm(x - y).square().mean()
    with torch.no_grad():
        assert error(m(x)) < .8*error(torch.full_like(x, .5))
    x, x_t = x[:5], x[5:10]
    strong = preset('attack.strong', features='means', steps=20)
    r = ch15.ratios(m, x, x_t, ch15.attacked_faces(m, None, strong, x, x_t))
    assert r['ratio'].mean() < .9 and (r['l2'] > 0).all()
