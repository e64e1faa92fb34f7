"""Checkpoints: resuming, keeping ten, refusing others; the original's, and its published model."""

import os
import pickle
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from command_line import (
    DATA,
    ORIGINAL,
    ROOT,
    Stop,
    assert_refused,
    evaluate_few,
    in_process,
    listing,
    make_omniglot,
    parsed,
    run,
    settle,
    succeeded,
)

from fewshot.networks.build import make_model
from fewshot.runs import flags as flags_module
from fewshot.runs.checkpoints import (
    checkpoints,
    is_plain_path,
    read_checkpoint,
    read_run_state,
    write_checkpoint,
)
from fewshot.runs.flags import model_settings, run_name, settings
from fewshot.runs.prepare import wants_one_program
from fewshot.runs.results import read_evaluation
from fewshot.runs.summaries import event_files, read_events, read_scalars
from fewshot.use.learner import Learner
from scripts.data import prepare_miniimagenet, prepare_omniglot
from scripts.model import import_tf1_checkpoint

SINUSOID = ['--meta_batch_size=4', '--log=False']
OMNIGLOT = [
    '--datasource=omniglot',
    '--num_classes=2',
    '--update_batch_size=1',
    '--meta_batch_size=2',
    '--num_filters=4',
    '--log=False',
]


@pytest.fixture(scope='module')
def omniglot(tmp_path_factory) -> str:
    return f'--data_dir={make_omniglot(tmp_path_factory.mktemp("omniglot"))}'


def contents(path) -> dict[str, np.ndarray]:
    """Every variable by TensorFlow's own keys: parameters, Adam's moments and step counts."""
    reader = tf.train.load_checkpoint(str(path))
    kinds = reader.get_variable_to_dtype_map()
    keys = [key for key, kind in kinds.items() if kind != tf.string]
    counter = 'save_counter/.ATTRIBUTES/VARIABLE_VALUE'
    return {key: reader.get_tensor(key) for key in keys if key != counter}


def values_of(model) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in (model.weights | model.norms).items()}


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def mses(folder: Path, name: str) -> np.ndarray:
    return pickle.loads((folder / f'test_{name}.pkl').read_bytes())['mses']


def folder_of(logdir: Path, *flags: str) -> Path:
    return logdir / run_name(parsed(*flags))


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags, iterations',
    [
        (SINUSOID, (2, 3, 6)),
        # On top of the 4, after which the first part ends.
        ([*SINUSOID, '--pretrain_iterations=4'], (0, 1, 3)),
        ([*OMNIGLOT, '--conv=False'], (2, 4)),
    ],
    ids=['meta-training', 'from pre-training', 'images'],
)
def test_resumed_run_is_exact(tmp_path, eager, omniglot, flags, iterations):
    """Interrupted or not, the weights and Adam's state are the same to the last bit."""
    train = [*flags, omniglot, '--meta_lr=.01']
    succeeded(run(*train, f'--metatrain_iterations={iterations[-1]}', f'--logdir={tmp_path}/once'))
    for i in iterations:
        flags = [*train, f'--metatrain_iterations={i}']
        outcome = succeeded(run(*flags, f'--logdir={tmp_path}/often'))
    total = sum(flags_module.iterations(parsed(*flags)))
    assert f'Continuing at iteration {total - i + iterations[-2]} of {total}' in outcome.out
    once, often = (folder_of(tmp_path / name, *train) for name in ('once', 'often'))
    assert_same(contents(once / f'model{total - 1}'), contents(often / f'model{total - 1}'))


