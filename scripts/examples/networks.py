"""Networks for --network=scripts/examples/networks.py:FUNCTION: the paper's, as Keras models.

The convolutions have no bias, since batch normalisation would take it away again.
"""

import keras
from keras import layers


def omniglot(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Four blocks of 3x3 convolution by stride 2, batch normalisation and ReLU; then affine."""
    model = keras.Sequential([layers.Input(image_shape)])
    for _ in range(4):
        model.add(layers.Conv2D(64, 3, strides=2, padding='same', use_bias=False))
        model.add(layers.BatchNormalization(scale=False))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(num_classes, kernel_initializer=keras.initializers.RandomNormal(0, 1)))
    return model


def miniimagenet(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Four blocks of 3x3 convolution, batch normalisation, ReLU and pooling; then affine."""
    model = keras.Sequential([layers.Input(image_shape)])
    for _ in range(4):
        model.add(layers.Conv2D(32, 3, padding='same', use_bias=False))
        model.add(layers.BatchNormalization(scale=False))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(num_classes))
    return model
