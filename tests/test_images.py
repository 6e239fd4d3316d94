"""Images from elsewhere: folders, arrays, files of numpy, data sets; parts, labels, caches."""
import numpy as np
import pytest, torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import ToTensor
from torchvision.transforms.functional import pil_to_tensor

from vae_robust.data import DataError, ImageData, data_folder, digest, images, load, resize


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path/'cache'))


def drawn(n=20, shape=(12, 12, 3)):
    return np.random.default_rng(0).integers(256, size=(n, *shape), dtype=np.uint8)


def folder(tmp_path, a, name=lambda i: f'{i:03}.png'):
    top = tmp_path/'pictures'
    for i, x in enumerate(a):
        (top/name(i)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(top/name(i))
    return top


def channels_first(a): return torch.tensor(a).permute(0, 3, 1, 2)


def test_a_folder_in_colour_and_its_parts(tmp_path):
    a = drawn()
    top = folder(tmp_path, a)
    whole, train, test = (images(top, part) for part in (None, 'train', 'test'))
    assert torch.equal(whole.x, channels_first(a)) and whole.y.shape == (20, 0)
    assert torch.equal(test.x, channels_first(a[::10]))
    assert torch.equal(train.x, channels_first(a[[i for i in range(20) if i % 10]]))
    assert torch.equal(load(f'images:{top}', 'test').x, test.x)


def test_gray_pictures_stay_gray_and_classes_are_folders(tmp_path):
    a = drawn(shape=(12, 9))
    top = folder(tmp_path, a, lambda i: f'{"ba"[i % 2]}/{i:03}.png')
    whole = images(top)
    in_order = [*a[1::2], *a[::2]]                               # folder a is first
    assert torch.equal(whole.x[:, 0], torch.tensor(np.array(in_order)))
    assert whole.y.tolist() == [0]*10 + [1]*10
    assert images(top, 'test').y.tolist() == [0, 1]
    assert torch.equal(images(top, channels=3).x, whole.x.expand(-1, 3, -1, -1))


def test_folders_train_and_test_are_the_parts(tmp_path):
    a = drawn(6)
    top = folder(tmp_path, a, lambda i: f'{"train" if i < 4 else "test"}/{"xy"[i % 2]}/{i}.png')
    assert len(images(top, 'train').x) == 4 and images(top, 'test').y.tolist() == [0, 1]


def test_pictures_of_several_sizes_need_one_and_lose_their_edges(tmp_path):
    wide, high = np.zeros((10, 30, 3), np.uint8), np.zeros((30, 10, 3), np.uint8)
    wide[:, 10:20], high[10:20] = 200, 200
    top = folder(tmp_path, [wide, high])
    with pytest.raises(DataError, match='have 2 sizes, such as 10 x 30 and 30 x 10: say size=64'):
        images(top)
    assert (images(top, size=5).x == 200).all() and images(top, size=5).x.shape == (2, 3, 5, 5)


def test_the_cache_is_used_and_knows_when_a_picture_was_replaced(tmp_path, monkeypatch):
    a = drawn()
    top = folder(tmp_path, a)
    first = digest(images(top).x)
    cache, = (data_folder()/'images').glob('*.npy')
    with monkeypatch.context() as m:
        m.setattr('vae_robust.data.opened', None)                # nothing is decoded again
        assert digest(images(top).x) == first
    Image.fromarray(255 - a[3]).save(top/'003.png')
    assert torch.equal(images(top).x[3], channels_first(255 - a[3:4])[0])
    assert digest(images(top).x) != first and [*cache.parent.glob('*.npy')] == [cache]


def test_a_damaged_picture_is_named(tmp_path):
    top = folder(tmp_path, drawn())
    (top/'007.png').write_bytes(b'no picture')
    with pytest.raises(DataError, match=r'1 of 20 pictures .* 007.png \(no picture\)'):
        images(top)


A, Y = drawn(), np.arange(20) % 3


class Pictures:
    "A data set in the style of torchvision: PIL images and labels."
    def __len__(self): return 20
    def __getitem__(self, i): return Image.fromarray(A[i]), int(Y[i])


class Rows:
    "A data set in the style of Hugging Face: dicts."
    def __len__(self): return 20
    def __getitem__(self, i): return {'image': Image.fromarray(A[i]), 'label': int(Y[i])}


floats = torch.tensor(A).permute(0, 3, 1, 2)/255
SOURCES = {'channels last': (A, Y), 'tensor': (channels_first(A), torch.tensor(Y)),
           'floats': (floats, [*Y]), 'dict': {'images': A, 'labels': Y},
           'torchvision': Pictures(), 'Hugging Face': Rows(),
           'tensors': TensorDataset(floats, torch.tensor(Y)),
           'ImageData': ImageData(channels_first(A), torch.tensor(Y)),
           'loader': DataLoader(TensorDataset(floats, torch.tensor(Y)), batch_size=6, shuffle=True),
           'parts': {'train': None, 'test': (A[::10], Y[::10])},
           'named parts': {'x_test': A[::10], 'y_test': Y[::10], 'x': A, 'y': Y}}


@pytest.mark.parametrize('name', SOURCES)
def test_every_source_gives_the_same_images_and_labels(name):
    if name not in ('parts', 'named parts'):
        whole = images(SOURCES[name])
        assert torch.equal(whole.x, channels_first(A)) and whole.y.tolist() == [*Y]
    test = images(SOURCES[name], 'test')
    assert test.x.dtype == torch.uint8 and test.y.dtype == torch.int64
    assert torch.equal(test.x, channels_first(A[::10])) and test.y.tolist() == [*Y[::10]]


def test_files_of_numpy(tmp_path):
    np.savez(tmp_path/'a.npz', imgs=A, latents_classes=np.stack([Y, 1 - Y], 1))
    np.save(tmp_path/'b.npy', A[..., 0])
    assert images(tmp_path/'a.npz').y.tolist() == [[y, 1 - y] for y in Y]
    assert torch.equal(images(tmp_path/'b.npy').x[:, 0], torch.tensor(A[..., 0]))
    train = images(tmp_path/'a.npz', 'train')
    assert torch.equal(load(f'images:{tmp_path/"a.npz"}', 'train', 6).x, resize(train.x, 6))
    (tmp_path/'c.npz').write_bytes(b'PK nonsense')
    with pytest.raises(DataError, match='c.npz cannot be read'):
        images(tmp_path/'c.npz')


def test_words_are_classes_and_factors_are_columns():
    assert images((A, ['b', 'a']*10)).y[:2].tolist() == [1, 0]
    assert images((A, np.stack([Y, Y], 1))).y.shape == (20, 2)
    assert images(A).y.shape == (20, 0)


def test_gray_is_what_PIL_says():
    gray = images(A, channels=1).x[:, 0].int()
    by_pil = torch.tensor(np.stack([np.asarray(Image.fromarray(a).convert('L')) for a in A])).int()
    assert (gray - by_pil).abs().max() <= 1
    assert images(Pictures(), channels=1).x.shape == (20, 1, 12, 12)


@pytest.mark.parametrize('source, words', [
    ('nowhere', 'nowhere is no folder of pictures, and no .npz or .npy file'),
    (3, 'not from a int'), ((A, Y[:3]), 'There are 20 images and labels'),
    (channels_first(A)*1. - 300, 'grey values go from 0 to 1'),
    ((A, Y + .5), 'whole numbers'), ({'z': A}, 'There are z, and none is called x, images')])
def test_what_cannot_be_images_is_refused_with_one_sentence(source, words):
    with pytest.raises(DataError, match=words):
        images(source)


def test_parts_must_exist_and_have_images(tmp_path):
    with pytest.raises(DataError, match="parts train and test, or all with None, not 'valid'"):
        images(A, 'valid')
    with pytest.raises(DataError, match="Of 1 images none is for 'train'"):
        images(A[:1], 'train')
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='has no pictures'):
        images(tmp_path/'empty')


