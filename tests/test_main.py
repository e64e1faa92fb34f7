"""The command line: flags, names of runs, refusals, what is printed and what is written."""

import contextlib
import csv
import importlib.util
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from command_line import (
    Outcome,
    assert_refused,
    command,
    evaluate_few,
    listing,
    make_miniimagenet,
    make_omniglot,
    parsed,
    run,
    settle,
    succeeded,
)
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from werkzeug.test import Client

from fewshot.networks.build import MODEL_SETTINGS
from fewshot.runs import flags as flags_module
from fewshot.runs import trainer
from fewshot.runs.checkpoints import checkpoints
from fewshot.runs.flags import FLAGS, INNER_LOOPS, run_name, settings
from fewshot.runs.prepare import prepare
from fewshot.runs.results import write_together, write_whole
from fewshot.runs.summaries import Log
from fewshot.runs.tasks import make_generators
from utils import figures_of_paper

NUMBER = r'(-?\d+\.\d+(?:e[-+]\d+)?|nan)'


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """No compilation: a few steps of many models. test_reference.py compares both ways."""
    settle(monkeypatch, compiled=False)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def graphs(eager):
    """TensorFlow's graphs after all, for the tests that take more than a few steps."""
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_miniimagenet(make_omniglot(tmp_path_factory.mktemp('data')))


@pytest.fixture
def intervals(monkeypatch):
    """Summaries, lines and validations more often than every 100 iterations."""

    def change(summary: int, line: int, validation: int = 500, save: int = 1000):
        values = dict(summary=summary, validation=validation, save=save)
        settle(monkeypatch, intervals=values, printing=line)

    return change


OMNIGLOT = [
    '--datasource=omniglot',
    '--num_classes=2',
    '--update_batch_size=1',
    '--meta_batch_size=2',
    '--num_filters=2',
]
PLAIN = [*OMNIGLOT, '--conv=False', '--norm=None']
MINIIMAGENET = [
    '--datasource=miniimagenet',
    '--num_classes=2',
    '--update_batch_size=1',
    '--meta_batch_size=1',
    '--num_filters=2',
    '--update_lr=0.01',
]
SINUSOID = ['--norm=None', '--meta_batch_size=4']


def values(folder: Path) -> Iterator[tuple]:
    """(step, value as TensorBoard has it) of all summaries in a folder's event files."""
    for file in sorted(folder.glob('events.*')):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield event.step, value


