"""Keras's fit, evaluate and callbacks around MAML, and the notebook that shows them."""

import csv
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from command_line import ROOT

from data_generator import Batch, ClassImages, ImageGenerator, SinusoidGenerator
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.paper_networks import FullyConnected
from fewshot.runs.flags import define_flags
from fewshot.runs.summaries import read_scalars
from fewshot.use.fit import MetaModel
from fewshot.use.learner import Learner
from maml import cross_entropy, mean_squared_error

layers = keras.layers
NOTEBOOK = ROOT / 'docs' / 'tutorials' / 'keras_fit.ipynb'
WAYS, TASKS = 2, 4


@pytest.fixture(autouse=True)
def eager(request):
    """Nothing is traced, but where a test is marked graph."""
    keras.utils.set_random_seed(0)
    tf.config.run_functions_eagerly('graph' not in request.fixturenames)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def graph():
    """For a test that needs TensorFlow's graphs."""


def sinusoids(seed: int = 0) -> SinusoidGenerator:
    return SinusoidGenerator(3, 3, seed=seed)


def pictures() -> ImageGenerator:
    """Classes of 3x3 images that a network can tell apart by their brightness."""
    random, classes, each = np.random.default_rng(0), 8, 4
    names, counts = [f'class{c}' for c in range(classes)], np.full(classes, each)
    values = np.repeat(np.arange(classes), each)[:, np.newaxis, np.newaxis, np.newaxis]
    images = (30 * values + random.integers(0, 20, (classes * each, 3, 3, 1))).astype(np.uint8)
    of_all = ClassImages('generated', names, each * np.arange(classes), counts, images)
    return ImageGenerator({'train': of_all, 'val': of_all}, WAYS, 1, 2)


def classifier() -> keras.Model:
    stack = [layers.Input((3, 3, 1)), layers.Conv2D(4, 2), layers.BatchNormalization()]
    return keras.Sequential([*stack, layers.ReLU(), layers.Flatten(), layers.Dense(WAYS)])


def of_pictures(model: keras.Model | None = None, **named) -> MetaModel:
    """Its gains and offsets are learned by the outer loop only."""
    network = KerasNetwork(model or classifier(), adapt=lambda path: 'norm' not in path)
    given = {'update_lr': 0.1, 'num_updates': 2, 'compiled': False}
    return MetaModel(network, cross_entropy(1), **given, **named)


def of_sinusoids(compiled: bool = False, **named) -> FastMAML:
    network = FullyConnected(1, (5,), 1)
    return FastMAML(network, mean_squared_error, 0.1, 2, compiled=compiled, **named)


def tensors(source, iteration: int, split: str = 'train') -> Batch:
    return Batch(*map(tf.constant, source.batch(split, iteration, TASKS)))


def values(model: FastMAML) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.parameters]


def assert_same(first: list[np.ndarray], second: list[np.ndarray]):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# Sources as data sets -----------------------------------------------------------------------------


@pytest.mark.parametrize('source', [sinusoids(), pictures()])
def test_data_sets_of_sources(source):
    drawn = source.dataset('val', TASKS, first_iteration=3)
    assert isinstance(drawn.element_spec, Batch)
    assert drawn.cardinality() == tf.data.INFINITE_CARDINALITY
    for iteration, batch in enumerate(drawn.take(3), start=3):
        assert_same(batch, source.batch('val', iteration, TASKS))
    for spec, array in zip(drawn.element_spec, source.batch('val', 3, TASKS)):
        assert spec.shape == array.shape and spec.dtype == array.dtype


def test_data_sets_are_refused_at_once():
    with pytest.raises(ValueError, match='no split'):
        sinusoids().dataset('validation', TASKS)
    with pytest.raises(ValueError, match='at least 1'):
        sinusoids().dataset('val', 0)


# Training -----------------------------------------------------------------------------------------


def in_data_set(split: str):
    """Of tasks one by one, batched as Keras users do."""
    drawn = pictures().batches(split, 0, 3, TASKS)
    tasks = [array.reshape(-1, *array.shape[2:]) for array in drawn]
    return tf.data.Dataset.from_tensor_slices(Batch(*tasks)).batch(TASKS, drop_remainder=True)


