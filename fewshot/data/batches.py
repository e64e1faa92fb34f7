"""Meta-batches, checked."""

from collections.abc import Mapping

import tensorflow as tf

from data_generator import Batch
from fewshot.checks import first_line, real_numbers

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


def as_tensors(batch: Batch) -> Batch:
    """A meta-batch as tensors, see `utils.named_batch`. Raises ValueError for what is none."""
    batch = named_batch(batch)
    try:
        return Batch(*map(tf.convert_to_tensor, batch))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'a meta-batch must be four arrays, {", ".join(Batch._fields)} ({first_line(error)})'
        ) from error


def checked_batch(batch: Batch, network, dtype: tf.DType) -> Batch:
    """A meta-batch in the model's dtype; see utils.Batch.

    Raises ValueError if it does not fit the network.
    """
    batch = as_tensors(batch)
    tasks = batch.inputa.shape[0] if batch.inputa.shape.rank else None
    for name, values in zip(Batch._fields, batch):
        real = values.dtype.is_floating or values.dtype.is_integer or values.dtype.is_bool
        if values.shape.rank != 3 or values.shape[0] != tasks or not real:
            raise ValueError(
                f'{name} must be [tasks, examples, size] of numbers, with the {tasks} tasks '
                f'of inputa, but it is {values.shape.as_list()} of {values.dtype.name}'
            )
        size = getattr(network, 'dim_input' if name.startswith('input') else 'dim_output', None)
        if size not in (None, values.shape[2]):
            raise ValueError(
                f'{name} is {values.shape.as_list()}, but the network takes [tasks, examples, '
                f'{size}]'
            )
    pairs = [(batch.inputa, batch.labela, 'a'), (batch.inputb, batch.labelb, 'b')]
    for inputs, labels, name in pairs:
        if inputs.shape[1] != labels.shape[1]:
            raise ValueError(
                f'input{name} has {inputs.shape[1]} examples per task, but label{name} has '
                f'{labels.shape[1]}'
            )
    return Batch(*(tf.cast(values, dtype) for values in batch))


def arrays_of(batch: Batch) -> Batch:
    """A Batch, or a dict of its names, as arrays. Raises ValueError, with the name of the array."""
    batch = named_batch(batch)
    return Batch(*map(real_numbers, Batch._fields, batch))