def summaries(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of all scalars in a folder's event files."""
    found = {}
    for step, value in values(folder):
        if value.tag not in ('flags', 'fit', 'task', SESSION_START_INFO_TAG):
            assert value.metadata.plugin_data.plugin_name == 'scalars'
            steps = found.setdefault(value.tag, {})
            assert step not in steps, 'written twice'
            steps[step] = float(tf.make_ndarray(value.tensor))
    return found


def only(folder: Path) -> Path:
    """The one run folder in a logdir."""
    (run_folder,) = folder.iterdir()
    return run_folder


# Flags and names ----------------------------------------------------------------------------------

DEFAULTS = dict(
    datasource='sinusoid',
    num_classes=5,
    baseline=None,
    pretrain_iterations=0,
    metatrain_iterations=15000,
    meta_batch_size=25,
    meta_lr=0.001,
    update_batch_size=5,
    update_lr=1e-3,
    num_updates=1,
    norm='batch_norm',
    num_filters=64,
    conv=True,
    max_pool=False,
    stop_grad=False,
    log=True,
    logdir='logs',
    resume=True,
    train=True,
    test_iter=-1,
    test_set=False,
    train_update_batch_size=-1,
    train_update_lr=-1,
)


def test_flags_and_defaults():
    values = settings(parsed())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert values.keys() - DEFAULTS.keys() == {
        'data_dir',
        'seed',
        'overwrite',
        'validation_tasks',
        'split',
        'image_size',
        'channels',
        'test_query',
        'transductive',
        'strategy',
        'network',
        'tf32',
        'test_tasks',
        'run',
        'cache_dir',
        'num_query',
        'fit',
        'skip_small_classes',
        'one_program',
        'original_output',
        'init',
        'loss',
        *INNER_LOOPS,
    }


@pytest.mark.parametrize(
    'line, name',
    [
        ('', 'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm'),
        ('--norm=None --update_batch_size=10', 'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm'),
        (
            '--norm=None --update_batch_size=10 --baseline=oracle',
            'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001oraclenonorm',
        ),
        ('--baseline=None', 'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm'),
        (
            '--datasource=omniglot --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 '
            '--num_updates=1',
            'cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm',
        ),
        (
            '--datasource=omniglot --meta_batch_size=16 --update_batch_size=1 --num_classes=20 '
            '--update_lr=.1 --num_updates=5',
            'cls_20.mbs_16.ubs_1.numstep5.updatelr0.1batchnorm',
        ),
        (
            '--datasource=miniimagenet --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 '
            '--num_updates=5 --num_classes=5 --num_filters=32 --max_pool=True',
            'cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm',
        ),
        (
            '--num_filters=32 --max_pool --stop_grad --norm=layer_norm --baseline=oracle',
            'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001hidden32maxpoolstopgradoraclelayernorm',
        ),
        ('--stop_grad=True', 'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001stopgradbatchnorm'),
        ('--update_lr=1', 'cls_5.mbs_25.ubs_5.numstep1.updatelr1.0batchnorm'),
        (
            '--update_batch_size=20 --train_update_batch_size=1 --update_lr=.2 '
            '--train_update_lr=.1 --train=False',
            'cls_5.mbs_25.ubs_1.numstep1.updatelr0.1batchnorm',
        ),
    ],
)
def test_run_name(line, name):
    assert run_name(parsed(*line.split())) == name


def test_iterations():
    flags = ['--pretrain_iterations=3', '--metatrain_iterations=4']
    assert flags_module.iterations(parsed(*flags)) == (3, 4)
    assert flags_module.iterations(parsed(*flags, '--baseline=oracle')) == (7, 0)


@pytest.mark.parametrize(
    'source, line, queries',
    [
        ('omniglot', '--update_batch_size=2', {'train': 2, 'val': 2}),
        ('omniglot', '--update_batch_size=2 --train=False --test_set=True', {'test': 2}),
        ('miniimagenet', '--update_batch_size=1', {'train': 15, 'val': 15}),
        ('miniimagenet', '--update_batch_size=3 --train=False', {'val': 3}),
        ('miniimagenet', '--update_batch_size=1 --metatrain_iterations=0', {'train': 0, 'val': 0}),
        (
            'miniimagenet',
            '--update_batch_size=1 --metatrain_iterations=0 --train=False',
            {'val': 0},
        ),
    ],
)
def test_query_images(data, source, line, queries):
    flags = ['--num_classes=2', f'--data_dir={data}', f'--datasource={source}', *line.split()]
    generators = make_generators(parsed(*flags))
    assert {split: generator.num_query for split, generator in generators.items()} == queries


# Refusals: one sentence, and nothing written ------------------------------------------------------


@pytest.mark.parametrize(
    'argument',
    [
        '--update_lr=abc',
        '--test_iter=-2',
        '--no_such_flag=1',
        '--datasource=imagenet',
        '--norm=no',
        '--metatrain_iterations=-1',
        '--pretrain_iterations=-1',
        '--seed=-1',
        '--num_updates=1.5',
        '--train=maybe',
        '--baseline=random',
    ],
)
def test_flag_that_cannot_be_parsed(argument):
    with pytest.raises(flags.Error, match=argument.split('=')[0].lstrip('-')):
        parsed(argument)


COUNTS = ('num_classes', 'meta_batch_size', 'update_batch_size', 'num_updates', 'num_filters')
# {flags: words of the sentence}; TMP is a folder.
BAD_COUNTS = {
    f'--{name}={value}': [f'--{name} must be at least 1', value]
    for name in COUNTS
    for value in ('0', '-5')
}
BAD_STEP_SIZES = {
    f'--{name}={value}': [f'--{name} must be a step size', value]
    for name in ('meta_lr', 'update_lr')
    for value in ('nan', 'inf', '-0.1')
}
SHOTS_TRAINED_WITH = ['--train_update_batch_size must be at least 1']
REFUSED = {
    **BAD_COUNTS,
    **BAD_STEP_SIZES,
    '--train=False --train_update_batch_size=-2': SHOTS_TRAINED_WITH,
    '--train=False --train_update_batch_size=0': SHOTS_TRAINED_WITH,
    '--train=False --train_update_lr=nan': ['--train_update_lr must be a step size'],
    '--train_update_batch_size=3': ['--train_update_batch_size', '--train=False'],
    '--train_update_lr=.1': ['--train_update_lr', '--train=False'],
    '--metatrain_iterations=0': [
        'nothing to train',
        '--metatrain_iterations',
        '--pretrain_iterations',
    ],
    '--baseline=oracle --metatrain_iterations=0': ['nothing to train'],
    '--datasource=omniglot --baseline=oracle': [
        '--baseline=oracle',
        '--datasource=sinusoid',
        'omniglot',
    ],
    '--datasource=miniimagenet --metatrain_iterations=0 --pretrain_iterations=1': [
        '--update_batch_size=1',
        'not 5',
    ],
    '--train=False': ['holds no checkpoint', '--logdir'],
    '--train=False --test_iter=7': ['holds no checkpoint'],
    '--test_iter=7': ['holds no checkpoint'],
    'sinusoid': ['"sinusoid" is no flag', '--name=value'],
    '--train False': ['"False" is no flag'],
    '--datasource=omniglot --data_dir=TMP/absent': [
        'no folder',
        'absent/omniglot_resized',
        'prepare_omniglot.py',
    ],
    '--datasource=omniglot --data_dir=TMP/empty': [
        'empty/omniglot_resized',
        'no class folders',
        'prepare_omniglot',
    ],
    '--datasource=miniimagenet --data_dir=TMP/absent': [
        'no folder',
        'miniImagenet/train',
        'prepare_miniimagenet.py',
    ],
    '--datasource=omniglot --num_classes=18': ['--num_classes=18', '17 classes', 'train split'],
    '--datasource=omniglot --num_classes=3 --update_batch_size=1': [
        '--num_classes=3',
        '2 classes',
        'val split',
    ],
    '--datasource=omniglot --num_classes=2 --update_batch_size=3': [
        'has 4 images',
        'takes 6',
        '--update_batch_size',
    ],
    '--datasource=miniimagenet --num_classes=2 --update_batch_size=2': [
        'has 16 images',
        'takes 17',
    ],
}


@pytest.mark.parametrize('line, words', REFUSED.items(), ids=REFUSED)
def test_refused(tmp_path, data, line, words):
    (tmp_path / 'empty/omniglot_resized').mkdir(parents=True)
    before = listing(tmp_path)
    line = line.replace('TMP', str(tmp_path)).split()
    outcome = run(f'--logdir={tmp_path}/logs', f'--data_dir={data}', *line)
    assert_refused(outcome, *words)
    assert len(outcome.err.splitlines()) == 1 or 'Decoding' in outcome.err
    assert listing(tmp_path) == before


def spoil_size(folder: Path) -> Path:
    make_omniglot(folder, size=32)
    return folder


def spoil_image(folder: Path) -> Path:
    image = make_omniglot(folder) / 'omniglot_resized/Alphabet1/character03/0003_02.png'
    image.write_bytes(image.read_bytes()[:60])
    return image


@pytest.mark.parametrize(
    'spoil, words',
    [
        (spoil_size, ['.png is 32x32', '28x28 ', 'expected', 'prepare_omniglot.py']),
        (spoil_image, ['character03/0003_02.png cannot be decoded', 'replace it']),
    ],
)
def test_bad_image_is_named(tmp_path, spoil, words):
    spoil(tmp_path)
    before = listing(tmp_path)
    assert_refused(run(*OMNIGLOT, f'--logdir={tmp_path}/logs', f'--data_dir={tmp_path}'), *words)
    assert listing(tmp_path) == before


def test_checkpoint_is_looked_for_before_the_data_is_decoded(tmp_path):
    make_omniglot(tmp_path)
    before = listing(tmp_path)
    outcome = run(*OMNIGLOT, f'--logdir={tmp_path}/logs', f'--data_dir={tmp_path}', '--train=False')
    assert_refused(outcome, 'holds no checkpoint')
    assert listing(tmp_path) == before


@pytest.mark.parametrize('place', ['file', 'file/below'])
@pytest.mark.parametrize('train', ['True', 'False'])
def test_logdir_is_a_file(tmp_path, place, train):
    (tmp_path / 'file').write_text('mine')
    outcome = run(*SINUSOID, f'--logdir={tmp_path / place}', f'--train={train}')
    assert_refused(outcome, str(tmp_path / place), '--logdir')
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may write anywhere')
def test_logdir_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    assert_refused(run(*SINUSOID, f'--logdir={tmp_path}/logs'), 'cannot be written', '--logdir')
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='no /proc')
def test_logdir_cannot_be_made():
    outcome = run(*SINUSOID, '--logdir=/proc/logs')
    assert_refused(outcome, '/proc/logs', 'cannot be written', '--logdir')


