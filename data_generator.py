"""Sources of tasks: random sinusoids, or class folders of images.

A source turns (seed, split, iteration) into a meta-batch of tasks and keeps no state:

    folders = fewshot.load_omniglot('data')
    source = OmniglotGenerator(folders, num_classes=5, num_support=1, num_query=1)
    batch = source.batch('train', iteration=0, num_tasks=32)  # a Batch

fewshot.UserTasks makes a source of an object of your own.
"""

import math
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ('train', 'val', 'test')
FEW_COMBINATIONS = 100  # an evaluation with fewer combinations of classes says so
EVALUATION_SEED = 1  # gives every run and checkpoint the same tasks


class Batch(NamedTuple):
    """A meta-batch of T tasks; a is the support set, b the query set; arrays or tensors.

    Inputs are flattened, D = height * width * channels, values in [0, 1]; labels are one-hot.
    Examples are ordered shot by shot: K (or Q) groups of N images, one per class, each group in an
    order of its own.
    """

    inputa: np.ndarray  # [T, N*K, D]    sinusoid: [T, K, 1], oracle [T, K, 3] = (x, A, phi)
    labela: np.ndarray  # [T, N*K, N]    sinusoid: [T, K, 1]
    inputb: np.ndarray  # [T, N*Q, D]    sinusoid: [T, Q, 1 or 3]
    labelb: np.ndarray  # [T, N*Q, N]    sinusoid: [T, Q, 1]


def whole_number(name: str, value, lowest: int = 0) -> int:
    """Returns a count as an int. Raises ValueError, with the argument's name, if it is no count."""
    try:
        found = operator.index(value)
    except TypeError as error:  # also of 2.0, which may be a mistake
        raise ValueError(f'{name} must be a whole number, but it is {value!r:.60}') from error
    if found < lowest:
        wanted = f'be at least {lowest}' if lowest > 0 else 'not be negative'
        raise ValueError(f'{name} must {wanted}, but it is {value}')
    return found


class ClassImages(NamedTuple):
    """The decoded images of some classes; class c owns counts[c] of them, from starts[c] on."""

    folder: str  # where they come from, for messages
    names: list  # of the classes, e.g. 'Greek/character01'
    starts: np.ndarray  # [classes] int64
    counts: np.ndarray  # [classes] int64
    images: np.ndarray  # [total, height, width, channels] uint8, mostly memory-mapped; 255 * value

    def select(self, classes: Sequence[int]) -> 'ClassImages':
        """Selects some of the classes, in the order given, on the same images."""
        names = [self.names[c] for c in classes]
        return self._replace(names=names, starts=self.starts[classes], counts=self.counts[classes])

    def named(self, names: Iterable[str]) -> 'ClassImages':
        """Selects the classes of these names, in the order given, on the same images."""
        place = {name: i for i, name in enumerate(self.names)}
        return self.select([place[name] for name in names])

    def sizes(self) -> dict[str, int]:
        """Returns {class: number of images}."""
        return dict(zip(self.names, map(int, self.counts)))


# Tasks --------------------------------------------------------------------------------------------


