"""Where tasks come from: random sinusoids, class folders of images, or an object of your own.

A source turns (seed, split, iteration) into a meta-batch of tasks and keeps no state:

    folders = load_omniglot('data')
    source = OmniglotGenerator(folders, num_classes=5, num_support=1, num_query=1)
    batch = source.batch('train', iteration=0, num_tasks=32)  # a utils.Batch

Images are decoded once. The pixels are kept beside the data (`omniglot_resized.cache`,
`miniImagenet.train.cache`, ...) in folders that are made again when the files change and may be
deleted at any time.
"""

import hashlib
import json
import math
import os
import random
import shlex
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from utils import Batch, cores, named_batch, whole_number

SPLITS = ('train', 'val', 'test')
FEW_COMBINATIONS = 100  # of classes in an evaluation, which it should say
EVALUATION_SEED = 1  # of tasks that are the same for every run and checkpoint


class ClassImages(NamedTuple):
    """The decoded images of some classes; class c owns counts[c] of them, from starts[c] on."""

    folder: str  # where they come from, for messages
    names: list  # of the classes, e.g. 'Greek/character01'
    starts: np.ndarray  # [classes] int64
    counts: np.ndarray  # [classes] int64
    images: np.ndarray  # [total, height, width, channels] uint8, mostly memory-mapped; 255 * value

    def select(self, classes: Sequence[int]) -> 'ClassImages':
        """Some of the classes, in the order given, on the same images."""
        names = [self.names[c] for c in classes]
        return self._replace(names=names, starts=self.starts[classes], counts=self.counts[classes])

    def named(self, names: Iterable[str]) -> 'ClassImages':
        """The classes of these names, alike."""
        place = {name: i for i, name in enumerate(self.names)}
        return self.select([place[name] for name in names])

    def sizes(self) -> dict[str, int]:
        """{class: how many images}."""
        return dict(zip(self.names, map(int, self.counts)))


# Tasks --------------------------------------------------------------------------------------------


