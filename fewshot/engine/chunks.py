"""Chunks of a meta-batch: tasks that run together."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from data_generator import Batch
from fewshot.engine.cores import cores

CHUNK_SIZE = 2**14  # input values of the tasks that run together, see `chunk_size`


def pairwise_sum(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Adds up neighbours, then their sums, and so on.

    The same numbers are added, whether one device has all of the values or two, or four, have equal
    parts. Rounding otherwise grows to percents of the weights within 20 iterations.
    """
    while len(values) > 1:
        values = [tf.add_n(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def chunks(batch: Batch, network=None) -> list[Batch]:
    """Cuts a meta-batch into chunks of `chunk_size` tasks; the last may have fewer."""
    tasks, each = batch.inputa.shape[0], chunk_size(batch, network)
    return [Batch(*(values[i : i + each] for values in batch)) for i in range(0, tasks, each)]


def in_a_loop(function: Callable, batch: Batch, types, network=None) -> list:
    """Calls a function on each chunk of a meta-batch, and returns the results in order.

    types: those of a result, in the same nesting. The equal chunks are turns of a loop of the
    graph, as many at a time as there are cores: with a copy of the function's operations for each
    of them, the graph of Omniglot, 20-way 1-shot, takes 13 s more to make, and a tenth more memory
    to run. But one turn waits for another where programs read variables: if the network's
    `reads_variables` is true, there is no loop.
    """
    tasks, each = batch.inputa.shape[0], chunk_size(batch, network)
    count = tasks // each
    if count == 1 or getattr(network, 'reads_variables', False):
        return [function(chunk) for chunk in chunks(batch, network)]
    equal = [tf.reshape(v[: count * each], [count, each, *v.shape[1:]]) for v in batch]
    stacks = tf.map_fn(
        function, Batch(*equal), fn_output_signature=types, parallel_iterations=cores()
    )  # nested tensors [count, ...]
    flat = [tf.unstack(stack, count) for stack in tf.nest.flatten(stacks)]
    parts = [tf.nest.pack_sequence_as(types, part) for part in zip(*flat)]
    if count * each < tasks:
        parts.append(function(Batch(*(values[count * each :] for values in batch))))
    return parts


def chunk_size(batch: Batch, network=None) -> int:
    """Returns how many tasks run together: chunks for all cores, each small enough for the caches.

    All chunks have equally many tasks, because XLA compiles for each number of them, unless that
    made the chunks less than half as large as they can be. There is one chunk on a GPU, which wants
    all the work at once, and where the tasks are tiny. A network may say how many it takes at most.
    """
    tasks, limit = batch.inputa.shape[0], getattr(network, 'most_tasks', None)
    size = max(batch.inputa.shape[1], batch.inputb.shape[1]) * batch.inputa.shape[2]
    if limit:
        size = max(size, CHUNK_SIZE // limit)
    elif tasks * size <= CHUNK_SIZE // 4 or tf.config.list_physical_devices('GPU'):
        return tasks
    most = min(max(CHUNK_SIZE // size, 1), tasks)
    equal = max(n for n in range(1, most + 1) if tasks % n == 0)
    return equal if 2 * equal >= most else most
