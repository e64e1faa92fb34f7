"""Signals and outputs of a program."""

import os
import signal
import stat
import sys
import threading
from contextlib import suppress

HANG_UP = getattr(signal, 'SIGHUP', None)  # Windows has none, and none of the last two
# SIGUSR1 or SIGUSR2: batch systems send one before they end a job.
NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2')
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def stopping_signals() -> list[int]:
    """Lists the signals that ask to stop; not SIGHUP where `nohup` has it ignored."""
    ignored = HANG_UP and signal.getsignal(HANG_UP) == signal.SIG_IGN
    return [number for number in STOPPING if not (ignored and number == HANG_UP)]


class Signals:
    """Turns `stopping_signals` into a request to stop, while entered; the second stops at once."""

    def __init__(self):
        self.received, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, _):
        if number == HANG_UP:
            leave_terminal()
        if self.received:
            sys.exit(128 + number)
        self.received = number
        print('\nStopping after this iteration; once more to stop at once.', file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_terminal():
    """Discards all output that would go to a terminal: writing to a closed one is an error."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def keeps_programs() -> bool:
    """Whether XLA keeps what it compiles in a folder of the user's, by TF_XLA_FLAGS."""
    return 'tf_xla_persistent_cache_directory' in os.environ.get('TF_XLA_FLAGS', '')


def print_anything():
    """Makes outputs print characters that their encoding does not have as \\x... from now on.

    A file's name may not be UTF-8, and an α not in ASCII: a program does not end for that.
    """
    if sys.stdout is None:  # closed by whom started this program
        sys.stdout = open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
