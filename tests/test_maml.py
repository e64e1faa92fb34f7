"""Networks, inner loop, meta-gradient, outer step: by hand, by finite differences, and against
TensorFlow's own layers.

Everything goes through the public interface of maml.py, so that layers may be rewritten for speed
without touching it. Tests are in float64 and uncompiled, hence exact and quick, where nothing else
is said.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from maml import Convolutional, FastMAML, FullyConnected, make_model, make_network
from special_grads import BatchNorm, LayerNorm
from utils import Batch, cross_entropy, mean_squared_error

FOLDER = Path(os.environ.get('MAML_REFERENCE_DIR', Path(__file__).parent / 'reference'))
NORMS = ['batch_norm', 'layer_norm', 'None']


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
    """Images of noise, of the size that `network` wants, and labels that have nothing to do with
    them.
    """
    random = np.random.default_rng(seed)
    if isinstance(network, FullyConnected):
        size = network.parameters['w1'][1][0]
    else:
        size = np.prod(network.image_shape)
    draw = lambda shots: (
        random.random((tasks, shots * classes, size)),
        one_hot(random, tasks, classes, shots),
    )
    return Batch(*(tf.constant(x, dtype) for x in (*draw(shots), *draw(queries))))


def exact_model(network, loss=None, perturbed: bool = True, **settings) -> FastMAML:
    """An uncompiled float64 model, two inner updates; `perturbed`: with biases, offsets and gains
    far from 0 and 1.
    """
    settings = {
        'update_lr': 0.05,
        'num_updates': 2,
        'dtype': tf.float64,
        'compiled': False,
    } | settings
    model = FastMAML(network, loss or cross_entropy(2), **settings)
    random = np.random.default_rng(3)
    for variable in model.parameters if perturbed else ():
        variable.assign_add(
            tf.constant(0.3 * random.standard_normal(variable.shape), variable.dtype)
        )
    return model


def copy_of(model: FastMAML, network=None, **settings) -> FastMAML:
    """A model with the same parameters and other settings, or another network with parameters of
    the same names.
    """
    other = exact_model(network or model.network, perturbed=False, **settings)
    for name, variable in named(other).items():
        variable.assign(tf.cast(named(model)[name], variable.dtype))
    return other


def named(model: FastMAML) -> dict[str, tf.Variable]:
    return model.weights | model.norms


def named_gradient(model: FastMAML, batch: Batch) -> dict[str, np.ndarray]:
    return {
        name: gradient.numpy()
        for name, gradient in zip(named(model), model.meta_gradient(batch)[1], strict=True)
    }


def distance(one: dict, other: dict) -> float:
    """Of two meta-gradients, relative to the second."""
    return np.sqrt(sum(np.sum((one[name] - other[name]) ** 2) for name in other)) / np.sqrt(
        sum(np.sum(value**2) for value in other.values())
    )


def adapted(model: FastMAML, batch: Batch, updates: int) -> dict[str, tf.Tensor]:
    """Weights of each task, {name: [T, ...]}, after inner updates on its support set."""
    weights, support = (
        model.initial_weights(batch.inputa.shape[0]),
        model.network.prepare(batch.inputa),
    )
    for _ in range(updates):
        weights = model.update(weights, model.norms, support, batch.labela)
    return weights


def tasks_of(batch: Batch, tasks) -> Batch:
    return Batch(*(x[tasks] for x in batch))


# Two parameters, by hand --------------------------------------------------------------------------


class Linear:
    """f(x) = w x + b + c: w and b are adapted, c is shared by all tasks, as the offset of a
    normalisation is.
    """

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
    """f(x) = w x + b + c with w = 2, b = 1, c = 0; squared error; α = 1/8; support (1, 1), query
    (3, 3).

    The support error is e1 = w x1 + b + c - y1 = 2 and its gradient for (w, b) is 2 e1 (x1, 1). An
    update therefore multiplies e1 by r = 1 - 2 α (x1² + 1) = 1/2 and takes 2 α e1 (x1, 1) from (w,
    b). c is not updated. The query error after M updates, s being 1 + r + ... + r^(M-1), is

        e2 = w x2 + b + c - y2 - 2 α s (x1 x2 + 1) e1 = 4 - 2 s,   that is 2 after one update and 1
        after two.

    By the chain rule through the updates, e1 having the derivatives (x1, 1, 1) for (w, b, c), those
    of e2² are

        2 e2 (x2 - 2 α s (x1 x2 + 1) x1,  1 - 2 α s (x1 x2 + 1),  1 - 2 α s (x1 x2 + 1)) = 2 e2 (3 -
        s, 1 - s, 1 - s):

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
    """As above, e1² = 4 before, and e2 = 4 - 2 s = 2, 1, 1/2, 1/4 after one to four updates; the
    first task of two.

    The other has support (0, 0) and query (2, 1): e1 = 1, r = 1 - 2 α = 3/4, e2 = 4 - s/4 with s =
    1, 7/4, 37/16, 175/64.
    """
    model = linear_model(update_lr=1 / 8, num_updates=1, stop_grad=stop_grad)
    results = model.evaluate(points((1, 1, 3, 3), (0, 0, 2, 1)), 4)
    np.testing.assert_array_equal(results.loss1, [4, 1])
    e2 = np.transpose([[2, 1, 1 / 2, 1 / 4], [4 - s / 4 for s in (1, 7 / 4, 37 / 16, 175 / 64)]])
    np.testing.assert_array_equal(results.losses2, e2**2)
    np.testing.assert_array_equal(results.outputa, [[[3]], [[1]]])
    np.testing.assert_array_equal(results.outputsb[..., 0, 0], e2 + [3, 1])


