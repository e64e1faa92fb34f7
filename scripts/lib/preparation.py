"""What the two prepare_*.py share: images out of untrusted archives, into a folder that is either whole or absent.

Images are read from the archives one at a time, in memory; nothing is unpacked to disk. One thread does it all, in
seconds: with images this small most of the work is Python's own, and more threads, which take turns at it, are slower.
"""

import contextlib
import csv
import functools
import os
import signal
import stat
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    ArithmeticError,
    RuntimeError,
    ValueError,
    OSError,
)
MAX_BYTES = 32 * 2**20  # of one image; ImageNet's largest has half of that


class PreparationError(Exception):
    """Bad source or target; the text is one sentence for the user."""


class Item(NamedTuple):
    """An image of the source."""

    path: PurePosixPath  # inside its archive or folder
    where: str  # for messages
    read: Callable[[], bytes]  # raises PreparationError


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turns what reading a damaged archive or file raises (far more than BadZipFile) into a PreparationError."""
    try:
        yield
    except DAMAGE as error:
        raise PreparationError(
            f'{what} is damaged or cannot be read ({error}); get it again.'
        ) from error


def check_member(info: zipfile.ZipInfo, archive: str) -> None:
    """Raises PreparationError on a member that a plain archive of images does not have."""
    name, kind = (
        info.orig_filename,
        stat.S_IFMT(info.external_attr >> 16),
    )  # the upper half holds the Unix mode, if any
    fault = None
    if (
        not name
        or not name.isprintable()
        or set('\\:') & set(name)
        or name.startswith('/')
        or '..' in PurePosixPath(name).parts
    ):
        fault = 'has an unsafe path'
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = 'is a link or a device'
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile cannot unpack the others piece by piece, so they have no bound.
        fault = 'is neither stored nor deflated'
    elif info.file_size > MAX_BYTES:
        fault = f'unpacks to more than {MAX_BYTES // 2**20} MiB'
    if fault:
        raise PreparationError(f'{archive} is refused: its member {name!r} {fault}.')


def hidden(path: PurePosixPath) -> bool:
    """True for what macOS adds to archives and folders, and the like."""
    return any(part.startswith('.') or part == '__MACOSX' for part in path.parts)


def archive_items(file: Path | BinaryIO, name: str) -> list[Item]:
    """The files in a zip archive, every member checked before the first is read; `name` stands for it in messages."""
    with blaming(name):
        archive = zipfile.ZipFile(file)  # open for as long as its items are about
    for info in archive.infolist():
        check_member(info, name)

    def read(info: zipfile.ZipInfo) -> bytes:
        with blaming(name), archive.open(info) as member:
            data = member.read(
                MAX_BYTES + 1
            )  # the header's size is only a claim; at the end, the CRC is checked
        if len(data) > MAX_BYTES:
            raise PreparationError(f'{name} is refused: its member {info.filename!r} is too large.')
        return data

    members = [
        (PurePosixPath(info.filename), info) for info in archive.infolist() if not info.is_dir()
    ]
    return [
        Item(path, f'{name}: {path}', functools.partial(read, info))
        for path, info in members
        if not hidden(path)
    ]


def folder_items(folder: Path, pattern: str) -> list[Item]:
    """The files below a folder that match a glob pattern."""

    def read(path: Path) -> bytes:
        with blaming(str(path)), path.open('rb') as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PreparationError(f'{path} is too large for an image.')
        return data

    paths = [
        (PurePosixPath(path.relative_to(folder).as_posix()), path)
        for path in sorted(folder.glob(pattern))
    ]
    return [
        Item(inner, str(path), functools.partial(read, path))
        for inner, path in paths
        if not hidden(inner) and path.is_file()
    ]


@contextlib.contextmanager
def decoding(item: Item) -> Iterator[None]:
    """Turns whatever Pillow raises on the image, and it is nearly everything, into a PreparationError that names it."""
    try:
        yield
    except PreparationError:
        raise
    except Exception as error:
        reason = 'of no format it may have' if isinstance(error, UnidentifiedImageError) else error
        raise PreparationError(
            f'{item.where} cannot be decoded ({reason}); get it again.'
        ) from error


def is_prepared(target: Path, complete: Callable[[set[str]], bool], size: tuple[int, int]) -> bool:
    """Whether the target holds all that would be written: `complete` judges the relative paths, `size` is each image's.

    False if there is nothing yet; PreparationError if there is anything else, which is never overwritten.
    """
    if not target.exists():
        return False
    if target.is_dir():
        found = [
            Path(folder, file)
            for folder, _, files in os.walk(target)
            for file in files
            if file[0] != '.'
        ]
        if not any(target.iterdir()):
            return False
        if complete({path.relative_to(target).as_posix() for path in found}) and all(
            has_size(p, size) for p in found
        ):
            return True
    raise PreparationError(
        f'{target} exists and is not the complete data; move it away, or name another --target.'
    )


def has_size(path: Path, size: tuple[int, int]) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == size
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, renamed to it at the end; after an exception nothing of it is left."""
    target = Path(os.path.realpath(target))  # the target may be a link to a larger disk
    absent_parents = [parent for parent in target.parents if not parent.exists()]  # nearest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as private:
            folder = Path(
                private, target.name
            )  # one deeper, as the upper one is closed to other users
            folder.mkdir()
            yield folder
            os.rename(folder, target)
    except BaseException:
        for parent in absent_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_images(target: Path, images: Mapping[str, Callable[[], bytes]]) -> None:
    """Writes the files (relative path: function that makes the contents), showing progress; all of them or none."""
    with new_folder(target) as folder:
        for parent in {(folder / name).parent for name in images}:
            parent.mkdir(parents=True, exist_ok=True)
        shown = time.monotonic()
        for count, (name, contents) in enumerate(images.items(), 1):
            (folder / name).write_bytes(contents())
            if count == len(images) or time.monotonic() > shown + (
                0.1 if sys.stderr.isatty() else 5
            ):
                shown = time.monotonic()
                end = (
                    '\r' if sys.stderr.isatty() and count < len(images) else '\n'
                )  # a terminal keeps one line
                print(f'{count}/{len(images)} images', end=end, file=sys.stderr, flush=True)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of a csv file, only the named columns, all of which must be plain file names without folders."""
    rows = []
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            for row in (reader := csv.DictReader(file)):
                rows.append([row[column] for column in columns])
                for name in rows[-1]:
                    if (
                        not name
                        or name.startswith('.')
                        or not name.isprintable()
                        or set('/\\:') & set(name)
                    ):
                        raise PreparationError(
                            f'{path}, line {reader.line_num}: {name!r} is not a plain name.'
                        )
    except KeyError as error:
        raise PreparationError(
            f'{path} has no column {error}; it should have {" and ".join(columns)}.'
        ) from error
    except (csv.Error, ValueError) as error:
        raise PreparationError(f'{path} is not a csv file ({error}); get it again.') from error
    return rows


def as_path(flag: str) -> Path:
    return Path(os.path.expanduser(flag))  # shells leave --source=~/data as it is


def run(prepare: Callable[[], str]) -> None:
    """Runs a command and prints its report; errors end it with one sentence and status 1, signals after cleaning up."""

    def stop(number, _):
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                ignored, signal.SIG_IGN
            )  # a second Ctrl-C would break off the cleaning up
        print('\nStopped; cleaning up.', file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    try:
        print(prepare())
    except (PreparationError, OSError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
