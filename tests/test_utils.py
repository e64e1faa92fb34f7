"""Losses, normalisation with its second derivatives, initial values and checkpoint files."""

import io
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import ROOT, parsed

import utils
from data_generator import Batch
from fewshot.checks import first_line
from fewshot.data.pictures import fit_picture, task_picture
from fewshot.engine import devices
from fewshot.engine.devices import has_nvidia_gpu, set_up_gpus, tune
from fewshot.runs.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from fewshot.runs.terminal import print_anything
from fewshot.use.learner import Learner
from maml import FullyConnected, accuracy, cross_entropy, initial_value, mean_squared_error
from special_grads import batch_norm, layer_norm

LOG = np.log


# Losses -------------------------------------------------------------------------------------------


def test_mean_squared_error_is_a_mean_over_the_points_of_each_task():
    """Task 0: errors 1, -2, 3 -> 14/3. Task 1: 0, 0, 6 -> 12."""
    output = tf.constant([[[1.0], [0.0], [4.0]], [[2.0], [3.0], [4.0]]])
    label = tf.constant([[[0.0], [2.0], [1.0]], [[2.0], [3.0], [-2.0]]])
    np.testing.assert_allclose(mean_squared_error(output, label), [14 / 3, 12.0], rtol=1e-6)


def test_cross_entropy_is_summed_and_divided_by_the_shots():
    """Logits (0, ln 3) are probabilities 1/4 and 3/4, logits (0, 0) one half each.

    Task 0 has labels 0, 1, 1 -> ln 4 + ln(4/3) + ln 2 = ln(32/3); task 1 has 1, 1, 0 -> ln(4/3) +
    ln(4/3) + ln 2 = ln(32/9). With K shots both are divided by K, whatever the number of examples.
    """
    logits = tf.constant(2 * [[[0.0, LOG(3.0)], [0.0, LOG(3.0)], [0.0, 0.0]]], tf.float64)
    label = tf.constant(np.eye(2)[[[0, 1, 1], [1, 1, 0]]])
    expected = np.array([LOG(32 / 3), LOG(32 / 9)])
    np.testing.assert_allclose(cross_entropy(1)(logits, label), expected, rtol=1e-14)
    np.testing.assert_allclose(cross_entropy(5)(logits, label), expected / 5, rtol=1e-14)


def test_cross_entropy_scale_of_support_and_query():
    """Equal logits cost N ln N on N*K support images, N*15/K ln N on 15 queries per class."""
    loss = cross_entropy(5)
    for examples, expected in ((5 * 5, 5 * LOG(5)), (5 * 15, 15 * LOG(5))):
        label = tf.constant(np.eye(5)[np.arange(examples) % 5][None])
        np.testing.assert_allclose(loss(tf.zeros_like(label), label), [expected], rtol=1e-14)


