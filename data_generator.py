"""Where tasks come from: random sinusoids, and class folders of images (Omniglot, miniImagenet, your own).

A generator turns (seed, split, iteration) into a meta-batch of tasks and keeps no state:

    folders = load_omniglot('data')
    generator = ImageGenerator(folders, num_classes=5, num_support=1, num_query=1, rotate=True)
    inputa, labela, inputb, labelb = generator.batch('train', iteration=0, num_tasks=32)

Images are decoded once. The pixels are kept beside the data (`omniglot_resized.cache`, `miniImagenet.train.cache`, ...)
in folders that are made again when the files change and may be deleted at any time.
"""

import hashlib
import json
import math
import os
import random
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from utils import Batch

SPLITS = ('train', 'val', 'test')


class ClassImages(NamedTuple):
    """The decoded images of some classes: class c owns images[starts[c]:starts[c] + counts[c]]."""

    folder: str  # where they come from, for messages
    names: list  # of the classes, e.g. 'Greek/character01'
    starts: np.ndarray  # [classes] int64
    counts: np.ndarray  # [classes] int64
    images: (
        np.ndarray
    )  # [total, height, width, channels] uint8, usually memory-mapped; value = stored / 255

    def select(self, classes: Sequence[int]) -> 'ClassImages':
        """Some of the classes, in the order given, on the same images."""
        names = [self.names[c] for c in classes]
        return self._replace(names=names, starts=self.starts[classes], counts=self.counts[classes])


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------
class DataGenerator:
    """Draws meta-batches. Everything random about a task is one row of uniform numbers; `_tasks` reads it."""

    def __init__(self, dim_input: int, dim_output: int, num_draws: int, seed: int):
        if seed < 0:
            raise ValueError(f'the seed must not be negative, but it is {seed}')
        self.dim_input, self.dim_output = dim_input, dim_output  # per example
        self.num_draws, self.seed = num_draws, seed

    def batch(
        self, split: str, iteration: int, num_tasks: int, tasks: slice = slice(None)
    ) -> Batch:
        """The meta-batch of an iteration, a pure function of (seed, split, iteration).

        Args:
          split: 'train', 'val' or 'test'.
          iteration: not negative.
          num_tasks: T. Task i is the same whatever T is.
          tasks: returns this share of the T tasks only, the same tasks as slicing the whole meta-batch would give,
            without the cost of the others.
        """
        return self._tasks(split, self._draw(split, iteration, num_tasks)[tasks])

    def batches(
        self,
        split: str,
        first_iteration: int,
        count: int,
        num_tasks: int,
        tasks: slice = slice(None),
    ) -> Batch:
        """The meta-batches of `count` successive iterations, stacked: [count, T, ...]; equal to batch() of each."""
        draws = [
            self._draw(split, i, num_tasks)[tasks]
            for i in range(first_iteration, first_iteration + count)
        ]
        batch = self._tasks(split, np.concatenate(draws))  # [count*T, ...]
        return Batch(*(array.reshape(count, len(draws[0]), *array.shape[1:]) for array in batch))

    def _draw(self, split: str, iteration: int, num_tasks: int) -> np.ndarray:
        """Uniform numbers in [0, 1), a row for each task: [T, num_draws]."""
        if split not in SPLITS:
            raise ValueError(f'there is no split {split!r}; the splits are {", ".join(SPLITS)}')
        if num_tasks < 1:
            raise ValueError(f'--meta_batch_size must be at least 1, but it is {num_tasks}')
        return np.random.default_rng([self.seed, SPLITS.index(split), iteration]).random(
            (num_tasks, self.num_draws)
        )

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        raise NotImplementedError


