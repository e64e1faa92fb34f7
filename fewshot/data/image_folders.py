"""Data sets of class folders: Omniglot, miniImagenet and their like."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_generator import SPLITS, ClassImages, split_classes
from fewshot.data.image_cache import _cache_places, _cached_images
from fewshot.data.image_files import (
    MINIIMAGENET,
    OMNIGLOT,
    ImageLayout,
    _class_folders,
    _image_files,
)


def load_omniglot(data_dir: str, cache_dir: str | None = None) -> dict[str, ClassImages]:
    """The classes `data_dir/omniglot_resized/<Alphabet>/<character>/*.png` (28x28) of each split.

    Values are 1 - pixel / 255, so ink is 1. See split_classes for which character goes where.
    cache_dir: see load_class_folders.
    Raises FileNotFoundError if there is no such folder, and ValueError if it is empty or has fewer
    than three classes, or an image is damaged or not 28x28.
    """
    folder = Path(data_dir) / 'omniglot_resized'
    command = (
        f'`python scripts/data/prepare_omniglot.py {_target(folder)}`, which downloads the '
        'archives unless it is given a folder that has them by --source=FOLDER'
    )
    characters = load_class_folders(folder, OMNIGLOT, _cache_of(folder), command, cache_dir)
    if len(characters.names) < len(SPLITS):
        raise ValueError(
            f'{folder} has only {len(characters.names)} character folders, but training, '
            'validation and test need at least one each; move it away and make it again with '
            f'{command}'
        )
    classes = split_classes(len(characters.names))
    return {split: characters.select(chosen) for split, chosen in classes.items()}


def load_miniimagenet(
    data_dir: str, splits: Iterable[str] = SPLITS, cache_dir: str | None = None
) -> dict[str, ClassImages]:
    """The classes `data_dir/miniImagenet/<split>/<wnid>/*` (84x84, colour) of each split.

    splits: those that are needed; other folders need not exist. cache_dir: see load_class_folders.
    Raises FileNotFoundError if the folder of a split is missing, and ValueError if it is empty or
    an image is damaged or not 84x84.
    """
    folder = Path(data_dir) / 'miniImagenet'
    command = (
        f'`python scripts/data/prepare_miniimagenet.py {_target(folder)}`, which downloads it '
        'unless it is given a folder that has it by --source=FOLDER'
    )
    given = (command, cache_dir)
    return {
        split: load_class_folders(folder / split, MINIIMAGENET, _cache_of(folder, split), *given)
        for split in splits
    }


def _target(folder: Path) -> str:
    """The flag of the scripts that prepare the data, for messages."""
    return f'--target={shlex.quote(str(folder))}'


def _cache_of(folder: Path, *parts: str) -> Path:
    """Beside the folder: what is in it belongs to the user, or to what prepares the data."""
    folder = Path(os.path.abspath(folder))  # '.' has no name
    return folder.with_name('.'.join((folder.name, *parts, 'cache')))


def _counts(classes: Mapping[str, Sequence]) -> dict[str, int]:
    return {name: len(files) for name, files in classes.items()}


def _check_folder(folder: Path):
    """Raises FileNotFoundError if it does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f'there is no folder {folder}; give --data_dir the folder that holds a folder of '
            'images for each class'
        )


def load_class_folders(
    folder: Path,
    layout: ImageLayout,
    cache: Path,
    command: str | None = None,
    cache_dir: str | None = None,
) -> ClassImages:
    """All images of a folder of class folders, sorted by class and file name.

    Hidden and stray files are ignored. The images come from the cache if that matches the files
    (names, sizes, times of change) and its own checksums. Otherwise they are decoded, and the
    cache is written if it can be.

    folder: the data set, or one split of it; layout: how it lies on disk.
    cache: the folder for the decoded images; one in the user's cache folder if it cannot be made.
    command: what makes the data, for the error messages; None if it is the user's own.
    cache_dir: where that folder is to be instead.
    Raises FileNotFoundError if there is no such folder, and ValueError if it holds no classes, a
    class holds no images, or an image is damaged or has another size.
    """
    if command and not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}; make it with {command}')
    _check_folder(folder)
    found = _class_folders(folder, layout.depth)
    classes = {name: _image_files(path, layout) for name, path in found}
    _check_classes(classes, folder, layout, command)
    return _load(folder, layout, cache, classes, command, cache_dir)


def _load(
    folder: Path,
    layout: ImageLayout,
    cache: Path,
    classes: dict[str, list[os.DirEntry]],
    command: str | None,
    cache_dir: str | None,
) -> ClassImages:
    """The images of classes; others as of load_class_folders."""
    files = [file for images in classes.values() for file in images]
    images = _cached_images(folder, layout, _cache_places(cache, cache_dir), files, command)
    counts = np.array([*_counts(classes).values()])
    return ClassImages(str(folder), list(classes), np.cumsum(counts) - counts, counts, images)


def _check_classes(
    classes: dict[str, list[os.DirEntry]],
    folder: Path,
    layout: ImageLayout,
    command: str | None,
    skip_small: bool = False,
):
    """Raises ValueError if there are none, or one holds no images and is not to be skipped."""
    again = f'move {folder} away and make it again with {command}'
    if not classes:
        remedy = again if command else 'it needs a folder of images for each class'
        raise ValueError(f'{folder} holds no class folders; {remedy}')
    for name, files in classes.items():
        if not files and command:
            raise ValueError(
                f'{folder / name} holds no images ({", ".join(layout.suffixes)}); remove it if it '
                f'is no class, or {again}'
            )
        deeper = [] if files else [path for _, path in _class_folders(folder / name, 1)]
        if deeper:
            raise ValueError(
                f'{folder / name} holds no images but folders, and other classes of {folder} hold '
                'images: move folders so that all classes lie at one depth'
            )
        if not files and not skip_small:
            raise ValueError(
                f'{folder / name} holds no images of a format that Pillow reads; add some, or '
                'remove it if it is no class, or leave it out with --skip_small_classes'
            )
