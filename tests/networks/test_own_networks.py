"""A network, a loss and a loop of one's own: what fits is trained, what does not is named."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import ROOT

from data_generator import Batch, SinusoidGenerator
from fewshot.engine.fast import FastMAML
from fewshot.networks.paper_networks import Convolutional, FullyConnected
from fewshot.use.learner import Learner
from fewshot.use.saved_models import settings_of
from maml import cross_entropy, mean_squared_error, repeated
from special_grads import dense

TASKS = SinusoidGenerator(num_support=4, num_query=4)


@pytest.fixture(autouse=True)
def eager():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


class Two:
    """Two layers; what a network needs, and no more."""

    parameters = {
        'w1': ('normal', (1, 5)),
        'b1': ('zeros', (5,)),
        'w2': ('glorot', (5, 1)),
        'b2': ('zeros', (1,)),
    }
    norm_parameters = {}
    dim_input = dim_output = 1

    def prepare(self, x):
        return x

    def __call__(self, x, weights, norms):
        x = tf.tanh(dense(x, weights['w1'], weights['b1']))
        return dense(x, weights['w2'], weights['b2'])


def model_of(network, loss=mean_squared_error, **settings) -> FastMAML:
    return FastMAML(network, loss, 0.01, compiled=False, **settings)


def test_a_network_of_one_s_own_learns():
    model = model_of(Two(), meta_lr=0.05)
    losses = [float(model.metatrain_step(TASKS.batch('train', i, 10))) for i in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_a_loop_of_one_s_own():
    """meta_gradient, and an optimizer of Keras's, do what metatrain_step does."""
    one, other = model_of(Two()), model_of(Two())
    optimizer = keras.optimizers.Adam(1e-3, epsilon=1e-8)
    for i in range(3):
        batch = Batch(*map(tf.constant, TASKS.batch('train', i, 10)))
        one.metatrain_step(batch)
        _, gradients = other.meta_gradient(batch)
        optimizer.apply(gradients, other.parameters)
    for a, b in zip(one.parameters, other.parameters):
        np.testing.assert_allclose(a, b, rtol=1e-6)


class NoAxis(Two):
    """Forgets that weights have an axis of tasks: right only where T equals K and Q."""

    def __call__(self, x, weights, norms):
        return super().__call__(x, weights, norms) + weights['b2']


class Flat(Two):
    """One number for each example instead of [out]."""

    def __call__(self, x, weights, norms):
        return super().__call__(x, weights, norms)[..., 0]


class Nothing:
    """No network at all."""


@pytest.mark.parametrize(
    'network, words',
    [
        (NoAxis, 'fails on 2 tasks of 3 examples'),
        (Flat, r'must return .* \[2, 3, 1\], but returns \[2, 3\]'),
        (Nothing, 'lacks parameters, norm_parameters, prepare'),
    ],
)
def test_networks_that_do_not_fit(network, words):
    with pytest.raises(ValueError, match=words) as error:
        model_of(network())
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'loss, words',
    [
        (keras.losses.MeanSquaredError(), r'for \[2, 3, 1\] it returns \[\]'),
        (keras.losses.MeanSquaredError(reduction='none'), r'returns \[2, 3\]'),
        (lambda output, label: output @ label, 'the loss fails'),
    ],
)
def test_losses_that_do_not_fit(loss, words):
    """They would train in silence with another α."""
    with pytest.raises(ValueError, match=words):
        model_of(Two(), loss)


class Scaled(FullyConnected):
    """A subclass whose call knows nothing of weights that tasks share."""

    def __call__(self, x, weights, norms, leading=None):
        doubled = {name: 2 * value for name, value in weights.items()}
        return super().__call__(x, doubled, norms, leading)


@pytest.mark.parametrize('updates', [1, 2])
def test_a_subclass_of_a_network(updates):
    model = model_of(Scaled(1, (4,), 1), num_updates=updates)
    assert np.isfinite(float(model.metatrain_step(TASKS.batch('train', 0, 5))))


def test_activation_and_initial_values():
    values = np.arange(1.0, 5.0).reshape(1, 4)
    network = FullyConnected(1, (4,), 1, activation=tf.tanh, initial='glorot')
    network.parameters['w1'] = (values, values.shape)
    network.parameters['b1'] = (keras.initializers.Constant(0.5), (4,))
    model = model_of(network)
    np.testing.assert_array_equal(model.weights['w1'], values)
    np.testing.assert_array_equal(model.weights['b1'], np.full(4, 0.5))
    x = np.array([[[0.3]]], np.float32)
    hidden = np.tanh(x @ values + 0.5)
    expected = hidden @ model.weights['w2'].numpy() + model.weights['b2'].numpy()
    output = model.maml.forward(repeated(model.weights, 1), {}, tf.constant(x))
    np.testing.assert_allclose(output, expected, rtol=1e-6)


def test_an_initial_value_of_another_shape():
    network = FullyConnected(1, (4,), 1, initial=lambda shape: np.zeros(3))
    with pytest.raises(ValueError, match=r'is \[3\], not \[1, 4\]'):
        model_of(network)


def test_a_keras_model_as_it_is():
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model = model_of(network)
    assert np.isfinite(float(model.metatrain_step(TASKS.batch('train', 0, 5))))


