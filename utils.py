"""What the rest is made of: losses, normalisation, layers, initial values, and the files of checkpoints.

Every tensor has a leading task axis T; "examples" is the number of examples of one task (N*K, or K points).
"""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from special_grads import kernel_product, max_pool2x2

BATCH_NORM_EPSILON = 1e-3    # of tf.contrib.layers.batch_norm, which the original used
LAYER_NORM_EPSILON = 1e-12   # of tf.contrib.layers.layer_norm


class Batch(NamedTuple):
    """A meta-batch of T tasks; a is the support set, b the query set; arrays or tensors.

    Inputs are flattened, D = height * width * channels, values in [0, 1]; labels are one-hot. Examples are ordered shot
    by shot: K (or Q) groups of N images, one per class, each group in an order of its own.
    """
    inputa: tf.Tensor  # [T, N*K, D]    sinusoid: [T, K, 1], oracle [T, K, 3] = (x, A, phi)
    labela: tf.Tensor  # [T, N*K, N]    sinusoid: [T, K, 1]
    inputb: tf.Tensor  # [T, N*Q, D]    sinusoid: [T, Q, 1 or 3]
    labelb: tf.Tensor  # [T, N*Q, N]    sinusoid: [T, Q, 1]


# Losses: one number per task -------------------------------------------------------------------------------------

