"""Finds CUB-200-2011 in a folder or an archive: CUB_200_2011.tgz, or what it unpacks to.

Its classes are folders as 001.Black_footed_Albatross. The split is that of Chen et al. (2019), A
Closer Look at Few-shot Classification: in the order of these numbers every other class is for
training, and the others are for validation and for testing in turn. torchmeta has the same.
"""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fewshot.data import archives, miniimagenet, preparation
from fewshot.data.miniimagenet import JPEG
from fewshot.data.preparation import Item, PreparationError

CLASS = re.compile(r'(\d{3})\.[\w-]+', re.ASCII)
SPLITS = ('train', 'val', 'train', 'test')  # of classes 1, 2, 3 and 4, and so on
TABLES = ('images.txt', 'bounding_boxes.txt')
DEPTH = 6  # of folders


def find(source: Path, crop: bool = False) -> dict[str, Callable[[], bytes]]:
    """Returns {SPLIT/CLASS/NAME.jpg: function that makes the contents}, in the source's order.

    crop: to the birds' bounding boxes. Raises PreparationError if there are no images, or no boxes.
    """
    items = preparation.all_items(source, DEPTH)
    if not (found := photos(items)):  # the archive may lie beside what it unpacks to
        items = archives.unpack(items)
        found = photos(items)
    if not found:
        raise PreparationError(
            f'--source={source} has no CUB-200-2011: neither CUB_200_2011.tgz nor its folder '
            'images with folders as 001.Black_footed_Albatross.'
        )
    images = preparation.by_path(found)
    edges = boxes(items, source) if crop else {}
    if crop and (lacking := [item for path, item in images.items() if inner(path) not in edges]):
        raise PreparationError(f'bounding_boxes.txt has no box of {lacking[0].where}.')
    return {
        path: functools.partial(miniimagenet.resize, item, edges.get(inner(path)))
        for path, item in images.items()
    }


def photos(items: Iterable[Item]) -> list[tuple[str, Item]]:
    """Lists (SPLIT/CLASS/NAME.jpg, item), as CUB's folder `images` has them."""
    found = []
    for item in items:
        *_, folder, label, name = ('', '', *item.path.parts)
        number = CLASS.fullmatch(label)
        if number and name.lower().endswith(JPEG) and folder in ('images', ''):
            found.append((f'{SPLITS[int(number[1]) % 4 - 1]}/{label}/{name}', item))
    return found


def inner(path: str) -> str:
    """Returns the path without its split, as images.txt has it."""
    return path.partition('/')[2]


def boxes(items: Iterable[Item], source: Path) -> dict[str, tuple[float, ...]]:
    """Returns {CLASS/NAME.jpg: left, upper, right and lower edge of the bird}."""
    files = {item.path.name: item for item in items if item.path.name in TABLES}
    found = {}
    try:
        lines = [files[name].read().decode().strip().splitlines() for name in TABLES]
        paths, numbers = (dict(line.split(maxsplit=1) for line in of) for of in lines)
        for key, path in paths.items():
            left, upper, width, height = map(float, numbers[key].split())
            found[path.strip()] = (left, upper, left + width, upper + height)
    except (ValueError, KeyError) as error:
        raise PreparationError(
            f'--crop needs {" and ".join(TABLES)} in {source}, with a path and four numbers to '
            f'each image; one is lacking or damaged ({error}).'
        ) from error
    return found