def test_cross_entropy_of_large_logits_is_finite():
    logits = tf.constant([[[1000.0, 0.0], [0.0, 1000.0]]])
    label = tf.constant([[[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(cross_entropy(1)(logits, label), [1000.0])


def test_accuracy_is_the_share_of_largest_logits():
    one = [[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]
    output = tf.constant([one, 4 * [[-1.0, -2.0, -3.0]]])
    label = tf.constant(np.eye(3, dtype=np.float32)[[[0, 1, 0, 0], [1, 2, 0, 1]]])
    np.testing.assert_array_equal(accuracy(output, label), [0.75, 0.25])


# Normalisation ------------------------------------------------------------------------------------

# Of a fully connected and a convolutional layer: [T, examples, ..., channels].
SHAPES = [(2, 5, 3), (2, 4, 3, 2, 3)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('scale', [1.0, 0.03])
def test_batch_norm_by_its_formula(shape, scale):
    """Biased variance of a task and channel, epsilon 0.001 in the root; 0.03² is less than that."""
    random = np.random.default_rng(0)
    x, beta = scale * random.standard_normal(shape) + 2, random.standard_normal(3)
    output = batch_norm(tf.constant(x), tf.constant(beta))
    for task, channel in np.ndindex(2, 3):
        values, found = x[task, ..., channel], output[task, ..., channel]
        variance = np.sum((values - values.mean()) ** 2) / values.size
        expected = (values - values.mean()) / np.sqrt(variance + 0.001) + beta[channel]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('scale', [1.0, 1e-6])
def test_layer_norm_by_its_formula(shape, scale):
    """Biased variance of an example, epsilon 1e-12 in the root; the last axis's gain and offset."""
    random = np.random.default_rng(0)
    x = scale * random.standard_normal(shape)
    beta, gamma = random.standard_normal((2, 3))
    output = layer_norm(*map(tf.constant, (x, beta, gamma)))
    for place in np.ndindex(shape[:2]):
        variance = np.mean((x[place] - x[place].mean()) ** 2)
        expected = (x[place] - x[place].mean()) / np.sqrt(variance + 1e-12) * gamma + beta
        np.testing.assert_allclose(output[place], expected, rtol=1e-9, atol=1e-10)


def test_constant_inputs_are_normalised_to_the_offset():
    x = tf.fill([2, 5, 3], 7.0)
    beta, gamma = tf.constant([1.0, 2.0, 3.0]), tf.constant([4.0, 5.0, 6.0])
    expected = np.broadcast_to(beta, x.shape)
    np.testing.assert_allclose(batch_norm(x, beta), expected, atol=1e-5)
    np.testing.assert_allclose(layer_norm(x, beta, gamma), expected, atol=1e-5)


def test_statistics_are_those_of_the_batch_at_hand():
    """No running averages: what was normalised before leaves no trace."""
    x, beta = tf.random.stateless_normal([2, 5, 3], [0, 0]), tf.zeros(3)
    before = batch_norm(x, beta)
    batch_norm(100 * x + 50, beta)
    np.testing.assert_array_equal(batch_norm(x, beta), before)


@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm'])
def test_each_layer_has_its_own_offset(norm):
    """A layer's normalisation takes its own scope's parameters; without one, nothing happens."""
    x = tf.random.stateless_normal([2, 5, 3], [0, 0])
    norms = {}
    for scope in range(4):
        norms |= {f'{scope}/{name}': tf.fill([3], float(scope)) for name in ('beta', 'gamma')}

    def normalize(x, norm, scope, norms):
        return FullyConnected(3, (3,), 3, norm)._normalize(x, scope, norms, None)

    one, three = (normalize(x, norm, scope, norms) for scope in '13')
    expected = tf.zeros_like(x) if norm == 'layer_norm' else -2 * (one - 1)
    np.testing.assert_allclose(three - 3 * one, expected, atol=1e-5)
    np.testing.assert_array_equal(normalize(x, 'None', '2', {}), x)


def test_parameters_of_each_normalisation():
    def norm_parameters(norm, *hidden):
        return FullyConnected(2, hidden, 1, norm).norm_parameters

    assert norm_parameters('None', 8) == {}
    assert norm_parameters('batch_norm', 8) == {'0/beta': ('zeros', (8,))}
    assert norm_parameters('layer_norm', 4, 8) == {
        '0/beta': ('zeros', (4,)),
        '0/gamma': ('ones', (4,)),
        '2/beta': ('zeros', (8,)),
        '2/gamma': ('ones', (8,)),
    }


# Its derivatives: TensorFlow's known trap ---------------------------------------------------------


def moments_norm(x, axes, epsilon):
    """Normalisation as one would write it, with tf.nn.moments, and as many programs have it."""
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


NORMS = {
    'batch_norm': (
        lambda x: batch_norm(x, tf.zeros(3, x.dtype)),
        lambda x: moments_norm(x, list(range(1, len(x.shape) - 1)), 1e-3),
    ),
    'layer_norm': (
        lambda x: layer_norm(x, tf.zeros(3, x.dtype), tf.ones(3, x.dtype)),
        lambda x: moments_norm(x, list(range(2, len(x.shape))), 1e-12),
    ),
}


def derivatives(norm, x, direction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value, a scalar's gradient, and the derivative of that gradient along `direction`."""
    x = tf.constant(x)
    weights = np.random.default_rng(1).standard_normal(x.shape)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = norm(x)
            scalar = tf.reduce_sum(weights * (y + y**2))
        first = inner.gradient(scalar, x)
        along = tf.reduce_sum(first * direction)
    return y.numpy(), first.numpy(), outer.gradient(along, x).numpy()


def relative(one, other) -> float:
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', NORMS)
def test_second_derivative_of_normalisation_is_exact(name, shape):
    """Against finite differences of the first derivative, which itself is checked by the values.

    tf.nn.moments takes the gradient of the mean inside the variance for zero, which it is: values
    and first derivatives are right. Its derivative is not zero, so second derivatives are wrong,
    and no warning is given.
    """
    random = np.random.default_rng(0)
    x, direction = random.standard_normal((2, *shape))
    (ours, naive), step = NORMS[name], 1e-5
    value, first, second = derivatives(ours, x, direction)
    up_value, up, _ = derivatives(ours, x + step * direction, direction)
    down_value, down, _ = derivatives(ours, x - step * direction, direction)
    weights = np.random.default_rng(1).standard_normal(shape)
    scalars = [np.sum(weights * (y + y**2)) for y in (up_value, down_value)]
    slope = (scalars[0] - scalars[1]) / (2 * step)
    np.testing.assert_allclose(np.sum(first * direction), slope, rtol=1e-6)
    assert relative(second, (up - down) / (2 * step)) < 1e-6

    naive_value, naive_first, naive_second = derivatives(naive, x, direction)
    np.testing.assert_allclose(naive_value, value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(naive_first, first, rtol=1e-10, atol=1e-12)
    assert relative(naive_second, second) > 0.01


# Initial values -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['glorot', 'normal', 'truncated'])
def test_initial_values_are_a_function_of_the_seed_alone(kind):
    tf.random.set_seed(1)
    one = initial_value(kind, (5, 6), [3, 4])
    tf.random.set_seed(2)
    np.random.seed(7)
    np.testing.assert_array_equal(initial_value(kind, (5, 6), [3, 4]), one)
    assert one.shape == (5, 6) and one.dtype == np.float32
    for other in ([3, 5], [4, 4], [4, 3]):
        assert not np.any(initial_value(kind, (5, 6), other) == one)


# Checkpoints --------------------------------------------------------------------------------------


def test_ten_newest_checkpoints_are_kept(tmp_path):
    """Newest by number, not by name: model11000 is newer than model9000."""
    checkpoint = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0, 2.0])})
    for i in range(1, 13):
        path = write_checkpoint(checkpoint, tmp_path, 1000 * i)
        assert path == str(tmp_path / f'model{1000 * i}')
    assert [*checkpoints(tmp_path)] == [1000 * i for i in range(3, 13)]
    stems = {path.name.split('.')[0] for path in tmp_path.iterdir()}
    assert stems == {f'model{1000 * i}' for i in range(3, 13)}
    assert checkpoints(tmp_path)[12000] == str(tmp_path / 'model12000')
    assert checkpoints(tmp_path / 'absent') == {}


@pytest.mark.parametrize('adam', [True, False])
def test_checkpoint_is_read_back_by_parameter_name(tmp_path, adam):
    """It is complete with Adam's state only."""
    values = {'w1': np.float32([[1, 2]]), '0/beta': np.float32([3]), '2/gamma': np.float32([4])}
    variables = {name: tf.Variable(value) for name, value in values.items()}
    more = {'metatrain_optimizer': tf.train.Checkpoint(step=tf.Variable(1))} if adam else {}
    checkpoint = tf.train.Checkpoint(weights={'w1': variables.pop('w1')}, norms=variables, **more)
    read, optimizers = read_checkpoint(write_checkpoint(checkpoint, tmp_path, 7), [*values])
    complete = optimizers == ['metatrain_optimizer']
    assert complete == adam and read.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    'names, stored',
    [
        (
            'conv1 b1 conv2 b2 w5 b5 0/beta 1/beta',
            'conv1 Variable conv2 Variable_1 w5 Variable_2 0/beta 1/beta',
        ),
        ('w1 b1 w2 b2 0/beta', 'Variable Variable_1 Variable_2 Variable_3 0/beta'),
    ],
    ids=['convolutional', 'fully connected'],
)
def test_checkpoint_of_the_original(tmp_path, names, stored):
    """The TensorFlow 1 format, and the names that TensorFlow made up for variables without one."""
    names, path = names.split(), str(tmp_path / 'model59999')
    values = [np.full([2], i, np.float32) for i in range(len(names))]
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=[f'model/{name}' for name in stored.split()],
        shape_and_slices=[''] * len(names),
        tensors=values,
    )
    read, optimizers = read_checkpoint(path, names)
    complete = bool(optimizers)
    assert not complete and read.keys() == set(names)
    for name, value in zip(names, values):
        np.testing.assert_array_equal(read[name], value)


def damaged(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    'damage',
    [lambda path: path.unlink(), damaged, lambda path: path.write_bytes(b'')],
    ids=['absent', 'cut', 'empty'],
)
def test_unreadable_checkpoint(tmp_path, damage):
    checkpoint = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0, 2.0])})
    path = write_checkpoint(checkpoint, tmp_path, 7)
    damage(tmp_path / 'model7.index')
    with pytest.raises(ValueError, match='model7 cannot be read as a checkpoint'):
        read_checkpoint(path, ['w1'])


