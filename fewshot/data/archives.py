"""Reads files in untrusted archives, zip and tar, plain or compressed, without unpacking them.

Every member is checked before the first is read: none may be a link, or have a path that leads
elsewhere, or be larger than its limit.
"""

import bz2
import functools
import gzip
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from fewshot.data import unpickling
from fewshot.data.preparation import (
    MAX_BYTES,
    Item,
    PreparationError,
    blaming,
    check_no_page,
    hidden,
)

COMPRESSED = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}
MAX_ARCHIVE = 256 * 2**30  # bytes of one within another; ImageNet's classes have 0.1 GB each
MAX_MEMBERS = 2 * 10**6  # ImageNet has 1.3 million images
PIECE = 2**24  # bytes; tarfile asks for as many at once as a header claims
SUFFIXES = ('.zip', '.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz')
UNPACKABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Member(NamedTuple):
    """A file or folder as an archive describes it."""

    name: str
    size: int
    is_folder: bool
    fault: str | None  # why the archive is refused, if it is
    open: functools.partial


def is_safe(name: str) -> bool:
    """Whether a member's path stays within the archive, on every system."""
    printable = bool(name) and name.isprintable() and not set('\\:') & set(name)
    return printable and not name.startswith('/') and '..' not in PurePosixPath(name).parts


def limit(name: str) -> int:
    """Returns the most bytes that a member may have."""
    if name.lower().endswith('.pkl'):
        return unpickling.MAX_BYTES
    return MAX_ARCHIVE if archive_suffix(PurePosixPath(name)) else MAX_BYTES


def check_member(member: Member, archive: str, max_bytes: int) -> None:
    """Raises PreparationError on a member that a plain archive of images does not have."""
    fault = member.fault
    if not is_safe(member.name):
        fault = 'has an unsafe path'
    elif not fault and member.size > max_bytes:
        fault = f'unpacks to more than {max_bytes // 2**20} MiB'
    if fault:
        raise PreparationError(f'{archive} is refused: its member {member.name!r} {fault}.')


def zip_members(file: BinaryIO) -> Iterator[Member]:
    archive = zipfile.ZipFile(file)  # open for as long as its items are about
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # the upper half holds the Unix mode, if any
        fault = None
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = 'is a link or a device'
        elif info.compress_type not in UNPACKABLE:
            # zipfile cannot unpack the others piece by piece, so they have no bound.
            fault = 'is neither stored nor deflated'
        opened = functools.partial(archive.open, info)
        yield Member(info.orig_filename, info.file_size, info.is_dir(), fault, opened)


class Pieces:
    """A file for tarfile that refuses to read much at once.

    A header may claim any size, and tarfile would read that much into memory.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        if size > PIECE:
            raise ValueError(f'a header of {size} bytes')
        return self.file.read(size)


def tar_members(file: BinaryIO, head: bytes) -> Iterator[Member]:
    openers = [opener for magic, opener in COMPRESSED.items() if head.startswith(magic)]
    stream = Pieces(openers[0](file) if openers else file)
    archive = tarfile.TarFile(fileobj=stream)  # open for as long as its items are about
    for info in archive:
        plain = info.isdir() or (info.isreg() and not info.issparse())
        fault = None if plain else 'is a link, a device or sparse'
        opened = functools.partial(archive.extractfile, info)
        yield Member(info.name, info.size, info.isdir(), fault, opened)
    # To tarfile, whatever is no header is the end; but that has two blocks of zeros.
    stream.seek(archive.offset)
    end = stream.read(PIECE)
    if len(end) < tarfile.BLOCKSIZE or end.strip(b'\0'):
        raise tarfile.ReadError('its end is missing')
    if stream.read(1):  # and at the end of what is compressed, there is a checksum
        raise tarfile.ReadError('it goes on after its end')


def archive_items(
    file: Path | BinaryIO, name: str, limit: Callable[[str], int] = limit
) -> list[Item]:
    """Lists the files in an archive, after every member is checked and before the first is read.

    name: stands for the archive in messages. limit: maps a member's name to the bytes that it may
    have.
    """
    items = []
    with blaming(name):
        opened = file.open('rb') if isinstance(file, Path) else file
        head = opened.read(tarfile.BLOCKSIZE)
        opened.seek(0)
        check_no_page(head, name)
        if head.startswith(b'PK') or name.lower().endswith('.zip'):
            members = zip_members(opened)
        else:
            members = tar_members(opened, head)
        for member in members:
            check_member(member, name, limit(member.name))
            path = PurePosixPath(member.name)
            if not member.is_folder and not hidden(path):
                items.append(Item(path, f'{name}: {path}', name, member.open))
            if len(items) > MAX_MEMBERS:
                raise PreparationError(f'{name} is refused: it has over {MAX_MEMBERS} files.')
    return items


def unpack(
    items: Iterable[Item],
    left_out: Callable[[str], bool] = lambda folder: False,
    limit: Callable[[str], int] = limit,
) -> list[Item]:
    """Replaces archives among the items by what they hold, each in a folder of the archive's name.

    left_out: tells whether the archive that unpacks to a folder of this name is skipped.
    """
    unpacked = []
    for item in items:
        suffix = archive_suffix(item.path)
        folder = item.path.with_name(item.path.name[: -len(suffix)]) if suffix else item.path
        if not suffix:
            unpacked.append(item)
        elif not left_out(folder.name):
            with blaming(item.origin):
                file = item.open()
            inside = archive_items(file, item.where, limit)
            unpacked += [inner._replace(path=folder / inner.path) for inner in inside]
    return unpacked


def archive_suffix(path: PurePosixPath) -> str:
    """Returns the suffix of an archive's name; '' if the name is no archive's."""
    endings = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    return max(endings, key=len, default='')