def test_continuing_from_an_earlier_checkpoint(tmp_path, eager):
    """--test_iter=N is refused where a run has gone on; a copy, made as it is told, goes on."""
    train = ['--meta_batch_size=4', f'--logdir={tmp_path}']
    for iterations in (2, 4):
        succeeded(run(*train, f'--metatrain_iterations={iterations}'))
    folder = folder_of(tmp_path, *train)
    for best in (1, 3):  # more than a run keeps
        (folder / f'best{best}.index').touch()
    last, curves, before = contents(folder / 'model3'), read_scalars(folder), listing(tmp_path)
    earlier = [*train, '--metatrain_iterations=4', '--test_iter=1']
    words = ['--test_iter=1 until iteration 3', 'leave --test_iter away', 'cp -r', '--logdir=OTHER']
    outcome = run(*earlier)
    assert_refused(outcome, *words)
    assert_refused(run(*earlier, '--overwrite'), '--overwrite', '--resume=False')
    assert_refused(run(*earlier, '--resume=False'), '--test_iter=1', '--resume=False', 'one of')
    assert listing(tmp_path) == before
    line = re.search('`(.*)`', outcome.err)[1].replace('OTHER', f'{tmp_path}/other')
    subprocess.run(line, shell=True, check=True)
    copy = folder_of(tmp_path / 'other', *train)
    assert [*checkpoints(copy)] == [1] == [*checkpoints(copy, 'best')]
    flags = ['--meta_batch_size=4', f'--logdir={tmp_path}/other', '--metatrain_iterations=4']
    assert 'Continuing at iteration 2 of 4' in succeeded(run(*flags)).out
    assert_same(last, contents(copy / 'model3'))
    assert read_scalars(folder) == curves
    succeeded(run(*train, '--metatrain_iterations=6', '--test_iter=3'))  # the newest


@pytest.mark.parametrize(
    'begun, without',
    [
        pytest.param([], '', marks=pytest.mark.slow),
        pytest.param(['--test_iter=1'], ' without --test_iter=1', marks=pytest.mark.slow),
        (['--resume=False', '--overwrite'], ' without --resume=False and --overwrite=True'),
    ],
    ids=['as usual', 'by its iteration', 'afresh'],
)
def test_the_command_that_continues(tmp_path, eager, monkeypatch, begun, without):
    """It is what the line says that tells of it: --overwrite would begin there once more."""

    train = [*SINUSOID, f'--logdir={tmp_path}']
    folder = write_run(tmp_path, *train, iterations=(1,))
    train += ['--metatrain_iterations=9']
    settle(monkeypatch, intervals={'save': 1})
    settle(monkeypatch, intervals={'summary': 1})
    with monkeypatch.context() as patch:
        Stop(patch, signal.SIGTERM, 1)
        outcome = run(*train, *begun)
    saved = max(checkpoints(folder))
    assert outcome.status == 128 + signal.SIGTERM
    told = f'the same command{without} continues at iteration {saved + 1} of 9.'
    assert outcome.lines[-1] == f'Saved {folder}/model{saved}; {told}'
    assert f'Continuing at iteration {saved + 1} of 9.' in run(*train).out


def test_names_that_are_no_checkpoints(tmp_path):
    for name in (
        'model5',
        'model007',
        'model\u0663',
        'model-1',
        'model1e3',
        'mymodel3',
        'model3.old',
    ):
        (tmp_path / f'{name}.index').touch()
    assert checkpoints(tmp_path) == {5: f'{tmp_path}/model5'}


