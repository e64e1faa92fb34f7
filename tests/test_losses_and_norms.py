"""Losses and normalisations by their formulas; exact second derivatives; initial values."""

import numpy as np
import pytest
import tensorflow as tf

from fewshot.networks.paper_networks import FullyConnected
from maml import accuracy, cross_entropy, initial_value, mean_squared_error
from special_grads import batch_norm, layer_norm

LOG = np.log


def test_mean_squared_error_is_a_mean_over_the_points_of_each_task():
    """Task 0: errors 1, -2, 3 -> 14/3. Task 1: 0, 0, 6 -> 12."""
    output = tf.constant([[[1.0], [0.0], [4.0]], [[2.0], [3.0], [4.0]]])
    label = tf.constant([[[0.0], [2.0], [1.0]], [[2.0], [3.0], [-2.0]]])
    np.testing.assert_allclose(mean_squared_error(output, label), [14 / 3, 12.0], rtol=1e-6)


def test_cross_entropy_is_summed_and_divided_by_the_shots():
    """Logits (0, ln 3) are probabilities 1/4 and 3/4, logits (0, 0) one half each.

    Task 0 has labels 0, 1, 1 -> ln 4 + ln(4/3) + ln 2 = ln(32/3); task 1 has 1, 1, 0 -> ln(4/3) +
    ln(4/3) + ln 2 = ln(32/9). With K shots both are divided by K, whatever the number of examples.
    """
    logits = tf.constant(2 * [[[0.0, LOG(3.0)], [0.0, LOG(3.0)], [0.0, 0.0]]], tf.float64)
    label = tf.constant(np.eye(2)[[[0, 1, 1], [1, 1, 0]]])
    expected = np.array([LOG(32 / 3), LOG(32 / 9)])
    np.testing.assert_allclose(cross_entropy(1)(logits, label), expected, rtol=1e-14)
    np.testing.assert_allclose(cross_entropy(5)(logits, label), expected / 5, rtol=1e-14)


def test_cross_entropy_scale_of_support_and_query():
    """Equal logits cost N ln N on N*K support images, N*15/K ln N on 15 queries per class."""
    loss = cross_entropy(5)
    for examples, expected in ((5 * 5, 5 * LOG(5)), (5 * 15, 15 * LOG(5))):
        label = tf.constant(np.eye(5)[np.arange(examples) % 5][None])
        np.testing.assert_allclose(loss(tf.zeros_like(label), label), [expected], rtol=1e-14)