class SinusoidGenerator(DataGenerator):
    """Regression tasks y = A sin(x - phi): A uniform in [0.1, 5], phi in [0, pi], x in [-5, 5].

    A task has K + Q points, the first K of which are the support set. With `oracle` the inputs are (x, A, phi). All
    splits draw from the same distribution, each from a stream of its own.

    Raises:
      ValueError: a size or the seed is out of range.
    """

    def __init__(self, num_support: int, num_query: int, oracle: bool = False, seed: int = 0):
        _check_shots(num_support, num_query)
        super().__init__(
            dim_input=3 if oracle else 1,
            dim_output=1,
            num_draws=2 + num_support + num_query,
            seed=seed,
        )
        self.num_support, self.num_query, self.oracle = num_support, num_query, oracle

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        amplitude = 0.1 + 4.9 * uniform[:, :1]  # [T, 1]
        phase = np.pi * uniform[:, 1:2]  # [T, 1]
        x = 10 * uniform[:, 2:] - 5  # [T, K+Q]
        inputs = np.empty((*x.shape, self.dim_input), np.float32)
        inputs[..., 0] = x
        if self.oracle:
            inputs[..., 1], inputs[..., 2] = amplitude, phase
        labels = (amplitude * np.sin(x - phase)).astype(np.float32)[..., None]
        support, query = np.s_[:, : self.num_support], np.s_[:, self.num_support :]
        return Batch(
            *(
                np.ascontiguousarray(part)
                for part in (inputs[support], labels[support], inputs[query], labels[query])
            )
        )


