"""Layers whose weights differ from task to task, differentiable any number of times.

After the first inner step every task of a meta-batch has weights of its own. TensorFlow has no
convolution with a batch of kernels, and `tf.map_fn` and `tf.vectorized_map` fall back to a loop
over tasks there. Here a convolution is a gather of patches followed by one batched matrix product,
and pooling is a maximum of four slices; their derivatives are written by hand, exact at every
order. Layers and normalisations are made of these.

Every tensor has a leading task axis T; "examples" is the number of examples of one task. Both may
be unknown when a function is traced; sizes of images and layers may not.
"""

import numpy as np
import tensorflow as tf

BATCH_NORM_EPSILON = 1e-3  # of tf.contrib.layers.batch_norm, which the original used
LAYER_NORM_EPSILON = 1e-12  # of tf.contrib.layers.layer_norm
FEW_ROWS = 16  # up to so many, sums of products of numbers beat products of matrices on CPUs


# Lengths of axes ----------------------------------------------------------------------------------


def sizes(x: tf.Tensor) -> list:
    """Returns the lengths of x's axes: numbers where a trace knows them, else tensors []."""
    if x.shape.is_fully_defined():
        return x.shape.as_list()
    lengths = tf.unstack(tf.shape(x), x.shape.rank)
    return [length if known is None else known for known, length in zip(x.shape, lengths)]


def number(n: int | tf.Tensor, like: tf.Tensor) -> int | tf.Tensor:
    """Returns a length in a form by which tensors like `like` may be divided."""
    return n if isinstance(n, int) else tf.cast(n, like.dtype)


# Products of matrices -----------------------------------------------------------------------------


@tf.custom_gradient
def product(rows: tf.Tensor, matrix: tf.Tensor):
    """Multiplies rows [T, n, in] by matrix [T, in, out]: [T, n, out].

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
    """Multiplies rows [T, n, out] by the transpose of matrix [T, in, out]: [T, n, in]."""
    return (
        tf.matmul(rows, matrix, transpose_b=True),
        lambda gradient: (product(gradient, matrix), product_outer(gradient, rows)),
    )


@tf.custom_gradient
def product_outer(left: tf.Tensor, right: tf.Tensor):
    """Multiplies the transpose of left [T, n, in] by right [T, n, out]: [T, in, out].

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