SOURCES = {
    'tf.data': lambda split: in_data_set(split),
    'DataGenerator': lambda split: pictures().dataset(split, TASKS),
    'generator': lambda split: (pictures().batch(split, i, TASKS) for i in range(100)),
    'list': lambda split: [pictures().batch(split, i, TASKS) for i in range(3)],
}


QUICK = 'DataGenerator'  # the others say the same of the callbacks


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind',
    [pytest.param(kind, marks=[] if kind == QUICK else pytest.mark.slow) for kind in SOURCES],
)
def test_fit_with_callbacks(kind, tmp_path):
    model, callbacks = of_pictures(), keras.callbacks
    model.compile()
    best, epochs = str(tmp_path / 'best.weights.h5'), []
    kept = {'monitor': 'val_accuracy', 'save_weights_only': True, 'save_best_only': True}
    history = model.fit(
        SOURCES[kind]('train'),
        epochs=3,
        steps_per_epoch=None if kind in ('tf.data', 'list') else 3,
        validation_data=SOURCES[kind]('val'),
        validation_steps=2,
        verbose=0,
        callbacks=[
            callbacks.TensorBoard(str(tmp_path / 'logs'), histogram_freq=1),
            callbacks.ModelCheckpoint(best, mode='max', **kept),
            callbacks.EarlyStopping('val_loss', min_delta=100, patience=1),
            callbacks.ReduceLROnPlateau('loss', min_delta=100, patience=1, factor=0.5),
            callbacks.CSVLogger(str(tmp_path / 'log.csv')),
            callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: epochs.append(values(model.maml))
            ),
        ],
    ).history
    assert len(history['loss']) == 2, 'stopped early'
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0005)
    measured = {f'{name}{i}' for name in ('loss', 'accuracy') for i in ('', '_0', '_1', '_2')}
    wanted = measured | {f'val_{name}' for name in measured}
    assert {*history} == wanted | {'learning_rate'}
    with open(tmp_path / 'log.csv') as file:
        rows = [*csv.DictReader(file)]
    assert wanted <= {*rows[0]} and len(rows) == 2
    assert float(rows[1]['val_loss']) == pytest.approx(history['val_loss'][1])
    scalars = read_scalars(tmp_path / 'logs' / 'validation')
    assert scalars['epoch_accuracy'][0] == pytest.approx(history['val_accuracy'][0])
    model.load_weights(best)
    assert_same(epochs[int(np.argmax(history['val_accuracy']))], values(model.maml))


def same_as_steps(model: MetaModel, other: FastMAML, source, **named):
    """Six iterations in two epochs are six outer steps."""
    model.fit(source.dataset('train', TASKS), steps_per_epoch=3, epochs=2, verbose=0, **named)
    for i in range(6):
        other.metatrain_step(tensors(source, i))
    assert_same(values(model.maml), values(other))
    variables = (m.metatrain_optimizer.variables for m in (model.maml, other))
    assert_same(*([variable.numpy() for variable in found] for found in variables))


def test_fit_is_outer_steps():
    given = classifier()
    model = of_pictures(given)
    model.compile()
    same_as_steps(model, of_pictures(given).maml, pictures())


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize(
    'named', [{}, {'training_metrics': False}, {'steps_per_execution': 3}, {'run_eagerly': True}]
)
def test_fit_is_outer_steps_in_graphs(graph, named, compiled):
    """Bit for bit: `fit` calls the very programs."""
    model = MetaModel(of_sinusoids(compiled))
    model.compile(**named)
    same_as_steps(model, of_sinusoids(compiled), sinusoids())


@pytest.mark.slow
def test_metrics_of_training_are_those_of_the_weights_before_each_step():
    model, other = of_pictures(), of_pictures()
    other.set_weights(model.get_weights())
    model.compile()
    source, expected = pictures(), []
    for i in range(3):
        results = other.maml.evaluate(tensors(source, i), 2)
        expected.append([results.loss1, *results.losses2])
        other.maml.metatrain_step(tensors(source, i))
    history = model.fit(source.dataset('train', TASKS), steps_per_epoch=3, verbose=0).history
    means = np.mean(expected, axis=(0, 2))
    for i, mean in enumerate(means):
        assert history[f'loss_{i}'][0] == pytest.approx(mean, rel=1e-6)
    assert history['loss'][0] == pytest.approx(means[2], rel=1e-6)


