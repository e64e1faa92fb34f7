"""The computations of an outer step, as programs of their own or inlined in a larger one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from data_generator import Batch
from fewshot.engine.chunks import chunks, in_a_loop
from fewshot.engine.shared import shared_parts, start_apart
from fewshot.networks.inner_loops import takes_shared
from maml import MAML, MetaParameters, Parts


class Programs(NamedTuple):
    """The programs that outer steps and evaluations call."""

    parts: Parts  # of one chunk of tasks
    # For each phase of training: (values, batch) -> [loss, *gradients], sums, of each chunk.
    sums: list[Callable]
    descend: Callable  # (gradients, optimizer)


def make_programs(phases: list[MAML], whole: bool, program: Callable) -> Programs:
    """Programs of a MAML, given as it is in each phase of training; the last is as in evaluation.

    whole: the gradient of a chunk is one program, so that XLA sees all of it. Else its parts are:
    XLA compiles one inner update, however many there are. program: makes a program of a function.
    """
    maml = phases[-1]
    parts = compiled_parts(maml, program)
    if whole:
        sums = [whole_sums(phase, program) for phase in phases]
    else:
        sums = []
        for phase in phases:
            own = parts if phase.stop_grad == maml.stop_grad else compiled_parts(phase, program)
            own = own._replace(prepare=parts.prepare, outcome=parts.outcome)
            sums.append(sums_by_parts(phase, own))
    return Programs(parts, sums, program(maml.descend))


def whole_sums(maml: MAML, program: Callable) -> Callable:
    """See Programs.sums; weights are shared until the update if it is the only one."""
    shared = maml.num_updates == 1 and takes_shared(maml.network)
    parts = shared_parts(maml) if shared else maml.parts._replace(start=start_apart)

    @program
    def of_chunk(chunk: Batch, values: MetaParameters) -> list[tf.Tensor]:
        return maml.gradient_of_sum(chunk, values, parts)

    def sums(values: MetaParameters, batch: Batch) -> list:
        return [of_chunk(chunk, values) for chunk in chunks(batch, maml.network)]

    return sums


def sums_by_parts(maml: MAML, parts: Parts) -> Callable:
    """See Programs.sums; chunks are turns of a loop."""
    types = [maml.dtype] * (1 + len(maml.parameters))

    def sums(values: MetaParameters, batch: Batch) -> list:
        of_chunk = functools.partial(maml.gradient_of_sum, values=values, parts=parts)
        return in_a_loop(of_chunk, batch, types, maml.network)

    return sums


def compiled_parts(maml: MAML, program: Callable) -> Parts:
    """A MAML's parts as programs; the last update and the loss after it are one, with gradient."""
    prepare, update, outcome = map(program, (maml.prepare, maml.update, maml.outcome))

    @program
    def last_loss_and_gradient(values: tuple, support: tuple, query: tuple):
        values = tf.nest.map_structure(tf.identity, values)  # layers may have a step size in common
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = maml.last_loss(*(*values, None)[:3], support, query)
        return loss, tape.gradient(loss, values, unconnected_gradients='zero')

    def last_loss(theta, norms, alpha, support: tuple, query: tuple) -> tf.Tensor:
        if getattr(maml.network, 'prepares_features', False):  # whose gradient is wanted too
            theta = update(theta, norms, alpha, *support)
            return tf.reduce_sum(outcome(theta, norms, *query)[0])
        values = (theta, norms) if alpha is None else (theta, norms, alpha)
        of_values = functools.partial(last_loss_and_gradient, support=support, query=query)
        return with_gradient(of_values, values)

    return Parts(start_apart, prepare, update, outcome, last_loss)


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
