"""Builds the model of a run from its settings."""

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from fewshot.checks import tells_names
from fewshot.engine.fast import FastMAML
from fewshot.networks.audit import compare
from fewshot.networks.checks import PROBE
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.paper_networks import Convolutional, FullyConnected, Normalization
from fewshot.runs.user_code import user_code, user_function
from fewshot.sources import SOURCES, source_of
from maml import cross_entropy, mean_squared_error


@contextlib.contextmanager
def random_seed(seed: int):
    """Makes random numbers of Keras, NumPy and Python a function of the seed, while entered."""
    states = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def example_shape(settings: dict) -> tuple[int, ...]:
    """Returns the shape of an image, or of an example of the user's tasks; settings: the flags."""
    if settings.get('example_shape'):
        return tuple(settings['example_shape'])
    given = settings.get('image_size', 84), settings.get('channels', 3)
    size, channels = source_of(settings['datasource']).image_shape or given
    return size, size, channels


def number_of_outputs(settings: dict) -> int:
    """Returns the number of a network's outputs; settings: the flags."""
    sizes = source_of(settings['datasource']).sizes
    default = sizes(settings.get('baseline'))[1] if sizes else settings.get('num_classes', 5)
    return settings.get('dim_output') or default


def is_regression(datasource: str, objective: str | None) -> bool:
    return (objective or source_of(datasource).generator.objective) == 'loss'


def user_loss(spec: str, settings: dict) -> Callable:
    """Returns the loss that FILE.py:FUNCTION names, checked; settings: the run's flags.

    Raises UserCodeError, and ValueError if for some outputs and labels it is not one finite number
    for each task, or its second derivative, which meta-gradients need, is wrong.
    """
    loss, random = user_function(spec), np.random.default_rng(0)
    shape = (*PROBE, number_of_outputs(settings))
    x = tf.Variable(random.standard_normal(shape), dtype=tf.float32)
    labels, along, direction = (np.float32(random.standard_normal(shape)) for _ in range(3))
    if not is_regression(settings['datasource'], settings.get('objective')):
        labels = np.float32(labels == labels.max(2, keepdims=True))
    labels = tf.constant(labels)

    def slope() -> tf.Tensor:
        with tf.GradientTape() as tape:
            values = loss(tf.convert_to_tensor(x), labels)
        return tf.reduce_sum(along * tape.gradient(values, x, unconnected_gradients='zero'))

    values = np.asarray(loss(tf.convert_to_tensor(x), labels))
    if values.shape != PROBE[:1] or not np.isfinite(values).all():
        raise ValueError(
            f'{spec} must return a finite number for each task, [tasks], of outputs and labels '
            f'[tasks, examples, out], but for {[*shape]} it returned {values.tolist()!r:.80}'
        )
    with tf.GradientTape() as tape:
        value = slope()
    gradient = tape.gradient(value, x, unconnected_gradients='zero')
    compared = compare(slope, [x], [gradient], [direction], 1e-3, 'float32')
    if not (value and compared.is_right or compared.spread > 0.01 * compared.scale):
        raise ValueError(
            f'{spec} has a wrong derivative, without which a meta-gradient is wrong: the first is '
            f'{value:.4g}; the second {compared.derivative:.4g}, by differences '
            f'{compared.difference:.4g}. Write it without tf.stop_gradient, tf.custom_gradient and '
            'what has no derivative, such as tf.argmax'
        )
    return loss


def user_network(spec: str, settings: dict, audit: bool | None = True):
    """Returns the network that FILE.py:FUNCTION makes for a run; settings: the run's flags.

    The function is called with the shape of an example and the number of classes or outputs, and
    returns a keras.Model, or any other network. Its random initial values are a function of the
    run's seed. audit: as in KerasNetwork, where None is for a network that is trained already.
    Raises UserCodeError, and ValueError for other sizes and all that `user_function` and
    `KerasNetwork` refuse.
    """
    shape, outputs = example_shape(settings), number_of_outputs(settings)
    function, seed = user_function(spec), settings.get('seed', 0)
    with random_seed(seed), user_code(spec, all_of_it=False):
        network = made = function(shape, outputs)
        if isinstance(made, keras.Model):
            network = KerasNetwork(made, input_shape=shape, audit=audit)
    if not callable(network) or not hasattr(network, 'parameters'):
        raise ValueError(f'{spec} must return a keras.Model, but it returned {made!r:.60}')
    sizes = {'dim_input': ('take', int(np.prod(shape))), 'dim_output': ('have', outputs)}
    for name, (verb, size) in sizes.items():
        found, things = getattr(network, name, size), ('values per example', 'outputs')
        if found != size:
            thing = things[name == 'dim_output']
            raise ValueError(f'{spec}: the model must {verb} {size} {thing}, but has {found}')
    return network


