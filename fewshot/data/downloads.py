"""Downloads files from a web server: resumes broken downloads, and checks the md5."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fewshot.data.preparation import PreparationError, Progress, is_web_page, parents_of

TIMEOUT = 60  # seconds without a byte
PIECE = 2**20  # bytes
FAILURES = (OSError, ValueError, http.client.HTTPException)


class Remote(NamedTuple):
    """A file on a server."""

    name: str
    address: str
    md5: str  # hexadecimal
    max_bytes: int


@contextlib.contextmanager
def folder_beside(target: Path, names: Iterable[str]) -> Iterator[Path]:
    """Makes TARGET.download, whose files a later call resumes if this one does not finish.

    At the end the files of these names are removed, and the folder if nothing else is in it.
    """
    target = Path(os.path.realpath(target))
    folder = target.with_name(f'{target.name}.download')
    with parents_of(folder):
        folder.mkdir(exist_ok=True)
        try:
            yield folder
            for name in names:
                (folder / name).unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing is in it


def read_small(address: str, max_bytes: int, advice: str) -> bytes:
    """Reads what an address has, at most `max_bytes`. Raises PreparationError.

    advice: the end of the error's sentence.
    """
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            return response.read(max_bytes)
    except FAILURES as error:
        raise failed(address, error, advice) from error


def failed(address: str, error: Exception, advice: str) -> PreparationError:
    return PreparationError(f'{address} cannot be downloaded ({error}); {advice}')


def digest(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open('rb') as file:
        while data := file.read(PIECE):
            md5.update(data)
    return md5.hexdigest()


def fetch(remote: Remote, folder: Path, advice: str) -> Path:
    """Downloads a file to the folder; the bytes that are there already are not fetched again.

    advice: the end of the error's sentences.
    Raises PreparationError, after which the folder holds the file's beginning, if it is good.
    """
    path = folder / remote.name
    if path.exists() and digest(path) == remote.md5:
        return path
    print(f'Downloading {remote.address}', file=sys.stderr)
    try:
        receive_all(remote, path)
        complete = digest(path) == remote.md5
    except FAILURES as error:
        if path.exists() and not path.stat().st_size:
            path.unlink()
        raise failed(remote.address, error, advice) from error
    if not complete:
        with path.open('rb') as file:
            page = is_web_page(file.read(PIECE))
        path.unlink()
        sent = 'sent a web page in place of it' if page else 'has another md5'
        raise PreparationError(
            f'{remote.address} is not the official file, whose md5 is {remote.md5}: the server '
            f'{sent}; {advice}'
        )
    return path


def receive_all(remote: Remote, path: Path) -> None:
    """Receives the rest of a file, again and again as long as some bytes come."""
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            return receive(remote, path, before)
        except FAILURES:
            if not path.exists() or path.stat().st_size <= before:
                raise


def receive(remote: Remote, path: Path, start: int) -> None:
    """Receives a file from a byte on, or from its beginning if the server cannot do that."""
    request = urllib.request.Request(remote.address)
    if start:
        request.add_header('Range', f'bytes={start}-')
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        path.unlink()  # it has more than the server's
        return receive(remote, path, 0)
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
            raise ValueError('the server sent another part than it was asked for')
        with path.open('ab' if resumed else 'wb') as file:
            write(response, file, remote)


def write(response: http.client.HTTPResponse, file: BinaryIO, remote: Remote) -> None:
    """Appends the bytes that come, showing progress."""
    done, length = file.tell(), response.headers.get('Content-Length')
    total = done + int(length) if length else None
    of = f' of {total / 1e6:.0f}' if total else ''
    progress = Progress()
    while data := response.read(PIECE):
        done += file.write(data)
        if done > remote.max_bytes:
            file.truncate(0)
            raise ValueError(f'it has more than {remote.max_bytes} bytes')
        progress.show(f'{remote.name}: {done / 1e6:.0f}{of} MB', last=done == total)
    if total and done < total:
        raise OSError(f'the connection broke off after {done} of {total} bytes')
