"""Layers whose weights differ from task to task, differentiable any number of times.

After the first inner step every task of a meta-batch has weights of its own. TensorFlow has no
convolution with a batch of kernels, and `tf.map_fn` and `tf.vectorized_map` fall back to a loop
over tasks there. Here a convolution is a gather of patches followed by one batched matrix product,
and pooling is a maximum of four slices; their derivatives are written by hand, exact at every
order. Layers and normalisations are made of these.

Every tensor has a leading task axis T; "examples" is the number of examples of one task. Numbers
of tasks and examples may be unknown when a function is traced, then some sums are taken in plainer
ways; sizes of images and layers may not.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

try:
    from tensorflow.python.ops import control_flow_state
except ImportError:
    control_flow_state = None  # see `constant_zeros`

BATCH_NORM_EPSILON = 1e-3  # of tf.contrib.layers.batch_norm, which the original used
LAYER_NORM_EPSILON = 1e-12  # of tf.contrib.layers.layer_norm
FEW_ROWS = 16  # up to so many, sums of products of numbers beat products of matrices on CPUs


# Lengths of axes ----------------------------------------------------------------------------------


def sizes(x: tf.Tensor) -> list:
    """The lengths of its axes: numbers where a trace knows them, else scalar tensors."""
    if x.shape.is_fully_defined():
        return x.shape.as_list()
    return [
        known if known is not None else length
        for known, length in zip(x.shape, tf.unstack(tf.shape(x), x.shape.rank))
    ]


def number(n: int | tf.Tensor, like: tf.Tensor) -> int | tf.Tensor:
    """A length as something that tensors like `like` may be divided by."""
    return n if isinstance(n, int) else tf.cast(n, like.dtype)


# Products of matrices -----------------------------------------------------------------------------


@tf.custom_gradient
def product(rows: tf.Tensor, matrix: tf.Tensor):
    """rows [T, n, in] times matrix [T, in, out]: [T, n, out].

    `product`, `product_transposed` and `product_outer` are the derivatives of one another, so they
    are exact at any order. TensorFlow's own derivative of a product takes rows^T @ gradient, the
    slowest form on CPUs by far.
    """
    return rows @ matrix, lambda gradient: (
        product_transposed(gradient, matrix),
        product_outer(rows, gradient),
    )


@tf.custom_gradient
def product_transposed(rows: tf.Tensor, matrix: tf.Tensor):
    """rows [T, n, out] times the transpose of matrix [T, in, out]: [T, n, in]."""
    return (
        tf.matmul(rows, matrix, transpose_b=True),
        lambda gradient: (product(gradient, matrix), product_outer(gradient, rows)),
    )


@tf.custom_gradient
def product_outer(left: tf.Tensor, right: tf.Tensor):
    """The transpose of left [T, n, in] times right [T, n, out]: [T, in, out].

    With few rows each entry is a short sum, which XLA makes one loop over all tasks.
    """
    if left.shape[1] is not None and left.shape[1] <= FEW_ROWS:
        outer = tf.reduce_sum(left[:, :, :, tf.newaxis] * right[:, :, tf.newaxis], axis=1)
    else:
        outer = tf.matmul(right, left, transpose_a=True)  # [T, out, in]
        # A maximum that changes nothing, or XLA would fold the transposition into the product,
        # which is a third slower then: a step of Omniglot, 20-way 1-shot, by 17 %.
        outer = tf.linalg.matrix_transpose(tf.maximum(outer, -np.inf))
    return outer, lambda gradient: (product_transposed(right, gradient), product(left, gradient))


# Weights that tasks share, before the first inner update ------------------------------------------


class Shared(NamedTuple):
    """A weight that all tasks have in common, before the first inner update, and a place for each
    task's gradient.

    The tasks then make up one product of matrices, and the gradient of the weight is at once the
    sum over tasks that the outer loop needs. The inner loop, which needs them one by one, finds
    them at `perturbation`, which is zero.
    """

    value: tf.Tensor  # [...]
    perturbation: tf.Tensor  # [T, ...]


def per_task(weight: tf.Tensor | Shared) -> tf.Tensor:
    """A weight of each task's own, [T, ...], equal to the shared one where it is shared."""
    if not isinstance(weight, Shared):
        return weight
    shape = sizes(weight.perturbation)
    rows = spread(tf.reshape(weight.value, [1, 1, -1]), shape[0])  # [1, T, size]
    return tf.reshape(rows, shape) + weight.perturbation