def test_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    """The disk is full or gone in the middle of a run: here a file has taken the folder's place."""

    def write(checkpoint, folder, *more):
        folder.rename(tmp_path / 'gone')
        folder.write_text('')
        return real(checkpoint, folder, *more)

    real = trainer.write_checkpoint
    monkeypatch.setattr(trainer, 'write_checkpoint', write)
    outcome = run(*SINUSOID, '--metatrain_iterations=1', '--log=False', f'--logdir={tmp_path}/logs')
    assert_refused(outcome, 'model0 cannot be written')


def test_tensorboard_is_absent(tmp_path, monkeypatch):
    """It is asked for before the run, and --log=False does without."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert_refused(run(*SINUSOID, f'--logdir={tmp_path}'), '--log=False', 'tensorboard')
    assert not [*tmp_path.iterdir()]
    for name in ('scalar', 'text', 'create_file_writer'):
        monkeypatch.setattr(tf.summary, name, None)
    succeeded(run(*SINUSOID, f'--logdir={tmp_path}', '--log=False', '--metatrain_iterations=2'))
    names = {path.name for path in only(tmp_path).iterdir()}
    assert names == {'model1.index', 'model1.data-00000-of-00001'}


def test_max_pool_without_convolutions(tmp_path):
    """The original lets it pass, with its place in the name."""
    flags = ['--max_pool=True', '--metatrain_iterations=1', '--log=False', f'--logdir={tmp_path}']
    outcome = succeeded(run(*SINUSOID, *flags))
    assert '--max_pool' in outcome.err and 'maxpool' in only(tmp_path).name


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--update_lr=abc'], ['update_lr', 'abc']),
        (['--num_classes=0'], ['main.py: --num_classes must be at least 1']),
        (['--train', 'False'], ['"False" is no flag']),
    ],
)
@pytest.mark.slow
def test_refused_as_a_process(tmp_path, arguments, words):
    outcome = command('main.py', *arguments, f'--logdir={tmp_path}/logs')
    assert outcome.status in (1, 2) and 'Traceback' not in outcome.err and not [*tmp_path.iterdir()]
    assert all(word in outcome.err for word in words)


# What is printed ----------------------------------------------------------------------------------


def means_of(written: dict, kind: str, update: int, steps) -> list[float]:
    tags = (f'metatrain_Pre-update_{kind}', f'metatrain_Post-update_{kind}__step_{update}')
    return [np.mean([written[tag][step] for step in steps]) for tag in tags]


def test_table_of_flags_says_what_makes_the_model():
    of_tasks = {'example_shape', 'dim_output', 'objective', 'shots'}  # of UserTasks.model_settings
    of_flags = {flag.name for flag in FLAGS if flag.makes_model}
    assert of_flags | of_tasks == {*MODEL_SETTINGS} and not of_flags & of_tasks


LINES = r'(Pretrain )?Iteration \d+ of', r'(Pretrain )?Iteration \d+:|Validation'


def test_lines_of_a_sinusoid(tmp_path, intervals, graphs):
    """A line every tenth summary, each the means of the losses since the line before; not at 0."""
    intervals(summary=2, line=2)
    flags = ['--metatrain_iterations=45', '--num_updates=2', f'--logdir={tmp_path}']
    outcome = succeeded(run(*SINUSOID, *flags, '--original_output'))
    shown, lines = ([x for x in outcome.lines if re.match(start, x)] for start in LINES)
    assert outcome.lines[0] == 'Done initializing, starting training.'
    assert [line.split(':')[0] for line in lines] == ['Iteration 20', 'Iteration 40']
    written = summaries(only(tmp_path))
    for line, steps in zip(lines, (range(0, 21, 2), range(22, 41, 2))):
        pre, post = re.fullmatch(rf'Iteration \d+: {NUMBER}, {NUMBER}', line).groups()
        expected = means_of(written, 'loss', 2, steps)
        np.testing.assert_allclose([float(pre), float(post)], expected, rtol=1e-5)
    for line, i, steps in zip(
        shown, (20, 40, 45), [*map(range, (0, 22, 42), (21, 41, 46), [2] * 3)]
    ):
        pre, post = (f'{mean:.4g}' for mean in means_of(written, 'loss', 2, steps))
        start = f'Iteration {i} of 45: loss {pre} before any update, {post} after 2 updates; '
        assert line.startswith(start) and re.search(r'; [\d,.]+ (per second|s each)', line)
    assert len(shown) == 3 and re.search(r', 0:\d\d:\d\d left$', shown[1])


@pytest.mark.slow
def test_lines_of_images(tmp_path, data, intervals, graphs):
    """Accuracies; pre-training has its own count and name; validation classes every so often."""
    intervals(summary=2, line=4, validation=6)
    iterations = ['--pretrain_iterations=8', '--metatrain_iterations=9']
    folders = [f'--data_dir={data}', f'--logdir={tmp_path}']
    outcome = succeeded(run(*PLAIN, *iterations, *folders, '--original_output'))
    written = summaries(only(tmp_path))

    def training(*steps):
        return means_of(written, 'accuracy', 1, steps)

    def validation(step):
        tags = ('Pre-update_accuracy', 'Post-update_accuracy__step_1')
        return [written[f'metaval_{tag}'][step] for tag in tags]

    lines = [line for line in outcome.lines if re.match(LINES[1], line)]
    expected = [
        ('Pretrain Iteration 4', training(0, 2, 4)),
        ('Validation results', validation(6)),
        ('Iteration 0', training(6, 8)),
        ('Iteration 4', training(10, 12)),
        ('Validation results', validation(12)),
        ('Iteration 8', training(14, 16)),
    ]
    assert [line.split(':')[0] for line in lines] == [label for label, _ in expected]
    for line, (_, values) in zip(lines, expected):
        numbers = re.fullmatch(rf'[A-Za-z 0-9]+: {NUMBER}, {NUMBER}', line).groups()
        np.testing.assert_allclose([float(number) for number in numbers], values, rtol=1e-5)


def test_restoring_is_printed(tmp_path):
    train = [*SINUSOID, f'--logdir={tmp_path}', '--log=False']
    succeeded(run(*train, '--metatrain_iterations=2'))
    path = only(tmp_path) / 'model1'
    outcome = succeeded(run(*train, '--metatrain_iterations=4'))
    assert outcome.lines[0] == f'Restoring model weights from {path}'
    assert 'at iteration 2 of 4' in outcome.lines[1]
    outcome = succeeded(run(*train, '--train=False', '--test_iter=1'))
    assert outcome.lines[0] == f'Restoring model weights from {path}'


# Summaries ----------------------------------------------------------------------------------------


def tags(prefix: str, kinds: list[str], updates: int) -> set[str]:
    found = {f'{prefix}_Pre-update_{kind}' for kind in kinds}
    for kind in kinds:
        found |= {f'{prefix}_Post-update_{kind}__step_{j}' for j in range(1, updates + 1)}
    return found


def test_tags_of_a_sinusoid(tmp_path, graphs):
    succeeded(run(*SINUSOID, '--metatrain_iterations=201', f'--logdir={tmp_path}'))
    written = summaries(only(tmp_path))
    assert written.keys() == tags('metatrain', ['loss'], 5) | {'training/loss'}
    assert all([*values] == [0, 100, 200] for values in written.values())
    assert all(np.isfinite([*values.values()]).all() for values in written.values())


@pytest.mark.slow
def test_tags_of_images(tmp_path, data, intervals, graphs):
    intervals(summary=100, line=100, validation=100)
    folders = [f'--data_dir={data}', f'--logdir={tmp_path}']
    succeeded(run(*PLAIN, '--metatrain_iterations=101', *folders))
    written = summaries(only(tmp_path))
    training = tags('metatrain', ['loss', 'accuracy'], 10) | {'training/accuracy'}
    validation = tags('metaval', ['loss', 'accuracy'], 10)
    validation |= {f'validation/{name}accuracy' for name in ('', 'interval_', 'best_')}
    assert written.keys() == training | validation
    assert all([*written[tag]] == [0, 100] for tag in training)
    assert all([*written[tag]] == [100] for tag in validation)
    for tag in written:
        if 'accuracy' in tag:
            assert all(0 <= value <= 1 for value in written[tag].values())


@pytest.mark.slow
def test_pictures(tmp_path, data, eager, monkeypatch):
    """At the start and at intervals: the fit of a sinusoid, the images of a task."""
    settle(monkeypatch, intervals={'summary': 1})
    settle(monkeypatch, intervals={'picture': 2})
    images = [*OMNIGLOT, '--conv=False', f'--data_dir={data}']
    for name, given in ('fit', SINUSOID), ('task', images):
        succeeded(run(*given, '--metatrain_iterations=4', f'--logdir={tmp_path}/{name}'))
        shown = [
            (step, value.tag, value.metadata.plugin_data.plugin_name)
            for step, value in values(only(tmp_path / name))
            if value.tag in ('fit', 'task')
        ]
        assert shown == [(0, name, 'images'), (2, name, 'images')]


@pytest.mark.slow
def test_updates_shown_of_miniimagenet(tmp_path, data):
    """One update, but at least those of --num_updates."""
    for updates in (1, 2):
        logdir = tmp_path / str(updates)
        flags = [*MINIIMAGENET, f'--num_updates={updates}', f'--data_dir={data}']
        succeeded(run(*flags, '--metatrain_iterations=1', f'--logdir={logdir}'))
        written = summaries(only(logdir))
        expected = tags('metatrain', ['loss', 'accuracy'], updates) | {'training/accuracy'}
        assert written.keys() == expected


def test_summaries_of_a_continued_run(tmp_path, intervals):
    """Every step once, though there are two event files."""
    intervals(summary=2, line=2)
    for iterations in (5, 9):
        succeeded(run(*SINUSOID, f'--metatrain_iterations={iterations}', f'--logdir={tmp_path}'))
    assert len([*only(tmp_path).glob('events.*')]) == 2
    # Files of the same second have a counter at the end of their names: another order.
    assert sorted(summaries(only(tmp_path))['metatrain_Pre-update_loss']) == [0, 2, 4, 6, 8]


def test_no_summaries(tmp_path):
    succeeded(run(*SINUSOID, '--metatrain_iterations=1', '--log=False', f'--logdir={tmp_path}'))
    assert not [*tmp_path.rglob('events.*')]


def compared(logdir: Path) -> dict[str, tuple[dict, dict]]:
    """{run: (its flags, its metrics)} as TensorBoard's HPARAMS tab gets them from its server."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    apps = HParamsPlugin(TBContext(data_provider=provider)).get_plugin_apps()
    ask = {'startIndex': 0, 'sliceSize': 100, 'allowedStatuses': ['STATUS_UNKNOWN']}
    answer = Client(apps['/session_groups']).post('/', json=ask).json
    found = {}
    for group in answer['sessionGroups']:
        (session,) = group['sessions']
        values = {value['name']['tag']: value for value in session['metricValues']}
        found[session['name']] = group['hparams'], values
    assert len(found) == answer['totalSize']
    return found


