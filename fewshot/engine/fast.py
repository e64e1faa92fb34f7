"""Class FastMAML: a MAML, compiled, in chunks, on several devices."""

import functools
import operator
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch, whole_number
from fewshot.checks import float_type, tells_names
from fewshot.data.batches import as_tensors, checked_batch
from fewshot.engine.chunks import in_a_loop, pairwise_sum
from fewshot.engine.devices import Replicas
from fewshot.engine.programs import Programs, make_programs
from fewshot.engine.tracing import constant_zeros
from fewshot.networks.checks import check_loss, check_network, check_numbers, warn_of_probabilities
from fewshot.networks.fused import fuse
from fewshot.networks.inner_loops import last_layer, named_inner_loop, part_of, step_norms
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.outer_losses import OuterLossSchedule
from fewshot.runs.checkpoints import check_parameters, read_checkpoint, read_objects
from maml import MAML, TASK_AXIS, InnerLoop, Results


def of_maml(*names: str):
    """Properties that are the MAML's, to be read."""
    return (property(operator.attrgetter(f'maml.{name}')) for name in names)


class FastMAML:
    """A MAML that runs fast: its attribute `maml`.

    The gradient of a chunk of tasks, or each of its parts, is a program; chunks fit the caches, and
    run side by side; several devices may have parts of the tasks.

    Args:
        network: FullyConnected, Convolutional, a Keras model, or what has Network's attributes.
        loss: function of outputs and labels, [T, examples, out] each, to one loss per task, [T].
        update_lr: α, inner step size.
        num_updates: inner updates in training.
        meta_lr: β, outer step size (Adam), or Keras's schedule.
        stop_grad: first-order approximation.
        clip: bound on each element of the meta-gradient, or None.
        seed: seed of the initial weights.
        dtype: type of all numbers.
        adapt: what the inner loop changes: 'all', the 'head' (last layer), or the 'body'.
        learn_lr: what the outer loop learns an α for: 'none', each 'layer', 'layer_step' (layer
            and update) or 'weight'.
        inner_loop: an InnerLoop of your own, instead of `learn_lr`.
        loss_steps: the query losses that count: the 'last', or 'all', weighted as in MAML++.
        loss_steps_iterations: iterations in which these weights move to the last; 0: all alike.
        first_order_iterations: iterations of first order before those of second.
        norm_steps: normalisation parameters for each update, instead of the same for all.
        compiled: programs are compiled by XLA, else plain TensorFlow.
        one_program: the gradient of a chunk is one program, as it always is with one update: with
            more, steps are faster and compiling takes twice as long.
        replicas: the devices that have parts of a meta-batch.

    Attributes: those of MAML, to be read; trained_on, the types of the inputs it was trained on,
    'float', 'uint8' and so on. Raises ValueError for numbers out of range, and for a network or
    loss that does not fit.
    """

    network, loss, dtype = of_maml('network', 'loss', 'dtype')
    update_lr, num_updates = of_maml('update_lr', 'num_updates')
    stop_grad, clip = of_maml('stop_grad', 'clip')
    weights, norms, rates = of_maml('weights', 'norms', 'rates')
    parameters, named_parameters = of_maml('parameters', 'named_parameters')
    metatrain_optimizer, inner_loop = of_maml('metatrain_optimizer', 'inner_loop')

    @tells_names()
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
        learn_lr: str = 'none',
        inner_loop: InnerLoop | None = None,
        loss_steps: str = 'last',
        loss_steps_iterations: int = 0,
        first_order_iterations: int = 0,
        norm_steps: bool = False,
        compiled: bool = True,
        one_program: bool = False,
        replicas: Replicas | None = None,
    ):
        check_numbers(update_lr, num_updates, meta_lr, clip, seed)
        dtype = float_type(dtype)
        network = KerasNetwork(network) if isinstance(network, keras.Model) else network
        check_network(network, dtype)
        check_loss(loss, network, dtype)
        warn_of_probabilities(loss, network, dtype)
        part = part_of(fuse(network), adapt)
        inner_loop = named_inner_loop(learn_lr, part, update_lr, num_updates, inner_loop)
        own = step_norms(network, adapt) if norm_steps else []
        numbers = update_lr, num_updates, meta_lr, stop_grad, clip, seed
        self.maml = MAML(part, loss, *numbers, dtype, inner_loop, own)
        schedule = loss_steps, loss_steps_iterations, first_order_iterations
        self.schedule = OuterLossSchedule(*schedule)
        self.pretrain_optimizer = keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        self.pretrain_optimizer.build(self.parameters)
        self.adapt, self.learn_lr, self.norm_steps = adapt, learn_lr, norm_steps
        self.trained_on = frozenset()  # types of training inputs, as far as known
        self.compiled = compiled and can_compile(network)
        self.one_program = bool(one_program)
        self.replicas = replicas or Replicas()
        self.make_programs()

    def set_programs(self, one_program: bool):
        """Decides whether the gradient of a chunk is one program, see the class."""
        if one_program != self.one_program:
            self.one_program = one_program
            self.make_programs()

    def make_programs(self):
        """Makes the programs, and the checkpoints, of `maml` as it is now."""
        graph = functools.partial(tf.function, autograph=False)
        program = functools.partial(graph, jit_compile=self.compiled)
        phases, whole = self.schedule.phases(self.maml), self.one_program or self.num_updates <= 1
        self.programs = make_programs(phases, whole, program)
        # Within a program nothing is one of its own: XLA takes minutes for derivatives of those.
        self.inlined = make_programs(phases, True, lambda function: function)
        self.metatrain_step = graph(lambda batch: self._metatrain_step(self.programs, batch))
        self.pretrain_step = graph(lambda batch: self._pretrain_step(self.programs, batch))
        self._traced_means = graph(lambda batch: self._means(self.programs, batch))
        self._evaluate, self._evaluate_replicas = graph(self._results), graph(self._table)
        self._steps = program(self._loop)
        kept = functools.partial(tf.train.Checkpoint, **self.groups)
        self.checkpoint = kept(metatrain_optimizer=self.metatrain_optimizer)
        self.pretrain_checkpoint = kept(pretrain_optimizer=self.pretrain_optimizer)

    @property
    def groups(self) -> dict[str, dict[str, tf.Variable]]:
        """The variables that the outer loop learns, grouped as in checkpoints."""
        rates = {'rates': self.rates} if self.rates else {}
        return {'weights': self.weights, 'norms': self.norms} | rates

    def is_finite(self) -> bool:
        """Whether all parameters are numbers."""
        return all(np.isfinite(parameter.numpy()).all() for parameter in self.parameters)

    # Outer steps.

    def meta_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """As MAML's; batch [T, ...]: from `replicas.place`. Raises ValueError if it is none."""
        # Called at once, TensorFlow would look for the derivative of the last program's gradient.
        eagerly = tf.executing_eagerly()
        loss, *gradients = (
            self._traced_means(batch) if eagerly else self._means(self.programs, batch)
        )
        return loss, gradients

    def _means(self, programs: Programs, batch: Batch) -> list[tf.Tensor]:
        """The outer loss and the meta-gradient: means over the tasks of all replicas."""
        return self.replicas.mean(functools.partial(self._means_of_part, programs), batch)

    def _means_of_part(self, programs: Programs, batch: Batch) -> list[tf.Tensor]:
        """A sum over tasks can be taken chunk by chunk: they run side by side, in little memory."""
        batch, values = self.training_batch(batch), self.maml.values()
        tasks = batch.inputa.shape[0]

        def means(sums: Callable) -> list[tf.Tensor]:
            with constant_zeros():
                return [pairwise_sum(terms) / tasks for terms in zip(*sums(values, batch))]

        calls = [functools.partial(means, sums) for sums in programs.sums]
        return self.schedule.choose(calls, self.metatrain_optimizer.iterations)

    def training_batch(self, batch: Batch) -> Batch:
        """A batch [T, ...], checked; a Learner asks later of which type the inputs were."""
        batch = as_tensors(batch, self.network)
        kind = batch.inputa.dtype
        self.trained_on |= {'float' if kind.is_floating else kind.name}
        return Batch(*(tf.cast(values, self.dtype) for values in batch))

    def _metatrain_step(self, programs: Programs, batch: Batch) -> tf.Tensor:
        """One outer step, as MAML's; returns the loss before it."""
        loss, *gradients = self._means(programs, batch)
        programs.descend(self.maml.clipped(gradients), self.metatrain_optimizer)
        return loss

    def _pretrain_step(self, programs: Programs, batch: Batch) -> tf.Tensor:
        """One step of Adam on the mean support loss before any update. Returns that loss."""

        def of_part(part: Batch) -> list[tf.Tensor]:
            part = self.training_batch(part)
            with constant_zeros():
                return self.maml.pretrain_gradient(part, programs.parts)

        loss, *gradients = self.replicas.mean(of_part, batch)
        programs.descend(gradients, self.pretrain_optimizer)
        return loss

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
            end, loss = self._steps(pretrain, batches, tf.constant(first), tf.constant(last))
            return int(end), float(loss)
        return first + 1, float(step(Batch(*(values[0] for values in batches))))

    def _loop(self, pretrain: bool, batches: Batch, first: tf.Tensor, last: tf.Tensor) -> tuple:
        step = self._pretrain_step if pretrain else self._metatrain_step

        def unfinished(i, loss):
            return (i < last) & tf.math.is_finite(loss)

        def body(i, _):
            return i + 1, step(self.inlined, Batch(*(values[i] for values in batches)))

        return tf.while_loop(unfinished, body, [first, tf.zeros([], self.dtype)])

    def _placed_steps(self, step: Callable, batches: Batch, first: int, last: int):
        """One by one; batches: this process's tasks."""
        for i in range(first, last):
            batch = Batch(*(values[i] for values in batches))
            loss = float(step(self.replicas.place(batch)))
            if not np.isfinite(loss):
                break
        return i + 1, loss

    # Evaluation.

    def evaluate(self, batch: Batch, num_updates: int, transductive: bool = True) -> Results:
        """As MAML's; batch: [T, ...]. Raises ValueError if it does not fit, or for no update."""
        num_updates = whole_number('num_updates', num_updates, lowest=1)
        return self._evaluate(as_tensors(batch, self.network), num_updates, transductive)

    def _results(self, batch: Batch, num_updates: int, transductive: bool) -> Results:
        batch = checked_batch(batch, self.network, self.dtype)
        types = Results(*[self.dtype] * len(Results._fields))
        settings = {'num_updates': num_updates, 'transductive': transductive}
        evaluate = functools.partial(self.maml.evaluate, **settings, parts=self.programs.parts)
        of_chunks = in_a_loop(evaluate, batch, types, self.network)
        return Results(*map(tf.concat, zip(*of_chunks), TASK_AXIS))

    def evaluate_together(self, batch: Batch, num_updates: int, transductive: bool = True):
        """Evaluates the tasks of all processes, of which `batch` [T, ...] has this one's.

        Arguments as of `evaluate`. There are no outputs if there are replicas.
        """
        if not self.replicas.strategy:
            return self.evaluate(batch, num_updates, transductive)
        table = self._evaluate_replicas(self.replicas.place(batch), num_updates, transductive)
        losses, accuracies = tf.split(table, 2)  # [1 + J, T] each
        rows = losses, accuracies, tf.zeros([*losses.shape, 0, 0], self.dtype)
        return Results(*(part for values in rows for part in (values[0], values[1:])))

    def _table(self, batch: Batch, num_updates: int, transductive: bool) -> tf.Tensor:
        def rows(part):
            results = self._evaluate(part, num_updates, transductive)
            before = results.loss1[tf.newaxis], results.accuracy1[tf.newaxis]
            return tf.concat([before[0], results.losses2, before[1], results.accuracies2], axis=0)

        return self.replicas.gather(rows, batch)

    # The state of training.

    def set_optimizer(self, optimizer: keras.optimizers.Optimizer):
        """Takes another outer optimizer, and forgets the state of the present one."""
        optimizer.build(self.parameters)
        self.maml.metatrain_optimizer = optimizer
        self.make_programs()

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
        values, optimizers = read_checkpoint(path, [*self.named_parameters])
        assign(path, values, self.named_parameters)
        if optimizers:
            read_objects(path, {name: getattr(self, name) for name in optimizers})
        return bool(optimizers)

    def begin_from(self, path: str) -> list[str]:
        """Loads the weights of a checkpoint of another run, but those of a last layer that differs.

        Returns the names of these. Raises ValueError, with nothing loaded, if others differ.
        """
        variables = self.weights | self.norms
        values, _ = read_checkpoint(path, [*self.named_parameters])
        last = [name for name in last_layer(self.network) if name in values]
        left = [name for name in last if values[name].shape != tuple(variables[name].shape)]
        assign(path, values, {name: variables[name] for name in variables if name not in left})
        return left


def assign(path: str, values: dict[str, np.ndarray], variables: dict[str, tf.Variable]):
    """Sets variables to the values of a checkpoint. Raises ValueError if they do not fit."""
    check_parameters(path, values, variables)
    for name, variable in variables.items():
        variable.assign(tf.cast(values[name], variable.dtype))


def can_compile(network) -> bool:
    """Whether XLA compiles a network; says so if not."""
    possible = getattr(network, 'compilable', True)
    if not possible:
        warnings.warn('XLA cannot compile this network, so it runs uncompiled', stacklevel=4)
    return possible
