"""The inner loops that grew from MAML's: what they change, and how; flags from training to export.

Meta-gradients are compared with central differences in float64, uncompiled; what the flags of
main.py do, from one run to its evaluation and export.
"""

import json
import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import (
    ROOT,
    assert_refused,
    command,
    in_process,
    make_omniglot,
    parsed,
    run,
    settle,
    succeeded,
)
from test_maml import Linear, exact_model, points, random_batch, running_eagerly
from test_own_models import trained_twice
from test_scale_out import assert_close, two_devices
from test_trust import assert_same_run
from test_use import QUERY, SUPPORT

from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model
from fewshot.networks.inner_loops import HeadOnly, Partly
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.outer_losses import OuterLossSchedule
from fewshot.networks.paper_networks import Convolutional, FullyConnected
from fewshot.runs import trainer
from fewshot.runs.checkpoints import read_run_state, write_checkpoint
from fewshot.runs.flags import INNER_LOOPS, run_name
from fewshot.runs.summaries import read_scalars
from fewshot.use.fit import MetaModel
from fewshot.use.learner import Learner
from maml import InnerLoop, cross_entropy, mean_squared_error, repeated
from scripts.model import classify, export, publish

PLUS_PLUS = dict(
    learn_lr='layer_step',
    loss_steps='all',
    loss_steps_iterations=4,
    first_order_iterations=0,
    norm_steps=True,
)


# The meta-gradient against finite differences -----------------------------------------------------


def fully_connected() -> FullyConnected:
    """Smooth, so that no difference meets a kink."""
    return FullyConnected(6, (5, 4), 3, 'batch_norm', tf.tanh, 'glorot')


def shallow() -> FullyConnected:
    return FullyConnected(6, (4,), 3, 'batch_norm', tf.tanh, 'glorot')


def convolutional() -> Convolutional:
    return Convolutional(11, 2, 3, 3)


NETWORKS = {'fully_connected': fully_connected, 'convolutional': convolutional}


def spread_rates(model):
    """Gives step sizes, and the normalisation parameters of updates, values of their own."""
    random = np.random.default_rng(5)
    for rate in model.rates.values():
        rate.assign(0.05 * (1 + 0.5 * random.random(rate.shape)))


def outer_loss(model, batch) -> float:
    """By the losses that an evaluation tells, weighed here."""
    losses = np.mean(model.evaluate(batch, model.num_updates).losses2, axis=1)
    if model.schedule.loss_steps == 'last':
        return float(losses[-1])
    done = model.metatrain_optimizer.iterations
    weights = model.schedule.weights(done, len(losses), tf.float64)
    return float(np.dot(weights, losses))


def difference(model, batch, group: dict, direction: dict, step: float) -> float:
    """Central, with all variables of a group moved along the direction together."""
    values, losses = {name: variable.numpy() for name, variable in group.items()}, []
    for sign in (1, -1):
        for name, variable in group.items():
            variable.assign(values[name] + sign * step * direction[name])
        losses.append(outer_loss(model, batch))
    for name, variable in group.items():
        variable.assign(values[name])
    return (losses[0] - losses[1]) / (2 * step)


def named_gradient(model, batch) -> dict[str, np.ndarray]:
    values = model.meta_gradient(batch)[1]
    return dict(zip(model.named_parameters, map(np.array, values), strict=True))


def assert_exact(model, batch, gradients: dict[str, np.ndarray]):
    """By weights, by what is not adapted, and by step sizes, along a random direction of each."""
    random, named = np.random.default_rng(7), model.named_parameters
    for kind, own in ((kind, own) for kind, own in model.groups.items() if own):
        group = {name: named[name] for name in named if any(named[name] is v for v in own.values())}
        direction = {name: random.standard_normal(group[name].shape) for name in group}
        slope = sum(np.sum(gradients[name] * direction[name]) for name in group)
        # The shorter steps are for a ReLU's kink that the longest happens to cross.
        errors = (
            abs(slope - difference(model, batch, group, direction, step))
            for step in (1e-5, 1e-6, 1e-7)
        )
        size = np.sqrt(sum(np.sum(gradients[name] ** 2) for name in group))
        assert size > 1e-4 and any(error <= 1e-6 * size for error in errors), kind