def test_cross_entropy_of_large_logits_is_finite():
    logits = tf.constant([[[1000.0, 0.0], [0.0, 1000.0]]])
    label = tf.constant([[[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(cross_entropy(1)(logits, label), [1000.0])


def test_accuracy_is_the_share_of_largest_logits():
    one = [[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]
    output = tf.constant([one, 4 * [[-1.0, -2.0, -3.0]]])
    label = tf.constant(np.eye(3, dtype=np.float32)[[[0, 1, 0, 0], [1, 2, 0, 1]]])
    np.testing.assert_array_equal(accuracy(output, label), [0.75, 0.25])


SHAPES = [(2, 5, 3), (2, 4, 3, 2, 3)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('scale', [1.0, 0.03])
def test_batch_norm_by_its_formula(shape, scale):
    """Biased variance of a task and channel, epsilon 0.001 in the root; 0.03² is less than that."""
    random = np.random.default_rng(0)
    x, beta = scale * random.standard_normal(shape) + 2, random.standard_normal(3)
    output = batch_norm(tf.constant(x), tf.constant(beta))
    for task, channel in np.ndindex(2, 3):
        values, found = x[task, ..., channel], output[task, ..., channel]
        variance = np.sum((values - values.mean()) ** 2) / values.size
        expected = (values - values.mean()) / np.sqrt(variance + 0.001) + beta[channel]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('scale', [1.0, 1e-6])
def test_layer_norm_by_its_formula(shape, scale):
    """Biased variance of an example, epsilon 1e-12 in the root; the last axis's gain and offset."""
    random = np.random.default_rng(0)
    x = scale * random.standard_normal(shape)
    beta, gamma = random.standard_normal((2, 3))
    output = layer_norm(*map(tf.constant, (x, beta, gamma)))
    for place in np.ndindex(shape[:2]):
        variance = np.mean((x[place] - x[place].mean()) ** 2)
        expected = (x[place] - x[place].mean()) / np.sqrt(variance + 1e-12) * gamma + beta
        np.testing.assert_allclose(output[place], expected, rtol=1e-9, atol=1e-10)


def test_constant_inputs_are_normalised_to_the_offset():
    x = tf.fill([2, 5, 3], 7.0)
    beta, gamma = tf.constant([1.0, 2.0, 3.0]), tf.constant([4.0, 5.0, 6.0])
    expected = np.broadcast_to(beta, x.shape)
    np.testing.assert_allclose(batch_norm(x, beta), expected, atol=1e-5)
    np.testing.assert_allclose(layer_norm(x, beta, gamma), expected, atol=1e-5)


def test_statistics_are_those_of_the_batch_at_hand():
    """No running averages: what was normalised before leaves no trace."""
    x, beta = tf.random.stateless_normal([2, 5, 3], [0, 0]), tf.zeros(3)
    before = batch_norm(x, beta)
    batch_norm(100 * x + 50, beta)
    np.testing.assert_array_equal(batch_norm(x, beta), before)


@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm'])
def test_each_layer_has_its_own_offset(norm):
    """A layer's normalisation takes its own scope's parameters; without one, nothing happens."""
    x = tf.random.stateless_normal([2, 5, 3], [0, 0])
    norms = {}
    for scope in range(4):
        norms |= {f'{scope}/{name}': tf.fill([3], float(scope)) for name in ('beta', 'gamma')}

    def normalize(x, norm, scope, norms):
        return FullyConnected(3, (3,), 3, norm)._normalize(x, scope, norms, None)

    one, three = (normalize(x, norm, scope, norms) for scope in '13')
    expected = tf.zeros_like(x) if norm == 'layer_norm' else -2 * (one - 1)
    np.testing.assert_allclose(three - 3 * one, expected, atol=1e-5)
    np.testing.assert_array_equal(normalize(x, 'None', '2', {}), x)


def test_parameters_of_each_normalisation():
    def norm_parameters(norm, *hidden):
        return FullyConnected(2, hidden, 1, norm).norm_parameters

    assert norm_parameters('None', 8) == {}
    assert norm_parameters('batch_norm', 8) == {'0/beta': ('zeros', (8,))}
    assert norm_parameters('layer_norm', 4, 8) == {
        '0/beta': ('zeros', (4,)),
        '0/gamma': ('ones', (4,)),
        '2/beta': ('zeros', (8,)),
        '2/gamma': ('ones', (8,)),
    }


def moments_norm(x, axes, epsilon):
    """Normalisation as one would write it, with tf.nn.moments, and as many programs have it."""
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


NORMS = {
    'batch_norm': (
        lambda x: batch_norm(x, tf.zeros(3, x.dtype)),
        lambda x: moments_norm(x, list(range(1, len(x.shape) - 1)), 1e-3),
    ),
    'layer_norm': (
        lambda x: layer_norm(x, tf.zeros(3, x.dtype), tf.ones(3, x.dtype)),
        lambda x: moments_norm(x, list(range(2, len(x.shape))), 1e-12),
    ),
}


def derivatives(norm, x, direction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value, a scalar's gradient, and the derivative of that gradient along `direction`."""
    x = tf.constant(x)
    weights = np.random.default_rng(1).standard_normal(x.shape)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = norm(x)
            scalar = tf.reduce_sum(weights * (y + y**2))
        first = inner.gradient(scalar, x)
        along = tf.reduce_sum(first * direction)
    return y.numpy(), first.numpy(), outer.gradient(along, x).numpy()


def relative(one, other) -> float:
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', NORMS)
def test_second_derivative_of_normalisation_is_exact(name, shape):
    """Against finite differences of the first derivative, which itself is checked by the values.

    tf.nn.moments takes the gradient of the mean inside the variance for zero, which it is: values
    and first derivatives are right. Its derivative is not zero, so second derivatives are wrong,
    and no warning is given.
    """
    random = np.random.default_rng(0)
    x, direction = random.standard_normal((2, *shape))
    (ours, naive), step = NORMS[name], 1e-5
    value, first, second = derivatives(ours, x, direction)
    up_value, up, _ = derivatives(ours, x + step * direction, direction)
    down_value, down, _ = derivatives(ours, x - step * direction, direction)
    weights = np.random.default_rng(1).standard_normal(shape)
    scalars = [np.sum(weights * (y + y**2)) for y in (up_value, down_value)]
    slope = (scalars[0] - scalars[1]) / (2 * step)
    np.testing.assert_allclose(np.sum(first * direction), slope, rtol=1e-6)
    assert relative(second, (up - down) / (2 * step)) < 1e-6

    naive_value, naive_first, naive_second = derivatives(naive, x, direction)
    np.testing.assert_allclose(naive_value, value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(naive_first, first, rtol=1e-10, atol=1e-12)
    assert relative(naive_second, second) > 0.01


@pytest.mark.parametrize('kind', ['glorot', 'normal', 'truncated'])
def test_initial_values_are_a_function_of_the_seed_alone(kind):
    tf.random.set_seed(1)
    one = initial_value(kind, (5, 6), [3, 4])
    tf.random.set_seed(2)
    np.random.seed(7)
    np.testing.assert_array_equal(initial_value(kind, (5, 6), [3, 4]), one)
    assert one.shape == (5, 6) and one.dtype == np.float32
    for other in ([3, 5], [4, 4], [4, 3]):
        assert not np.any(initial_value(kind, (5, 6), other) == one)
