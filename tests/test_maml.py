"""Networks, inner loop, meta-gradient, outer step: by hand, by differences, by plain TensorFlow.

Everything but the tests of a single block and of chunks goes through the public interface of
maml.py, so that layers may be rewritten for speed without touching it. Tests are in float64 and
uncompiled, hence exact and quick, where nothing else is said.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from data_generator import Batch
from fewshot.engine.chunks import CHUNK_SIZE, in_a_loop
from fewshot.engine.fast import FastMAML
from fewshot.engine.programs import with_gradient
from fewshot.networks.build import make_model, make_network
from fewshot.networks.fused import FusedConvolutional, fuse
from fewshot.networks.paper_networks import BatchNorm, Convolutional, FullyConnected, LayerNorm
from maml import MAML, Results, cross_entropy, mean_squared_error, repeated
from special_grads import BATCH_NORM_EPSILON

FOLDER = Path(os.environ.get('MAML_REFERENCE_DIR', Path(__file__).parent / 'reference'))
NORMS = ['batch_norm', 'layer_norm', 'None']


def plain_block(
    images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, beta: tf.Tensor, max_pool: bool
) -> tf.Tensor:
    """The paper's block for the images of one task, section 5.2, in TensorFlow's own operations.

    images: [examples, height, width, C]; kernel: [3, 3, C, F]; bias, beta: [F]. Returns [examples,
    height', width', F]. `Convolutional` computes the same in another way.
    """
    x = tf.nn.conv2d(images, kernel, strides=1 if max_pool else 2, padding='SAME') + bias
    mean = tf.reduce_mean(x, [0, 1, 2])  # not tf.nn.moments: wrong at second order
    variance = tf.reduce_mean(tf.square(x - mean), [0, 1, 2])
    x = tf.nn.relu((x - mean) * tf.math.rsqrt(variance + BATCH_NORM_EPSILON) + beta)
    return tf.nn.max_pool2d(x, 2, 2, 'VALID') if max_pool else x


@contextmanager
def running_eagerly():
    """Without tracing tf.functions, which takes longer than to run them once or twice."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(before)


@pytest.fixture
def eagerly():
    with running_eagerly():
        yield


# Ingredients --------------------------------------------------------------------------------------


def one_hot(random, tasks: int, classes: int, shots: int) -> np.ndarray:
    """Labels [T, shots*N, N]: every class once per shot, in random order."""
    order = [[random.permutation(classes) for _ in range(shots)] for _ in range(tasks)]
    return np.eye(classes)[np.reshape(order, [tasks, shots * classes])]


def random_batch(
    network,
    tasks: int = 2,
    classes: int = 3,
    shots: int = 2,
    queries: int = 2,
    seed: int = 0,
    dtype=tf.float64,
) -> Batch:
    """Images of noise, of the size that `network` wants, and labels independent of them."""
    random = np.random.default_rng(seed)
    if isinstance(network, FullyConnected):
        size = network.parameters['w1'][1][0]
    else:
        size = np.prod(network.image_shape)

    def draw(shots):
        images = random.random((tasks, shots * classes, size))
        return images, one_hot(random, tasks, classes, shots)

    return Batch(*(tf.constant(x, dtype) for x in (*draw(shots), *draw(queries))))


def exact_model(network, loss=None, perturbed: bool = True, **settings) -> FastMAML:
    """Uncompiled, float64, two inner updates; `perturbed`: biases, offsets, gains off 0 and 1."""
    defaults = dict(update_lr=0.05, num_updates=2, dtype=tf.float64, compiled=False)
    model = FastMAML(network, loss or cross_entropy(2), **defaults | settings)
    random = np.random.default_rng(3)
    for variable in model.parameters if perturbed else ():
        change = 0.3 * random.standard_normal(variable.shape)
        variable.assign_add(tf.constant(change, variable.dtype))
    return model


def copy_of(model: FastMAML, network=None, **settings) -> FastMAML:
    """The same parameters in a model with other settings, or with a network of the same names."""
    other = exact_model(network or model.network, perturbed=False, **settings)
    for name, variable in named(other).items():
        variable.assign(tf.cast(named(model)[name], variable.dtype))
    return other


def named(model: FastMAML) -> dict[str, tf.Variable]:
    return model.weights | model.norms


def named_gradient(model: FastMAML, batch: Batch) -> dict[str, np.ndarray]:
    _, gradients = model.meta_gradient(batch)
    return {name: value.numpy() for name, value in zip(named(model), gradients, strict=True)}


def distance(one: dict, other: dict) -> float:
    """Of two meta-gradients, relative to the second."""
    squares = sum(np.sum((one[name] - other[name]) ** 2) for name in other)
    return np.sqrt(squares / sum(np.sum(value**2) for value in other.values()))


def assert_close(one: dict, other: dict, rtol: float = 1e-9, atol: float = 1e-12):
    for name, value in other.items():
        np.testing.assert_allclose(one[name], value, rtol=rtol, atol=atol, err_msg=name)


def adapted(model: FastMAML, batch: Batch, updates: int) -> dict[str, tf.Tensor]:
    """Weights of each task, {name: [T, ...]}, after inner updates on its support set."""
    weights = repeated(model.weights, batch.inputa.shape[0])
    support = model.network.prepare(batch.inputa)
    for _ in range(updates):
        weights = model.maml.update(weights, model.norms, None, support, batch.labela)
    return weights


def tasks_of(batch: Batch, tasks) -> Batch:
    return Batch(*(x[tasks] for x in batch))


# Two parameters, by hand --------------------------------------------------------------------------


class Linear:
    """f(x) = w x + b + c: w and b are adapted; c is common to all tasks, as offsets are."""

    parameters = {'w': ('zeros', (1, 1)), 'b': ('zeros', (1,))}
    norm_parameters = {'c': ('zeros', (1,))}

    def prepare(self, inputs):
        return inputs

    def __call__(self, x, weights, norms):
        return x @ weights['w'] + weights['b'][:, None] + norms['c']


def linear_model(w=2.0, b=1.0, c=0.0, **settings) -> FastMAML:
    model = exact_model(Linear(), mean_squared_error, perturbed=False, **settings)
    for variable, value in zip(model.parameters, (w, b, c), strict=True):
        variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
    return model


def points(*tasks) -> Batch:
    """One support and one query point per task: (x1, y1, x2, y2) each."""
    return Batch(*(tf.constant([[[task[i]]] for task in tasks], tf.float64) for i in range(4)))


