"""Any Keras model: its own outputs and the exact meta-gradient, or a refusal that names the layer.

The reference shares nothing with the project: the model itself is called, its variables assigned,
and the outer loss differentiated by central differences in float64.
"""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_keras import float64  # noqa: F401 (a fixture)

from data_generator import Batch
from fewshot.engine.fast import FastMAML
from fewshot.networks.keras_network import KerasNetwork
from fewshot.use.learner import Learner
from maml import mean_squared_error

layers, ops = keras.layers, keras.ops
LR = 0.1
SOFT = 'softplus'  # no kinks to cross by a difference

# The reference ------------------------------------------------------------------------------------


def own_output(model, x) -> tf.Tensor:
    """What a model makes of the examples of one task, [examples, out]."""
    output = model(x, training=True)
    return tf.reshape(output, [output.shape[0], -1])


def own_outer_loss(model, values, batch: Batch) -> float:
    """After one inner update of each task, by assigning the model's variables."""
    total, variables = 0.0, model.trainable_variables
    for inputa, labela, inputb, labelb in zip(*batch):
        for variable, value in zip(variables, values):
            variable.assign(value)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(own_output(model, inputa) - labela))
        gradients = tape.gradient(loss, [v.value for v in variables], unconnected_gradients='zero')
        for variable, value, gradient in zip(variables, values, gradients):
            variable.assign(value - LR * tf.convert_to_tensor(gradient))
        total += float(tf.reduce_mean(tf.square(own_output(model, inputb) - labelb)))
    return total / len(batch.inputa)


def own_derivative(model, values, directions, batch: Batch) -> tuple[float, float]:
    """Of the outer loss along a direction, and how far two steps are apart, which must agree.

    Small steps; larger ones where the model rounds to float32, as TensorFlow's resize does.
    """

    def difference(step: float) -> float:
        moves = [[v + s * d for v, d in zip(values, directions)] for s in (step, -step)]
        after, before = (own_outer_loss(model, move, batch) for move in moves)
        return (after - before) / (2 * step)

    for steps, tolerance in ((1e-7, 1e-8), 1e-5), ((1e-9, 1e-8), 1e-5), ((3e-4, 1e-4), 2e-3):
        one, other = map(difference, steps)
        if abs(one - other) <= tolerance * abs(other) + 1e-7:
            return one, abs(one - other)
    raise AssertionError(f'differences are {one} and {other}')


def random_tasks(network, inputs, seed: int, tasks: int = 2, examples: int = 4) -> tuple:
    """The batch with inputs of the model's shape, and as MAML takes it."""
    dice = np.random.default_rng(seed)
    x, z = (inputs(dice, (tasks, examples, *network.image_shape)) for _ in range(2))
    y, w = (dice.standard_normal((tasks, examples, network.dim_output)) for _ in range(2))
    shaped = Batch(*(tf.constant(part, network.dtype) for part in (x, y, z, w)))
    flat = (tf.reshape(part, [tasks, examples, -1]) for part in shaped)
    return shaped, Batch(*flat)


def uniform(dice, shape) -> np.ndarray:
    return dice.random(shape)


def tokens(dice, shape) -> np.ndarray:
    """Zeros, which mask, among them; never a task without others."""
    found = dice.integers(0, 10, shape)
    found[..., 0] = 1
    return found


def padded(dice, shape) -> np.ndarray:
    """Sequences [..., time, features] of which some end early."""
    x = dice.random(shape)
    x[..., ::2, -2:, :] = 0
    return x


