"""Makes data/cifar_fs, for main.py --datasource=folder --image_size=32, of CIFAR-100's images.

    python scripts/data/prepare_cifar_fs.py                   # downloads them (169 MB)
    python scripts/data/prepare_cifar_fs.py --source=FOLDER   # has them there
    python scripts/data/prepare_cifar_fs.py --splits=fc100    # makes data/fc100

FOLDER, or an archive, tar or zip, has one of these, in archives or not:

    cifar-100-python.tar.gz, or the files train, test and meta that it unpacks to
    folders train and test with a folder of PNG images for each class

CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018) are splits of the same hundred
classes of 600 images; fewshot/data/cifar100_splits.json has their names. The result is
TARGET/{train,val,test}/<class>/<name>.png: 32x32, RGB, the same pixels from either form.
"""

import collections
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from absl import app, flags
from PIL import Image

from fewshot.data import archives, downloads, preparation, unpickling
from fewshot.data.downloads import Remote
from fewshot.data.preparation import Item, PreparationError

ARCHIVE = Remote(
    'cifar-100-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz',
    md5='eb9058c3a382ffc7106e4002c42a8d85',
    max_bytes=256 * 2**20,
)
ADVICE = (
    'try again, which goes on where it broke off, or get CIFAR-100 by other means and name its '
    'folder with --source.'
)
SPLITS = json.loads(Path(preparation.__file__).with_name('cifar100_splits.json').read_text())
PARTS = ('train', 'test')  # of CIFAR-100; the splits are others
IMAGES = 600  # of each class
SIZE = (32, 32)
DEPTH = 6  # of folders
NESTED = 2  # archives, and archives in these
MAX_PICKLE = 512 * 2**20  # bytes; the larger one has 155 million
MAX_COPIED = 16 * 2**10  # bytes of a PNG; 3,072 numbers have no use for more


# CIFAR-100 in both its forms ----------------------------------------------------------------------


def limit(name: str) -> int:
    """The bytes that an archive's member may have."""
    is_pickle = PurePosixPath(name).name in (*PARTS, 'meta')
    return MAX_PICKLE if is_pickle else archives.limit(name)


def find(source: Path) -> dict[str, Callable[[], bytes]]:
    """{CLASS/NAME.png: function that makes the contents}; PreparationError if there are none."""
    items = preparation.source_items(source, DEPTH)
    for _ in range(NESTED):
        items = archives.unpack(items, limit=limit)
    images = png_images(items) or pickled_images(items)
    if not images:
        raise PreparationError(
            f'--source={source} has no CIFAR-100: neither cifar-100-python.tar.gz, or its files '
            'train, test and meta, nor folders train and test with a folder of PNG images for each '
            'class.'
        )
    return images


def png_images(items: Iterable[Item]) -> dict[str, Callable[[], bytes]]:
    """The images of .../PART/CLASS/NAME.png. One of the classes is called train."""
    images = {}
    for item in items:
        *_, part, label, name = ('', '', *item.path.parts)
        if part in PARTS and name.endswith('.png'):
            add(images, (label, name), functools.partial(checked, item), item.where)
    return images


def add(images: dict, path: tuple[str, str], contents: Callable[[], bytes], where: str):
    """Adds the image of (class, name).

    Raises PreparationError on the second of a name, or a name that is not plain.
    """
    joined = '/'.join(path)
    if not all(map(preparation.is_plain, path)) or not joined.endswith('.png'):
        text = ascii(joined)[1:81].removesuffix("'")
        raise PreparationError(f'{where} has an image {text}, which is no plain name of a PNG.')
    if joined in images:
        raise PreparationError(f'{where}: there are two images {joined}.')
    images[joined] = contents


def checked(item: Item) -> bytes:
    """The PNG as it is; PreparationError if it is not one of 32x32 in colour."""
    data = item.read()
    with preparation.decoding(item):
        image = Image.open(io.BytesIO(data), formats=('PNG',))
        image.load()
        if (image.mode, image.size) != ('RGB', SIZE):
            found = f'{image.width}x{image.height}, {image.mode}'
            raise PreparationError(f"{item.where} is {found}; CIFAR-100's images are 32x32, RGB.")
    return data if len(data) <= MAX_COPIED else preparation.png(np.asarray(image))


