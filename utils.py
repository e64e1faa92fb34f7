"""What the rest is made of: losses, normalisation, layers, initial values, and the files of runs.

Every tensor has a leading task axis T; "examples" is the number of examples of one task (N*K, or K points).
"""

import csv
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw

from special_grads import (
    Shared,
    divisor_near_root,
    max_pool2x2,
    moments,
    number,
    patches3x3,
    per_task,
    product,
    product_shared,
    sizes,
    spread,
    standardize,
    sum_rows,
)

BATCH_NORM_EPSILON = 1e-3  # of tf.contrib.layers.batch_norm, which the original used
LAYER_NORM_EPSILON = 1e-12  # of tf.contrib.layers.layer_norm
DIVERGED = 100.0  # mean squared error of a sinusoid; its largest amplitude is 5, so that predicting 0 has 25 at most


class Batch(NamedTuple):
    """A meta-batch of T tasks; a is the support set, b the query set; arrays or tensors.

    Inputs are flattened, D = height * width * channels, values in [0, 1]; labels are one-hot. Examples are ordered shot
    by shot: K (or Q) groups of N images, one per class, each group in an order of its own.
    """

    inputa: tf.Tensor  # [T, N*K, D]    sinusoid: [T, K, 1], oracle [T, K, 3] = (x, A, phi)
    labela: tf.Tensor  # [T, N*K, N]    sinusoid: [T, K, 1]
    inputb: tf.Tensor  # [T, N*Q, D]    sinusoid: [T, Q, 1 or 3]
    labelb: tf.Tensor  # [T, N*Q, N]    sinusoid: [T, Q, 1]


# Losses: one number per task -------------------------------------------------------------------------------------


