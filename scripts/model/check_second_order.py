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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.checks import first_line
from fewshot.networks.audit import Compared
from fewshot.networks.keras_network import KerasNetwork
from fewshot.runs.terminal import print_anything
from fewshot.runs.user_code import UserCodeError, user_code, user_function
from fewshot.use.second_order import Row, Setting, audit_variables
from maml import cross_entropy, mean_squared_error

HEADING = ('this project', 'plain Keras', 'difference', 'first order')


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Makes Keras's objects that are made while entered compute in float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx('float64')
    keras.config.set_dtype_policy('float64')
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def make_network(options: argparse.Namespace) -> KerasNetwork:
    """Makes the network. Raises UserCodeError, and ValueError for no model, or a refused one."""
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
        found = f'takes inputs of {network.image_shape}'
        raise ValueError(f'the model {found}, but --input_shape is {shape}')
    if network.dim_output != options.classes:
        found = f'has {network.dim_output} outputs'
        raise ValueError(f'the model {found}, but --classes is {options.classes}')
    return network


def random_batch(options: argparse.Namespace) -> Batch:
    """Draws inputs from 0 to 1; random classes, or numbers if there is one output."""
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


# The printed output -------------------------------------------------------------------------------


def line(name: str, width: int, cells: list, verdict: str) -> str:
    cells = [cell if isinstance(cell, str) else number(cell) for cell in cells]
    aligned = [f'{cell:>{len(head)}}' for cell, head in zip(cells, HEADING)]
    return f'{name:{width}} {" ".join(aligned)}  {verdict}'


def number(value: float) -> str:
    plain = 1e-3 <= abs(value) < 1e5 or abs(value) < 1e-9  # which is a zero
    return f'{value:.5f}' if plain else f'{value:.3e}'


def verdict(row: Row) -> str:
    if not row.here.is_decided:
        return 'undecided'
    faults = [fault('this project', row.here), fault('plain Keras', row.keras)]
    return ', '.join(filter(None, faults)) or 'right'


def fault(method: str, compared: Compared) -> str:
    """Tells how a method is wrong; empty if it is not."""
    if compared.is_right:
        return ''
    is_zero = abs(compared.difference) < compared.scale
    return f'{method} not zero' if is_zero else f'{method} {100 * compared.error:.2f} % off'


def listed(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def conclusion(rows: list[Row]) -> str:
    decided = [row for row in rows if row.here.is_decided]
    wrong = [row.name for row in decided if not row.here.is_right]
    keras_wrong = [row.name for row in decided if not row.keras.is_right]
    if wrong:
        said = (
            f'This project is wrong for {listed(wrong)}: do not meta-train this model, unless it '
            'stops gradients on purpose.'
        )
    elif not decided:
        said = 'Nothing could be decided.'
    else:
        plain = f'; plain Keras is wrong for {listed(keras_wrong)}'
        plain = plain if keras_wrong else ', and so is plain Keras'
        said = f'This project is right for {len(decided)} of {len(rows)} variables{plain}.'
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
    network, batch, rows = make_network(options), random_batch(options), []
    loss = cross_entropy(options.examples / options.classes)
    loss = mean_squared_error if options.classes == 1 else loss
    setting = Setting(network, batch, loss, options.updates, options.lr, options.seed)
    width = max(map(len, network.parameters))
    for row in audit_variables(setting):
        if not rows:
            print(line('variable', width, HEADING, 'verdict'))
        rows.append(row)
        here = row.here
        cells = [here.derivative, row.keras.derivative, here.difference, row.first_order]
        print(line(row.name, width, cells, verdict(row)), flush=True)
    print(conclusion(rows))
    right = [row.here.is_right for row in rows if row.here.is_decided]
    return bool(right) and all(right)


# The command line ---------------------------------------------------------------------------------


def positive(convert: Callable, wanted: str) -> Callable:
    """Returns a parser of finite numbers above 0; its error for other texts says `wanted`."""

    def parsed(text: str):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if 0 < np.min(value) and np.max(value) < np.inf:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} must be {wanted}')

    return parsed


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(',')))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = positive(sizes, 'whole numbers, such as 28,28,1')
    count = positive(int, 'a whole number, at least 1')
    step_size = positive(float, 'a number above 0')
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