@pytest.mark.slow
def test_ten_are_kept(tmp_path, eager, monkeypatch):
    """One every so often and one at the end, not at 0; the newest ten of all runs stay."""
    settle(monkeypatch, intervals={'save': 2})
    settle(monkeypatch, intervals={'summary': 2})  # of which the others are multiples
    train = [*SINUSOID, '--norm=None', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=6'))
    folder = folder_of(tmp_path, *train)
    assert [*checkpoints(folder)] == [2, 4, 5]
    succeeded(run(*train, '--metatrain_iterations=24'))
    assert [*checkpoints(folder)] == [5, *range(6, 23, 2), 23][-10:]
    names = {path.name for path in folder.iterdir()}
    suffixes = ('index', 'data-00000-of-00001')
    assert names == {f'model{i}.{end}' for i in checkpoints(folder) for end in suffixes}
    assert f'model{23}' in succeeded(run(*train, '--train=False')).lines[0]  # the newest


# Names of folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [b'caf\xe9', b'[', b']', b'*', b'?', b'{', b'}', b'\\'])
def test_paths_that_tensorflow_does_not_take_as_they_are(name):
    assert not is_plain_path(os.fsdecode(b'logs/' + name + b'/run'))
    assert is_plain_path('~/My runs (2), caf\xe9/$x;#!@+=&%')


@pytest.mark.parametrize('name', [b'caf\xe9', b'[x]'], ids=['not UTF-8', 'brackets'])
def test_folders_where_no_checkpoints_can_be(tmp_path, eager, name):
    """Runs and Learners are refused there, in one sentence, and nothing is written."""
    logdir, sentence = tmp_path / os.fsdecode(name), 'TensorFlow cannot write or read checkpoints'
    write_run(tmp_path / 'usual', *SINUSOID)
    copied = next((tmp_path / 'usual').iterdir())
    kept = Learner.load(write_run(tmp_path / 'with_flags', *SINUSOID, with_flags=True))
    shutil.copytree(copied, logdir / copied.name)
    before = listing(tmp_path)
    for flags in (
        [f'--logdir={logdir}'],
        [f'--logdir={logdir}', '--train=False'],
        [f'--logdir={logdir}', '--resume=False', '--overwrite'],
        ['--train=False', f'--run={logdir / copied.name}'],
    ):
        assert_refused(run(*SINUSOID, '--metatrain_iterations=2', *flags), sentence)
    for refused in (lambda: Learner.load(logdir / copied.name), lambda: kept.save(logdir)):
        with pytest.raises(ValueError, match=sentence):
            refused()
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_data_in_a_folder_of_any_name(tmp_path, eager):
    """Its name is among the flags, which TensorBoard takes in UTF-8 only."""
    data = tmp_path / os.fsdecode(b'caf\xe9 [x]*')
    flags = [*OMNIGLOT[:-1], f'--data_dir={make_omniglot(data)}', f'--logdir={tmp_path}/logs']
    for iterations in (1, 2):
        succeeded(run(*flags, f'--metatrain_iterations={iterations}'))
    folder = folder_of(tmp_path / 'logs', *flags)
    assert '/caf\\udce9 [x]*' in flags_text(folder)
    assert {*read_scalars(folder)['metatrain_Pre-update_loss']} == {0}
    succeeded(run('--train=False', f'--run={folder}'))


def flags_text(folder: Path) -> str:
    """The table of flags among a run's summaries."""
    for path in event_files(folder):
        for event in map(tf.compat.v1.Event.FromString, read_events(path)):
            for value in event.summary.value:
                if value.tag == 'flags':
                    return value.tensor.string_val[0].decode()
    raise AssertionError('no flags')


@pytest.mark.parametrize('flag', ['--logdir', '--data_dir'])
def test_addresses_are_no_folders(tmp_path, monkeypatch, flag):
    """They would be made as folders beside this program."""
    monkeypatch.chdir(tmp_path)
    assert_refused(run(f'{flag}=gs://bucket/runs'), flag, 'a folder, not an address')
    assert not [*tmp_path.iterdir()]


# Refusals -----------------------------------------------------------------------------------------


def write_run(logdir: Path, *flags: str, iterations=(0,), with_flags: bool = False) -> Path:
    """The folder of a run with checkpoints of initial weights: quicker than training them."""
    folder = folder_of(logdir, *flags)
    folder.mkdir(parents=True)
    model = make_model(**model_settings(parsed(*flags)))
    state = {'flags': settings(parsed(*flags))} if with_flags else {}
    for i in iterations:
        write_checkpoint(model.checkpoint, folder, i, state)
    return folder


def test_test_iter_that_does_not_exist(tmp_path, eager):
    train = [*SINUSOID, f'--logdir={tmp_path}']
    write_run(tmp_path, *train, iterations=(0, 2))
    before = listing(tmp_path)
    for more in (['--train=False'], ['--metatrain_iterations=9']):
        outcome = run(*train, '--test_iter=1', *more)
        assert_refused(outcome, '--test_iter=1', 'those of the iterations 0, 2')
    assert listing(tmp_path) == before
    for iteration in (0, 2):
        outcome = succeeded(run(*train, '--train=False', f'--test_iter={iteration}'))
        assert f'model{iteration}' in outcome.lines[0]


@pytest.mark.parametrize(
    'written, read, words',
    [
        (['--conv=True'], ['--conv=False'], 'conv1'),
        (['--conv=False'], ['--conv=True'], 'w1'),
        (['--datasource=sinusoid'], ['--conv=True'], 'w1'),
        (['--conv=False'], ['--datasource=sinusoid'], 'w4'),
        (['--datasource=miniimagenet'], ['--datasource=omniglot'], 'conv1'),
    ],
)
@pytest.mark.parametrize('train', ['True', 'False'])
def test_checkpoint_of_another_architecture(tmp_path, eager, omniglot, written, read, words, train):
    """All of them have the same name."""
    flags = [*OMNIGLOT, omniglot, f'--logdir={tmp_path}']
    write_run(tmp_path, *flags, *written)
    before = listing(tmp_path)
    outcome = run(*flags, *read, '--metatrain_iterations=2', f'--train={train}')
    assert_refused(outcome, 'model0 is of another architecture', words, '--logdir')
    assert listing(tmp_path) == before


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('suffix', ['index', 'data-00000-of-00001'])
@pytest.mark.parametrize(
    'damage',
    [Path.unlink, cut(0), cut(0.1), cut(0.5), cut(0.99), flip],
    ids=['absent', 'empty', 'cut early', 'cut halfway', 'cut late', 'bit flipped'],
)
def test_damaged_checkpoint(tmp_path, eager, suffix, damage):
    """Named with --test_iter, it is refused and nothing changes; else the one before it is used.

    A warning says so. Without its index, it is not there.
    """
    train = [*SINUSOID, f'--logdir={tmp_path}']
    folder = write_run(tmp_path, *train, iterations=(0, 1))
    damage(folder / f'model1.{suffix}')
    before = listing(tmp_path)
    if [*checkpoints(folder)] == [0]:
        assert suffix == 'index' and damage == Path.unlink
        return
    for more in (['--metatrain_iterations=3'], ['--train=False']):
        outcome = run(*train, *more, '--test_iter=1')
        assert_refused(outcome, 'model1 cannot be read', 'remove it', '--test_iter')
    assert listing(tmp_path) == before
    outcome = succeeded(run(*train, '--metatrain_iterations=3'))
    assert 'model1 cannot be read' in outcome.err and 'the one before it is used' in outcome.err
    assert 'Continuing at iteration 1 of 3' in outcome.out


def test_the_checkpoint_before_a_damaged_one(tmp_path, eager):
    """It can be evaluated, and trained from again."""
    train = [*SINUSOID, f'--logdir={tmp_path}']
    flip(write_run(tmp_path, *train, iterations=(0, 1)) / 'model1.data-00000-of-00001')
    for more in (['--train=False', '--test_iter=0'], ['--metatrain_iterations=3']):
        assert 'model0' in succeeded(run(*train, *more)).lines[0]
    assert 'model2' in succeeded(run(*train, '--train=False')).lines[0]


# The original's checkpoints -----------------------------------------------------------------------


class Original:
    """As the original writes it: a TensorFlow 1 graph; biases, or all weights, have no names."""

    def __init__(self, seed: int = 0):
        self.graph, self.random = tf.Graph(), np.random.default_rng(seed)
        self.values = {}  # by this program's names

    def _value(self, name: str, shape) -> np.ndarray:
        self.values[name] = self.random.normal(scale=0.1, size=shape).astype(np.float32)
        return self.values[name]

    def named(self, name: str, shape):
        """As tf.get_variable and the contributed layers do."""
        value = self._value(name, shape)
        tf.compat.v1.get_variable(name, initializer=value)

    def unnamed(self, name: str, shape):
        tf.compat.v1.Variable(self._value(name, shape))

    def convolutional(self, channels: int, filters: int, classes: int, features: int):
        for i in range(1, 5):
            self.named(f'conv{i}', (3, 3, channels if i == 1 else filters, filters))
            self.unnamed(f'b{i}', (filters,))
        self.named('w5', (features, classes))
        self.named('b5', (classes,))

    def fully_connected(self, *sizes: int):
        for i in range(1, len(sizes)):
            self.unnamed(f'w{i}', sizes[i - 1 : i + 1])
            self.unnamed(f'b{i}', sizes[i : i + 1])

    def norms(self, scopes: str, sizes, kinds=('beta',)):
        for scope, size in zip(scopes, sizes):
            for kind in kinds:
                self.named(f'{scope}/{kind}', (size,))

    def write(self, folder: Path, iteration: int, build) -> Path:
        """build: called with self, in the original's scope, to make the variables."""
        folder.mkdir(parents=True, exist_ok=True)
        v1 = tf.compat.v1
        with self.graph.as_default(), v1.Session() as session, v1.variable_scope('model'):
            build(self)
            session.run(v1.global_variables_initializer())
            saver = v1.train.Saver(v1.trainable_variables(), max_to_keep=10)
            return Path(saver.save(session, str(folder / f'model{iteration}')))


def sinusoid(original: Original):
    original.fully_connected(1, 40, 40, 1)
    original.norms('02', (40, 40))


def oracle(original: Original):
    original.fully_connected(3, 40, 40, 1)
    original.norms('02', (40, 40), ('beta', 'gamma'))


def convolutional(original: Original):
    original.convolutional(1, 4, 2, features=4)
    original.norms('0123', [4] * 4)


def fully_connected(original: Original):
    original.fully_connected(784, 256, 128, 64, 64, 2)


NETWORKS = {
    'sinusoid': (sinusoid, SINUSOID),
    'oracle': (oracle, [*SINUSOID, '--baseline=oracle', '--norm=layer_norm']),
    'convolutional': (convolutional, OMNIGLOT),
    'fully connected': (fully_connected, [*OMNIGLOT, '--conv=False', '--norm=None']),
}
networks = pytest.mark.parametrize('build, flags', NETWORKS.values(), ids=NETWORKS)


@networks
def test_original_checkpoint_by_value(tmp_path, build, flags):
    original = Original()
    path = original.write(tmp_path, 700, build)
    model = make_model(**model_settings(parsed(*flags)))
    assert not model.restore(str(path))  # no state of Adam's in it
    assert_same(values_of(model), original.values)


@networks
def test_training_continues_from_the_original(tmp_path, eager, omniglot, build, flags):
    """From the iteration after it, with Adam afresh; the original's file stays."""
    original, train = Original(), [*flags, omniglot, f'--logdir={tmp_path}']
    folder = folder_of(tmp_path, *train)
    original.write(folder, 700, build)
    before = listing(folder)
    outcome = succeeded(run(*train, '--metatrain_iterations=702'))
    assert outcome.lines[0] == f'Restoring model weights from {folder}/model700'
    assert 'afresh' in outcome.out and 'Continuing at iteration 701 of 702' in outcome.out
    steps = [value for value in contents(folder / 'model701').values() if value.dtype == np.int64]
    assert steps == [1]  # the optimizer in use has taken one step; the other is not there
    assert {name: value for name, value in listing(folder).items() if name in before} == before
    values, _ = read_checkpoint(str(folder / 'model701'), [*original.values])
    changes = np.concatenate([np.ravel(values[name] - original.values[name]) for name in values])
    assert 0 < np.abs(changes).max() <= 1.01e-3  # Adam's first step is β, element by element


def test_the_original_is_never_removed(tmp_path):
    checkpoint = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0])})
    Original().write(tmp_path, 4, sinusoid)
    for i in range(5, 18):
        write_checkpoint(checkpoint, tmp_path, i)
    assert [*checkpoints(tmp_path)] == [4, *range(8, 18)]