@pytest.mark.usefixtures('eagerly')
def test_one_update_by_hand():
    """θ' = θ - α ∇: as above, (w, b) = (2, 1) - 1/8 · 4 (1, 1) = (3/2, 1/2); the second task has e1
    = 1 and x1 = 0.
    """
    model = linear_model(update_lr=1 / 8)
    batch = points((1, 1, 3, 3), (0, 0, 2, 1))
    weights = adapted(model, batch, 1)
    np.testing.assert_array_equal(weights['w'][:, 0, 0], [1.5, 2])
    np.testing.assert_array_equal(weights['b'][:, 0], [0.5, 0.75])
    assert weights.keys() == {'w', 'b'}  # c, the offset, is nobody's to adapt
    assert [variable.numpy().item() for variable in model.parameters] == [2, 1, 0]


@pytest.mark.usefixtures('eagerly')
def test_totals_are_means_over_tasks_by_hand():
    """The two tasks above: e2² = 4 and (15/4)²; the second's gradient is 2 e2 (x2, 1 - 2 α, 1 - 2
    α).
    """
    loss, gradients = linear_model(update_lr=1 / 8, num_updates=1).meta_gradient(
        points((1, 1, 3, 3), (0, 0, 2, 1))
    )
    assert loss == (4 + 225 / 16) / 2
    assert [g.numpy().item() for g in gradients] == [
        (8 + 7.5 * 2) / 2,
        7.5 * 0.75 / 2,
        7.5 * 0.75 / 2,
    ]


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
CONVOLUTIONAL = [
    pytest.param(
        dict(image_size=size, norm=norm, max_pool=halving == 'max_pool', flatten=head == 'flatten'),
        id=f'{norm}-{halving}-{head}',
    )
    for norm in NORMS
    for (halving, head), size in SIZES.items()
]
HALF = [
    CONVOLUTIONAL[i] for i in (0, 3, 5, 6, 8, 11)
]  # each normalisation, both ways to halve, the heads in turns


def small_network(image_size=11, channels=2, filters=3, classes=3, **settings) -> Convolutional:
    return Convolutional(image_size, channels, filters, classes, **settings)