class ImageGenerator(DataGenerator):
    """N-way classification tasks from class folders.

    A task draws N classes without replacement, K + Q images of each without replacement (the first K are the support
    set) and, with `rotate`, a rotation by 0, 90, 180 or 270 degrees (counter-clockwise) for each class. Class i of
    those drawn has the label i; within each shot the classes are shuffled.

    Generators are cheap and hold no copy of the images: make a second one on the same `folders` for another number of
    query images.

    Args:
      folders: the decoded classes of each split, from load_omniglot, load_miniimagenet or load_folder.
      num_classes: N.
      num_support: K, support images per class.
      num_query: Q, query images per class; may be 0.
      rotate: draw rotations.
      seed: another seed gives other tasks.
      splits: the splits it will be used on; all that `folders` holds if None.

    Raises:
      ValueError: a size is out of range, or a split has too few classes or too few images in a class.
    """

    def __init__(
        self,
        folders: Mapping[str, ClassImages],
        num_classes: int,
        num_support: int,
        num_query: int,
        rotate: bool = False,
        seed: int = 0,
        splits: Iterable[str] | None = None,
    ):
        _check_shots(num_support, num_query)
        if num_classes < 1:
            raise ValueError(f'--num_classes must be at least 1, but it is {num_classes}')
        self.folders = {split: folders[split] for split in (folders if splits is None else splits)}
        self.num_classes, self.num_support, self.num_query = num_classes, num_support, num_query
        self.rotate = rotate
        for split in self.folders:
            self._check(split)
        self.image_shape = next(iter(self.folders.values())).images.shape[
            1:
        ]  # (height, width, channels)
        if rotate and self.image_shape[0] != self.image_shape[1]:
            raise ValueError(
                f'only square images can be rotated, not {self.image_shape[0]}x{self.image_shape[1]}'
            )
        # A task draws N classes, N rotations, K + Q images of each class, and an order of the classes for each shot.
        super().__init__(
            math.prod(self.image_shape),
            num_classes,
            num_draws=2 * num_classes * (1 + num_support + num_query),
            seed=seed,
        )

    def _check(self, split: str):
        """Raise ValueError if the split cannot fill a task."""
        classes, images = self.folders[split], self.num_support + self.num_query
        if self.num_classes > len(classes.names):
            raise ValueError(
                f'--num_classes={self.num_classes} is more than the {len(classes.names)} classes of the '
                f'{split} split in {classes.folder}: use a smaller --num_classes, or give the split more classes'
            )
        shortest = int(np.argmin(classes.counts))
        if images > classes.counts[shortest]:
            raise ValueError(
                f'the class {classes.names[shortest]} of the {split} split in {classes.folder} has '
                f'{classes.counts[shortest]} images, but a task takes {images} of each class ({self.num_support} for '
                f'support, {self.num_query} for query): use a smaller --update_batch_size'
            )

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        if split not in self.folders:
            raise ValueError(
                f'this generator was made for the splits {", ".join(self.folders)}, not for {split}'
            )
        source = self.folders[split]
        ways, shots = self.num_classes, self.num_support + self.num_query
        ends = np.cumsum([ways, ways, ways * shots])
        classes, turns, chosen, order = np.split(uniform, ends, axis=1)
        classes = _distinct(classes, len(source.names))  # [T, N]
        turns = (4 * turns).astype(np.int64)  # [T, N]
        chosen = _distinct(
            chosen.reshape(-1, ways, shots), source.counts[classes][..., None]
        )  # [T, N, K+Q]
        order = _distinct(order.reshape(-1, shots, ways), ways)  # [T, K+Q, N]: labels
        images = (source.starts[classes][..., None] + chosen).transpose(
            0, 2, 1
        )  # [T, K+Q, N] by class
        images = np.take_along_axis(images, order, axis=2)
        turns = np.take_along_axis(turns[:, None], order, axis=2)
        support, query = np.s_[:, : self.num_support], np.s_[:, self.num_support :]
        return Batch(
            self._pixels(source, images[support], turns[support]),
            self._one_hot(order[support]),
            self._pixels(source, images[query], turns[query]),
            self._one_hot(order[query]),
        )

    def _pixels(self, source: ClassImages, index: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Images [T, shots, N] by their index, turned and flattened row by row: [T, shots*N, D] float32."""
        pixels = source.images[index]  # [T, shots, N, height, width, channels] uint8
        for quarter in (1, 2, 3) if self.rotate else ():
            turned = turns == quarter
            pixels[turned] = np.rot90(pixels[turned], quarter, axes=(1, 2))
        tasks, shots, ways = index.shape
        return np.divide(pixels, 255, dtype=np.float32).reshape(tasks, shots * ways, self.dim_input)

    def _one_hot(self, labels: np.ndarray) -> np.ndarray:
        """[T, shots, N] -> [T, shots*N, N] float32."""
        tasks, shots, ways = labels.shape
        return np.eye(ways, dtype=np.float32)[labels].reshape(tasks, shots * ways, ways)


def _check_shots(num_support: int, num_query: int):
    if num_support < 1:
        raise ValueError(f'--update_batch_size must be at least 1, but it is {num_support}')
    if num_query < 0:
        raise ValueError(
            f'the number of query examples must not be negative, but it is {num_query}'
        )


def _distinct(uniform: np.ndarray, counts) -> np.ndarray:
    """Draws without replacement, in random order: [..., size] uniform numbers -> distinct integers below `counts`.

    `counts` is a number or [..., 1]. The i-th draw is one of the counts - i numbers that are left, first as its rank
    among them (a Lehmer code); stepping over every earlier draw that is not greater turns the rank into the number.
    """
    size = uniform.shape[-1]
    draws = (uniform * (counts - np.arange(size))).astype(np.int64)
    for i in reversed(range(size - 1)):
        later = draws[..., i + 1 :]
        later += later >= draws[..., i : i + 1]
    return draws


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------
class ImageLayout(NamedTuple):
    """How a data set lies on disk, and how its images are to be stored."""

    depth: int  # of a class folder below the data set's folder: 1 for <class>/, 2 for <Alphabet>/<character>/
    suffixes: tuple  # of its image files, lower case
    size: tuple  # (height, width) of the stored images
    mode: str  # Pillow mode they are converted to: 'L' (one channel) or 'RGB' (three)
    invert: bool  # store 255 - pixel
    resampling: int  # how images of another size are resized, see PIL.Image.Resampling
    prepared: bool  # whether the files have that size already, so that others are mistakes

    def shape(self, total: int) -> tuple:
        """Of the array that holds `total` images."""
        return (total, *self.size, len(Image.new(self.mode, (1, 1)).getbands()))


OMNIGLOT = ImageLayout(
    depth=2,
    suffixes=('.png',),
    size=(28, 28),
    mode='L',
    invert=True,
    resampling=Image.Resampling.NEAREST,
    prepared=True,
)
MINIIMAGENET = ImageLayout(
    depth=1,
    suffixes=('.jpg', '.jpeg', '.png'),
    size=(84, 84),
    mode='RGB',
    invert=False,
    resampling=Image.Resampling.LANCZOS,
    prepared=True,
)


def folder_layout(image_size: int, channels: int) -> ImageLayout:
    """Of class folders of any images; channels: 1 (grey) or 3 (colour)."""
    Image.init()  # Pillow knows few of its formats before
    suffixes = sorted(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    )
    return ImageLayout(
        depth=1,
        suffixes=tuple(suffixes),
        size=(image_size, image_size),
        mode='L' if channels == 1 else 'RGB',
        invert=False,
        resampling=Image.Resampling.LANCZOS,
        prepared=False,
    )


def run_layout(settings: Mapping) -> ImageLayout:
    """For images given to a model that was trained with these flags (datasource, image_size, channels): any file, any size."""
    if settings['datasource'] == 'omniglot':
        return OMNIGLOT._replace(prepared=False, suffixes=folder_layout(28, 1).suffixes)
    if settings['datasource'] == 'miniimagenet':
        return folder_layout(84, 3)
    return folder_layout(settings['image_size'], settings['channels'])


def load_omniglot(data_dir: str) -> dict[str, ClassImages]:
    """The train, val and test classes of `data_dir/omniglot_resized/<Alphabet>/<character>/*.png` (28x28).

    Values are 1 - pixel / 255, so ink is 1. See split_classes for which character goes where.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is empty or has fewer than three classes, or an image is damaged or not 28x28.
    """
    folder = Path(data_dir) / 'omniglot_resized'
    command = (
        f'`python scripts/data/prepare_omniglot.py {_target(folder)}`, which downloads the archives unless it is '
        'given a folder that has them by --source=FOLDER'
    )
    characters = load_class_folders(folder, OMNIGLOT, _cache_of(folder), command)
    if len(characters.names) < len(SPLITS):
        raise ValueError(
            f'{folder} has only {len(characters.names)} character folders, but training, validation and '
            f'test need at least one each; move it away and make it again with {command}'
        )
    return {
        split: characters.select(classes)
        for split, classes in split_classes(len(characters.names)).items()
    }


def load_miniimagenet(data_dir: str, splits: Iterable[str] = SPLITS) -> dict[str, ClassImages]:
    """The classes of `data_dir/miniImagenet/<split>/<wnid>/*.jpg` (84x84, colour). Only `splits` need exist.

    Raises:
      FileNotFoundError: the folder of a split is missing.
      ValueError: it is empty, or an image is damaged or not 84x84.
    """
    folder = Path(data_dir) / 'miniImagenet'
    command = (
        f'`python scripts/data/prepare_miniimagenet.py --source=FOLDER {_target(folder)}`, where FOLDER holds the '
        'images and the csv files of the splits'
    )
    return {
        split: load_class_folders(folder / split, MINIIMAGENET, _cache_of(folder, split), command)
        for split in splits
    }


def load_folder(
    folder: str,
    image_size: int = 84,
    channels: int = 3,
    shares: Sequence[float] = (0.64, 0.16, 0.2),
    splits: Iterable[str] = SPLITS,
) -> dict[str, ClassImages]:
    """The classes of `folder/<split>/<class>/*`, or of `folder/<class>/*`, shared out among train, val and test.

    Any format that Pillow reads; images become image_size x image_size whatever their shape was, grey (channels 1) or
    colour (3), transparency white. The pixels are kept beside the folder.

    Args:
      shares: of the classes that train, val and test get, in proportion; at least one class each. Which class goes
        where depends on the classes' names alone. Without effect if there are folders for the splits.
      splits: those that are needed; other folders need not exist.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is empty or has fewer than three classes, or an image cannot be read.
    """
    folder, layout = Path(folder), folder_layout(image_size, channels)
    kind = f'{image_size}x{image_size}x{channels}'
    if any((folder / split).is_dir() and _class_folders(folder / split, 1) for split in SPLITS):
        return {
            split: load_class_folders(folder / split, layout, _cache_of(folder, split, kind))
            for split in splits
        }
    classes = load_class_folders(folder, layout, _cache_of(folder, kind))
    if len(classes.names) < len(SPLITS):
        raise ValueError(
            f'{folder} has only {len(classes.names)} class folders, but training, validation and test need at '
            'least one each'
        )
    total = sum(shares)
    val, test = (max(1, round(len(classes.names) * share / total)) for share in shares[1:])
    return {
        split: classes.select(chosen)
        for split, chosen in _share_out(len(classes.names), val, test).items()
    }


def _target(folder: Path) -> str:
    return f'--target={shlex.quote(str(folder))}'


def _cache_of(folder: Path, *parts: str) -> Path:
    """Beside the folder, not in it: what is in it belongs to the scripts that prepare the data."""
    return folder.with_name('.'.join((folder.name, *parts, 'cache')))


def split_classes(num_classes: int) -> dict[str, list[int]]:
    """Which of the sorted classes of Omniglot belong to which split: shuffled by a fixed seed, then cut.

    The 1623 official characters give 1100 train, 100 val and 423 test classes; any set of at least 1201 the same 1100
    and 100, and the rest for test. A smaller set (of at least 3 classes) is shared out in the proportions
    1100 : 100 : 423, at least one class each.
    """
    val, test = 100, num_classes - 1200
    if num_classes < 1201:
        val, test = (max(1, round(num_classes * share / 1623)) for share in (100, 423))
    return _share_out(num_classes, val, test)


def _share_out(num_classes: int, val: int, test: int) -> dict[str, list[int]]:
    """A shuffle with a fixed seed, cut into train, val and test, of which train gets what is left, and at least one."""
    order = list(range(num_classes))
    random.Random(1).shuffle(order)
    train = max(1, num_classes - val - test)
    val = min(val, num_classes - train - 1)
    return {'train': order[:train], 'val': order[train : train + val], 'test': order[train + val :]}


# ---------------------------------------------------------------------------------------------------------------------
# Class folders, decoded once
# ---------------------------------------------------------------------------------------------------------------------
CACHE_FORMAT = 2  # raise it when what the cache holds changes
CHUNK = 256  # images decoded, written and checksummed together


def load_class_folders(
    folder: Path, layout: ImageLayout, cache: Path, command: str | None = None
) -> ClassImages:
    """All images of a folder of class folders, sorted by class and file name; hidden and stray files are ignored.

    They come from the cache if that matches the files (names, sizes, times of change) and its own checksums. Otherwise
    they are decoded, and the cache is written if it can be.

    Args:
      folder: the data set, or one split of it.
      layout: how it lies on disk.
      cache: the folder for the decoded images.
      command: what makes the data, for the error messages; None if it is the user's own.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no classes, a class holds no images, or an image is damaged or has another size.
    """
    again = f'move {folder} away and make it again with {command}'
    if not folder.is_dir():
        remedy = (
            f'make it with {command}'
            if command
            else 'give --data_dir the folder that holds a folder of images for each class'
        )
        raise FileNotFoundError(f'there is no folder {folder}; {remedy}')
    classes = {
        name: _image_files(path, layout) for name, path in _class_folders(folder, layout.depth)
    }
    if not classes:
        raise ValueError(
            f'{folder} holds no class folders; {again if command else "it needs a folder of images for each class"}'
        )
    for name, files in classes.items():
        if not files and command:
            raise ValueError(
                f'{folder / name} holds no images ({", ".join(layout.suffixes)}); remove it if it is no class, or {again}'
            )
        if not files:
            raise ValueError(
                f'{folder / name} holds no images of a format that Pillow reads; add some, or remove it if it is no class'
            )
    counts = np.array([len(files) for files in classes.values()])
    images = _cached_images(
        folder, layout, cache, [file for files in classes.values() for file in files], command
    )
    return ClassImages(str(folder), list(classes), np.cumsum(counts) - counts, counts, images)


def _visible(folder: str) -> list[os.DirEntry]:
    """The entries of a folder, without the hidden ones, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith('.')),
            key=lambda entry: entry.name,
        )


