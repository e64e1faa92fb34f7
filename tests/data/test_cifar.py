"""CIFAR-FS and FC100 of CIFAR-100 in the forms that people have: the same images, or a sentence."""

import functools
import hashlib
import io
import itertools
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import Calls, dumps2, link, named, put, serving

from data_generator import TaskSize
from fewshot.data.downloads import Remote
from fewshot.data.image_files import folder_layout
from fewshot.data.own_images import OwnImages
from fewshot.data.preparation import PreparationError
from scripts.data import prepare_cifar_fs
from scripts.data.prepare_cifar_fs import SPLITS

ROOT = Path(__file__).resolve().parents[2]
SMALL = {'train': ['train', 'apple'], 'val': ['bee'], 'test': ['cup']}
NAMES = ['apple', 'bee', 'cup', 'train']  # in the order of their numbers
IMAGES = 3  # of a class: two of the part train, one of test
ARCHIVE = 'cifar-100-python.tar.gz'

prepare = functools.partial(prepare_cifar_fs.prepare, splits=SMALL, images=IMAGES)


def pixels(label: str, number: int) -> np.ndarray:
    dice = np.random.default_rng([NAMES.index(label), number])
    return dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'PNG', **options)
    return file.getvalue()


def keys() -> dict[str, list[tuple[str, int]]]:
    """{part: (class, number) of its images}, in another order than the classes'."""
    parts = {'train': (2, 1), 'test': (3,)}
    return {part: [*itertools.product(NAMES[::-1], of)] for part, of in parts.items()}


def name(label: str, number: int) -> str:
    return f'{label[::-1]}_s_{number:06d}.png'


def contents() -> dict[str, dict]:
    """What the three pickles hold."""
    found = {'meta': {'fine_label_names': list(NAMES), 'coarse_label_names': ['things']}}
    for part, of in keys().items():
        found[part] = {
            'filenames': [name(*key) for key in of],
            'batch_label': f'{part}ing batch 1 of 1',
            'fine_labels': [NAMES.index(label) for label, _ in of],
            'coarse_labels': [0 for _ in of],
            # Red, green and blue one after another, each row by row.
            'data': np.stack([pixels(*key).transpose(2, 0, 1).reshape(-1) for key in of]),
        }
    return found


def unpacked(folder: Path, dumps=dumps2, change=lambda content: None):
    content = contents()
    change(content)
    for part, stored in content.items():
        put(folder / 'cifar-100-python' / part, dumps(stored))
    put(folder / 'cifar-100-python/file.txt~', b'')


def packed(folder: Path, name: str = ARCHIVE, fill=unpacked, more=()):
    """An archive of what `fill` makes, and of members besides, (name or TarInfo, bytes)."""
    fill(folder)
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    members = [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]
    for path in paths:
        path.unlink()
    if name.endswith('.zip'):
        with zipfile.ZipFile(folder / name, 'w') as archive:
            for member, data in members:
                archive.writestr(member, data)
        return
    with tarfile.open(folder / name, f'w:{name.rpartition(".tar.")[2]}') as archive:
        for member, data in [*members, *more]:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def folders(folder: Path, top='.', **options):
    for part, of in keys().items():
        for key in of:
            put(folder / top / part / key[0] / name(*key), encoded(pixels(*key), **options))
    put(folder / top / 'README.md', b'x')
    put(folder / top / 'train/.DS_Store', b'x')


FORMS = {
    'the archive': packed,
    'unpacked': unpacked,
    'of Python 3': functools.partial(unpacked, dumps=pickle.dumps),
    'folders': folders,
    'deeper folders': functools.partial(folders, top='a/b'),
    'folders in a zip': functools.partial(
        packed, name='CIFAR-100-dataset-main.zip', fill=functools.partial(folders, top='x-main')
    ),
    'folders in a tar': functools.partial(packed, name='cifar.tar.xz', fill=folders),
}


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / 'data/cifar_fs'


def loaded(target: Path) -> dict:
    """{split: classes and images}, as with --datasource=folder."""
    own = OwnImages(str(target), folder_layout(32, 3), [*SMALL])
    own.choose((0.64, 0.16, 0.2), TaskSize(1, 1, 1), skip_small=False, known=None)
    return own.load(None)