def fully_connected(norm: str, inputs: int = 6, classes: int = 3) -> FullyConnected:
    return FullyConnected(inputs, (5, 4, 4), classes, norm)


def outer_loss(model: FastMAML, batch: Batch) -> float:
    return float(np.mean(model.evaluate(batch, model.num_updates).losses2[-1]))


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
    """Along a random direction in each variable; second order differs from first, and offsets count
    in both.
    """
    model, batch, random = (
        exact_model(network),
        random_batch(network, shots=1, queries=1),
        np.random.default_rng(7),
    )
    with running_eagerly():
        gradients = named_gradient(model, batch)
        first_order = named_gradient(copy_of(model, stop_grad=True), batch)
    for name, variable in named(model).items():
        direction = random.standard_normal(variable.shape)
        direction /= np.linalg.norm(direction)
        # 1e-8: rounding error of the difference, all there is for a bias that batch normalisation
        # cancels. The shorter step is for a ReLU's or a maximum's kink that the longer one happens
        # to cross.
        tolerance = 1e-6 * np.linalg.norm(gradients[name]) + 1e-8
        slope = np.sum(gradients[name] * direction)
        assert any(
            abs(slope - central_difference(model, batch, variable, direction, step)) <= tolerance
            for step in (1e-6, 1e-7)
        ), name
    assert distance(first_order, gradients) > 0.02
    for name in model.norms:
        assert (
            np.linalg.norm(gradients[name]) > 1e-3 and np.linalg.norm(first_order[name]) > 1e-3
        ), name


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
    """stop_grad: the query loss's gradient at the adapted weights, and its direct gradient for
    offsets and gains.
    """
    model, batch = exact_model(network, stop_grad=True), random_batch(network)
    weights = adapted(model, batch, model.num_updates)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        losses = model.loss(
            network(network.prepare(batch.inputb), weights, model.norms), batch.labelb
        )
    of_weights, direct = tape.gradient(losses, (weights, model.norms), unconnected_gradients='zero')
    expected = {name: np.mean(gradient, axis=0) for name, gradient in of_weights.items()}
    expected |= {name: gradient.numpy() / 2 for name, gradient in direct.items()}
    gradients = named_gradient(model, batch)
    for name in named(model):
        np.testing.assert_allclose(
            gradients[name], expected[name], rtol=1e-9, atol=1e-12, err_msg=name
        )


# The networks against TensorFlow's own layers, task by task ---------------------------------------