# Patches of images, and pooling -------------------------------------------------------------------


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Returns TensorFlow's zeros before and after `size` pixels for a 3-wide 'SAME' window."""
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def patches3x3(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Gathers every 3x3 neighbourhood of the images, zero-padded at the borders ('SAME').

    x: [T, examples, height, width, channels]. Returns [T, examples, ceil(height/stride),
    ceil(width/stride), 9*channels], each patch ordered as a kernel [3, 3, channels] is: convolution
    is then a product of matrices. The patches are made of shifted slices, since
    `tf.image.extract_patches` does not compile reliably inside loops.
    """
    size = x.shape[2:4]

    @tf.custom_gradient
    def gather(x):
        return gather_patches(padded(x, stride), stride), lambda gradient: scatter(gradient)

    @tf.custom_gradient
    def scatter(patches):
        return _unpatch(patches, size, stride), lambda gradient: gather(gradient)

    return gather(x)


def padded(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Pads images with zeros for patches ('SAME'): [T, examples, H, W, C] to [..., H', W', C]."""
    height, width = (same_padding(size, stride) for size in x.shape[2:4])
    return tf.pad(x, [[0, 0], [0, 0], height, width, [0, 0]])


def gather_patches(x: tf.Tensor, stride: int, *more) -> tf.Tensor:
    """Gathers every 3x3 neighbourhood within the images: [T, examples, H', W', 9*C + more].

    more: channels [T, examples, H', W', n] that are appended.
    """
    height, width = ((size - 3) // stride * stride + 1 for size in x.shape[2:4])
    if stride == 1:  # three columns first, as copies of longer pieces are faster
        x = gather_columns(x)
        return tf.concat([*(x[:, :, i : i + height] for i in range(3)), *more], axis=-1)
    slices = [
        x[:, :, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)
    ]
    return tf.concat([*slices, *more], axis=-1)


def gather_columns(x: tf.Tensor) -> tf.Tensor:
    """Gathers every three neighbouring columns: [T, examples, H, W, C] to [..., W - 2, 3*C]."""
    return tf.concat([x[:, :, :, j : j + x.shape[3] - 2] for j in range(3)], axis=-1)


def _unpatch(patches: tf.Tensor, size: tuple[int, int], stride: int) -> tf.Tensor:
    """Adds up patches at every pixel: [T, examples, H', W', 9*C] -> [T, examples, *size, C].

    Pixels are taken by their phase, their position modulo the stride: those of one phase are in the
    same places of the patches, so each phase is a sum of slices.
    """
    channels, phases = patches.shape[4] // 9, []
    for p in range(stride):
        for q in range(stride):
            terms = []
            for down, i in _taps(p, size[0], stride):
                for right, j in _taps(q, size[1], stride):
                    first = (3 * i + j) * channels
                    terms.append(_shifted(patches[..., first : first + channels], down, right))
            phases.append(tf.add_n(terms))
    return _interleave(phases, size)


def _taps(phase: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Lists (k' - k, place in the patch) for each patch k' that holds pixel stride*k + phase.

    size: the length of the axis in pixels.
    """
    before = same_padding(size, stride)[0]
    offsets = ((phase + before - i, i) for i in range(3))
    return [(offset // stride, i) for offset, i in offsets if offset % stride == 0]


def _shifted(x: tf.Tensor, down: int, right: int) -> tf.Tensor:
    """Shifts images: [:, :, i, j] becomes x[:, :, i + down, j + right], zero where there is none.

    down, right: -1, 0 or 1.
    """
    height, width = x.shape[2:4]
    vertical, horizontal = ([max(-n, 0), max(n, 0)] for n in (down, right))
    x = tf.pad(x, [[0, 0], [0, 0], vertical, horizontal, [0, 0]])
    return x[:, :, vertical[1] : vertical[1] + height, horizontal[1] : horizontal[1] + width]


def max_pool2x2(x: tf.Tensor) -> tf.Tensor:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped ('VALID').

    x: [T, examples, height, width, channels]. The first of equal maxima (row by row) takes the
    whole gradient, at every order, as in TensorFlow's own pooling.
    """
    size = x.shape[2:4]

    @tf.custom_gradient
    def pool(x):
        a, b, c, d = _quarters(x)
        places = _first_maxima(a, b, c, d)
        maxima = tf.maximum(tf.maximum(a, b), tf.maximum(c, d))
        return maxima, lambda gradient: scatter(gradient, *places)

    @tf.custom_gradient
    def scatter(values, *places):  # to where the maxima are, zeros elsewhere
        zeros = tf.zeros_like(values)
        image = _interleave([tf.where(place, values, zeros) for place in places], size)
        return image, lambda gradient: (pick(gradient, *places), *[None] * 4)

    @tf.custom_gradient
    def pick(x, *places):  # the values at the maxima
        quarters = _quarters(x)
        zeros = tf.zeros_like(quarters[0])
        terms = [tf.where(place, values, zeros) for place, values in zip(places, quarters)]
        return tf.add_n(terms), lambda gradient: (scatter(gradient, *places), *[None] * 4)

    return pool(x)


def _first_maxima(a, b, c, d) -> list[tf.Tensor]:
    """Tells where each of four tensors is the first that is as large as any."""
    first, second = (a >= b) & (a >= c) & (a >= d), (b > a) & (b >= c) & (b >= d)
    third = (c > a) & (c > b) & (c >= d)
    return [first, second, third, ~(first | second | third)]


def _quarters(x: tf.Tensor) -> list[tf.Tensor]:
    """Splits 2x2 windows into their four pixels: [T, examples, H // 2, W // 2, C] each, row by row.

    H, W: the height and width of the images.
    """
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def _interleave(phases: list[tf.Tensor], size: tuple[int, int]) -> tf.Tensor:
    """Builds images [T, examples, *size, C] from the pixels [T, examples, H, W, C] of each phase.

    A phase is a position modulo 1 or 2. Pixels beyond `size` are cut off; pixels that no phase
    reaches are zero.
    """
    tasks, examples, height, width, channels = sizes(phases[0])
    x, stride = phases[0], int(len(phases) ** 0.5)
    if stride > 1:
        x = tf.stack(phases, axis=-2)
        x = tf.reshape(x, [tasks, examples, height, width, stride, stride, channels])
        x = tf.transpose(x, [0, 1, 2, 4, 3, 5, 6])
    x = tf.reshape(x, [tasks, examples, height * stride, width * stride, channels])
    x = x[:, :, : size[0], : size[1]]
    return tf.pad(x, [[0, 0], [0, 0], [0, size[0] - x.shape[2]], [0, size[1] - x.shape[3]], [0, 0]])


# Sums over examples, and statistics ---------------------------------------------------------------


def divisor_near_root(n: int) -> int:
    """Returns the largest divisor of n that is not above its square root; 1 for 0."""
    return max((i for i in range(1, int(n**0.5) + 1) if n % i == 0), default=1)


@tf.custom_gradient
def sum_rows(x: tf.Tensor):
    """Sums over the rows of each task's matrix: [T, rows, columns] -> [T, 1, columns].

    It multiplies by rows of ones, because XLA's reductions over rows run many times slower on CPUs
    than its matrix products. It does so twice, over about the square root of the rows each, because
    a product adds up one by one, and the rounding errors of thousands of additions show. Its
    gradient is `spread`, whose gradient is this again, to any order.
    """
    tasks, rows, columns = sizes(x)
    if None in x.shape:
        return tf.reduce_sum(x, axis=1, keepdims=True), lambda gradient: spread(gradient, rows)
    parts = divisor_near_root(rows)
    blocks = tf.reshape(x, [tasks, parts, rows // parts, columns])
    ones = tf.ones([tasks, parts, 1, rows // parts], x.dtype)
    sums = tf.reshape(ones @ blocks, [tasks, parts, columns])
    return tf.ones([tasks, 1, parts], x.dtype) @ sums, lambda gradient: spread(gradient, rows)


def spread(x: tf.Tensor, rows: int) -> tf.Tensor:
    """Repeats a row for all of a task's examples: [T, 1, columns] -> [T, rows, columns].

    Broadcasting does the same, but here the gradient is `sum_rows`.
    """

    @tf.custom_gradient
    def repeat(x):
        tasks, _, columns = sizes(x)
        return tf.broadcast_to(x, [tasks, rows, columns]), sum_rows

    return repeat(x)


@tf.custom_gradient
def moments(rows: tf.Tensor):
    """Computes mean and biased variance of each column: [T, n, columns] -> two of [T, 1, columns].

    `tf.nn.moments` stops the gradient of the mean inside the variance, which is right at first
    order but silently wrong at second.
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
    """Computes (rows - mean) * scale + offset; rows [T, n, columns], the others [T, 1, columns]."""
    n, constant = sizes(rows)[1], tf.stop_gradient(mean)

    def derivative(gradient):
        total = sum_rows(gradient)
        # The second term is zero, and so spares the derivative of the first a sum over the rows.
        by_scale = sum_rows(gradient * (rows - spread(constant, n))) - (mean - constant) * total
        return gradient * spread(scale, n), -scale * total, by_scale, total

    return (rows - spread(mean, n)) * spread(scale, n) + spread(offset, n), derivative


# Layers -------------------------------------------------------------------------------------------

# A weight is [T, ...], or what tasks share: then it has the methods that are called here, see
# fewshot.engine.shared.


def per_task(weight) -> tf.Tensor:
    """Returns a weight as each task's own, [T, ...]."""
    return weight.per_task() if hasattr(weight, 'per_task') else weight


def multiply(rows: tf.Tensor, matrix) -> tf.Tensor:
    """Multiplies rows [T, n, in] by matrix [T, in, out]: [T, n, out]."""
    return matrix.multiply(rows) if hasattr(matrix, 'multiply') else product(rows, matrix)


def dense(x: tf.Tensor, matrix, bias) -> tf.Tensor:
    """Applies an affine layer: [T, examples, in], [T, in, out], [T, out] -> [T, examples, out]."""
    return multiply(x, matrix) + tf.expand_dims(per_task(bias), 1)


def convolve(x: tf.Tensor, kernel, stride: int) -> tf.Tensor:
    """Convolves each task's images with its own 3x3 kernel ('SAME'), as a product of matrices.

    x [T, examples, height, width, C], kernel [T, 3, 3, C, F] -> [T, examples, ceil(height/stride),
    ceil(width/stride), F]. TensorFlow's own convolution has one kernel for all, so it serves a
    single task, and with a stride its derivatives are slow.
    """
    if x.shape[0] == 1 and stride == 1:
        return convolve_one(x, per_task(kernel))
    return convolve_patches(patches3x3(x, stride), kernel)


@tf.custom_gradient
def convolve_one(x: tf.Tensor, kernel: tf.Tensor):
    """Convolves a single task's images with stride 1, by TensorFlow's own convolution.

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
    """Computes the derivative of `convolve_one` by its kernel, [1, 3, 3, C, F].

    x and gradient: [1, examples, height, width, C or F]. It is a product, as XLA's own transposes
    the images so that examples come last: four times the work. Columns are shifted on the side of
    x, and rows on that of the gradient, which copies half of what patches would.
    """
    channels, filters = x.shape[-1], gradient.shape[-1]
    columns = gather_columns(padded(x, 1))  # [1, examples, height + 2, width, 3C]
    shifts = [[[0, 0], [0, 0], [i, 2 - i], [0, 0], [0, 0]] for i in range(3)]
    rows = tf.concat([tf.pad(gradient, shift) for shift in shifts], axis=-1)  # [..., width, 3F]
    left, right = (tf.reshape(y, [1, -1, y.shape[-1]]) for y in (columns, rows))
    outer = product_outer(left, right)  # [1, 3C, 3F]
    outer = tf.transpose(tf.reshape(outer, [1, 3, channels, 3, filters]), [0, 3, 1, 2, 4])
    return outer, lambda kernel: (
        convolve_one(gradient, turned(kernel)),
        convolve_one(x, kernel),
    )


def turned(kernel: tf.Tensor) -> tf.Tensor:
    """Returns the kernel that leads from outputs to inputs: [T, 3, 3, C, F] -> [T, 3, 3, F, C]."""
    return tf.transpose(kernel[:, ::-1, ::-1], [0, 1, 2, 4, 3])


def convolve_patches(patches: tf.Tensor, kernel) -> tf.Tensor:
    """Multiplies each task's patches by its kernel.

    patches [T, examples, H, W, 9*C], kernel [T, 3, 3, C, F] -> [T, examples, H, W, F].
    """
    tasks, examples, height, width, size = sizes(patches)
    rows = tf.reshape(patches, [tasks, examples * height * width, size])  # [T, rows, 9C]
    if hasattr(kernel, 'reshaped'):
        matrix = kernel.reshaped([size, -1])
    else:
        matrix = tf.reshape(kernel, [tasks, size, kernel.shape[-1]])  # [T, 9C, F]
    output = multiply(rows, matrix)
    return tf.reshape(output, [tasks, examples, height, width, output.shape[-1]])


# Normalisation ------------------------------------------------------------------------------------


def batch_moments(x: tf.Tensor, leading: int | tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes each channel's mean and variance, [T, 1, channels]; arguments as in `batch_norm`."""
    if leading is not None:  # in a loop XLA has no second derivative of a slice, even of all
        x = x[:, :leading]
    return moments(tf.reshape(x, [sizes(x)[0], -1, x.shape[-1]]))


def batch_norm(
    x: tf.Tensor, beta: tf.Tensor, leading: int | tf.Tensor | None = None, max_pool: bool = False
) -> tf.Tensor:
    """Applies batch normalisation per channel, over examples and space, then pooling if asked.

    The statistics are those of the batch at hand, see `moments`; there is an offset but no gain.

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
    """Applies layer normalisation per example, over all its axes; gain and offset are per channel.

    x: [T, examples, ..., channels]; beta, gamma: [channels].
    """
    size = int(np.prod(x.shape[2:]))
    values = tf.reshape(x, [-1, size, 1])  # [T*examples, size, 1]
    centred = values - spread(sum_rows(values) / size, size)
    variance = sum_rows(tf.square(centred)) / size  # [T*examples, 1, 1]
    standard = centred * spread(tf.math.rsqrt(variance + LAYER_NORM_EPSILON), size)
    return tf.reshape(standard, sizes(x)) * gamma + beta
