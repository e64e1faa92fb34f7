"""The inner loop and the forward pass of a model, for any number of tasks and examples."""

import functools
from collections.abc import Callable

import tensorflow as tf

from maml import MAML, Tensors

# x is [T, examples, D], y [T, examples, out], and weights are [T, ...].


def adapt(
    maml: MAML, x, y, weights: Tensors, lr, start, stop, scales_learned: bool = False
) -> Tensors:
    """Takes the inner updates start...stop - 1, counted from 0, and returns the new weights.

    lr: the step size or, if it scales the learned ones, their factor.
    """
    values = maml.values()
    support = maml.prepare(x, maml.prepared_norms(values)), y

    def update(theta: Tensors, norms: Tensors, alpha, x, y) -> Tensors:
        alpha = tf.nest.map_structure(lambda rate: lr * rate, alpha) if scales_learned else lr
        return maml.update(theta, norms, alpha, x, y)

    def turn(step: tf.Tensor, theta: Tensors) -> tuple:
        ((theta, _),) = maml.adapt(theta, values, support, [step], update)
        shapes = {name: weights[name].shape for name in theta}  # which the loop wants to be kept
        return step + 1, {name: tf.ensure_shape(theta[name], shapes[name]) for name in theta}

    return tf.while_loop(lambda step, _: step < stop, turn, [start, weights])[1]


def output(maml: MAML, x, weights: Tensors, done, leading=None) -> tf.Tensor:
    """Computes the outputs for x, [T, examples, out]; leading: as in MAML.forward.

    done: how many updates the weights have had, which chooses normalisation parameters.
    """
    values = maml.values()
    x = maml.prepare(x, maml.prepared_norms(values), leading)
    norms, _ = maml.of_update(values, tf.maximum(done - 1, 0))
    return maml.forward(weights, norms, x, leading)


def losses(maml: MAML, x, y, weights: Tensors, done) -> tf.Tensor:
    """Computes the loss of each task, [T]; done: as in `output`."""
    return maml.loss(output(maml, x, weights, done), y)


class Programs:
    """The functions above, each as one program of TensorFlow for all numbers of tasks and examples.

    A program for each number would fill the memory of a process that lives long.
    """

    def __init__(self, maml: MAML):
        def tensors(*shape):
            return tf.TensorSpec(shape, maml.dtype)

        x, y = (tensors(None, None, n) for n in (maml.network.dim_input, maml.network.dim_output))
        weights = {name: tensors(None, *theta.shape) for name, theta in maml.weights.items()}
        count, updates = tf.TensorSpec([], tf.int32), [x, y, weights, tensors()]
        scale_learned = functools.partial(adapt, scales_learned=True)
        self.adapt = any_size(adapt, maml, *updates, count, count)
        self.adapt_as_learned = any_size(scale_learned, maml, *updates, count, count)
        self.output = any_size(output, maml, x, weights, count)
        self.output_after = any_size(output, maml, x, weights, count, count)  # after leading ones
        self.losses = any_size(losses, maml, x, y, weights, count)


def any_size(function: Callable, maml: MAML, *signature) -> Callable:
    """Returns the function of a MAML as a program, or as it is if the network must know sizes."""
    function = functools.partial(function, maml)
    program = tf.function(function, input_signature=signature, autograph=False)

    @functools.cache
    def traced() -> Callable:
        try:
            program.get_concrete_function()
        except Exception:  # whatever it is: without a program it is raised again
            return function
        return program

    def run(*arguments):
        return (function if tf.config.functions_run_eagerly() else traced())(*arguments)

    return run