class DataGenerator:
    """Draws meta-batches, and says how its tasks are trained on, evaluated and shown.

    Everything random about a task is one row of uniform numbers; `_tasks` reads it.
    Raises ValueError if the seed is negative.
    """

    objective = 'accuracy'  # the figure that is printed and evaluated: 'accuracy' or 'loss'
    validates = True  # whether held-out classes are evaluated during training
    iterations_at_once = 1  # meta-batches that run as one program: many of tiny tasks
    print_factor = 1  # printed lines are this many times further apart
    updates_shown = 1  # inner updates evaluated during training, at least
    tasks_at_once = 4  # tasks evaluated together, which bounds the memory; divides 600
    picture_name = 'task'  # the tag of its pictures in TensorBoard
    has_queries = True  # whether tasks have query sets; without them updates have no result
    model_settings = {}  # the settings that `make_model` needs besides the flags
    classes = {}  # {split: {class: how many images}}, which checkpoints keep
    settled_flags = {}  # values of flags that were left to the data

    def __init__(self, dim_input: int, dim_output: int, num_draws: int, seed: int):
        seed = whole_number('the seed', seed)
        self.dim_input, self.dim_output = dim_input, dim_output  # per example
        self.num_draws, self.seed = num_draws, seed

    def batch(
        self, split: str, iteration: int, num_tasks: int, tasks: slice = slice(None)
    ) -> Batch:
        """Returns the meta-batch of an iteration, a pure function of (seed, split, iteration).

        split: 'train', 'val' or 'test'; iteration: not negative. num_tasks: T. Task i is the same
        whatever T is. tasks: the slice of the T tasks to return; the others cost nothing.
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
        """Returns `batch` of `count` successive iterations, stacked: [count, T, ...]."""
        iterations = range(first_iteration, first_iteration + count)
        draws = [self._draw(split, i, num_tasks)[tasks] for i in iterations]
        batch = self._tasks(split, np.concatenate(draws))  # [count*T, ...]
        return Batch(*(array.reshape(count, len(draws[0]), *array.shape[1:]) for array in batch))

    def dataset(self, split: str, num_tasks: int, first_iteration: int = 0):
        """Returns an endless tf.data.Dataset of the meta-batches (Batch) from an iteration on.

        The arguments are those of `batch`. fewshot.MetaModel.fit takes the dataset.
        """
        import tensorflow as tf  # nothing else here needs it

        first = self.batch(split, first_iteration, num_tasks)  # its sizes are those of all

        def arrays(iteration: np.ndarray) -> Batch:
            return self.batch(split, int(iteration), num_tasks)

        @tf.autograph.experimental.do_not_convert
        def draw(iteration: tf.Tensor) -> Batch:
            batch = Batch(*tf.numpy_function(arrays, [iteration], [part.dtype for part in first]))
            for drawn, values in zip(batch, first):
                drawn.set_shape(values.shape)
            return batch

        return tf.data.Dataset.counter(first_iteration).map(draw).prefetch(2)

    def caution(self, split: str) -> str:
        """Returns a sentence of caution about an evaluation on a split; empty if none is needed."""
        return ''

    def _draw(self, split: str, iteration: int, num_tasks: int) -> np.ndarray:
        """Draws uniform numbers in [0, 1), a row for each task: [T, num_draws]."""
        iteration, num_tasks = checked_request(split, iteration, num_tasks)
        generator = np.random.default_rng([self.seed, SPLITS.index(split), iteration])
        return generator.random((num_tasks, self.num_draws))

    def _tasks(self, split: str, uniform: np.ndarray) -> Batch:
        """Builds the tasks that rows of uniform numbers, [T, num_draws], stand for."""
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
    the classes are shuffled. Generators on the same `folders` share the images.

    folders: the decoded classes of each split, from load_omniglot, load_miniimagenet, load_folder.
    num_classes: N. num_support: K, images per class. num_query: Q, images per class; may be 0.
    rotate: whether to draw rotations; `rotates` if None. seed: another seed gives other tasks.
    splits: the splits it will be used on; all that `folders` holds if None.
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

    def caution(self, split: str) -> str:
        """Warns if the split's classes can be combined into few tasks only."""
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
        """Gathers images by their index, turned and flattened row by row: [T, shots*N, D] float32.

        index: [T, shots, N]; turns: quarters counter-clockwise, likewise.
        """
        pixels = source.images[index]  # [T, shots, N, height, width, channels] uint8
        for quarter in (1, 2, 3) if self.rotate else ():
            turned = turns == quarter
            pixels[turned] = np.rot90(pixels[turned], quarter, axes=(1, 2))
        tasks, shots, ways = index.shape
        return np.divide(pixels, 255, dtype=np.float32).reshape(tasks, shots * ways, self.dim_input)

    def _one_hot(self, labels: np.ndarray) -> np.ndarray:
        """Encodes labels as one-hot rows: [T, shots, N] -> [T, shots*N, N] float32."""
        tasks, shots, ways = labels.shape
        return np.eye(ways, dtype=np.float32)[labels].reshape(tasks, shots * ways, ways)


class OmniglotGenerator(ImageGenerator):
    """An ImageGenerator of small images with rotations, so that every character is four classes."""

    rotates = True
    updates_shown = 10
    tasks_at_once = 20


def checked_request(split: str, iteration: int, num_tasks: int) -> tuple[int, int]:
    """Returns iteration and number of tasks. Raises ValueError if there is no such meta-batch."""
    if split not in SPLITS:
        raise ValueError(f'there is no split {split!r}; the splits are {", ".join(SPLITS)}')
    return whole_number('iteration', iteration), whole_number('--meta_batch_size', num_tasks, 1)


class TaskSize(NamedTuple):
    """The size of a task: its number of classes, and the images that it takes of each."""

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
    small = sorted((name for name in counts if counts[name] < size.images), key=counts.get)
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


def listed(names: Sequence[str], most: int = 5) -> str:
    """Lists the first few names, and tells how many more there are."""
    shown = ', '.join(names[:most])
    return f'{shown} and {len(names) - most} more' if len(names) > most else shown


def _check_shots(num_support: int, num_query: int):
    """Raises ValueError if the numbers of examples are out of range."""
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


# Splits -------------------------------------------------------------------------------------------


def split_classes(num_classes: int) -> dict[str, list[int]]:
    """Assigns Omniglot's sorted classes to the splits: they are shuffled, then cut.

    The 1623 official characters give 1100 train, 100 val and 423 test classes; any set of at least
    1201 gives the same 1100 and 100, and the rest are for test. A smaller set (of at least 3
    classes) is dealt out in the proportions 1100 : 100 : 423, at least one class each.
    """
    if num_classes >= 1201:
        return deal_out(num_classes, val=100, test=num_classes - 1200)
    return deal_out(num_classes, *held_out(num_classes, (1100, 100, 423)))


def held_out(num_classes: int, proportions: Sequence[float]) -> tuple[int, int]:
    """Returns how many classes val and test get, at least one each.

    proportions: those of train, val and test.
    """
    total = sum(proportions)
    val, test = (max(1, round(num_classes * part / total)) for part in proportions[1:])
    return val, test


def deal_out(num_classes: int, val: int, test: int) -> dict[str, list[int]]:
    """Shuffles by a fixed seed, then cuts; train gets what val and test leave, and at least one."""
    order = list(range(num_classes))
    random.Random(1).shuffle(order)
    train = max(1, num_classes - val - test)
    val = min(val, num_classes - train - 1)
    return {'train': order[:train], 'val': order[train : train + val], 'test': order[train + val :]}