@pytest.mark.slow
def test_runs_are_compared_by_flags_and_accuracies(tmp_path, data, intervals):
    """Of a run that went on, the flags that it has now, the newest values and the best."""
    intervals(summary=2, line=2, validation=2)
    train = [*PLAIN, f'--data_dir={data}', f'--logdir={tmp_path}', '--validation_tasks=2']
    for more in (['--metatrain_iterations=3'], ['--metatrain_iterations=5'], ['--num_updates=2']):
        succeeded(run(*train, '--metatrain_iterations=3', *more))
    runs = compared(tmp_path)
    ends = {hparams['num_updates']: hparams['metatrain_iterations'] for hparams, _ in runs.values()}
    assert ends == {1: 5, 2: 3} and len(runs) == 2
    for name, (hparams, metrics) in runs.items():
        updates = int(hparams['num_updates'])
        assert hparams['conv'] is False and hparams['baseline'] == 'None'
        assert 'logdir' not in hparams
        written = summaries(tmp_path / name)
        validated = written[f'metaval_Post-update_accuracy__step_{updates}']
        trained = written[f'metatrain_Post-update_accuracy__step_{updates}']
        assert max(validated) == max(trained) == ends[updates] - 1
        metric = metrics['validation/accuracy']
        assert (metric['trainingStep'], metric['value']) == [*validated.items()][-1]
        assert metrics['validation/best_accuracy']['value'] == max(validated.values())


