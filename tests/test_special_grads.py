"""Products, sums and pooling for many tasks at once, against TensorFlow's, task by task."""

import numpy as np
import pytest
import tensorflow as tf

from fewshot.engine.shared import Shared, product_shared
from special_grads import (
    FEW_ROWS,
    convolve,
    max_pool2x2,
    moments,
    patches3x3,
    per_task,
    product,
    product_outer,
    product_transposed,
    spread,
    standardize,
    sum_rows,
)

SIZES = [(6, 6), (5, 5), (7, 4), (4, 7), (3, 2), (2, 2), (1, 3), (1, 1)]


def convolution(x, kernel, stride):
    """x [T, examples, H, W, C], kernel [T, 3, 3, C, F]: each task's patches by its kernel."""
    matrix = tf.reshape(kernel, [kernel.shape[0], -1, kernel.shape[-1]])  # [T, 9*C, F]
    return tf.einsum('tehwi,tif->tehwf', patches3x3(x, stride), matrix)


def tensorflow_convolution(x, kernel, stride):
    tasks = zip(x, kernel)
    return tf.stack([tf.nn.conv2d(*task, strides=stride, padding='SAME') for task in tasks])


def tensorflow_pooling(x):
    return tf.stack([tf.nn.max_pool2d(task, 2, 2, 'VALID') for task in x])


