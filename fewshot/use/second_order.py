"""A Keras model's meta-gradient by this project, by Keras alone, and by central differences."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.engine.fast import FastMAML
from fewshot.networks.audit import DIRECTIONS, TOLERANCE, Compared, compare, moved
from fewshot.networks.keras_layers import takes_training
from fewshot.networks.keras_network import KerasNetwork


class Setting(NamedTuple):
    """A network, tasks, and how it adapts to them, in float64."""

    network: KerasNetwork
    batch: Batch
    loss: Callable
    updates: int
    lr: float
    seed: int  # of weights and directions

    def maml(self, stop_grad: bool = False) -> FastMAML:
        """Makes a FastMAML with weights near the model's."""
        numbers, named = (self.lr, self.updates), {'dtype': tf.float64, 'compiled': False}
        model = FastMAML(self.network, self.loss, *numbers, stop_grad=stop_grad, **named)
        random = np.random.default_rng([self.seed, 1])
        for variable in model.parameters:
            variable.assign(moved(variable.numpy(), random))
        return model


class Row(NamedTuple):
    """The derivatives along a direction of one variable: by this project, and by Keras alone."""

    name: str
    here: Compared
    keras: Compared
    first_order: float


def plain_keras(setting: Setting, theta: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Computes the outer loss and its gradient by Keras alone, as one would write them with it."""
    model = setting.network.model
    fixed = [variable.value for variable in model.non_trainable_variables]
    named = {'training': True} if takes_training(model) else {}

    def loss(theta, x, y):  # of one task: [examples, D] and [examples, classes]
        images = tf.reshape(x, [-1, *setting.network.image_shape])
        output, _ = model.stateless_call(theta, fixed, images, **named)
        return setting.loss(tf.reshape(output, [1, *y.shape]), y[tf.newaxis])[0]

    @tf.function(autograph=False)
    def loss_and_gradient(theta):
        total = 0.0
        with tf.GradientTape() as outer:
            outer.watch(theta)
            for inputa, labela, inputb, labelb in zip(*map(tf.unstack, setting.batch)):
                adapted = theta
                for _ in range(setting.updates):
                    with tf.GradientTape() as inner:
                        inner.watch(adapted)
                        support = loss(adapted, inputa, labela)
                    gradients = inner.gradient(support, adapted, unconnected_gradients='zero')
                    adapted = [value - setting.lr * g for value, g in zip(adapted, gradients)]
                total += loss(adapted, inputb, labelb)
            total /= setting.batch.inputa.shape[0]
        return total, outer.gradient(total, theta, unconnected_gradients='zero')

    return loss_and_gradient(theta)


def audit_variables(setting: Setting) -> Iterator[Row]:
    """Audits variables, one by one. Raises ValueError without a finite loss to differentiate."""
    model, precision = setting.maml(), setting.network.precision
    loss, exact = model.meta_gradient(setting.batch)
    keras_loss, plain = plain_keras(setting, [v.value() for v in model.parameters])
    loss, keras_loss = float(loss), float(keras_loss)
    if not np.isfinite(loss):
        raise ValueError(f'the outer loss is {loss}: try a smaller --lr, or fewer --updates')
    if abs(loss - keras_loss) > TOLERANCE * abs(keras_loss):
        raise ValueError(
            f'the outer loss is {loss:.6g} by this project, and {keras_loss:.6g} by Keras alone: '
            'examples or tasks depend on each other in a way that is not supported'
        )
    _, first_order = setting.maml(stop_grad=True).meta_gradient(setting.batch)
    norms = np.array([float(tf.norm(gradient)) for gradient in [*exact, *first_order]])
    floor = max(1e-3 * norms[np.isfinite(norms)].max(initial=0), 1e-12)

    def outer_loss() -> float:
        return np.mean(model.evaluate(setting.batch, setting.updates).losses2[-1])

    for i, (name, variable) in enumerate(zip(setting.network.parameters, model.parameters)):
        random = np.random.default_rng([setting.seed, 2, i])
        for _ in range(DIRECTIONS):
            direction = random.standard_normal(variable.shape)
            here = compare(outer_loss, [variable], [exact[i]], [direction], floor, precision)
            if here.is_decided:
                break
        keras, first = (float(np.sum(g[i] * direction)) for g in (plain, first_order))
        yield Row(name, here, here._replace(derivative=keras), first)
