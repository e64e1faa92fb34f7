#!/usr/bin/env python
"""Converts a TensorFlow 1 checkpoint of the original program into one of this program, for good.

    python scripts/model/import_tf1_checkpoint.py FOLDER/model59000 --target=logs/NAME

NAME is the name of the run, by which main.py finds it:
cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm is 5-way, trained with 4 tasks per
meta-batch, 1 shot and 5 updates of step size 0.01, of a network with 32 filters, max-pooling and
batch normalisation. Without --target it is logs/ and the name of the checkpoint's own folder. The
source is left as it is. main.py can also use it without conversion, if it lies in a folder of that
name.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from fewshot.data.preparation import as_path
from fewshot.networks.build import make_model
from fewshot.runs.checkpoints import (
    OBJECT_GRAPH,
    checkpoints,
    read_checkpoint,
    stored_values,
    write_checkpoint,
)
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import refusals

NAME = re.compile(
    r'cls_(?P<num_classes>\d+)\.mbs_(?P<meta_batch_size>\d+)\.ubs_(?P<update_batch_size>\d+)'
    r'\.numstep(?P<num_updates>\d+)\.updatelr(?P<update_lr>[\d.]+(?:e-?\d+)?)'
    r'(?:hidden(?P<num_filters>\d+))?(?P<max_pool>maxpool)?(?P<stop_grad>stopgrad)?'
    r'(?P<baseline>oracle)?(?P<norm>batchnorm|layernorm|nonorm)'
)
NORMS = {'batchnorm': 'batch_norm', 'layernorm': 'layer_norm', 'nonorm': 'None'}
# These tell the datasource: inputs of fully connected, channels of convolutional networks.
INPUTS = {1: 'sinusoid', 3: 'sinusoid', 28 * 28: 'omniglot', 84 * 84 * 3: 'miniimagenet'}
CHANNELS = {1: 'omniglot', 3: 'miniimagenet'}
CONVOLUTIONAL = 'conv1 b1 conv2 b2 conv3 b3 conv4 b4 w5 b5'.split()  # the names of its weights


def locate(source: Path) -> tuple[str, int]:
    """Returns (path without suffix, iteration) of a checkpoint, a folder's newest."""
    if source.is_dir():
        found = checkpoints(source)
        if not found:
            raise ValueError(
                f'{source} holds no checkpoint: no file model{{iteration}}.index and its data'
            )
        return found[max(found)], max(found)
    path = re.sub(r'\.(index|meta|data-\d+-of-\d+)$', '', str(source))
    if not Path(f'{path}.index').is_file():
        raise ValueError(f'there is no checkpoint {path}: the file {path}.index is missing')
    iteration = re.fullmatch(r'model(\d+)', Path(path).name)
    if not iteration:
        raise ValueError(
            f'{path} is not called model{{iteration}}: rename its files, for instance to '
            'model59000.*'
        )
    return path, int(iteration[1])


