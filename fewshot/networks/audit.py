"""Checks meta-gradients: derivatives of an outer loss against central differences, in float64.

Differences need no derivative, so they share no fault with TensorFlow's: several of its gradients
are constants to the second derivative, without an error.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.ops import gradient_registry

from data_generator import Batch
from fewshot.networks.keras_layers import attributes
from maml import MAML, mean_squared_error

# Steps of differences. Larger ones cross kinks of ReLU and max-pooling, of which deep networks have
# many: MobileNetV2 needs 1e-9.
FINE = (1e-7, 1e-8, 1e-9, 1e-10, 1e-11)
COARSE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # where an operation rounds to float32
STEPS = {'float64': (FINE, COARSE), 'float32': (COARSE[3:],)}
TOLERANCE = 1e-4  # relative error of a derivative that is right
SPREAD = {'float64': TOLERANCE / 2, 'float32': 1e-2}  # relative, of differences that agree
ENOUGH = 1e-5  # smaller steps are not tried if two have agreed so well
DIRECTIONS = 3  # tried until the differences agree with each other
PATIENCE = 60  # seconds, after which no other direction is tried
STRIDE = 0.02  # size of an audit's inner update, relative to the weights


# A model in float64, and random values for it -----------------------------------------------------


@contextlib.contextmanager
def in_float64(model: keras.Model) -> Iterator[None]:
    """Lets a float32 model compute in float64 while entered, with values that are given to it."""
    policy, is_float, changes = keras.DTypePolicy('float64'), keras.backend.is_float_dtype, []
    layers, typed = model._flatten_layers(), [*model.variables]
    inner = [getattr(layer, '_functional', None) for layer in layers]  # what a Sequential calls
    for layer in [*layers, *filter(None, inner)]:
        if is_float(layer.compute_dtype):
            changes.append((layer, '_dtype_policy', policy))
        typed += [layer] if isinstance(layer, keras.layers.InputLayer) else []
        typed += getattr(layer, '_inputs', None) or []
    changes += [(thing, '_dtype', 'float64') for thing in typed if is_float(thing.dtype)]
    with attributes(changes):
        yield


def rounds(graph: tf.Graph) -> bool:
    """Whether an operation rounds float64 to float32, or less, which small steps do not see."""
    for operation in graph.get_operations():
        if any(x.dtype == tf.float64 for x in operation.inputs):
            if any(y.dtype.is_floating and y.dtype != tf.float64 for y in operation.outputs):
                return True
    return any(node.op == 'Cast' and narrows(node) for node in nodes(graph))


def narrows(cast) -> bool:
    source, to = (tf.as_dtype(cast.attr[name].type) for name in ('SrcT', 'DstT'))
    return source == tf.float64 and to.is_floating and to != tf.float64


def nodes(graph: tf.Graph) -> list:
    """Lists the nodes of a graph, and of the functions that it calls."""
    made = graph.as_graph_def()
    return [*made.node, *(node for body in made.library.function for node in body.node_def)]


def moved(value: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns a value near by, since zeros hide a derivative or lie on a kink.

    Signs stay, since a variable may have to be positive.
    """
    value = np.asarray(value, np.float64)
    factor = 1 + 0.1 * random.uniform(-1, 1, value.shape)
    return np.where(value == 0, random.uniform(-0.1, 0.1, value.shape), factor * value)