SETTINGS = {
    'head': dict(adapt='head'),
    'body': dict(adapt='body'),
    'layer': dict(learn_lr='layer'),
    'layer_step': dict(learn_lr='layer_step'),
    'weight': dict(learn_lr='weight'),
    'loss_steps': dict(loss_steps='all'),
    'loss_steps_annealed': dict(loss_steps='all', loss_steps_iterations=4),
    'norm_steps': dict(norm_steps=True),
    'plus_plus': PLUS_PLUS,
    'anil_sgd': dict(adapt='head', learn_lr='weight', loss_steps='all'),
    'boil_plus': dict(PLUS_PLUS, adapt='body'),
}

QUICK = {  # the others say little more
    'fully_connected': {*SETTINGS} - {'loss_steps', 'anil_sgd', 'boil_plus'},
    'convolutional': {'head', 'plus_plus'},
}
CASES = [
    pytest.param(make, settings, id=f'{kind}-{name}', marks=pytest.mark.slow if slow else ())
    for kind, make in NETWORKS.items()
    for name, settings in SETTINGS.items()
    for slow in [name not in QUICK[kind]]
]


@pytest.mark.parametrize('make, settings', CASES)
def test_meta_gradient_equals_differences(make, settings):
    """By θ, by α and by the normalisation of each update; first order is another."""
    batch = random_batch(make(), shots=1, queries=1)
    with running_eagerly():
        model = exact_model(make(), **settings)
        spread_rates(model)
        model.metatrain_optimizer.iterations.assign(1)
        gradients = named_gradient(model, batch)
        assert_exact(model, batch, gradients)
        other = copy_of_all(model, make(), stop_grad=True, **settings)
        assert distance(named_gradient(other, batch), gradients) > 1e-3


def copy_of_all(model, network, **settings):
    other = exact_model(network, perturbed=False, **settings)
    for name, variable in other.named_parameters.items():
        variable.assign(model.named_parameters[name])
    other.metatrain_optimizer.iterations.assign(model.metatrain_optimizer.iterations)
    return other


def distance(one: dict, other: dict) -> float:
    squares = sum(np.sum((one[name] - other[name]) ** 2) for name in other)
    return np.sqrt(squares / sum(np.sum(value**2) for value in other.values()))


# By hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stop_grad', [False, True])
def test_meta_sgd_by_hand(stop_grad):
    """f(x) = w x + b + c with w = 2, b = 1, c = 0; an α for w, 1/8, and one for b, 1/4.

    Support (1, 1), query (3, 3). The support error is e1 = 2 and its square's gradient for (w, b)
    is 2 e1 (x1, 1) = (4, 4). So w' = 2 - 4/8 = 3/2, b' = 1 - 4/4 = 0, and the query error is
    e2 = 9/2 - 3 = 3/2, the outer loss 9/4. Its derivatives for (w', b', c) are 2 e2 (3, 1, 1) =
    (9, 3, 3), and for the step sizes -4 times those of w' and b': (-36, -12).

    e1 has the derivatives (1, 1, 1), so w' has those of (1, 0, 0) - 2/8 (1, 1, 1), b' those of
    (0, 1, 0) - 2/4 (1, 1, 1), and by the chain rule the outer loss has
    9 (3/4, -1/4, -1/4) + 3 (-1/2, 1/2, -1/2) + (0, 0, 3) = (21/4, -3/4, -3/4);
    at first order, where the gradients are constants, (9, 3, 3).
    """
    model = exact_model(
        Linear(), mean_squared_error, False, num_updates=1, stop_grad=stop_grad, learn_lr='weight'
    )
    for name, value in dict(w=2, b=1, c=0, **{'rates/w': 1 / 8, 'rates/b': 1 / 4}).items():
        variable = model.named_parameters[name]
        variable.assign(tf.fill(variable.shape, tf.cast(value, tf.float64)))
    loss, gradients = model.meta_gradient(points((1, 1, 3, 3)))
    assert loss == 9 / 4
    of_weights = (9, 3, 3) if stop_grad else (21 / 4, -3 / 4, -3 / 4)
    found = [gradient.numpy().item() for gradient in gradients]
    assert found == [*of_weights, -36, -12]


def test_weights_of_losses():
    """As in MAML++'s program, with outer steps for its epochs: from 1/5 each to 0.03/5."""

    def weights(done, iterations, updates=5):
        schedule = OuterLossSchedule('all', iterations)
        found = schedule.weights(tf.constant(done, tf.int64), updates, tf.float64)
        return [float(weight) for weight in found]

    for done in (0, 3, 7, 10):
        decay = done / 5 / 10
        others = max(1 / 5 - decay, 0.03 / 5)
        last = min(1 / 5 + 4 * decay, 1 - 4 * 0.03 / 5)
        np.testing.assert_allclose(weights(done, 10), [others] * 4 + [last], rtol=1e-14)
    np.testing.assert_allclose(weights(1000, 0), [1 / 5] * 5)  # never annealed
    np.testing.assert_allclose(weights(1, 10, 2), [0.9 / 2, 1.1 / 2])