@pytest.mark.parametrize(
    'updates, stop_grad, expected',
    [(1, False, (8, 0, 0)), (1, True, (12, 4, 4)), (2, False, (3, -1, -1)), (2, True, (6, 2, 2))],
)
def test_meta_gradient_by_hand(updates, stop_grad, expected):
    """f(x) = w x + b + c with w = 2, b = 1, c = 0; squared error; α = 1/8.

    Support (1, 1), query (3, 3). The support error is e1 = w x1 + b + c - y1 = 2 and its gradient
    for (w, b) is 2 e1 (x1, 1). An update therefore multiplies e1 by r = 1 - 2 α (x1² + 1) = 1/2 and
    takes 2 α e1 (x1, 1) from (w, b). c is not updated. The query error after M updates, s being
    1 + r + ... + r^(M-1), is

        e2 = w x2 + b + c - y2 - 2 α s (x1 x2 + 1) e1 = 4 - 2 s,

    that is 2 after one update and 1 after two. By the chain rule through the updates, e1 having the
    derivatives (x1, 1, 1) for (w, b, c), those of e2² are, with q = 2 α s (x1 x2 + 1) = s,

        2 e2 (x2 - q x1,  1 - q,  1 - q) = 2 e2 (3 - s, 1 - s, 1 - s):

    M = 1, s = 1: 4 (2, 0, 0) = (8, 0, 0);   M = 2, s = 3/2: 2 (3/2, -1/2, -1/2) = (3, -1, -1).

    At first order the updates count as constants: 2 e2 (x2, 1, 1) = (12, 4, 4) and (6, 2, 2); c,
    the offset, keeps its direct gradient.
    """
    model = linear_model(update_lr=1 / 8, num_updates=updates, stop_grad=stop_grad)
    loss, gradients = model.meta_gradient(points((1, 1, 3, 3)))
    assert loss == {1: 4, 2: 1}[updates]
    assert [gradient.numpy().item() for gradient in gradients] == list(expected)


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('stop_grad', [False, True])
def test_losses_after_each_update_by_hand(stop_grad):
    """As above, e1² = 4 before, and e2 = 4 - 2 s = 2, 1, 1/2, 1/4 after one to four updates.

    That is the first of two tasks. The other has support (0, 0) and query (2, 1): e1 = 1,
    r = 1 - 2 α = 3/4, e2 = 4 - s/4 with s = 1, 7/4, 37/16, 175/64.
    """
    model = linear_model(update_lr=1 / 8, num_updates=1, stop_grad=stop_grad)
    results = model.evaluate(points((1, 1, 3, 3), (0, 0, 2, 1)), 4)
    np.testing.assert_array_equal(results.loss1, [4, 1])
    e2 = np.transpose([[2, 1, 1 / 2, 1 / 4], [4 - s / 4 for s in (1, 7 / 4, 37 / 16, 175 / 64)]])
    np.testing.assert_array_equal(results.losses2, e2**2)
    np.testing.assert_array_equal(results.outputa, [[[3]], [[1]]])
    np.testing.assert_array_equal(results.outputsb[..., 0, 0], e2 + [3, 1])


@pytest.mark.parametrize('wrap', [lambda f: f, tf.function], ids=['eager', 'graph'])
def test_programs_that_come_with_their_gradient(wrap):
    """x³ y, with 3 x² y and x³ from the program; the second derivatives are right, too."""

    def program(values):
        x, y = values['x'], values['y']
        return x**3 * y, {'x': 3 * x**2 * y, 'y': x**3}

    @wrap
    def derivatives(x, y):
        with tf.GradientTape(persistent=True) as second:
            second.watch((x, y))
            with tf.GradientTape() as first:
                first.watch((x, y))
                value = 2 * with_gradient(program, {'x': x, 'y': y})
            gradient = first.gradient(value, (x, y))
        hessian = [second.gradient(g, (x, y), unconnected_gradients='zero') for g in gradient]
        return gradient, hessian

    gradient, hessian = derivatives(tf.constant(2.0), tf.constant(5.0))
    assert [float(g) for g in gradient] == [120, 16]
    assert [[float(g) for g in row] for row in hessian] == [[120, 24], [24, 0]]


@pytest.mark.usefixtures('eagerly')
def test_one_update_by_hand():
    """θ' = θ - α ∇. As above, (w, b) = (2, 1) - 1/8 · 4 (1, 1); the other has e1 = 1, x1 = 0."""
    model = linear_model(update_lr=1 / 8)
    batch = points((1, 1, 3, 3), (0, 0, 2, 1))
    weights = adapted(model, batch, 1)
    np.testing.assert_array_equal(weights['w'][:, 0, 0], [1.5, 2])
    np.testing.assert_array_equal(weights['b'][:, 0], [0.5, 0.75])
    assert weights.keys() == {'w', 'b'}  # c, the offset, is nobody's to adapt
    assert [variable.numpy().item() for variable in model.parameters] == [2, 1, 0]


@pytest.mark.usefixtures('eagerly')
def test_totals_are_means_over_tasks_by_hand():
    """The two tasks above: e2² = 4 and (15/4)²; the second's gradient is 2 e2 (x2, 3/4, 3/4)."""
    model = linear_model(update_lr=1 / 8, num_updates=1)
    loss, gradients = model.meta_gradient(points((1, 1, 3, 3), (0, 0, 2, 1)))
    assert loss == (4 + 225 / 16) / 2
    expected = [(8 + 7.5 * 2) / 2, 7.5 * 0.75 / 2, 7.5 * 0.75 / 2]
    assert [gradient.numpy().item() for gradient in gradients] == expected


# The meta-gradient against finite differences -----------------------------------------------------

# Image sizes. Strides round up: 11 -> 6 -> 3 -> 2 -> 1 and 17 -> 9 -> 5 -> 3 -> 2 (more than one
# pixel to flatten). Pooling rounds down, hence needs at least 16 pixels: 19 -> 9 -> 4 -> 2 -> 1 and
# 33 -> 16 -> 8 -> 4 -> 2.
SIZES = {
    ('stride', 'mean'): 11,
    ('stride', 'flatten'): 17,
    ('max_pool', 'mean'): 19,
    ('max_pool', 'flatten'): 33,
}


def convolutional(norm: str, halving: str, head: str):
    """A case: settings of `small_network`."""
    settings = dict(max_pool=halving == 'max_pool', flatten=head == 'flatten')
    settings |= dict(image_size=SIZES[halving, head], norm=norm)
    return pytest.param(settings, id=f'{norm}-{halving}-{head}')


CONVOLUTIONAL = [convolutional(norm, *ends) for norm in NORMS for ends in SIZES]
# Each normalisation, both ways to halve, the heads in turns.
HALF = [CONVOLUTIONAL[i] for i in (0, 3, 5, 6, 8, 11)]


def small_network(image_size=11, channels=2, filters=3, classes=3, **settings) -> Convolutional:
    return Convolutional(image_size, channels, filters, classes, **settings)


def fully_connected(norm: str, inputs: int = 6, classes: int = 3) -> FullyConnected:
    return FullyConnected(inputs, (5, 4, 4), classes, norm)


