"""The outer step of a model as a program for other runtimes than TensorFlow's."""

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

import special_grads
from data_generator import Batch
from fewshot.checks import first_line
from fewshot.engine import chunks, shared
from fewshot.engine.devices import set_up_gpus
from fewshot.engine.fast import FastMAML
from fewshot.engine.tracing import replaced
from special_grads import product, product_outer, product_transposed

LONG_SUM = 1500  # rows from which on a sum over them is taken in parts
MOST_PARTS = 256  # of the sums of all tasks together
FEWEST_ROWS = 32  # of a part
COPY = re.compile(r'mhlo\.copy (%\S+) : (\S+)')


class Step(NamedTuple):
    """An outer step, Adam's included: a function of arrays.

    Its arguments are the four arrays of a meta-batch and those of `state`; its results the loss
    before the step, and the new values of those of the state that `written` names, in that order.
    """

    program: str  # StableHLO
    state: dict[str, np.ndarray]
    written: list[str]


def state_variables(model: FastMAML) -> dict:
    """Returns {name: variable} of all that an outer step reads: parameters, and Adam's state."""
    parameters = {f'parameters/{name}': v for name, v in model.named_parameters.items()}
    return parameters | {f'adam/{i}': v for i, v in enumerate(model.metatrain_optimizer.variables)}


def export_step(model: FastMAML, batch: Batch) -> Step:
    """Exports a model's outer step on meta-batches of the sizes of `batch`.

    All tasks run together, as a GPU wants them; products of float32 have the highest precision, on
    devices that would round their factors; and long sums are in parts, see `sum_in_parts`.
    Raises ValueError if XLA cannot compile the step, or it reads other variables, as those of a
    layer that is not trained.
    """
    if not model.compiled:
        raise ValueError('XLA cannot compile this network, so its step cannot be exported')
    set_up_gpus()  # before the trace: it decides on the precision
    shapes = [tf.TensorSpec(values.shape, model.dtype) for values in batch]

    @tf.function(autograph=False, jit_compile=True)
    def step(*arrays):
        return model._metatrain_step(model.inlined, Batch(*arrays))

    with all_tasks_together(), sums_in_parts():
        read = step.get_concrete_function(*shapes).captured_inputs
    names = {id(handle(variable)): name for name, variable in state_variables(model).items()}
    if any(id(tensor) not in names for tensor in read):
        raise ValueError('the step reads variables that are not trained, so it cannot be exported')
    try:
        text = step.experimental_get_compiler_ir(*shapes)(stage='stablehlo', platform_name='CPU')
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(f'this step cannot be exported ({first_line(error)})') from error
    variables = state_variables(model)
    state = {name: variables[name].numpy() for name in (names[id(tensor)] for tensor in read)}
    rate = model.metatrain_optimizer.learning_rate  # the only one that is never written
    written = [name for name in state if variables[name] is not rate]
    # A copy is of no use here, and plugins of JAX refuse it: it is no operation of StableHLO.
    return Step(COPY.sub(r'stablehlo.reshape \1 : (\2) -> \2', text), state, written)


def handle(variable) -> tf.Tensor:
    """Returns the handle of a variable of TensorFlow's or Keras's, by which programs read it."""
    return (variable if isinstance(variable, tf.Variable) else variable.value).handle


@contextlib.contextmanager
def all_tasks_together() -> Iterator[None]:
    """Makes a meta-batch one chunk, or the largest that a network takes, while entered."""

    def whole(batch: Batch, network=None) -> int:
        tasks = batch.inputa.shape[0]
        return min(tasks, getattr(network, 'most_tasks', None) or tasks)

    with replaced(chunks, 'chunk_size', whole):
        yield


@contextlib.contextmanager
def sums_in_parts() -> Iterator[None]:
    """Makes `special_grads.product_outer` take long sums in parts, while entered."""
    with contextlib.ExitStack() as stack:
        for module in (special_grads, shared):
            stack.enter_context(replaced(module, 'product_outer', sum_in_parts))
        yield


@tf.custom_gradient
def sum_in_parts(left: tf.Tensor, right: tf.Tensor):
    """As special_grads.product_outer: [T, n, in], [T, n, out] -> [T, in, out].

    A GPU's library of products divides the result among its processors, not the sum, and a kernel's
    derivative is a few numbers, each the sum over all pixels of all images: 4 to 12 of an H200's
    132 processors had work. Summed in parts, a step on miniImagenet took a tenth of the time, as
    measured with an earlier implementation.
    """
    (tasks, rows), parts = left.shape[:2], number_of_parts(*left.shape[:2])
    pieces = [tf.reshape(x, [tasks * parts, rows // parts, x.shape[2]]) for x in (left, right)]
    sums = product_outer(*pieces)  # [T * parts, in, out]
    if parts > 1:  # else XLA would make one product of it again
        (sums,) = xla.optimization_barrier(sums)
        sums = tf.reduce_sum(tf.reshape(sums, [tasks, parts, *sums.shape[1:]]), axis=1)
    return sums, lambda gradient: (product_transposed(right, gradient), product(left, gradient))


def number_of_parts(tasks: int, rows: int) -> int:
    """Returns how many equal parts a sum over rows has, for each of the tasks."""
    if rows < LONG_SUM:
        return 1
    most = min(MOST_PARTS // tasks, rows // FEWEST_ROWS)
    return max((parts for parts in range(1, most + 1) if rows % parts == 0), default=1)
