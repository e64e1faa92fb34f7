"""What the two prepare_*.py share: images out of untrusted archives, into a folder.

The folder is whole or absent, never half made. Images are read from the archives one at a time, in
memory; nothing is unpacked to disk. One thread does it all, in seconds: with images this small most
of the work is Python's own, and more threads, which take turns at it, are slower.
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
UNPACKABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class PreparationError(Exception):
    """Bad source or target; the text is one sentence for the user."""


class Item(NamedTuple):
    """An image of the source."""

    path: PurePosixPath  # inside its archive or folder
    where: str  # for messages
    read: Callable[[], bytes]  # raises PreparationError


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turns what reading a damaged archive or file raises into a PreparationError.

    That is far more than BadZipFile.
    """
    try:
        yield
    except DAMAGE as error:
        raise PreparationError(
            f'{what} is damaged or cannot be read ({error}); get it again.'
        ) from error


def is_safe(name: str) -> bool:
    """Whether a member's path stays within the archive, on every system."""
    printable = bool(name) and name.isprintable() and not set('\\:') & set(name)
    return printable and not name.startswith('/') and '..' not in PurePosixPath(name).parts


def check_member(info: zipfile.ZipInfo, archive: str) -> None:
    """Raises PreparationError on a member that a plain archive of images does not have."""
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)  # the upper half holds the Unix mode, if any
    fault = None
    if not is_safe(name):
        fault = 'has an unsafe path'
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = 'is a link or a device'
    elif info.compress_type not in UNPACKABLE:
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
    """The files in a zip archive, every member checked before the first is read.

    name: stands for the archive in messages.
    """
    with blaming(name):
        archive = zipfile.ZipFile(file)  # open for as long as its items are about
    for info in archive.infolist():
        check_member(info, name)

    def read(info: zipfile.ZipInfo) -> bytes:
        with blaming(name), archive.open(info) as member:
            # The header's size is only a claim; at the end, the CRC is checked.
            data = member.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PreparationError(f'{name} is refused: its member {info.filename!r} is too large.')
        return data

    items = []
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if not info.is_dir() and not hidden(path):
            items.append(Item(path, f'{name}: {path}', functools.partial(read, info)))
    return items


def folder_items(folder: Path, pattern: str) -> list[Item]:
    """The files below a folder that match a glob pattern."""

    def read(path: Path) -> bytes:
        with blaming(str(path)), path.open('rb') as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PreparationError(f'{path} is too large for an image.')
        return data

    items = []
    for path in sorted(folder.glob(pattern)):
        inner = PurePosixPath(path.relative_to(folder).as_posix())
        if not hidden(inner) and path.is_file():
            items.append(Item(inner, str(path), functools.partial(read, path)))
    return items


@contextlib.contextmanager
def decoding(item: Item) -> Iterator[None]:
    """Turns what Pillow raises on the image, and it is nearly everything, into a PreparationError.

    Its sentence names the image.
    """
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
    """Whether the target holds all that would be written.

    complete: judges the relative paths; size: each image's. False if there is nothing yet;
    PreparationError if there is anything else, which is never overwritten.
    """
    if not target.exists():
        return False
    if target.is_dir():
        if not any(target.iterdir()):
            return False
        found = visible_files(target)
        paths = {path.relative_to(target).as_posix() for path in found}
        if complete(paths) and all(has_size(path, size) for path in found):
            return True
    raise PreparationError(
        f'{target} exists and is not the complete data; move it away, or name another --target.'
    )


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, but for those whose names begin with a dot."""
    found = []
    for parent, _, files in os.walk(folder):
        found += [Path(parent, file) for file in files if file[0] != '.']
    return found


def has_size(path: Path, size: tuple[int, int]) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == size
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, renamed to it at the end.

    After an exception nothing of it is left.
    """
    target = Path(os.path.realpath(target))  # the target may be a link to a larger disk
    absent_parents = [parent for parent in target.parents if not parent.exists()]  # nearest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as private:
            folder = Path(private, target.name)  # one deeper: the upper is closed to others
            folder.mkdir()
            yield folder
            os.rename(folder, target)
    except BaseException:
        for parent in absent_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_images(target: Path, images: Mapping[str, Callable[[], bytes]]) -> None:
    """Writes the files, all of them or none, showing progress.

    images: {relative path: function that makes the contents}.
    """
    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else 5  # seconds between lines of progress
    with new_folder(target) as folder:
        for parent in {(folder / name).parent for name in images}:
            parent.mkdir(parents=True, exist_ok=True)
        shown = time.monotonic()
        for count, (name, contents) in enumerate(images.items(), 1):
            (folder / name).write_bytes(contents())
            last = count == len(images)
            if last or time.monotonic() > shown + interval:
                shown = time.monotonic()
                end = '\r' if terminal and not last else '\n'  # a terminal keeps one line
                print(f'{count}/{len(images)} images', end=end, file=sys.stderr, flush=True)


def is_plain(name: str) -> bool:
    """Whether it is the name of a file, without folders, on every system."""
    return (
        bool(name)
        and not name.startswith('.')
        and name.isprintable()
        and not set('/\\:') & set(name)
    )


def read_csv(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of a csv file, only the named columns; all fields must be plain names of files."""
    rows = []
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            for row in (reader := csv.DictReader(file)):
                rows.append([row[column] for column in columns])
                for name in rows[-1]:
                    if not is_plain(name):
                        where = f'{path}, line {reader.line_num}'
                        raise PreparationError(f'{where}: {name!r} is not a plain name.')
    except KeyError as error:
        wanted = ' and '.join(columns)
        raise PreparationError(f'{path} has no column {error}; it should have {wanted}.') from error
    except (csv.Error, ValueError) as error:
        raise PreparationError(f'{path} is not a csv file ({error}); get it again.') from error
    return rows


def as_path(flag: str) -> Path:
    return Path(os.path.expanduser(flag))  # shells leave --source=~/data as it is


def run(prepare: Callable[[], str]) -> None:
    """Runs a command and prints its report.

    Errors end it with one sentence and status 1, signals after cleaning up.
    """

    def stop(number, _):
        for ignored in (signal.SIGINT, signal.SIGTERM):
            # A second Ctrl-C would break off the cleaning up.
            signal.signal(ignored, signal.SIG_IGN)
        print('\nStopped; cleaning up.', file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    sys.stdout.reconfigure(errors='backslashreplace')  # as utils.print_anything
    try:
        print(prepare())
    except (PreparationError, OSError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
