"""--strategy: the same weights from one device, two of a process, and two processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from command_line import ROOT, assert_refused, command, make_omniglot, run, succeeded

from data_generator import Batch
from fewshot.engine.devices import Replicas
from fewshot.runs.checkpoints import checkpoints
from fewshot.runs.results import read_evaluation
from scripts.launch_workers import free_ports

LAUNCH = 'scripts/launch_workers.py'
TWO_DEVICES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main
from fewshot.runs.flags import define_flags
import tensorflow as tf
from absl import app
cpu, = tf.config.list_physical_devices('CPU')
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
define_flags()
app.run(main.program)
"""


@pytest.fixture(scope='module')
def flags(tmp_path_factory) -> list[str]:
    """A network with a normalisation, one that starts fast, and 20 iterations of it."""
    data = make_omniglot(tmp_path_factory.mktemp('scale'))
    source = ['--datasource=omniglot', f'--data_dir={data}', '--num_classes=2']
    # Two shares of 16 tasks, on one device and on two.
    tasks = ['--update_batch_size=1', '--meta_batch_size=32', '--num_filters=8']
    return [*source, *tasks, '--update_lr=0.4', '--metatrain_iterations=20']


def two_devices(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, '-B', '-c', TWO_DEVICES, *arguments, '--strategy=mirrored']
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


def stored(logdir: Path) -> dict[str, np.ndarray]:
    """All variables of the newest checkpoint."""
    (folder,) = logdir.iterdir()
    reader = tf.train.load_checkpoint([*checkpoints(folder).values()][-1])
    names = reader.get_variable_to_shape_map()
    parts = ('weights', 'norms', 'rates', 'metatrain')
    return {name: reader.get_tensor(name) for name in names if name.startswith(parts)}


