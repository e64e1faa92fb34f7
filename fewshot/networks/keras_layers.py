"""Keras's layers with the weights of several tasks at once, exact at second order.

A layer takes weights of one task. A model is called task by task; or, where its layers allow that,
once: the examples of all tasks lie one after another, [T*examples, ...], and a layer with weights
has them per task, [T, ...].
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from fewshot.engine.tracing import TRACING, replaced
from maml import Leading
from special_grads import batch_moments, convolve, max_pool2x2, product, sizes, standardize

Values = dict[int, tf.Tensor]  # {id of a variable: value}, as two variables may have one path

# Functions that TensorFlow differentiates wrongly, made exact while a model is traced -------------


@contextlib.contextmanager
def exact(model: keras.Model, leading: Leading = None):
    """Makes second derivatives of a model exact for this thread, while it is called.

    leading: how many examples, from the first on, give statistics over examples (None: all).
    """
    with (
        replaced(tf.nn, 'moments', moments_of(leading)),
        replaced(tf.image, 'resize', resize_by(tf.image.resize)),
        leading_statistics(model, leading),
    ):
        yield


def moments_of(leading: Leading) -> Callable:
    """Returns tf.nn.moments, which Keras's normalisations call, exact at second order.

    TensorFlow stops the gradient of the mean inside the variance.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        over_examples = 0 in [axis % x.shape.rank for axis in np.atleast_1d(axes)]
        x = x[:leading] if over_examples else x
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
        return mean if keepdims else tf.squeeze(mean, axes), variance

    return moments


def resize_by(original: Callable) -> Callable:
    """Returns tf.image.resize as products with matrices: its own gradients have no derivative.

    TensorFlow does not refuse that of a bilinear resize but takes it for zero.
    """

    def matrix(size: int, wanted: int, dtype, **named) -> tf.Tensor:
        """Returns [wanted, size]: the matrix times a column of pixels is the resized column."""
        with tf.init_scope():
            columns = original(tf.eye(size)[..., tf.newaxis, tf.newaxis], (wanted, 1), **named)
            return tf.cast(tf.transpose(columns[..., 0, 0]), dtype)

    def resize(images, size, method='bilinear', preserve_aspect_ratio=False, **named):
        images = tf.convert_to_tensor(images)
        height, width = images.shape[-3:-1]
        known = None not in (height, width) and not any(map(tf.is_tensor, size))
        if preserve_aspect_ratio or not (images.dtype.is_floating and known):
            return original(images, size, method, preserve_aspect_ratio, **named)
        rows = matrix(height, int(size[0]), images.dtype, method=method, **named)
        columns = matrix(width, int(size[1]), images.dtype, method=method, **named)
        return tf.einsum('ph,...hwc,qw->...pqc', rows, images, columns)

    return resize


@contextlib.contextmanager
def leading_statistics(model: keras.Model, leading: Leading):
    """Lets batch normalisations with a mask, or synchronized, take leading examples too."""
    layers = [] if leading is None else model._flatten_layers(include_self=False)
    found = [layer for layer in layers if hasattr(layer, '_moments')]

    def of_leading(moments: Callable) -> Callable:
        def chosen(inputs, mask=None):
            return moments(inputs[:leading], None if mask is None else mask[:leading])

        return chosen

    with attributes((layer, '_moments', of_leading(layer._moments)) for layer in found):
        yield


@contextlib.contextmanager
def attributes(changes: Iterable[tuple]):
    """Sets (object, name, value) while entered, without Keras's tracking of attributes.

    Other threads that call a model through this module wait.
    """
    with TRACING, contextlib.ExitStack() as undone:
        for thing, name, value in changes:
            if name in vars(thing):
                undone.callback(object.__setattr__, thing, name, vars(thing)[name])
            else:
                undone.callback(object.__delattr__, thing, name)
            object.__setattr__(thing, name, value)
        yield


# One task -----------------------------------------------------------------------------------------


def takes_training(layer: keras.Layer) -> bool:
    """Whether a layer's call has the argument `training`."""
    return 'training' in inspect.signature(type(layer).call).parameters


def apply_layer(layer: keras.Layer, values: Values, *inputs, **named):
    """Calls a layer on one task, with these values of its trainable variables, [...] each."""
    trainable = [values[id(variable)] for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]
    if takes_training(layer):
        named['training'] = True
    return layer.stateless_call(trainable, others, *inputs, **named)[0]


# Layers of all tasks at once ----------------------------------------------------------------------


def keras_dense(layer, weights: dict, x: tf.Tensor, leading=None) -> tf.Tensor:
    """Computes Dense: x [T, examples, ..., in], kernel [T, in, out] -> the same with out."""
    kernel = weights['kernel']
    rows = tf.reshape(x, [sizes(x)[0], -1, x.shape[-1]])  # [T, rows, in]
    output = product(rows, kernel)
    if layer.use_bias:
        output += weights['bias'][:, tf.newaxis]
    return layer.activation(tf.reshape(output, [*sizes(x)[:-1], kernel.shape[-1]]))