@pytest.mark.parametrize('damage', [cut(0.5), flip])
def test_damaged_original(tmp_path, eager, damage):
    path = Original().write(folder_of(tmp_path, *SINUSOID), 700, sinusoid)
    damage(path.with_name('model700.data-00000-of-00001'))
    before = listing(tmp_path)
    outcome = run(*SINUSOID, f'--logdir={tmp_path}', '--train=False')
    assert_refused(outcome, 'model700 cannot be read')
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    'build, flags',
    [
        (convolutional, [*OMNIGLOT, '--conv=False']),
        (convolutional, SINUSOID),
        (fully_connected, [*OMNIGLOT, '--norm=None']),
        (oracle, SINUSOID),
    ],
)
def test_original_of_another_architecture(tmp_path, eager, omniglot, build, flags):
    flags = [*flags, omniglot, f'--logdir={tmp_path}']
    Original().write(folder_of(tmp_path, *flags), 700, build)
    before = listing(tmp_path)
    assert_refused(run(*flags, '--train=False'), 'model700 is of another architecture', '--logdir')
    assert listing(tmp_path) == before


# Converting the original's checkpoints ------------------------------------------------------------


def convert(*arguments):
    return in_process(import_tf1_checkpoint.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    'suffix', ['/model700', '/model700.index', '/model700.data-00000-of-00001', '']
)
def test_source_and_target_of_a_conversion(tmp_path, suffix):
    path = Original().write(tmp_path / 'original', 700, sinusoid)
    target = folder_of(tmp_path, *SINUSOID)
    before = listing(path.parent)
    succeeded(convert(f'{path.parent}{suffix}', f'--target={target}'))
    assert listing(path.parent) == before
    names = {file.name for file in target.iterdir()}
    assert names == {'model700.index', 'model700.data-00000-of-00001'}