def mean_squared_error(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Equation 2, as a mean over all points: output and label [T, examples, D] -> [T]."""
    return tf.reduce_mean(tf.square(output - label), axis=[1, 2])


def cross_entropy(shots: int):
    """Equation 3: softmax cross-entropy *summed* over the examples and divided by K (`shots`).

    The support loss is thereby N times the mean over examples, a query loss with Q images per class N*Q/K times it;
    α and the gradient clip refer to this scale. Returns a function of logits and one-hot labels,
    [T, examples, N] each, to [T].
    """
    def loss(output, label):
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(label, output), axis=1) / shots
    return loss


def accuracy(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Share of examples whose largest logit is the label's: [T, examples, N] each -> [T], of output's dtype."""
    hits = tf.equal(tf.argmax(output, axis=-1), tf.argmax(label, axis=-1))
    return tf.reduce_mean(tf.cast(hits, output.dtype), axis=1)


# Normalisation -----------------------------------------------------------------------------------------------------

def standardize(x: tf.Tensor, axes: list[int], epsilon: float) -> tf.Tensor:
    """(x - mean) / sqrt(variance + epsilon) over `axes`, with the biased variance.

    The means are written out because `tf.nn.moments` stops the gradient of the mean inside the variance: right at
    first order, silently wrong at second, hence for MAML.
    """
    centred = x - tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
    return centred * tf.math.rsqrt(variance + epsilon)


def batch_norm(x: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """Per channel over examples and space, statistics always of the batch at hand; offset but no gain.

    x: [T, examples, ..., channels]; beta: [channels], shared by tasks and inner steps.
    """
    return standardize(x, list(range(1, len(x.shape) - 1)), BATCH_NORM_EPSILON) + beta


def layer_norm(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """Per example over all its axes, then gain and offset over the last axis. x: [T, examples, ..., channels]."""
    return standardize(x, list(range(2, len(x.shape))), LAYER_NORM_EPSILON) * gamma + beta


def normalize(x: tf.Tensor, norm: str, scope: str, norms: dict) -> tf.Tensor:
    """Applies `norm` ('batch_norm', 'layer_norm' or 'None') with the parameters that `norms` holds for `scope`."""
    if norm == 'batch_norm':
        return batch_norm(x, norms[f'{scope}/beta'])
    if norm == 'layer_norm':
        return layer_norm(x, norms[f'{scope}/beta'], norms[f'{scope}/gamma'])
    return x


def norm_parameters(norm: str, scope: str, channels: int) -> dict[str, tuple]:
    """Kinds of initial value (see `initial_value`) and shapes of one layer's normalisation parameters."""
    parameters = {'None': {}, 'batch_norm': {'beta': 'zeros'}, 'layer_norm': {'beta': 'zeros', 'gamma': 'ones'}}
    return {f'{scope}/{name}': (kind, (channels,)) for name, kind in parameters[norm].items()}


# Layers ------------------------------------------------------------------------------------------------------------

def dense(x: tf.Tensor, matrix: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """x [T, examples, in], matrix [T, in, out], bias [T, out] -> [T, examples, out]."""
    return x @ matrix + bias[:, tf.newaxis]


def conv_block(patches: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, max_pool: bool, normalization) -> tf.Tensor:
    """Convolution, bias, normalisation, ReLU and, if asked for, 2x2 max-pooling.

    patches: [T, examples, H, W, 9*C] of the block's input; kernel: [T, 3, 3, C, F]; bias: [T, F]; normalization: a
    function of one tensor. Returns [T, examples, H', W', F].
    """
    x = kernel_product(patches, kernel) + bias[:, tf.newaxis, tf.newaxis, tf.newaxis]
    x = normalization(x)
    # The ReLU comes after the pooling here: max and ReLU commute, and so do their derivatives.
    return tf.nn.relu(max_pool2x2(x) if max_pool else x)


# Initial values ----------------------------------------------------------------------------------------------------

def initial_value(kind: str, shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
    """A parameter's initial value, a function of `seed` alone.

    kind: 'glorot' (uniform within ±sqrt(6 / (fan in + fan out))), 'normal' (stddev 1), 'truncated' (normal of stddev
    0.01, cut at two standard deviations), 'zeros' or 'ones'.
    """
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    initializers = tf.keras.initializers
    initializer = {'glorot': lambda: initializers.GlorotUniform(seed),
                   'normal': lambda: initializers.RandomNormal(stddev=1., seed=seed),
                   'truncated': lambda: initializers.TruncatedNormal(stddev=0.01, seed=seed),
                   'zeros': initializers.Zeros, 'ones': initializers.Ones}[kind]()
    return np.asarray(initializer(shape, dtype='float32'))


# Checkpoints: FOLDER/model{iteration}.index and .data-..., of this program or of the TensorFlow 1 original ----------

CHECKPOINTS_KEPT = 10


def checkpoints(folder: str | Path) -> dict[int, str]:
    """{iteration: path without suffix} of the checkpoints in a folder, the oldest first."""
    found = (re.fullmatch(r'model(\d+)\.index', path.name) for path in Path(folder).glob('model*.index'))
    return {i: str(Path(folder) / f'model{i}') for i in sorted(int(match[1]) for match in found if match)}


def write_checkpoint(checkpoint: tf.train.Checkpoint, folder: str | Path, iteration: int) -> str:
    """Writes FOLDER/model{iteration} and removes all but the newest ten. Returns its path.

    tf.train.CheckpointManager would put a hyphen into the name, which the original does not have.
    """
    path = checkpoint.write(str(Path(folder) / f'model{iteration}'))
    for old in [*checkpoints(folder)][:-CHECKPOINTS_KEPT]:
        for file in Path(folder).glob(f'model{old}.*'):
            file.unlink()
    return path


def read_checkpoint(path: str, names: list[str]) -> tuple[dict[str, np.ndarray], bool]:
    """Parameters by name from a checkpoint, and whether it is of this program, hence holds Adam's state too.

    names: of the network's parameters, in the order in which it creates them. The TensorFlow 1 original left its
    biases, and all weights of the fully connected network, without names; TensorFlow called them Variable,
    Variable_1, ... in that order. Raises ValueError if the file cannot be read.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        stored = reader.get_variable_to_shape_map()
        if '_CHECKPOINTABLE_OBJECT_GRAPH' in stored:
            pattern, keys = r'(?:weights|norms)/(.+)/\.ATTRIBUTES/VARIABLE_VALUE', {}
            for key in stored:
                if match := re.fullmatch(pattern, key):
                    keys[match[1].replace('.S', '/')] = key
            return {name: reader.get_tensor(key) for name, key in keys.items()}, True
        named = {key.removeprefix('model/') for key in stored if key.startswith('model/')}
        unnamed = [name for name in names if name not in named]
        keys = {name: 'Variable' if i == 0 else f'Variable_{i}' for i, name in enumerate(unnamed)}
        keys |= {name: name for name in named if not name.startswith('Variable')}
        return {name: reader.get_tensor(f'model/{key}') for name, key in keys.items() if key in named}, False
    except (tf.errors.OpError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a checkpoint; remove it or name another with --test_iter '
                         f'({str(error).splitlines()[0]})') from error
