"""The contract of a meta-batch, which models, tasks of one's own and Keras's fit check here."""

from collections.abc import Mapping

import tensorflow as tf

from data_generator import Batch
from fewshot.checks import real_numbers

NAMED = 'Batch(inputa=..., labela=..., inputb=..., labelb=...)'
# Pairs of a batch's arrays that have the same size along an axis.
EQUAL_AXES = (
    ('inputa', 'labela', 1, 'examples per task'),
    ('inputb', 'labelb', 1, 'examples per task'),
    ('inputa', 'inputb', 2, 'values per example'),
    ('labela', 'labelb', 2, 'values per example'),
)


def named_batch(values, text: str = 'a meta-batch must be', remedy: str = NAMED) -> Batch:
    """Returns a Batch, or a dict of its four names, as a Batch.

    Raises ValueError, which begins with `text`, for others. Tuples are refused too: their order may
    be another, and equal sizes would not tell.
    """
    if isinstance(values, Batch):
        return values
    if isinstance(values, Mapping) and {*values} == {*Batch._fields}:
        return Batch(**values)
    found = f'it is of type {type(values).__name__}'
    if isinstance(values, Mapping):
        found = f'the names are {", ".join(map(str, values)) or "none"}'
    raise ValueError(
        f'{text} a data_generator.Batch, or a dict of four arrays, {", ".join(Batch._fields)}, but '
        f'{found}: write {remedy}'
    )


def fitting_batch(values, network=None, tasks: int | None = None) -> Batch:
    """Returns a Batch, or a dict of its names, as a Batch that fits together and fits the network.

    Tensors, and specs of them, come back as they are, anything else as arrays. A size that a graph
    does not know fits all. network: its sizes are required, as far as it has them. tasks: the
    number that is required. Raises ValueError with the name of the array, and its shape.
    """
    batch = Batch(*map(_real_numbers, Batch._fields, named_batch(values)))
    shapes = {name: _sizes(array.shape) for name, array in zip(Batch._fields, batch)}
    whose = 'of inputa' if tasks is None else 'asked for'
    wanted = (shapes['inputa'] or [None])[0] if tasks is None else tasks
    for name, shape in shapes.items():
        if len(shape) != 3 or not _equal(shape[0], wanted):
            raise ValueError(
                f'{name} must be [tasks, examples, size] of numbers, with the {wanted} tasks '
                f'{whose}, but it is {shape}'
            )
        size = getattr(network, 'dim_input' if name.startswith('input') else 'dim_output', None)
        if not _equal(shape[2], size):
            raise ValueError(f'{name} is {shape}, but the network takes [tasks, examples, {size}]')
    for one, other, axis, what in EQUAL_AXES:
        first, second = shapes[one][axis], shapes[other][axis]
        if not _equal(first, second):
            raise ValueError(f'{one} has {first} {what}, but {other} has {second}')
    return batch


def as_tensors(batch: Batch, network=None) -> Batch:
    """Converts a meta-batch to tensors. Raises ValueError as fitting_batch does."""
    return Batch(*map(tf.convert_to_tensor, fitting_batch(batch, network)))


def checked_batch(batch: Batch, network, dtype: tf.DType) -> Batch:
    """Converts a meta-batch to tensors of the model's dtype. Raises as fitting_batch does."""
    return Batch(*(tf.cast(values, dtype) for values in as_tensors(batch, network)))


def _real_numbers(name: str, values):
    """Returns an array, or a tensor or spec as is. Raises ValueError if it has no real numbers."""
    if not isinstance(values, tf.Tensor | tf.Variable | tf.TensorSpec):
        return real_numbers(name, values)
    kind = values.dtype
    if not (kind.is_floating or kind.is_integer or kind.is_bool):
        raise ValueError(f'{name} must be an array of real numbers, but it is of {kind.name}')
    return values


def _sizes(shape) -> list[int | None]:
    """Lists the sizes of an array, tensor or spec; none if its number of axes is not known."""
    return [] if tf.TensorShape(shape).rank is None else [*shape]


def _equal(one: int | None, other: int | None) -> bool:
    """Whether two sizes may be the same; None: not known."""
    return None in (one, other) or one == other