def probe_inputs(model: keras.Model, shape: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """Yields random inputs a model may take, the likelier first; shape: [..., examples, *input]."""
    random, layers = np.random.default_rng(seed), model._flatten_layers(include_self=False)
    sizes = [getattr(layer, name, 0) for layer in layers for name in ('input_dim', 'num_tokens')]
    if sizes := [size for size in sizes if size]:
        yield random.integers(0, min(sizes), shape).astype(float)
    x = random.random(shape)
    for layer in layers:
        if isinstance(layer, keras.layers.Masking):
            x[..., ::2, -1, :] = layer.mask_value  # the last time step of every other example
    yield x


# Differences --------------------------------------------------------------------------------------


def differentiate(
    difference: Callable[[float], float], floor: float, precision: str
) -> tuple[float, float]:
    """Computes a derivative by central differences, and how far the two best steps are apart.

    difference: f(step) - f(-step), over 2. Large steps are off by the curvature, and by kinks of
    ReLU and max-pooling, where the outer loss jumps; small ones by rounding. Between them lies a
    plateau, where two steps agree best. floor: smaller derivatives need no more digits than it.
    precision: 'float32' if an operation rounds to it; then steps must be large.
    """
    best = np.nan, np.inf
    for steps in STEPS[precision]:
        found = []
        for step in steps:
            found.append(difference(step) / step)
            value, spread = float(np.mean(found[-2:])), float(np.ptp(found[-2:]))
            if len(found) > 1 and spread < best[1]:
                best = value, spread
            if best[1] <= ENOUGH * max(abs(value), floor):
                return best
        if best[1] <= SPREAD[precision] * max(abs(best[0]), floor):
            break
    return best


class Compared(NamedTuple):
    """A derivative along a direction, compared with central differences."""

    derivative: float
    difference: float
    spread: float  # of the differences
    floor: float  # errors are relative to this at least
    precision: str = 'float64'
    blind: Sequence[str] = ()  # operations, if it is wrong, whose derivatives count as zero

    @property
    def scale(self) -> float:
        return max(abs(self.difference), self.floor)

    @property
    def error(self) -> float:
        """The relative error of the derivative."""
        return abs(self.derivative - self.difference) / self.scale

    @property
    def is_right(self) -> bool:
        apart = 5 * self.spread / self.scale if self.precision == 'float32' else 0
        return self.error <= max(TOLERANCE, apart)

    @property
    def is_decided(self) -> bool:
        """Whether the derivative is known to be right or wrong.

        Large steps may agree with each other on the wrong number, across many kinks: they call it
        wrong only if there is a reason.
        """
        agree = self.spread <= SPREAD[self.precision] * self.scale
        return agree and (self.precision == 'float64' or self.is_right or bool(self.blind))


def compare(
    loss: Callable, variables: Sequence, gradient: Sequence, direction: Sequence, *how
) -> Compared:
    """Compares the gradient of a loss along a direction with differences.

    loss: a function without arguments of the values of the variables, which keep theirs. gradient
    and direction: an array for each variable. how: the floor and the precision of `differentiate`.
    """
    values = [variable.numpy() for variable in variables]

    def loss_at(step: float) -> float:
        for variable, value, d in zip(variables, values, direction):
            variable.assign(value + step * d)
        return float(loss())

    derivative = sum(float(np.sum(np.multiply(g, d))) for g, d in zip(gradient, direction))
    found = differentiate(lambda step: (loss_at(step) - loss_at(-step)) / 2, *how)
    for variable, value in zip(variables, values):
        variable.assign(value)
    return Compared(derivative, *found, *how)


# The audit of a network ---------------------------------------------------------------------------


def audit(network, inputs: Callable) -> Compared:
    """Checks a network's meta-gradient along a random direction of all that the outer loop learns.

    network: a KerasNetwork that computes in its `precision`. inputs: maps a seed to random inputs,
    [T, examples, D].
    """
    random, start, dtype = np.random.default_rng(1), time.monotonic(), network.precision
    model = MAML(network, mean_squared_error, update_lr=1.0, dtype=dtype)
    for variable in model.parameters:
        variable.assign(moved(variable.numpy(), random))
    x, z = inputs(2), inputs(3)
    shape = (*x.shape[:2], network.dim_output)
    y, label = (tf.constant(random.standard_normal(shape), x.dtype) for _ in range(2))
    batch = Batch(inputa=x, labela=y, inputb=z, labelb=label)
    model.update_lr = step_size(model, batch)
    _, *gradient = model.gradient_of_sum(batch)
    sizes = [rms(variable.numpy()) for variable in model.parameters]
    floor = 1e-3 * float(tf.linalg.global_norm(gradient)) * max(sizes) + 1e-12
    for _ in range(DIRECTIONS):
        direction = [random.standard_normal(g.shape) * s for g, s in zip(gradient, sizes)]
        outer_loss = functools.partial(model.outer_loss, batch)
        compared = compare(outer_loss, model.parameters, gradient, direction, floor, dtype)
        if not compared.is_right:
            compared = compared._replace(blind=blind_operations(outer_loss))
        if compared.is_decided or time.monotonic() > start + PATIENCE:
            break
    return compared


def rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(value)))) if np.size(value) else 0.0


def step_size(model: MAML, batch: Batch) -> float:
    """Returns the size of an inner update that changes weights by a share, STRIDE."""
    gradients = zip(model.named_parameters, model.pretrain_gradient(batch)[1:])
    length = tf.linalg.global_norm([g for name, g in gradients if name in model.weights])
    size = tf.linalg.global_norm([*model.weights.values()])
    return STRIDE * float(size / length) if length > 0 else 1.0


def blind_operations(loss: Callable) -> list[str]:
    """Lists the operations of a loss() whose derivatives TensorFlow takes for zero."""
    graph = tf.function(loss, autograph=False).get_concrete_function().graph
    floats, found = (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum), {}
    for node in nodes(graph):
        with contextlib.suppress(LookupError):
            if node.attr['T'].type in floats and gradient_registry.lookup(node.op) is None:
                found[node.op] = node.name
    return [f'{kind} ({found[kind]})' for kind in found if kind not in FLAT]


# Operations whose derivatives are zero, or that have truth values.
FLAT = {
    *('ZerosLike', 'OnesLike', 'Fill', 'Sign', 'IsFinite', 'IsNan', 'IsInf'),
    *('Equal', 'NotEqual', 'Less', 'LessEqual', 'Greater', 'GreaterEqual'),
}
