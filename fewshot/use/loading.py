"""Trained models, as scripts/model/ loads them."""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

from fewshot.engine.devices import set_up_gpus
from fewshot.networks.build import user_network
from fewshot.runs.checkpoints import read_run_state
from fewshot.use.learner import Learner
from fewshot.use.saved_models import find_checkpoint


def add_arguments(parser: argparse.ArgumentParser):
    """Those that tell which model of a run is meant."""
    parser.add_argument(
        '--checkpoint',
        choices=['last', 'best'],
        default='last',
        help='best: that of the best validation',
    )
    parser.add_argument(
        '--network',
        default='',
        metavar='FILE.py:FUNCTION',
        help='if the run was trained with --network: what makes its network',
    )


def load(run_folder: Path, checkpoint: int | str = -1, network: str = '') -> Learner:
    """As Learner.load, on GPUs as main.py uses them.

    network: FILE.py:FUNCTION, if the run was trained with one. Raises ValueError and UserCodeError.
    """
    set_up_gpus()
    with said():
        return _load(run_folder, checkpoint, network)


@contextlib.contextmanager
def said():
    """Prints warnings as a script's other sentences, each once, when it is left."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always', UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in heard):
                print(f'{Path(sys.argv[0]).name}: {text}', file=sys.stderr)


def _load(run_folder: Path, checkpoint: int | str, network: str) -> Learner:
    if not network:
        return Learner.load(run_folder, checkpoint)
    settings = read_run_state(find_checkpoint(run_folder, checkpoint)).get('flags', {})
    if not settings.get('network'):
        raise ValueError(f'{run_folder} was trained without --network, so it takes none')
    return Learner.load(run_folder, checkpoint, network=user_network(network, settings, audit=None))