def make_network(
    datasource: str,
    num_classes: int = 5,
    norm: str | Normalization = 'batch_norm',
    num_filters: int = 64,
    conv: bool = True,
    max_pool: bool = False,
    baseline: str | None = None,
    image_size: int = 84,
    channels: int = 3,
    example_shape: Sequence[int] | None = None,
    dim_output: int = 1,
) -> FullyConnected | Convolutional:
    """Makes a source's network: the paper's, miniImagenet's for folders, the sinusoid's for others.

    The arguments are the flags of the same names; norm may be a Normalization of one's own.
    example_shape, dim_output: those of the user's own tasks, see UserTasks.
    """
    source = source_of(datasource)
    if source.sizes:
        dim_input, dim_output = source.sizes(baseline)
        return FullyConnected(dim_input, (40, 40), dim_output, norm)
    if example_shape:
        return FullyConnected(int(np.prod(example_shape)), (40, 40), dim_output, norm)
    if not source.has_images:
        known = ', '.join(SOURCES)
        raise ValueError(f'there is no datasource {datasource!r}, but {known}')
    size, channels = source.image_shape or (image_size, channels)
    if not conv:
        return FullyConnected(size * size * channels, (256, 128, 64, 64), num_classes, norm)
    return Convolutional(size, channels, num_filters, num_classes, norm, max_pool, source.flatten)


@tells_names(FastMAML, make_network)
def make_model(
    datasource: str,
    update_batch_size: int = 5,
    update_lr: float = 1e-3,
    num_updates: int = 1,
    meta_lr: float = 1e-3,
    network='',
    objective: str | None = None,
    shots: float | None = None,
    meta_lr_decay: str = 'none',
    meta_lr_end: float = 0.0,
    metatrain_iterations: int = 15000,
    loss: Callable | None = None,
    **settings,
) -> FastMAML:
    """Makes a model with the paper's network, loss and clipping.

    The arguments are the flags; `settings` are those of `make_network` and of FastMAML. network:
    another network, or a keras.Model. objective, shots: for the user's own tasks, 'loss' or
    'accuracy', and the K that the loss of a classifier is divided by. meta_lr_decay: 'cosine' lets
    the outer step size fall to meta_lr_end over metatrain_iterations. loss: another one; of a
    classifier it counts as a sum over examples divided by K where other numbers of them are given.
    """
    shots = None if is_regression(datasource, objective) else shots or update_batch_size
    usual = cross_entropy(shots) if shots else mean_squared_error
    loss = functools.partial(loss) if callable(loss) else loss or usual
    if shots and callable(loss):  # FastMAML tells of others
        loss.shots = shots
    of_network = {name: settings.pop(name) for name in NETWORK_SETTINGS & settings.keys()}
    made = make_network(datasource, **of_network) if isinstance(network, str) else network
    if meta_lr_decay == 'cosine':
        share = meta_lr_end / meta_lr if meta_lr else 0.0
        meta_lr = keras.optimizers.schedules.CosineDecay(meta_lr, metatrain_iterations, share)
    clip = source_of(datasource).clip
    return FastMAML(made, loss, update_lr, num_updates, meta_lr, clip=clip, **settings)


NETWORK_SETTINGS = inspect.signature(make_network).parameters.keys() - {'datasource'}
NOT_SETTINGS = {'network', 'loss', 'settings', 'clip', 'dtype', 'inner_loop'}
NOT_SETTINGS |= {'compiled', 'one_program', 'replicas'}
# The settings of a run that `make_model` takes.
MODEL_SETTINGS = NETWORK_SETTINGS | inspect.signature(make_model).parameters.keys()
MODEL_SETTINGS = (MODEL_SETTINGS | inspect.signature(FastMAML).parameters.keys()) - NOT_SETTINGS