def task_gradients(losses: Callable, weights: dict) -> dict[str, tf.Tensor]:
    """The gradient of each task's loss for its own weights, {name: [T, ...]}.

    losses: function of weights to [T]; weights: {name: [T, ...] or Shared}.
    """
    own = {name: w.perturbation if isinstance(w, Shared) else w for name, w in weights.items()}
    with tf.GradientTape() as tape:
        tape.watch(own)
        values = losses(weights)
    return tape.gradient(values, own, unconnected_gradients='zero')


@tf.custom_gradient
def product_shared(rows: tf.Tensor, matrix: tf.Tensor, perturbation: tf.Tensor):
    """rows [T, n, in] times matrix [in, out] + perturbation [T, in, out], which is zero: [T, n,
    out].

    Differentiable by `perturbation` once, and any number of times by the others.
    """
    tasks, n, size = rows.shape
    together, shared = (
        tf.reshape(rows, [1, tasks * n, size]),
        tf.expand_dims(matrix, 0),
    )  # as one task

    def derivative(gradient):
        flat = tf.reshape(gradient, [1, tasks * n, matrix.shape[-1]])
        return (
            tf.reshape(product_transposed(flat, shared), rows.shape),
            product_outer(together, flat)[0],
            product_outer(rows, gradient),
        )

    return tf.reshape(product(together, shared), [tasks, n, matrix.shape[-1]]), derivative


# Patches of images, and pooling -------------------------------------------------------------------


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `size` pixels for a 3-wide 'SAME' window, as TensorFlow
    lays them out.
    """
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def patches3x3(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Every 3x3 neighbourhood of the images, zero-padded at the borders ('SAME').

    x: [T, examples, height, width, channels]. Returns [T, examples, ceil(height/stride),
    ceil(width/stride), 9*channels], each patch ordered as a kernel [3, 3, channels] is: convolution
    is then a product of matrices. Of shifted slices, since `tf.image.extract_patches` does not
    compile reliably inside loops.
    """
    size = x.shape[2:4]

    @tf.custom_gradient
    def gather(x):
        return _patches(_padded(x, stride), stride), lambda gradient: scatter(gradient)

    @tf.custom_gradient
    def scatter(patches):
        return _unpatch(patches, size, stride), lambda gradient: gather(gradient)

    return gather(x)


def _padded(x: tf.Tensor, stride: int) -> tf.Tensor:
    """With zeros around the images, for patches ('SAME')."""
    height, width = (same_padding(size, stride) for size in x.shape[2:4])
    return tf.pad(x, [[0, 0], [0, 0], height, width, [0, 0]])


