"""Decodes images once, and keeps the pixels in a file beside the data.

The file is a NumPy array, [total, height, width, channels] uint8, that `np.load` reads. The
fingerprint of the data and a checksum of the pixels follow it. It may be deleted at any time.
"""

import glob
import hashlib
import os
import secrets
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_generator import listed
from fewshot.data.image_files import ImageLayout, read_image
from fewshot.engine.cores import cores

CACHE_FORMAT = 3  # raise it when what the cache holds changes
CHUNK = 256  # images decoded and written together
DARK = 64  # what 14 bits come to if a file says that it has 16


def tell(text: str):
    """Prints a sentence for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


def cache_places(folder: Path, *parts: str, cache_dir: str | None = None) -> list[Path]:
    """Lists files that may keep the decoded images of a folder, the first choice first.

    The first is beside the folder, the second in the user's cache folder. Away from the data the
    name tells where they are, since folders of one name may be different data. cache_dir: a folder
    instead of both. parts: go into the file's name.
    """
    folder = Path(os.path.abspath(folder))  # '.' has no name
    beside = folder.with_name('.'.join([folder.name, *parts, 'cache.npy']))
    origin = hashlib.sha256(os.fsencode(beside)).hexdigest()[:16]
    name = '.'.join([folder.name, *parts, origin, 'cache.npy'])
    if cache_dir:
        return [Path(cache_dir).expanduser() / name]
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if home.startswith('~'):  # HOME is not set, and the system does not know the user
        return [beside]
    return [beside, Path(home) / 'maml-tf2' / name]


def cached_images(
    folder: Path,
    layout: ImageLayout,
    files: list[os.DirEntry],
    places: Sequence[Path],
    command: str | None = None,
) -> np.ndarray:
    """Returns the images of `files` in order, [total, height, width, channels] uint8.

    They are mapped from a cache in one of the `places`, or decoded; other arguments as in
    load_class_folders. Raises ValueError, with all their names, if images cannot be read.
    """
    key, shape = _fingerprint(folder, layout, files), layout.shape(len(files))
    for cache in places:
        images = _read_cache(cache, key, shape)
        if images is not None:
            return images
    unusable = [cache for cache in places if cache.is_file()]
    why = f': {unusable[0]} is out of date or damaged' if unusable else ''
    tell(f'Decoding the {len(files)} images of {folder}{why}.')

    failures = []
    for cache in places:
        try:
            images = _write_cache(cache, key, shape, _decode_all(files, layout, command))
        except OSError as error:
            failures.append(f'{cache} ({error.strerror or error})')
            continue
        if failures:
            tell(f'The decoded images cannot be kept in {failures[0]}, but are in {cache}.')
        return images
    tell(
        f'The decoded images cannot be kept in {" or ".join(failures)}; they will be decoded at '
        'every start. --cache_dir=FOLDER keeps them elsewhere.'
    )
    images = np.empty(shape, np.uint8)
    for i, chunk in enumerate(_decode_all(files, layout, command)):
        images[i * CHUNK : (i + 1) * CHUNK] = chunk
    return images


def _fingerprint(folder: Path, layout: ImageLayout, files: list[os.DirEntry]) -> str:
    """Computes a text that changes with the layout, and any file's name, size or time of change."""
    stored = layout._replace(suffixes=())  # the files tell those that matter
    stored = repr(stored).replace(', bits=16', '')  # as before there were others
    digest = hashlib.sha256(f'({CACHE_FORMAT}, {stored})'.encode())
    for file in files:
        status = file.stat()
        path = os.fsencode(file.path.removeprefix(str(folder)))  # the folder itself may move
        digest.update(b'%s\0%d\0%d\n' % (path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _seal(key: str, checksum: int) -> bytes:
    """Returns the bytes behind the array: the fingerprint of its images, and its checksum."""
    return f'{key} {checksum:08x}'.encode()


def _read_cache(cache: Path, key: str, shape: tuple) -> np.ndarray | None:
    """Maps the cached images into memory; None if they are absent, out of date or damaged.

    A wrong pixel would go unnoticed without the checksum. It takes 0.6 s for 38,400 images of
    84x84x3, and training reads them anyway.
    """
    try:
        with open(cache, 'rb') as file:
            file.seek(-len(_seal(key, 0)), os.SEEK_END)
            seal = file.read()
        images = np.asarray(np.load(cache, mmap_mode='r'))
        fits = seal.startswith(key.encode()) and images.shape == shape and images.dtype == np.uint8
        return images if fits and seal == _seal(key, zlib.crc32(images)) else None
    except Exception:  # whatever is wrong with a cache, it can be made again
        return None


def _write_cache(cache: Path, key: str, shape: tuple, chunks: Iterator[np.ndarray]) -> np.ndarray:
    """Writes the chunks as they come, as data may be larger than memory; returns the cached images.

    The file is renamed when it is complete, so processes that write or read the same cache do not
    disturb each other. It is written, not mapped: on a full disk a write raises OSError, but a
    mapped page kills the process.
    """
    unfinished = cache.with_name(f'{cache.name}.{secrets.token_hex(4)}.tmp')
    header, checksum = {'descr': '|u1', 'fortran_order': False, 'shape': shape}, 0
    cache.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    try:
        with open(unfinished, 'xb') as file:
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk)
                checksum = zlib.crc32(chunk, checksum)
            file.write(_seal(key, checksum))
        unfinished.replace(cache)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    images = _read_cache(cache, key, shape)
    if images is None:
        raise OSError('another process changed it')
    return images


def _remove_leftovers(cache: Path):
    """Removes the files of processes that were killed; a live one writes all the time."""
    for leftover in cache.parent.glob(f'{glob.escape(cache.name)}.*.tmp'):
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink()


def _decode_all(
    files: list[os.DirEntry], layout: ImageLayout, command: str | None
) -> Iterator[np.ndarray]:
    """Yields the decoded files, [CHUNK, height, width, channels] uint8; all cores decode.

    Says which images of the user's own are nearly black. Raises ValueError at the end if some
    cannot be decoded, so that all can be replaced at once.
    """
    failed, dark = [], []  # (path, error), paths

    def decoded(file: os.DirEntry) -> np.ndarray | None:
        try:
            image = read_image(file.path, layout, command)
        except ValueError as error:
            failed.append((file.path, error))
            return None
        if image.max() < DARK and not layout.prepared:
            dark.append(file.path)
        return image

    with ThreadPoolExecutor(cores()) as pool:
        for first in range(0, len(files), CHUNK):
            images = [*pool.map(decoded, files[first : first + CHUNK])]
            if not failed:
                yield np.stack(images)
            if sys.stderr.isatty():
                done = first + len(images)
                end = '\r' if done < len(files) else '\n'
                print(f'{done} of {len(files)}', end=end, file=sys.stderr)
    if failed:
        (_, error), *others = sorted(failed)
        more = f' ({len(others)} more cannot be read: {listed([path for path, _ in others])})'
        raise ValueError(f'{error}{more if others else ""}') from error
    if dark:
        tell(
            f'{len(dark)} images are nearly black, with no value above {DARK - 1} of 255: '
            f'{listed(sorted(dark))}.'
        )
