"""Trains and evaluates MAML on sinusoids, Omniglot, miniImagenet and any folder of class folders of
images.

    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000
    --norm=None --update_batch_size=10 python main.py --datasource=omniglot
    --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 \
        --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/

trains, in the folder of --logdir that is named after the flags. The same line again continues; with
--train=False it evaluates the newest checkpoint on 600 validation tasks, with --train=False
--test_set=True on 600 test tasks. The README has the line for every cell of the paper's tables.
"""

import csv
import datetime
import importlib.util
import io
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import scipy.stats

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # no lines about CPU features and missing GPUs
import tensorflow as tf
from absl import app, flags, logging

import data_generator
from maml import IMAGE_SHAPES, MODEL_SETTINGS, TASK_AXIS, FastMAML, Results, make_model
from special_grads import Normalization
from utils import (
    Batch,
    DamagedCheckpoint,
    Replicas,
    checkpoints,
    event_files,
    first_line,
    forget_summaries,
    lock,
    machine,
    read_run_state,
    remove_checkpoint,
    remove_leftovers,
    write_checkpoint,
    write_whole,
)

SUMMARY_INTERVAL = 100  # iterations between summaries
PRINT_INTERVAL = 100  # between printed lines; 1000 for the sinusoid
VALIDATION_INTERVAL = 500  # between validations, image sources only
SAVE_INTERVAL = 1000  # between checkpoints
PICTURE_INTERVAL = 5000  # between pictures of a task for TensorBoard
EVALUATION_TASKS = 600
EVALUATION_UPDATES = 10
EVALUATION_SEED = 1  # of validation and test tasks: the same for every run and checkpoint
MINIIMAGENET_QUERY_IMAGES = 15  # per class in training; K in evaluation, and in both for Omniglot


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


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """The command line; symbols are the paper's."""

    def define(kind, name, default, meaning, **kwargs):
        getattr(flags, f'DEFINE_{kind}')(
            name=name, default=default, help=meaning, flag_values=values, **kwargs
        )

    natural = {'lower_bound': 0}
    define(
        'enum',
        'datasource',
        'sinusoid',
        'where tasks come from',
        enum_values=['sinusoid', 'omniglot', 'miniimagenet', 'folder'],
    )
    define('integer', 'num_classes', 5, 'N, ways: classes of a task (images only)')
    define(
        'enum',
        'baseline',
        None,
        'oracle: amplitude and phase are inputs (sinusoid only)',
        enum_values=['oracle', 'None'],
    )
    define(
        'string', 'data_dir', 'data', 'folder of the prepared data, or of your own class folders'
    )
    define(
        'string',
        'split',
        '0.64,0.16,0.2',
        'shares of the classes that train, val and test get (folder only)',
    )
    define('integer', 'image_size', 84, 'height and width that images are resized to (folder only)')
    define('integer', 'channels', 3, '3: colour, 1: grey (folder only)')
    define(
        'enum',
        'strategy',
        'none',
        'devices that share the tasks: mirrored: all of this machine; multi_worker: of several '
        'processes, by TF_CONFIG',
        enum_values=['none', 'mirrored', 'multi_worker'],
    )
    define('integer', 'seed', 0, 'of the initial weights and the training tasks', **natural)
    # Training
    define(
        'integer',
        'pretrain_iterations',
        0,
        'iterations of joint training on all tasks, before meta-training',
        **natural,
    )
    define('integer', 'metatrain_iterations', 15000, 'iterations of meta-training', **natural)
    define('integer', 'meta_batch_size', 25, 'T, tasks per iteration')
    define('float', 'meta_lr', 0.001, 'β, step size of the outer loop (Adam)')
    define('integer', 'update_batch_size', 5, 'K, shots: support examples per class')
    define('float', 'update_lr', 1e-3, 'α, step size of the inner loop')
    define('integer', 'num_updates', 1, 'inner updates in training')
    # Model
    define(
        'enum',
        'norm',
        'batch_norm',
        'normalisation',
        enum_values=['batch_norm', 'layer_norm', 'None'],
    )
    define(
        'integer',
        'num_filters',
        64,
        'filters per convolution: 64 for Omniglot, 32 for miniImagenet',
    )
    define('boolean', 'conv', True, 'convolutional network (images only), else fully connected')
    define('boolean', 'max_pool', False, 'max-pooling instead of strided convolutions')
    define('boolean', 'stop_grad', False, 'first-order approximation')
    # Logging, saving, testing
    define('boolean', 'log', True, 'write summaries for TensorBoard')
    define('string', 'logdir', 'logs', 'folder of the run folders')
    define('boolean', 'resume', True, 'continue from the newest checkpoint of the same run')
    define(
        'boolean',
        'overwrite',
        False,
        'with --resume=False: remove the earlier run of the same name',
    )
    define(
        'integer',
        'validation_tasks',
        100,
        'tasks of a validation during training (images only)',
        lower_bound=2,
    )
    define('boolean', 'train', True, 'train, else evaluate')
    flags.DEFINE(
        CheckpointParser(),
        'test_iter',
        -1,
        'iteration of the checkpoint to load; -1: the newest; best: that of the best validation',
        flag_values=values,
    )
    define(
        'boolean', 'test_set', False, 'evaluate on the test classes, else on the validation classes'
    )
    define(
        'integer',
        'test_query',
        -1,
        'query images per class in evaluation (-1: as many as shots; images only)',
    )
    define(
        'boolean',
        'transductive',
        True,
        "evaluate with batch normalisation by the queries' own statistics, else by the support set's",
    )
    define(
        'integer',
        'train_update_batch_size',
        -1,
        'K used in training, when evaluating with another K (-1: the same)',
    )
    define(
        'float',
        'train_update_lr',
        -1,
        'α used in training, when evaluating with another α (-1: the same)',
    )


