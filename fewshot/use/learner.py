"""Class Learner: arrays in, arrays out."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import finite_numbers, folder_path, real_number, real_numbers, tells_names
from fewshot.engine.fast import FastMAML
from fewshot.networks.checks import has_sizes
from fewshot.runs.checkpoints import checkpoints, read_run_state, write_checkpoint
from fewshot.use.programs import Programs
from fewshot.use.saved_models import find_checkpoint, load_model, of_images, settings_of
from maml import Arrays, InnerLoop, Tensors, repeated

PIXEL_TOLERANCE = 1e-5  # by which pixels may be beyond 0 and 1, from rounding


def pixel_values(name: str, images: np.ndarray) -> np.ndarray:
    """Returns values from 0 to 1, of those or of uint8. The type decides: 0 and 1 may be either's.

    Raises ValueError, with the name, for other values.
    """
    if images.dtype == np.uint8:
        return images / 255
    if not (images.min() >= -PIXEL_TOLERANCE and images.max() <= 1 + PIXEL_TOLERANCE):
        raise ValueError(
            f'{name} must have values from 0 to 1, or be uint8 from 0 to 255, but it is '
            f'{images.dtype} from {images.min()} to {images.max()}'
        )
    return images


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Encodes labels: [...] -> [..., classes]. Raises ValueError for anything but class numbers."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'labels must be integers from 0 to {classes - 1}, but they are {labels.dtype} from '
            f'{labels.min()} to {labels.max()}'
        )
    return np.eye(classes)[labels]


def checked_finite(arrays: Arrays, what: str) -> Arrays:
    """Returns the arrays. Raises ValueError if they are not finite, as adaptation has diverged."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f'{what} are NaN or infinite: adaptation diverged, try a smaller lr')
    return arrays


# A task's arrays come with or without an axis of tasks. `axis` below is (T,), or () without it.


def finite_tensor(model: FastMAML, name: str, array: np.ndarray) -> tf.Tensor:
    """Makes a tensor of the model's type. Raises ValueError, with the name, if it is not finite."""
    return tf.constant(finite_numbers(name, array, model.dtype.as_numpy_dtype))


def axis_of(model: FastMAML, weights: Arrays) -> tuple:
    """Returns the axis of tasks of weights from `adapt`. Raises ValueError for anything else."""
    own = model.weights
    if not isinstance(weights, Mapping) or weights.keys() != own.keys():
        kind = type(weights).__name__
        found = ', '.join(map(str, weights)) if isinstance(weights, Mapping) else f'a {kind}'
        raise ValueError(
            f'weights must be what adapt() returns, with {", ".join(own)}, but they are {found}'
        )
    name, theta = next(iter(own.items()))
    shape = real_numbers(f'the weight {name}', weights[name]).shape
    return shape[: max(len(shape) - theta.shape.rank, 0)]


def weights_of_tasks(model: FastMAML, weights: Arrays, axis: tuple) -> Tensors:
    """Converts weights from `adapt` to [T, ...]. Raises ValueError if the shapes differ."""
    axis_of(model, weights)
    given = {}
    for name, theta in model.weights.items():
        value = real_numbers(f'the weight {name}', weights[name])
        if len(axis) > 1 or value.shape != (*axis, *theta.shape):
            raise ValueError(
                f'the weight {name} must be {[*axis, *theta.shape]}, of one task or with one '
                f'axis of tasks, as the others and the examples, but it is {[*value.shape]}'
            )
        value = finite_tensor(model, f'the weight {name}', value)
        given[name] = value if axis else value[tf.newaxis]
    return given