def outer_loss(model: FastMAML, batch: Batch) -> float:
    return float(np.mean(model.evaluate(batch, model.num_updates).losses2[-1]))


def test_the_algorithm_alone():
    """MAML takes FastMAML's steps, and evaluates as it; nothing is traced again."""
    network, settings = fully_connected('batch_norm'), dict(clip=0.01, seed=3, dtype=tf.float64)
    alone = MAML(network, cross_entropy(2), 0.05, 3, **settings)
    fast = FastMAML(network, cross_entropy(2), 0.05, 3, **settings, compiled=False)
    batch = random_batch(network)
    for _ in range(3):
        np.testing.assert_allclose(alone.metatrain_step(batch), fast.metatrain_step(batch), 1e-12)
    for one, other in zip(alone.parameters, fast.parameters, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)
    for one, other in zip(alone.evaluate(batch, 4, False), fast.evaluate(batch, 4, False)):
        np.testing.assert_allclose(one, other, rtol=1e-8)
    assert alone.metatrain_step.experimental_get_tracing_count() == 1


def central_difference(
    model: FastMAML, batch: Batch, variable: tf.Variable, direction: np.ndarray, step: float
) -> float:
    value, losses = variable.numpy(), []
    for sign in (1, -1):
        variable.assign(value + sign * step * direction)
        losses.append(outer_loss(model, batch))
    variable.assign(value)
    return (losses[0] - losses[1]) / (2 * step)


def assert_exact_meta_gradient(network):
    """Along random directions; second order differs from first, and offsets count in both."""
    model, batch = exact_model(network), random_batch(network, shots=1, queries=1)
    random = np.random.default_rng(7)
    with running_eagerly():
        gradients = named_gradient(model, batch)
        first_order = named_gradient(copy_of(model, stop_grad=True), batch)
    for name, variable in named(model).items():
        direction = random.standard_normal(variable.shape)
        direction /= np.linalg.norm(direction)
        slope = np.sum(gradients[name] * direction)
        # The shorter step is for a ReLU's or a maximum's kink that the longer one happens to cross.
        errors = (
            abs(slope - central_difference(model, batch, variable, direction, step))
            for step in (1e-6, 1e-7)
        )
        # 1e-8: rounding error of the difference, all there is for a bias that batch normalisation
        # cancels.
        tolerance = 1e-6 * np.linalg.norm(gradients[name]) + 1e-8
        assert any(error <= tolerance for error in errors), name
    assert distance(first_order, gradients) > 0.02
    for name in model.norms:
        assert np.linalg.norm(gradients[name]) > 1e-3, name
        assert np.linalg.norm(first_order[name]) > 1e-3, name


@pytest.mark.parametrize('settings', HALF)
def test_meta_gradient_of_convolutional_networks(settings):
    assert_exact_meta_gradient(small_network(**settings))


@pytest.mark.parametrize('norm', NORMS)
def test_meta_gradient_of_fully_connected_networks(norm):
    assert_exact_meta_gradient(fully_connected(norm))


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize(
    'network',
    [*(fully_connected(norm) for norm in NORMS), *(small_network(norm=norm) for norm in NORMS)],
    ids=[f'{kind}-{norm}' for kind in ('fully_connected', 'convolutional') for norm in NORMS],
)
def test_first_order_meta_gradient(network):
    """stop_grad: the query loss's gradient for adapted weights, and the direct one for offsets."""
    model, batch = exact_model(network, stop_grad=True), random_batch(network)
    weights = adapted(model, batch, model.num_updates)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        output = network(network.prepare(batch.inputb), weights, model.norms)
        losses = model.loss(output, batch.labelb)
    of_weights, direct = tape.gradient(losses, (weights, model.norms), unconnected_gradients='zero')
    expected = {name: np.mean(gradient, axis=0) for name, gradient in of_weights.items()}
    expected |= {name: gradient.numpy() / 2 for name, gradient in direct.items()}
    gradients = named_gradient(model, batch)
    assert gradients.keys() == expected.keys()
    assert_close(gradients, expected)


# The networks against TensorFlow's own layers, task by task ---------------------------------------