@networks
def test_converted_checkpoint_evaluates_alike(tmp_path, eager, omniglot, build, flags):
    """And main.py finds it by the flags that the report gives."""
    name = run_name(parsed(*flags))
    path = Original().write(tmp_path / 'original' / name, 700, build)
    target = tmp_path / 'converted' / name
    outcome = succeeded(convert(path, f'--target={target}'))
    told = re.search(r'python main.py (.*)', outcome.out)[1].split()
    assert f'--logdir={tmp_path}/converted' in told
    succeeded(run(*flags, omniglot, '--train=False', f'--logdir={tmp_path}/original'))
    succeeded(run(*told, omniglot))
    table = f'ubs{parsed(*flags).update_batch_size}_stepsize0.001_val'
    np.testing.assert_array_equal(mses(target, table), mses(path.parent, table))
    more = ['--train=True', '--metatrain_iterations=702', '--log=False']
    outcome = succeeded(run(*told, omniglot, *more))
    assert 'Adam' not in outcome.out and 'Continuing at iteration 701' in outcome.out


def test_target_is_named_after_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = run_name(parsed(*SINUSOID))
    succeeded(convert(Original().write(tmp_path / name, 700, sinusoid)))
    assert [*checkpoints(tmp_path / 'logs' / name)] == [700]


