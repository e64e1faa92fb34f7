"""Makes data/omniglot_resized, for main.py --datasource=omniglot, from the two official archives.

    python scripts/data/prepare_omniglot.py                   # downloads them (16 MB)
    python scripts/data/prepare_omniglot.py --source=FOLDER   # has them there

FOLDER, or a folder in it, holds images_background.zip and images_evaluation.zip, or the two folders
they unpack to, or all alphabets. The result is TARGET/<Alphabet>/<characterNN>/*.png: all 50
alphabets, 1623 characters of 20 images, 28x28, 1 bit.
"""

import collections
import functools
import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags
from PIL import Image

from fewshot.data import archives, downloads, preparation
from fewshot.data.downloads import Remote
from fewshot.data.entries import class_folders
from fewshot.data.preparation import Item, PreparationError

URL = 'https://raw.githubusercontent.com/brendenlake/omniglot/master/python'
MD5 = {
    'images_background.zip': '68d2efa1b9178cc56df9314c21c6e718',
    'images_evaluation.zip': '6b91aef0f799c5bb55b94e3f2daec811',
}
MAX_DOWNLOAD = 64 * 2**20  # bytes; the archives have 9.5 and 6.5 million
ADVICE = 'try again, or get both archives by other means and name their folder with --source.'
SIZE = (105, 105)
RESIZED = (28, 28)


class Counts(NamedTuple):
    """The numbers of a complete Omniglot."""

    alphabets: int = 50
    characters: int = 1623
    images: int = 20  # of each character


OFFICIAL = Counts()


def images_in(folder: Path) -> list[Item]:
    """Lists the files ALPHABET/CHARACTER/NAME.png of a folder; none if there is no such folder."""
    items = preparation.all_items(folder, depth=2)
    return [item for item in items if len(item.path.parts) == 3 and item.path.suffix == '.png']


def items_in(folder: Path) -> list[Item]:
    """Lists images in a folder: in archives, the folders they unpack to, or alphabets in it."""
    items = []
    for name in MD5:
        if (folder / name).is_file():
            items += archives.unpack(preparation.all_items(folder / name, depth=0))
        else:
            items += images_in(folder / Path(name).stem)
    return items or images_in(folder)


def find(source: Path) -> list[Item]:
    """Finds images in a folder or, as torchvision's lie in omniglot-py, in a folder of it."""
    if not source.is_dir():
        raise PreparationError(f'--source={source} is not a folder.')
    for folder in (source, *(Path(path) for _, path in class_folders(source, 1))):
        if items := items_in(folder):
            return items
    both = ' and '.join(MD5)
    raise PreparationError(f'--source={source} holds neither {both} nor what they unpack to.')


def fault(paths: Iterable[str], counts: Counts) -> str | None:
    """Tells what the files Alphabet/characterNN/name.png lack of a complete Omniglot, or None."""
    images = collections.Counter(path.rpartition('/')[0] for path in paths)
    alphabets = {character.partition('/')[0] for character in images}
    if (len(alphabets), len(images)) != (counts.alphabets, counts.characters):
        found = f'{len(alphabets)} alphabets with {len(images)} characters'
        return f'{found} instead of {counts.alphabets} with {counts.characters}'
    for character, count in sorted(images.items()):
        if count != counts.images:
            return f'{count} images of {character} instead of {counts.images}'
    return None


def merge(items: list[Item]) -> dict[str, Item]:
    """Returns images by their path in the target; archives may have folders above the alphabets."""
    merged = {}
    for item in items:
        if len(item.path.parts) < 3 or item.path.suffix != '.png':
            continue
        name = '/'.join(item.path.parts[-3:])
        first = merged.setdefault(name, item)
        if first is not item:
            raise PreparationError(f'{item.where} and {first.where} are both the same image.')
    return dict(sorted(merged.items()))


def resize(item: Item) -> bytes:
    """Returns the image as a 28x28 PNG of 1 bit. Raises PreparationError if it is not 105x105."""
    file = io.BytesIO()
    with preparation.decoded(item, item.read(), 'PNG') as image:
        if image.size != SIZE:
            size = f'{image.width}x{image.height}'
            raise PreparationError(f'{item.where} is {size}; the official images are 105x105.')
        # Nothing changes unless a copy was stored in grey.
        image = image.convert('1', dither=Image.Dither.NONE)
        # The published results come from images that were asked to be resized with Lanczos. Pillow
        # resizes 1-bit images with nearest neighbour whatever is asked, so that is what everyone
        # has trained on, and what is asked for here.
        image.resize(RESIZED, Image.Resampling.NEAREST).save(file, 'PNG')
    return file.getvalue()


def prepare(
    source: Path | None,
    target: Path,
    url: str = URL,
    md5: Mapping[str, str] = MD5,
    counts: Counts = OFFICIAL,
) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder; None: the archives that `md5` names are downloaded. Raises PreparationError.
    """
    preparation.check_source(source)
    if preparation.is_prepared(target, lambda paths: fault(paths, counts) is None, RESIZED):
        return f'{target} is complete already; nothing to do.'
    if not source:
        with downloads.folder_beside(target, md5) as folder:
            for name, digest in md5.items():
                remote = Remote(name, f'{url.rstrip("/")}/{name}', digest, MAX_DOWNLOAD)
                downloads.fetch(remote, folder, ADVICE)
            return prepare(folder, target, counts=counts)
    merged = merge(find(source))
    if wrong := fault(merged, counts):
        raise PreparationError(f'{source} does not hold the complete Omniglot: {wrong}.')
    images = {name: functools.partial(resize, item) for name, item in merged.items()}
    preparation.write_images(target, images)
    classes = f'{counts.alphabets} alphabets, {counts.characters} characters'
    return f'{target}: {classes}, {len(images)} images.'


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    source = preparation.as_path(values.source) if values.source else None
    preparation.run(argv, lambda: prepare(source, preparation.as_path(values.target), values.url))


if __name__ == '__main__':
    flags.DEFINE_string(
        'source', None, 'folder with the archives or what they unpack to; without it, a download'
    )
    flags.DEFINE_string('target', 'data/omniglot_resized', 'folder to make')
    flags.DEFINE_string('url', URL, 'where to download the archives from')
    app.run(main)
