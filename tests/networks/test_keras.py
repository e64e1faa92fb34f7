"""Keras models as networks: exact meta-gradients through every kind of layer, or a refusal."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import ORIGINAL
from test_reference import FOLDER, Case, check_metatrain, check_outcomes

from data_generator import Batch
from fewshot.engine.fast import FastMAML
from fewshot.networks.keras_network import KerasNetwork
from fewshot.use.learner import Learner
from maml import cross_entropy

layers = keras.layers
SHARED = ORIGINAL.parent / 'reference'  # has cases that are too large for tests/reference
WAYS = 5
smooth = functools.partial(layers.Activation, 'softplus')  # no kinks to cross by a difference


def in_precision(dtype: str):
    """Keras makes models of this type from now on."""
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


@pytest.fixture
def float64():
    """Keras makes models of float64, with the same initial values every time; no graphs."""
    in_precision('float64')
    keras.utils.set_random_seed(0)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
    in_precision('float32')


def conv(**named) -> keras.Layer:
    return layers.Conv2D(4, 3, strides=2, padding='same', **named)


def of_images(*middle) -> keras.Model:
    inputs, end = layers.Input((8, 8, 1)), [layers.GlobalAveragePooling2D(), layers.Dense(WAYS)]
    return keras.Sequential([inputs, conv(), *middle, *end])


def of_sequences(*middle) -> keras.Model:
    return keras.Sequential([layers.Input((6, 3)), *middle, layers.Dense(WAYS)])


def branches() -> keras.Model:
    x = keras.Input((4,))
    a, b = layers.Dense(3, activation='tanh')(x), layers.Dense(3, activation='softplus')(x)
    both = [layers.Add()([a, b]), layers.Multiply()([a, b])]
    return keras.Model(x, layers.Dense(WAYS)(layers.Concatenate()(both)))


def attention() -> keras.Model:
    x = keras.Input((4, 3))
    y = layers.MultiHeadAttention(2, 2)(x, x)
    return keras.Model(x, layers.Dense(WAYS)(layers.GlobalAveragePooling1D()(y)))


def operations() -> keras.Model:
    """More than layers: operations of Keras between them."""
    x = keras.Input((4,))
    hidden = layers.Dense(6)(x)
    gated = keras.ops.silu(hidden) * keras.ops.sigmoid(hidden) - keras.ops.gelu(hidden)
    summed = keras.ops.sin(hidden) + keras.ops.softmax(hidden) + keras.ops.tanh(gated)
    pooled = keras.ops.mean(keras.ops.reshape(summed, (-1, 2, 3)), 1)
    return keras.Model(x, layers.Dense(WAYS)(keras.ops.concatenate([gated, pooled], -1)))


class Subclassed(keras.Model):
    """Its call takes no `training`."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(3, activation='tanh'), layers.Dense(WAYS)

    def call(self, x):
        return self.last(self.first(x))


def words() -> keras.Model:
    return of_words(layers.Embedding(10, 4))


def of_words(embedding) -> keras.Model:
    start = [layers.Input((6,)), layers.Rescaling(9.0), embedding]
    return keras.Sequential([*start, layers.GlobalAveragePooling1D(), layers.Dense(WAYS)])


MODELS = {
    'Dense': lambda: keras.Sequential(
        [layers.Input((4,)), layers.Dense(6, activation='tanh'), layers.Dense(WAYS)]
    ),
    'Conv1D': lambda: of_sequences(layers.Conv1D(4, 3, activation='tanh'), layers.Flatten()),
    'Conv2D': lambda: of_images(smooth(), conv(activation='tanh')),
    'Conv2D of 1x1': lambda: of_images(smooth(), layers.Conv2D(3, 1, activation='tanh')),
    'DepthwiseConv2D': lambda: of_images(layers.DepthwiseConv2D(3, activation='tanh')),
    'SeparableConv2D': lambda: of_images(layers.SeparableConv2D(4, 3, activation='tanh')),
    'Conv2DTranspose': lambda: of_images(layers.Conv2DTranspose(4, 3, activation='tanh')),
    'MaxPooling2D': lambda: of_images(smooth(), layers.MaxPooling2D(2)),
    'AveragePooling2D': lambda: of_images(smooth(), layers.AveragePooling2D(2)),
    'BatchNormalization': lambda: of_images(layers.BatchNormalization(), smooth()),
    'BatchNormalization without gain': lambda: of_images(
        layers.BatchNormalization(scale=False), smooth()
    ),
    'LayerNormalization': lambda: of_images(layers.LayerNormalization(), smooth()),
    'LayerNormalization of all axes': lambda: of_images(
        layers.LayerNormalization(axis=[1, 2, 3]), smooth()
    ),
    'GroupNormalization': lambda: of_images(layers.GroupNormalization(2), smooth()),
    'UnitNormalization': lambda: of_images(layers.UnitNormalization(), smooth()),
    'RMSNormalization': lambda: of_images(layers.RMSNormalization(), smooth()),
    'PReLU': lambda: of_images(layers.PReLU(alpha_initializer='ones'), smooth()),
    'Embedding': words,
    'GRU': lambda: of_sequences(layers.GRU(4)),
    'LSTM': lambda: of_sequences(layers.LSTM(4)),
    'MultiHeadAttention': attention,
    'Add, Multiply, Concatenate': branches,
    'operations': operations,
}