@pytest.mark.slow
def test_runs_are_compared_by_errors(tmp_path, intervals):
    """Sinusoids are not validated: training tasks are new ones, too. The mean since the line."""
    intervals(summary=1, line=1)
    succeeded(run(*SINUSOID, '--metatrain_iterations=13', f'--logdir={tmp_path}'))
    ((name, (hparams, metrics)),) = compared(tmp_path).items()
    losses = summaries(tmp_path / name)['metatrain_Post-update_loss__step_1']
    expected = np.mean([losses[step] for step in (11, 12)])
    assert metrics['training/loss']['value'] == pytest.approx(expected, rel=1e-5)
    assert hparams['norm'] == 'None'


# Evaluation ---------------------------------------------------------------------------------------


def results(folder: Path, name: str) -> np.ndarray:
    """The 600 tasks of an evaluation, after a comparison of its csv with its pkl."""
    stored = pickle.loads((folder / f'{name}.pkl').read_bytes())
    values = stored['mses']
    with open(folder / f'{name}.csv', newline='') as file:
        header, *rows = csv.reader(file)
    updates = [f'update{j}' for j in range(values.shape[1])]
    assert header == [*updates, 'split', 'iteration'] and len(rows) == 3
    assert {tuple(row[-2:]) for row in rows} == {(stored['split'], str(stored['iteration']))}
    means, stddevs, ci95 = np.array([row[:-2] for row in rows], float)
    np.testing.assert_allclose(means, values.mean(0, dtype=float), rtol=1e-5)
    np.testing.assert_allclose(stddevs, values.std(0, dtype=float), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ci95, 1.96 * stddevs / np.sqrt(len(values)), rtol=1e-5)
    return values


def printed(outcome: Outcome) -> np.ndarray:
    """The three vectors after the line that announces them."""
    title = 'Mean validation accuracy/loss, stddev, and confidence intervals\n'
    _, found, text = outcome.out.partition(title)
    assert found
    rows = re.findall(r'\[([^\]]*)\]', text)
    return np.array([[float(x) for x in row.split(',')] for row in rows])


