"""Checks networks and losses of one's own before training."""

import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import first_line, real_number
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.paper_networks import Convolutional, FullyConnected
from maml import initial_value

PROBE = (2, 3)  # tasks and examples: different numbers, so that a mistaken axis does not broadcast


def check_numbers(update_lr: float, num_updates: int, meta_lr, clip: float | None, seed: int):
    """Raises ValueError, with the argument's name, for a value out of range or not a number."""
    real_number('update_lr', update_lr)
    whole_number('num_updates', num_updates)
    if not isinstance(meta_lr, keras.optimizers.schedules.LearningRateSchedule):
        real_number('meta_lr', meta_lr)
    if clip is not None:
        real_number('clip', clip, above=0)
    whole_number('seed', seed)


def check_network(network, dtype: tf.DType):
    """Raises ValueError if a network lacks something, or treats the axis of tasks wrongly.

    The project's own networks are right; another one is called once, with a few random inputs.
    """
    needed = ('parameters', 'norm_parameters', 'prepare', '__call__')
    if lacking := [name for name in needed if not hasattr(network, name)]:
        raise ValueError(
            f'the network, of {type(network).__name__}, lacks {", ".join(lacking)}; '
            'fewshot.Network says what one needs, and a Keras model is one as it is'
        )
    if getattr(network, 'dtype', dtype) != dtype:
        raise ValueError(
            f'the network computes in {network.dtype}, but dtype is {dtype.name}; a Keras model '
            'computes in float64 after keras.config.set_dtype_policy("float64")'
        )
    known = type(network) in (FullyConnected, Convolutional, KerasNetwork)
    if known or not has_sizes(network):
        return
    tasks, examples = PROBE
    try:
        shape = probe_output(network, dtype).shape
    except Exception as error:  # the user's own code
        raise ValueError(
            f'the network fails on {tasks} tasks of {examples} examples, with weights of a task '
            f'each, [{tasks}, ...]: {first_line(error)}'
        ) from error
    if tuple(shape) != (*PROBE, network.dim_output):
        raise ValueError(
            f'the network must return [tasks, examples, dim_output], that is '
            f'{[*PROBE, network.dim_output]}, but returns {list(shape)}'
        )


def probe_output(network, dtype: tf.DType) -> tf.Tensor:
    """Returns a network's output for random inputs: [*PROBE, out]. Raises the network's errors."""
    values, weights = {}, {}
    for i, (name, made) in enumerate((network.parameters | network.norm_parameters).items()):
        values[name] = tf.cast(initial_value(*made, seed=[0, i]), dtype)
    for name in network.parameters:
        theta = values.pop(name)
        weights[name] = tf.tile(theta[tf.newaxis], PROBE[:1] + (1,) * theta.shape.rank)
    x = tf.random.stateless_uniform([*PROBE, network.dim_input], [0, 1], dtype=dtype)
    return network(network.prepare(x), weights, values)


def has_sizes(network) -> bool:
    """Whether a network tells the sizes that it takes and returns; else there is no check."""
    return hasattr(network, 'dim_input') and hasattr(network, 'dim_output')


def check_loss(loss: Callable, network, dtype: tf.DType):
    """Raises ValueError if a loss does not give one number for each task."""
    if not has_sizes(network):
        return
    output = tf.random.stateless_uniform([*PROBE, network.dim_output], [0, 1], dtype=dtype)
    label = tf.one_hot(tf.zeros(PROBE, tf.int32), network.dim_output, dtype=dtype)
    try:
        shape = tf.convert_to_tensor(loss(output, label)).shape
    except Exception as error:  # the user's own code
        raise ValueError(
            f'the loss fails on outputs and labels {list(output.shape)}: {first_line(error)}'
        ) from error
    if tuple(shape) != PROBE[:1]:
        raise ValueError(
            'the loss must return one number for each task, [tasks], of outputs and labels '
            f'[tasks, examples, out]; for {list(output.shape)} it returns {list(shape)}. '
            'One of Keras takes the mean over tasks too, which would change α: write it as '
            'tf.reduce_mean(..., axis=[1, 2])'
        )


def warn_of_probabilities(loss: Callable, network, dtype: tf.DType):
    """Warns if a network ends in softmax and its loss takes the softmax too."""
    own = type(network) in (FullyConnected, Convolutional)
    if own or not hasattr(loss, 'shots') or not has_sizes(network) or network.dim_output < 2:
        return
    output = probe_output(network, dtype).numpy()
    if (output >= 0).all() and np.abs(output.sum(-1) - 1).max() < 1e-5:
        warnings.warn(
            "the network's outputs are probabilities already, but cross_entropy takes logits: "
            'leave the softmax at its end away (activation=None, or classifier_activation=None)',
            stacklevel=4,  # beyond FastMAML, and what names its arguments
        )