def test_losses_alone(graph):
    """They are the outer losses that the steps return."""
    model, other = MetaModel(of_sinusoids()), of_sinusoids()
    model.compile(training_metrics=False)
    tasks = sinusoids().dataset('train', TASKS)
    history = model.fit(tasks, steps_per_epoch=3, verbose=0).history
    losses = [other.metatrain_step(tensors(sinusoids(), i)) for i in range(3)]
    assert {*history} == {'loss'}
    assert history['loss'][0] == pytest.approx(np.mean(losses), rel=1e-6)


def test_optimizer_of_one_s_own(graph):
    """Steps that were traced with the one before do not go on with it."""
    model = MetaModel(of_sinusoids())
    tasks = sinusoids().dataset('train', TASKS)
    model.compile()
    model.fit(tasks, steps_per_epoch=1, verbose=0)
    before, (_, gradients) = values(model.maml), model.maml.meta_gradient(next(iter(tasks)))
    model.compile(keras.optimizers.SGD(0.5))
    model.fit(tasks, steps_per_epoch=1, verbose=0)
    for value, old, gradient in zip(values(model.maml), before, gradients):
        np.testing.assert_allclose(value, old - 0.5 * gradient, rtol=1e-5, atol=1e-7)
    model.optimizer.learning_rate = 0.0
    before = values(model.maml)
    model.fit(tasks, steps_per_epoch=1, verbose=0)
    assert_same(before, values(model.maml))
    model.compile('adam')
    assert isinstance(model.maml.metatrain_optimizer, keras.optimizers.Adam)


def test_checkpoints_of_the_program_hold_one_s_own_optimizer(tmp_path):
    model = MetaModel(of_sinusoids())
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9))
    model.fit(sinusoids().dataset('train', TASKS), steps_per_epoch=2, verbose=0)
    path = model.maml.checkpoint.write(str(tmp_path / 'model1'))
    momenta = [variable.numpy() for variable in model.optimizer.variables]
    model.fit(sinusoids().dataset('train', TASKS), steps_per_epoch=2, verbose=0)
    model.maml.checkpoint.read(path).assert_consumed()
    assert_same(momenta, [variable.numpy() for variable in model.optimizer.variables])


def test_float64_takes_what_sources_draw():
    model = MetaModel(of_sinusoids(dtype=tf.float64))
    model.compile()
    tasks = sinusoids().dataset('train', TASKS)
    loss = model.fit(tasks, steps_per_epoch=2, verbose=0).history['loss'][0]
    assert model.maml.parameters[0].dtype == tf.float64 and np.isfinite(loss)


@pytest.mark.parametrize('form', ['data set', 'dict', 'list', 'generator', 'Batch'])
def test_names_count_not_the_order(form):
    """Of dicts, in whatever order they stand; a Batch has them."""
    batch = pictures().batch('val', 0, TASKS)
    turned = {name: getattr(batch, name) for name in ('labelb', 'inputb', 'inputa', 'labela')}
    tasks = {
        'data set': tf.data.Dataset.from_tensors(turned),
        'dict': turned,
        'list': [turned],
        'generator': iter([turned]),
        'Batch': Batch(**turned),
    }[form]
    model = of_pictures()
    model.compile()
    found = model.evaluate(tasks, verbose=0, return_dict=True)
    expected = np.mean(model.maml.evaluate(batch, 2).losses2[1])
    assert found['loss'] == pytest.approx(expected, rel=1e-6)
    assert np.mean(model.maml.evaluate(turned, 2).losses2[1]) == expected


def test_tuples_in_the_order_of_a_batch():
    """Support set first, inputs first; everywhere in place of a Batch."""
    batch = SinusoidGenerator(3, 3, oracle=True).batch('val', 0, TASKS)
    plain, network = tuple(batch), FullyConnected(3, (5,), 1)
    model = MetaModel(FastMAML(network, mean_squared_error, 0.1, compiled=False))
    model.compile(keras.optimizers.SGD(0.0))
    expected = model.evaluate(batch, verbose=0)
    for tasks in plain, [plain], iter([plain]), tf.data.Dataset.from_tensors(plain):
        assert model.evaluate(tasks, verbose=0) == expected
    history = model.fit(plain, validation_data=plain, verbose=0).history
    assert history['val_loss'] == history['loss'] == [expected[0]]
    np.testing.assert_array_equal(*(model.predict(x, verbose=0) for x in (plain, batch)))
    four = model.fit((batch,) * 4, verbose=0).history  # four Batches are no tuple of arrays
    assert four['loss'] == [expected[0]]


