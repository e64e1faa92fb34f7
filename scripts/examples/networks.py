"""Networks for --network=scripts/examples/networks.py:FUNCTION: the paper's in Keras, a ResNet-12.

The convolutions have no bias, since batch normalisation would take it away again.
"""

import keras
from keras import layers


def omniglot(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Makes four blocks of 3x3 convolution by stride 2, batch normalisation, ReLU; then affine."""
    model = keras.Sequential([layers.Input(image_shape)])
    for _ in range(4):
        model.add(layers.Conv2D(64, 3, strides=2, padding='same', use_bias=False))
        model.add(layers.BatchNormalization(scale=False))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(num_classes, kernel_initializer=keras.initializers.RandomNormal(0, 1)))
    return model


def miniimagenet(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Makes four blocks of 3x3 convolution, batch normalisation, ReLU and pooling; then affine."""
    model = keras.Sequential([layers.Input(image_shape)])
    for _ in range(4):
        model.add(layers.Conv2D(32, 3, padding='same', use_bias=False))
        model.add(layers.BatchNormalization(scale=False))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(num_classes))
    return model


def resnet12(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Makes a ResNet-12 of four residual blocks, as few-shot papers use it; then affine."""
    x = images = keras.Input(image_shape)
    for filters in (64, 128, 256, 512):
        x = residual_block(x, filters)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(num_classes)(x))


def residual_block(x, filters: int):
    """Halves the height and width of x, [examples, height, width, C], with `filters` channels."""
    short = layers.Conv2D(filters, 1, use_bias=False)(x)
    short = layers.BatchNormalization()(short)
    for i in range(3):
        x = layers.Conv2D(filters, 3, padding='same', use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.LeakyReLU(0.1)(x) if i < 2 else x
    x = layers.LeakyReLU(0.1)(layers.Add()([x, short]))
    return layers.MaxPooling2D(2)(x)