def random_batch(network: KerasNetwork, tasks: int = 3, examples: int = 4, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    shape = (tasks, examples)
    inputs = [random.random((*shape, network.dim_input)) for _ in range(2)]
    labels = [np.eye(WAYS)[random.integers(0, WAYS, shape)] for _ in range(2)]
    parts = (inputs[0], labels[0], inputs[1], labels[1])
    return Batch(*(tf.constant(part, network.dtype) for part in parts))


def plain_model(network, updates: int, stop_grad: bool = False, lr: float = 0.1) -> FastMAML:
    given = {'stop_grad': stop_grad, 'dtype': network.dtype, 'compiled': False}
    return FastMAML(network, cross_entropy(1), lr, updates, **given)


def directional(model: FastMAML, batch: Batch, directions: list, step: float) -> float:
    """A central difference of the outer loss along a direction."""
    values = [variable.numpy() for variable in model.parameters]
    losses = []
    for sign in (1, -1):
        for variable, value, direction in zip(model.parameters, values, directions):
            variable.assign(value + sign * step * direction)
        losses.append(float(model.meta_gradient(batch)[0]))
    for variable, value in zip(model.parameters, values):
        variable.assign(value)
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize('updates', [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.filterwarnings('ignore:XLA cannot compile')
def test_meta_gradient_equals_differences(float64, name, updates):
    network = KerasNetwork(MODELS[name](), audit=None)
    model, batch = plain_model(network, updates), random_batch(network)
    random = np.random.default_rng(1)
    directions = [random.standard_normal(variable.shape) for variable in model.parameters]
    along = []
    for stop_grad in (False, True):
        _, gradients = plain_model(network, updates, stop_grad).meta_gradient(batch)
        along.append(sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradients, directions)))
    expected = directional(model, batch, directions, 1e-6)
    assert along[0] == pytest.approx(expected, rel=1e-6)
    assert abs(along[1] - expected) > 1e-4 * abs(expected), 'the same as first order'


def test_keras_itself_is_wrong(float64):
    """The reason for all this: the moments of TensorFlow, without the correction."""
    model = MODELS['BatchNormalization']()
    network = KerasNetwork(model)
    batch = random_batch(network, tasks=1)
    exact = plain_model(network, 1).meta_gradient(batch)[1]
    theta = [tf.identity(variable) for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]

    def loss(values, x, y):
        output, _ = model.stateless_call(values, fixed, network.prepare(x)[0], training=True)
        return cross_entropy(1)(output[tf.newaxis], y)[0]

    with tf.GradientTape() as outer:
        outer.watch(theta)
        with tf.GradientTape() as inner:
            inner.watch(theta)
            support = loss(theta, batch.inputa, batch.labela)
        adapted = [v - 0.1 * g for v, g in zip(theta, inner.gradient(support, theta))]
        query = loss(adapted, batch.inputb, batch.labelb)
    plain = outer.gradient(query, theta)
    assert float(query) == pytest.approx(float(plain_model(network, 1).meta_gradient(batch)[0]))
    wrong = [float(tf.norm(a - b) / tf.norm(b)) for a, b in zip(plain, exact)]
    assert max(wrong[:1]) > 0.01


# The paper's networks, written with Keras ---------------------------------------------------------


@keras.saving.register_keras_serializable()
class Affine(layers.Layer):
    """Gain and offset per channel, as the original's layer normalisation has them."""

    def build(self, shape):
        self.beta = self.add_weight(shape=shape[-1:], initializer='zeros', name='beta')
        self.gamma = self.add_weight(shape=shape[-1:], initializer='ones', name='gamma')

    def call(self, x):
        return x * self.gamma + self.beta


def paper_network(case: Case) -> tuple[keras.Model, list[str]]:
    """The network of a case, and the original's names of its trainable variables."""
    f = case.flags
    size, channels = (84, 3) if f.datasource == 'miniimagenet' else (28, 1)
    stack, names = [layers.Input((size, size, channels))], []
    for i in range(1, 5):
        strides = 1 if f.max_pool else 2
        stack.append(layers.Conv2D(f.num_filters, 3, strides, padding='same'))
        names += [f'conv{i}', f'b{i}', f'{i - 1}/beta']
        if f.norm == 'batch_norm':
            stack.append(layers.BatchNormalization(scale=False))
        else:
            plain = {'center': False, 'scale': False, 'epsilon': 1e-12}
            stack += [layers.LayerNormalization(axis=[1, 2, 3], **plain), Affine()]
            names.append(f'{i - 1}/gamma')
        stack.append(layers.ReLU())
        if f.max_pool:
            stack.append(layers.MaxPooling2D(2))
    flatten = f.datasource == 'miniimagenet'
    stack.append(layers.Flatten() if flatten else layers.GlobalAveragePooling2D())
    stack.append(layers.Dense(f.num_classes))
    return keras.Sequential(stack), [*names, 'w5', 'b5']


def is_adapted(path: str) -> bool:
    return not path.endswith(('beta', 'gamma'))


def keras_case(case: Case, dtype, compiled: bool) -> FastMAML:
    """The case's model with a Keras network, its parameters under the original's names."""
    network, names = paper_network(case)
    network = KerasNetwork(network, adapt=is_adapted, audit=None)
    renamed = dict(zip(network.variables, names))
    network.variables = {renamed[name]: own for name, own in network.variables.items()}
    network.parameters = {renamed[name]: made for name, made in network.parameters.items()}
    made = {renamed[name]: value for name, value in network.norm_parameters.items()}
    network.norm_parameters = made
    f = case.flags
    clip = 10.0 if f.datasource == 'miniimagenet' else None
    loss, rates = cross_entropy(f.update_batch_size), (f.update_lr, f.num_updates, f.meta_lr)
    given = {'dtype': dtype, 'compiled': compiled}
    model = FastMAML(network, loss, *rates, f.stop_grad, clip, **given)
    case.initialize(model)
    return model


PAPER = [
    'omniglot_5way_1shot',
    'omniglot_20way_1shot_5steps',
    'omniglot_layer_norm',
    'omniglot_max_pool',
    'miniimagenet_clipped',
]
CASES = [
    (name, precision, compiled)
    for name in PAPER
    for precision in ('float64', 'float32')
    for compiled in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize('name, precision, compiled', CASES)
def test_paper_networks_in_keras(name, precision, compiled):
    folder = FOLDER if (FOLDER / f'{name}.npz').exists() else SHARED
    if not (folder / f'{name}.npz').exists():
        pytest.skip(f'{name}.npz is not in {folder}')
    in_precision(precision)
    try:
        case, dtype = Case(folder / name), tf.as_dtype(precision)
        batch = case.batch(dtype)
        check_outcomes(case, keras_case(case, dtype, compiled), batch)
        tolerance = 1e-9 if dtype == tf.float64 else case.gradient_tolerance
        check_metatrain(case, keras_case(case, dtype, compiled), batch, tolerance)
    finally:
        in_precision('float32')


# What is refused ----------------------------------------------------------------------------------


def two_inputs() -> keras.Model:
    a, b = keras.Input((3,)), keras.Input((3,))
    return keras.Model([a, b], layers.Dense(2)(layers.Add()([a, b])))


def two_outputs() -> keras.Model:
    x = keras.Input((3,))
    return keras.Model(x, [layers.Dense(2)(x), layers.Dense(2)(x)])


def small(*middle) -> keras.Model:
    return keras.Sequential([layers.Input((3,)), *middle, layers.Dense(2, name='head')])


REFUSED = {
    'no model': (lambda: layers.Dense(2), 'keras.Model'),
    'not built': (lambda: keras.Sequential([layers.Dense(2)]), 'input_shape'),
    'two inputs': (two_inputs, '2 inputs'),
    'two outputs': (two_outputs, 'one output'),
    'any size': (lambda: keras.Sequential([layers.Input((None, 3)), layers.GRU(2)]), 'any size'),
    'nothing to learn': (
        lambda: keras.Sequential([layers.Input((3,)), layers.ReLU()]),
        'no trainable variables',
    ),
    'dropout': (lambda: small(layers.Dense(2), layers.Dropout(0.5, name='drop')), 'drop (Dropout)'),
    'noise': (lambda: small(layers.GaussianNoise(0.5, name='noise')), 'noise (GaussianNoise)'),
    'random': (lambda: small(layers.Lambda(lambda x: x + tf.random.normal([3]))), 'random'),
    'dropout of a GRU': (
        lambda: keras.Sequential([layers.Input((4, 3)), layers.GRU(2, dropout=0.5)]),
        'random numbers',
    ),
    'regularizer': (
        lambda: small(layers.Dense(2, kernel_regularizer='l2')),
        'losses of its own',
    ),
    'half': (lambda: small(layers.Dense(2, dtype='float16')), 'float16'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_models(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError) as error:
        KerasNetwork(make())
    assert words in str(error.value) and '\n' not in str(error.value)


def centred(x):
    return x - tf.reduce_mean(x, 0)


def held(x):
    return tf.stop_gradient(x) + x


def held_operation() -> keras.Model:
    x = keras.Input((4,))
    hidden = layers.Dense(3)(x)
    return keras.Model(x, layers.Dense(2)(hidden + keras.ops.stop_gradient(hidden)))


class Resized(layers.Layer):
    """By an operation whose gradient TensorFlow takes for a constant, without a word."""

    def call(self, x):
        return tf.raw_ops.ResizeBilinear(images=x, size=(5, 5), half_pixel_centers=True)

    def compute_output_shape(self, shape):
        return (shape[0], 5, 5, shape[3])


BLIND = {
    'activation': (lambda: small(layers.Dense(3), layers.Activation(held)), 'StopGradient'),
    'activation of a layer': (lambda: small(layers.Dense(3, held)), 'StopGradient'),
    'operation': (held_operation, 'StopGradient'),
    'renorm': (lambda: of_images(layers.BatchNormalization(renorm=True)), 'StopGradient'),
    'spectral': (lambda: small(layers.SpectralNormalization(layers.Dense(3))), 'StopGradient'),
    'resize': (
        lambda: of_images(Resized(name='resized'), layers.Activation('tanh')),
        r'ResizeBilinearGrad \(.*/resized',
    ),
}


@pytest.mark.parametrize('name', BLIND)
def test_derivatives_that_tensorflow_takes_for_zero(name):
    """The audit finds them, whatever the layer is, and names the operation."""
    make, words = BLIND[name]
    with pytest.raises(
        ValueError, match=f'would be wrong.* takes derivatives for zero in.*{words}'
    ):
        KerasNetwork(make())
    with pytest.warns(UserWarning, match='is not compared with differences'):
        KerasNetwork(make(), audit=False)


@pytest.mark.filterwarnings('error')
def test_functions_of_one_s_own_are_right():
    for layer in (layers.Dense(3, tf.math.sin), layers.Activation(centred), Affine()):
        KerasNetwork(small(layer))
    KerasNetwork(Subclassed(), input_shape=(4,))


class InFloat32(layers.Layer):
    """A type of its own, so that nothing can be done in float64."""

    def call(self, x):
        return x * tf.constant(2.0, tf.float32)


@pytest.mark.filterwarnings('error')
def test_models_that_fix_float32():
    """Differences of larger steps tell right from wrong there."""
    KerasNetwork(small(layers.Dense(3, 'tanh'), InFloat32()))
    with pytest.raises(ValueError, match='StopGradient'):
        KerasNetwork(small(layers.Dense(3, held), InFloat32()))


@pytest.mark.parametrize(
    'layer', [layers.Activation(centred), layers.Dense(3, centred), layers.Conv2D(3, 3, 1, 'same')]
)
def test_activations_of_one_s_own_see_one_task(layer):
    """One that takes all examples in sight must not see those of other tasks."""
    if isinstance(layer, layers.Conv2D):
        layer.activation = centred
    start = [keras.Input((4, 4, 2)), layers.Dense(2)]
    network = KerasNetwork(keras.Sequential([*start, layer, layers.Flatten()]))
    weights = {name: tf.stack([made[0]] * 2) for name, made in network.parameters.items()}
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype('float32')
    together = network(network.prepare(tf.constant(x)), weights, {})
    for task in range(2):
        alone = network.model(x[task].reshape(5, 4, 4, 2))
        np.testing.assert_allclose(together[task], alone, atol=1e-5)


@pytest.mark.parametrize(
    'size, padding, expected', [(2, 'valid', True), (2, 'same', False), (3, 'valid', False)]
)
def test_pooling_that_xla_can_compile(size, padding, expected):
    """It has no second derivative of Keras's max-pooling in float64, and a rough one in float32."""
    pooling = layers.MaxPooling2D(size, padding=padding)
    network = KerasNetwork(
        keras.Sequential([keras.Input((6, 6, 1)), pooling, layers.Flatten(), layers.Dense(2)])
    )
    assert network.compilable == expected


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.filterwarnings('error')
def test_the_audit_finds_nothing(name):
    KerasNetwork(MODELS[name]())


@pytest.mark.parametrize(
    'adapt, words', [(['tail'], "'tail'"), (lambda path: False, 'none of the variables')]
)
def test_refused_choices_of_what_is_adapted(adapt, words):
    with pytest.raises(ValueError, match=words):
        KerasNetwork(small(), adapt)


def test_dtype_of_the_model_must_be_the_network_s():
    with pytest.raises(ValueError, match='float64'):
        FastMAML(KerasNetwork(small()), cross_entropy(1), 0.1, dtype=tf.float64)


# Behaviour ----------------------------------------------------------------------------------------


def test_initial_values_are_the_model_s_and_it_stays_as_it_is():
    model = of_images(layers.BatchNormalization(), layers.ReLU())
    before = [variable.numpy() for variable in model.variables]
    network = KerasNetwork(model)
    maml = FastMAML(network, cross_entropy(1), 0.1, compiled=False)
    for variable, value in zip(maml.weights.values(), model.trainable_variables):
        np.testing.assert_array_equal(variable, value)
    maml.metatrain_step(random_batch(network))
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_names_do_not_depend_on_what_was_made_before():
    first, second = (KerasNetwork(of_images(layers.BatchNormalization())) for _ in range(2))
    assert [*first.parameters] == [*second.parameters]
    assert len({*first.parameters}) == 6


def test_what_is_not_adapted_is_learned_by_the_outer_loop():
    network = KerasNetwork(small(layers.Dense(4, name='body')), adapt=['head'])
    assert {name.split('/')[1] for name in network.norm_parameters} == {'body'}
    network = KerasNetwork(small(layers.Dense(4, name='body')), adapt=['body'])
    assert {name.split('/')[1] for name in network.parameters} == {'body'}


@pytest.mark.parametrize(
    'name', ['Subclassed', 'Conv2DTranspose', 'operations', 'BatchNormalization']
)
def test_tasks_do_not_mix(float64, name):
    """A task's results are the same alone and beside others."""
    model = Subclassed() if name == 'Subclassed' else MODELS[name]()
    network = KerasNetwork(model, input_shape=(4,) if name == 'Subclassed' else None)
    assert network.together == (name not in ('Subclassed', 'operations'))
    maml, batch = plain_model(network, 1), random_batch(network)
    together = maml.evaluate(batch, 2)
    for task in range(3):
        alone = maml.evaluate(Batch(*(values[task : task + 1] for values in batch)), 2)
        np.testing.assert_allclose(together.losses2[:, task], alone.losses2[:, 0], rtol=1e-9)


def test_statistics_of_the_support_set_alone(float64):
    """Not transductive: a query's answer does not depend on the others."""
    network = KerasNetwork(MODELS['BatchNormalization']())
    learner = Learner(plain_model(network, 1))
    batch = Batch(*(values[0].numpy() for values in random_batch(network)))
    weights = learner.adapt(batch.inputa, batch.labela.argmax(-1))
    all_of_them = learner.predict(batch.inputb, weights, batch.inputa)
    one = learner.predict(batch.inputb[:1], weights, batch.inputa)
    np.testing.assert_allclose(one[0], all_of_them[0], rtol=1e-9)


def test_groups_of_examples_are_normalised_exactly(float64):
    """GroupNormalization and the like take no statistics over examples, so tasks may mix there."""
    network = KerasNetwork(MODELS['GroupNormalization']())
    weights = {
        name: tf.constant(value)[tf.newaxis] for name, (value, _) in network.parameters.items()
    }
    x = random_batch(network, tasks=1).inputa
    expected = network.model(network.prepare(x)[0], training=True)
    np.testing.assert_allclose(network(network.prepare(x), weights, {})[0], expected, rtol=1e-9)


@pytest.mark.slow
def test_the_moments_of_others_stay_theirs():
    before = tf.nn.moments
    network = KerasNetwork(MODELS['BatchNormalization']())
    FastMAML(network, cross_entropy(1), 0.1, compiled=False).metatrain_step(random_batch(network))
    assert tf.nn.moments is before


def test_recurrent_networks_run_uncompiled():
    with pytest.warns(UserWarning, match='uncompiled'):
        model = FastMAML(KerasNetwork(MODELS['GRU']()), cross_entropy(1), 0.1)
    assert not model.compiled
