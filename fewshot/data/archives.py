"""Reads files in untrusted archives, zip and tar, plain or compressed, without unpacking them.

Every member is checked before the first is read: none may be a link, or have a path that leads
elsewhere, or be larger than its limit.
"""

import bz2
import functools
import gzip
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from fewshot.data import preparation, unpickling
from fewshot.data.preparation import Item, PreparationError, blaming

# An archive's name: that of the folder it stands for, and a suffix.
ARCHIVE = re.compile(r'(.+?)(\.zip|\.tar(\.gz|\.bz2|\.xz)?|\.tgz|\.tbz2|\.txz)', re.I | re.S)
COMPRESSED = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}
MAX_ARCHIVE = 256 * 2**30  # bytes of one within another; ImageNet's classes have 0.1 GB each
MAX_MEMBERS = 2 * 10**6  # ImageNet has 1.3 million images
PICKLES = ('train', 'test', 'meta')  # of CIFAR-100, 0.2 GB; others are called NAME.pkl
MAX_PICKLE = 2**29
LIMITS = {  # {suffix: bytes of a file}; what is no image is read piece by piece, or not at all
    '.pkl': unpickling.MAX_BYTES,
    '.npz': MAX_ARCHIVE,
    '.npy': MAX_ARCHIVE,  # in these
    '.txt': 2**30,  # CUB's attributes of its images have a tenth of that
}
PIECE = 2**24  # bytes; tarfile asks for as many at once as a header claims
UNPACKABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Member(NamedTuple):
    """A file or folder as an archive describes it."""

    name: str
    size: int
    is_folder: bool
    fault: str | None  # why the archive is refused, if it is
    open: functools.partial


def check_member(member: Member, archive: str) -> None:
    """Raises PreparationError on a member that a plain archive of images does not have."""
    fault, path = member.fault, PurePosixPath(member.name)
    most = LIMITS.get(path.suffix.lower(), preparation.MAX_BYTES)
    most = MAX_PICKLE if path.name in PICKLES else most
    most = MAX_ARCHIVE if ARCHIVE.fullmatch(path.name) else most
    if not preparation.is_safe(member.name):
        fault = 'has an unsafe path'
    elif not fault and member.size > most:
        fault = f'unpacks to more than {most // 2**20} MiB'
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


def archive_items(file: BinaryIO, name: str) -> list[Item]:
    """Lists the files in an archive, after every member is checked and before the first is read.

    name: stands for the archive in messages.
    """
    items = []
    with blaming(name):
        head = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        preparation.check_no_page(head, name)
        if head.startswith(b'PK') or name.lower().endswith('.zip'):
            members = zip_members(file)
        else:
            members = tar_members(file, head)
        for member in members:
            check_member(member, name)
            path = PurePosixPath(member.name)
            if not member.is_folder and not preparation.hidden(path):
                items.append(Item(path, f'{name}: {path}', name, member.open))
            if len(items) > MAX_MEMBERS:
                raise PreparationError(f'{name} is refused: it has over {MAX_MEMBERS} files.')
    return items


def unpack(
    items: Iterable[Item], left_out: Callable[[str], bool] = lambda folder: False
) -> list[Item]:
    """Replaces archives among the items by what they hold, each in a folder of the archive's name.

    left_out: tells whether the archive that unpacks to a folder of this name is skipped.
    """
    unpacked = []
    for item in items:
        archive = ARCHIVE.fullmatch(item.path.name)
        if not archive:
            unpacked.append(item)
        elif not left_out(archive[1]):
            with blaming(item.origin):
                file = item.open()
            inside = archive_items(file, item.where)
            folder = item.path.with_name(archive[1])
            unpacked += [inner._replace(path=folder / inner.path) for inner in inside]
    return unpacked
