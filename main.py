r"""Trains and evaluates MAML on sinusoids, Omniglot, miniImagenet, folders and tasks of your own.

    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 \
        --norm=None --update_batch_size=10
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 \
        --update_batch_size=1 --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/

trains, in the folder of --logdir that is named after the flags. The same line again continues; with
--train=False it evaluates the newest checkpoint on 600 validation tasks, with --train=False
--test_set=True on 600 test tasks. scripts/paper has the line for every cell of the paper's tables.
"""

import csv
import datetime
import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import utils  # noqa: F401 (first, since it starts TensorFlow quietly)

# isort: split
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from data_generator import (
    EVALUATION_SEED,
    FITS,
    BadTasks,
    DataGenerator,
    ImageGenerator,
    OmniglotGenerator,
    OwnImages,
    SinusoidGenerator,
    TaskSize,
    UserTasks,
    as_in_run,
    folder_layout,
    load_miniimagenet,
    load_omniglot,
)
from maml import (
    LEARNED_RATES,
    Diverged,
    FastMAML,
    Observer,
    Results,
    Schedule,
    Trainer,
    evaluate_tasks,
    make_model,
    user_network,
)
from special_grads import Normalization
from utils import (
    DamagedCheckpoint,
    Replicas,
    UserCodeError,
    checkpoints,
    evaluated_iteration,
    event_files,
    first_line,
    first_whole,
    forget_summaries,
    is_spec,
    keep_freed_memory,
    keeps_programs,
    lock,
    other_runs,
    print_anything,
    read_run_state,
    remove_checkpoint,
    remove_leftovers,
    set_up_gpus,
    user_code,
    user_function,
    without_cache_lines,
    write_together,
)

SUMMARY_INTERVAL = 100  # iterations between summaries
PRINT_INTERVAL = 100  # between printed lines; times the source's print_factor
VALIDATION_INTERVAL = 500  # between validations, if the source validates
SAVE_INTERVAL = 1000  # between checkpoints
PICTURE_INTERVAL = 5000  # between pictures of a task for TensorBoard
EVALUATION_UPDATES = 10
SPLITS = {'val': 'validation', 'test': 'test'}
SOURCES = ('sinusoid', 'omniglot', 'miniimagenet', 'folder')
HANG_UP = getattr(signal, 'SIGHUP', None)  # Windows has none
MINIIMAGENET_QUERY_IMAGES = 15  # per class in training; K in evaluation, and in both for Omniglot


# Flags --------------------------------------------------------------------------------------------


class CheckpointParser(flags.ArgumentParser):
    """An iteration, -1 or 'best'."""

    def parse(self, argument):
        if argument == 'best':
            return argument
        try:
            iteration = int(argument)
        except ValueError:
            iteration = -2
        if iteration < -1:
            raise ValueError(f'it must be an iteration, -1 or best, but it is {argument}')
        return iteration

    def flag_type(self) -> str:
        return 'iteration, -1 or best'


class SourceParser(flags.ArgumentParser):
    """One of SOURCES, or FILE.py:FUNCTION."""

    def parse(self, argument):
        if argument in SOURCES or is_spec(argument):
            return argument
        raise ValueError(f'it must be one of {self.flag_type()}, but it is {argument}')

    def flag_type(self) -> str:
        return f'{", ".join(SOURCES)}, or FILE.py:FUNCTION'


class Rule(NamedTuple):
    """What the value of a flag must be."""

    holds: Callable
    text: str  # --name must be ..., but it is ...


class Flag(NamedTuple):
    """A flag: all that is particular to it."""

    name: str
    kind: type | tuple | flags.ArgumentParser  # a tuple holds the values that there are
    default: object
    # Whether it may change when a run is continued or evaluated: ANYTIME; in EVALUATION only;
    # or NEVER, since the network or the classes would be others.
    may_change: str
    meaning: str
    rule: Rule | None = None
    lowest: int | None = None  # that absl lets pass
    makes_model: bool = False  # whether maml.make_model takes it
    in_name: Callable | None = None  # from the value to its part of the run's name


def split_proportions(text: str) -> tuple[float, ...] | None:
    """The value of --split; None if it is none."""
    try:
        values = tuple(map(float, text.split(',')))
    except ValueError:
        return None
    return values if len(values) == 3 and all(0 < v < float('inf') for v in values) else None


def is_step_size(value: float) -> bool:
    return 0 <= value < float('inf')


ANYTIME, EVALUATION, NEVER = 'anytime', 'in evaluation', 'never'
POSITIVE = Rule(lambda value: value >= 1, 'at least 1')
STEP_SIZE = Rule(is_step_size, 'a step size of 0 or more')
SPLIT = Rule(split_proportions, 'three numbers above 0, for train, val and test, as 0.64,0.16,0.2')
CHANNELS = Rule(lambda value: value in (1, 3), '1 (grey) or 3 (colour)')
TRAIN_SHOTS = Rule(
    lambda value: value == -1 or value >= 1, 'at least 1, or -1 for that of --update_batch_size'
)
TRAIN_STEP_SIZE = Rule(
    lambda value: value == -1 or is_step_size(value),
    'a step size of 0 or more, or -1 for that of --update_lr',
)
NETWORK = Rule(lambda value: value == '' or is_spec(value), 'FILE.py:FUNCTION')
FOLDER = Rule(lambda value: '://' not in value, 'a folder, not an address')
TEST_QUERY = Rule(lambda value: value == -1 or value >= 1, 'at least 1, or -1 for as many as shots')

