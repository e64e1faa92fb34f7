#!/usr/bin/env python
"""Audits the second derivatives of a Keras model: is its meta-gradient right?

    python scripts/model/check_second_order.py FILE.py:FUNCTION [--input_shape=28,28,1]

FUNCTION(image_shape, classes) returns the model. For each trainable variable the derivative of the
outer loss along a random direction is printed, in float64, on random data: as central differences
have it, which need no derivative; by this project; by Keras alone, with a GradientTape inside
another; and by first-order MAML. Weights are the model's, each moved a little at random, so that
zeros neither hide a derivative nor lie on a kink.

The exit status is 0 if this project's derivatives are the differences, wherever these agree with
each other; 1 if not, or if they agree nowhere; and 2 if there is nothing to audit: a model that is
refused, or a mistake in the command or in FUNCTION.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.checks import first_line
from fewshot.engine.fast import FastMAML
from fewshot.networks.audit import DIRECTIONS, TOLERANCE, Compared, differentiate, moved
from fewshot.networks.keras_layers import takes_training
from fewshot.networks.keras_network import KerasNetwork
from fewshot.runs.terminal import print_anything
from fewshot.runs.user_code import UserCodeError, user_code, user_function
from maml import cross_entropy, mean_squared_error

THIS, KERAS, FIRST_ORDER = 'this project', 'plain Keras', 'first order'
HEADING = (THIS, KERAS, 'difference', FIRST_ORDER)
RIGHT, UNDECIDED = 'right', 'undecided'


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """What Keras makes while entered computes in float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx('float64')
    keras.config.set_dtype_policy('float64')
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


# What is audited ----------------------------------------------------------------------------------


def make_network(options: argparse.Namespace) -> KerasNetwork:
    """Raises ValueError for what is no model, or is refused, and UserCodeError."""
    shape, spec = options.input_shape, options.function
    keras.utils.set_random_seed(options.seed)
    model = user_function(spec)(shape, options.classes)
    for variable in getattr(model, 'trainable_variables', []):
        if variable.dtype != 'float64':
            raise ValueError(
                f'{variable.path} is {variable.dtype}, but differences need float64: give the '
                'layers of the model no dtype, or "float64"'
            )
    with user_code(spec, all_of_it=False):  # calls the model
        network = KerasNetwork(model, input_shape=shape, audit=None)
    if network.image_shape != shape:
        raise ValueError(
            f'the model takes inputs of {network.image_shape}, but --input_shape is {shape}'
        )
    if network.dim_output != options.classes:
        raise ValueError(
            f'the model has {network.dim_output} outputs, but --classes is {options.classes}'
        )
    return network


def random_batch(options: argparse.Namespace) -> Batch:
    """Inputs from 0 to 1; random classes, or numbers if there is one output."""
    random = np.random.default_rng(options.seed)
    count, outputs = (options.tasks, options.examples), options.classes
    parts = []
    for _ in 'ab':
        parts.append(random.random((*count, int(np.prod(options.input_shape)))))
        if outputs == 1:
            parts.append(random.standard_normal((*count, 1)))
        else:
            parts.append(np.eye(outputs)[random.integers(0, outputs, count)])
    return Batch(*map(tf.constant, parts))


class Setting(NamedTuple):
    """A network, tasks, and how it adapts to them."""

    network: KerasNetwork
    values: list[np.ndarray]  # of the trainable variables
    batch: Batch
    loss: Callable
    updates: int
    lr: float

    def maml(self, stop_grad: bool = False) -> FastMAML:
        numbers, named = (self.lr, self.updates), {'dtype': tf.float64, 'compiled': False}
        model = FastMAML(self.network, self.loss, *numbers, stop_grad=stop_grad, **named)
        for variable, value in zip(model.parameters, self.values):
            variable.assign(value)
        return model


def make_setting(options: argparse.Namespace) -> Setting:
    """Raises as `make_network`."""
    network, random = make_network(options), np.random.default_rng([options.seed, 1])
    values = [moved(value, random) for value, _ in network.parameters.values()]
    loss = cross_entropy(options.examples / options.classes)
    loss = mean_squared_error if options.classes == 1 else loss
    return Setting(network, values, random_batch(options), loss, options.updates, options.lr)


