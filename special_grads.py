"""Layers whose weights differ from task to task, differentiable any number of times.

After the first inner step every task of a meta-batch has weights of its own. TensorFlow has no convolution with a
batch of kernels, and `tf.map_fn` and `tf.vectorized_map` fall back to a loop over tasks there. Here a convolution is
a gather of patches followed by one batched matrix product, which has exact derivatives of every order, and pooling is
a maximum of four slices. Every tensor has a leading task axis T. Numbers of tasks and examples may be unknown when a
function is traced, then some sums are taken in plainer ways; sizes of images and layers may not.
"""

from typing import NamedTuple

import tensorflow as tf

FEW_ROWS = 16  # up to so many, sums of products of numbers beat products of matrices on CPUs


def sizes(x: tf.Tensor) -> list:
    """The lengths of its axes: numbers where they are known when a function is traced, else scalar tensors."""
    if x.shape.is_fully_defined():
        return x.shape.as_list()
    return [
        known if known is not None else length
        for known, length in zip(x.shape, tf.unstack(tf.shape(x), x.shape.rank))
    ]


def number(n: int | tf.Tensor, like: tf.Tensor) -> int | tf.Tensor:
    """A length as something that tensors like `like` may be divided by."""
    return n if isinstance(n, int) else tf.cast(n, like.dtype)


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `size` pixels for a 3-wide 'SAME' window, as TensorFlow lays them out."""
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


@tf.custom_gradient
def product(rows: tf.Tensor, matrix: tf.Tensor):
    """rows [T, n, in] times matrix [T, in, out]: [T, n, out].

    `product`, `product_transposed` and `product_outer` are the derivatives of one another, so they are exact at any
    order. TensorFlow's own derivative of a product takes rows^T @ gradient, the slowest form on CPUs by far.
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
        outer = tf.linalg.matrix_transpose(tf.matmul(right, left, transpose_a=True))
    return outer, lambda gradient: (product_transposed(right, gradient), product(left, gradient))


class Shared(NamedTuple):
    """A weight that all tasks have in common, before the first inner update, and a place for each task's gradient.

    The tasks then make up one product of matrices, and the gradient of the weight is at once the sum over tasks that
    the outer loop needs. The inner loop, which needs them one by one, finds them at `perturbation`, which is zero.
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


@tf.custom_gradient
def product_shared(rows: tf.Tensor, matrix: tf.Tensor, perturbation: tf.Tensor):
    """rows [T, n, in] times matrix [in, out] + perturbation [T, in, out], which is zero: [T, n, out].

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


def patches3x3(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Every 3x3 neighbourhood of the images, zero-padded at the borders ('SAME').

    x: [T, examples, height, width, channels]. Returns [T, examples, ceil(height/stride), ceil(width/stride),
    9*channels], each patch ordered as a kernel [3, 3, channels] is: convolution is then a product of matrices. Nine
    shifted slices, since `tf.image.extract_patches` does not compile reliably inside loops.
    """
    size = x.shape[2:4]

    @tf.custom_gradient
    def gather(x):
        return _patches(x, stride), lambda gradient: scatter(gradient)

    @tf.custom_gradient
    def scatter(patches):
        return _unpatch(patches, size, stride), lambda gradient: gather(gradient)

    return gather(x)


def _patches(x: tf.Tensor, stride: int) -> tf.Tensor:
    height, width = x.shape[2:4]
    rows, columns = -(-height // stride), -(-width // stride)
    x = tf.pad(
        x, [[0, 0], [0, 0], same_padding(height, stride), same_padding(width, stride), [0, 0]]
    )
    bottom, right = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    return tf.concat(
        [
            x[:, :, i : i + bottom : stride, j : j + right : stride]
            for i in range(3)
            for j in range(3)
        ],
        axis=-1,
    )


def _unpatch(patches: tf.Tensor, size: tuple[int, int], stride: int) -> tf.Tensor:
    """Adds up at every pixel what patches hold of it: [T, examples, H', W', 9*C] -> [T, examples, *size, C].

    Pixels are taken by their phase, their position modulo the stride: those of one phase are in the same places of
    the patches, so each phase is a sum of slices.
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
    """(k' - k, place in the patch) for each patch k' that holds pixel stride*k + phase of an axis of `size` pixels."""
    before = same_padding(size, stride)[0]
    return [
        ((phase + before - i) // stride, i) for i in range(3) if (phase + before - i) % stride == 0
    ]


def _shifted(x: tf.Tensor, down: int, right: int) -> tf.Tensor:
    """x[:, :, i + down, j + right] at [:, :, i, j], zero where there is none; down and right are -1, 0 or 1."""
    height, width = x.shape[2:4]
    x = tf.pad(
        x, [[0, 0], [0, 0], [max(-down, 0), max(down, 0)], [max(-right, 0), max(right, 0)], [0, 0]]
    )
    return x[:, :, max(down, 0) : max(down, 0) + height, max(right, 0) : max(right, 0) + width]


def max_pool2x2(x: tf.Tensor) -> tf.Tensor:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped ('VALID').

    x: [T, examples, height, width, channels]. The first of equal maxima (row by row) takes the whole gradient, at
    every order, as in TensorFlow's own pooling.
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
    """The four pixels of each 2x2 window, row by row: [T, examples, height // 2, width // 2, channels] each."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def _interleave(phases: list[tf.Tensor], size: tuple[int, int]) -> tf.Tensor:
    """Images [T, examples, *size, C] from the pixels [T, examples, H, W, C] of each phase, their position modulo 1 or 2.

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


def divisor_near_root(n: int) -> int:
    """The largest divisor of n that is not above its square root; 1 for 0."""
    return max((i for i in range(1, int(n**0.5) + 1) if n % i == 0), default=1)


@tf.custom_gradient
def sum_rows(x: tf.Tensor):
    """Sum over the rows of each task's matrix: [T, rows, columns] -> [T, 1, columns].

    Products with rows of ones, because XLA's reductions over rows run many times slower on CPUs than its matrix
    products; two of them, over about the square root of the rows each, because a product adds up one by one, and the
    rounding errors of thousands of additions show. Its gradient is `spread`, whose gradient is this again, to any order.
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

    `tf.nn.moments` stops the gradient of the mean inside the variance: right at first order, silently wrong at second.
    """
    n = sizes(rows)[1]
    count = number(n, rows)
    mean = sum_rows(rows) / count
    variance = sum_rows(tf.square(rows - spread(mean, n))) / count

    @tf.custom_gradient
    def pull_back(rows, of_mean, of_variance):  # gradients of [T, 1, columns] back to the rows
        def derivative(gradient):
            centred = gradient - spread(sum_rows(gradient) / count, n)
            # Any constant may be taken from the rows here, and with their mean the least is lost to rounding.
            product = sum_rows((rows - spread(tf.stop_gradient(mean), n)) * centred)
            return (
                2 / count * spread(of_variance, n) * centred,
                sum_rows(gradient) / count,
                2 / count * product,
            )

        return spread(of_mean / count, n) + spread(2 / count * of_variance, n) * (
            rows - spread(mean, n)
        ), derivative

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
