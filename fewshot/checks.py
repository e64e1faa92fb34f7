"""Checks of arguments: an error is one sentence with the name of the wrong argument."""

import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import tensorflow as tf


def real_number(name: str, value, above: float | None = None) -> float:
    """Returns an argument that is at least 0, such as a step size, or greater than `above`.

    Raises ValueError, with its name, if it is infinite, NaN, out of range or no real number.
    """
    try:
        array = real_numbers(name, value)
        found = float(array) if array.ndim == 0 else np.nan
    except ValueError:
        found = np.nan
    if not (found >= 0 if above is None else found > above) or found == np.inf:
        wanted = 'of 0 or more' if above is None else f'above {above:g}'
        raise ValueError(f'{name} must be a finite number {wanted}, but it is {value!r:.60}')
    return found


def real_numbers(name: str, values) -> np.ndarray:
    """Returns an argument as an array. Raises ValueError, with its name, if it has no real numbers.

    Booleans count as real numbers; masked values do not.
    """
    if np.ma.is_masked(values):
        raise ValueError(f'{name} must be real numbers, but some are masked')
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f'{name} must be an array, but it is none ({error})') from error
    if not np.can_cast(array.dtype, np.float64, 'same_kind'):
        kind = 'None' if values is None else f'of type {array.dtype}'
        raise ValueError(f'{name} must be an array of real numbers, but it is {kind}')
    return array


def finite_numbers(name: str, array: np.ndarray, dtype) -> np.ndarray:
    """Converts an array to `dtype`. Raises ValueError, with the name, if it is not finite there."""
    with np.errstate(over='ignore'):
        array = np.asarray(array, dtype)
    if not np.isfinite(array).all():
        count = int(np.sum(~np.isfinite(array)))
        raise ValueError(
            f'{name} must be finite numbers of {array.dtype}, but {count} are NaN or infinite'
        )
    return array


def folder_path(name: str, value) -> Path:
    """Returns a folder's path. Raises ValueError, with the argument's name, if it is no path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f'{name} must be the path of a folder, but it is {value!r:.60}')
    return Path(value)


def first_line(error: Exception) -> str:
    """Returns the first line with content after TensorFlow's headings and places in the program."""
    headings = ('Graph execution error', 'Detected at node', 'File ', '<stack traces', ' ', '\t')
    said = [line for line in str(error).splitlines() if line and not line.startswith(headings)]
    # TensorFlow names the operation before and after what the system says.
    return re.sub(r'\{\{.*?\}\} | \[Op:\w+\].*', '', (said or [type(error).__name__])[0])


def check_choice(name: str, value, choices: Collection[str], more: str = ''):
    """Raises ValueError, with the argument's name, if the value is none of the choices."""
    if value not in choices:
        known = ', '.join(map(repr, choices))
        raise ValueError(f'{name} must be one of {known}{more}, but it is {value!r:.60}')


def float_type(dtype) -> tf.DType:
    """Returns float32 or float64, given by name or as in TensorFlow or NumPy. Raises ValueError."""
    try:
        found = tf.as_dtype(dtype)
    except TypeError:
        found = None
    if found not in (tf.float32, tf.float64):
        raise ValueError(f'dtype must be float32 or float64, but it is {dtype!r:.60}')
    return found


def tells_names(*targets: Callable) -> Callable:
    """Decorates a function: its error for an unknown argument tells the one that may be meant.

    targets: where the function passes other named arguments on.
    """

    def decorate(function: Callable) -> Callable:
        signatures = [inspect.signature(target).parameters for target in (function, *targets)]
        parts = [part for each in signatures for part in each.values()]
        known = {part.name for part in parts if part.kind != part.VAR_KEYWORD}
        known = sorted(known - {'self', 'cls'})

        @functools.wraps(function)
        def call(*arguments, **named):
            for name in named.keys() - known:
                near = difflib.get_close_matches(name, known, 1)
                remedy = f'did you mean {near[0]}?' if near else f'there are {", ".join(known)}'
                raise TypeError(f'there is no argument {name}; {remedy}')
            return function(*arguments, **named)

        return call

    return decorate
