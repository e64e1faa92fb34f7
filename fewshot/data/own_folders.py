"""Finds classes, and what assigns them to splits, in a folder of one's own images.

Folders `train`, `val` and `test` hold the classes, or csv files of these names list images with
their labels, or txt files list class folders; without any of them all classes are one tree.
"""

import csv
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from posixpath import basename
from typing import NamedTuple

from data_generator import SPLITS, listed
from fewshot.data.entries import class_folders, nfc, visible
from fewshot.data.image_cache import tell
from fewshot.data.image_files import ImageLayout, image_entries
from fewshot.data.image_folders import Classes, check_folder

SPLIT_NAMES = {  # {what people call them: split}
    **dict.fromkeys(['train', 'training', 'base'], 'train'),
    **dict.fromkeys(['val', 'valid', 'validation', 'dev'], 'val'),
    **dict.fromkeys(['test', 'testing', 'novel'], 'test'),
}
PAIR = {'base', 'novel'}  # one alone is a class like others
MAX_DEPTH = 5  # of class folders
MAX_LIST = 2**20  # characters of a list of classes
COLUMNS = ('filename', 'label')


class Tree(NamedTuple):
    """Classes that were found together."""

    folder: Path
    classes: Classes
    folders: dict[str, str] = {}  # {class: its folder}, if it has one
    idle: tuple[str, ...] = ()  # folders above the classes that hold no images
    file: Path | None = None  # that lists them


def find_classes(folder: Path, layout: ImageLayout, splits: Iterable[str]) -> dict[str, Tree]:
    """Finds the classes of each split; the splits share one tree if they are yet to be dealt out.

    splits: those that are needed. Raises FileNotFoundError if there is no such folder, and
    ValueError if a split has no classes though others have, two folders or lists are the same
    split's, or a list names what is not there.
    """
    check_folder(folder)
    trees = {s: own_classes(path, layout) for s, path in split_folders(folder).items()}
    trees = trees or listed_images(folder)
    if not trees:
        tree = own_classes(folder, layout)
        trees = listed_classes(folder, tree) or dict.fromkeys(SPLITS, tree)
    if missing := [split for split in splits if split not in trees]:
        first = next(iter(trees.values()))
        there = first.file or first.folder
        wanted = [str(there.with_name(split + there.suffix)) for split in missing]
        raise ValueError(
            f'{folder} has classes for {" and ".join(trees)}, but none for {" and ".join(missing)}:'
            f' move some of {there} to {" and ".join(wanted)}; no class may be in two of them'
        )
    return trees


def different(trees: Iterable[Tree]) -> list[Tree]:
    """Lists the trees of splits, which may share one."""
    return [*{id(tree): tree for tree in trees}.values()]


def of_splits(paths: Mapping[str, Path]) -> dict[str, Path]:
    """Returns {split: its path}, of {name in SPLIT_NAMES: path}. Raises ValueError if two are."""
    alone, found = set() if PAIR <= paths.keys() else PAIR, {}
    for name in [name for name in SPLIT_NAMES if name in paths and name not in alone]:
        split = SPLIT_NAMES[name]
        first = found.setdefault(split, paths[name])
        if first != paths[name]:
            word = 'validation' if split == 'val' else split
            raise ValueError(
                f'{first} and {paths[name]} both hold {word} classes: move those of one into the '
                'other, and remove it'
            )
    return found


# Folders ------------------------------------------------------------------------------------------


def split_folders(folder: Path) -> dict[str, Path]:
    """Returns {split: its folder of classes}; empty if none of them holds any.

    Raises ValueError if two are the same split's, or all lie one level further down.
    """
    inside = {Path(path).name.lower(): Path(path) for _, path in class_folders(folder, 1)}
    named = {name: path for name, path in inside.items() if name in SPLIT_NAMES}
    found = of_splits({name: path for name, path in named.items() if class_folders(path, 1)})
    if not found and len(inside) == 1 and split_folders(*inside.values()):
        (only,) = inside.values()
        raise ValueError(f'the folders of the splits lie in {only}: give it as --data_dir')
    return found


