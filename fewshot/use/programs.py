"""The inner loop and the forward pass of a model, for any number of tasks and examples."""

import functools
from collections.abc import Callable

import tensorflow as tf

from maml import MAML, Tensors

# x is [T, examples, D], y [T, examples, out], and weights are [T, ...]. MAML's methods are called
# by its name, because those of FastMAML are programs with fixed sizes.


def adapt(
    model: MAML, x, y, weights: Tensors, lr, start, stop, scales_learned: bool = False
) -> Tensors:
    """The weights after the inner updates start...stop - 1, counted from 0.

    lr: the step size or, if it scales the learned ones, their factor.
    """
    common = model.common_values()
    x = MAML.prepare(model, x, *model.preparing(common))

    def update(step, theta):
        norms, rates = model.at(common, step)
        sizes = tf.nest.map_structure(lambda rate: lr * rate, rates) if scales_learned else lr
        theta = MAML.update(model, theta, norms, x, y, sizes)
        shapes = {name: weights[name].shape for name in theta}  # which the loop wants to be kept
        return step + 1, {name: tf.ensure_shape(theta[name], shapes[name]) for name in theta}

    return tf.while_loop(lambda step, _: step < stop, update, [start, weights])[1]


def output(model: MAML, x, weights: Tensors, done, leading=None) -> tf.Tensor:
    """The outputs for x, [T, examples, out]; leading: as of MAML.output.

    done: how many updates the weights have had, which chooses normalisation parameters.
    """
    common = model.common_values()
    x = MAML.prepare(model, x, *model.preparing(common, leading))
    norms, _ = model.at(common, tf.maximum(done - 1, 0))
    return MAML.output(model, weights, norms, x, leading)


def losses(model: MAML, x, y, weights: Tensors, done) -> tf.Tensor:
    """The loss of each task, [T]; done: as of `output`."""
    return model.loss(output(model, x, weights, done), y)


class Programs:
    """The functions above, each as one program of TensorFlow for all numbers of tasks and examples.

    A program for each number would fill the memory of a process that lives long.
    """

    def __init__(self, model: MAML):
        def tensors(*shape):
            return tf.TensorSpec(shape, model.dtype)

        x, y = (tensors(None, None, n) for n in (model.network.dim_input, model.network.dim_output))
        weights = {name: tensors(None, *theta.shape) for name, theta in model.weights.items()}
        count, updates = tf.TensorSpec([], tf.int32), [x, y, weights, tensors()]
        scale_learned = functools.partial(adapt, scales_learned=True)
        self.adapt = any_size(adapt, model, *updates, count, count)
        self.adapt_as_learned = any_size(scale_learned, model, *updates, count, count)
        self.output = any_size(output, model, x, weights, count)
        self.output_after = any_size(output, model, x, weights, count, count)  # after leading ones
        self.losses = any_size(losses, model, x, y, weights, count)


def any_size(function: Callable, model: MAML, *signature) -> Callable:
    """The function of a model as a program, or as it is if the network has to know the sizes."""
    function = functools.partial(function, model)
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
