"""Times what main.py does, on this machine, and prints one line of JSON.

    python scripts/measure/benchmark.py CASE.npz [--steps=20]
    python scripts/measure/benchmark.py --train [main.py's flags] [--seconds=30]
    python scripts/measure/benchmark.py --evaluate [main.py's flags]

The first times meta-training steps on the meta-batch of a case file; the second the training loop
with real data: what of it is spent waiting for data, and how much memory grows after the first
hundred iterations; the third the evaluation of 600 tasks, with the weights that training starts
from. Nothing is kept.

A case file holds arrays: `flags`, main.py's flags as JSON text; `input/inputa`, `input/labela`,
`input/inputb` and `input/labelb`, shaped as in data_generator.Batch (`input/inputa_uint8`: pixels
of 0...255 instead); and the initial parameters, `init/conv1` and so on. tests/reference has some.
"""

# ruff: noqa: E402 (the clock starts before TensorFlow is imported)

import functools
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

STARTED = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from data_generator import Batch
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model
from fewshot.runs import flags as run_flags
from fewshot.runs import machine
from fewshot.runs.flag_checks import check_flags
from fewshot.runs.flags import model_settings, settings
from fewshot.runs.prepare import USUAL, build_model, make_trainer, prepare
from fewshot.runs.tasks import make_generators
from fewshot.runs.terminal import print_anything
from fewshot.runs.trainer import Diverged, evaluate_tasks
from fewshot.runs.user_code import UserCodeError


def since_start() -> float:
    """Returns the seconds since this process was started.

    Where the system does not tell, they are counted from the start of this file.
    """
    try:
        ticks = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError):
        return time.time() - STARTED


def peak_rss_mb() -> float:
    """Returns the most memory this process has held. The system counts kilobytes; macOS bytes."""
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def rss_mb() -> float:
    """Returns the memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        return pages * os.sysconf('SC_PAGE_SIZE') / 2**20
    except OSError:
        return 0.0


# A meta-training step -----------------------------------------------------------------------------


def read_case(path: str) -> dict[str, np.ndarray]:
    """Reads the arrays of a case file. Raises ValueError if it is none."""
    try:
        with np.load(path) as case:
            values = dict(case)
    except FileNotFoundError as error:
        raise ValueError(f'there is no file {path}') from error
    except Exception as error:
        # A folder, text, one array only, half a file: NumPy has a different error for each.
        raise ValueError(f'{path} is no case file (.npz), or it is damaged') from error
    if 'flags' not in values:
        raise ValueError(
            f'{path} has no array "flags" with the flags of main.py, so it is no case file'
        )
    return values


def case_flags(path: str, values: dict) -> flags.FlagValues:
    """Reads main.py's flags from a case. Raises ValueError."""
    f = flags.FlagValues()
    run_flags.define_flags(f)
    try:
        given = json.loads(str(values['flags']))
        f(['main.py', *(f'--{name}={value}' for name, value in given.items())])
    except (ValueError, AttributeError, flags.Error) as error:
        raise ValueError(f'{path}: "flags" does not hold flags of main.py ({error})') from error
    check_flags(f)
    return f


