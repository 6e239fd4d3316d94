"""Every file that the package reads, damaged at random: `python tests/fuzz_files.py [N]` tries N
damages of each kind of file (default 250) and prints a table; test_corruption.py tries fewer.
A damage is refused in one sentence of the package's own, or changes nothing, or is repaired;
a file with a checksum is never taken for another one."""
import collections, contextlib, gzip, io, random, shutil, sys, tempfile
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from vae_robust import data, settings, sweep, training
from vae_robust.data import DataError, ImageData, idx, load, read_idx
from vae_robust.judges import train_judge
from vae_robust.settings import (SettingsError, TableError, preset, read_settings, read_table,
                                 save_csv)
from vae_robust.training import TrainingError
from vae_robust.yours import own_judge

OWN = DataError, SettingsError, TableError, TrainingError, sweep.SweepError
TINY = preset('digits.entangled', steps=4, batch=16)
JUDGE = preset('judge.smoke', steps=1, batch=4)


def flip(b, rng):
    i = rng.randrange(len(b))
    return b[:i] + bytes([b[i] ^ 1 << rng.randrange(8)]) + b[i + 1:]
def cut(b, rng): return b[:rng.randrange(len(b))]
def zeros(b, rng):
    i = rng.randrange(len(b))
    n = rng.randrange(1, 1 + min(4096, len(b) - i))
    return b[:i] + bytes(n) + b[i + n:]
def empty(b, rng): return b''
def behead(b, rng): return b[rng.randrange(1, len(b)):]
def longer(b, rng): return b + rng.randbytes(rng.randrange(1, 99))
def twice(b, rng):
    i, j = sorted(rng.randrange(len(b) + 1) for _ in range(2))
    return b[:j] + b[i:]
def junk(b, rng): return rng.randbytes(rng.randrange(200))
DAMAGES = flip, flip, flip, cut, zeros, empty, behead, longer, twice, junk


def weights_of(model):
    return torch.cat([p.flatten() for p in model.parameters()]).detach().numpy().tobytes()

class Stop(Exception): pass

def begun(folder):
    "A run of TINY that stopped after its first checkpoint."
    honest = training.save_checkpoint
    def stopping(path, **state):
        honest(path, **state)
        raise Stop
    training.save_checkpoint = stopping
    try:
        training.train(TINY, folder, progress=False, every=2)
    except Stop:
        pass
    finally:
        training.save_checkpoint = honest

def mnist(folder):
    rng = np.random.default_rng(0)
    for f in data.MD5['mnist']:
        pictures = lambda: rng.integers(256, size=(7, 28, 28), dtype=np.uint8)
        array = pictures() if 'images' in f else np.arange(7, dtype=np.uint8)
        settings.write(data.raw_folder('mnist')/f, idx(array))
    data.MD5['mnist'] = {f: data.hashlib.md5((data.raw_folder('mnist')/f).read_bytes()).hexdigest()
                         for f in data.MD5['mnist']}

def archive():
    data.FACTORS['dsprites'] = {'colour': 1, 'shape': 1, 'scale': 1,
                                'orientation': 1, 'x': 2, 'y': 2}
    path = data.data_folder()/data.NPZ
    np.savez_compressed(path, imgs=(np.arange(4*64*64).reshape(4, 64, 64) % 2).astype(np.uint8))
    data.MD5['published dsprites'] = {data.NPZ: data.hashlib.md5(path.read_bytes()).hexdigest()}
    return path

def download(top):
    "The files of MNIST, gzipped as a source has them in the folder `top`; and that source."
    for f in data.MD5['mnist']:
        settings.write(top/f'{f}.gz', gzip.compress((data.raw_folder('mnist')/f).read_bytes()))
    def source(name, folder): shutil.copytree(top, folder, dirs_exist_ok=True)
    return source

