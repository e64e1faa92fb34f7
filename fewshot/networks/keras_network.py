"""Keras models as networks."""

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from fewshot.checks import first_line
from fewshot.networks.audit import audit, in_float64, moved, probe_inputs, rounds
from fewshot.networks.keras_checks import check_keras_model, keras_input_shape, observe
from fewshot.networks.keras_layers import (
    MAX_POOLING,
    Values,
    apply_layer,
    calls_for_tasks,
    exact,
    map_tasks,
    stays,
    task_layer,
    task_leaves,
)
from maml import Leading, repeated
from special_grads import sizes

KERAS_TASKS = 4  # of a model whose tasks run one after another, in one program: it takes to compile
CLOSE = 1e-5  # relative difference of outputs, in float64, that are the same
CLOSE_IN_FLOAT32 = 1e-3
PROBE = (2, 4)  # tasks and examples
LEADING = 2  # of these examples, in a call that asks for the others alone


class KerasNetwork:
    """A Keras model of one input and one output as a network: any kind of them.

    Its trainable variables are parameters, from the values that they have; the model itself is left
    as it is. Batch normalisation takes the statistics of the batch at hand, so moving averages do
    not change; a frozen one takes the moving averages, as in Keras. Where its layers allow that,
    tasks run together, else one after another within a program; a model that makes or takes masks
    always does the latter.

    A model that could not be right is refused: see `check_keras_model`. Then outputs are compared
    with the model's own, task by task, and the derivative of an outer loss along a random direction
    with central differences, in float64: see `audit`.

    model: a keras.Model. adapt: the variables that the inner loop changes: None, all; names of
    layers; or a function that tells it of a variable's path. The outer loop alone learns the rest.
    input_shape: that of an example, if the model is not built yet. audit: False leaves the
    comparison with differences out, and says so, for a model that stops gradients on purpose, or
    takes long; None says nothing, for one that was compared when it was trained.
    Raises ValueError, in a sentence that names the layer or operation.
    """

    def __init__(
        self,
        model: keras.Model,
        adapt: Sequence[str] | Callable[[str], bool] | None = None,
        input_shape: Sequence[int] | None = None,
        audit: bool | None = True,
    ):
        self.model, self.image_shape = model, keras_input_shape(model, input_shape)
        check_keras_model(model)
        self.dim_input = int(np.prod(self.image_shape))
        self.dtype = model.trainable_variables[0].dtype
        self.variables = dict(zip(variable_names(model), model.trainable_variables))
        adapted = adapted_names(self.variables, adapt)
        initial = {name: (own.numpy(), tuple(own.shape)) for name, own in self.variables.items()}
        self.parameters = {name: initial[name] for name in initial if name in adapted}
        self.norm_parameters = {name: initial[name] for name in initial if name not in adapted}
        self.layers, self.mixes_examples = task_leaves(model), False
        seen = observe(model, probe(self, self.dtype)[0])
        self.dim_output = int(np.prod(seen.output.shape[1:]))
        last = {id(variable) for variable in seen.last.trainable_variables}
        self.head_names = [name for name, own in self.variables.items() if id(own) in last]
        self.layers = None if seen.has_masks else self.layers
        self.precision = 'float64' if computes_in_float64(self) else 'float32'  # of checks
        with in_float64(model) if self.precision == 'float64' else contextlib.nullcontext():
            choose_calls(self)
            if audit:
                check_derivatives(self)
        if audit is False:
            of = f'the meta-gradient of the model {model.name}'
            warnings.warn(f'{of} is not compared with differences: audit=False', stacklevel=2)

    @property
    def together(self) -> bool:
        """Whether the examples of all tasks go through the model at once."""
        return self.layers is not None

    @property
    def most_tasks(self) -> int | None:
        return None if self.together else KERAS_TASKS

    @property
    def reads_variables(self) -> bool:
        """Whether a call reads variables that are not among the parameters."""
        return bool(self._fixed())

    @property
    def compilable(self) -> bool:
        """Whether XLA can compile the network.

        XLA does not differentiate the loops of recurrent layers. It has no second derivative of a
        maximum's place in float64, and one with too few digits in float32.
        """
        recurrent = (keras.layers.RNN, keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D)
        for layer in self.model._flatten_layers(include_self=False):
            loops = isinstance(layer, recurrent) and not getattr(layer, 'unroll', False)
            pools = isinstance(layer, MAX_POOLING) and not (self.together and task_layer(layer))
            if loops or pools:
                return False
        return True

    @property
    def layer_names(self) -> dict[str, str]:
        """Returns {name of a variable: its layer}, which is called after its first variable."""
        firsts, found, seen = {}, {}, []
        for name, variable in self.variables.items():
            seen.append(variable.path)
            layer = variable.path.rpartition('/')[0], seen.count(variable.path)
            found[name] = firsts.setdefault(layer, name.rpartition('/')[0])
        return found

    def prepare(self, inputs: tf.Tensor, leading: Leading = None) -> tf.Tensor:
        """Reshapes [T, examples, D] to [T, examples, ...] of the model's input shape."""
        return tf.reshape(inputs, [*sizes(inputs)[:2], *self.image_shape])

    def __call__(self, x, weights: dict, norms: dict, leading: Leading = None) -> tf.Tensor:
        """Computes [T, examples, out] from x, see `prepare`, and weights, [T, ...] each.

        leading: the number of first examples that give batch normalisation its statistics; the
        others do not depend on each other then.
        """
        own = repeated(norms, sizes(x)[0]) | weights
        values = {id(variable): own[name] for name, variable in self.variables.items()}
        if self.mixes_examples and leading is not None:
            return self._alone(x, values, leading)
        return self.outputs(x, values, leading)

    def outputs(self, x: tf.Tensor, values: Values, leading: Leading = None) -> tf.Tensor:
        """Computes the same, but examples may depend on each other; values: [T, ...] each."""
        call = self._together if self.together else self._one_by_one
        with exact(self.model, leading):
            return tf.reshape(call(x, values, leading), [*sizes(x)[:2], self.dim_output])

    def _one_by_one(self, x: tf.Tensor, values: Values, leading: Leading = None) -> tf.Tensor:
        return map_tasks(lambda own: apply_layer(self.model, *own), sizes(x)[0], (values, x))

    def _together(self, x: tf.Tensor, values: Values, leading: Leading) -> tf.Tensor:
        rows = tf.reshape(x, [-1, *self.image_shape])  # [T*examples, ...]
        fixed = keras.StatelessScope([(variable, variable.value) for variable in self._fixed()])
        with calls_for_tasks(self.layers, values, sizes(x)[0], leading), fixed:
            return self.model(rows, training=True)

    def _alone(self, x: tf.Tensor, values: Values, leading: Leading) -> tf.Tensor:
        """Computes each example after the leading ones alone with these, whose outputs are zero."""
        support, others = x[:, :leading], tf.einsum('tq...->qt...', x[:, leading:])

        def output(query: tf.Tensor) -> tf.Tensor:  # [T, ...] -> [T, out]
            both = tf.concat([support, query[:, tf.newaxis]], axis=1)
            return self.outputs(both, values, leading)[:, -1]

        like = tf.TensorSpec([x.shape[0], self.dim_output], x.dtype)
        outputs = tf.einsum('qto->tqo', tf.map_fn(output, others, fn_output_signature=like))
        none = tf.zeros([sizes(x)[0], leading, self.dim_output], x.dtype)
        return tf.concat([none, outputs], axis=1)

    def _fixed(self) -> list[keras.Variable]:
        """Lists the variables that the layers read as they are."""
        if not self.together:
            return self.model.non_trainable_variables
        layers = [layer for layer in self.layers if stays(layer) or not task_layer(layer)]
        return [variable for layer in layers for variable in layer.non_trainable_variables]