# Pictures -----------------------------------------------------------------------------------------


def test_picture_of_a_task():
    """Every image of the first two shots stands in its place, unchanged; later ones do not."""
    random = np.random.default_rng(0)

    def examples(shots):
        images = random.integers(0, 256, (2, shots * 3, 20 * 30 * 3)) / 255
        return images, np.tile(np.eye(3)[[2, 0, 1]], (2, shots, 1))

    batch = Batch(*examples(1), *examples(4))
    picture = task_picture(batch, (20, 30, 3), task=1)
    assert picture.shape == (3 * 36 + 28, 3 * 34, 3) and picture.dtype == np.uint8
    expected = [
        (14 + 14, batch.inputa[1, :3]),
        (14 + 36 + 14 + 14, batch.inputb[1, :3]),
        (14 + 36 + 14 + 36 + 14, batch.inputb[1, 3:6]),
    ]
    for top, row in expected:
        for i, image in enumerate(row):
            place = picture[top : top + 20, 34 * i : 34 * i + 30]
            np.testing.assert_array_equal(place, np.uint8(255 * image.reshape(20, 30, 3)))
    assert (picture[14:28] < 128).any()  # the labels


def test_picture_of_a_fit():
    """A curve goes through its points, y upwards."""
    x = np.linspace(-5, 5, 50)
    picture = fit_picture({'red line': np.stack([x, x], 1)}, np.array([[0.0, 5.0]]))
    assert picture.shape == (320, 480, 3)
    red, purple, white = (255, 0, 0), (128, 0, 128), (255, 255, 255)
    for at, colour in [((-4, -4), red), ((4, 4), red), ((0, 5), purple), ((-4, 4), white)]:
        column, row = round((at[0] + 5) / 10 * 479), round((6 - at[1]) / 12 * 319)
        assert (picture[row - 1 : row + 2, column - 1 : column + 2] == colour).all(-1).any(), at