def mean_squared_error(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Equation 2, as a mean over all points: output and label [T, examples, D] -> [T]."""
    return tf.reduce_mean(tf.square(output - label), axis=[1, 2])


def cross_entropy(shots: int):
    """Equation 3: softmax cross-entropy *summed* over the examples and divided by K (`shots`).

    The support loss is thereby N times the mean over examples, a query loss with Q images per class N*Q/K times it;
    α and the gradient clip refer to this scale. Returns a function of logits and one-hot labels,
    [T, examples, N] each, to [T]; its attribute `shots` tells K.
    """

    def loss(output, label):
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(label, output), axis=1) / shots

    loss.shots = shots
    return loss


def accuracy(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Share of examples whose largest logit is the label's: [T, examples, N] each -> [T], of output's dtype."""
    hits = tf.equal(tf.argmax(output, axis=-1), tf.argmax(label, axis=-1))
    return tf.reduce_mean(tf.cast(hits, output.dtype), axis=1)


# Normalisation -----------------------------------------------------------------------------------------------------


def batch_norm(
    x: tf.Tensor, beta: tf.Tensor, max_pool: bool = False, leading: int | tf.Tensor | None = None
) -> tf.Tensor:
    """Per channel over examples and space, statistics always of the batch at hand; offset but no gain; then pooling.

    x: [T, examples, ..., channels]; beta: [channels], shared by tasks and inner steps; leading: how many of the examples,
    from the first on, give the statistics (None: all). The variance is the biased one. Not with `tf.nn.moments`, whose
    second derivatives are silently wrong, see special_grads.moments.
    """
    tasks, channels = sizes(x)[0], x.shape[-1]
    mean, variance = moments(tf.reshape(x[:, :leading], [tasks, -1, channels]))  # [T, 1, channels]
    # Without a gain, larger stays larger: pooling first gives the same, for less work, and equal inputs stay equal.
    x = max_pool2x2(x) if max_pool else x
    rows = standardize(
        tf.reshape(x, [tasks, -1, channels]),
        mean,
        tf.math.rsqrt(variance + BATCH_NORM_EPSILON),
        tf.broadcast_to(beta, [tasks, 1, channels]),
    )
    return tf.reshape(rows, sizes(x))


def layer_norm(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """Per example over all its axes, then gain and offset over the last axis. x: [T, examples, ..., channels]."""
    size = int(np.prod(x.shape[2:]))
    values = tf.reshape(x, [-1, size, 1])  # [T*examples, size, 1]
    centred = values - spread(sum_rows(values) / size, size)
    variance = sum_rows(tf.square(centred)) / size  # [T*examples, 1, 1]
    standard = centred * spread(tf.math.rsqrt(variance + LAYER_NORM_EPSILON), size)
    return tf.reshape(standard, sizes(x)) * gamma + beta


def normalize(
    x: tf.Tensor,
    norm: str,
    scope: str,
    norms: dict,
    max_pool: bool = False,
    leading: int | tf.Tensor | None = None,
) -> tf.Tensor:
    """`norm` ('batch_norm', 'layer_norm' or 'None') with the parameters that `norms` holds for `scope`, then pooling.

    x: [T, examples, ..., channels], or [T, examples, height, width, channels] for max_pool; leading: see `batch_norm`.
    """
    if norm == 'batch_norm':
        return batch_norm(x, norms[f'{scope}/beta'], max_pool, leading)
    if norm == 'layer_norm':
        x = layer_norm(x, norms[f'{scope}/beta'], norms[f'{scope}/gamma'])
    return max_pool2x2(x) if max_pool else x


def norm_parameters(norm: str, scope: str, channels: int) -> dict[str, tuple]:
    """Kinds of initial value (see `initial_value`) and shapes of one layer's normalisation parameters."""
    if norm not in ('None', 'batch_norm', 'layer_norm'):
        raise ValueError(f"norm must be 'batch_norm', 'layer_norm' or 'None', but it is {norm!r}")
    parameters = {
        'None': {},
        'batch_norm': {'beta': 'zeros'},
        'layer_norm': {'beta': 'zeros', 'gamma': 'ones'},
    }
    return {f'{scope}/{name}': (kind, (channels,)) for name, kind in parameters[norm].items()}


# Layers ------------------------------------------------------------------------------------------------------------

# A weight is [T, ...], or Shared.


def multiply(rows: tf.Tensor, matrix: tf.Tensor | Shared) -> tf.Tensor:
    """rows [T, n, in], matrix [T, in, out] -> [T, n, out]."""
    return product_shared(rows, *matrix) if isinstance(matrix, Shared) else product(rows, matrix)


def dense(x: tf.Tensor, matrix: tf.Tensor | Shared, bias: tf.Tensor | Shared) -> tf.Tensor:
    """x [T, examples, in], matrix [T, in, out], bias [T, out] -> [T, examples, out]."""
    return multiply(x, matrix) + tf.expand_dims(per_task(bias), 1)


def convolve(x: tf.Tensor, kernel: tf.Tensor | Shared, stride: int) -> tf.Tensor:
    """3x3 convolution ('SAME') of each task's images by its own kernel, as a product of matrices.

    x [T, examples, height, width, C], kernel [T, 3, 3, C, F] -> [T, examples, ceil(height/stride),
    ceil(width/stride), F]. TensorFlow's own convolution has one kernel for all, so it serves a single task; with a
    stride its derivatives are slow.
    """
    if x.shape[0] == 1 and stride == 1:
        return tf.expand_dims(tf.nn.conv2d(x[0], per_task(kernel)[0], stride, 'SAME'), 0)
    return convolve_patches(patches3x3(x, stride), kernel)


def convolve_patches(patches: tf.Tensor, kernel: tf.Tensor | Shared) -> tf.Tensor:
    """Each task's patches [T, examples, H, W, 9*C] by its kernel [T, 3, 3, C, F] -> [T, examples, H, W, F]."""
    tasks, examples, height, width, size = sizes(patches)
    rows = tf.reshape(patches, [tasks, examples * height * width, size])  # [T, rows, 9C]
    if isinstance(kernel, Shared):
        matrix = Shared(
            *(tf.reshape(part, [*part.shape[:-4], size, part.shape[-1]]) for part in kernel)
        )
    else:
        matrix = tf.reshape(kernel, [tasks, size, kernel.shape[-1]])  # [T, 9C, F]
    output = multiply(rows, matrix)
    return tf.reshape(output, [tasks, examples, height, width, output.shape[-1]])


class NormalizedPatches(NamedTuple):
    """Patches of the input images, made ready for `convolve_normalized`."""

    patches: (
        tf.Tensor
    )  # [T, examples, H, W, 9*C + 1], the task's mean taken away, and a last channel of ones
    mean: tf.Tensor  # [T, 1, 9*C], what rounding left of it
    covariance: (
        tf.Tensor
    )  # [T, 9*C, 9*C], float64: neighbouring pixels are so alike that it is nearly singular


def normalize_patches(
    patches: tf.Tensor, leading: int | tf.Tensor | None = None
) -> NormalizedPatches:
    """patches: [T, examples, H, W, 9*C]; leading: see `batch_norm`.

    Products within blocks of rows, and a sum of blocks in float64.
    """
    tasks, examples, height, width, size = sizes(patches)
    rows = tf.reshape(patches, [tasks, examples * height * width, size])  # [T, rows, 9C]
    count = (examples if leading is None else leading) * height * width  # of rows with a say
    divisor = number(count, rows)
    rows -= spread(sum_rows(rows[:, :count]) / divisor, examples * height * width)
    relevant = rows[:, :count]
    blocks = divisor_near_root(count) if isinstance(count, int) else count // width
    blocks = tf.reshape(relevant, [tasks, blocks, -1, size])
    products = tf.cast(
        tf.matmul(blocks, blocks, transpose_a=True), tf.float64
    )  # [T, blocks, 9C, 9C]
    with_ones = tf.concat([rows, tf.ones_like(rows[..., :1])], axis=-1)
    return NormalizedPatches(
        tf.reshape(with_ones, [tasks, examples, height, width, size + 1]),
        sum_rows(relevant) / divisor,
        tf.reduce_sum(products, axis=1) / tf.cast(count, tf.float64),
    )


def convolve_normalized(
    x: NormalizedPatches, kernel: tf.Tensor | Shared, beta: tf.Tensor
) -> tf.Tensor:
    """Convolution and batch normalisation of the input images, as one matrix product: [T, examples, H, W, F].

    kernel: [T, 3, 3, C, F]; beta: [F]. The output before normalisation is patches P times kernel k, so its variance is
    k^T cov(P) k, and cov(P) does not change while the weights do: no statistics of the large output are needed.
    """
    kernel = per_task(kernel)
    tasks, filters = sizes(kernel)[0], kernel.shape[-1]
    matrix = tf.reshape(kernel, [tasks, -1, filters])  # [T, 9C, F]
    exact = tf.cast(matrix, tf.float64)
    variance = tf.reduce_sum(exact * (x.covariance @ exact), axis=1, keepdims=True)  # [T, 1, F]
    scaled = tf.cast(exact * tf.math.rsqrt(variance + BATCH_NORM_EPSILON), kernel.dtype)
    return convolve_patches(x.patches, tf.concat([scaled, beta - x.mean @ scaled], axis=1))


# Initial values ----------------------------------------------------------------------------------------------------


def initial_value(kind: str, shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
    """A parameter's initial value, a function of `seed` alone.

    kind: 'glorot' (uniform within ±sqrt(6 / (fan in + fan out))), 'normal' (stddev 1), 'truncated' (normal of stddev
    0.01, cut at two standard deviations), 'zeros' or 'ones'.
    """
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    initializers = tf.keras.initializers
    initializer = {
        'glorot': lambda: initializers.GlorotUniform(seed),
        'normal': lambda: initializers.RandomNormal(stddev=1.0, seed=seed),
        'truncated': lambda: initializers.TruncatedNormal(stddev=0.01, seed=seed),
        'zeros': initializers.Zeros,
        'ones': initializers.Ones,
    }[kind]()
    return np.asarray(initializer(shape, dtype='float32'))


# Checkpoints: FOLDER/model{iteration}.index and .data-..., of this program or of the TensorFlow 1 original; the one of
# best validation is FOLDER/best{iteration} ---------------------------------------------------------------------------

CHECKPOINTS_KEPT = 10
OBJECT_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'  # in checkpoints of TensorFlow 2 only
RUN_STATE = 'run/.ATTRIBUTES/VARIABLE_VALUE'  # what `write_checkpoint` adds


def checkpoints(folder: str | Path, kind: str = 'model') -> dict[int, str]:
    """{iteration: path without suffix} of the checkpoints in a folder, the oldest first; kind 'model' or 'best'."""
    found = (
        re.fullmatch(kind + r'(\d+)\.index', path.name)
        for path in Path(folder).glob(f'{kind}*.index')
    )
    return {
        i: str(Path(folder) / f'{kind}{i}')
        for i in sorted(int(match[1]) for match in found if match)
    }


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or damaged; the text is one sentence for the user."""


def write_checkpoint(
    checkpoint: tf.train.Checkpoint,
    folder: str | Path,
    iteration: int,
    state: dict | None = None,
    kind: str = 'model',
) -> str:
    """Writes FOLDER/{kind}{iteration} whole, then removes all but the newest ten (best: all others). Returns its path.

    state: what else belongs to the run, kept as JSON. tf.train.CheckpointManager would put a hyphen into the name, which
    the original does not have. The original's own checkpoints stay. Raises OSError if it cannot be written.
    """
    path = str(Path(folder) / f'{kind}{iteration}')
    try:
        # The index comes last, so a checkpoint that has one is complete.
        tf.train.Checkpoint(
            checkpoint, run=tf.Variable(json.dumps({**(state or {}), 'iteration': iteration}))
        ).write(path)
    except tf.errors.OpError as error:
        remove_leftovers(folder)
        raise OSError(f'{path} cannot be written ({first_line(error)})') from error
    for old in [*checkpoints(folder, kind).values()][
        : -(CHECKPOINTS_KEPT if kind == 'model' else 1)
    ]:
        if is_own(old):
            remove_checkpoint(old)
    return path


def remove_checkpoint(path: str):
    """Its index first, so that what is left if the process dies is a leftover, not a damaged checkpoint."""
    for file in sorted(
        Path(path).parent.glob(f'{Path(path).name}.*'), key=lambda file: file.suffix != '.index'
    ):
        file.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path):
    """Removes what a process that died or found no space left of checkpoints it was about to write or remove."""
    for path in Path(folder).glob('*.data-*'):
        if re.fullmatch(r'(model|best)\d+\.data-\d+-of-\d+(\.tempstate\d+)?', path.name) and (
            'tempstate' in path.name
            or not (path.parent / f'{path.name.split(".")[0]}.index').exists()
        ):
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
            f'{path} is not what its name says, but the checkpoint of iteration {state["iteration"]}'
        )
    return state


def stored_values(path: str) -> dict[str, np.ndarray]:
    """All that is in a checkpoint, by TensorFlow's keys, its checksums compared. Raises DamagedCheckpoint."""
    try:
        reader = tf.train.load_checkpoint(path)
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except (
        Exception
    ) as error:  # OpError, ValueError, IndexError and others, depending on where the damage is
        raise DamagedCheckpoint(
            f'{path} cannot be read as a checkpoint; remove it or name another with --test_iter '
            f'({first_line(error)})'
        ) from error


def first_line(error: Exception) -> str:
    """The first line that says something: TensorFlow puts headings and places in the program before it."""
    headings = ('Graph execution error', 'Detected at node', 'File ', '<stack traces', ' ', '\t')
    said = [line for line in str(error).splitlines() if line and not line.startswith(headings)]
    return (said or [type(error).__name__])[0]


def read_checkpoint(path: str, names: list[str]) -> tuple[dict[str, np.ndarray], bool]:
    """Parameters by name from a checkpoint, and whether it holds Adam's state too, as all of this program that are not
    published without.

    names: of the network's parameters, in the order in which it creates them. The TensorFlow 1 original left its
    biases, and all weights of the fully connected network, without names; TensorFlow called them Variable,
    Variable_1, ... in that order. Raises DamagedCheckpoint, and ValueError if parameters have names not in `names`.
    """
    stored = stored_values(path)
    if OBJECT_GRAPH in stored:
        found = (
            re.fullmatch(r'(?:weights|norms)/(.+)/\.ATTRIBUTES/VARIABLE_VALUE', key)
            for key in stored
        )
        values = {match[1].replace('.S', '/'): stored[match[0]] for match in found if match}
    else:
        values = {
            key.removeprefix('model/'): stored[key]
            for key in stored
            if re.match(r'model/(?!.*/Adam)', key)
        }
        for i, name in enumerate([name for name in names if name not in values]):
            if (unnamed := f'Variable_{i}' if i else 'Variable') in values:
                values[name] = values.pop(unnamed)
    if unknown := [name for name in values if name not in names]:
        raise ValueError(
            f'{path} is of another architecture: it has {", ".join(unknown)}, and the network that the '
            'flags describe has not'
        )
    return values, any(key.startswith('metatrain_optimizer/') for key in stored)


# Devices that share the work ------------------------------------------------------------------------------------------

ASKING_INTERVAL = 5  # iterations between the workers' questions whether one of them is to stop


class Replicas:
    """The devices, of this process and of others, that have equal shares of the tasks of every meta-batch.

    strategy: of tf.distribute, mirrored or multi-worker mirrored, or None for one device. Variables are each process's
    own, and equal: all start from the first one's, see `agree`, and take the same steps.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None):
        self.strategy = strategy
        self.count = strategy.num_replicas_in_sync if strategy else 1
        self.local = len(strategy.extended.worker_devices) if strategy else 1
        cluster = strategy.cluster_resolver if strategy else None
        self.process = (cluster.task_id if cluster and cluster.cluster_spec() else None) or 0
        self.is_chief = self.process == 0  # the one that prints and writes

    def share(self, tasks: int) -> slice:
        """Which of a meta-batch's tasks are this process's. Raises ValueError if they cannot be shared equally."""
        if tasks % self.count:
            raise ValueError(
                f'--meta_batch_size={tasks} tasks cannot be shared equally by {self.count} replicas: make it a multiple of '
                f'{self.count}'
            )
        each = tasks // self.count * self.local
        return slice(self.process * each, (self.process + 1) * each)

    def place(self, batch: Batch) -> Batch:
        """This process's tasks on its devices, for `run`."""
        if self.strategy is None:
            return batch
        each, first = batch.inputa.shape[0] // self.local, self.process * self.local
        part = lambda i: Batch(
            *(tf.convert_to_tensor(values[i * each : (i + 1) * each]) for values in batch)
        )
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: part(context.replica_id_in_sync_group - first)
        )

    def mean(self, function: Callable, batch: Batch) -> list[tf.Tensor]:
        """The mean over replicas of the tensors that function(share of the batch) returns; batch: from `place`."""
        if self.strategy is None:
            return function(batch)
        shapes = []

        def replica(share):
            values = function(share)
            shapes[:] = [value.shape for value in values]
            flat = tf.concat(
                [tf.reshape(value, [-1]) for value in values], axis=0
            )  # one message instead of many
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, flat)

        flat = self._first(self.strategy.run(replica, (batch,)))
        parts = tf.split(flat, [shape.num_elements() for shape in shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes)]

    def gather(self, function: Callable, batch: Batch) -> tf.Tensor:
        """What function(share of the batch) returns, [n, tasks of the share], for all tasks, [n, T]; batch: from `place`."""
        if self.strategy is None:
            return function(batch)

        # As a sum: each replica fills its own columns.
        def replica(share):
            values, context = function(share), tf.distribute.get_replica_context()
            mine = tf.one_hot(
                context.replica_id_in_sync_group, self.count, dtype=values.dtype
            )  # [replicas]
            columns = tf.where(
                mine[:, tf.newaxis] > 0, values[:, tf.newaxis], tf.zeros_like(values)[:, tf.newaxis]
            )
            return context.all_reduce(tf.distribute.ReduceOp.SUM, columns)  # [n, replicas, t]

        total = self._first(self.strategy.run(replica, (batch,)))
        return tf.reshape(total, [total.shape[0], -1])

    def agree(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The first process's values, in all of them."""
        if self.strategy is None or self.count == self.local:
            return values
        return [self._sum(value if self.is_chief else np.zeros_like(value)) for value in values]

    def any(self, flag: bool, iteration: int) -> bool:
        """Whether the flag is set in one of the processes; they ask each other every few iterations, as that takes time."""
        if self.strategy is None or self.count == self.local:
            return flag
        return iteration % ASKING_INTERVAL == 0 and bool(self._sum(np.float32(flag)) > 0)

    def _sum(self, value: np.ndarray) -> np.ndarray:
        """Over processes of one replica each, or of equally many, whose values are counted once."""
        return self._sum_replicas(tf.convert_to_tensor(value)).numpy()

    @tf.function(autograph=False, reduce_retracing=False)
    def _sum_replicas(self, value: tf.Tensor) -> tf.Tensor:
        def replica():
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % self.local == 0  # of its process
            return context.all_reduce(
                tf.distribute.ReduceOp.SUM, tf.where(first, value, tf.zeros_like(value))
            )

        return self._first(self.strategy.run(replica))

    def _first(self, values) -> tf.Tensor:
        return self.strategy.experimental_local_results(values)[0]


# Run folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from training in a folder while entered, and no longer than this process lives.

    Does nothing where the system has no locks. Raises BlockingIOError if another process holds it.
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    gpus = len(tf.config.list_physical_devices('GPU'))
    return (
        f'{cores} core{"s" * (cores != 1)}, '
        + f'{gpus} GPU{"s" * (gpus != 1)}, ' * (gpus > 0)
        + f'{platform.machine()}, Python {platform.python_version()}, TensorFlow {tf.__version__}'
    )


def event_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob('events.out.tfevents.*'))


def forget_summaries(folder: str | Path, start: int):
    """Removes the summaries of iteration `start` and later, which a run that continues there will write again.

    What cannot be read, the end of a file whose writer died, goes with them.
    """
    for path in event_files(folder):
        events, kept = read_events(path), 0
        beside = path.with_name(path.name.replace('events.', 'part.'))
        with tf.io.TFRecordWriter(str(beside)) as writer:
            for record in events:
                event = tf.compat.v1.Event.FromString(record)
                if event.HasField('file_version') or event.step < start:
                    writer.write(record)
                    kept += not event.HasField('file_version')
        beside.replace(path) if kept else (beside.unlink(), path.unlink())


def read_events(path: Path) -> list[bytes]:
    """The serialised events of a file, up to the first that is damaged."""
    records = []
    try:
        for record in tf.data.TFRecordDataset(str(path)):
            records.append(record.numpy())
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError):
        pass
    return records


