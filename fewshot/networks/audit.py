"""Is a meta-gradient right? Derivatives of an outer loss against central differences, in float64.

Differences need no derivative, so they share no fault with TensorFlow's: several of its gradients
are constants to the second derivative, without an error.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.ops import gradient_registry

from fewshot.networks.keras_layers import attributes

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
STRIDE = 0.02  # of the inner update of an audit, relative to the weights


# A model in float64, and random values for it -----------------------------------------------------


@contextlib.contextmanager
def in_float64(model: keras.Model) -> Iterator[None]:
    """Has a model of float32 compute in float64 while entered, with values that are given to it."""
    policy, is_float, changes = keras.DTypePolicy('float64'), keras.backend.is_float_dtype, []
    layers = model._flatten_layers()
    inner = [getattr(layer, '_functional', None) for layer in layers]  # what a Sequential calls
    for layer in [*layers, *filter(None, inner)]:
        if is_float(layer.compute_dtype):
            changes.append((layer, '_dtype_policy', policy))
        typed = [layer] if isinstance(layer, keras.layers.InputLayer) else []
        typed += getattr(layer, '_inputs', None) or []
        changes += [(thing, '_dtype', 'float64') for thing in typed if is_float(thing.dtype)]
    changes += [(own, '_dtype', 'float64') for own in model.variables if is_float(own.dtype)]
    with attributes(changes):
        yield


def rounds(graph: tf.Graph) -> bool:
    """Whether an operation makes float32, or less, of float64, which small steps do not see."""
    for operation in graph.get_operations():
        if any(x.dtype == tf.float64 for x in operation.inputs):
            if any(y.dtype.is_floating and y.dtype != tf.float64 for y in operation.outputs):
                return True
    double = tf.float64.as_datatype_enum
    bodies = [function.node_def for function in graph.as_graph_def().library.function]
    casts = [node for body in bodies for node in body if node.op == 'Cast']
    return any(
        node.attr['SrcT'].type == double
        and node.attr['DstT'].type != double
        and tf.as_dtype(node.attr['DstT'].type).is_floating
        for node in casts
    )


def moved(value: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A value near by, since zeros hide a derivative or lie on a kink.

    Signs stay, since a variable may have to be positive.
    """
    value = np.asarray(value, np.float64)
    factor = 1 + 0.1 * random.uniform(-1, 1, value.shape)
    return np.where(value == 0, random.uniform(-0.1, 0.1, value.shape), factor * value)