GRAPH_ERROR = (
    'Graph execution error:\n\nDetected at node A defined at (most recent call last):\n'
    '<stack traces unavailable>\nConnection reset\nmore'
)


@pytest.mark.parametrize(
    'text, line',
    [(GRAPH_ERROR, 'Connection reset'), ('disk full', 'disk full'), ('', 'ValueError')],
)
def test_first_line(text, line):
    assert first_line(ValueError(text)) == line


# A quiet start ------------------------------------------------------------------------------------

NO_GPU = 'E0000 00:00:1.2 34 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error'
NO_AVX = 'F0000 00:00:1.2 34 cpu_feature_guard.cc:4] was compiled to use AVX instructions'
NO_LIBRARY = 'W0000 00:00:1.2 34 gpu_device.cc:5] Cannot dlopen some GPU libraries'


def test_lines_that_say_nothing_are_dropped(capfd):
    """On the process's stderr, where C++ prints, and only while entered."""
    with utils.without_lines(utils.LINES_WITHOUT_GPU):
        os.write(2, f'{NO_LIBRARY}\n{NO_GPU}\n{NO_AVX}\n'.encode())
    os.write(2, f'{NO_GPU}\n'.encode())
    assert capfd.readouterr().err.splitlines() == [NO_LIBRARY, NO_AVX, NO_GPU]


