"""Class FastMAML: the algorithm of maml.MAML, compiled, in chunks, on several devices."""

import functools
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch, whole_number
from fewshot.checks import float_type
from fewshot.data.batches import as_tensors, checked_batch
from fewshot.engine.chunks import chunks, in_a_loop, pairwise_sum
from fewshot.engine.devices import Replicas
from fewshot.engine.pieces import graph, piece
from fewshot.engine.shared import Shared
from fewshot.engine.tracing import constant_zeros
from fewshot.networks.checks import check_loss, check_network, check_numbers, warn_of_probabilities
from fewshot.networks.fused import fuse
from fewshot.networks.inner_loops import part_of, step_norms, takes_shared, update_rule
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.outer_losses import Phase, phased, phases, step_weights
from fewshot.runs.checkpoints import check_parameters, read_checkpoint, read_objects
from maml import MAML, TASK_AXIS, Leading, Results, Tensors, UpdateRule
from special_grads import per_task


class FastMAML(MAML):
    """The algorithm of MAML, run fast.

    Its parts are programs of their own (`piece`, `graph`); a meta-batch runs in chunks that fit the
    caches; tasks share θ until their first update; and several devices may have parts of the tasks.

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
        compiled: the pieces are compiled by XLA, else plain TensorFlow.
        replicas: the devices that have parts of a meta-batch.

    Attribute: trained_on, the types of the inputs it was trained on, 'float', 'uint8' and so on.
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
        compiled: bool = True,
        replicas: Replicas | None = None,
    ):
        check_numbers(update_lr, num_updates, meta_lr, clip, seed)
        dtype = float_type(dtype)
        network = KerasNetwork(network) if isinstance(network, keras.Model) else network
        check_network(network, dtype)
        check_loss(loss, network, dtype)
        warn_of_probabilities(loss, network, dtype)
        part = part_of(fuse(network), adapt)
        rule = update_rule(learn_lr, part, update_lr, num_updates)
        own = step_norms(network, adapt) if norm_steps else []
        numbers = update_lr, num_updates, meta_lr, stop_grad, clip, seed
        super().__init__(part, loss, *numbers, dtype, rule, own)
        self.adapt, self.learn_lr, self.norm_steps = adapt, learn_lr, norm_steps
        self.trained_on = frozenset()  # types of training inputs, as far as known
        self.phases = phases(loss_steps, loss_steps_iterations, first_order_iterations)
        self.loss_steps, self.loss_steps_iterations = loss_steps, loss_steps_iterations
        self.first_order_iterations = first_order_iterations
        self.compiled = compiled and can_compile(self.network)
        self.replicas = replicas or Replicas()
        self.checkpoint = tf.train.Checkpoint(
            **self.groups, metatrain_optimizer=self.metatrain_optimizer
        )
        self.pretrain_checkpoint = tf.train.Checkpoint(
            **self.groups, pretrain_optimizer=self.pretrain_optimizer
        )

    @property
    def groups(self) -> dict[str, dict[str, tf.Variable]]:
        """What the outer loop learns, as checkpoints have it."""
        rates = {'rates': self.rates} if self.rates else {}
        return {'weights': self.weights, 'norms': self.norms} | rates

    def is_finite(self) -> bool:
        """Whether all parameters are numbers."""
        return all(np.isfinite(parameter.numpy()).all() for parameter in self.parameters)

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
        options = phase.first_order, phase.all_losses
        batch = self.training_batch(batch)
        tasks = batch.inputa.shape[0]
        # Of one update XLA makes the faster program if it sees all; more would take it too long.
        if self.num_updates <= 1:
            whole = functools.partial(self._whole_gradient, options=options)
            parts = [whole(chunk) for chunk in chunks(batch, self.network)]
        else:
            types = [self.dtype] * (1 + len(self.parameters))
            parts = in_a_loop(
                lambda chunk: self.gradient_of_sum(chunk, *options), batch, types, self.network
            )
        return [pairwise_sum(terms) / tasks for terms in zip(*parts)]

    def training_batch(self, batch: Batch) -> Batch:
        """As `checked_batch`; a Learner asks later of which type the inputs were."""
        batch = as_tensors(batch, self.network)
        kind = batch.inputa.dtype
        self.trained_on |= {'float' if kind.is_floating else kind.name}
        return Batch(*(tf.cast(values, self.dtype) for values in batch))

    def gradient_of_sum(self, batch: Batch, *options: bool) -> list[tf.Tensor]:
        with constant_zeros():
            return super().gradient_of_sum(batch, *options)

    def total(self, losses: list[tf.Tensor]) -> tf.Tensor:
        """As MAML's; those after all updates are weighed, see `step_weights`."""
        if len(losses) == 1:
            return losses[0]
        done, count = self.metatrain_optimizer.iterations, len(losses)
        weights = step_weights(count, done, self.loss_steps_iterations, self.dtype)
        return tf.add_n([w * loss for w, loss in zip(weights, losses)])

    def last_loss(self, theta, norms, alpha, *others) -> tf.Tensor:
        """As MAML's. Where updates come before, it is one program, with its gradient."""
        if self.num_updates <= 1 or getattr(self.network, 'prepares_features', False):
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
    def _whole_gradient(self, chunk: Batch, options: tuple[bool, bool]) -> list[tf.Tensor]:
        return self.gradient_of_sum(chunk, *options)

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
        return self._evaluate(as_tensors(batch, self.network), num_updates, transductive)

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
