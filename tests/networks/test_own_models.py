"""Networks and tasks of one's own from the command line: --network and --datasource."""

import random
import signal
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import (
    ROOT,
    assert_refused,
    command,
    in_process,
    make_omniglot,
    parsed,
    run,
    settle,
    succeeded,
)
from test_scale_out import assert_close, two_devices
from test_trust import Stop, assert_same_run, often
from test_use import QUERY, SUPPORT, served, tasks_to_serve

from fewshot.data.user_tasks import BadTasks, UserTasks
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import example_shape, make_model, user_network
from fewshot.networks.keras_network import KerasNetwork
from fewshot.networks.paper_networks import FullyConnected
from fewshot.runs import trainer
from fewshot.runs.checkpoints import checkpoints, read_run_state, write_checkpoint
from fewshot.runs.flags import run_name
from fewshot.runs.results import read_evaluation
from fewshot.runs.user_code import user_function
from fewshot.use.learner import Learner
from maml import cross_entropy, mean_squared_error, repeated
from scripts.examples import curves, networks
from scripts.model import classify, export, publish

__all__ = ['often']  # a fixture
NETWORKS = """
import keras
import helper_of_networks
from keras import layers

def small(image_shape, num_classes):
    start = [layers.Input(image_shape), layers.Conv2D(2, 5, strides=4, use_bias=False)]
    start.append(layers.BatchNormalization())
    return keras.Sequential([*start, *helper_of_networks.end(num_classes)])

def dense(image_shape, num_classes):
    return keras.Sequential(helper_of_networks.end(num_classes))

def tanh(example_shape, outputs):
    return keras.Sequential([layers.Dense(5, activation='tanh'), layers.Dense(outputs)])

def half_frozen(image_shape, num_classes):
    model = small(image_shape, num_classes)
    model.layers[0].trainable = False
    return model

def wrapped(image_shape, num_classes):
    from fewshot.networks.keras_network import KerasNetwork
    model = small(image_shape, num_classes)
    return KerasNetwork(model, adapt=[model.layers[-1].name])

def outputs(image_shape, num_classes):
    return small(image_shape, num_classes + 1)

def inputs(image_shape, num_classes):
    return keras.Sequential([layers.Input((7,)), layers.Dense(num_classes)])

def weightless(image_shape, num_classes):
    return keras.Sequential([layers.Input(image_shape), layers.Flatten()])

def dropout(image_shape, num_classes):
    return keras.Sequential([layers.Flatten(), layers.Dropout(0.5), layers.Dense(num_classes)])

def nothing(image_shape, num_classes):
    small(image_shape, num_classes)

def no_arguments():
    pass

def failing(image_shape, num_classes):
    return undefined

class Failing(keras.Model):
    def call(self, x):
        return x.no_such_attribute

def failing_model(image_shape, num_classes):
    return Failing()

constant = 3
"""
HELPER = """
from keras import layers

def end(num_classes):
    return [layers.ReLU(), layers.Flatten(), layers.Dense(num_classes)]
"""
FLAGS = ['--num_classes=2', '--update_batch_size=1', '--meta_batch_size=2', '--update_lr=.1']


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Files of a user, and images."""
    folder = tmp_path_factory.mktemp('own')
    (folder / 'networks.py').write_text(NETWORKS)
    (folder / 'helper_of_networks.py').write_text(HELPER)
    (folder / 'syntax.py').write_text('def small(:\n')
    (folder / 'broken.py').write_text('import no_such_module\n')
    make_omniglot(folder / 'data')
    return folder


def flags_of(folder: Path, name: str = 'small') -> list[str]:
    source = ['--datasource=omniglot', f'--data_dir={folder}/data', '--validation_tasks=2']
    return [*source, *FLAGS, f'--network={folder}/networks.py:{name}']


# --network ----------------------------------------------------------------------------------------


def trained_twice(logdir: Path, monkeypatch, flags: list[str], stop: int) -> tuple[Path, Path]:
    """The folders of a run that a signal stops, then continues, and of one that is left alone."""
    succeeded(run(*flags, f'--logdir={logdir}/once'))
    with monkeypatch.context() as patch:
        Stop(patch, signal.SIGTERM, stop)
        stopped = run(*flags, f'--logdir={logdir}/twice')
    assert stopped.status == 143 and 'the same command continues' in stopped.out
    assert 'Continuing at iteration' in succeeded(run(*flags, f'--logdir={logdir}/twice')).out
    return tuple(logdir / name / run_name(parsed(*flags)) for name in ('once', 'twice'))


@pytest.mark.slow
def test_network_stops_and_continues_exactly(folder, tmp_path, eager, often, monkeypatch):
    """Weights, Adam, best checkpoint and summaries, pictures among them; then an evaluation."""
    flags = [*flags_of(folder), '--metatrain_iterations=17']
    once, twice = trained_twice(tmp_path, monkeypatch, flags, stop=10)
    assert once.name == 'cls_2.mbs_2.ubs_1.numstep1.updatelr0.1batchnorm.small'
    assert_same_run(once, twice, last=16)
    assert [*checkpoints(once, 'best')] == [15]
    assert read_run_state(f'{once}/model16')['flags']['network'] == f'{folder}/networks.py:small'
    line = [*flags, '--train=False', '--test_iter=best', '--test_set=True', '--transductive=False']
    for name in 'once', 'twice':
        succeeded(run(*line, f'--logdir={tmp_path}/{name}'))
    first, second = (next(folder.glob('test_*.csv')).read_text() for folder in (once, twice))
    assert first == second


@pytest.mark.slow
def test_network_compiled_in_processes(folder, tmp_path):
    """The same command twice, with fewer iterations the first time."""
    flags = [*flags_of(folder), '--log=False']
    for logdir, ends in ('once', [6]), ('twice', [3, 6]):
        for end in ends:
            line = [*flags, f'--metatrain_iterations={end}', f'--logdir={tmp_path}/{logdir}']
            succeeded(command('main.py', *line))
    assert_same_run(*(next((tmp_path / name).iterdir()) for name in ('once', 'twice')), last=5)


@pytest.mark.slow
def test_network_on_two_devices(folder, tmp_path):
    flags = [*flags_of(folder, 'small'), '--metatrain_iterations=8', '--meta_batch_size=4']
    succeeded(command('main.py', *flags, f'--logdir={tmp_path}/one'))
    mirrored = two_devices(*flags, f'--logdir={tmp_path}/mirrored')
    assert mirrored.returncode == 0, mirrored.stderr[-2000:]
    assert_close(tmp_path / 'one', tmp_path / 'mirrored')


@pytest.fixture(scope='module')
def run_folder(folder, tmp_path_factory) -> Path:
    """Of a short run with five classes."""
    logdir = tmp_path_factory.mktemp('logs')
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, compiled=False)
        tf.config.run_functions_eagerly(True)
        flags = [*flags_of(folder), '--num_classes=2', '--log=False', '--metatrain_iterations=2']
        succeeded(run(*flags, f'--logdir={logdir}'))
        tf.config.run_functions_eagerly(False)
    return next(logdir.iterdir())


@pytest.mark.slow
def test_scripts_take_the_network(folder, run_folder, tmp_path):
    """classify.py, export.py and publish.py; without --network they refuse and run nothing."""
    (tmp_path / 'support').mkdir()
    for label in 'Armenian', 'Malay':
        (tmp_path / 'support' / label).symlink_to(SUPPORT / label)
    network = f'--network={folder}/networks.py:small'
    for program, arguments in [
        (classify, [run_folder, tmp_path / 'support', QUERY]),
        (export, [run_folder, tmp_path / 'model']),
        (publish, [run_folder, tmp_path / 'kept']),
    ]:
        line = [*map(str, arguments)]
        outcome = in_process(program.main, line)
        assert_refused(outcome, f'{folder}/networks.py:small', '--network', 'not run unasked')
        succeeded(in_process(program.main, [*line, network]))
        line[-1] += '2' if program is not classify else ''
        outcome = in_process(program.main, [*line, f'--network={folder}/networks.py:outputs'])
        assert_refused(outcome, 'must have 2 outputs, but has 3')
    kept = tmp_path / 'kept' / run_folder.name
    assert network in (kept / 'command.txt').read_text()
    network = user_network(
        f'{folder}/networks.py:small', {'datasource': 'omniglot', 'num_classes': 2}
    )
    ours, theirs = (Learner.load(path, network=network).model for path in (kept, run_folder))
    for one, other in zip(ours.parameters, theirs.parameters):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_exported_network(folder, run_folder, tmp_path):
    """Any number of tasks and examples, in a process that knows nothing of this project."""
    spec, arrays = f'{folder}/networks.py:small', tasks_to_serve()
    for name in arrays:
        arrays[name] = arrays[name] % 2 if name.startswith('y') else arrays[name]
    line = [str(run_folder), f'{tmp_path}/model', f'--network={spec}', '--steps=2', '--lr=.2']
    assert '2 ways, images 28x28x1' in succeeded(in_process(export.main, line)).out
    found = served(tmp_path / 'model', arrays, tmp_path)
    settings = read_run_state(f'{run_folder}/model1')['flags']
    learner = Learner.load(run_folder, network=user_network(spec, settings))
    for shots in 1, 5:
        x, y = arrays[f'x{shots}'], arrays[f'y{shots}']
        expected = learner.predict(arrays['query'], learner.adapt(x, y, 2, 0.2), x)
        np.testing.assert_allclose(found[f'p{shots}'], expected, atol=1e-5)


@pytest.mark.slow
def test_load_needs_the_network_and_runs_no_file(folder, run_folder, tmp_path, monkeypatch):
    """Given as a Keras model, a KerasNetwork, or anything with the attributes of a network."""
    function = user_function(f'{folder}/networks.py:small')
    with monkeypatch.context() as patch:
        patch.setattr('fewshot.networks.build.user_function', None)
        with pytest.raises(ValueError, match='networks.py:small.* network='):
            Learner.load(run_folder)
        unasked = run('--train=False', f'--run={run_folder}')
        assert_refused(unasked, 'networks.py:small', 'not run unasked')
        model = function((28, 28, 1), 2)
        learners = [
            Learner.load(run_folder, network=network)
            for network in (model, KerasNetwork(model), Likewise(KerasNetwork(model)))
        ]
    x, y = np.random.default_rng(0).random((4, 28, 28, 1)), np.array([0, 1, 1, 0])
    answers = [learner.predict(x, learner.adapt(x, y)) for learner in learners]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    with pytest.raises(ValueError, match='another architecture'):
        Learner.load(run_folder, network=FullyConnected(784, (3,), 2))


class Likewise:
    """A network that is none of this project's classes."""

    def __init__(self, network: KerasNetwork):
        self.parameters, self.norm_parameters = network.parameters, network.norm_parameters
        self.dim_input, self.dim_output, self.prepare = 784, 2, network.prepare
        self.network = network

    def __call__(self, *arguments):
        return self.network(*arguments)


