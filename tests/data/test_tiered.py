"""tieredImageNet in small, in the forms that people have: the same images, or a sentence."""

import functools
import io
import itertools
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from PIL import Image
from sources import Calls, dumps2, link, named, put, train_on

from data_generator import TaskSize
from fewshot.data import archives, preparation, unpickling
from fewshot.data.image_files import folder_layout
from fewshot.data.own_images import OwnImages
from fewshot.data.preparation import PreparationError
from fewshot.data.tieredimagenet import SPLITS
from scripts.data import prepare_tieredimagenet

SMALL = {split: synsets[:2] for split, synsets in SPLITS.items()}
NAMES = ['Arabian camel', "carpenter's kit/../tool kit"]  # of a split's two classes
IMAGES = 4  # of each class

prepare = functools.partial(prepare_tieredimagenet.prepare, splits=SMALL)


def keys() -> list[tuple[int, int]]:
    """(class, number) of a split's images, in no order of the classes."""
    return [*itertools.product(range(2), range(IMAGES))][::-1]


def pixels(split: str, label: int, number: int) -> np.ndarray:
    dice = np.random.default_rng([[*SMALL].index(split), label, number])
    return dice.integers(0, 256, (84, 84, 3), dtype=np.uint8)


def encoded(array: np.ndarray, form='PNG') -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


def labels(split: str) -> dict:
    return {
        'label_specific': np.array([label for label, _ in keys()], np.int32),
        'label_general': np.zeros(len(keys()), np.int32),
        'label_specific_str': list(NAMES),
        'label_general_str': ['things'],
    }


def numbered(split: str) -> dict:
    """Labels as another release has them: numbers only, which go on from split to split."""
    first = 2 * [*SMALL].index(split)
    return {'labels': [first + label for label, _ in keys()]}


def pngs(split: str, shape=(-1, 1)) -> list[np.ndarray]:
    files = [encoded(pixels(split, *key)) for key in keys()]
    return [np.frombuffer(file, np.uint8).reshape(shape) for file in files]


def pickles(folder: Path, dumps=dumps2, start='', shape=(-1, 1)):
    for split in SMALL:
        put(folder / f'{start}{split}_images_png.pkl', dumps(pngs(split, shape)))
        put(folder / f'{start}{split}_labels.pkl', dumps(labels(split)))
    put(folder / 'class_names.txt', b'x')


def npz(folder: Path, save=np.savez, labels=labels):
    for split in SMALL:
        put(folder / f'{split}_labels.pkl', pickle.dumps(labels(split)))
        images = np.stack([pixels(split, *key) for key in keys()])
        save(folder / f'{split}_images.npz', images=images[..., ::-1])


def synsets(folder: Path, top='ILSVRC2012_img_train'):
    """ImageNet has PNG files under other names; the pixels of these can be compared."""
    for split, names in SMALL.items():
        for label, number in keys():
            path = folder / top / names[label] / f'{names[label]}_{number}.JPEG'
            put(path, encoded(pixels(split, label, number)))
    put(folder / top / 'n00000000/n00000000_1.JPEG', b'no class of it')
    put(folder / 'val' / SMALL['val'][0] / 'ILSVRC2012_val_00000293.JPEG', b'for validation')
    put(folder / 'mini' / SMALL['val'][0] / f'{SMALL["val"][0]}00000001.jpg', b'of miniImagenet')


def packed(folder: Path, fill, name='tiered-imagenet.tar', more=()):
    """An archive of what `fill` makes, and of members besides, (name or TarInfo, bytes)."""
    fill(folder / 'tiered-imagenet')
    with tarfile.open(folder / name, 'w') as archive:
        for path in sorted(path for path in folder.rglob('*') if path.suffix != '.tar'):
            if path.is_file():
                archive.add(path, path.relative_to(folder).as_posix())
                path.unlink()
        for member, data in more:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def imagenet(folder: Path):
    """The archive of archives that ImageNet gives away."""
    synsets(folder, '.')
    tars = []
    for synset in sorted(path for path in folder.iterdir() if path.name.startswith('n0')):
        tars.append(folder / f'{synset.name}.tar')
        with tarfile.open(tars[-1], 'w') as archive:
            for path in sorted(synset.iterdir()):
                archive.add(path, path.name)
                path.unlink()
    with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as archive:
        for path in tars:
            archive.add(path, path.name)
            path.unlink()


FORMS = {
    'pickles': pickles,
    'of Python 3': functools.partial(pickles, dumps=pickle.dumps, shape=-1),
    'of protocol 5': functools.partial(pickles, dumps=lambda value: pickle.dumps(value, 5)),
    "under Zenodo's names": functools.partial(pickles, start='tiered-imagenet-'),
    'in a tar': functools.partial(packed, fill=pickles),
    'npz': npz,
    'npz, compressed': functools.partial(npz, save=np.savez_compressed),
    'npz, by number': functools.partial(npz, labels=numbered),
    'npz in a tar': functools.partial(packed, fill=npz),
    'pickles and npz': lambda folder: (pickles(folder), npz(folder)),
    'synsets': synsets,
    'synsets in a tar': functools.partial(packed, fill=synsets),
    'archives of synsets': imagenet,
}


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / 'data/tieredImageNet'


