"""Losses; files; devices.

Losses of tasks, the meta-batches they are taken of, and intervals of their means. Checks of
arguments. The files of a run, checkpoints, summaries and tables, each of them written whole or not
at all; and what users wrote for it. Compiled pieces of a program, and the devices that compute the
tasks of a meta-batch together.
"""

import csv
import ctypes
import functools
import glob
import hashlib
import importlib.util
import json
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.special
from google.protobuf.message import DecodeError

# A quiet start ------------------------------------------------------------------------------------

# What TensorFlow says of its instructions and of a GPU that is not there; errors come through.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Keras reads them when it is loaded: another backend, or Keras 2, would not do.
KERAS_CAME_FIRST = 'keras' in sys.modules
if not KERAS_CAME_FIRST:
    os.environ['KERAS_BACKEND'] = 'tensorflow'
for name in ('TF_USE_LEGACY_KERAS', 'TF2_BEHAVIOR'):
    os.environ.pop(name, None)
# Lines that its C++ prints while it is loaded, before that level counts. Some say nothing at all,
# some say nothing where there is no GPU.
IDLE_LINES = ('All log messages before absl::InitializeLog', 'Unable to register cu[A-Z]+ factory')
LINES_WITHOUT_GPU = ('Could not find cuda drivers', 'failed call to cuInit')


def has_nvidia_gpu() -> bool:
    """Whether the system has the device of an NVIDIA GPU, usable or not."""
    return any(Path('/dev').glob('nvidia[0-9]*')) or Path('/dev/dxg').exists()  # the latter: WSL


@contextmanager
def without_lines(patterns: Iterable[str]) -> Iterator[None]:
    """Keeps lines with one of the patterns from the process's stderr while entered.

    Another program reads them: should this process be aborted, what it said last comes through.
    All lines come where there is no `sed`.
    """
    program = ['sed', '-E', f'/{"|".join(patterns)}/d']
    with ExitStack() as closing:
        with suppress(OSError):  # no sed, or no stderr
            stderr = os.dup(2)
            closing.callback(os.close, stderr)
            # In a session of its own: Ctrl-C is for this process, which may have a word to say.
            reader = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True
            )
            closing.callback(reader.wait)
            closing.callback(os.dup2, stderr, 2)
            os.dup2(reader.stdin.fileno(), 2)
            reader.stdin.close()
        yield


def keeps_programs() -> bool:
    """Whether XLA keeps what it compiles in a folder of the user's, by TF_XLA_FLAGS."""
    return 'tf_xla_persistent_cache_directory' in os.environ.get('TF_XLA_FLAGS', '')


def without_cache_lines():
    """A context without what TensorFlow says of each compiled program that it finds in a folder.

    It takes the file for a text first, and says that this is none. Where no programs are kept
    nothing is done: stderr stays what it is.
    """
    if ALL_LINES or not keeps_programs():
        return nullcontext()
    return without_lines(['Error parsing text-format tensorflow.XlaSerializedCacheEntry'])


ALL_LINES = os.environ['TF_CPP_MIN_LOG_LEVEL'] == '0'  # asked for
DROPPED = IDLE_LINES if has_nvidia_gpu() else IDLE_LINES + LINES_WITHOUT_GPU
with nullcontext() if ALL_LINES else without_lines(DROPPED):
    import keras
    import tensorflow as tf

    if not has_nvidia_gpu():
        tf.config.list_physical_devices()  # looks for GPUs, and says that there is none

# Keras's settings ---------------------------------------------------------------------------------


def settle_keras(came_first: bool):
    """Keras as this project needs it, whatever ~/.keras/keras.json says.

    came_first: a program that imported Keras before may have set it up as it likes, but not on
    another backend. Raises ImportError then.
    """
    if keras.config.backend() != 'tensorflow':
        raise ImportError(
            f'Keras runs on {keras.config.backend()} here, and this project needs it on '
            'TensorFlow: set KERAS_BACKEND=tensorflow, or import this before keras'
        )
    if not came_first:
        keras.config.set_floatx('float32')
        keras.config.set_epsilon(1e-7)
        keras.config.set_image_data_format('channels_last')
    elif keras.config.floatx() != 'float32':
        warnings.warn(
            f'Keras rounds step sizes to {keras.config.floatx()} here, by its setting floatx',
            stacklevel=2,
        )