def test_meta_batches_one_by_one():
    """As Keras's names promise."""
    model, other = MetaModel(of_sinusoids()), MetaModel(of_sinusoids())
    for each in model, other:
        each.compile()
    batch = sinusoids().batch('train', 0, TASKS)
    history = other.fit(batch, verbose=0).history
    found = model.train_on_batch(batch, return_dict=True)
    assert found == {name: values[0] for name, values in history.items()}
    assert_same(values(model.maml), values(other.maml))
    assert model.test_on_batch(batch._asdict()) == other.evaluate(batch, verbose=0)
    answers = other.predict(batch, verbose=0)
    np.testing.assert_array_equal(model.predict_on_batch(batch), answers)
    with pytest.raises(ValueError, match='diverged'):
        model.predict_on_batch(batch._replace(inputa=1e30 * batch.inputa))


def test_sizes_may_change_from_call_to_call(graph):
    """Keras would take them for unknown from the second call on."""
    model, other = MetaModel(of_sinusoids()), of_sinusoids()
    model.compile(training_metrics=False)
    for i, train in enumerate((model.train_on_batch, model.fit, model.train_on_batch)):
        batch = sinusoids().batch('train', i, TASKS - i)
        train(batch, **({'verbose': 0} if train == model.fit else {}))
        other.metatrain_step(batch)
        assert_same(values(model.maml), values(other))


@pytest.mark.slow
def test_what_fit_was_given_is_what_a_task_may_be():
    """Bytes go into the network as they are; of a model that was trained on floats, refused."""
    floats = pictures().batch('train', 0, TASKS)
    whole = floats._replace(inputa=np.uint8(255 * floats.inputa), inputb=np.uint8(floats.inputb))
    whole = whole._replace(labela=whole.labela > 0)  # booleans are numbers
    x, y = whole.inputa[0], whole.labela[0].argmax(-1)
    for batch, kind in (floats, 'float'), (whole, 'uint8'):
        model = of_pictures()
        model.compile()
        model.fit(batch, verbose=0)
        assert model.maml.trained_on == {kind}
        if kind == 'float':
            with pytest.raises(ValueError, match='support_x is uint8, but the model was trained'):
                model.adapt(x, y)
        else:
            assert_same([*model.adapt(x, y).values()], [*model.adapt(np.float32(x), y).values()])


# Evaluation and single tasks ----------------------------------------------------------------------


@pytest.mark.parametrize('transductive', [True, False])
def test_evaluate_is_that_of_maml(transductive):
    model = of_pictures(updates=3, transductive=transductive)
    model.compile()
    found = model.evaluate(pictures().dataset('val', TASKS), steps=2, verbose=0, return_dict=True)
    batches = [pictures().batch('val', i, TASKS) for i in range(2)]
    results = [model.maml.evaluate(batch, 3, transductive) for batch in batches]
    for objective in ('loss', 'accuracy'):
        before, after = map(np.stack, zip(*(result.of(objective) for result in results)))
        expected = [before.mean(), *after.mean(axis=(0, 2))]
        assert found[objective] == pytest.approx(expected[2], rel=1e-6)
        each = [found[f'{objective}_{i}'] for i in range(4)]
        assert each == pytest.approx(expected, rel=1e-6)
    assert len(found) == 10


@pytest.mark.slow
def test_validation_tasks_are_the_same_every_time():
    model = of_pictures()
    model.compile(keras.optimizers.SGD(0.0))
    tasks, fixed = pictures().dataset('val', TASKS), pictures().batch('val', 0, TASKS)
    named = {'epochs': 2, 'steps_per_epoch': 1, 'verbose': 0}
    for data, steps in ((tasks, 2), (fixed, None)):
        history = model.fit(tasks, validation_data=data, validation_steps=steps, **named).history
        assert history['val_loss'][0] == history['val_loss'][1]
        assert history['loss'][0] != history['loss'][1], 'training tasks go on'


def test_predictions_of_tasks():
    model, batch = of_pictures(updates=4), pictures().batch('val', 0, TASKS)
    model.compile()
    found = model.predict([batch, batch], verbose=0)
    output = model.maml.evaluate(batch, 2).outputsb[-1]
    assert found.shape == (2 * TASKS, 2 * WAYS, WAYS)
    np.testing.assert_allclose(found[:TASKS], tf.nn.softmax(output), rtol=1e-6)
    np.testing.assert_array_equal(found[:TASKS], found[TASKS:])


