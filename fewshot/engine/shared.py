"""Weights that tasks share until the first inner update: one product of matrices for all."""

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from maml import MAML, Parts, Tensors
from special_grads import per_task, product, product_outer, product_transposed, sizes, spread


class Shared(NamedTuple):
    """A weight that all tasks have in common, and a place for each task's gradient.

    The tasks then make up one product of matrices, and the gradient of the weight is at once the
    sum over tasks that the outer loop needs. The inner loop, which needs them one by one, finds
    them at `perturbation`, which is zero.
    """

    value: tf.Tensor  # [...]
    perturbation: tf.Tensor  # [T, ...]

    def per_task(self) -> tf.Tensor:
        """An equal weight of each task's own: [T, ...]."""
        shape = sizes(self.perturbation)
        rows = spread(tf.reshape(self.value, [1, 1, -1]), shape[0])  # [1, T, size]
        return tf.reshape(rows, shape) + self.perturbation

    def multiply(self, rows: tf.Tensor) -> tf.Tensor:
        """rows [T, n, in] times a matrix [in, out]: [T, n, out]."""
        return product_shared(rows, *self)

    def reshaped(self, shape: list[int]) -> 'Shared':
        """value: [...] -> shape."""
        tasks = self.perturbation.shape[:1]
        value = tf.reshape(self.value, shape)
        return Shared(value, tf.reshape(self.perturbation, [*tasks, *value.shape]))


@tf.custom_gradient
def product_shared(rows: tf.Tensor, matrix: tf.Tensor, perturbation: tf.Tensor):
    """rows [T, n, in] times matrix [in, out] + perturbation [T, in, out], which is zero.

    Returns [T, n, out]. Differentiable by `perturbation` once, and any number of times by the
    others.
    """
    tasks, n, size = rows.shape
    together = tf.reshape(rows, [1, tasks * n, size])  # as one task
    shared, out = tf.expand_dims(matrix, 0), matrix.shape[-1]

    def derivative(gradient):
        flat = tf.reshape(gradient, [1, tasks * n, out])
        return (
            tf.reshape(product_transposed(flat, shared), rows.shape),
            product_outer(together, flat)[0],
            product_outer(rows, gradient),
        )

    return tf.reshape(product(together, shared), [tasks, n, out]), derivative


def share(theta: Tensors, tasks: int | tf.Tensor) -> dict[str, Shared]:
    """θ, {name: [...]}, as weights of so many tasks."""
    zeros = {name: tf.zeros([tasks, *value.shape], value.dtype) for name, value in theta.items()}
    return {name: Shared(tf.convert_to_tensor(theta[name]), zeros[name]) for name in theta}


def own(theta: Mapping[str, Shared]) -> Tensors:
    """Weights that tasks shared as weights of their own: {name: [T, ...]}."""
    return {name: per_task(weight) for name, weight in theta.items()}


def start_apart(theta: Tensors, tasks: int | tf.Tensor) -> Tensors:
    """θ, once for every task, as maml.repeated; the derivative is a faster sum over tasks."""
    return own(share(theta, tasks))


def shared_parts(maml: MAML) -> Parts:
    """The parts of a MAML whose tasks share θ until their first update, which is the only one."""

    def update(theta: dict[str, Shared], norms: Tensors, alpha, x, y: tf.Tensor) -> Tensors:
        perturbations = {name: weight.perturbation for name, weight in theta.items()}
        with tf.GradientTape() as inner:
            inner.watch(perturbations)
            losses = maml.loss(maml.network(x, theta, norms), y)  # [T]
        gradients = inner.gradient(losses, perturbations, unconnected_gradients='zero')
        return maml.inner_step(own(theta), gradients, alpha)

    def last_loss(theta, norms: Tensors, alpha, support: tuple, query: tuple) -> tf.Tensor:
        return maml.query_loss(update(theta, norms, alpha, *support), norms, *query)

    return maml.parts._replace(start=share, update=update, last_loss=last_loss)