settle_keras(KERAS_CAME_FIRST)

# Meta-batches, losses and their means -------------------------------------------------------------


class Batch(NamedTuple):
    """A meta-batch of T tasks; a is the support set, b the query set; arrays or tensors.

    Inputs are flattened, D = height * width * channels, values in [0, 1]; labels are one-hot.
    Examples are ordered shot by shot: K (or Q) groups of N images, one per class, each group in an
    order of its own.
    """

    inputa: tf.Tensor  # [T, N*K, D]    sinusoid: [T, K, 1], oracle [T, K, 3] = (x, A, phi)
    labela: tf.Tensor  # [T, N*K, N]    sinusoid: [T, K, 1]
    inputb: tf.Tensor  # [T, N*Q, D]    sinusoid: [T, Q, 1 or 3]
    labelb: tf.Tensor  # [T, N*Q, N]    sinusoid: [T, Q, 1]


NAMED = 'Batch(inputa=..., labela=..., inputb=..., labelb=...)'


def named_batch(values, text: str = 'a meta-batch must be', remedy: str = NAMED) -> Batch:
    """A Batch, or a dict of its four names, as a Batch.

    Raises ValueError, which begins with `text`, for others, tuples too: their order may be another,
    and of equal sizes nothing would tell.
    """
    if isinstance(values, Batch):
        return values
    if isinstance(values, Mapping) and {*values} == {*Batch._fields}:
        return Batch(**values)
    found = f'it is of type {type(values).__name__}'
    if isinstance(values, Mapping):
        found = f'the names are {", ".join(map(str, values)) or "none"}'
    raise ValueError(
        f'{text} a utils.Batch, or a dict of four arrays, {", ".join(Batch._fields)}, but {found}: '
        f'write {remedy}'
    )


def mean_squared_error(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Equation 2, as a mean over all points: output and label [T, examples, D] -> [T]."""
    return tf.reduce_mean(tf.square(output - label), axis=[1, 2])


def cross_entropy(shots: int):
    """Equation 3: softmax cross-entropy *summed* over the examples and divided by K (`shots`).

    The support loss is thereby N times the mean over examples, a query loss with Q images per class
    N*Q/K times it; α and the gradient clip refer to this scale. Returns a function of logits and
    one-hot labels, [T, examples, N] each, to [T]; its attribute `shots` tells K. Raises ValueError
    if that is not above 0.
    """
    real_number('shots', shots, above=0)

    def loss(output, label):
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(label, output), axis=1) / shots

    loss.shots = shots
    return loss


def accuracy(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """How many of the examples have their largest logit at the label: a fraction per task.

    output, label: [T, examples, N] -> [T], of output's dtype; nan if there is nothing to choose
    from, as where N is 1.
    """
    if output.shape[-1] == 1:
        return tf.fill(tf.shape(output)[:1], tf.constant(np.nan, output.dtype))
    hits = tf.equal(tf.argmax(output, axis=-1), tf.argmax(label, axis=-1))
    return tf.reduce_mean(tf.cast(hits, output.dtype), axis=1)


def confidence(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean of a small sample, by Student's t.

    values: [tasks or seeds, ...]. Returns [...]; nan where one is infinite.
    """
    count = len(values)
    # scipy.stats has both factors, and takes as long to import as a tenth of TensorFlow.
    with np.errstate(invalid='ignore'):  # inf - inf
        standard_error = np.std(values, axis=0, ddof=1) / count**0.5
    return standard_error * scipy.special.stdtrit(count - 1, 0.975)


# Arguments, checked -------------------------------------------------------------------------------


def whole_number(name: str, value, lowest: int = 0) -> int:
    """An argument that counts something. Raises ValueError, with its name, if it is no count."""
    try:
        found = operator.index(value)
    except TypeError:  # also of 2.0, which may be a mistake
        found = None
    if found is None:
        raise ValueError(f'{name} must be a whole number, but it is {value!r:.60}')
    if found < lowest:
        wanted = f'be at least {lowest}' if lowest > 0 else 'not be negative'
        raise ValueError(f'{name} must {wanted}, but it is {value}')
    return found


def real_number(name: str, value, above: float | None = None) -> float:
    """An argument of 0 or more, a step size; or one greater than `above`.

    Raises ValueError, with its name, if it is infinite, NaN, out of range or no real number.
    """
    try:
        array = real_numbers(name, value)
        found = float(array) if array.ndim == 0 else np.nan
    except ValueError:
        found = np.nan
    if not (found >= 0 if above is None else found > above) or found == np.inf:
        wanted = 'of 0 or more' if above is None else f'above {above:g}'
        raise ValueError(f'{name} must be a finite number {wanted}, but it is {value!r:.60}')
    return found


def real_numbers(name: str, values) -> np.ndarray:
    """An argument as an array. Raises ValueError, with its name, if it is not one of real numbers.

    Booleans count as such; what NumPy masks does not.
    """
    if np.ma.is_masked(values):
        raise ValueError(f'{name} must be real numbers, but some are masked')
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f'{name} must be an array, but it is none ({error})') from error
    if not np.can_cast(array.dtype, np.float64, 'same_kind'):
        kind = 'None' if values is None else f'of type {array.dtype}'
        raise ValueError(f'{name} must be an array of real numbers, but it is {kind}')
    return array