def own_classes(folder: Path, layout: ImageLayout) -> Tree:
    """Finds the class folders at the first depth that has images, sorted level by level.

    If there is none, all folders that hold nothing count as classes without images.
    """
    idle = {}
    for depth in range(1, MAX_DEPTH + 1):
        found = dict(class_folders(folder, depth))
        classes = {name: image_entries(path, layout) for name, path in found.items()}
        if any(classes.values()):
            return Tree(folder, classes, found, tuple(idle))
        idle |= {name: path for name, path in found.items() if not class_folders(path, 1)}
    return Tree(folder, {name: [] for name in idle}, idle)


# Lists --------------------------------------------------------------------------------------------


def lists_in(folder: Path, suffix: str) -> dict[str, Path]:
    """Returns {split: its list}."""
    paths = {name: folder / f'{name}{suffix}' for name in SPLIT_NAMES}
    return of_splits({name: path for name, path in paths.items() if path.is_file()})


def listed_images(folder: Path) -> dict[str, Tree]:
    """Finds the images that train.csv, val.csv and test.csv list, or labels.csv for all splits."""
    trees = {split: tree for split, p in lists_in(folder, '.csv').items() if (tree := read_csv(p))}
    labels = folder / 'labels.csv'
    if not trees and labels.is_file() and (tree := read_csv(labels)):
        trees = dict.fromkeys(SPLITS, tree)
    return trees


def read_csv(path: Path) -> Tree | None:
    """Reads the columns filename and label; None if these are not there.

    The images lie in the folder of the file or in its folder `images`, or there in a folder for
    each label. Raises ValueError if some are missing.
    """
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            rows = [*reader] if {*COLUMNS} <= {*(reader.fieldnames or [])} else None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f'{path} cannot be read as a csv file ({error})') from error
    if rows is None:
        return tell(f'{path} is not read, since it has no columns {" and ".join(COLUMNS)}.')
    found, missing, files_of = {}, [], functools.cache(files_in)
    starts = [path.parent / 'images', path.parent]
    rows = {tuple(nfc(row[column] or '').strip() for column in COLUMNS) for row in rows}
    for filename, label in sorted(rows):
        places = [p for start in starts for p in (start / filename, start / label / filename)]
        entries = [files_of(place.parent).get(place.name) for place in places]
        entry = next(filter(None, entries), None) if filename and label else None
        found.setdefault(label, []).append(entry)
        missing += [] if entry else [filename]
    if missing:
        raise ValueError(
            f'{path} lists {len(missing)} images that are neither in {starts[0]} nor beside it: '
            f'{listed(missing)}'
        )
    return Tree(path.parent, dict(sorted(found.items())), file=path)


def files_in(folder: Path) -> dict[str, os.DirEntry]:
    return {nfc(e.name): e for e in visible(folder)} if folder.is_dir() else {}


def listed_classes(folder: Path, tree: Tree) -> dict[str, Tree]:
    """Finds the classes of train.txt, val.txt and test.txt, which name a class folder in each line.

    They lie in the folder or above it, there or in `splits` or in a folder of `splits`. Files that
    name no class are something else. Raises ValueError if there are several such lists, or one
    names classes that are not there.
    """
    names = {*tree.classes, *map(basename, tree.classes)}
    for start in (folder, Path(os.path.abspath(folder)).parent):
        places = (start, start / 'splits', *sorted((start / 'splits').glob('*')))
        found = [lists_in(place, '.txt') for place in places]
        found = [lists for lists in found if any(names & read_list(p) for p in lists.values())]
        if len(found) > 1:
            several = ' and '.join(str(next(iter(lists.values()))) for lists in found)
            raise ValueError(f'{several} both list classes of {folder}: take one of them away')
        if found:
            return {split: chosen(tree, path) for split, path in found[0].items()}
    return {}


def read_list(path: Path) -> set[str]:
    with path.open(encoding='utf-8-sig', errors='replace') as file:
        lines = nfc(file.read(MAX_LIST)).splitlines()
    return {line.strip().rstrip('/') for line in lines} - {''}


def chosen(tree: Tree, path: Path) -> Tree:
    """Returns the listed classes of a tree, in its order. Raises ValueError if some are missing."""
    wanted = read_list(path)
    classes = {n: f for n, f in tree.classes.items() if not wanted.isdisjoint((n, basename(n)))}
    if missing := sorted(wanted - classes.keys() - {*map(basename, classes)}):
        raise ValueError(
            f'{path} names classes that {tree.folder} does not have: {listed(missing)}'
        )
    return tree._replace(classes=classes, folders={n: tree.folders[n] for n in classes}, file=path)
