"""Models that were saved: found, described and loaded."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import folder_path
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import IMAGE_SHAPES
from fewshot.networks.inner_loops import Partly
from fewshot.runs.checkpoints import DamagedCheckpoint, checkpoints, first_whole, other_runs
from maml import mean_squared_error


def of_images(settings: dict) -> bool:
    """Whether main.py trained on images, which it reads as values from 0 to 1."""
    return settings.get('datasource') in (*IMAGE_SHAPES, 'folder')


def settings_of(model: FastMAML) -> dict:
    """What `Learner.load` must know of a model that was not made from flags."""
    shots, plain = getattr(model.loss, 'shots', None), model.loss is mean_squared_error
    rule, network = model.learn_lr, model.network
    network = network.network if isinstance(network, Partly) else network
    return {
        'datasource': 'own',
        'network': type(network).__name__,
        'update_lr': model.update_lr,
        'num_updates': model.num_updates,
        'stop_grad': model.stop_grad,
        'clip': None if model.clip is None else float(model.clip),
        'loss_steps': model.loss_steps,
        'loss_steps_iterations': int(model.loss_steps_iterations),
        'first_order_iterations': int(model.first_order_iterations),
        'adapt': model.adapt,
        'learn_lr': rule if isinstance(rule, str) else type(rule).__name__,
        'norm_steps': model.norm_steps,
        'objective': 'loss' if shots is None else 'accuracy',
        'shots': shots,
        'loss': '' if plain or shots is not None else getattr(model.loss, '__name__', 'own'),
        'dtype': model.dtype.name,
        'optimizer': described(model.metatrain_optimizer),
    }


def described(optimizer: keras.Optimizer) -> dict:
    """Keras's description of an optimizer, as far as there is one."""
    try:
        return keras.optimizers.serialize(optimizer)
    except NotImplementedError:  # a schedule of one's own without get_config
        return {}


def stored_object(description: dict, path: str):
    """The optimizer or schedule that is described. Raises ValueError for an unknown class."""
    with contextlib.suppress(TypeError, ValueError):
        if description and is_known_to_keras(description):
            return keras.saving.deserialize_keras_object(description)
    raise ValueError(
        f'{path} was trained with an outer optimizer or a schedule of meta_lr that Keras does not '
        'know: give its class a get_config method, and decorate it with '
        'keras.saving.register_keras_serializable()'
    )


def is_known_to_keras(description) -> bool:
    """Whether all classes in a description are Keras's or registered: a file that somebody else
    wrote should not have a module imported.
    """
    if isinstance(description, (list, tuple)):
        return all(map(is_known_to_keras, description))
    if not isinstance(description, Mapping):
        return True
    if 'class_name' in description:
        home = (description.get('module') or '').split('.')[0]
        registered = keras.saving.get_registered_object(description.get('registered_name') or '')
        if home != 'keras' and registered is None:
            return False
    return all(map(is_known_to_keras, description.values()))


def find_checkpoint(run_folder: str | Path, checkpoint: int | str = -1) -> str:
    """The path of a run's checkpoint; arguments and errors as of `Learner.load`.

    Warns of newer ones that are damaged.
    """
    if not isinstance(checkpoint, str | int | np.integer) or checkpoint not in ('best', -1):
        text = "checkpoint, if it is not 'best' or -1 for the newest,"
        checkpoint = whole_number(text, checkpoint)
    folder = folder_path('run_folder', run_folder)
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}: give one that main.py trained in')
    found = checkpoints(folder, 'best' if checkpoint == 'best' else 'model')
    there = [*checkpoints(folder)]
    if not found and not there:
        raise ValueError(
            f'{folder} has no checkpoint{other_runs(folder)}: give a folder that main.py trained '
            'in, LOGDIR/cls_...'
        )
    if not found:
        raise ValueError(
            f'{folder} has no best checkpoint, which training keeps from its first validation on: '
            f'train on, or take the newest, of iteration {there[-1]}'
        )
    if checkpoint not in (-1, 'best', *found):
        raise ValueError(
            f'{folder} has no checkpoint {checkpoint!r}; iterations that are there: '
            f'{", ".join(map(str, there))}'
        )
    wanted = {checkpoint: found[checkpoint]} if checkpoint in found else found
    try:
        return first_whole(dict(reversed(wanted.items())), warnings.warn)[1]
    except DamagedCheckpoint as error:
        remedy = 'give another checkpoint, or a copy of the run that is whole'
        raise DamagedCheckpoint(f'{error}; {remedy}') from error


def check_network_is_given(path: str, settings: dict, network):
    """Raises ValueError if a run had a network of the user's, which a checkpoint does not hold.

    The file is not run unasked: a checkpoint may come from anywhere.
    """
    if isinstance(network, str):
        raise ValueError(f'network must be a keras.Model or another network, not {network!r:.60}')
    spec = settings.get('network')
    if spec and network is None:
        raise ValueError(
            f'{path} was trained with --network={spec}, which it does not hold and which is not '
            'run unasked: give it again, by --network or from Python as network='
        )


def set_optimizer(model: FastMAML, optimizer: keras.optimizers.Optimizer):
    """Gives a model another outer optimizer; the program that was traced with the old one goes."""
    optimizer.build(model.parameters)
    model.metatrain_optimizer = optimizer
    model.checkpoint = tf.train.Checkpoint(**model.groups, metatrain_optimizer=optimizer)
    vars(model).pop(FastMAML.metatrain_step.attribute, None)