def _class_folders(folder: Path, depth: int) -> list[tuple[str, str]]:
    """(name relative to folder, path) of the folders `depth` levels below, sorted level by level."""
    found = [('', str(folder))]
    for _ in range(depth):
        found = [
            (f'{name}/{entry.name}'.lstrip('/'), entry.path)
            for name, path in found
            for entry in _visible(path)
            if entry.is_dir()
        ]
    return found


def image_files(folder: str | Path, layout: ImageLayout) -> list[str]:
    """The paths of a folder's images, sorted by name."""
    return [file.path for file in _image_files(str(folder), layout)]


def _image_files(folder: str, layout: ImageLayout) -> list[os.DirEntry]:
    return [
        entry
        for entry in _visible(folder)
        if entry.name.lower().endswith(layout.suffixes) and entry.is_file()
    ]


def _cached_images(
    folder: Path, layout: ImageLayout, cache: Path, files: list[os.DirEntry], command: str | None
) -> np.ndarray:
    """The images of `files` in order, [total, height, width, channels] uint8: mapped from the cache, else decoded."""

    def blocks() -> Iterator[np.ndarray]:
        print(f'Decoding the {len(files)} images of {folder}.', file=sys.stderr, flush=True)
        return _decode_all(files, lambda file: read_image(file.path, layout, command))

    key, shape = _fingerprint(folder, layout, files), layout.shape(len(files))
    images = _read_cache(cache, key, shape)
    if images is None:
        try:
            _write_cache(cache, key, blocks())
            images = _read_cache(cache, key, shape)
        except OSError as error:
            print(
                f'The decoded images cannot be kept in {cache} ({error.strerror or error}); they will be decoded at '
                'every start.',
                file=sys.stderr,
            )
    if images is None:
        images = np.empty(shape, np.uint8)
        for part, block in zip(_chunks(images), blocks()):
            part[:] = block
    return images