def assert_all_images(target: Path) -> dict[str, list[str]]:
    """What --datasource=folder gets is every image, bit for bit; returns the classes' names."""
    own = OwnImages(str(target), folder_layout(84, 3), [*SMALL])
    own.choose((0.64, 0.16, 0.2), TaskSize(1, 1, 1), skip_small=False, known=None)
    names = {}
    for split, classes in own.load(None).items():
        names[split] = classes.names
        wanted = [{pixels(split, label, k).tobytes() for k in range(IMAGES)} for label in range(2)]
        assert [*classes.counts] == [IMAGES] * 2
        found = [image.tobytes() for image in classes.images]
        assert [{*found[:IMAGES]}, {*found[IMAGES:]}] == wanted
    return names


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_images(tmp_path, target, form):
    FORMS[form](tmp_path / 'source')
    told = 'train 2 classes, 8 images; val 2 classes, 8 images; test 2 classes, 8 images'
    assert told in prepare(tmp_path / 'source', target)
    names = assert_all_images(target)
    if 'synsets' in form:
        assert names == SMALL
    elif 'by number' in form:
        assert names == {'train': ['000', '001'], 'val': ['002', '003'], 'test': ['004', '005']}
    else:
        assert names == {
            split: ['000_Arabian_camel', '001_carpenter_s_kit_tool_kit'] for split in SMALL
        }
    assert 'nothing to do' in prepare(tmp_path / 'source', target)


def test_photos_of_imagenet_are_resized(tmp_path, target):
    synsets(tmp_path / 'source')
    label = SMALL['train'][0]
    path = tmp_path / 'source/ILSVRC2012_img_train' / label / f'{label}_0.JPEG'
    put(path, encoded(np.full((300, 500, 3), (200, 100, 50), np.uint8), 'JPEG'))
    prepare(tmp_path / 'source', target)
    with Image.open(target / 'train' / label / path.name) as image:
        assert (image.size, image.mode, image.format) == ((84, 84), 'RGB', 'JPEG')
        assert np.abs(np.int32(image) - (200, 100, 50)).max() <= 3


def test_splits():
    """As many classes as published, each in one split."""
    assert [len(synsets) for synsets in SPLITS.values()] == [351, 97, 160]
    assert len({*itertools.chain(*SPLITS.values())}) == 608


def test_a_training_run(tmp_path, target, eager):
    pickles(tmp_path / 'source')
    prepare(tmp_path / 'source', target)
    train_on(target, tmp_path)


# What is refused ----------------------------------------------------------------------------------


def refused(source: Path | None, target: Path, *words: str):
    """One sentence with the words, and nothing written."""
    with pytest.raises(PreparationError) as caught:
        prepare(source, target)
    sentence = str(caught.value)
    assert '\n' not in sentence and not target.exists()
    assert all(word in sentence for word in words), sentence


def replaced(name: str, value, fill=pickles):
    """The source with another content, or none, of a pickle."""

    def make(folder: Path):
        fill(folder)
        (folder / name).unlink()
        if value is not None:
            put(folder / name, value if isinstance(value, bytes) else pickle.dumps(value))

    return make


def with_array(array: np.ndarray, **options):
    def make(folder: Path):
        npz(folder)
        np.savez(folder / 'train_images.npz', **{'images': array, **options})

    return make


def without_synset(folder: Path):
    synsets(folder)
    (path,) = folder.glob(f'*/{SMALL["test"][1]}')
    path.rename(folder / 'elsewhere')


def twice(folder: Path):
    synsets(folder)
    synsets(folder, 'copy')


ONE_LESS = {'labels': [0] * 7}
NO_PNG = [np.frombuffer(b'no PNG', np.uint8)] * 8
ZEROS = functools.partial(np.zeros, dtype=np.uint8)
NO_NUMBERS = "tieredImageNet's: neither label_specific nor labels"