def test_all_lines_without_sed(capfd, monkeypatch):
    monkeypatch.setenv('PATH', '')
    with utils.without_lines(utils.LINES_WITHOUT_GPU):
        os.write(2, NO_GPU.encode())
    assert capfd.readouterr().err == NO_GPU


KEPT_PROGRAM = (
    'E0000 00:00:1.2 34 text_format.cc:378] Error parsing text-format '
    'tensorflow.XlaSerializedCacheEntry: 2:1: Expected identifier, got: 6'
)


@pytest.mark.parametrize('kept', [False, True])
def test_lines_of_programs_that_are_kept(capfd, monkeypatch, kept):
    flags = '--tf_xla_persistent_cache_directory=/a' if kept else ''
    monkeypatch.setenv('TF_XLA_FLAGS', flags)
    with utils.without_cache_lines():
        os.write(2, f'{KEPT_PROGRAM}\n{NO_GPU}\n'.encode())
    told = [NO_GPU] if kept else [KEPT_PROGRAM, NO_GPU]
    assert capfd.readouterr().err.splitlines() == told


@pytest.mark.slow
def test_programs_that_are_kept(tmp_path):
    """The next run reads them, says nothing of it, and has the same weights; damage is reported."""
    kept, weights, counts = tmp_path / 'programs', [], []
    environment = os.environ | {'TF_XLA_FLAGS': f'--tf_xla_persistent_cache_directory={kept}'}
    kept.mkdir()

    def run(logdir: str) -> subprocess.CompletedProcess:
        flags = ['--norm=None', '--metatrain_iterations=2', f'--logdir={tmp_path / logdir}']
        line = [sys.executable, '-B', ROOT / 'main.py', *flags, '--log=False']
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)

    for logdir in ('first', 'second'):
        done = run(logdir)
        assert done.returncode == 0 and done.stderr == ''
        (folder,) = (tmp_path / logdir).iterdir()
        weights.append(Learner.load(folder).model.weights)
        counts.append(len([*kept.iterdir()]))
    assert counts[0] > 0 and counts[1] == counts[0]
    for key, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][key])
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    done = run('third')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'see to the folder that TF_XLA_FLAGS names, or empty it' in done.stderr