def _fingerprint(folder: Path, layout: ImageLayout, files: list[os.DirEntry]) -> str:
    """Changes when the layout or any file's name, size or time of change does."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, layout._replace(suffixes=()))).encode())
    for file in files:
        status = file.stat()
        path = os.fsencode(file.path.removeprefix(str(folder)))  # the folder itself may move
        digest.update(b'%s\0%d\0%d\n' % (path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _read_cache(cache: Path, key: str, shape: tuple) -> np.ndarray | None:
    """The cached images, memory-mapped; None if they are absent, out of date or damaged."""
    try:
        index = json.loads((cache / 'index.json').read_bytes())
        if index['key'] != key:
            return None
        if (cache / 'images.raw').stat().st_size != math.prod(shape):
            raise ValueError('wrong size')
        images = np.asarray(np.memmap(cache / 'images.raw', np.uint8, 'r', shape=shape))
        with ThreadPoolExecutor(_cores()) as pool:
            if list(pool.map(zlib.crc32, _chunks(images))) != index['checksums']:
                raise ValueError('wrong checksum')
        return images
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with a cache, it can be made again
        print(f'The cache {cache} is damaged ({error}) and is not used.', file=sys.stderr)
        return None


def _write_cache(cache: Path, key: str, blocks: Iterator[np.ndarray]):
    """Write the blocks as they come, so that data larger than memory will do, and rename into place at the end.

    The index, which holds the checksums of the images, goes last: whatever happens before, they do not match.
    """
    images, index = (cache / f'{name}.{os.getpid()}.tmp' for name in ('images.raw', 'index.json'))
    try:
        cache.mkdir(exist_ok=True)
        for leftover in cache.glob(
            '*.tmp'
        ):  # of a process that was killed; a live one writes all the time
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
        with open(images, 'wb') as file:
            checksums = [zlib.crc32(block) for block in blocks if file.write(block)]
        index.write_text(json.dumps({'key': key, 'checksums': checksums}))
        images.replace(cache / 'images.raw')
        index.replace(cache / 'index.json')
    finally:
        with suppress(OSError):
            images.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            cache.rmdir()  # only if nothing is in it


def _decode_all(
    files: list[os.DirEntry], decode: Callable[[os.DirEntry], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the decoded files in blocks [CHUNK, height, width, channels] uint8, by all cores, showing the progress."""
    chunks, cores, done = _chunks(files), _cores(), 0
    with ThreadPoolExecutor(cores) as pool:
        for first in range(
            0, len(chunks), 8 * cores
        ):  # not all at once: the blocks that wait would fill the memory
            for block in pool.map(
                lambda chunk: np.stack([*map(decode, chunk)]), chunks[first : first + 8 * cores]
            ):
                yield block
                done += len(block)
                if sys.stderr.isatty():
                    print(
                        f'{done} of {len(files)}',
                        end='\n' if done == len(files) else '\r',
                        file=sys.stderr,
                    )


