"""Finds miniImagenet in a folder or an archive, in the forms in which people have it:

- images with Ravi and Larochelle's csv files, which list their names;
- ImageNet's folders of synsets with the same files, whose n0153282900000005.jpg is the fifth of
  n01532829's images in the order of their numbers;
- pickles as Ren et al. made, mini-imagenet-cache-train.pkl and its like;
- folders train, val and test with a folder for each class.

The first form in this order that is there is taken. Archives are looked into, and archives in
these: ImageNet's own is one of archives.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fewshot.data import archives, preparation, unpickling
from fewshot.data.preparation import Item, PreparationError
from fewshot.data.unpickling import text

SIZE = (84, 84)
CLASSES = {'train': 64, 'val': 16, 'test': 20}  # in the official splits
IMAGES = 600  # of each class
SPLITS = {'valid': 'val', 'validation': 'val', 'dev': 'val', **{split: split for split in CLASSES}}
JPEG = ('.jpg', '.jpeg')
SUFFIXES = (*JPEG, '.png')
DEPTH = 8  # of folders: ILSVRC/Data/CLS-LOC/train/n01532829 in another's
NESTED = 2  # archives, and archives in these
MAX_COPIED = 64 * 2**10  # bytes; 84x84 pixels have no use for more, however the file is padded
PICKLE = re.compile(r'mini-imagenet-cache-(\w+)\.pkl')
SYNSET = re.compile(r'n\d{8}')


class Row(NamedTuple):
    """A line of one of the csv files."""

    split: str
    filename: str
    label: str


class Found(NamedTuple):
    """The images in a source, and those that it lacks."""

    # {path in the target: function that makes the contents}, in the order of the source, so that
    # compressed archives are read from front to back
    images: dict[str, Callable[[], bytes]]
    missing: list[Row]  # listed images that are not there
    listed: int  # how many are listed


# The contents of a source -------------------------------------------------------------------------


def files_of_splits(items: Iterable[Item], pattern: str) -> dict[str, Item]:
    """Returns {split: the file of a name that matches}, the one that is the least deep in folders.

    Raises PreparationError if two are equally deep.
    """
    found = {}
    for item in sorted(items, key=lambda item: len(item.path.parts)):
        match = re.fullmatch(pattern, item.path.name, re.IGNORECASE)
        if not match or not (split := SPLITS.get(match[1].lower())):
            continue
        first = found.setdefault(split, item)
        if first is not item and len(first.path.parts) == len(item.path.parts):
            both = f'{first.where} and {item.where}'
            raise PreparationError(f'{both} are both of {split}; take one away.')
    return {split: found[split] for split in CLASSES if split in found}


def read_rows(items: list[Item]) -> list[Row]:
    """Reads the rows of the csv files. Raises PreparationError if they list a file twice."""
    rows, seen = [], set()
    for split, item in files_of_splits(items, r'(\w+)\.csv').items():
        for filename, label in preparation.read_csv(item, ('filename', 'label')):
            fault = None if filename.lower().endswith(JPEG) else 'is not the name of a JPEG file'
            if filename in seen:
                fault = 'is listed twice, here or in another of the csv files'
            if fault:
                raise PreparationError(f'{item.where}: {filename!r} {fault}.')
            seen.add(filename)
            rows.append(Row(split, filename, label))
    return rows


def is_not_listed(labels: set[str], folder: str) -> bool:
    """Whether the folder is of a synset that is none of the listed classes, if there is a list."""
    return bool(labels and SYNSET.fullmatch(folder) and folder not in labels)


def find(source: Path) -> Found:
    """Finds the images of a source. Raises PreparationError if it has none of the forms."""
    items = preparation.all_items(source, DEPTH)
    items.sort(key=lambda item: item.path.parts[0] != 'images')  # before other folders
    rows = read_rows(items)
    for _ in range(NESTED):
        labels = {row.label for row in rows}
        items = archives.unpack(items, functools.partial(is_not_listed, labels))
        rows = rows or read_rows(items)
    pictures = [item for item in items if item.path.name.lower().endswith(SUFFIXES)]
    listed = listed_images(rows, pictures) if rows and pictures else None
    if listed and listed.images:
        return listed
    if pickles := files_of_splits(items, PICKLE.pattern):
        return Found(pickled_images(pickles), [], 0)
    if images := tree_images(pictures):
        return Found(images, [], 0)
    if listed:
        return listed
    lists = 'train.csv, val.csv or test.csv'
    if rows:
        raise PreparationError(f'--source={source} has no .jpg images, which {lists} list.')
    raise PreparationError(
        f'--source={source} has no miniImagenet: no {lists} that lists an image, no mini-imagenet-'
        'cache-train.pkl or the like, and no folders train, val and test with a folder of images '
        'for each class.'
    )


# Images and csv files -----------------------------------------------------------------------------


def listed_images(rows: list[Row], pictures: list[Item]) -> Found:
    """Finds the listed images by name or, where no image has a listed name, from the synsets."""
    wanted = {row.filename: row for row in rows}
    found = by_name(wanted, pictures) or by_number(rows, pictures)
    images = {}
    for filename, item in found.items():
        row = wanted[filename]
        images[f'{row.split}/{row.label}/{filename}'] = functools.partial(resize, item)
    missing = [row for row in rows if row.filename not in found]
    return Found(images, missing, len(rows))


def by_name(wanted: Mapping[str, Row], pictures: list[Item]) -> dict[str, Item]:
    """Returns {filename: image}, from images/ or, if it lacks one, from other folders and archives.

    Raises PreparationError if two of the same place have the same file name.
    """
    found = {}  # {filename: (its place, the image)}
    for item in pictures:
        name = item.path.name
        if name not in wanted:
            continue
        # Images in folders, not in an archive, have themselves as origin.
        place = item.path.parts[0] == 'images' if item.origin == item.where else item.origin
        first_place, first = found.setdefault(name, (place, item))
        if first is not item and first_place == place:
            fault = 'have the same file name; the csv files cannot tell them apart'
            raise PreparationError(f'{item.where} and {first.where} {fault}.')
    return {name: item for name, (_, item) in found.items()}


def by_number(rows: list[Row], pictures: list[Item]) -> dict[str, Item]:
    """Returns {filename: image}; the last eight digits count the synset's images, from 1 on."""
    synsets = {row.label: {} for row in rows}  # {synset: {number: image}}
    for item in pictures:
        synset, _, number = item.path.stem.partition('_')
        if synset in synsets and number.isdecimal():
            first = synsets[synset].setdefault(int(number), item)
            if first is not item:
                raise PreparationError(f'{first.where} and {item.where} are both the same image.')
    ordered = {label: [images[n] for n in sorted(images)] for label, images in synsets.items()}
    found = {}
    for row in rows:
        place, images = row.filename.removeprefix(row.label).partition('.')[0], ordered[row.label]
        if not (images and len(place) == 8 and place.isdecimal()):
            continue
        if not 1 <= int(place) <= len(images):
            raise PreparationError(
                f'{row.filename} is to be image {int(place)} of {row.label}, but there are '
                f"{len(images)}, as {images[0].where}; the csv files need all of ImageNet's."
            )
        found[row.filename] = images[int(place) - 1]
    order = {id(item): place for place, item in enumerate(pictures)}
    return dict(sorted(found.items(), key=lambda pair: order[id(pair[1])]))


