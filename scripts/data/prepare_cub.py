"""Makes data/cub, for main.py --datasource=folder, of CUB-200-2011, 11,788 photos of 200 birds.

    python scripts/data/prepare_cub.py                   # downloads it (1.2 GB)
    python scripts/data/prepare_cub.py --source=FOLDER   # has it there
    python scripts/data/prepare_cub.py --crop            # makes data/cub_crop

FOLDER is CUB_200_2011.tgz or has it, or what it unpacks to. The 100, 50 and 50 classes are those of
Chen et al. (2019); fewshot/data/cub.py has the rule. The result is
TARGET/{train,val,test}/<class>/<name>.jpg: 84x84, RGB, resized with Lanczos without regard to
shape, JPEG at quality 95. --crop takes the birds' bounding boxes instead of whole images, as others
do: papers differ in that.
"""

import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags

from fewshot.data import cub, downloads, preparation
from fewshot.data.downloads import Remote
from fewshot.data.miniimagenet import SIZE
from fewshot.data.preparation import PreparationError

ARCHIVE = Remote(
    'CUB_200_2011.tgz',
    'https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz',
    md5='97eceeb196236b17998738112f37df78',
    max_bytes=2 * 2**30,
)
ADVICE = (
    'try again, which goes on where it broke off, or get CUB_200_2011.tgz from '
    'data.caltech.edu/records/65de6-vp158 with a browser and name it with --source.'
)
CLASSES = {'train': 100, 'val': 50, 'test': 50}
IMAGES = 11788


def fault(paths: Collection[str], classes: dict[str, int], images: int) -> str | None:
    """Tells how the files SPLIT/CLASS/NAME differ from all of CUB; None if they do not."""
    if wrong := preparation.fault_of_classes(paths, classes):
        return wrong
    return None if len(paths) == images else f'{len(paths)} images instead of {images}'


def prepare(
    source: Path | None,
    target: Path,
    crop: bool = False,
    remote: Remote = ARCHIVE,
    classes: dict[str, int] = CLASSES,
    images: int = IMAGES,
) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder or an archive; None: `remote` is downloaded. classes, images: the complete
    numbers. Raises PreparationError.
    """
    preparation.check_source(source)
    if preparation.is_prepared(target, lambda paths: not fault(paths, classes, images), SIZE):
        return f'{target} is complete already; nothing to do.'
    if not source:
        with downloads.folder_beside(target, [remote.name]) as folder:
            archive = downloads.fetch(remote, folder, ADVICE)
            return prepare(archive, target, crop, remote, classes, images)
    found = cub.find(source, crop)
    if wrong := fault(found, classes, images):
        raise PreparationError(f'{source} does not hold the complete CUB-200-2011: {wrong}.')
    return preparation.write_splits(target, found, SIZE)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    source = preparation.as_path(values.source) if values.source else None
    target = preparation.as_path(values.target or ('data/cub_crop' if values.crop else 'data/cub'))
    preparation.run(argv, lambda: prepare(source, target, values.crop))


if __name__ == '__main__':
    flags.DEFINE_string(
        'source', None, 'folder or archive that has CUB-200-2011; without it, a download'
    )
    flags.DEFINE_boolean('crop', False, "take the birds' bounding boxes instead of whole images")
    flags.DEFINE_string(
        'target', None, 'folder to make, another with --crop (default: data/cub or data/cub_crop)'
    )
    app.run(main)