def celeba():
    "A CelebA of three pictures, without pictures."
    (data.celeba_folder()/data.PICTURES).mkdir(parents=True)
    rows = [f'{i:06}.jpg {" ".join(random.Random(i).choices(("-1", "1"), k=4))}' for i in range(3)]
    (data.celeba_folder()/data.ATTR).write_text('\n'.join(['3', 'Bald Bangs Smiling Young', *rows]))
    (data.celeba_folder()/data.PARTITION).write_text('000000.jpg 0\n000001.jpg 1\n000002.jpg 2\n')

def pictures(top):
    top.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(top/f'{i:02}.{"jpg" if i % 2 else "png"}')
    load(f'faces:{top}')
    return next((data.data_folder()/'faces').glob('*.npy'))


def kinds(top):
    """{name: (file to damage, how to read it as something that can be compared,
    whether a checksum could know)}, made in the folder `top`."""
    mnist(top)
    celeba()
    training.train(TINY, top/'done', progress=False)
    train_judge(JUDGE, top/'judge', progress=False)
    source = download(top/'source')
    begun(top/'begun')
    npz, npy, kept, shelf = archive(), pictures(top/'own'), top/'begun.kept', top/'shelf'
    shutil.copytree(top/'begun', kept)
    table = pd.DataFrame({'name': ['run #1', 'None', None, ''], 'code': ['007', '1', '2', '3'],
                          'v': [.1, np.nan, 2, 3]})
    cell = {'model': 'a', 'seed': 3}
    save_csv(table, 't', top)
    sweep.keep(cell, table, top)
    sweep.clock(cell, 2., top)
    sweep.clock(cell, 3., top)
    training.ship(top/'done', 'digits/entangled', 0, shelf)
    (top/'s.ini').write_text(settings.settings_file().read_text())
    (top/'tiny.idx').write_bytes(idx(np.arange(60, dtype=np.uint8).reshape(3, 4, 5)))
    def resumed():
        shutil.rmtree(top/'begun')
        shutil.copytree(kept, top/'begun')
        return weights_of(training.train(TINY, top/'begun', progress=False))
    done = lambda: weights_of(training.train(TINY, top/'done', progress=False))
    of = lambda s: ('mnist.disentangled', s) if s.startswith('train.') else (s,)
    every = lambda: [preset(*of(s), file=top/'s.ini') for s in read_settings(top/'s.ini')]
    faces = lambda: load(f'faces:{top/"own"}').x.numpy().tobytes()
    def answered():
        a = sweep.answer(cell, top)
        return a is not None and repr(a.to_dict('split'))
    def fetched():
        files, trouble = data.fetched('mnist', source)
        if trouble: raise DataError(trouble)
        return b''.join(files[f] for f in sorted(files))
    judge = lambda: weights_of(train_judge(JUDGE, top/'judge', progress=False))
    seen = ImageData(*(part[:20] for part in load('digits')))
    own = lambda: weights_of(own_judge(seen, top/'own judge', steps=1, progress=False))
    own()
    points = pd.DataFrame({'step': [100, 200], 'loss': [.5, .25], 'rec': [.4, .2], 'kl_c': [0., 1]})
    training.leave(top/'long'/'weights.safetensors', training.build(TINY), '', points, 1.,
                   torch.float32, 'cpu')
    curves = lambda: repr(training.curves_of(top/'long').to_dict('split'))
    listing = lambda: repr(data.celeba_listing())
    def shipped():
        file = training.shipped('digits/entangled', 0, shelf, training.identity(TINY, 0))
        return weights_of(training.load_weights(file, training.build(TINY)))
    return {
        'idx': (top/'tiny.idx', lambda: read_idx((top/'tiny.idx').read_bytes()).tobytes(), False),
        'idx of a set': (data.raw_folder('mnist')/data.FILES['train'][0],
                         lambda: load('mnist').x.numpy().tobytes(), True),
        'npz': (npz, lambda: load('dsprites').x[:].numpy().tobytes(), True),
        'jpg': (top/'own'/'01.jpg', faces, False), 'png': (top/'own'/'02.png', faces, False),
        'cache': (npy, faces, True), 'note of a cache': (npy.with_suffix('.json'), faces, True),
        'download': (top/'source'/f'{data.FILES["test"][0]}.gz', fetched, True),
        'attributes': (data.celeba_folder()/data.ATTR, listing, False),
        'parts': (data.celeba_folder()/data.PARTITION, listing, False),
        'weights': (top/'done'/'weights.safetensors', done, True),
        'judge': (top/'judge'/'weights.safetensors', judge, True),
        'own judge': (next((top/'own judge').rglob('*.safetensors')), own, True),
        'curves': (top/'long'/'curves.csv', curves, True),
        'record of a run': (top/'done'/'run.json', done, True),
        'shipped weights': (shelf/'digits/entangled/seed0.safetensors', shipped, True),
        'sums': (shelf/'SHA256SUMS', shipped, True),
        'checkpoint': (kept/'checkpoint.pt', resumed, True),
        'answer': (sweep.path_of(cell, top), answered, True),
        'clock': (top/'seconds.jsonl', lambda: bool(sweep.plan([cell | {'seed': 4}], top)), False),
        'table': (top/'t.csv', lambda: repr(read_table(top/'t.csv').to_dict('split')),
                  lambda spoilt: b'sha256' in spoilt),  # older tables have no checksum
        'origin of a table': (top/'t.csv', lambda: settings.facts_of(top/'t.csv') and '', False),
        'settings': (top/'s.ini', lambda: str(every()), False)}