@pytest.mark.parametrize(
    'make, words',
    [
        (Path.mkdir, ['no tieredImageNet', 'train_images_png.pkl', 'synsets']),
        (replaced('val_images_png.pkl', None), ['no images of val']),
        (replaced('test_labels.pkl', None), ['no labels of test']),
        (replaced('val_images.npz', None, npz), ['no images of val']),
        (replaced('val_labels.pkl', ONE_LESS), ['1 classes of val instead of 2']),
        (replaced('val_labels.pkl', {'labels': [0, 1]}), ['val_images', 'no list of 2 PNG files']),
        (replaced('val_labels.pkl', {'labels': None}), [NO_NUMBERS]),
        (replaced('val_labels.pkl', {'labels': [0, -1]}), [NO_NUMBERS]),
        (replaced('val_labels.pkl', {'labels': [0, 10**5000]}), [NO_NUMBERS]),
        (replaced('val_labels.pkl', {'label_specific': ZEROS((8, 2))}), [NO_NUMBERS]),
        (replaced('val_labels.pkl', [0, 1]), [NO_NUMBERS]),
        (replaced('val_images_png.pkl', {}), ['no list of 8 PNG files']),
        (replaced('val_images_png.pkl', [b'x'] * 8), ['no list of 8 PNG files']),
        (replaced('val_images_png.pkl', NO_PNG), ['image 0 cannot be decoded']),
        (replaced('val_images_png.pkl', b'<html>Quota exceeded</html>'), ['is a web page']),
        (replaced('val_images_png.pkl', pickle.dumps(pngs('val'))[:-9000]), ['ends early']),
        (replaced('train_images.npz', b'x' * 999, npz), ['train_images.npz is damaged']),
        (with_array(ZEROS((8, 84, 84))), ['images is [8, 84, 84] of uint8']),
        (with_array(ZEROS((7, 84, 84, 3))), ['images is [7, 84, 84, 3]', 'not [8, 84, 84, 3]']),
        (with_array(np.zeros((8, 84, 84, 3))), ['of float64']),
        (with_array(np.asfortranarray(ZEROS((8, 84, 84, 3)))), ['by rows']),
        (with_array(np.array([None])), ['of object']),
        (without_synset, ['1 classes of test instead of 2']),
        (twice, ['both the same image']),
    ],
)
def test_sources_that_are_refused(tmp_path, target, make, words):
    make(tmp_path / 'source')
    refused(tmp_path / 'source', target, *words)


@pytest.mark.parametrize(
    'name', ['train_labels.pkl', 'train_images_png.pkl', 'test_images_png.pkl']
)
def test_a_pickle_that_would_call_something(tmp_path, target, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    replaced(name, [Calls()])(tmp_path / 'source')
    refused(tmp_path / 'source', target, name, 'it would call', 'where you trust it')
    replaced('train_images.npz', None, npz)(tmp_path / 'npz')
    np.savez(tmp_path / 'npz/train_images.npz', images=np.array([Calls()] * 8, object))
    refused(tmp_path / 'npz', target, 'of object')
    assert not (tmp_path / 'called').exists()


@pytest.mark.parametrize(
    'member, data, words',
    [
        (link('train_labels.pkl'), b'', 'is a link'),
        (named('../train_labels.pkl'), b'abc', 'unsafe path'),
        (named('a/x.png'), bytes(2**25 + 1), 'unpacks to more than 32 MiB'),
    ],
)
def test_malicious_members(tmp_path, target, member, data, words):
    packed(tmp_path / 'source', pickles, more=[(member, data)])
    refused(tmp_path / 'source', target, repr(member.name), words)


def test_no_more_parts_than_bytes_allow(tmp_path, target, monkeypatch):
    """A list of many large files has many parts; one of nothing but parts is refused as before."""
    monkeypatch.setattr(unpickling, 'MAX_READS', 500)
    pickles(tmp_path / 'source', dumps=pickle.dumps)
    prepare(tmp_path / 'source', target)
    replaced('val_images_png.pkl', b']' * 20000 + b'.')(tmp_path / 'bomb')
    refused(tmp_path / 'bomb', target.with_name('other'), 'too many parts')


def test_other_targets_are_left_alone(tmp_path, target):
    pickles(tmp_path / 'source')
    put(target / 'mine.txt', b'x')
    with pytest.raises(PreparationError, match='exists and is not the complete data'):
        prepare(tmp_path / 'source', target)
    assert [path.name for path in target.iterdir()] == ['mine.txt']


def test_command(tmp_path):
    """Asks for all of tieredImageNet, and tells where people get it."""
    synsets(tmp_path / 'source')
    for arguments, words in [
        (['--source=source'], '2 classes of train instead of 351'),
        (['--source=absent'], '--source=absent is neither a folder nor an archive'),
        ([], 'github.com/renmengye/few-shot-ssl-public'),
    ]:
        line = [sys.executable, '-B', ROOT / 'scripts/data/prepare_tieredimagenet.py', *arguments]
        result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
        assert 'Traceback' not in result.stderr and not (tmp_path / 'data').exists()


def test_limits_are_larger_than_the_data():
    """Bytes: the list of 448,695 files, the array of them, and CUB's attributes."""
    for name, size in ('train_images_png.pkl', 9e9), ('images.npy', 9.5e9), ('a.txt', 1e8):
        archives.check_member(archives.Member(name, int(size), False, None, None), 'x.tar')
    with pytest.raises(PreparationError):
        archives.check_member(
            archives.Member('x', preparation.MAX_BYTES + 1, False, None, None), 'x'
        )