def _patches(x: tf.Tensor, stride: int, *more) -> tf.Tensor:
    """Every 3x3 neighbourhood within the images: [T, examples, H', W', 9*C + more].

    more: channels [T, examples, H', W', n] that go behind.
    """
    height, width = ((size - 3) // stride * stride + 1 for size in x.shape[2:4])
    if stride == 1:  # three columns first, as copies of longer pieces are faster
        x = tf.concat([x[:, :, :, j : j + width] for j in range(3)], axis=-1)
        return tf.concat([*(x[:, :, i : i + height] for i in range(3)), *more], axis=-1)
    slices = [
        x[:, :, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)
    ]
    return tf.concat([*slices, *more], axis=-1)


def _unpatch(patches: tf.Tensor, size: tuple[int, int], stride: int) -> tf.Tensor:
    """Adds up at every pixel what patches hold of it: [T, examples, H', W', 9*C] -> [T, examples,
    *size, C].

    Pixels are taken by their phase, their position modulo the stride: those of one phase are in the
    same places of the patches, so each phase is a sum of slices.
    """
    channels = patches.shape[4] // 9
    phases = []
    for p in range(stride):
        for q in range(stride):
            phases.append(
                tf.add_n(
                    [
                        _shifted(
                            patches[..., (3 * i + j) * channels : (3 * i + j + 1) * channels],
                            down,
                            right,
                        )
                        for down, i in _taps(p, size[0], stride)
                        for right, j in _taps(q, size[1], stride)
                    ]
                )
            )
    return _interleave(phases, size)


def _taps(phase: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(k' - k, place in the patch) for each patch k' that holds pixel stride*k + phase of an axis
    of `size` pixels.
    """
    before = same_padding(size, stride)[0]
    return [
        ((phase + before - i) // stride, i) for i in range(3) if (phase + before - i) % stride == 0
    ]


def _shifted(x: tf.Tensor, down: int, right: int) -> tf.Tensor:
    """x[:, :, i + down, j + right] at [:, :, i, j], zero where there is none; down and right are
    -1, 0 or 1.
    """
    height, width = x.shape[2:4]
    x = tf.pad(
        x, [[0, 0], [0, 0], [max(-down, 0), max(down, 0)], [max(-right, 0), max(right, 0)], [0, 0]]
    )
    return x[:, :, max(down, 0) : max(down, 0) + height, max(right, 0) : max(right, 0) + width]


def max_pool2x2(x: tf.Tensor) -> tf.Tensor:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped ('VALID').

    x: [T, examples, height, width, channels]. The first of equal maxima (row by row) takes the
    whole gradient, at every order, as in TensorFlow's own pooling.
    """
    size = x.shape[2:4]

    @tf.custom_gradient
    def pool(x):
        a, b, c, d = _quarters(x)
        return tf.maximum(tf.maximum(a, b), tf.maximum(c, d)), lambda gradient: scatter(
            gradient, *_first_maxima(a, b, c, d)
        )

    @tf.custom_gradient
    def scatter(values, *places):  # to where the maxima are, zeros elsewhere
        zeros = tf.zeros_like(values)
        return (
            _interleave([tf.where(place, values, zeros) for place in places], size),
            lambda gradient: (pick(gradient, *places), *[None] * 4),
        )

    @tf.custom_gradient
    def pick(x, *places):  # what is there
        quarters = _quarters(x)
        zeros = tf.zeros_like(quarters[0])
        return (
            tf.add_n([tf.where(place, values, zeros) for place, values in zip(places, quarters)]),
            lambda gradient: (scatter(gradient, *places), *[None] * 4),
        )

    return pool(x)


def _first_maxima(a, b, c, d) -> list[tf.Tensor]:
    """Where each of four tensors is the first that is as large as any."""
    where = [
        (a >= b) & (a >= c) & (a >= d),
        (b > a) & (b >= c) & (b >= d),
        (c > a) & (c > b) & (c >= d),
    ]
    return [*where, ~(where[0] | where[1] | where[2])]


def _quarters(x: tf.Tensor) -> list[tf.Tensor]:
    """The four pixels of each 2x2 window, row by row: [T, examples, height // 2, width // 2,
    channels] each.
    """
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def _interleave(phases: list[tf.Tensor], size: tuple[int, int]) -> tf.Tensor:
    """Images [T, examples, *size, C] from the pixels [T, examples, H, W, C] of each phase, their
    position modulo 1 or 2.

    What is beyond `size` is cut off; pixels that no phase reaches are zero.
    """
    tasks, examples, height, width, channels = sizes(phases[0])
    if (stride := int(len(phases) ** 0.5)) > 1:
        x = tf.reshape(
            tf.stack(phases, axis=-2), [tasks, examples, height, width, stride, stride, channels]
        )
        x = tf.transpose(x, [0, 1, 2, 4, 3, 5, 6])
    else:
        x = phases[0]
    x = tf.reshape(x, [tasks, examples, height * stride, width * stride, channels])[
        :, :, : size[0], : size[1]
    ]
    return tf.pad(x, [[0, 0], [0, 0], [0, size[0] - x.shape[2]], [0, size[1] - x.shape[3]], [0, 0]])


# Sums over examples, and statistics ---------------------------------------------------------------


def divisor_near_root(n: int) -> int:
    """The largest divisor of n that is not above its square root; 1 for 0."""
    return max((i for i in range(1, int(n**0.5) + 1) if n % i == 0), default=1)


@tf.custom_gradient
def sum_rows(x: tf.Tensor):
    """Sum over the rows of each task's matrix: [T, rows, columns] -> [T, 1, columns].

    Products with rows of ones, because XLA's reductions over rows run many times slower on CPUs
    than its matrix products; two of them, over about the square root of the rows each, because a
    product adds up one by one, and the rounding errors of thousands of additions show. Its gradient
    is `spread`, whose gradient is this again, to any order.
    """
    tasks, rows, columns = sizes(x)
    if None in x.shape:
        return tf.reduce_sum(x, axis=1, keepdims=True), lambda gradient: spread(gradient, rows)
    parts = divisor_near_root(rows)
    blocks = tf.reshape(x, [tasks, parts, rows // parts, columns])
    sums = tf.reshape(
        tf.ones([tasks, parts, 1, rows // parts], x.dtype) @ blocks, [tasks, parts, columns]
    )
    return tf.ones([tasks, 1, parts], x.dtype) @ sums, lambda gradient: spread(gradient, rows)


def spread(x: tf.Tensor, rows: int) -> tf.Tensor:
    """The same row for all of a task's examples: [T, 1, columns] -> [T, rows, columns].

    What broadcasting does, but with `sum_rows` as its gradient.
    """

    @tf.custom_gradient
    def repeat(x):
        tasks, _, columns = sizes(x)
        return tf.broadcast_to(x, [tasks, rows, columns]), sum_rows

    return repeat(x)


@tf.custom_gradient
def moments(rows: tf.Tensor):
    """Mean and biased variance of each column: [T, n, columns] -> two of [T, 1, columns].

    `tf.nn.moments` stops the gradient of the mean inside the variance: right at first order,
    silently wrong at second.
    """
    n = sizes(rows)[1]
    count = number(n, rows)
    mean = sum_rows(rows) / count
    variance = sum_rows(tf.square(rows - spread(mean, n))) / count

    @tf.custom_gradient
    def pull_back(rows, of_mean, of_variance):  # gradients of [T, 1, columns] back to the rows
        def derivative(gradient):
            centred = gradient - spread(sum_rows(gradient) / count, n)
            # Any constant may be taken from the rows; with the mean, rounding loses the least.
            along = sum_rows((rows - spread(tf.stop_gradient(mean), n)) * centred)
            of_rows = 2 / count * spread(of_variance, n) * centred
            return of_rows, sum_rows(gradient) / count, 2 / count * along

        centred = rows - spread(mean, n)
        pulled = spread(of_mean / count, n) + spread(2 / count * of_variance, n) * centred
        return pulled, derivative

    return (mean, variance), lambda of_mean, of_variance: pull_back(rows, of_mean, of_variance)


@tf.custom_gradient
def standardize(rows: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor):
    """(rows - mean) * scale + offset; rows [T, n, columns], the others [T, 1, columns]."""
    n, constant = sizes(rows)[1], tf.stop_gradient(mean)

    def derivative(gradient):
        total = sum_rows(gradient)
        # The second term is zero, and so spares the derivative of the first a sum over the rows.
        by_scale = sum_rows(gradient * (rows - spread(constant, n))) - (mean - constant) * total
        return gradient * spread(scale, n), -scale * total, by_scale, total

    return (rows - spread(mean, n)) * spread(scale, n) + spread(offset, n), derivative


# Layers -------------------------------------------------------------------------------------------

# A weight is [T, ...], or Shared. Of networks, see maml.py.


def multiply(rows: tf.Tensor, matrix: tf.Tensor | Shared) -> tf.Tensor:
    """rows [T, n, in], matrix [T, in, out] -> [T, n, out]."""
    return product_shared(rows, *matrix) if isinstance(matrix, Shared) else product(rows, matrix)


def dense(x: tf.Tensor, matrix: tf.Tensor | Shared, bias: tf.Tensor | Shared) -> tf.Tensor:
    """x [T, examples, in], matrix [T, in, out], bias [T, out] -> [T, examples, out]."""
    return multiply(x, matrix) + tf.expand_dims(per_task(bias), 1)


def convolve(x: tf.Tensor, kernel: tf.Tensor | Shared, stride: int) -> tf.Tensor:
    """3x3 convolution ('SAME') of each task's images by its own kernel, as a product of matrices.

    x [T, examples, height, width, C], kernel [T, 3, 3, C, F] -> [T, examples, ceil(height/stride),
    ceil(width/stride), F]. TensorFlow's own convolution has one kernel for all, so it serves a
    single task, and with a stride its derivatives are slow.
    """
    if x.shape[0] == 1 and stride == 1:
        return convolve_one(x, per_task(kernel))
    return convolve_patches(patches3x3(x, stride), kernel)


@tf.custom_gradient
def convolve_one(x: tf.Tensor, kernel: tf.Tensor):
    """`convolve` with stride 1 of a single task's images, by TensorFlow's own convolution.

    x [1, examples, height, width, C], kernel [1, 3, 3, C, F] -> [1, examples, height, width, F].
    This and `convolve_outer` are the derivatives of one another, so they are exact at any order.
    """
    output = tf.expand_dims(tf.nn.conv2d(x[0], kernel[0], 1, 'SAME'), 0)
    return output, lambda gradient: (
        convolve_one(gradient, turned(kernel)),
        convolve_outer(x, gradient),
    )


@tf.custom_gradient
def convolve_outer(x: tf.Tensor, gradient: tf.Tensor):
    """The derivative of `convolve_one` by its kernel, [1, 3, 3, C, F].

    x and gradient: [1, examples, height, width, C or F]. A product with patches, since XLA's own
    transposes the images so that examples come last: four times the work of the product.
    """
    channels, filters = x.shape[-1], gradient.shape[-1]
    patches = tf.reshape(_patches(_padded(x, 1), 1), [1, -1, 9 * channels])  # [1, rows, 9C]
    outer = product_outer(patches, tf.reshape(gradient, [1, -1, filters]))  # [1, 9C, F]
    return tf.reshape(outer, [1, 3, 3, channels, filters]), lambda kernel: (
        convolve_one(gradient, turned(kernel)),
        convolve_one(x, kernel),
    )


def turned(kernel: tf.Tensor) -> tf.Tensor:
    """[T, 3, 3, C, F] -> [T, 3, 3, F, C]: the kernel that leads from outputs back to inputs."""
    return tf.transpose(kernel[:, ::-1, ::-1], [0, 1, 2, 4, 3])


def convolve_patches(patches: tf.Tensor, kernel: tf.Tensor | Shared) -> tf.Tensor:
    """Each task's patches by its kernel.

    patches [T, examples, H, W, 9*C], kernel [T, 3, 3, C, F] -> [T, examples, H, W, F].
    """
    tasks, examples, height, width, size = sizes(patches)
    rows = tf.reshape(patches, [tasks, examples * height * width, size])  # [T, rows, 9C]
    if isinstance(kernel, Shared):
        value, perturbation = kernel
        filters = value.shape[-1]
        matrix = Shared(
            tf.reshape(value, [size, filters]),  # [9C, F]
            tf.reshape(perturbation, [*perturbation.shape[:1], size, filters]),  # [T, 9C, F]
        )
    else:
        matrix = tf.reshape(kernel, [tasks, size, kernel.shape[-1]])  # [T, 9C, F]
    output = multiply(rows, matrix)
    return tf.reshape(output, [tasks, examples, height, width, output.shape[-1]])


class NormalizedPatches(NamedTuple):
    """Patches of the input images, ready for `convolve_normalized`."""

    # [T, examples, H, W, 9*C + 1], the task's mean pixel taken away, and a last channel of ones
    patches: tf.Tensor
    # [T, 1, 9*C], what borders and rounding left of the mean
    mean: tf.Tensor
    # [T, 9*C, 9*C], float64: neighbouring pixels are so alike that it is nearly singular
    covariance: tf.Tensor


def normalized_patches(
    images: tf.Tensor, stride: int, leading: int | tf.Tensor | None = None
) -> NormalizedPatches:
    """images: [T, examples, height, width, C]; leading: see `batch_norm`.

    Patches with a channel of ones, times themselves: sums, and sums of products. In pieces of the
    rows, which are added up in float64. For the rounding the task's mean pixel is taken away, from
    the zeros around the images, too, so that every patch loses the same.
    """
    tasks, examples, channels = sizes(images)[0], sizes(images)[1], images.shape[-1]
    height, width = (-(-size // stride) for size in images.shape[2:4])
    given = tf.reshape(images[:, :leading], [tasks, -1, channels])
    mean = sum_rows(given) / number(sizes(given)[1], images)  # [T, 1, C]
    centred = _padded(images, stride) - mean[:, :, tf.newaxis, tf.newaxis]
    ones = tf.ones([tasks, examples, height, width, 1], images.dtype)
    patches = _patches(centred, stride, ones)  # [T, examples, H', W', 9C + 1]
    count = (examples if leading is None else leading) * height * width  # of rows with a say
    pieces = divisor_near_root(count) if isinstance(count, int) else count // width
    pieces = tf.reshape(patches[:, :leading], [tasks, pieces, -1, patches.shape[-1]])
    products = tf.matmul(pieces, pieces, transpose_a=True)  # [T, pieces, 9C + 1, 9C + 1]
    means = tf.reduce_sum(tf.cast(products, tf.float64), axis=1) / tf.cast(count, tf.float64)
    mean = means[:, -1:, :-1]  # [T, 1, 9C]
    covariance = means[:, :-1, :-1] - tf.matmul(mean, mean, transpose_a=True)
    return NormalizedPatches(patches, tf.cast(mean, images.dtype), covariance)


def convolve_normalized(
    x: NormalizedPatches, kernel: tf.Tensor | Shared, beta: tf.Tensor
) -> tf.Tensor:
    """Convolution and batch normalisation of the input images, as one matrix product: [T, examples,
    H, W, F].

    kernel: [T, 3, 3, C, F]; beta: [F]. The output before normalisation is patches P times kernel k,
    so its variance is k^T cov(P) k, and cov(P) does not change while the weights do: no statistics
    of the large output are needed.
    """
    kernel = per_task(kernel)
    tasks, filters = sizes(kernel)[0], kernel.shape[-1]
    matrix = tf.reshape(kernel, [tasks, -1, filters])  # [T, 9C, F]
    exact = tf.cast(matrix, tf.float64)
    variance = tf.reduce_sum(exact * (x.covariance @ exact), axis=1, keepdims=True)  # [T, 1, F]
    scaled = tf.cast(exact * tf.math.rsqrt(variance + BATCH_NORM_EPSILON), kernel.dtype)
    return convolve_patches(x.patches, tf.concat([scaled, beta - x.mean @ scaled], axis=1))


# Normalisation ------------------------------------------------------------------------------------


def batch_moments(x: tf.Tensor, leading: int | tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance per channel, [T, 1, channels] each; arguments as of `batch_norm`."""
    if leading is not None:  # in a loop XLA has no second derivative of a slice, even of all
        x = x[:, :leading]
    return moments(tf.reshape(x, [sizes(x)[0], -1, x.shape[-1]]))


def batch_norm(
    x: tf.Tensor, beta: tf.Tensor, leading: int | tf.Tensor | None = None, max_pool: bool = False
) -> tf.Tensor:
    """Batch normalisation per channel, over examples and space, then pooling if asked.

    The statistics are always those of the batch at hand, the variance the biased one; there is an
    offset but no gain. Not with `tf.nn.moments`, whose second derivatives are silently wrong, see
    `moments`.

    x: [T, examples, ..., channels]; beta: [channels], the same for all tasks and inner steps;
    leading: how many of the examples, from the first on, give the statistics (None: all).
    """
    tasks, channels = sizes(x)[0], x.shape[-1]
    mean, variance = batch_moments(x, leading)
    # Without a gain larger stays larger: pooling first gives the same, for less work, and equal
    # inputs stay equal.
    x = max_pool2x2(x) if max_pool else x
    scale = tf.math.rsqrt(variance + BATCH_NORM_EPSILON)
    offset = tf.broadcast_to(beta, [tasks, 1, channels])
    rows = standardize(tf.reshape(x, [tasks, -1, channels]), mean, scale, offset)
    return tf.reshape(rows, sizes(x))


def layer_norm(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """Layer normalisation per example over all its axes; gain and offset over the last one.

    x: [T, examples, ..., channels]; beta, gamma: [channels].
    """
    size = int(np.prod(x.shape[2:]))
    values = tf.reshape(x, [-1, size, 1])  # [T*examples, size, 1]
    centred = values - spread(sum_rows(values) / size, size)
    variance = sum_rows(tf.square(centred)) / size  # [T*examples, 1, 1]
    standard = centred * spread(tf.math.rsqrt(variance + LAYER_NORM_EPSILON), size)
    return tf.reshape(standard, sizes(x)) * gamma + beta


class Normalization:
    """What follows the layers of a network; what networks take as `norm`, the user's own too.

    A normalisation of your own says which parameters it has and what it makes of a layer's output,
    see `LayerNorm` below. `tf.nn.moments` is wrong at second order: take means, or `moments`.
    """

    removes_mean = False  # of each channel: a bias added before would change nothing but rounding

    def parameters(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (kind of initial value, shape)} of one layer's; see maml.initial_value."""
        return {}

    def normalize(
        self, x: tf.Tensor, parameters: dict, leading: int | tf.Tensor | None = None
    ) -> tf.Tensor:
        """x normalised, of the same shape [T, examples, ..., channels].

        parameters: {name: tensor}; leading: how many of the examples, from the first on, give the
        statistics (None: all).
        """
        return x

    def __call__(
        self,
        x: tf.Tensor,
        parameters: dict,
        leading: int | tf.Tensor | None = None,
        max_pool: bool = False,
    ) -> tf.Tensor:
        """`normalize`, then 2x2 max-pooling of [T, examples, height, width, channels] if asked."""
        x = self.normalize(x, parameters, leading)
        return max_pool2x2(x) if max_pool else x


class BatchNorm(Normalization):
    """See `batch_norm`."""

    removes_mean = True

    def parameters(self, channels: int) -> dict:
        return {'beta': ('zeros', (channels,))}

    def __call__(self, x, parameters, leading=None, max_pool=False) -> tf.Tensor:
        return batch_norm(x, parameters['beta'], leading, max_pool)


class LayerNorm(Normalization):
    """See `layer_norm`."""

    def parameters(self, channels: int) -> dict:
        return {'beta': ('zeros', (channels,)), 'gamma': ('ones', (channels,))}

    def normalize(self, x, parameters, leading=None) -> tf.Tensor:
        return layer_norm(x, parameters['beta'], parameters['gamma'])


NORMALIZATIONS = {'batch_norm': BatchNorm, 'layer_norm': LayerNorm, 'None': Normalization}


def normalization(norm: str | Normalization) -> Normalization:
    """A normalisation by its name, or the one that is given. Raises ValueError."""
    if isinstance(norm, Normalization):
        return norm
    if norm not in NORMALIZATIONS:
        names = ', '.join(map(repr, NORMALIZATIONS))
        raise ValueError(f'norm must be one of {names}, or a Normalization, but it is {norm!r}')
    return NORMALIZATIONS[norm]()


# TensorFlow's own functions, for as long as something is traced -----------------------------------
