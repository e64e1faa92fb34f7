"""Class Learner: arrays in, arrays out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import finite_numbers, folder_path, real_number, real_numbers
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import MODEL_SETTINGS, make_model
from fewshot.networks.checks import check_loss, has_sizes
from fewshot.networks.inner_loops import LEARNED_RATES
from fewshot.networks.keras_network import KerasNetwork
from fewshot.runs.checkpoints import checkpoints, read_run_state, write_checkpoint
from fewshot.use.any_size import AnySize
from fewshot.use.saved_models import (
    check_network_is_given,
    find_checkpoint,
    of_images,
    set_optimizer,
    settings_of,
    stored_object,
)
from maml import MAML, Arrays, Tensors, UpdateRule


class ArraysOfTasks:
    """The arrays that a Learner takes, checked and made tensors.

    Subclasses have model, is_classifier and takes_images.
    """

    def _labels(self, y: np.ndarray) -> tuple[tf.Tensor, bool]:
        """Labels [T, examples, out] of what `adapt` takes, and whether they are of one task."""
        y, out = real_numbers('labels', y), self.model.network.dim_output
        rank = 1 if self.is_classifier else 2  # of one task's
        if y.ndim not in (rank, rank + 1) or not y.size:
            wanted = '[examples]' if self.is_classifier else f'[examples, {out}]'
            raise ValueError(
                f'labels must be {wanted}, or that with an axis of tasks before, but they are '
                f'{list(y.shape)}'
            )
        if self.is_classifier:
            label = one_hot(y, out)
        elif y.shape[-1] != out:
            raise ValueError(
                f'labels must have {out} values per example, but they are {list(y.shape)}'
            )
        else:
            label = y
        single, dtype = y.ndim == rank, self.model.dtype.as_numpy_dtype
        label = finite_numbers('labels', label, dtype)
        return tf.constant(label[np.newaxis] if single else label), single

    def _examples(self, x, name: str, single: bool, axes: Sequence[int | None] = (None, None)):
        """Inputs [T, examples, D] of what `adapt` takes; axes: (T, examples), where known."""
        x, size = real_numbers(name, x), self.model.network.dim_input
        x = x[np.newaxis] if single else x
        fits = x.ndim >= 3 and x.size and int(np.prod(x.shape[2:])) == size
        if not fits or any(axis not in (None, given) for axis, given in zip(axes, x.shape)):
            shape = getattr(self.model.network, 'image_shape', [size])
            names = [given or name for given, name in zip(axes, ('T', 'examples'))]
            wanted = [*names[single:], *shape]
            raise ValueError(f'{name} must be {wanted}, but it is {list(x.shape[single:])}')
        x = pixel_values(name, x) if self.takes_images else x
        check_bytes(name, x, self.model.trained_on)
        x = finite_numbers(name, x, self.model.dtype.as_numpy_dtype)
        return tf.constant(x.reshape(*x.shape[:2], size))

    def _is_single(self, weights: Arrays) -> bool:
        """Whether weights are of one task, without an axis for it.

        Raises ValueError if they are not of this network.
        """
        own = self.model.weights
        text = f'weights must be what adapt() returns, with {", ".join(own)}, but they '
        if not isinstance(weights, Mapping):
            raise ValueError(f'{text}are of type {type(weights).__name__}')
        text += 'have '
        if {*own} != {*weights}:
            raise ValueError(text + ', '.join(map(str, weights)))
        arrays = {name: real_numbers(f'the weight {name}', weights[name]) for name in own}
        axes = {arrays[name].ndim - theta.shape.rank for name, theta in own.items()}
        if axes not in ({0}, {1}):
            names = ', '.join(weights)
            raise ValueError(
                f'{text}{names} of other shapes than one task or one axis of tasks gives'
            )
        return axes == {0}

    def _given(self, weights: Arrays, tasks: int, single: bool) -> Tensors:
        """Weights [T, ...] from what `adapt` returns."""
        if self._is_single(weights) != single:
            have, need = ('several tasks', 'one') if single else ('one task', 'several')
            raise ValueError(f'weights are of {have}, examples of {need}')
        given = {}
        for name, theta in self.model.weights.items():
            value = np.asarray(weights[name])
            value = value[np.newaxis] if single else value
            if value.shape != (tasks, *theta.shape):
                raise ValueError(
                    f'the weight {name} is {list(value.shape[single:])}, but {tasks} tasks of '
                    f'{theta.shape.as_list()} are needed'
                )
            dtype = self.model.dtype.as_numpy_dtype
            given[name] = tf.constant(finite_numbers(f'the weight {name}', value, dtype))
        return given


PIXEL_TOLERANCE = 1e-5  # by which pixels may be beyond 0 and 1, from rounding


def pixel_values(name: str, images: np.ndarray) -> np.ndarray:
    """Values from 0 to 1, of those or of uint8. The type decides, as 0 and 1 may be either's.

    Raises ValueError, with the name, for others.
    """
    if images.dtype == np.uint8:
        return images / 255
    if not (images.min() >= -PIXEL_TOLERANCE and images.max() <= 1 + PIXEL_TOLERANCE):
        raise ValueError(
            f'{name} must have values from 0 to 1, or be uint8 from 0 to 255, but it is '
            f'{images.dtype} from {images.min()} to {images.max()}'
        )
    return images


def check_bytes(name: str, x: np.ndarray, trained_on: Collection[str]):
    """Raises ValueError, with the name, for uint8 if training was on floats: another scale."""
    if x.dtype == np.uint8 and 'float' in trained_on and 'uint8' not in trained_on:
        raise ValueError(
            f'{name} is uint8, but the model was trained on floats; give numbers as in training, '
            'for example divided by 255'
        )


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """[...] -> [..., classes]. Raises ValueError for what are no classes' numbers."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'labels must be integers from 0 to {classes - 1}, but they are {labels.dtype} from '
            f'{labels.min()} to {labels.max()}'
        )
    return np.eye(classes)[labels]