def probe_inputs(model: keras.Model, shape: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """Random inputs that a model may take, the likelier first; shape: [..., examples, *input]."""
    random, layers = np.random.default_rng(seed), model._flatten_layers(include_self=False)
    sizes = [getattr(layer, 'input_dim', None) for layer in layers]
    sizes += [getattr(layer, 'num_tokens', None) for layer in layers]
    if sizes := [size for size in sizes if size]:
        yield random.integers(0, min(sizes), shape).astype(float)
    x = random.random(shape)
    for layer in layers:
        if isinstance(layer, keras.layers.Masking):
            x[..., ::2, -1, :] = layer.mask_value  # the last time step of every other example
    yield x


# The outer loss, and its derivatives --------------------------------------------------------------


class Tasks(NamedTuple):
    """Random regressions, [T, examples, ...] each, and the step size of the inner update."""

    inputa: tf.Tensor
    labela: tf.Tensor
    inputb: tf.Tensor
    labelb: tf.Tensor
    lr: float


def squared_error(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """[T, examples, out] each -> [T]."""
    return tf.reduce_mean(tf.square(output - label), axis=[1, 2])


def weights_and_norms(network, values: Sequence[tf.Tensor], tasks: int) -> tuple[dict, dict]:
    """θ for each task, {name: [T, ...]}, and what tasks have in common, {name: [...]}.

    values: of the network's parameters and norm_parameters, in this order.
    """
    count = len(network.parameters)
    theta = {
        name: tf.broadcast_to(value, [tasks, *value.shape])
        for name, value in zip(network.parameters, values)
    }
    return theta, dict(zip(network.norm_parameters, values[count:]))


def inner_gradient(network, theta: dict, norms: dict, tasks: Tasks) -> dict:
    """∇_θ of the support losses, {name: [T, ...]}."""
    with tf.GradientTape() as tape:
        tape.watch(theta)
        output = network(network.prepare(tasks.inputa), theta, norms)
        losses = squared_error(output, tasks.labela)
    return tape.gradient(losses, theta, unconnected_gradients='zero')


def outer_loss(network, values: Sequence[tf.Tensor], tasks: Tasks) -> tf.Tensor:
    """The sum over tasks of the query loss after an inner update, a scalar; lines 4 to 10."""
    theta, norms = weights_and_norms(network, values, tasks.inputa.shape[0])
    gradients = inner_gradient(network, theta, norms, tasks)
    theta = {name: theta[name] - tasks.lr * gradients[name] for name in theta}
    output = network(network.prepare(tasks.inputb), theta, norms)
    return tf.reduce_sum(squared_error(output, tasks.labelb))


def meta_gradient(network, values: Sequence[tf.Tensor], tasks: Tasks) -> list[tf.Tensor]:
    """∇ of `outer_loss` for the values."""
    with tf.GradientTape() as tape:
        tape.watch(values)
        loss = outer_loss(network, values, tasks)
    return tape.gradient(loss, values, unconnected_gradients='zero')


# Differences --------------------------------------------------------------------------------------


def differentiate(
    difference: Callable[[float], float], floor: float, precision: str
) -> tuple[float, float]:
    """A derivative by central differences, and how far the two steps that agree best are apart.

    difference: f(step) - f(-step), over 2. Large steps are off by the curvature, and by kinks of
    ReLU and max-pooling, where the outer loss jumps; small ones by rounding. Between them lies a
    plateau. floor: smaller derivatives need no more digits than it. precision: 'float32' if an
    operation rounds so, to which steps must be large.
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
    """A derivative along a direction, and what differences have."""

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
        """Relative."""
        return abs(self.derivative - self.difference) / self.scale

    @property
    def is_right(self) -> bool:
        apart = 5 * self.spread / self.scale if self.precision == 'float32' else 0
        return self.error <= max(TOLERANCE, apart)

    @property
    def is_decided(self) -> bool:
        """Whether it is known to be right or wrong.

        Large steps may agree with each other on the wrong number, across many kinks: they call it
        wrong only if there is a reason.
        """
        agree = self.spread <= SPREAD[self.precision] * self.scale
        return agree and (self.precision == 'float64' or self.is_right or bool(self.blind))


def audit(network, inputs: Callable) -> Compared:
    """The meta-gradient of a network along a random direction of all that the outer loop learns.

    network: a KerasNetwork, computing in its `precision`. inputs: from a seed to random inputs,
    [T, examples, D].
    """
    random, start, dtype = np.random.default_rng(1), time.monotonic(), network.precision
    made = [value for value, _ in [*network.parameters.values(), *network.norm_parameters.values()]]
    values = [tf.constant(moved(value, random), dtype) for value in made]
    tasks = random_tasks(network, values, inputs, random)
    gradient = meta_gradient(network, values, tasks)
    norm = float(tf.linalg.global_norm(gradient))
    for _ in range(DIRECTIONS):
        direction = [tf.constant(random.standard_normal(v.shape) * rms(v), dtype) for v in values]

        def difference(step: float, direction=direction) -> float:
            moves = [[v + s * d for v, d in zip(values, direction)] for s in (step, -step)]
            after, before = (outer_loss(network, move, tasks) for move in moves)
            return float(after - before) / 2

        derivative = sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradient, direction))
        floor = 1e-3 * norm * max(map(rms, values)) + 1e-12
        found = differentiate(difference, floor, dtype)
        compared = Compared(derivative, *found, floor, dtype)
        if not compared.is_right:
            compared = compared._replace(blind=blind_operations(network, values, tasks))
        if compared.is_decided or time.monotonic() > start + PATIENCE:
            break
    return compared


def rms(value: tf.Tensor) -> float:
    return float(tf.sqrt(tf.reduce_mean(tf.square(value)))) if tf.size(value) else 0.0


def random_tasks(network, values: list, inputs: Callable, random: np.random.Generator) -> Tasks:
    """Regression to random numbers, by an inner update that changes weights by a share, STRIDE."""
    x, z = inputs(2), inputs(3)
    shape = (*x.shape[:2], network.dim_output)
    y, label = (tf.constant(random.standard_normal(shape), x.dtype) for _ in range(2))
    tasks = Tasks(x, y, z, label, lr=1.0)
    theta, norms = weights_and_norms(network, values, x.shape[0])
    gradients = inner_gradient(network, theta, norms, tasks)
    length = float(tf.linalg.global_norm([*gradients.values()]))
    lr = STRIDE * float(tf.linalg.global_norm([*theta.values()])) / length if length else 1.0
    return tasks._replace(lr=lr)


def blind_operations(network, values: Sequence[tf.Tensor], tasks: Tasks) -> list[str]:
    """The operations of the outer loss whose derivatives TensorFlow takes for zero."""
    program = tf.function(lambda values: outer_loss(network, values, tasks), autograph=False)
    graph = program.get_concrete_function([*values]).graph.as_graph_def()
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    floats, found = (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum), {}
    for node in (node for body in bodies for node in body):
        with contextlib.suppress(LookupError):
            if node.attr['T'].type in floats and gradient_registry.lookup(node.op) is None:
                found[node.op] = node.name
    return [f'{kind} ({found[kind]})' for kind in found if kind not in FLAT]


# Operations whose derivatives are zero, or that have truth values.
FLAT = {
    *('ZerosLike', 'OnesLike', 'Fill', 'Sign', 'IsFinite', 'IsNan', 'IsInf'),
    *('Equal', 'NotEqual', 'Less', 'LessEqual', 'Greater', 'GreaterEqual'),
}
