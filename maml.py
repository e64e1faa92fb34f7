"""Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017).

Networks; what an inner loop changes, and how; the algorithm, class MAML, as the paper has it; how
it is run fast, class FastMAML; the training loop, class Trainer; arrays in and arrays out, class
Learner; Keras's `fit` and callbacks, class MetaModel; and the model that the command line's
settings describe.

The task axis is explicit. After the first inner step each task has weights of its own, so weights
are [T, ...] like the data, and every layer acts on all T tasks of a meta-batch at once. "a" is the
support set (inner gradient), "b" the query set (outer gradient).
"""

import contextlib
import functools
import inspect
import itertools
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import utils  # noqa: F401 (first, since it starts TensorFlow quietly)

# isort: split
import keras
import numpy as np
import tensorflow as tf

from fewshot.networks.keras_network import KerasNetwork
from special_grads import (
    BATCH_NORM_EPSILON,
    BatchNorm,
    Normalization,
    Shared,
    constant_zeros,
    convolve,
    convolve_normalized,
    convolve_patches,
    dense,
    max_pool2x2,
    normalization,
    normalized_patches,
    patches3x3,
    per_task,
    sizes,
    task_gradients,
)
from utils import (
    Batch,
    DamagedCheckpoint,
    Replicas,
    accuracy,
    checkpoints,
    confidence,
    cores,
    cross_entropy,
    finite_numbers,
    first_line,
    first_whole,
    folder_path,
    graph,
    machine,
    mean_squared_error,
    named_batch,
    other_runs,
    piece,
    read_checkpoint,
    read_objects,
    read_run_state,
    real_number,
    real_numbers,
    user_code,
    user_function,
    whole_number,
    write_checkpoint,
)

IMAGE_SHAPES = {'omniglot': (28, 1), 'miniimagenet': (84, 3)}  # height = width, channels
Tensors = dict[str, tf.Tensor]  # weights, {name: [T, ...] or Shared}, or norms, {name: [...]}
Arrays = dict[str, np.ndarray]  # weights of a task, {name: [...]}; of several, {name: [T, ...]}
Leading = int | tf.Tensor | None  # how many examples give batch normalisation its statistics


# Networks: functions of inputs and weights that know nothing of meta-learning ---------------------


