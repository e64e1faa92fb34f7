"""Writes images out of untrusted archives into a folder, for all prepare_*.py.

The folder is whole or absent, never half made. Images are read from the archives one at a time, in
memory; nothing is unpacked to disk. One thread does it all, in seconds: with images this small most
of the work is Python's own, and more threads, which take turns at it, are slower.
"""

import collections
import contextlib
import csv
import functools
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import filterfalse
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fewshot.data.entries import is_stray

SPLITS = ('train', 'val', 'test')
MAX_BYTES = 32 * 2**20  # of one image; ImageNet's largest has half of that


class PreparationError(Exception):
    """Bad source or target; the text is one sentence for the user."""


class Item(NamedTuple):
    """A file of the source."""

    path: PurePosixPath  # inside its archive or folder
    where: str  # for messages
    origin: str  # the file to get again if it is damaged: itself, or its archive
    open: Callable[[], BinaryIO]

    def read(self) -> bytes:
        """Reads all of an image or of another small file. Raises PreparationError."""
        with blaming(self.origin), self.open() as file:
            # A header's size is only a claim; at the end of a zip's member, the CRC is checked.
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PreparationError(f'{self.where} is too large for an image.')
        return data


@contextlib.contextmanager
def blaming(what: str, fault: str = 'is damaged or cannot be read') -> Iterator[None]:
    """Turns errors into PreparationError: damaged archives and files raise nearly all kinds."""
    try:
        yield
    except (PreparationError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = 'of no format it may have'
        raise PreparationError(f'{what} {fault} ({reason}); get it again.') from error


def hidden(path: PurePath) -> bool:
    """Whether a path is hidden, or one that a system adds to archives and folders."""
    return any(map(is_stray, path.parts))


def is_web_page(data: bytes) -> bool:
    """Whether data begin as HTML, which servers send in place of a file that they refuse."""
    start = data.removeprefix(b'\xef\xbb\xbf').lstrip()[:15].lower()
    return start.startswith((b'<!doctype html', b'<html', b'<head', b'<?xml'))


def check_no_page(data: bytes, name: str) -> None:
    """Raises PreparationError if data begin as a web page does."""
    if is_web_page(data):
        raise PreparationError(
            f'{name} is a web page, in the place of the file that was to be downloaded; get that '
            'with a browser.'
        )


def all_items(source: Path, depth: int) -> list[Item]:
    """Lists a file, or those in a folder and `depth` levels below it, links followed, in order."""
    files = [(source, PurePosixPath(source.name))] if source.is_file() else []
    for parent, folders, names in os.walk(source, followlinks=True):
        inner = PurePosixPath(Path(parent).relative_to(source).as_posix())
        # A link may lead in circles.
        folders[:] = sorted(filterfalse(is_stray, folders)) if len(inner.parts) < depth else []
        visible = sorted(filterfalse(is_stray, names))
        files += [(Path(parent, name), inner / name) for name in visible]
    return [
        Item(inner, str(path), str(path), functools.partial(path.open, 'rb'))
        for path, inner in files
    ]


def check_source(source: Path | None):
    """Raises PreparationError if there is no --source, but one is given."""
    if source and not source.is_dir() and not source.is_file():
        raise PreparationError(f'--source={source} is neither a folder nor an archive.')


def png(pixels: np.ndarray) -> bytes:
    """Encodes an image [height, width, 3] uint8 as a PNG.

    Level 1 is twice as fast as the default, and photos get no larger.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG', compress_level=1)
    return file.getvalue()


@contextlib.contextmanager
def decoded(item: Item, data: bytes, *formats: str) -> Iterator[Image.Image]:
    """Opens the image in the data of an item, of one of the formats, without loading it.

    Errors, here and while entered, become a PreparationError that names the image.
    """
    with blaming(item.where, 'cannot be decoded'):
        yield Image.open(io.BytesIO(data), formats=formats)


def is_prepared(target: Path, complete: Callable[[set[str]], bool], size: tuple[int, int]) -> bool:
    """Whether the target holds all that would be written.

    complete: judges the relative paths; size: each image's. Returns False if there is nothing yet.
    Raises PreparationError if there is anything else, which is never overwritten.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    files = (path.relative_to(target) for path in target.rglob('*') if not path.is_dir())
    paths = {path.as_posix() for path in files if not hidden(path)}
    if complete(paths) and all(has_size(target / path, size) for path in paths):
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
def parents_of(path: Path) -> Iterator[None]:
    """Makes the folders above a path; an exception removes those that it made and are empty."""
    absent = [parent for parent in path.parents if not parent.exists()]  # nearest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in absent:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Makes an empty folder beside the target, and renames it to the target at the end.

    After an exception nothing of it is left.
    """
    target = Path(os.path.realpath(target))  # the target may be a link to a larger disk
    beside = dict(prefix=f'.{target.name}.', dir=target.parent)
    with parents_of(target), tempfile.TemporaryDirectory(**beside) as private:
        folder = Path(private, target.name)  # one deeper: the upper is closed to others
        folder.mkdir()
        yield folder
        os.rename(folder, target)


class Progress:
    """Prints lines on stderr, now and then; a terminal keeps one of them."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.interval = 0.1 if self.terminal else 5  # seconds
        self.shown = time.monotonic()

    def show(self, text: str, last: bool = False):
        if last or time.monotonic() > self.shown + self.interval:
            self.shown = time.monotonic()
            end = '\r' if self.terminal and not last else '\n'
            print(text, end=end, file=sys.stderr, flush=True)


def write_images(target: Path, images: Mapping[str, Callable[[], bytes]]) -> None:
    """Writes the files, all of them or none, showing progress.

    images: {relative path: function that makes the contents}.
    """
    with new_folder(target) as folder:
        for parent in {(folder / name).parent for name in images}:
            parent.mkdir(parents=True, exist_ok=True)
        progress = Progress()
        for count, (name, contents) in enumerate(images.items(), 1):
            (folder / name).write_bytes(contents())
            progress.show(f'{count}/{len(images)} images', last=count == len(images))


def classes_of(paths: Iterable[str]) -> collections.Counter:
    """Returns {split: its number of classes} of paths SPLIT/CLASS/NAME."""
    labels = {path.rpartition('/')[0] for path in paths}
    return collections.Counter(label.partition('/')[0] for label in labels)


def fault_of_classes(paths: Iterable[str], classes: Mapping[str, int]) -> str | None:
    """Tells which split of paths SPLIT/CLASS/NAME lacks classes or has too many; None if none."""
    counts = classes_of(paths)
    for split in {**classes, **counts}:
        if counts[split] != (wanted := classes.get(split, 0)):
            return f'{counts[split]} classes of {split} instead of {wanted}'
    return None


def write_splits(target: Path, images: Mapping[str, Callable[[], bytes]], size: tuple) -> str:
    """Writes the images {SPLIT/CLASS/NAME: function}, unless they are there; returns a report."""
    if is_prepared(target, lambda paths: paths == images.keys(), size):
        return f'{target} is complete already; nothing to do.'
    write_images(target, images)
    classes, counts = classes_of(images), collections.Counter(path.split('/')[0] for path in images)
    sizes = [f'{split} {classes[split]} classes, {counts[split]} images' for split in SPLITS]
    return f'{target}: {"; ".join(sizes)}.'


def by_path(found: Iterable[tuple[str, Item]]) -> dict[str, Item]:
    """Returns {path: item}. Raises PreparationError if two have the same, or it is no plain one."""
    items = {}
    for path, item in found:
        if not all(map(is_plain, path.split('/'))):
            raise PreparationError(f'{item.where} has no plain name; give it one.')
        if (first := items.setdefault(path, item)) is not item:
            both = f'{first.where} and {item.where}'
            raise PreparationError(f'{both} are both the same image; take one away.')
    return items


def is_safe(name: str) -> bool:
    """Whether a path stays within its archive or folder, on every system."""
    printable = bool(name) and name.isprintable() and not set('\\:') & set(name)
    return printable and not name.startswith('/') and '..' not in PurePosixPath(name).parts


def is_plain(name: str) -> bool:
    """Whether a name is that of a visible file, without folders, on every system."""
    return is_safe(name) and not name.startswith('.') and '/' not in name


def read_csv(item: Item, columns: tuple[str, ...]) -> list[list[str]]:
    """Reads the named columns of a csv file, row by row; all fields must be plain file names."""
    rows, where, data = [], item.where, item.read()
    check_no_page(data, where)
    try:
        reader = csv.DictReader(io.StringIO(data.decode('utf-8-sig'), newline=''))
        for row in reader:
            rows.append([row[column] for column in columns])
            for name in filterfalse(is_plain, rows[-1]):
                line = f'{where}, line {reader.line_num}'
                raise PreparationError(f'{line}: {name!r} is not a plain name.')
    except KeyError as error:
        fault = f'has no column {error}; it should have {" and ".join(columns)}'
        raise PreparationError(f'{where} {fault}.') from error
    except (csv.Error, ValueError) as error:
        raise PreparationError(f'{where} is not a csv file ({error}); get it again.') from error
    return rows


def as_path(flag: str) -> Path:
    """Returns the path that a flag names. Exits if the home folder in it is not known."""
    path = os.path.expanduser(flag)  # shells leave --source=~/data as it is
    if path.startswith('~'):
        sys.exit(f'{Path(sys.argv[0]).name}: the home folder in {flag} is not known: set HOME')
    return Path(path)


def run(arguments: list[str], prepare: Callable[[], str]) -> None:
    """Runs a command and prints its report; arguments: those that absl left.

    Errors end it with one sentence and status 1, signals after cleaning up.
    """
    if len(arguments) > 1:
        raise SystemExit(f'Unexpected argument {arguments[1]!r}; see --help.')

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
    except MemoryError:
        sys.exit(f'{Path(sys.argv[0]).name}: there is not enough memory')
