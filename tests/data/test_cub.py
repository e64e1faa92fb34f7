"""CUB-200-2011 in small, in the forms that people have: the same images, or a sentence."""

import functools
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from PIL import Image
from sources import link, named, put, serving, train_on

from fewshot.data.cub import SPLITS
from fewshot.data.downloads import Remote
from fewshot.data.preparation import PreparationError
from scripts.data import prepare_cub

ARCHIVE = 'CUB_200_2011.tgz'
SMALL = {'train': 4, 'val': 2, 'test': 2}
LABELS = [f'{n:03d}.Bird_{n}' for n in range(1, 9)]
SPLIT = {label: ('train', 'val', 'train', 'test')[n % 4] for n, label in enumerate(LABELS)}
IMAGES = 3  # of each class
BOX = (30, 20, 60, 50)  # left, upper, width and height of the bird, which is white

prepare = functools.partial(prepare_cub.prepare, classes=SMALL, images=IMAGES * len(LABELS))


def photo(label: str, number: int) -> bytes:
    """A photo of a colour of its own, with a white bird."""
    pixels = np.full(
        (110, 150, 3), np.random.default_rng([*label.encode(), number]).integers(99, size=3)
    )
    left, upper, width, height = BOX
    pixels[upper : upper + height, left : left + width] = 255
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG', quality=95)
    return file.getvalue()


def unpacked(folder: Path, top='CUB_200_2011'):
    names, boxes = [], []
    for label in LABELS:
        for number in range(IMAGES):
            names.append(f'{len(names) + 1} {label}/Bird_{number}.jpg')
            boxes.append(f'{len(names)} {" ".join(f"{edge:.1f}" for edge in BOX)}')
            put(folder / top / 'images' / label / f'Bird_{number}.jpg', photo(label, number))
            put(folder / top / 'segmentations' / label / f'Bird_{number}.png', b'x')
    put(folder / top / 'images.txt', '\n'.join(names).encode() + b'\n')
    put(folder / top / 'bounding_boxes.txt', '\n'.join(boxes).encode() + b'\n')
    put(folder / 'attributes.txt', b'x')
    put(folder / 'cub/train' / LABELS[0] / 'Bird_0.jpg', b'what was prepared before')


def packed(folder: Path, more=()):
    """The archive, and members besides, (TarInfo, bytes). It has a text of 100 MB."""
    unpacked(folder)
    put(folder / 'CUB_200_2011/attributes/image_attribute_labels.txt', bytes(10**8))
    with tarfile.open(folder / ARCHIVE, 'w:gz', compresslevel=1) as archive:
        for path in sorted(folder.rglob('*')):
            if path.is_file() and path.name != ARCHIVE:
                archive.add(path, path.relative_to(folder).as_posix())
                path.unlink()
        for member, data in more:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def both(folder: Path):
    """The archive, and beside it what it unpacks to."""
    packed(folder)
    unpacked(folder)


FORMS = {
    'unpacked': unpacked,
    'the archive': packed,
    'both': both,
    'deeper': functools.partial(unpacked, top='a/b'),
}


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / 'data/cub'


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in paths}


def assert_all_images(target: Path):
    wanted = {f'{SPLIT[label]}/{label}/Bird_{k}.jpg' for label in LABELS for k in range(IMAGES)}
    found = pixels_of(target)
    assert found.keys() == wanted
    for name, pixels in found.items():
        _, label, file = name.split('/')
        whole = Image.open(io.BytesIO(photo(label, int(file[5]))))
        resized = np.int32(whole.resize((84, 84), Image.Resampling.LANCZOS))
        assert pixels.shape == (84, 84, 3) and np.abs(pixels - resized).mean() < 3


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_images(tmp_path, target, form):
    FORMS[form](tmp_path / 'source')
    told = 'train 4 classes, 12 images; val 2 classes, 6 images; test 2 classes, 6 images'
    assert told in prepare(tmp_path / 'source', target)
    assert_all_images(target)
    assert 'nothing to do' in prepare(tmp_path / 'source', target)
    assert 'nothing to do' in prepare(None, target)


@pytest.mark.parametrize('form', FORMS)
def test_crop(tmp_path, target, form):
    FORMS[form](tmp_path / 'source')
    prepare(tmp_path / 'source', target, crop=True)
    found = pixels_of(target)
    assert len(found) == IMAGES * len(LABELS)
    assert all(pixels[5:-5, 5:-5].min() > 240 for pixels in found.values())


def test_boxes_end_with_the_image(tmp_path, target):
    unpacked(tmp_path / 'source')
    path = tmp_path / 'source/CUB_200_2011/bounding_boxes.txt'
    path.write_text(path.read_text().replace('30.0 20.0 60.0 50.0', '-1.0 0.0 151.5 111.0'))
    prepare(tmp_path / 'source', target, crop=True)
    assert_all_images(target)


