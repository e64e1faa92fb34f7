"""miniImagenet in the forms that people have, and downloaded: the same images, or one sentence."""

import csv
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import dumps2, link, named, put, serving

from fewshot.data import unpickling
from fewshot.data.image_folders import load_miniimagenet
from fewshot.data.preparation import PreparationError
from scripts.data import prepare_miniimagenet
from scripts.data.prepare_miniimagenet import PICKLES, prepare

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {'train': 3, 'val': 2, 'test': 2}  # classes of each
PLACES = (1, 3, 4)  # of a class's images among those of its synset


def photo(seed: int, size=(84, 84)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, 'JPEG')
    return file.getvalue()


def images() -> dict:
    """{(split, class, place): JPEG of 84x84}."""
    found = {}
    for s, (split, count) in enumerate(SPLITS.items()):
        for c in range(count):
            for place in PLACES:
                found[split, f'n{s}{c:07d}', place] = photo(100 * s + 10 * c + place)
    return found


IMAGES = images()


def write_csv(folder: Path):
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        rows = [(f'{c}{k:08d}.jpg', c) for s, c, k in IMAGES if s == split]
        with open(folder / f'{split}.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('filename', 'label'), *rows])


def flat(folder: Path, images='images'):
    write_csv(folder)
    for (_, name, place), data in IMAGES.items():
        put(folder / images / f'{name}{place:08d}.jpg', data)


def tree(folder: Path, splits=('train', 'val', 'test')):
    for (split, name, place), data in IMAGES.items():
        path = f'{dict(zip(SPLITS, splits))[split]}/{name}/photo{place}.jpg'
        put(folder / path, data)


def synsets(folder: Path, suffix='JPEG'):
    """Numbers with gaps, of one to four digits, so that their order is not that of the names."""
    write_csv(folder)
    for (_, name, place), data in IMAGES.items():
        put(folder / 'ILSVRC/train' / name / f'{name}_{7**place}.{suffix}', data)
    for name in {name for _, name, _ in IMAGES}:
        put(folder / 'ILSVRC/train' / name / f'{name}_{7**2}.{suffix}', photo(999))


def caches() -> dict:
    """{split: what its pickle holds}, the images in another order than the classes list them."""
    found = {}
    for split in SPLITS:
        keys = [key for key in IMAGES if key[0] == split]
        arrays = [np.asarray(Image.open(io.BytesIO(IMAGES[key]))) for key in keys]
        classes = {}
        for place, (_, name, _) in enumerate(keys):
            classes.setdefault(name, []).append(len(keys) - 1 - place)
        found[split] = {'image_data': np.stack(arrays[::-1]), 'class_dict': classes}
    return found


def pickles(folder: Path, dumps=pickle.dumps, val='val'):
    for split, content in caches().items():
        name = val if split == 'val' else split
        put(folder / f'mini-imagenet-cache-{name}.pkl', dumps(content))


def of_protocol(protocol):
    return functools.partial(pickles, dumps=functools.partial(pickle.dumps, protocol=protocol))


FORMS = {
    'flat': flat,
    'flat in a deeper folder': functools.partial(flat, images='a/b'),
    'tree': tree,
    'tree with valid': functools.partial(tree, splits=('train', 'valid', 'test')),
    'tree with Validation': functools.partial(tree, splits=('Train', 'Validation', 'TEST')),
    'tree with dev': functools.partial(tree, splits=('train', 'dev', 'test')),
    'synsets': synsets,
    'pickles of protocol 0': of_protocol(0),
    'pickles of protocol 2': of_protocol(2),
    'pickles of protocol 4': of_protocol(4),
    'pickles of protocol 5': of_protocol(5),
    'pickles of Python 2': functools.partial(pickles, dumps=dumps2, val='validation'),
}


def assert_all_images(data: Path):
    """What training gets is IMAGES, bit for bit."""
    for split, classes in load_miniimagenet(data).items():
        keys = [key for key in IMAGES if key[0] == split]
        arrays = [np.asarray(Image.open(io.BytesIO(IMAGES[key]))) for key in keys]
        assert classes.names == sorted({name for _, name, _ in keys})
        assert set(classes.counts) == {len(PLACES)}
        np.testing.assert_array_equal(classes.images, arrays)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / 'data/miniImagenet'


def refused(source: Path, target: Path, *words: str):
    """One sentence with the words, and nothing written."""
    with pytest.raises(PreparationError) as caught:
        prepare(source, target)
    sentence = str(caught.value)
    assert '\n' not in sentence and not target.parent.exists()
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_images(tmp_path, target, form):
    FORMS[form](tmp_path / 'source')
    assert 'val: 2 classes, 6 images' in prepare(tmp_path / 'source', target)
    assert_all_images(target.parent)
    assert 'nothing to do' in prepare(tmp_path / 'source', target)


@pytest.mark.parametrize(
    'form, suffix',
    [
        *itertools.product(['flat', 'tree', 'synsets'], ['.zip', '.tar', '.tar.gz', '.tar.bz2']),
        *itertools.product(['pickles of Python 2'], ['.zip', '.tar', '.tgz']),
        ('tree', '.tar.xz'),
    ],
)
def test_archives(tmp_path, target, form, suffix):
    kind = {'.tgz': '.tar.gz'}.get(suffix, suffix)
    formats = {'.zip': 'zip', '.tar': 'tar', '.tar.gz': 'gztar', '.tar.bz2': 'bztar'}
    FORMS[form](tmp_path / 'whole')
    made = shutil.make_archive(tmp_path / 'archive', formats.get(kind, 'xztar'), tmp_path, 'whole')
    source = tmp_path / f'mini{suffix}'
    os.rename(made, source)
    prepare(source, target)
    assert_all_images(target.parent)


def test_archives_of_splits_in_a_folder(tmp_path, target):
    """train.tar, val.tar and test.zip, whose class folders are on top."""
    tree(tmp_path)
    (tmp_path / 'source').mkdir()
    for split, form in ('train', 'tar'), ('val', 'gztar'), ('test', 'zip'):
        shutil.make_archive(tmp_path / 'source' / split, form, tmp_path / split)
    prepare(tmp_path / 'source', target)
    assert_all_images(target.parent)


def test_imagenet_as_an_archive_of_archives(tmp_path, target):
    """Those of other synsets are not even opened."""
    synsets(tmp_path / 'whole')
    folder = tmp_path / 'whole/ILSVRC/train'
    write_csv(tmp_path / 'source')
    with tarfile.open(tmp_path / 'source/ILSVRC2012_img_train.tar', 'w') as outer:
        for synset in sorted(folder.iterdir()):
            inner = shutil.make_archive(tmp_path / synset.name, 'tar', synset)
            outer.add(inner, f'{synset.name}.tar')
        (tmp_path / 'other').write_bytes(b'no archive')
        outer.add(tmp_path / 'other', 'n09999999.tar')
    prepare(tmp_path / 'source', target)
    assert_all_images(target.parent)


def test_copies_in_other_folders_do_not_count(tmp_path, target):
    """images/ and the uppermost csv files do, as when nothing else was looked at."""
    flat(tmp_path / 'source')
    for copy in 'a', 'b':
        name = f'{copy}/n0000000000000001.jpg'
        put(tmp_path / 'source' / name, photo(999))
        put(tmp_path / f'source/{copy}/train.csv', b'not a csv file')
    prepare(tmp_path / 'source', target)
    assert_all_images(target.parent)


def test_images_of_any_size_and_png(tmp_path, target):
    """PNG of 84x84 stays as it is, others are resized and stay what they are."""
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(1))).save(file, 'PNG')
    put(tmp_path / 'source/train/n0/same.png', file.getvalue())
    file = io.BytesIO()
    large = Image.open(io.BytesIO(photo(2, (200, 150))))
    large.save(file, 'PNG')
    put(tmp_path / 'source/train/n0/large.png', file.getvalue())
    put(tmp_path / 'source/train/n0/large.jpeg', photo(2, (200, 150)))
    put(tmp_path / 'source/train/n0/notes.txt', b'x')
    prepare(tmp_path / 'source', target)
    made = {path.name: path for path in (target / 'train/n0').iterdir()}
    assert set(made) == {'same.png', 'large.png', 'large.jpeg'}
    assert made['same.png'].read_bytes() == (tmp_path / 'source/train/n0/same.png').read_bytes()
    expected = large.resize((84, 84), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(Image.open(made['large.png']), expected)
    with Image.open(made['large.jpeg']) as image:
        assert (image.format, image.size) == ('JPEG', (84, 84))


# What is refused ----------------------------------------------------------------------------------


def two_names_of_val(source):
    tree(source)
    put(source / 'valid/n9/a.jpg', photo(1))


def imagenet_without_csv(source):
    for c in range(65):
        put(source / f'train/n{c:08d}/n_1.JPEG', photo(1))


def incomplete_synset(source):
    synsets(source)
    next((source / 'ILSVRC/train/n00000000').iterdir()).unlink()


def csv_alone(source):
    write_csv(source)


def both_pickles_of_val(source):
    pickles(source)
    pickles(source, val='validation')


@pytest.mark.parametrize(
    'make, words',
    [
        (two_names_of_val, ['val', 'valid', 'take one away']),
        (imagenet_without_csv, ['train has 65 classes', 'miniImagenet has 64', 'train.csv']),
        (incomplete_synset, ['n0000000000000004.jpg', 'image 4 of n00000000', 'there are 3']),
        (csv_alone, ['no .jpg images']),
        (both_pickles_of_val, ['mini-imagenet-cache-val.pkl', 'validation.pkl', 'take one away']),
        (Path.mkdir, ['no train.csv', 'mini-imagenet-cache-train.pkl', 'folders train, val']),
    ],
)
def test_sources_that_are_refused(tmp_path, target, make, words):
    make(tmp_path / 'source')
    refused(tmp_path / 'source', target, *words)


class Calls:
    """Unpickled by Python itself, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_call_something(tmp_path, target, protocol):
    content = {**caches()['train'], 'more': Calls(tmp_path / 'touched')}
    name = tmp_path / 'source/mini-imagenet-cache-train.pkl'
    put(name, pickle.dumps(content, protocol))
    refused(tmp_path / 'source', target, str(name), f'would call {os.system.__module__}.system')
    assert not (tmp_path / 'touched').exists()


def claim(size: int, data: bytes) -> bytes:
    """A pickle of bytes that claims a size."""
    return b'\x80\x04\x8e' + struct.pack('<Q', size) + data


def nested_key(levels: int) -> bytes:
    """A dictionary with a key of pairs of pairs of ...: its hash would take 2**levels steps."""
    levels = b''.join(b'q' + bytes([i]) + b'h' + bytes([i]) + b'\x86' for i in range(levels))
    return b'})' + levels + b'Ns.'


def copies(size: int, count: int) -> bytes:
    """A text whose encoding is asked for again and again."""
    start = b'\x80\x02c_codecs\nencode\nq\0X' + struct.pack('<I', size) + b'a' * size + b'q\1'
    return start + b'U\6latin1q\2' + b'h\0h\1h\2\x86R' * count + b'.'


WHOLE = pickle.dumps(caches()['val'])
HUGE = {
    'claimed bytes': (claim(2**40, b'abc'), 'ends early'),
    'claimed array': (b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'abc', 'ends early'),
    'claimed memo': (b'\x80\x02]r\xff\xff\xff\x7f.', 'not miniImagenet as it should be'),
    'nested key': (nested_key(200), 'a key is no text and no number'),
    'many parts': (b'}' * 20000 + b'.', 'too many parts'),
    'many copies': (copies(2**20, 100), 'makes much more than it holds'),
}
DAMAGED = {
    'empty': (b'', 'ends early'),
    'no array': (WHOLE[:40], 'ends early'),
    'half an array': (WHOLE[: len(WHOLE) // 2], 'ends early'),
    'without its end': (WHOLE[:-1], 'ends early'),
    'text': (b'miniImagenet', 'no pickle, or damaged'),
    'web page': (b'<!DOCTYPE html><html>Sign in</html>', 'is a web page'),
    'instance': (b"(S'touch'\nios\nsystem\n.", 'would call os.system'),
    'persistent': (b'Pname\n.', 'PERSID'),
    'extension': (b'\x82\x01.', 'EXT1'),
}


@pytest.mark.parametrize('data, words', [*HUGE.values(), *DAMAGED.values()], ids=[*HUGE, *DAMAGED])
def test_bombs_and_damaged_pickles(tmp_path, target, monkeypatch, data, words):
    monkeypatch.setattr(unpickling, 'MAX_READS', 10000)
    put(tmp_path / 'source/mini-imagenet-cache-train.pkl', data)
    refused(tmp_path / 'source', target, str(tmp_path), 'mini-imagenet-cache-train.pkl', words)


def changed(**changes):
    return lambda content: {**content, **changes}


def without_class(content):
    classes = content['class_dict']
    return {**content, 'class_dict': {**classes, 'n00000000': []}}


def with_class(name, places):
    return lambda content: {**content, 'class_dict': {name: places}}


ZEROS = functools.partial(np.zeros, dtype=np.uint8)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda content: [content], 'no array image_data'),
        (changed(image_data=[1]), 'no array image_data'),
        (changed(image_data=ZEROS((9, 3, 84, 84))), '[9, 3, 84, 84] of uint8'),
        (changed(image_data=ZEROS((9, 84, 84))), '[9, 84, 84] of uint8'),
        (changed(image_data=ZEROS((9, 80, 80, 3))), '[9, 80, 80, 3] of uint8'),
        (changed(image_data=np.zeros((9, 84, 84, 3), 'f4')), '[9, 84, 84, 3] of float32'),
        (changed(image_data=np.array([[1], 'x'], object)), "array of 'O8'"),
        (changed(class_dict=None), 'no dictionary class_dict'),
        (changed(class_dict={}), 'no dictionary class_dict'),
        (without_class, 'n00000000 has no list'),
        (with_class('n0', [0, 9]), 'has image 9 of 9'),
        (with_class('n0', [-1]), 'has image -1'),
        (with_class('n0', [0.5]), 'has image 0.5'),
        (with_class('n0', [1, 1]), 'image 1 for the second time'),
        (with_class('../n0', [1]), "'../n0', which is no name"),
        (with_class(5, [1]), '5, which is no name'),
    ],
)
def test_pickles_of_something_else(tmp_path, target, change, words):
    """The first pickle is good, and is not written either."""
    pickles(tmp_path / 'source')
    put(tmp_path / 'source/mini-imagenet-cache-train.pkl', pickle.dumps(change(caches()['train'])))
    refused(tmp_path / 'source', target, 'mini-imagenet-cache-train.pkl', words)


def test_numpy_numbers_as_places(tmp_path, target):
    content = caches()['train']
    classes = content['class_dict']
    content['class_dict'] = {name: np.array(places) for name, places in classes.items()}
    content['class_dict']['n00000001'] = [*content['class_dict']['n00000001']]
    pickles(tmp_path / 'source')
    put(tmp_path / 'source/mini-imagenet-cache-train.pkl', pickle.dumps(content))
    prepare(tmp_path / 'source', target)
    assert_all_images(target.parent)


class View:
    """Unpickled by Python itself, an array on the memory of another, which that may give up."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        function, (_, *others) = self.array.__reduce_ex__(5)
        return function, (self.array, *others)


def test_arrays_on_the_memory_of_others_are_refused():
    array = np.arange(4)
    assert np.array_equal(pickle.loads(pickle.dumps(View(array), 4)), array)
    with pytest.raises(pickle.UnpicklingError, match='is no pickle, or damaged'):
        unpickling.load(io.BytesIO(pickle.dumps(View(array), 4)))


def test_any_damage_to_a_pickle_is_a_sentence_or_harmless():
    """Bytes changed anywhere: nothing but UnpicklingError, and no other types."""
    whole = pickle.dumps({'a': np.arange(4), 'b': [1, np.float32(2)], 'c': {'d': (None, True)}}, 2)
    dice = np.random.default_rng(0)
    read = 0
    for _ in range(600):
        data = bytearray(whole)
        for place in dice.integers(0, len(data), dice.integers(1, 4)):
            data[place] = dice.integers(0, 256)
        try:
            unpickling.load(io.BytesIO(data))
            read += 1
        except pickle.UnpicklingError as error:
            assert '\n' not in str(error)
    assert 0 < read < 600


@pytest.mark.parametrize('suffix', ['.tar', '.tar.gz'])
@pytest.mark.parametrize(
    'info, words',
    [
        (link(), 'is a link'),
        (link(to='b.jpg', kind=tarfile.LNKTYPE), 'is a link'),
        (link(kind=tarfile.FIFOTYPE), 'is a link, a device'),
        (link(kind=tarfile.CHRTYPE), 'is a link, a device'),
        (named('/tmp/train/n0/a.jpg'), 'unsafe path'),
        (named('../train/n0/a.jpg'), 'unsafe path'),
        (named('train/n0/../../../a.jpg'), 'unsafe path'),
        (named('C:/train/n0/a.jpg'), 'unsafe path'),
    ],
)
def test_malicious_members_of_tars(tmp_path, target, info, words, suffix):
    tree(tmp_path / 'whole')
    source = tmp_path / f'source{suffix}'
    with tarfile.open(source, f'w:{suffix[5:]}') as archive:
        archive.add(tmp_path / 'whole', 'whole')
        archive.addfile(info, io.BytesIO(b'abc') if info.size else None)
    refused(source, target, str(source), repr(info.name), words)


@pytest.mark.parametrize('suffix', ['.tar', '.tar.gz', '.tar.bz2', '.zip'])
@pytest.mark.parametrize('damage', ['half', 'end', 'header', 'text', 'web page'])
def test_damaged_archives(tmp_path, target, suffix, damage):
    tree(tmp_path / 'whole')
    form = {'.tar': 'tar', '.tar.gz': 'gztar', '.tar.bz2': 'bztar', '.zip': 'zip'}[suffix]
    source = Path(shutil.make_archive(tmp_path / 'source', form, tmp_path / 'whole'))
    data = source.read_bytes()
    place = data.index(b'ustar', len(data) // 2) if suffix == '.tar' else len(data) // 2
    spoilt = {
        'half': data[: len(data) // 2],
        'end': data[: data.rindex(b'ustar') + 2048] if suffix == '.tar' else data[:-12],
        'header': data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
        'text': b'x' * 2000,
        'web page': b'<html>Virus scan warning</html>',
    }
    source.write_bytes(spoilt[damage])
    words = 'is a web page' if damage == 'web page' else 'is damaged'
    if suffix == '.zip' and damage == 'header':
        words = str(source)  # or the image in it is
    refused(source, target, str(source), words)


def test_a_header_that_claims_gigabytes(tmp_path, target):
    """Of a long name, which is read at once."""
    info = named('x')
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    (tmp_path / 'source.tar').write_bytes(info.tobuf() + bytes(10**5))
    refused(tmp_path / 'source.tar', target, 'source.tar is damaged', '4294967296 bytes')


# Download -----------------------------------------------------------------------------------------


@pytest.fixture
def zenodo(tmp_path, monkeypatch):
    """A server with a record as Zenodo's of three small pickles; `record` is its address."""
    monkeypatch.setenv('no_proxy', '*')
    pickles(tmp_path / 'official', val='validation')
    with serving() as server:
        address, files = server.address, []
        server.record = f'{address}/7'
        for name in PICKLES:
            data = server.served[f'/{name}'] = (tmp_path / 'official' / name).read_bytes()
            md5 = hashlib.md5(data).hexdigest()
            links = {'self': f'{address}/{name}'}
            files.append({'key': name, 'checksum': f'md5:{md5}', 'links': links})
        server.served['/7'] = json.dumps({'id': 7, 'files': files}).encode()
        yield server


def download(server, target) -> str:
    return prepare_miniimagenet.download(target, server.record, SPLITS, len(PLACES))


def left(target: Path) -> dict:
    """{name: size} of what is kept of a download."""
    folder = target.with_name('miniImagenet.download')
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}


def fails(server, target: Path, *words: str):
    with pytest.raises(PreparationError) as caught:
        download(server, target)
    sentence = str(caught.value)
    assert '\n' not in sentence and not target.exists()
    assert all(word in sentence for word in ('--source', *words)), sentence


def test_download(zenodo, target, capsys):
    assert 'train: 3 classes, 9 images' in download(zenodo, target)
    assert_all_images(target.parent)
    assert f'{PICKLES[0]}: 0 of 0 MB' in capsys.readouterr().err
    asked = len(zenodo.asked)
    assert 'complete already' in download(zenodo, target) and len(zenodo.asked) == asked
    caches = {f'miniImagenet.{split}.cache.npy' for split in SPLITS}
    assert {path.name for path in target.parent.iterdir()} == {'miniImagenet', *caches}


@pytest.mark.parametrize('resumes', [True, False])
def test_a_connection_that_breaks_off(zenodo, target, resumes):
    """It goes on where it was, or from the beginning where the server cannot do that."""
    zenodo.resumes = resumes
    size = len(zenodo.served[f'/{PICKLES[0]}'])
    zenodo.breaks = [size, 1500, 1000, 10**9]  # from the last on; the first is of the record
    download(zenodo, target)
    assert_all_images(target.parent)
    parts = [part for path, part in zenodo.asked if path == f'/{PICKLES[0]}']
    assert parts == [None, 'bytes=1000-', 'bytes=1500-']


def test_a_download_that_is_started_again(zenodo, target):
    """What is there already is not fetched again, nor is what is complete."""
    data = zenodo.served.pop(f'/{PICKLES[1]}')
    fails(zenodo, target, PICKLES[1], '404')
    assert left(target) == {PICKLES[0]: len(zenodo.served[f'/{PICKLES[0]}'])}
    (target.with_name('miniImagenet.download') / PICKLES[1]).write_bytes(data[:700])
    zenodo.served[f'/{PICKLES[1]}'] = data
    zenodo.asked.clear()
    download(zenodo, target)
    assert_all_images(target.parent)
    first, second, third = (f'/{name}' for name in PICKLES)
    assert zenodo.asked == [('/7', None), (second, 'bytes=700-'), (third, None)]
    assert not left(target) and first in zenodo.served


def test_a_longer_file_than_the_servers_is_fetched_again(zenodo, target):
    folder = target.with_name('miniImagenet.download')
    put(folder / PICKLES[0], bytes(10**6))
    download(zenodo, target)
    assert_all_images(target.parent)


@pytest.mark.parametrize(
    'data, words',
    [
        (b'<html>Verify that you are human</html>', 'sent a web page in place of it'),
        (bytes(1000), 'has another md5'),
    ],
)
def test_a_server_that_sends_something_else(zenodo, target, data, words):
    zenodo.served[f'/{PICKLES[0]}'] = data
    fails(zenodo, target, PICKLES[0], 'is not the official file, whose md5 is', words)
    assert not target.parent.exists()


def test_more_than_a_file_may_have(zenodo, target, monkeypatch):
    monkeypatch.setattr(prepare_miniimagenet, 'MAX_DOWNLOAD', 1000)
    fails(zenodo, target, PICKLES[0], 'more than 1000 bytes')
    assert not target.parent.exists()


@pytest.mark.parametrize(
    'record',
    [
        b'<html>Maintenance</html>',
        b'[]',
        b'{"files": []}',
        b'{"files": [{"key": "%s", "checksum": "md5:0", "links": {"self": "file:///etc/passwd"}}]}'
        % PICKLES[0].encode(),
    ],
)
def test_a_record_that_is_none(zenodo, target, record):
    zenodo.served['/7'] = record
    fails(zenodo, target, zenodo.record, 'is not a description of the pickles')
    assert not target.parent.exists()


def test_no_server(zenodo, target):
    zenodo.record = 'http://127.0.0.1:9/7'
    fails(zenodo, target, 'http://127.0.0.1:9/7 cannot be downloaded')
    assert not target.parent.exists()


def test_command_without_source_downloads(tmp_path, monkeypatch):
    """Through a proxy that is not there, so that no test asks Zenodo."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    line = [sys.executable, '-B', ROOT / 'scripts/data/prepare_miniimagenet.py']
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    (sentence,) = result.stderr.splitlines()
    assert f'{prepare_miniimagenet.RECORD} cannot be downloaded' in sentence
    assert '--source' in sentence
