"""Makes data/tieredImageNet, for main.py --datasource=folder, from whatever form of it.

    python scripts/data/prepare_tieredimagenet.py --source=FOLDER

FOLDER, or an archive, tar or zip, has one of these, in archives or not:

    train_images_png.pkl, train_labels.pkl, and the same of val and test
    train_images.npz, in OpenCV's order of colours, instead of the first, and so on
    ImageNet's folders of synsets, as ILSVRC2012_img_train.tar, or what it unpacks to

The splits are Ren et al.'s (2018): 351, 97 and 160 classes; in all of it there are 448,695, 124,261
and 206,209 images. The result is TARGET/{train,val,test}/<class>/<name>: 84x84, RGB. Images of
pickles keep their pixels, as PNG; ImageNet's are resized with Lanczos and saved as JPEG at quality
95, where the authors took cubic interpolation. Classes are called by number and name, or by synset.
The pickles of PNG files take 10 GB of memory, other forms little.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags

from fewshot.data import preparation, tieredimagenet
from fewshot.data.preparation import PreparationError
from fewshot.data.tieredimagenet import SIZE, SPLITS

ADVICE = (
    'Name with --source the folder that has tieredImageNet. Its authors told where to get it in '
    'github.com/renmengye/few-shot-ssl-public; zenodo.org/records/7978538 has had the pickles; '
    'and image-net.org has ImageNet, of which it is a part.'
)


def prepare(source: Path | None, target: Path, splits: Mapping[str, list[str]] = SPLITS) -> str:
    """Writes the target, unless it is there already, and returns a report.

    source: a folder or an archive; splits: {split: synsets}. Raises PreparationError.
    """
    if not source:
        raise PreparationError(ADVICE)
    preparation.check_source(source)
    images = tieredimagenet.find(source, splits)
    classes = {split: len(synsets) for split, synsets in splits.items()}
    if wrong := preparation.fault_of_classes(images, classes):
        raise PreparationError(f'{source} does not hold the complete tieredImageNet: {wrong}.')
    return preparation.write_splits(target, images, SIZE)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    source = preparation.as_path(values.source) if values.source else None
    preparation.run(argv, lambda: prepare(source, preparation.as_path(values.target)))


if __name__ == '__main__':
    flags.DEFINE_string('source', None, 'folder or archive that has tieredImageNet or ImageNet')
    flags.DEFINE_string('target', 'data/tieredImageNet', 'folder to make')
    app.run(main)