def means_norm(x, axes, epsilon):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean((x - mean) ** 2, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


def moments_norm(x, axes, epsilon):
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


class TaskByTask:
    """As one would write `network` for a single task, with its parameters' names."""

    def __init__(self, network: Convolutional, norm=means_norm):
        self.network, self.norm = network, norm
        self.parameters, self.norm_parameters = network.parameters, network.norm_parameters

    def prepare(self, inputs):
        return inputs

    def __call__(self, x, weights, norms):
        tasks = ({name: weight[i] for name, weight in weights.items()} for i in range(x.shape[0]))
        return tf.stack([self.task(*task, norms) for task in zip(x, tasks)])

    def task(self, x, weights, norms):
        x = tf.reshape(x, [-1, *self.network.image_shape])
        for i in range(4):
            stride = 1 if self.network.max_pool else 2
            x = tf.nn.conv2d(x, weights[f'conv{i + 1}'], stride, 'SAME') + weights[f'b{i + 1}']
            own = {name[2:]: norm for name, norm in norms.items() if int(name[0]) == i}
            x = tf.nn.relu(self.normalize(x, own))
            if self.network.max_pool:
                x = tf.nn.max_pool2d(x, 2, 2, 'VALID')
        x = tf.reshape(x, [x.shape[0], -1]) if self.network.flatten else tf.reduce_mean(x, [1, 2])
        return x @ weights['w5'] + weights['b5']

    def normalize(self, x, parameters):
        if isinstance(self.network.norm, BatchNorm):
            return self.norm(x, [0, 1, 2], 1e-3) + parameters['beta']
        if isinstance(self.network.norm, LayerNorm):
            return self.norm(x, [1, 2, 3], 1e-12) * parameters['gamma'] + parameters['beta']
        return x


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('settings', CONVOLUTIONAL)
def test_network_is_that_of_tensorflows_layers(settings):
    """Outputs and meta-gradient. One task is noise; the other has blank regions, hence ties."""
    network = small_network(**settings)
    model, batch = exact_model(network, num_updates=1), random_batch(network)

    def blank(x):
        return tf.stack([x[0], tf.where(x[1] < 0.95, 0.0, x[1])])

    batch = batch._replace(inputa=blank(batch.inputa), inputb=blank(batch.inputb))
    other = copy_of(model, TaskByTask(network), num_updates=1)
    gradients, expected = named_gradient(model, batch), named_gradient(other, batch)
    assert_close(gradients, expected, rtol=1e-7, atol=1e-11)
    output = network(network.prepare(batch.inputa), repeated(model.weights, 2), model.norms)
    expected = other.network(batch.inputa, repeated(other.weights, 2), other.norms)
    np.testing.assert_allclose(output, expected, rtol=1e-9, atol=1e-11)


def derivatives(block, inputs, weights, directions) -> tuple:
    """block(*inputs), gradients of a scalar of it, and gradients of a scalar of those gradients."""
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            value = block(*inputs)
            scalar = tf.reduce_sum(weights * (value + value**2))
        first = inner.gradient(scalar, inputs, unconnected_gradients='zero')
        scalar = tf.add_n([tf.reduce_sum(g * along) for g, along in zip(first, directions)])
    return value, first, outer.gradient(scalar, inputs, unconnected_gradients='zero')


@pytest.mark.parametrize('max_pool', [False, True], ids=['stride', 'max_pool'])
@pytest.mark.parametrize('number, fused', [(1, True), (1, False), (3, False)])
def test_block_is_the_papers(number, fused, max_pool):
    """`plain_block` and the network's block, two tasks of two kernels: to the second derivative.

    Block 1 is on prepared images, and may be fused; the others are alike.
    """
    network = small_network(19, max_pool=max_pool)
    network = fuse(network) if fused else network
    assert type(network) is (FusedConvolutional if fused else Convolutional)
    size, channels = (19, 2) if number == 1 else (7, 3)
    shapes = [(2, 4, size, size, channels), (2, 3, 3, channels, 3), (2, 3), (3,)]
    random = np.random.default_rng(0)
    # Images, kernels and biases of each task; beta is common to all.
    inputs, directions = (
        [tf.constant(random.standard_normal(shape)) for shape in shapes] for _ in range(2)
    )
    halved = size // 2 if max_pool else -(-size // 2)
    weights = tf.constant(random.standard_normal((2, 4, halved, halved, 3)))

    def block(images, kernel, bias, beta):
        x = network.prepare(tf.reshape(images, [2, 4, -1])) if number == 1 else images
        return network.block(number, x, kernel, bias, {f'{number - 1}/beta': beta}, None)

    def plain(*arguments):
        return plain_block(*arguments, max_pool)

    def of_task(task, values):
        return [value[task] for value in values[:3]] + [values[3]]

    ours = derivatives(block, inputs, weights, directions)
    tasks = [
        derivatives(plain, of_task(i, inputs), weights[i], of_task(i, directions)) for i in (0, 1)
    ]
    close = dict(rtol=1e-9, atol=1e-9)
    for i, (value, *gradients) in enumerate(tasks):
        np.testing.assert_allclose(ours[0][i], value, **close)
        for order, (images, kernel, bias, _) in enumerate(gradients, start=1):
            for found, expected in zip(of_task(i, ours[order]), (images, kernel, bias)):
                np.testing.assert_allclose(found, expected, **close)
            assert min(np.abs(kernel).max(), np.abs(images).max()) > 0.1
    for order in (1, 2):
        np.testing.assert_allclose(ours[order][3], tasks[0][order][3] + tasks[1][order][3], **close)
        assert np.abs(ours[order][3]).max() > 0.1


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', NORMS)
def test_fully_connected_network_by_its_formula(norm):
    """Affine, normalisation, ReLU, three times; then affine."""
    network = fully_connected(norm)
    model, batch = exact_model(network), random_batch(network)
    x, weights, norms = batch.inputa, repeated(model.weights, 2), model.norms

    def affine(x, i):
        return x @ weights[f'w{i}'] + weights[f'b{i}'][:, None]

    for i, scope in enumerate(['0', '2', '3'], start=1):
        x = affine(x, i)
        if norm == 'batch_norm':
            x = means_norm(x, [1], 1e-3) + norms[f'{scope}/beta']
        if norm == 'layer_norm':
            x = means_norm(x, [2], 1e-12) * norms[f'{scope}/gamma'] + norms[f'{scope}/beta']
        x = tf.maximum(x, 0)
    expected = affine(x, 4)
    np.testing.assert_allclose(model.evaluate(batch, 1).outputa, expected, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
def test_moments_would_spoil_the_meta_gradient(reference):
    """The measured case: with tf.nn.moments all losses are right, conv1's meta-gradient is not.

    The project's own is the float64 reference's, and so is that of TensorFlow's layers with the
    means written out.
    """
    settings = dict(image_size=28, channels=1, filters=8, classes=5)
    ours = exact_model(small_network(**settings), cross_entropy(1), update_lr=0.4, num_updates=1)
    for name, variable in named(ours).items():
        variable.assign(reference[f'init/{name}'].astype(float))
    batch = Batch(*(tf.constant(reference[f'input/{name}'], tf.float64) for name in Batch._fields))
    error = {}
    for norm in (means_norm, moments_norm, None):
        network = TaskByTask(ours.network, norm) if norm else None
        model = copy_of(ours, network, loss=cross_entropy(1), update_lr=0.4, num_updates=1)
        loss, gradients = model.meta_gradient(batch)
        np.testing.assert_allclose(loss, reference['float64/total_losses2'][0], rtol=1e-9)
        exact = reference['float64/meta_grad/conv1']
        error[norm] = np.linalg.norm(gradients[0] - exact) / np.linalg.norm(exact)
    assert error[None] < 1e-7 and error[means_norm] < 1e-7 and error[moments_norm] > 0.1


@pytest.fixture
def reference():
    path = FOLDER / 'omniglot_5way_1shot.npz'
    if not path.exists():
        pytest.skip(f'{path} is not there')
    return np.load(path)


# Independence of tasks, of the query labels, of what went before ----------------------------------

INDEPENDENCE = [
    pytest.param(small_network(), id='batch_norm'),
    pytest.param(small_network(17, norm='layer_norm', flatten=True), id='layer_norm'),
    pytest.param(fully_connected('batch_norm'), id='fully_connected'),
]


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('network', INDEPENDENCE)
def test_tasks_are_independent(network):
    """Evaluated together as alone; the meta-gradient of a meta-batch is the mean over tasks."""
    model, batch = exact_model(network, num_updates=1), random_batch(network, tasks=2)
    singles = [tasks_of(batch, slice(i, i + 1)) for i in range(2)]
    alone = [model.evaluate(single, 2) for single in singles]
    expected = {}
    for name in Results._fields:
        axis = 1 if name in ('losses2', 'accuracies2', 'outputsb') else 0
        expected[name] = np.concatenate([getattr(one, name) for one in alone], axis)
    assert_close(model.evaluate(batch, 2)._asdict(), expected)
    one, two = (named_gradient(model, single) for single in singles)
    assert_close(named_gradient(model, batch), {name: (one[name] + two[name]) / 2 for name in one})


@pytest.mark.slow
@pytest.mark.usefixtures('eagerly')
def test_parts_of_a_large_meta_batch():
    """The meta-gradient of twelve tasks is the mean of three times four: the parts do not matter.

    And evaluation gives each task its own results, in order.
    """
    network = small_network(28, channels=1, filters=2, classes=5)
    model, batch = exact_model(network, num_updates=1), random_batch(network, 12, 5, 1, 1)
    loss, gradients = model.meta_gradient(batch)
    parts = [tasks_of(batch, slice(i, i + 4)) for i in (0, 4, 8)]
    losses, of_parts = zip(*map(model.meta_gradient, parts))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-9)
    for gradient, *one_each in zip(gradients, *of_parts, strict=True):
        np.testing.assert_allclose(gradient, np.mean(one_each, axis=0), rtol=1e-9, atol=1e-12)
    second = {}  # of the three
    for name, values in model.evaluate(batch, 2)._asdict().items():
        after_updates = name in ('losses2', 'accuracies2', 'outputsb')
        second[name] = values[:, 4:8] if after_updates else values[4:8]
    assert_close(second, model.evaluate(parts[1], 2)._asdict())


@pytest.mark.usefixtures('eagerly')
def test_meta_gradient_of_thousands_of_tasks():
    """Linear ones as above, by the formula, after one update."""
    x1, y1, x2, y2 = points = np.random.default_rng(0).standard_normal((4, 40000))
    model = linear_model(update_lr=1 / 8, num_updates=1)
    loss, gradients = model.meta_gradient(Batch(*map(tf.constant, points[:, :, None, None])))
    e1, carried = 2 * x1 + 1 - y1, (x1 * x2 + 1) / 4
    e2 = 2 * x2 + 1 - y2 - carried * e1
    np.testing.assert_allclose(loss, np.mean(e2**2))
    expected = [np.mean(2 * e2 * (x2 - carried * x1)), *2 * [np.mean(2 * e2 * (1 - carried))]]
    np.testing.assert_allclose([gradient.numpy().item() for gradient in gradients], expected)


@pytest.mark.usefixtures('eagerly')
def test_shapes_of_results():
    network = small_network()
    results = exact_model(network).evaluate(random_batch(network, tasks=4, shots=1, queries=5), 6)
    shapes = {name: tuple(value.shape) for name, value in results._asdict().items()}
    assert shapes == {
        'loss1': (4,),
        'losses2': (6, 4),
        'accuracy1': (4,),
        'accuracies2': (6, 4),
        'outputa': (4, 3, 3),
        'outputsb': (6, 4, 15, 3),
    }


@pytest.mark.usefixtures('eagerly')
def test_losses_and_accuracies_are_those_of_the_outputs():
    """Support before any update, query after each; summed over examples, divided by K = 2."""
    network = small_network()
    batch = random_batch(network, queries=5)
    results = exact_model(network).evaluate(batch, 3)

    def loss_and_accuracy(output, label):
        log_probability = output - np.log(np.sum(np.exp(output), axis=-1, keepdims=True))
        hits = np.argmax(output, -1) == np.argmax(label, -1)
        return -np.sum(log_probability * label, axis=(-2, -1)) / 2, np.mean(hits, axis=-1)

    loss, accuracy = loss_and_accuracy(results.outputa.numpy(), batch.labela.numpy())
    np.testing.assert_allclose(results.loss1, loss, rtol=1e-9)
    np.testing.assert_allclose(results.accuracy1, accuracy, rtol=1e-9)
    loss, accuracy = loss_and_accuracy(results.outputsb.numpy(), batch.labelb.numpy())
    np.testing.assert_allclose(results.losses2, loss, rtol=1e-9)
    np.testing.assert_allclose(results.accuracies2, accuracy, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
def test_query_labels_do_not_leak_into_predictions():
    network = small_network()
    model, batch = exact_model(network, update_lr=0.5), random_batch(network)
    expected = model.evaluate(batch, 3)
    other = model.evaluate(batch._replace(labelb=tf.roll(batch.labelb, 1, axis=2)), 3)
    np.testing.assert_array_equal(other.outputsb, expected.outputsb)
    assert not np.any(other.losses2 == expected.losses2)
    # Those of the support set do matter.
    other = model.evaluate(batch._replace(labela=tf.roll(batch.labela, 1, axis=2)), 3)
    assert not np.all(other.outputsb == expected.outputsb, axis=(2, 3)).any()
    np.testing.assert_array_equal(other.outputa, expected.outputa)


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', NORMS)
def test_only_batch_norm_lets_query_images_see_each_other(norm):
    """Transductive: statistics are those of the query set itself. Its order plays no part."""
    network = small_network(norm=norm)
    model, batch = exact_model(network), random_batch(network, queries=4)
    expected = model.evaluate(batch, 2).outputsb
    other_last = tf.concat([batch.inputb[:, :-1], batch.inputb[:, -1:] ** 3], 1)
    changed = model.evaluate(batch._replace(inputb=other_last), 2).outputsb
    same = np.isclose(changed[:, :, :-1], expected[:, :, :-1], rtol=1e-9)
    same = np.all(same, axis=(2, 3))  # [J, T]
    assert not np.any(same) if norm == 'batch_norm' else np.all(same)
    turned = model.evaluate(batch._replace(inputb=tf.reverse(batch.inputb, [1])), 2)
    np.testing.assert_allclose(turned.outputsb[:, :, ::-1], expected, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm'])
def test_evaluation_changes_nothing(norm):
    """Neither θ nor offsets; and no running statistics: batches in between leave no trace."""
    network = small_network(norm=norm)
    model, batch = exact_model(network), random_batch(network)
    before, values = model.evaluate(batch, 2), [variable.numpy() for variable in model.parameters]
    model.evaluate(Batch(*(3 * x for x in random_batch(network, seed=5))), 2)
    for variable, value in zip(model.parameters, values):
        np.testing.assert_array_equal(variable, value)
    for one, other in zip(before, model.evaluate(batch, 2)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures('eagerly')
def test_chance_accuracy_on_noise():
    """Fresh weights know nothing: 1/N before an update, and 1/N on queries of noise after some.

    240 tasks of 5 images: a mean accuracy has a standard error of sqrt(0.2 · 0.8 / 1200) = 0.012.
    """
    network = small_network(9, channels=1, filters=8, classes=5)
    model = exact_model(network, cross_entropy(1), perturbed=False, update_lr=0.4, dtype=tf.float32)
    batch = random_batch(network, tasks=240, classes=5, shots=1, queries=1, dtype=tf.float32)
    results = model.evaluate(batch, 3)
    assert abs(np.mean(results.accuracy1) - 0.2) < 0.05
    assert np.all(np.abs(np.mean(results.accuracies2, axis=1) - 0.2) < 0.05)
    on_support = model.evaluate(batch._replace(inputb=batch.inputa, labelb=batch.labela), 3)
    assert np.mean(on_support.accuracies2[-1]) > 0.5  # the updates did learn something, to no avail


# Initial values -----------------------------------------------------------------------------------


def blocks(channels: int, filters: int, last: tuple[int, int]) -> dict:
    sizes = [channels, filters, filters, filters]
    convolutions = {f'conv{i}': (3, 3, size, filters) for i, size in enumerate(sizes, start=1)}
    return convolutions | {f'b{i}': (filters,) for i in range(1, 5)} | {'w5': last, 'b5': last[1:]}


def layers(*sizes: int) -> dict:
    pairs = list(enumerate(zip(sizes, sizes[1:]), start=1))
    return {f'w{i}': pair for i, pair in pairs} | {f'b{i}': pair[1:] for i, pair in pairs}


def betas(**sizes: int) -> dict:
    """Offsets of the scopes _0, _2 and so on."""
    return {f'{scope[1:]}/beta': (size,) for scope, size in sizes.items()}


def gammas(**sizes: int) -> dict:
    return {f'{scope[1:]}/gamma': (size,) for scope, size in sizes.items()}


OMNIGLOT, MINIIMAGENET = dict(datasource='omniglot'), dict(datasource='miniimagenet')
HIDDEN = dict(_0=256, _2=128, _3=64, _4=64)
SHAPES = [
    (dict(datasource='sinusoid', norm='None'), layers(1, 40, 40, 1), {}),
    (dict(datasource='sinusoid', norm='None', baseline='oracle'), layers(3, 40, 40, 1), {}),
    (dict(datasource='sinusoid'), layers(1, 40, 40, 1), betas(_0=40, _2=40)),
    (OMNIGLOT, blocks(1, 64, (64, 5)), betas(_0=64, _1=64, _2=64, _3=64)),
    (
        OMNIGLOT | dict(num_classes=20, max_pool=True, norm='layer_norm', num_filters=8),
        blocks(1, 8, (8, 20)),
        betas(_0=8, _1=8, _2=8, _3=8) | gammas(_0=8, _1=8, _2=8, _3=8),
    ),
    (OMNIGLOT | dict(conv=False), layers(784, 256, 128, 64, 64, 5), betas(**HIDDEN)),
    (
        OMNIGLOT | dict(conv=False, norm='layer_norm', num_classes=20),
        layers(784, 256, 128, 64, 64, 20),
        betas(**HIDDEN) | gammas(**HIDDEN),
    ),
    (
        MINIIMAGENET | dict(num_filters=32, max_pool=True),
        blocks(3, 32, (800, 5)),
        betas(_0=32, _1=32, _2=32, _3=32),
    ),
    (MINIIMAGENET | dict(conv=False, norm='None'), layers(21168, 256, 128, 64, 64, 5), {}),
]
SHAPE_IDS = ['-'.join(map(str, settings.values())) for settings, *_ in SHAPES]


@pytest.mark.parametrize('settings, weights, norms', SHAPES, ids=SHAPE_IDS)
def test_names_and_shapes_of_parameters(settings, weights, norms):
    """The original's variables: adapted ones, and normalisation parameters, which are not."""
    model = make_model(compiled=False, **settings)
    assert {name: tuple(variable.shape) for name, variable in model.weights.items()} == weights
    assert {name: tuple(variable.shape) for name, variable in model.norms.items()} == norms
    references = [variable.ref() for variable in named(model).values()]
    assert [variable.ref() for variable in model.parameters] == references
    network = make_network(**settings)
    assert {name: shape for name, (_, shape) in network.parameters.items()} == weights
    assert {name: shape for name, (_, shape) in network.norm_parameters.items()} == norms


def assert_uniform(values: np.ndarray, fan_in: int, fan_out: int):
    """Glorot: within ±sqrt(6 / (fan in + fan out)), up to the rim, and of a uniform's deviation."""
    limit = np.sqrt(6 / (fan_in + fan_out))
    assert limit * (1 - 20 / values.size) < np.abs(values).max() <= limit
    np.testing.assert_allclose(values.std(), limit / np.sqrt(3), rtol=3 / np.sqrt(values.size))
    assert abs(values.mean()) < 4 * limit / np.sqrt(3 * values.size)


def test_initial_values_of_convolutional_networks():
    """Glorot uniform kernels, fans counted over 3x3; zero biases and offsets; unit gains."""
    for source, channels in (('omniglot', 1), ('miniimagenet', 3)):
        model = make_model(source, norm='layer_norm', num_filters=32, compiled=False)
        for i, fan_in in enumerate([channels, 32, 32, 32], start=1):
            assert_uniform(model.weights[f'conv{i}'].numpy(), 9 * fan_in, 9 * 32)
        for name, variable in named(model).items():
            if name[0] == 'b' or '/' in name:
                expected = np.full(variable.shape, float('gamma' in name))
                np.testing.assert_array_equal(variable, expected, err_msg=name)


def test_initial_values_of_the_last_layer():
    """Omniglot: normal of stddev 1, not truncated; miniImagenet, pooled or not: Glorot uniform."""
    w5 = make_model('omniglot', num_classes=20, compiled=False).weights['w5'].numpy()
    assert abs(w5.std() - 1) < 0.06 and abs(w5.mean()) < 0.1
    assert abs(np.mean(np.abs(w5) > 2) - 0.0455) < 0.02 and np.abs(w5).max() > 2.7
    # 84 -> 42 -> 21 -> 10 -> 5, and 84 -> 42 -> 21 -> 11 -> 6.
    for max_pool, pixels in (True, 25), (False, 36):
        model = make_model('miniimagenet', num_filters=8, max_pool=max_pool, compiled=False)
        w5 = model.weights['w5'].numpy()
        assert w5.shape == (pixels * 8, 5)
        assert_uniform(w5, pixels * 8, 5)


def test_initial_values_of_fully_connected_networks():
    """Normal of standard deviation 0.01, cut at two, which leaves 0.0088; zero biases."""
    for settings in dict(datasource='sinusoid', norm='None'), OMNIGLOT | dict(conv=False):
        for name, variable in make_model(compiled=False, **settings).weights.items():
            values = variable.numpy()
            if name[0] == 'b':
                assert not np.any(values)
                continue
            assert 0 < np.abs(values).max() <= 0.02
            if values.size > 100:
                np.testing.assert_allclose(values.std(), 0.0088, rtol=0.1)
                assert np.abs(values).max() > 0.018 and abs(values.mean()) < 0.0015


def test_initial_values_follow_the_seed():
    """Equal for equal seeds; others differ, as do equally shaped parameters of one network."""
    tf.random.set_seed(1)
    one, two = (make_model('omniglot', seed=4, num_filters=8, compiled=False) for _ in range(2))
    tf.random.set_seed(2)
    other = make_model('omniglot', seed=5, num_filters=8, compiled=False)
    for name in ('conv1', 'conv2', 'conv3', 'conv4', 'w5'):
        np.testing.assert_array_equal(one.weights[name], two.weights[name])
        assert not np.any(one.weights[name] == other.weights[name])
    assert not np.any(one.weights['conv2'] == one.weights['conv3'])


# The outer step -----------------------------------------------------------------------------------

ADAM = 2e-5  # relative tolerance: Keras takes β₂ for the float32 next to 0.999, in float64 too


def adam(theta, gradients, learning_rate: float, epsilon: float = 1e-8):
    """TensorFlow 1's Adam, from its documentation: θ after one step for each of `gradients`."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = learning_rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        theta = theta - rate * m / (np.sqrt(v) + epsilon)
    return theta


def values_of(model: FastMAML) -> np.ndarray:
    return np.array([variable.numpy().item() for variable in model.parameters])


def task_with_gradient(model: FastMAML, gradient: float) -> Batch:
    """Support and query loss both have `gradient` · (3, 1, 1) for the present (w, b, c)."""
    y = np.sum(values_of(model) * [3, 1, 1]) - gradient / 2
    return points((3, y, 3, y))


@pytest.mark.parametrize('step', ['metatrain_step', 'pretrain_step'])
@pytest.mark.parametrize('clip', [None, 10.0])
@pytest.mark.parametrize(
    'gradients', [(1e-7,), (1e-7, -3e-8), (2.0, 0.5), (1000.0, 1.0, -1000.0, 5.0)], ids=str
)
@pytest.mark.usefixtures('eagerly')
def test_adam_by_its_formula(step, clip, gradients):
    """Both outer steps, epsilon 1e-8; only meta-training clips, each element on its own.

    Gradients of 1e-7 tell epsilons apart: a first step is β g / (|g| + ε / sqrt(0.001)), 0.24 β for
    ε = 1e-8 and 0.03 β for Keras's 1e-7.
    """
    model = linear_model(update_lr=0.0, num_updates=1, meta_lr=0.01, clip=clip)
    before, given = values_of(model), []
    for gradient in gradients:
        given.append(gradient * np.array([3.0, 1.0, 1.0]))
        loss = getattr(model, step)(task_with_gradient(model, gradient))
        np.testing.assert_allclose(loss, gradient**2 / 4, rtol=1e-6)  # before the step
    if clip and step == 'metatrain_step':
        given = np.clip(given, -clip, clip)
    change = adam(before, given, 0.01) - before
    np.testing.assert_allclose(values_of(model) - before, change, rtol=ADAM)
    if max(gradients) < 1e-6:
        assert np.all(np.abs(adam(before, given, 0.01, epsilon=1e-7) - before) < np.abs(change) / 2)


@pytest.mark.usefixtures('eagerly')
def test_pre_training_minimises_the_support_loss_of_all_tasks():
    """Its gradient is the mean over tasks, nothing is adapted, and its Adam is its own."""
    model = linear_model(update_lr=1 / 8, meta_lr=0.01)
    model.metatrain_step(points((1, 1, 3, 3)))
    before, inputs, given = values_of(model), np.array([[1, 1, 1], [2, 1, 1]]), []
    for _ in range(2):
        errors = inputs @ values_of(model) - [1, 7]
        given.append(np.mean(2 * errors[:, None] * inputs, axis=0))
        loss = model.pretrain_step(points((1, 1, 30, 30), (2, 7, 40, 40)))
        np.testing.assert_allclose(loss, np.mean(errors**2))
    change = adam(before, given, 0.01) - before
    np.testing.assert_allclose(values_of(model) - before, change, rtol=ADAM)


def second_change(gradients):
    """By the second of Adam's steps for two gradients, from 0."""
    return adam(0.0, gradients, 0.001) - adam(0.0, gradients[:1], 0.001)


@pytest.mark.parametrize('source, clipped', [('miniimagenet', True), ('omniglot', False)])
@pytest.mark.usefixtures('eagerly')
def test_only_miniimagenet_clips_the_meta_gradient(source, clipped):
    """Each element to ±10. Adam's first step has no scale; the second shows that of the first."""
    model = make_model(
        source, update_batch_size=1, update_lr=1e-6, dtype=tf.float64, compiled=False, num_filters=2
    )
    random = np.random.default_rng(0)
    model.weights['w5'].assign(1000 * random.standard_normal(model.weights['w5'].shape))
    given, values = [], []
    for seed in range(2):
        batch = random_batch(model.network, 1, classes=5, shots=1, queries=1, seed=seed)
        given.append(named_gradient(model, batch))
        model.metatrain_step(batch)
        values.append({name: variable.numpy() for name, variable in named(model).items()})
    for name in ('conv1', 'conv4', '0/beta'):
        gradients = [gradient[name] for gradient in given]
        assert np.abs(gradients).max() > 100
        with_clip, without = second_change(np.clip(gradients, -10, 10)), second_change(gradients)
        expected = with_clip if clipped else without
        np.testing.assert_allclose(values[1][name] - values[0][name], expected, rtol=ADAM)
        assert np.abs(with_clip - without).max() > 1e-5


@pytest.mark.parametrize('pretrain', [False, True])
def test_many_steps_at_once_are_those_steps_one_by_one(pretrain):
    """Training on the meta-batches first...last-1; Adam's count goes on from call to call."""
    together, single = (linear_model(update_lr=1 / 8, num_updates=1) for _ in range(2))
    arrays = np.random.default_rng(0).standard_normal((4, 6, 2, 5, 1))
    batches = Batch(*map(tf.constant, arrays))  # [count, T, ...]
    for first, last in ((0, 2), (2, 3), (4, 6)):
        end, loss = together.steps(batches, first, last, pretrain)
        assert end == last
        for i in range(first, last):
            step = single.pretrain_step if pretrain else single.metatrain_step
            expected = step(Batch(*(values[i] for values in batches)))
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(values_of(together), values_of(single), rtol=1e-12)
    one = Batch(*(values[3:4] for values in batches))
    _, loss = together.steps(one, 0, 1, pretrain)
    np.testing.assert_allclose(loss, step(tasks_of(one, 0)), rtol=1e-12)
    np.testing.assert_allclose(values_of(together), values_of(single), rtol=1e-12)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, words',
    [
        (
            ('inputa', lambda x: x[..., :-1]),
            r'inputa is \[2, 6, 35\], but the network takes \[tasks, examples, 36\]',
        ),
        (
            ('labelb', lambda y: y[..., :-1]),
            r'labelb is \[2, 6, 2\], but the network takes \[tasks, examples, 3\]',
        ),
        (
            ('inputb', lambda x: x[:1]),
            r'inputb must be .* with the 2 tasks of inputa, but it is \[1, 6, 36\]',
        ),
        (('labela', lambda y: y[0]), r'labela must be \[tasks, examples, size\]'),
        (('inputa', lambda x: tf.cast(x, tf.complex64)), 'of complex64'),
        (('labela', lambda y: y[:, 1:]), 'inputa has 6 examples per task, but labela has 5'),
    ],
)
@pytest.mark.parametrize('method', ['meta_gradient', 'metatrain_step', 'pretrain_step', 'evaluate'])
def test_meta_batches_that_do_not_fit(method, change, words):
    """ValueError, with the shapes."""
    network = FullyConnected(36, (4,), 3)
    model, arguments = exact_model(network), [1] if method == 'evaluate' else []
    batch, (name, alter) = random_batch(network), change
    batch = batch._replace(**{name: alter(getattr(batch, name))})
    with pytest.raises(ValueError, match=words):
        getattr(model, method)(batch, *arguments)


def with_step_size(update_lr: float) -> FastMAML:
    return FastMAML(FullyConnected(1, (4,), 1), mean_squared_error, update_lr=update_lr)


def evaluate_after_no_updates():
    batch = Batch(*[tf.zeros([1, 1, 1], tf.float64)] * 4)
    exact_model(FullyConnected(1, (4,), 1)).evaluate(batch, 0)


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: with_step_size(-1), 'update_lr must .* it is -1'),
        (lambda: with_step_size(float('nan')), 'update_lr must .* it is nan'),
        (lambda: FullyConnected(1, (0,), 1), r'the sizes are 1, \(0,\) and 1'),
        (lambda: Convolutional(8, 1, 4, 2, max_pool=True), '8x8x1'),
        (lambda: make_network('imagenet'), 'imagenet'),
        (lambda: make_network('sinusoid', norm='batch'), "'batch'"),
        (evaluate_after_no_updates, 'num_updates'),
    ],
)
def test_settings_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Compilation --------------------------------------------------------------------------------------