class Learner:
    """A model that learns tasks of one's own from NumPy arrays.

    For one task, x is [examples, ...], y [examples] and weights [...]; for several, there is an
    axis of tasks before: x [T, examples, ...], y [T, examples], weights [T, ...]. An example is an
    array of any shape of the network's size; its numbers go into the network as they are, as in
    training. For a run of main.py on images they are from 0 to 1, or uint8 from 0 to 255: the type
    alone says which, 0 and 1 of uint8 are almost black. y are the classes' numbers, 0 to N-1; of
    regression, the values, [(T,) examples, out].

    Attributes: model, a FastMAML; if it was loaded also settings, the flags it was trained with,
    and checkpoint, the path.
    """

    def __init__(self, model: FastMAML, settings: dict | None = None):
        if not isinstance(model, FastMAML):
            raise ValueError(f'model must be a FastMAML, but it is a {type(model).__name__}')
        if not has_sizes(model.network):
            raise ValueError('the network must have dim_input and dim_output, see fewshot.Network')
        self.model, self.settings, self.checkpoint = model, settings or {}, None
        self.is_classifier = hasattr(model.loss, 'shots')
        self.takes_images = self.is_classifier and of_images(self.settings)
        self.programs = Programs(model.maml)

    @classmethod
    @tells_names()
    def load(
        cls,
        run_folder: str | Path,
        checkpoint: int | str = -1,
        *,
        compiled: bool = False,
        network=None,
        loss: Callable | None = None,
        inner_loop: InnerLoop | None = None,
    ) -> 'Learner':
        """Loads the model of a training run, or of `save`.

        checkpoint: an iteration, -1 for the newest, or 'best' for that of the best validation.
        compiled: as in FastMAML, for training or evaluating `model`; a Learner does not need it.
        network, loss, inner_loop: the run's, if they are not those of this program; a network may
        be a keras.Model. Raises ValueError if there is no such checkpoint, or it is damaged or does
        not tell its flags, or network, loss or inner_loop is missing.
        """
        path = find_checkpoint(run_folder, checkpoint)
        settings = read_run_state(path).get('flags')
        model = load_model(path, settings, network, loss, inner_loop, compiled)
        learner = cls(model, settings)
        learner.checkpoint = path
        return learner

    def save(self, folder: str | Path) -> str:
        """Writes FOLDER/model0, which `load` reads, and returns its path.

        Raises OSError, and ValueError if the folder has checkpoints of a run: `load` would take
        the newest of them.
        """
        folder = folder_path('folder', folder)
        if others := checkpoints(folder).keys() - {0}:
            raise ValueError(
                f'{folder} holds checkpoints of a run, {max(others)} the newest, which load would '
                'take: give another folder'
            )
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings or settings_of(self.model)
        settings = settings | {'trained_on': sorted(self.model.trained_on)}
        return write_checkpoint(self.model.checkpoint, folder, 0, {'flags': settings})

    @tells_names()
    def adapt(
        self,
        support_x: np.ndarray,
        support_y: np.ndarray,
        steps: int | None = None,
        lr: float | None = None,
        weights: Arrays | None = None,
        done: int = 0,
    ) -> Arrays:
        """Adapts to the support set of a task, or of several, and returns the weights: equation 1.

        steps: `num_updates` if None. lr: α; None: `update_lr` or, if they were learned, the step
        sizes of training. For a classifier it is scaled so that it means the same for any number of
        examples. weights: where to start, θ if None; done: how many updates these have had, which
        counts where step sizes or normalisation differ from update to update.
        Raises ValueError for arguments that do not fit, and if the weights become infinite or NaN.
        """
        model = self.model
        steps = whole_number('steps', model.num_updates if steps is None else steps)
        done, as_learned = whole_number('done', done), lr is None and bool(model.rates)
        lr = real_number('lr', model.update_lr if lr is None else lr)
        label, axis = self._labels(support_y)
        tasks, examples = label.shape[:2]
        x = self._examples('support_x', support_x, axis, examples)
        start = repeated(model.weights, tasks)
        if weights is not None:
            start = weights_of_tasks(model, weights, axis)
        factor, run = self.example_scale(examples), self.programs
        call = run.adapt_as_learned if as_learned else run.adapt
        adapted = call(x, label, start, factor if as_learned else lr * factor, done, done + steps)
        arrays = {name: value.numpy() for name, value in adapted.items()}
        sizes = 'learned step sizes' if as_learned else f'lr={lr:g}'
        checked_finite(arrays, f'after {steps} step{"s" * (steps != 1)} with {sizes} the weights')
        return arrays if axis else {name: value[0] for name, value in arrays.items()}

    @tells_names()
    def predict(
        self,
        query_x: np.ndarray,
        weights: Arrays,
        support_x: np.ndarray | None = None,
        done: int | None = None,
    ) -> np.ndarray:
        """Computes class probabilities of queries, [(T,) queries, N]; for regression, the outputs.

        weights: from `adapt`. support_x: if given, batch normalisation takes its statistics of this
        support set alone, so that an answer does not depend on the other queries; else of the
        queries, as in training and in the paper. done: how many updates the weights have had,
        `num_updates` if None; it counts with `norm_steps` only. Raises ValueError for arguments
        that do not fit, and for weights that give no finite answers.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        axis = axis_of(self.model, weights)
        given = weights_of_tasks(self.model, weights, axis)
        x = self._examples('query_x', query_x, axis)
        if support_x is None:
            output = self.programs.output(x, given, done)
        else:
            support = self._examples('support_x', support_x, axis)
            both = tf.concat([support, x], axis=1)
            output = self.programs.output_after(both, given, done, support.shape[1])
        output = (tf.nn.softmax(output) if self.is_classifier else output).numpy()
        checked_finite({'output': output}, 'the answers')
        return output if axis else output[0]

    def task_loss(
        self, x: np.ndarray, y: np.ndarray, weights: Arrays, done: int | None = None
    ) -> np.ndarray:
        """Computes the mean loss of a task's examples, a number; for several tasks, [T].

        The arguments and errors are those of `adapt` and `predict`.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        label, axis = self._labels(y)
        inputs = self._examples('x', x, axis, label.shape[1])
        given = weights_of_tasks(self.model, weights, axis)
        loss = self.programs.losses(inputs, label, given, done).numpy()
        checked_finite({'loss': loss}, 'the losses')
        if self.is_classifier:  # a sum over examples, divided by training's K
            loss *= self.model.loss.shots / label.shape[1]
        return loss if axis else loss[0]

    def example_scale(self, examples: float | tf.Tensor) -> float | tf.Tensor:
        """Returns the factor of α for a support set of so many examples.

        The loss of a classifier is a sum over them divided by training's K, and α is meant for N
        times their mean, whatever their number.
        """
        if not self.is_classifier:
            return 1
        return self.model.loss.shots * self.model.network.dim_output / examples

    # Arguments, checked and made tensors; axis: see above.

    def _labels(self, y) -> tuple[tf.Tensor, tuple]:
        """Returns labels [T, examples, out], and their axis of tasks."""
        y, out = real_numbers('labels', y), self.model.network.dim_output
        own = [] if self.is_classifier else [out]  # the shape of an example's label
        axis = y.shape[: -1 - len(own)]
        first = len(axis)
        if not y.size or first > 1 or y.ndim == 0 or [*y.shape[first + 1 :]] != own:
            wanted = ', '.join(['examples', *map(str, own)])
            raise ValueError(
                f'labels must be [{wanted}], or that with an axis of tasks before, but they are '
                f'{[*y.shape]}'
            )
        label = finite_tensor(self.model, 'labels', one_hot(y, out) if self.is_classifier else y)
        return (label if axis else label[tf.newaxis]), axis

    def _examples(self, name: str, x, axis: tuple, examples: int | None = None) -> tf.Tensor:
        """Returns inputs [T, examples, D]; examples: how many there must be, if that is known."""
        x, size, first = real_numbers(name, x), self.model.network.dim_input, len(axis)
        count, values = x.shape[first : first + 1], x.shape[first + 1 :]  # of examples; of each
        fits = x.size and x.shape[:first] == axis and values and np.prod(values) == size
        if not fits or examples not in (None, *count):
            shape = getattr(self.model.network, 'image_shape', [size])
            wanted = ', '.join(map(str, [*axis, examples or 'examples', *shape]))
            raise ValueError(f'{name} must be [{wanted}], but it is {[*x.shape]}')
        trained_on = self.model.trained_on
        if self.takes_images:
            x = pixel_values(name, x)
        elif x.dtype == np.uint8 and 'float' in trained_on and 'uint8' not in trained_on:
            raise ValueError(
                f'{name} is uint8, but the model was trained on floats; give numbers as in '
                'training, for example divided by 255'
            )
        return finite_tensor(self.model, name, x.reshape(*(axis or (1,)), -1, size))
