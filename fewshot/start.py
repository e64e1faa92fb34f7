"""Loads TensorFlow without its idle lines, and Keras with the settings that are needed here.

Import it before anything else imports TensorFlow: its C++ prints while it is loaded, before its log
level counts.
"""

import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fewshot import KERAS_CAME_FIRST

IDLE_LINES = (
    'All log messages before absl::InitializeLog',
    'Unable to register cu[A-Z]+ factory',
    'oneDNN custom operations are on',
)
LINES_WITHOUT_GPU = ('Could not find cuda drivers', 'failed call to cuInit')


def has_nvidia_gpu() -> bool:
    """Whether the system has the device of an NVIDIA GPU, usable or not."""
    return any(Path('/dev').glob('nvidia[0-9]*')) or Path('/dev/dxg').exists()  # the latter: WSL


@contextmanager
def without_lines(patterns: tuple[str, ...]) -> Iterator[None]:
    """Holds the process's stderr back until it is left, then prints all lines without a pattern."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not re.search('|'.join(patterns).encode(), line):
                    os.write(2, line)


def check_beside():
    """Raises ImportError if a file of the user's hides a module that stands beside this package."""
    here = Path(__file__).resolve().parents[1]
    for name in ('special_grads', 'data_generator', 'maml'):
        found = importlib.util.find_spec(name)
        if found and found.origin and Path(found.origin).resolve().parent != here:
            raise ImportError(
                f'{found.origin} hides the {name}.py that fewshot needs: give it another name'
            )


def settle_keras(came_first: bool):
    """Sets Keras up as this project needs it, whatever ~/.keras/keras.json says.

    came_first: whether the program had imported Keras before; then its settings stay. Raises
    ImportError for another backend.
    """
    if keras.config.backend() != 'tensorflow':
        raise ImportError(
            f'Keras runs on {keras.config.backend()} here, and this project needs it on '
            'TensorFlow: set KERAS_BACKEND=tensorflow, or import this before keras'
        )
    if not came_first:
        keras.config.set_floatx('float32')
        keras.config.set_epsilon(1e-7)
        keras.config.set_image_data_format('channels_last')
    elif keras.config.floatx() != 'float32':
        warnings.warn(
            f'Keras rounds step sizes to {keras.config.floatx()} here, by its setting floatx',
            stacklevel=2,
        )


check_beside()
ALL_LINES = os.environ['TF_CPP_MIN_LOG_LEVEL'] == '0' or 'tensorflow' in sys.modules
DROPPED = IDLE_LINES if has_nvidia_gpu() else IDLE_LINES + LINES_WITHOUT_GPU
with nullcontext() if ALL_LINES else without_lines(DROPPED):
    import keras
    import tensorflow as tf

    if not has_nvidia_gpu():
        tf.config.list_physical_devices()  # looks for GPUs, and says that there is none

settle_keras(KERAS_CAME_FIRST)
