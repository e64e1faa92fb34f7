"""Trains and evaluates MAML on sinusoids, Omniglot and miniImagenet.

    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 \
        --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/

trains, in the folder of --logdir that is named after the flags. The same line again continues; with --train=False it
evaluates the newest checkpoint on 600 validation tasks, with --train=False --test_set=True on 600 test tasks.
The README has the line for every cell of the paper's tables.
"""
import csv
import datetime
import importlib.util
import io
import itertools
import os
import pickle
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # no lines about CPU features and missing GPUs
import tensorflow as tf
from absl import app, flags, logging

import data_generator
from maml import MAML, Results, make_model
from utils import Batch, DamagedCheckpoint, checkpoints, write_checkpoint

SUMMARY_INTERVAL = 100          # iterations between summaries
PRINT_INTERVAL = 100            # between printed lines; 1000 for the sinusoid
VALIDATION_INTERVAL = 500       # between validations, image sources only
SAVE_INTERVAL = 1000            # between checkpoints
EVALUATION_TASKS = 600
EVALUATION_UPDATES = 10
EVALUATION_SEED = 1             # of validation and test tasks: the same for every run and checkpoint
MINIIMAGENET_QUERY_IMAGES = 15  # per class in training; K in evaluation, and in both for Omniglot


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """The command line; symbols are the paper's."""
    def define(kind, name, default, meaning, **kwargs):
        getattr(flags, f'DEFINE_{kind}')(name=name, default=default, help=meaning, flag_values=values, **kwargs)

    natural = {'lower_bound': 0}
    define('enum', 'datasource', 'sinusoid', 'where tasks come from', enum_values=['sinusoid', 'omniglot', 'miniimagenet'])
    define('integer', 'num_classes', 5, 'N, ways: classes of a task (images only)')
    define('enum', 'baseline', None, 'oracle: amplitude and phase are inputs (sinusoid only)', enum_values=['oracle', 'None'])
    define('string', 'data_dir', 'data', 'folder of the prepared data')
    define('integer', 'seed', 0, 'of the initial weights and the training tasks', **natural)
    # Training
    define('integer', 'pretrain_iterations', 0, 'iterations of joint training on all tasks, before meta-training', **natural)
    define('integer', 'metatrain_iterations', 15000, 'iterations of meta-training', **natural)
    define('integer', 'meta_batch_size', 25, 'T, tasks per iteration')
    define('float', 'meta_lr', 0.001, 'β, step size of the outer loop (Adam)')
    define('integer', 'update_batch_size', 5, 'K, shots: support examples per class')
    define('float', 'update_lr', 1e-3, 'α, step size of the inner loop')
    define('integer', 'num_updates', 1, 'inner updates in training')
    # Model
    define('enum', 'norm', 'batch_norm', 'normalisation', enum_values=['batch_norm', 'layer_norm', 'None'])
    define('integer', 'num_filters', 64, 'filters per convolution: 64 for Omniglot, 32 for miniImagenet')
    define('boolean', 'conv', True, 'convolutional network (images only), else fully connected')
    define('boolean', 'max_pool', False, 'max-pooling instead of strided convolutions')
    define('boolean', 'stop_grad', False, 'first-order approximation')
    # Logging, saving, testing
    define('boolean', 'log', True, 'write summaries for TensorBoard')
    define('string', 'logdir', 'logs', 'folder of the run folders')
    define('boolean', 'resume', True, 'continue from the newest checkpoint of the same run')
    define('boolean', 'train', True, 'train, else evaluate')
    define('integer', 'test_iter', -1, 'iteration of the checkpoint to load (-1: the newest)', lower_bound=-1)
    define('boolean', 'test_set', False, 'evaluate on the test classes, else on the validation classes')
    define('integer', 'train_update_batch_size', -1, 'K used in training, when evaluating with another K (-1: the same)')
    define('float', 'train_update_lr', -1, 'α used in training, when evaluating with another α (-1: the same)')


def settings(f: flags.FlagValues) -> dict:
    """{name: value} of the flags above, without absl's own."""
    above = flags.FlagValues()
    define_flags(above)
    return {name: f[name].value for name in above}


# Flags to settings ----------------------------------------------------------------------------------------------------

