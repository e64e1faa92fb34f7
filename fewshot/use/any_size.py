"""A model for any number of tasks and examples."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from fewshot.engine.fast import FastMAML
from maml import Common, Tensors


class Parts(NamedTuple):
    """The methods of a model that a Learner takes, as pieces or plain; see FastMAML."""

    prepare: Callable
    update: Callable
    output: Callable
    outcome: Callable

    @classmethod
    def plain(cls, model: FastMAML) -> 'Parts':
        """Without the programs of their own that pieces are."""
        found = []
        for name in cls._fields:
            method = inspect.getattr_static(type(model), name)
            found.append(getattr(method, 'method', method).__get__(model))
        return cls(*found)


class AnySize:
    """What a Learner has of its model, for any number of tasks and examples.

    Each of these is traced once for one task and once for several, with all numbers unknown: a
    program for each size would fill the memory of a process that lives long. A network of one's own
    that must know the numbers runs without programs. A compiled model has programs for the first
    COMPILED sizes, since XLA needs to know them, and the others run as of one that is not compiled.
    Here x is [T, examples, D], y [T, examples, out], and weights are [T, ...].
    """

    COMPILED = 24

    def __init__(self, model: FastMAML):
        self.model, self.common = model, Common(model.norms, model.rates)
        self.plain = Parts.plain(model)
        self.pieces = Parts(*(getattr(model, name) for name in Parts._fields))
        self.programs, self.compiled = {}, set()
        self.compiles = getattr(model, 'compiled', False)

    def adapt(
        self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, lr, steps: int, done: int = 0
    ) -> Tensors:
        """The weights after so many updates more; lr: α, a scalar; done: updates before these."""
        size = tf.constant(lr, self.model.dtype)
        return self._run(self._adapt, x, y, weights, size, done, done + steps)

    def adapt_as_learned(
        self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, scale, steps: int, done: int = 0
    ) -> Tensors:
        """The same with the step sizes that the outer loop has learned, times `scale`."""
        size = tf.constant(scale, self.model.dtype)
        return self._run(self._adapt_as_learned, x, y, weights, size, done, done + steps)

    def output(
        self, x: tf.Tensor, weights: Tensors, leading: int | None = None, done: int = 0
    ) -> tf.Tensor:
        """As MAML.output, of inputs that are not prepared; done: updates that the weights had."""
        if leading is None:
            return self._run(self._output, x, weights, done)
        return self._run(self._output, x, weights, done, leading)

    def losses(self, x: tf.Tensor, y: tf.Tensor, weights: Tensors, done: int = 0) -> tf.Tensor:
        """[T]; done: see `output`."""
        return self._run(self._losses, x, y, weights, done)

    def _adapt(self, parts: Parts, x, y, weights, lr, done, end) -> Tensors:
        return self._updated(parts, x, y, weights, done, end, lambda alpha: lr)

    def _adapt_as_learned(self, parts: Parts, x, y, weights, scale, done, end) -> Tensors:
        def scaled(alpha):
            return tf.nest.map_structure(lambda rate: scale * rate, alpha)

        return self._updated(parts, x, y, weights, done, end, scaled)

    def _updated(self, parts: Parts, x, y, weights, done, end, chosen: Callable) -> Tensors:
        """chosen: from the rule's α of an update to that which it gets."""
        x = parts.prepare(x, *self.model.preparing(self.common))

        def update(step, theta):
            norms, alpha = self.model.at(self.common, step)
            theta = parts.update(theta, norms, x, y, chosen(alpha))
            shapes = {name: weights[name].shape for name in theta}  # as loops want to know them
            return step + 1, {name: tf.ensure_shape(theta[name], shapes[name]) for name in theta}

        return tf.while_loop(lambda step, _: step < end, update, [done, weights])[1]

    def _output(self, parts: Parts, x, weights, done, *leading) -> tf.Tensor:
        x = parts.prepare(x, *self.model.preparing(self.common, *leading))
        return parts.output(weights, self._norms_after(done), x, *leading)

    def _losses(self, parts: Parts, x, y, weights, done) -> tf.Tensor:
        x = parts.prepare(x, *self.model.preparing(self.common))
        return parts.outcome(weights, self._norms_after(done), x, y)[0]

    def _norms_after(self, done: int | tf.Tensor) -> Tensors:
        """The normalisation parameters of queries after so many updates, as in training."""
        before = max(done - 1, 0) if isinstance(done, int) else tf.maximum(done - 1, 0)
        return self.model.at(self.common, before)[0]

    def _run(self, function: Callable, x: tf.Tensor, *others):
        size = function.__name__, *x.shape, len(others)
        if self.compiles and (size in self.compiled or len(self.compiled) < self.COMPILED):
            self.compiled.add(size)
            return function(self.pieces, x, *others)
        if tf.config.functions_run_eagerly():
            return function(self.plain, x, *others)
        key = function.__name__, x.shape[0] == 1, len(others)
        program = self.programs.get(key)
        if program is None:
            program = self._program(functools.partial(function, self.plain), x, *others)
        result = program(x, *others)
        self.programs[key] = program  # not of a loss that failed
        return result

    def _program(self, function: Callable, *arguments) -> Callable:
        """The function as a program for arguments like these; itself if there can be none."""
        tasks, signature = 1 if arguments[0].shape[0] == 1 else None, []
        for argument in arguments:
            if isinstance(argument, dict):  # weights
                kept = {name: value.shape[1:] for name, value in argument.items()}
                spec = {
                    name: tf.TensorSpec([tasks, *kept[name]], self.model.dtype) for name in kept
                }
            elif tf.is_tensor(argument) and argument.shape.rank:  # x, y
                spec = tf.TensorSpec([tasks, None, argument.shape[2]], self.model.dtype)
            else:
                spec = tf.TensorSpec([], tf.convert_to_tensor(argument).dtype)
            signature.append(spec)
        program = tf.function(function, input_signature=signature, autograph=False)
        try:
            program.get_concrete_function()
        except Exception:  # whatever it is: without a program it is shown as it is
            return function
        return program
