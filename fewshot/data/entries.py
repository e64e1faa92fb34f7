"""Lists what folders hold of data, without what systems and this program leave there."""

import os
import re
import unicodedata
from pathlib import Path

SYSTEM = {'__macosx', '@eadir', '#recycle', '$recycle.bin', 'system volume information'}
SYSTEM |= {'lost+found', '__pycache__', 'thumbs.db', 'desktop.ini'}
OWN = re.compile(r'.+\.cache(\.npy(\.\w+\.tmp)?)?|.+\.download')  # caches, broken downloads
OF_RUN = re.compile(r'(model|best)\d+\.(index|data-.+)|events\.out\.tfevents\..+')


def nfc(name: str) -> str:
    """Returns a name in the Unicode form that tells equal names; file systems differ in theirs."""
    return unicodedata.normalize('NFC', name)


def is_stray(name: str) -> bool:
    """Whether a name is never that of data: a hidden one, a system's, a cache's or a download's."""
    return bool(name.startswith('.') or name.lower() in SYSTEM or OWN.fullmatch(name))


def is_output(entry: os.DirEntry) -> bool:
    """Whether an entry is a cache, a run's folder, or a folder that holds nothing but these."""
    if OWN.fullmatch(entry.name):
        return True
    if not entry.is_dir(follow_symlinks=False):  # links may lead in circles
        return False
    with os.scandir(entry.path) as entries:
        inside = [inner for inner in entries if not inner.name.startswith('.')]
    of_run = any(OF_RUN.fullmatch(inner.name) for inner in inside)
    return of_run or bool(inside) and all(map(is_output, inside))


def visible(folder: str | Path) -> list[os.DirEntry]:
    """Lists the entries of a folder that may be data, sorted by name."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not is_stray(entry.name) and not is_output(entry)]
    return sorted(found, key=lambda entry: nfc(entry.name))


def class_folders(folder: str | Path, depth: int) -> list[tuple[str, str]]:
    """Lists (relative name, path) of the folders `depth` levels below, sorted level by level.

    Raises ValueError if two names are the same text.
    """
    found = {'': str(folder)}
    for _ in range(depth):
        parents, found = found, {}
        for parent, path in parents.items():
            for entry in visible(path):
                name = f'{parent}/{nfc(entry.name)}'.lstrip('/')
                if entry.is_dir() and found.setdefault(name, entry.path) != entry.path:
                    raise ValueError(
                        f'{path} has two folders {name}, whose names differ in the Unicode form '
                        'only: move the images of one into the other, and remove it'
                    )
    return [*found.items()]