def assert_close(logdir: Path, other: Path, tolerance: float = 1e-5):
    ours, theirs = stored(logdir), stored(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.linalg.norm(value - theirs[name]) <= tolerance * np.linalg.norm(value), name


def means(logdir: Path) -> np.ndarray:
    """Of the one evaluation in the one folder: [1 + updates]."""
    (path,) = logdir.glob('*/*.csv')
    return read_evaluation(path)[0]


@pytest.mark.slow
@pytest.mark.parametrize('conv', [False, True])
def test_one_device_two_devices_two_workers(flags, tmp_path, conv):
    """They end with the same weights; one of them prints and writes."""
    flags = [*flags, f'--conv={conv}']
    succeeded(command('main.py', *flags, f'--logdir={tmp_path}/one'))
    mirrored = two_devices(*flags, f'--logdir={tmp_path}/mirrored')
    assert mirrored.returncode == 0, mirrored.stderr[-2000:]
    workers = succeeded(command(LAUNCH, '2', '--', *flags, f'--logdir={tmp_path}/workers'))
    assert workers.out.count('Done initializing') == 1  # one of them prints
    for other in 'mirrored', 'workers':
        assert_close(tmp_path / 'one', tmp_path / other)
    assert len([*tmp_path.glob('workers/*/events*')]) == 1


@pytest.mark.slow
def test_evaluation_is_shared(flags, tmp_path):
    succeeded(command('main.py', *flags, f'--logdir={tmp_path}/one'))
    shutil.copytree(tmp_path / 'one', tmp_path / 'mirrored')
    succeeded(command('main.py', *flags, '--train=False', f'--logdir={tmp_path}/one'))
    evaluated = two_devices(*flags, '--train=False', f'--logdir={tmp_path}/mirrored')
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    np.testing.assert_allclose(means(tmp_path / 'one'), means(tmp_path / 'mirrored'), rtol=1e-5)


@pytest.mark.slow
def test_resume_across_strategies(flags, tmp_path):
    """One run that each strategy takes a part of ends as one that was not interrupted."""
    start = [flag for flag in flags if 'iterations' not in flag]
    succeeded(command('main.py', *start, '--metatrain_iterations=16', f'--logdir={tmp_path}/whole'))
    parts = f'--logdir={tmp_path}/parts'
    succeeded(command('main.py', *start, '--metatrain_iterations=4', parts))
    assert two_devices(*start, '--metatrain_iterations=8', parts).returncode == 0
    continued = succeeded(command(LAUNCH, '2', '--', *start, '--metatrain_iterations=12', parts))
    assert 'Continuing at iteration 8 of 12.' in continued.lines
    succeeded(command('main.py', *start, '--metatrain_iterations=16', parts))
    assert_close(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.slow
@pytest.mark.parametrize('more', ['--update_batch_size=5', '--pretrain_iterations=150'])
def test_sinusoids_too(more, tmp_path):
    """Whose steps are many to a program on one device."""
    line = ['--datasource=sinusoid', '--norm=None', '--meta_batch_size=8', more]
    line += ['--metatrain_iterations=300']
    succeeded(command('main.py', *line, f'--logdir={tmp_path}/one'))
    assert two_devices(*line, f'--logdir={tmp_path}/two').returncode == 0
    assert_close(tmp_path / 'one', tmp_path / 'two', 1e-3)  # rounding grows over as many iterations


def children(process: subprocess.Popen) -> list[int]:
    listed = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    return [int(pid) for pid in listed.split()]


def launched(*arguments: str) -> subprocess.Popen:
    """Two workers with these flags."""
    line = [sys.executable, '-B', ROOT / LAUNCH, '2', '--', *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def longer(flags: list[str], iterations: int) -> list[str]:
    rest = [flag for flag in flags if 'iterations' not in flag]
    return [*rest, '--conv=False', f'--metatrain_iterations={iterations}']


def wait_for(folder: Path, pattern: str, process: subprocess.Popen):
    deadline = time.monotonic() + 300
    while not [*folder.glob(pattern)]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc to find the workers')
def test_a_worker_is_killed(flags, tmp_path):
    """kill -9 of the second: the first says so and ends; started again, they end as if it lived."""
    line = longer(flags, 2500)
    succeeded(command(LAUNCH, '2', '--', *line, f'--logdir={tmp_path}/whole'))
    process = launched(*line, f'--logdir={tmp_path}/killed')
    wait_for(tmp_path, 'killed/*/model1000.index', process)
    os.kill(children(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    sentence = r'main\.py: worker 0 lost another one \(.*start all of them again'
    assert process.returncode != 0 and re.search(sentence, err), err[-2000:]
    assert 'Traceback' not in err
    (folder,) = (tmp_path / 'killed').iterdir()
    assert max(checkpoints(folder)) < 2499
    again = succeeded(command(LAUNCH, '2', '--', *line, f'--logdir={tmp_path}/killed'))
    assert 'Continuing at iteration' in again.out
    assert_close(tmp_path / 'whole', tmp_path / 'killed', 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc to find the workers')
def test_a_signal_stops_all_workers(flags, tmp_path):
    """SIGTERM to the second alone: both stop after the same iteration, and the run is saved."""
    process = launched(*longer(flags, 100000), f'--logdir={tmp_path}/logs')
    wait_for(tmp_path, 'logs/*/model1000.index', process)
    os.kill(children(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    sentence = r'Saved .*; the same command continues at iteration'
    assert process.returncode == 143 and re.search(sentence, out), err[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc to find the workers')
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_launcher(flags, tmp_path, number):
    """A signal is passed on; where it cannot be, nobody trains on unwatched."""
    process = launched(*longer(flags, 100000), f'--logdir={tmp_path}/logs')
    wait_for(tmp_path, 'logs/*/model1000.index', process)
    workers = children(process)
    process.send_signal(number)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f'/proc/{worker}').exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (folder,) = (tmp_path / 'logs').iterdir()
    assert max(checkpoints(folder)) % 1000  # that of the iteration in which they were told


@pytest.mark.slow
def test_a_chief_is_the_first(flags, tmp_path):
    """And a cluster of a chief and a worker trains as one of two workers."""
    succeeded(command(LAUNCH, '2', '--', *flags, f'--logdir={tmp_path}/workers'))
    first, second = free_ports(2)
    cluster = {'chief': [f'127.0.0.1:{first}'], 'worker': [f'127.0.0.1:{second}']}
    line = [sys.executable, '-B', ROOT / 'main.py', *flags, '--strategy=multi_worker']
    processes = []
    for kind in cluster:
        config = json.dumps({'cluster': cluster, 'task': {'type': kind, 'index': 0}})
        given = {'env': {**os.environ, 'TF_CONFIG': config}, 'stderr': subprocess.PIPE}
        processes.append(subprocess.Popen([*line, f'--logdir={tmp_path}/chief'], **given))
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert_close(tmp_path / 'workers', tmp_path / 'chief', 0)


# Without other processes --------------------------------------------------------------------------


def test_one_device_is_no_strategy():
    replicas, batch = Replicas(), Batch(*np.ones([4, 2, 3, 1]))
    assert replicas.place(batch) is batch and replicas.is_chief
    assert replicas.slice_of(6) == slice(0, 6)
    assert replicas.any(True, 1) and not replicas.any(False, 1)
    assert replicas.agree([1, 2]) == [1, 2]
    assert replicas.mean(lambda share: share, batch) is batch
    assert replicas.gather(len, batch) == 4


class FourWorkers(Replicas):
    """The third of four processes with two devices each."""

    def __init__(self):
        self.strategy, self.count, self.local, self.process = object(), 8, 2, 2


def test_shares_of_the_tasks():
    assert FourWorkers().slice_of(32) == slice(16, 24)
    sentence = 'tasks cannot be shared equally by 8 replicas: make it a multiple of 8'
    with pytest.raises(ValueError, match=f'--meta_batch_size=25 {sentence}'):
        FourWorkers().slice_of(25)


PS = '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}'
EVALUATOR = '{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}'


@pytest.mark.parametrize(
    'config, words',
    [
        (None, 'needs TF_CONFIG'),
        ('none', 'gives no cluster'),
        (PS, 'TF_CONFIG names ps, but only a chief and workers train here'),
        (EVALUATOR, 'TF_CONFIG names evaluator, but'),
    ],
)
def test_no_cluster(monkeypatch, tmp_path, config, words):
    monkeypatch.delenv('TF_CONFIG', raising=False)
    if config:
        monkeypatch.setenv('TF_CONFIG', config)
    assert_refused(run('--strategy=multi_worker', f'--logdir={tmp_path}'), 'main.py: ', words)


@pytest.mark.slow
def test_tasks_that_two_devices_cannot_share(flags, tmp_path):
    outcome = two_devices(*flags, '--meta_batch_size=25', f'--logdir={tmp_path}')
    assert outcome.returncode == 1 and 'multiple of 2' in outcome.stderr.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_launcher_refuses():
    assert_refused(command(LAUNCH, '0'), 'N must be at least 1')
    outcome = command(LAUNCH, '2', '--', '--num_classes=0', '--datasource=omniglot')
    assert outcome.status == 1 and '--num_classes must be at least 1' in outcome.err