def test_initial_values_are_a_function_of_the_seed(folder):
    """And nothing else that is random notices."""
    spec, settings = f'{folder}/networks.py:small', {'datasource': 'omniglot', 'num_classes': 2}

    def initial(seed: int) -> np.ndarray:
        return user_network(spec, settings | {'seed': seed}).parameters['0/conv2d/kernel'][0]

    random.seed(5)
    np.random.seed(5)
    drawn = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    first, again, other = initial(1), initial(1), initial(2)
    assert (random.random(), np.random.random()) == drawn
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.slow
def test_frozen_layers_have_the_values_of_training(folder, tmp_path, eager):
    """Whatever --seed an evaluation is given: they are in no checkpoint."""
    flags, logdir = [*flags_of(folder, 'half_frozen'), '--log=False'], tmp_path / 'logs'
    succeeded(run(*flags, '--seed=3', '--metatrain_iterations=1', f'--logdir={logdir}'))
    (trained,) = logdir.iterdir()
    test = [*flags, '--train=False', f'--run={trained}']
    tables = [succeeded(run(*test, f'--seed={seed}')).out for seed in (3, 0)]
    assert tables[0] == tables[1]


def test_network_that_adapts_in_part(folder, tmp_path, eager):
    """The function may return a KerasNetwork."""
    flags = [*flags_of(folder, 'wrapped'), '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*flags, '--metatrain_iterations=1'))
    (path,) = checkpoints(next(tmp_path.iterdir())).values()
    names = {
        name.split('/')[0] for name in tf.train.load_checkpoint(path).get_variable_to_dtype_map()
    }
    assert {'weights', 'norms'} <= names


def test_folders_take_networks(folder, tmp_path, eager):
    """Joint training too."""
    flags = [*flags_of(folder, 'dense'), '--log=False', f'--logdir={tmp_path}', '--image_size=8']
    flags[0] = '--datasource=folder'
    flags[1] = f'--data_dir={folder}/data/omniglot_resized/Alphabet0'
    line = [*flags, '--channels=1', '--pretrain_iterations=1', '--metatrain_iterations=1']
    succeeded(run(*line))
    succeeded(run(*line, '--train=False'))


@pytest.mark.parametrize(
    'spec, words',
    [
        ('absent.py:small', 'there is no file'),
        ('networks.py:absent', "there is no function 'absent'"),
        ('networks.py:constant', "there is no function 'constant'"),
        ('networks.py', 'FILE.py:FUNCTION'),
        ('networks.txt:small', 'FILE.py:FUNCTION'),
        ('networks.py:../small', 'FILE.py:FUNCTION'),
        ('networks.py:outputs', 'must have 2 outputs, but has 3'),
        ('networks.py:inputs', 'must take 784 values per example, but has 7'),
        ('networks.py:weightless', 'no trainable variables'),
        ('networks.py:dropout', 'draws random numbers in dropout'),
        ('networks.py:nothing', 'must return a keras.Model, but it returned None'),
    ],
)
def test_networks_refused(folder, tmp_path, eager, spec, words):
    flags = [*flags_of(folder)[:-1], f'--network={folder}/{spec}', f'--logdir={tmp_path}/logs']
    assert_refused(run(*flags), 'main.py: ', words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_networks_that_contradict(folder, tmp_path, eager, monkeypatch):
    """Sinusoids take none; another file's function of the same name is another network."""
    assert_refused(run(f'--network={folder}/networks.py:small'), '--network', 'not sinusoid')
    flags = [*flags_of(folder), f'--logdir={tmp_path}', '--log=False']
    succeeded(run(*flags, '--metatrain_iterations=1'))
    (tmp_path / 'other.py').write_text(NETWORKS)
    line = [*flags, f'--network={tmp_path}/other.py:small', '--train=False']
    assert_refused(run(*line), f'--network={folder}/networks.py:small (now ')
    outcome = run(*flags, '--conv=False', '--metatrain_iterations=1')
    assert_refused(outcome, '--conv=True (now False)')
    assert '--conv may be part of the name' in outcome.err


@pytest.mark.parametrize(
    'spec, words',
    [
        ('networks.py:no_arguments', ['takes 0 positional arguments but 2 were given']),
        ('networks.py:failing', ["name 'undefined' is not defined"]),
        ('networks.py:failing_model', ['no_such_attribute']),
        ('syntax.py:small', ['SyntaxError', 'def small(:']),
        ('broken.py:small', ['No module named', 'import no_such_module']),
    ],
)
def test_errors_in_users_files_are_shown_as_theirs(folder, tmp_path, spec, words):
    """Their own traceback, and no line of this program."""
    flags = [*flags_of(folder)[:-1], f'--network={folder}/{spec}', f'--logdir={tmp_path}/logs']
    outcome = run(*flags)
    assert outcome.status == 1 and all(word in outcome.err for word in words), outcome.err
    assert f'main.py: {folder}/{spec} failed, not this program:' in outcome.err
    places = [line for line in outcome.err.splitlines() if line.startswith('  File ')]
    own = f'  File "{folder.resolve()}/{spec.partition(":")[0]}"'
    assert all(line.startswith(own) for line in places[:1])
    assert places or spec == 'networks.py:no_arguments'
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_checkpoints_from_before_the_flag(folder, tmp_path, eager, monkeypatch):
    """They are evaluated, loaded and continued."""
    flags = [*flags_of(folder)[:-1], '--conv=False', '--log=False', f'--logdir={tmp_path}']

    def write(checkpoint, folder, iteration, state, kind):
        del state['flags']['network']
        return write_checkpoint(checkpoint, folder, iteration, state, kind)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'write_checkpoint', write)
        succeeded(run(*flags, '--metatrain_iterations=1'))
    (run_folder,) = tmp_path.iterdir()
    assert 'network' not in read_run_state(f'{run_folder}/model0')['flags']
    succeeded(run(*flags, '--train=False'))
    assert Learner.load(run_folder).model.network.dim_output == 2
    outcome = succeeded(run(*flags, '--metatrain_iterations=2'))
    assert 'Continuing at iteration 1 of 2.' in outcome.out
    assert read_run_state(f'{run_folder}/model1')['flags']['network'] == ''


@pytest.mark.slow
@pytest.mark.parametrize('source', ['omniglot', 'miniimagenet'])
def test_examples_are_the_papers_networks(source):
    """Same outputs as the project's own with the same weights."""
    filters, pool = {'omniglot': (64, False), 'miniimagenet': (32, True)}[source]
    own = make_model(source, 1, num_filters=filters, max_pool=pool, compiled=False)
    shape = example_shape({'datasource': source})
    theirs = make_model(source, 1, network=getattr(networks, source)(shape, 5), compiled=False)
    values = []
    for i in range(1, 5):
        values += [own.weights[f'conv{i}'], own.norms[f'{i - 1}/beta']]
    values += [own.weights['w5'], own.weights['b5']]
    for variable, value in zip(theirs.parameters, values, strict=True):
        variable.assign(value)
    x = tf.random.stateless_uniform([2, 5, int(np.prod(shape))], [0, 1])
    outputs = [
        model.maml.forward(repeated(model.weights, 2), model.norms, model.maml.prepare(x, {}))
        for model in (own, theirs)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


class Softmax(FullyConnected):
    def head(self, *arguments):
        return tf.nn.softmax(super().head(*arguments))


class WithoutSizes(Likewise):
    """A network that does not say its sizes."""

    def __init__(self, network):
        super().__init__(network)
        del self.dim_input, self.dim_output


def test_probabilities_are_no_logits():
    """Softmax of softmax is warned of, once, where it is taken."""
    layers = keras.layers
    stack = [layers.Input((3,)), layers.Dense(2, activation='softmax')]
    network, words = keras.Sequential(stack), 'probabilities already, but cross_entropy takes'
    for probable in network, Softmax(3, (4,), 2):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always', UserWarning)
            FastMAML(probable, cross_entropy(1), 0.1, compiled=False)
        (warning,) = [one for one in heard if words in str(one.message)]
        assert warning.filename == __file__ and 'activation=None' in str(warning.message)
    logits = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', words)
        for right in logits, FullyConnected(3, (4,), 2), Softmax(3, (4,), 1):
            FastMAML(right, cross_entropy(1), 0.1, compiled=False)
        FastMAML(WithoutSizes(Softmax(3, (4,), 2)), cross_entropy(1), 0.1, compiled=False)
        FastMAML(network, mean_squared_error, 0.1, compiled=False)


# --datasource=FILE.py:FUNCTION --------------------------------------------------------------------

CURVES = f'--datasource={ROOT}/scripts/examples/curves.py:tasks'
TASKS = """
import sys
import numpy as np
from data_generator import Batch

class Tasks:
    example_shape = (4, 4, 1)
    def batch(self, split, iteration, num_tasks):
        random = np.random.default_rng([len(split), iteration])
        means = random.random((num_tasks, 1, 3, 16))
        x = means + 0.1 * random.random((num_tasks, 5, 3, 16))
        x = x.reshape(num_tasks, 15, 16)
        y = np.broadcast_to(np.tile(np.eye(3, dtype=int), (5, 1)), (num_tasks, 15, 3))
        return Batch(inputa=x[:, :6], labela=y[:, :6], inputb=x[:, 6:], labelb=y[:, 6:])

class Failing(Tasks):
    def batch(self, split, iteration, num_tasks):
        if iteration == 3:
            raise OSError('my disk')
        return super().batch(split, iteration, num_tasks)

class Stopping(Failing):
    def batch(self, split, iteration, num_tasks):
        return next(iter([])) if iteration == 3 else super().batch(split, iteration, num_tasks)

class Leaving(Failing):
    def batch(self, split, iteration, num_tasks):
        return sys.exit(5) if iteration == 3 else super().batch(split, iteration, num_tasks)

class Changing(Tasks):
    def batch(self, split, iteration, num_tasks):
        batch = super().batch(split, iteration, num_tasks)
        return Batch(*(values[:, iteration:] for values in batch))

def convolutional(shape, outputs):
    import keras
    assert shape == (4, 4, 1)
    first = [keras.layers.Input(shape), keras.layers.Conv2D(4, 3), keras.layers.Flatten()]
    return keras.Sequential([*first, keras.layers.Dense(outputs)])

def no_object():
    return 3

def needs(argument):
    return Tasks()
"""


@pytest.fixture
def own(tmp_path) -> Path:
    (tmp_path / 'own.py').write_text(TASKS)
    return tmp_path / 'own.py'


@pytest.mark.slow
def test_own_tasks_stop_and_continue_exactly(tmp_path, eager, often, monkeypatch):
    """Regression: the best checkpoint is that of the smallest loss; evaluated, and used."""
    monkeypatch.setattr(curves.Curves, 'iterations_at_once', 1)
    flags = [CURVES, '--norm=None', '--update_lr=.1', '--meta_batch_size=4', '--validation_tasks=4']
    flags += ['--metatrain_iterations=34']
    once, twice = trained_twice(tmp_path, monkeypatch, flags, stop=1)
    assert_same_run(once, twice, last=33)
    best = read_run_state(f'{once}/model33')['best']
    assert best['loss'] > 0 and [*checkpoints(once, 'best')] == [best['iteration']]
    outcome = succeeded(run(*flags, '--train=False', f'--logdir={tmp_path}/once'))
    assert 'Mean squared error on' in outcome.out
    learner, batch = Learner.load(once), curves.tasks().batch('test', 0, 3)
    weights = learner.adapt(*batch[:2], steps=3)
    assert learner.task_loss(*batch[:2], weights).shape == (3,)
    assert learner.predict(batch[2], weights).shape == (3, 11, 1)


@pytest.mark.slow
def test_own_classification(own, tmp_path, eager, often):
    """One-hot labels make it one; with the network here, with one's own, and exported."""
    source = [f'--datasource={own}:Tasks', '--meta_batch_size=4', '--validation_tasks=4']
    source += ['--update_lr=.1', f'--logdir={tmp_path}/logs']
    for more in ['--norm=None'], [f'--network={own}:convolutional']:
        outcome = succeeded(run(*source, *more, '--metatrain_iterations=16'))
        assert 'Accuracy on 4 validation tasks' in outcome.out
        assert 'Continuing' in succeeded(run(*source, *more, '--metatrain_iterations=17')).out
        assert 'Mean ' in succeeded(run(*source, *more, '--train=False')).out
    plain, convolutional = sorted((tmp_path / 'logs').iterdir(), key=lambda path: len(path.name))
    learner = Learner.load(plain)
    assert learner.model.loss.shots == 2 and learner.model.network.dim_input == 16
    x, y = 3 * np.random.default_rng(0).random((6, 16)), np.arange(6) % 3
    assert learner.predict(x, learner.adapt(x, y)).shape == (6, 3)
    line = [str(convolutional), f'{tmp_path}/model', f'--network={own}:convolutional']
    assert '3 ways, images 4x4x1' in succeeded(in_process(export.main, line)).out
    outcome = in_process(classify.main, [str(plain), str(SUPPORT), str(QUERY)])
    assert_refused(outcome, 'has no images')


@pytest.mark.slow
def test_example_learns(tmp_path):
    """As the documents say, in a process."""
    flags = [CURVES, '--norm=None', '--update_lr=.1', '--meta_lr=.003', '--num_updates=3']
    flags += [f'--logdir={tmp_path}', '--log=False']
    succeeded(command('main.py', *flags, '--metatrain_iterations=3001'))
    succeeded(command('main.py', *flags, '--train=False', '--test_set=True'))
    (path,) = tmp_path.glob('*/test_*.csv')
    means = read_evaluation(path)[0]
    assert means[0] > 0.1 and means[3] < 0.05


def test_example_is_what_it_says():
    """curves.csv comes from the formula; each curve is in one split."""
    random = np.random.default_rng(0)
    doses = np.array([float(f'{dose:.3g}') for dose in np.logspace(-2, 2, 16)])
    rows = []
    for _ in range(60):
        bottom, top = random.uniform(-0.1, 0.3), random.uniform(0.6, 1.4)
        if random.random() < 0.5:
            bottom, top = top, bottom
        ec50, slope = 10 ** random.uniform(-1.2, 1.2), random.uniform(0.7, 3)
        curve = bottom + (top - bottom) / (1 + (ec50 / doses) ** slope)
        rows.append(curve + random.normal(0, 0.02, 16))
    tasks = curves.tasks()
    np.testing.assert_allclose(tasks.y, rows, atol=6e-4)
    np.testing.assert_allclose(tasks.x, np.log10(doses) / 2)
    batch = tasks.batch('val', 3, 50)
    labels = np.concatenate([batch[1], batch[3]], axis=1)[..., 0]  # [tasks, points]
    held_out = [sorted(curve) for curve in tasks.y[40:50].tolist()]
    assert all(sorted(task) in held_out for task in labels.tolist())


class Arrays:
    """Tasks that are what a test says."""

    def __init__(self, change=lambda batch, split: batch, **attributes):
        self.change, self.calls = change, 0
        self.__dict__ |= attributes

    def batch(self, split: str, iteration: int, num_tasks: int):
        self.calls += 1
        random = np.random.default_rng([iteration])
        shapes = {'inputa': 5, 'labela': 5, 'inputb': 7, 'labelb': 7}
        batch = {
            name: random.random((num_tasks, examples, 2 if name[0] == 'i' else 3))
            for name, examples in shapes.items()
        }
        return self.change(batch, split)


def test_sources_from_objects():
    """What the trainer needs of a source, from an object that has only `batch`."""
    tasks = Arrays()
    source = UserTasks(tasks)
    assert (source.dim_input, source.dim_output, source.objective) == (2, 3, 'loss')
    assert (
        source.validates and source.iterations_at_once == 1 and source.picture(None, None) is None
    )
    whole, calls = source.batch('train', 3, 6), tasks.calls
    for part in slice(0, 2), slice(2, 6):
        for one, other in zip(source.batch('train', 3, 6, part), whole):
            np.testing.assert_array_equal(one, other[part])
    assert tasks.calls == calls and whole.inputa.dtype == np.float32
    several = source.batches('train', 2, 3, 6, slice(1, 3))
    assert several.labelb.shape == (3, 2, 7, 3)
    np.testing.assert_array_equal(several.labelb[1], whole.labelb[1:3])
    shown = UserTasks(Arrays(validates=False, updates_shown=7, example_shape=(1, 2)))
    assert not shown.validates and shown.updates_shown == 7
    assert shown.model_settings['example_shape'] == [1, 2]


def one_hot(batch: dict, split: str) -> dict:
    for name in ('labela', 'labelb'):
        batch[name] = np.eye(3)[batch[name].argmax(-1)]
    return batch


def test_labels_tell_the_objective():
    assert UserTasks(Arrays(one_hot)).objective == 'accuracy'
    assert UserTasks(Arrays(one_hot, objective='loss')).objective == 'loss'
    assert UserTasks(Arrays(one_hot)).model_settings['shots'] == pytest.approx(5 / 3)
    with pytest.raises(BadTasks, match='labela must be one-hot.* since objective is accuracy'):
        UserTasks(Arrays(objective='accuracy'))
    with pytest.raises(BadTasks, match="'accuracy' or 'loss', but it is 'mse'"):
        UserTasks(Arrays(objective='mse'))


@pytest.mark.parametrize('objective', [None, 'accuracy'])
def test_labels_of_a_classifier_are_one_hot_in_every_batch(objective):
    """Those of a later batch are not; the sentence names it."""

    class Growing:
        def batch(self, split, iteration, num_tasks):
            labels = np.eye(2)[np.zeros((num_tasks, 3), int)] * (1 + iteration)
            return dict.fromkeys(('inputa', 'labela', 'inputb', 'labelb'), labels)

    tasks = Growing()
    if objective:
        tasks.objective = objective
    source = UserTasks(tasks, 'own.py:tasks')
    assert source.objective == 'accuracy' and source.batch('train', 0, 2).labela.max() == 1
    words = r"own.py:tasks: batch\('train', 1, 2\): labela must be one-hot, since .* from 0 to 2"
    with pytest.raises(BadTasks, match=words):
        source.batch('train', 1, 2)
    tasks.objective = 'loss'
    assert UserTasks(tasks).batch('train', 1, 2).labela.max() == 2


def changed(name: str, change):
    """What `Arrays` takes: one of the arrays is changed."""
    return lambda batch, split: batch | {name: change(batch[name])}


def with_value(value: float):
    def change(array):
        array[1, 2, 0] = value
        return array

    return change


@pytest.mark.parametrize(
    'change, words',
    [
        (changed('inputa', lambda a: a[..., None]), r'inputa must be \[tasks, examples, size\]'),
        (changed('inputb', lambda a: a[0]), r'inputb must be .* 4 tasks asked for.* is \[7, 2\]'),
        (changed('labela', lambda a: a[..., 0]), r'labela must be .* it is \[4, 5\]'),
        (changed('labelb', lambda a: a[:3]), r'labelb must be .* 4 tasks .* it is \[3, 7, 3\]'),
        (lambda batch, split: {k: a[:3] for k, a in batch.items()}, 'inputa must be .* 4 tasks'),
        (changed('labela', lambda a: a[:, :4]), 'inputa has 5 examples per task, but labela has 4'),
        (changed('inputb', lambda a: a[:, :6]), 'inputb has 6 examples per task, but labelb has 7'),
        (changed('inputb', lambda a: a[..., :1]), 'inputa has 2 values .* but inputb has 1'),
        (changed('labelb', lambda a: a[..., :1]), 'labela has 3 values .* but labelb has 1'),
        (
            lambda batch, split: batch | {n: batch[n][:, :0] for n in ('inputa', 'labela')},
            r'inputa must not be empty, but it is \[4, 0, 2\]',
        ),
        (changed('inputa', with_value(np.nan)), 'inputa must be finite.* 1 are NaN'),
        (changed('labelb', with_value(np.inf)), 'labelb must be finite'),
        (changed('labelb', with_value(1e300)), 'labelb must be finite'),
        (changed('inputa', lambda a: a.astype(str)), 'inputa must be .* numbers.* type <U'),
        (changed('inputa', lambda a: a.astype(complex)), 'inputa must be .* numbers.* complex'),
        (changed('inputa', lambda a: [[1], [1, 2]]), 'inputa must be an array'),
        (changed('labela', lambda a: None), 'labela must be .* numbers, but it is None'),
        (lambda batch, split: tuple(batch.values()), 'a dict of four arrays.* type tuple: write'),
        (lambda batch, split: None, 'must be a data_generator.Batch.* NoneType: write Batch[(]in'),
        (lambda batch, split: batch | {'c': 0}, 'but the names are inputa, .*, labelb, c: write'),
        (
            changed('inputb', lambda a: np.ma.masked_less(a, 0.1)),
            'inputb must be real numbers, but some are masked',
        ),
        (changed('labela', lambda a: a + np.random.random()), 'labela was another one the second'),
        (
            lambda batch, split: {
                name: array[..., : 2 if split == 'val' else 3] for name, array in batch.items()
            },
            r"batch\('val', 0, 4\): labela is \[4, 5, 2\], but .* \[4, 5, 3\] in the split train",
        ),
    ],
)
def test_tasks_refused(change, words):
    """The sentence names the call, the array and what is wrong with it."""
    with pytest.raises(BadTasks, match=words) as refused:
        UserTasks(Arrays(change), 'own.py:tasks')
    assert str(refused.value).startswith('own.py:tasks: batch(') and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'spec, words',
    [
        ('own.py:absent', ["there is no function 'absent'"]),
        ('absent.py:tasks', ['there is no file']),
        ('own.py:no_object', ['must be an object with batch', 'int']),
    ],
)
def test_sources_refused(own, tmp_path, eager, spec, words):
    outcome = run(f'--datasource={tmp_path}/{spec}', f'--logdir={tmp_path}/logs')
    assert_refused(outcome, 'main.py: ', *words)
    assert [*tmp_path.iterdir()] == [own]


def test_tasks_that_fail_later(own, tmp_path, eager):
    """An error of the user's is theirs; another shape is a sentence. What was trained is kept."""
    flags = ['--log=False', '--meta_batch_size=2', '--norm=None', f'--logdir={tmp_path}/logs']
    outcome = run(f'--datasource={own}:Failing', *flags)
    assert outcome.status == 1 and 'OSError: my disk' in outcome.err
    assert f'main.py: {own}:Failing failed, not this program:' in outcome.err
    for name, error in (('Stopping', 'StopIteration'), ('Leaving', 'SystemExit: 5')):
        outcome = run(f'--datasource={own}:{name}', *flags)
        assert outcome.status == 1 and outcome.err.endswith(f'{error}\n'), outcome.err
        assert f'main.py: {own}:{name} failed' in outcome.err and 'iteration == 3' in outcome.err
    outcome = run(f'--datasource={own}:Changing', *flags)
    assert_refused(outcome, "batch('train', 1, 2)", 'inputa is [2, 5, 16], but it was [2, 6, 16]')