def assert_all_images(target: Path):
    """What --datasource=folder gets is every image, bit for bit, in the order of their names."""
    for split, classes in loaded(target).items():
        assert classes.names == sorted(SMALL[split])
        assert [*classes.counts] == [IMAGES] * len(SMALL[split])
        wanted = [pixels(label, k) for label in sorted(SMALL[split]) for k in (1, 2, 3)]
        np.testing.assert_array_equal(classes.images, wanted)


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_images(tmp_path, target, form):
    FORMS[form](tmp_path / 'source')
    told = 'train 2 classes, 6 images; val 1 classes, 3 images; test 1 classes, 3 images'
    assert told in prepare(tmp_path / 'source', target)
    assert {path.name for path in target.iterdir()} == set(SMALL)
    assert_all_images(target)
    assert 'nothing to do' in prepare(tmp_path / 'source', target)
    assert 'nothing to do' in prepare(None, target)


def test_an_archive_by_its_name(tmp_path, target):
    packed(tmp_path / 'source')
    prepare(tmp_path / 'source' / ARCHIVE, target)
    assert_all_images(target)


def test_large_pngs_keep_their_pixels(tmp_path, target):
    """Whatever else is in the file."""
    folders(tmp_path / 'source', compress_level=0, icc_profile=bytes(20000))
    prepare(tmp_path / 'source', target)
    assert_all_images(target)
    assert max(path.stat().st_size for path in target.rglob('*.png')) < 5000


def test_splits():
    """As many classes as published, each in one split; both of the same hundred."""
    sizes = {'cifar_fs': [64, 16, 20], 'fc100': [60, 20, 20]}
    hundred = set()
    for name, splits in SPLITS.items():
        assert [len(labels) for labels in splits.values()] == sizes[name]
        labels = list(itertools.chain(*splits.values()))
        assert len({*labels}) == 100
        hundred |= {*labels}
    assert len(hundred) == 100
    assert {'train', 'wolf'} <= {*SPLITS['cifar_fs']['train']}
    # FC100 splits by superclass, so people are all in one split; CIFAR-FS does not.
    people = {'baby', 'boy', 'girl', 'man', 'woman'}
    assert people <= {*SPLITS['fc100']['test']} and not people <= {*SPLITS['cifar_fs']['test']}


# What is refused ----------------------------------------------------------------------------------


def refused(source: Path | None, target: Path, *words: str, **options):
    """One sentence with the words, and nothing written."""
    with pytest.raises(PreparationError) as caught:
        prepare(source, target, **options)
    sentence = str(caught.value)
    assert '\n' not in sentence and not target.exists()
    assert all(word in sentence for word in words), sentence


def set_in(part: str, key: str, value):
    """Puts the value, or what a function makes of the one there."""

    def change(content):
        content[part][key] = value(content[part][key]) if callable(value) else value

    return change


NO_ARRAY, NO_CLASS, NOT_PLAIN = 'no array data', 'the 4 classes that meta names', 'no plain name'


@pytest.mark.parametrize(
    'part, key, value, words',
    [
        ('train', 'data', lambda data: data[:, :-1], NO_ARRAY),
        ('train', 'data', np.float32, NO_ARRAY),
        ('test', 'data', lambda data: data[:-1], 'as long as data'),
        ('test', 'fine_labels', lambda of: None, 'as long as data'),
        ('train', 'fine_labels', lambda of: [4, *of[1:]], NO_CLASS),
        ('train', 'fine_labels', lambda of: [-1, *of[1:]], NO_CLASS),
        ('train', 'fine_labels', lambda of: ['x', *of[1:]], NO_CLASS),
        ('test', 'fine_labels', lambda of: [0, 1, 2, 2], '4 images of cup instead of 3'),
        ('test', 'filenames', lambda of: [3, *of[1:]], 'filenames are not texts'),
        ('test', 'filenames', lambda of: ['../../x.png', *of[1:]], NOT_PLAIN),
        ('test', 'filenames', lambda of: ['x.exe', *of[1:]], NOT_PLAIN),
        ('train', 'filenames', lambda of: ['a.png'] * 8, 'two images train/a.png'),
        ('meta', 'fine_label_names', lambda of: None, 'no list fine_label_names'),
        ('meta', 'fine_label_names', lambda of: ['ant', *of[1:]], 'there is a class ant'),
        ('meta', 'fine_label_names', lambda of: ['..', *of[1:]], NOT_PLAIN),
    ],
)
def test_contents_are_checked(tmp_path, target, part, key, value, words):
    def change(content):
        content[part][key] = value(content[part][key])

    unpacked(tmp_path / 'source', change=change, dumps=pickle.dumps)
    refused(tmp_path / 'source', target, words)