NAME = 'cls_5.mbs_4.ubs_5.numstep1.updatelr0.001batchnorm'
NEW = f'new/{NAME}'


@pytest.fixture(scope='module')
def sources(tmp_path_factory) -> Path:
    """Checkpoints that cannot be converted, or only to certain targets."""
    folder = tmp_path_factory.mktemp('sources')
    for name in ('source', f'full/{NAME}', 'damaged'):
        path = Original().write(folder / name, 700, sinusoid)
    cut(0.5)(path.with_name('model700.data-00000-of-00001'))
    for suffix in ('index', 'data-00000-of-00001'):
        shutil.copy(folder / f'source/model700.{suffix}', folder / f'source/other.{suffix}')
    Original().write(folder / 'images', 700, convolutional)
    Original().write(folder / 'strange', 700, lambda original: original.fully_connected(17, 4))
    converted = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0])})
    converted.write(str(folder / 'converted' / 'model700'))
    (folder / 'empty').mkdir()
    (folder / 'file').write_text('')
    return folder


def renamed(old: str, new: str) -> str:
    return f'new/{NAME.replace(old, new)}'


@pytest.mark.parametrize(
    'source, target, words',
    [
        ('absent/model5', NEW, ['no checkpoint absent/model5', 'model5.index is missing']),
        ('empty', NEW, ['empty holds no checkpoint']),
        ('source/other', NEW, ['other is not called model{iteration}', 'rename']),
        ('source/model700', None, ['source is not the name of a run', '--target']),
        ('source', 'new/mine', ['mine is not the name of a run', '--target']),
        ('source', renamed('batchnorm', 'nonorm'), ['norm=batch_norm', 'nonorm', 'None']),
        ('source', renamed('batchnorm', 'oraclebatchnorm'), ['baseline=None', 'oracle']),
        ('images', NEW, ['num_classes=2', '5']),
        ('images', renamed('cls_5', 'cls_2'), ['num_filters=4', '64']),
        ('source', f'full/{NAME}', ['model700 already', 'never overwritten', '--target']),
        ('source', f'file/{NAME}', ['file']),
        ('converted', NEW, ['TensorFlow 2 already']),
        ('damaged', NEW, ['model700 cannot be read']),
        ('strange', NEW, ['of no network of the original program', 'model/Variable']),
    ],
)
def test_conversion_refused(sources, monkeypatch, source, target, words):
    monkeypatch.chdir(sources)
    arguments = [source] if target is None else [source, f'--target={target}']
    before = listing(sources)
    assert_refused(convert(*arguments), *words)
    assert listing(sources) == before