def finite_numbers(name: str, array: np.ndarray, dtype) -> np.ndarray:
    """In another type. Raises ValueError, with the name, if they are not finite in it."""
    with np.errstate(over='ignore'):
        array = np.asarray(array, dtype)
    if not np.isfinite(array).all():
        count = int(np.sum(~np.isfinite(array)))
        raise ValueError(
            f'{name} must be finite numbers of {array.dtype}, but {count} are NaN or infinite'
        )
    return array


def folder_path(name: str, value) -> Path:
    """An argument that names a folder. Raises ValueError, with its name, for what is no path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f'{name} must be the path of a folder, but it is {value!r:.60}')
    return Path(value)


# Files of a run: checkpoints ----------------------------------------------------------------------

# FOLDER/model{iteration}.index and .data-..., of this program or of the TensorFlow 1 original; the
# one of the best validation is FOLDER/best{iteration}.

CHECKPOINTS_KEPT = 10
OBJECT_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'  # in checkpoints of TensorFlow 2 only
RUN_STATE = 'run/.ATTRIBUTES/VARIABLE_VALUE'  # what `write_checkpoint` adds
# The group of learned step sizes belongs to their names, as they may be called after weights.
PARAMETER_KEY = r'(?:weights/|norms/|(?=rates/))(.+)/\.ATTRIBUTES/VARIABLE_VALUE'
OPTIMIZERS = ('metatrain_optimizer', 'pretrain_optimizer')


def checkpoints(folder: str | Path, kind: str = 'model') -> dict[int, str]:
    """{iteration: path without suffix} of a folder's checkpoints, the oldest first.

    kind: 'model' or 'best'.
    """
    names = (path.name for path in Path(folder).glob(f'{kind}*.index'))
    found = (re.fullmatch(kind + r'(0|[1-9][0-9]*)\.index', name) for name in names)
    iterations = sorted(int(match[1]) for match in found if match)
    return {i: str(Path(folder) / f'{kind}{i}') for i in iterations}


def other_runs(folder: str | Path) -> str:
    """Where there are runs, if a folder is none: the end of a clause, empty if nowhere near."""
    folder = Path(folder)
    text = '' if folder.is_dir() else ', since there is no such folder'
    if not folder.parent.is_dir():
        text += f', nor {folder.parent}'
    for place in (folder, folder.parent, folder.parent.parent):
        found = [*place.glob('*/*.index'), *place.glob('*/*/*.index')]
        runs = sorted({str(path.parent.relative_to(place)) for path in found})
        if runs:
            more = f' and {len(runs) - 3} more' if len(runs) > 3 else ''
            return f'{text}; {place} has the runs {", ".join(runs[:3])}{more}'
    return text


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or damaged; the text is one sentence for the user."""


