"""What the tests of data preparation serve and pack: pickles, members of archives, a web server."""

import contextlib
import http.server
import io
import os
import pickle
import re
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

from command_line import run, succeeded


def put(path: Path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class Python2(pickle._Pickler):
    """Writes texts and bytes as Python 2 does, where they are one."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(b'T' + struct.pack('<i', len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_text


def dumps2(value) -> bytes:
    file = io.BytesIO()
    Python2(file, 2).dump(value)
    return file.getvalue()


class Calls:
    """Unpickled by Python itself, it makes a file."""

    def __reduce__(self):
        return os.system, ('touch called',)


def train_on(folder: Path, place: Path):
    """Trains on class folders of photos and evaluates, both by main.py, in little time."""
    flags = '--num_classes=2 --update_batch_size=1 --num_query=1 --meta_batch_size=2'.split()
    flags += ['--datasource=folder', '--image_size=84', '--num_filters=4', '--max_pool=True']
    flags += [f'--data_dir={folder}', f'--logdir={place}/logs', '--metatrain_iterations=2']
    succeeded(run(*flags))
    (run_folder,) = (place / 'logs').iterdir()
    succeeded(run('--train=False', '--test_set=True', f'--run={run_folder}', '--test_tasks=2'))


def link(name='train/n0/a.jpg', to='/etc/passwd', kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def named(name):
    info = tarfile.TarInfo(name)
    info.size = 3
    return info


class Server(http.server.BaseHTTPRequestHandler):
    """Serves bytes by their path, parts of them too."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        served = self.server.served
        self.server.asked.append((self.path, self.headers.get('Range')))
        if self.path not in served:
            return self.send_error(404)
        data, first = served[self.path], 0
        part = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if part and self.server.resumes:
            first = int(part[1])
            if first >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {first}-{len(data) - 1}/{len(data)}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(data) - first))
        self.end_headers()
        last = self.server.breaks.pop() if self.server.breaks else len(data)
        self.wfile.write(data[first:last])


@contextlib.contextmanager
def serving() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server that serves what `served` has, {path: bytes}, at its `address`.

    resumes: whether it can go on within a file; breaks: after how many bytes of it each answer
    ends, from the last on; asked: what was asked for.
    """
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        server.address = f'http://127.0.0.1:{server.server_port}'
        server.served, server.resumes, server.breaks, server.asked = {}, True, [], []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
