"""Layers whose weights differ from task to task, differentiable any number of times.

After the first inner step every task of a meta-batch has weights of its own. TensorFlow has no convolution with a
batch of kernels, and `tf.map_fn` and `tf.vectorized_map` fall back to a loop over tasks there. Here a convolution is
a gather of patches followed by one batched matrix product, which has exact derivatives of every order, and pooling is
a maximum of four slices. Every tensor has a leading task axis T.
"""
import tensorflow as tf


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `size` pixels for a 3-wide 'SAME' window, as TensorFlow lays them out."""
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def patches3x3(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Every 3x3 neighbourhood of the images, zero-padded at the borders ('SAME').

    x: [T, examples, height, width, channels]. Returns [T, examples, ceil(height/stride), ceil(width/stride),
    9*channels], each patch ordered as a kernel [3, 3, channels] is: convolution is then a product of matrices. Nine shifted slices, since
    `tf.image.extract_patches` does not compile reliably inside loops.
    """
    height, width = x.shape[2], x.shape[3]
    rows, columns = -(-height // stride), -(-width // stride)
    x = tf.pad(x, [[0, 0], [0, 0], same_padding(height, stride), same_padding(width, stride), [0, 0]])
    bottom, right = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    return tf.concat([x[:, :, i:i + bottom:stride, j:j + right:stride] for i in range(3) for j in range(3)], axis=-1)


def max_pool2x2(x: tf.Tensor) -> tf.Tensor:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped ('VALID').

    x: [T, examples, height, width, channels]. The first of equal maxima (row by row) takes the whole gradient, at
    every order, as in TensorFlow's own pooling: `tf.maximum` passes the gradient of a tie to its first argument.
    """
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    a, b, c, d = (x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    return tf.maximum(tf.maximum(a, b), tf.maximum(c, d))


@tf.custom_gradient
def sum_rows(x: tf.Tensor):
    """Sum over the rows of each task's matrix: [T, rows, columns] -> [T, 1, columns].

    Products with rows of ones, because XLA's reductions over rows run many times slower on CPUs than its matrix
    products; two of them, over about the square root of the rows each, because a product adds up one by one, and the
    rounding errors of thousands of additions show. Its gradient is `spread`, whose gradient is this again, to any order.
    """
    tasks, rows, columns = x.shape
    parts = max((n for n in range(1, int(rows ** 0.5) + 1) if rows % n == 0), default=1)   # of 0 rows too
    folded = tf.reshape(x, [tasks, rows // parts, parts * columns])                  # row r + parts*s at [s, r]
    sums = tf.reshape(tf.ones([tasks, 1, rows // parts], x.dtype) @ folded, [tasks, parts, columns])
    return tf.ones([tasks, 1, parts], x.dtype) @ sums, lambda gradient: spread(gradient, rows)


def spread(x: tf.Tensor, rows: int) -> tf.Tensor:
    """The same row for all of a task's examples: [T, 1, columns] -> [T, rows, columns].

    What broadcasting does, but with `sum_rows` as its gradient.
    """
    @tf.custom_gradient
    def repeat(x):
        return tf.broadcast_to(x, [x.shape[0], rows, x.shape[2]]), sum_rows
    return repeat(x)
