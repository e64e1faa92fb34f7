"""Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017): Algorithm 1 and 2.

Class MAML has the inner loop, the outer loop and evaluation; above it stand the losses, and the
inner update that variants replace. fewshot.FastMAML runs a MAML fast; the paper's networks are in
fewshot/networks/paper_networks.py.

The task axis is explicit. After the first inner update each task has weights of its own, so weights
are [T, ...] like the data, and every layer acts on all T tasks of a meta-batch at once. "a" is the
support set (inner gradient), "b" the query set (outer gradient).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch

Tensors = dict[str, tf.Tensor]  # weights, {name: [T, ...]}, or normalisation parameters, [...]
Arrays = dict[str, np.ndarray]  # weights of a task, {name: [...]}; of several, {name: [T, ...]}
Leading = int | tf.Tensor | None  # how many examples give batch normalisation its statistics


# Losses -------------------------------------------------------------------------------------------


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


# What the two loops work on -----------------------------------------------------------------------


class MetaParameters(NamedTuple):
    """What the outer loop learns: variables, values or gradients, {name: [...]}, without tasks."""

    weights: dict  # θ, which the inner loop adapts
    norms: dict  # shared by all tasks: normalisation parameters, and weights that are not adapted
    rates: dict  # parameters of the inner loop, such as step sizes


class InnerLoop:
    """An inner update: gradient descent with one step size α, MAML's `update_lr`.

    Derive from it for another one, and give that to FastMAML as `inner_loop`. Attribute:
    parameters, {name: (kind of initial value, shape)}, see `initial_value`: learned by the outer
    loop, here none.
    """

    parameters = {}

    def rates(self, values: Tensors, step: int | tf.Tensor):
        """Returns α of update number `step`, counted from 0, for the method `step`.

        None stands for `update_lr`. values: of `parameters`, {name: [...]}. Evaluations take more
        updates than training.
        """
        return None

    def shown(self, values: Arrays) -> Arrays:
        """Names the parameters for TensorBoard: {label: scalar or array [...]}."""
        return values

    def step(self, theta: Tensors, gradients: Tensors, alpha) -> Tensors:
        """θ' = θ − α ∇L, {name: [T, ...]} each.

        alpha: a scalar, or {name: scalar or array of the weight's shape}.
        """
        rates = alpha if isinstance(alpha, Mapping) else dict.fromkeys(theta, alpha)
        return {name: theta[name] - rates[name] * gradients[name] for name in theta}


def row_of(rows: tf.Tensor, step: int | tf.Tensor) -> tf.Tensor:
    """The row of update number `step`, [rows, ...] -> [...]; the last one if there are fewer."""
    last = rows.shape[0] - 1
    return rows[min(step, last) if isinstance(step, int) else tf.minimum(step, last)]


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


class Results(NamedTuple):
    """Losses, accuracies and outputs of each task; J is the number of updates evaluated."""

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


# The algorithm ------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The computations that the loops are made of: MAML's own, or the same ones made faster."""

    start: Callable  # θ -> θ'i of every task
    prepare: Callable  # inputs -> the part of the forward pass that no adapted weight enters
    update: Callable  # one inner update
    outcome: Callable  # loss, accuracy and output
    last_loss: Callable  # the last update, and the outer loss after it


class MAML:
    """Initial weights θ of a network, and the two loops that learn them.

    network: an object with the attributes of fewshot.Network. loss: function of outputs and
    labels, [T, examples, out] each, to one loss per task, [T]. update_lr: α, inner step size.
    num_updates: inner updates in training. meta_lr: β, outer step size (Adam), or Keras's schedule.
    stop_grad: first-order approximation. clip: bound on each element of the meta-gradient, or None.
    seed: of the initial weights. dtype: of everything. inner_loop: makes new weights of weights and
    gradients. step_norms: names of normalisation parameters of which each update has its own.
    loss_weights: returns weights of the losses after each update; None: the last alone counts.

    Attributes: weights, norms and rates, {name: variable}, see MetaParameters.
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
        inner_loop: InnerLoop | None = None,
        step_norms: Sequence[str] = (),
        loss_weights: Callable | None = None,
    ):
        self.network, self.loss, self.update_lr = network, loss, update_lr
        self.num_updates, self.stop_grad, self.clip = num_updates, stop_grad, clip
        self.dtype, self.inner_loop = tf.as_dtype(dtype), inner_loop or InnerLoop()
        self.step_norms, self.loss_weights = step_norms, loss_weights
        self.variables = self.make_variables(seed)
        self.weights, self.norms, self.rates = self.variables
        # ε as TensorFlow 1's Adam has it; Keras's own default is ten times larger.
        self.metatrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        self.metatrain_optimizer.build(self.parameters)

    # Algorithm 2, line by line; Algorithm 1's lines in brackets. Lines 3 to 5 and 8, which sample
    # tasks and examples, are data_generator.py's.

    def update(self, theta: Tensors, norms: Tensors, alpha, x, y: tf.Tensor) -> Tensors:
        """θ'i = θ − α ∇_θ L_Ti(f_θ): lines 6 and 7 (5 and 6), for every task Ti at once.

        theta: {name: [T, ...]}; x: prepared support inputs; y: labels [T, examples, out].
        """
        with tf.GradientTape() as inner:
            inner.watch(theta)
            losses = self.loss(self.network(x, theta, norms), y)  # L_Ti(f_θ), [T]
        gradients = inner.gradient(losses, theta, unconnected_gradients='zero')  # {name: [T, ...]}
        return self.inner_step(theta, gradients, alpha)

    def inner_step(self, theta: Tensors, gradients: Tensors, alpha) -> Tensors:
        """θ − α ∇L, where at first order the gradients count as constants."""
        if self.stop_grad:
            gradients = tf.nest.map_structure(tf.stop_gradient, gradients)
        return self.inner_loop.step(theta, gradients, self.update_lr if alpha is None else alpha)

    def adapt(
        self, theta: Tensors, values: MetaParameters, support: tuple, steps: Iterable, update=None
    ) -> Iterator[tuple[Tensors, Tensors]]:
        """Updates θ'i on the support set (x, y), once for each number in `steps`, counted from 0.

        Yields θ'i and the normalisation parameters in use, after each update.
        """
        for step in steps:
            norms, alpha = self.of_update(values, step)
            theta = (update or self.update)(theta, norms, alpha, *support)
            yield theta, norms

    def outer_loss(
        self, batch: Batch, values: MetaParameters | None = None, parts: Parts | None = None
    ) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar: lines 4 to 9 (4 to 7), then the sum in line 10 (8)."""
        values, parts, losses = values or self.values(), parts or self.parts, []
        theta = start = parts.start(values.weights, batch.inputa.shape[0])  # θ'i ← θ
        support = parts.prepare(batch.inputa, self.prepared_norms(values)), batch.labela
        query = parts.prepare(batch.inputb, self.prepared_norms(values)), batch.labelb
        before_last = range(self.num_updates - 1)
        for theta, norms in self.adapt(start, values, support, before_last, parts.update):
            if self.loss_weights:
                losses.append(tf.reduce_sum(parts.outcome(theta, norms, *query)[0]))
        last = self.of_update(values, max(self.num_updates - 1, 0))
        losses.append(parts.last_loss(theta, *last, support, query))
        return weighted_sum(losses, self.loss_weights)

    def gradient_of_sum(
        self, batch: Batch, values: MetaParameters | None = None, parts: Parts | None = None
    ) -> list[tf.Tensor]:
        """Σ_Ti L_Ti(f_θ'i), and ∇_θ of it for `parameters`, through the updates."""
        values = values or self.values()
        with tf.GradientTape() as outer:
            outer.watch(values)
            loss = self.outer_loss(batch, values, parts)
        return [loss, *self.in_order(outer.gradient(loss, values, unconnected_gradients='zero'))]

    def meta_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Σ_Ti L_Ti(f_θ'i) / T, and ∇_θ of it for `parameters`, unclipped."""
        loss, *gradients = self.gradient_of_sum(batch)
        tasks = batch.inputa.shape[0]
        return loss / tasks, [gradient / tasks for gradient in gradients]

    @tf.function(autograph=False)
    def metatrain_step(self, batch: Batch) -> tf.Tensor:
        """θ ← θ − β ∇_θ Σ_Ti L_Ti(f_θ'i) / T: line 10 (8), by Adam. Returns the loss before it."""
        loss, gradients = self.meta_gradient(batch)
        self.descend(self.clipped(gradients))
        return loss

    # The parts of the algorithm.

    @property
    def parts(self) -> Parts:
        """The methods of this class, as the loops call them."""
        return Parts(repeated, self.prepare, self.update, self.outcome, self.last_loss)

    def prepare(self, inputs: tf.Tensor, norms: Tensors, leading: Leading = None):
        """Computes what no adapted weight enters; inputs: [T, examples, D].

        norms: for a network that computes features here, see `prepared_norms`, else {}. leading:
        see `forward`.
        """
        more = [] if leading is None else [leading]
        return self.network.prepare(inputs, *([leading, norms] if norms else more))

    def forward(self, theta: Tensors, norms: Tensors, x, leading: Leading = None) -> tf.Tensor:
        """Computes the network's outputs for prepared inputs, [T, examples, out].

        leading: the number of examples at the beginning that only give batch normalisation its
        statistics; they have no outputs.
        """
        if leading is None:
            return self.network(x, theta, norms)
        return self.network(x, theta, norms, leading)[:, leading:]

    def outcome(self, theta: Tensors, norms: Tensors, x, y: tf.Tensor, leading=None) -> tuple:
        """Loss [T], accuracy [T] and output [T, examples, out]; leading: see `forward`."""
        output = self.forward(theta, norms, x, leading)
        return self.loss(output, y), accuracy(output, y), output

    def last_loss(self, theta: Tensors, norms: Tensors, alpha, support, query) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar, after one more update; support, query: (x, y)."""
        if self.num_updates:
            theta = self.update(theta, norms, alpha, *support)
        return self.query_loss(theta, norms, *query)

    def query_loss(self, theta: Tensors, norms: Tensors, x, y: tf.Tensor) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar."""
        return tf.reduce_sum(self.loss(self.forward(theta, norms, x), y))

    def clipped(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients within ±`clip`."""
        if self.clip is None:
            return gradients
        return [tf.clip_by_value(g, -self.clip, self.clip) for g in gradients]

    def descend(self, gradients: list[tf.Tensor], optimizer=None):
        """One step of `metatrain_optimizer`, or of another one."""
        (optimizer or self.metatrain_optimizer).apply(gradients, self.parameters)

    # The meta-parameters.

    def make_variables(self, seed: int) -> MetaParameters:
        """Variables with their initial values, which are functions of `seed`."""
        network, variables = self.network, {}
        made = network.parameters | network.norm_parameters
        made = {name: made[name] for name in getattr(network, 'order', made)}
        rates = {f'rates/{name}': value for name, value in self.inner_loop.parameters.items()}
        for i, (name, value) in enumerate((made | rates).items()):
            value = initial_value(*value, seed=[seed, i])
            if name in self.step_norms:
                value = np.stack([value] * max(self.num_updates, 1))  # [updates, ...]
            variables[name] = tf.Variable(tf.cast(value, self.dtype))
        self.names = [*variables]
        return MetaParameters(
            weights={name: variables[name] for name in network.parameters},
            norms={name: variables[name] for name in network.norm_parameters},
            rates={name: variables[f'rates/{name}'] for name in self.inner_loop.parameters},
        )

    def in_order(self, found: MetaParameters) -> list:
        """All of them, in the network's order, whatever the inner loop adapts; rates come last."""
        rates = {f'rates/{name}': value for name, value in found.rates.items()}
        named = found.weights | found.norms | rates
        return [named[name] for name in self.names]

    @property
    def parameters(self) -> list[tf.Variable]:
        """The variables that the outer loop learns."""
        return self.in_order(self.variables)

    @property
    def named_parameters(self) -> dict[str, tf.Variable]:
        """`parameters` by name; those of the inner loop are 'rates/...'."""
        return dict(zip(self.names, self.parameters))

    def values(self) -> MetaParameters:
        """The values of all variables, read once."""
        return tf.nest.map_structure(tf.convert_to_tensor, self.variables)

    def prepared_norms(self, values: MetaParameters) -> Tensors:
        """The norms that `prepare` takes: all if the network computes its features there, or {}."""
        return values.norms if getattr(self.network, 'prepares_features', False) else {}

    def of_update(self, values: MetaParameters, step: int | tf.Tensor) -> tuple[Tensors, object]:
        """Normalisation parameters and α of update number `step`, and of the queries after it.

        α as InnerLoop.rates returns it. Before any update the norms are those of update 0.
        """
        norms = {} if self.prepared_norms(values) else values.norms
        rows = {name: row_of(norms[name], step) for name in self.step_norms}
        return norms | rows, self.inner_loop.rates(values.rates, step)

    # Evaluation, and the joint-training baseline of section 5.1.

    def evaluate(
        self, batch: Batch, num_updates: int, transductive: bool = True, parts: Parts | None = None
    ) -> Results:
        """Evaluates each task before any update and after each of `num_updates`.

        transductive: batch normalisation takes the queries' own statistics, as in training and in
        the paper, so that an answer depends on the other queries; else those of the support set.
        """
        values, parts, query, leading = self.values(), parts or self.parts, batch.inputb, None
        support = parts.prepare(batch.inputa, self.prepared_norms(values)), batch.labela
        if not transductive:  # the support set leads
            leading, query = batch.inputa.shape[1], tf.concat([batch.inputa, query], axis=1)
        query = parts.prepare(query, self.prepared_norms(values), leading), batch.labelb
        start, outcomes = parts.start(values.weights, batch.inputa.shape[0]), []
        before = parts.outcome(start, self.of_update(values, 0)[0], *support)
        for theta, norms in self.adapt(start, values, support, range(num_updates), parts.update):
            outcomes.append(parts.outcome(theta, norms, *query, leading))
        (loss1, accuracy1, outputa), after = before, map(tf.stack, zip(*outcomes))
        losses2, accuracies2, outputsb = after
        return Results(loss1, losses2, accuracy1, accuracies2, outputa, outputsb)

    def pretrain_gradient(self, batch: Batch, parts: Parts | None = None) -> list[tf.Tensor]:
        """The mean support loss before any update, and its gradient for `parameters`."""
        values, parts = self.values(), parts or self.parts
        with tf.GradientTape() as tape:
            tape.watch(values)
            theta = parts.start(values.weights, batch.inputa.shape[0])
            x = parts.prepare(batch.inputa, self.prepared_norms(values))
            norms, _ = self.of_update(values, 0)
            loss = tf.reduce_mean(parts.outcome(theta, norms, x, batch.labela)[0])
        return [loss, *self.in_order(tape.gradient(loss, values, unconnected_gradients='zero'))]


def repeated(theta: Tensors, tasks: int | tf.Tensor) -> Tensors:
    """θ, once for every task: {name: [...]} -> {name: [T, ...]}."""
    return {name: tf.broadcast_to(value, [tasks, *value.shape]) for name, value in theta.items()}


def weighted_sum(losses: list[tf.Tensor], weights: Callable | None) -> tf.Tensor:
    """The last of the losses [] after each update; or the sum of all, by weights() [] each."""
    if weights is None:
        return losses[-1]
    return tf.add_n([weight * loss for weight, loss in zip(weights(), losses)])