def means_norm(x, axes, epsilon):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean((x - mean) ** 2, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


def moments_norm(x, axes, epsilon):
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


class TaskByTask:
    """A convolutional network as one would write it for a single task, with the parameters of
    `network`.
    """

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
            x = tf.nn.relu(
                self.normalize(
                    x, {name[2:]: norm for name, norm in norms.items() if int(name[0]) == i}
                )
            )
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
    """Outputs and meta-gradient. One task is noise; the other has blank regions, hence equal pixels
    to pool.
    """
    network = small_network(**settings)
    model, batch = exact_model(network, num_updates=1), random_batch(network)
    blank = lambda x: tf.stack([x[0], tf.where(x[1] < 0.95, 0.0, x[1])])
    batch = batch._replace(inputa=blank(batch.inputa), inputb=blank(batch.inputb))
    other = copy_of(model, TaskByTask(network), num_updates=1)
    gradients, expected = named_gradient(model, batch), named_gradient(other, batch)
    for name in expected:
        np.testing.assert_allclose(
            gradients[name], expected[name], rtol=1e-7, atol=1e-11, err_msg=name
        )
    output = network(network.prepare(batch.inputa), model.initial_weights(2), model.norms)
    np.testing.assert_allclose(
        output,
        other.network(batch.inputa, other.initial_weights(2), other.norms),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', NORMS)
def test_fully_connected_network_by_its_formula(norm):
    """Affine, normalisation, ReLU, three times; then affine."""
    network = fully_connected(norm)
    model, batch = exact_model(network), random_batch(network)
    x = batch.inputa
    weights = {
        name: value[:, None] if name[0] == 'b' else value
        for name, value in model.initial_weights(2).items()
    }
    for i, scope in enumerate(['0', '2', '3'], start=1):
        x = x @ weights[f'w{i}'] + weights[f'b{i}']
        if norm == 'batch_norm':
            x = means_norm(x, [1], 1e-3) + model.norms[f'{scope}/beta']
        if norm == 'layer_norm':
            x = (
                means_norm(x, [2], 1e-12) * model.norms[f'{scope}/gamma']
                + model.norms[f'{scope}/beta']
            )
        x = tf.maximum(x, 0)
    expected = x @ weights['w4'] + weights['b4']
    np.testing.assert_allclose(model.evaluate(batch, 1).outputa, expected, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
def test_moments_would_spoil_the_meta_gradient(reference):
    """The measured case: with tf.nn.moments all losses are right and conv1's meta-gradient is off
    by far.

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
    small_network(),
    small_network(17, norm='layer_norm', flatten=True),
    fully_connected('batch_norm'),
]


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize(
    'network', INDEPENDENCE, ids=['batch_norm', 'layer_norm', 'fully_connected']
)
def test_tasks_are_independent(network):
    """Evaluated together as alone; and the meta-gradient of a meta-batch is the mean of its
    tasks'.
    """
    model, batch = exact_model(network, num_updates=1), random_batch(network, tasks=2)
    together, alone = (
        model.evaluate(batch, 2),
        [model.evaluate(tasks_of(batch, slice(i, i + 1)), 2) for i in range(2)],
    )
    for name, values in together._asdict().items():
        axis = 1 if name in ('losses2', 'accuracies2', 'outputsb') else 0
        np.testing.assert_allclose(
            values,
            np.concatenate([getattr(one, name) for one in alone], axis),
            rtol=1e-9,
            atol=1e-12,
            err_msg=name,
        )
    gradients = named_gradient(model, batch)
    singles = [named_gradient(model, tasks_of(batch, slice(i, i + 1))) for i in range(2)]
    for name in gradients:
        np.testing.assert_allclose(
            gradients[name],
            np.mean([one[name] for one in singles], axis=0),
            rtol=1e-9,
            atol=1e-12,
            err_msg=name,
        )


@pytest.mark.usefixtures('eagerly')
def test_parts_of_a_large_meta_batch():
    """Whatever parts it is worked on in: twelve tasks have the mean of three times four tasks'
    meta-gradients.

    And evaluation gives each task its own results, in order.
    """
    network = small_network(28, channels=1, filters=2, classes=5)
    model, batch = exact_model(network, num_updates=1), random_batch(network, 12, 5, 1, 1)
    loss, gradients = model.meta_gradient(batch)
    parts = [model.meta_gradient(tasks_of(batch, slice(i, i + 4))) for i in (0, 4, 8)]
    np.testing.assert_allclose(loss, np.mean([loss for loss, _ in parts]), rtol=1e-9)
    for gradient, *of_parts in zip(gradients, *(gradients for _, gradients in parts)):
        np.testing.assert_allclose(gradient, np.mean(of_parts, axis=0), rtol=1e-9, atol=1e-12)
    together, part = model.evaluate(batch, 2), model.evaluate(tasks_of(batch, slice(4, 8)), 2)
    for name, values in part._asdict().items():
        values_together = getattr(together, name)
        values_together = (
            values_together[:, 4:8] if len(values.shape) in (2, 4) else values_together[4:8]
        )
        np.testing.assert_allclose(values_together, values, rtol=1e-9, atol=1e-12, err_msg=name)


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
    """Support before any update, query after each; summed over examples and divided by K, here
    2.
    """
    network = small_network()
    batch = random_batch(network, queries=5)
    results = exact_model(network).evaluate(batch, 3)

    def loss_and_accuracy(output, label):
        log_probability = output - np.log(np.sum(np.exp(output), axis=-1, keepdims=True))
        hits = np.argmax(output, -1) == np.argmax(label, -1)
        return -np.sum(log_probability * label, axis=(-2, -1)) / 2, np.mean(hits, axis=-1)

    for actual, expected in zip(
        (results.loss1, results.accuracy1),
        loss_and_accuracy(results.outputa.numpy(), batch.labela.numpy()),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    for actual, expected in zip(
        (results.losses2, results.accuracies2),
        loss_and_accuracy(results.outputsb.numpy(), batch.labelb.numpy()),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
def test_query_labels_do_not_leak_into_predictions():
    network = small_network()
    model, batch = exact_model(network, update_lr=0.5), random_batch(network)
    expected = model.evaluate(batch, 3)
    other = model.evaluate(batch._replace(labelb=tf.roll(batch.labelb, 1, axis=2)), 3)
    np.testing.assert_array_equal(other.outputsb, expected.outputsb)
    assert not np.any(other.losses2 == expected.losses2)
    other = model.evaluate(
        batch._replace(labela=tf.roll(batch.labela, 1, axis=2)), 3
    )  # those do matter
    assert not np.all(other.outputsb == expected.outputsb, axis=(2, 3)).any()
    np.testing.assert_array_equal(other.outputa, expected.outputa)


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', NORMS)
def test_only_batch_norm_lets_query_images_see_each_other(norm):
    """Transductive: statistics are those of the query set itself. Its order plays no part."""
    network = small_network(norm=norm)
    model, batch = exact_model(network), random_batch(network, queries=4)
    expected = model.evaluate(batch, 2).outputsb
    changed = model.evaluate(
        batch._replace(inputb=tf.concat([batch.inputb[:, :-1], batch.inputb[:, -1:] ** 3], 1)), 2
    )
    same = np.all(
        np.isclose(changed.outputsb[:, :, :-1], expected[:, :, :-1], rtol=1e-9), axis=(2, 3)
    )  # [J, T]
    assert not np.any(same) if norm == 'batch_norm' else np.all(same)
    turned = model.evaluate(batch._replace(inputb=tf.reverse(batch.inputb, [1])), 2)
    np.testing.assert_allclose(turned.outputsb[:, :, ::-1], expected, rtol=1e-9)


@pytest.mark.usefixtures('eagerly')
@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm'])
def test_evaluation_changes_nothing(norm):
    """Neither θ nor offsets; and no running statistics: another batch in between leaves no
    trace.
    """
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
    """Fresh weights know nothing: 1/N before an update, and 1/N on the query set of noise after
    updates, too.

    240 tasks of 5 images: the standard error of a mean accuracy is about sqrt(0.2 · 0.8 / 1200) =
    0.012.
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
    pairs = list(zip(sizes, sizes[1:]))
    return {f'w{i}': pair for i, pair in enumerate(pairs, start=1)} | {
        f'b{i}': pair[1:] for i, pair in enumerate(pairs, start=1)
    }


SHAPES = [
    (dict(datasource='sinusoid', norm='None'), layers(1, 40, 40, 1), {}),
    (dict(datasource='sinusoid', norm='None', baseline='oracle'), layers(3, 40, 40, 1), {}),
    (dict(datasource='sinusoid'), layers(1, 40, 40, 1), {'0/beta': (40,), '2/beta': (40,)}),
    (dict(datasource='omniglot'), blocks(1, 64, (64, 5)), {f'{i}/beta': (64,) for i in range(4)}),
    (
        dict(
            datasource='omniglot', num_classes=20, max_pool=True, norm='layer_norm', num_filters=8
        ),
        blocks(1, 8, (8, 20)),
        {f'{i}/{name}': (8,) for i in range(4) for name in ('beta', 'gamma')},
    ),
    (
        dict(datasource='omniglot', conv=False),
        layers(784, 256, 128, 64, 64, 5),
        {'0/beta': (256,), '2/beta': (128,), '3/beta': (64,), '4/beta': (64,)},
    ),
    (
        dict(datasource='omniglot', conv=False, norm='layer_norm', num_classes=20),
        layers(784, 256, 128, 64, 64, 20),
        {
            f'{scope}/{name}': (size,)
            for scope, size in ((0, 256), (2, 128), (3, 64), (4, 64))
            for name in ('beta', 'gamma')
        },
    ),
    (
        dict(datasource='miniimagenet', num_filters=32, max_pool=True),
        blocks(3, 32, (800, 5)),
        {f'{i}/beta': (32,) for i in range(4)},
    ),
    (
        dict(datasource='miniimagenet', conv=False, norm='None'),
        layers(21168, 256, 128, 64, 64, 5),
        {},
    ),
]


@pytest.mark.parametrize(
    'settings, weights, norms',
    SHAPES,
    ids=['-'.join(map(str, settings.values())) for settings, *_ in SHAPES],
)
def test_names_and_shapes_of_parameters(settings, weights, norms):
    """The original's variables: adapted ones, and normalisation parameters, which are not."""
    model = make_model(compiled=False, **settings)
    assert {name: tuple(variable.shape) for name, variable in model.weights.items()} == weights
    assert {name: tuple(variable.shape) for name, variable in model.norms.items()} == norms
    assert [variable.ref() for variable in model.parameters] == [
        variable.ref() for variable in named(model).values()
    ]
    network = make_network(**settings)
    assert {name: shape for name, (_, shape) in network.parameters.items()} == weights
    assert {name: shape for name, (_, shape) in network.norm_parameters.items()} == norms


def assert_uniform(values: np.ndarray, fan_in: int, fan_out: int):
    """Glorot: within ±sqrt(6 / (fan in + fan out)), up to the rim, with a uniform distribution's
    deviation.
    """
    limit = np.sqrt(6 / (fan_in + fan_out))
    assert limit * (1 - 20 / values.size) < np.abs(values).max() <= limit
    np.testing.assert_allclose(values.std(), limit / np.sqrt(3), rtol=3 / np.sqrt(values.size))
    assert abs(values.mean()) < 4 * limit / np.sqrt(3 * values.size)


def test_initial_values_of_convolutional_networks():
    """Glorot uniform kernels, fans counted over 3x3; zero biases and offsets; unit gains."""
    for source, channels in (('omniglot', 1), ('miniimagenet', 3)):
        model = make_model(source, norm='layer_norm', num_filters=32, compiled=False)
        for i in range(1, 5):
            assert_uniform(
                model.weights[f'conv{i}'].numpy(), 9 * (channels if i == 1 else 32), 9 * 32
            )
        for name, variable in named(model).items():
            if name[0] == 'b' or '/' in name:
                np.testing.assert_array_equal(
                    variable, np.full(variable.shape, float('gamma' in name)), err_msg=name
                )


def test_initial_values_of_the_last_layer():
    """Omniglot: normal of stddev 1, not truncated; miniImagenet, with pooling or without: Glorot
    uniform.
    """
    w5 = make_model('omniglot', num_classes=20, compiled=False).weights['w5'].numpy()
    assert abs(w5.std() - 1) < 0.06 and abs(w5.mean()) < 0.1
    assert abs(np.mean(np.abs(w5) > 2) - 0.0455) < 0.02 and np.abs(w5).max() > 2.7
    for max_pool, pixels in (
        (True, 25),
        (False, 36),
    ):  # 84 -> 42 -> 21 -> 10 -> 5, and 84 -> 42 -> 21 -> 11 -> 6
        w5 = (
            make_model('miniimagenet', num_filters=8, max_pool=max_pool, compiled=False)
            .weights['w5']
            .numpy()
        )
        assert w5.shape == (pixels * 8, 5)
        assert_uniform(w5, pixels * 8, 5)


def test_initial_values_of_fully_connected_networks():
    """Normal of standard deviation 0.01, cut at two, which leaves 0.0088; zero biases."""
    for settings in (
        dict(datasource='sinusoid', norm='None'),
        dict(datasource='omniglot', conv=False),
    ):
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
    """Equal for equal seeds; for others all differ, as do those of equally shaped parameters of one
    network.
    """
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
    """A task whose support and query loss both have `gradient` · (3, 1, 1) for (w, b, c) where the
    model now stands.
    """
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
    """Its gradient is the mean over tasks, nothing is adapted, and its Adam knows nothing of the
    other one.
    """
    model = linear_model(update_lr=1 / 8, meta_lr=0.01)
    model.metatrain_step(points((1, 1, 3, 3)))
    before, inputs, given = values_of(model), np.array([[1, 1, 1], [2, 1, 1]]), []
    for _ in range(2):
        errors = inputs @ values_of(model) - [1, 7]
        given.append(np.mean(2 * errors[:, None] * inputs, axis=0))
        np.testing.assert_allclose(
            model.pretrain_step(points((1, 1, 30, 30), (2, 7, 40, 40))), np.mean(errors**2)
        )
    np.testing.assert_allclose(
        values_of(model) - before, adam(before, given, 0.01) - before, rtol=ADAM
    )


@pytest.mark.parametrize('source, clipped', [('miniimagenet', True), ('omniglot', False)])
@pytest.mark.usefixtures('eagerly')
def test_only_miniimagenet_clips_the_meta_gradient(source, clipped):
    """To ±10 for each element. Adam's first step has no scale; the second shows how large the first
    gradient was.
    """
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
        change = lambda gradients: adam(0.0, gradients, 0.001) - adam(0.0, gradients[:1], 0.001)
        expected = [change(np.clip(gradients, -10, 10)), change(gradients)][:: 1 if clipped else -1]
        np.testing.assert_allclose(values[1][name] - values[0][name], expected[0], rtol=ADAM)
        assert np.abs(expected[1] - expected[0]).max() > 1e-5


@pytest.mark.parametrize('pretrain', [False, True])
def test_many_steps_at_once_are_those_steps_one_by_one(pretrain):
    """Training on the meta-batches first...last-1 of several; Adam's count of steps goes on from
    call to call.
    """
    together, single = (linear_model(update_lr=1 / 8, num_updates=1) for _ in range(2))
    batches = Batch(
        *map(tf.constant, np.random.default_rng(0).standard_normal((4, 6, 2, 5, 1)))
    )  # [count, T, ...]
    for first, last in ((0, 2), (2, 3), (4, 6)):
        end, loss = together.steps(batches, first, last, pretrain)
        assert end == last
        for i in range(first, last):
            step = single.pretrain_step if pretrain else single.metatrain_step
            expected = step(Batch(*(values[i] for values in batches)))
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(values_of(together), values_of(single), rtol=1e-12)
    one = Batch(*(values[3:4] for values in batches))
    np.testing.assert_allclose(
        together.steps(one, 0, 1, pretrain)[1], step(tasks_of(one, 0)), rtol=1e-12
    )
    np.testing.assert_allclose(values_of(together), values_of(single), rtol=1e-12)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda b: b._replace(inputa=b.inputa[..., :-1]),
            r'inputa is \[2, 6, 35\], but the network takes \[tasks, examples, 36\]',
        ),
        (
            lambda b: b._replace(labelb=b.labelb[..., :-1]),
            r'labelb is \[2, 6, 2\], but the network takes \[tasks, examples, 3\]',
        ),
        (
            lambda b: b._replace(inputb=b.inputb[:1]),
            r'inputb must be .* with the 2 tasks of inputa, but it is \[1, 6, 36\]',
        ),
        (lambda b: b._replace(labela=b.labela[0]), r'labela must be \[tasks, examples, size\]'),
        (lambda b: b._replace(inputa=tf.cast(b.inputa, tf.float16)), 'of float16'),
        (
            lambda b: b._replace(labela=b.labela[:, 1:]),
            'inputa has 6 examples per task, but labela has 5',
        ),
    ],
)
@pytest.mark.parametrize('method', ['meta_gradient', 'metatrain_step', 'pretrain_step', 'evaluate'])
def test_meta_batches_that_do_not_fit(method, change, words):
    """ValueError, with the shapes."""
    network = FullyConnected(36, (4,), 3)
    model, arguments = exact_model(network), [1] if method == 'evaluate' else []
    with pytest.raises(ValueError, match=words):
        getattr(model, method)(change(random_batch(network)), *arguments)


