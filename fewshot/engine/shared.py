"""Weights that tasks share until the first inner update: one product of matrices for all."""

from typing import NamedTuple

import tensorflow as tf

from special_grads import product, product_outer, product_transposed, sizes, spread


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
