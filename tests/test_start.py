"""TensorFlow and Keras as a program starts with them."""

import os
import shutil
import subprocess
import sys
import zipfile

from fewshot.start import has_nvidia_gpu

import keras
import numpy as np
import pytest
from command_line import ROOT

from fewshot import start
from fewshot.use.learner import Learner

NO_GPU = 'E0000 00:00:1.2 34 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error'
NO_AVX = 'F0000 00:00:1.2 34 cpu_feature_guard.cc:4] was compiled to use AVX instructions'
ONEDNN = 'I0000 00:00:1.2 34 port.cc:153] oneDNN custom operations are on. You may see'
NO_LIBRARY = 'W0000 00:00:1.2 34 gpu_device.cc:5] Cannot dlopen some GPU libraries'


def test_lines_that_say_nothing_are_dropped(capfd):
    """On the process's stderr, where C++ prints, and only while entered."""
    with start.without_lines(start.IDLE_LINES + start.LINES_WITHOUT_GPU):
        os.write(2, f'{NO_LIBRARY}\n{NO_GPU}\n{ONEDNN}\n{NO_AVX}\n'.encode())
    os.write(2, f'{NO_GPU}\n'.encode())
    assert capfd.readouterr().err.splitlines() == [NO_LIBRARY, NO_AVX, NO_GPU]


def test_lines_come_through_if_the_import_fails(capfd):
    with pytest.raises(ImportError), start.without_lines(start.IDLE_LINES):
        os.write(2, f'{ONEDNN}\n{NO_AVX}\n'.encode())
        raise ImportError
    assert capfd.readouterr().err == f'{NO_AVX}\n'


@pytest.mark.slow
def test_programs_that_are_kept(tmp_path):
    """The next run reads them and has the same weights; damage is reported."""
    kept, weights, counts = tmp_path / 'programs', [], []
    environment = os.environ | {'TF_XLA_FLAGS': f'--tf_xla_persistent_cache_directory={kept}'}
    kept.mkdir()

    def run(logdir: str) -> subprocess.CompletedProcess:
        flags = ['--norm=None', '--metatrain_iterations=2', f'--logdir={tmp_path / logdir}']
        line = [sys.executable, '-B', ROOT / 'main.py', *flags, '--log=False']
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)

    for logdir in ('first', 'second'):
        done = run(logdir)
        assert done.returncode == 0 and 'Traceback' not in done.stderr
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


QUIET = [
    'import main',
    pytest.param('from fewshot import FastMAML', marks=pytest.mark.slow),
    pytest.param('from scripts.model import publish', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('onednn', ['', pytest.param('1', marks=pytest.mark.slow)])
@pytest.mark.parametrize('line', QUIET)
def test_a_start_is_quiet(line, onednn):
    """Up to TensorFlow's first operation; oneDNN is on by itself where there is AVX-512."""
    code = f'{line}; import tensorflow as tf; print(tf.reduce_sum(tf.ones(3)).numpy())'
    more = {'TF_ENABLE_ONEDNN_OPTS': onednn} if onednn else {}
    done = quietly(code, **more)
    assert (done.stdout, done.stderr) == ('3.0\n', '')
    if onednn and not has_nvidia_gpu():
        assert 'cuInit' in quietly(code, TF_CPP_MIN_LOG_LEVEL='0').stderr


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


def test_settings_of_keras():
    """Those of keras.json do not count, a program's own do."""
    try:
        keras.config.set_floatx('float16')
        with pytest.warns(UserWarning, match='float16'):
            start.settle_keras(came_first=True)
        start.settle_keras(came_first=False)
        assert keras.config.floatx() == 'float32'
    finally:
        keras.config.set_floatx('float32')


def test_another_backend_of_keras(monkeypatch):
    monkeypatch.setattr(keras.config, 'backend', lambda: 'jax')
    with pytest.raises(ImportError, match='Keras runs on jax here.*KERAS_BACKEND=tensorflow'):
        start.settle_keras(came_first=True)


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


TRAINING = """
import importlib.util
import fewshot, maml
from data_generator import SinusoidGenerator
from fewshot import FastMAML, KerasNetwork, Learner, MetaModel, make_model
network = maml.FullyConnected(1, (40, 40), 1)
model = FastMAML(network, maml.mean_squared_error, update_lr=0.01)
tasks = SinusoidGenerator(num_support=5, num_query=5)
losses = [float(model.metatrain_step(tasks.batch('train', i, 4))) for i in range(3)]
test = tasks.batch('test', 0, 1)
Learner(model).adapt(test.inputa, test.labela)
print(fewshot.__file__, maml.__file__, losses == losses)
import fewshot.data.cifar100
"""


@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path):
    """Installed elsewhere, in a folder with a utils.py and a main.py of the user's."""
    source, installed, here = (tmp_path / name for name in ('source', 'installed', 'here'))
    names = ['setup.py', 'maml.py', 'data_generator.py', 'special_grads.py', 'main.py', 'utils.py']
    source.mkdir()
    for name in names:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / 'fewshot', source / 'fewshot')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run(
        [*pip, 'wheel', '.', '--no-deps', f'--wheel-dir={tmp_path}'], cwd=source, check=True
    )
    (wheel,) = tmp_path.glob('*.whl')
    files = zipfile.ZipFile(wheel).namelist()
    assert not {'main.py', 'utils.py'} & {*files}
    assert {'maml.py', 'fewshot/use/demo_pad.js', 'fewshot/data/cifar100_splits.json'} <= {*files}
    subprocess.run([*pip, 'install', '--no-deps', f'--target={installed}', wheel], check=True)
    here.mkdir()
    for name in ('utils', 'main'):
        (here / f'{name}.py').write_text('raise ImportError("this one is the user\'s own")\n')
    more = {'env': os.environ | {'PYTHONPATH': str(installed)}, 'cwd': here}
    line = [sys.executable, '-B', '-c', TRAINING]
    done = subprocess.run(line, **more, capture_output=True, text=True, timeout=600)
    own = installed / 'fewshot/__init__.py', installed / 'maml.py', True
    assert done.stdout.split() == [*map(str, own)], done.stderr