def derivatives(function, *inputs):
    """The value, a scalar's gradient, and the derivative of that gradient along a direction."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    random = np.random.default_rng(1)
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            # Squares of inputs and outputs: the scalar's second derivative passes through the layer
            # in every way.
            value = function(*(x + tf.square(x) / 4 for x in inputs))
            weights = random.standard_normal(value.shape)
            scalar = tf.reduce_sum(weights * (value + tf.square(value)))
        first = inner.gradient(scalar, inputs)
        along = tf.add_n([tf.reduce_sum(g * random.standard_normal(g.shape)) for g in first])
    return value, first, outer.gradient(along, inputs)


def assert_same(one, other):
    for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_convolution_is_tensorflows_of_each_task(size, stride):
    """Value, first and second derivatives for images and kernels; a kernel for each task."""
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((3, 2, *size, 2)), random.standard_normal((3, 3, 3, 2, 4))
    ours = derivatives(lambda *inputs: convolution(*inputs, stride), x, kernel)
    assert ours[0].shape == (3, 2, -(-size[0] // stride), -(-size[1] // stride), 4)
    expected = derivatives(lambda *inputs: tensorflow_convolution(*inputs, stride), x, kernel)
    assert_same(ours, expected)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('tasks', [1, 2])
@pytest.mark.parametrize('size', [(5, 4), (2, 1)], ids=str)
def test_convolution_of_few_tasks(size, tasks, stride):
    """A single one with stride 1 goes another way."""
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((tasks, 3, *size, 2)), random.random((tasks, 3, 3, 2, 4))
    ours = derivatives(lambda *inputs: convolve(*inputs, stride), x, kernel)
    assert_same(
        ours, derivatives(lambda *inputs: tensorflow_convolution(*inputs, stride), x, kernel)
    )


@pytest.mark.parametrize('stride', [1, 2])
def test_each_task_has_its_own_kernel(stride):
    """A task's output and gradients do not change with the other tasks' images and kernels."""
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((3, 2, 6, 5, 2)), random.standard_normal((3, 3, 3, 2, 4))

    def middle(*inputs):
        return convolution(*inputs, stride)[1]

    def of_middle_task():
        value, first, second = derivatives(middle, x, kernel)
        for gradient in (*first, *second):
            assert np.any(gradient[1]) and not np.any(gradient[0]) and not np.any(gradient[2])
        return value, [gradient[1] for gradient in (*first, *second)]

    before = of_middle_task()
    x[[0, 2]] = random.standard_normal((2, 2, 6, 5, 2))
    kernel[[0, 2]] = random.standard_normal((2, 3, 3, 2, 4))
    assert_same(of_middle_task(), before)


@pytest.mark.parametrize('size', [(4, 4), (5, 7), (3, 2), (2, 3), (84, 3)], ids=str)
@pytest.mark.parametrize('ties', [False, True], ids=['distinct', 'ties'])
def test_max_pooling_is_tensorflows(size, ties):
    """Value, gradient and second derivative; an odd last row and column are dropped.

    Blank paper makes constant regions, whose maxima are ties: the gradient then goes where
    TensorFlow sends it.
    """
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, *size, 2))
    if ties:
        x = np.rint(x)
        x[0] = 0.7  # all ties, all positive
    ours = derivatives(max_pool2x2, x)
    assert ours[0].shape == (2, 3, size[0] // 2, size[1] // 2, 2)
    assert_same(ours, derivatives(tensorflow_pooling, x))


@pytest.mark.parametrize('shape', [(2, 3, 5, 7, 2), (1, 1, 2, 2, 1)], ids=str)
def test_ties_of_max_pooling_share_nothing(shape):
    """One element of each window gets all of the gradient that its output has."""
    x = tf.ones(shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = max_pool2x2(x)
    gradient = tape.gradient(y, x).numpy()
    assert set(np.unique(gradient)) <= {0.0, 1.0} and gradient.sum() == np.prod(y.shape)


@pytest.mark.parametrize(
    'ours, plain, shape',
    [
        (sum_rows, lambda x: tf.reduce_sum(x, axis=1, keepdims=True), (2, 5, 3)),
        (lambda x: spread(x, 5), lambda x: tf.repeat(x, 5, axis=1), (2, 1, 3)),
    ],
    ids=['sum_rows', 'spread'],
)
def test_sums_and_copies_have_derivatives_of_every_order(ours, plain, shape):
    """The one is the other's gradient; as TensorFlow's, up to the third derivative."""

    def thrice(function):
        x = tf.constant(np.random.default_rng(0).standard_normal(shape))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = function(x**2)
            results = [y, tf.reduce_sum(y**4)]
            for _ in range(3):
                results.append(tape.gradient(results[-1], x))
        return results

    assert_same(thrice(ours), thrice(plain))


@pytest.mark.parametrize(
    'layer, shapes',
    [
        (lambda x, kernel: convolution(x, kernel, 2), [(2, 2, 5, 4, 2), (2, 3, 3, 2, 2)]),
        (max_pool2x2, [(2, 2, 5, 4, 2)]),
    ],
    ids=['convolution', 'pooling'],
)
def test_compiled_layers(layer, shapes):
    """XLA computes the same value and the same derivatives, ties included."""
    inputs = [np.rint(np.random.default_rng(0).standard_normal(shape)) for shape in shapes]
    compiled = tf.function(lambda *x: derivatives(layer, *x), jit_compile=True)
    assert_same(compiled(*inputs), derivatives(layer, *inputs))


def plain_moments(x):
    mean = tf.reduce_mean(x, 1, keepdims=True)
    return tf.concat([mean, tf.reduce_mean(tf.square(x - mean), 1, keepdims=True)], 1)


def plain_standardize(x, mean, scale, offset):
    return (x - mean) * scale + offset


def plain_outer(x, y):
    return tf.matmul(x, y, transpose_a=True)


def plain_transposed(x, matrix):
    return tf.matmul(x, matrix, transpose_b=True)


def unperturbed(x, matrix):
    return product_shared(x, matrix, tf.zeros([2, 3, 4], tf.float64))


@pytest.mark.parametrize(
    'ours, plain, shapes',
    [
        (product, tf.matmul, [(2, 5, 3), (2, 3, 4)]),
        (product_transposed, plain_transposed, [(2, 5, 3), (2, 4, 3)]),
        (product_outer, plain_outer, [(2, 5, 3), (2, 5, 4)]),
        (product_outer, plain_outer, [(2, FEW_ROWS + 1, 3), (2, FEW_ROWS + 1, 4)]),
        (unperturbed, tf.matmul, [(2, 5, 3), (3, 4)]),
        (lambda x: tf.concat(moments(x), 1), plain_moments, [(2, 12, 3)]),
        (standardize, plain_standardize, [(2, 12, 3), *[(2, 1, 3)] * 3]),
    ],
)
def test_derivatives_by_hand(ours, plain, shapes):
    """To the third order; the network needs two."""
    random = np.random.default_rng(2)
    inputs = [tf.constant(random.standard_normal(shape)) for shape in shapes]
    assert_same(derivatives(ours, *inputs), derivatives(plain, *inputs))

    def third(function):
        def second(*inputs):
            gradients = derivatives(function, *inputs)[2]
            return tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)

        return derivatives(second, *inputs)[1]

    assert_same(third(ours), third(plain))


@pytest.mark.parametrize('rows', [5, FEW_ROWS + 1])
def test_shared_weights_have_a_gradient_for_each_task(rows):
    """As with weights of each task's own; its derivatives, too: an inner update consists of it."""
    random = np.random.default_rng(0)
    x, matrix = (tf.constant(random.standard_normal(shape)) for shape in [(2, rows, 3), (3, 4)])
    perturbation = tf.zeros([2, 3, 4], tf.float64)

    def gradient_of_shared(x, matrix):
        with tf.GradientTape() as tape:
            tape.watch(perturbation)
            scalar = tf.reduce_sum(tf.sin(product_shared(x, matrix, perturbation)))
        return tape.gradient(scalar, perturbation)

    def gradient_of_copies(x, matrix):
        copies = per_task(Shared(matrix, perturbation))
        with tf.GradientTape() as tape:
            tape.watch(copies)
            scalar = tf.reduce_sum(tf.sin(x @ copies))
        return tape.gradient(scalar, copies)

    shared = derivatives(gradient_of_shared, x, matrix)
    assert_same(shared, derivatives(gradient_of_copies, x, matrix))
