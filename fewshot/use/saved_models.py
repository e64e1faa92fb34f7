"""Finds, describes and loads models that were saved."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from data_generator import whole_number
from fewshot.checks import folder_path
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import MODEL_SETTINGS, make_model
from fewshot.networks.checks import check_loss
from fewshot.networks.inner_loops import LEARNED_RATES, LearnedRates, Partly
from fewshot.networks.keras_network import KerasNetwork
from fewshot.paper.published import known_names, run_named
from fewshot.runs.checkpoints import DamagedCheckpoint, checkpoints, first_whole, other_runs
from fewshot.sources import IMAGE_SOURCES
from maml import InnerLoop, mean_squared_error


def of_images(settings: dict) -> bool:
    """Whether main.py trained on images, which it reads as values from 0 to 1."""
    return settings.get('datasource') in IMAGE_SOURCES


def settings_of(model: FastMAML) -> dict:
    """Returns the settings that `Learner.load` needs for a model that was not made from flags."""
    shots, plain = getattr(model.loss, 'shots', None), model.loss is mean_squared_error
    inner_loop, network = model.inner_loop, model.network
    known = type(inner_loop) in (InnerLoop, LearnedRates)
    network = network.network if isinstance(network, Partly) else network
    network = getattr(network, 'plain', network)  # as it was given
    return {
        'datasource': 'own',
        'network': type(network).__name__,
        'update_lr': model.update_lr,
        'num_updates': model.num_updates,
        'stop_grad': model.stop_grad,
        'clip': None if model.clip is None else float(model.clip),
        'loss_steps': model.schedule.loss_steps,
        'loss_steps_iterations': model.schedule.iterations,
        'first_order_iterations': model.schedule.first_order_iterations,
        'adapt': model.adapt,
        'learn_lr': model.learn_lr if known else type(inner_loop).__name__,
        'norm_steps': model.norm_steps,
        'objective': 'loss' if shots is None else 'accuracy',
        'shots': shots,
        'loss': '' if plain or shots is not None else getattr(model.loss, '__name__', 'own'),
        'dtype': model.dtype.name,
        'optimizer': described(model.metatrain_optimizer),
    }


def described(optimizer: keras.Optimizer) -> dict:
    """Returns Keras's description of an optimizer, as far as there is one."""
    try:
        return keras.optimizers.serialize(optimizer)
    except NotImplementedError:  # a schedule of one's own without get_config
        return {}


def stored_optimizer(description: dict, path: str) -> keras.Optimizer:
    """Makes the optimizer that is described. Raises ValueError for an unknown class."""
    with contextlib.suppress(TypeError, ValueError):
        if description and is_known_to_keras(description):
            return keras.optimizers.deserialize(description)
    raise ValueError(
        f'{path} was trained with an outer optimizer or a schedule of meta_lr that Keras does not '
        'know: give its class a get_config method, and decorate it with '
        'keras.saving.register_keras_serializable()'
    )


def is_known_to_keras(part) -> bool:
    """Whether all classes in a description are Keras's or registered.

    Older versions of Keras import any module that a file names, whoever wrote it.
    """
    if isinstance(part, Mapping):
        home, name = (part.get('module') or '').split('.')[0], part.get('registered_name') or ''
        if 'class_name' in part and home != 'keras':
            if keras.saving.get_registered_object(name) is None:
                return False
        part = [*part.values()]
    return not isinstance(part, list | tuple) or all(map(is_known_to_keras, part))


def find_checkpoint(run_folder: str | Path, checkpoint: int | str = -1) -> str:
    """Returns a checkpoint's path, see `Learner.load`. Warns of newer ones that are damaged."""
    if not isinstance(checkpoint, str | int | np.integer) or checkpoint not in ('best', -1):
        text = "checkpoint, if it is not 'best' or -1 for the newest,"
        checkpoint = whole_number(text, checkpoint)
    folder = run_named(folder_path('run_folder', run_folder))
    if not folder.is_dir():
        raise ValueError(
            f'there is no folder {folder}: give one that main.py trained in{known_names()}'
        )
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


def load_model(
    path: str,
    settings: dict | None,
    network=None,
    loss: Callable | None = None,
    inner_loop: InnerLoop | None = None,
    compiled: bool = False,
) -> FastMAML:
    """Loads a checkpoint's model, see `Learner.load`; settings: the flags of its run."""
    if not settings:
        raise ValueError(
            f'{path} does not tell the flags it was trained with; if it is the TensorFlow 1 '
            "original's, scripts/model/import_tf1_checkpoint.py makes one that does"
        )
    check_given(path, settings, network, loss, inner_loop)
    if isinstance(network, keras.Model):
        network = KerasNetwork(network, audit=None)  # as when it was trained
    made = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    made |= {} if inner_loop is None else {'inner_loop': inner_loop, 'learn_lr': 'none'}
    made['dtype'] = tf.as_dtype(settings.get('dtype', 'float32'))
    made |= {'network': '' if network is None else network, 'loss': loss}
    model = make_model(**made, compiled=compiled)
    if 'optimizer' in settings:
        model.set_optimizer(stored_optimizer(settings['optimizer'], path))
    if loss is not None:
        check_loss(loss, model.network, model.dtype)
    model.maml.clip = settings.get('clip', model.clip)  # of models that were made in Python
    model.make_programs()
    images = ['float'] if of_images(settings) else []
    model.trained_on = frozenset(settings.get('trained_on', images))
    model.restore(path)
    return model


def check_given(path: str, settings: dict, network, loss, inner_loop):
    """Raises ValueError if a run had something of the user's that its checkpoint does not hold.

    The file of a network is not run unasked: a checkpoint may come from anywhere.
    """
    if isinstance(network, str):
        raise ValueError(f'network must be a keras.Model or another network, not {network!r:.60}')
    spec = settings.get('network')
    if spec and network is None:
        raise ValueError(
            f'{path} was trained with --network={spec}, which it does not hold and which is not '
            'run unasked: give it again, by --network or from Python as network='
        )
    if settings.get('loss') and loss is None:
        raise ValueError(f'{path} was trained with a loss of its own: give it as loss=')
    if settings.get('learn_lr', 'none') not in ('none', *LEARNED_RATES) and inner_loop is None:
        raise ValueError(
            f'{path} was trained with an inner loop of its own: give it as inner_loop='
        )