def write_checkpoint(
    checkpoint: tf.train.Checkpoint,
    folder: str | Path,
    iteration: int,
    state: dict | None = None,
    kind: str = 'model',
) -> str:
    """Writes FOLDER/{kind}{iteration} whole, then removes all but the newest ten (best: one).

    state: what else belongs to the run, kept as JSON. The original's own checkpoints stay. Returns
    the path. Raises OSError if it cannot be written.
    """
    # tf.train.CheckpointManager would put a hyphen into the name, which the original does not have.
    path = str(Path(folder) / f'{kind}{iteration}')
    run = tf.Variable(json.dumps({**(state or {}), 'iteration': iteration}))
    try:
        with for_tensorflow(path) as prefix:
            # The index comes last, so a checkpoint that has one is complete.
            tf.train.Checkpoint(checkpoint, run=run).write(prefix)
    except tf.errors.OpError as error:
        remove_leftovers(folder)
        raise OSError(f'{path} cannot be written ({first_line(error)})') from error
    kept = CHECKPOINTS_KEPT if kind == 'model' else 1
    for old in list(checkpoints(folder, kind).values())[:-kept]:
        if is_own(old):
            remove_checkpoint(old)
    return path


def taken_as_written(path: str) -> bool:
    """Whether TensorFlow takes a path for what it is.

    One that it reads it takes for a pattern, with [ and the like, and it wants all in UTF-8.
    """
    return not re.search(r'[\[\]{}*?\\\udc80-\udcff]', path)


@contextmanager
def for_tensorflow(path: str) -> Iterator[str]:
    """A path of the same checkpoint that TensorFlow takes as it is written, while entered.

    If need be one through a link to the folder.
    """
    if taken_as_written(path):
        yield path
        return
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory() as beside:
        os.symlink(folder, link := os.path.join(beside, 'run'))
        yield os.path.join(link, name)


def remove_checkpoint(path: str):
    """Its index first: what is left if the process dies is a leftover, no damaged checkpoint."""
    files = Path(path).parent.glob(f'{Path(path).name}.*')
    for file in sorted(files, key=lambda file: file.suffix != '.index'):
        file.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path):
    """Removes what a process that died, or found no space, left of checkpoints.

    These are the files that have no index beside them, and TensorFlow's temporary ones.
    """
    for path in Path(folder).glob('*.data-*'):
        ours = re.fullmatch(r'((?:model|best)\d+)\.data-\d+-of-\d+(\.tempstate\d+)?', path.name)
        if ours and (ours[2] or not path.with_name(f'{ours[1]}.index').exists()):
            path.unlink(missing_ok=True)
    for path in Path(folder).glob('*.index.tempstate*'):
        path.unlink(missing_ok=True)


def is_own(path: str) -> bool:
    """Whether a checkpoint is this program's and whole."""
    try:
        return OBJECT_GRAPH in stored_values(path)
    except DamagedCheckpoint:
        return False


def read_run_state(path: str) -> dict:
    """The `state` that a checkpoint was written with, and its 'iteration'; empty if it has none.

    Raises DamagedCheckpoint, also if the file is that of another iteration by another name.
    """
    stored = stored_values(path)
    if RUN_STATE not in stored:
        return {}
    state = json.loads(stored[RUN_STATE])
    if re.search(r'\d*$', str(path))[0] != str(state['iteration']):
        raise DamagedCheckpoint(
            f'{path} is not what its name says, but the checkpoint of iteration '
            f'{state["iteration"]}'
        )
    return state


def stored_values(path: str) -> dict[str, np.ndarray]:
    """All that is in a checkpoint, by TensorFlow's keys, its checksums compared.

    Raises DamagedCheckpoint, and OSError if this process may not read it, which is no damage.
    """
    for file in Path(path).parent.glob(f'{glob.escape(Path(path).name)}.*'):
        open(file, 'rb').close()
    with for_tensorflow(path) as prefix:
        return all_values(prefix, path)


def all_values(prefix: str, path: str) -> dict[str, np.ndarray]:
    """The part of `stored_values` that TensorFlow does; prefix: of `for_tensorflow`."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except Exception as error:  # OpError, ValueError, IndexError ...: it depends on the damage
        raise DamagedCheckpoint(
            f'{path} cannot be read as a checkpoint, it is damaged ({first_line(error)})'
        ) from error


def first_whole(candidates: dict[int, str], tell: Callable[[str], None]) -> tuple[int, str, dict]:
    """The first of a run's checkpoints that is whole: iteration, path, and state of the run.

    candidates: {iteration: path}, the best choice first. tell: is told of those that are damaged.
    Raises DamagedCheckpoint if all are.
    """
    for number, (iteration, path) in enumerate(candidates.items(), start=1):
        try:
            return iteration, path, read_run_state(path)
        except DamagedCheckpoint as error:
            if number == len(candidates):
                raise
            tell(f'{error}; the one before it is used.')
    raise ValueError('there are no checkpoints')


def first_line(error: Exception) -> str:
    """The first line that says something, after TensorFlow's headings and places in the program."""
    headings = ('Graph execution error', 'Detected at node', 'File ', '<stack traces', ' ', '\t')
    said = [line for line in str(error).splitlines() if line and not line.startswith(headings)]
    return (said or [type(error).__name__])[0]