def test_arrays_of_other_types():
    """float64, as NumPy has them, and integers are taken."""
    batch = TASKS.batch('train', 0, 5)
    expected = float(model_of(Two()).metatrain_step(batch))
    doubles = Batch(*(values.astype('float64') for values in batch))
    assert float(model_of(Two()).metatrain_step(doubles)) == pytest.approx(expected, rel=1e-5)
    whole = Batch(*(np.round(values).astype('int32') for values in batch))
    assert np.isfinite(float(model_of(Two()).metatrain_step(whole)))


def test_a_regression_has_no_accuracy():
    results = model_of(Two()).evaluate(TASKS.batch('val', 0, 5), 2)
    assert np.isnan(results.accuracy1).all() and np.isnan(results.accuracies2).all()
    assert np.isfinite(results.losses2).all()


def test_a_schedule_of_outer_step_sizes():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 3)
    model = model_of(Two(), meta_lr=schedule)
    for i in range(4):
        before = model.weights['w1'].numpy()
        model.metatrain_step(TASKS.batch('train', i, 5))
    np.testing.assert_array_equal(model.weights['w1'], before)  # the last step has size 0


def test_a_learner_needs_the_sizes():
    class Bare(Two):
        @property
        def dim_input(self):
            raise AttributeError

    with pytest.raises(ValueError, match='dim_input and dim_output'):
        Learner(model_of(Bare()))


def absolute(output, label):
    return tf.reduce_mean(tf.abs(output - label), axis=[1, 2])


@pytest.mark.parametrize('loss', [mean_squared_error, absolute])
def test_save_and_load(tmp_path, loss):
    learner = Learner(model_of(Two(), loss, num_updates=2))
    learner.model.metatrain_step(TASKS.batch('train', 0, 5))
    learner.save(tmp_path / 'own')
    given = {} if loss is mean_squared_error else {'loss': loss}
    loaded = Learner.load(tmp_path / 'own', network=Two(), **given)
    batch, outputs = TASKS.batch('test', 0, 3), []
    for one in (learner, loaded):
        weights = one.adapt(batch.inputa, batch.labela)
        outputs.append(one.predict(batch.inputb, weights))
    np.testing.assert_array_equal(*outputs)
    with pytest.raises(ValueError, match='network'):
        Learner.load(tmp_path / 'own')
    if given:
        with pytest.raises(ValueError, match='loss='):
            Learner.load(tmp_path / 'own', network=Two())


def test_save_and_load_in_float64_with_a_schedule(tmp_path):
    """What is loaded goes on as what was saved: weights, Adam, and the place in the schedule."""
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.5)
    learner = Learner(model_of(Two(), dtype=tf.float64, meta_lr=rate))
    learner.model.metatrain_step(TASKS.batch('train', 0, 5))
    learner.save(tmp_path)
    loaded = Learner.load(tmp_path, network=Two())
    assert loaded.model.dtype == tf.float64
    for one in (learner, loaded):
        one.model.metatrain_step(TASKS.batch('train', 1, 5))
    for name, value in learner.model.weights.items():
        np.testing.assert_array_equal(loaded.model.weights[name], value)


class Constant(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.01


def test_load_names_a_schedule_of_ones_own(tmp_path):
    Learner(model_of(Two(), meta_lr=Constant())).save(tmp_path)
    with pytest.raises(ValueError, match='meta_lr .* get_config .*register_keras_serializable'):
        Learner.load(tmp_path, network=Two())


@pytest.mark.parametrize(
    'optimizer',
    [
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.02, 9)),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02)),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_save_and_load_with_another_outer_optimizer(tmp_path, optimizer):
    """What is loaded goes on as what was saved."""
    learner = Learner(model_of(Two()))
    learner.model.set_optimizer(optimizer)
    learner.model.metatrain_step(TASKS.batch('train', 0, 5))
    learner.save(tmp_path)
    loaded = Learner.load(tmp_path, network=Two())
    assert type(loaded.model.metatrain_optimizer) is type(optimizer)
    for one in (learner, loaded):
        one.model.metatrain_step(TASKS.batch('train', 1, 5))
    for name, value in learner.model.weights.items():
        np.testing.assert_array_equal(loaded.model.weights[name], value)


def test_the_network_is_called_by_its_own_name():
    """Also where a faster one of the same computes."""
    model = FastMAML(Convolutional(16, 1, 2, 2), cross_entropy(1), 0.1, compiled=False)
    assert settings_of(model)['network'] == 'Convolutional'
    assert settings_of(model_of(Two()))['network'] == 'Two'


def test_load_imports_no_module_that_a_checkpoint_names(tmp_path):
    settings = settings_of(model_of(Two()))
    settings['optimizer']['config']['learning_rate'] = {
        'module': 'antigravity',
        'class_name': 'Adam',
        'config': {},
        'registered_name': None,
    }
    Learner(model_of(Two()), settings).save(tmp_path)
    with pytest.raises(ValueError, match='that Keras does not know'):
        Learner.load(tmp_path, network=Two())
    assert 'antigravity' not in sys.modules


def test_the_example_learns():
    """A loop of one's own, typed as the documents say."""
    line = [sys.executable, '-B', ROOT / 'scripts/examples/own_loop.py']
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.findall(r'\d+\.\d+', done.stdout))
    assert after < 0.9 * before
