"""Arguments, checked: one sentence with the name of the one that is wrong."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf


def real_number(name: str, value, above: float | None = None) -> float:
    """An argument of 0 or more, a step size; or one greater than `above`.

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
    """An argument as an array. Raises ValueError, with its name, if it is not one of real numbers.

    Booleans count as such; what NumPy masks does not.
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
    """In another type. Raises ValueError, with the name, if they are not finite in it."""
    with np.errstate(over='ignore'):
        array = np.asarray(array, dtype)
    if not np.isfinite(array).all():
        count = int(np.sum(~np.isfinite(array)))
        raise ValueError(
            f'{name} must be finite numbers of {array.dtype}, but {count} are NaN or infinite'
        )
    return array


def folder_path(name: str, value) -> Path:
    """An argument that names a folder. Raises ValueError, with its name, for what is no path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f'{name} must be the path of a folder, but it is {value!r:.60}')
    return Path(value)


def first_line(error: Exception) -> str:
    """The first line that says something, after TensorFlow's headings and places in the program."""
    headings = ('Graph execution error', 'Detected at node', 'File ', '<stack traces', ' ', '\t')
    said = [line for line in str(error).splitlines() if line and not line.startswith(headings)]
    return (said or [type(error).__name__])[0]


def check_choice(name: str, value, choices: Sequence[str], more: str = ''):
    """Raises ValueError, with the argument's name, for a value that is no choice."""
    if value not in choices:
        known = ', '.join(map(repr, choices))
        raise ValueError(f'{name} must be one of {known}{more}, but it is {value!r:.60}')


def float_type(dtype) -> tf.DType:
    """float32 or float64, by name or as TensorFlow or NumPy have it. Raises ValueError."""
    try:
        found = tf.as_dtype(dtype)
    except TypeError:
        found = None
    if found not in (tf.float32, tf.float64):
        raise ValueError(f'dtype must be float32 or float64, but it is {dtype!r:.60}')
    return found