class Counting:
    """A network that counts its calls from Python, of which a traced function makes none."""

    def __init__(self, network):
        self.network, self.calls = network, 0
        self.parameters, self.norm_parameters = network.parameters, network.norm_parameters

    def prepare(self, inputs):
        self.calls += 1
        return self.network.prepare(inputs)

    def __call__(self, x, weights, norms):
        self.calls += 1
        return self.network(x, weights, norms)


def test_functions_are_traced_once():
    """Neither fresh batches nor more updates trace anything; another number of tasks does, once."""
    model = exact_model(Counting(Linear()), mean_squared_error)
    random = np.random.default_rng(0)

    def draw(tasks):
        return Batch(*random.standard_normal((4, tasks, 5, 1)))

    def use(batch):
        model.metatrain_step(batch)
        model.pretrain_step(batch)
        model.evaluate(batch, 2)
        return model.network.calls

    calls = use(draw(2))
    for _ in range(3):
        assert use(draw(2)) == calls
        assert use(Batch(*map(tf.constant, draw(2)))) == calls  # tensors, as arrays
    model.evaluate(draw(2), 5)
    assert model.network.calls == calls
    assert use(draw(3)) == use(draw(3)) <= 2 * calls
    assert model.metatrain_step.experimental_get_tracing_count() == 2
    assert model.pretrain_step.experimental_get_tracing_count() == 2


