#!/usr/bin/env python
"""Starts several workers of --strategy=multi_worker on this machine, for trial.

    python scripts/launch_workers.py N [--pin] -- FLAGS

is N processes `python main.py FLAGS --strategy=multi_worker` that talk to each other over ports of
127.0.0.1. --pin gives each a core of its own. What the first one prints is shown, and what any of
them has to say of errors. If one ends with an error the others are ended too, and all of them
when this process is gone. SIGINT, SIGTERM and the like are passed on: the run is saved and can be
continued.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fewshot.runs.terminal import stopping_signals

MAIN = Path(__file__).resolve().parents[1] / 'main.py'
GRACE = 20  # seconds that the others have to end by themselves


def free_ports(count: int) -> list[int]:
    """Finds different ports, which other processes could take before their use, but hardly will."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(('127.0.0.1', 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(index: int, ports: list[int], flags: list[str], pin: bool) -> subprocess.Popen:
    """Starts one worker, in a group of its own, so that Ctrl-C reaches it from here only."""
    cluster = {
        'cluster': {'worker': [f'127.0.0.1:{port}' for port in ports]},
        'task': {'type': 'worker', 'index': index},
    }
    cores = sorted(os.sched_getaffinity(0)) if pin else []

    def settle():
        os.setpgrp()
        if sys.platform == 'linux':  # a worker ends when its launcher is gone
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if pin:
            os.sched_setaffinity(0, {cores[index % len(cores)]})

    return subprocess.Popen(
        [sys.executable, MAIN, *flags, '--strategy=multi_worker'],
        env={**os.environ, 'TF_CONFIG': json.dumps(cluster)},
        preexec_fn=settle,
    )


def running(workers: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [worker for worker in workers if worker.poll() is None]


def wait(workers: list[subprocess.Popen]) -> int:
    """Waits until all have ended, and returns the first status that is not zero.

    -9 of a process that was killed becomes 137, as in a shell.
    """
    status, ended = 0, False
    while not ended:
        time.sleep(0.1)
        ended = not running(workers)
        if not status:
            status = next((worker.returncode for worker in workers if worker.returncode), 0)
            deadline = time.monotonic() + GRACE
        if status and time.monotonic() > deadline:
            for worker in running(workers):
                worker.kill()
    return 128 - status if status < 0 else status


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns this script's own arguments, and the flags for main.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='launch_workers.py N [--pin] -- FLAGS',
    )
    parser.add_argument('count', type=int, metavar='N')
    parser.add_argument('--pin', action='store_true', help='a core of its own for each worker')
    own, flags = arguments, []
    if '--' in arguments:  # argparse would not have options before it and flags after
        end = arguments.index('--')
        own, flags = arguments[:end], arguments[end + 1 :]
    values = parser.parse_args(own)
    if values.count < 1:
        sys.exit(f'launch_workers.py: N must be at least 1, but it is {values.count}')
    if values.pin and not hasattr(os, 'sched_setaffinity'):
        sys.exit('launch_workers.py: --pin needs Linux, where processes can be given cores')
    return values, flags


def main():
    values, flags = parse(sys.argv[1:])
    workers = []

    def forward(number, _):
        for worker in running(workers):
            worker.send_signal(number)

    for number in stopping_signals():
        signal.signal(number, forward)
    try:
        ports = free_ports(values.count)
        for index in range(values.count):
            workers.append(start(index, ports, flags, values.pin))
    except OSError as error:
        for worker in workers:
            worker.kill()
        sys.exit(f'launch_workers.py: {values.count} processes cannot be started ({error})')
    sys.exit(wait(workers))


if __name__ == '__main__':
    main()
