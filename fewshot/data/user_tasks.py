"""Tasks of one's own: any object with batch(split, iteration, num_tasks)."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data_generator import SPLITS, Batch, DataGenerator, _asked
from fewshot.data.batches import named_batch


class BadTasks(ValueError):
    """A user's tasks are not what they must be; the text is one sentence for the user."""


class UserTasks(DataGenerator):
    """Tasks of one's own: any object with batch(split, iteration, num_tasks).

    It returns a utils.Batch, or a dict of its four names, for each of the splits 'train', 'val' and
    'test', the same whenever it is called with the same arguments. Labels of a classifier are
    one-hot in every batch; other labels are those of a regression, unless the object's attribute
    `objective` says 'accuracy' or 'loss'. Optional too: example_shape, for networks that want more
    than [D], and all attributes of DataGenerator that say how tasks are trained on, evaluated and
    shown.

    tasks: the object. name: of it, for messages. splits: those that are checked now; another one is
    checked when it is first asked for. num_tasks: how many are asked for in a check.
    Raises BadTasks, here and later, with the array and the shape that is wanted.
    """

    def __init__(
        self,
        tasks,
        name: str = 'the tasks object',
        splits: Iterable[str] = SPLITS,
        num_tasks: int = 4,
    ):
        if not callable(getattr(tasks, 'batch', None)):
            raise BadTasks(
                f'{name} must be an object with batch(split, iteration, num_tasks), but it is a '
                f'{type(tasks).__name__}'
            )
        self.source, self.name, self.objective = tasks, name, None
        self.shapes = {}  # {split: {array: [examples, size]}}
        self.newest = {}  # {split: ((iteration, num_tasks), batch)}
        self.busy = threading.Lock()  # training draws ahead in a thread of its own
        batches = [self.batch(split, 0, num_tasks) for split in splits]
        inputs, labels = batches[0].inputa, [b for batch in batches for b in batch[1::2]]
        super().__init__(inputs.shape[2], labels[0].shape[2], num_draws=0, seed=0)
        self.objective = label_objective(tasks, labels, name)
        self.tasks_at_once = 100 if inputs[0].size <= 2**12 else 4
        for attribute in SHOWN:
            if hasattr(tasks, attribute):
                setattr(self, attribute, getattr(tasks, attribute))
        shots = labels[0].shape[1] / self.dim_output if self.objective == 'accuracy' else None
        self.example_shape = self._example_shape()
        self.model_settings = {
            'example_shape': self.example_shape,
            'dim_output': self.dim_output,
            'objective': self.objective,
            'shots': shots,
        }

    def batch(
        self, split: str, iteration: int, num_tasks: int, tasks: slice = slice(None)
    ) -> Batch:
        asked = _asked(split, iteration, num_tasks)
        with self.busy:
            held = self.newest.get(split)
            if not held or held[0] != asked:  # else another slice of the same tasks
                held = self.newest[split] = asked, self._drawn(split, *asked)
        return Batch(*(array[tasks] for array in held[1]))

    def batches(
        self,
        split: str,
        first_iteration: int,
        count: int,
        num_tasks: int,
        tasks: slice = slice(None),
    ) -> Batch:
        iterations = range(first_iteration, first_iteration + count)
        drawn = [self.batch(split, i, num_tasks, tasks) for i in iterations]
        return Batch(*map(np.stack, zip(*drawn)))

    def picture(self, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray | None:
        own = getattr(self.source, 'picture', None)
        return own(batch, evaluate) if own else None

    def _drawn(self, split: str, iteration: int, num_tasks: int) -> Batch:
        """The user's batch, checked."""
        arguments = (split, iteration, num_tasks)
        where = f'{self.name}: batch{arguments}'
        batch = user_batch(self.source.batch(*arguments), num_tasks, where)
        if self.objective == 'accuracy':
            check_one_hot(batch, where, getattr(self.source, 'objective', None))
        shapes = {name: array.shape[1:] for name, array in zip(Batch._fields, batch)}
        if split not in self.shapes:
            self._check_split(batch, shapes, arguments)
        for name, shape in self.shapes[split].items():
            if shapes[name] != shape:
                raise BadTasks(
                    f'{where}: {name} is {[num_tasks, *shapes[name]]}, but it was '
                    f'{[num_tasks, *shape]} before, and must stay so'
                )
        return batch

    def _check_split(self, batch: Batch, shapes: dict, arguments: tuple):
        """The first batch of a split."""
        where = f'{self.name}: batch{arguments}'
        for other, known in self.shapes.items():
            for name in ('inputa', 'labela'):
                if known[name][-1] != shapes[name][-1]:
                    raise BadTasks(
                        f'{where}: {name} must be [tasks, examples, {known[name][-1]}] as in the '
                        f'split {other}, but it is {[arguments[-1], *shapes[name]]}'
                    )
        again = user_batch(self.source.batch(*arguments), arguments[-1], where)
        for name, one, other in zip(Batch._fields, batch, again):
            if not np.array_equal(one, other):
                raise BadTasks(
                    f'{where}: {name} was another one the second time, but it must be a function '
                    'of these arguments; draw random numbers from '
                    'np.random.default_rng([seed, iteration])'
                )
        self.shapes[arguments[0]] = shapes

    def _example_shape(self) -> list[int]:
        shape = [*map(int, getattr(self.source, 'example_shape', None) or [self.dim_input])]
        if math.prod(shape) != self.dim_input:
            raise BadTasks(
                f'{self.name}: example_shape is {shape}, but inputa has {self.dim_input} values '
                'per example'
            )
        return shape


# The attributes that `UserTasks` takes from the user's object.
SHOWN = (
    'validates',
    'iterations_at_once',
    'print_factor',
    'updates_shown',
    'tasks_at_once',
    'picture_name',
)


def user_batch(values, num_tasks: int, where: str) -> Batch:
    """The four arrays of a user's meta-batch as float32, copied. Raises BadTasks."""
    try:
        values = named_batch(values, f'{where} must return')
    except ValueError as error:
        raise BadTasks(str(error)) from None
    arrays = [
        user_array(value, num_tasks, f'{where}: {name}')
        for name, value in zip(Batch._fields, values)
    ]
    batch = Batch(*arrays)
    for name, other, axis in PAIRS:
        one, two = getattr(batch, name), getattr(batch, other)
        size = one.shape[axis]
        if two.shape[axis] != size:
            wanted = f'[{num_tasks}, examples, {size}]'
            if axis == 1:
                wanted = f'[{num_tasks}, {size}, size]'
            raise BadTasks(
                f'{where}: {other} must be {wanted}, as {name} is {[*one.shape]}, but it is '
                f'{[*two.shape]}'
            )
    return batch


# Which arrays of a batch have the same size along which axis.
PAIRS = (
    ('inputa', 'labela', 1),
    ('inputb', 'labelb', 1),
    ('inputa', 'inputb', 2),
    ('labela', 'labelb', 2),
)


def user_array(value, num_tasks: int, where: str) -> np.ndarray:
    """[tasks, examples, size] float32, copied. Raises BadTasks."""
    wanted = f'[{num_tasks}, examples, size]'
    if np.ma.is_masked(value):
        raise BadTasks(f'{where} must be {wanted} without a mask, which would be lost: fill it')
    kind = 'one-hot or values' if 'label' in where.rpartition(' ')[2] else 'flattened examples'
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise BadTasks(f'{where} must be an array {wanted}, but it is none ({error})') from error
    if array.dtype.kind not in 'fiub':
        raise BadTasks(f'{where} must be numbers, {wanted}, but it is of type {array.dtype}')
    if array.ndim != 3 or array.shape[0] != num_tasks or not array.size:
        raise BadTasks(f'{where} must be {wanted}, {kind}, but it is {[*array.shape]}')
    with np.errstate(over='ignore'):
        array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise BadTasks(f'{where} must be finite, {wanted}, but {count} values are NaN or infinite')
    return array


def is_one_hot(labels: np.ndarray) -> bool:
    """[T, examples, out]; a single output is none."""
    values = np.isin(labels, (0, 1)).all() and (labels.sum(2) == 1).all()
    return bool(labels.shape[2] > 1 and values)


def check_one_hot(batch: Batch, where: str, asked: str | None):
    """Raises BadTasks if labels are not; asked: the objective that the user's object says."""
    reason = 'objective is accuracy' if asked else 'those of the first batches are'
    for name in ('labela', 'labelb'):
        if not is_one_hot(label := getattr(batch, name)):
            raise BadTasks(
                f'{where}: {name} must be one-hot, since {reason}, but its values are from '
                f"{label.min():g} to {label.max():g}; for a regression set objective = 'loss'"
            )


def label_objective(tasks, labels: Sequence[np.ndarray], name: str) -> str:
    """'accuracy' if all labels are one-hot, else 'loss', unless the object says which.

    labels: [T, examples, out] each. Raises BadTasks.
    """
    asked = getattr(tasks, 'objective', None)
    one_hot = all(map(is_one_hot, labels))
    if asked is None:
        return 'accuracy' if one_hot else 'loss'
    if asked not in ('accuracy', 'loss'):
        raise BadTasks(f"{name}: objective must be 'accuracy' or 'loss', but it is {asked!r}")
    if asked == 'accuracy' and not one_hot:
        raise BadTasks(
            f'{name}: objective is accuracy, so labela and labelb must be one-hot, [tasks, '
            f'examples, classes], but labela is {[*labels[0].shape]} with values from '
            f'{labels[0].min():g} to {labels[0].max():g}'
        )
    return asked