def read_image(path: str, layout: ImageLayout, command: str | None = None) -> np.ndarray:
    """One image, [height, width, channels] uint8; `command` as for load_class_folders.

    Raises:
      ValueError: it cannot be decoded, or is not of the layout's size if that is for prepared images.
    """
    again = f', or move the data away and make it again with {command}' if command else ''
    try:
        with Image.open(path) as image:
            size, mode = image.size[::-1], image.mode
            fits = mode not in ('I', 'F') and not (
                layout.prepared and (size != layout.size or mode.startswith('I;'))
            )
            pixels = _pixels(image, layout) if fits else None
    except (
        Exception
    ) as error:  # Pillow raises OSError, SyntaxError, struct.error and others on damaged files
        raise ValueError(
            f'{path} cannot be decoded ({error}); replace it{again or " or remove it"}'
        ) from error
    if not fits:  # the modes have more than 8 bits
        expected = '{}x{} with at most 8'.format(*layout.size) if layout.prepared else 'at most 16'
        raise ValueError(
            f'{path} is {size[0]}x{size[1]} of mode {mode}, but images of {expected} bits per channel are '
            f'expected; replace it{again or " or remove it"}'
        )
    return ~pixels if layout.invert else pixels


def _pixels(image: Image.Image, layout: ImageLayout) -> np.ndarray:
    """The way up that a camera noted, on white where it is transparent, [height, width, channels] uint8."""
    if not layout.prepared:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;'):  # 16 bits, which Pillow's conversion would cut off at 255
        image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
    if image.has_transparency_data and not layout.prepared:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    image = image.convert(layout.mode)
    if image.size[::-1] != layout.size:
        image = image.resize(layout.size[::-1], layout.resampling)
    return np.asarray(image).reshape(layout.shape(1)[1:])