# The published model ------------------------------------------------------------------------------

PUBLISHED = ORIGINAL / 'miniimagenet1shot' / 'model59000'
FLAGS = [
    '--datasource=miniimagenet',
    '--update_batch_size=1',
    '--update_lr=0.01',
    '--num_updates=5',
    '--num_classes=5',
    '--meta_batch_size=4',
    '--num_filters=32',
    '--max_pool=True',
    '--train=False',
]
ARCHIVES = DATA / 'miniImagenet'
published = pytest.mark.skipif(
    not Path(f'{PUBLISHED}.index').is_file(), reason=f'no {PUBLISHED} (set MAML_TEST_ORIGINAL)'
)
images = pytest.mark.skipif(
    not (ARCHIVES / 'val').is_dir() and not (ARCHIVES / 'images_val.zip').is_file(),
    reason=f'no {ARCHIVES}/images_val.zip (set MAML_TEST_DATA)',
)


@pytest.fixture(scope='session')
def validation_classes(tmp_path_factory) -> Path:
    """A data folder with the 16 real validation classes, prepared already or from the archive."""
    if (ARCHIVES / 'val').is_dir():
        return DATA
    folder = tmp_path_factory.mktemp('real')
    (folder / 'source').mkdir()
    for name in ('images_val.zip', 'val.csv'):
        (folder / 'source' / name).symlink_to(ARCHIVES / name)
    prepare_miniimagenet.prepare(folder / 'source', folder / 'miniImagenet')
    return folder


@pytest.fixture
def published_run(tmp_path) -> Path:
    """The run's folder with a copy of the published model."""
    folder = folder_of(tmp_path, *FLAGS)
    folder.mkdir()
    for file in PUBLISHED.parent.glob('model59000.*'):
        shutil.copyfile(file, folder / file.name)
    return folder


@published
def test_published_model_by_value(published_run):
    assert published_run.name == 'cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm'
    model = make_model(**model_settings(parsed(*FLAGS)))
    assert not model.restore(str(published_run / 'model59000'))
    reader = tf.train.load_checkpoint(str(PUBLISHED))
    keys = {name: f'model/{name}' for name in model.weights | model.norms}
    for i, suffix in enumerate(['', '_1', '_2', '_3'], start=1):
        keys[f'b{i}'] = f'model/Variable{suffix}'
    assert {*keys.values()} == reader.get_variable_to_shape_map().keys()
    for name, variable in (model.weights | model.norms).items():
        expected = reader.get_tensor(keys[name])
        np.testing.assert_array_equal(variable, expected, err_msg=name)


def assert_figures(values: np.ndarray):
    """Means within the sampling errors (99.9 %) of these tasks and of the original's 600 others."""
    measured = [(0, 0.2007, 0), (1, 0.3637, 0.0130), (4, 0.4783, 0.0177), (10, 0.4783, 0.0179)]
    for update, mean, ci95 in measured:
        found = values[:, update].mean()
        own = values[:, update].std() / np.sqrt(len(values))
        error = 3.3 * np.hypot(own, ci95 / 1.96)
        assert abs(found - mean) <= max(error, 0.01), (update, found, error)


@published
@images
@pytest.mark.slow
@pytest.mark.parametrize('tasks', [16, 600])
def test_accuracy_of_the_published_model(published_run, validation_classes, monkeypatch, tasks):
    evaluate_few(monkeypatch, tasks, updates=10)
    succeeded(run(*FLAGS, f'--data_dir={validation_classes}', f'--logdir={published_run.parent}'))
    values = mses(published_run, 'ubs1_stepsize0.01_val')
    assert values.shape == (tasks, 11)
    assert np.isin(np.round(5 * values, 4), range(6)).all()  # of five query images
    assert_figures(values)