# Symbols are the paper's. The flags that name a run stand in the order of the name.
# fmt: off
FLAGS = (
    # The tasks
    Flag('datasource', SourceParser(), 'sinusoid', NEVER,
         'where tasks come from: sinusoid, omniglot, miniimagenet, folder, or FILE.py:FUNCTION, '
         'which returns tasks of your own', makes_model=True),
    Flag('data_dir', str, 'data', ANYTIME,
         'folder of the prepared data, or of your own class folders', FOLDER),
    Flag('split', str, '0.64,0.16,0.2', NEVER,
         'shares of the classes that train, val and test get (folder only)', SPLIT),
    Flag('image_size', int, 84, NEVER,
         'height and width that images are resized to (folder only)', POSITIVE, makes_model=True),
    Flag('channels', int, 3, NEVER,
         '3: colour, 1: grey (folder only)', CHANNELS, makes_model=True),
    Flag('fit', FITS, None, EVALUATION,
         'what becomes of images that are not square: crop them, pad with white, or squash '
         '(folder only; default: as the run has it, a new one crops)'),
    Flag('skip_small_classes', bool, False, ANYTIME,
         'leave out classes that have too few images for a task (folder only)'),
    Flag('cache_dir', str, '', ANYTIME,
         "where decoded images are kept (default: beside the data or, if that cannot be written, "
         "in the user's cache folder)"),
    Flag('seed', int, 0, EVALUATION,
         'of the initial weights and the training tasks', lowest=0, makes_model=True),
    Flag('strategy', ('none', 'mirrored', 'multi_worker'), 'none', ANYTIME,
         'devices that share the tasks: mirrored: all of this machine; multi_worker: of several '
         'processes, by TF_CONFIG'),
    Flag('tf32', bool, False, ANYTIME,
         'let GPUs round the factors of float32 products to 10 bits: faster, other numbers'),
    # Training
    Flag('pretrain_iterations', int, 0, EVALUATION,
         'iterations of joint training on all tasks, before meta-training', lowest=0),
    Flag('metatrain_iterations', int, 15000, ANYTIME,
         'iterations of meta-training', lowest=0, makes_model=True),
    Flag('num_classes', int, 5, NEVER,
         'N, ways: classes of a task (images only)', POSITIVE, makes_model=True,
         in_name='cls_{}'.format),
    Flag('meta_batch_size', int, 25, EVALUATION,
         'T, tasks per iteration', POSITIVE, in_name='.mbs_{}'.format),
    Flag('update_batch_size', int, 5, EVALUATION,
         'K, shots: support examples per class', POSITIVE, makes_model=True,
         in_name='.ubs_{}'.format),
    Flag('num_query', int, -1, EVALUATION,
         'Q, query images per class in training (-1: as the paper, 15 of miniimagenet, else as '
         'many as shots; images only)', TEST_QUERY,
         in_name=lambda value: '' if value == -1 else f'.query_{value}'),
    Flag('num_updates', int, 1, EVALUATION,
         'inner updates in training', POSITIVE, makes_model=True, in_name='.numstep{}'.format),
    Flag('update_lr', float, 1e-3, EVALUATION,
         'α, step size of the inner loop', STEP_SIZE, makes_model=True,
         in_name='.updatelr{}'.format),
    Flag('meta_lr', float, 1e-3, EVALUATION,
         'β, step size of the outer loop (Adam)', STEP_SIZE, makes_model=True),
    # The model
    Flag('num_filters', int, 64, NEVER,
         'filters per convolution: 64 for Omniglot, 32 for miniImagenet', POSITIVE,
         makes_model=True, in_name=lambda value: '' if value == 64 else f'hidden{value}'),
    Flag('conv', bool, True, NEVER,
         'convolutional network (images only), else fully connected', makes_model=True),
    Flag('max_pool', bool, False, NEVER,
         'max-pooling instead of strided convolutions', makes_model=True,
         in_name=lambda value: 'maxpool' if value else ''),
    Flag('stop_grad', bool, False, EVALUATION,
         'first-order approximation', makes_model=True,
         in_name=lambda value: 'stopgrad' if value else ''),
    Flag('baseline', ('oracle', 'None'), None, NEVER,
         'oracle: amplitude and phase are inputs (sinusoid only)', makes_model=True,
         in_name=lambda value: 'oracle' if value == 'oracle' else ''),
    Flag('norm', ('batch_norm', 'layer_norm', 'None'), 'batch_norm', NEVER,
         'normalisation', makes_model=True,
         in_name={'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}.get),
    Flag('network', str, '', NEVER,
         'FILE.py:FUNCTION, which takes (image_shape, num_classes) and returns a Keras model to '
         'use instead (not for sinusoid)', NETWORK,
         in_name=lambda value: f'.{value.rpartition(":")[2]}' if value else ''),
    # Inner loops that grew from MAML's
    Flag('adapt', ('all', 'head', 'body'), 'all', NEVER,
         'what the inner loop changes: all; head: the last layer (ANIL); body: the others (BOIL)',
         makes_model=True, in_name=lambda value: '' if value == 'all' else f'.{value}'),
    Flag('learn_lr', ('none', *LEARNED_RATES), 'none', NEVER,
         'learn α, from --update_lr on: one per layer; per layer and update (MAML++); per weight '
         '(Meta-SGD)', makes_model=True,
         in_name=lambda value: '' if value == 'none' else f'.lr_{value}'),
    Flag('loss_steps', ('last', 'all'), 'last', EVALUATION,
         'query losses that the outer loss adds up: after the last update, or after all, weighed '
         '(MAML++)', makes_model=True,
         in_name=lambda value: '' if value == 'last' else '.losses_all'),
    Flag('loss_steps_iterations', int, 0, EVALUATION,
         'iterations in which the weights of --loss_steps=all move to the last; after them it '
         'alone counts (0: all count alike, always)', lowest=0, makes_model=True,
         in_name=lambda value: f'{value}' if value else ''),
    Flag('first_order_iterations', int, 0, EVALUATION,
         'iterations of first order before those of second (MAML++)', lowest=0, makes_model=True,
         in_name=lambda value: f'.first{value}' if value else ''),
    Flag('norm_steps', bool, False, NEVER,
         'normalisation parameters of their own for each update (MAML++)', makes_model=True,
         in_name=lambda value: '.normsteps' if value else ''),
    Flag('meta_lr_decay', ('none', 'cosine'), 'none', EVALUATION,
         'let β fall over --metatrain_iterations (MAML++: cosine)', makes_model=True,
         in_name=lambda value: '' if value == 'none' else f'.{value}'),
    Flag('meta_lr_end', float, 0.0, EVALUATION,
         'β at the end of --meta_lr_decay', STEP_SIZE, makes_model=True,
         in_name=lambda value: f'{value}' if value else ''),
    # Logging, saving, testing
    Flag('log', bool, True, ANYTIME, 'write summaries for TensorBoard'),
    Flag('logdir', str, 'logs', ANYTIME, 'folder of the run folders', FOLDER),
    Flag('resume', bool, True, ANYTIME, 'continue from the newest checkpoint of the same run'),
    Flag('overwrite', bool, False, ANYTIME,
         'with --resume=False: remove the earlier run of the same name; with --test_iter=N: what '
         'came after iteration N'),
    Flag('validation_tasks', int, 100, EVALUATION,
         'tasks of a validation during training (images only)', lowest=2),
    Flag('train', bool, True, ANYTIME, 'train, else evaluate'),
    Flag('run', str, '', ANYTIME,
         'folder of the run to evaluate, which knows its flags; others that are given count'),
    Flag('test_iter', CheckpointParser(), -1, ANYTIME,
         'iteration of the checkpoint to load; -1: the newest; best: that of the best validation'),
    Flag('test_set', bool, False, ANYTIME,
         'evaluate on the test classes, else on the validation classes'),
    Flag('test_tasks', int, 600, ANYTIME, 'tasks of an evaluation', lowest=2),
    Flag('test_query', int, -1, ANYTIME,
         'query images per class in evaluation (-1: as many as shots; images only)', TEST_QUERY),
    Flag('transductive', bool, True, ANYTIME,
         "evaluate with batch normalisation by the queries' own statistics, else by the support "
         "set's"),
    Flag('train_update_batch_size', int, -1, ANYTIME,
         'K used in training, when evaluating with another K (-1: the same)', TRAIN_SHOTS),
    Flag('train_update_lr', float, -1, ANYTIME,
         'α used in training, when evaluating with another α (-1: the same)', TRAIN_STEP_SIZE),
)
# fmt: on


# Flags that older runs do not have, with what these did.
INNER_LOOPS = {
    name: next(flag.default for flag in FLAGS if flag.name == name)
    for name in (
        *('adapt', 'learn_lr', 'loss_steps', 'loss_steps_iterations', 'first_order_iterations'),
        *('norm_steps', 'meta_lr_decay', 'meta_lr_end'),
    )
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """The command line."""
    kinds = {int: 'integer', float: 'float', bool: 'boolean', str: 'string'}
    for flag in FLAGS:
        given = {'name': flag.name, 'default': flag.default, 'help': flag.meaning}
        given |= {'flag_values': values}
        if isinstance(flag.kind, tuple):
            flags.DEFINE_enum(enum_values=list(flag.kind), **given)
        elif isinstance(flag.kind, flags.ArgumentParser):
            flags.DEFINE(flag.kind, **given)
        else:
            lowest = {} if flag.lowest is None else {'lower_bound': flag.lowest}
            getattr(flags, f'DEFINE_{kinds[flag.kind]}')(**given, **lowest)


def settings(f: flags.FlagValues) -> dict:
    """{name: value} of the flags above, without absl's own."""
    return {flag.name: f[flag.name].value for flag in FLAGS}


def model_settings(f: flags.FlagValues) -> dict:
    """The flags that `make_model` takes."""
    return {flag.name: f[flag.name].value for flag in FLAGS if flag.makes_model}


def trained_settings(f: flags.FlagValues) -> dict:
    """As `settings`, with the K and α of training."""
    trained = settings(f)
    for name in ('update_batch_size', 'update_lr'):
        if trained[f'train_{name}'] != -1:
            trained[name] = trained[f'train_{name}']
    return trained


def run_name(f: flags.FlagValues) -> str:
    """The name of the run's folder, after the flags it was trained with."""
    trained = trained_settings(f)
    return ''.join(flag.in_name(trained[flag.name]) for flag in FLAGS if flag.in_name)


def run_folder(f: flags.FlagValues) -> Path:
    return Path(os.path.expanduser(f.run or os.path.join(f.logdir, run_name(f))))


def iterations(f: flags.FlagValues) -> tuple[int, int]:
    """(pre-training, meta-training) iterations. The oracle is jointly trained throughout."""
    if f.baseline == 'oracle':
        return f.pretrain_iterations + f.metatrain_iterations, 0
    return f.pretrain_iterations, f.metatrain_iterations


def check_flags(f: flags.FlagValues):
    """Raises ValueError with one sentence for flags that make no sense, alone or together."""
    for flag in FLAGS:
        value = f[flag.name].value
        if flag.rule and not flag.rule.holds(value):
            raise ValueError(f'--{flag.name} must be {flag.rule.text}, but it is {value}')
    check_tasks(f)
    check_inner_loop(f)
    if f.train:
        check_training(f)
    if f.overwrite and (f.resume and f.test_iter == -1 or not f.train):
        raise ValueError(
            '--overwrite removes an earlier run of the same name, so it needs --resume=False and '
            '--train=True; or what came after --test_iter=N, if training is to continue there'
        )


def check_tasks(f: flags.FlagValues):
    """The part of `check_flags` on what does not suit the source of the tasks."""
    if f.baseline == 'oracle' and f.datasource != 'sinusoid':
        raise ValueError(
            '--baseline=oracle knows amplitude and phase, so it needs --datasource=sinusoid, not '
            f'{f.datasource}'
        )
    if f.num_query != -1 and (f.datasource == 'sinusoid' or is_spec(f.datasource)):
        raise ValueError(
            f'--num_query={f.num_query} is for images, so it needs --datasource=omniglot, '
            f'miniimagenet or folder, not {f.datasource}'
        )
    if f.metatrain_iterations == 0 and f.datasource == 'miniimagenet' and f.update_batch_size != 1:
        raise ValueError(
            'a plain network on miniimagenet (--metatrain_iterations=0) takes one image per class, '
            f'so it needs --update_batch_size=1, not {f.update_batch_size}'
        )
    if f.num_classes == 1 and f.datasource in ('omniglot', 'miniimagenet', 'folder'):
        raise ValueError('--num_classes=1: between images of one class there is nothing to learn')
    if f.network:
        check_network(f)
    elif f.max_pool and (f.datasource == 'sinusoid' or not f.conv):
        print(
            '--max_pool is part of the name of the run, but does nothing without convolutions.',
            file=sys.stderr,
        )


def check_inner_loop(f: flags.FlagValues):
    """The part of `check_flags` on what the inner loop changes, and how it is learned."""
    if f.loss_steps_iterations and f.loss_steps == 'last':
        raise ValueError(
            f'--loss_steps_iterations={f.loss_steps_iterations} anneals the losses after all '
            'updates, so it needs --loss_steps=all'
        )
    if f.first_order_iterations and f.stop_grad:
        raise ValueError(
            '--stop_grad is of first order throughout, so it goes without '
            f'--first_order_iterations={f.first_order_iterations}'
        )
    if f.norm_steps and f.adapt == 'head':
        raise ValueError(
            '--norm_steps changes normalisation from update to update, but with --adapt=head all '
            'layers before the last are computed once: give one of the two'
        )
    if f.norm_steps and f.norm == 'None' and not f.network:
        raise ValueError('--norm_steps needs a normalisation, not --norm=None')
    if f.meta_lr_end and f.meta_lr_decay == 'none':
        raise ValueError(f'--meta_lr_end={f.meta_lr_end} needs --meta_lr_decay=cosine')
    if f.meta_lr_end > f.meta_lr:
        raise ValueError(
            f'--meta_lr_end={f.meta_lr_end} must not be above --meta_lr={f.meta_lr}, where β begins'
        )
    if f.meta_lr_decay != 'none' and (iterations(f)[0] or not f.metatrain_iterations):
        raise ValueError(
            f'--meta_lr_decay={f.meta_lr_decay} is over meta-training alone, so it goes without '
            '--pretrain_iterations and --baseline=oracle, and needs --metatrain_iterations above 0'
        )


def check_network(f: flags.FlagValues):
    """The part of `check_flags` on --network."""
    if f.datasource == 'sinusoid':
        raise ValueError(
            f'--network={f.network} needs images or tasks of your own: --datasource=omniglot, '
            'miniimagenet, folder or FILE.py:FUNCTION, not sinusoid'
        )
    names = ('num_filters', 'conv', 'max_pool', 'norm')
    changed = [f'--{name}' for name in names if f[name].value != f[name].default]
    if changed:
        print(
            f'{" and ".join(changed)} may be part of the name of the run, but --network makes '
            'another network.',
            file=sys.stderr,
        )


def check_training(f: flags.FlagValues):
    """The part of `check_flags` on what training cannot use."""
    for name, is_asked in {
        'run': f.run != '',
        'test_query': f.test_query != -1,
        'transductive': not f.transductive,
        'test_iter': f.test_iter == 'best',
    }.items():
        if is_asked:
            text = f'--{name}={f[name].value} is for evaluation, so it needs --train=False'
            raise ValueError(text)
    if f.test_iter != -1 and not f.resume:
        raise ValueError(
            f'--test_iter={f.test_iter} continues from a checkpoint, and --resume=False begins '
            'afresh: give one of them'
        )
    if sum(iterations(f)) == 0:
        raise ValueError(
            'there is nothing to train: set --metatrain_iterations or --pretrain_iterations above 0'
        )
    same_shots = f.train_update_batch_size in (-1, f.update_batch_size)
    if not same_shots or f.train_update_lr not in (-1, f.update_lr):
        raise ValueError(
            '--train_update_batch_size and --train_update_lr name the run to evaluate, so they '
            'need --train=False'
        )
    if f.log and importlib.util.find_spec('tensorboard') is None:
        raise ValueError(
            '--log writes summaries with the package tensorboard, which is not installed: run '
            '`pip install tensorboard` or give --log=False'
        )


# The tasks ----------------------------------------------------------------------------------------


def make_generators(f: flags.FlagValues, run: dict | None = None) -> dict[str, DataGenerator]:
    """{'train': ..., 'val': ...} for training, {'val' or 'test': ...} for evaluation.

    run: what the run knows of its data, see `data_of_run`.
    """
    splits = {'test' if f.test_set else 'val': EVALUATION_SEED}
    if f.train:
        splits = {'train': f.seed, 'val': EVALUATION_SEED}
    shots = f.update_batch_size
    if f.datasource == 'sinusoid':
        make, given = SinusoidGenerator, (shots, shots, f.baseline == 'oracle')
        return {split: make(*given, seed=seed) for split, seed in splits.items()}
    if is_spec(f.datasource):
        own = user_function(f.datasource)()
        with user_code(f.datasource, all_of_it=False):
            return dict.fromkeys(splits, UserTasks(own, f.datasource, splits, f.meta_batch_size))
    make = OmniglotGenerator if f.datasource == 'omniglot' else ImageGenerator
    run = run or {}
    folders, counts, fit = load_images(f, [*splits], run)
    counts |= (f.train and run.get('classes')) or {}  # of splits that are not there any more too
    generators, given = {}, (folders, f.num_classes, shots, query_images(f))
    for split, seed in splits.items():
        generators[split] = source = make(*given, seed=seed, splits=[split])
        source.classes, source.settled_flags = counts, {'fit': fit}
    return generators


def load_images(f: flags.FlagValues, splits: list[str], run: dict) -> tuple[dict, dict, str | None]:
    """The classes of each split; and what a run is to know of its data, see `data_of_run`."""
    data_dir, cache_dir = os.path.expanduser(f.data_dir), f.cache_dir or None
    known = run.get('classes')
    if f.datasource == 'folder':
        fit = f.fit or run.get('fit', 'crop')
        own = OwnImages(data_dir, folder_layout(f.image_size, f.channels, fit), splits)
        size = TaskSize(f.num_classes, f.update_batch_size, query_images(f))
        own.choose(split_proportions(f.split), size, f.skip_small_classes, known)
        return own.load(cache_dir), own.counts, fit
    if f.datasource == 'omniglot':
        folders = load_omniglot(data_dir, cache_dir)
    else:
        folders = load_miniimagenet(data_dir, splits, cache_dir)
    folders = as_in_run(folders, splits, known)
    counts = {split: classes.sizes() for split, classes in folders.items()}
    return folders, counts, f.fit


def data_of_run(replicas: Replicas, iteration: int, state: dict) -> dict:
    """What a run knows of its data, the same in all workers; empty of a new run.

    'classes': {split: {class: how many images}}, None in checkpoints from before they were kept;
    'fit': of images of one's own. iteration, state: of the checkpoint, as from `restore_run`.
    """
    fit = state.get('flags', {}).get('fit') or 'squash'
    data = {'classes': state.get('classes'), 'fit': fit}
    text = np.frombuffer(json.dumps(data if iteration >= 0 else {}).encode(), np.uint8)
    (length,) = replicas.agree([np.int64(len(text))])
    numbers = np.int64(text) if replicas.is_chief else np.zeros(int(length), np.int64)
    (numbers,) = replicas.agree([numbers])
    return json.loads(bytes(np.uint8(numbers)))


def query_images(f: flags.FlagValues) -> int:
    """Q, per class: the original's, if --num_query or --test_query does not say otherwise."""
    asked = f.num_query if f.train else f.test_query
    if asked != -1:
        return asked
    if f.datasource == 'miniimagenet' and f.metatrain_iterations == 0:
        return 0
    if f.datasource == 'miniimagenet' and f.train:
        return MINIIMAGENET_QUERY_IMAGES
    return f.update_batch_size


# Checkpoints --------------------------------------------------------------------------------------


def find_checkpoints(folder: Path, f: flags.FlagValues) -> dict[int, str]:
    """{iteration: path} of the checkpoints that may be loaded, the best choice first.

    None if training starts afresh. Raises ValueError.
    """
    found = checkpoints(folder, 'best' if f.test_iter == 'best' else 'model')
    if f.train and (not f.resume or not found and f.test_iter == -1):
        return {}
    if not found and f.test_iter == 'best' and checkpoints(folder):
        raise ValueError(
            f'--test_iter=best: {folder} has no best checkpoint; training keeps one from its first '
            f'validation on, at iteration {VALIDATION_INTERVAL}: train on, or leave --test_iter '
            f'away for the newest, of iteration {max(checkpoints(folder))}'
        )
    if not found:
        raise ValueError(
            f'{folder} holds no checkpoint{other_runs(folder)}: train first with the same flags, '
            'or give --run=FOLDER, or --logdir, --train_update_batch_size and --train_update_lr of '
            'the training run'
        )
    if f.test_iter in (-1, 'best'):
        return dict(reversed(found.items()))
    if f.test_iter not in found:
        raise ValueError(
            f'--test_iter={f.test_iter}: {folder} has no such checkpoint, but those of the '
            f'iterations {", ".join(map(str, found))}'
        )
    return {f.test_iter: found[f.test_iter]}


def take_run(f: flags.FlagValues):
    """With --run, flags that are not given become those that the run was trained with.

    These are the ones that could not change in training, and where the data are, if they are there.
    Raises ValueError for a folder that is no run, and for flags that --run contradicts.
    """
    if not f.run:
        return
    naming = ('logdir', 'train_update_batch_size', 'train_update_lr')
    if given := [f'--{name}' for name in naming if f[name].present]:
        raise ValueError(f'--run={f.run} names the folder already: leave {given[0]} away')
    stored = stored_flags(run_folder(f), f)
    for name in ('data_dir', 'cache_dir'):
        if not os.path.isdir(os.path.expanduser(stored.get(name, ''))):
            stored.pop(name, None)  # of another machine
    for name in ('datasource', 'network'):
        # A checkpoint may come from anywhere: no file is run because it names it.
        if is_spec(stored.get(name, '')) and not f[name].present:
            raise ValueError(
                f'{f.run} was trained with --{name}={stored[name]}, which is not run unasked: give '
                'it again'
            )
    besides = ('data_dir', 'cache_dir', 'skip_small_classes', 'metatrain_iterations')
    for flag in FLAGS:
        taken = flag.may_change != ANYTIME or flag.name in besides
        if taken and flag.name in stored and not f[flag.name].present:
            f[flag.name].value = stored[flag.name]


def stored_flags(folder: Path, f: flags.FlagValues) -> dict:
    """The flags in the checkpoint of a run that --test_iter asks for.

    Raises ValueError if the folder is no run, or the run does not tell them.
    """
    if not any(checkpoints(folder, kind) for kind in ('model', 'best')):
        raise ValueError(
            f'--run={f.run} must be a folder that main.py trained in, LOGDIR/cls_..., but it has '
            f'no checkpoint{other_runs(folder)}'
        )
    reason = ValueError(
        f'--run={f.run} does not tell the flags it was trained with: give them, and --logdir'
    )
    for path in find_checkpoints(folder, f).values():
        try:
            if stored := read_run_state(path).get('flags'):
                return stored
        except DamagedCheckpoint as error:
            reason = error
    raise reason


def load(model: FastMAML, candidates: dict[int, str], f: flags.FlagValues) -> tuple[int, dict]:
    """Loads the first checkpoint that is whole; says which are not.

    Returns its iteration and state (-1 and {} if none). Raises ValueError if all are damaged or
    the flags contradict those that it was written with.
    """
    if not candidates:
        return -1, {}
    try:
        iteration, path, state = first_whole(candidates, tell)
    except DamagedCheckpoint as error:
        raise ValueError(f'{error}; remove it, or name another with --test_iter') from error
    check_contradictions(path, iteration, state.get('flags', {}), f)
    restore(model, path, f)
    return iteration, state


def tell(text: str):
    print(f'main.py: {text}', file=sys.stderr)


def check_contradictions(path: str, iteration: int, stored: dict, f: flags.FlagValues):
    """Raises ValueError with the flags that are not those of the run up to this iteration.

    stored: the flags that the checkpoint holds; one that is younger than it, it does not hold.
    """
    fixed = (EVALUATION, NEVER) if f.train else (NEVER,)
    stored = {'fit': 'squash'} | INNER_LOOPS | stored  # what runs did that are older than the flags
    names = [flag.name for flag in FLAGS if flag.may_change in fixed and flag.name in stored]
    names += [name for name in held_by_learning(stored, f.train) if name not in names]
    names = [name for name in names if name != 'fit' or f.fit]  # else it is the run's
    pretrained = min(stored.get('pretrain_iterations', 0), f.pretrain_iterations)
    if 'pretrain_iterations' in names and (f.baseline == 'oracle' or iteration < pretrained):
        # So far it has trained jointly, and so it would have with the other number.
        names.remove('pretrain_iterations')
    wrong = [name for name in names if stored[name] != f[name].value]
    alike = {'miniimagenet', 'folder'}  # to evaluate the model of one on the other is no mistake
    if not f.train and {stored.get('datasource'), f.datasource} <= alike:
        wrong = [name for name in wrong if name != 'datasource']
    if wrong:
        listed = ', '.join(f'--{name}={stored[name]} (now {f[name].value})' for name in wrong)
        remedy = 'give the same flags, or another --logdir'
        if f.run:
            remedy = 'no evaluation can change that, so leave it away'
        raise ValueError(f'{path} was trained with {listed}: {remedy}')


def held_by_learning(stored: dict, train: bool) -> list[str]:
    """Flags that could change, were it not for what a run with such flags has learned."""
    held = []
    if stored.get('meta_lr_decay') == 'cosine' and train:
        held.append('metatrain_iterations')  # β so far would have been another
    if stored.get('learn_lr') in LEARNED_RATES:
        held.append('update_lr')  # it was the beginning only
    if stored.get('learn_lr') == 'layer_step' or stored.get('norm_steps'):
        held.append('num_updates')
    return held


def restore(model: FastMAML, path: str, f: flags.FlagValues):
    """Loads a checkpoint that is whole. Raises ValueError if it is another network's."""
    try:
        complete = model.restore(path)
    except ValueError as error:
        raise ValueError(
            f'{error}; give the flags of the run that wrote it, or another --logdir'
        ) from error
    print(f'Restoring model weights from {path}')
    if f.train and not complete:
        print('The checkpoint holds the weights only, so Adam starts afresh.')


# What is printed, and shown in TensorBoard --------------------------------------------------------


class Log(Observer):
    """Summaries for TensorBoard, the original's printed lines, and a line of progress.

    objective: of the source, 'loss' or 'accuracy'. pretrain, end: iterations of joint training, and
    of both. update: the number of inner updates whose outcome is printed, None if there are no
    query sets to tell of it. interval: iterations between printed lines. start: the first
    iteration; state: what `state` gave before it. folder: of the summaries, if there are to be any.
    """

    def __init__(
        self,
        objective: str,
        pretrain: int,
        end: int,
        update: int | None,
        interval: int,
        start: int = 0,
        state: dict | None = None,
        folder: Path | None = None,
    ):
        self.objective, self.pretrain, self.end, self.start = objective, pretrain, end, start
        self.update, self.interval = update, interval
        before, after = (state or {}).get('printing', ([], []))
        # What the next printed line is the mean of.
        self.before, self.after = [*map(np.float32, before)], [*map(np.float32, after)]
        self.best = ((state or {}).get('best') or {}).get(objective, np.nan)  # of the validations
        self.folder = folder
        self.clock = self.shown = time.perf_counter()
        self.writer = tf.summary.create_file_writer(os.fsencode(folder)) if folder else None
        self.shows_pictures = self.writer is not None

    def state(self) -> dict:
        return {'printing': [[*map(float, values)] for values in (self.before, self.after)]}

    def introduce(self, values: dict):
        """Writes the flags of a run that begins, and says what the lines to come hold.

        TensorBoard's HPARAMS tab gets those of a run that goes on too: they may be others.
        """
        if self.writer:
            write_session(self.writer, values, str(self.folder), self.end)
        if self.writer and self.start == 0:
            rows = ['flag | value', '--- | ---']
            rows += [f'`--{name}` | {value}' for name, value in values.items()]
            with self.writer.as_default():
                tf.summary.text('flags', in_utf8('\n'.join(rows)), step=self.start)
        updates = '1 update' if self.update == 1 else f'{self.update} updates'
        after = f', and on the query sets after {updates}' if self.update else ''
        self.line(
            f'To be printed every {self.interval} iterations: mean {self.objective} on the support '
            f'sets before any update{after}.'
        )

    def summaries(self, prefix: str, results: Results, iteration: int) -> list[float]:
        """Writes the scalars of one meta-batch under the original's tags.

        Returns the means of the objective to print: before any update, and after `update`.
        """
        for kind in ('loss',) if self.objective == 'loss' else ('loss', 'accuracy'):
            before, after = results.of(kind)
            pre, post = np.mean(before), np.mean(after, axis=1) if self.update else []
            tags = [f'Pre-update_{kind}']
            tags += [f'Post-update_{kind}__step_{j}' for j in range(1, len(post) + 1)]
            self._write(tuple(f'{prefix}_{tag}' for tag in tags), [pre, *post], iteration)
        return [pre, post[self.update - 1]] if self.update else [pre]  # the objective comes last

    def _write(self, tags: tuple[str, ...], values: list, iteration: int):
        if self.writer:
            self._scalars(tags, tf.constant(values), tf.constant(iteration, tf.int64))

    @tf.function(autograph=False)  # one call for all of them takes a fifth of the time
    def _scalars(self, tags: tuple[str, ...], values: tf.Tensor, iteration: tf.Tensor):
        with self.writer.as_default():
            for i, tag in enumerate(tags):
                tf.summary.scalar(tag, values[i], step=iteration)

    def training(self, results: Results, iteration: int):
        """Prints the means of all meta-batches since the last line, if one is due."""
        means = self.summaries('metatrain', results, iteration)
        for shown, mean in zip((self.before, self.after), means):
            shown.append(mean)
        if self.update:
            self._write((f'last_training_{self.objective}',), [np.mean(self.after)], iteration)
        if iteration % self.interval == 0 and iteration != 0:
            label = f'Iteration {iteration - self.pretrain}'
            if iteration < self.pretrain:
                label = f'Pretrain Iteration {iteration}'
            means = [np.mean(shown) for shown in (self.before, self.after) if shown]
            self.line(f'{label}: {", ".join(map(str, means))}')
            self.before, self.after = [], []

    def step_sizes(self, rates: dict[str, np.ndarray], iteration: int):
        """Writes a scalar each; of those of many weights the mean, and a histogram."""
        means = [np.float32(np.mean(value)) for value in rates.values()]
        self._write(tuple(f'update_lr/{name}' for name in rates), means, iteration)
        for name, value in rates.items():
            if self.writer and np.ndim(value):
                with self.writer.as_default():
                    tf.summary.histogram(f'update_lr/{name}/all', value, step=iteration)

    def validation(self, results: Results, interval: float, iteration: int):
        before, after = self.summaries('metaval', results, iteration)
        self.line(f'Validation results: {before}, {after}')
        better = np.fmax if self.objective == 'accuracy' else np.fmin  # a nan is never the best
        self.best = better(self.best, after)
        tags = (
            f'metaval_Post-update_{self.objective}_interval',
            f'last_validation_{self.objective}',
            f'best_validation_{self.objective}',
        )
        self._write(tags, [*map(np.float32, (interval, after, self.best))], iteration)

    def steps(self, first: int, last: int, loss: float):
        """The first step's time, compilation included; then where the run is.

        On a terminal that is a line that changes every second, else one after each printed line.
        """
        now = time.perf_counter()
        if first == self.start:
            self.line(f'The first step took {now - self.clock:.1f} s, compilation included.')
            self.clock = now  # of the steps after it
        iteration, done = last - 1, last - 1 - self.start
        due = iteration % self.interval == 0 and iteration != 0
        if sys.stdout.isatty():
            due = now - self.shown > 1
        if done and due:
            self.shown, rate = now, done / (now - self.clock)
            left = min((self.end - last) / rate, datetime.timedelta.max.total_seconds() / 2)
            left = datetime.timedelta(seconds=round(left))
            where = f'{last} of {self.end} iterations, {rate:.3g} per second, {left} left'
            end = '\033[K\r' if sys.stdout.isatty() else '\n'
            print(f'{where}, loss {loss:.4g}', end=end, flush=True)

    def picture(self, name: str, picture: np.ndarray, iteration: int):
        with self.writer.as_default():
            tf.summary.image(name, picture[np.newaxis], step=iteration)

    def line(self, text: str):
        print(text + ('\033[K' if sys.stdout.isatty() else ''), flush=True)

    def flush(self):
        try:
            if self.writer:
                self.writer.flush()
        except tf.errors.OpError as error:
            raise OSError(f'the summaries cannot be written ({first_line(error)})') from error

    def close(self):
        with suppress(tf.errors.OpError):
            if self.writer:
                self.writer.close()


def in_utf8(text: str) -> str:
    """The same text, but for the bytes of a path that is not UTF-8, which TensorBoard refuses."""
    return text.encode(errors='backslashreplace').decode()


def write_session(writer: tf.summary.SummaryWriter, values: dict, run: str, end: int):
    """The flags that tell a run from others, for TensorBoard's HPARAMS tab.

    values: of all flags. run: its folder. end: the iteration it is to end with; the flags are
    written as if they belonged to it, so that a run that goes on forgets them and writes its own.
    """
    from tensorboard.plugins.hparams import summary_v2  # --log=False does without the package

    telling = [flag.name for flag in FLAGS if flag.may_change != ANYTIME]
    shown = {name: values[name] for name in (*telling, 'metatrain_iterations')}
    for name, value in shown.items():
        if value is None or isinstance(value, str):
            shown[name] = in_utf8(str(value))
    session = summary_v2.hparams_pb(shown, trial_id=in_utf8(run))
    with writer.as_default():
        tf.summary.experimental.write_raw_pb(session.SerializeToString(), step=end)


# Training -----------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """Everything that a run needs; see `prepare`."""

    model: FastMAML
    generators: dict[str, DataGenerator]  # none if the run is complete
    folder: Path
    start: int  # the first iteration that is left
    state: dict  # of the checkpoint before it


def make_trainer(run: Prepared, f: flags.FlagValues) -> Trainer:
    """The training loop that the flags describe, and what it prints."""
    source, (pretrain, _) = run.generators['train'], iterations(f)
    intervals = (SUMMARY_INTERVAL, PICTURE_INTERVAL, VALIDATION_INTERVAL, SAVE_INTERVAL)
    schedule = Schedule(pretrain, sum(iterations(f)), *intervals)
    log = Log(
        source.objective,
        pretrain,
        schedule.end,
        f.num_updates if source.has_queries else None,
        PRINT_INTERVAL * source.print_factor,
        run.start,
        run.state,
        run.folder if f.log and run.model.replicas.is_chief else None,
    )
    log.introduce(settings(f))
    return Trainer(
        run.model,
        run.generators,
        f.meta_batch_size,
        schedule,
        run.folder,
        log,
        run.start,
        run.state,
        settings(f) | source.model_settings | source.settled_flags,
        f.validation_tasks,
    )


class Signals:
    """SIGINT, SIGTERM and SIGHUP become a request to stop, while entered; the second one stops at
    once.

    SIGHUP comes when the terminal is closed. `nohup` has it ignored, and so it stays.
    """

    def __init__(self):
        self.received, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, HANG_UP):
                if number and (number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, _):
        if number == HANG_UP:
            leave_terminal()
        if self.received:
            sys.exit(128 + number)
        self.received = number
        print('\nStopping after this iteration; once more to stop at once.', file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_terminal():
    """Prints to nowhere what would go to a terminal: writing to a closed one is an error."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def train(trainer: Trainer, watch: Callable = iter):
    """Trains to the end, or until a signal; exits with 128 + its number then."""
    with Signals() as signals:
        try:
            done = trainer.run(lambda: bool(signals.received), watch)
        finally:
            trainer.log.close()
    end = trainer.schedule.end
    if done < end:
        print(
            f'Saved {trainer.folder}/model{done - 1}; {command_again(trainer.settings)} continues '
            f'at iteration {done} of {end}.'
        )
        sys.exit(128 + (signals.received or signal.SIGTERM))  # another worker's signal stops all


def command_again(given: dict) -> str:
    """What continues a run: the command without what said where this process was to begin."""
    names = ('resume', 'overwrite', 'test_iter')
    defaults = {flag.name: flag.default for flag in FLAGS}
    once = [f'--{name}={given[name]}' for name in names if given[name] != defaults[name]]
    return f'the same command{" without " if once else ""}{" and ".join(once)}'


# Evaluation ---------------------------------------------------------------------------------------


def evaluate(run: Prepared, f: flags.FlagValues):
    """--test_tasks tasks: prints means, standard deviations and 95 % intervals over 0...10 updates.

    As the original does, then as a table. Writes them as csv and pkl; besides the original's
    `mses`, the latter tells the iteration of the checkpoint and the split.
    """
    ((split, source),) = run.generators.items()
    updates, rows = max(f.num_updates, EVALUATION_UPDATES), []
    tasks = (split, f.test_tasks, updates, f.transductive)
    for row in evaluate_tasks(run.model, source, *tasks):
        rows.append(row)
        if sys.stdout.isatty():
            done = len(row) * len(rows)
            print(f'{done} of {f.test_tasks} tasks', end='\033[K\r', flush=True)
    values = np.concatenate(rows)[: f.test_tasks]  # [tasks, 1 + updates]
    if not source.has_queries:
        values = values[:, :1]
        print(
            'There are no query images, as in the original, to tell of updates: '
            f'--test_query={MINIIMAGENET_QUERY_IMAGES} takes some.'
        )
    with np.errstate(invalid='ignore', over='ignore'):  # of tasks that diverge
        mean, stddev = values.mean(0), values.std(0)
    interval = 1.96 * stddev / np.sqrt(len(values))
    print('Mean validation accuracy/loss, stddev, and confidence intervals')
    print((mean, stddev, interval))
    objective = 'accuracy' if source.objective == 'accuracy' else 'squared error'
    what = f'{objective} on {len(values)} {SPLITS[split]} tasks'
    paper = {} if other_data(run, f) else paper_figures(run.state, f)
    print(*result_table(what, mean, interval, paper), sep='\n')
    if caution := source.caution(split):
        print(caution)
    if not run.model.replicas.is_chief:
        return
    path = run.folder / f'{evaluation_name(f)}{other_data(run, f)}'
    content = {'mses': values, 'iteration': run.start - 1, 'split': split}
    header = [f'update{j}' for j in range(len(mean))]
    rows = [[*row, split, run.start - 1] for row in (mean, stddev, interval)]
    text = io.StringIO()
    csv.writer(text).writerows([header + ['split', 'iteration'], *rows])
    written = {'pkl': pickle.dumps(content), 'csv': text.getvalue().encode()}
    write_together({path.with_name(f'{path.name}.{end}'): of for end, of in written.items()})


def other_data(run: Prepared, f: flags.FlagValues) -> str:
    """What a result's name ends with if it is on classes that the run does not know."""
    ((split, source),) = run.generators.items()
    known = (run.state.get('classes') or {}).get(split)
    if known in (None, source.classes.get(split)):
        return ''
    return f'_on_{os.path.basename(os.path.abspath(os.path.expanduser(f.data_dir)))}'


def result_table(what: str, mean: np.ndarray, interval: np.ndarray, paper: dict) -> list[str]:
    """The lines of a table of means and halves of their 95 % intervals, [1 + updates] each.

    what: they are of, beginning with the objective: accuracies are shown in percent. paper:
    {updates: its figure}. A mean that does not exist is shown as a hyphen.
    """
    scale, digits = (100, '.2f') if what.startswith('accuracy') else (1, '.4g')
    unit = ', %' if scale == 100 else ''
    lines = [f'Mean {what}{unit}', 'updates      mean    95 % interval']
    for update, (value, half) in enumerate(zip(scale * mean, scale * interval)):
        shown = (f'{value:{digits}}', f'+- {half:{digits}}') if np.isfinite(value) else ('-', '-')
        note = '   on the support sets' if update == 0 else ''
        if update in paper:
            note += f'   paper, on test tasks: {paper[update]}'
        lines.append(f'{update:7} {shown[0]:>9}    {shown[1]:<13}{note}'.rstrip())
    return lines


def evaluation_name(f: flags.FlagValues) -> str:
    """Of the files that hold an evaluation, without suffix.

    It is the original's for the test classes and the newest checkpoint, and tells what is not so.
    """
    parts = [
        f'test_ubs{f.update_batch_size}_stepsize{f.update_lr}',
        f'_query{f.test_query}' if f.test_query != -1 else '',
        f'_tasks{f.test_tasks}' if f.test_tasks != f['test_tasks'].default else '',
        '' if f.transductive else '_inductive',
        '' if f.test_set else '_val',
        {-1: '', 'best': '_best'}.get(f.test_iter, f'_iteration{f.test_iter}'),
    ]
    return ''.join(parts)


# The paper's tables -------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One entry of a table, the paper's or another's."""

    name: str  # the script's and the folder's
    title: str
    group: str  # cells that are drawn together
    kind: str  # title within the group
    paper: str  # what it says
    updates: int  # the paper's number of updates in evaluation
    settings: dict  # flags of main.py, as in the script
    published: tuple = ()  # (figure, whose) where it is not in MAML's paper; the first is `paper`

    @property
    def numbers(self) -> list[float]:
        """The numbers in `paper`: a value and half of its interval.

        Of sinusoids they are the errors after 1, 5 and 10 updates.
        """
        return [float(number) for number in re.findall(r'[\d.]+', self.paper)]

    @property
    def figures(self) -> dict[int, str]:
        """{updates: what the paper says}."""
        if self.settings['datasource'] == 'sinusoid':
            return dict(zip((1, 5, 10), self.paper.split(' / '))) if self.paper else {}
        return {self.updates: self.paper.replace('±', '+-')}

    @property
    def test_shots(self) -> int:
        """K in the paper's evaluation; its sinusoid was trained with another."""
        is_sinusoid = self.settings['datasource'] == 'sinusoid'
        return 5 if is_sinusoid else self.settings['update_batch_size']


def omniglot(ways: int, shots: int, paper: str, conv: bool = True) -> Cell:
    few = ways == 5
    settings = dict(
        datasource='omniglot',
        num_classes=ways,
        update_batch_size=shots,
        update_lr=0.4 if few else 0.1,
        num_updates=1 if few else 5,
        meta_batch_size=32 if few else 16,
        conv=conv,
        num_filters=64,
        max_pool=False,
        stop_grad=False,
    )
    more = '' if conv else ', no convolutions'
    return Cell(
        f'omniglot_{ways}way_{shots}shot' + ('' if conv else '_no_conv'),
        f'Omniglot, {ways}-way {shots}-shot{more}',
        f'Omniglot, {ways}-way{more}',
        f'{shots}-shot',
        paper,
        3 if few else 5,
        settings,
    )


def miniimagenet(shots: int, paper: str, first_order: bool = False) -> Cell:
    settings = dict(
        datasource='miniimagenet',
        num_classes=5,
        update_batch_size=shots,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4 if shots == 1 else 2,
        conv=True,
        num_filters=32,
        max_pool=True,
        stop_grad=first_order,
    )
    kind = f'{shots}-shot' + ', first order' * first_order
    return Cell(
        f'miniimagenet_5way_{shots}shot' + '_first_order' * first_order,
        f'miniImagenet, 5-way {kind}',
        'miniImagenet, 5-way',
        kind,
        paper,
        10,
        settings,
    )


def cifar_fs(shots: int, *published: tuple[str, str]) -> Cell:
    settings = dict(
        datasource='folder',
        image_size=32,
        num_classes=5,
        update_batch_size=shots,
        num_query=15,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4,
        conv=True,
        num_filters=32,
        max_pool=True,
        stop_grad=False,
    )
    return Cell(
        f'cifar_fs_5way_{shots}shot',
        f'CIFAR-FS, 5-way {shots}-shot',
        'CIFAR-FS, 5-way',
        f'{shots}-shot',
        published[0][0],
        10,
        settings,
        published,
    )


def omniglot_variant(name: str, kind: str, *published: tuple[str, str], **settings) -> Cell:
    """Omniglot, 20-way 1-shot, by an inner loop that grew from MAML's."""
    cell = omniglot(20, 1, published[0][0])
    return cell._replace(
        name=f'{cell.name}_{name}',
        title=f'{cell.title}, {kind}',
        kind=f'{cell.kind}, {kind}',
        settings=cell.settings | settings,
        published=published,
    )


def sinusoid(
    name: str, title: str, paper: str, baseline: str | None = None, update_lr: float = 0.01
) -> Cell:
    settings = dict(
        datasource='sinusoid',
        update_batch_size=10,
        update_lr=update_lr,
        num_updates=1,
        meta_batch_size=25,
        norm='None',
        baseline=baseline,
        stop_grad=False,
    )
    return Cell(name, title, 'Sinusoid', title, paper, 10, settings)


CELLS = [
    omniglot(5, 1, '89.7 ± 1.1', conv=False),
    omniglot(5, 5, '97.5 ± 0.6', conv=False),
    omniglot(5, 1, '98.7 ± 0.4'),
    omniglot(5, 5, '99.9 ± 0.1'),
    omniglot(20, 1, '95.8 ± 0.3'),
    omniglot(20, 5, '98.9 ± 0.2'),
    miniimagenet(1, '48.07 ± 1.75', first_order=True),
    miniimagenet(1, '48.70 ± 1.84'),
    miniimagenet(5, '63.15 ± 0.91', first_order=True),
    miniimagenet(5, '63.11 ± 0.92'),
]
# Entries of tables in other papers.
OTHER_CELLS = [
    cifar_fs(1, ('58.9 ± 1.9', 'Bertinetto et al. 2019'), ('56.8 ± 1.9', 'Devos et al. 2019')),
    cifar_fs(5, ('71.5 ± 1.0', 'Bertinetto et al. 2019'), ('70.8 ± 0.9', 'Devos et al. 2019')),
    omniglot_variant('anil', 'ANIL', ('96.2 ± 0.5', 'Raghu et al. 2020'), adapt='head'),
    omniglot_variant(
        'maml_plus_plus',
        'MAML++',
        ('97.65 ± 0.05', 'Antoniou et al. 2019'),
        ('96.65 ± 0.06', 'the same program, run by another'),
        learn_lr='layer_step',
        loss_steps='all',
        loss_steps_iterations=6000,
        first_order_iterations=20000,
        norm_steps=True,
        meta_lr_decay='cosine',
        meta_lr_end=0.00001,
    ),
]
MAML_ERRORS = '.67 / .38 / .35'
SINUSOIDS = [
    sinusoid('sinusoid', 'MAML', MAML_ERRORS),
    sinusoid('sinusoid_published_command', 'MAML, α = 0.001', MAML_ERRORS, update_lr=0.001),
    sinusoid('sinusoid_pretrain', 'pre-trained on all tasks', '2.41 / 2.23 / 2.19'),
    sinusoid('sinusoid_oracle', 'oracle', '', 'oracle'),
]


def same(value, wanted) -> bool:
    """Whether two values of a flag are the same; --baseline=None is the text 'None'."""
    return value == wanted or str(value) == str(wanted) == 'None'


def paper_figures(state: dict, f: flags.FlagValues) -> dict[int, str]:
    """{updates: what the paper's tables have after as many}, for an evaluation of one of its cells.

    state: of the checkpoint, with the flags that it was trained with. Empty for other evaluations.
    """
    trained = trained_settings(f) | state.get('flags', {})
    if f.test_query != -1 or not f.transductive or f.update_lr != trained['update_lr']:
        return {}
    telling = [flag for flag in FLAGS if flag.makes_model or flag.in_name]
    others = ('seed', 'metatrain_iterations')
    joint = trained['metatrain_iterations'] == 0
    for cell in CELLS + SINUSOIDS:
        wanted = {flag.name: flag.default for flag in telling if flag.name not in others}
        wanted |= cell.settings
        differing = [name for name in wanted if not same(trained.get(name), wanted[name])]
        pretrained = cell.name == 'sinusoid_pretrain'
        if not differing and joint == pretrained and f.update_batch_size == cell.test_shots:
            return cell.figures
    return {}


# The program --------------------------------------------------------------------------------------


def prepare(f: flags.FlagValues, held: ExitStack, norm: Normalization | None = None) -> Prepared:
    """Everything that can fail for the user's reasons, before anything is written.

    held: keeps the lock on the folder. norm: a normalisation of one's own, instead of --norm.
    Raises ValueError, OSError and UserCodeError.
    """
    check_flags(f)
    folder, total = run_folder(f), sum(iterations(f))
    replicas = make_replicas(f)
    replicas.slice_of(f.meta_batch_size)
    own = make_generators(f) if is_spec(f.datasource) else {}
    model = build_model(f, own, replicas, norm, trained_seed(folder, f))
    iteration, state = restore_run(model, folder, f, held) if replicas.is_chief else (-1, {})
    start = int(replicas.agree([np.int64(iteration)])[0]) + 1
    model.agree()
    if f.train and start >= total:
        print(complete(start, f))
        return Prepared(model, {}, folder, start, state)
    generators = own or make_generators(f, data_of_run(replicas, iteration, state))
    if replicas.is_chief:
        open_folder(folder, f, start, held)
        if f.overwrite and not best_is_there(folder, state):
            state = {**state, 'best': None}
    if f.train and start > 0:
        print(f'Continuing at iteration {start} of {total}.')
    return Prepared(model, generators, folder, start, state)


def complete(done: int, f: flags.FlagValues) -> str:
    """Says that nothing is left to train."""
    total, joint = sum(iterations(f)), f.metatrain_iterations == 0
    if f.meta_lr_decay != 'none':
        return f'The run is complete: {done} of {total} iterations, and β has come to its end.'
    flag = '--pretrain_iterations' if joint else '--metatrain_iterations'
    of = f'of {total} iterations' if done == total else f'iterations, and {total} are asked for'
    return f'The run is complete: {done} {of}; raise {flag} for more.'


def build_model(
    f: flags.FlagValues,
    generators: dict[str, DataGenerator],
    replicas: Replicas | None = None,
    norm: Normalization | None = None,
    seed: int | None = None,
) -> FastMAML:
    """The model that the flags describe.

    generators: of the user's own tasks, whose sizes it takes. seed: if it is not --seed. Others as
    of `prepare`. Raises ValueError.
    """
    made = model_settings(f)
    for source in generators.values():
        made |= source.model_settings
    made |= {'norm': norm} if norm else {}
    made |= {} if seed is None else {'seed': seed}
    network = user_network(f.network, made, audit=f.train or None) if f.network else ''
    return make_model(**made, replicas=replicas, network=network)


def trained_seed(folder: Path, f: flags.FlagValues) -> int:
    """The seed of the run that is evaluated, --seed if it is not known.

    The weights come from the checkpoint, but what a user's network does not train, as a layer that
    is frozen, from the seed.
    """
    for path in () if f.train else reversed(checkpoints(folder).values()):
        with suppress(DamagedCheckpoint):
            return read_run_state(path).get('flags', {}).get('seed', f.seed)
    return f.seed


def make_replicas(f: flags.FlagValues) -> Replicas:
    """The devices of --strategy; to be called before TensorFlow's first operation.

    Raises ValueError.
    """
    if f.strategy == 'mirrored':
        kind = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
        names = [device.name for device in tf.config.list_logical_devices(kind)]
        return Replicas(tf.distribute.MirroredStrategy(names))
    if f.strategy == 'none':
        return Replicas()
    if not os.environ.get('TF_CONFIG'):
        raise ValueError(
            '--strategy=multi_worker needs TF_CONFIG, which tells each worker the addresses of '
            'all; `python scripts/launch_workers.py N -- FLAGS` starts N workers on this machine'
        )
    wrong = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, tf.errors.OpError)
    try:
        return Replicas(tf.distribute.MultiWorkerMirroredStrategy())
    except wrong as error:
        given, reason = os.environ['TF_CONFIG'], first_line(error)
        raise ValueError(f'TF_CONFIG={given} gives no cluster ({reason})') from error


def restore_run(
    model: FastMAML, folder: Path, f: flags.FlagValues, held: ExitStack
) -> tuple[int, dict]:
    """Locks a run's folder for training, and loads its checkpoint.

    Returns iteration and state, -1 and {} if there is none. Raises ValueError and OSError.
    """
    if f.train and folder.is_dir():
        lock_folder(folder, held)
    candidates = find_checkpoints(folder, f)
    if f.train and not f.resume and checkpoints(folder) and not f.overwrite:
        raise ValueError(
            f'{folder} holds a run: leave --resume=False away to continue it, add --overwrite to '
            'remove it, or give another --logdir'
        )
    if f.train and f.test_iter != -1 and not f.overwrite:
        check_nothing_later(folder, f.test_iter)
    return load(model, candidates, f)


def check_nothing_later(folder: Path, iteration: int):
    """Raises ValueError if a run has gone on after an iteration: it has one history."""
    last = max(checkpoints(folder))
    if last > iteration:
        raise ValueError(
            f'{folder} goes on after --test_iter={iteration} until iteration {last}: add '
            '--overwrite to remove what came later, leave --test_iter away to continue at the end, '
            'or give another --logdir'
        )


def lock_folder(folder: Path, held: ExitStack):
    """Raises ValueError if another process trains there."""
    try:
        held.enter_context(lock(folder))
    except BlockingIOError:
        raise ValueError(
            f'{folder} is in use by another process that trains there: wait for it, or give '
            'another --logdir'
        ) from None


def open_folder(folder: Path, f: flags.FlagValues, start: int, held: ExitStack):
    """Makes the run's folder, sees that it can be written, and clears what is not to stay.

    With --overwrite that is the earlier run, or what came after the iteration that it continues
    from; else what a process that died has left of later
    iterations. Raises OSError and ValueError.
    """
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if f.train:
                lock_folder(folder, held)
        tempfile.TemporaryFile(dir=folder).close()
        if f.train:
            if f.overwrite and f.resume:
                remove_later(folder, start)
            elif f.overwrite:
                remove_run(folder)
            remove_leftovers(folder)
            forget_summaries(folder, start)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f'{folder} cannot be written ({reason}): give another --logdir') from error


def remove_run(folder: Path):
    """Removes what a run has written, and says so; other files in the folder stay."""
    count = len(checkpoints(folder))
    for kind in ('model', 'best'):
        for path in checkpoints(folder, kind).values():
            remove_checkpoint(path)
    tables = [*folder.glob('test_ubs*_stepsize*.csv'), *folder.glob('test_ubs*_stepsize*.pkl')]
    for path in [*event_files(folder), *tables]:
        path.unlink()
    print(f'Removed the earlier run in {folder}: {count} checkpoints, summaries and results.')


def best_is_there(folder: Path, state: dict) -> bool:
    """Whether the checkpoint of the best validation so far is still there, or there was none."""
    best = state.get('best')
    return not best or best['iteration'] in checkpoints(folder, 'best')


def remove_later(folder: Path, start: int):
    """Removes what a run has written of iteration `start` and later, and says so.

    The newest goes first: what is left, if the process dies, is an earlier state of the run. Its
    summaries are left to `forget_summaries`.
    """
    found = {kind: checkpoints(folder, kind) for kind in ('best', 'model')}
    later = {kind: [i for i in found[kind] if i >= start] for kind in found}
    for kind, iterations_ in later.items():
        for i in reversed(iterations_):
            remove_checkpoint(found[kind][i])
    for path in folder.glob('test_ubs*_stepsize*.csv'):
        if evaluated_iteration(path) >= start:
            path.unlink()
            path.with_suffix('.pkl').unlink(missing_ok=True)
    print(
        f'Removed what came after iteration {start - 1} in {folder}: {len(later["model"])} '
        'checkpoints, and their summaries and results.'
    )


def main(
    arguments: list[str],
    f: flags.FlagValues = flags.FLAGS,
    norm: Normalization | None = None,
    start: Callable = lambda f: None,
):
    """Trains or evaluates.

    arguments: the program and what is left of the command line after the flags. norm: see
    `prepare`. start: is called with the flags before anything of TensorFlow.
    """
    logging.set_verbosity(logging.ERROR)
    if worker_index(f) > 0:
        sys.stdout = open(os.devnull, 'w', errors='ignore')  # the first one prints
    with ExitStack() as held:
        try:
            if len(arguments) > 1:
                raise ValueError(f'"{arguments[1]}" is no flag: flags are written --name=value')
            take_run(f)
            start(f)
            run = prepare(f, held, norm)
        except (ValueError, OSError, UserCodeError) as error:
            sys.exit(f'main.py: {error}')
        if run.generators:
            what = 'training' if f.train else 'evaluation'
            print(f'Done initializing, starting {what}.', flush=True)
            with without_cache_lines():
                carry_out(run, f)


def carry_out(run: Prepared, f: flags.FlagValues):
    """Trains or evaluates; what goes wrong now is said in one sentence."""
    try:
        with user_code(f.datasource, all_of_it=False), user_code(f.network, all_of_it=False):
            if f.train:
                train(make_trainer(run, f))
                print(next_steps(run, f))
            else:
                evaluate(run, f)
    except BrokenPipeError:
        raise
    except (UserCodeError, BadTasks) as error:
        sys.exit(f'main.py: {error}')
    except (OSError, Diverged) as error:  # the disk is full, the folder is gone
        sys.exit(f'main.py: {error}')
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        sys.exit(
            f'main.py: there is not enough memory ({first_line(error)}): use a smaller '
            '--meta_batch_size, or other sizes of the tasks'
        )
    except tf.errors.OpError as error:
        if is_of_kept_program(error):
            sys.exit(
                f'main.py: a compiled program cannot be read or written ({first_line(error)}): see '
                'to the folder that TF_XLA_FLAGS names, or empty it'
            )
        if f.strategy != 'multi_worker':
            raise
        print(
            f'main.py: worker {worker_index(f)} lost another one ({first_line(error)}); start all '
            f'of them again: {command_again(settings(f))} continues from the newest checkpoint in '
            f'{run.folder}',
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # leaving the cluster in order would wait for the one that is gone


def is_of_kept_program(error: tf.errors.OpError) -> bool:
    """Whether it may be of the folder of compiled programs: not there, closed, or damaged."""
    of_files = (
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.OutOfRangeError,
        tf.errors.DataLossError,
    )
    return keeps_programs() and (isinstance(error, of_files) or 'cache key' in str(error))


def next_steps(run: Prepared, f: flags.FlagValues) -> str:
    """Where a run is that has come to its end, and what can be done with it."""
    # Of the user's own files: a run names them, and they are not run unasked.
    given = [f'--{n}={f[n].value}' for n in ('datasource', 'network') if is_spec(f[n].value)]
    evaluation = ['main.py', '--train=False', '--test_set=True', f'--run={run.folder}', *given]
    commands = [command_line(*evaluation)]
    if f.datasource in ('omniglot', 'miniimagenet', 'folder'):
        network = [f'--network={f.network}'] if f.network else []
        classify = ['scripts/model/classify.py', run.folder, 'SUPPORT_DIR', 'IMAGE', *network]
        commands.append(command_line(*classify))
    return '\n    '.join([f'The run is in {run.folder}. Test it, use it:', *commands])


def command_line(script: str, *arguments: str | Path) -> str:
    """A line for the shell that starts a script of this project from the folder at hand."""
    own, script = sys.executable, os.path.relpath(Path(__file__).resolve().parent / script)
    python = 'python' if shutil.which('python') == own else own
    return shlex.join([python, script, *map(str, arguments)])


def worker_index(f: flags.FlagValues) -> int:
    """Of this process among the workers of --strategy=multi_worker; 0 is the chief."""
    if f.strategy != 'multi_worker':
        return 0
    try:
        return int(json.loads(os.environ['TF_CONFIG'])['task']['index'])
    except (KeyError, ValueError, TypeError):
        return 0  # a TF_CONFIG that cannot be read is refused later


def tune(f: flags.FlagValues):
    """Settings of TensorFlow that suit a run; to be called before anything of it.

    GPUs as `utils.set_up_gpus` says; the rest by measurement. One arena of memory for large images:
    a step on miniImagenet took a fifth less than with several, a small one took longer. A thread
    for each operation where tasks are tiny: handing work over takes longer than the work. XLA's
    older generator of loops for Omniglot and for the networks here: it compiles a quarter faster
    and into less, and a step on miniImagenet takes a tenth less; Keras models on large images were
    not tried. XLA ends the process at options it does not know, so only in the version tried.
    """
    keep_freed_memory(arenas=1 if f.datasource in ('miniimagenet', 'folder') else 4)
    set_up_gpus(f.tf32)
    if f.datasource == 'sinusoid':
        tf.config.threading.set_intra_op_parallelism_threads(1)
    plain_network = f.datasource in ('miniimagenet', 'folder') and not f.network
    if (f.datasource == 'omniglot' or plain_network) and tf.__version__.startswith('2.21.'):
        others = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'--xla_cpu_use_fusion_emitters=false {others}'


def program(arguments: list[str], norm: Normalization | None = None):
    """main.py as a process of its own."""
    try:
        main(arguments, norm=norm, start=tune)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == '__main__':
    print_anything()
    define_flags()
    app.run(program)