def settings(f: flags.FlagValues) -> dict:
    """{name: value} of the flags above, without absl's own."""
    above = flags.FlagValues()
    define_flags(above)
    return {name: f[name].value for name in above}


# Flags to settings --------------------------------------------------------------------------------


def check_flags(f: flags.FlagValues):
    """Raises ValueError with one sentence for flags that make no sense, alone or together."""
    for name in (
        'num_classes',
        'meta_batch_size',
        'update_batch_size',
        'num_updates',
        'num_filters',
        'image_size',
    ):
        if f[name].value < 1:
            raise ValueError(f'--{name} must be at least 1, but it is {f[name].value}')
    for name in ('meta_lr', 'update_lr'):
        if not 0 <= f[name].value < float('inf'):
            raise ValueError(
                f'--{name} must be a step size of 0 or more, but it is {f[name].value}'
            )
    if f.train_update_batch_size != -1 and f.train_update_batch_size < 1:
        raise ValueError(
            '--train_update_batch_size must be at least 1, or -1 for that of --update_batch_size, but it '
            f'is {f.train_update_batch_size}'
        )
    if f.train_update_lr != -1 and not 0 <= f.train_update_lr < float('inf'):
        raise ValueError(
            '--train_update_lr must be a step size of 0 or more, or -1 for that of --update_lr, but it is '
            f'{f.train_update_lr}'
        )
    if f.channels not in (1, 3):
        raise ValueError(f'--channels must be 1 (grey) or 3 (colour), but it is {f.channels}')
    if f.test_query != -1 and f.test_query < 1:
        raise ValueError(
            f'--test_query must be at least 1, or -1 for as many as shots, but it is {f.test_query}'
        )
    split_proportions(f)
    check_combinations(f)


def split_proportions(f: flags.FlagValues) -> tuple[float, ...]:
    """The value of --split. Raises ValueError."""
    try:
        values = tuple(map(float, f.split.split(',')))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 < value < float('inf') for value in values):
        raise ValueError(
            f'--split must be three numbers above 0, for train, val and test, as 0.64,0.16,0.2, but it is {f.split}'
        )
    return values


def check_combinations(f: flags.FlagValues):
    """The part of `check_flags` that looks at several flags at once."""
    if f.baseline == 'oracle' and f.datasource != 'sinusoid':
        raise ValueError(
            f'--baseline=oracle knows amplitude and phase, so it needs --datasource=sinusoid, not {f.datasource}'
        )
    if f.overwrite and (f.resume or not f.train):
        raise ValueError(
            '--overwrite removes an earlier run of the same name, so it needs --resume=False and --train=True'
        )
    evaluation_only = [
        name
        for name, wanted in [
            ('test_query', f.test_query != -1),
            ('transductive', not f.transductive),
        ]
        if wanted
    ]
    if f.train and evaluation_only:
        raise ValueError(
            f'--{evaluation_only[0]}={f[evaluation_only[0]].value} is for evaluation, so it needs --train=False'
        )
    if f.train and f.test_iter == 'best':
        raise ValueError('--test_iter=best is for evaluation, so it needs --train=False')
    if f.train and sum(iterations(f)) == 0:
        raise ValueError(
            'there is nothing to train: set --metatrain_iterations or --pretrain_iterations above 0'
        )
    named_otherwise = f.train_update_batch_size not in (
        -1,
        f.update_batch_size,
    ) or f.train_update_lr not in (-1, f.update_lr)
    if f.train and named_otherwise:
        raise ValueError(
            '--train_update_batch_size and --train_update_lr name the run to evaluate, so they need '
            '--train=False'
        )
    if f.train and f.log and importlib.util.find_spec('tensorboard') is None:
        raise ValueError(
            '--log writes summaries with the package tensorboard, which is not installed: run `pip install '
            'tensorboard` or give --log=False'
        )
    if f.metatrain_iterations == 0 and f.datasource == 'miniimagenet' and f.update_batch_size != 1:
        raise ValueError(
            'a plain network on miniimagenet (--metatrain_iterations=0) takes one image per class, so it needs '
            f'--update_batch_size=1, not {f.update_batch_size}'
        )
    if f.max_pool and (f.datasource == 'sinusoid' or not f.conv):
        print(
            '--max_pool is part of the name of the run, but does nothing without convolutions.',
            file=sys.stderr,
        )