def case_array(path: str, values: dict, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns an array of a case; None in its shape is any size.

    Raises ValueError if the array is missing or of another shape.
    """
    if f'{key}_uint8' in values:
        array = values[f'{key}_uint8'].astype(np.float32) / np.float32(255)
    elif key in values:
        array = values[key]
    else:
        raise ValueError(f'{path} has no array "{key}", which its flags ask for')
    fits = [size in (None, found) for size, found in zip(shape, array.shape)]
    if array.ndim != len(shape) or not all(fits):
        wanted = ', '.join('?' if size is None else str(size) for size in shape)
        raise ValueError(f'{path}: "{key}" is {[*array.shape]}, but its flags ask for [{wanted}]')
    return array


def case_batch(path: str, values: dict, model: FastMAML, tasks: int) -> Batch:
    """Returns the meta-batch of a case. Raises ValueError if one is missing or of another shape."""
    network, arrays = model.network, []
    for part in 'ab':
        sizes = tasks, None, network.dim_input
        arrays.append(case_array(path, values, f'input/input{part}', sizes))
        sizes = tasks, arrays[-1].shape[1], network.dim_output
        arrays.append(case_array(path, values, f'input/label{part}', sizes))
    return Batch(*(tf.constant(array, model.dtype) for array in arrays))


def operations(model: FastMAML, batch: Batch) -> int:
    """Counts operations of the matrix products and convolutions of one meta-training step.

    They are two per multiplication and addition. Per layer and example, in units of a forward pass:
    an inner update takes 3 (forward, and the gradients of inputs and of weights) and, at second
    order, 6 for its derivative; the outer loss takes 3. The first layer's inputs have no gradient:
    2, 2 and 2. Normalisation and the like are left out.
    """
    network, total = model.network, 0
    size, max_pool = getattr(network, 'image_shape', (0,))[0], getattr(network, 'max_pool', False)
    weights = [shape for name, (_, shape) in network.parameters.items() if name[0] != 'b']
    tasks, support, query = *batch.inputa.shape[:2], batch.inputb.shape[1]
    for i, shape in enumerate(weights):
        forward = 2 * int(np.prod(shape))
        if len(shape) > 2:  # a convolution, once for each place
            halved = -(-size // 2)  # by the stride, rounded up
            convolved, size = (size, size // 2) if max_pool else (halved, halved)
            forward *= convolved**2
        inner, derivative, outer = (2, 2, 2) if i == 0 else (3, 6, 3)
        per_update = inner + (0 if model.stop_grad else derivative)
        total += forward * (support * model.num_updates * per_update + query * outer)
    return total * tasks


def time_case(path: str, steps: int, tune: Callable) -> dict:
    """Times `steps` meta-training steps on a case file.

    Before them come one that compiles and two that warm up.
    """
    values = read_case(path)
    f = case_flags(path, values)
    tune(f)
    model = make_model(**model_settings(f), one_program=bool(f.one_program))
    for name, variable in (model.weights | model.norms).items():
        variable.assign(case_array(path, values, f'init/{name}', tuple(variable.shape)))
    batch = case_batch(path, values, model, f.meta_batch_size)
    times, losses = [], []
    for _ in range(3 + steps):
        start = time.perf_counter()
        losses.append(float(model.metatrain_step(batch)))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[3:])
    return {
        'workload': Path(path).stem,
        'first_loss': round(losses[0], 5),
        'compile_s': round(times[0], 2),
        'median_ms': round(1e3 * median, 3),
        'min_ms': round(1e3 * min(times[3:]), 3),
        'steps': steps,
        'peak_rss_mb': peak_rss_mb(),
        'gflops_per_s': round(operations(model, batch) / median / 1e9, 2),
    }


# Training and evaluation --------------------------------------------------------------------------


class Stopwatch:
    """Times a training run from outside: when steps end, and how long the loop waits for data."""

    def __init__(self, model: FastMAML, seconds: float):
        self.seconds, self.run_steps, self.figures = seconds, model.steps, {}
        self.first_end = self.end = None  # of the first call of `steps`, and of the last
        self.iterations, self.waited = 0, 0.0  # after the first
        self.early_rss = None  # MB, once a hundred iterations are done
        model.steps = self.step

    def step(self, batches: Batch, first: int, last: int, *more, **named) -> tuple[int, float]:
        """Calls FastMAML.steps, and watches it."""
        outcome = self.run_steps(batches, first, last, *more, **named)
        self.end = time.perf_counter()
        if self.first_end is None:
            self.first_end, self.waited = self.end, 0.0
            self.figures['first_step_s'] = round(since_start(), 2)
        else:
            self.iterations += last - first
        if self.early_rss is None and self.iterations >= 100:
            self.early_rss = rss_mb()
        return outcome

    def watch(self, batches: Iterator) -> Iterator:
        """Yields the training data, and watches them, until the time is over."""
        start = time.perf_counter()
        for item in batches:
            self.waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()
            if self.first_end is not None and start - self.first_end >= self.seconds:
                return

    def report(self) -> dict:
        if not self.iterations:
            raise ValueError(
                'there was time for one step only; give more --seconds or --metatrain_iterations'
            )
        elapsed = self.end - self.first_end
        self.figures['iterations'] = self.iterations
        self.figures['iterations_per_s'] = round(self.iterations / elapsed, 3)
        self.figures['input_share'] = round(self.waited / elapsed, 5)
        if self.early_rss:
            self.figures['rss_growth_mb'] = round(rss_mb() - self.early_rss, 1)
        return self.figures


def time_training(f: flags.FlagValues, seconds: float) -> dict:
    """Times main.py's training loop, summaries, validation and checkpoints included."""
    folders, quiet = tempfile.TemporaryDirectory(), redirect_stdout(io.StringIO())
    with folders as folder, quiet, ExitStack() as held:
        f.logdir = folder
        run = prepare(f, held)
        watch = Stopwatch(run.model, seconds)
        trainer = make_trainer(run, f)
        trainer.run(watch=watch.watch)
        trainer.log.close()
    return watch.report()


def time_evaluation(f: flags.FlagValues) -> dict:
    """Times main.py's evaluation of 600 tasks, compilation included."""
    f.train = False
    check_flags(f)
    generators = make_generators(f)
    model = build_model(f, generators)
    updates, start = max(f.num_updates, USUAL.updates), time.perf_counter()
    ((split, source),) = generators.items()
    for _ in evaluate_tasks(model, source, split, f.test_tasks, updates, f.transductive):
        pass
    elapsed = time.perf_counter() - start
    return {
        'tasks': f.test_tasks,
        'updates': updates,
        'evaluation_s': round(elapsed, 2),
        'tasks_per_s': round(f.test_tasks / elapsed, 2),
        'since_process_start_s': round(since_start(), 2),
    }


# The program --------------------------------------------------------------------------------------


def define_flags(values: flags.FlagValues = flags.FLAGS):
    run_flags.define_flags(values)
    of_steps = 'steps to time, after the first three (for a case file)'
    flags.DEFINE_integer('steps', 20, of_steps, lower_bound=1, flag_values=values)
    of_seconds = 'time to train, after the first step'
    flags.DEFINE_float('seconds', 30.0, of_seconds, lower_bound=0.0, flag_values=values)
    flags.DEFINE_boolean('evaluate', False, 'time the evaluation of 600 tasks', flag_values=values)


def benchmark(arguments: list[str], f=flags.FLAGS, tune: Callable = lambda f: None):
    """Prints the figures; arguments: the program and, if asked, a case file; see machine.tune."""
    asked = (len(arguments) == 2) + f.evaluate + f['train'].present
    try:
        if asked != 1 or len(arguments) > 2 or not (f.train or f.evaluate):
            raise ValueError(
                'give either a case file, or --train, or --evaluate with flags of main.py'
            )
        if len(arguments) == 2:
            figures = time_case(arguments[1], f.steps, tune)
        else:
            tune(f)
            names = [name for name in settings(f) if name not in ('train', 'data_dir')]
            figures = {'flags': {name: f[name].value for name in names if f[name].present}}
            figures |= time_evaluation(f) if f.evaluate else time_training(f, f.seconds)
            figures['peak_rss_mb'] = peak_rss_mb()
    except (ValueError, OSError, UserCodeError, Diverged) as error:
        sys.exit(f'benchmark.py: {error}')
    versions = {module.__name__: module.__version__ for module in (tf, keras, np)}
    print(json.dumps(figures | {'versions': {'python': sys.version.split()[0], **versions}}))


if __name__ == '__main__':
    print_anything()
    define_flags()
    app.run(functools.partial(benchmark, tune=machine.tune))