def once(tmp_path, data) -> list[str]:
    """Flags for one iteration of Omniglot."""
    folders = [f'--data_dir={data}', f'--logdir={tmp_path}']
    return [*OMNIGLOT, *folders, '--log=False', '--metatrain_iterations=1']


@pytest.mark.slow
def test_evaluation_of_a_sinusoid(tmp_path):
    train = [*SINUSOID, '--metatrain_iterations=20', f'--logdir={tmp_path}', '--log=False']
    succeeded(run(*train))
    outcome = succeeded(run(*train, '--train=False', '--original_output'))
    values = results(only(tmp_path), 'test_ubs5_stepsize0.001_val')
    stored = pickle.loads((only(tmp_path) / 'test_ubs5_stepsize0.001_val.pkl').read_bytes())
    assert (stored['iteration'], stored['split']) == (19, 'val')  # what was evaluated on what
    assert values.shape == (600, 11) and np.isfinite(values).all()
    assert outcome.lines[1] == 'Done initializing, starting evaluation.'
    expected = [values.mean(0), values.std(0), 1.96 * values.std(0) / 600**0.5]
    np.testing.assert_allclose(printed(outcome), expected, rtol=1e-4)
    again = succeeded(run(*train, '--train=False', '--original_output'))
    assert again.out == outcome.out  # the same tasks
    suffixes = {path.suffix for path in only(tmp_path).iterdir()}
    assert suffixes == {'.index', '.data-00000-of-00001', '.csv', '.pkl'}


@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_evaluation_of_tasks_that_diverge(tmp_path, monkeypatch, eager):
    """Says so in the table, and without a warning of NumPy's."""
    succeeded(run('--norm=None', '--metatrain_iterations=1', '--log=False', f'--logdir={tmp_path}'))
    outcome = succeeded(
        run(
            '--norm=None',
            '--train=False',
            '--update_lr=1e30',
            f'--logdir={tmp_path}',
            '--train_update_lr=0.001',
        )
    )
    assert not outcome.err and outcome.lines[-2].split() == ['10', '-', '-']


@pytest.mark.slow
def test_evaluation_is_of_single_tasks(tmp_path, data, monkeypatch):
    """The numbers per task do not depend on how many are evaluated at once."""
    evaluate_few(monkeypatch, 22)  # a chunk and a bit
    train = once(tmp_path, data)
    succeeded(run(*train))
    succeeded(run(*train, '--train=False', '--test_set=True'))
    values = results(only(tmp_path), 'test_ubs1_stepsize0.001')
    f = parsed(*train, '--train=False', '--test_set=True')
    with contextlib.ExitStack() as held:
        model, generators, *_ = prepare(f, held)
    assert values.shape == (22, 3)
    for i in (0, 13, 21):
        task = generators['test'].batch('test', 0, 22, slice(i, i + 1))
        single = model.evaluate(task, 2)
        expected = np.concatenate([single.accuracy1, np.squeeze(single.accuracies2, 1)])
        np.testing.assert_array_equal(values[i], expected)
    assert set(values.ravel()) <= {0, 0.5, 1}  # two examples


@pytest.mark.slow
def test_evaluation_with_other_shots_and_step_size(tmp_path, data, monkeypatch):
    """K=2 and α=0.4 on a run trained with K=1 and α=0.001, found by its name."""
    evaluate_few(monkeypatch, 40)
    train = once(tmp_path, data)
    succeeded(run(*train))
    other = ['--train=False', '--update_batch_size=2', '--update_lr=.4']
    before = listing(tmp_path)
    words = ['no checkpoint', '--train_update_batch_size', '--train_update_lr']
    assert_refused(run(*train, *other), 'ubs_2', *words)
    assert listing(tmp_path) == before
    succeeded(run(*train, *other, '--train_update_batch_size=1', '--train_update_lr=0.001'))
    values = results(only(tmp_path), 'test_ubs2_stepsize0.4_val')
    assert values.shape == (40, 3) and set(values.ravel()) <= {0, 0.25, 0.5, 0.75, 1}


def table(outcome: Outcome) -> tuple[str, list[list[str]]]:
    """The title of the table, and the words of its rows."""
    _, title, text = re.split(r'^(Mean .* tasks.*)$', outcome.out, flags=re.MULTILINE)
    _, head, *rows = text.splitlines()
    assert head.split() == ['updates', 'mean', '95', '%', 'interval']
    return title, [row.split() for row in rows if row[:7].strip().isdigit()]  # cautions follow


def test_table_of_errors(tmp_path):
    train = [*SINUSOID, '--metatrain_iterations=2', f'--logdir={tmp_path}', '--log=False']
    succeeded(run(*train))
    title, rows = table(succeeded(run(*train, '--train=False', '--test_set=True')))
    assert title == 'Mean squared error on 600 test tasks'
    values = results(only(tmp_path), 'test_ubs5_stepsize0.001')
    interval = 1.96 * values.std(0) / 600**0.5
    assert rows[0][4:] == 'on the support sets'.split()
    for j, row in enumerate(rows):
        assert row[:4] == [str(j), f'{values.mean(0)[j]:.4g}', '+-', f'{interval[j]:.4g}']
    assert len(rows) == 11 and all(len(row) == 4 for row in rows[1:]), 'no figure of the paper'