def test_one_task():
    model, batch = of_pictures(), pictures().batch('val', 0, 1)
    images, labels = batch.inputa[0].reshape(-1, 3, 3, 1), batch.labela[0].argmax(-1)
    learner = Learner(model.maml)
    weights = model.adapt(images, labels, steps=3)
    expected = learner.adapt(images, labels, steps=3)
    assert_same([*weights.values()], [*expected.values()])
    answers = model.predict_task(batch.inputb[0], weights, images)
    np.testing.assert_array_equal(answers, learner.predict(batch.inputb[0], weights, images))


# Weights as Keras sees them -----------------------------------------------------------------------


def test_weights_are_those_of_maml():
    model = of_pictures()
    assert model.count_params() == 4 * 4 + 4 + 2 * 4 + 16 * WAYS + WAYS
    assert len(model.trainable_weights) == 6 and len(model.layers) == 2
    assert [weight.shape for weight in model.theta.weights] == [
        value.shape for value in model.maml.weights.values()
    ]
    assert_same(model.get_weights(), values(model.maml))
    model.set_weights([value + 1 for value in values(model.maml)])
    assert_same(model.get_weights(), values(model.maml))
    model.maml.parameters[0].assign_add(tf.ones_like(model.maml.parameters[0]))
    assert_same(model.get_weights(), values(model.maml))
    printed = []
    model.summary(print_fn=printed.append)
    assert re.search('theta.*54', ''.join(printed)) and 'Total params: 62' in ''.join(printed)


@pytest.mark.slow
def test_saved_weights_go_on_as_if_nothing_had_happened(tmp_path):
    """Adam's state comes with them."""
    path = tmp_path / 'model.weights.h5'
    model, tasks = of_pictures(), pictures().dataset('train', TASKS)
    model.compile()
    model.fit(tasks, steps_per_epoch=2, verbose=0)
    model.save_weights(path)
    kept = values(model.maml)
    other = of_pictures()
    other.compile()
    other.load_weights(path)
    assert_same(kept, values(other.maml))
    for each in (model, other):
        each.fit(tasks, steps_per_epoch=2, verbose=0)
    assert_same(values(model.maml), values(other.maml))
    assert np.any(kept[0] != values(model.maml)[0])


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / 'model.weights.h5'
    MetaModel(of_sinusoids()).save_weights(path)
    with pytest.raises(ValueError):
        of_pictures().load_weights(path)


def test_the_model_itself_is_not_saved(tmp_path):
    with pytest.raises(NotImplementedError, match='save_weights'):
        MetaModel(of_sinusoids()).save(tmp_path / 'model.keras')


# What is refused ----------------------------------------------------------------------------------


def unknown_sizes() -> tf.data.Dataset:
    return in_data_set('train').unbatch().batch(TASKS)


def masked(batch: Batch) -> Batch:
    return batch._replace(inputa=np.ma.masked_less(batch.inputa, 0.1))


def shorter(name: str) -> Batch:
    batch = pictures().batch('train', 0, TASKS)
    return batch._replace(**{name: getattr(batch, name)[:, :-1]})


def narrower(name: str) -> tf.data.Dataset:
    batch = pictures().batch('train', 0, TASKS)
    return tf.data.Dataset.from_tensors(batch._replace(**{name: getattr(batch, name)[..., :-1]}))


