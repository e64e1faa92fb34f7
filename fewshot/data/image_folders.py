"""Data sets of class folders: Omniglot, miniImagenet and their like."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_generator import SPLITS, ClassImages, listed, split_classes
from fewshot.data.entries import class_folders
from fewshot.data.image_cache import cache_places, cached_images
from fewshot.data.image_files import MINIIMAGENET, OMNIGLOT, ImageLayout, image_entries

Classes = Mapping[str, list[os.DirEntry]]  # {class: its image files}


def load_omniglot(data_dir: str, cache_dir: str | None = None) -> dict[str, ClassImages]:
    """Loads `data_dir/omniglot_resized/<Alphabet>/<character>/*.png`, 28x28, split by split.

    Values are 1 - pixel / 255, so ink is 1. split_classes tells which character goes where.
    cache_dir: see cache_places.
    Raises FileNotFoundError if there is no such folder, and ValueError if it is empty or has fewer
    than three classes, or an image is damaged or not 28x28.
    """
    folder = Path(data_dir) / 'omniglot_resized'
    command = _preparation('prepare_omniglot.py', folder)
    places = cache_places(folder, cache_dir=cache_dir)
    characters = load_class_folders(folder, OMNIGLOT, places, command)
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
    """Loads the classes `data_dir/miniImagenet/<split>/<wnid>/*` (84x84, colour) of each split.

    splits: the splits that are needed; other folders need not exist. cache_dir: see cache_places.
    Raises FileNotFoundError if the folder of a split is missing, and ValueError if it is empty or
    an image is damaged or not 84x84.
    """
    folder, loaded = Path(data_dir) / 'miniImagenet', {}
    command = _preparation('prepare_miniimagenet.py', folder)
    for split in splits:
        places = cache_places(folder, split, cache_dir=cache_dir)
        loaded[split] = load_class_folders(folder / split, MINIIMAGENET, places, command)
    return loaded


def _preparation(script: str, folder: Path) -> str:
    """Returns the command that makes the data, for messages."""
    return (
        f'`python scripts/data/{script} --target={shlex.quote(str(folder))}`, which downloads the '
        'data unless --source=FOLDER names a folder that has them'
    )


def load_class_folders(
    folder: Path, layout: ImageLayout, places: Sequence[Path], command: str
) -> ClassImages:
    """Loads the visible images of a folder of class folders, sorted by class and file name.

    places: those of the cache, see cache_places. command: the command that makes the data, for
    messages. Raises FileNotFoundError if there is no such folder, and ValueError if it holds no
    classes, a class holds no images, or an image is damaged or has another size.
    """
    check_folder(folder, command)
    found = class_folders(folder, layout.depth)
    classes = {name: image_entries(path, layout) for name, path in found}
    if fault := no_classes(classes, folder, command):
        raise ValueError(fault)
    return load_classes(folder, layout, classes, places, command)


def load_classes(
    folder: Path,
    layout: ImageLayout,
    classes: Classes,
    places: Sequence[Path],
    command: str | None = None,
) -> ClassImages:
    """Loads the images of classes found in a folder; other arguments as in load_class_folders."""
    files = [file for images in classes.values() for file in images]
    images = cached_images(folder, layout, files, places, command)
    counts = np.array([len(files) for files in classes.values()])
    return ClassImages(str(folder), list(classes), np.cumsum(counts) - counts, counts, images)


def check_folder(folder: Path, command: str | None = None):
    """Raises FileNotFoundError if a folder of class folders does not exist."""
    if not folder.is_dir():
        own = 'give --data_dir the folder that holds a folder of images for each class'
        remedy = f'make it with {command}' if command else own
        raise FileNotFoundError(f'there is no folder {folder}; {remedy}')


def no_classes(classes: Classes, folder: Path, command: str | None = None) -> str:
    """Says that there are no classes in a folder, or some have no images; '' if neither is so."""
    empty = [str(folder / name) for name, files in classes.items() if not files]
    if classes and not empty:
        return ''
    fault, remedy = f'{folder} holds no class folders', 'it needs a folder of images for each class'
    if empty:
        fault = f'{listed(empty)} holds no images of a format that is read here'
        remedy = 'add some, or remove what is no class, or leave them out with --skip_small_classes'
    if command:
        remedy = f'move {folder} away and make it again with {command}'
    return f'{fault}; {remedy}'