def pickled_images(items: Iterable[Item]) -> dict[str, Callable[[], bytes]]:
    """The images of the pickles train and test, whose classes' names the pickle meta has."""
    files = {}
    for item in items:
        name = item.path.name
        if name in (*PARTS, 'meta') and files.setdefault(name, item) is not item:
            both = f'{files[name].where} and {item.where}'
            raise PreparationError(f'{both} are both called {name}; take one away.')
    if set(files) != {*PARTS, 'meta'}:
        return {}
    names = class_names(files['meta'])
    images = {}
    for part in PARTS:
        for path, pixels in read_part(files[part], names):
            add(images, path, functools.partial(preparation.png, pixels), files[part].where)
    return images


def class_names(item: Item) -> list[str]:
    """Of all classes, in the order of their numbers."""
    names = unpickling.read_dictionary(item).get('fine_label_names')
    names = [*map(unpickling.text, names)] if isinstance(names, list) else []
    if not names or None in names:
        raise PreparationError(f"{item.where} is not CIFAR-100's: it has no list fine_label_names.")
    return names


def read_part(item: Item, names: list[str]) -> Iterable[tuple[tuple[str, str], np.ndarray]]:
    """(class, name) and pixels, [32, 32, 3] uint8, of each image."""
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


# Splits -------------------------------------------------------------------------------------------


def fault(counts: Mapping[str, int], classes: Iterable[str], images: int) -> str | None:
    """What {class: images} lacks of CIFAR-100; None if nothing."""
    for label in sorted({*classes, *counts}):
        if label not in classes:
            return f'there is a class {label}'
        if counts.get(label, 0) != images:
            return f'{counts.get(label, 0)} images of {label} instead of {images}'
    return None


def split_images(found: Mapping[str, Callable[[], bytes]], splits: dict, images: int) -> dict:
    """{SPLIT/CLASS/NAME.png: function}; PreparationError if it is not all of CIFAR-100."""
    split_of = {label: split for split, labels in splits.items() for label in labels}
    counts = collections.Counter(path.partition('/')[0] for path in found)
    if wrong := fault(counts, split_of, images):
        raise PreparationError(f'The source does not hold the complete CIFAR-100: {wrong}.')
    return {f'{split_of[path.partition("/")[0]]}/{path}': made for path, made in found.items()}


def report(target: Path, splits: dict, images: int) -> str:
    sizes = (
        f'{split} {len(labels)} classes, {images * len(labels)} images'
        for split, labels in splits.items()
    )
    return f'{target}: {"; ".join(sizes)}.'


def prepare(
    source: Path | None, target: Path, splits: dict, remote: Remote = ARCHIVE, images: int = IMAGES
) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder or an archive; None: downloads `remote`. splits: {split: classes}. images: of
    each class. Raises PreparationError.
    """

    def complete(paths: set[str]) -> bool:
        counts = collections.Counter(path.rpartition('/')[0] for path in paths)
        wanted = [f'{split}/{label}' for split, labels in splits.items() for label in labels]
        return fault(counts, wanted, images) is None

    if preparation.is_prepared(target, complete, SIZE):
        return f'{target} is complete already; nothing to do.'
    if source:
        preparation.write_images(target, split_images(find(source), splits, images))
        return report(target, splits, images)
    with downloads.folder_beside(target, [remote.name]) as folder:
        archive = downloads.fetch(remote, folder, ADVICE)
        return prepare(archive, target, splits, remote, images)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f'Unexpected argument {argv[1]!r}; see --help.')
    values = flags.FLAGS
    source = preparation.as_path(values.source) if values.source else None
    target = preparation.as_path(values.target or f'data/{values.splits}')
    preparation.run(lambda: prepare(source, target, SPLITS[values.splits]))


if __name__ == '__main__':
    flags.DEFINE_string(
        'source', None, 'folder or archive that has CIFAR-100; without it, a download'
    )
    flags.DEFINE_enum('splits', 'cifar_fs', [*SPLITS], 'which classes are in which split')
    flags.DEFINE_string('target', None, 'folder to make (default: data/cifar_fs or data/fc100)')
    app.run(main)