@published
def test_published_model_converted(published_run, tmp_path):
    target = tmp_path / 'converted' / published_run.name
    succeeded(convert(published_run, f'--target={target}'))
    models = [make_model(**model_settings(parsed(*FLAGS))) for _ in range(2)]
    paths = [str(folder / 'model59000') for folder in (published_run, target)]
    assert [model.restore(path) for model, path in zip(models, paths)] == [False, True]
    assert_same(*(values_of(model) for model in models))


# Runs that are published here ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def all_omniglot(tmp_path_factory) -> Path:
    """A data folder with the real Omniglot, prepared already or from the archives."""
    if (DATA / 'omniglot_resized').is_dir():
        return DATA
    if not (DATA / 'omniglot/images_evaluation.zip').is_file():
        pytest.skip(f'no {DATA}/omniglot/images_evaluation.zip (set MAML_TEST_DATA)')
    folder = tmp_path_factory.mktemp('all_omniglot')
    prepare_omniglot.prepare(DATA / 'omniglot', folder / 'omniglot_resized')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('cell', ['omniglot_5way_1shot', 'omniglot_5way_5shot'])
def test_published_run_evaluates_to_its_figures(all_omniglot, tmp_path, cell):
    (published,) = (ROOT / 'logs/results/paper' / cell / 'seed0').iterdir()
    folder = tmp_path / published.name
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns('test_*'))
    assert not list(folder.glob('test_*'))
    for kind in -1, 'best':
        asked = ['--train=False', '--test_set=True', f'--test_iter={kind}']
        succeeded(run(*asked, f'--run={folder}', f'--data_dir={all_omniglot}'))
    names = sorted(path.name for path in folder.glob('test_*.csv'))
    assert len(names) == 2
    for name in names:
        mean, _, interval = read_evaluation(folder / name)
        published_mean, _, published_interval = read_evaluation(published / name)
        # An image in a thousand that rounding assigns to another class.
        np.testing.assert_allclose(mean, published_mean, atol=1e-3)
        np.testing.assert_allclose(interval, published_interval, atol=5e-4)


# One program --------------------------------------------------------------------------------------


SEVERAL = [*OMNIGLOT, '--num_updates=2']


def wanted(state: dict, *flags: str) -> bool:
    f = parsed(*SEVERAL, *flags)
    return wants_one_program(f, make_model(**model_settings(f)), state)


@pytest.mark.usefixtures('eager')
def test_long_runs_are_one_program_and_stay_what_they_are():
    """An older run does not tell, and goes on by parts; the flag wins."""
    assert wanted({}, '--metatrain_iterations=2000')
    assert not wanted({}, '--metatrain_iterations=1999')
    long = ['--metatrain_iterations=60000']
    for other in ('--num_updates=1', '--conv=False', '--adapt=head', '--train=False'):
        assert not wanted({}, *long, other)
    pooled = ['--datasource=folder', '--max_pool=True']
    assert wanted({}, *long, *pooled, '--image_size=32')
    assert not wanted({}, *long, *pooled, '--image_size=33')
    assert wanted({'flags': {'one_program': True}}, '--metatrain_iterations=10')
    assert not wanted({'flags': {'one_program': None}}, *long)
    assert not wanted({'flags': {}}, *long)
    assert wanted({'flags': {}}, *long, '--one_program=True')
    assert not wanted({}, *long, '--one_program=False')


@pytest.mark.usefixtures('eager')
def test_a_run_knows_whether_it_is_one_program(tmp_path, omniglot):
    folder = folder_of(tmp_path, *SEVERAL)
    given = ['--one_program=True'], [], ['--one_program=False']
    for i, (flags, one) in enumerate(zip(given, (True, True, False))):
        train = [*SEVERAL, *flags, omniglot, f'--metatrain_iterations={i + 1}']
        outcome = succeeded(run(*train, f'--logdir={tmp_path}'))
        assert ('as one program' in outcome.out) == one
        assert read_run_state(str(folder / f'model{i}'))['flags']['one_program'] is one
