"""Loads trained models for the scripts, and has the code that those scripts share."""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

import tensorflow as tf

from fewshot.engine.devices import set_up_gpus
from fewshot.networks.build import user_loss, user_network
from fewshot.paper.published import run_named
from fewshot.runs.checkpoints import read_run_state
from fewshot.runs.user_code import UserCodeError
from fewshot.use.learner import Learner
from fewshot.use.saved_models import find_checkpoint

# Arguments ----------------------------------------------------------------------------------------


def parser_of(description: str, checkpoint: bool = True) -> argparse.ArgumentParser:
    """Makes a parser of RUN_FOLDER, --network and, if asked, --checkpoint, which name a model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'run_folder', type=run_named, metavar='RUN_FOLDER', help='or the name of a published model'
    )
    for name, what in {'network': 'what makes its network', 'loss': 'its loss'}.items():
        meaning = f'if the run was trained with --{name}: {what}'
        parser.add_argument(f'--{name}', default='', metavar='FILE.py:FUNCTION', help=meaning)
    if checkpoint:
        given = dict(choices=['last', 'best'], default='last')
        parser.add_argument('--checkpoint', **given, help='best: that of the best validation')
    return parser


def add_adaptation(parser: argparse.ArgumentParser):
    """Adds the arguments that tell how the model adapts and answers."""
    parser.add_argument('--steps', type=int, help='gradient steps; default: as in training')
    parser.add_argument('--lr', type=float, help='step size; default: as in training')
    parser.add_argument(
        '--transductive',
        action='store_true',
        help='normalise by the statistics of the images to classify, together, as the paper does; '
        'default: by those of the labelled images, so that an answer depends on its image alone',
    )


def chosen_steps(values: argparse.Namespace, learner: Learner) -> tuple[int, float | None]:
    """Returns number and size of steps (None: as learned). Raises ValueError out of range."""
    steps = learner.model.num_updates if values.steps is None else values.steps
    default = None if learner.model.rates else learner.model.update_lr
    lr = default if values.lr is None else values.lr
    if not 0 <= steps <= 1000 or lr is not None and not 0 <= lr < float('inf'):
        raise ValueError(
            f'--steps must be from 0 to 1000 and --lr at least 0, but they are {steps} and {lr}'
        )
    return steps, lr


# Models -------------------------------------------------------------------------------------------


def load(
    run_folder: Path,
    checkpoint: int | str = -1,
    network: str = '',
    loss: str = '',
    compiled: bool = False,
) -> Learner:
    """Loads a Learner, see Learner.load, on GPUs as main.py uses them.

    checkpoint: 'last' is -1. network, loss: FILE.py:FUNCTION, if the run was trained with one.
    compiled: whether its `model` is, which pays for hundreds of tasks.
    Raises ValueError and UserCodeError.
    """
    set_up_gpus()
    checkpoint, own = -1 if checkpoint == 'last' else checkpoint, {}
    with warnings_printed():
        settings = read_run_state(find_checkpoint(run_folder, checkpoint)).get('flags', {})
        for name, spec in {'network': network, 'loss': loss}.items():
            if spec and not settings.get(name):
                raise ValueError(f'{run_folder} was trained without --{name}, so it takes none')
        if network:
            own['network'] = user_network(network, settings, audit=None)
        if loss:
            own['loss'] = user_loss(loss, settings)
        return Learner.load(run_folder, checkpoint, **own, compiled=compiled)


def load_of_images(values: argparse.Namespace, compiled: bool = False) -> Learner:
    """Loads the model that the arguments name. Raises ValueError too if its run had no images."""
    learner = load(values.run_folder, values.checkpoint, values.network, values.loss, compiled)
    if not learner.takes_images:
        raise ValueError(
            f'{values.run_folder} is a run on {learner.settings["datasource"]}, which has no images'
        )
    return learner


@contextlib.contextmanager
def warnings_printed():
    """Prints warnings like a script's other sentences, each once, when it is left."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always', UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in heard):
                print(f'{Path(sys.argv[0]).name}: {text}', file=sys.stderr)


@contextlib.contextmanager
def refusals(script: str):
    """Ends the program with one sentence, that of the error, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, UserCodeError, tf.errors.OpError) as error:
        sys.exit(f'{Path(script).name}: {error}')
