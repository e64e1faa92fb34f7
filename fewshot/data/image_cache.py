"""Images are decoded once; the pixels are kept beside the data."""

import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_generator import listed
from fewshot.data.image_files import ImageLayout, read_image
from fewshot.engine.devices import cores


def _tell(text: str):
    print(text, file=sys.stderr, flush=True)


CACHE_FORMAT = 2  # raise it when what the cache holds changes
CHUNK = 256  # images decoded, written and checksummed together


def _cache_places(cache: Path, cache_dir: str | None) -> list[Path]:
    """Where decoded images may be kept, the first choice first.

    cache: beside the data. cache_dir: another folder, instead. Away from the data the name tells
    where they are, since folders of one name may be different data.
    """
    place = os.fsencode(cache)
    name = f'{cache.stem}.{hashlib.sha256(place).hexdigest()[:16]}{cache.suffix}'
    if cache_dir:
        return [Path(cache_dir).expanduser() / name]
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return [cache, Path(home) / 'maml-tf2' / name]


def _cached_images(
    folder: Path,
    layout: ImageLayout,
    places: Sequence[Path],
    files: list[os.DirEntry],
    command: str | None,
) -> np.ndarray:
    """The images of `files` in order, mapped from a cache, else decoded.

    Returns [total, height, width, channels] uint8.
    """

    def decode(file: os.DirEntry) -> np.ndarray:
        return read_image(file.path, layout, command)

    def decoded() -> Iterator[np.ndarray]:
        _tell(f'Decoding the {len(files)} images of {folder}.')
        try:
            yield from _decode_all(files, decode)
        except ValueError as error:  # so that all can be replaced at once
            others = _unreadable(files, decode)[1:]
            more = f' ({len(others)} more cannot be read: {listed(others)})' if others else ''
            raise ValueError(f'{error}{more}') from error

    key, shape = _fingerprint(folder, layout, files), layout.shape(len(files))
    for cache in places:
        images = _read_cache(cache, key, shape)
        if images is not None:
            return images
    cache = _keep(places, key, decoded)
    images = _read_cache(cache, key, shape) if cache else None
    if images is not None:
        return images
    images = np.empty(shape, np.uint8)
    for place, chunk in zip(_chunks(images), decoded()):
        place[:] = chunk
    return images


def _keep(
    places: Sequence[Path], key: str, decoded: Callable[[], Iterator[np.ndarray]]
) -> Path | None:
    """Writes the cache at the first place where it can be, and returns that."""
    failures = []
    for cache in places:
        try:
            _write_cache(cache, key, decoded())
        except OSError as error:
            failures.append(f'{cache} ({error.strerror or error})')
            continue
        if failures:
            _tell(f'The decoded images cannot be kept in {failures[0]}, but are in {cache}.')
        return cache
    _tell(
        f'The decoded images cannot be kept in {" or ".join(failures)}; they will be decoded at '
        'every start. --cache_dir=FOLDER keeps them elsewhere.'
    )
    return None


def _fingerprint(folder: Path, layout: ImageLayout, files: list[os.DirEntry]) -> str:
    """Changes when the layout or any file's name, size or time of change does."""
    digest = hashlib.sha256(f'({CACHE_FORMAT}, {layout.key()})'.encode())
    for file in files:
        status = file.stat()
        path = os.fsencode(file.path.removeprefix(str(folder)))  # the folder itself may move
        digest.update(b'%s\0%d\0%d\n' % (path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _read_cache(cache: Path, key: str, shape: tuple) -> np.ndarray | None:
    """The cached images, memory-mapped; None if they are absent, out of date or damaged."""
    try:
        index = json.loads((cache / 'index.json').read_bytes())
        if index['key'] != key:
            return None
        if (cache / 'images.raw').stat().st_size != math.prod(shape):
            raise ValueError('wrong size')
        images = np.asarray(np.memmap(cache / 'images.raw', np.uint8, 'r', shape=shape))
        with ThreadPoolExecutor(cores()) as pool:
            if list(pool.map(zlib.crc32, _chunks(images))) != index['checksums']:
                raise ValueError('wrong checksum')
        return images
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever is wrong with a cache, it can be made again
        print(f'The cache {cache} is damaged ({error}) and is not used.', file=sys.stderr)
        return None


def _write_cache(cache: Path, key: str, chunks: Iterator[np.ndarray]):
    """Writes the chunks as they come, so that data larger than memory will do.

    The files get their names at the end, and the index, which holds the checksums of the images,
    goes last: whatever happens before, they do not match.
    """
    images, index = (cache / f'{name}.{os.getpid()}.tmp' for name in ('images.raw', 'index.json'))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        with open(images, 'wb') as file:
            checksums = [zlib.crc32(chunk) for chunk in chunks if file.write(chunk)]
        index.write_text(json.dumps({'key': key, 'checksums': checksums}))
        images.replace(cache / 'images.raw')
        index.replace(cache / 'index.json')
    finally:
        with suppress(OSError):
            images.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            cache.rmdir()  # only if nothing is in it


def _remove_leftovers(cache: Path):
    """Removes the files of processes that were killed; a live one writes all the time."""
    for leftover in cache.glob('*.tmp'):
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink()


def _decode_all(
    files: list[os.DirEntry], decode: Callable[[os.DirEntry], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the decoded files, [CHUNK, height, width, channels] uint8, showing the progress.

    All cores decode, some chunks ahead: if all were, those that wait would fill the memory.
    """

    def decode_chunk(chunk: list[os.DirEntry]) -> np.ndarray:
        return np.stack([decode(file) for file in chunk])

    chunks, workers, done = _chunks(files), cores(), 0
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(chunks), 8 * workers):
            for images in pool.map(decode_chunk, chunks[first : first + 8 * workers]):
                yield images
                done += len(images)
                if sys.stderr.isatty():
                    end = '\n' if done == len(files) else '\r'
                    print(f'{done} of {len(files)}', end=end, file=sys.stderr)


def _unreadable(files: list[os.DirEntry], decode: Callable[[os.DirEntry], np.ndarray]) -> list[str]:
    """The paths of the files that cannot be decoded."""

    def fails(file: os.DirEntry) -> bool:
        try:
            decode(file)
        except ValueError:
            return True
        return False

    with ThreadPoolExecutor(cores()) as pool:
        return [file.path for file, failed in zip(files, pool.map(fails, files)) if failed]


def _chunks(items: Sequence) -> list[Sequence]:
    """Successive stretches of CHUNK items, the last one of what is left."""
    return [items[first : first + CHUNK] for first in range(0, len(items), CHUNK)]