def without_meta(source):
    unpacked(source)
    (source / 'cifar-100-python/meta').unlink()


def two_of_train(source):
    unpacked(source)
    put(source / 'copy/train', b'x')


def one_lacking(source):
    folders(source)
    (source / 'test/train' / name('train', 3)).unlink()


def another(data: bytes):
    """The PNG folders with these bytes for one of the images."""

    def make(source):
        folders(source)
        put(source / 'train/bee' / name('bee', 1), data)

    return make


PNG = encoded(pixels('bee', 1))


@pytest.mark.parametrize(
    'make, words',
    [
        (Path.mkdir, ['no CIFAR-100', ARCHIVE, 'meta', 'PNG']),
        (without_meta, ['no CIFAR-100']),
        (two_of_train, ['both called train']),
        (one_lacking, ['2 images of train instead of 3']),
        (another(PNG[:300]), [name('bee', 1), 'cannot be decoded']),
        (another(b''), [name('bee', 1), 'cannot be decoded']),
        (another(encoded(np.zeros((32, 31, 3), np.uint8))), ['is 31x32, RGB', '32x32']),
        (another(encoded(np.zeros((32, 32), np.uint8))), ['is 32x32, L']),
    ],
)
def test_sources_that_are_refused(tmp_path, target, make, words):
    make(tmp_path / 'source')
    refused(tmp_path / 'source', target, *words)