def quietly(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process with a user's settings."""
    inherited = {name: text for name, text in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'}
    line = [sys.executable, '-B', '-c', code]
    given = {'env': inherited | environment, 'cwd': ROOT, 'capture_output': True, 'text': True}
    return subprocess.run(line, timeout=600, **given)


@pytest.mark.slow
def test_a_start_is_quiet():
    """The modules and TensorFlow's first operation; what ends the process comes through."""
    start = 'import maml, os, tensorflow as tf; print(tf.reduce_sum(tf.ones(3)).numpy())'
    done = quietly(start)
    assert (done.stdout, done.stderr) == ('3.0\n', '')
    aborted = quietly(
        'import os, utils\n'
        'with utils.without_lines(utils.LINES_WITHOUT_GPU):\n'
        f'    os.write(2, b"{NO_GPU}\\n{NO_AVX}\\n")\n'
        '    os.abort()'
    )
    assert aborted.returncode < 0 and aborted.stderr == f'{NO_AVX}\n'
    if not has_nvidia_gpu():
        assert 'cuInit' in quietly(start, TF_CPP_MIN_LOG_LEVEL='0').stderr


@pytest.mark.slow
def test_warnings_come_through(tmp_path):
    """main.py, from start to end: the two lines that it prints on stderr itself, and no other."""
    flags = ['--norm=None', '--max_pool=True', '--metatrain_iterations=1', '--log=False']
    arguments = ['main.py', *flags, f'--logdir={tmp_path}/a', '--update_lr=1e30']
    code = f'import runpy, sys; sys.argv = {arguments}; runpy.run_path("main.py", None, "__main__")'
    done = quietly(code)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and len(said) == 2
    assert said[0].startswith('--max_pool is part of the name of the run, but does nothing')
    assert said[1].startswith('main.py: the loss is')


# GPUs ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch) -> dict:
    """What TensorFlow is told of the two GPUs that it seems to have."""
    told = {}
    config = tf.config.experimental
    monkeypatch.setattr(
        config, 'enable_tensor_float_32_execution', told.setdefault('tf32', []).append
    )
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [f'{kind}:0', f'{kind}:1'])
    monkeypatch.setattr(config, 'set_memory_growth', told.__setitem__)
    monkeypatch.setattr(devices, 'has_nvidia_gpu', lambda: True)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return told


@pytest.mark.parametrize('tf32', [False, True])
def test_gpus_are_exact_and_shared(gpus, capsys, tf32):
    tune(parsed('--datasource=miniimagenet', f'--tf32={tf32}'))
    assert gpus == {'tf32': [tf32], 'GPU:0': True, 'GPU:1': True}
    assert capsys.readouterr().err == ''


def test_gpus_in_use(gpus, monkeypatch):
    def refuse(*_):
        raise RuntimeError('Physical devices cannot be modified after being initialized')

    monkeypatch.setattr(tf.config.experimental, 'set_memory_growth', refuse)
    set_up_gpus()
    assert gpus == {'tf32': [False]}


def test_gpu_that_tensorflow_does_not_find(gpus, monkeypatch, capsys):
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
    set_up_gpus()
    assert "pip install -e '.[gpu]'" in capsys.readouterr().err
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # on purpose
    set_up_gpus()
    assert capsys.readouterr().err == ''


# What is outside ----------------------------------------------------------------------------------


def test_any_text_is_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, 'ascii'))
    print_anything()
    print('α caf\udce9', flush=True)
    assert written.getvalue() == b'\\u03b1 caf\\udce9\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    'script', ['main.py', 'scripts/model/publish.py', 'scripts/paper/report.py']
)
def test_help_where_the_output_is_ascii(script):
    line = [sys.executable, ROOT / script, '--help']
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run(line, capture_output=True, env=environment, timeout=600)
    assert b'Traceback' not in done.stderr and len(done.stdout) > 300
    if script == 'main.py':
        assert b'\\u03b1, step size of the inner loop' in done.stdout


def test_settings_of_keras():
    """Those of keras.json do not count, a program's own do."""
    try:
        keras.config.set_floatx('float16')
        with pytest.warns(UserWarning, match='float16'):
            utils.settle_keras(came_first=True)
        utils.settle_keras(came_first=False)
        assert keras.config.floatx() == 'float32'
    finally:
        keras.config.set_floatx('float32')


def test_another_backend_of_keras(monkeypatch):
    monkeypatch.setattr(keras.config, 'backend', lambda: 'jax')
    with pytest.raises(ImportError, match='Keras runs on jax here.*KERAS_BACKEND=tensorflow'):
        utils.settle_keras(came_first=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['KERAS_BACKEND', 'TF_USE_LEGACY_KERAS', 'TF2_BEHAVIOR', 'KERAS_HOME']
)
def test_settings_of_the_environment(tmp_path, name):
    """None of them makes other weights."""
    (tmp_path / 'keras.json').write_text('{"floatx": "float16", "backend": "jax"}')
    values = {'KERAS_BACKEND': 'jax', 'TF_USE_LEGACY_KERAS': '1', 'TF2_BEHAVIOR': '0'}
    weights = []
    for logdir, more in ('plain', {}), ('other', {name: values.get(name, str(tmp_path))}):
        flags = ['--norm=None', '--metatrain_iterations=2', f'--logdir={tmp_path / logdir}']
        line = [sys.executable, ROOT / 'main.py', *flags, '--log=False']
        subprocess.run(line, check=True, env={**os.environ, **more}, timeout=600)
        (folder,) = (tmp_path / logdir).iterdir()
        weights.append(Learner.load(folder).model.weights)
    for key, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][key])