@pytest.mark.parametrize(
    'make, words',
    [
        (
            lambda: FastMAML(FullyConnected(1, (4,), 1), mean_squared_error, update_lr=-1),
            'update_lr is -1',
        ),
        (
            lambda: FastMAML(
                FullyConnected(1, (4,), 1), mean_squared_error, update_lr=float('nan')
            ),
            'update_lr is nan',
        ),
        (lambda: FullyConnected(1, (0,), 1), r'\[1, 0, 1\]'),
        (lambda: Convolutional(8, 1, 4, 2, max_pool=True), '8x8x1'),
        (lambda: make_network('imagenet'), 'imagenet'),
        (lambda: make_network('sinusoid', norm='batch'), "'batch'"),
        (
            lambda: exact_model(FullyConnected(1, (4,), 1)).evaluate(
                Batch(*[tf.zeros([1, 1, 1], tf.float64)] * 4), 0
            ),
            'num_updates',
        ),
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
    """Fresh batches, further steps and more updates trace nothing anew; another number of tasks
    does, once.
    """
    model = exact_model(Counting(Linear()), mean_squared_error)
    random = np.random.default_rng(0)
    draw = lambda tasks: Batch(*random.standard_normal((4, tasks, 5, 1)))

    def use(batch):
        model.metatrain_step(batch), model.pretrain_step(batch), model.evaluate(batch, 2)
        return model.network.calls

    calls = use(draw(2))
    for _ in range(3):
        assert (
            use(draw(2)) == use(Batch(*map(tf.constant, draw(2)))) == calls
        )  # arrays and tensors are the same
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


def test_compiled_evaluation():
    """By XLA and by plain TensorFlow, float32."""
    network = Convolutional(6, 1, 2, 3)
    (compiled, plain), batch = compiled_and_not(network), random_batch(network, dtype=tf.float32)
    with running_eagerly():
        expected = plain.evaluate(batch, 2)
    for one, other in zip(compiled.evaluate(batch, 2), expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # to compile; test_reference.py compiles larger networks, and compares with the original's values
def test_compiled_meta_training():
    """Two steps by XLA and by plain TensorFlow, float32."""
    network = Convolutional(6, 1, 2, 3)
    compiled, plain = compiled_and_not(network)
    batches = [random_batch(network, seed=seed, dtype=tf.float32) for seed in range(2)]
    with running_eagerly():
        expected = [plain.metatrain_step(batch) for batch in batches]
    np.testing.assert_allclose(
        [compiled.metatrain_step(batch) for batch in batches], expected, rtol=1e-5
    )
    for name, variable in named(plain).items():
        # Not the biases before batch normalisation: Adam makes a full step of a rounding error in
        # their gradient.
        if name not in ('b1', 'b2', 'b3', 'b4'):
            np.testing.assert_allclose(named(compiled)[name], variable, atol=2e-5, err_msg=name)
