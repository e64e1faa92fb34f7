"""Replaces TensorFlow's own functions while something is traced."""

import contextlib
import threading
from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.ops import control_flow_state

TRACING = threading.RLock()  # held while a function is replaced


@contextlib.contextmanager
def replaced(module, name: str, function: Callable):
    """Replaces the module's function of that name, for this thread, while entered."""

    def chosen(*arguments, **named):
        mine = threading.get_ident() == owner
        return (function if mine else original)(*arguments, **named)

    with TRACING:
        owner, original = threading.get_ident(), getattr(module, name)
        setattr(module, name, chosen)
        try:
            yield
        finally:
            setattr(module, name, original)


@contextlib.contextmanager
def constant_zeros():
    """Makes zero gradients constants, while the derivatives of programs are traced.

    `tf.custom_gradient` also returns its inputs. Their gradients are zeros, which TensorFlow builds
    from the runtime shape, so every input is copied between programs. Here the zeros are constants.
    Without the copies, a task of Omniglot, 20-way 1-shot, keeps 9 MB per update instead of 25, and
    a step is a tenth shorter. TensorFlow has no public way to ask for this; where the function has
    gone, programs are slower, but as right.
    """
    name = 'ZerosLike'
    if not hasattr(control_flow_state, name):
        yield
        return
    original = getattr(control_flow_state, name)

    def zeros(operation, index: int):
        passed_on = operation.outputs[index]
        if operation.type == 'IdentityN' and passed_on.shape.is_fully_defined():
            return tf.zeros(passed_on.shape, passed_on.dtype)
        return original(operation, index)

    with replaced(control_flow_state, name, zeros):
        yield