# Names --------------------------------------------------------------------------------------------


def variable_names(model: keras.Model) -> list[str]:
    """Names the trainable variables, each differently and alike in every process.

    Keras counts the layers of a kind that a process has made: dense_7 here is dense_2 there.
    """
    names = []
    for i, variable in enumerate(model.trainable_variables):
        parts = variable.path.split('/')
        parts = parts[1:] if parts[0] == model.name else parts
        parts = [re.sub(r'_\d+$', '', part) for part in parts]
        names.append('/'.join([str(i), *parts]))
    return names


def adapted_names(variables: dict[str, keras.Variable], adapt) -> set[str]:
    """Names the variables that the inner loop changes. Raises ValueError if there are none."""
    paths = {name: variable.path for name, variable in variables.items()}
    if adapt is None:
        return {*paths}
    if callable(adapt):
        chosen = {name for name, path in paths.items() if adapt(path)}
    else:
        layers = [adapt] if isinstance(adapt, str) else [*adapt]
        for layer in layers:
            if not any(layer in path.split('/') for path in paths.values()):
                there = [path.split('/')[-2] for path in paths.values() if '/' in path]
                raise ValueError(
                    f'adapt: there is no layer {layer!r} with variables, but '
                    f'{", ".join(dict.fromkeys(there))}'
                )
        chosen = {name for name, path in paths.items() if {*layers} & {*path.split('/')}}
    if not chosen:
        raise ValueError(f'adapt chooses none of the variables {", ".join(paths.values())}')
    return chosen