def compare(model, inputs=uniform, seed: int = 0, **options) -> KerasNetwork:
    """Asserts that outputs are the model's own, and the meta-gradient that of differences."""
    network = KerasNetwork(model, **options)
    shaped, batch = random_tasks(network, inputs, seed)
    dice, variables = np.random.default_rng([seed, 1]), model.trainable_variables
    start = [variable.numpy() for variable in variables]
    values = [value + 0.1 * dice.standard_normal(value.shape) for value in start]
    maml = FastMAML(network, mean_squared_error, LR, dtype=network.dtype, compiled=False)
    for name, value in zip(network.variables, values):
        maml.named_parameters[name].assign(value)
    loss, gradients = maml.meta_gradient(batch)
    directions = [dice.standard_normal(value.shape) for value in values]
    found = sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradients, directions))
    expected, apart = own_derivative(model, values, directions, shaped)
    own_loss = own_outer_loss(model, values, shaped)
    for variable, value in zip(variables, start):
        variable.assign(value)
    assert float(loss) == pytest.approx(own_loss, rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4, abs=3 * apart + 1e-6)
    return network


# What public reports and a hostile hour found -----------------------------------------------------


def stack(shape, *middle) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *middle])


def of_vectors(*middle) -> keras.Model:
    return stack((4,), *middle, layers.Dense(3))


def of_images(*middle) -> keras.Model:
    start, end = layers.Conv2D(3, 3, padding='same'), [layers.Flatten(), layers.Dense(3)]
    return stack((6, 6, 2), start, *middle, *end)


def of_tokens(*middle) -> keras.Model:
    embedding = layers.Embedding(10, 4, mask_zero=True)
    return stack((4,), embedding, *middle, layers.Dense(3))


def of_sequences(make) -> keras.Model:
    """make: from a tensor [time, features] to one that is flattened."""
    x = keras.Input((3, 4))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(make(x))))


def attention_with_mask() -> keras.Model:
    def make(x):
        mask = layers.Reshape((3, 3))(layers.Dense(9, 'sigmoid')(layers.Flatten()(x)))
        return layers.MultiHeadAttention(2, 2)(x, x, attention_mask=ops.round(mask))

    return of_sequences(make)


def with_state(kind) -> keras.Model:
    def make(x):
        state = layers.Dense(3)(layers.Flatten()(x))
        return kind(3)(x, initial_state=[state, state] if kind is layers.LSTM else state)

    return of_sequences(make)


class Scaled(layers.Layer):
    def build(self, shape):
        self.gain = self.add_weight(shape=shape[-1:], initializer='ones')

    def call(self, x, scale=1.0, offset=None):
        return x * self.gain * scale + (0 if offset is None else offset)


def with_keywords() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(3)(Scaled()(x, scale=2.0, offset=layers.Dense(4)(x))))


def with_constants() -> keras.Model:
    """An array as an argument, as long as the examples of some call."""
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(3)(Scaled()(x, offset=np.arange(32.0).reshape(8, 4)[:1])))


def attention_of_tokens() -> keras.Model:
    x = keras.Input((4,))
    y = layers.Embedding(10, 4, mask_zero=True)(x)
    y = layers.MultiHeadAttention(2, 2)(y, y)
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(y)))


def centred(x):
    return x - ops.mean(x, 0)


def synchronized() -> keras.Model:
    x = keras.Input((4,))
    y = layers.BatchNormalization(synchronized=True)(layers.Dense(4)(x))
    return keras.Model(x, layers.Dense(3)(ops.tanh(y)))


def frozen(what: str) -> keras.Model:
    dense, norm = layers.Dense(4, 'tanh'), layers.BatchNormalization()
    if what == 'dense':
        dense.trainable = False
        return of_vectors(dense, norm)
    if what == 'norm':
        norm.trainable = False
        return of_vectors(dense, norm)
    if what == 'nested':
        nested = stack((4,), dense, norm)
        nested.trainable = False
        return of_vectors(layers.Dense(4), nested)
    if what == 'conv':
        conv = layers.Conv2D(3, 3, padding='same')
        conv.trainable = False
        return of_images(conv, norm)
    model = of_vectors(dense, norm)
    (dense.bias if what == 'bias' else norm.gamma).trainable = False
    return model