def read_checkpoint(path: str, names: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """A checkpoint's parameters by name, and the names of the optimizers whose state it holds.

    That is one of OPTIMIZERS; both in older ones, none in those published without. names: of the
    network's parameters, in the order in which it creates them. Raises DamagedCheckpoint, and
    ValueError if it has parameters that are not in `names`.
    """
    stored = stored_values(path)
    if OBJECT_GRAPH in stored:
        found = (re.fullmatch(PARAMETER_KEY, key) for key in stored)
        values = {match[1].replace('.S', '/'): stored[match[0]] for match in found if match}
    else:
        values = original_parameters(stored, names)
    if unknown := [name for name in values if name not in names]:
        raise ValueError(
            f'{path} is of another architecture: it has {", ".join(unknown)}, and the network that '
            'the flags describe has not'
        )
    optimizers = [name for name in OPTIMIZERS if any(key.startswith(f'{name}/') for key in stored)]
    return values, optimizers


def read_objects(path: str, objects: dict):
    """Gives objects of TensorFlow and Keras the state that a checkpoint has by these names."""
    with for_tensorflow(path) as prefix:
        status = tf.train.Checkpoint(**objects).read(prefix)
    # There is more in a checkpoint than this: the run's own state.
    status.assert_existing_objects_matched().expect_partial()


def original_parameters(stored: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Parameters by name out of the TensorFlow 1 original's checkpoint, as `read_checkpoint`.

    It left its biases, and all weights of the fully connected network, without names; TensorFlow
    called them Variable, Variable_1, ... in the order of `names`.
    """
    keys = [key for key in stored if re.match(r'model/(?!.*/Adam)', key)]
    values = {key.removeprefix('model/'): stored[key] for key in keys}
    for i, name in enumerate([name for name in names if name not in values]):
        unnamed = f'Variable_{i}' if i else 'Variable'
        if unnamed in values:
            values[name] = values.pop(unnamed)
    return values


# Files of a run: its folder, summaries and tables -------------------------------------------------


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from training in a folder while entered.

    It holds no longer than this process lives, and does nothing where the system has no locks.
    Raises BlockingIOError if another process holds it.
    """
    descriptor = None
    try:
        import fcntl  # not on Windows

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except (ImportError, OSError):  # some network file systems have no locks either
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def machine() -> str:
    """What this process computes with, in a few words."""
    count, gpus = cores(), len(tf.config.list_physical_devices('GPU'))
    parts = [f'{count} core{"s" * (count != 1)}']
    if gpus:
        parts.append(f'{gpus} GPU{"s" * (gpus != 1)}')
    parts += [platform.machine(), f'Python {platform.python_version()}']
    return ', '.join([*parts, f'TensorFlow {tf.__version__}'])


def event_files(folder: str | Path) -> list[Path]:
    """The files of a run's summaries, the oldest first."""
    found = Path(folder).glob('events.out.tfevents.*')
    return sorted(path for path in found if path.is_file())


def forget_summaries(folder: str | Path, start: int):
    """Removes the summaries of iteration `start` and later.

    A run that continues there will write them again. What cannot be read, the end of a file whose
    writer died, goes with them.
    """
    for path in event_files(folder):
        events, kept = read_events(path), 0
        beside = path.with_name(path.name.replace('events.', 'part.'))
        with tf.io.TFRecordWriter(os.fsencode(beside)) as writer:
            for record in events:
                event = tf.compat.v1.Event.FromString(record)
                if event.HasField('file_version') or event.step < start:
                    writer.write(record)
                    kept += not event.HasField('file_version')
        if kept:
            beside.replace(path)
        else:
            beside.unlink()
            path.unlink()


def read_events(path: Path) -> list[bytes]:
    """The serialised events of a file, up to the first that is damaged or none."""
    records = []
    try:
        for record in tf.data.TFRecordDataset(os.fsencode(path)):
            tf.compat.v1.Event.FromString(record.numpy())
            records.append(record.numpy())
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError, DecodeError):
        pass
    return records


def read_evaluation(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, standard deviations and halves of the 95 % intervals out of a test_*.csv.

    Each is [1 + updates]. Raises ValueError if the file is none.
    """
    try:
        header, rows = read_table(path)
        size = sum(name.startswith('update') for name in header)  # split and iteration may follow
        means, deviations, intervals = np.array([row[:size] for row in rows], float)
        if header[:size] != [f'update{i}' for i in range(size)] or size == 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'{path} is not the table main.py writes (a header, then means, standard deviations '
            'and confidence intervals); evaluate the run again with --train=False'
        ) from None
    return means, deviations, intervals


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a csv file. Raises ValueError if it has none."""
    with open(path, newline='') as file:
        try:
            header, *rows = csv.reader(file)
        except csv.Error as error:
            raise ValueError(f'{path} is no csv file ({error})') from error
    return header, rows


def evaluated_iteration(path: Path) -> int:
    """Of the checkpoint that a test_*.csv tells of; -1 if it does not say, as older ones."""
    try:
        header, rows = read_table(path)
        return int(rows[0][header.index('iteration')])
    except (ValueError, IndexError):
        return -1


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """{tag: {iteration: value}} of the numbers among a run's summaries, in order of iteration."""
    number = tf.float32.as_datatype_enum  # others are texts and pictures
    found = {}
    for path in event_files(folder):
        for event in map(tf.compat.v1.Event.FromString, read_events(path)):
            for value in event.summary.value:
                if value.tensor.dtype == number and not value.tensor.tensor_shape.dim:
                    values = found.setdefault(value.tag, {})
                    values[event.step] = float(tf.make_ndarray(value.tensor))
    return {tag: dict(sorted(values.items())) for tag, values in found.items()}


def print_anything():
    """From now on, what the encoding of an output has no characters for is printed as \\x...

    A file's name may not be UTF-8, and an α not in ASCII: a program does not end for that.
    """
    if sys.stdout is None:  # closed by whom started this program
        sys.stdout = open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def write_whole(path: Path, content: bytes):
    """Writes a file so that it is there whole or, if the process dies, not at all."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes]):
    """The same for files that belong together: none is replaced before all are written.

    Raises OSError.
    """
    beside = {path: path.with_name(path.name + '.part') for path in contents}
    try:
        for path, content in contents.items():
            beside[path].write_bytes(content)
        for path in contents:
            beside[path].replace(path)
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error.strerror or error})') from error
    finally:
        for part in beside.values():
            part.unlink(missing_ok=True)


# Files of a run: what the user wrote for it -------------------------------------------------------


class UserCodeError(Exception):
    """A failure inside the user's own code; the text is its traceback, from the user's file on."""


@contextmanager
def user_code(spec: str, all_of_it: bool = True) -> Iterator[None]:
    """What fails while entered is the code's that FILE.py:FUNCTION names: a UserCodeError.

    all_of_it: else this program runs too, and only what has a line in the file is the user's.
    """
    try:
        yield
    except Exception as error:
        file, place = str(Path(spec.rpartition(':')[0]).resolve()), error.__traceback__
        while place and place.tb_frame.f_code.co_filename != file:
            place = place.tb_next
        if place is None and not all_of_it:
            raise
        # Without a place if none is in the file: a wrong number of arguments, say.
        lines = traceback.format_exception(type(error), error, place)
        text = ''.join(lines).rstrip()
        raise UserCodeError(f'{spec} failed, not this program:\n{text}') from error


def is_spec(text: str) -> bool:
    """Whether a text has the form FILE.py:FUNCTION."""
    return re.fullmatch(r'.+\.py:[^\W\d]\w*', text) is not None


def user_function(spec: str) -> Callable:
    """The function that FILE.py:FUNCTION names, out of a module of its own.

    What fails in it raises UserCodeError, at the import and when it is called. Raises ValueError
    for a spec that is none, a file that is not there, and one without the function.
    """
    file, colon, name = spec.rpartition(':')
    if not colon or not file or not name.isidentifier():
        raise ValueError(f'{spec!r} must be FILE.py:FUNCTION, the name of a function after a colon')
    if not Path(file).is_file():
        raise ValueError(f'there is no file {file}, which {spec!r} names')
    with user_code(spec):
        module = user_module(Path(file).resolve())
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if is_defined_in(value, module)]
        there = f'has {", ".join(own)}' if own else 'has none'
        raise ValueError(f'there is no function {name!r} in {file}, which {there}')

    @functools.wraps(function)
    def call(*arguments, **named):
        with user_code(spec):
            return function(*arguments, **named)

    return call


def is_defined_in(value, module) -> bool:
    return callable(value) and getattr(value, '__module__', None) == module.__name__


def user_module(path: Path):
    """Runs a file as a module; its name is no other module's. It may import what lies beside it."""
    name = f'user_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}'
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ImportError(f'{path} is no Python file: its name must end with .py')
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that it hides nothing
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and Keras look for its classes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# Devices: compiled pieces -------------------------------------------------------------------------


TRACED = threading.local()  # of this thread: `inside`, whether a piece is being traced


class piece:
    """A method that is a program of its own, compiled by XLA if its object is `compiled`.

    What calls pieces differentiates through the calls: piece by piece, XLA compiles one inner
    update, however many there are, instead of all of them unrolled. A piece that a piece calls is
    a part of it: XLA takes minutes for derivatives of programs within a program.
    """

    xla = True

    def __init__(self, method: Callable):
        self.method = method
        functools.update_wrapper(self, method)

    def __set_name__(self, owner: type, name: str):
        self.attribute = f'_{name}_of_{owner.__name__}'  # where an object keeps its program

    def __get__(self, instance, owner: type | None = None):
        if instance is None:
            return self
        method = self.method.__get__(instance)
        if getattr(TRACED, 'inside', False):
            return method
        program = instance.__dict__.get(self.attribute)
        if program is None:
            program = tf.function(
                as_one(method) if self.xla else method,
                jit_compile=instance.compiled if self.xla else None,
                autograph=False,
            )
            instance.__dict__[self.attribute] = program
        return program


def as_one(method: Callable) -> Callable:
    """The method with the pieces that it calls as its parts."""

    @functools.wraps(method)
    def traced(*arguments, **named):
        TRACED.inside, before = True, getattr(TRACED, 'inside', False)
        try:
            return method(*arguments, **named)
        finally:
            TRACED.inside = before

    return traced


class graph(piece):
    """A method that is a graph of TensorFlow, in which pieces run."""

    xla = False


# Devices: the replicas of a model -----------------------------------------------------------------

ASKING_INTERVAL = 5  # iterations between the workers' questions whether one of them is to stop


def keep_freed_memory(arenas: int):
    """Lets the C library keep what this process frees for the next step, not give it back at once.

    A step frees what it allocates, and blocks of megabytes would go back to the system each time.
    Their pages then come back one by one, cleared: on virtual machines that took 12 to 35 % of a
    step's time. arenas: of memory, at most; with fewer less goes back, and threads wait more for
    each other. glibc has the settings; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == 'glibc':
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them
        settings = {trim_threshold: -1, mmap_max: 0, arena_max: arenas}  # -1: never
        for setting, value in settings.items():
            ctypes.CDLL(None).mallopt(setting, value)


def cores() -> int:
    """How many this process may use, which not every system tells."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_up_gpus(tf32: bool = False):
    """Exact products, and no more memory than is needed; before TensorFlow's first operation.

    By default TensorFlow rounds the factors of float32 products to TF32, which has 10 bits of
    mantissa, on GPUs that can: here only if `tf32`. It also takes all the memory of all GPUs; if
    they are in use already, that stays as it is. Says so if the machine has a GPU that TensorFlow
    does not find.
    """
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    gpus = tf.config.list_physical_devices('GPU')
    with suppress(RuntimeError):  # in use
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
    if has_nvidia_gpu() and not gpus and not hidden:
        print(
            'There is an NVIDIA GPU, but TensorFlow does not find it, so the CPU computes: '
            "`pip install -e '.[gpu]'` installs TensorFlow's CUDA libraries.",
            file=sys.stderr,
        )


class Replicas:
    """The devices, of this process and of others, that have equal parts of every meta-batch.

    strategy: of tf.distribute, mirrored or multi-worker mirrored, or None for one device. Variables
    are each process's own, and equal: all start from the first one's, see `agree`, and take the
    same steps.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None):
        self.strategy = strategy
        self.count = strategy.num_replicas_in_sync if strategy else 1
        self.local = len(strategy.extended.worker_devices) if strategy else 1
        cluster = strategy.cluster_resolver if strategy else None
        self.process = (cluster.task_id if cluster and cluster.cluster_spec() else None) or 0
        self.is_chief = self.process == 0  # the one that prints and writes

    def slice_of(self, tasks: int) -> slice:
        """Which of a meta-batch's tasks are this process's.

        Raises ValueError if replicas cannot have equally many.
        """
        if tasks % self.count:
            raise ValueError(
                f'--meta_batch_size={tasks} tasks cannot be shared equally by {self.count} '
                f'replicas: make it a multiple of {self.count}'
            )
        each = tasks // self.count * self.local
        return slice(self.process * each, (self.process + 1) * each)

    def place(self, batch: Batch) -> Batch:
        """This process's tasks on its devices, for `mean` and `gather`."""
        if self.strategy is None:
            return batch
        each, first = batch.inputa.shape[0] // self.local, self.process * self.local

        def part(context) -> Batch:
            i = context.replica_id_in_sync_group - first
            of_replica = slice(i * each, (i + 1) * each)
            return Batch(*(tf.convert_to_tensor(values[of_replica]) for values in batch))

        return self.strategy.experimental_distribute_values_from_function(part)

    def mean(self, function: Callable, batch: Batch) -> list[tf.Tensor]:
        """The mean over replicas of the tensors that function(a replica's part) returns.

        batch: from `place`.
        """
        if self.strategy is None:
            return function(batch)
        shapes = []

        def replica(part):
            values = function(part)
            shapes[:] = [value.shape for value in values]
            # One message instead of many.
            flat = tf.concat([tf.reshape(value, [-1]) for value in values], axis=0)
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, flat)

        flat = self._first(self.strategy.run(replica, (batch,)))
        parts = tf.split(flat, [shape.num_elements() for shape in shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes)]

    def gather(self, function: Callable, batch: Batch) -> tf.Tensor:
        """What function(a replica's part) returns, [n, tasks of the part], for all tasks: [n, T].

        batch: from `place`.
        """
        if self.strategy is None:
            return function(batch)

        def replica(part):  # as a sum: each fills its own columns
            values, context = function(part), tf.distribute.get_replica_context()
            values = values[:, tf.newaxis]  # [n, 1, tasks of the part]
            mine = tf.range(self.count) == context.replica_id_in_sync_group  # [replicas]
            columns = tf.where(mine[:, tf.newaxis], values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, columns)  # [n, replicas, tasks]

        total = self._first(self.strategy.run(replica, (batch,)))
        return tf.reshape(total, [total.shape[0], -1])

    def agree(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The first process's values, in all of them."""
        if self.strategy is None or self.count == self.local:
            return values
        return [self._sum(value if self.is_chief else np.zeros_like(value)) for value in values]

    def any(self, flag: bool, iteration: int) -> bool:
        """Whether the flag is set in one of the processes.

        They ask each other every few iterations only, as that takes time.
        """
        if self.strategy is None or self.count == self.local:
            return flag
        return iteration % ASKING_INTERVAL == 0 and bool(self._sum(np.float32(flag)) > 0)

    def _sum(self, value: np.ndarray) -> np.ndarray:
        """Over processes of one replica each, or of equally many, whose values count once."""
        return self._sum_replicas(tf.convert_to_tensor(value)).numpy()

    @tf.function(autograph=False, reduce_retracing=False)
    def _sum_replicas(self, value: tf.Tensor) -> tf.Tensor:
        def replica():
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % self.local == 0  # of its process
            counted = tf.where(first, value, tf.zeros_like(value))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, counted)

        return self._first(self.strategy.run(replica))

    def _first(self, values) -> tf.Tensor:
        return self.strategy.experimental_local_results(values)[0]
