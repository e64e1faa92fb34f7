"""Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017): Algorithm 1 and 2.

The paper's networks and losses, and class MAML: the inner loop, the outer loop, evaluation.
fewshot.FastMAML is the same, compiled.

The task axis is explicit. After the first inner step each task has weights of its own, so weights
are [T, ...] like the data, and every layer acts on all T tasks of a meta-batch at once. "a" is the
support set (inner gradient), "b" the query set (outer gradient).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch
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

Tensors = dict[str, tf.Tensor]  # weights, {name: [T, ...] or Shared}, or norms, {name: [...]}
Arrays = dict[str, np.ndarray]  # weights of a task, {name: [...]}; of several, {name: [T, ...]}
Leading = int | tf.Tensor | None  # how many examples give batch normalisation its statistics


# Normalisations -----------------------------------------------------------------------------------


class Normalization:
    """What follows the layers of a network; what networks take as `norm`, the user's own too.

    A normalisation of your own says which parameters it has and what it makes of a layer's output,
    see `LayerNorm` below. `tf.nn.moments` is wrong at second order: take means, or `moments`.
    """

    removes_mean = False  # of each channel: a bias added before would change nothing but rounding

    def parameters(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (kind of initial value, shape)} of one layer's; see `initial_value`."""
        return {}

    def normalize(self, x: tf.Tensor, parameters: dict, leading: Leading = None) -> tf.Tensor:
        """x normalised, of the same shape [T, examples, ..., channels].

        parameters: {name: tensor}; leading: how many of the examples, from the first on, give the
        statistics (None: all).
        """
        return x

    def __call__(
        self, x: tf.Tensor, parameters: dict, leading: Leading = None, max_pool: bool = False
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
    known = {
        'glorot': keras.initializers.GlorotUniform(number),
        'normal': keras.initializers.RandomNormal(stddev=1.0, seed=number),
        'truncated': keras.initializers.TruncatedNormal(stddev=0.01, seed=number),
        'zeros': keras.initializers.Zeros(),
        'ones': keras.initializers.Ones(),
    }
    if kind not in known:
        raise ValueError(f'there is no initial value {kind!r}')
    return np.asarray(known[kind](shape, dtype='float32'))


def are_sizes(*values) -> bool:
    """Whether they are whole numbers, at least 1."""
    return all(isinstance(value, int | np.integer) and value >= 1 for value in values)


class Network:
    """What the networks here have in common; one of your own needs only the attributes and methods.

    Attributes: parameters and norm_parameters, {name: (kind of initial value, shape)}; the former
    are adapted by the inner loop, the latter common to all tasks; dim_input and dim_output, sizes
    of an example and of its output, without which there are no checks and no Learner. Optional:
    takes_shared, whether `__call__` of the class that says so takes weights that tasks share;
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

    norm: 'batch_norm', 'layer_norm', 'None' or a Normalization of your own.
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
        return patches3x3(images, self.stride)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """x: from `prepare`; weights: [T, ...] each. Returns logits [T, examples, classes]."""
        return self.head(self.features(x, weights, norms, leading), weights)

    def features(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """The four blocks, of what `prepare` returns: [T, examples, F]."""
        for i in range(1, 5):
            x = self.block(i, x, weights[f'conv{i}'], weights[f'b{i}'], norms, leading)
        if self.flatten:
            return tf.reshape(x, [*sizes(x)[:2], int(np.prod(x.shape[2:]))])
        return tf.reduce_mean(x, [2, 3])

    def head(self, features: tf.Tensor, weights: Tensors) -> tf.Tensor:
        """The last layer: [T, examples, F] -> logits [T, examples, classes]."""
        return dense(features, weights['w5'], weights['b5'])

    def block(self, i: int, x, kernel, bias, norms: Tensors, leading: Leading) -> tf.Tensor:
        """The paper's block, section 5.2: convolution, normalisation, ReLU and pooling, if asked.

        Pooling commutes with the ReLU and comes first. A bias that the normalisation takes away
        again would change nothing but the rounding, so it is not added.
        """
        x = convolve_patches(x, kernel) if i == 1 else convolve(x, kernel, self.stride)
        if not self.norm.removes_mean:
            x += per_task(bias)[:, tf.newaxis, tf.newaxis, tf.newaxis]
        x = self._normalize(x, str(i - 1), norms, leading, self.max_pool)
        return tf.nn.relu(x)


# Inner loops: what they change, and how -----------------------------------------------------------


class UpdateRule:
    """What an inner update makes of weights and gradients: gradient descent with one α.

    FastMAML takes one of your own as `learn_lr`. Attribute: parameters, {name: (kind of initial
    value, shape)}, see `initial_value`, that the outer loop learns: none here.
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
        theta = {name: per_task(weight) for name, weight in weights.items()}
        return {name: theta[name] - rates[name] * gradients[name] for name in theta}


def row_of(rows: tf.Tensor, step: int | tf.Tensor) -> tf.Tensor:
    """The row of update `step` + 1, [rows, ...] -> [...]; of one that has none, the last."""
    last = rows.shape[0] - 1
    return rows[min(step, last) if isinstance(step, int) else tf.minimum(step, last)]


# Losses of tasks ----------------------------------------------------------------------------------


def mean_squared_error(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Equation 2, as a mean over all points: output and label [T, examples, D] -> [T]."""
    return tf.reduce_mean(tf.square(output - label), axis=[1, 2])


def cross_entropy(shots: int):
    """Equation 3: softmax cross-entropy *summed* over the examples and divided by K (`shots`).

    The support loss is thereby N times the mean over examples, a query loss with Q images per class
    N*Q/K times it; α and the gradient clip refer to this scale. Returns a function of logits and
    one-hot labels, [T, examples, N] each, to [T]; its attribute `shots` tells K. Raises ValueError
    if that is not above 0.
    """
    if not 0 < shots < float('inf'):
        raise ValueError(f'shots must be a finite number above 0, but it is {shots!r:.60}')

    def loss(output, label):
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(label, output), axis=1) / shots

    loss.shots = shots
    return loss


def accuracy(output: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """How many of the examples have their largest logit at the label: a fraction per task.

    output, label: [T, examples, N] -> [T], of output's dtype; nan if there is nothing to choose
    from, as where N is 1.
    """
    if output.shape[-1] == 1:
        return tf.fill(tf.shape(output)[:1], tf.constant(np.nan, output.dtype))
    hits = tf.equal(tf.argmax(output, axis=-1), tf.argmax(label, axis=-1))
    return tf.reduce_mean(tf.cast(hits, output.dtype), axis=1)


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
        is_loss = objective == 'loss'
        return (self.loss1, self.losses2) if is_loss else (self.accuracy1, self.accuracies2)


TASK_AXIS = Results(loss1=0, losses2=1, accuracy1=0, accuracies2=1, outputa=0, outputsb=1)


class Common(NamedTuple):
    """What all tasks have in common in their inner loops, read once."""

    norms: Tensors  # what the outer loop alone learns, {name: [...]}
    rates: Tensors  # the rule's parameters


class MAML(tf.Module):
    """Initial weights θ of a network, and the two loops that learn them.

    network: FullyConnected, Convolutional, or what has Network's attributes. loss: function of
    outputs and labels, [T, examples, out] each, to one loss per task, [T]. update_lr: α, inner step
    size. num_updates: inner updates in training. meta_lr: β, outer step size (Adam), or Keras's
    schedule. stop_grad: first-order approximation. clip: bound on each element of the
    meta-gradient, or None. seed: of the initial weights. dtype: of everything. rule: what an update
    makes of weights and gradients. step_norms: normalisation parameters, by name, of which each
    update has its own.

    Attributes: weights, norms and rates, {name: variable} each: θ; what the outer loop alone
    learns; the rule's parameters.
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
        rule: UpdateRule | None = None,
        step_norms: Sequence[str] = (),
    ):
        super().__init__()
        self.network, self.loss, self.update_lr = network, loss, update_lr
        self.num_updates, self.stop_grad, self.clip = num_updates, stop_grad, clip
        self.dtype, self.rule = tf.as_dtype(dtype), rule or UpdateRule()
        self.step_norms = step_norms
        made = network.parameters | network.norm_parameters
        self.names = getattr(network, 'order', [*made])
        variables = self._variables({name: made[name] for name in self.names}, seed)
        self.weights = {name: variables[name] for name in network.parameters}
        self.norms = {name: variables[name] for name in network.norm_parameters}
        self.rates = {name: variables[f'rates/{name}'] for name in self.rule.parameters}
        # ε as TensorFlow 1's Adam has it; Keras's own default is ten times larger.
        self.metatrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        self.pretrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        for optimizer in (self.metatrain_optimizer, self.pretrain_optimizer):
            optimizer.build(self.parameters)

    def _variables(self, made: dict, seed: int) -> dict[str, tf.Variable]:
        """With their initial values, functions of `seed`; made: {name: (kind, shape)}."""
        variables = {}
        rates = {f'rates/{name}': value for name, value in self.rule.parameters.items()}
        for i, (name, value) in enumerate((made | rates).items()):
            value = initial_value(*value, seed=[seed, i])
            if name in self.step_norms:
                value = np.stack([value] * max(self.num_updates, 1))  # [updates, ...]
            variables[name] = tf.Variable(tf.cast(value, self.dtype))
        return variables

    # Algorithm 2, line by line; Algorithm 1's lines in brackets. Lines 3 to 5 and 8, which sample
    # tasks and examples, are data_generator.py's.

    def update(
        self, weights: Tensors, norms: Tensors, x, y: tf.Tensor, lr=None, first_order: bool = False
    ) -> Tensors:
        """θ' = θ − α ∇_θ L_Ti(f_θ): lines 6 and 7 (5 and 6), for every task Ti.

        weights: θ, {name: [T, ...]}; x: prepared support inputs; y: labels [T, examples, out];
        lr: α, `update_lr` if None, or the rule's. Returns θ', {name: [T, ...]}.
        """
        own = {name: getattr(w, 'perturbation', w) for name, w in weights.items()}  # a task's own
        with tf.GradientTape() as inner:
            inner.watch(own)
            losses = self.loss(self.network(x, weights, norms), y)  # L_Ti(f_θ), [T]
        gradients = inner.gradient(losses, own, unconnected_gradients='zero')  # {name: [T, ...]}
        if self.stop_grad or first_order:  # first order: gradients count as constants
            gradients = tf.nest.map_structure(tf.stop_gradient, gradients)
        return self.rule(weights, gradients, self.update_lr if lr is None else lr)

    def outer_loss(
        self, batch: Batch, first_order: bool = False, every_loss: bool = False
    ) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar: the sum in line 10 (8), after `num_updates` updates.

        every_loss: those after each update, see `total`.
        """
        theta, common, losses = self.start(batch.inputa.shape[0]), self.common_values(), []
        support = self.prepare(batch.inputa, *self.preparing(common)), batch.labela
        query = self.prepare(batch.inputb, *self.preparing(common)), batch.labelb
        for i in range(self.num_updates - 1):
            norms, alpha = self.at(common, i)
            theta = self.update(theta, norms, *support, alpha, first_order)
            if every_loss:
                losses.append(tf.reduce_sum(self.outcome(theta, norms, *query)[0]))
        last = self.at(common, self.num_updates - 1)
        losses.append(self.last_loss(theta, *last, support, query, first_order))
        return self.total(losses)

    def last_loss(self, theta, norms: Tensors, alpha, support, query, first_order) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar, after one more update, the last; support, query: (x, y)."""
        if self.num_updates:
            theta = self.update(theta, norms, *support, alpha, first_order)
        return tf.reduce_sum(self.outcome(theta, norms, *query)[0])

    def meta_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Σ_Ti L_Ti(f_θ'i) / T, and ∇_θ of it for `parameters`, unclipped: line 10 (8)."""
        tasks = batch.inputa.shape[0]
        loss, *gradients = self.gradient_of_sum(batch)
        return loss / tasks, [gradient / tasks for gradient in gradients]

    def gradient_of_sum(self, batch: Batch, *options: bool) -> list[tf.Tensor]:
        """Σ_Ti L_Ti(f_θ'i), and ∇_θ of it for `parameters`, through the updates."""
        with tf.GradientTape() as outer:
            loss = self.outer_loss(batch, *options)
        return [loss, *outer.gradient(loss, self.parameters, unconnected_gradients='zero')]

    def metatrain_step(self, batch: Batch) -> tf.Tensor:
        """θ ← θ − β ∇_θ Σ_Ti L_Ti(f_θ'i) / T: line 10 (8), by Adam. Returns the loss before it."""
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
        theta = self.weights
        return {name: tf.broadcast_to(theta[name], [tasks, *theta[name].shape]) for name in theta}

    def prepare(self, inputs: tf.Tensor, *more):
        """What of the forward pass no adapted weight enters; inputs: [T, examples, D]."""
        return self.network.prepare(inputs, *more)

    def total(self, losses: list[tf.Tensor]) -> tf.Tensor:
        """The loss after the last update; or those after all, added up; scalars."""
        return tf.add_n(losses)

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

    # What the outer loop learns.

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

    def common_values(self) -> Common:
        """Normalisation parameters and the rule's, read once."""
        return tf.nest.map_structure(tf.convert_to_tensor, Common(self.norms, self.rates))

    def at(self, common: Common, step: int | tf.Tensor) -> tuple[Tensors, dict | None]:
        """Normalisation parameters and α of update `step` + 1, and of the queries after it.

        α as of `UpdateRule.rates`. Before any update they are those of the first.
        """
        norms = {} if getattr(self.network, 'prepares_features', False) else common.norms
        rows = {name: row_of(norms[name], step) for name in self.step_norms}
        return {**norms, **rows} if rows else norms, self.rule.rates(common.rates, step)

    def preparing(self, common: Common, leading: Leading = None) -> list:
        """Further arguments of `prepare`: how many examples lead, and norms for features."""
        if getattr(self.network, 'prepares_features', False):
            return [leading, common.norms]
        return [] if leading is None else [leading]

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
        before = self.outcome(weights, self.at(common, 0)[0], support, batch.labela)
        loss1, accuracy1, outputa = before
        for i in range(num_updates):
            norms, alpha = self.at(common, i)
            weights = self.update(weights, norms, support, batch.labela, alpha, False)
            outcomes.append(self.outcome(weights, norms, query, batch.labelb, leading))
        losses2, accuracies2, outputsb = map(tf.stack, zip(*outcomes))
        return Results(loss1, losses2, accuracy1, accuracies2, outputa, outputsb)