@pytest.mark.slow
def test_tables_of_accuracies_of_the_first_tasks(tmp_path, data, monkeypatch):
    """In percent; fewer tasks are the first ones of more, and have files of their own."""
    evaluate_few(monkeypatch, 20)
    train = [*once(tmp_path, data), '--conv=False']
    succeeded(run(*train))
    evaluations = {}
    for tasks in (3, 9):
        outcome = succeeded(run(*train, '--train=False', f'--test_tasks={tasks}'))
        values = results(only(tmp_path), f'test_ubs1_stepsize0.001_tasks{tasks}_val')
        title, rows = table(outcome)
        assert title == f'Mean accuracy on {tasks} validation tasks, %'
        assert [row[1] for row in rows] == [f'{100 * mean:.2f}' for mean in values.mean(0)]
        evaluations[tasks] = values
    assert len(evaluations[9]) == 9
    np.testing.assert_array_equal(evaluations[3], evaluations[9][:3])
    assert not [*only(tmp_path).glob('test_ubs1_stepsize0.001.*')]


OMNIGLOT_CELL = '--datasource=omniglot --update_batch_size=1 --update_lr=0.4 --meta_batch_size=32'
SINUSOID_CELL = '--norm=None --update_batch_size=10 --update_lr=0.01'


@pytest.mark.parametrize(
    'trained, evaluated, figures',
    [
        (OMNIGLOT_CELL, '', {3: '98.7 +- 0.4'}),
        (f'{OMNIGLOT_CELL} --conv=False', '--seed=3', {3: '89.7 +- 1.1'}),
        (f'{OMNIGLOT_CELL} --norm=layer_norm', '', {}),
        (f'{OMNIGLOT_CELL} --meta_batch_size=16', '', {}),
        (OMNIGLOT_CELL, '--test_query=15', {}),
        (OMNIGLOT_CELL, '--transductive=False', {}),
        (OMNIGLOT_CELL, '--update_lr=0.2 --train_update_lr=0.4', {}),
        (OMNIGLOT_CELL, '--update_batch_size=5 --train_update_batch_size=1', {}),
        (SINUSOID_CELL, '', {}),
        (
            SINUSOID_CELL,
            '--update_batch_size=5 --train_update_batch_size=10',
            {1: '.67', 5: '.38', 10: '.35'},
        ),
        (
            f'{SINUSOID_CELL} --pretrain_iterations=70000 --metatrain_iterations=0',
            '--update_batch_size=5 --train_update_batch_size=10',
            {1: '2.41', 5: '2.23', 10: '2.19'},
        ),
    ],
)
def test_figures_of_the_paper(trained, evaluated, figures):
    """With the run's flags in the checkpoint and, of the original's checkpoints, without."""
    stored = settings(parsed(*trained.split()))
    f = parsed(*trained.split(), *evaluated.split(), '--train=False')
    for state in ({'flags': stored}, {}):
        assert figures_of_paper(state, f) == figures


@pytest.mark.slow
def test_evaluation_of_a_run_by_its_folder(tmp_path, data, monkeypatch):
    """The run knows its flags, wherever it is; what is given counts; no other folder appears."""
    evaluate_few(monkeypatch, 4)
    train = [*once(tmp_path / 'logs', data), '--conv=False']
    train += ['--seed=3', '--num_updates=2', '--log=True', '--test_set=True']
    succeeded(run(*train))
    train += ['--original_output']
    usual = succeeded(run(*train, '--train=False', '--test_set=False'))
    folder = only(tmp_path / 'logs').rename(tmp_path / 'elsewhere')
    before = listing(folder)
    outcome = succeeded(run('--train=False', f'--run={folder}', '--original_output'))
    assert printed(outcome).tolist() == printed(usual).tolist()
    assert table(outcome) == table(usual)
    assert listing(folder).keys() == before.keys() and {*tmp_path.iterdir()} == {
        folder,
        tmp_path / 'logs',
    }
    given = ['--update_batch_size=2', '--update_lr=0.5', '--test_set', '--test_tasks=2']
    succeeded(run('--train=False', f'--run={folder}', *given))
    assert results(folder, 'test_ubs2_stepsize0.5_tasks2').shape == (2, 3)


def test_folder_that_is_no_run(tmp_path):
    """One sentence; a folder of runs names one of them."""
    evaluate = ['--train=False', f'--run={tmp_path}/logs']
    assert_refused(run(*evaluate), '--run=', 'no such folder')
    (tmp_path / 'logs').mkdir()
    assert_refused(run(*evaluate), 'has no checkpoint')
    succeeded(run(*SINUSOID, '--metatrain_iterations=1', f'--logdir={tmp_path}/logs'))
    folder = only(tmp_path / 'logs')
    assert_refused(run(*evaluate), f'{tmp_path}/logs has the runs {folder.name}')
    there = ['--train=False', f'--run={folder}']
    assert_refused(run(*there, '--test_iter=7'), '--test_iter=7', 'no such checkpoint')
    assert_refused(run(*there, '--norm=layer_norm'), '--norm=None (now layer_norm)', 'leave it')
    assert_refused(run(*there, '--logdir=x'), '--run=', 'leave --logdir away')
    assert_refused(run(f'--run={folder}'), '--run=', 'needs --train=False')
    (folder / 'model0.data-00000-of-00001').write_bytes(b'')
    assert_refused(run(*there), 'model0 cannot be read')


@pytest.mark.slow
def test_test_classes_are_others(tmp_path, data, monkeypatch):
    evaluate_few(monkeypatch, 20)
    train = [*once(tmp_path, data), '--original_output']
    succeeded(run(*train))
    validation = printed(succeeded(run(*train, '--train=False')))
    test = printed(succeeded(run(*train, '--train=False', '--test_set=True')))
    assert not np.array_equal(validation, test)
    succeeded(run(*train, '--train=False', '--test_set=True', '--test_iter=0'))
    usual = 'test_ubs1_stepsize0.001'  # none of them replaces another
    for name, vectors in (usual, test), (f'{usual}_iteration0', test), (f'{usual}_val', validation):
        values = results(only(tmp_path), name)
        np.testing.assert_allclose(values.mean(0), vectors[0], rtol=1e-4)


