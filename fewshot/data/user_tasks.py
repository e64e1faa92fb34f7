"""Tasks of one's own: any object with batch(split, iteration, num_tasks)."""

import math
import threading
from collections.abc import Callable, Iterable

import numpy as np

from data_generator import SPLITS, Batch, DataGenerator, checked_request
from fewshot.checks import finite_numbers
from fewshot.data.batches import fitting_batch


class BadTasks(ValueError):
    """A user's tasks are not what they must be; the text is one sentence for the user."""


class UserTasks(DataGenerator):
    """Tasks of one's own: any object with batch(split, iteration, num_tasks).

    It returns a data_generator.Batch, or a dict of its four names, for each of the splits 'train',
    'val' and 'test', the same whenever it is called with the same arguments. Labels of a classifier
    are one-hot in every batch; others are those of a regression, unless the object's attribute
    `objective` says 'accuracy' or 'loss'. Optional too: example_shape, for networks that want more
    than [D], and those of DataGenerator's attributes that OPTIONAL names.

    tasks: the object. name: its name in messages. splits: the splits that are checked now; another
    one is checked when it is first asked for. num_tasks: how many are asked for in a check.
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
        self.source, self.name = tasks, name
        self.objective = asked = getattr(tasks, 'objective', None)
        if asked not in (None, 'accuracy', 'loss'):
            raise BadTasks(f"{name}: objective must be 'accuracy' or 'loss', but it is {asked!r}")
        self.shapes = {}  # {split: {array: [examples, size]}}
        self.newest = {}  # {split: ((iteration, num_tasks), batch)}
        self.busy = threading.Lock()  # training draws ahead in a thread of its own
        batches = [self.batch(split, 0, num_tasks) for split in splits]
        inputs, labels = batches[0].inputa, [b for batch in batches for b in batch[1::2]]
        super().__init__(inputs.shape[2], labels[0].shape[2], num_draws=0, seed=0)
        self.objective = asked or ('accuracy' if all(map(is_one_hot, labels)) else 'loss')
        self.tasks_at_once = 100 if inputs[0].size <= 2**12 else 4
        for attribute in OPTIONAL:
            if hasattr(tasks, attribute):
                setattr(self, attribute, getattr(tasks, attribute))
        shape = [*map(int, getattr(tasks, 'example_shape', None) or [self.dim_input])]
        if math.prod(shape) != self.dim_input:
            raise BadTasks(
                f'{name}: example_shape is {shape}, but inputa has {self.dim_input} values per '
                'example'
            )
        self.model_settings = {
            'example_shape': shape,
            'dim_output': self.dim_output,
            'objective': self.objective,
            'shots': labels[0].shape[1] / self.dim_output if self.objective == 'accuracy' else None,
        }

    def batch(
        self, split: str, iteration: int, num_tasks: int, tasks: slice = slice(None)
    ) -> Batch:
        asked = checked_request(split, iteration, num_tasks)
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
        """Returns `batch` of `count` successive iterations, stacked: [count, T, ...]."""
        iterations = range(first_iteration, first_iteration + count)
        drawn = [self.batch(split, i, num_tasks, tasks) for i in iterations]
        return Batch(*map(np.stack, zip(*drawn)))

    def picture(self, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray | None:
        own = getattr(self.source, 'picture', None)
        return own(batch, evaluate) if own else None

    def _drawn(self, split: str, iteration: int, num_tasks: int) -> Batch:
        """Draws the user's batch and checks it; the first of a split is drawn twice."""
        where = f'{self.name}: batch{(split, iteration, num_tasks)}'
        batch = user_batch(self.source.batch(split, iteration, num_tasks), num_tasks, where)
        if self.objective == 'accuracy':
            check_one_hot(batch, where, getattr(self.source, 'objective', None))
        shapes = {name: [*array.shape[1:]] for name, array in zip(Batch._fields, batch)}
        for other, known in self.shapes.items():
            for name, shape in shapes.items():  # in the same split both sizes, else the last
                if known[name] != shape if other == split else known[name][1] != shape[1]:
                    raise BadTasks(
                        f'{where}: {name} is {[num_tasks, *shape]}, but it was '
                        f'{[num_tasks, *known[name]]} in the split {other}, and must stay so'
                    )
        if split not in self.shapes:
            again = user_batch(self.source.batch(split, iteration, num_tasks), num_tasks, where)
            for name, one, other in zip(Batch._fields, batch, again):
                if not np.array_equal(one, other):
                    raise BadTasks(
                        f'{where}: {name} was another one the second time, but it must be a '
                        'function of these arguments; draw random numbers from '
                        'np.random.default_rng([seed, iteration])'
                    )
            self.shapes[split] = shapes
        return batch


# The attributes that `UserTasks` takes from the user's object.
OPTIONAL = ('validates', 'iterations_at_once', 'print_factor', 'updates_shown')
OPTIONAL += ('tasks_at_once', 'picture_name')


def user_batch(values, num_tasks: int, where: str) -> Batch:
    """Returns the four arrays of a user's meta-batch as float32, copied. Raises BadTasks."""
    try:
        batch = fitting_batch(values, tasks=num_tasks)
        arrays = [finite_numbers(n, array, np.float32) for n, array in zip(Batch._fields, batch)]
    except ValueError as error:
        raise BadTasks(f'{where}: {error}') from error
    for name, array in zip(Batch._fields, arrays):
        if not array.size:
            raise BadTasks(f'{where}: {name} must not be empty, but it is {[*array.shape]}')
    return Batch(*map(np.array, arrays))


def is_one_hot(labels: np.ndarray) -> bool:
    """Whether labels [T, examples, out] are one-hot; a single output is not."""
    values = np.isin(labels, (0, 1)).all() and (labels.sum(2) == 1).all()
    return bool(labels.shape[2] > 1 and values)


def check_one_hot(batch: Batch, where: str, asked: str | None):
    """Raises BadTasks if labels are not one-hot; asked: the user's object's `objective`, if any."""
    reason = 'objective is accuracy' if asked else 'those of the first batches are'
    for name in ('labela', 'labelb'):
        if not is_one_hot(label := getattr(batch, name)):
            raise BadTasks(
                f'{where}: {name} must be one-hot, since {reason}, but it is {[*label.shape]} with '
                f'values from {label.min():g} to {label.max():g}; for a regression set objective = '
                "'loss'"
            )
