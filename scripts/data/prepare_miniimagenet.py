"""Makes data/miniImagenet, for main.py --datasource=miniimagenet, from whatever form of it.

    python scripts/data/prepare_miniimagenet.py                   # downloads it (1.3 GB)
    python scripts/data/prepare_miniimagenet.py --source=FOLDER   # has it there

FOLDER, or an archive, tar or zip, has one of these, in archives or not:

    images and train.csv, val.csv, test.csv, each with the columns filename and label
    ImageNet's folders of synsets, complete, and the same csv files
    mini-imagenet-cache-train.pkl, -val.pkl or -validation.pkl, -test.pkl
    train, val (or valid, validation, dev) and test with a folder of images for each class

Whichever splits are there are used. The result is TARGET/{train,val,test}/<label>/<name>: 84x84,
RGB. Images that are that already keep their bytes; the others are resized with Lanczos and saved
as JPEG at quality 95 without subsampling of colours. Those of pickles become PNG, losslessly.
"""

import collections
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags

from fewshot.data import downloads, miniimagenet, preparation
from fewshot.data.downloads import Remote
from fewshot.data.miniimagenet import CLASSES, IMAGES, SIZE
from fewshot.data.preparation import PreparationError

RECORD = 'https://zenodo.org/api/records/7978538'
PICKLES = tuple(f'mini-imagenet-cache-{split}.pkl' for split in ('train', 'validation', 'test'))
MAX_RECORD = 2**20  # bytes of json
MAX_DOWNLOAD = 2 * 2**30  # bytes of a pickle; the largest has 0.8
ADVICE = (
    'try again, which goes on where it broke off, or get miniImagenet by other means and name its '
    'folder with --source.'
)


def pickles_of(record: str) -> list[Remote]:
    """Returns the files of a record of Zenodo, by its own description.

    Raises PreparationError if some are lacking.
    """
    data = downloads.read_small(record, MAX_RECORD, ADVICE)
    try:
        files = {file['key']: file for file in json.loads(data)['files']}
        remotes = []
        for name in PICKLES:
            address = files[name]['links']['self']
            kind, _, md5 = files[name]['checksum'].partition(':')
            if kind != 'md5' or not address.startswith(('https://', 'http://')):
                raise ValueError(f'{name} has no address and md5')
            remotes.append(Remote(name, address, md5, MAX_DOWNLOAD))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreparationError(
            f'{record} is not a description of the pickles ({error}); {ADVICE}'
        ) from error
    return remotes


def is_official(paths: Iterable[str], classes: dict[str, int], images: int) -> bool:
    """Whether the files SPLIT/CLASS/NAME are as many as miniImagenet has."""
    counts = collections.Counter(path.rpartition('/')[0] for path in paths)
    splits = collections.Counter(name.partition('/')[0] for name in counts)
    return splits == classes and set(counts.values()) == {images}


def download(
    target: Path, record: str = RECORD, classes: dict[str, int] = CLASSES, images: int = IMAGES
) -> str:
    """Downloads miniImagenet, unless the target is there already, and returns a report.

    record: an address of Zenodo; classes, images: the complete numbers. Raises PreparationError.
    """
    complete = functools.partial(is_official, classes=classes, images=images)
    if preparation.is_prepared(target, complete, SIZE):
        return f'{target} is complete already; nothing to do.'
    with downloads.folder_beside(target, PICKLES) as folder:
        for remote in pickles_of(record):
            downloads.fetch(remote, folder, ADVICE)
        return prepare(folder, target)


def report(paths: Iterable[str], missing: int) -> str:
    """Tells the classes and images written per split."""
    lines, written = [], [path.split('/') for path in paths]
    for split, number in CLASSES.items():
        labels = [label for of, label, _ in written if of == split]
        if labels:
            official = f'{number} classes, {IMAGES * number} images'
            lines.append(
                f'{split}: {len(set(labels))} classes, {len(labels)} images '
                f'(the official split has {official})'
            )
    if missing:
        lines.append(f'{missing} listed images are missing')
    return '\n'.join(lines)


def prepare(source: Path, target: Path, allow_missing: bool = False) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder or an archive. allow_missing: some, not all. Raises PreparationError.
    """
    preparation.check_source(source)
    found = miniimagenet.find(source)
    images, missing = found.images, found.missing
    if missing and not (allow_missing and images):
        first = ', '.join(f'{row.filename} ({row.split})' for row in missing[:3])
        more = ', ...' if len(missing) > 3 else ''
        advice = '' if allow_missing else ' Get them, or leave them out with --allow_missing.'
        count = f'{len(missing)} of the {found.listed} listed images'
        raise PreparationError(f'{source} lacks {count}: {first}{more}.{advice}')
    if preparation.is_prepared(target, lambda paths: paths == images.keys(), SIZE):
        return f'{target} is complete already; nothing to do.'
    preparation.write_images(target, images)
    return f'{target}\n{report(images, len(missing))}'


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    target = preparation.as_path(values.target)
    if values.source:
        source = preparation.as_path(values.source)
        preparation.run(argv, lambda: prepare(source, target, values.allow_missing))
    else:
        preparation.run(argv, lambda: download(target))


if __name__ == '__main__':
    flags.DEFINE_string(
        'source', None, 'folder or archive that has miniImagenet; without it, a download'
    )
    flags.DEFINE_string('target', 'data/miniImagenet', 'folder to make')
    flags.DEFINE_boolean(
        'allow_missing', False, 'leave out listed images that are not there, instead of refusing'
    )
    app.run(main)
