"""Finds CIFAR-100 in a folder or an archive, in the forms in which people have it:

- the pickles train, test and meta, as cifar-100-python.tar.gz has them;
- folders train and test with a folder of PNG images for each class.
"""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from fewshot.data import archives, preparation, unpickling
from fewshot.data.preparation import Item, PreparationError

# {cifar_fs (Bertinetto et al. 2019) or fc100 (Oreshkin et al. 2018): {split: classes}}
SPLITS = json.loads(Path(__file__).with_name('cifar100_splits.json').read_text())
PARTS = ('train', 'test')  # of CIFAR-100; the splits are others
SIZE = (32, 32)
DEPTH = 6  # of folders
NESTED = 2  # archives, and archives in these
MAX_COPIED = 16 * 2**10  # bytes of a PNG; 3,072 numbers have no use for more


def find(source: Path) -> dict[str, Callable[[], bytes]]:
    """Returns {CLASS/NAME.png: function that makes the contents}.

    Raises PreparationError if there are no images.
    """
    items = preparation.all_items(source, DEPTH)
    for _ in range(NESTED):
        items = archives.unpack(items)
    images = png_images(items) or pickled_images(items)
    if not images:
        raise PreparationError(
            f'--source={source} has no CIFAR-100: neither cifar-100-python.tar.gz, or its files '
            'train, test and meta, nor folders train and test with a folder of PNG images for each '
            'class.'
        )
    return images


def png_images(items: Iterable[Item]) -> dict[str, Callable[[], bytes]]:
    """Finds the images .../PART/CLASS/NAME.png. One of the classes is called train."""
    images = {}
    for item in items:
        *_, part, label, name = ('', '', *item.path.parts)
        if part in PARTS and name.endswith('.png'):
            add(images, (label, name), functools.partial(checked, item), item.where)
    return images


def add(images: dict, path: tuple[str, str], contents: Callable[[], bytes], where: str):
    """Adds the image of (class, name). Raises PreparationError on a second, or no plain name."""
    joined = '/'.join(path)
    if not all(map(preparation.is_plain, path)) or not joined.endswith('.png'):
        text = ascii(joined)[1:81].removesuffix("'")
        raise PreparationError(f'{where} has an image {text}, which is no plain name of a PNG.')
    if joined in images:
        raise PreparationError(f'{where}: there are two images {joined}.')
    images[joined] = contents


def checked(item: Item) -> bytes:
    """Returns the bytes of a PNG, encoded anew if they are far too many.

    Raises PreparationError if the image is not 32x32 in colour.
    """
    data = item.read()
    with preparation.decoded(item, data, 'PNG') as image:
        image.load()
        if (image.mode, image.size) != ('RGB', SIZE):
            found = f'{image.width}x{image.height}, {image.mode}'
            raise PreparationError(f"{item.where} is {found}; CIFAR-100's images are 32x32, RGB.")
    return data if len(data) <= MAX_COPIED else preparation.png(np.asarray(image))


def pickled_images(items: Iterable[Item]) -> dict[str, Callable[[], bytes]]:
    """Finds the images of the pickles train and test; the pickle meta has their classes' names."""
    files = {}
    for item in items:
        name = item.path.name
        if name in archives.PICKLES and files.setdefault(name, item) is not item:
            both = f'{files[name].where} and {item.where}'
            raise PreparationError(f'{both} are both called {name}; take one away.')
    if set(files) != {*archives.PICKLES}:
        return {}
    names = class_names(files['meta'])
    images = {}
    for part in PARTS:
        for path, pixels in read_part(files[part], names):
            add(images, path, functools.partial(preparation.png, pixels), files[part].where)
    return images


def class_names(item: Item) -> list[str]:
    """Returns the names of all classes, in the order of their numbers."""
    names = unpickling.read_dictionary(item).get('fine_label_names')
    names = [*map(unpickling.text, names)] if isinstance(names, list) else []
    if not names or None in names:
        raise PreparationError(f"{item.where} is not CIFAR-100's: it has no list fine_label_names.")
    return names


def read_part(item: Item, names: list[str]) -> Iterable[tuple[tuple[str, str], np.ndarray]]:
    """Returns (class, name) and pixels, [32, 32, 3] uint8, for each image."""
    content = unpickling.read_dictionary(item)
    data, labels, files = (content.get(key) for key in ('data', 'fine_labels', 'filenames'))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        fault = 'it has no array data, [images, 3072] of uint8'
    elif not all(isinstance(of, list) and len(of) == len(data) for of in (labels, files)):
        fault = 'fine_labels and filenames are not lists as long as data'
    elif not all(isinstance(n, (int, np.integer)) and 0 <= n < len(names) for n in labels):
        fault = f'fine_labels are not numbers of the {len(names)} classes that meta names'
    elif not all(map(unpickling.text, files)):
        fault = 'filenames are not texts'
    else:
        pixels = data.reshape(-1, 3, *SIZE).transpose(0, 2, 3, 1)  # stored channel by channel
        return zip(((names[n], unpickling.text(file)) for n, file in zip(labels, files)), pixels)
    raise PreparationError(f"{item.where} is not CIFAR-100's: {fault}.")
