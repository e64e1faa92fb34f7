"""Trains with an exported outer step by JAX's runtime, on whatever device that has.

It needs JAX and NumPy, but not TensorFlow: the folder has all else, see fewshot.runs.transfer.
"""

import collections
import contextlib
import dataclasses
import json
import os
import platform
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import data_generator
from data_generator import Batch, ClassImages, DataGenerator

SIGNATURE, PROGRAM, IMAGES = 'signature.json', 'step.mlir', 'images.npy'
THREADS, AHEAD = 4, 16  # that draw meta-batches; meta-batches that are drawn ahead
SHOWN = 100  # iterations between printed lines
# Of the first loss. In three of the paper's cells float32's rounding changed it by up to 2e-4 of
# it, and TF32's, done to the factors on a CPU, by 2e-3 to 4e-2.
TOLERANCE = 1e-3

State = dict[str, np.ndarray]  # or arrays of JAX


def read_signature(folder: Path) -> dict:
    """Reads what an exported folder tells of itself. Raises ValueError if it is none."""
    try:
        return json.loads((folder / SIGNATURE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{folder} holds no exported step: make it by `python scripts/device/transfer.py '
            'export FOLDER FLAGS`'
        ) from error


# States -------------------------------------------------------------------------------------------


def states(folder: Path) -> dict[int, Path]:
    """Returns {iterations done: path} of the states in a folder, the oldest first."""
    found = (re.fullmatch(r'state(\d+)\.npz', path.name) for path in folder.glob('state*.npz'))
    return {done: folder / f'state{done}.npz' for done in sorted(int(m[1]) for m in found if m)}


def read_state(path: Path, signature: dict) -> tuple[State, str]:
    """Reads a state, and which machine wrote it. Raises ValueError if it is of another step."""
    try:
        with np.load(path) as stored:
            state = {name: stored[name] for name in stored if name != 'machine'}
            machine = str(stored['machine'])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} cannot be read as a state ({error}): remove it') from error
    shapes = {name: [*array.shape] for name, array in state.items()}
    if shapes != signature['state']:
        raise ValueError(f'{path} is of a step with other flags: it does not belong to {SIGNATURE}')
    return {name: state[name] for name in signature['state']}, machine


def write_state(folder: Path, done: int, state: State, machine: str):
    """Writes FOLDER/state{done}.npz whole or not at all. Raises OSError."""
    path = folder / f'state{done}.npz'
    beside = path.with_suffix('.part')
    try:
        with open(beside, 'wb') as file:
            np.savez(file, machine=machine, **state)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# The step, and its tasks --------------------------------------------------------------------------


def load_source(folder: Path, signature: dict) -> DataGenerator:
    """Returns the source of the training tasks, which draws the same ones as main.py."""
    make = getattr(data_generator, signature['generator'])
    if not (sizes := signature['classes']):
        return make(**signature['arguments'])
    counts = np.array([*sizes.values()])
    images = np.load(folder / IMAGES, mmap_mode='r')
    classes = ClassImages(str(folder), [*sizes], np.cumsum(counts) - counts, counts, images)
    return make({'train': classes}, **signature['arguments'])


def load_step(program: str, batch: Batch, state: State, written: list[str]) -> Callable:
    """Compiles an exported step for JAX's device: (batch, state) -> (loss, new state).

    The arguments are those of fewshot.engine.export.Step, and a meta-batch of its sizes. The state
    that is given to the step is not there any more afterwards. Raises ValueError if this version of
    JAX cannot read the program.
    """
    import jax
    import jax.export
    from jax.extend.mlir.dialects import stablehlo

    jax.config.update('jax_enable_x64', True)  # statistics of images are sums of float64
    version = stablehlo.get_current_version()
    try:
        artifact = stablehlo.serialize_portable_artifact_str(program, version)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'JAX {jax.__version__} cannot read the program ({error})') from error

    def results(*_) -> list:
        return [
            jax.numpy.zeros(a.shape, a.dtype) for a in (np.float32(0), *map(state.get, written))
        ]

    # JAX takes programs that it has exported; this one gets the place of one with its arguments.
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*batch, *state.values())]
    other = jax.export.export(jax.jit(results, keep_unused=True))(*arguments)
    exported = dataclasses.replace(other, mlir_module_serialized=artifact)
    names = [*state]  # JAX sorts those of a dict

    def step(batch: Batch, state: State) -> tuple:
        loss, *values = exported.call(*batch, *(state[name] for name in names))
        return loss, state | dict(zip(written, values))

    return jax.jit(step, donate_argnums=1)