def keras_convolution(layer, weights: dict, x: tf.Tensor, leading=None) -> tf.Tensor:
    """Computes Conv2D of 3x3 kernels, see `convolve`, or of 1x1, a product of matrices."""
    kernel = weights['kernel']  # [T, height, width, C, F]
    if layer.kernel_size == (1, 1):
        channels, filters = kernel.shape[3:]
        rows = tf.reshape(x, [sizes(x)[0], -1, channels])  # [T, rows, C]
        output = product(rows, tf.reshape(kernel, [-1, channels, filters]))
        output = tf.reshape(output, [*sizes(x)[:-1], filters])
    else:
        output = convolve(x, kernel, layer.strides[0])
    if layer.use_bias:
        output += weights['bias'][:, tf.newaxis, tf.newaxis, tf.newaxis]
    return layer.activation(output)


def keras_batch_norm(layer, weights: dict, x: tf.Tensor, leading=None) -> tf.Tensor:
    """Computes BatchNormalization by the statistics of the examples at hand."""
    tasks, channels = sizes(x)[0], x.shape[-1]
    rows = tf.reshape(x, [tasks, -1, channels])
    mean, variance = batch_moments(x, leading)
    scale = tf.math.rsqrt(variance + layer.epsilon)
    zero = tf.zeros([tasks, 1, channels], x.dtype)
    offset = weights['beta'][:, tf.newaxis] if layer.center else zero
    if layer.scale:
        rows = standardize(rows, mean, scale, zero) * weights['gamma'][:, tf.newaxis] + offset
    else:
        rows = standardize(rows, mean, scale, offset)
    return tf.reshape(rows, sizes(x))


def keras_max_pool(layer, weights: dict, x: tf.Tensor, leading=None) -> tf.Tensor:
    """Computes MaxPooling2D of 2x2 windows, see `max_pool2x2`."""
    return max_pool2x2(x)


WEIGHTS = ('kernel', 'bias', 'gamma', 'beta')  # of the layers above
MAX_POOLING = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D)


def task_layer(layer: keras.Layer) -> Callable | None:
    """Returns the function above that computes a layer for all tasks at once; else None."""
    kind = type(layer)
    if not has_known_activations(layer):
        return None
    if kind is keras.layers.Dense:
        return keras_dense
    if kind is keras.layers.BatchNormalization:
        last = layer.axis in (-1, layer.input_spec.ndim - 1)
        plain = layer.trainable and last and not getattr(layer, 'renorm', False)
        return keras_batch_norm if plain else None
    if kind is keras.layers.MaxPooling2D:
        halves = layer.pool_size == (2, 2) and layer.strides == (2, 2) and layer.padding == 'valid'
        return keras_max_pool if halves and layer.data_format == 'channels_last' else None
    if kind is keras.layers.Conv2D:
        pointwise = layer.kernel_size == (1, 1) and layer.strides == (1, 1)
        fits = layer.kernel_size == (3, 3) and layer.strides in ((1, 1), (2, 2))
        fits = (fits and layer.padding == 'same') or pointwise
        fits &= layer.dilation_rate == (1, 1) and layer.groups == 1
        return keras_convolution if fits and layer.data_format == 'channels_last' else None
    return None


DIMENSIONS = (1, 2, 3)
PER_EXAMPLE = {  # layers without weights that treat each example by itself
    *('InputLayer', 'Activation', 'ReLU', 'LeakyReLU', 'ELU', 'Softmax', 'Identity', 'Rescaling'),
    *('Flatten', 'Reshape', 'Permute', 'RepeatVector', 'UnitNormalization', 'Dropout'),
    *(f'{kind}Pooling{n}D' for kind in ('Max', 'Average') for n in DIMENSIONS),
    *(f'Global{kind}Pooling{n}D' for kind in ('Max', 'Average') for n in DIMENSIONS),
    *(f'{kind}{n}D' for kind in ('ZeroPadding', 'Cropping', 'UpSampling') for n in DIMENSIONS),
    *('Add', 'Subtract', 'Multiply', 'Average', 'Maximum', 'Minimum', 'Concatenate'),
}
# Layers that do so as long as their weights are the same for all tasks, as those that are frozen.
PER_EXAMPLE_IF_FROZEN = {
    *('Dense', 'Embedding', 'EinsumDense', 'PReLU', 'BatchNormalization', 'LayerNormalization'),
    *('GroupNormalization', 'RMSNormalization'),
    *(f'{kind}Conv{n}D' for kind in ('', 'Depthwise', 'Separable') for n in DIMENSIONS),
    *(f'Conv{n}DTranspose' for n in DIMENSIONS),
}


def is_per_example(layer: keras.Layer) -> bool:
    """Whether a layer may be called with the examples of all tasks, one after another.

    Its axes may still lead to the examples; `KerasNetwork` compares with a call task by task.
    """
    name, known = type(layer).__name__, PER_EXAMPLE
    if layer.variables:
        adapted = layer.trainable_variables or name == 'BatchNormalization' and layer.trainable
        known = () if adapted else PER_EXAMPLE_IF_FROZEN
    is_keras = getattr(keras.layers, name, None) is type(layer)
    return is_keras and name in known and has_known_activations(layer)