def test_more_updates_than_ten(tmp_path):
    train = [*SINUSOID, '--num_updates=12', f'--logdir={tmp_path}', '--log=False']
    train += ['--metatrain_iterations=1']
    succeeded(run(*train))
    succeeded(run(*train, '--train=False', '--test_set=True'))
    assert results(only(tmp_path), 'test_ubs5_stepsize0.001').shape == (600, 13)


@pytest.mark.slow
def test_plain_network_on_miniimagenet(tmp_path, data, monkeypatch):
    """Without meta-training, one image per class and no queries: no figures after an update.

    Nor a best validation. With --test_query there are.
    """
    settle(monkeypatch, intervals={'validation': 1, 'summary': 1}, printing=1)
    evaluate_few(monkeypatch, 8)
    train = [*MINIIMAGENET, '--metatrain_iterations=0', '--pretrain_iterations=2']
    train += [f'--data_dir={data}', f'--logdir={tmp_path}', '--original_output']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trained = succeeded(run(*train))
        outcome = succeeded(run(*train, '--train=False'))
    vectors = printed(outcome)
    assert vectors.shape == (3, 1) and np.isfinite(vectors).all()
    assert results(only(tmp_path), 'test_ubs1_stepsize0.01_val').shape == (8, 1)
    assert 'no query images' in outcome.out and '--test_query=15' in outcome.out
    assert 'Warning' not in outcome.err
    assert re.search(r'^Pretrain Iteration 1: \d\.\d+$', trained.out, re.MULTILINE), trained.out
    assert not re.search(r'\bnan\b|validation', trained.out + outcome.out.partition('Mean')[0])
    assert not checkpoints(only(tmp_path), 'best')
    written = summaries(only(tmp_path))
    assert 'metatrain_Pre-update_accuracy' in written
    assert all(np.isfinite([*values.values()]).all() for values in written.values())
    assert printed(succeeded(run(*train, '--train=False', '--test_query=3'))).shape == (3, 3)


def test_nothing_is_half_written(tmp_path):
    (tmp_path / 'there.csv').mkdir()  # whatever cannot be replaced
    with pytest.raises(OSError):
        write_whole(tmp_path / 'there.csv', b'content')
    assert [path.name for path in tmp_path.iterdir()] == ['there.csv']


def test_files_that_belong_together(tmp_path):
    """If one cannot be written, the other stays as it is."""
    (tmp_path / 'a.pkl').write_bytes(b'before')
    contents = {tmp_path / 'a.pkl': b'after', tmp_path / 'none/a.csv': b'after'}
    with pytest.raises(OSError, match='none/a.csv cannot be written .No such file'):
        write_together(contents)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pkl']
    assert (tmp_path / 'a.pkl').read_bytes() == b'before'


@pytest.mark.slow
def test_default_command(tmp_path):
    """Compiled, with batch normalisation."""
    succeeded(run('--metatrain_iterations=3', f'--logdir={tmp_path}'))
    assert [*checkpoints(only(tmp_path))] == [2]


def test_endless_run(capsys):
    log = Log('loss', 0, 10**30, None, 1)
    log.steps(0, 1, 0.5)
    log.steps(1, 1000, 0.5)
    log.before = [0.5]
    log.report(1000)
    assert f'Iteration 1000 of {10**30}: loss 0.5 before any' in capsys.readouterr().out


# Starting again -----------------------------------------------------------------------------------


def test_complete_run(tmp_path):
    train = [*SINUSOID, '--metatrain_iterations=3', f'--logdir={tmp_path}']
    succeeded(run(*train))
    before = listing(tmp_path)
    outcome = succeeded(run(*train))
    for words in ('3 of 3 iterations', 'complete', '--metatrain_iterations'):
        assert words in outcome.out
    assert listing(tmp_path) == before
    outcome = succeeded(run(*train, '--metatrain_iterations=2'))
    assert (
        'complete: 3 iterations, and 2 are asked for; raise --metatrain_iterations' in outcome.out
    )
    assert listing(tmp_path) == before


def test_run_afresh(tmp_path):
    """--resume=False alone never replaces a run; with --overwrite it does, but no other files."""
    train = [*SINUSOID, f'--logdir={tmp_path}']
    five, three = ([*train, f'--metatrain_iterations={i}'] for i in (5, 3))
    succeeded(run(*five))
    succeeded(run(*five, '--train=False'))
    folder = only(tmp_path)
    (folder / 'notes.txt').write_text('mine')
    before = listing(tmp_path)
    words = [f'{folder} holds a run', '--overwrite', '--logdir']
    assert_refused(run(*three, '--resume=False'), *words)
    assert_refused(run(*three, '--overwrite'), '--overwrite', '--resume=False')
    succeeded(run(*five, '--train=False', '--resume=False'))  # of no consequence here
    assert listing(tmp_path).keys() == before.keys()
    outcome = succeeded(run(*three, '--resume=False', '--overwrite'))
    assert 'Restoring' not in outcome.out and f'Removed the earlier run in {folder}' in outcome.out
    assert [*checkpoints(folder)] == [2] and not [*folder.glob('test_*')]
    assert (folder / 'notes.txt').read_text() == 'mine'
    assert [*summaries(folder)['metatrain_Pre-update_loss']] == [0]