def checked_finite(arrays: Arrays, what: str) -> Arrays:
    """Raises ValueError if adaptation has diverged, so that there are no numbers any more."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f'{what} are NaN or infinite: adaptation diverged, try a smaller lr')
    return arrays


class Learner(ArraysOfTasks):
    """A model that learns tasks of one's own from NumPy arrays.

    Of one task, x is [examples, ...], y [examples] and weights [...]; of several, with an axis of
    tasks before: x [T, examples, ...], y [T, examples], weights [T, ...]. An example is an array of
    any shape of the network's size; its numbers go into the network as they are, as in training. Of
    a run of main.py on images they are from 0 to 1, or uint8 from 0 to 255: the type alone says
    which, 0 and 1 of uint8 are almost black. y are the classes' numbers, 0 to N-1; of regression,
    the values, [(T,) examples, out].

    Attributes: model, a FastMAML; of one that was loaded also settings, the flags it was trained
    with, and checkpoint, the path.
    """

    def __init__(self, model: FastMAML, settings: dict | None = None):
        if not isinstance(model, MAML):
            raise ValueError(f'model must be a FastMAML, but it is a {type(model).__name__}')
        if not has_sizes(model.network):
            raise ValueError('the network must have dim_input and dim_output, see maml.Network')
        self.model, self.settings, self.checkpoint = model, settings or {}, None
        self.is_classifier = hasattr(model.loss, 'shots')
        self.takes_images = self.is_classifier and of_images(self.settings)
        self.programs = AnySize(model)

    @classmethod
    def load(
        cls,
        run_folder: str | Path,
        checkpoint: int | str = -1,
        compiled: bool = False,
        network=None,
        loss: Callable | None = None,
        learn_lr: UpdateRule | None = None,
    ) -> 'Learner':
        """The model of a training run, or of `save`.

        checkpoint: an iteration, -1 for the newest, or 'best' for that of the best validation.
        compiled: see FastMAML; it takes seconds for each new number of tasks or examples, and pays
        for many tasks. network, loss, learn_lr: the run's, if they are not those of this program; a
        network may be a keras.Model. Raises ValueError if there is no such checkpoint, or it is
        damaged or does not tell its flags, or network, loss or learn_lr is missing.
        """
        path = find_checkpoint(run_folder, checkpoint)
        settings = read_run_state(path).get('flags')
        if not settings:
            raise ValueError(
                f'{path} does not tell the flags it was trained with; if it is the TensorFlow 1 '
                "original's, scripts/model/import_tf1_checkpoint.py makes one that does"
            )
        check_network_is_given(path, settings, network)
        if isinstance(network, keras.Model):
            network = KerasNetwork(network, audit=None)  # as when it was trained
        if settings.get('loss') and loss is None:
            raise ValueError(f'{path} was trained with a loss of its own: give it as loss=')
        made = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
        if settings.get('learn_lr', 'none') not in ('none', *LEARNED_RATES) and learn_lr is None:
            raise ValueError(f'{path} was trained with a rule of its own: give it as learn_lr=')
        made |= {} if learn_lr is None else {'learn_lr': learn_lr}
        made['dtype'] = tf.as_dtype(settings.get('dtype', 'float32'))
        if isinstance(made.get('meta_lr'), dict):  # saved before `optimizer` was
            made['meta_lr'] = stored_object(made['meta_lr'], path)
        model = make_model(**made, compiled=compiled, network='' if network is None else network)
        if 'optimizer' in settings:
            set_optimizer(model, stored_object(settings['optimizer'], path))
        if loss is not None:
            check_loss(loss, model.network, model.dtype)
            model.loss = loss
        model.clip = settings.get('clip', model.clip)  # of models that were made in Python
        images = ['float'] if of_images(settings) else []
        model.trained_on = frozenset(settings.get('trained_on', images))
        model.restore(path)
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

    def adapt(
        self,
        support_x: np.ndarray,
        support_y: np.ndarray,
        steps: int | None = None,
        lr: float | None = None,
        weights: Arrays | None = None,
        done: int = 0,
    ) -> Arrays:
        """The weights after inner updates on the support set of a task, or of several: equation 1.

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
        label, single = self._labels(support_y)  # [T, examples, out]
        tasks, examples = label.shape[:2]
        x = self._examples(support_x, 'support_x', single, (tasks, examples))
        if weights is None:
            start = model.initial_weights(tasks)
        else:
            start = self._given(weights, tasks, single)
        scale = self.example_scale(examples)
        if as_learned:
            adapted = self.programs.adapt_as_learned(x, label, start, scale, steps, done)
        else:
            adapted = self.programs.adapt(x, label, start, lr * scale, steps, done)
        arrays = {name: value.numpy() for name, value in adapted.items()}
        sizes = 'learned step sizes' if as_learned else f'lr={lr:g}'
        checked_finite(arrays, f'after {steps} step{"s" * (steps != 1)} with {sizes} the weights')
        return {name: value[0] for name, value in arrays.items()} if single else arrays

    def predict(
        self,
        query_x: np.ndarray,
        weights: Arrays,
        support_x: np.ndarray | None = None,
        done: int | None = None,
    ) -> np.ndarray:
        """Class probabilities of the queries, [(T,) queries, N]; of regression, the outputs.

        weights: from `adapt`. support_x: if given, batch normalisation takes its statistics of this
        support set alone, so that an answer does not depend on the other queries; else of the
        queries, as in training and in the paper. done: how many updates the weights have had,
        `num_updates` if None; it counts with `norm_steps` only. Raises ValueError for arguments
        that do not fit, and for weights that give no finite answers.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        single = self._is_single(weights)
        x, leading = self._examples(query_x, 'query_x', single), None
        if support_x is not None:
            support = self._examples(support_x, 'support_x', single, (x.shape[0], None))
            x, leading = tf.concat([support, x], axis=1), support.shape[1]
        given = self._given(weights, x.shape[0], single)
        output = self.programs.output(x, given, leading, done)
        output = (tf.nn.softmax(output) if self.is_classifier else output).numpy()
        checked_finite({'output': output}, 'the answers')
        return output[0] if single else output

    def task_loss(
        self, x: np.ndarray, y: np.ndarray, weights: Arrays, done: int | None = None
    ) -> np.ndarray:
        """The mean loss of a task's examples, a number; of several tasks, [T].

        Arguments and errors as of `adapt` and `predict`.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        label, single = self._labels(y)
        inputs = self._examples(x, 'x', single, label.shape[:2])
        given = self._given(weights, label.shape[0], single)
        loss = self.programs.losses(inputs, label, given, done).numpy()
        checked_finite({'loss': loss}, 'the losses')
        if self.is_classifier:  # a sum over examples, divided by training's K
            loss *= self.model.loss.shots / label.shape[1]
        return loss[0] if single else loss

    def example_scale(self, examples: float | tf.Tensor) -> float | tf.Tensor:
        """What α is to be multiplied by for a support set of so many examples.

        The loss of a classifier is a sum over them divided by training's K, and α is meant for N
        times their mean, whatever their number.
        """
        if not self.is_classifier:
            return 1
        return self.model.loss.shots * self.model.network.dim_output / examples