# Derivatives --------------------------------------------------------------------------------------


def plain_keras(setting: Setting) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The outer loss and its gradient as one would write them with Keras, without this project."""
    model = setting.network.model
    fixed = [variable.value for variable in model.non_trainable_variables]
    named = {'training': True} if takes_training(model) else {}

    def loss(theta, x, y):  # of one task: [examples, D] and [examples, classes]
        images = tf.reshape(x, [-1, *setting.network.image_shape])
        output, _ = model.stateless_call(theta, fixed, images, **named)
        return setting.loss(tf.reshape(output, [1, *y.shape]), y[tf.newaxis])[0]

    @tf.function(autograph=False)
    def loss_and_gradient(theta):
        total = 0.0
        with tf.GradientTape() as outer:
            outer.watch(theta)
            for inputa, labela, inputb, labelb in zip(*map(tf.unstack, setting.batch)):
                adapted = theta
                for _ in range(setting.updates):
                    with tf.GradientTape() as inner:
                        inner.watch(adapted)
                        support = loss(adapted, inputa, labela)
                    gradients = inner.gradient(support, adapted, unconnected_gradients='zero')
                    adapted = [value - setting.lr * g for value, g in zip(adapted, gradients)]
                total += loss(adapted, inputb, labelb)
            total /= setting.batch.inputa.shape[0]
        return total, outer.gradient(total, theta, unconnected_gradients='zero')

    return loss_and_gradient([tf.constant(value) for value in setting.values])


class Differences:
    """Central differences of the outer loss, which need none of its derivatives."""

    def __init__(self, setting: Setting):
        self.setting, self.model = setting, setting.maml()

    def outer_loss(self) -> float:
        results = self.model.evaluate(self.setting.batch, self.setting.updates)
        return float(np.mean(results.losses2[-1]))

    def along(self, i: int, direction: np.ndarray, floor: float) -> tuple[float, float]:
        """The derivative for variable i, and its uncertainty; see `differentiate`."""
        precision = self.setting.network.precision
        return differentiate(lambda step: self.difference(i, step * direction), floor, precision)

    def difference(self, i: int, change: np.ndarray) -> float:
        variable, value = self.model.parameters[i], self.setting.values[i]
        variable.assign(value + change)
        after = self.outer_loss()
        variable.assign(value - change)
        before = self.outer_loss()
        variable.assign(value)
        return (after - before) / 2


class Row(NamedTuple):
    """Of one variable."""

    name: str
    compared: dict[str, Compared]  # by each method, with the same differences

    @property
    def difference(self) -> float:
        return self.compared[THIS].difference

    @property
    def is_decided(self) -> bool:
        return self.compared[THIS].is_decided

    def is_right(self, method: str) -> bool:
        return self.compared[method].is_right

    @property
    def verdict(self) -> str:
        if not self.is_decided:
            return UNDECIDED
        return ', '.join(filter(None, map(self.fault, (THIS, KERAS)))) or RIGHT

    def fault(self, method: str) -> str:
        """Empty if there is none."""
        of = self.compared[method]
        if of.is_right:
            return ''
        if abs(of.difference) < of.scale:
            return f'{method} not zero'
        return f'{method} {100 * of.error:.2f} % off'


def audit(setting: Setting, seed: int) -> Iterator[Row]:
    """The variables, one by one. Raises ValueError if there is no finite loss to differentiate."""
    loss, exact = setting.maml().meta_gradient(setting.batch)
    keras_loss, plain = plain_keras(setting)
    if not np.isfinite(loss):
        raise ValueError(f'the outer loss is {float(loss)}: try a smaller --lr, or fewer --updates')
    if abs(loss - keras_loss) > TOLERANCE * abs(keras_loss):
        raise ValueError(
            f'the outer loss is {float(loss):.6g} by this project, and {float(keras_loss):.6g} by '
            'Keras alone: examples or tasks depend on each other in a way that is not supported'
        )
    _, first_order = setting.maml(stop_grad=True).meta_gradient(setting.batch)
    gradients = {THIS: exact, KERAS: plain, FIRST_ORDER: first_order}
    norms = np.array([float(tf.norm(gradient)) for gradient in [*exact, *first_order]])
    floor = max(1e-3 * norms[np.isfinite(norms)].max(initial=0), 1e-12)
    differences = Differences(setting)
    for i, name in enumerate(setting.network.parameters):
        random = np.random.default_rng([seed, 2, i])
        for _ in range(DIRECTIONS):
            direction = random.standard_normal(setting.values[i].shape)
            found = *differences.along(i, direction, floor), floor, setting.network.precision
            along = {method: float(np.sum(g[i] * direction)) for method, g in gradients.items()}
            row = Row(name, {method: Compared(along[method], *found) for method in along})
            if row.is_decided:
                break
        yield row


# What is printed ----------------------------------------------------------------------------------


def line(name: str, width: int, cells: list, verdict: str) -> str:
    cells = [cell if isinstance(cell, str) else number(cell) for cell in cells]
    aligned = [f'{cell:>{len(head)}}' for cell, head in zip(cells, HEADING)]
    return f'{name:{width}} {" ".join(aligned)}  {verdict}'


def number(value: float) -> str:
    plain = 1e-3 <= abs(value) < 1e5 or abs(value) < 1e-9  # which is a zero
    return f'{value:.5f}' if plain else f'{value:.3e}'


def listed(rows: list[Row]) -> str:
    names, more = [row.name for row in rows[:3]], len(rows) - 3
    return ', '.join(names) + (f' and {more} more' if more > 0 else '')


def conclusion(rows: list[Row]) -> str:
    decided = [row for row in rows if row.is_decided]
    wrong = [row for row in decided if not row.is_right(THIS)]
    keras_wrong = [row for row in decided if not row.is_right(KERAS)]
    if wrong:
        said = (
            f'This project is wrong for {listed(wrong)}: do not meta-train this model, unless it '
            'stops gradients on purpose.'
        )
    elif not decided:
        said = 'Nothing could be decided.'
    else:
        besides = f'; plain Keras is wrong for {listed(keras_wrong)}' if keras_wrong else ''
        besides = besides or ', and so is plain Keras'
        said = f'This project is right for {len(decided)} of {len(rows)} variables{besides}.'
    if len(decided) < len(rows):
        said += (
            f' For {len(rows) - len(decided)} the differences do not agree with each other, as '
            'happens near the kinks of ReLU and max-pooling: try another --seed, or softplus.'
        )
    return said


def report(options: argparse.Namespace) -> bool:
    """Prints the table. Returns whether this project is right wherever that could be decided.

    Raises ValueError and UserCodeError.
    """
    setting = make_setting(options)
    width = max(len(name) for name in setting.network.parameters)
    rows = []
    for row in audit(setting, options.seed):
        if not rows:
            print(line('variable', width, HEADING, 'verdict'))
        rows.append(row)
        along = {method: row.compared[method].derivative for method in row.compared}
        cells = [along[THIS], along[KERAS], row.difference, along[FIRST_ORDER]]
        print(line(row.name, width, cells, row.verdict), flush=True)
    print(conclusion(rows))
    decided = [row for row in rows if row.is_decided]
    return bool(decided) and all(row.is_right(THIS) for row in decided)


# The command line ---------------------------------------------------------------------------------


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number, at least 1')
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    sizes = text.split(',')
    if not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f'{text!r} must be whole numbers, such as 28,28,1')
    return tuple(map(int, sizes))


def step_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text!r} must be a number above 0')
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('function', metavar='FILE.py:FUNCTION')
    parser.add_argument('--input_shape', type=shape, default=(28, 28, 1), help='of an example')
    parser.add_argument('--classes', type=count, default=5, help='outputs; 1: regression')
    parser.add_argument('--updates', type=count, default=1, help='of the inner loop')
    parser.add_argument('--lr', type=step_size, default=0.1, help='its step size, α')
    parser.add_argument('--tasks', type=count, default=2)
    parser.add_argument('--examples', type=count, default=5, help='of each support and query set')
    parser.add_argument('--seed', type=int, default=0, help='of weights, data and directions')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    try:
        with in_float64():
            right = report(options)
    except UserCodeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, tf.errors.OpError) as error:
        print(f'check_second_order.py: {first_line(error)}', file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if right else 1)


if __name__ == '__main__':
    print_anything()
    main()