def outcome(read, want, sealed):
    """What becomes of a damaged file: 'same', 'refused', 'other' (not to be known), or,
    which must not be, 'OTHER' and 'TRACEBACK'."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            got = read()
    except OWN as e:
        return 'refused' if str(e) and '\n' not in str(e) else f'TRACEBACK of several lines: {e}'
    except Exception as e:
        return f'TRACEBACK {type(e).__name__}: {str(e)[:150]}'
    return 'same' if got == want else 'refused' if got is False else 'OTHER' if sealed else 'other'


@contextlib.contextmanager
def elsewhere():
    "A folder that is the data folder meanwhile; what `kinds` changes is put back afterwards."
    with tempfile.TemporaryDirectory() as d, pytest.MonkeyPatch.context() as patch:
        patch.setenv('VAE_ROBUST_DATA', f'{d}/data')
        patch.setattr(data, 'MD5', dict(data.MD5))
        patch.setattr(data, 'FACTORS', dict(data.FACTORS))
        Path(d, 'data').mkdir()
        yield Path(d)


def damaged(kind, file, read, sealed, n, seed=0):
    "A Counter of the outcomes of `n` damages of a `file`; it is whole afterwards."
    rng, whole, found = random.Random(f'{kind} {seed}'), file.read_bytes(), []
    with contextlib.redirect_stdout(io.StringIO()):
        want = read()
    for i in range(n):
        damage = rng.choice(DAMAGES)
        file.write_bytes(spoilt := damage(whole, rng))
        said = outcome(read, want, sealed(spoilt) if callable(sealed) else sealed)
        if said.isupper() or said.startswith('TRACEBACK'):
            print(f'{kind}, {damage.__name__}, damage {i}: {said}', file=sys.stderr)
        found.append(said.split()[0])
        file.write_bytes(whole)
    return collections.Counter(found)


def fuzz(n, seed=0, only=None):
    "`n` damages of every kind of file (or of the kinds `only`): {kind: Counter of outcomes}."
    with elsewhere() as top:
        return {kind: damaged(kind, *made, n, seed) for kind, made in kinds(top).items()
                if not only or kind in only}


if __name__ == '__main__':
    torch.set_num_threads(1)
    found = pd.DataFrame(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 250)).T.fillna(0).astype(int)
    print(found.to_string())
    sys.exit(any(c.isupper() for c in found))
