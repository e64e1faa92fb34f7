"""Finds tieredImageNet in a folder or an archive, in the forms in which people have it:

- Ren et al.'s (2018) pickles: train_images_png.pkl, a list of PNG files, each an array of bytes,
  and train_labels.pkl, with each image's number `label_specific` and the names of these,
  `label_specific_str`; likewise val and test;
- train_images.npz instead, which their program makes of the first: an array `images`, [total, 84,
  84, 3], in OpenCV's order: blue, green, red; here train_labels.pkl may have a list `labels`;
- ImageNet's folders of synsets, or archives of them.

Archives are looked into, and archives in these. Which synset is in which split is a fact of the csv
files in github.com/renmengye/few-shot-ssl-public, fewshot/data/tiered_imagenet_split.
"""

import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from fewshot.data import archives, miniimagenet, preparation, unpickling
from fewshot.data.miniimagenet import DEPTH, NESTED, SIZE, SUFFIXES
from fewshot.data.preparation import Item, PreparationError

SPLITS = json.loads(Path(__file__).with_name('tieredimagenet_splits.json').read_text())
START = r'(?:tiered-imagenet-)?(\w+)'  # Zenodo's files have the longer names
PNGS, ARRAYS, LABELS = rf'{START}_images_png\.pkl', rf'{START}_images\.npz', rf'{START}_labels\.pkl'
SHAPE = (*SIZE, 3)
MOST = 1000  # classes; that is how many ImageNet has


def find(source: Path, splits: Mapping[str, list[str]]) -> dict[str, Callable[[], bytes]]:
    """Returns {SPLIT/CLASS/NAME: function that makes the contents}, in the order of the source.

    splits: {split: synsets}. Raises PreparationError if it has none of the forms.
    """
    split_of = {synset: split for split, synsets in splits.items() for synset in synsets}
    items = preparation.all_items(source, DEPTH)
    is_left_out = functools.partial(miniimagenet.is_not_listed, {*split_of})
    for _ in range(NESTED):
        items = archives.unpack(items, is_left_out)
    images = pickled_images(items, splits) or synset_images(items, split_of)
    if not images:
        raise PreparationError(
            f'--source={source} has no tieredImageNet: neither train_images_png.pkl or '
            "train_images.npz, train_labels.pkl and their like, nor ImageNet's folders of synsets."
        )
    return images


# Folders of synsets -------------------------------------------------------------------------------


def synset_images(items: Iterable[Item], split_of: Mapping[str, str]) -> dict[str, Callable]:
    """Finds the images .../SYNSET/SYNSET_NUMBER.JPEG, those of ImageNet's training.

    Others lie in folders of the same names: ILSVRC2012_val_00000293.JPEG, or miniImagenet's.
    """
    found = []
    for item in items:
        synset, name = item.path.parent.name, item.path.name
        if synset in split_of and name.startswith(f'{synset}_') and name.lower().endswith(SUFFIXES):
            found.append((f'{split_of[synset]}/{synset}/{name}', item))
    return {
        path: functools.partial(miniimagenet.resize, item)
        for path, item in preparation.by_path(found).items()
    }


# Pickles ------------------------------------------------------------------------------------------


def pickled_images(items: list[Item], splits: Iterable[str]) -> dict[str, Callable[[], bytes]]:
    """Finds the images of the pickles; those of one split at a time are in memory."""
    pngs, arrays, labels = (
        miniimagenet.files_of_splits(items, names) for names in (PNGS, ARRAYS, LABELS)
    )
    pictures, reader = (pngs, read_pngs) if pngs else (arrays, read_array)
    read = functools.lru_cache(maxsize=1)(lambda split, total: reader(pictures[split], total))

    def png(split: str, total: int, place: int) -> bytes:
        return read(split, total)(place)

    images = {}
    for split in splits if pictures else ():
        for word, there in ('images', pictures), ('labels', labels):
            if split not in there:
                beside = next(iter(pictures.values())).where
                raise PreparationError(f'Beside {beside} there are no {word} of {split}.')
        folders = class_folders(labels[split])
        for place, folder in enumerate(folders):
            made = functools.partial(png, split, len(folders), place)
            images[f'{split}/{folder}/{place:06d}.png'] = made
    return images


def class_folders(item: Item) -> list[str]:
    """Returns the folder of each image's class: its number and, where the pickle has it, name."""
    content = unpickling.read_dictionary(item)
    numbers = content.get('label_specific', content.get('labels'))
    names = content.get('label_specific_str')
    numbers = numbers.tolist() if isinstance(numbers, np.ndarray) else numbers
    if not isinstance(numbers, list) or not numbers or not all(map(is_number, numbers)):
        raise PreparationError(
            f"{item.where} is not tieredImageNet's: neither label_specific nor labels has the "
            "number of each image's class."
        )
    folders = {}
    for n in {*numbers}:
        name = unpickling.text(names[n]) if isinstance(names, list) and n < len(names) else None
        folders[n] = f'{n:03d}_{re.sub("[^0-9A-Za-z]+", "_", name or "")[:80]}'.strip('_')
    return [folders[n] for n in numbers]


def is_number(value) -> bool:
    return isinstance(value, (int, np.integer)) and 0 <= value < MOST


def read_pngs(item: Item, total: int) -> Callable[[int], bytes]:
    """Reads the pickle of PNG files; returns what makes the contents of the image at a place."""
    pngs = unpickling.read(item)
    if not isinstance(pngs, list) or len(pngs) != total or not all(map(is_bytes, pngs)):
        raise PreparationError(f'{item.where} is no list of {total} PNG files, one to each label.')

    def make(place: int) -> bytes:
        where = f'{item.where}, image {place}'
        opened = functools.partial(io.BytesIO, pngs[place].tobytes())
        return miniimagenet.resize(Item(PurePosixPath('image.png'), where, where, opened))

    return make


def is_bytes(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8


def read_array(item: Item, total: int) -> Callable[[int], bytes]:
    """Opens the array; returns what makes the contents of the image at a place.

    It is read from front to back and never whole, since it has up to 9 GB.
    """
    with preparation.blaming(item.where):
        arrays = {of.path.name: of for of in archives.archive_items(item.open(), item.where)}
        if 'images.npy' not in arrays:
            raise PreparationError(f'{item.where} has no array images.')
        file = arrays['images.npy'].open()
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), math.prod(SHAPE)
    if (shape, by_columns, dtype) != ((total, *SHAPE), False, np.uint8):
        found = f'{[*shape]} of {dtype}'
        raise PreparationError(
            f'{item.where}: images is {found}, not [{total}, 84, 84, 3] of uint8, by rows.'
        )

    def make(place: int) -> bytes:
        with preparation.blaming(item.where):
            file.seek(start + place * size)
            pixels = np.frombuffer(file.read(size), np.uint8).reshape(SHAPE)
        return preparation.png(np.ascontiguousarray(pixels[..., ::-1]))

    return make