# Pickles ------------------------------------------------------------------------------------------


def read_cache(item: Item) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Reads a split's images, [total, 84, 84, 3] uint8, and {class: places of its images}.

    Raises PreparationError if it is no pickle of these, or would call something.
    """
    content = unpickling.read_dictionary(item)
    images, places = content.get('image_data'), content.get('class_dict')
    fault = fault_of_images(images) or fault_of_classes(places, images)
    if fault:
        raise PreparationError(f'{item.where} is not miniImagenet as it should be: {fault}.')
    return images, {text(name): [*map(int, where)] for name, where in places.items()}


def fault_of_images(images) -> str | None:
    if not isinstance(images, np.ndarray):
        return 'it has no array image_data'
    if images.dtype != np.uint8 or images.shape[1:] != (*SIZE, 3):
        found = f'{[*images.shape]} of {images.dtype}'
        return f'image_data is {found}, not [images, 84, 84, 3] of uint8'
    return None


def fault_of_classes(places, images: np.ndarray) -> str | None:
    if type(places) is not dict or not places:
        return 'it has no dictionary class_dict'
    seen = set()
    for name, where in places.items():
        if not preparation.is_plain(text(name) or ''):
            return f'class_dict has {ascii(name)[:80]}, which is no name of a class'
        if not isinstance(where, (list, tuple, np.ndarray)) or not len(where):
            return f'class {text(name)} has no list of images'
        for place in where:
            if not isinstance(place, (int, np.integer)) or not 0 <= place < len(images):
                return f'class {text(name)} has image {ascii(place)[:80]} of {len(images)}'
            if place in seen:
                return f'class {text(name)} has image {place} for the second time'
            seen.add(int(place))
    return None


def pickled_images(pickles: Mapping[str, Item]) -> dict[str, Callable[[], bytes]]:
    """Returns the images as PNG, which keeps their pixels; one pickle at a time is in memory."""
    read = functools.lru_cache(maxsize=1)(lambda split: read_cache(pickles[split]))

    def png(split: str, place: int) -> bytes:
        return preparation.png(read(split)[0][place])

    images = {}
    for split in pickles:
        for name, places in read(split)[1].items():
            for k, place in enumerate(places):
                path = f'{split}/{name}/{name}{k + 1:08d}.png'
                images[path] = functools.partial(png, split, place)
    return images


# Folders of classes -------------------------------------------------------------------------------


def tree_images(pictures: list[Item]) -> dict[str, Callable[[], bytes]]:
    """Finds the images of .../SPLIT/CLASS/.

    Raises PreparationError on two of one name, or far too many.
    """
    found, folders = {}, {}
    for item in pictures:
        *_, split, _, _ = ('', '', *item.path.parts)
        if not (split := SPLITS.get(split.lower())):
            continue
        folder, path = item.path.parents[1], '/'.join((split, *item.path.parts[-2:]))
        if folders.setdefault(split, folder) != folder:
            raise PreparationError(
                f'Both {folders[split]} and {folder} hold images of {split}; take one away.'
            )
        if not all(map(preparation.is_plain, item.path.parts[-2:])):
            raise PreparationError(f'{item.where} has no plain name; give it one.')
        if found.setdefault(path, item) is not item:
            raise PreparationError(f'{found[path].where} and {item.where} are both the same image.')
    for split, number in CLASSES.items():
        classes = {path.split('/')[1] for path in found if path.startswith(f'{split}/')}
        if len(classes) > number:
            raise PreparationError(
                f'{folders[split]} has {len(classes)} classes, but miniImagenet has {number}; '
                "ImageNet's own folders need train.csv, val.csv and test.csv beside them."
            )
    return {path: functools.partial(resize, item) for path, item in found.items()}


def resize(item: Item, box: tuple[float, ...] | None = None) -> bytes:
    """Returns the image as 84x84 RGB: PNG if its name is a PNG's, otherwise JPEG.

    box: the left, upper, right and lower edge of the part to take; None takes all.
    """
    data, file = item.read(), io.BytesIO()
    # ImageNet has a PNG under a JPEG's name.
    with preparation.decoded(item, data, 'JPEG', 'PNG') as image:
        image.load()
        as_wanted = (image.mode, image.size) == ('RGB', SIZE)
        if as_wanted and not box and len(data) <= MAX_COPIED:
            return data
        if box:  # edges beyond the image's are the image's
            box = [min(max(edge, 0), most) for edge, most in zip(box, image.size * 2)]
            if not (box[0] < box[2] and box[1] < box[3]):
                raise PreparationError(f'The bounding box of {item.where} is empty.')
        resized = image.convert('RGB').resize(SIZE, Image.Resampling.LANCZOS, box)
        form = 'PNG' if item.path.suffix.lower() == '.png' else 'JPEG'
        resized.save(file, form, quality=95, subsampling=0)  # PNG has no such options
    return file.getvalue()