class DataGenerator:
    """Draws meta-batches, and says how its tasks are trained on, evaluated and shown.

    Everything random about a task is one row of uniform numbers; `_tasks` reads it.
    Raises ValueError if the seed is negative.
    """

    objective = 'accuracy'  # what is printed of a task and evaluated: 'accuracy', or 'loss'
    validates = True  # whether held-out classes are evaluated during training
    iterations_at_once = 1  # meta-batches that run as one program: many of tiny tasks
    print_factor = 1  # printed lines are this many times further apart
    updates_shown = 1  # inner updates evaluated during training, at least
    tasks_at_once = 4  # tasks evaluated together, which bounds the memory; divides 600
    picture_name = 'task'  # the tag of `picture` in TensorBoard
    has_queries = True  # whether tasks have query sets; else updates have no outcome to tell of
    model_settings = {}  # what `make_model` must know of the tasks besides the flags
    classes = {}  # {split: {class: how many images}}, which checkpoints keep
    settled_flags = {}  # values of flags that were left to the data

    def __init__(self, dim_input: int, dim_output: int, num_draws: int, seed: int):
        seed = whole_number('the seed', seed)
        self.dim_input, self.dim_output = dim_input, dim_output  # per example
        self.num_draws, self.seed = num_draws, seed

    def batch(
        self, split: str, iteration: int, num_tasks: int, tasks: slice = slice(None)
    ) -> Batch:
        """The meta-batch of an iteration, a pure function of (seed, split, iteration).

        split: 'train', 'val' or 'test'; iteration: not negative.
        num_tasks: T. Task i is the same whatever T is.
        tasks: a slice of the T tasks, to get these only and without the cost of the others.
        """
        return self._tasks(split, self._draw(split, iteration, num_tasks)[tasks])

    def batches(
        self,
        split: str,
        first_iteration: int,
        count: int,
        num_tasks: int,
        tasks: slice = slice(None),
    ) -> Batch:
        """Those of `count` successive iterations, stacked: [count, T, ...]; as batch() of each."""
        iterations = range(first_iteration, first_iteration + count)
        draws = [self._draw(split, i, num_tasks)[tasks] for i in iterations]
        batch = self._tasks(split, np.concatenate(draws))  # [count*T, ...]
        return Batch(*(array.reshape(count, len(draws[0]), *array.shape[1:]) for array in batch))

    def dataset(self, split: str, num_tasks: int, first_iteration: int = 0):
        """The meta-batches from an iteration on, without end: a tf.data.Dataset of Batch.

        Arguments as of `batch`. It is what maml.MetaModel.fit takes.
        """
        import tensorflow as tf  # nothing else here needs it

        first = self.batch(split, first_iteration, num_tasks)  # its sizes are those of all
        types = [values.dtype for values in first]

        def arrays(iteration: np.ndarray) -> Batch:
            return self.batch(split, int(iteration), num_tasks)

        @tf.autograph.experimental.do_not_convert
        def draw(iteration: tf.Tensor) -> Batch:
            batch = Batch(*tf.numpy_function(arrays, [iteration], types))
            for drawn, values in zip(batch, first):
                drawn.set_shape(values.shape)
            return batch

        return tf.data.Dataset.counter(first_iteration).map(draw).prefetch(2)

    def picture(self, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray | None:
        """What TensorBoard shows now and then during training: [height, width, 3] uint8, or None.

        batch: the meta-batch at hand, arrays.
        evaluate: gives the outputs on the query set of a Batch after update 1...J,
        [J, T, examples, out].
        """
        raise NotImplementedError

    def caution(self, split: str) -> str:
        """What is to be kept in mind of an evaluation on a split, a sentence; empty if nothing."""
        return ''

    def _draw(self, split: str, iteration: int, num_tasks: int) -> np.ndarray:
        """Uniform numbers in [0, 1), a row for each task: [T, num_draws]."""
        iteration, num_tasks = _asked(split, iteration, num_tasks)
        generator = np.random.default_rng([self.seed, SPLITS.index(split), iteration])
        return generator.random((num_tasks, self.num_draws))

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        """The tasks that rows of uniform numbers stand for, [T, num_draws]."""
        raise NotImplementedError


class SinusoidGenerator(DataGenerator):
    """Regression tasks y = A sin(x - φ): A uniform in [0.1, 5], φ in [0, π], x in [-5, 5].

    A task has K + Q points, the first K of which are the support set. With `oracle` the inputs are
    (x, A, φ). All splits draw from the same distribution, each from a stream of its own.
    Raises ValueError if a size or the seed is out of range.
    """

    objective = 'loss'
    validates = False
    iterations_at_once = 100
    print_factor = 10
    updates_shown = 5
    tasks_at_once = 600
    picture_name = 'fit'

    def __init__(self, num_support: int, num_query: int, oracle: bool = False, seed: int = 0):
        _check_shots(num_support, num_query)
        num_draws = 2 + num_support + num_query  # A, φ and the points
        super().__init__(3 if oracle else 1, dim_output=1, num_draws=num_draws, seed=seed)
        self.num_support, self.num_query, self.oracle = num_support, num_query, oracle

    def picture(self, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray:
        """One sinusoid, fitted after 1 and after all updates.

        Points all over [-5, 5] are the query points of many copies of the task, which makes a
        meta-batch of the usual shape, for which the evaluation is compiled.
        """
        tasks, shots, dim = batch.inputa.shape[0], self.num_support, self.dim_input
        task = SinusoidGenerator(shots, 0, oracle=True, seed=EVALUATION_SEED).batch('val', 0, 1)
        amplitude, phase = task.inputa[0, 0, 1:]
        x = np.linspace(-5, 5, tasks * shots, dtype=np.float32)  # [T*K]
        truth = amplitude * np.sin(x - phase)
        inputs = np.stack([x, np.full_like(x, amplitude), np.full_like(x, phase)], axis=1)
        outputs = evaluate(
            Batch(
                np.repeat(task.inputa[..., :dim], tasks, axis=0),  # [T, K, D]
                np.repeat(task.labela, tasks, axis=0),  # [T, K, 1]
                inputs[:, :dim].reshape(tasks, shots, dim),
                truth.reshape(tasks, shots, 1),
            )
        )  # [J, T, K, 1]
        curves = {'red truth': truth}
        for colour, update in (('green', 1), ('blue', len(outputs))):
            curves[f'{colour} after {update} updates'] = np.reshape(outputs[update - 1], -1)
        return fit_picture(
            {name: np.stack([x, y], axis=1) for name, y in curves.items()},
            points=np.stack([task.inputa[0, :, 0], task.labela[0, :, 0]], axis=1),
        )

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        amplitude = 0.1 + 4.9 * uniform[:, :1]  # [T, 1]
        phase = np.pi * uniform[:, 1:2]  # [T, 1]
        x = 10 * uniform[:, 2:] - 5  # [T, K+Q]
        inputs = np.empty((*x.shape, self.dim_input), np.float32)
        inputs[..., 0] = x
        if self.oracle:
            inputs[..., 1], inputs[..., 2] = amplitude, phase
        labels = (amplitude * np.sin(x - phase)).astype(np.float32)[..., None]
        support, query = np.s_[:, : self.num_support], np.s_[:, self.num_support :]
        parts = (inputs[support], labels[support], inputs[query], labels[query])
        return Batch(*map(np.ascontiguousarray, parts))


class ImageGenerator(DataGenerator):
    """N-way classification tasks from class folders.

    A task draws N classes without replacement, K + Q images of each without replacement (the first
    K are the support set) and, with `rotate`, a rotation by 0, 90, 180 or 270 degrees
    (counter-clockwise) for each class. Class i of those drawn has the label i; within each shot
    the classes are shuffled.

    Generators are cheap and hold no copy of the images: make a second one on the same `folders`
    for another number of query images.

    folders: the decoded classes of each split, from load_omniglot, load_miniimagenet, load_folder.
    num_classes: N. num_support: K, images per class. num_query: Q, images per class; may be 0.
    rotate: draw rotations; `rotates` if None. seed: another one gives other tasks.
    splits: those it will be used on; all that `folders` holds if None.
    Raises ValueError if a size is out of range, or a split has too few classes or too few images
    in a class.
    """

    rotates = False

    def __init__(
        self,
        folders: Mapping[str, ClassImages],
        num_classes: int,
        num_support: int,
        num_query: int,
        rotate: bool | None = None,
        seed: int = 0,
        splits: Iterable[str] | None = None,
    ):
        _check_shots(num_support, num_query)
        num_classes = whole_number('--num_classes', num_classes, lowest=1)
        splits = folders if splits is None else splits
        self.folders = {split: folders[split] for split in splits}
        self.num_classes, self.num_support, self.num_query = num_classes, num_support, num_query
        self.rotate = self.rotates if rotate is None else rotate
        self.has_queries = self.validates = num_query > 0
        size = TaskSize(num_classes, num_support, num_query)
        for split, classes in self.folders.items():
            check_split(split, classes.folder, classes.sizes(), size)
        first = next(iter(self.folders.values()))
        self.image_shape = first.images.shape[1:]  # (height, width, channels)
        height, width, _ = self.image_shape
        if self.rotate and height != width:
            raise ValueError(f'only square images can be rotated, not {height}x{width}')
        # N classes, N rotations, K + Q images of each class, an order of the classes for each shot
        num_draws = 2 * num_classes * (1 + num_support + num_query)
        super().__init__(math.prod(self.image_shape), num_classes, num_draws, seed)

    def picture(self, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray:
        """The first task of the meta-batch."""
        return task_picture(batch, self.image_shape)

    def caution(self, split: str) -> str:
        """Says if its classes can be combined to few tasks only."""
        classes, ways = len(self.folders[split].names), self.num_classes
        combinations = math.comb(classes, ways)
        if combinations >= FEW_COMBINATIONS:
            return ''
        tasks = f'have {combinations} combinations of {ways} of the {classes} {split} classes'
        if combinations == 1:
            tasks = f'are of the same {ways} classes, since the {split} split has no others'
        return (
            f'Note: all these tasks {tasks}. The interval tells how far the images matter; other '
            'classes may give quite another mean.'
        )

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        if split not in self.folders:
            made_for = ', '.join(self.folders)
            raise ValueError(f'this generator was made for the splits {made_for}, not for {split}')
        source = self.folders[split]
        ways, shots = self.num_classes, self.num_support + self.num_query
        ends = np.cumsum([ways, ways, ways * shots])
        classes, turns, chosen, order = np.split(uniform, ends, axis=1)
        classes = _distinct(classes, len(source.names))  # [T, N]
        turns = (4 * turns).astype(np.int64)  # [T, N]
        available = source.counts[classes][..., None]  # [T, N, 1]
        chosen = _distinct(chosen.reshape(-1, ways, shots), available)  # [T, N, K+Q]
        order = _distinct(order.reshape(-1, shots, ways), ways)  # [T, K+Q, N]: labels
        images = source.starts[classes][..., None] + chosen  # [T, N, K+Q] by class
        images = np.take_along_axis(images.transpose(0, 2, 1), order, axis=2)  # [T, K+Q, N]
        turns = np.take_along_axis(turns[:, None], order, axis=2)
        support, query = np.s_[:, : self.num_support], np.s_[:, self.num_support :]
        return Batch(
            self._pixels(source, images[support], turns[support]),
            self._one_hot(order[support]),
            self._pixels(source, images[query], turns[query]),
            self._one_hot(order[query]),
        )

    def _pixels(self, source: ClassImages, index: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Images by their index, turned and flattened row by row: [T, shots*N, D] float32.

        index: [T, shots, N]; turns: quarters counter-clockwise, alike.
        """
        pixels = source.images[index]  # [T, shots, N, height, width, channels] uint8
        for quarter in (1, 2, 3) if self.rotate else ():
            turned = turns == quarter
            pixels[turned] = np.rot90(pixels[turned], quarter, axes=(1, 2))
        tasks, shots, ways = index.shape
        return np.divide(pixels, 255, dtype=np.float32).reshape(tasks, shots * ways, self.dim_input)

    def _one_hot(self, labels: np.ndarray) -> np.ndarray:
        """[T, shots, N] -> [T, shots*N, N] float32."""
        tasks, shots, ways = labels.shape
        return np.eye(ways, dtype=np.float32)[labels].reshape(tasks, shots * ways, ways)


class OmniglotGenerator(ImageGenerator):
    """The same with rotations, so that every character is four classes, and small images."""

    rotates = True
    updates_shown = 10
    tasks_at_once = 20


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


def _asked(split: str, iteration: int, num_tasks: int) -> tuple[int, int]:
    """Iteration and number of tasks. Raises ValueError if there is no such meta-batch."""
    if split not in SPLITS:
        raise ValueError(f'there is no split {split!r}; the splits are {", ".join(SPLITS)}')
    return whole_number('iteration', iteration), whole_number('--meta_batch_size', num_tasks, 1)


class TaskSize(NamedTuple):
    """What a task takes of a split: so many classes, and of each so many images."""

    ways: int = 1
    support: int = 1
    query: int = 0

    @property
    def images(self) -> int:
        return self.support + self.query


SMALLEST_TASK = TaskSize()


def check_split(
    split: str, folder: str | Path, counts: Mapping[str, int], size: TaskSize, own: bool = False
):
    """Raises ValueError if a split cannot fill a task.

    counts: {class: how many images}. own: whether --skip_small_classes would help.
    """
    if size.ways > len(counts):
        raise ValueError(
            f'--num_classes={size.ways} is more than the {len(counts)} classes of the {split} '
            f'split in {folder}: use a smaller --num_classes, or give the split more classes'
        )
    small = small_classes(counts, size)
    if not small:
        return
    more = f' (too few have also {listed(small[1:])})' if small[1:] else ''
    leave = 'leave it out with --skip_small_classes' if own else 'remove it'
    fewer = ', or use a smaller --update_batch_size or --num_query (in evaluation --test_query)'
    fewer = fewer if size.images > 2 else ''
    raise ValueError(
        f'the class {small[0]} of the {split} split in {folder} has {counts[small[0]]} images, but '
        f'a task takes {size.images} of each class ({size.support} for support, {size.query} for '
        f'query){more}: add images to it, or {leave}{fewer}'
    )


def small_classes(counts: Mapping[str, int], size: TaskSize) -> list[str]:
    """Those that have too few images for a task, the smallest first."""
    return sorted((name for name in counts if counts[name] < size.images), key=counts.get)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few, and how many there are besides."""
    shown = ', '.join(names[:most])
    return f'{shown} and {len(names) - most} more' if len(names) > most else shown


def _check_shots(num_support: int, num_query: int):
    """Raises ValueError if they are out of range."""
    whole_number('--update_batch_size', num_support, lowest=1)
    whole_number('the number of query examples', num_query)


def _distinct(uniform: np.ndarray, counts) -> np.ndarray:
    """Draws without replacement, in random order: uniform numbers -> integers below `counts`.

    uniform: [..., size], as the result; counts: a number or [..., 1]. The i-th draw is one of the
    counts - i numbers that are left, first as its rank among them (a Lehmer code); stepping over
    every earlier draw that is not greater turns the rank into the number.
    """
    size = uniform.shape[-1]
    draws = (uniform * (counts - np.arange(size))).astype(np.int64)
    for i in reversed(range(size - 1)):
        later = draws[..., i + 1 :]
        later += later >= draws[..., i : i + 1]
    return draws


# Pictures: [height, width, 3] uint8 ---------------------------------------------------------------

MARGIN = 14  # pixels, for a line of text


def task_picture(batch: Batch, image_shape: tuple[int, int, int], task: int = 0) -> np.ndarray:
    """A task's support images above its query images, each below its label.

    Both have a row for each of the first two shots.
    batch: arrays; image_shape: (height, width, channels).
    """
    ways = batch.labela.shape[2]
    first = np.s_[task, : 2 * ways]  # [examples, D] of the inputs, [examples, N] of the labels
    support = batch.inputa[first], batch.labela[first]
    query = batch.inputb[first], batch.labelb[first]
    rows = sum(len(labels) // ways for _, labels in (support, query))
    width, height = image_shape[1] + 4, image_shape[0] + MARGIN + 2  # of an image and its label
    canvas = Image.new('RGB', (ways * width, rows * height + 2 * MARGIN), 'white')
    top = 0
    for title, (inputs, labels) in (('support', support), ('query', query)):
        ImageDraw.Draw(canvas).text((2, top), title, fill='red')
        top += MARGIN
        for i, (image, label) in enumerate(zip(inputs, labels)):
            corner = i % ways * width, top + i // ways * height
            _paste(canvas, corner, image.reshape(image_shape), str(label.argmax()))
        top += len(labels) // ways * height
    return np.asarray(canvas)


def _paste(canvas: Image.Image, corner: tuple[int, int], image: np.ndarray, label: str):
    """Puts an image [height, width, channels], values 0 to 1, below its label."""
    x, y = corner
    pixels = np.broadcast_to(np.uint8(255 * image), (*image.shape[:2], 3))  # grey in colours
    ImageDraw.Draw(canvas).text((x + 2, y), label, fill='black')
    canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x, y + MARGIN))


def fit_picture(
    curves: dict[str, np.ndarray], points: np.ndarray, size: tuple[int, int] = (480, 320)
) -> np.ndarray:
    """Curves and points of a regression task, x in [-5, 5] and y in [-6, 6].

    curves: {colour and name, as 'red truth': [n, 2]}; points: [K, 2]; size: (width, height).
    """
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    draw.line(_places(np.array([[-5, 0], [5, 0]]), size), fill='lightgray')
    for i, (name, curve) in enumerate(curves.items()):
        colour, _, text = name.partition(' ')
        draw.line(_places(curve, size), fill=colour, width=2)
        draw.text((4, 2 + i * MARGIN), text, fill=colour)
    for x, y in _places(points, size):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='purple')
    return np.asarray(canvas)


def _places(points: np.ndarray, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Where points [n, 2] of the plane stand in a picture."""
    width, height = size
    places = (np.clip(points, -6, 6) * [1, -1] + [5, 6]) / [10, 12] * [width - 1, height - 1]
    return [tuple(place) for place in places]


# Data sets ----------------------------------------------------------------------------------------


FITS = ('crop', 'pad', 'squash')


class ImageLayout(NamedTuple):
    """How a data set lies on disk, and how its images are to be stored."""

    depth: int  # of the class folders: 1 for <class>/, 2 for <Alphabet>/<character>/
    suffixes: tuple  # of its image files, lower case
    size: tuple  # (height, width) of the stored images
    mode: str  # Pillow mode they are converted to: 'L' (one channel) or 'RGB' (three)
    invert: bool  # store 255 - pixel
    resampling: int  # how images of another size are resized, see PIL.Image.Resampling
    prepared: bool  # whether the files have that size already, so that others are mistakes
    # What happens to images of another shape: 'crop' cuts off what is too long, at both ends alike,
    # 'pad' fills with white what is missing, 'squash' stretches.
    fit: str = 'squash'

    def key(self) -> str:
        """All that the stored pixels depend on, in the form that caches have had from the start."""
        fields = self._replace(suffixes=())._asdict()
        fit = fields.pop('fit')
        text = ', '.join(f'{name}={value!r}' for name, value in fields.items())
        return f'ImageLayout({text})' + (f' {fit}' if fit != 'squash' else '')

    def kind(self) -> list[str]:
        """What tells the caches of a folder apart."""
        size = 'x'.join(map(str, self.shape(1)[1:]))
        return [size] if self.fit == 'squash' else [size, self.fit]

    def shape(self, total: int) -> tuple:
        """Of the array that holds `total` images."""
        return (total, *self.size, len(Image.new(self.mode, (1, 1)).getbands()))


OMNIGLOT = ImageLayout(
    depth=2,
    suffixes=('.png',),
    size=(28, 28),
    mode='L',
    invert=True,
    resampling=Image.Resampling.NEAREST,
    prepared=True,
)
MINIIMAGENET = ImageLayout(
    depth=1,
    suffixes=('.jpg', '.jpeg', '.png'),
    size=(84, 84),
    mode='RGB',
    invert=False,
    resampling=Image.Resampling.LANCZOS,
    prepared=True,
)


def folder_layout(image_size: int, channels: int, fit: str = 'crop') -> ImageLayout:
    """Of class folders of any images; channels: 1 (grey) or 3 (colour); fit: one of FITS."""
    Image.init()  # Pillow knows few of its formats before
    formats = Image.registered_extensions().items()
    suffixes = sorted(suffix for suffix, name in formats if name in Image.OPEN)
    return ImageLayout(
        depth=1,
        suffixes=tuple(suffixes),
        size=(image_size, image_size),
        mode='L' if channels == 1 else 'RGB',
        invert=False,
        resampling=Image.Resampling.LANCZOS,
        prepared=False,
        fit=fit,
    )


def run_layout(settings: Mapping) -> ImageLayout:
    """For images given to a trained model: any file, any size.

    settings: the flags it was trained with, of which datasource, image_size, channels and fit
    count. Runs that are older than the last one squash, and the original's data were squashed too.
    """
    if settings['datasource'] == 'omniglot':
        return OMNIGLOT._replace(prepared=False, suffixes=folder_layout(28, 1).suffixes)
    if settings['datasource'] == 'miniimagenet':
        return folder_layout(84, 3, 'squash')
    fit = settings.get('fit') or 'squash'
    return folder_layout(settings['image_size'], settings['channels'], fit)


def load_omniglot(data_dir: str, cache_dir: str | None = None) -> dict[str, ClassImages]:
    """The classes `data_dir/omniglot_resized/<Alphabet>/<character>/*.png` (28x28) of each split.

    Values are 1 - pixel / 255, so ink is 1. See split_classes for which character goes where.
    cache_dir: see load_class_folders.
    Raises FileNotFoundError if there is no such folder, and ValueError if it is empty or has fewer
    than three classes, or an image is damaged or not 28x28.
    """
    folder = Path(data_dir) / 'omniglot_resized'
    command = (
        f'`python scripts/data/prepare_omniglot.py {_target(folder)}`, which downloads the '
        'archives unless it is given a folder that has them by --source=FOLDER'
    )
    characters = load_class_folders(folder, OMNIGLOT, _cache_of(folder), command, cache_dir)
    if len(characters.names) < len(SPLITS):
        raise ValueError(
            f'{folder} has only {len(characters.names)} character folders, but training, '
            'validation and test need at least one each; move it away and make it again with '
            f'{command}'
        )
    classes = split_classes(len(characters.names))
    return {split: characters.select(chosen) for split, chosen in classes.items()}


def load_miniimagenet(
    data_dir: str, splits: Iterable[str] = SPLITS, cache_dir: str | None = None
) -> dict[str, ClassImages]:
    """The classes `data_dir/miniImagenet/<split>/<wnid>/*` (84x84, colour) of each split.

    splits: those that are needed; other folders need not exist. cache_dir: see load_class_folders.
    Raises FileNotFoundError if the folder of a split is missing, and ValueError if it is empty or
    an image is damaged or not 84x84.
    """
    folder = Path(data_dir) / 'miniImagenet'
    command = (
        f'`python scripts/data/prepare_miniimagenet.py {_target(folder)}`, which downloads it '
        'unless it is given a folder that has it by --source=FOLDER'
    )
    given = (command, cache_dir)
    return {
        split: load_class_folders(folder / split, MINIIMAGENET, _cache_of(folder, split), *given)
        for split in splits
    }


def _target(folder: Path) -> str:
    """The flag of the scripts that prepare the data, for messages."""
    return f'--target={shlex.quote(str(folder))}'


def _cache_of(folder: Path, *parts: str) -> Path:
    """Beside the folder: what is in it belongs to the user, or to what prepares the data."""
    folder = Path(os.path.abspath(folder))  # '.' has no name
    return folder.with_name('.'.join((folder.name, *parts, 'cache')))


def split_classes(num_classes: int) -> dict[str, list[int]]:
    """Which of the sorted classes of Omniglot belong to which split: shuffled, then cut.

    The 1623 official characters give 1100 train, 100 val and 423 test classes; any set of at least
    1201 the same 1100 and 100, and the rest for test. A smaller set (of at least 3 classes) is
    dealt out in the proportions 1100 : 100 : 423, at least one class each.
    """
    if num_classes >= 1201:
        return _deal_out(num_classes, val=100, test=num_classes - 1200)
    return _deal_out(num_classes, *_held_out(num_classes, (1100, 100, 423)))


def _held_out(num_classes: int, proportions: Sequence[float]) -> tuple[int, int]:
    """How many classes val and test get, at least one each; proportions: of train, val and test."""
    total = sum(proportions)
    val, test = (max(1, round(num_classes * part / total)) for part in proportions[1:])
    return val, test


def _deal_out(num_classes: int, val: int, test: int) -> dict[str, list[int]]:
    """A shuffle with a fixed seed, cut; train gets what val and test leave, and at least one."""
    order = list(range(num_classes))
    random.Random(1).shuffle(order)
    train = max(1, num_classes - val - test)
    val = min(val, num_classes - train - 1)
    return {'train': order[:train], 'val': order[train : train + val], 'test': order[train + val :]}


# Images of one's own ------------------------------------------------------------------------------

VALIDATION_FOLDERS = ('val', 'valid', 'validation', 'dev')  # what people call it
MAX_DEPTH = 5  # of class folders
Counts = Mapping[str, int]  # {class: how many images}


def load_folder(
    folder: str,
    image_size: int = 84,
    channels: int = 3,
    proportions: Sequence[float] = (0.64, 0.16, 0.2),
    splits: Iterable[str] = SPLITS,
    fit: str = 'crop',
    cache_dir: str | None = None,
) -> dict[str, ClassImages]:
    """The classes of a folder of one's own, of each split; see OwnImages.

    Any format that Pillow reads; images become image_size x image_size, grey (channels 1) or colour
    (3), transparency white. The pixels are kept beside the folder.

    proportions: see deal_classes. fit: see ImageLayout. cache_dir: see load_class_folders.
    splits: those that are needed; other folders need not exist.
    Raises FileNotFoundError and ValueError as OwnImages does, and ValueError if an image cannot be
    read.
    """
    own = OwnImages(folder, folder_layout(image_size, channels, fit), splits)
    own.choose(proportions)
    return own.load(cache_dir)


class OwnImages:
    """The classes in a folder of one's own: found, chosen and checked before any is decoded.

    A class is a folder of images at any one depth below the folder, and is called after its path.
    Either folders `train`, `val` (or `valid`, `validation`, `dev`) and `test` hold the classes, or
    these are dealt out by their names alone.

    splits: those that are needed; other folders need not exist, and may hold too little.
    Attributes: classes, {split: {class: its image files}}, from `choose` on; counts, {split:
    {class: how many images}}, which a run keeps in its checkpoints.
    Raises FileNotFoundError if there is no such folder, and ValueError if two are the same split's.
    """

    def __init__(self, folder: str | Path, layout: ImageLayout, splits: Iterable[str] = SPLITS):
        self.folder, self.layout, self.splits = Path(folder), layout, [*splits]
        _check_folder(self.folder)
        self.paths = split_folders(self.folder)  # none if the classes are to be dealt out
        for split in self.splits if self.paths else ():
            _check_folder(self.paths.get(split, self.folder / split))
        if self.paths:
            self.found = {split: own_classes(path, layout) for split, path in self.paths.items()}
        else:
            self.found = dict.fromkeys(SPLITS, own_classes(self.folder, layout))
        self.classes, self.counts = {}, {}

    def choose(
        self,
        proportions: Sequence[float] = (0.64, 0.16, 0.2),
        size: TaskSize = SMALLEST_TASK,
        skip_small: bool = False,
        known: Mapping[str, Counts] | None = None,
    ):
        """Chooses the classes of each split; says on stderr what is left out.

        proportions: see deal_classes. size: of the tasks. skip_small: leaves out classes that are
        too small for them. known: the counts of a run that goes on or is evaluated, see
        classes_of_run: it keeps its classes, and those added since are left out.
        Raises ValueError if there are no classes or they lie at different depths, if they are too
        few or too small for the splits that are needed, or are not those of the run.
        """
        for split in self.splits:
            lenient = skip_small or bool(known)
            _check_classes(self.found[split], self.path(split), self.layout, None, lenient)
        if not known:
            self._tell_of_files()
        found = {split: _counts(classes) for split, classes in self.found.items()}
        chosen = classes_of_run(found, self.splits, known, self.folder) if known else None
        if chosen:
            needed = {split: chosen[split] for split in self.splits}
            chosen |= self._large(needed, size, skip_small)
        elif self.paths:
            chosen = self._large(found, size, skip_small)
        else:
            names = [*self._large(found, size, skip_small)['train']]
            dealt = deal_classes(names, proportions, size.ways, self.splits, self.folder)
            chosen = {split: {name: found[split][name] for name in dealt[split]} for split in dealt}
        self._check_sizes(chosen, size, first=not known)
        self.counts = chosen
        self.classes = {
            split: {name: self.found[split][name] for name in names}
            for split, names in chosen.items()
        }

    def load(self, cache_dir: str | None = None) -> dict[str, ClassImages]:
        """Decodes the splits that are needed, or all if the classes were dealt out.

        Raises ValueError if an image cannot be read. cache_dir: see load_class_folders.
        """
        kind, given = self.layout.kind(), (None, cache_dir)
        if self.paths:
            loaded = {}
            for split in self.splits:
                cache = _cache_of(self.folder, split, *kind)
                classes = self.classes[split]
                loaded[split] = _load(self.paths[split], self.layout, cache, classes, *given)
            return loaded
        chosen = {name for classes in self.classes.values() for name in classes}
        classes = {name: files for name, files in self.found['train'].items() if name in chosen}
        images = _load(self.folder, self.layout, _cache_of(self.folder, *kind), classes, *given)
        return {split: images.named(names) for split, names in self.classes.items()}

    def path(self, split: str) -> Path:
        """The folder that the split's classes lie in."""
        return self.paths[split] if self.paths else self.folder

    def _large(self, counts: dict[str, Counts], size: TaskSize, skip: bool) -> dict[str, Counts]:
        """The classes that have enough images; all, unless the others are to be skipped."""
        if not skip:
            return counts
        small = {name: n for part in counts.values() for name, n in part.items() if n < size.images}
        if small:
            shown = listed([f'{name} ({n})' for name, n in small.items()])
            _tell(
                f'--skip_small_classes leaves out of {self.folder} what has fewer than '
                f'{size.images} images: {shown}.'
            )
        return {
            split: {name: n for name, n in part.items() if n >= size.images}
            for split, part in counts.items()
        }

    def _check_sizes(self, counts: dict[str, Counts], size: TaskSize, first: bool):
        """Raises ValueError if a split that is needed cannot fill a task; warns of others."""
        for split in self.splits:
            check_split(split, self.folder, counts[split], size, own=True)
        for split in set(counts) - set(self.splits) if first and 'train' in self.splits else ():
            try:
                check_split(split, self.folder, counts[split], size, own=True)
            except ValueError as error:
                _tell(f'Training can do without, but an evaluation cannot: {error}.')

    def _tell_of_files(self):
        """Says which files are no images, and which classes of different splits are namesakes."""
        left_out = []
        for split in self.paths or ['train']:
            left_out += _other_files(self.path(split), self.found[split], self.layout)
        if left_out:
            kinds = Counter(Path(file).suffix.lower() or 'no suffix' for file in left_out)
            listed_kinds = ', '.join(f'{count} {kind}' for kind, count in kinds.most_common())
            _tell(
                f'{len(left_out)} files in {self.folder} are left out, since Pillow reads no such '
                f'files ({listed_kinds}): {listed(left_out)}.'
            )
        places = Counter(name for split in self.paths for name in self.found[split])
        namesakes = [name for name, count in places.items() if count > 1]
        if namesakes:
            folders = ', '.join(path.name for path in self.paths.values())
            _tell(
                f'Several of {folders} in {self.folder} have folders of these names: '
                f'{listed(namesakes)}. They are taken for different classes; if they are the same '
                'ones, put the images of a class into one folder: MAML is tested on new classes.'
            )


def _tell(text: str):
    print(text, file=sys.stderr, flush=True)


def _counts(classes: Mapping[str, Sequence]) -> dict[str, int]:
    return {name: len(files) for name, files in classes.items()}


def _check_folder(folder: Path):
    """Raises FileNotFoundError if it does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f'there is no folder {folder}; give --data_dir the folder that holds a folder of '
            'images for each class'
        )


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of classes of each split; empty if none of them holds any.

    Raises ValueError if two are the same split's, or all lie one level further down.
    """
    found, inside = _split_folders(folder), _class_folders(folder, 1)
    if not found and len(inside) == 1 and _split_folders(Path(inside[0][1])):
        raise ValueError(f'the folders of the splits lie in {inside[0][1]}: give it as --data_dir')
    return found


def _split_folders(folder: Path) -> dict[str, Path]:
    """As split_folders, in this folder only."""
    found = {}
    for split in SPLITS:
        names = VALIDATION_FOLDERS if split == 'val' else (split,)
        there = [folder / name for name in names if (folder / name).is_dir()]
        holding = [path for path in there if _class_folders(path, 1)]
        if len(holding) > 1:
            raise ValueError(
                f'{holding[0]} and {holding[1]} both hold validation classes: move those of one '
                'into the other, and remove it'
            )
        if there:
            found[split] = (holding or there)[0]
    return found if any(_class_folders(path, 1) for path in found.values()) else {}


def own_classes(folder: Path, layout: ImageLayout) -> dict[str, list[os.DirEntry]]:
    """{class: image files}, sorted level by level: the folders where images begin.

    Folders without any at that depth or above, which have no folders either, are among them.
    """
    ends, level = {}, [('', str(folder))]
    for _ in range(MAX_DEPTH):
        below = []
        for name, path in level:
            inside = _class_folders(path, 1)
            below += [(f'{name}/{child}'.lstrip('/'), place) for child, place in inside]
            if name and not inside:
                ends[name] = []
        classes = {name: _image_files(path, layout) for name, path in below}
        if any(classes.values()):
            return ends | classes
        level = below
    return ends


def _other_files(folder: Path, classes: Iterable[str], layout: ImageLayout) -> list[str]:
    """Paths relative to the folder of the files in it and its classes that are no images."""
    places = {'': None}
    for name in classes:
        parts = name.split('/')
        places |= {'/'.join(parts[:i]): None for i in range(1, len(parts) + 1)}
    found = []
    for place in places:
        names = [entry.name for entry in _visible(str(folder / place)) if entry.is_file()]
        others = [name for name in names if not name.lower().endswith(layout.suffixes)]
        found += [f'{place}/{name}'.lstrip('/') for name in others]
    return found


def deal_classes(
    names: Sequence[str],
    proportions: Sequence[float],
    ways: int,
    splits: Sequence[str],
    folder: str | Path,
) -> dict[str, list[str]]:
    """Which of the sorted classes belong to which split; a function of their names alone.

    proportions: of train, val and test, at least one class each. If these cannot fill tasks of
    `ways` classes, neither for training nor in the `splits` that are needed, they are moved just so
    far that each split can. folder: for messages. Raises ValueError if there are too few classes.
    """
    count = len(names)
    if count < len(SPLITS):
        raise ValueError(
            f'{folder} has only {count} class folders, but training, validation and test need at '
            'least one each'
        )
    val, test = _held_out(count, proportions)
    dealt = _deal_out(count, val, test)
    if not any(all(len(dealt[s]) >= ways for s in some) for some in (('train', 'val'), splits)):
        _check_count(count, ways, folder)
        val = max(ways, min(val, count - 2 * ways))
        dealt = _deal_out(count, val, max(ways, min(test, count - ways - val)))
    return {split: [names[i] for i in chosen] for split, chosen in dealt.items()}


def _check_count(count: int, ways: int, folder: str | Path):
    """Raises ValueError, with what would do, if not every split can have `ways` classes."""
    if count >= 3 * ways:
        return
    remedies, most = [], count // 3
    if most > 1:
        remedies.append(f'--num_classes={most} --split={count - 2 * most},{most},{most}')
    if count > 2 * ways:
        shares = f'{count - ways - 1},{ways},1'
        remedies.append(f'--split={shares}, which leaves nothing to test on')
    remedy = f', or give {" or ".join(remedies)}' if remedies else ''
    raise ValueError(
        f'{folder} has {count} classes, but --num_classes={ways} takes {3 * ways}: {ways} each for '
        f'training, validation and test; add classes{remedy}'
    )


# The data of a run --------------------------------------------------------------------------------


def as_in_run(
    folders: Mapping[str, ClassImages],
    splits: Iterable[str],
    known: Mapping[str, Counts] | None,
) -> dict[str, ClassImages]:
    """The classes of prepared data that a run knows; see classes_of_run, whose errors it raises."""
    first = next(iter(folders.values()))
    found = {split: classes.sizes() for split, classes in folders.items()}
    chosen = classes_of_run(found, splits, known, first.folder) if known else None
    if chosen is None:
        return dict(folders)
    return {split: folders[split].named(names) for split, names in chosen.items()}


def classes_of_run(
    found: Mapping[str, Counts],
    splits: Iterable[str],
    known: Mapping[str, Counts],
    folder: str | Path,
) -> dict[str, Counts] | None:
    """The classes of each split that a run knows, in its order.

    None if the data are others, of which the run knows no class: these may be evaluated on.

    found: the classes among which those of a split are. splits: those that are needed.
    known: those of the run, from its checkpoint.
    Raises ValueError with the difference if the run knows some of them, or is to be trained.
    """
    splits, used = [*splits], {name for classes in known.values() for name in classes}
    wrong = [text for split in splits for text in differences(split, found[split], known)]
    if wrong and 'train' not in splits and all(used.isdisjoint(found[s]) for s in splits):
        if used and all(split in known for split in splits):
            _tell(f'The run knows no class of {folder}: they are new to it.')
        return None
    if wrong:
        raise ValueError(
            f'the run has other data than {folder}: {"; ".join(wrong)}. Give the --data_dir that '
            'it was trained with, or to train anew another --logdir; to evaluate on new classes, '
            "a folder with none of the run's"
        )
    chosen = {}
    for split in [split for split in known if split in found]:
        chosen[split] = {name: found[split][name] for name in known[split] if name in found[split]}
    added = [*dict.fromkeys(name for s in chosen for name in found[s] if name not in used)]
    if added:
        _tell(f'Classes in {folder} that the run does not know are left out: {listed(added)}.')
    return chosen


def differences(split: str, found: Counts, known: Mapping[str, Counts]) -> list[str]:
    """What of a split is not as the run knows it, as texts."""
    if split not in known:
        used = [name for name in found if any(name in classes for classes in known.values())]
        return [f'it knows no {split} classes, and used {listed(used)} otherwise']
    texts, wanted = [], known[split]
    missing = [name for name in wanted if name not in found]
    if missing:
        texts.append(f'of {len(wanted)} {split} classes it misses {listed(missing)}')
    for name, count in wanted.items():
        if found.get(name, count) != count:
            texts.append(f'{name} has {found[name]} images and had {count}')
    return texts


# Class folders, decoded once ----------------------------------------------------------------------

CACHE_FORMAT = 2  # raise it when what the cache holds changes
CHUNK = 256  # images decoded, written and checksummed together


def load_class_folders(
    folder: Path,
    layout: ImageLayout,
    cache: Path,
    command: str | None = None,
    cache_dir: str | None = None,
) -> ClassImages:
    """All images of a folder of class folders, sorted by class and file name.

    Hidden and stray files are ignored. The images come from the cache if that matches the files
    (names, sizes, times of change) and its own checksums. Otherwise they are decoded, and the
    cache is written if it can be.

    folder: the data set, or one split of it; layout: how it lies on disk.
    cache: the folder for the decoded images; one in the user's cache folder if it cannot be made.
    command: what makes the data, for the error messages; None if it is the user's own.
    cache_dir: where that folder is to be instead.
    Raises FileNotFoundError if there is no such folder, and ValueError if it holds no classes, a
    class holds no images, or an image is damaged or has another size.
    """
    if command and not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}; make it with {command}')
    _check_folder(folder)
    found = _class_folders(folder, layout.depth)
    classes = {name: _image_files(path, layout) for name, path in found}
    _check_classes(classes, folder, layout, command)
    return _load(folder, layout, cache, classes, command, cache_dir)


def _load(
    folder: Path,
    layout: ImageLayout,
    cache: Path,
    classes: dict[str, list[os.DirEntry]],
    command: str | None,
    cache_dir: str | None,
) -> ClassImages:
    """The images of classes; others as of load_class_folders."""
    files = [file for images in classes.values() for file in images]
    images = _cached_images(folder, layout, _cache_places(cache, cache_dir), files, command)
    counts = np.array([*_counts(classes).values()])
    return ClassImages(str(folder), list(classes), np.cumsum(counts) - counts, counts, images)


def _check_classes(
    classes: dict[str, list[os.DirEntry]],
    folder: Path,
    layout: ImageLayout,
    command: str | None,
    skip_small: bool = False,
):
    """Raises ValueError if there are none, or one holds no images and is not to be skipped."""
    again = f'move {folder} away and make it again with {command}'
    if not classes:
        remedy = again if command else 'it needs a folder of images for each class'
        raise ValueError(f'{folder} holds no class folders; {remedy}')
    for name, files in classes.items():
        if not files and command:
            raise ValueError(
                f'{folder / name} holds no images ({", ".join(layout.suffixes)}); remove it if it '
                f'is no class, or {again}'
            )
        deeper = [] if files else [path for _, path in _class_folders(folder / name, 1)]
        if deeper:
            raise ValueError(
                f'{folder / name} holds no images but folders, and other classes of {folder} hold '
                'images: move folders so that all classes lie at one depth'
            )
        if not files and not skip_small:
            raise ValueError(
                f'{folder / name} holds no images of a format that Pillow reads; add some, or '
                'remove it if it is no class, or leave it out with --skip_small_classes'
            )


def _visible(folder: str) -> list[os.DirEntry]:
    """The entries of a folder, without the hidden ones, sorted by name."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith('.')]
    return sorted(visible, key=lambda entry: entry.name)


def _class_folders(folder: Path, depth: int) -> list[tuple[str, str]]:
    """(name relative to folder, path) of those `depth` levels below, sorted level by level."""
    found = [('', str(folder))]
    for _ in range(depth):
        parents, found = found, []
        for parent, path in parents:
            folders = [entry for entry in _visible(path) if entry.is_dir()]
            found += [(f'{parent}/{entry.name}'.lstrip('/'), entry.path) for entry in folders]
    return found


def image_files(folder: str | Path, layout: ImageLayout) -> list[str]:
    """The paths of a folder's images, sorted by name."""
    return [file.path for file in _image_files(str(folder), layout)]


def _image_files(folder: str, layout: ImageLayout) -> list[os.DirEntry]:
    """The same as entries, which know the size and the time of change."""
    files = [entry for entry in _visible(folder) if entry.name.lower().endswith(layout.suffixes)]
    return [entry for entry in files if entry.is_file()]


def _cache_places(cache: Path, cache_dir: str | None) -> list[Path]:
    """Where decoded images may be kept, the first choice first.

    cache: beside the data. cache_dir: another folder, instead. Away from the data the name tells
    where they are, since folders of one name may be different data.
    """
    place = os.fsencode(cache)
    name = f'{cache.stem}.{hashlib.sha256(place).hexdigest()[:16]}{cache.suffix}'
    if cache_dir:
        return [Path(cache_dir).expanduser() / name]
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return [cache, Path(home) / 'maml-tf2' / name]


def _cached_images(
    folder: Path,
    layout: ImageLayout,
    places: Sequence[Path],
    files: list[os.DirEntry],
    command: str | None,
) -> np.ndarray:
    """The images of `files` in order, mapped from a cache, else decoded.

    Returns [total, height, width, channels] uint8.
    """

    def decode(file: os.DirEntry) -> np.ndarray:
        return read_image(file.path, layout, command)

    def decoded() -> Iterator[np.ndarray]:
        _tell(f'Decoding the {len(files)} images of {folder}.')
        try:
            yield from _decode_all(files, decode)
        except ValueError as error:  # so that all can be replaced at once
            others = _unreadable(files, decode)[1:]
            more = f' ({len(others)} more cannot be read: {listed(others)})' if others else ''
            raise ValueError(f'{error}{more}') from error

    key, shape = _fingerprint(folder, layout, files), layout.shape(len(files))
    for cache in places:
        images = _read_cache(cache, key, shape)
        if images is not None:
            return images
    cache = _keep(places, key, decoded)
    images = _read_cache(cache, key, shape) if cache else None
    if images is not None:
        return images
    images = np.empty(shape, np.uint8)
    for place, chunk in zip(_chunks(images), decoded()):
        place[:] = chunk
    return images


def _keep(
    places: Sequence[Path], key: str, decoded: Callable[[], Iterator[np.ndarray]]
) -> Path | None:
    """Writes the cache at the first place where it can be, and returns that."""
    failures = []
    for cache in places:
        try:
            _write_cache(cache, key, decoded())
        except OSError as error:
            failures.append(f'{cache} ({error.strerror or error})')
            continue
        if failures:
            _tell(f'The decoded images cannot be kept in {failures[0]}, but are in {cache}.')
        return cache
    _tell(
        f'The decoded images cannot be kept in {" or ".join(failures)}; they will be decoded at '
        'every start. --cache_dir=FOLDER keeps them elsewhere.'
    )
    return None


def _fingerprint(folder: Path, layout: ImageLayout, files: list[os.DirEntry]) -> str:
    """Changes when the layout or any file's name, size or time of change does."""
    digest = hashlib.sha256(f'({CACHE_FORMAT}, {layout.key()})'.encode())
    for file in files:
        status = file.stat()
        path = os.fsencode(file.path.removeprefix(str(folder)))  # the folder itself may move
        digest.update(b'%s\0%d\0%d\n' % (path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _read_cache(cache: Path, key: str, shape: tuple) -> np.ndarray | None:
    """The cached images, memory-mapped; None if they are absent, out of date or damaged."""
    try:
        index = json.loads((cache / 'index.json').read_bytes())
        if index['key'] != key:
            return None
        if (cache / 'images.raw').stat().st_size != math.prod(shape):
            raise ValueError('wrong size')
        images = np.asarray(np.memmap(cache / 'images.raw', np.uint8, 'r', shape=shape))
        with ThreadPoolExecutor(cores()) as pool:
            if list(pool.map(zlib.crc32, _chunks(images))) != index['checksums']:
                raise ValueError('wrong checksum')
        return images
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever is wrong with a cache, it can be made again
        print(f'The cache {cache} is damaged ({error}) and is not used.', file=sys.stderr)
        return None


def _write_cache(cache: Path, key: str, chunks: Iterator[np.ndarray]):
    """Writes the chunks as they come, so that data larger than memory will do.

    The files get their names at the end, and the index, which holds the checksums of the images,
    goes last: whatever happens before, they do not match.
    """
    images, index = (cache / f'{name}.{os.getpid()}.tmp' for name in ('images.raw', 'index.json'))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        with open(images, 'wb') as file:
            checksums = [zlib.crc32(chunk) for chunk in chunks if file.write(chunk)]
        index.write_text(json.dumps({'key': key, 'checksums': checksums}))
        images.replace(cache / 'images.raw')
        index.replace(cache / 'index.json')
    finally:
        with suppress(OSError):
            images.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            cache.rmdir()  # only if nothing is in it


def _remove_leftovers(cache: Path):
    """Removes the files of processes that were killed; a live one writes all the time."""
    for leftover in cache.glob('*.tmp'):
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink()


def _decode_all(
    files: list[os.DirEntry], decode: Callable[[os.DirEntry], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the decoded files, [CHUNK, height, width, channels] uint8, showing the progress.

    All cores decode, some chunks ahead: if all were, those that wait would fill the memory.
    """

    def decode_chunk(chunk: list[os.DirEntry]) -> np.ndarray:
        return np.stack([decode(file) for file in chunk])

    chunks, workers, done = _chunks(files), cores(), 0
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(chunks), 8 * workers):
            for images in pool.map(decode_chunk, chunks[first : first + 8 * workers]):
                yield images
                done += len(images)
                if sys.stderr.isatty():
                    end = '\n' if done == len(files) else '\r'
                    print(f'{done} of {len(files)}', end=end, file=sys.stderr)


def _unreadable(files: list[os.DirEntry], decode: Callable[[os.DirEntry], np.ndarray]) -> list[str]:
    """The paths of the files that cannot be decoded."""

    def fails(file: os.DirEntry) -> bool:
        try:
            decode(file)
        except ValueError:
            return True
        return False

    with ThreadPoolExecutor(cores()) as pool:
        return [file.path for file, failed in zip(files, pool.map(fails, files)) if failed]


def read_image(path: str, layout: ImageLayout, command: str | None = None) -> np.ndarray:
    """One image, [height, width, channels] uint8; command: as for load_class_folders.

    Raises ValueError if it cannot be decoded, or is not of the layout's size if that is for
    prepared images.
    """
    again = f', or move the data away and make it again with {command}' if command else ''
    remedy = f'replace it{again or " or remove it"}'
    try:
        with Image.open(path) as image:
            size, mode, fits = image.size[::-1], image.mode, _fits(image, layout)
            pixels = _pixels(image, layout) if fits else None
    except Exception as error:  # on damaged files OSError, SyntaxError, struct.error and others
        raise ValueError(f'{path} cannot be decoded ({error}); {remedy}') from error
    if not fits:
        expected = '{}x{} with at most 8'.format(*layout.size) if layout.prepared else 'at most 16'
        raise ValueError(
            f'{path} is {size[0]}x{size[1]} of mode {mode}, but images of {expected} bits per '
            f'channel are expected; {remedy}'
        )
    return ~pixels if layout.invert else pixels


def _fits(image: Image.Image, layout: ImageLayout) -> bool:
    """Whether an image has the layout's size, if that is for prepared images, and few enough bits.

    I and F are Pillow's modes of 32 bits, those that begin with I; have 16.
    """
    if image.mode in ('I', 'F'):
        return False
    fits = image.size[::-1] == layout.size and not image.mode.startswith('I;')
    return fits or not layout.prepared


def _pixels(image: Image.Image, layout: ImageLayout) -> np.ndarray:
    """Converted to the layout: [height, width, channels] uint8.

    The way up that a camera noted, and on white where it is transparent.
    """
    if not layout.prepared:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;'):  # 16 bits, which Pillow's conversion would cut off at 255
        image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
    if image.has_transparency_data and not layout.prepared:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    image = image.convert(layout.mode)
    if image.size[::-1] != layout.size:
        image = _fitted(image, layout)
    return np.asarray(image).reshape(layout.shape(1)[1:])


def _fitted(image: Image.Image, layout: ImageLayout) -> Image.Image:
    """In the layout's size, by its `fit`."""
    size = layout.size[::-1]  # (width, height)
    if layout.fit == 'crop':
        return ImageOps.fit(image, size, layout.resampling)
    if layout.fit == 'pad':
        return ImageOps.pad(image, size, layout.resampling, color='white')
    return image.resize(size, layout.resampling)


def _chunks(items: Sequence) -> list[Sequence]:
    """Successive stretches of CHUNK items, the last one of what is left."""
    return [items[first : first + CHUNK] for first in range(0, len(items), CHUNK)]