def compiled_and_not(network: Convolutional) -> list[FastMAML]:
    return [
        exact_model(network, dtype=tf.float32, num_updates=1, compiled=compiled)
        for compiled in (True, False)
    ]


@pytest.mark.slow
def test_programs_hand_over_what_derivatives_need():
    """Not each argument of a custom gradient, for zeros of its shape; TensorFlow's own op is left.

    Numbers 11 times those of the images; 30 times, if each argument were among them.
    """
    network = Convolutional(28, 1, 4, 3)
    model, batch = exact_model(network), random_batch(network)
    traced = tf.function(model.meta_gradient, autograph=False).get_concrete_function(batch)
    functions = traced.graph.as_graph_def().library.function
    zeros = [node for f in functions for node in f.node_def if node.op == 'ZerosLike']
    assert len(zeros) <= 1, zeros
    (program,) = [f for f in functions if f.signature.name.startswith('__forward_update')]
    calls = [op for op in traced.graph.get_operations() if 'PartitionedCall' in op.type]
    called = [op for op in calls if op.get_attr('f').name == program.signature.name]
    handed_over = sum(np.prod(out.shape) for out in called[0].outputs)
    assert handed_over < 15 * np.prod(batch.inputa.shape)


@pytest.mark.slow
def test_meta_gradient_of_compiled_updates():
    """Called at once, and as part of a graph."""
    network = Convolutional(6, 1, 2, 3)
    model = exact_model(network, dtype=tf.float32, compiled=True)
    batch = random_batch(network, dtype=tf.float32)
    (loss, ours), (same, theirs) = (
        model.meta_gradient(batch),
        tf.function(model.meta_gradient)(batch),
    )
    assert float(loss) == float(same)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_compiled_evaluation():
    """By XLA and by plain TensorFlow, float32."""
    network = Convolutional(6, 1, 2, 3)
    (compiled, plain), batch = compiled_and_not(network), random_batch(network, dtype=tf.float32)
    with running_eagerly():
        expected = plain.evaluate(batch, 2)
    for one, other in zip(compiled.evaluate(batch, 2), expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# Slow to compile; test_reference.py compiles larger networks, and has the original's values.
@pytest.mark.slow
def test_compiled_meta_training():
    """Two steps by XLA and by plain TensorFlow, float32."""
    network = Convolutional(6, 1, 2, 3)
    compiled, plain = compiled_and_not(network)
    batches = [random_batch(network, seed=seed, dtype=tf.float32) for seed in range(2)]
    with running_eagerly():
        expected = [plain.metatrain_step(batch) for batch in batches]
    losses = [compiled.metatrain_step(batch) for batch in batches]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, variable in named(plain).items():
        # Not the biases before batch normalisation: Adam makes a full step of a rounding error in
        # their gradient.
        if name not in ('b1', 'b2', 'b3', 'b4'):
            np.testing.assert_allclose(named(compiled)[name], variable, atol=2e-5, err_msg=name)


# Chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('reads_variables', [False, True])
def test_chunks_in_a_loop(reads_variables):
    """In order, the last one smaller; the function is traced once for all equal ones, or else for
    each of them.
    """
    network, called = SimpleNamespace(reads_variables=reads_variables), []
    x = tf.random.stateless_normal([11, 2, CHUNK_SIZE // 10], [0, 1])  # five tasks are most
    batch = Batch(x, x[..., :1], x, x[..., :1])

    def function(chunk: Batch):
        called.append(chunk.inputa.shape[0])
        return tf.reduce_sum(chunk.inputa, axis=[1, 2])

    parts = tf.function(lambda batch: in_a_loop(function, batch, tf.float32, network))(batch)
    assert called == ([5, 5, 1] if reads_variables else [5, 1])
    np.testing.assert_allclose(tf.concat(parts, 0), tf.reduce_sum(x, axis=[1, 2]), rtol=1e-5)
