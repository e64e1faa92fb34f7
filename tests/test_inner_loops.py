"""The inner loops that grew from MAML's: what they change, and how; flags from training to export.

Meta-gradients are compared with central differences in float64, uncompiled; what the flags of
main.py do, from one run to its evaluation and export.
"""

import numpy as np
import pytest
import tensorflow as tf
from test_maml import Linear, copy_of, exact_model, points, random_batch, running_eagerly

from maml import (
    Convolutional,
    FullyConnected,
    KerasNetwork,
    Learner,
    MetaModel,
    Phase,
    UpdateRule,
    make_model,
    phases,
    step_weights,
)
from utils import mean_squared_error

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
    if not model.phases[0].all_losses:
        return float(losses[-1])
    done = model.metatrain_optimizer.iterations
    weights = step_weights(len(losses), done, model.loss_steps_iterations, tf.float64)
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
    for kind, own in model.groups.items():
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

QUICK = ('head', 'weight', 'plus_plus')  # of the convolutional network
CASES = [
    pytest.param(make, settings, id=f'{kind}-{name}', marks=pytest.mark.slow if slow else ())
    for kind, make in NETWORKS.items()
    for name, settings in SETTINGS.items()
    for slow in [kind == 'convolutional' and name not in QUICK]
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