def test_phases():
    """Of both annealings, in either order; one if there is none."""

    def phases(*settings) -> list[tuple]:
        schedule = OuterLossSchedule(*settings)
        starts = schedule.starts()
        return [
            (start, schedule.first_order(start), schedule.all_losses(start)) for start in starts
        ]

    assert phases('last', 0, 0) == [(0, False, False)]
    assert phases('all', 0, 0) == [(0, False, True)]
    assert phases('last', 0, 3) == [(0, True, False), (3, False, False)]
    assert phases('all', 5, 3) == [(0, True, True), (3, False, True), (5, False, False)]
    assert phases('all', 3, 5) == [(0, True, True), (3, True, False), (5, False, False)]
    assert phases('all', 4, 4) == [(0, True, True), (4, False, False)]


# Phases of the outer loop -------------------------------------------------------------------------


@pytest.mark.slow
def test_phases_are_those_of_models_that_stay_in_them():
    """First order and all losses until the second step, then neither; nothing is traced again."""
    batch = random_batch(shallow(), shots=1, queries=1)
    own = dict(loss_steps='all', loss_steps_iterations=2)
    model = exact_model(shallow(), first_order_iterations=1, **own)
    others = [
        exact_model(shallow(), stop_grad=True, **own),
        exact_model(shallow(), **own),
        exact_model(shallow()),
    ]
    gradient = tf.function(model.meta_gradient, autograph=False)
    for done, other in enumerate(others):
        for each in (model, other):
            each.metatrain_optimizer.iterations.assign(done)
        loss, gradients = gradient(batch)
        with running_eagerly():
            expected, values = other.meta_gradient(batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        for one, value in zip(gradients, values, strict=True):
            np.testing.assert_allclose(one, value, rtol=1e-9, atol=1e-12)
    assert gradient.experimental_get_tracing_count() == 1


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_phases_in_one_program(compiled):
    """Many steps that are one program equal single ones."""
    settings = dict(num_updates=2, update_lr=0.1, first_order_iterations=2, loss_steps='all')
    settings |= dict(loss_steps_iterations=3, learn_lr='layer_step', norm_steps=True)
    made = [FastMAML(shallow(), cross_entropy(1), compiled=compiled, **settings) for _ in range(2)]
    batch = random_batch(shallow(), shots=1, queries=1, dtype=tf.float32)
    batches = type(batch)(*(tf.stack([values] * 5) for values in batch))
    made[0].steps(batches, 0, 5)
    with running_eagerly():
        for _ in range(5):
            made[1].metatrain_step(batch)
    one, other = (model.named_parameters for model in made)
    for name in one.keys() - {'b1'}:  # whose gradient is rounding error, as normalisation follows
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_cosine():
    """β falls to its end over meta-training."""
    model = make_model(
        'sinusoid',
        meta_lr_decay='cosine',
        meta_lr=0.1,
        meta_lr_end=0.02,
        metatrain_iterations=10,
        norm='None',
        compiled=False,
    )
    found = []
    for done in (0, 5, 10, 20):
        model.metatrain_optimizer.iterations.assign(done)
        found.append(float(model.metatrain_optimizer.learning_rate))
    np.testing.assert_allclose(found, [0.1, 0.06, 0.02, 0.02], rtol=1e-6)


# What the inner loop changes ----------------------------------------------------------------------


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('make', NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize('adapt', ['head', 'body'])
def test_what_is_not_adapted_stays(make, adapt):
    """Adaptation returns the others; θ begins where MAML's does, whatever is adapted."""
    whole, part = exact_model(make()), exact_model(make(), adapt=adapt)
    assert [*whole.named_parameters] == [*part.named_parameters]
    for one, other in zip(whole.parameters, part.parameters):
        np.testing.assert_array_equal(one, other)
    last = [*make().parameters][-2:]
    assert ([*part.weights] == last) == (adapt == 'head')
    batch = random_batch(make())
    learner = Learner(part)
    classes = batch.labela.numpy().argmax(-1)
    weights = learner.adapt(batch.inputa, classes, 2)
    assert weights.keys() == part.weights.keys()
    results = part.evaluate(batch, 2)
    answers = learner.predict(batch.inputb, weights)
    np.testing.assert_allclose(answers, tf.nn.softmax(results.outputsb[-1]), rtol=1e-9)
    losses = learner.task_loss(batch.inputb, batch.labelb.numpy().argmax(-1), weights)
    np.testing.assert_allclose(losses, results.losses2[-1] / 3, rtol=1e-9)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('make', NETWORKS.values(), ids=NETWORKS.keys())
def test_features_that_are_prepared_once_are_the_networks(make):
    """As without `features`, where the whole network is computed in every update."""

    class Whole(type(make())):
        def __call__(self, *arguments):
            return super().__call__(*arguments)

    batch, other = random_batch(make(), shots=1, queries=1), make()
    other.__class__ = Whole
    once, often = (exact_model(network, adapt='head') for network in (make(), other))
    assert type(once.network) is HeadOnly and type(often.network) is Partly
    for transductive in (True, False):
        results = (model.evaluate(batch, 3, transductive) for model in (once, often))
        for one, value in zip(*results):
            np.testing.assert_allclose(one, value, rtol=1e-9, atol=1e-12)
    for one, value in zip(named_gradient(once, batch).values(), often.meta_gradient(batch)[1]):
        np.testing.assert_allclose(one, value, rtol=1e-9, atol=1e-12)


def keras_model() -> keras.Model:
    policy = keras.config.dtype_policy().name
    keras.config.set_dtype_policy('float64')
    try:
        layers = [keras.layers.Dense(4, 'tanh') for _ in range(2)]
        layers += [keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        return keras.Sequential([keras.Input((6,)), *layers])
    finally:
        keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize(
    'settings',
    [
        dict(adapt='head'),
        dict(adapt='body', learn_lr='layer'),
        dict(learn_lr='layer_step', loss_steps='all'),
        dict(learn_lr='weight'),
        dict(norm_steps=True, learn_lr='layer'),
    ],
)
@pytest.mark.usefixtures('eager')
def test_keras_models(settings):
    """Exact for a Keras model, too; its last layer is the head, and a layer's variables share α."""
    keras.utils.set_random_seed(0)
    own = (lambda path: 'dense' in path) if 'norm_steps' in settings else None
    model = exact_model(KerasNetwork(keras_model(), own), **settings)
    spread_rates(model)
    batch = random_batch(fully_connected(), shots=1, queries=1)
    assert_exact(model, batch, named_gradient(model, batch))
    if settings.get('adapt') == 'head':
        assert [*model.weights] == ['6/dense/kernel', '7/dense/bias']
    if settings.get('learn_lr') == 'layer' and 'adapt' in settings:
        assert [*model.rates] == ['0/dense', '2/dense', '4/batch_normalization']


# Step sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind, shapes',
    [
        ('layer', {'layer1': (), 'layer2': (), 'layer3': ()}),
        ('layer_step', {'layer1': (2,), 'layer2': (2,), 'layer3': (2,)}),
        ('weight', {'w1': (6, 5), 'b1': (5,), 'w2': (5, 4), 'b2': (4,), 'w3': (4, 3), 'b3': (3,)}),
    ],
)
def test_step_sizes_begin_with_update_lr(kind, shapes):
    model = exact_model(fully_connected(), perturbed=False, learn_lr=kind)
    assert {name: tuple(rate.shape) for name, rate in model.rates.items()} == shapes
    assert all((rate.numpy() == 0.05).all() for rate in model.rates.values())
    plain = exact_model(fully_connected(), perturbed=False)
    batch = random_batch(fully_connected())
    with running_eagerly():
        for one, other in zip(model.evaluate(batch, 3), plain.evaluate(batch, 3)):
            np.testing.assert_allclose(one, other, rtol=1e-12)
        np.testing.assert_allclose(model.metatrain_step(batch), plain.metatrain_step(batch))
    moved = {name for name, rate in model.rates.items() if (rate.numpy() != 0.05).any()}
    assert moved >= {name for name in model.rates if name[0] != 'b'}  # that of a bias may not count


@pytest.mark.usefixtures('eager')
def test_more_updates_than_step_sizes_use_the_last():
    """And the last normalisation parameters; step by step as at once; by a given α all alike."""
    model = exact_model(fully_connected(), learn_lr='layer_step', norm_steps=True)
    spread_rates(model)
    assert {value.shape[0] for value in model.norms.values()} == {2}
    batch, learner = random_batch(fully_connected(), shots=2), Learner(model)
    classes = batch.labela.numpy().argmax(-1)
    at_once = learner.adapt(batch.inputa, classes, 4)
    weights, results = None, model.evaluate(batch, 4)
    for done in range(4):
        weights = learner.adapt(batch.inputa, classes, 1, weights=weights, done=done)
        answers = learner.predict(batch.inputb, weights, done=done + 1)
        np.testing.assert_allclose(answers, tf.nn.softmax(results.outputsb[done]), rtol=1e-9)
    for name, value in at_once.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-12)
    by_hand = repeated(model.weights, 2)
    for step in range(4):
        norms = {name: value[min(step, 1)] for name, value in model.norms.items()}
        alpha = {name: model.rates[f'layer{name[1]}'][min(step, 1)] for name in model.weights}
        by_hand = model.maml.update(by_hand, norms, alpha, batch.inputa, batch.labela)
    for name, value in at_once.items():
        np.testing.assert_allclose(by_hand[name], value, rtol=1e-12)
    given = learner.adapt(batch.inputa, classes, 1, lr=0.3)
    norms = {name: value[0] for name, value in model.norms.items()}
    start = repeated(model.weights, 2)
    expected = model.maml.update(start, norms, 0.3, batch.inputa, batch.labela)
    np.testing.assert_allclose(given['w1'], expected['w1'], rtol=1e-12)


def test_step_sizes_mean_the_same_for_any_number_of_examples():
    """Three times the same examples are as one time, as with a fixed α."""
    model = exact_model(FullyConnected(6, (5,), 3), learn_lr='weight')
    spread_rates(model)
    batch, learner = random_batch(fully_connected(), shots=2), Learner(model)
    x, y = batch.inputa.numpy(), batch.labela.numpy().argmax(-1)
    once = learner.adapt(x, y)
    thrice = learner.adapt(np.tile(x, (1, 3, 1)), np.tile(y, (1, 3)))
    for name, value in once.items():
        np.testing.assert_allclose(thrice[name], value, rtol=1e-9)


class Damped(InnerLoop):
    """A rule of one's own, with a parameter that the outer loop learns."""

    parameters = {'damping': ('ones', ())}

    def rates(self, values, step):
        return values['damping'] / (1 + step)

    def step(self, theta, gradients, alpha):
        gradients = {name: tf.tanh(gradient) for name, gradient in gradients.items()}
        return super().step(theta, gradients, 0.1 * alpha)


@pytest.mark.usefixtures('eager')
def test_a_rule_of_ones_own(tmp_path):
    """The same door: exact, saved, and loaded with the rule given again."""
    model = exact_model(fully_connected(), inner_loop=Damped())
    batch = random_batch(fully_connected(), shots=1, queries=1)
    assert_exact(model, batch, named_gradient(model, batch))
    model = FastMAML(fully_connected(), cross_entropy(2), 0.1, inner_loop=Damped(), compiled=False)
    Learner(model).save(tmp_path)
    assert read_run_state(f'{tmp_path}/model0')['flags']['learn_lr'] == 'Damped'
    with pytest.raises(ValueError, match='an inner loop of its own: give it as inner_loop='):
        Learner.load(tmp_path, network=fully_connected())
    loaded = Learner.load(tmp_path, network=fully_connected(), inner_loop=Damped())
    model.rates['damping'].assign(2)
    assert loaded.model.rates['damping'] == 1


# The defaults -------------------------------------------------------------------------------------


def test_defaults_take_none_of_it(tmp_path):
    """The same program as with the defaults given, without a choice in it; no new keys."""
    given = dict(adapt='all', learn_lr='none', loss_steps='last', loss_steps_iterations=0)
    given |= dict(first_order_iterations=0, norm_steps=False)
    batch, programs = random_batch(shallow()), []
    for settings in ({}, given, dict(first_order_iterations=1)):
        model = exact_model(shallow(), **settings)
        graph = model.metatrain_step.get_concrete_function(batch).graph.as_graph_def()
        functions = [node.op for f in graph.library.function for node in f.node_def]
        programs.append(sorted([*functions, *(node.op for node in graph.node)]))
        if not settings:
            model.checkpoint.write(f'{tmp_path}/default')
    assert programs[0] == programs[1] != programs[2]
    chosen = {'If', 'StatelessIf', 'Case', 'StatelessCase'}
    assert not chosen & {*programs[0]} and chosen & {*programs[2]}
    keys = tf.train.load_checkpoint(f'{tmp_path}/default').get_variable_to_shape_map()
    groups = {key.split('/')[0] for key in keys}
    assert groups == {
        *('weights', 'norms', 'metatrain_optimizer', '_CHECKPOINTABLE_OBJECT_GRAPH'),
    }


def test_network_trained_whole_is_read_by_part(tmp_path):
    """Weights have the same names, and Adam's state the same order, whatever is adapted."""
    whole = exact_model(convolutional())
    with running_eagerly():
        whole.metatrain_step(random_batch(convolutional(), shots=1, queries=1))
    path = whole.checkpoint.write(f'{tmp_path}/model')
    for adapt in ('head', 'body'):
        part = exact_model(convolutional(), adapt=adapt, seed=1)
        assert part.restore(path)
        for name, variable in whole.named_parameters.items():
            np.testing.assert_array_equal(part.named_parameters[name], variable)
        for one, other in zip(
            part.metatrain_optimizer.variables, whole.metatrain_optimizer.variables
        ):
            np.testing.assert_array_equal(one, other)


# main.py ------------------------------------------------------------------------------------------

FLAGS = [
    *('--datasource=omniglot', '--num_classes=2', '--update_batch_size=1', '--num_updates=2'),
    *('--num_filters=4', '--meta_batch_size=2', '--update_lr=0.1', '--validation_tasks=2'),
]
VARIANTS = {
    'anil': ['--adapt=head', '--learn_lr=weight'],
    'plus_plus': [
        *('--adapt=body', '--learn_lr=layer_step', '--loss_steps=all', '--norm_steps'),
        *('--loss_steps_iterations=1', '--first_order_iterations=2', '--conv=False'),
        *('--meta_lr_decay=cosine', '--meta_lr_end=0.0001'),
    ],
}
NAME = 'cls_2.mbs_2.ubs_1.numstep2.updatelr0.1hidden4batchnorm'
SUFFIXES = {
    'anil': '.head.lr_weight',
    'plus_plus': '.body.lr_layer_step.losses_all1.first2.normsteps.cosine0.0001',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    return f'--data_dir={make_omniglot(tmp_path_factory.mktemp("omniglot"))}'


@pytest.fixture
def often(monkeypatch):
    """Everything that happens at intervals happens every few iterations."""
    settle(monkeypatch, intervals=dict(save=1, summary=4, validation=4), printing=4)


@pytest.mark.slow
@pytest.mark.usefixtures('eager', 'often')
@pytest.mark.parametrize('variant', [pytest.param('anil', marks=pytest.mark.slow), 'plus_plus'])
def test_from_training_to_export(tmp_path, data, monkeypatch, variant):
    """All flags: stop, continue to the bit, evaluate, load, classify, export, publish."""
    flags = [*FLAGS, data, *VARIANTS[variant], '--metatrain_iterations=3']
    once, folder = trained_twice(tmp_path, monkeypatch, flags, stop=2)
    assert_same_run(once, folder, last=2)
    assert folder.name == NAME + SUFFIXES[variant]
    check_summaries(folder, variant)
    line = [*flags, f'--logdir={tmp_path}/twice', '--train=False', '--test_set=True']
    outcome = succeeded(run(*line, '--transductive=False'))
    of_run = ['--train=False', '--test_set=True', '--transductive=False', data]
    again = succeeded(run(f'--run={folder}', *of_run))
    assert outcome.lines[-5:] == again.lines[-5:]
    learner = Learner.load(folder)
    restored = {name: v.numpy() for name, v in learner.model.named_parameters.items()}
    assert len(restored) == len(learner.model.weights | learner.model.norms) + len(
        learner.model.rates
    )
    assert len(classified(folder, tmp_path)['losses']) == 4
    check_export(learner, folder, tmp_path / 'model')
    succeeded(in_process(publish.main, [str(folder), str(tmp_path / 'kept')]))
    kept = Learner.load(tmp_path / 'kept' / folder.name).model
    for name, value in restored.items():
        np.testing.assert_array_equal(kept.named_parameters[name], value)


def classified(folder: Path, beside: Path, *more: str) -> dict:
    """What classify.py answers after three updates."""
    for label in ('Armenian', 'Malay'):
        shutil.copytree(SUPPORT / label, beside / 'support' / label)
    arguments = [str(folder), str(beside / 'support'), str(QUERY), '--steps=3', '--json', *more]
    return json.loads(succeeded(in_process(classify.main, arguments)).out)


@pytest.mark.slow
def test_network_of_ones_own(tmp_path, eager, data):
    """A Keras model's head, with a step size for the layer."""
    network = f'--network={ROOT}/tests/networks.py:plain'
    flags = [*FLAGS, data, network, '--adapt=head', '--learn_lr=layer', '--log=False']
    flags += ['--metatrain_iterations=2', f'--logdir={tmp_path}/logs']
    succeeded(run(*flags))
    (folder,) = (tmp_path / 'logs').iterdir()
    assert folder.name == f'{NAME}.plain.head.lr_layer'
    succeeded(run(*flags, '--train=False'))
    assert len(classified(folder, tmp_path, network)['losses']) == 4
    told = in_process(export.main, [str(folder), str(tmp_path / 'model'), network])
    assert 'the learned step sizes' in succeeded(told).out


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_on_two_devices(tmp_path, data, variant):
    """Compiled; the same weights, step sizes and Adam's state as on one."""
    flags = [*FLAGS, data, *VARIANTS[variant], '--metatrain_iterations=6', '--log=False']
    # A norm over two examples would make much of rounding; one over 16 features does not.
    flags += ['--meta_batch_size=4', '--num_filters=16', '--norm=layer_norm']
    succeeded(command('main.py', *flags, f'--logdir={tmp_path}/one'))
    mirrored = two_devices(*flags, f'--logdir={tmp_path}/mirrored')
    assert mirrored.returncode == 0, mirrored.stderr[-2000:]
    assert_close(tmp_path / 'one', tmp_path / 'mirrored', 1e-4)


def check_summaries(folder: Path, variant: str):
    """Step sizes: a scalar per layer and update, or the mean of those of a layer's weights."""
    tags = {tag for tag in read_scalars(folder) if tag.startswith('update_lr/')}
    if variant == 'anil':
        assert tags == {'update_lr/w5', 'update_lr/b5'}
    else:
        layers = range(1, 5)  # the body's
        assert tags == {f'update_lr/layer{i}__step_{j}' for i in layers for j in (1, 2)}


def check_export(learner: Learner, folder: Path, out: Path):
    """The SavedModel answers as the learner does."""
    told = succeeded(in_process(export.main, [str(folder), str(out), '--steps=2'])).out
    assert '2 steps with the learned step sizes' in told
    random = np.random.default_rng(1)
    x, query = (random.random((2, n, 28, 28, 1), np.float32) for n in (4, 3))
    y = np.tile([0, 1], (2, 2))
    served = tf.saved_model.load(str(out)).signatures['adapt_and_predict']
    given = dict(support_images=x, support_labels=y, query_images=query)
    found = served(**{name: tf.constant(value) for name, value in given.items()})
    weights = learner.adapt(x, y, 2)
    expected = learner.predict(query, weights, x, done=2)
    np.testing.assert_allclose(found['probabilities'], expected, atol=1e-5)


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--learn_lr=layers', 'layer_step'),
        ('--loss_steps_iterations=5', 'needs --loss_steps=all'),
        ('--stop_grad --first_order_iterations=5', '--stop_grad is of first order throughout'),
        ('--norm_steps --adapt=head', 'give one of the two'),
        ('--norm_steps --norm=None', 'needs a normalisation'),
        ('--meta_lr_end=0.0001', 'needs --meta_lr_decay=cosine'),
        ('--meta_lr_decay=cosine --meta_lr_end=0.1', 'must not be above --meta_lr=0.001'),
        ('--meta_lr_decay=cosine --meta_lr_end=-1', 'a step size of 0 or more'),
        ('--meta_lr_decay=cosine --pretrain_iterations=3', 'over meta-training alone'),
    ],
)
def test_flags_refused(tmp_path, flags, words):
    try:
        outcome = run(*flags.split(), f'--logdir={tmp_path}')
    except Exception as error:  # absl's
        assert words in str(error)
        return
    assert_refused(outcome, 'main.py: ', words)
    assert not [*tmp_path.iterdir()]


