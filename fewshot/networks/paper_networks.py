"""The paper's networks: functions of inputs and weights that know nothing of meta-learning.

The task axis is explicit: weights are [T, ...] like the data, since each task has its own after
the first inner update.
"""

import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from fewshot.checks import check_choice
from maml import Leading, Tensors
from special_grads import (
    batch_norm,
    convolve,
    convolve_patches,
    dense,
    layer_norm,
    max_pool2x2,
    patches3x3,
    per_task,
    sizes,
)

# Normalisations -----------------------------------------------------------------------------------


class Normalization:
    """A normalisation after a network's layers: the argument `norm`, also the user's own.

    A normalisation of your own tells which parameters it has and how it changes a layer's output,
    see `LayerNorm` below. `tf.nn.moments` is wrong at second order: take means, or `moments`.
    """

    removes_mean = False  # of each channel: a bias added before would change nothing but rounding

    def parameters(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns {name: (kind of initial value, shape)} for one layer; see `initial_value`."""
        return {}

    def normalize(self, x: tf.Tensor, parameters: dict, leading: Leading = None) -> tf.Tensor:
        """Normalises x to the same shape [T, examples, ..., channels].

        parameters: {name: tensor}; leading: how many of the examples, from the first on, give the
        statistics (None: all).
        """
        return x

    def __call__(self, x, parameters: dict, leading: Leading = None, max_pool=False) -> tf.Tensor:
        """Normalises, then pools [T, examples, height, width, channels] by 2x2 maxima if asked."""
        x = self.normalize(x, parameters, leading)
        return max_pool2x2(x) if max_pool else x


class BatchNorm(Normalization):
    """Batch normalisation, see `batch_norm`."""

    removes_mean = True

    def parameters(self, channels: int) -> dict:
        return {'beta': ('zeros', (channels,))}

    def __call__(self, x, parameters, leading=None, max_pool=False) -> tf.Tensor:
        return batch_norm(x, parameters['beta'], leading, max_pool)


class LayerNorm(Normalization):
    """Layer normalisation, see `layer_norm`."""

    def parameters(self, channels: int) -> dict:
        return {'beta': ('zeros', (channels,)), 'gamma': ('ones', (channels,))}

    def normalize(self, x, parameters, leading=None) -> tf.Tensor:
        return layer_norm(x, parameters['beta'], parameters['gamma'])


NORMALIZATIONS = {'batch_norm': BatchNorm, 'layer_norm': LayerNorm, 'None': Normalization}


def normalization(norm: str | Normalization) -> Normalization:
    """Returns a normalisation by its name, or the one that is given. Raises ValueError."""
    if isinstance(norm, Normalization):
        return norm
    check_choice('norm', norm, NORMALIZATIONS, ', or a Normalization')
    return NORMALIZATIONS[norm]()


# Networks -----------------------------------------------------------------------------------------


def are_sizes(*values) -> bool:
    """Whether the values are whole numbers, at least 1."""
    return all(isinstance(value, int | np.integer) and value >= 1 for value in values)


class Network:
    """The base of the networks here; one of your own needs only the attributes and methods.

    Attributes: parameters and norm_parameters, {name: (kind of initial value, shape)}; the inner
    loop adapts the former, and all tasks have the latter in common; dim_input and dim_output, the
    sizes of an example and of its output, without which there are no checks and no Learner.
    Optional: takes_shared, whether `__call__` of the class that says so takes weights that tasks
    share; compilable, whether XLA can compile it; most_tasks, the most tasks that run together;
    reads_variables, whether `__call__` reads variables; dtype, the only one that it works in;
    layer_names, {name of a parameter: its layer}, and methods `features` and `head`, which together
    are `__call__`, for step sizes per layer and an inner loop of the last one alone; head_names,
    the parameters of the last layer, if it is not that of the last of layer_names.
    """

    def __init__(self, norm: str | Normalization):
        self.norm = normalization(norm)
        self.parameters, self.norm_parameters = {}, {}

    @property
    def layer_names(self) -> dict[str, str]:
        """Returns {name of a parameter: its layer}: w1 and b1, or conv1 and b1, are of layer1."""
        return {name: re.sub(r'^\D+(\d+)$', r'layer\1', name) for name in self.parameters}

    def prepare(self, inputs: tf.Tensor, leading: Leading = None):
        """Computes what no weight enters, of [T, examples, D]: nothing here."""
        return inputs

    def _add_normalization(self, scope: str, channels: int):
        """Adds the parameters of a layer's normalisation, as SCOPE/beta and so on."""
        for name, value in self.norm.parameters(channels).items():
            self.norm_parameters[f'{scope}/{name}'] = value

    def _normalize(self, x, scope: str, norms: Tensors, leading: Leading, max_pool: bool = False):
        """Normalises x, [T, examples, ..., channels], and pools it if asked."""
        prefix = f'{scope}/'
        own = {key.removeprefix(prefix): norms[key] for key in norms if key.startswith(prefix)}
        return self.norm(x, own, leading, max_pool)


class FullyConnected(Network):
    """Affine layers, each but the last followed by normalisation and ReLU.

    norm: 'batch_norm', 'layer_norm', 'None' or a Normalization of your own.
    activation: a function of a tensor instead of ReLU. initial: that of the matrices, see
    `initial_value`; the original's is a normal one of stddev 0.01, with which tanh does not learn.
    Raises ValueError for a layer without units.
    """

    takes_shared = True

    def __init__(
        self,
        dim_input: int,
        dim_hidden: tuple[int, ...],
        dim_output: int,
        norm: str | Normalization = 'None',
        activation: Callable = tf.nn.relu,
        initial: str | Callable = 'truncated',
    ):
        super().__init__(norm)
        self.activation = activation
        units = [dim_input, *(dim_hidden if np.iterable(dim_hidden) else [None]), dim_output]
        if not are_sizes(*units):
            raise ValueError(
                f'every layer needs at least one unit, but the sizes are {dim_input}, {dim_hidden} '
                f'and {dim_output}: numbers, and a tuple of numbers between them, are wanted'
            )
        self.dim_input, self.dim_output = dim_input, dim_output
        self.scopes = ['0', *(str(i + 1) for i in range(1, len(dim_hidden)))]  # 0, 2, 3, ...
        for i, (fan_in, fan_out) in enumerate(zip(units, units[1:]), start=1):
            self.parameters[f'w{i}'] = (initial, (fan_in, fan_out))
            self.parameters[f'b{i}'] = ('zeros', (fan_out,))
        for scope, size in zip(self.scopes, dim_hidden):
            self._add_normalization(scope, size)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """Computes [T, examples, out] from x, [T, examples, D], and weights, [T, ...] each."""
        return self.head(self.features(x, weights, norms, leading), weights)

    def features(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """Computes all layers but the last: [T, examples, D] -> [T, examples, units]."""
        for i, scope in enumerate(self.scopes, start=1):
            x = dense(x, weights[f'w{i}'], weights[f'b{i}'])
            x = self.activation(self._normalize(x, scope, norms, leading))
        return x

    def head(self, features: tf.Tensor, weights: Tensors) -> tf.Tensor:
        """Computes the last layer: [T, examples, units] -> [T, examples, out]."""
        last = len(self.scopes) + 1
        return dense(features, weights[f'w{last}'], weights[f'b{last}'])


class Convolutional(Network):
    """Four blocks of 3x3 convolution, normalisation and ReLU, halving the image each; then affine.

    max_pool: halve by 2x2 pooling (image size rounded down), else by stride 2 (rounded up).
    flatten: the last layer sees all pixels (miniImagenet, Glorot initial values), else their mean
    (Omniglot, normal ones). norm: as in FullyConnected. Raises ValueError for impossible sizes.
    """

    takes_shared = True

    def __init__(
        self,
        image_size: int,
        channels: int,
        filters: int,
        classes: int,
        norm: str | Normalization = 'batch_norm',
        max_pool: bool = False,
        flatten: bool = False,
    ):
        super().__init__(norm)
        fits = are_sizes(image_size, channels, filters, classes)
        if not fits or max_pool and image_size < 16:
            raise ValueError(
                f'no network for {image_size}x{image_size}x{channels} images, {filters} filters '
                f'and {classes} classes: each must be at least 1, and the images 16x16 if they are '
                'pooled four times'
            )
        self.image_shape = (image_size, image_size, channels)
        self.dim_input, self.dim_output = image_size * image_size * channels, classes
        self.max_pool, self.flatten = max_pool, flatten
        self.stride = 1 if max_pool else 2
        for i, fan_in in enumerate([channels, filters, filters, filters], start=1):
            self.parameters[f'conv{i}'] = ('glorot', (3, 3, fan_in, filters))
            self.parameters[f'b{i}'] = ('zeros', (filters,))
            self._add_normalization(str(i - 1), filters)
            image_size = image_size // 2 if max_pool else -(-image_size // 2)
        features = filters * image_size**2 if flatten else filters
        self.parameters['w5'] = ('glorot' if flatten else 'normal', (features, classes))
        self.parameters['b5'] = ('zeros', (classes,))

    def prepare(self, inputs: tf.Tensor, leading: Leading = None):
        """Gathers patches of the images [T, examples, H*W*C]: [T, examples, H', W', 9*C]."""
        images = tf.reshape(inputs, [*sizes(inputs)[:2], *self.image_shape])
        return patches3x3(images, self.stride)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """Computes logits [T, examples, classes]; x: from `prepare`; weights: [T, ...] each."""
        return self.head(self.features(x, weights, norms, leading), weights)

    def features(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """Computes the four blocks from the result of `prepare`: [T, examples, F]."""
        for i in range(1, 5):
            x = self.block(i, x, weights[f'conv{i}'], weights[f'b{i}'], norms, leading)
        if self.flatten:
            return tf.reshape(x, [*sizes(x)[:2], int(np.prod(x.shape[2:]))])
        return tf.reduce_mean(x, [2, 3])

    def head(self, features: tf.Tensor, weights: Tensors) -> tf.Tensor:
        """Computes the last layer: [T, examples, F] -> logits [T, examples, classes]."""
        return dense(features, weights['w5'], weights['b5'])

    def block(self, i: int, x, kernel, bias, norms: Tensors, leading: Leading) -> tf.Tensor:
        """Computes block i, section 5.2: [T, examples, H, W, C] to [T, examples, H', W', F].

        That is convolution, normalisation, ReLU and, if asked, pooling, which commutes with the
        ReLU and comes first. A bias that the normalisation takes away again would change nothing
        but the rounding, so it is not added.
        """
        x = convolve_patches(x, kernel) if i == 1 else convolve(x, kernel, self.stride)
        if not self.norm.removes_mean:
            x += per_task(bias)[:, tf.newaxis, tf.newaxis, tf.newaxis]
        x = self._normalize(x, str(i - 1), norms, leading, self.max_pool)
        return tf.nn.relu(x)
