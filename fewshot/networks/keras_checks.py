"""Checks a Keras model, and refuses what cannot be right, before anything is differentiated."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from fewshot.networks.keras_layers import attributes, takes_training


def keras_input_shape(model, given: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the shape of an example; builds the model if it is not built. Raises ValueError."""
    if not isinstance(model, keras.Model):
        raise ValueError(f'a keras.Model is needed, but this is {type(model).__name__}')
    inputs = getattr(model, 'inputs', None) or []
    if len(inputs) > 1:
        raise ValueError(f'the model {model.name} has {len(inputs)} inputs, but one is needed')
    if inputs:
        shape = tuple(inputs[0].shape[1:])
    elif given is None:
        raise ValueError(
            f'the model {model.name} does not tell its input: give input_shape, the shape of an '
            'example'
        )
    else:
        shape = tuple(given)
        model(tf.zeros([2, *shape], model.compute_dtype))  # makes its variables
    if None in shape:
        raise ValueError(
            f'the model {model.name} takes inputs of any size, {shape}: fix it with keras.Input'
        )
    return shape


def check_keras_model(model: keras.Model):
    """Raises ValueError for a model whose meta-gradient would not be right, and names the layer.

    Such a model has no trainable variables, or some that are no floats of the type that all of it
    computes with; or it has losses or constraints, which an inner loop does not count or keep.
    """
    variables = model.trainable_variables
    if not variables:
        raise ValueError(f'the model {model.name} has no trainable variables, so nothing can learn')
    types = {variable.dtype for variable in variables}
    if len(types) > 1 or types != {model.compute_dtype} or not types <= {'float32', 'float64'}:
        raise ValueError(
            f'the model {model.name} has variables of {", ".join(sorted(types))} and computes in '
            f'{model.compute_dtype}: all must be float32, or all float64'
        )
    for layer in model._flatten_layers():
        check_layer(layer, model.compute_dtype)


def check_layer(layer: keras.Layer, dtype: str):
    """Raises ValueError for a layer that cannot be right; dtype: the type the model computes in."""
    is_float = keras.backend.is_float_dtype(layer.compute_dtype)
    if is_float and layer.compute_dtype != dtype and not isinstance(layer, keras.layers.InputLayer):
        raise ValueError(
            f'the layer {named(layer)} computes in {layer.compute_dtype}, but the model in '
            f'{dtype}: give it no dtype, or {dtype!r}'
        )
    if getattr(layer, 'activity_regularizer', None) is not None:
        raise ValueError(has_loss(layer, 'an activity_regularizer'))
    for variable in [*layer._trainable_variables]:
        if getattr(variable, 'regularizer', None) is not None:
            raise ValueError(has_loss(layer, f'a regularizer of its {variable.name}'))
        if getattr(variable, 'constraint', None) is not None:
            raise ValueError(
                f'the layer {named(layer)} has a constraint of its {variable.name}, which an inner '
                'update would not keep: leave it out'
            )


def named(layer: keras.Layer) -> str:
    return f'{layer.name} ({type(layer).__name__})'


def has_loss(layer: keras.Layer, what: str) -> str:
    return (
        f'the layer {named(layer)} has losses of its own ({what}), which the loss of a task does '
        'not count: leave them out, or add them to that loss'
    )


class Observed(NamedTuple):
    """The outcome of one call of a model."""

    output: tf.Tensor
    last: keras.Layer  # with trainable variables, that was called last
    has_masks: bool


def observe(model: keras.Model, x: tf.Tensor) -> Observed:
    """Calls a model on x, [examples, ...].

    Raises ValueError if it has several outputs, draws random numbers or adds a loss: an inner loop
    must be repeatable, and counts the loss of the task alone.
    """
    called, masks, adding = [], [], []

    def watched(layer: keras.Layer) -> Callable:
        call = layer.call

        def watch(*inputs, **named):
            called.append(layer)
            masks.extend(getattr(x, '_keras_mask', None) for x in tf.nest.flatten((inputs, named)))
            return call(*inputs, **named)

        return watch

    layers = model._flatten_layers()
    changes = [(layer, 'add_loss', lambda _, own=layer: adding.append(own)) for layer in layers]
    changes += [(layer, 'call', watched(layer)) for layer in layers if layer is not model]
    with attributes(changes):
        output = check_one_call(model, x)
    if adding:
        raise ValueError(has_loss(adding[-1], 'add_loss'))
    units = {id(unit) for unit in outermost(model)}
    last = [unit for unit in called if id(unit) in units and unit.trainable_variables]
    return Observed(output, last[-1] if last else model, any(mask is not None for mask in masks))


def outermost(model: keras.Model) -> list[keras.Layer]:
    """Lists the layers of a model, of models in it too, but not those that a layer consists of."""
    found = []
    for layer in model._flatten_layers(include_self=False, recursive=False):
        found += outermost(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def check_one_call(model: keras.Model, x: tf.Tensor) -> tf.Tensor:
    """Returns the output for `observe`, and raises its errors."""
    trainable = [variable.value for variable in model.trainable_variables]
    others = model.non_trainable_variables
    before = [variable.numpy() for variable in others]
    options = {'training': True} if takes_training(model) else {}

    output, after = model.stateless_call(trainable, before, x, **options)
    again, _ = model.stateless_call(trainable, before, x, **options)
    if not tf.is_tensor(output) or output.shape[:1] != x.shape[:1]:
        raise ValueError(f'the model {model.name} must have one output, [examples, ...]')
    seeds = [values for values in zip(others, before, after) if 'seed_generator' in values[0].path]
    drawn = {id(variable) for variable, old, new in seeds if np.any(old != np.array(new))}
    if drawn or np.any(np.array(output) != np.array(again)):
        raise ValueError(
            f'the model {model.name} draws random numbers in {drawing(model, drawn)}: leave that '
            'out, since an inner loop must be repeatable'
        )
    return output


def drawing(model: keras.Model, drawn: set[int]) -> str:
    """Names the layer that has the seed generators with these variables."""
    for layer in reversed(model._flatten_layers(include_self=False)):
        if any(id(variable) in drawn for variable in layer.non_trainable_variables):
            return named(layer)
    return 'a layer'