def twice() -> keras.Model:
    shared, x = layers.Dense(4), keras.Input((4,))
    both = layers.Add()([stack((4,), shared)(x), shared(x)])
    return keras.Model(x, layers.Dense(3)(both))


def two_of(layer) -> keras.Model:
    return of_sequences(lambda x: layer([layers.Dense(4)(x), layers.Dense(4)(x)]))


def states() -> keras.Model:
    return of_sequences(lambda x: layers.Concatenate()(layers.LSTM(3, return_state=True)(x)))


def query_and_value() -> keras.Model:
    def make(x):
        return layers.MultiHeadAttention(2, 2)(query=x, value=layers.Dense(4)(x))

    return of_sequences(make)


class TwoOfOneName(layers.Layer):
    def build(self, shape):
        self.gain = self.add_weight(shape=shape[-1:], initializer='ones', name='w')
        self.offset = self.add_weight(shape=shape[-1:], initializer='zeros', name='w')

    def call(self, x):
        return x * self.gain + ops.sin(self.offset)


class Cloned(keras.Model):
    def __init__(self):
        super().__init__()
        x = keras.Input((4,))
        model = keras.Model(x, layers.Dense(4, 'tanh', name='dense')(x), name='model')
        self.first, self.second = (keras.models.clone_model(model) for _ in range(2))
        self.last = layers.Dense(3)

    def call(self, x):
        return self.last(self.second(self.first(x)))


up = functools.partial(layers.UpSampling2D, interpolation='bilinear')
bicubic = functools.partial(layers.UpSampling2D, interpolation='bicubic')
small = functools.partial(layers.Resizing, 4, 4)
tanh = functools.partial(layers.Activation, 'tanh')
pool = layers.GlobalAveragePooling1D
norm = layers.BatchNormalization


class Case(NamedTuple):
    make: Callable[[], keras.Model]
    inputs: Callable = uniform
    options: dict = {}  # of KerasNetwork


def causal(x):
    return layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)


RIGHT = {
    'causal attention': Case(lambda: of_sequences(causal)),
    'attention with a mask': Case(attention_with_mask),
    'LSTM from a state': Case(lambda: with_state(layers.LSTM)),
    'GRU from a state': Case(lambda: with_state(layers.GRU)),
    'keywords': Case(with_keywords),
    'constants': Case(with_constants),
    'tokens, LSTM': Case(lambda: of_tokens(layers.LSTM(3)), tokens),
    'tokens, GRU': Case(lambda: of_tokens(layers.GRU(3)), tokens),
    'tokens, both ways': Case(lambda: of_tokens(layers.Bidirectional(layers.GRU(2))), tokens),
    'tokens, attention': Case(attention_of_tokens, tokens),
    'tokens, batch norm': Case(lambda: of_tokens(norm(), pool()), tokens),
    'tokens, pooling': Case(lambda: of_tokens(pool()), tokens),
    'masked steps': Case(
        lambda: stack((4, 3), layers.Masking(), layers.GRU(3), layers.Dense(3)), padded
    ),
    'bilinear': Case(lambda: of_images(up(), tanh())),
    'resizing': Case(lambda: of_images(small(), tanh())),
    'bicubic': Case(lambda: of_images(bicubic(), tanh())),
    'nearest': Case(lambda: of_images(small(interpolation='nearest'), tanh())),
    'softmax over examples': Case(lambda: of_vectors(layers.Dense(4), layers.Softmax(-2))),
    'softmax of two axes': Case(lambda: of_vectors(layers.Dense(4), layers.Softmax((-2, -1)))),
    'unit norm over examples': Case(
        lambda: of_vectors(layers.Dense(4), layers.UnitNormalization(-2))
    ),
    'centred over examples': Case(lambda: of_vectors(layers.Dense(4), layers.Activation(centred))),
    'synchronized': Case(synchronized),
    'frozen dense': Case(lambda: frozen('dense')),
    'frozen norm': Case(lambda: frozen('norm')),
    'frozen model': Case(lambda: frozen('nested')),
    'frozen convolution': Case(lambda: frozen('conv')),
    'frozen bias': Case(lambda: frozen('bias')),
    'frozen gamma': Case(lambda: frozen('gamma')),
    'twice': Case(twice),
    'Attention': Case(lambda: two_of(layers.Attention())),
    'Dot': Case(lambda: two_of(layers.Dot(1))),
    'states': Case(states),
    'query and value': Case(query_and_value),
    'two variables of one name': Case(lambda: of_vectors(layers.Dense(4), TwoOfOneName())),
    'cloned': Case(Cloned, options={'input_shape': (4,)}),
}


