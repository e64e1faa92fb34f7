"""main.py from within a test, and the data it needs."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

import main
from fewshot.engine.fast import FastMAML
from fewshot.runs.flags import define_flags
from fewshot.runs.prepare import USUAL

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get('MAML_TEST_DATA', ROOT.parent / 'shared' / 'data'))
ORIGINAL = Path(os.environ.get('MAML_TEST_ORIGINAL', ROOT.parent / 'shared' / 'original'))


class Outcome(NamedTuple):
    """Of one run of a program."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def parsed(*arguments: str) -> flags.FlagValues:
    """The flags of a command line; raises flags.Error as absl does before main() is called."""
    values = flags.FlagValues()
    define_flags(values)
    values(['main.py', *arguments])
    return values


def in_process(program, *arguments) -> Outcome:
    """Calls a main function and collects what it prints and how it ends, without a process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program(*arguments)
        except SystemExit as end:  # as Python itself treats it
            status = end.code or 0
            if isinstance(end.code, str):
                print(end.code, file=err)
                status = 1
    return Outcome(status, out.getvalue(), err.getvalue())


OPTIONS = USUAL  # of `run`, which `settle` changes
TASKS = 600  # that an evaluation takes by default


def run(*arguments: str) -> Outcome:
    """main.py with these flags, in this process."""
    values = flags.FlagValues()
    define_flags(values)
    values.set_default('test_tasks', TASKS)
    return in_process(main.main, values(['main.py', *arguments]), values, OPTIONS)


def settle(patch, **changes):
    """Changes `Options` of `run`; intervals are added to those before. patch: a MonkeyPatch."""
    here = sys.modules[__name__]
    intervals = OPTIONS.intervals | changes.pop('intervals', {})
    patch.setattr(here, 'OPTIONS', OPTIONS._replace(intervals=intervals, **changes))


def evaluate_few(patch, tasks: int, updates: int = 2):
    """Fewer tasks and updates than evaluations have by default; patch: a MonkeyPatch."""
    patch.setattr(sys.modules[__name__], 'TASKS', tasks)
    settle(patch, updates=updates)


@contextlib.contextmanager
def running_eagerly(patch) -> Iterator[None]:
    """main.py uncompiled and on few tasks, for many models for a moment; patch: a MonkeyPatch."""
    settle(patch, compiled=False)
    evaluate_few(patch, 20)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


class Stop:
    """Raises a signal in the middle of some outer step."""

    def __init__(self, monkeypatch, number: int, iteration: int):
        original, count = FastMAML.steps, [0]

        def train(model, *arguments, **named):
            count[0] += 1
            if count[0] == iteration:
                signal.raise_signal(number)
            return original(model, *arguments, **named)

        monkeypatch.setattr(FastMAML, 'steps', train)


def command(script: str, *arguments) -> Outcome:
    """A script of the checkout in a process of its own."""
    line = [sys.executable, '-B', ROOT / script, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.err
    return outcome


def assert_refused(outcome: Outcome, *words: str):
    """Status 1 or 2 and, last on stderr, one sentence that has the words; no traceback."""
    assert outcome.status in (1, 2) and 'Traceback' not in outcome.err, outcome
    sentence = outcome.err.strip().splitlines()[-1]
    assert all(word in sentence for word in words), sentence


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: {relative path: (size, time of change)}."""

    def status(path: Path) -> tuple:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()

    return {path.relative_to(folder).as_posix(): status(path) for path in folder.rglob('*')}


def draw(path: Path, size: tuple[int, int], mode: str, seed: int, noise: int):
    """An image of a class: `seed` sets its shape, `noise` what the class's images differ in."""
    shape, other = (np.random.default_rng(s).random((7, 7, 3)) for s in (seed, [seed, noise]))
    small = Image.fromarray(np.uint8(255 * (0.8 * shape + 0.2 * other)))
    image = small.resize(size, Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode, dither=Image.Dither.NONE).save(path)


def make_omniglot(data: Path, characters: int = 26, images: int = 4, size: int = 28) -> Path:
    """Omniglot-like prepared data: 26 characters make 17 training, 2 validation, 7 test classes."""
    for c in range(characters):
        for i in range(images):
            folder = data / f'omniglot_resized/Alphabet{c % 2}/character{c:02d}'
            draw(folder / f'{c:04d}_{i:02d}.png', (size, size), '1', c, i)
    return data


def make_miniimagenet(
    data: Path, splits=('train', 'val', 'test'), classes: int = 2, images: int = 16
) -> Path:
    """Prepared miniImagenet-like data."""
    make_class_folders(data / 'miniImagenet', splits, classes, images)
    return data


def make_class_folders(
    folder: Path,
    splits=('train', 'val', 'test'),
    classes: int = 2,
    images: int = 16,
    size: int = 84,
):
    """FOLDER/SPLIT/CLASS/IMAGE.jpg."""
    for s, split in enumerate(splits):
        for c in range(classes):
            for i in range(images):
                path = folder / f'{split}/n{s}{c:07d}/image{i:03d}.jpg'
                draw(path, (size, size), 'RGB', 100 * s + c, i)