def _chunks(items: Sequence) -> list[Sequence]:
    return [items[first : first + CHUNK] for first in range(0, len(items), CHUNK)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


# Pictures of tasks for TensorBoard: [height, width, 3] uint8 --------------------------------------

MARGIN = 14  # pixels, for a line of text


def task_picture(batch: Batch, image_shape: tuple[int, int, int], task: int = 0) -> np.ndarray:
    """A task's support images, a row for each of the first two shots, above its query images alike; labels above images.

    batch: arrays; image_shape: (height, width, channels).
    """
    height, width, channels = image_shape
    ways, gap = batch.labela.shape[2], MARGIN + 2
    parts = [
        (inputs[task, : 2 * ways], labels[task, : 2 * ways])  # [examples, D], [examples, N]
        for inputs, labels in [(batch.inputa, batch.labela), (batch.inputb, batch.labelb)]
    ]
    rows = [len(labels) // ways for _, labels in parts]
    canvas = Image.new(
        'RGB', (ways * (width + 4), sum(rows) * (height + gap) + 2 * MARGIN), 'white'
    )
    draw, top = ImageDraw.Draw(canvas), 0
    for title, (inputs, labels) in zip(('support', 'query'), parts):
        draw.text((2, top), title, fill='red')
        top += MARGIN
        for i, (image, label) in enumerate(zip(inputs, labels)):
            x, y = i % ways * (width + 4), top + i // ways * (height + gap)
            pixels = np.broadcast_to(
                np.uint8(255 * image.reshape(height, width, channels)), (height, width, 3)
            )
            draw.text((x + 2, y), str(label.argmax()), fill='black')
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x, y + MARGIN))
        top += len(labels) // ways * (height + gap)
    return np.asarray(canvas)


def fit_picture(
    curves: dict[str, np.ndarray], points: np.ndarray, size: tuple[int, int] = (480, 320)
) -> np.ndarray:
    """Curves {colour and name, as 'red truth': [n, 2]} and points [K, 2] of a regression task; x in [-5, 5], y in [-6, 6]."""
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)

    def place(xy):
        scaled = (np.clip(xy, -6, 6) * [1, -1] + [5, 6]) / [10, 12]  # 0 to 1
        return [tuple(point) for point in scaled * [size[0] - 1, size[1] - 1]]

    draw.line(place(np.array([[-5, 0], [5, 0]])), fill='lightgray')
    for i, (name, curve) in enumerate(curves.items()):
        colour, _, text = name.partition(' ')
        draw.line(place(curve), fill=colour, width=2)
        draw.text((4, 2 + i * MARGIN), text, fill=colour)
    for x, y in place(points):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='purple')
    return np.asarray(canvas)