def read_evaluation(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, standard deviations and halves of the 95 % intervals, each [1 + updates], of a test_*.csv. Raises ValueError if it is none."""
    try:
        with open(path, newline='') as file:
            header, *rows = csv.reader(file)
        means, deviations, intervals = np.array(rows, float)
        if header != [f'update{i}' for i in range(len(means))]:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'{path} is not the table main.py writes (a header, then means, standard deviations and '
            'confidence intervals); evaluate the run again with --train=False'
        ) from None
    return means, deviations, intervals


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """{tag: {iteration: value}} of the numbers among a run's summaries, in order of iteration."""
    found = {}
    for path in event_files(folder):
        for event in map(tf.compat.v1.Event.FromString, read_events(path)):
            for value in event.summary.value:
                if (
                    value.tensor.dtype == tf.float32.as_datatype_enum
                ):  # others are texts and pictures
                    found.setdefault(value.tag, {})[event.step] = float(
                        tf.make_ndarray(value.tensor)
                    )
    return {tag: dict(sorted(values.items())) for tag, values in found.items()}


# Pictures for TensorBoard: [height, width, 3] uint8 ----------------------------------------------------------------------

MARGIN = 14  # pixels, for a line of text


def task_picture(batch: Batch, image_shape: tuple[int, int, int], task: int = 0) -> np.ndarray:
    """A task's support images, a row for each of the first two shots, above its query images alike; labels above images.

    batch: arrays; image_shape: (height, width, channels).
    """
    height, width, channels = image_shape
    ways, gap = batch.labela.shape[2], MARGIN + 2
    parts = [
        (inputs[task, : 2 * ways], labels[task, : 2 * ways])  # [examples, D], [examples, N]
        for inputs, labels in [(batch.inputa, batch.labela), (batch.inputb, batch.labelb)]
    ]
    rows = [len(labels) // ways for _, labels in parts]
    canvas = Image.new(
        'RGB', (ways * (width + 4), sum(rows) * (height + gap) + 2 * MARGIN), 'white'
    )
    draw, top = ImageDraw.Draw(canvas), 0
    for title, (inputs, labels) in zip(('support', 'query'), parts):
        draw.text((2, top), title, fill='red')
        top += MARGIN
        for i, (image, label) in enumerate(zip(inputs, labels)):
            x, y = i % ways * (width + 4), top + i // ways * (height + gap)
            pixels = np.broadcast_to(
                np.uint8(255 * image.reshape(height, width, channels)), (height, width, 3)
            )
            draw.text((x + 2, y), str(label.argmax()), fill='black')
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x, y + MARGIN))
        top += len(labels) // ways * (height + gap)
    return np.asarray(canvas)


def fit_picture(
    curves: dict[str, np.ndarray], points: np.ndarray, size: tuple[int, int] = (480, 320)
) -> np.ndarray:
    """Curves {colour and name, as 'red truth': [n, 2]} and points [K, 2] of a regression task; x in [-5, 5], y in [-6, 6]."""
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    place = lambda xy: [
        tuple(p)
        for p in (np.clip(xy, -6, 6) * [1, -1] + [5, 6]) / [10, 12] * [size[0] - 1, size[1] - 1]
    ]
    draw.line(place(np.array([[-5, 0], [5, 0]])), fill='lightgray')
    for i, (name, curve) in enumerate(curves.items()):
        colour, _, text = name.partition(' ')
        draw.line(place(curve), fill=colour, width=2)
        draw.text((4, 2 + i * MARGIN), text, fill=colour)
    for x, y in place(points):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='purple')
    return np.asarray(canvas)