# How it is called, and whether that is right ------------------------------------------------------


def probe(network: KerasNetwork, dtype: str, seed: int = 0) -> tf.Tensor:
    """Draws random inputs that the model takes, [T, examples, ...]; raises its error otherwise."""
    failure, values = None, {id(own): own.value for own in network.model.trainable_variables}
    for x in probe_inputs(network.model, (*PROBE, *network.image_shape), seed):
        x = tf.constant(x, dtype)
        try:
            apply_layer(network.model, values, x[0])
            return x
        except Exception as error:
            failure = error
    raise failure


def computes_in_float64(network: KerasNetwork) -> bool:
    """Whether a model computes all in float64 if asked; not so where a layer fixes another type."""
    model = network.model

    def call(values: Values) -> tf.Tensor:
        with exact(model):
            return apply_layer(model, values, x[0])

    try:
        with in_float64(model):
            x = probe(network, 'float64')
            own = model.trainable_variables
            values = {id(value): tf.constant(value.numpy(), tf.float64) for value in own}
            program = tf.function(call, autograph=False).get_concrete_function(values)
    except Exception:  # of a user's layer, whatever it is
        return False
    return program.structured_outputs.dtype == tf.float64 and not rounds(program.graph)


def choose_calls(network: KerasNetwork):
    """Lets tasks run together if that gives the model's own outputs, and queries alone if they mix.

    Raises ValueError if not even tasks one by one give these.
    """
    x, values = probe(network, network.precision), probe_values(network)
    layers, network.layers = network.layers, None
    expected = {leading: network.outputs(x, values, leading) for leading in (None, LEADING)}
    own = network._one_by_one(x, values)  # without what makes derivatives exact
    if not is_close(tf.reshape(own, expected[None].shape), expected[None]):
        raise ValueError(
            f'the model {network.model.name} has other outputs here than alone: it uses something '
            'of TensorFlow that is replaced to be differentiable'
        )
    network.layers = layers
    if network.together and not gives(network, x, values, expected):
        network.layers = None
    fewer = network.outputs(x[:, : LEADING + 1], values, LEADING)
    network.mixes_examples = not is_close(fewer[:, LEADING], expected[LEADING][:, LEADING])


def gives(network: KerasNetwork, x: tf.Tensor, values: Values, expected: dict) -> bool:
    """Whether a network has the expected outputs, {leading: [T, examples, out]}."""
    try:
        return all(is_close(network.outputs(x, values, n), expected[n]) for n in expected)
    except Exception:  # of a layer that cannot take the examples of several tasks
        return False


def is_close(found: tf.Tensor, wanted: tf.Tensor) -> bool:
    """Whether outputs are equal but for rounding; outputs that cannot be computed are equal too."""
    close = CLOSE if wanted.dtype == tf.float64 else CLOSE_IN_FLOAT32
    size = np.abs(np.nan_to_num(wanted)).max(initial=0)
    return np.allclose(found, wanted, close, close * size, equal_nan=True)


def probe_values(network: KerasNetwork) -> Values:
    """Draws values near the variables' own, others for each task: [T, ...] each."""
    random, found = np.random.default_rng(1), {}
    for own in network.variables.values():
        value = np.stack([moved(own.numpy(), random) for _ in range(PROBE[0])])
        found[id(own)] = tf.constant(value, network.precision)
    return found


def check_derivatives(network: KerasNetwork):
    """Raises ValueError if the derivatives of a model are not those of central differences.

    Warns if the differences do not agree with each other, as near the kinks of a large network.
    """

    def inputs(seed: int) -> tf.Tensor:  # of one task: tasks were compared with each other already
        x = probe(network, network.precision, seed)[:1, :3]
        return tf.reshape(x, [1, 3, network.dim_input])

    try:
        compared = audit(network, inputs)
    except LookupError as error:
        raise ValueError(
            f'the model {network.model.name} cannot be differentiated twice ({first_line(error)})'
        ) from error
    if not compared.is_decided:
        warnings.warn(
            f'the meta-gradient of the model {network.model.name} could not be compared with '
            'differences, which do not agree with each other: try '
            'scripts/model/check_second_order.py, or KerasNetwork(model, audit=False)',
            stacklevel=3,
        )
    elif not compared.is_right:
        blind = f'TensorFlow takes derivatives for zero in {", ".join(compared.blind)}: use others'
        raise ValueError(
            f'the meta-gradient of the model {network.model.name} would be wrong: along a random '
            f'direction it is {compared.derivative:.6g}, and {compared.difference:.6g} by central '
            f'differences; {blind if compared.blind else "does a layer of it stop gradients?"} '
            '(KerasNetwork(model, audit=False) trains it as it is)'
        )