def check_flags(f: flags.FlagValues):
    """Raises ValueError with one sentence for flags that make no sense, alone or together."""
    for name in ('num_classes', 'meta_batch_size', 'update_batch_size', 'num_updates', 'num_filters'):
        if f[name].value < 1:
            raise ValueError(f'--{name} must be at least 1, but it is {f[name].value}')
    for name in ('meta_lr', 'update_lr'):
        if not 0 <= f[name].value < float('inf'):
            raise ValueError(f'--{name} must be a step size of 0 or more, but it is {f[name].value}')
    if f.train_update_batch_size != -1 and f.train_update_batch_size < 1:
        raise ValueError('--train_update_batch_size must be at least 1, or -1 for that of --update_batch_size, but it '
                         f'is {f.train_update_batch_size}')
    if f.train_update_lr != -1 and not 0 <= f.train_update_lr < float('inf'):
        raise ValueError('--train_update_lr must be a step size of 0 or more, or -1 for that of --update_lr, but it is '
                         f'{f.train_update_lr}')
    check_combinations(f)


def check_combinations(f: flags.FlagValues):
    """The part of `check_flags` that looks at several flags at once."""
    if f.baseline == 'oracle' and f.datasource != 'sinusoid':
        raise ValueError(f'--baseline=oracle knows amplitude and phase, so it needs --datasource=sinusoid, not {f.datasource}')
    if f.train and sum(iterations(f)) == 0:
        raise ValueError('there is nothing to train: set --metatrain_iterations or --pretrain_iterations above 0')
    named_otherwise = (f.train_update_batch_size not in (-1, f.update_batch_size)
                       or f.train_update_lr not in (-1, f.update_lr))
    if f.train and named_otherwise:
        raise ValueError('--train_update_batch_size and --train_update_lr name the run to evaluate, so they need '
                         '--train=False')
    if f.train and f.log and importlib.util.find_spec('tensorboard') is None:
        raise ValueError('--log writes summaries with the package tensorboard, which is not installed: run `pip install '
                         'tensorboard` or give --log=False')
    if f.metatrain_iterations == 0 and f.datasource == 'miniimagenet' and f.update_batch_size != 1:
        raise ValueError('a plain network on miniimagenet (--metatrain_iterations=0) takes one image per class, so it needs '
                         f'--update_batch_size=1, not {f.update_batch_size}')
    if f.max_pool and (f.datasource == 'sinusoid' or not f.conv):
        print('--max_pool is part of the name of the run, but does nothing without convolutions.', file=sys.stderr)