@pytest.mark.parametrize('part', ['meta', 'train', 'test'])
def test_a_pickle_that_would_call_something(tmp_path, target, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    unpacked(tmp_path / 'source')
    path = tmp_path / 'source/cifar-100-python' / part
    path.write_bytes(pickle.dumps({'fine_label_names': Calls()}))
    refused(tmp_path / 'source', target, str(path), 'it would call', 'where you trust it')
    assert not (tmp_path / 'called').exists()


@pytest.mark.parametrize('damage', ['half', 'empty', 'web page', 'another byte'])
@pytest.mark.parametrize('part', ['meta', 'train'])
def test_damaged_pickles(tmp_path, target, part, damage):
    unpacked(tmp_path / 'source')
    path = tmp_path / 'source/cifar-100-python' / part
    data = path.read_bytes()
    spoilt = {'half': data[: len(data) // 2], 'empty': b'', 'web page': b'<html>Sorry</html>'}
    path.write_bytes(spoilt.get(damage, b'\xff' + data[1:]))
    refused(tmp_path / 'source', target, str(path))


@pytest.mark.parametrize(
    'member, data, words',
    [
        (link('cifar-100-python/train'), b'', 'is a link'),
        (named('../train'), b'abc', 'unsafe path'),
        (named('/tmp/train'), b'abc', 'unsafe path'),
        (named('cifar-100-python/x.png'), bytes(2**25 + 1), 'unpacks to more than 32 MiB'),
    ],
)
def test_malicious_members(tmp_path, target, member, data, words):
    packed(tmp_path / 'source', more=[(member, data)])
    refused(tmp_path / 'source', target, ARCHIVE, repr(member.name), words)


@pytest.mark.parametrize('damage', ['half', 'end', 'middle', 'text', 'web page'])
def test_damaged_archives(tmp_path, target, damage):
    packed(tmp_path / 'source')
    path = tmp_path / 'source' / ARCHIVE
    data = path.read_bytes()
    half = len(data) // 2
    spoilt = {
        'half': data[:half],
        'end': data[:-12],
        'middle': data[:half] + bytes(9) + data[half + 9 :],
        'text': b'x' * 2000,
        'web page': b'<html>Virus scan warning</html>',
    }
    path.write_bytes(spoilt[damage])
    words = 'is a web page' if damage == 'web page' else 'is damaged'
    refused(path, target, str(path), words)


def test_other_targets_are_left_alone(tmp_path, target):
    folders(tmp_path / 'source')
    put(target / 'mine.txt', b'x')
    with pytest.raises(PreparationError, match='exists and is not the complete data'):
        prepare(tmp_path / 'source', target)
    assert [path.name for path in target.iterdir()] == ['mine.txt']


# Download -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the archive; `remote` describes it."""
    monkeypatch.setenv('no_proxy', '*')
    packed(tmp_path / 'official')
    data = (tmp_path / 'official' / ARCHIVE).read_bytes()
    with serving() as server:
        address = f'{server.address}/{ARCHIVE}'
        server.served = {f'/{ARCHIVE}': data}
        server.remote = Remote(ARCHIVE, address, hashlib.md5(data).hexdigest(), 10**6)
        yield server


def test_download(server, target):
    """It goes on where it broke off; nothing but the images is left."""
    server.breaks = [10**9, 500]
    prepare(None, target, remote=server.remote)
    assert_all_images(target)
    assert [part for _, part in server.asked] == [None, 'bytes=500-']
    caches = {path.name for path in target.parent.iterdir() if path.name.endswith('.cache.npy')}
    assert {path.name for path in target.parent.iterdir()} == {target.name, *caches}


def test_a_download_that_is_started_again(server, target):
    folder = target.with_name('cifar_fs.download')
    put(folder / ARCHIVE, server.served[f'/{ARCHIVE}'][:700])
    prepare(None, target, remote=server.remote)
    assert_all_images(target)
    assert server.asked == [(f'/{ARCHIVE}', 'bytes=700-')] and not folder.exists()


@pytest.mark.parametrize(
    'served, words',
    [
        ({f'/{ARCHIVE}': b'<html>Sorry</html>'}, 'sent a web page in place of it'),
        ({f'/{ARCHIVE}': bytes(1000)}, 'has another md5'),
        ({}, '404'),
    ],
)
def test_a_server_that_sends_something_else(server, target, served, words):
    server.served = served
    refused(None, target, server.remote.address, words, '--source', remote=server.remote)
    assert not target.parent.exists()


# The command --------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, '-B', ROOT / 'scripts/data/prepare_cifar_fs.py', *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=60)


def test_command(tmp_path, monkeypatch):
    """Asks for all of CIFAR-100, and of its server if no source is named."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    folders(tmp_path / 'source')
    for arguments, words in [
        (['--source=source'], '3 images of apple instead of 600'),
        (['--source=absent'], '--source=absent is neither a folder nor an archive'),
        (['stray'], '--help'),
        ([], f'{prepare_cifar_fs.ARCHIVE.address} cannot be downloaded'),
    ]:
        result = command(tmp_path, *arguments)
        assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
        assert 'Traceback' not in result.stderr and not (tmp_path / 'data').exists()


@pytest.mark.slow
def test_all_of_it(tmp_path):
    """Every class of both splits, 600 images each, from the archive and from folders."""
    names = sorted(itertools.chain(*SPLITS['cifar_fs'].values()))
    dice = np.random.default_rng(0)
    content = {'meta': {'fine_label_names': names}}
    for part, count in ('train', 500), ('test', 100):
        labels = [c for c in range(100) for _ in range(count)]
        content[part] = {
            'filenames': [f'{part}_{i:06d}.png' for i in range(len(labels))],
            'fine_labels': labels,
            'data': dice.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
        }
        for label, file, data in zip(labels, content[part]['filenames'], content[part]['data']):
            image = data.reshape(3, 32, 32).transpose(1, 2, 0)
            put(tmp_path / 'png' / part / names[label] / file, encoded(image, compress_level=1))
    for part, stored in content.items():
        put(tmp_path / 'archive' / part, dumps2(stored))
    found = {}
    for source, splits in itertools.product(['png', 'archive'], SPLITS):
        target = tmp_path / f'{source}_{splits}'
        given = [f'--source={source}', f'--target={target}', f'--splits={splits}']
        assert command(tmp_path, *given).returncode == 0
        found[source, splits] = {split: of.images for split, of in loaded(target).items()}
    for splits, sizes in ('cifar_fs', [38400, 9600, 12000]), ('fc100', [36000, 12000, 12000]):
        archive, png = found['archive', splits], found['png', splits]
        assert [len(images) for images in png.values()] == sizes
        for split in SMALL:
            np.testing.assert_array_equal(archive[split], png[split])
