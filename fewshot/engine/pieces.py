"""Methods that are programs of their own."""

import functools
import threading
from collections.abc import Callable

import tensorflow as tf

TRACED = threading.local()  # of this thread: `inside`, whether a piece is being traced


class piece:
    """A method that is a program of its own, compiled by XLA if its object is `compiled`.

    What calls pieces differentiates through the calls: piece by piece, XLA compiles one inner
    update, however many there are, instead of all of them unrolled. A piece that a piece calls is
    a part of it: XLA takes minutes for derivatives of programs within a program.
    """

    xla = True

    def __init__(self, method: Callable):
        self.method = method
        functools.update_wrapper(self, method)

    def __set_name__(self, owner: type, name: str):
        self.attribute = f'_{name}_of_{owner.__name__}'  # where an object keeps its program

    def __get__(self, instance, owner: type | None = None):
        if instance is None:
            return self
        method = self.method.__get__(instance)
        if getattr(TRACED, 'inside', False):
            return method
        program = instance.__dict__.get(self.attribute)
        if program is None:
            program = tf.function(
                as_one(method) if self.xla else method,
                jit_compile=instance.compiled if self.xla else None,
                autograph=False,
            )
            instance.__dict__[self.attribute] = program
        return program


def as_one(method: Callable) -> Callable:
    """The method with the pieces that it calls as its parts."""

    @functools.wraps(method)
    def traced(*arguments, **named):
        TRACED.inside, before = True, getattr(TRACED, 'inside', False)
        try:
            return method(*arguments, **named)
        finally:
            TRACED.inside = before

    return traced


class graph(piece):
    """A method that is a graph of TensorFlow, in which pieces run."""

    xla = False