def run_name(f: flags.FlagValues) -> str:
    """The name of the run's folder, after the flags it was trained with."""
    shots = f.update_batch_size if f.train_update_batch_size == -1 else f.train_update_batch_size
    rate = f.update_lr if f.train_update_lr == -1 else f.train_update_lr
    parts = [f'cls_{f.num_classes}.mbs_{f.meta_batch_size}.ubs_{shots}.numstep{f.num_updates}.updatelr{rate}',
             f'hidden{f.num_filters}' if f.num_filters != 64 else '', 'maxpool' if f.max_pool else '',
             'stopgrad' if f.stop_grad else '', f.baseline if f.baseline == 'oracle' else '',
             {'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}[f.norm]]
    return ''.join(parts)


def model_settings(f: flags.FlagValues) -> dict:
    """The flags that `make_model` takes."""
    return {name: f[name].value for name in ('datasource', 'num_classes', 'norm', 'num_filters', 'conv', 'max_pool', 'baseline',
                                             'update_batch_size', 'update_lr', 'num_updates', 'meta_lr', 'stop_grad', 'seed')}


def iterations(f: flags.FlagValues) -> tuple[int, int]:
    """(pre-training, meta-training) iterations. The oracle is jointly trained throughout."""
    if f.baseline == 'oracle':
        return f.pretrain_iterations + f.metatrain_iterations, 0
    return f.pretrain_iterations, f.metatrain_iterations


def make_generators(f: flags.FlagValues) -> dict[str, data_generator.DataGenerator]:
    """{'train': ..., 'val': ...} for training, {'val' or 'test': ...} for evaluation."""
    splits = {'train': f.seed, 'val': EVALUATION_SEED} if f.train else {'test' if f.test_set else 'val': EVALUATION_SEED}
    shots, data_dir = f.update_batch_size, os.path.expanduser(f.data_dir)
    if f.datasource == 'sinusoid':
        return {split: data_generator.SinusoidGenerator(shots, shots, f.baseline == 'oracle', seed)
                for split, seed in splits.items()}
    if f.datasource == 'omniglot':
        queries, folders = shots, data_generator.load_omniglot(data_dir)
    else:
        folders = data_generator.load_miniimagenet(data_dir, splits)
        queries = 0 if f.metatrain_iterations == 0 else MINIIMAGENET_QUERY_IMAGES if f.train else shots
    return {split: data_generator.ImageGenerator(folders, f.num_classes, shots, queries, f.datasource == 'omniglot', seed,
                                                 splits=[split]) for split, seed in splits.items()}


def find_checkpoint(folder: Path, f: flags.FlagValues) -> tuple[int, str] | None:
    """(iteration, path) of the checkpoint to load; None if training starts at the beginning."""
    found = checkpoints(folder)
    if f.train and (not f.resume or not found and f.test_iter == -1):
        return None
    if not found:
        raise ValueError(f'{folder} holds no checkpoint: train first with the same flags, or give the --logdir, '
                         '--train_update_batch_size and --train_update_lr of the training run')
    iteration = max(found) if f.test_iter == -1 else f.test_iter
    if iteration not in found:
        raise ValueError(f'--test_iter={iteration}: {folder} has no such checkpoint, but those of the iterations '
                         f'{", ".join(map(str, found))}')
    return iteration, found[iteration]


def restore(model: MAML, path: str, f: flags.FlagValues):
    """Loads a checkpoint. Raises ValueError if it is damaged or another network's."""
    print(f'Restoring model weights from {path}')
    try:
        complete = model.restore(path)
    except DamagedCheckpoint:
        raise
    except ValueError as error:
        raise ValueError(f'{error}; give the flags of the run that wrote it, or another --logdir') from error
    if f.train and not complete:
        print("The checkpoint is TensorFlow 1's: it holds the weights only, so Adam starts afresh.")


# Training -------------------------------------------------------------------------------------------------------------

class Log:
    """What a run shows: summaries for TensorBoard, the original's printed lines, and a line of progress."""

    def __init__(self, folder: Path, f: flags.FlagValues, start: int):
        self.kinds = ['loss'] if f.datasource == 'sinusoid' else ['loss', 'accuracy']   # the last one is printed
        self.pretrain, self.update = iterations(f)[0], f.num_updates - 1
        self.interval = PRINT_INTERVAL * (10 if f.datasource == 'sinusoid' else 1)
        self.before, self.after = [], []
        self.start, self.end = start, sum(iterations(f))
        self.clock = self.shown = time.perf_counter()
        self.writer = tf.summary.create_file_writer(str(folder)) if f.log else None
        if self.writer:
            table = [f'`--{name}` | {value}' for name, value in settings(f).items()]
            with self.writer.as_default():
                tf.summary.text('flags', '\n'.join(['flag | value', '--- | ---', *table]), step=start)

    def summaries(self, prefix: str, results: Results, iteration: int) -> tuple[float, float]:
        """Writes the scalars of one meta-batch under the original's tags. Returns the values to print: pre, post."""
        for kind in self.kinds:
            pre, post = means(results, kind)
            tags = [f'Pre-update_{kind}', *(f'Post-update_{kind}__step_{j}' for j in range(1, len(post) + 1))]
            if self.writer:
                self._scalars(tuple(f'{prefix}_{tag}' for tag in tags), tf.constant([pre, *post]), tf.constant(iteration, tf.int64))
        return pre, post[self.update]

    @tf.function(autograph=False)   # one call for all of them takes a fifth of the time
    def _scalars(self, tags: tuple[str, ...], values: tf.Tensor, iteration: tf.Tensor):
        with self.writer.as_default():
            for i, tag in enumerate(tags):
                tf.summary.scalar(tag, values[i], step=iteration)

    def train(self, results: Results, iteration: int):
        """Takes a training meta-batch in; prints the means of all since the last line."""
        for values, value in zip((self.before, self.after), self.summaries('metatrain', results, iteration)):
            values.append(value)
        if iteration % self.interval == 0 and iteration != 0:
            pretraining = iteration < self.pretrain
            label = f'Pretrain Iteration {iteration}' if pretraining else f'Iteration {iteration - self.pretrain}'
            self.line(f'{label}: {np.mean(self.before)}, {np.mean(self.after)}')
            self.before, self.after = [], []

    def validation(self, results: Results, iteration: int):
        """Takes a validation meta-batch in and prints its means."""
        pre, post = self.summaries('metaval', results, iteration)
        self.line(f'Validation results: {pre}, {post}')

    def first_step(self):
        """To be called after the first step; the clock of the progress line starts here."""
        self.line(f'The first step took {time.perf_counter() - self.clock:.1f} s, compilation included.')
        self.clock = time.perf_counter()

    def progress(self, iteration: int, loss: tf.Tensor):
        """Where the run is: on a terminal a line that changes every second, else one after each printed line."""
        now, done = time.perf_counter(), iteration - self.start
        due = now - self.shown > 1 if sys.stdout.isatty() else iteration % self.interval == 0 and iteration != 0
        if done and due:
            self.shown, rate = now, done / (now - self.clock)
            left = datetime.timedelta(seconds=round((self.end - iteration - 1) / rate))
            text = f'{iteration + 1} of {self.end} iterations, {rate:.3g} per second, {left} left, loss {loss:.4g}'
            print(text, end='\033[K\r' if sys.stdout.isatty() else '\n', flush=True)

    def close(self):
        if self.writer:
            self.writer.close()

    @staticmethod
    def line(text: str):
        print(text + ('\033[K' if sys.stdout.isatty() else ''), flush=True)


def means(results: Results, kind: str) -> tuple[float, np.ndarray]:
    """Means over tasks of 'loss' or 'accuracy' before (support) and after each update (query): a number and [J]."""
    before, after = {'loss': results[:2], 'accuracy': results[2:4]}[kind]
    return np.mean(before), np.mean(after, axis=1)


def train(model: MAML, generators: dict, f: flags.FlagValues, folder: Path, start: int, watch: Callable = iter):
    """Pre-training, then meta-training, from iteration `start` to the end. watch: wraps the iterator of the data."""
    pretrain, end = iterations(f)[0], sum(iterations(f))
    num_updates = max(f.num_updates, {'sinusoid': 5, 'omniglot': 10, 'miniimagenet': 1}[f.datasource])
    log, block = Log(folder, f, start), SUMMARY_INTERVAL if f.datasource == 'sinusoid' else 1
    for origin, batches in watch(prefetch(generators['train'], f.meta_batch_size, block, start, end)):
        for first, last in stretches(max(origin, start), min(origin + block, end), pretrain):
            if first % SUMMARY_INTERVAL == 0:
                batch = Batch(*(values.numpy()[first - origin] for values in batches))
                log.train(model.evaluate(batch, num_updates), first)
            loss = model.train(batches, first - origin, last - origin, pretrain=first < pretrain)
            if first == start:
                log.first_step()
            log.progress(last - 1, loss)
            if first % SAVE_INTERVAL == 0 and first != 0 or last == end:
                write_checkpoint(model.checkpoint, folder, last - 1)
            if first % VALIDATION_INTERVAL == 0 and first != 0 and f.datasource != 'sinusoid':
                batch = generators['val'].batch('val', 0, f.meta_batch_size)
                log.validation(model.evaluate(batch, num_updates), first)
    log.close()


def stretches(start: int, end: int, pretrain: int) -> Iterator[tuple[int, int]]:
    """Cuts start...end into (first, last + 1) that nothing interrupts: summaries come before, checkpoints and
    validations after the first iteration of an interval, and pre-training ends with iteration `pretrain` - 1."""
    while start < end:
        stop = start + 1 if start % SAVE_INTERVAL == 0 else (start // SUMMARY_INTERVAL + 1) * SUMMARY_INTERVAL
        stop = min(stop, end, pretrain if start < pretrain else end)
        yield start, stop
        start = stop


def prefetch(generator: data_generator.DataGenerator, tasks: int, block: int, start: int, end: int
             ) -> Iterator[tuple[int, Batch]]:
    """Training meta-batches [block, T, ...] with the iteration of the first, drawn while those before are in use.

    Blocks begin at multiples of `block`, wherever a run is continued: then all is as if it had not been interrupted.
    Small ones are drawn ten at a time, since Python's lock makes the loop wait for the drawing at either's start.
    """
    group = 10 * block if block > 1 else 1

    def draw(origin):
        drawn = generator.batches('train', origin, group, tasks)
        return [(origin + i, Batch(*(tf.constant(values[i:i + block]) for values in drawn))) for i in range(0, group, block)]

    for blocks in ahead(draw, range(start // group * group, end, group)):
        yield from ((origin, batch) for origin, batch in blocks if origin + block > start and origin < end)


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


# Evaluation -----------------------------------------------------------------------------------------------------------

def test(model: MAML, generators: dict, f: flags.FlagValues, folder: Path):
    """600 tasks: prints means, standard deviations and 95 % intervals over 0...10 updates and writes them as csv and pkl."""
    (split, generator), = generators.items()
    chunk = {'sinusoid': 600, 'omniglot': 20, 'miniimagenet': 4}[f.datasource]   # tasks at once: bounds the memory
    rows = []
    draw = lambda i: generator.batch(split, 0, EVALUATION_TASKS, slice(i, i + chunk))
    for batch in ahead(draw, range(0, EVALUATION_TASKS, chunk)):
        results = model.evaluate(batch, max(f.num_updates, EVALUATION_UPDATES))
        before, after = results[:2] if f.datasource == 'sinusoid' else results[2:4]
        rows.append(np.concatenate([[before], after]).T)   # [chunk, 1 + updates]
        if sys.stdout.isatty():
            print(f'{chunk * len(rows)} of {EVALUATION_TASKS} tasks', end='\033[K\r', flush=True)
    values = np.concatenate(rows)                          # [600, 1 + updates]
    mean, stddev = values.mean(0), values.std(0)
    interval = 1.96 * stddev / np.sqrt(len(values))
    print('Mean validation accuracy/loss, stddev, and confidence intervals')
    print((mean, stddev, interval))
    name = f'test_ubs{f.update_batch_size}_stepsize{f.update_lr}'
    write_whole(folder / f'{name}.pkl', pickle.dumps({'mses': values}))
    text = io.StringIO()
    csv.writer(text).writerows([[f'update{j}' for j in range(len(mean))], mean, stddev, interval])
    write_whole(folder / f'{name}.csv', text.getvalue().encode())


def write_whole(path: Path, content: bytes):
    """Writes a file so that it is there whole or, if the process dies, not at all."""
    beside = path.with_name(path.name + '.part')
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# The program ----------------------------------------------------------------------------------------------------------

def prepare(f: flags.FlagValues) -> tuple[MAML, dict, Path, int]:
    """Everything that can fail for the user's reasons, before anything is written: (model, generators, folder, start).

    Returns no generators if the run is complete.
    """
    check_flags(f)
    folder, total = Path(os.path.expanduser(f.logdir)) / run_name(f), sum(iterations(f))
    checkpoint = find_checkpoint(folder, f)
    start = checkpoint[0] + 1 if checkpoint else 0
    model = make_model(**model_settings(f))
    if checkpoint:
        restore(model, checkpoint[1], f)
    if f.train and start >= total:
        print(f'The run is complete: {start} of {total} iterations; raise --metatrain_iterations for more.')
        return model, {}, folder, start
    generators = make_generators(f)
    open_folder(folder, f)
    if f.train and checkpoint:
        print(f'Continuing at iteration {start} of {total}.')
    return model, generators, folder, start


def open_folder(folder: Path, f: flags.FlagValues):
    """Makes the run's folder, or sees that it can be written. Raises OSError.

    With --resume=False the folder of an earlier run becomes NAME.1, NAME.2, ...: were the checkpoints of both in one
    folder, the earlier run's would be taken for the newest, and this run's for the oldest.
    """
    try:
        if f.train and not f.resume and checkpoints(folder):
            names = (folder.with_name(f'{folder.name}.{i}') for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            folder.rename(aside)
            print(f'The earlier run is now {aside}')
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f'{folder} cannot be written ({error.strerror}): give another --logdir') from error


def main(arguments: list[str], f: flags.FlagValues = flags.FLAGS):
    """Trains or evaluates. arguments: the program and what is left of the command line after the flags."""
    logging.set_verbosity(logging.ERROR)
    try:
        if len(arguments) > 1:
            raise ValueError(f'"{arguments[1]}" is no flag: flags are written --name=value')
        model, generators, folder, start = prepare(f)
    except (ValueError, OSError) as error:
        sys.exit(f'main.py: {error}')
    if not generators:
        return
    print('Done initializing, starting training.' if f.train else 'Done initializing, starting evaluation.', flush=True)
    try:
        train(model, generators, f, folder, start) if f.train else test(model, generators, f, folder)
    except OSError as error:   # the disk is full, the folder is gone
        sys.exit(f'main.py: {error}')


def tune(f: flags.FlagValues):
    """Settings of TensorFlow that suit a run, by measurement; to be called before its first operation.

    A thread for each operation where tasks are tiny: handing work over takes longer than the work. XLA's older
    generator of loops for Omniglot: it compiles a quarter faster and into less, and the code is as fast; for the
    others the code is slower. XLA ends the process at options it does not know, so only in the version tried.
    """
    if f.datasource == 'sinusoid':
        tf.config.threading.set_intra_op_parallelism_threads(1)
    if f.datasource == 'omniglot' and tf.__version__.startswith('2.21.'):
        os.environ['XLA_FLAGS'] = f'--xla_cpu_use_fusion_emitters=false {os.environ.get("XLA_FLAGS", "")}'


def program(arguments: list[str]):
    """main.py as a process of its own."""
    tune(flags.FLAGS)
    main(arguments)


if __name__ == '__main__':
    define_flags()
    app.run(program)