REFUSED = {
    'without end': (lambda: pictures().dataset('train', TASKS), 'steps_per_epoch'),
    'unknown sizes': (unknown_sizes, 'drop_remainder'),
    'pairs': (lambda: in_data_set('train').map(lambda *parts: parts[:2]), 'four arrays'),
    'five': (
        lambda: in_data_set('train').map(lambda *parts: (*parts, parts[0])),
        'of type tuple: write dataset.map(lambda a, b, c, d: Batch(inputa=a, labela=b, inputb=c, '
        'labelb=d))',
    ),
    'other names': (lambda: {'inputa': 0, 'a': 0}, 'but the names are inputa, a: write Batch('),
    'another order': (
        lambda: tuple(pictures().batch('train', 0, TASKS))[::-1],
        'the network takes',
    ),
    'an order that sizes do not tell': (
        lambda: tuple(sinusoids().batch('train', 0, TASKS)),
        'write Batch(inputa=support_x, labela=support_y, inputb=query_x, labelb=query_y)',
    ),
    'an array': (lambda: np.zeros((4, 2, 9)), 'type ndarray: write Batch('),
    'other sizes later': (
        lambda: (pictures().batch('train', 0, tasks) for tasks in (2, 3)),
        'an element of shape (3, 2, 9) where an element of shape (2, 2, 9) was expected',
    ),
    'another type later': (lambda: iter([pictures().batch('val', 0, 2), 5]), 'but it is of type'),
    'masks': (lambda: masked(pictures().batch('train', 0, TASKS)), 'inputa must be real numbers'),
    'labels too few': (lambda: shorter('labela'), 'inputa has 2 examples per task, but labela has'),
    'queries too small': (lambda: narrower('inputb'), 'inputa has 9 values per example, but'),
    'a source': (pictures, 'dataset(split, num_tasks)'),
    'nothing': (lambda: iter([]), 'list or generator'),
    'of another network': (lambda: [sinusoids().batch('train', 0, TASKS)], 'network takes'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_tasks(name):
    make, words = REFUSED[name]
    model = of_pictures()
    model.compile()
    with pytest.raises(ValueError, match=re.escape(words)):
        model.fit(make(), verbose=0)


@pytest.mark.parametrize(
    'call',
    [
        lambda model, x, y: model.fit(x, y),
        lambda model, x, y: model.fit(x, batch_size=2),
        lambda model, x, y: model.evaluate(x, y),
        lambda model, x, y: model.train_on_batch(x, y),
        lambda model, x, y: model.test_on_batch(x, y),
        lambda model, x, y: model.train_on_batch(x, class_weight={0: 2.0}),
    ],
)
def test_examples_and_labels_in_place_of_tasks(call):
    model, batch = of_pictures(), pictures().batch('train', 0, TASKS)
    model.compile()
    with pytest.raises(ValueError, match=r'tuple \(support_x, support_y, query_x, query_y\), and'):
        call(model, batch, batch.labela)
    with pytest.raises(ValueError, match='but it is of type'):
        model.predict_on_batch(batch.inputa)


@pytest.mark.parametrize(
    'call, words',
    [
        (
            lambda: FastMAML(None, mean_squared_error, updte_lr=0.1),
            'did you mean update_lr?',
        ),
        (
            lambda: MetaModel(None, mean_squared_error, updte_lr=0.1),
            'did you mean update_lr?',
        ),
        (lambda: MetaModel(of_sinusoids(), update=2), 'did you mean updates?'),
        (
            lambda: make_model('sinusoid', nrm='None'),
            'no argument nrm; did you mean norm?',
        ),
        (lambda: make_model('sinusoid', zzz=1), 'zzz; there are adapt, baseline, channels'),
        (lambda: Learner.load('.', chekpoint=1), 'did you mean checkpoint?'),
        (lambda: Learner(of_sinusoids()).adapt(1, 2, step=3), 'did you mean steps?'),
        (lambda: MetaModel(of_sinusoids()).adapt(1, 2, step=3), 'did you mean steps?'),
        (lambda: MetaModel(of_sinusoids()).compile(optimiser='adam'), 'did you mean optimizer?'),
        (lambda: MetaModel(of_sinusoids()).fit([], epoch=3), 'did you mean epochs?'),
    ],
)
def test_names_of_arguments(call, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        call()


def test_refused_validation_without_end():
    model, tasks = of_pictures(), pictures().dataset('val', TASKS)
    model.compile()
    with pytest.raises(ValueError, match='validation_steps'):
        model.fit(tasks, steps_per_epoch=1, validation_data=tasks, verbose=0)
    with pytest.raises(ValueError, match='by steps how many'):
        model.evaluate(tasks)
    with pytest.raises(ValueError, match='by steps how many'):
        model.predict(tasks)


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: MetaModel(of_sinusoids(), mean_squared_error), 'already'),
        (lambda: MetaModel(of_sinusoids(), update_lr=0.1), 'already'),
        (lambda: MetaModel(classifier(), cross_entropy(1)), 'update_lr'),
        (lambda: MetaModel(classifier(), update_lr=0.1), 'loss'),
        (lambda: MetaModel(FullyConnected(1, (5,), 1), mean_squared_error, update_lr=-1), 'lr'),
        (
            lambda: MetaModel(FastMAML(FullyConnected(1, (5,), 1), mean_squared_error, 0.1, 0)),
            'num_updates',
        ),
        (lambda: MetaModel(of_sinusoids()).compile('adam', loss='mse'), 'no loss'),
        (lambda: MetaModel(of_sinusoids()).compile(metrics=['accuracy']), 'no metrics'),
    ],
)
def test_refused_models(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_keras_model_as_it_is():
    model = MetaModel(classifier(), cross_entropy(1), update_lr=0.1, compiled=False)
    assert isinstance(model.maml.network, KerasNetwork) and len(model.theta.weights) == 6
    batch = pictures().batch('train', 0, TASKS)
    assert isinstance(batch, Batch) and model.predict(batch, verbose=0).shape == (4, 4, 2)


# A folder of the user's, and notebooks ------------------------------------------------------------


def in_folder(folder, code: str) -> subprocess.CompletedProcess:
    """Python in a folder with a utils.py and a main.py of the user's."""
    for name in ('utils', 'main'):
        (folder / f'{name}.py').write_text('raise ImportError("this one is the user\'s own")\n')
    line, env = [sys.executable, '-B', '-c', code], os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_a_model_in_the_user_s_folder(tmp_path):
    Learner(of_sinusoids()).save(tmp_path / 'saved')
    code = 'import fewshot; from maml import MAML; from fewshot import FastMAML, Learner; '
    network = 'fewshot.FullyConnected(1, (5,), 1)'
    done = in_folder(tmp_path, f'{code}print(Learner.load("saved", network={network}).checkpoint)')
    assert (done.stdout, done.returncode) == ('saved/model0\n', 0), done.stderr


def test_a_file_of_the_user_s_with_a_name_of_ours(tmp_path):
    (tmp_path / 'data_generator.py').touch()
    done = in_folder(tmp_path, 'from fewshot import Learner')
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and str(tmp_path / 'data_generator.py') in sentence
    assert sentence.endswith('that fewshot needs: give it another name')


def test_flags_of_a_second_run_in_one_process():
    """Those of the first do not count."""
    found = flags.FlagValues()
    for line in ['--num_updates=3', '--noresume'], []:
        define_flags(found)
        found(['main.py', *line])
    assert found.num_updates == 1 and found.resume
    assert found['num_updates'].using_default_value


RUNS = """
from IPython.testing.globalipapp import start_ipython
shell = start_ipython()
shell.run_cell('import tensorflow; tensorflow.ones(3);')
for more in '--num_updates=2', '', '--train=False --test_tasks=10':
    shell.run_line_magic('run', f'{line} {more}')
import sys; print('utils' in sys.modules)
"""


@pytest.mark.slow
def test_main_runs_again_in_a_notebook(tmp_path):
    """With TensorFlow in use before, and a `utils` that is the user's."""
    pytest.importorskip('IPython')
    logs = tmp_path / 'logs'
    line = f'{ROOT}/main.py --norm=None --metatrain_iterations=1 --log=False --logdir={logs}'
    done = in_folder(tmp_path, f'line = {line!r}\n{RUNS}')
    folders = sorted(folder.name for folder in logs.iterdir())
    assert [re.search(r'numstep\d', name)[0] for name in folders] == ['numstep1', 'numstep2']
    assert '10 validation tasks' in done.stdout and 'Error' not in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1] == 'False'


@pytest.mark.slow
def test_notebook(graph):
    for name in ('nbclient', 'ipykernel', 'matplotlib'):
        pytest.importorskip(name, reason=f"the notebook needs {name}: pip install -e '.[notebook]'")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) <= 15
    resources = {'metadata': {'path': str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    text = ''.join(output.get('text', '') for output in outputs)
    printed = {name: float(value) for name, value in re.findall(r'^(.+): ([-\d.]+)$', text, re.M)}
    assert printed['accuracy_0 on Armenian letters'] < 0.4
    assert printed['accuracy_1 on Armenian letters'] > 0.7
    exact, wrong = printed['difference'], printed['nested tapes']
    assert printed['this project'] == pytest.approx(exact, rel=1e-5)
    assert abs(wrong - exact) > 0.1 * abs(exact), 'the trap'
    assert len([output for output in outputs if 'image/png' in output.get('data', {})]) == 4