SINUSOID = ['--datasource=sinusoid', '--log=False', '--num_updates=2', '--meta_batch_size=2']


def test_what_a_run_cannot_change(tmp_path, eager):
    """With learned step sizes α is their beginning; with a cosine the end of training is fixed."""
    given = [f'--logdir={tmp_path}', '--norm=layer_norm', *SINUSOID]
    plus = [*given, '--learn_lr=layer_step', '--norm_steps', '--meta_lr_decay=cosine']
    plus += ['--first_order_iterations=1']
    succeeded(run(*plus, '--metatrain_iterations=2'))
    (folder,) = tmp_path.iterdir()
    outcome = run(*plus, '--metatrain_iterations=3')
    assert_refused(outcome, '--metatrain_iterations=2 (now 3)')
    outcome = succeeded(run(*plus, '--metatrain_iterations=2'))
    assert 'β has come to its end' in outcome.out
    for flag, words in {
        '--update_lr=0.5': '--update_lr=0.001 (now 0.5)',
        '--num_updates=3': '--num_updates=2 (now 3)',
        '--learn_lr=none': '--learn_lr=layer_step (now none)',
        '--adapt=head': '--adapt=all (now head)',
    }.items():
        more = ['--norm_steps=False'] if 'adapt' in flag else []
        outcome = run(f'--run={folder}', '--train=False', flag, *more)
        assert_refused(outcome, words, 'no evaluation can change that')
    succeeded(run(f'--run={folder}', '--train=False'))


