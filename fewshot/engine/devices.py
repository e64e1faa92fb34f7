"""The devices that compute a meta-batch together, and settings that suit them."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress

from fewshot.start import has_nvidia_gpu

import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.engine.cores import cores

ASKING_INTERVAL = 5  # iterations between the workers' checks whether one of them is to stop


def keep_freed_memory():
    """Lets the C library keep freed memory for the next step, instead of giving it back at once.

    A step frees the memory that it allocates, and pieces of megabytes would go back to the system
    each time. Their pages then come back one by one, cleared: on virtual machines that took 12 to
    35 % of a step's time. There are four arenas of memory: with one, threads wait for each other,
    and a step takes 5 to 10 % longer. Only glibc has the settings; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == 'glibc':
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them
        settings = {trim_threshold: -1, mmap_max: 0, arena_max: 4}  # -1: never
        for setting, value in settings.items():
            ctypes.CDLL(None).mallopt(setting, value)


def set_up_gpus(tf32: bool = False):
    """Makes products exact and memory small on GPUs; call it before TensorFlow's first operation.

    By default TensorFlow rounds the factors of float32 products to TF32, which has 10 bits of
    mantissa, on GPUs that can: here it does so only if `tf32`. By default it also takes all the
    memory of all GPUs; if they are in use already, that stays as it is. The function says so if the
    machine has a GPU that TensorFlow does not find.
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


def process_index(cluster: dict, kind: str, index: int) -> int:
    """Returns the number of a process of a cluster, {kind: addresses}; a chief precedes workers."""
    return int(index) + (len(cluster.get('chief', [])) if kind == 'worker' else 0)


class Replicas:
    """The devices, of this process and of others, that have equal parts of every meta-batch.

    strategy: one of tf.distribute, mirrored or multi-worker mirrored, or None for one device. Each
    process has variables of its own, which are equal: all start from the first process's, see
    `agree`, and take the same steps.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None):
        self.strategy = strategy
        self.count = strategy.num_replicas_in_sync if strategy else 1
        self.local = len(strategy.extended.worker_devices) if strategy else 1
        cluster, self.process = strategy.cluster_resolver if strategy else None, 0
        if cluster and cluster.cluster_spec():
            spec = cluster.cluster_spec().as_dict()
            self.process = process_index(spec, cluster.task_type, cluster.task_id)
        self.is_chief = self.process == 0  # the one that prints and writes

    def slice_of(self, tasks: int) -> slice:
        """Returns this process's slice of a meta-batch's tasks.

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
        """Places this process's tasks [T, ...] on its devices, for `mean` and `gather`."""
        if self.strategy is None:
            return batch
        each, first = batch.inputa.shape[0] // self.local, self.process * self.local

        def part(context) -> Batch:
            i = context.replica_id_in_sync_group - first
            of_replica = slice(i * each, (i + 1) * each)
            return Batch(*(tf.convert_to_tensor(values[of_replica]) for values in batch))

        return self.strategy.experimental_distribute_values_from_function(part)

    def mean(self, function: Callable, batch: Batch) -> list[tf.Tensor]:
        """Averages the tensors that function(a replica's part [T, ...]) returns over the replicas.

        batch: the result of `place`.
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
        """Gathers the results of function(a replica's part), [n, tasks of the part]: [n, T].

        batch: the result of `place`.
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
        """Returns the first process's values, arrays [...], in all processes."""
        if self.strategy is None or self.count == self.local:
            return values
        return [self._sum(value if self.is_chief else np.zeros_like(value)) for value in values]

    def any(self, flag: bool, iteration: int) -> bool:
        """Whether the flag is set in one of the processes.

        They ask each other every few iterations only, because that takes time.
        """
        if self.strategy is None or self.count == self.local:
            return flag
        return iteration % ASKING_INTERVAL == 0 and bool(self._sum(np.float32(flag)) > 0)

    def _sum(self, value: np.ndarray) -> np.ndarray:
        """Sums a value over the processes, which have equally many replicas: each counts once."""
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


def machine() -> str:
    """Describes the hardware and software of this process in a few words."""
    counts = {'core': cores(), 'GPU': len(tf.config.list_physical_devices('GPU'))}
    parts = [f'{count} {thing}{"s" * (count != 1)}' for thing, count in counts.items() if count]
    parts += [platform.machine(), f'Python {platform.python_version()}']
    return ', '.join([*parts, f'TensorFlow {tf.__version__}'])