def run_name(f: flags.FlagValues) -> str:
    """The name of the run's folder, after the flags it was trained with."""
    shots = f.update_batch_size if f.train_update_batch_size == -1 else f.train_update_batch_size
    rate = f.update_lr if f.train_update_lr == -1 else f.train_update_lr
    parts = [
        f'cls_{f.num_classes}.mbs_{f.meta_batch_size}.ubs_{shots}.numstep{f.num_updates}.updatelr{rate}',
        f'hidden{f.num_filters}' if f.num_filters != 64 else '',
        'maxpool' if f.max_pool else '',
        'stopgrad' if f.stop_grad else '',
        f.baseline if f.baseline == 'oracle' else '',
        {'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}[f.norm],
    ]
    return ''.join(parts)


def model_settings(f: flags.FlagValues) -> dict:
    """The flags that `make_model` takes."""
    return {name: f[name].value for name in MODEL_SETTINGS}


def iterations(f: flags.FlagValues) -> tuple[int, int]:
    """(pre-training, meta-training) iterations. The oracle is jointly trained throughout."""
    if f.baseline == 'oracle':
        return f.pretrain_iterations + f.metatrain_iterations, 0
    return f.pretrain_iterations, f.metatrain_iterations


def make_generators(f: flags.FlagValues) -> dict[str, data_generator.DataGenerator]:
    """{'train': ..., 'val': ...} for training, {'val' or 'test': ...} for evaluation."""
    splits = (
        {'train': f.seed, 'val': EVALUATION_SEED}
        if f.train
        else {'test' if f.test_set else 'val': EVALUATION_SEED}
    )
    shots, data_dir = f.update_batch_size, os.path.expanduser(f.data_dir)
    if f.datasource == 'sinusoid':
        return {
            split: data_generator.SinusoidGenerator(shots, shots, f.baseline == 'oracle', seed)
            for split, seed in splits.items()
        }
    if f.datasource == 'omniglot':
        folders = data_generator.load_omniglot(data_dir)
    elif f.datasource == 'miniimagenet':
        folders = data_generator.load_miniimagenet(data_dir, splits)
    else:
        folders = data_generator.load_folder(
            data_dir, f.image_size, f.channels, split_proportions(f), splits
        )
    return {
        split: data_generator.ImageGenerator(
            folders,
            f.num_classes,
            shots,
            query_images(f),
            f.datasource == 'omniglot',
            seed,
            splits=[split],
        )
        for split, seed in splits.items()
    }


def query_images(f: flags.FlagValues) -> int:
    """Q, per class: the original's, if --test_query does not say otherwise."""
    if not f.train and f.test_query != -1:
        return f.test_query
    if f.datasource == 'miniimagenet' and f.metatrain_iterations == 0:
        return 0
    return (
        MINIIMAGENET_QUERY_IMAGES
        if f.datasource == 'miniimagenet' and f.train
        else f.update_batch_size
    )


def find_checkpoints(folder: Path, f: flags.FlagValues) -> dict[int, str]:
    """{iteration: path} of the checkpoints that may be loaded, the best choice first; none if
    training starts afresh.
    """
    found = checkpoints(folder, 'best' if f.test_iter == 'best' else 'model')
    if f.train and (not f.resume or not found and f.test_iter == -1):
        return {}
    if not found and f.test_iter == 'best' and checkpoints(folder):
        raise ValueError(
            f'--test_iter=best: {folder} has no best checkpoint; training on images keeps one from its first '
            f'validation on, at iteration {VALIDATION_INTERVAL}'
        )
    if not found:
        raise ValueError(
            f'{folder} holds no checkpoint: train first with the same flags, or give the --logdir, '
            '--train_update_batch_size and --train_update_lr of the training run'
        )
    if f.test_iter in (-1, 'best'):
        return dict(reversed(found.items()))
    if f.test_iter not in found:
        raise ValueError(
            f'--test_iter={f.test_iter}: {folder} has no such checkpoint, but those of the iterations '
            f'{", ".join(map(str, found))}'
        )
    return {f.test_iter: found[f.test_iter]}


def load(model: FastMAML, candidates: dict[int, str], f: flags.FlagValues) -> tuple[int, dict]:
    """Loads the first checkpoint that is whole; says which are not. Returns its iteration and state
    (-1 and {} if none).

    Raises ValueError if all are damaged or the flags contradict those that it was written with.
    """
    for number, (iteration, path) in enumerate(candidates.items(), start=1):
        try:
            state = read_run_state(path)
            check_contradictions(path, iteration, state.get('flags', {}), f)
            restore(model, path, f)
            return iteration, state
        except DamagedCheckpoint as error:
            if number == len(candidates):
                raise
            print(f'main.py: {error}; the one before it is used.', file=sys.stderr)
    return -1, {}


def check_contradictions(path: str, iteration: int, stored: dict, f: flags.FlagValues):
    """Raises ValueError with the list of flags that are not what the run was trained with up to
    this iteration, and matter.
    """
    free = {
        'log',
        'logdir',
        'data_dir',
        'resume',
        'overwrite',
        'train',
        'test_iter',
        'test_set',
        'metatrain_iterations',
        'train_update_batch_size',
        'train_update_lr',
        'test_query',
        'transductive',
        'strategy',
    }
    if f.baseline == 'oracle' or iteration < min(
        stored.get('pretrain_iterations', 0), f.pretrain_iterations
    ):
        free.add(
            'pretrain_iterations'
        )  # so far it has trained jointly, and so it would have with the other number
    network = {
        'datasource',
        'num_classes',
        'norm',
        'num_filters',
        'conv',
        'max_pool',
        'baseline',
        'image_size',
        'channels',
        'split',
    }  # the last decides which classes were not trained on
    names = [name for name in settings(f) if (name not in free if f.train else name in network)]
    alike = {
        'miniimagenet',
        'folder',
    }  # to evaluate the model of the one on the other is no mistake
    wrong = [
        f'--{name}={stored[name]} (now {f[name].value})'
        for name in names
        if name in stored
        and stored[name] != f[name].value
        and (f.train or not {stored[name], f[name].value} <= alike)
    ]
    if wrong:
        raise ValueError(
            f'{path} was trained with {", ".join(wrong)}: give the same flags, or another --logdir'
        )


def restore(model: FastMAML, path: str, f: flags.FlagValues):
    """Loads a checkpoint. Raises ValueError if it is damaged or another network's."""
    try:
        complete = model.restore(path)
    except DamagedCheckpoint:
        raise
    except ValueError as error:
        raise ValueError(
            f'{error}; give the flags of the run that wrote it, or another --logdir'
        ) from error
    print(f'Restoring model weights from {path}')
    if f.train and not complete:
        print('The checkpoint holds the weights only, so Adam starts afresh.')


# Training -----------------------------------------------------------------------------------------


class Log:
    """What a run shows: summaries for TensorBoard, the original's printed lines, and a line of
    progress.
    """

    def __init__(self, folder: Path, f: flags.FlagValues, start: int, is_chief: bool = True):
        self.kinds = (
            ['loss'] if f.datasource == 'sinusoid' else ['loss', 'accuracy']
        )  # the last one is printed
        self.pretrain, self.update = iterations(f)[0], f.num_updates - 1
        self.interval = PRINT_INTERVAL * (10 if f.datasource == 'sinusoid' else 1)
        self.before, self.after = [], []  # what the next printed line is the mean of
        self.start, self.end = start, sum(iterations(f))
        self.clock = self.shown = time.perf_counter()
        self.writer = tf.summary.create_file_writer(str(folder)) if f.log and is_chief else None
        if self.writer and start == 0:
            table = [f'`--{name}` | {value}' for name, value in settings(f).items()]
            with self.writer.as_default():
                tf.summary.text(
                    'flags', '\n'.join(['flag | value', '--- | ---', *table]), step=start
                )

    def summaries(self, prefix: str, results: Results, iteration: int) -> tuple[float, float]:
        """Writes the scalars of one meta-batch under the original's tags. Returns the values to
        print: pre, post.
        """
        for kind in self.kinds:
            pre, post = means(results, kind)
            tags = [
                f'Pre-update_{kind}',
                *(f'Post-update_{kind}__step_{j}' for j in range(1, len(post) + 1)),
            ]
            if self.writer:
                self._scalars(
                    tuple(f'{prefix}_{tag}' for tag in tags),
                    tf.constant([pre, *post]),
                    tf.constant(iteration, tf.int64),
                )
        return pre, post[self.update]

    @tf.function(autograph=False)  # one call for all of them takes a fifth of the time
    def _scalars(self, tags: tuple[str, ...], values: tf.Tensor, iteration: tf.Tensor):
        with self.writer.as_default():
            for i, tag in enumerate(tags):
                tf.summary.scalar(tag, values[i], step=iteration)

    def train(self, results: Results, iteration: int):
        """Takes a training meta-batch in; prints the means of all since the last line."""
        for values, value in zip(
            (self.before, self.after), self.summaries('metatrain', results, iteration)
        ):
            values.append(value)
        if iteration % self.interval == 0 and iteration != 0:
            pretraining = iteration < self.pretrain
            label = (
                f'Pretrain Iteration {iteration}'
                if pretraining
                else f'Iteration {iteration - self.pretrain}'
            )
            self.line(f'{label}: {np.mean(self.before)}, {np.mean(self.after)}')
            self.before, self.after = [], []

    def validation(self, results: Results, iteration: int) -> tuple[float, float]:
        """Takes validation tasks in and prints their means. Returns mean and 95 % interval of the
        accuracy after training's number of updates.
        """
        pre, post = self.summaries('metaval', results, iteration)
        interval = float(confidence(results.accuracies2[self.update]))
        self.line(f'Validation results: {pre}, {post}')
        if self.writer:
            self._scalars(
                ('metaval_Post-update_accuracy_interval',),
                tf.constant([interval]),
                tf.constant(iteration, tf.int64),
            )
        return float(post), float(interval)

    def first_step(self):
        """To be called after the first step; the clock of the progress line starts here."""
        self.line(
            f'The first step took {time.perf_counter() - self.clock:.1f} s, compilation included.'
        )
        self.clock = time.perf_counter()

    def progress(self, iteration: int, loss: float):
        """Where the run is: on a terminal a line that changes every second, else one after each
        printed line.
        """
        now, done = time.perf_counter(), iteration - self.start
        due = (
            now - self.shown > 1
            if sys.stdout.isatty()
            else iteration % self.interval == 0 and iteration != 0
        )
        if done and due:
            self.shown, rate = now, done / (now - self.clock)
            left = datetime.timedelta(seconds=round((self.end - iteration - 1) / rate))
            text = f'{iteration + 1} of {self.end} iterations, {rate:.3g} per second, {left} left, loss {loss:.4g}'
            print(text, end='\033[K\r' if sys.stdout.isatty() else '\n', flush=True)

    def picture(self, tag: str, picture: np.ndarray, iteration: int):
        """picture: [height, width, 3] uint8."""
        with self.writer.as_default():
            tf.summary.image(tag, picture[np.newaxis], step=iteration)

    def flush(self):
        """What was shown so far is in the file. Raises OSError."""
        try:
            self.writer and self.writer.flush()
        except tf.errors.OpError as error:
            raise OSError(f'the summaries cannot be written ({first_line(error)})') from error

    def close(self):
        with suppress(tf.errors.OpError):
            self.writer and self.writer.close()

    @staticmethod
    def line(text: str):
        print(text + ('\033[K' if sys.stdout.isatty() else ''), flush=True)


def means(results: Results, kind: str) -> tuple[float, np.ndarray]:
    """Means over tasks of 'loss' or 'accuracy' before (support) and after each update (query): a
    number and [J].
    """
    before, after = {'loss': results[:2], 'accuracy': results[2:4]}[kind]
    return np.mean(before), np.mean(after, axis=1)


def confidence(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean of a small sample, [tasks or seeds, ...], by Student's
    t: [...]; nan if one is infinite.
    """
    with np.errstate(invalid='ignore'):  # inf - inf
        return scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)


class Diverged(Exception):
    """The loss, or a weight, is no longer a number; the text is one sentence for the user."""


class Run:
    """A training run: the model, its folder, and what is known of it besides the weights."""

    def __init__(
        self,
        model: FastMAML,
        generators: dict,
        f: flags.FlagValues,
        folder: Path,
        start: int = 0,
        state: dict | None = None,
    ):
        self.model, self.generators, self.f, self.folder, self.start = (
            model,
            generators,
            f,
            folder,
            start,
        )
        self.saved = start - 1  # iteration of the newest checkpoint
        self.best = (state or {}).get(
            'best'
        )  # {'iteration', 'accuracy', 'interval'} of the best validation
        self.num_updates = max(f.num_updates, {'sinusoid': 5, 'omniglot': 10}.get(f.datasource, 1))
        self.replicas = model.replicas
        self.share = self.replicas.slice_of(
            f.meta_batch_size
        )  # of the tasks, which this process draws
        self.log = Log(folder, f, start, self.replicas.is_chief)
        self.log.before, self.log.after = (
            [*map(np.float32, values)] for values in (state or {}).get('printing', ([], []))
        )

    def save(self, iteration: int, kind: str = 'model'):
        """Writes a checkpoint; summaries first, so that none is missing when the run continues
        there.

        Raises OSError, and Diverged if a weight is not a number.
        """
        if not self.model.is_finite():
            raise Diverged(self.diverged(f'a weight is not a number after iteration {iteration}'))
        if not self.replicas.is_chief:
            return
        self.log.flush()
        printing = [[*map(float, values)] for values in (self.log.before, self.log.after)]
        pretraining = iteration < iterations(self.f)[0]
        checkpoint = self.model.pretrain_checkpoint if pretraining else self.model.checkpoint
        write_checkpoint(
            checkpoint,
            self.folder,
            iteration,
            {
                'flags': settings(self.f),
                'best': self.best,
                'printing': printing,
                'machine': machine(),
            },
            kind,
        )
        if kind == 'model':
            self.saved = iteration

    def diverged(self, what: str) -> str:
        last = (
            f'{self.folder}/model{self.saved} is the last good checkpoint'
            if self.saved >= 0
            else 'there is no checkpoint yet'
        )
        return f'{what}, so training has stopped; {last}. Try a smaller --update_lr or --meta_lr, or --norm=batch_norm'

    def validate(self, iteration: int):
        """Validation tasks, the same every time; keeps the checkpoint with the best accuracy."""
        tasks, chunk = (
            self.f.validation_tasks,
            self.f.meta_batch_size,
        )  # chunks of a size that is compiled already
        whole = -(-tasks // chunk) * chunk
        parts = [
            self.model.evaluate_together(
                self.generators['val'].batch(
                    'val', 0, whole, slice(i + self.share.start, i + self.share.stop)
                ),
                self.num_updates,
            )
            for i in range(0, whole, chunk)
        ]
        results = concatenate(parts, tasks)
        accuracy, interval = self.log.validation(results, iteration)
        better = self.best is None or accuracy > self.best['accuracy']
        if better:
            self.best = {'iteration': iteration, 'accuracy': accuracy, 'interval': interval}
            self.save(iteration, 'best')
        best = (
            'the best so far'
            if better
            else f'the best was {self.best["accuracy"]:.4f} at iteration {self.best["iteration"]}'
        )
        self.log.line(
            f'Accuracy on {tasks} validation tasks: {accuracy:.4f} +- {interval:.4f}, {best}.'
        )

    def show(self, batch: Batch, iteration: int):
        """A picture for TensorBoard: how a new sinusoid is fitted, or the first task of a
        meta-batch (arrays).
        """
        if self.f.datasource == 'sinusoid':
            self.log.picture('fit', self.fit(), iteration)
        else:
            size, channels = IMAGE_SHAPES.get(
                self.f.datasource, (self.f.image_size, self.f.channels)
            )
            self.log.picture(
                'task', data_generator.task_picture(batch, (size, size, channels)), iteration
            )

    def fit(self) -> np.ndarray:
        """A picture of one sinusoid, fitted after 1 and after all updates.

        Points all over [-5, 5] are the query points of many copies of the task, which makes a
        meta-batch of the usual shape, for which the evaluation is compiled.
        """
        tasks, shots, dim = (
            self.f.meta_batch_size,
            self.f.update_batch_size,
            self.model.network.dim_input,
        )
        task = data_generator.SinusoidGenerator(shots, 0, oracle=True, seed=EVALUATION_SEED).batch(
            'val', 0, 1
        )
        x = np.linspace(-5, 5, tasks * shots, dtype=np.float32)
        full = np.stack(
            [x, *(np.full_like(x, task.inputa[0, 0, i]) for i in (1, 2))], axis=1
        )  # x, A, φ
        truth = full[:, 1] * np.sin(x - full[:, 2])
        copies = lambda values: np.repeat(values, tasks, axis=0)
        points = lambda values: values.reshape(tasks, shots, -1)
        results = self.model.evaluate(
            Batch(
                copies(task.inputa[..., :dim]),
                copies(task.labela),
                points(full[:, :dim]),
                points(truth),
            ),
            self.num_updates,
        )
        curve = lambda y: np.stack([x, np.reshape(y, -1)], axis=1)
        curves = {'red truth': curve(truth)} | {
            f'{colour} after {j} updates': curve(results.outputsb[j - 1])
            for colour, j in [('green', 1), ('blue', self.num_updates)]
        }
        return data_generator.fit_picture(
            curves, np.stack([task.inputa[0, :, 0], task.labela[0, :, 0]], axis=1)
        )

    def train(self, watch: Callable = iter, stopped: Callable = lambda: False) -> int:
        """Pre-training, then meta-training, to the end or until `stopped()` in a process. Returns
        the number of iterations done.

        watch: wraps the iterator of the data. Raises Diverged, and OSError if something cannot be
        written.
        """
        pretrain, end = iterations(self.f)[0], sum(iterations(self.f))
        block = SUMMARY_INTERVAL if self.f.datasource == 'sinusoid' else 1
        for origin, batches in watch(
            prefetch(
                self.generators['train'], self.f.meta_batch_size, self.share, block, self.start, end
            )
        ):
            for first, last in stretches(
                max(origin, self.start), min(origin + block, end), pretrain
            ):
                if first % SUMMARY_INTERVAL == 0:
                    batch = Batch(*(values.numpy()[first - origin] for values in batches))
                    self.log.train(self.model.evaluate_together(batch, self.num_updates), first)
                    if first % PICTURE_INTERVAL == 0 and self.log.writer:
                        self.show(batch, first)
                done, loss = self.model.steps(
                    batches, first - origin, last - origin, pretrain=first < pretrain
                )
                if not np.isfinite(loss):
                    raise Diverged(
                        self.diverged(f'the loss is {loss} in iteration {origin + done - 1}')
                    )
                self.after(first, last, loss)
                if last < end and self.replicas.any(stopped(), last):
                    if self.saved != last - 1:
                        self.save(last - 1)
                    return last
        return end

    def after(self, first: int, last: int, loss: float):
        """What is due after the iterations first...last-1."""
        if first == self.start:
            self.log.first_step()
        self.log.progress(last - 1, loss)
        if first % VALIDATION_INTERVAL == 0 and first != 0 and self.f.datasource != 'sinusoid':
            self.validate(first)
        if first % SAVE_INTERVAL == 0 and first != 0 or last == sum(iterations(self.f)):
            self.save(last - 1)


def concatenate(parts: list[Results], tasks: int) -> Results:
    """The first `tasks` tasks of several evaluations, as one; arrays."""
    return Results(
        *(
            np.concatenate(values, axis).take(range(tasks), axis)
            for values, axis in zip(zip(*parts), TASK_AXIS)
        )
    )


class Signals:
    """SIGINT and SIGTERM become a request to stop, while entered; the second one stops at once."""

    def __init__(self):
        self.received, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self.receive)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def receive(self, number, _):
        if self.received:
            sys.exit(128 + number)
        self.received = number
        print('\nStopping after this iteration; once more to stop at once.', file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(run: Run, watch: Callable = iter):
    """Trains to the end, or until a signal; exits with 128 + its number then."""
    with Signals() as signals:
        try:
            done = run.train(watch, lambda: bool(signals.received))
        finally:
            run.log.close()
    if done < run.log.end:
        print(
            f'Saved {run.folder}/model{done - 1}; the same command continues at iteration {done} of {run.log.end}.'
        )
        sys.exit(128 + (signals.received or signal.SIGTERM))  # another worker's signal stops all


def stretches(start: int, end: int, pretrain: int) -> Iterator[tuple[int, int]]:
    """Cuts start...end into (first, last + 1) that nothing interrupts: summaries come before,
    checkpoints and validations after the first iteration of an interval, and pre-training ends with
    iteration `pretrain` - 1.
    """
    while start < end:
        stop = (
            start + 1
            if start % SAVE_INTERVAL == 0
            else (start // SUMMARY_INTERVAL + 1) * SUMMARY_INTERVAL
        )
        stop = min(stop, end, pretrain if start < pretrain else end)
        yield start, stop
        start = stop


def prefetch(
    generator: data_generator.DataGenerator,
    tasks: int,
    share: slice,
    block: int,
    start: int,
    end: int,
) -> Iterator[tuple[int, Batch]]:
    """Shares of training meta-batches [block, T, ...] with the iteration of the first, drawn while
    those before are in use.

    Blocks begin at multiples of `block`, wherever a run is continued: then all is as if it had not
    been interrupted. Small ones are drawn ten at a time, since Python's lock makes the loop wait
    for the drawing at either's start.
    """
    group = 10 * block if block > 1 else 1

    def draw(origin):
        drawn = generator.batches('train', origin, group, tasks, share)
        return [
            (origin + i, Batch(*(tf.constant(values[i : i + block]) for values in drawn)))
            for i in range(0, group, block)
        ]

    for blocks in ahead(draw, range(start // group * group, end, group)):
        yield from (
            (origin, batch) for origin, batch in blocks if origin + block > start and origin < end
        )


def ahead(draw: Callable, arguments: Iterable) -> Iterator:
    """draw(argument) for each, in a thread of its own while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for argument in arguments:
            ready, coming = coming, thread.submit(draw, argument)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


# Evaluation ---------------------------------------------------------------------------------------


def test(model: FastMAML, generators: dict, f: flags.FlagValues, folder: Path, iteration: int = -1):
    """600 tasks: prints means, standard deviations and 95 % intervals over 0...10 updates and
    writes them as csv and pkl.

    iteration: of the checkpoint that was loaded (-1: none); the pkl tells it, and the split,
    besides the original's `mses`.
    """
    ((split, generator),) = generators.items()
    chunk = tasks_at_once(f.datasource) * model.replicas.count
    share, rows, whole = model.replicas.slice_of(chunk), [], -(-EVALUATION_TASKS // chunk) * chunk
    draw = lambda i: generator.batch(split, 0, whole, slice(i + share.start, i + share.stop))
    for batch in ahead(draw, range(0, whole, chunk)):
        results = model.evaluate_together(
            batch, max(f.num_updates, EVALUATION_UPDATES), f.transductive
        )
        before, after = results[:2] if f.datasource == 'sinusoid' else results[2:4]
        rows.append(np.concatenate([[before], after]).T)  # [chunk, 1 + updates]
        if sys.stdout.isatty():
            print(f'{chunk * len(rows)} of {whole} tasks', end='\033[K\r', flush=True)
    values = np.concatenate(rows)[:EVALUATION_TASKS]  # [600, 1 + updates]
    mean, stddev = values.mean(0), values.std(0)
    interval = 1.96 * stddev / np.sqrt(len(values))
    print('Mean validation accuracy/loss, stddev, and confidence intervals')
    print((mean, stddev, interval))
    if not model.replicas.is_chief:
        return
    name = (
        f'test_ubs{f.update_batch_size}_stepsize{f.update_lr}'
        + (f'_query{f.test_query}' if f.test_query != -1 else '')
        + ('' if f.transductive else '_inductive')
        + ('_best' if f.test_iter == 'best' else '')
    )
    write_whole(
        folder / f'{name}.pkl',
        pickle.dumps({'mses': values, 'iteration': iteration, 'split': split}),
    )
    text = io.StringIO()
    csv.writer(text).writerows([[f'update{j}' for j in range(len(mean))], mean, stddev, interval])
    write_whole(folder / f'{name}.csv', text.getvalue().encode())


def tasks_at_once(datasource: str) -> int:
    """So many tasks that an evaluation's memory is bounded, and whose number divides 600."""
    return {'sinusoid': 600, 'omniglot': 20}.get(datasource, 4)


# The program --------------------------------------------------------------------------------------


def make_replicas(f: flags.FlagValues) -> Replicas:
    """The devices of --strategy; to be called before TensorFlow's first operation. Raises
    ValueError.
    """
    if f.strategy == 'multi_worker' and not os.environ.get('TF_CONFIG'):
        raise ValueError(
            '--strategy=multi_worker needs TF_CONFIG, which tells each worker the addresses of all; '
            '`python scripts/launch_workers.py N -- FLAGS` starts N workers on this machine'
        )
    if f.strategy == 'multi_worker':
        try:
            return Replicas(tf.distribute.MultiWorkerMirroredStrategy())
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            tf.errors.OpError,
        ) as error:
            raise ValueError(
                f'TF_CONFIG={os.environ["TF_CONFIG"]} gives no cluster ({first_line(error)})'
            ) from error
    if f.strategy == 'mirrored':
        kind = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
        return Replicas(
            tf.distribute.MirroredStrategy(
                [device.name for device in tf.config.list_logical_devices(kind)]
            )
        )
    return Replicas()


def prepare(
    f: flags.FlagValues, held: ExitStack, norm: Normalization | None = None
) -> tuple[FastMAML, dict, Path, int, dict]:
    """Everything that can fail for the user's reasons, before anything is written.

    held: keeps the lock on the folder. Returns (model, generators, folder, start, state); no
    generators if the run is complete. Raises ValueError and OSError.
    """
    check_flags(f)
    folder, total, replicas = (
        Path(os.path.expanduser(f.logdir)) / run_name(f),
        sum(iterations(f)),
        make_replicas(f),
    )
    replicas.slice_of(f.meta_batch_size)
    model = make_model(**model_settings(f) | ({'norm': norm} if norm else {}), replicas=replicas)
    iteration, state = restore_run(model, folder, f, held) if replicas.is_chief else (-1, {})
    iteration = int(replicas.agree([np.int64(iteration)])[0])
    model.agree()
    if f.train and iteration + 1 >= total:
        print(
            f'The run is complete: {iteration + 1} of {total} iterations; raise --metatrain_iterations for more.'
        )
        return model, {}, folder, iteration + 1, state
    generators = make_generators(f)
    if replicas.is_chief:
        open_folder(folder, f, iteration + 1, held)
    if f.train and iteration >= 0:
        print(f'Continuing at iteration {iteration + 1} of {total}.')
    return model, generators, folder, iteration + 1, state


def restore_run(
    model: FastMAML, folder: Path, f: flags.FlagValues, held: ExitStack
) -> tuple[int, dict]:
    """Locks a run's folder for training, and loads its checkpoint: iteration and state, -1 and {}
    if there is none.

    Raises ValueError and OSError.
    """
    if f.train and folder.is_dir():
        lock_folder(folder, held)
    candidates = find_checkpoints(folder, f)
    if f.train and not f.resume and checkpoints(folder) and not f.overwrite:
        raise ValueError(
            f'{folder} holds a run: leave --resume=False away to continue it, add --overwrite to remove it, or '
            'give another --logdir'
        )
    return load(model, candidates, f)


def lock_folder(folder: Path, held: ExitStack):
    """Raises ValueError if another process trains there."""
    try:
        held.enter_context(lock(folder))
    except BlockingIOError:
        raise ValueError(
            f'{folder} is in use by another process that trains there: wait for it, or give another --logdir'
        ) from None


def open_folder(folder: Path, f: flags.FlagValues, start: int, held: ExitStack):
    """Makes the run's folder, sees that it can be written, and clears what is not to stay. Raises
    OSError and ValueError.

    With --overwrite that is the earlier run; else what a process that died has left of later
    iterations.
    """
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if f.train:
                lock_folder(folder, held)
        tempfile.TemporaryFile(dir=folder).close()
        if f.train:
            if f.overwrite:
                remove_run(folder)
            remove_leftovers(folder)
            forget_summaries(folder, start)
    except OSError as error:
        raise OSError(
            f'{folder} cannot be written ({error.strerror or error}): give another --logdir'
        ) from error


def remove_run(folder: Path):
    """Removes what a run has written, and says so; other files in the folder stay."""
    count = len(checkpoints(folder))
    for kind in ('model', 'best'):
        for path in checkpoints(folder, kind).values():
            remove_checkpoint(path)
    for path in [
        *event_files(folder),
        *folder.glob('test_ubs*_stepsize*.csv'),
        *folder.glob('test_ubs*_stepsize*.pkl'),
    ]:
        path.unlink()
    print(f'Removed the earlier run in {folder}: {count} checkpoints, summaries and results.')


def main(
    arguments: list[str],
    f: flags.FlagValues = flags.FLAGS,
    norm: Normalization | None = None,
):
    """Trains or evaluates. arguments: the program and what is left of the command line after the
    flags.
    """
    logging.set_verbosity(logging.ERROR)
    if (index := worker_index(f)) > 0:
        sys.stdout = open(os.devnull, 'w')  # the first one prints
    with ExitStack() as held:
        try:
            if len(arguments) > 1:
                raise ValueError(f'"{arguments[1]}" is no flag: flags are written --name=value')
            model, generators, folder, start, state = prepare(f, held, norm)
        except (ValueError, OSError) as error:
            sys.exit(f'main.py: {error}')
        if not generators:
            return
        print(
            'Done initializing, starting training.'
            if f.train
            else 'Done initializing, starting evaluation.',
            flush=True,
        )
        try:
            train(Run(model, generators, f, folder, start, state)) if f.train else test(
                model, generators, f, folder, start - 1
            )
        except (OSError, Diverged) as error:  # the disk is full, the folder is gone
            sys.exit(f'main.py: {error}')
        except tf.errors.OpError as error:
            if f.strategy != 'multi_worker':
                raise
            print(
                f'main.py: worker {index} lost another one ({first_line(error)}); start all of them again: the run continues from '
                f'its newest checkpoint in {folder}',
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # leaving the cluster in order would wait for the one that is gone


def worker_index(f: flags.FlagValues) -> int:
    """Of this process among the workers of --strategy=multi_worker; 0 is the chief."""
    try:
        return (
            int(json.loads(os.environ['TF_CONFIG'])['task']['index'])
            if f.strategy == 'multi_worker'
            else 0
        )
    except (KeyError, ValueError, TypeError):
        return 0  # a TF_CONFIG that cannot be read is refused later


def tune(f: flags.FlagValues):
    """Settings of TensorFlow that suit a run, by measurement; to be called before its first
    operation.

    A thread for each operation where tasks are tiny: handing work over takes longer than the work.
    XLA's older generator of loops for Omniglot: it compiles a quarter faster and into less, and the
    code is as fast; for the others the code is slower. XLA ends the process at options it does not
    know, so only in the version tried.
    """
    if f.datasource == 'sinusoid':
        tf.config.threading.set_intra_op_parallelism_threads(1)
    if f.datasource == 'omniglot' and tf.__version__.startswith('2.21.'):
        os.environ['XLA_FLAGS'] = (
            f'--xla_cpu_use_fusion_emitters=false {os.environ.get("XLA_FLAGS", "")}'
        )


def program(arguments: list[str], norm: Normalization | None = None):
    """main.py as a process of its own."""
    tune(flags.FLAGS)
    try:
        main(arguments, norm=norm)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    define_flags()
    app.run(program)
