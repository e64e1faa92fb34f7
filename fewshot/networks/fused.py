"""The paper's convolutional network, its first layer and batch normalisation as one product."""

from typing import NamedTuple

import tensorflow as tf

from fewshot.networks.paper_networks import BatchNorm, Convolutional
from maml import Leading
from special_grads import (
    BATCH_NORM_EPSILON,
    convolve_patches,
    divisor_near_root,
    gather_patches,
    max_pool2x2,
    number,
    padded,
    per_task,
    sizes,
    sum_rows,
)


def fuse(network):
    """Returns the same network, faster if it is a Convolutional with batch normalisation."""
    fits = type(network) is Convolutional and type(network.norm) is BatchNorm
    return FusedConvolutional(network) if fits else network


class FusedConvolutional(Convolutional):
    """A Convolutional that takes its first layer's statistics from those of the images."""

    def __init__(self, network: Convolutional):
        vars(self).update(vars(network))
        self.plain = network

    def prepare(self, inputs: tf.Tensor, leading: Leading = None):
        """Gathers patches of the images [T, examples, H*W*C]: [T, examples, H', W', 9*C + 1]."""
        images = tf.reshape(inputs, [*sizes(inputs)[:2], *self.image_shape])
        return normalized_patches(images, self.stride, leading)

    def block(self, i: int, x, kernel, bias, norms: dict, leading=None) -> tf.Tensor:
        if i > 1:
            return super().block(i, x, kernel, bias, norms, leading)
        x = convolve_normalized(x, kernel, norms['0/beta'])
        return tf.nn.relu(max_pool2x2(x) if self.max_pool else x)


class NormalizedPatches(NamedTuple):
    """Patches of the input images, ready for `convolve_normalized`."""

    # [T, examples, H, W, 9*C + 1], the task's mean pixel taken away, and a last channel of ones
    patches: tf.Tensor
    # [T, 1, 9*C], what borders and rounding left of the mean
    mean: tf.Tensor
    # [T, 9*C, 9*C], float64: neighbouring pixels are so alike that it is nearly singular
    covariance: tf.Tensor


def normalized_patches(images: tf.Tensor, stride: int, leading: Leading) -> NormalizedPatches:
    """Gathers the patches of images [T, examples, height, width, C]; leading: see `batch_norm`.

    Patches with a channel of ones, times themselves, give sums, and sums of products. They are
    computed in pieces of the rows, which are added up in float64. To keep rounding small, the
    task's mean pixel is taken away, from the zeros around the images, too, so that every patch
    loses the same.
    """
    tasks, examples, channels = sizes(images)[0], sizes(images)[1], images.shape[-1]
    height, width = (-(-size // stride) for size in images.shape[2:4])
    given = tf.reshape(images[:, :leading], [tasks, -1, channels])
    mean = sum_rows(given) / number(sizes(given)[1], images)  # [T, 1, C]
    centred = padded(images, stride) - mean[:, :, tf.newaxis, tf.newaxis]
    ones = tf.ones([tasks, examples, height, width, 1], images.dtype)
    patches = gather_patches(centred, stride, ones)  # [T, examples, H', W', 9C + 1]
    count = (examples if leading is None else leading) * height * width  # of rows with a say
    pieces = divisor_near_root(count) if isinstance(count, int) else count // width
    pieces = tf.reshape(patches[:, :leading], [tasks, pieces, -1, patches.shape[-1]])
    products = tf.matmul(pieces, pieces, transpose_a=True)  # [T, pieces, 9C + 1, 9C + 1]
    means = tf.reduce_sum(tf.cast(products, tf.float64), axis=1) / tf.cast(count, tf.float64)
    mean = means[:, -1:, :-1]  # [T, 1, 9C]
    covariance = means[:, :-1, :-1] - tf.matmul(mean, mean, transpose_a=True)
    return NormalizedPatches(patches, tf.cast(mean, images.dtype), covariance)


def convolve_normalized(x: NormalizedPatches, kernel: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """Convolves and normalises the input images by one matrix product: [T, examples, H, W, F].

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