@pytest.mark.parametrize('name', RIGHT)
@pytest.mark.filterwarnings('error:the meta-gradient')
def test_right(float64, name):  # noqa: F811
    make, inputs, options = RIGHT[name]
    compare(make(), inputs, **options)


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(x))
        return x


REFUSED = {
    'activity_regularizer': (layers.Dense(4, activity_regularizer='l2', name='a'), 'a (Dense)'),
    'ActivityRegularization': (layers.ActivityRegularization(0.1, name='a'), 'a (Activity'),
    'add_loss': (AddsLoss(name='a'), 'a (AddsLoss)'),
    'constraint': (layers.Dense(4, kernel_constraint='non_neg', name='a'), 'its kernel'),
    'another type': (layers.Dense(4, dtype='mixed_float16', name='a'), 'a (Dense) computes in'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    layer, words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        KerasNetwork(of_vectors(layer))
    assert words in str(caught.value) and '\n' not in str(caught.value)


# What is adapted, and what an answer depends on ---------------------------------------------------


class HeadFirst(keras.Model):
    """Makes its last layer first."""

    def __init__(self):
        super().__init__()
        self.the_head, self.the_body = layers.Dense(3, name='the_head'), layers.Dense(4, 'tanh')

    def call(self, x):
        return self.the_head(self.the_body(x))


@pytest.mark.parametrize(
    'make, shape, head',
    [
        (HeadFirst, (4,), {'the_head'}),
        (
            lambda: stack((2, 4), layers.Dense(4), layers.Bidirectional(layers.GRU(2))),
            None,
            {'bidirectional'},
        ),
        (
            lambda: stack((4,), stack((4,), layers.Dense(4), layers.Dense(3, name='end'))),
            None,
            {'end'},
        ),
    ],
)
def test_the_head_is_the_layer_that_is_called_last(make, shape, head):
    network = KerasNetwork(make(), input_shape=shape)
    for adapt in ('head', 'body'):
        maml = FastMAML(network, mean_squared_error, LR, compiled=False, adapt=adapt)
        changed = [name for name in maml.weights if head & {*name.split('/')}]
        assert len(changed) == (len(maml.weights) if adapt == 'head' else 0)
        assert len(maml.weights) + len(maml.norms) == len(network.variables)
    assert len(network.head_names) >= 2


ALONE = ['tokens, batch norm', 'synchronized', 'centred over examples', 'softmax over examples']


@pytest.mark.parametrize('name', ALONE)
def test_an_answer_does_not_depend_on_other_queries(name):
    """With a support set, and in an evaluation that is not transductive."""
    make, inputs, _ = RIGHT[name]
    network = KerasNetwork(make())
    learner = Learner(FastMAML(network, mean_squared_error, LR, compiled=False))
    (x, y, z, _), _ = random_tasks(network, inputs, seed=0)
    weights = learner.adapt(x[0].numpy(), y[0].numpy(), steps=2)
    together = learner.predict(z[0].numpy(), weights, support_x=x[0].numpy())
    for i, query in enumerate(z[0].numpy()):
        alone = learner.predict(query[np.newaxis], weights, support_x=x[0].numpy())
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-4, atol=1e-6)


def test_a_frozen_layer_stays_as_it_is():
    model = frozen('nested')
    before = [variable.numpy() for variable in model.non_trainable_variables]
    network = KerasNetwork(model)
    _, batch = random_tasks(network, uniform, seed=0)
    maml = FastMAML(network, mean_squared_error, LR)
    for _ in range(2):
        maml.metatrain_step(batch)
    for variable, value in zip(model.non_trainable_variables, before):
        np.testing.assert_array_equal(variable, value)


# Models drawn at random ---------------------------------------------------------------------------


def pick(dice, *choices):
    return choices[dice.integers(len(choices))]


def activation(dice):
    return pick(dice, None, 'tanh', SOFT, 'sigmoid', 'gelu', 'softmax')


def layer_of_vectors(dice) -> keras.Layer:
    return pick(
        dice,
        lambda: layers.Dense(4, activation(dice)),
        lambda: layers.BatchNormalization(
            scale=pick(dice, True, False), center=pick(dice, True, False)
        ),
        lambda: layers.LayerNormalization(),
        lambda: layers.Softmax(axis=pick(dice, -1, -2, 1, 0)),
        lambda: layers.UnitNormalization(axis=pick(dice, -1, -2)),
        lambda: layers.Reshape((2, -1)),
        lambda: layers.PReLU(alpha_initializer='ones'),
        lambda: layers.Dense(4, kernel_regularizer=pick(dice, None, 'l2')),
        lambda: layers.Dense(4, bias_constraint=pick(dice, None, 'unit_norm')),
        lambda: layers.Dense(4, trainable=False),
        lambda: layers.SpectralNormalization(layers.Dense(4)),
    )()


def layer_of_sequences(dice) -> keras.Layer:
    return pick(
        dice,
        lambda: layers.Dense(3, activation(dice)),
        lambda: layers.LSTM(3, return_sequences=pick(dice, True, False)),
        lambda: layers.GRU(3, return_sequences=True, go_backwards=pick(dice, True, False)),
        lambda: layers.SimpleRNN(3, return_sequences=pick(dice, True, False)),
        lambda: layers.Bidirectional(layers.GRU(2, return_sequences=pick(dice, True, False))),
        lambda: layers.Conv1D(3, 2, padding=pick(dice, 'same', 'valid', 'causal')),
        lambda: layers.SeparableConv1D(3, 2, padding='same'),
        lambda: layers.BatchNormalization(axis=pick(dice, -1, 1), renorm=pick(dice, False, True)),
        lambda: layers.LayerNormalization(axis=pick(dice, -1, [1, 2])),
        lambda: layers.GroupNormalization(1),
        lambda: layers.Softmax(axis=pick(dice, -1, -2, -3)),
        lambda: layers.Masking(),
        lambda: layers.Permute((2, 1)),
        lambda: layers.UpSampling1D(2),
        lambda: layers.AveragePooling1D(2),
        lambda: layers.GlobalAveragePooling1D(),
        lambda: layers.TimeDistributed(layers.Dense(3, SOFT)),
        lambda: layers.EinsumDense('abc,cd->abd', output_shape=(None, 3)),
        lambda: layers.Flatten(),
    )()


def layer_of_images(dice) -> keras.Layer:
    padding = pick(dice, 'same', 'valid')
    return pick(
        dice,
        lambda: layers.Conv2D(3, pick(dice, 1, 2, 3), pick(dice, 1, 2), padding),
        lambda: layers.Conv2D(4, 3, padding=padding, dilation_rate=pick(dice, 1, 2)),
        lambda: layers.DepthwiseConv2D(2, padding=padding, depth_multiplier=pick(dice, 1, 2)),
        lambda: layers.SeparableConv2D(3, 2, padding=padding),
        lambda: layers.Conv2DTranspose(3, 2, pick(dice, 1, 2), padding),
        lambda: layers.BatchNormalization(axis=pick(dice, -1, 1)),
        lambda: layers.LayerNormalization(axis=pick(dice, -1, [1, 2, 3])),
        lambda: layers.GroupNormalization(1),
        lambda: layers.RMSNormalization(),
        lambda: layers.UpSampling2D(2, interpolation=pick(dice, 'nearest', 'bilinear', 'lanczos3')),
        lambda: layers.Resizing(5, 4, interpolation=pick(dice, 'bilinear', 'area', 'bicubic')),
        lambda: layers.AveragePooling2D(2, padding=padding),
        lambda: layers.ZeroPadding2D(1),
        lambda: layers.Cropping2D(1),
        lambda: layers.Activation(activation(dice) or 'linear'),
        lambda: layers.ActivityRegularization(pick(dice, 0.0, 0.1)),
        lambda: layers.GlobalAveragePooling2D(),
        lambda: layers.Flatten(),
    )()


BY_RANK = {2: layer_of_vectors, 3: layer_of_sequences, 4: layer_of_images}


def merged(dice, x, y):
    kinds = (layers.Add, layers.Multiply, layers.Concatenate, layers.Average)
    if len(x.shape) == 3:
        kinds += (layers.Attention,)
    return pick(dice, *kinds)()([x, y])


def drawn(seed: int) -> tuple[keras.Model, Callable]:
    """A model of a few layers, with branches now and then, and its inputs."""
    dice = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    shape, inputs = pick(
        dice, ((4,), uniform), ((4, 3), uniform), ((5, 5, 2), uniform), ((5,), tokens)
    )
    x = start = keras.Input(shape)
    if inputs is tokens:
        x = layers.Embedding(10, 3, mask_zero=pick(dice, True, False))(x)
    for _ in range(dice.integers(1, 4)):
        make = BY_RANK[len(x.shape)]
        before, x = x, make(dice)(x)
        if dice.random() < 0.2 and before.shape == x.shape:
            x = merged(dice, before, x)
    if len(x.shape) > 2:
        x = layers.Flatten()(x)
    return keras.Model(start, layers.Dense(3)(x)), inputs


def model_of(seed: int) -> tuple[keras.Model, Callable] | None:
    """As `drawn`; None if Keras itself cannot make or call it."""
    try:
        model, inputs = drawn(seed)
        model(inputs(np.random.default_rng(0), (4, *model.input_shape[1:])), training=True)
    except Exception:  # whatever its layers raise
        return None
    return model, inputs


def search(seeds) -> collections.Counter:
    """How many random models are right, and how many are refused for what; of no other kind."""
    told = collections.Counter()
    for seed in seeds:
        if (found := model_of(seed)) is None:
            told['no model'] += 1
            continue
        model, inputs = found
        try:
            compare(model, inputs, seed)
            told['right'] += 1
        except ValueError as error:
            told[reason(str(error))] += 1
        except AssertionError as error:
            raise AssertionError(f'seed {seed}: {[*map(str, model.layers)]}: {error}') from error
    return told


REASONS = ('losses of its own', 'a constraint', 'for zero in StopGradient', 'differentiated twice')


def reason(sentence: str) -> str:
    found = [reason for reason in REASONS if reason in sentence]
    assert found and '\n' not in sentence, sentence
    return found[0]


@pytest.mark.filterwarnings('error:the meta-gradient')
@pytest.mark.parametrize(
    'seeds', [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)], ids=str
)
def test_random_models(float64, seeds):  # noqa: F811
    assert search(seeds)['right'] >= len(seeds) / 2


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [range(8), pytest.param(range(100), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings('error:the meta-gradient')
def test_no_model_of_float32_is_called_wrong(seeds):
    """It is asked to compute in float64, which layers, models in models and operations must do."""
    for seed in seeds:
        if (found := model_of(seed)) is None:
            continue
        model, _ = found
        try:
            KerasNetwork(stack(model.input_shape[1:], model))
        except ValueError as error:
            reason(str(error))


@pytest.mark.slow
def test_three_hundred_random_models(float64):  # noqa: F811
    told = search(range(1000, 1320))
    print(dict(told))
    assert told['right'] >= 150 and told.total() - told['no model'] >= 300


# Models that people have --------------------------------------------------------------------------


def on_top_of(backbone: keras.Model, trained: int) -> keras.Model:
    """A classifier whose backbone is frozen but for its last layers."""
    for layer in backbone.layers[:-trained]:
        layer.trainable = False
    return stack(backbone.input_shape[1:], backbone, layers.Dense(3))


def mobile_net() -> keras.Model:
    given = {'include_top': False, 'weights': None, 'pooling': 'avg'}
    return on_top_of(keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, **given), 12)


def res_net() -> keras.Model:
    given = {'include_top': False, 'weights': None, 'pooling': 'avg'}
    return on_top_of(keras.applications.ResNet50V2(input_shape=(32, 32, 3), **given), 12)


def text_classifier() -> keras.Model:
    embedding = layers.Embedding(10, 8, mask_zero=True)
    return stack((8,), embedding, layers.GRU(8), layers.Dense(8, SOFT), layers.Dense(3))


def encoder_block(x):
    y = layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    x = layers.LayerNormalization()(layers.Add()([x, y]))
    y = layers.Dense(8)(layers.Dense(16, 'gelu')(x))
    return layers.LayerNormalization()(layers.Add()([x, y]))


def transformer() -> keras.Model:
    x = keras.Input((6, 8))
    y = layers.GlobalAveragePooling1D()(encoder_block(encoder_block(x)))
    return keras.Model(x, layers.Dense(3)(y))


def double_convolution(x, filters: int):
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding='same')(x)
        x = layers.Activation(SOFT)(layers.BatchNormalization()(x))
    return x


