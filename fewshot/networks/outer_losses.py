"""Outer losses that change during training, as MAML++ has them."""

import copy
from collections.abc import Callable

import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import check_choice
from maml import MAML

LEAST_STEP_WEIGHT = 0.03  # of a loss before the last, times the number of updates


class OuterLossSchedule:
    """The schedule, by outer step, of the losses that count and of the order of their gradient.

    loss_steps: whether the 'last' of the losses after each update counts, or 'all', for
    loss_steps_iterations outer steps; 0: always. first_order_iterations: the number of outer steps
    of first order, before the others. Raises ValueError for values that do not fit.
    """

    def __init__(
        self,
        loss_steps: str = 'last',
        loss_steps_iterations: int = 0,
        first_order_iterations: int = 0,
    ):
        check_choice('loss_steps', loss_steps, ('last', 'all'))
        self.loss_steps = loss_steps
        self.iterations = whole_number('loss_steps_iterations', loss_steps_iterations)
        self.first_order_iterations = whole_number('first_order_iterations', first_order_iterations)
        if self.iterations and loss_steps == 'last':
            wrong = f"loss_steps_iterations={self.iterations} is for loss_steps='all'"
            raise ValueError(f'{wrong}: give both or none')

    def first_order(self, step: int) -> bool:
        """Whether outer step number `step`, from 0, is of first order."""
        return step < self.first_order_iterations

    def all_losses(self, step: int) -> bool:
        """Whether the losses after all updates count in outer step number `step`."""
        return self.loss_steps == 'all' and (not self.iterations or step < self.iterations)

    def starts(self) -> list[int]:
        """Lists the outer steps with which a phase begins: one of the above changes there."""
        return sorted({0, self.first_order_iterations, self.iterations})

    def weights(self, done: tf.Tensor, updates: int, dtype: tf.DType) -> list[tf.Tensor]:
        """Computes MAML++'s weights of the losses after each of J updates; they add up to 1.

        In its authors' program those before the last fall from 1/J each to 0.03/J, and the last one
        gains what they lose, linearly over the iterations. done: outer steps so far.
        """
        share = tf.zeros([], dtype)
        if self.iterations:
            share = tf.cast(done, dtype) / self.iterations
        others = tf.maximum(1 - share, LEAST_STEP_WEIGHT) / updates
        return [others] * (updates - 1) + [1 - (updates - 1) * others]

    def phases(self, maml: MAML) -> list[MAML]:
        """Returns a MAML as it is in each phase, in order; all have the same variables."""

        def weights() -> list[tf.Tensor]:
            return self.weights(maml.metatrain_optimizer.iterations, maml.num_updates, maml.dtype)

        found = []
        for start in self.starts():
            phase = copy.copy(maml)
            phase.stop_grad = maml.stop_grad or self.first_order(start)
            several = self.all_losses(start) and maml.num_updates > 1
            phase.loss_weights = weights if several else None
            found.append(phase)
        return found

    def choose(self, calls: list[Callable], done: tf.Variable):
        """Returns the result of the present phase's call; done: outer steps so far.

        The graph chooses: a run that continues needs no memory of its phase, and nothing is traced
        again.
        """
        if len(calls) == 1:
            return calls[0]()
        begun = [tf.cast(done >= start, tf.int32) for start in self.starts()[1:]]
        return tf.switch_case(tf.add_n(begun), calls)
