"""Makes data/miniImagenet, which main.py --datasource=miniimagenet reads, from the official files.

    python scripts/data/prepare_miniimagenet.py --source=FOLDER

FOLDER holds the images (in images/ or in zip archives) and train.csv, val.csv, test.csv or some of
them, each with the columns filename and label. The result is TARGET/{train,val,test}/<label>/
<filename>: 84x84, RGB, JPEG. Images that are 84x84 RGB JPEG already are copied byte for byte; the
others are resized with Lanczos and saved at quality 95 without subsampling of colours.
"""

import functools
import io
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags
from PIL import Image

from scripts.lib import preparation
from scripts.lib.preparation import Item, PreparationError

SIZE = (84, 84)
SUFFIXES = ('.jpg', '.jpeg')
CLASSES = {'train': 64, 'val': 16, 'test': 20}  # in the official splits, 600 images each
MAX_COPIED = 64 * 2**10  # bytes; 84x84 pixels have no use for more, however the file is padded

HELP = (
    'Type python scripts/data/prepare_miniimagenet.py --source=FOLDER, the folder that has '
    'train.csv, val.csv and test.csv of Ravi & Larochelle '
    '(https://github.com/twitter-research/meta-learning-lstm, in data/miniImagenet) '
    "and their images, in images/ or zip archives; these are ImageNet's, cannot be downloaded "
    'freely, and come from the authors.'
)


class Row(NamedTuple):
    """A line of one of the csv files."""

    split: str
    filename: str
    label: str


def read_rows(source: Path) -> list[Row]:
    """What the csv files list; PreparationError if there are none, or if they list a file twice."""
    if not source.is_dir():
        raise PreparationError(f'--source={source} is not a folder.')
    rows, seen = [], set()
    for split in CLASSES:
        path = source / f'{split}.csv'
        if not path.is_file():
            continue
        for filename, label in preparation.read_csv(path, ('filename', 'label')):
            if not filename.lower().endswith(SUFFIXES):
                raise PreparationError(f'{path}: {filename!r} is not the name of a JPEG file.')
            if filename in seen:
                raise PreparationError(
                    f'{path}: {filename!r} is listed twice, here or in another of the csv files.'
                )
            seen.add(filename)
            rows.append(Row(split, filename, label))
    if not rows:
        raise PreparationError(
            f'--source={source} has no train.csv, val.csv or test.csv that lists an image.'
        )
    return rows


def by_name(items: list[Item]) -> dict[str, Item]:
    """The images among them; PreparationError if two have the same file name."""
    images = {}
    for item in items:
        name = item.path.name
        if name.lower().endswith(SUFFIXES) and images.setdefault(name, item) is not item:
            raise PreparationError(
                f'{item.where} and {images[name].where} have the same file name; the csv files '
                'cannot tell them apart.'
            )
    return images


def find(source: Path) -> dict[str, Item]:
    """The images by file name: those of images/ and, where that lacks them, of the zip archives."""
    groups = [preparation.folder_items(source / 'images', '*')]
    groups += [preparation.archive_items(path, str(path)) for path in sorted(source.glob('*.zip'))]
    found = {}
    for group in groups:
        found = {**by_name(group), **found}
    if not found:
        raise PreparationError(
            f'--source={source} has no .jpg images, neither in a folder images nor in zip archives.'
        )
    return found


def resize(item: Item) -> bytes:
    """The image as an 84x84 RGB JPEG."""
    data, file = item.read(), io.BytesIO()
    with preparation.decoding(item):
        # ImageNet has a PNG under a JPEG's name.
        image = Image.open(io.BytesIO(data), formats=('JPEG', 'PNG'))
        image.load()
        as_wanted = (image.format, image.mode, image.size) == ('JPEG', 'RGB', SIZE)
        if as_wanted and len(data) <= MAX_COPIED:
            return data
        resized = image.convert('RGB').resize(SIZE, Image.Resampling.LANCZOS)
        resized.save(file, 'JPEG', quality=95, subsampling=0)
    return file.getvalue()


def report(rows: list[Row], missing: list[Row]) -> str:
    """Classes and images written per split."""
    lines = []
    for split in CLASSES:
        written = [row for row in rows if row.split == split]
        if written:
            classes = {row.label for row in written}
            official = f'{CLASSES[split]} classes, {600 * CLASSES[split]} images'
            lines.append(
                f'{split}: {len(classes)} classes, {len(written)} images '
                f'(the official split has {official})'
            )
    if missing:
        lines.append(f'{len(missing)} listed images are missing')
    return '\n'.join(lines)


def check_missing(source: Path, missing: list[Row], listed: int, allowed: bool) -> None:
    """Raises PreparationError if images are missing, when that is not allowed, or if all are."""
    if not missing or (allowed and len(missing) < listed):
        return
    first = ', '.join(f'{row.filename} ({row.split})' for row in missing[:3])
    if len(missing) > 3:
        first += ', ...'
    advice = '' if allowed else ' Get them, or leave them out with --allow_missing.'
    raise PreparationError(
        f'{source} lacks {len(missing)} of the {listed} listed images: {first}.{advice}'
    )


def prepare(source: Path, target: Path, allow_missing: bool = False) -> str:
    """Writes the target, unless it is there already, and returns a report.

    Raises PreparationError.
    """
    listed, found = read_rows(source), find(source)
    missing = [row for row in listed if row.filename not in found]
    check_missing(source, missing, len(listed), allow_missing)
    rows = [row for row in listed if row.filename in found]
    images = {}
    for row in rows:
        path = f'{row.split}/{row.label}/{row.filename}'
        images[path] = functools.partial(resize, found[row.filename])
    if preparation.is_prepared(target, lambda paths: paths == images.keys(), SIZE):
        return f'{target} is complete already; nothing to do.'
    preparation.write_images(target, images)
    return f'{target}\n{report(rows, missing)}'


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f'Unexpected argument {argv[1]!r}; see --help.')
    values = flags.FLAGS
    if not values.source:
        raise SystemExit(HELP)
    source, target = preparation.as_path(values.source), preparation.as_path(values.target)
    preparation.run(lambda: prepare(source, target, values.allow_missing))


if __name__ == '__main__':
    flags.DEFINE_string('source', None, 'folder with the images and the csv files')
    flags.DEFINE_string('target', 'data/miniImagenet', 'folder to make')
    flags.DEFINE_boolean(
        'allow_missing', False, 'leave out listed images that are not there, instead of refusing'
    )
    app.run(main)