def u_net() -> keras.Model:
    """From an image to one of the same size."""
    x = keras.Input((16, 16, 1))
    fine = double_convolution(x, 4)
    coarse = double_convolution(layers.AveragePooling2D(2)(fine), 8)
    joined = layers.Concatenate()([fine, up(2)(coarse)])
    return keras.Model(x, layers.Conv2D(1, 1)(double_convolution(joined, 4)))


def of_signals() -> keras.Model:
    blocks = []
    for filters in (4, 8):
        blocks += [layers.Conv1D(filters, 5, padding='same'), layers.BatchNormalization()]
        blocks += [layers.Activation(SOFT), layers.AveragePooling1D(2)]
    return stack((32, 2), *blocks, layers.GlobalAveragePooling1D(), layers.Dense(3))


PEOPLE = {
    'MobileNetV2': (mobile_net, uniform),
    'ResNet50V2': (res_net, uniform),
    'text': (text_classifier, tokens),
    'transformer': (transformer, uniform),
    'U-Net': (u_net, uniform),
    'signals': (of_signals, uniform),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PEOPLE)
def test_models_that_people_have_are_exact(float64, name):  # noqa: F811
    make, inputs = PEOPLE[name]
    compare(make(), inputs)


@pytest.mark.slow
@pytest.mark.parametrize('name', PEOPLE)
@pytest.mark.filterwarnings('ignore:XLA cannot compile')
def test_models_that_people_have_from_training_to_prediction(tmp_path, name):
    """As in use: float32, compiled where that is possible."""
    make, inputs = PEOPLE[name]
    network = KerasNetwork(make(), audit=None)
    (x, y, z, _), batch = random_tasks(network, inputs, seed=0)
    maml = FastMAML(network, mean_squared_error, 0.01, num_updates=2, meta_lr=1e-4)
    losses = [float(maml.metatrain_step(batch)) for _ in range(3)]
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    learner = Learner(maml)
    learner.save(tmp_path)
    loaded = Learner.load(tmp_path, network=network.model)
    answers = []
    for one in (learner, loaded):
        weights = one.adapt(x[0].numpy(), np.reshape(y[0], (4, -1)))
        answers.append(one.predict(z[0].numpy(), weights))
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