@pytest.mark.parametrize('parts', [('train',), ('train', 'test')])
def test_train_and_test_are_parts_and_a_class_has_one_number_in_both(tmp_path, parts):
    names = {'train': 'abc', 'test': 'ac'}
    for part in parts:
        here = names[part]
        top = folder(tmp_path, A[:6], lambda i: f'{part}/{here[i % len(here)]}/{i}.png')
    assert images(top).y.tolist() == len(parts[1:])*[0, 0, 0, 2, 2, 2] + [0, 0, 1, 1, 2, 2]
    if len(parts) == 2:
        assert images(top, 'train').y.tolist() == [0, 0, 1, 1, 2, 2]
        assert images(top, 'test').y.tolist() == [0, 0, 0, 2, 2, 2]


def test_torchvision(tmp_path):
    top = folder(tmp_path, A, lambda i: f'{"abc"[Y[i]]}/{i:03}.png')
    by_class = [i for k in range(3) for i in range(20) if Y[i] == k]
    pil, tensors = ImageFolder(top), ImageFolder(top, transform=ToTensor())
    for source in (pil, tensors, DataLoader(tensors, batch_size=6)):
        found = images(source)
        assert torch.equal(found.x, channels_first(A[by_class])) and found.y.tolist() == [*Y[by_class]]
    fake = FakeData(7, (3, 9, 9), 4)
    assert torch.equal(images(fake).x[3], pil_to_tensor(fake[3][0])) and len(images(fake).y) == 7


def test_hugging_face(library):
    datasets, pyarrow = library('datasets'), library('pyarrow')
    classes = datasets.ClassLabel(names=[*'abc'])
    features = datasets.Features({'image': datasets.Image(), 'label': classes})
    def rows(which):
        items = [{'image': Image.fromarray(a), 'label': int(y)} for a, y in zip(A[which], Y[which])]
        table = pyarrow.Table.from_pylist([*map(features.encode_example, items)],
                                          schema=features.arrow_schema)
        return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint='own')
    whole = images(rows(slice(None)))
    assert torch.equal(whole.x, channels_first(A)) and whole.y.tolist() == [*Y]
    both = images({'train': rows(slice(15)), 'test': rows(slice(15, None))}, 'test')
    assert torch.equal(both.x, whole.x[15:])


def test_hugging_face_reads_a_folder(library, tmp_path):
    datasets = library('datasets')
    top = folder(tmp_path, A, lambda i: f'{"train" if i < 14 else "test"}/{"abc"[Y[i]]}/{i:03}.png')
    rows = datasets.load_dataset('imagefolder', data_dir=str(top), cache_dir=str(tmp_path/'hub'))
    for part in ('train', 'test'):
        ours, theirs = images(top, part), images(rows, part)
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)