def test_runs_from_before_the_flags(tmp_path, eager, monkeypatch):
    """They go on, are evaluated and loaded; in another way they do not go on."""
    flags = [f'--logdir={tmp_path}', '--norm=None', *SINUSOID]

    def write(checkpoint, folder, iteration, state, kind):
        for name in INNER_LOOPS:
            del state['flags'][name]
        return write_checkpoint(checkpoint, folder, iteration, state, kind)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'write_checkpoint', write)
        succeeded(run(*flags, '--metatrain_iterations=1'))
    (folder,) = tmp_path.iterdir()
    assert 'learn_lr' not in read_run_state(f'{folder}/model0')['flags']
    succeeded(run(f'--run={folder}', '--train=False'))
    assert Learner.load(folder).model.rates == {}
    other = [*flags, '--metatrain_iterations=2', '--first_order_iterations=1']
    os.rename(folder, tmp_path / run_name(parsed(*other)))
    assert_refused(run(*other), '--first_order_iterations=0 (now 1)')
    os.rename(tmp_path / run_name(parsed(*other)), folder)
    assert 'Continuing' in succeeded(run(*flags, '--metatrain_iterations=2')).out


# Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(adapt='heads'), "adapt must be one of 'all', 'head', 'body'"),
        (dict(learn_lr='step'), "'weight', but it is 'step'"),
        (dict(learn_lr='layer', inner_loop=Damped()), 'give one of the two'),
        (dict(inner_loop=0.1), 'inner_loop must be a maml.InnerLoop, but it is 0.1'),
        (dict(loss_steps='first'), "loss_steps must be one of 'last', 'all'"),
        (dict(loss_steps_iterations=3), "is for loss_steps='all'"),
        (dict(loss_steps='all', loss_steps_iterations=-3), 'loss_steps_iterations must not be'),
        (dict(first_order_iterations=1.5), 'first_order_iterations must be a whole number'),
        (dict(norm_steps=True, adapt='head'), 'give one of the two'),
    ],
)
def test_arguments_refused(settings, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(')):
        exact_model(fully_connected(), **settings)


def test_networks_refused():
    with pytest.raises(ValueError, match='this network has none'):
        exact_model(FullyConnected(6, (5,), 3), norm_steps=True)
    with pytest.raises(ValueError, match='give it an attribute layer_names'):
        exact_model(Linear(), mean_squared_error, False, adapt='head')
    frozen = KerasNetwork(keras_model(), lambda path: path.split('/')[-2].startswith('batch'))
    with pytest.raises(ValueError, match='leaves nothing for the inner loop to change'):
        exact_model(frozen, adapt='head')


def test_fit(tmp_path):
    """Keras's `fit` learns step sizes, and its files of weights have them."""
    settings = dict(update_lr=0.1, num_updates=2, learn_lr='layer', compiled=False)
    made = [MetaModel(FullyConnected(6, (5,), 3), cross_entropy(2), **settings) for _ in range(2)]
    batch = random_batch(fully_connected(), dtype=tf.float32)
    for model in made:
        model.compile()
    made[0].fit([batch] * 3, verbose=0)
    rates = [rate.numpy() for rate in made[0].maml.rates.values()]
    assert all(rate != np.float32(0.1) for rate in rates)
    made[0].save_weights(tmp_path / 'of.weights.h5')
    made[1].load_weights(tmp_path / 'of.weights.h5')
    assert [rate.numpy() for rate in made[1].maml.rates.values()] == rates
