"""Outer losses that change during training."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from data_generator import Batch, whole_number
from fewshot.checks import check_choice


class Phase(NamedTuple):
    """A part of meta-training with an outer loss of its own."""

    start: int  # the first iteration
    first_order: bool = False  # even if MAML's stop_grad is not
    all_losses: bool = False  # the losses after every update count, not the last alone


def phases(loss_steps: str, loss_steps_iterations: int, first_order: int) -> list[Phase]:
    """What MAML++ changes during training; arguments as of FastMAML. Raises ValueError."""
    first_order = whole_number('first_order_iterations', first_order)
    until = last_all_losses(loss_steps, loss_steps_iterations)
    starts = sorted({0, first_order, until} - {float('inf')})
    return [Phase(start, start < first_order, start < until) for start in starts]


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
