"""Networks as a user writes them, for `FILE.py:FUNCTION`: from image shape and classes to a model.

The activations are smooth: with ReLU and max-pooling differences may meet a kink.
"""

import keras

layers = keras.layers


def of_layers(image_shape, classes, *middle) -> keras.Model:
    start = [layers.Input(image_shape), layers.Conv2D(4, 3, strides=2, padding='same')]
    end = [layers.Activation('softplus'), layers.GlobalAveragePooling2D(), layers.Dense(classes)]
    return keras.Sequential([*start, *middle, *end])


def plain(image_shape, classes) -> keras.Model:
    """Without normalisation."""
    return of_layers(image_shape, classes)


def batch_norm(image_shape, classes) -> keras.Model:
    """Nested gradient tapes are wrong here."""
    return of_layers(image_shape, classes, layers.BatchNormalization())


def group_norm(image_shape, classes) -> keras.Model:
    """And here."""
    return of_layers(image_shape, classes, layers.GroupNormalization(2))


def dropout(image_shape, classes) -> keras.Model:
    """Refused: an inner loop must be repeatable."""
    return of_layers(image_shape, classes, layers.Dropout(0.5, name='drop'))


def held(x):
    return x + keras.ops.stop_gradient(x)


def stopped(image_shape, classes) -> keras.Model:
    """No difference agrees with a gradient that is half of the slope."""
    return of_layers(image_shape, classes, layers.Activation(held))


def rough(x):
    return x + keras.ops.stop_gradient(keras.ops.sin(1e12 * x)) / 1000


def jumps(image_shape, classes) -> keras.Model:
    """No two differences agree."""
    return of_layers(image_shape, classes, layers.Activation(rough))


def in_float32(x):
    single = keras.ops.tanh(keras.ops.cast(x, 'float32'))
    return x + keras.ops.cast(single, x.dtype)


def rounded(image_shape, classes) -> keras.Model:
    """Small steps do not change what is rounded, and agree with each other on the rest."""
    middle = layers.Dense(2, activation=in_float32)
    return keras.Sequential([layers.Input(image_shape), middle, layers.Dense(classes)])


def regression(image_shape, classes) -> keras.Model:
    """Numbers in, a number out."""
    middle = layers.Dense(6, activation='tanh')
    return keras.Sequential([layers.Input(image_shape), middle, layers.Dense(classes)])


def one_too_many(image_shape, classes) -> keras.Model:
    return of_layers(image_shape, classes + 1)


def single(image_shape, classes) -> keras.Model:
    """Computes in float32, whatever the others do."""
    start = [layers.Input(image_shape), layers.Flatten()]
    return keras.Sequential([*start, layers.Dense(classes, dtype='float32')])


def no_model(image_shape, classes):
    return layers.Dense(classes)


def raises(image_shape, classes):
    """A mistake of the user's, of a kind that others would take for a refusal."""
    raise ValueError('these filters are no filters')


class Broken(keras.layers.Layer):
    def call(self, x):
        raise ValueError('this layer is not finished')


def raises_when_called(image_shape, classes) -> keras.Model:
    return keras.Sequential([layers.Flatten(), Broken(), layers.Dense(classes)])


def layer_norm(image_shape, classes) -> keras.Model:
    """Over the last axis alone nested tapes are right."""
    return of_layers(image_shape, classes, layers.LayerNormalization())


def layer_norm_of_all_axes(image_shape, classes) -> keras.Model:
    """Over all axes they are not."""
    return of_layers(image_shape, classes, layers.LayerNormalization(axis=[1, 2, 3]))