def device() -> str:
    """Describes JAX's device in a few words."""
    import jax

    parts = jax.devices()[0].device_kind, platform.machine(), f'Python {platform.python_version()}'
    return ', '.join([*parts, f'JAX {jax.__version__}'])


# Training -----------------------------------------------------------------------------------------


def ahead(draw: Callable, arguments: Iterable) -> Iterator:
    """Yields draw(argument) for each, drawn by threads while those before are in use."""
    pool, coming = ThreadPoolExecutor(THREADS), collections.deque()
    try:
        for argument in arguments:
            coming.append(pool.submit(draw, argument))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Training:
    """Trains from the newest state of an exported folder on, on the tasks that main.py would draw.

    save: iterations between states. When a state is written the one before is removed, except the
    first and one every `keep` iterations, by default a tenth of the run. Raises ValueError for a
    folder that cannot be trained in.
    """

    def __init__(self, folder: Path, save: int = 1000, keep: int | None = None):
        self.folder, self.save = folder, save
        self.signature = read_signature(folder)
        self.start, self.end = self.signature['start'], self.signature['end']
        self.keep = keep or -(-self.end // 10)
        needed = [PROGRAM, IMAGES] if self.signature['classes'] else [PROGRAM]
        found, missing = states(folder), [name for name in needed if not (folder / name).exists()]
        if missing or not found:
            what = missing[0] if missing else 'stateN.npz'
            raise ValueError(f'{folder} has no {what}: copy all of it, or export it again')
        self.done = max(found)
        self.state, _ = read_state(found[self.done], self.signature)

    def run(self, stopped: Callable = lambda: False) -> int:
        """Trains to the end, or until `stopped()`; returns the number of iterations done.

        Raises ValueError if the device computes another first loss than TensorFlow did,
        FloatingPointError if training diverges, and OSError if a state cannot be written.
        """
        source, tasks = load_source(self.folder, self.signature), self.signature['tasks']
        batches = ahead(lambda i: source.batch('train', i, tasks), range(self.done, self.end))
        program, step = (self.folder / PROGRAM).read_text(), None
        losses, self.clock = [], time.perf_counter()
        with contextlib.closing(batches):
            for batch in batches:
                step = step or load_step(program, batch, self.state, self.signature['written'])
                loss, self.state = step(batch, self.state)
                if self.done == self.start:
                    self.check_first(float(loss))
                self.done += 1
                losses.append(loss)  # no number yet: the device may still compute it
                last = self.done == self.end or stopped()
                if self.done % SHOWN == 0 or last:
                    self.report(losses)
                    losses = []
                if self.done % self.save == 0 or self.done % self.keep == 0 or last:
                    self.write()
                if last:
                    break
        return self.done

    def check_first(self, loss: float):
        """Raises ValueError if the loss of the first iteration is not what TensorFlow has."""
        expected = self.signature['loss']
        print(f'First loss on {device()}: {loss:.6f}; by TensorFlow: {expected:.6f}', flush=True)
        if not np.isclose(loss, expected, rtol=TOLERANCE, atol=TOLERANCE / 10):
            raise ValueError(
                f'the first loss is {loss:.6f} here and {expected:.6f} by TensorFlow, so this '
                'device computes something else: see that it rounds no factors of products'
            )

    def report(self, losses: list):
        """Prints the mean loss since the last line. Raises FloatingPointError if it is none."""
        mean = float(np.mean([float(loss) for loss in losses]))
        if not np.isfinite(mean):
            self.stop(f'a loss is {mean} before iteration {self.done}')
        now, progress = time.perf_counter(), f'{self.done} of {self.end} iterations'
        speed, self.clock = len(losses) / (now - self.clock), now
        print(f'{progress}: loss {mean:.5f}, {speed:.1f} iterations per second', flush=True)

    def write(self):
        """Writes the state, and removes the one before if it is not to be kept."""
        arrays = {name: np.asarray(value) for name, value in self.state.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            self.stop(f'a weight is not a number after {self.done} iterations')
        before = states(self.folder)
        write_state(self.folder, self.done, arrays, device())
        for done, path in before.items():
            if done % self.keep and self.start < done < self.done:
                path.unlink()

    def stop(self, what: str):
        """Raises FloatingPointError, and names the last good state."""
        last = states(self.folder)[max(states(self.folder))]
        raise FloatingPointError(
            f'{what}, so training has stopped; {last} is the last good state. Export a run with a '
            'smaller --update_lr or --meta_lr'
        )