def test_the_split_is_that_of_chen_et_al():
    """Of the classes in order, counted from 0: even, 1 after fours, 3 after fours."""
    split = {n: SPLITS[n % 4 - 1] for n in range(1, 201)}
    assert [n for n in split if split[n] == 'train'] == [*range(1, 201, 2)]
    assert [n for n in split if split[n] == 'val'] == [*range(2, 201, 4)]
    assert [n for n in split if split[n] == 'test'] == [*range(4, 201, 4)]


def test_a_training_run(tmp_path, target, eager):
    unpacked(tmp_path / 'source')
    prepare(tmp_path / 'source', target)
    train_on(target, tmp_path)


# What is refused ----------------------------------------------------------------------------------


def refused(source: Path | None, target: Path, *words: str, **options):
    """One sentence with the words, and nothing written."""
    with pytest.raises(PreparationError) as caught:
        prepare(source, target, **options)
    sentence = str(caught.value)
    assert '\n' not in sentence and not target.exists()
    assert all(word in sentence for word in words), sentence


def changed(path: str, data: bytes | None):
    def make(folder: Path):
        unpacked(folder)
        (folder / 'CUB_200_2011' / path).unlink()
        if data is not None:
            put(folder / 'CUB_200_2011' / path, data)

    return make


def twice(folder: Path):
    unpacked(folder)
    unpacked(folder, 'copy')


ONE = f'images/{LABELS[0]}/Bird_0.jpg'
BOXES = 'bounding_boxes.txt'


@pytest.mark.parametrize(
    'make, crop, words',
    [
        (Path.mkdir, False, ['no CUB-200-2011', ARCHIVE, '001.Black_footed_Albatross']),
        (changed(ONE, None), False, ['23 images instead of 24']),
        (changed(ONE, photo('', 0)[:300]), False, ['Bird_0.jpg cannot be decoded']),
        (twice, False, ['both the same image']),
        (changed(BOXES, None), True, ['--crop needs', "'bounding_boxes.txt'"]),
        (changed(BOXES, b'1 2 3\n'), True, ['--crop needs', 'lacking or damaged']),
        (changed(BOXES, b'\xff\n'), True, ['--crop needs', 'lacking or damaged']),
        (changed('images.txt', b'1 a/b.jpg\n'), True, ['no box of', 'Bird_0.jpg']),
        (
            changed(BOXES, b'\n'.join(b'%d nan 0 9 9' % n for n in range(1, 25))),
            True,
            ['box of', 'is empty'],
        ),
        (
            changed(BOXES, b'\n'.join(b'%d 9 9 0 9' % n for n in range(1, 25))),
            True,
            ['box of', 'is empty'],
        ),
    ],
)
def test_sources_that_are_refused(tmp_path, target, make, crop, words):
    make(tmp_path / 'source')
    refused(tmp_path / 'source', target, *words, crop=crop)


@pytest.mark.parametrize(
    'member, data, words',
    [
        (link('CUB_200_2011/images/x.jpg'), b'', 'is a link'),
        (named('../001.Bird_1/x.jpg'), b'abc', 'unsafe path'),
        (named('/tmp/001.Bird_1/x.jpg'), b'abc', 'unsafe path'),
        (named('a/x.jpg'), bytes(2**25 + 1), 'unpacks to more than 32 MiB'),
    ],
)
def test_malicious_members(tmp_path, target, member, data, words):
    packed(tmp_path / 'source', more=[(member, data)])
    refused(tmp_path / 'source', target, ARCHIVE, repr(member.name), words)


def test_other_targets_are_left_alone(tmp_path, target):
    unpacked(tmp_path / 'source')
    put(target / 'mine.txt', b'x')
    with pytest.raises(PreparationError, match='exists and is not the complete data'):
        prepare(tmp_path / 'source', target)
    assert [path.name for path in target.iterdir()] == ['mine.txt']


def test_download(tmp_path, target, monkeypatch):
    """It goes on where it broke off; nothing but the images is left. Another file is refused."""
    monkeypatch.setenv('no_proxy', '*')
    packed(tmp_path / 'official')
    data = (tmp_path / 'official' / ARCHIVE).read_bytes()
    with serving() as server:
        address = f'{server.address}/{ARCHIVE}'
        remote = Remote(ARCHIVE, address, hashlib.md5(data).hexdigest(), 10**7)
        server.served = {f'/{ARCHIVE}': b'<html>Sorry</html>'}
        refused(None, target, address, 'sent a web page', '--source', remote=remote)
        server.served = {f'/{ARCHIVE}': data}
        server.breaks = [10**9, 500]
        prepare(None, target, remote=remote)
    assert_all_images(target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_command(tmp_path, monkeypatch):
    """Asks for all of CUB, and of its server if no source is named."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    unpacked(tmp_path / 'source')
    for arguments, words in [
        (['--source=source'], '4 classes of train instead of 100'),
        (['--source=absent'], '--source=absent is neither a folder nor an archive'),
        (['--crop'], f'{prepare_cub.ARCHIVE.address} cannot be downloaded'),
    ]:
        line = [sys.executable, '-B', ROOT / 'scripts/data/prepare_cub.py', *arguments]
        result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
        assert 'Traceback' not in result.stderr and not (tmp_path / 'data').exists()