def has_known_activations(layer) -> bool:
    """Whether a layer's activations are Keras's, or TensorFlow's of the same name.

    Another function may do anything, such as mix the examples of tasks.
    """
    functions = (getattr(layer, name, None) for name in ('activation', 'recurrent_activation'))
    return all(function is None or is_known_activation(function) for function in functions)


def is_known_activation(function: Callable) -> bool:
    if isinstance(function, keras.Layer):
        return is_per_example(function)
    home = getattr(function, '__module__', None) or ''
    named = hasattr(keras.activations, getattr(function, '__name__', ''))
    return named and home.startswith(('keras.', 'tensorflow.'))


def map_tasks(function: Callable, tasks: int | tf.Tensor, values):
    """Stacks function(values of a task) over the tasks; values: nested tensors [T, ...]."""

    def of_task(i: int):
        return function(tf.nest.map_structure(lambda value: value[i], values))

    if isinstance(tasks, int):
        return tf.nest.map_structure(lambda *own: tf.stack(own), *map(of_task, range(tasks)))
    like = tf.nest.map_structure(tf.TensorSpec.from_tensor, of_task(0))
    return tf.map_fn(function, values, fn_output_signature=like)


def task_leaves(model: keras.Model) -> list[keras.Layer] | None:
    """Lists the layers of a Sequential or functional model, those of models in it too, each once.

    Returns None if there is more in it than layers, or tensors that are no outputs of layers, so
    that it might mix examples of different tasks.
    """
    if type(model) is keras.Sequential:
        operations = model.layers
    elif type(model).__name__ == 'Functional':  # keras.Model(inputs, outputs)
        operations = model.operations
    else:
        return None
    found = {}
    for operation in operations:
        inner = [operation] if isinstance(operation, keras.Layer) else None
        if isinstance(operation, keras.Model):
            inner = task_leaves(operation)
        if inner is None or takes_constants(operation):
            return None
        found |= {id(layer): layer for layer in inner}
    return [*found.values()]


def takes_constants(layer: keras.Layer) -> bool:
    """Whether a functional model calls a layer with arrays, which may have an axis of examples."""
    given = [node.arguments for node in getattr(layer, '_inbound_nodes', [])]
    leaves = tf.nest.flatten([(arguments.args, arguments.kwargs) for arguments in given])
    return any(hasattr(x, 'shape') and not isinstance(x, keras.KerasTensor) for x in leaves)


@contextlib.contextmanager
def calls_for_tasks(layers: list, values: Values, tasks: int | tf.Tensor, leading: Leading = None):
    """Lets layers take the examples of all tasks, one after another, while entered.

    layers: all layers of a model that is called then. values: its trainable variables', [T, ...]
    each.
    """
    given, changed = (values, tasks, leading), [layer for layer in layers if not stays(layer)]
    with attributes((layer, 'call', call_for_tasks(layer, *given)) for layer in changed):
        yield


def stays(layer: keras.Layer) -> bool:
    """Whether a layer's own call is right, and fast, for the examples of all tasks."""
    return is_per_example(layer) and bool(layer.variables or not task_layer(layer))


def call_for_tasks(layer, values: Values, tasks: int | tf.Tensor, leading: Leading) -> Callable:
    """Returns a layer's call for the examples of all tasks."""
    call, known, busy = layer.call, task_layer(layer), []
    trained = {id(variable): values[id(variable)] for variable in layer.trainable_variables}

    def split(x):  # [T*examples, ...] -> [T, examples, ...]
        return tf.reshape(x, [tasks, -1, *sizes(x)[1:]])

    def join(x):
        return tf.reshape(x, [-1, *sizes(x)[2:]])

    def together(x, *others, **named):
        if named.get('mask') is not None:
            return one_by_one(x, *others, **named)
        own = [variable for variable in layer.variables if variable.name in WEIGHTS]
        weights = {variable.name: per_task(variable, x.dtype) for variable in own}
        return join(known(layer, weights, split(x), leading))

    def per_task(variable, dtype) -> tf.Tensor:  # [T, ...], of one that is frozen too
        if id(variable) in trained:
            return trained[id(variable)]
        return tf.broadcast_to(tf.cast(variable.value, dtype), [tasks, *variable.shape])

    def one_by_one(*inputs, **named):
        if busy:  # called for one task, from below
            return call(*inputs, **named)
        flat = tf.nest.flatten((inputs, named))
        tensors = {i: split(x) for i, x in enumerate(flat) if tf.is_tensor(x)}

        def of_task(own):
            own_values, own_tensors = own
            given = [own_tensors.get(i, x) for i, x in enumerate(flat)]
            arguments, options = tf.nest.pack_sequence_as((inputs, named), given)
            return apply_layer(layer, own_values, *arguments, **options)

        busy.append(True)
        try:
            outputs = map_tasks(of_task, tasks, (trained, tensors))
        finally:
            busy.pop()
        return tf.nest.map_structure(join, outputs)

    return together if known else one_by_one