def initial_value(kind, shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
    """A parameter's initial value, a function of `seed` alone.

    kind: 'glorot' (uniform within ±sqrt(6 / (fan in + fan out))), 'normal' (stddev 1), 'truncated'
    (normal of stddev 0.01, cut at two standard deviations), 'zeros' or 'ones'; or the value itself,
    or a function of the shape that returns it, such as an initializer of Keras.
    Raises ValueError if there is no such kind, or the value has another shape.
    """
    if not isinstance(kind, str):
        value = np.asarray(kind(shape) if callable(kind) else kind)
        if value.shape != tuple(shape):
            raise ValueError(f'an initial value is {list(value.shape)}, not {list(shape)}')
        return value
    number = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    make = keras.initializers
    if kind in ('zeros', 'ones'):
        initializer = {'zeros': make.Zeros, 'ones': make.Ones}[kind]()
    elif kind == 'glorot':
        initializer = make.GlorotUniform(number)
    elif kind == 'normal':
        initializer = make.RandomNormal(stddev=1.0, seed=number)
    elif kind == 'truncated':
        initializer = make.TruncatedNormal(stddev=0.01, seed=number)
    else:
        raise ValueError(f'there is no initial value {kind!r}')
    return np.asarray(initializer(shape, dtype='float32'))


def are_sizes(*values) -> bool:
    """Whether they are whole numbers, at least 1."""
    return all(isinstance(value, int | np.integer) and value >= 1 for value in values)


class Network:
    """What the networks here have in common; one of your own needs only the attributes and methods.

    Attributes: parameters and norm_parameters, {name: (kind of initial value, shape)}; the former
    are adapted by the inner loop, the latter common to all tasks; dim_input and dim_output, sizes
    of an example and of its output, without which there are no checks and no Learner. Optional:
    takes_shared, whether `__call__` of the class that says so takes special_grads.Shared;
    compilable, whether XLA can compile it; most_tasks, that run together; reads_variables, whether
    `__call__` does; dtype, that it needs; layer_names, {name of a parameter: its layer}, and
    methods `features` and `head`, which together are `__call__`, for step sizes per layer and an
    inner loop of the last one alone; head_names, the parameters of the last layer, if it is not
    that of the last of layer_names.
    """

    def __init__(self, norm: str | Normalization):
        self.norm = normalization(norm)
        self.parameters, self.norm_parameters = {}, {}

    @property
    def layer_names(self) -> dict[str, str]:
        """{name of a parameter: its layer}: w1 and b1, or conv1 and b1, are of layer1."""
        return {name: re.sub(r'^\D+(\d+)$', r'layer\1', name) for name in self.parameters}

    def prepare(self, inputs: tf.Tensor, leading: Leading = None):
        """The part of the forward pass that no weight enters: none here."""
        return inputs

    def _add_normalization(self, scope: str, channels: int):
        """The parameters of a layer's normalisation, as SCOPE/beta and so on."""
        for name, value in self.norm.parameters(channels).items():
            self.norm_parameters[f'{scope}/{name}'] = value

    def _normalize(self, x, scope: str, norms: Tensors, leading: Leading, max_pool: bool = False):
        """x: [T, examples, ..., channels]; normalised, and pooled if asked."""
        prefix = f'{scope}/'
        own = {key.removeprefix(prefix): norms[key] for key in norms if key.startswith(prefix)}
        return self.norm(x, own, leading, max_pool)


class FullyConnected(Network):
    """Affine layers, each but the last followed by normalisation and ReLU.

    norm: 'batch_norm', 'layer_norm', 'None' or a special_grads.Normalization of your own.
    activation: instead of ReLU, a function of a tensor. initial: of the matrices, see
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

    def __call__(
        self, x: tf.Tensor, weights: Tensors, norms: Tensors, leading: Leading = None
    ) -> tf.Tensor:
        """x: [T, examples, D]; weights: [T, ...] each. Returns [T, examples, out]."""
        return self.head(self.features(x, weights, norms, leading), weights)

    def features(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """All layers but the last: [T, examples, D] -> [T, examples, units]."""
        for i, scope in enumerate(self.scopes, start=1):
            x = dense(x, weights[f'w{i}'], weights[f'b{i}'])
            x = self.activation(self._normalize(x, scope, norms, leading))
        return x

    def head(self, features: tf.Tensor, weights: Tensors) -> tf.Tensor:
        """The last layer: [T, examples, units] -> [T, examples, out]."""
        last = len(self.scopes) + 1
        return dense(features, weights[f'w{last}'], weights[f'b{last}'])


class Convolutional(Network):
    """Four blocks of 3x3 convolution, normalisation and ReLU, halving the image each; then affine.

    max_pool: halve by 2x2 pooling (image size rounded down), else by stride 2 (rounded up).
    flatten: the last layer sees all pixels (miniImagenet, Glorot initial values), else their mean
    (Omniglot, normal ones). norm: as FullyConnected. Raises ValueError for impossible sizes.
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
        # The statistics of the first convolution's output follow from those of the images.
        self.fused = type(self.norm) is BatchNorm
        for i, fan_in in enumerate([channels, filters, filters, filters], start=1):
            self.parameters[f'conv{i}'] = ('glorot', (3, 3, fan_in, filters))
            self.parameters[f'b{i}'] = ('zeros', (filters,))
            self._add_normalization(str(i - 1), filters)
            image_size = image_size // 2 if max_pool else -(-image_size // 2)
        features = filters * image_size**2 if flatten else filters
        self.parameters['w5'] = ('glorot' if flatten else 'normal', (features, classes))
        self.parameters['b5'] = ('zeros', (classes,))

    def prepare(self, inputs: tf.Tensor, leading: Leading = None):
        """Patches of the images [T, examples, H*W*C]: [T, examples, H', W', 9*C]."""
        images = tf.reshape(inputs, [*sizes(inputs)[:2], *self.image_shape])
        if self.fused:
            return normalized_patches(images, self.stride, leading)
        return patches3x3(images, self.stride)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """x: from `prepare`; weights: [T, ...] each. Returns logits [T, examples, classes]."""
        return self.head(self.features(x, weights, norms, leading), weights)

    def features(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """The four blocks, of what `prepare` returns: [T, examples, F]."""
        for i in range(1, 5):
            x = self._block(i, x, weights[f'conv{i}'], weights[f'b{i}'], norms, leading)
        if self.flatten:
            return tf.reshape(x, [*sizes(x)[:2], int(np.prod(x.shape[2:]))])
        return tf.reduce_mean(x, [2, 3])

    def head(self, features: tf.Tensor, weights: Tensors) -> tf.Tensor:
        """The last layer: [T, examples, F] -> logits [T, examples, classes]."""
        return dense(features, weights['w5'], weights['b5'])

    def _block(self, i: int, x, kernel, bias, norms: Tensors, leading: Leading) -> tf.Tensor:
        """What `plain_block` says, for all tasks at once, and fast.

        Pooling commutes with the ReLU and comes first. A bias that the normalisation takes away
        again would change nothing but the rounding, so it is not added.
        """
        if self.fused and i == 1:
            x = convolve_normalized(x, kernel, norms['0/beta'])
            x = max_pool2x2(x) if self.max_pool else x
        else:
            x = convolve_patches(x, kernel) if i == 1 else convolve(x, kernel, self.stride)
            if not self.norm.removes_mean:
                x += per_task(bias)[:, tf.newaxis, tf.newaxis, tf.newaxis]
            x = self._normalize(x, str(i - 1), norms, leading, self.max_pool)
        return tf.nn.relu(x)


def plain_block(
    images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, beta: tf.Tensor, max_pool: bool
) -> tf.Tensor:
    """The paper's block for the images of one task, section 5.2, in TensorFlow's own operations.

    images: [examples, height, width, C]; kernel: [3, 3, C, F]; bias, beta: [F]. Returns [examples,
    height', width', F]. `Convolutional` computes the same in another way.
    """
    x = tf.nn.conv2d(images, kernel, strides=1 if max_pool else 2, padding='SAME') + bias
    mean = tf.reduce_mean(x, [0, 1, 2])  # not tf.nn.moments: wrong at second order
    variance = tf.reduce_mean(tf.square(x - mean), [0, 1, 2])
    x = tf.nn.relu((x - mean) * tf.math.rsqrt(variance + BATCH_NORM_EPSILON) + beta)
    return tf.nn.max_pool2d(x, 2, 2, 'VALID') if max_pool else x


# Inner loops: what they change, and how -----------------------------------------------------------


class UpdateRule:
    """What an inner update makes of weights and gradients: gradient descent with one α.

    MAML takes one of your own as `learn_lr`. Attribute: parameters, {name: (kind of initial value,
    shape)}, see `initial_value`, that the outer loop learns: none here.
    """

    parameters = {}

    def rates(self, values: Tensors, step: int | tf.Tensor):
        """What the call gets as `alpha` in update `step` + 1; None: `update_lr`.

        values: of `parameters`, {name: tensor}. step: there may be more than in training.
        """
        return None

    def shown(self, values: Arrays) -> Arrays:
        """What summaries tell of `parameters`, {label: scalar or array}."""
        return values

    def __call__(self, weights: dict, gradients: Tensors, alpha) -> Tensors:
        """θ' = θ − α ∇L, {name: [T, ...]}.

        weights: {name: [T, ...] or Shared}; gradients: {name: [T, ...]}; alpha: a scalar, or {name:
        scalar or the weight's shape}.
        """
        rates = alpha if isinstance(alpha, Mapping) else dict.fromkeys(weights, alpha)
        return {
            name: per_task(theta) - rates[name] * gradients[name] for name, theta in weights.items()
        }


class LearnedRates(UpdateRule):
    """Gradient descent with step sizes that the outer loop learns, from `update_lr` on.

    kind: 'layer', one for each layer; 'layer_step', one for each layer and update, as MAML++;
    'weight', one for each weight, as Meta-SGD. More updates than there are step sizes use the last.
    """

    def __init__(self, kind: str, network, update_lr: float, num_updates: int):
        self.kind, self.parameters, self.names = kind, {}, {}
        layers = getattr(network, 'layer_names', {})
        for name, (_, shape) in network.parameters.items():
            of_layer = (max(num_updates, 1),) if kind == 'layer_step' else ()
            size = tuple(shape) if kind == 'weight' else of_layer
            rate = name if kind == 'weight' else layers.get(name, name)
            self.names[name] = rate
            self.parameters[rate] = (np.full(size, update_lr), size)

    def rates(self, values: Tensors, step: int | tf.Tensor) -> Tensors:
        """{name of a weight: its α}."""
        if self.kind == 'layer_step':
            values = {name: row_of(value, step) for name, value in values.items()}
        return {name: values[rate] for name, rate in self.names.items()}

    def shown(self, values: Arrays) -> Arrays:
        if self.kind != 'layer_step':
            return values
        rows = {name: enumerate(value, start=1) for name, value in values.items()}
        return {f'{name}__step_{i}': rate for name in rows for i, rate in rows[name]}


LEARNED_RATES = ('layer', 'layer_step', 'weight')


def row_of(rows: tf.Tensor, step: int | tf.Tensor) -> tf.Tensor:
    """The row of update `step` + 1, [rows, ...] -> [...]; of one that has none, the last."""
    last = rows.shape[0] - 1
    return rows[min(step, last) if isinstance(step, int) else tf.minimum(step, last)]


def update_rule(learn_lr, network, update_lr: float, num_updates: int) -> UpdateRule:
    """The rule that `learn_lr` names, or is. Raises ValueError."""
    if isinstance(learn_lr, UpdateRule):
        return learn_lr
    check_choice('learn_lr', learn_lr, ('none', *LEARNED_RATES), ', or an UpdateRule')
    if learn_lr == 'none':
        return UpdateRule()
    return LearnedRates(learn_lr, network, update_lr, num_updates)


class Partly:
    """A network of which the inner loop changes a part; the rest is common to all tasks.

    adapt: 'head', the last layer; 'body', all the others. Other attributes are the network's.
    Raises ValueError if the network does not tell its layers, or no weight is left to adapt.
    """

    def __init__(self, network, adapt: str):
        self.network = network
        layers = getattr(network, 'layer_names', None)
        if not layers:
            raise ValueError(
                f'adapt={adapt!r} needs to know the layers of the network: give it an attribute '
                'layer_names, {name of a parameter: its layer}'
            )
        last = [*layers.values()][-1]
        of_last = [name for name in network.parameters if layers.get(name) == last]
        head = getattr(network, 'head_names', of_last)
        names = [name for name in network.parameters if (name in head) == (adapt == 'head')]
        if not names:
            raise ValueError(
                f'adapt={adapt!r} leaves nothing for the inner loop to change: the network adapts '
                f'{", ".join(network.parameters)}, and its last layer has {", ".join(head)}'
            )
        self.parameters = {name: network.parameters[name] for name in names}
        self.common = [name for name in network.parameters if name not in names]
        common = {name: network.parameters[name] for name in self.common}
        self.norm_parameters = common | network.norm_parameters

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def prepare(self, *inputs):
        """As the network's."""
        return self.network.prepare(*inputs)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """x: from `prepare`; weights: [T, ...] each. Returns [T, examples, out]."""
        first = next(iter(weights.values()))
        tasks = sizes(first.perturbation if isinstance(first, Shared) else first)[0]
        whole = weights | self.common_weights(norms, tasks, x)
        return self.network(x, whole, self.norms_in(norms), *([] if leading is None else [leading]))

    def common_weights(self, norms: Tensors, tasks: int | tf.Tensor, x) -> dict:
        """The weights that are not adapted, as the network takes them.

        They are Shared, one product of matrices for all tasks, if it takes that and all sizes are
        known; x: what it is called with.
        """
        known = all(part.shape.is_fully_defined() for part in tf.nest.flatten(x))
        found = {}
        for name in self.common:
            theta = tf.convert_to_tensor(norms[name])
            if known and takes_shared(self.network):
                found[name] = Shared(theta, tf.zeros([tasks, *theta.shape], theta.dtype))
            else:
                found[name] = tf.broadcast_to(theta, [tasks, *theta.shape])
        return found

    def norms_in(self, norms: Tensors) -> Tensors:
        """Those that the network itself knows as such."""
        return {name: norms[name] for name in self.network.norm_parameters}


class HeadOnly(Partly):
    """The last layer alone, of a network with `features` and `head`: the features are prepared.

    They are computed once for all updates, and the outer loop differentiates through them.
    """

    def prepare(self, inputs: tf.Tensor, leading: Leading, norms: Tensors) -> tf.Tensor:
        """Features of inputs [T, examples, D]: [T, examples, F]."""
        x = self.network.prepare(inputs, *([] if leading is None else [leading]))
        weights = self.common_weights(norms, sizes(inputs)[0], x)
        return self.network.features(x, weights, self.norms_in(norms), leading)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        return self.network.head(x, weights)


def part_of(network, adapt: str):
    """The network as the inner loop of `adapt` sees it. Raises ValueError."""
    check_choice('adapt', adapt, ('all', 'head', 'body'))
    if adapt == 'all':
        return network
    splits = adapt == 'head' and said_with_call(network, 'features')
    return (HeadOnly if splits else Partly)(network, adapt)


def step_norms(network, adapt: str) -> list[str]:
    """The names of the normalisation parameters that `norm_steps` has one of for each update.

    Raises ValueError if there are none, or they do not change from update to update.
    """
    names = [*network.norm_parameters]
    if isinstance(network, KerasNetwork):  # these may be any that its own `adapt` leaves out
        names = [name for name in names if name.endswith(('/gamma', '/beta'))]
    if not names:
        raise ValueError(
            'norm_steps needs normalisation parameters that the inner loop does not change, and '
            'this network has none: give it a norm, or leave norm_steps away'
        )
    if adapt == 'head':
        raise ValueError(
            "norm_steps has normalisation change with the updates, but with adapt='head' all "
            'layers before the last are computed once: give one of the two'
        )
    return names


class Phase(NamedTuple):
    """A part of meta-training with an outer loss of its own."""

    start: int  # the first iteration
    first_order: bool = False  # even if MAML's stop_grad is not
    all_losses: bool = False  # the losses after every update count, not the last alone


LAST_PHASE = Phase(0)  # as in the paper


def phases(first_order: int, all_losses: float) -> list[Phase]:
    """first_order, all_losses: until which iteration the outer loss is so."""
    starts = sorted({0, first_order, all_losses} - {float('inf')})
    return [Phase(start, start < first_order, start < all_losses) for start in starts]


def phased(method: Callable) -> Callable:
    """A method of a meta-batch and a phase as one of a meta-batch, in the phase that it is.

    Where there are several the graph chooses, by the number of steps that the outer optimizer has
    taken: a run that continues needs no memory of it, and nothing is traced again.
    """

    @functools.wraps(method)
    def now(self, batch: Batch):
        calls = [functools.partial(method, self, batch, phase) for phase in self.phases]
        if len(calls) == 1:
            return calls[0]()
        done = self.metatrain_optimizer.iterations
        begun = [tf.cast(done >= phase.start, tf.int32) for phase in self.phases[1:]]
        return tf.switch_case(tf.add_n(begun), calls)

    return now


LEAST_STEP_WEIGHT = 0.03  # of a loss before the last, times the number of updates


def step_weights(updates: int, done: tf.Tensor, iterations: int, dtype) -> list[tf.Tensor]:
    """MAML++'s weights of the losses after each of J updates in the outer loss; they add up to 1.

    As in its authors' program: from 1/J each those before the last fall to 0.03/J, and what they
    lose the last one gains, linearly over `iterations` outer steps. done: steps so far.
    iterations: 0 keeps 1/J.
    """
    share = tf.cast(done, dtype) / iterations if iterations else tf.zeros([], dtype)
    others = tf.maximum(1 - share, LEAST_STEP_WEIGHT) / updates
    return [others] * (updates - 1) + [1 - (updates - 1) * others]


class Common(NamedTuple):
    """What all tasks have in common in their inner loops, read once."""

    norms: Tensors  # what the outer loop alone learns, {name: [...]}
    rates: Tensors  # the rule's parameters


class InnerLoop(NamedTuple):
    """Arguments of MAML that say what there is to learn."""

    update_lr: float
    num_updates: int
    adapt: str
    learn_lr: str | UpdateRule
    norm_steps: bool


class Learned(tf.Module):
    """What the outer loop learns: θ, what is common to all tasks, step sizes.

    Attributes: weights, norms and rates, {name: variable} each; network, as the inner loop sees it;
    rule, an UpdateRule; step_norms, the names of norms that each update has of its own.
    Raises ValueError for settings that do not fit the network.
    """

    def __init__(self, network, inner: InnerLoop, seed: int, dtype: tf.DType):
        super().__init__()
        self.network, self.dtype = part_of(network, inner.adapt), dtype
        self.adapt, self.learn_lr, self.norm_steps = inner.adapt, inner.learn_lr, inner.norm_steps
        self.rule = update_rule(inner.learn_lr, self.network, inner.update_lr, inner.num_updates)
        self.step_norms = step_norms(network, inner.adapt) if inner.norm_steps else []
        variables, made = {}, network.parameters | network.norm_parameters
        for i, (name, value) in enumerate((made | rate_parameters(self.rule)).items()):
            value = initial_value(*value, seed=[seed, i])
            if name in self.step_norms:
                value = np.stack([value] * max(inner.num_updates, 1))  # [updates, ...]
            variables[name] = tf.Variable(tf.cast(value, dtype))
        self.names = [*made]
        self.weights = {name: variables[name] for name in self.network.parameters}  # θ
        # Learned by the outer loop only; of the update rule, likewise.
        self.norms = {name: variables[name] for name in self.network.norm_parameters}
        self.rates = {name: variables[f'rates/{name}'] for name in self.rule.parameters}

    @property
    def named_parameters(self) -> dict[str, tf.Variable]:
        """All that the outer loop learns, by name: weights, normalisation parameters, step sizes.

        The order is the network's, whatever the inner loop changes; step sizes are 'rates/...'.
        """
        own = self.weights | self.norms
        rates = {f'rates/{name}': rate for name, rate in self.rates.items()}
        return {name: own[name] for name in self.names} | rates

    @property
    def parameters(self) -> list[tf.Variable]:
        """All that the outer loop learns: weights, normalisation parameters, step sizes."""
        return [*self.named_parameters.values()]

    @property
    def groups(self) -> dict[str, dict[str, tf.Variable]]:
        """The same as checkpoints have them."""
        rates = {'rates': self.rates} if self.rates else {}
        return {'weights': self.weights, 'norms': self.norms} | rates

    def is_finite(self) -> bool:
        """Whether all parameters are numbers."""
        return all(np.isfinite(parameter.numpy()).all() for parameter in self.parameters)

    def common_values(self) -> Common:
        """Normalisation parameters and the rule's, read once."""
        groups = self.norms, self.rates
        return Common(
            *({name: tf.convert_to_tensor(value) for name, value in own.items()} for own in groups)
        )

    def at(self, common: Common, step: int | tf.Tensor) -> tuple[Tensors, dict | None]:
        """What update `step` + 1 and the queries after it have of what tasks have in common.

        Normalisation parameters, and the α of the rule, see `UpdateRule.rates`. Before any update
        it is that of the first.
        """
        norms = {} if isinstance(self.network, HeadOnly) else common.norms
        rows = {name: row_of(norms[name], step) for name in self.step_norms}
        return {**norms, **rows} if rows else norms, self.rule.rates(common.rates, step)

    def preparing(self, common: Common, leading: Leading = None) -> list:
        """What `prepare` is to be given besides the inputs; leading: see `output`."""
        if isinstance(self.network, HeadOnly):
            return [leading, common.norms]
        return [] if leading is None else [leading]


def rate_parameters(rule: UpdateRule) -> dict[str, tuple]:
    """Its parameters, by their names among all others."""
    return {f'rates/{name}': made for name, made in rule.parameters.items()}


# The algorithm ------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What adaptation does to each task; J is the number of updates evaluated."""

    loss1: tf.Tensor  # [T], support, before any update
    losses2: tf.Tensor  # [J, T], query, after update 1...J
    accuracy1: tf.Tensor  # [T]
    accuracies2: tf.Tensor  # [J, T]
    outputa: tf.Tensor  # [T, examples, out], support, before any update
    outputsb: tf.Tensor  # [J, T, examples, out], query, after update 1...J

    def of(self, objective: str) -> tuple:
        """'loss' or 'accuracy' of each task, before any update and after each: [T] and [J, T]."""
        if objective == 'loss':
            return self.loss1, self.losses2
        return self.accuracy1, self.accuracies2


TASK_AXIS = Results(loss1=0, losses2=1, accuracy1=0, accuracies2=1, outputa=0, outputsb=1)


class MAML(Learned):
    """Meta-learned initial weights θ of a network, and the loops that learn them; see FastMAML.

    Args:
        network: FullyConnected, Convolutional, a Keras model, or what has Network's attributes.
        loss: function of outputs and labels, [T, examples, out] each, to one loss per task, [T].
        update_lr: α, inner step size. meta_lr: β, outer step size (Adam), or Keras's schedule.
        num_updates: inner updates in training. stop_grad: first-order approximation.
        clip: bound on each element of the meta-gradient, or None.
        seed: of the initial weights. dtype: of everything.
        adapt: what the inner loop changes: 'all', the 'head' (last layer), or the 'body'.
        learn_lr: step sizes that the outer loop learns, see LearnedRates, or an UpdateRule.
        loss_steps: whether the 'last' of the losses after each update counts, or 'all', see
            `step_weights`, for loss_steps_iterations outer steps; 0: always.
        first_order_iterations: outer steps that are of first order, before the others.
        norm_steps: normalisation parameters for each update, instead of the same for all.

    Raises ValueError for numbers out of range, and for a network or loss that does not fit.
    """

    def __init__(
        self,
        network,
        loss: Callable,
        update_lr: float,
        num_updates: int = 1,
        meta_lr: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
        stop_grad: bool = False,
        clip: float | None = None,
        seed: int = 0,
        dtype=tf.float32,
        adapt: str = 'all',
        learn_lr: str | UpdateRule = 'none',
        loss_steps: str = 'last',
        loss_steps_iterations: int = 0,
        first_order_iterations: int = 0,
        norm_steps: bool = False,
    ):
        check_numbers(update_lr, num_updates, meta_lr, clip, seed)
        network = KerasNetwork(network) if isinstance(network, keras.Model) else network
        check_network(network, float_type(dtype))
        check_loss(loss, network, float_type(dtype))
        warn_of_probabilities(loss, network, float_type(dtype))
        inner = InnerLoop(update_lr, num_updates, adapt, learn_lr, norm_steps)
        super().__init__(network, inner, seed, float_type(dtype))
        self.loss, self.update_lr, self.num_updates = loss, update_lr, num_updates
        self.stop_grad, self.clip = stop_grad, clip
        self.trained_on = frozenset()  # types of training inputs, as far as known: see FastMAML
        until = last_all_losses(loss_steps, loss_steps_iterations)
        self.phases = phases(whole_number('first_order_iterations', first_order_iterations), until)
        self.loss_steps, self.loss_steps_iterations = loss_steps, loss_steps_iterations
        self.first_order_iterations = first_order_iterations
        # ε as TensorFlow 1's Adam has it; Keras's own default is ten times larger.
        self.metatrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        self.pretrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        for optimizer in (self.metatrain_optimizer, self.pretrain_optimizer):
            optimizer.build(self.parameters)

    # Algorithm 2, line by line; Algorithm 1's lines in brackets. Lines 3 to 5 and 8, which sample
    # tasks and examples, are data_generator.py's.

    def update(
        self, weights: Tensors, norms: Tensors, x, y: tf.Tensor, lr=None, first_order: bool = False
    ) -> Tensors:
        """θ' = θ − α ∇_θ L_Ti(f_θ): lines 6 and 7 (5 and 6), for every task Ti.

        weights: θ, {name: [T, ...]}; x: prepared support inputs; y: labels [T, examples, out];
        lr: α, `update_lr` if None, or the rule's. Returns θ', {name: [T, ...]}.
        """

        def losses(theta):
            return self.loss(self.network(x, theta, norms), y)  # L_Ti(f_θ), [T]

        gradients = task_gradients(losses, weights)  # ∇_θ L_Ti(f_θ), {name: [T, ...]}
        if self.stop_grad or first_order:  # first order: gradients count as constants
            gradients = tf.nest.map_structure(tf.stop_gradient, gradients)
        return self.rule(weights, gradients, self.update_lr if lr is None else lr)

    def outer_loss(self, batch: Batch, phase: Phase = LAST_PHASE) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar: the sum in line 10 (8), after `num_updates` updates."""
        theta, common, losses = self.start(batch.inputa.shape[0]), self.common_values(), []
        support = self.prepare(batch.inputa, *self.preparing(common)), batch.labela
        query = self.prepare(batch.inputb, *self.preparing(common)), batch.labelb
        for i in range(self.num_updates - 1):
            norms, alpha = self.at(common, i)
            # θ'i ← θ'i − α ∇ L
            theta = self.update(theta, norms, *support, alpha, phase.first_order)
            if phase.all_losses:
                losses.append(tf.reduce_sum(self.outcome(theta, norms, *query)[0]))
        last = self.at(common, self.num_updates - 1)
        losses.append(self.last_loss(theta, *last, support, query, phase.first_order))
        return self.total(losses)

    def last_loss(self, theta, norms: Tensors, alpha, support, query, first_order) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar, after one more update, the last; support, query: (x, y)."""
        if self.num_updates:
            theta = self.update(theta, norms, *support, alpha, first_order)
        return tf.reduce_sum(self.outcome(theta, norms, *query)[0])

    @phased
    def meta_gradient(self, batch: Batch, phase: Phase) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Σ_Ti L_Ti(f_θ'i) / T, and ∇_θ of it for `parameters`, unclipped: line 10 (8)."""
        tasks = batch.inputa.shape[0]
        loss, *gradients = self.gradient_of_sum(batch, phase)
        return loss / tasks, [gradient / tasks for gradient in gradients]

    def gradient_of_sum(self, batch: Batch, phase: Phase) -> list[tf.Tensor]:
        """Σ_Ti L_Ti(f_θ'i), and ∇_θ of it for `parameters`, through the updates."""
        with tf.GradientTape() as outer:
            loss = self.outer_loss(batch, phase)
        return [loss, *outer.gradient(loss, self.parameters, unconnected_gradients='zero')]

    def metatrain_step(self, batch: Batch) -> tf.Tensor:
        """θ ← θ − β ∇_θ Σ_Ti L_Ti(f_θ'i) / T: line 10 (8), by Adam.

        Returns the outer loss before the step.
        """
        loss, gradients = self.meta_gradient(batch)
        if self.clip is not None:
            gradients = [tf.clip_by_value(g, -self.clip, self.clip) for g in gradients]
        self.apply(self.metatrain_optimizer, gradients)
        return loss

    # What the algorithm is made of.

    def start(self, tasks: int) -> Tensors:
        """θ'i ← θ, for every task: {name: [T, ...]}."""
        return self.initial_weights(tasks)

    def initial_weights(self, tasks: int) -> Tensors:
        """θ, once per task: {name: [T, ...]}."""
        return {
            name: tf.broadcast_to(theta, [tasks, *theta.shape])
            for name, theta in self.weights.items()
        }

    def prepare(self, inputs: tf.Tensor, *more):
        """What of the forward pass no weight that is adapted enters; inputs: [T, examples, D].

        more: of `preparing`.
        """
        return self.network.prepare(inputs, *more)

    def total(self, losses: list[tf.Tensor]) -> tf.Tensor:
        """The loss after the last update, or those after all, weighed and added; scalars."""
        if len(losses) > 1:
            iterations = self.metatrain_optimizer.iterations, self.loss_steps_iterations
            weights = step_weights(len(losses), *iterations, self.dtype)
            return tf.add_n([w * loss for w, loss in zip(weights, losses)])
        return losses[-1]

    def output(self, weights: Tensors, norms: Tensors, x, leading: Leading = None) -> tf.Tensor:
        """What the network makes of prepared inputs, [T, examples, out].

        leading: so many examples at the beginning are not asked for; they give batch normalisation
        its statistics.
        """
        if leading is None:
            return self.network(x, weights, norms)
        return self.network(x, weights, norms, leading)[:, leading:]

    def outcome(self, weights: Tensors, norms: Tensors, x, y: tf.Tensor, leading=None) -> tuple:
        """Loss [T], accuracy [T] and output [T, examples, out] of tasks with these weights.

        leading: as of `output`; these examples have no label.
        """
        output = MAML.output(self, weights, norms, x, leading)
        return self.loss(output, y), accuracy(output, y), output

    def apply(self, optimizer, gradients: list[tf.Tensor]):
        """One step of Adam on `parameters`."""
        optimizer.apply(gradients, self.parameters)

    # The joint-training baseline, section 5.1, and evaluation.

    def pretrain_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The mean support loss before any update, and its gradient for `parameters`."""
        with tf.GradientTape() as tape:
            weights, common = self.initial_weights(batch.inputa.shape[0]), self.common_values()
            x, norms = self.prepare(batch.inputa, *self.preparing(common)), self.at(common, 0)[0]
            losses, _, _ = self.outcome(weights, norms, x, batch.labela)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, self.parameters, unconnected_gradients='zero')

    def pretrain_step(self, batch: Batch) -> tf.Tensor:
        """One step of Adam on the mean support loss before any update. Returns that loss."""
        loss, gradients = self.pretrain_gradient(batch)
        self.apply(self.pretrain_optimizer, gradients)
        return loss

    def evaluate(self, batch: Batch, num_updates: int, transductive: bool = True) -> Results:
        """Losses, accuracies and outputs of each task before and after each inner update.

        transductive: batch normalisation takes the queries' own statistics, as in training and in
        the paper, so that an answer depends on the other queries; else those of the support set.
        """
        common, query, leading = self.common_values(), batch.inputb, None
        support = self.prepare(batch.inputa, *self.preparing(common))
        if not transductive:  # the support set leads
            leading, query = batch.inputa.shape[1], tf.concat([batch.inputa, query], axis=1)
        query = self.prepare(query, *self.preparing(common, leading))
        weights, outcomes = self.initial_weights(batch.inputa.shape[0]), []
        loss1, accuracy1, outputa = self.outcome(
            weights, self.at(common, 0)[0], support, batch.labela
        )
        for i in range(num_updates):
            norms, alpha = self.at(common, i)
            weights = self.update(weights, norms, support, batch.labela, alpha, False)
            outcomes.append(self.outcome(weights, norms, query, batch.labelb, leading))
        losses2, accuracies2, outputsb = map(tf.stack, zip(*outcomes))
        return Results(loss1, losses2, accuracy1, accuracies2, outputa, outputsb)


# How it is run ------------------------------------------------------------------------------------

CHUNK_SIZE = 2**14  # input values of the tasks that run together, see `chunk_size`


class FastMAML(MAML):
    """The same algorithm, run fast.

    Its parts are programs of their own (`piece`, `graph`); a meta-batch runs in chunks that fit the
    caches; tasks share θ until their first update; and several devices may have parts of the tasks.
    Arguments as of MAML, and

        compiled: the pieces are compiled by XLA, else plain TensorFlow.
        replicas: the devices that have parts of a meta-batch.

    Attribute: trained_on, the types of the inputs it was trained on, 'float', 'uint8' and so on.
    """

    def __init__(
        self, *arguments, compiled: bool = True, replicas: Replicas | None = None, **named
    ):
        super().__init__(*arguments, **named)
        self.compiled = compiled and can_compile(self.network)
        self.replicas = replicas or Replicas()
        self.checkpoint = tf.train.Checkpoint(
            **self.groups, metatrain_optimizer=self.metatrain_optimizer
        )
        self.pretrain_checkpoint = tf.train.Checkpoint(
            **self.groups, pretrain_optimizer=self.pretrain_optimizer
        )

    # Pieces.

    @piece
    def prepare(self, *inputs):
        return super().prepare(*inputs)

    @piece
    def update(self, *arguments, **named):
        return super().update(*arguments, **named)

    @piece
    def output(self, *arguments):
        return super().output(*arguments)

    @piece
    def outcome(self, weights, norms, x, y, leading: Leading = None):
        return super().outcome(weights, norms, x, y, leading)

    @piece
    def apply(self, optimizer, gradients):
        super().apply(optimizer, gradients)

    # Weights that tasks share.

    def shared_weights(self, tasks: int | tf.Tensor) -> dict[str, Shared]:
        """θ, which the tasks have in common until the first update."""
        shared = {}
        for name, theta in self.weights.items():
            zeros = tf.zeros([tasks, *theta.shape], self.dtype)
            shared[name] = Shared(tf.convert_to_tensor(theta), zeros)
        return shared

    def initial_weights(self, tasks: int | tf.Tensor) -> Tensors:
        return {name: per_task(theta) for name, theta in self.shared_weights(tasks).items()}

    def start(self, tasks: int) -> dict:
        """Shared where that is faster.

        An update of shared weights is a program of its own, which takes longer to compile than it
        saves if more follow.
        """
        shared = self.num_updates == 1 and takes_shared(self.network)
        return self.shared_weights(tasks) if shared else self.initial_weights(tasks)

    # Chunks of tasks, and parts of the devices.

    def meta_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """As MAML's; batch: from `replicas.place`. Raises ValueError for a wrong shape or type."""
        # Called at once, TensorFlow would look for the derivative of the last program's gradient.
        traced = self._traced_gradient if tf.executing_eagerly() else self._mean_gradient
        loss, *gradients = traced(batch)
        return loss, gradients

    @graph
    def _traced_gradient(self, batch: Batch) -> list[tf.Tensor]:
        return self._mean_gradient(batch)

    def _mean_gradient(self, batch: Batch) -> list[tf.Tensor]:
        return self.replicas.mean(self._meta_gradient, batch)

    @phased
    def _meta_gradient(self, batch: Batch, phase: Phase) -> list[tf.Tensor]:
        """A sum over tasks can be taken chunk by chunk: they run side by side, in little memory."""
        batch = self.training_batch(batch)
        tasks = batch.inputa.shape[0]
        # Of one update XLA makes the faster program if it sees all; more would take it too long.
        if self.num_updates <= 1:
            parts = [self._whole_gradient(chunk, phase) for chunk in chunks(batch, self.network)]
        else:
            types = [self.dtype] * (1 + len(self.parameters))
            gradient = functools.partial(self.gradient_of_sum, phase=phase)
            parts = in_a_loop(gradient, batch, types, self.network)
        return [pairwise_sum(terms) / tasks for terms in zip(*parts)]

    def training_batch(self, batch: Batch) -> Batch:
        """As `checked_batch`; a Learner asks later of which type the inputs were."""
        batch = as_tensors(batch)
        checked, kind = checked_batch(batch, self.network, self.dtype), batch.inputa.dtype
        self.trained_on |= {'float' if kind.is_floating else kind.name}
        return checked

    def gradient_of_sum(self, batch: Batch, phase: Phase) -> list[tf.Tensor]:
        with constant_zeros():
            return super().gradient_of_sum(batch, phase)

    def last_loss(self, theta, norms, alpha, *others) -> tf.Tensor:
        """As MAML's. Where updates come before, it is one program, with its gradient."""
        if self.num_updates <= 1 or isinstance(self.network, HeadOnly):
            return super().last_loss(theta, norms, alpha, *others)
        values = (theta, norms) if alpha is None else (theta, norms, alpha)
        return with_gradient(lambda values: self._last_loss(values, *others), values)

    @piece
    def _last_loss(self, values: tuple, *others) -> tuple[tf.Tensor, tuple]:
        values = tf.nest.map_structure(tf.identity, values)  # layers may have a step size in common
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = MAML.last_loss(self, *(*values, None)[:3], *others)
        return loss, tape.gradient(loss, values, unconnected_gradients='zero')

    @piece
    def _whole_gradient(self, chunk: Batch, phase: Phase) -> list[tf.Tensor]:
        return self.gradient_of_sum(chunk, phase)

    def pretrain_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """As MAML's; batch: from `replicas.place`. Raises ValueError for a wrong shape or type."""

        def of_part(part):
            part = self.training_batch(part)
            with constant_zeros():
                return tf.nest.flatten(MAML.pretrain_gradient(self, part))

        loss, *gradients = self.replicas.mean(of_part, batch)
        return loss, gradients

    @graph
    def metatrain_step(self, batch: Batch) -> tf.Tensor:
        return super().metatrain_step(batch)

    @graph
    def pretrain_step(self, batch: Batch) -> tf.Tensor:
        return super().pretrain_step(batch)

    def evaluate(self, batch: Batch, num_updates: int, transductive: bool = True) -> Results:
        """As MAML's. Raises ValueError for a wrong shape or type, or fewer than one update."""
        num_updates = whole_number('num_updates', num_updates, lowest=1)
        return self._evaluate(as_tensors(batch), num_updates, transductive)

    @graph
    def _evaluate(self, batch: Batch, num_updates: int, transductive: bool) -> Results:
        batch = checked_batch(batch, self.network, self.dtype)
        types = Results(*[self.dtype] * len(Results._fields))
        evaluate = functools.partial(
            MAML.evaluate, self, num_updates=num_updates, transductive=transductive
        )
        parts = in_a_loop(evaluate, batch, types, self.network)
        return Results(*map(tf.concat, zip(*parts), TASK_AXIS))

    def evaluate_together(self, batch: Batch, num_updates: int, transductive: bool = True):
        """Of this process's tasks to the results of all; without outputs if there are replicas."""
        if not self.replicas.strategy:
            return self.evaluate(batch, num_updates, transductive)
        table = self._evaluate_replicas(self.replicas.place(batch), num_updates, transductive)
        parts = tf.split(table, [1, num_updates, 1, num_updates])  # of [2 + 2J, T]
        loss1, losses2, accuracy1, accuracies2 = parts
        none = tf.zeros([table.shape[1], 0, 0], self.dtype)
        outputs = none, tf.stack([none] * num_updates)
        return Results(loss1[0], losses2, accuracy1[0], accuracies2, *outputs)

    @graph
    def _evaluate_replicas(self, batch: Batch, num_updates: int, transductive: bool) -> tf.Tensor:
        def table(part):
            results = self._evaluate(part, num_updates, transductive)
            before = results.loss1[tf.newaxis], results.accuracy1[tf.newaxis]
            return tf.concat([before[0], results.losses2, before[1], results.accuracies2], axis=0)

        return self.replicas.gather(table, batch)

    def steps(
        self, batches: Batch, first: int, last: int, pretrain: bool = False
    ) -> tuple[int, float]:
        """One outer step on each of the meta-batches first...last-1 of `batches`, [count, T, ...].

        Returns the number of the meta-batch after the last one used, and its loss, which is not
        finite if that is not `last`. Many steps on tiny tasks are one program: starting each would
        take longer than the step.
        """
        step = self.pretrain_step if pretrain else self.metatrain_step
        if self.replicas.strategy:
            return self._placed_steps(step, batches, first, last)
        if batches.inputa.shape[0] > 1:
            end, loss = self._steps(step, batches, tf.constant(first), tf.constant(last))
            return int(end), float(loss)
        return first + 1, float(step(Batch(*(values[0] for values in batches))))

    @piece
    def _steps(self, step: Callable, batches: Batch, first: tf.Tensor, last: tf.Tensor) -> tuple:
        def unfinished(i, loss):
            return (i < last) & tf.math.is_finite(loss)

        def body(i, _):
            return i + 1, step(Batch(*(values[i] for values in batches)))

        return tf.while_loop(unfinished, body, [first, tf.zeros([], self.dtype)])

    def _placed_steps(self, step: Callable, batches: Batch, first: int, last: int):
        """One by one; batches: this process's tasks."""
        for i in range(first, last):
            batch = Batch(*(values[i] for values in batches))
            loss = float(step(self.replicas.place(batch)))
            if not np.isfinite(loss):
                break
        return i + 1, loss

    def agree(self):
        """Gives the model of every process the variables of the first one's."""
        optimizers = (self.metatrain_optimizer, self.pretrain_optimizer)
        variables = [*self.parameters, *(v for adam in optimizers for v in adam.variables)]
        values = self.replicas.agree([variable.numpy() for variable in variables])
        for variable, value in zip(variables, values):
            variable.assign(value)

    def restore(self, path: str) -> bool:
        """Loads a checkpoint of this program, or the weights in one of the TensorFlow 1 original.

        Returns whether Adam's state came with the weights. Raises ValueError, with nothing loaded,
        if the parameters in it are not those of this network.
        """
        variables = self.named_parameters
        values, optimizers = read_checkpoint(path, [*variables])
        check_parameters(path, values, variables)
        for name, variable in variables.items():
            variable.assign(tf.cast(values[name], variable.dtype))
        state = {name: getattr(self, name) for name in optimizers}
        if state:
            read_objects(path, state)
        return bool(state)


def with_gradient(program: Callable, values) -> tf.Tensor:
    """The scalar of a program that returns (scalar, its gradient for `values`).

    values: nested tensors. Derivatives of the gradient go through the program's operations.
    """

    @tf.custom_gradient
    def scalar(*flat):
        found, gradient = program(tf.nest.pack_sequence_as(values, flat))

        def scaled(upstream, variables=()):  # which are read, as those of a frozen layer
            terms = [None if g is None else upstream * g for g in tf.nest.flatten(gradient)]
            return (terms, [None] * len(variables)) if variables else terms

        return found, scaled

    return scalar(*tf.nest.flatten(values))


def can_compile(network) -> bool:
    """Whether XLA compiles a network; says so if not."""
    possible = getattr(network, 'compilable', True)
    if not possible:
        warnings.warn('XLA cannot compile this network, so it runs uncompiled', stacklevel=3)
    return possible


def check_parameters(path: str, values: Arrays, variables: dict[str, tf.Variable]):
    """Raises ValueError if the parameters in a checkpoint are not those of the network."""
    for name, variable in variables.items():
        if name not in values:
            raise ValueError(
                f'{path} is of another architecture: it has no {name}, but {", ".join(values)}'
            )
        if values[name].shape != tuple(variable.shape):
            raise ValueError(
                f'{path} is of another architecture: {name} is {list(values[name].shape)} in it '
                f'and {variable.shape.as_list()} in the network that the flags describe'
            )


def as_tensors(batch: Batch) -> Batch:
    """A meta-batch as tensors, see `utils.named_batch`. Raises ValueError for what is none."""
    batch = named_batch(batch)
    try:
        return Batch(*map(tf.convert_to_tensor, batch))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'a meta-batch must be four arrays, {", ".join(Batch._fields)} ({first_line(error)})'
        ) from error


def checked_batch(batch: Batch, network, dtype: tf.DType) -> Batch:
    """A meta-batch in the model's dtype; see utils.Batch.

    Raises ValueError if it does not fit the network.
    """
    batch = as_tensors(batch)
    tasks = batch.inputa.shape[0] if batch.inputa.shape.rank else None
    for name, values in zip(Batch._fields, batch):
        real = values.dtype.is_floating or values.dtype.is_integer or values.dtype.is_bool
        if values.shape.rank != 3 or values.shape[0] != tasks or not real:
            raise ValueError(
                f'{name} must be [tasks, examples, size] of numbers, with the {tasks} tasks '
                f'of inputa, but it is {values.shape.as_list()} of {values.dtype.name}'
            )
        size = getattr(network, 'dim_input' if name.startswith('input') else 'dim_output', None)
        if size not in (None, values.shape[2]):
            raise ValueError(
                f'{name} is {values.shape.as_list()}, but the network takes [tasks, examples, '
                f'{size}]'
            )
    pairs = [(batch.inputa, batch.labela, 'a'), (batch.inputb, batch.labelb, 'b')]
    for inputs, labels, name in pairs:
        if inputs.shape[1] != labels.shape[1]:
            raise ValueError(
                f'input{name} has {inputs.shape[1]} examples per task, but label{name} has '
                f'{labels.shape[1]}'
            )
    return Batch(*(tf.cast(values, dtype) for values in batch))


def pairwise_sum(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Of neighbours, then of their sums, and so on.

    The same numbers are added, whether one device has all of the values or two, or four, have equal
    parts. Rounding otherwise grows to percents of the weights within 20 iterations.
    """
    while len(values) > 1:
        values = [tf.add_n(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def chunks(batch: Batch, network=None) -> list[Batch]:
    """A meta-batch in chunks of `chunk_size` tasks; the last may have fewer."""
    tasks, each = batch.inputa.shape[0], chunk_size(batch, network)
    return [Batch(*(values[i : i + each] for values in batch)) for i in range(0, tasks, each)]


def in_a_loop(function: Callable, batch: Batch, types, network=None) -> list:
    """What a function returns for each of the chunks of a meta-batch, in order.

    types: of what it returns, in the same nesting. The equal chunks are turns of a loop of the
    graph, as many at a time as there are cores: with a copy of the function's operations for each
    of them, the graph of Omniglot, 20-way 1-shot, takes 13 s more to make, and a tenth more memory
    to run. But one turn waits for another where programs read variables, as a network says whose
    `reads_variables` is true: chunks of its tasks are no loop.
    """
    tasks, each = batch.inputa.shape[0], chunk_size(batch, network)
    count = tasks // each
    if count == 1 or getattr(network, 'reads_variables', False):
        return [function(chunk) for chunk in chunks(batch, network)]
    equal = [tf.reshape(v[: count * each], [count, each, *v.shape[1:]]) for v in batch]
    stacks = tf.map_fn(
        function, Batch(*equal), fn_output_signature=types, parallel_iterations=cores()
    )  # nested tensors [count, ...]
    flat = [tf.unstack(stack, count) for stack in tf.nest.flatten(stacks)]
    parts = [tf.nest.pack_sequence_as(types, part) for part in zip(*flat)]
    if count * each < tasks:
        parts.append(function(Batch(*(values[count * each :] for values in batch))))
    return parts


def chunk_size(batch: Batch, network=None) -> int:
    """How many tasks run together: enough chunks for all cores, each small enough for their caches.

    Of equally many tasks, as XLA compiles for each number of them, unless that made the chunks less
    than half as large as they can be. One chunk on a GPU, which wants all the work at once, and
    where the tasks are tiny. A network may say how many it takes at most.
    """
    tasks, limit = batch.inputa.shape[0], getattr(network, 'most_tasks', None)
    size = max(batch.inputa.shape[1], batch.inputb.shape[1]) * batch.inputa.shape[2]
    if limit:
        size = max(size, CHUNK_SIZE // limit)
    elif tasks * size <= CHUNK_SIZE // 4 or tf.config.list_physical_devices('GPU'):
        return tasks
    most = min(max(CHUNK_SIZE // size, 1), tasks)
    equal = max(n for n in range(1, most + 1) if tasks % n == 0)
    return equal if 2 * equal >= most else most


# Checks of networks and losses of one's own -------------------------------------------------------

PROBE = (2, 3)  # tasks and examples: different numbers, so that a mistaken axis does not broadcast


def check_numbers(update_lr: float, num_updates: int, meta_lr, clip: float | None, seed: int):
    """Raises ValueError, with the argument's name, for numbers out of range and for no numbers."""
    real_number('update_lr', update_lr)
    whole_number('num_updates', num_updates)
    if not isinstance(meta_lr, keras.optimizers.schedules.LearningRateSchedule):
        real_number('meta_lr', meta_lr)
    if clip is not None:
        real_number('clip', clip, above=0)
    whole_number('seed', seed)


def check_choice(name: str, value, choices: Sequence[str], more: str = ''):
    """Raises ValueError, with the argument's name, for a value that is no choice."""
    if value not in choices:
        known = ', '.join(map(repr, choices))
        raise ValueError(f'{name} must be one of {known}{more}, but it is {value!r:.60}')


def last_all_losses(loss_steps: str, iterations: int) -> float:
    """Until which iteration the losses after all updates count; 0: never. Raises ValueError."""
    check_choice('loss_steps', loss_steps, ('last', 'all'))
    iterations = whole_number('loss_steps_iterations', iterations)
    if loss_steps == 'all':
        return iterations or float('inf')
    if iterations:
        raise ValueError(
            f"loss_steps_iterations={iterations} is for loss_steps='all': give both or none"
        )
    return 0


def float_type(dtype) -> tf.DType:
    """float32 or float64, by name or as TensorFlow or NumPy have it. Raises ValueError."""
    try:
        found = tf.as_dtype(dtype)
    except TypeError:
        found = None
    if found not in (tf.float32, tf.float64):
        raise ValueError(f'dtype must be float32 or float64, but it is {dtype!r:.60}')
    return found


def check_network(network, dtype: tf.DType):
    """Raises ValueError if a network lacks something, or treats the axis of tasks wrongly.

    One of this file is right; another is called once, with a few random inputs.
    """
    needed = ('parameters', 'norm_parameters', 'prepare', '__call__')
    if lacking := [name for name in needed if not hasattr(network, name)]:
        raise ValueError(
            f'the network, of {type(network).__name__}, lacks {", ".join(lacking)}; maml.Network '
            'says what one needs, and a Keras model is one as it is'
        )
    if getattr(network, 'dtype', dtype) != dtype:
        raise ValueError(
            f'the network computes in {network.dtype}, but dtype is {dtype.name}; a Keras model '
            'computes in float64 after keras.config.set_dtype_policy("float64")'
        )
    known = type(network) in (FullyConnected, Convolutional, KerasNetwork)
    if known or not has_sizes(network):
        return
    tasks, examples = PROBE
    try:
        shape = probe_output(network, dtype).shape
    except Exception as error:  # the user's own code
        raise ValueError(
            f'the network fails on {tasks} tasks of {examples} examples, with weights of a task '
            f'each, [{tasks}, ...]: {first_line(error)}'
        ) from error
    if tuple(shape) != (*PROBE, network.dim_output):
        raise ValueError(
            f'the network must return [tasks, examples, dim_output], that is '
            f'{[*PROBE, network.dim_output]}, but returns {list(shape)}'
        )


def probe_output(network, dtype: tf.DType) -> tf.Tensor:
    """What a network makes of a few random inputs: [*PROBE, out]. Raises whatever it raises."""
    values, weights = {}, {}
    for i, (name, made) in enumerate((network.parameters | network.norm_parameters).items()):
        values[name] = tf.cast(initial_value(*made, seed=[0, i]), dtype)
    for name in network.parameters:
        theta = values.pop(name)
        weights[name] = tf.tile(theta[tf.newaxis], PROBE[:1] + (1,) * theta.shape.rank)
    x = tf.random.stateless_uniform([*PROBE, network.dim_input], [0, 1], dtype=dtype)
    return network(network.prepare(x), weights, values)


def has_sizes(network) -> bool:
    """Whether a network says what it takes and returns, without which there is no check."""
    return hasattr(network, 'dim_input') and hasattr(network, 'dim_output')


def check_loss(loss: Callable, network, dtype: tf.DType):
    """Raises ValueError if a loss does not give one number for each task."""
    if not has_sizes(network):
        return
    output = tf.random.stateless_uniform([*PROBE, network.dim_output], [0, 1], dtype=dtype)
    label = tf.one_hot(tf.zeros(PROBE, tf.int32), network.dim_output, dtype=dtype)
    try:
        shape = tf.convert_to_tensor(loss(output, label)).shape
    except Exception as error:  # the user's own code
        raise ValueError(
            f'the loss fails on outputs and labels {list(output.shape)}: {first_line(error)}'
        ) from error
    if tuple(shape) != PROBE[:1]:
        raise ValueError(
            'the loss must return one number for each task, [tasks], of outputs and labels '
            f'[tasks, examples, out]; for {list(output.shape)} it returns {list(shape)}. '
            'One of Keras takes the mean over tasks too, which would change α: write it as '
            'tf.reduce_mean(..., axis=[1, 2])'
        )


def warn_of_probabilities(loss: Callable, network, dtype: tf.DType):
    """Warns of a network that ends in softmax with a loss that takes the softmax itself."""
    own = type(network) in (FullyConnected, Convolutional)
    if own or not hasattr(loss, 'shots') or not has_sizes(network) or network.dim_output < 2:
        return
    output = probe_output(network, dtype).numpy()
    if (output >= 0).all() and np.abs(output.sum(-1) - 1).max() < 1e-5:
        warnings.warn(
            "the network's outputs are probabilities already, but cross_entropy takes logits: "
            'leave the softmax at its end away (activation=None, or classifier_activation=None)',
            stacklevel=4,
        )


def takes_shared(network) -> bool:
    """Whether weights may be special_grads.Shared: the class that defines __call__ says so."""
    network = network.network if isinstance(network, Partly) else network
    return said_with_call(network, 'takes_shared') or False


def said_with_call(network, name: str):
    """An attribute of the class that defines __call__: what inherits may have another call."""
    for kind in type(network).__mro__:
        if '__call__' in vars(kind):
            return vars(kind).get(name)
    return None


# Training -----------------------------------------------------------------------------------------

GROUP = 10  # blocks of tiny meta-batches that are drawn together


class Schedule(NamedTuple):
    """When a training run does what, in iterations, that is, outer steps."""

    pretrain: int  # iterations of joint training, which come before meta-training
    end: int  # iterations of both
    summary: int = 100  # between summaries of what adaptation does to a training meta-batch
    picture: int = 5000  # between pictures, a multiple of the former
    validation: int = 500  # between validations, likewise
    save: int = 1000  # between checkpoints, likewise

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cuts start...end into (first, last + 1) that nothing interrupts.

        Summaries come before, checkpoints and validations after the first iteration of an
        interval, and pre-training ends with iteration `pretrain` - 1.
        """
        while start < end:
            stop = (start // self.summary + 1) * self.summary
            if start % self.save == 0:
                stop = start + 1
            stop = min(stop, end, self.pretrain if start < self.pretrain else end)
            yield start, stop
            start = stop


class Diverged(Exception):
    """The loss, or a weight, is no longer a number; the text is one sentence for the user."""


class Observer:
    """What a Trainer tells of its run: nothing happens here. main.Log prints and writes summaries.

    Attribute: shows_pictures, whether pictures are to be made at all.
    """

    shows_pictures = False

    def training(self, results: Results, iteration: int):
        """What adaptation does to the meta-batch of an iteration, before its outer step."""

    def step_sizes(self, rates: dict[str, np.ndarray], iteration: int):
        """The step sizes of the inner loop that are learned, before the step of an iteration."""

    def validation(self, results: Results, interval: float, iteration: int):
        """What it does to the validation tasks; interval: half of the objective's 95 % interval."""

    def picture(self, name: str, picture: np.ndarray, iteration: int):
        """A picture of a task, [height, width, 3] uint8."""

    def steps(self, first: int, last: int, loss: float):
        """The iterations first...last-1 are done, the last one with this loss."""

    def line(self, text: str):
        """Something else to tell."""

    def flush(self):
        """A checkpoint follows: what was told so far is to be on the disk. Raises OSError."""

    def state(self) -> dict:
        """What the checkpoint is to keep of this, as JSON."""
        return {}


class Trainer:
    """The training loop: outer steps, and between them summaries, validations and checkpoints.

    model: a FastMAML. sources: {'train': ...} and, if that one validates, {'val': ...}; each a
    data_generator.DataGenerator or what has its attributes and methods. tasks: T. schedule: a
    Schedule. folder: of the checkpoints; it exists. log: an Observer. start: the first iteration,
    and state: of the checkpoint before it, if training continues. settings: what checkpoints keep
    of how the model was made. validation_tasks: how many a validation takes.
    Raises ValueError if the model's replicas cannot have equally many tasks.
    """

    def __init__(
        self,
        model: FastMAML,
        sources: dict,
        tasks: int,
        schedule: Schedule,
        folder: str | Path,
        log: Observer | None = None,
        start: int = 0,
        state: dict | None = None,
        settings: dict | None = None,
        validation_tasks: int = 100,
    ):
        self.model, self.sources, self.tasks, self.schedule = model, sources, tasks, schedule
        self.folder, self.log, self.start = Path(folder), log or Observer(), start
        self.settings, self.validation_tasks = settings or {}, validation_tasks
        self.source, self.replicas = sources['train'], model.replicas
        self.slice = self.replicas.slice_of(tasks)  # of the tasks, which this process draws
        self.updates = max(model.num_updates, self.source.updates_shown)  # that are evaluated
        self.saved = start - 1  # iteration of the newest checkpoint
        # Of the best validation: {'iteration', 'accuracy' or 'loss', 'interval'}.
        self.best = (state or {}).get('best')

    def run(self, stopped: Callable = lambda: False, watch: Callable = iter) -> int:
        """Trains to the end of the schedule, or until `stopped()` in one of the processes.

        watch: wraps the iterator of the data. Returns the number of iterations done. Raises
        Diverged, and OSError if something cannot be written.
        """
        end, block = self.schedule.end, self.source.iterations_at_once
        for origin, batches in watch(self.batches()):
            begin = max(origin, self.start)
            for first, last in self.schedule.stretches(begin, min(origin + block, end)):
                if first % self.schedule.summary == 0:
                    self.summarize(Batch(*(values.numpy() for values in batches)), origin, first)
                self.steps(batches, origin, first, last)
                if last < end and self.replicas.any(stopped(), last):
                    if self.saved != last - 1:
                        self.save(last - 1)
                    return last
        return end

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Blocks of training meta-batches [block, T, ...] with the iteration of the first.

        The next ones are drawn while those before are in use. Blocks begin at multiples of their
        length, wherever a run is continued: then all is as if it had not been interrupted. Small
        ones are drawn ten at a time, since Python's lock makes the loop wait at either's start.
        """
        block = self.source.iterations_at_once
        group = GROUP * block if block > 1 else 1

        def draw(origin: int) -> list[tuple[int, Batch]]:
            drawn = self.source.batches('train', origin, group, self.tasks, self.slice)
            blocks = []
            for i in range(0, group, block):
                batch = Batch(*(tf.constant(array[i : i + block]) for array in drawn))
                blocks.append((origin + i, batch))
            return blocks

        start, end = self.start, self.schedule.end
        for blocks in ahead(draw, range(start // group * group, end, group)):
            for origin, batch in blocks:
                if origin + block > start and origin < end:
                    yield origin, batch

    def summarize(self, batches: Batch, origin: int, iteration: int):
        """Tells what adaptation does to the meta-batch of an iteration; batches: arrays."""
        batch = Batch(*(values[iteration - origin] for values in batches))
        self.log.training(self.model.evaluate_together(batch, self.updates), iteration)
        if self.model.rates:
            rates = {name: rate.numpy() for name, rate in self.model.rates.items()}
            self.log.step_sizes(self.model.rule.shown(rates), iteration)
        if iteration % self.schedule.picture == 0 and self.log.shows_pictures:
            picture = self.source.picture(batch, self.outputs)
            if picture is not None:
                self.log.picture(self.source.picture_name, picture, iteration)

    def outputs(self, batch: Batch) -> np.ndarray:
        """On the query set after each update, [J, T, examples, out]."""
        return self.model.evaluate(batch, self.updates).outputsb.numpy()

    def steps(self, batches: Batch, origin: int, first: int, last: int):
        """The iterations first...last-1, and what is due after them."""
        positions, pretrain = (first - origin, last - origin), first < self.schedule.pretrain
        done, loss = self.model.steps(batches, *positions, pretrain=pretrain)
        if not np.isfinite(loss):
            self.stop(f'the loss is {loss} in iteration {origin + done - 1}')
        self.after(first, last, loss)

    def after(self, first: int, last: int, loss: float):
        """What is due after the iterations first...last-1."""
        schedule = self.schedule
        self.log.steps(first, last, loss)
        if first % schedule.validation == 0 and first != 0 and self.source.validates:
            self.validate(first)
        if first % schedule.save == 0 and first != 0 or last == schedule.end:
            self.save(last - 1)

    def validate(self, iteration: int):
        """Validation tasks, the same every time; keeps the checkpoint with the best objective."""
        results, objective = self.validation_results(), self.source.objective
        values = results.of(objective)[1][self.model.num_updates - 1]  # [tasks]
        mean, interval = float(np.mean(values)), float(confidence(values))
        self.log.validation(results, interval, iteration)
        best = self.best or {objective: np.nan}
        if is_better(mean, best[objective], objective):
            self.best = {'iteration': iteration, objective: mean, 'interval': interval}
            self.save(iteration, 'best')
            verdict = 'the best so far'
        elif np.isfinite(best[objective]):
            verdict = f'the best was {best[objective]:.4f} at iteration {best["iteration"]}'
        else:
            verdict = 'none was finite so far'
        shown = f'{mean:.4f} +- {interval:.4f}, {verdict}.'
        what = f'{objective.capitalize()} on {self.validation_tasks} validation tasks'
        self.log.line(f'{what}: {shown}')

    def validation_results(self) -> Results:
        """Of as many tasks as a meta-batch has at a time, for which the evaluation is compiled."""
        whole = -(-self.validation_tasks // self.tasks) * self.tasks
        parts = []
        for i in range(0, whole, self.tasks):
            tasks = slice(i + self.slice.start, i + self.slice.stop)
            batch = self.sources['val'].batch('val', 0, whole, tasks)
            parts.append(self.model.evaluate_together(batch, self.updates))
        kept = range(self.validation_tasks)
        joined = map(np.concatenate, zip(*parts), TASK_AXIS)
        return Results(*(values.take(kept, axis) for values, axis in zip(joined, TASK_AXIS)))

    def save(self, iteration: int, kind: str = 'model'):
        """Writes a checkpoint, after what was told: nothing is missing when the run continues.

        Raises OSError, and Diverged if a weight is not a number.
        """
        if not self.model.is_finite():
            self.stop(f'a weight is not a number after iteration {iteration}')
        if not self.replicas.is_chief:
            return
        self.log.flush()
        pretraining = iteration < self.schedule.pretrain
        checkpoint = self.model.pretrain_checkpoint if pretraining else self.model.checkpoint
        state = {'flags': self.settings, 'best': self.best, 'machine': machine()}
        state |= {'classes': self.source.classes} if self.source.classes else {}
        write_checkpoint(checkpoint, self.folder, iteration, state | self.log.state(), kind)
        if kind == 'model':
            self.saved = iteration

    def stop(self, what: str):
        """Raises Diverged."""
        last = f'{self.folder}/model{self.saved} is the last good checkpoint'
        if self.saved < 0:
            last = 'there is no checkpoint yet'
        raise Diverged(
            f'{what}, so training has stopped; {last}. Try a smaller --update_lr or --meta_lr, or '
            '--norm=batch_norm, with another --logdir'
        )


def is_better(value: float, best: float, objective: str) -> bool:
    """Whether a loss is lower, or an accuracy higher; what is no finite number never is."""
    if not np.isfinite(value) or not np.isfinite(best):
        return bool(np.isfinite(value))
    return value > best if objective == 'accuracy' else value < best


def evaluate_tasks(
    model: FastMAML,
    source,
    split: str,
    tasks: int,
    num_updates: int,
    transductive: bool = True,
) -> Iterator[np.ndarray]:
    """The source's objective for tasks of a split, before and after each update.

    Arguments as of `Trainer` and FastMAML.evaluate. Yields [some tasks, 1 + num_updates] at a
    time, which bounds the memory, together `tasks` of them or a few more.
    """
    chunk = source.tasks_at_once * model.replicas.count
    part, whole = model.replicas.slice_of(chunk), -(-tasks // chunk) * chunk

    def draw(i: int) -> Batch:
        return source.batch(split, 0, whole, slice(i + part.start, i + part.stop))

    for batch in ahead(draw, range(0, whole, chunk)):
        results = model.evaluate_together(batch, num_updates, transductive)
        before, after = results.of(source.objective)
        yield np.concatenate([[before], after]).T  # [chunk, 1 + updates]


def ahead(draw: Callable, arguments: Iterable) -> Iterator:
    """draw(argument) for each, in a thread of its own while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for argument in arguments:
            ready, coming = coming, thread.submit(draw, argument)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


# Arrays in, arrays out ----------------------------------------------------------------------------


class Parts(NamedTuple):
    """The methods of a model that a Learner takes, as pieces or plain; see FastMAML."""

    prepare: Callable
    update: Callable
    output: Callable
    outcome: Callable

    @classmethod
    def plain(cls, model: FastMAML) -> 'Parts':
        """Without the programs of their own that pieces are."""
        found = []
        for name in cls._fields:
            method = inspect.getattr_static(type(model), name)
            found.append(getattr(method, 'method', method).__get__(model))
        return cls(*found)


class AnySize:
    """What a Learner has of its model, for any number of tasks and examples.

    Each of these is traced once for one task and once for several, with all numbers unknown: a
    program for each size would fill the memory of a process that lives long. A network of one's own
    that must know the numbers runs without programs. A compiled model has programs for the first
    COMPILED sizes, since XLA needs to know them, and the others run as of one that is not compiled.
    Here x is [T, examples, D], y [T, examples, out], and weights are [T, ...].
    """

    COMPILED = 24

    def __init__(self, model: FastMAML):
        self.model, self.common = model, Common(model.norms, model.rates)
        self.plain = Parts.plain(model)
        self.pieces = Parts(*(getattr(model, name) for name in Parts._fields))
        self.programs, self.compiled = {}, set()
        self.compiles = getattr(model, 'compiled', False)

    def adapt(
        self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, lr, steps: int, done: int = 0
    ) -> Tensors:
        """The weights after so many updates more; lr: α, a scalar; done: updates before these."""
        size = tf.constant(lr, self.model.dtype)
        return self._run(self._adapt, x, y, weights, size, done, done + steps)

    def adapt_as_learned(
        self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, scale, steps: int, done: int = 0
    ) -> Tensors:
        """The same with the step sizes that the outer loop has learned, times `scale`."""
        size = tf.constant(scale, self.model.dtype)
        return self._run(self._adapt_as_learned, x, y, weights, size, done, done + steps)

    def output(
        self, x: tf.Tensor, weights: Tensors, leading: int | None = None, done: int = 0
    ) -> tf.Tensor:
        """As MAML.output, of inputs that are not prepared; done: updates that the weights had."""
        if leading is None:
            return self._run(self._output, x, weights, done)
        return self._run(self._output, x, weights, done, leading)

    def losses(self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, done: int = 0) -> tf.Tensor:
        """[T]; done: see `output`."""
        return self._run(self._losses, x, y, weights, done)

    def _adapt(self, parts: Parts, x, y, weights, lr, done, end) -> Tensors:
        return self._updated(parts, x, y, weights, done, end, lambda alpha: lr)

    def _adapt_as_learned(self, parts: Parts, x, y, weights, scale, done, end) -> Tensors:
        def scaled(alpha):
            return tf.nest.map_structure(lambda rate: scale * rate, alpha)

        return self._updated(parts, x, y, weights, done, end, scaled)

    def _updated(self, parts: Parts, x, y, weights, done, end, chosen: Callable) -> Tensors:
        """chosen: from the rule's α of an update to that which it gets."""
        x = parts.prepare(x, *self.model.preparing(self.common))

        def update(step, theta):
            norms, alpha = self.model.at(self.common, step)
            theta = parts.update(theta, norms, x, y, chosen(alpha))
            shapes = {name: weights[name].shape for name in theta}  # as loops want to know them
            return step + 1, {name: tf.ensure_shape(theta[name], shapes[name]) for name in theta}

        return tf.while_loop(lambda step, _: step < end, update, [done, weights])[1]

    def _output(self, parts: Parts, x, weights, done, *leading) -> tf.Tensor:
        x = parts.prepare(x, *self.model.preparing(self.common, *leading))
        return parts.output(weights, self._norms_after(done), x, *leading)

    def _losses(self, parts: Parts, x, y, weights, done) -> tf.Tensor:
        x = parts.prepare(x, *self.model.preparing(self.common))
        return parts.outcome(weights, self._norms_after(done), x, y)[0]

    def _norms_after(self, done: int | tf.Tensor) -> Tensors:
        """The normalisation parameters of queries after so many updates, as in training."""
        before = max(done - 1, 0) if isinstance(done, int) else tf.maximum(done - 1, 0)
        return self.model.at(self.common, before)[0]

    def _run(self, function: Callable, x: tf.Tensor, *others):
        size = function.__name__, *x.shape, len(others)
        if self.compiles and (size in self.compiled or len(self.compiled) < self.COMPILED):
            self.compiled.add(size)
            return function(self.pieces, x, *others)
        if tf.config.functions_run_eagerly():
            return function(self.plain, x, *others)
        key = function.__name__, x.shape[0] == 1, len(others)
        program = self.programs.get(key)
        if program is None:
            program = self._program(functools.partial(function, self.plain), x, *others)
        result = program(x, *others)
        self.programs[key] = program  # not of a loss that failed
        return result

    def _program(self, function: Callable, *arguments) -> Callable:
        """The function as a program for arguments like these; itself if there can be none."""
        tasks, signature = 1 if arguments[0].shape[0] == 1 else None, []
        for argument in arguments:
            if isinstance(argument, dict):  # weights
                kept = {name: value.shape[1:] for name, value in argument.items()}
                spec = {
                    name: tf.TensorSpec([tasks, *kept[name]], self.model.dtype) for name in kept
                }
            elif tf.is_tensor(argument) and argument.shape.rank:  # x, y
                spec = tf.TensorSpec([tasks, None, argument.shape[2]], self.model.dtype)
            else:
                spec = tf.TensorSpec([], tf.convert_to_tensor(argument).dtype)
            signature.append(spec)
        program = tf.function(function, input_signature=signature, autograph=False)
        try:
            program.get_concrete_function()
        except Exception:  # whatever it is: without a program it is shown as it is
            return function
        return program


class ArraysOfTasks:
    """The arrays that a Learner takes, checked and made tensors.

    Subclasses have model, is_classifier and takes_images.
    """

    def _labels(self, y: np.ndarray) -> tuple[tf.Tensor, bool]:
        """Labels [T, examples, out] of what `adapt` takes, and whether they are of one task."""
        y, out = real_numbers('labels', y), self.model.network.dim_output
        rank = 1 if self.is_classifier else 2  # of one task's
        if y.ndim not in (rank, rank + 1) or not y.size:
            wanted = '[examples]' if self.is_classifier else f'[examples, {out}]'
            raise ValueError(
                f'labels must be {wanted}, or that with an axis of tasks before, but they are '
                f'{list(y.shape)}'
            )
        if self.is_classifier:
            label = one_hot(y, out)
        elif y.shape[-1] != out:
            raise ValueError(
                f'labels must have {out} values per example, but they are {list(y.shape)}'
            )
        else:
            label = y
        single, dtype = y.ndim == rank, self.model.dtype.as_numpy_dtype
        label = finite_numbers('labels', label, dtype)
        return tf.constant(label[np.newaxis] if single else label), single

    def _examples(self, x, name: str, single: bool, axes: Sequence[int | None] = (None, None)):
        """Inputs [T, examples, D] of what `adapt` takes; axes: (T, examples), where known."""
        x, size = real_numbers(name, x), self.model.network.dim_input
        x = x[np.newaxis] if single else x
        fits = x.ndim >= 3 and x.size and int(np.prod(x.shape[2:])) == size
        if not fits or any(axis not in (None, given) for axis, given in zip(axes, x.shape)):
            shape = getattr(self.model.network, 'image_shape', [size])
            names = [given or name for given, name in zip(axes, ('T', 'examples'))]
            wanted = [*names[single:], *shape]
            raise ValueError(f'{name} must be {wanted}, but it is {list(x.shape[single:])}')
        x = pixel_values(name, x) if self.takes_images else x
        check_bytes(name, x, self.model.trained_on)
        x = finite_numbers(name, x, self.model.dtype.as_numpy_dtype)
        return tf.constant(x.reshape(*x.shape[:2], size))

    def _is_single(self, weights: Arrays) -> bool:
        """Whether weights are of one task, without an axis for it.

        Raises ValueError if they are not of this network.
        """
        own = self.model.weights
        text = f'weights must be what adapt() returns, with {", ".join(own)}, but they '
        if not isinstance(weights, Mapping):
            raise ValueError(f'{text}are of type {type(weights).__name__}')
        text += 'have '
        if {*own} != {*weights}:
            raise ValueError(text + ', '.join(map(str, weights)))
        arrays = {name: real_numbers(f'the weight {name}', weights[name]) for name in own}
        axes = {arrays[name].ndim - theta.shape.rank for name, theta in own.items()}
        if axes not in ({0}, {1}):
            names = ', '.join(weights)
            raise ValueError(
                f'{text}{names} of other shapes than one task or one axis of tasks gives'
            )
        return axes == {0}

    def _given(self, weights: Arrays, tasks: int, single: bool) -> Tensors:
        """Weights [T, ...] from what `adapt` returns."""
        if self._is_single(weights) != single:
            have, need = ('several tasks', 'one') if single else ('one task', 'several')
            raise ValueError(f'weights are of {have}, examples of {need}')
        given = {}
        for name, theta in self.model.weights.items():
            value = np.asarray(weights[name])
            value = value[np.newaxis] if single else value
            if value.shape != (tasks, *theta.shape):
                raise ValueError(
                    f'the weight {name} is {list(value.shape[single:])}, but {tasks} tasks of '
                    f'{theta.shape.as_list()} are needed'
                )
            dtype = self.model.dtype.as_numpy_dtype
            given[name] = tf.constant(finite_numbers(f'the weight {name}', value, dtype))
        return given


PIXEL_TOLERANCE = 1e-5  # by which pixels may be beyond 0 and 1, from rounding


def pixel_values(name: str, images: np.ndarray) -> np.ndarray:
    """Values from 0 to 1, of those or of uint8. The type decides, as 0 and 1 may be either's.

    Raises ValueError, with the name, for others.
    """
    if images.dtype == np.uint8:
        return images / 255
    if not (images.min() >= -PIXEL_TOLERANCE and images.max() <= 1 + PIXEL_TOLERANCE):
        raise ValueError(
            f'{name} must have values from 0 to 1, or be uint8 from 0 to 255, but it is '
            f'{images.dtype} from {images.min()} to {images.max()}'
        )
    return images


def check_bytes(name: str, x: np.ndarray, trained_on: Collection[str]):
    """Raises ValueError, with the name, for uint8 if training was on floats: another scale."""
    if x.dtype == np.uint8 and 'float' in trained_on and 'uint8' not in trained_on:
        raise ValueError(
            f'{name} is uint8, but the model was trained on floats; give numbers as in training, '
            'for example divided by 255'
        )


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """[...] -> [..., classes]. Raises ValueError for what are no classes' numbers."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'labels must be integers from 0 to {classes - 1}, but they are {labels.dtype} from '
            f'{labels.min()} to {labels.max()}'
        )
    return np.eye(classes)[labels]


def checked_finite(arrays: Arrays, what: str) -> Arrays:
    """Raises ValueError if adaptation has diverged, so that there are no numbers any more."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f'{what} are NaN or infinite: adaptation diverged, try a smaller lr')
    return arrays


class Learner(ArraysOfTasks):
    """A model that learns tasks of one's own from NumPy arrays.

    Of one task, x is [examples, ...], y [examples] and weights [...]; of several, with an axis of
    tasks before: x [T, examples, ...], y [T, examples], weights [T, ...]. An example is an array of
    any shape of the network's size; its numbers go into the network as they are, as in training. Of
    a run of main.py on images they are from 0 to 1, or uint8 from 0 to 255: the type alone says
    which, 0 and 1 of uint8 are almost black. y are the classes' numbers, 0 to N-1; of regression,
    the values, [(T,) examples, out].

    Attributes: model, a FastMAML; of one that was loaded also settings, the flags it was trained
    with, and checkpoint, the path.
    """

    def __init__(self, model: FastMAML, settings: dict | None = None):
        if not isinstance(model, MAML):
            raise ValueError(f'model must be a FastMAML, but it is a {type(model).__name__}')
        if not has_sizes(model.network):
            raise ValueError('the network must have dim_input and dim_output, see maml.Network')
        self.model, self.settings, self.checkpoint = model, settings or {}, None
        self.is_classifier = hasattr(model.loss, 'shots')
        self.takes_images = self.is_classifier and of_images(self.settings)
        self.programs = AnySize(model)

    @classmethod
    def load(
        cls,
        run_folder: str | Path,
        checkpoint: int | str = -1,
        compiled: bool = False,
        network=None,
        loss: Callable | None = None,
        learn_lr: UpdateRule | None = None,
    ) -> 'Learner':
        """The model of a training run, or of `save`.

        checkpoint: an iteration, -1 for the newest, or 'best' for that of the best validation.
        compiled: see FastMAML; it takes seconds for each new number of tasks or examples, and pays
        for many tasks. network, loss, learn_lr: the run's, if they are not those of this program; a
        network may be a keras.Model. Raises ValueError if there is no such checkpoint, or it is
        damaged or does not tell its flags, or network, loss or learn_lr is missing.
        """
        path = find_checkpoint(run_folder, checkpoint)
        settings = read_run_state(path).get('flags')
        if not settings:
            raise ValueError(
                f'{path} does not tell the flags it was trained with; if it is the TensorFlow 1 '
                "original's, scripts/model/import_tf1_checkpoint.py makes one that does"
            )
        check_network_is_given(path, settings, network)
        if isinstance(network, keras.Model):
            network = KerasNetwork(network, audit=None)  # as when it was trained
        if settings.get('loss') and loss is None:
            raise ValueError(f'{path} was trained with a loss of its own: give it as loss=')
        made = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
        if settings.get('learn_lr', 'none') not in ('none', *LEARNED_RATES) and learn_lr is None:
            raise ValueError(f'{path} was trained with a rule of its own: give it as learn_lr=')
        made |= {} if learn_lr is None else {'learn_lr': learn_lr}
        made['dtype'] = tf.as_dtype(settings.get('dtype', 'float32'))
        if isinstance(made.get('meta_lr'), dict):  # saved before `optimizer` was
            made['meta_lr'] = stored_object(made['meta_lr'], path)
        model = make_model(**made, compiled=compiled, network='' if network is None else network)
        if 'optimizer' in settings:
            set_optimizer(model, stored_object(settings['optimizer'], path))
        if loss is not None:
            check_loss(loss, model.network, model.dtype)
            model.loss = loss
        model.clip = settings.get('clip', model.clip)  # of models that were made in Python
        images = ['float'] if of_images(settings) else []
        model.trained_on = frozenset(settings.get('trained_on', images))
        model.restore(path)
        learner = cls(model, settings)
        learner.checkpoint = path
        return learner

    def save(self, folder: str | Path) -> str:
        """Writes FOLDER/model0, which `load` reads, and returns its path.

        Raises OSError, and ValueError if the folder has checkpoints of a run: `load` would take
        the newest of them.
        """
        folder = folder_path('folder', folder)
        if others := checkpoints(folder).keys() - {0}:
            raise ValueError(
                f'{folder} holds checkpoints of a run, {max(others)} the newest, which load would '
                'take: give another folder'
            )
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings or settings_of(self.model)
        settings = settings | {'trained_on': sorted(self.model.trained_on)}
        return write_checkpoint(self.model.checkpoint, folder, 0, {'flags': settings})

    def adapt(
        self,
        support_x: np.ndarray,
        support_y: np.ndarray,
        steps: int | None = None,
        lr: float | None = None,
        weights: Arrays | None = None,
        done: int = 0,
    ) -> Arrays:
        """The weights after inner updates on the support set of a task, or of several: equation 1.

        steps: `num_updates` if None. lr: α; None: `update_lr` or, if they were learned, the step
        sizes of training. For a classifier it is scaled so that it means the same for any number of
        examples. weights: where to start, θ if None; done: how many updates these have had, which
        counts where step sizes or normalisation differ from update to update.
        Raises ValueError for arguments that do not fit, and if the weights become infinite or NaN.
        """
        model = self.model
        steps = whole_number('steps', model.num_updates if steps is None else steps)
        done, as_learned = whole_number('done', done), lr is None and bool(model.rates)
        lr = real_number('lr', model.update_lr if lr is None else lr)
        label, single = self._labels(support_y)  # [T, examples, out]
        tasks, examples = label.shape[:2]
        x = self._examples(support_x, 'support_x', single, (tasks, examples))
        if weights is None:
            start = model.initial_weights(tasks)
        else:
            start = self._given(weights, tasks, single)
        scale = self.example_scale(examples)
        if as_learned:
            adapted = self.programs.adapt_as_learned(x, label, start, scale, steps, done)
        else:
            adapted = self.programs.adapt(x, label, start, lr * scale, steps, done)
        arrays = {name: value.numpy() for name, value in adapted.items()}
        sizes = 'learned step sizes' if as_learned else f'lr={lr:g}'
        checked_finite(arrays, f'after {steps} step{"s" * (steps != 1)} with {sizes} the weights')
        return {name: value[0] for name, value in arrays.items()} if single else arrays

    def predict(
        self,
        query_x: np.ndarray,
        weights: Arrays,
        support_x: np.ndarray | None = None,
        done: int | None = None,
    ) -> np.ndarray:
        """Class probabilities of the queries, [(T,) queries, N]; of regression, the outputs.

        weights: from `adapt`. support_x: if given, batch normalisation takes its statistics of this
        support set alone, so that an answer does not depend on the other queries; else of the
        queries, as in training and in the paper. done: how many updates the weights have had,
        `num_updates` if None; it counts with `norm_steps` only. Raises ValueError for arguments
        that do not fit, and for weights that give no finite answers.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        single = self._is_single(weights)
        x, leading = self._examples(query_x, 'query_x', single), None
        if support_x is not None:
            support = self._examples(support_x, 'support_x', single, (x.shape[0], None))
            x, leading = tf.concat([support, x], axis=1), support.shape[1]
        given = self._given(weights, x.shape[0], single)
        output = self.programs.output(x, given, leading, done)
        output = (tf.nn.softmax(output) if self.is_classifier else output).numpy()
        checked_finite({'output': output}, 'the answers')
        return output[0] if single else output

    def task_loss(
        self, x: np.ndarray, y: np.ndarray, weights: Arrays, done: int | None = None
    ) -> np.ndarray:
        """The mean loss of a task's examples, a number; of several tasks, [T].

        Arguments and errors as of `adapt` and `predict`.
        """
        done = whole_number('done', self.model.num_updates if done is None else done)
        label, single = self._labels(y)
        inputs = self._examples(x, 'x', single, label.shape[:2])
        given = self._given(weights, label.shape[0], single)
        loss = self.programs.losses(inputs, label, given, done).numpy()
        checked_finite({'loss': loss}, 'the losses')
        if self.is_classifier:  # a sum over examples, divided by training's K
            loss *= self.model.loss.shots / label.shape[1]
        return loss[0] if single else loss

    def example_scale(self, examples: float | tf.Tensor) -> float | tf.Tensor:
        """What α is to be multiplied by for a support set of so many examples.

        The loss of a classifier is a sum over them divided by training's K, and α is meant for N
        times their mean, whatever their number.
        """
        if not self.is_classifier:
            return 1
        return self.model.loss.shots * self.model.network.dim_output / examples


def of_images(settings: dict) -> bool:
    """Whether main.py trained on images, which it reads as values from 0 to 1."""
    return settings.get('datasource') in (*IMAGE_SHAPES, 'folder')


def settings_of(model: FastMAML) -> dict:
    """What `Learner.load` must know of a model that was not made from flags."""
    shots, plain = getattr(model.loss, 'shots', None), model.loss is mean_squared_error
    rule, network = model.learn_lr, model.network
    network = network.network if isinstance(network, Partly) else network
    return {
        'datasource': 'own',
        'network': type(network).__name__,
        'update_lr': model.update_lr,
        'num_updates': model.num_updates,
        'stop_grad': model.stop_grad,
        'clip': None if model.clip is None else float(model.clip),
        'loss_steps': model.loss_steps,
        'loss_steps_iterations': int(model.loss_steps_iterations),
        'first_order_iterations': int(model.first_order_iterations),
        'adapt': model.adapt,
        'learn_lr': rule if isinstance(rule, str) else type(rule).__name__,
        'norm_steps': model.norm_steps,
        'objective': 'loss' if shots is None else 'accuracy',
        'shots': shots,
        'loss': '' if plain or shots is not None else getattr(model.loss, '__name__', 'own'),
        'dtype': model.dtype.name,
        'optimizer': described(model.metatrain_optimizer),
    }


def described(optimizer: keras.Optimizer) -> dict:
    """Keras's description of an optimizer, as far as there is one."""
    try:
        return keras.optimizers.serialize(optimizer)
    except NotImplementedError:  # a schedule of one's own without get_config
        return {}


def stored_object(description: dict, path: str):
    """The optimizer or schedule that is described. Raises ValueError for an unknown class."""
    with contextlib.suppress(TypeError, ValueError):
        if description and is_known_to_keras(description):
            return keras.saving.deserialize_keras_object(description)
    raise ValueError(
        f'{path} was trained with an outer optimizer or a schedule of meta_lr that Keras does not '
        'know: give its class a get_config method, and decorate it with '
        'keras.saving.register_keras_serializable()'
    )


def is_known_to_keras(description) -> bool:
    """Whether all classes in a description are Keras's or registered: a file that somebody else
    wrote should not have a module imported.
    """
    if isinstance(description, (list, tuple)):
        return all(map(is_known_to_keras, description))
    if not isinstance(description, Mapping):
        return True
    if 'class_name' in description:
        home = (description.get('module') or '').split('.')[0]
        registered = keras.saving.get_registered_object(description.get('registered_name') or '')
        if home != 'keras' and registered is None:
            return False
    return all(map(is_known_to_keras, description.values()))


def find_checkpoint(run_folder: str | Path, checkpoint: int | str = -1) -> str:
    """The path of a run's checkpoint; arguments and errors as of `Learner.load`.

    Warns of newer ones that are damaged.
    """
    if not isinstance(checkpoint, str | int | np.integer) or checkpoint not in ('best', -1):
        text = "checkpoint, if it is not 'best' or -1 for the newest,"
        checkpoint = whole_number(text, checkpoint)
    folder = folder_path('run_folder', run_folder)
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}: give one that main.py trained in')
    found = checkpoints(folder, 'best' if checkpoint == 'best' else 'model')
    there = [*checkpoints(folder)]
    if not found and not there:
        raise ValueError(
            f'{folder} has no checkpoint{other_runs(folder)}: give a folder that main.py trained '
            'in, LOGDIR/cls_...'
        )
    if not found:
        raise ValueError(
            f'{folder} has no best checkpoint, which training keeps from its first validation on: '
            f'train on, or take the newest, of iteration {there[-1]}'
        )
    if checkpoint not in (-1, 'best', *found):
        raise ValueError(
            f'{folder} has no checkpoint {checkpoint!r}; iterations that are there: '
            f'{", ".join(map(str, there))}'
        )
    wanted = {checkpoint: found[checkpoint]} if checkpoint in found else found
    try:
        return first_whole(dict(reversed(wanted.items())), warnings.warn)[1]
    except DamagedCheckpoint as error:
        remedy = 'give another checkpoint, or a copy of the run that is whole'
        raise DamagedCheckpoint(f'{error}; {remedy}') from error


def check_network_is_given(path: str, settings: dict, network):
    """Raises ValueError if a run had a network of the user's, which a checkpoint does not hold.

    The file is not run unasked: a checkpoint may come from anywhere.
    """
    if isinstance(network, str):
        raise ValueError(f'network must be a keras.Model or another network, not {network!r:.60}')
    spec = settings.get('network')
    if spec and network is None:
        raise ValueError(
            f'{path} was trained with --network={spec}, which it does not hold and which is not '
            'run unasked: give it again, by --network or from Python as network='
        )


# The way Keras users work -------------------------------------------------------------------------


class MetaModel(keras.Model):
    """A FastMAML with Keras's `compile`, `fit` and `evaluate`, and a Learner's `adapt`.

    What Keras calls a batch is a meta-batch here, see `as_dataset`; its callbacks work, and so do
    `save_weights` and `load_weights`.

    model: a FastMAML; or a keras.Model or other network, of which one is made with `loss`,
    `update_lr` and what else FastMAML takes. updates: how many updates the metrics tell of, at
    least as many as in training. transductive: of evaluation, as of FastMAML.evaluate.
    Attributes: maml, the FastMAML; learner, the Learner of it.
    Raises ValueError for arguments that do not fit each other, and what their makers raise.
    """

    supports_jit = False  # as a whole: pieces of it are compiled

    def __init__(
        self,
        model,
        loss: Callable | None = None,
        updates: int = 1,
        transductive: bool = True,
        name: str = 'maml',
        **given,
    ):
        super().__init__(name=name)
        maml = as_maml(model, loss, given)
        self.maml, self.learner = maml, Learner(maml)
        updates = whole_number('updates', updates)
        self.updates, self.transductive = max(updates, maml.num_updates), transductive
        self.measured = TaskMeans(self.updates, maml, self.learner.is_classifier)
        self.watches = True
        self.theta = KerasVariables(maml.weights, 'theta')
        if maml.norms:
            self.norms = KerasVariables(maml.norms, 'norms')
        if maml.rates:
            self.rates = KerasVariables(maml.rates, 'rates')
        self.built = True

    def compile(
        self,
        optimizer=None,
        training_metrics: bool = True,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        **others,
    ):
        """As Keras's.

        optimizer: of the outer loop; None, the FastMAML's own, Adam. training_metrics: measure all
        metrics of the training tasks too, which takes an evaluation per step, else the loss alone.
        Raises ValueError for a loss or metrics: the tasks' own are taken.
        """
        if others:
            raise ValueError(
                f'compile takes no {", ".join(others)} here: the loss was given when the model was '
                'made, and losses and accuracies of tasks are the metrics'
            )
        if optimizer is not None:
            set_optimizer(self.maml, keras.optimizers.get(optimizer))
        self.watches = training_metrics
        given = {'run_eagerly': run_eagerly, 'steps_per_execution': steps_per_execution}
        super().compile(optimizer=self.maml.metatrain_optimizer, jit_compile=False, **given)

    def fit(
        self, x, *, steps_per_epoch=None, validation_data=None, validation_steps=None, **named
    ) -> keras.callbacks.History:
        """As Keras's; x, validation_data: tasks, see `as_dataset`. Raises ValueError for others.

        Tasks that never end go on from epoch to epoch, and begin again for each validation.
        """
        tasks = as_dataset(x, 'steps_per_epoch', steps_per_epoch)
        named = {'steps_per_epoch': steps_per_epoch, 'shuffle': False} | named
        if validation_data is not None:
            data = as_dataset(validation_data, 'validation_steps', validation_steps)
            named |= {'validation_data': data, 'validation_steps': validation_steps}
        return super().fit(tasks, **named)

    def evaluate(self, x=None, *, steps=None, **named):
        """As Keras's; x: tasks, see `as_dataset`. Raises ValueError for others."""
        return super().evaluate(as_dataset(x, 'steps', steps), steps=steps, **named)

    def predict(self, x, *, steps=None, **named) -> np.ndarray:
        """What the queries of tasks are after the updates of training: [tasks, examples, out].

        As Keras's; x: tasks, see `as_dataset`. Class probabilities, or outputs of regression.
        Raises ValueError for others, and if an adaptation diverges.
        """
        output = super().predict(as_dataset(x, 'steps', steps), steps=steps, **named)
        return checked_finite({'output': output}, 'the answers')['output']

    # What Keras calls for each meta-batch.

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """One outer step. The metrics are of the weights before it."""
        batch = self._batch(data)
        if self.watches:
            self.measured.update(self.maml.evaluate(batch, self.updates))
        loss = self.maml.metatrain_step(batch)
        if self.watches:
            return self.measured.results()
        self.measured.means['loss'].update_state(loss)
        return self.measured.results(['loss'])

    def test_step(self, data) -> dict[str, tf.Tensor]:
        """The metrics of a meta-batch."""
        batch = self._batch(data)
        self.measured.update(self.maml.evaluate(batch, self.updates, self.transductive))
        return self.measured.results()

    def predict_step(self, data) -> tf.Tensor:
        maml, batch = self.maml, self._batch(data)
        output = maml.evaluate(batch, maml.num_updates, self.transductive).outputsb[-1]
        return tf.nn.softmax(output) if self.learner.is_classifier else output

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Means over the tasks of an epoch."""
        return [*self.measured.means.values()]

    def _batch(self, data) -> Batch:
        return Batch(*data)

    # One task, from arrays.

    def adapt(self, *arguments, **named) -> Arrays:
        """As Learner.adapt."""
        return self.learner.adapt(*arguments, **named)

    def predict_task(self, *arguments, **named) -> np.ndarray:
        """As Learner.predict; Keras's `predict` takes no weights, and data in batches."""
        return self.learner.predict(*arguments, **named)

    def get_config(self) -> dict:
        """Raises NotImplementedError: weights can be saved, the model is code."""
        raise NotImplementedError(
            'only the weights of this model can be saved: save_weights(PATH.weights.h5), or '
            'ModelCheckpoint(PATH.weights.h5, save_weights_only=True)'
        )


class KerasVariables(keras.Layer):
    """Variables of a FastMAML as Keras sees them, for counting, saving and histograms."""

    def __init__(self, variables: dict[str, tf.Variable], name: str):
        super().__init__(name=name)
        for key, variable in variables.items():
            shape, dtype = tuple(variable.shape), variable.dtype.name
            own = self.add_weight(shape, 'zeros', dtype, name=key.replace('/', '.'))
            own._value = variable  # the same one, not a copy: Keras has no other way to say so
        self.built = True


class TaskMeans:
    """Means over tasks of losses and, of a classifier, accuracies.

    {'loss_0': before any update, on the support set; 'loss_1': after one, on the query set; ...;
    'loss': after as many as in training; 'accuracy_0': ...}
    """

    def __init__(self, updates: int, maml: FastMAML, is_classifier: bool):
        self.objectives = ['loss', 'accuracy'] if is_classifier else ['loss']
        self.trained, self.means = maml.num_updates, {}
        for objective in self.objectives:
            for name in (objective, *(f'{objective}_{i}' for i in range(updates + 1))):
                self.means[name] = keras.metrics.Mean(name, maml.dtype.name)

    def update(self, results: Results):
        for objective in self.objectives:
            before, after = results.of(objective)
            values = [before, *tf.unstack(after)]  # [T] each
            for i, value in enumerate(values):
                self.means[f'{objective}_{i}'].update_state(value)
            self.means[objective].update_state(values[self.trained])

    def results(self, names: Iterable[str] | None = None) -> dict[str, tf.Tensor]:
        return {name: self.means[name].result() for name in names or self.means}


def as_maml(model, loss: Callable | None, given: dict) -> FastMAML:
    """Arguments and errors as of MetaModel."""
    if isinstance(model, FastMAML):
        if loss is not None or given:
            raise ValueError('a FastMAML has a loss and settings already: give none')
    elif loss is None or 'update_lr' not in given:
        raise ValueError('a network needs a loss and update_lr, the inner step size')
    else:
        model = FastMAML(model, loss, **given)
    if model.num_updates < 1 or model.replicas.strategy or tf.distribute.has_strategy():
        raise ValueError(
            'MetaModel needs num_updates of at least 1, and one device: for several there is '
            'Trainer, main.py --strategy'
        )
    return model


def set_optimizer(model: FastMAML, optimizer: keras.optimizers.Optimizer):
    """Gives a model another outer optimizer; the program that was traced with the old one goes."""
    optimizer.build(model.parameters)
    model.metatrain_optimizer = optimizer
    model.checkpoint = tf.train.Checkpoint(**model.groups, metatrain_optimizer=optimizer)
    vars(model).pop(FastMAML.metatrain_step.attribute, None)


def as_dataset(tasks, steps_name: str, steps: int | None) -> tf.data.Dataset:
    """Tasks as a tf.data.Dataset of Batches.

    tasks: such a dataset, see `DataGenerator.dataset`; a Batch; or a list or generator of Batches.
    A Batch may be a dict of its four names. steps_name, steps: how many meta-batches are wanted, by
    the name of the argument that says so. Raises ValueError for tuples without names, if sizes are
    not known, or tasks never end and nothing says how many are wanted.
    """
    if isinstance(tasks, Batch | Mapping):
        tasks = dataset_of_batches([tasks])
    elif not isinstance(tasks, tf.data.Dataset):
        tasks = dataset_of_batches(tasks)
    remedy = 'dataset.map(lambda a, b, c, d: Batch(inputa=a, labela=b, inputb=c, labelb=d))'
    spec = named_batch(tasks.element_spec, 'what a dataset of tasks holds must be', remedy)
    if isinstance(tasks.element_spec, Mapping):
        tasks = tasks.map(lambda arrays: Batch(**arrays))
    if not all(part.shape.rank == 3 and None not in part.shape for part in spec):
        raise ValueError(
            'tasks must be four arrays, [tasks, examples, size] each with numbers that are fixed '
            f'(batch(T, drop_remainder=True) fixes that of tasks), but they are {spec}'
        )
    if steps is None and tasks.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f'these tasks never end: say by {steps_name} how many meta-batches')
    return tasks


def dataset_of_batches(batches: Iterable[Batch]) -> tf.data.Dataset:
    """Of a list of Batches, or of a generator, once.

    Raises ValueError if there is none, and for no names, no numbers and different sizes.
    """
    if isinstance(batches, Sequence):
        batches = [*map(arrays_of, batches)]
    try:
        iterator = iter(batches)
        first = arrays_of(next(iterator))
    except (TypeError, StopIteration):
        raise ValueError(
            'tasks must be a tf.data.Dataset, as source.dataset(split, num_tasks) is, a Batch, or '
            f'a list or generator of Batches, but this is {type(batches).__name__}'
        ) from None
    if isinstance(batches, Sequence):
        sizes = {tuple(np.shape(values) for values in batch) for batch in batches}
        if len(sizes) > 1:
            raise ValueError(f'all Batches must have the same sizes, but there are {sizes}')
    rest = itertools.chain([first], iterator) if iterator is batches else batches
    spec = Batch(*(tf.TensorSpec(values.shape, values.dtype) for values in first))
    dataset = tf.data.Dataset.from_generator(lambda: map(arrays_of, rest), output_signature=spec)
    if isinstance(batches, Sequence):
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
    return dataset


def arrays_of(batch: Batch) -> Batch:
    """A Batch, or a dict of its names, as arrays. Raises ValueError, with the name of the array."""
    batch = named_batch(batch)
    return Batch(*map(real_numbers, Batch._fields, batch))


# From the command line's settings to a model ------------------------------------------------------


@contextlib.contextmanager
def random_seed(seed: int):
    """Random numbers of Keras, NumPy and Python are a function of the seed, while entered."""
    states = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def example_shape(settings: dict) -> tuple[int, ...]:
    """Of an image, or of an example of the user's own tasks; settings: the flags of a run."""
    if settings.get('example_shape'):
        return tuple(settings['example_shape'])
    given = settings.get('image_size', 84), settings.get('channels', 3)
    size, channels = IMAGE_SHAPES.get(settings['datasource'], given)
    return size, size, channels


def user_network(spec: str, settings: dict, audit: bool | None = True):
    """The network that FILE.py:FUNCTION makes for a run; settings: the flags of it.

    It is called with the shape of an example and the number of classes or outputs, and returns a
    keras.Model, or any other network. Its random initial values are a function of the run's seed.
    audit: as of KerasNetwork, for one that is trained. Raises UserCodeError, and ValueError for
    other sizes and what `utils.user_function` and `KerasNetwork` refuse.
    """
    shape = example_shape(settings)
    outputs = settings.get('dim_output') or settings.get('num_classes', 5)
    function, seed = user_function(spec), settings.get('seed', 0)
    with random_seed(seed), user_code(spec, all_of_it=False):
        made = function(shape, outputs)
        network = made
        if isinstance(made, keras.Model):
            network = KerasNetwork(made, input_shape=shape, audit=audit)
    if not callable(network) or not hasattr(network, 'parameters'):
        raise ValueError(f'{spec} must return a keras.Model, but it returned {made!r:.60}')
    sizes = {'dim_input': ('take', int(np.prod(shape))), 'dim_output': ('have', outputs)}
    for name, (verb, size) in sizes.items():
        found, things = getattr(network, name, size), ('values per example', 'outputs')
        if found != size:
            thing = things[name == 'dim_output']
            raise ValueError(f'{spec}: the model must {verb} {size} {thing}, but has {found}')
    return network


def make_network(
    datasource: str,
    num_classes: int = 5,
    norm: str | Normalization = 'batch_norm',
    num_filters: int = 64,
    conv: bool = True,
    max_pool: bool = False,
    baseline: str | None = None,
    image_size: int = 84,
    channels: int = 3,
    example_shape: Sequence[int] | None = None,
    dim_output: int = 1,
) -> FullyConnected | Convolutional:
    """The paper's network for a data source, miniImagenet's for folders, the sinusoid's for others.

    Arguments as the flags of the same names; norm may be a Normalization of one's own.
    example_shape, dim_output: of the user's own tasks, see data_generator.UserTasks.
    """
    if datasource == 'sinusoid':
        return FullyConnected(3 if baseline == 'oracle' else 1, (40, 40), 1, norm)
    if example_shape:
        return FullyConnected(int(np.prod(example_shape)), (40, 40), dim_output, norm)
    if datasource not in (*IMAGE_SHAPES, 'folder'):
        known = ', '.join(IMAGE_SHAPES)
        raise ValueError(f'there is no datasource {datasource!r}, but sinusoid, {known} and folder')
    size, channels = IMAGE_SHAPES.get(datasource, (image_size, channels))
    if not conv:
        return FullyConnected(size * size * channels, (256, 128, 64, 64), num_classes, norm)
    flatten = datasource != 'omniglot'
    return Convolutional(size, channels, num_filters, num_classes, norm, max_pool, flatten)


def make_model(
    datasource: str,
    update_batch_size: int = 5,
    update_lr: float = 1e-3,
    num_updates: int = 1,
    meta_lr: float = 1e-3,
    stop_grad: bool = False,
    seed: int = 0,
    dtype=tf.float32,
    compiled: bool = True,
    replicas: Replicas | None = None,
    network='',
    objective: str | None = None,
    shots: float | None = None,
    adapt: str = 'all',
    learn_lr: str | UpdateRule = 'none',
    loss_steps: str = 'last',
    loss_steps_iterations: int = 0,
    first_order_iterations: int = 0,
    norm_steps: bool = False,
    meta_lr_decay: str = 'none',
    meta_lr_end: float = 0.0,
    metatrain_iterations: int = 15000,
    **settings,
) -> FastMAML:
    """A model with the paper's network, loss and clipping.

    Arguments as the flags and as of FastMAML, `settings` as for `make_network`. network: another
    one, or a keras.Model. objective, shots: of the user's own tasks, 'loss' or 'accuracy', and the
    K that the loss of a classifier is divided by. meta_lr_decay: 'cosine' lets the outer step size
    fall to meta_lr_end over metatrain_iterations.
    """
    is_regression = objective == 'loss' or objective is None and datasource == 'sinusoid'
    loss = mean_squared_error if is_regression else cross_entropy(shots or update_batch_size)
    clip = 10.0 if datasource in ('miniimagenet', 'folder') else None
    made = make_network(datasource, **settings) if isinstance(network, str) else network
    if meta_lr_decay == 'cosine':
        share = meta_lr_end / meta_lr if meta_lr else 0.0
        meta_lr = keras.optimizers.schedules.CosineDecay(meta_lr, metatrain_iterations, share)
    inner, outer = (update_lr, num_updates), (meta_lr, stop_grad, clip)
    annealed = (loss_steps, loss_steps_iterations, first_order_iterations)
    more = (seed, dtype, adapt, learn_lr, *annealed, norm_steps)
    return FastMAML(made, loss, *inner, *outer, *more, compiled=compiled, replicas=replicas)


# The settings of a run that `make_model` takes, in the arguments' order.
MODEL_SETTINGS = tuple(
    name
    for function in (make_model, make_network)
    for name in inspect.signature(function).parameters
    if name not in ('dtype', 'compiled', 'replicas', 'network', 'settings')
)
