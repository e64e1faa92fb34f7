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
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags

from fewshot.data import downloads, preparation
from fewshot.data.cifar100 import SIZE, SPLITS, find
from fewshot.data.downloads import Remote
from fewshot.data.preparation import PreparationError

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
IMAGES = 600  # of each class


def fault(counts: Mapping[str, int], classes: Iterable[str], images: int) -> str | None:
    """Tells how {class: images} differs from CIFAR-100; None if it does not."""
    for label in sorted({*classes, *counts}):
        if label not in classes:
            return f'there is a class {label}'
        if counts.get(label, 0) != images:
            return f'{counts.get(label, 0)} images of {label} instead of {images}'
    return None


def split_images(found: Mapping[str, Callable[[], bytes]], splits: dict, images: int) -> dict:
    """Returns {SPLIT/CLASS/NAME.png: function}.

    Raises PreparationError if it is not all of CIFAR-100.
    """
    split_of = {label: split for split, labels in splits.items() for label in labels}
    counts = collections.Counter(path.partition('/')[0] for path in found)
    if wrong := fault(counts, split_of, images):
        raise PreparationError(f'The source does not hold the complete CIFAR-100: {wrong}.')
    return {f'{split_of[path.partition("/")[0]]}/{path}': made for path, made in found.items()}


def prepare(
    source: Path | None, target: Path, splits: dict, remote: Remote = ARCHIVE, images: int = IMAGES
) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder or an archive; None: `remote` is downloaded. splits: {split: classes}. images:
    the number of each class's. Raises PreparationError.
    """

    def complete(paths: set[str]) -> bool:
        counts = collections.Counter(path.rpartition('/')[0] for path in paths)
        wanted = [f'{split}/{label}' for split, labels in splits.items() for label in labels]
        return fault(counts, wanted, images) is None

    preparation.check_source(source)
    if preparation.is_prepared(target, complete, SIZE):
        return f'{target} is complete already; nothing to do.'
    if not source:
        with downloads.folder_beside(target, [remote.name]) as folder:
            archive = downloads.fetch(remote, folder, ADVICE)
            return prepare(archive, target, splits, remote, images)
    return preparation.write_splits(target, split_images(find(source), splits, images), SIZE)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    source = preparation.as_path(values.source) if values.source else None
    target = preparation.as_path(values.target or f'data/{values.splits}')
    preparation.run(argv, lambda: prepare(source, target, SPLITS[values.splits]))


if __name__ == '__main__':
    flags.DEFINE_string(
        'source', None, 'folder or archive that has CIFAR-100; without it, a download'
    )
    flags.DEFINE_enum('splits', 'cifar_fs', [*SPLITS], 'which classes are in which split')
    flags.DEFINE_string('target', None, 'folder to make (default: data/cifar_fs or data/fc100)')
    app.run(main)