def weight_names(stored: Collection[str]) -> list[str]:
    """Names the weights in a checkpoint of these variables, in the network's order."""
    if 'model/conv1' in stored:
        return CONVOLUTIONAL
    variables = [key for key in stored if re.fullmatch(r'model/Variable(_\d+)?', key)]
    return [f'{kind}{i}' for i in range(1, len(variables) // 2 + 1) for kind in 'wb']


def read_original(path: str) -> dict:
    """Reads the flags that variables tell. Raises ValueError for those of no original network."""
    stored = stored_values(path)
    if OBJECT_GRAPH in stored:
        raise ValueError(
            f'{path} is a checkpoint of TensorFlow 2 already; main.py reads it as it is'
        )
    names = weight_names(stored)
    norms = [key for key in stored if re.fullmatch(r'model/\d/(beta|gamma)', key)]
    norms = sorted(key.removeprefix('model/') for key in norms)
    try:
        values, _ = read_checkpoint(path, names + norms)
        flags = known_flags({name: values[name] for name in names}, norms)
    except (ValueError, LookupError, TypeError):  # too many variables, too few, of strange shapes
        flags = {}
    if not flags.get('datasource'):
        held = ', '.join(sorted(stored))
        raise ValueError(f'{path} is of no network of the original program: it holds {held}')
    return flags


def known_flags(weights: dict, norms: list[str]) -> dict:
    """Returns the flags that names and shapes of parameters tell; datasource may be None."""
    flags = {'norm': 'batch_norm' if norms else 'None'}
    if '0/gamma' in norms:
        flags['norm'] = 'layer_norm'
    classes = len([*weights.values()][-1])  # biases of the last layer
    if 'conv1' in weights:
        channels, filters = weights['conv1'].shape[2:]
        flags |= {'datasource': CHANNELS.get(channels), 'num_classes': classes}
        flags |= {'num_filters': filters, 'conv': True}
        if channels == 3:  # of 84x84 pixels, 5x5 are left after pooling, 6x6 after strides
            flags['max_pool'] = len(weights['w5']) == 25 * filters
        return flags
    inputs = len(weights['w1'])
    if INPUTS.get(inputs) == 'sinusoid':
        return flags | {'datasource': 'sinusoid', 'baseline': 'oracle' if inputs == 3 else None}
    return flags | {'datasource': INPUTS.get(inputs), 'conv': False, 'num_classes': classes}


def flags_of_name(name: str) -> dict:
    """Returns the flags that a run's name tells. Raises ValueError if it is no run's name."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f'{name} is not the name of a run, by which main.py would find it: give a '
            '--target like logs/cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm, '
            'with the settings of the run'
        )
    flags = match.groupdict(default=64)  # the default is num_filters' alone
    flags = {flag: int(text) if str(text).isdigit() else text for flag, text in flags.items()}
    return flags | {
        'max_pool': bool(match['max_pool']),
        'stop_grad': bool(match['stop_grad']),
        'baseline': match['baseline'],
        'norm': NORMS[match['norm']],
    }


def check_name(target: Path, path: str, known: dict) -> dict:
    """Returns all flags that are told. Raises ValueError if the name is none, or contradicts."""
    told = flags_of_name(target.name)
    for flag, value in told.items():
        if known.get(flag, value) != value:
            raise ValueError(
                f'{path} has {flag}={known[flag]}, but the name {target.name} says {value}: '
                'give as --target the name of its run'
            )
    return told | known


def convert(source: Path, target: Path | None) -> str:
    """Writes target/model{iteration}, or raises ValueError or OSError before; returns a report."""
    path, iteration = locate(source)
    target = target or Path('logs', Path(path).resolve().parent.name)
    flags = check_name(target, path, read_original(path))
    if [*target.glob(f'model{iteration}.*')]:
        raise ValueError(
            f'{target} has a model{iteration} already, which is never overwritten: '
            'give another --target'
        )
    settings = flags | {'update_lr': float(flags['update_lr'])}  # as a number; a name has its text
    model = make_model(**{flag: settings[flag] for flag in settings if flag != 'meta_batch_size'})
    model.restore(path)
    target.mkdir(parents=True, exist_ok=True)
    written = write_checkpoint(model.checkpoint, target, iteration, {'flags': settings})
    line = ' '.join(f'--{flag}={value}' for flag, value in flags.items() if value is not None)
    logdir = shlex.quote(str(target.parent))
    return f'{written}\nTo evaluate it: python main.py {line} --logdir={logdir} --train=False'


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'source', type=Path, metavar='CHECKPOINT_OR_FOLDER', help='model{iteration}, or its folder'
    )
    parser.add_argument(
        '--target', type=as_path, metavar='RUN_FOLDER', help='the folder to write to, LOGDIR/NAME'
    )
    values = parser.parse_args(arguments)
    with refusals(__file__):
        print(convert(values.source, values.target))


if __name__ == '__main__':
    print_anything()
    main()
