"""What happens to a run when the machine, the disk or the user does something unforeseen.

The fast tests call main.py in this process; the slow ones start it, kill it, and look.
"""

import contextlib
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from command_line import (
    ROOT,
    Outcome,
    Stop,
    assert_refused,
    listing,
    make_omniglot,
    parsed,
    run,
    running_eagerly,
    settle,
    succeeded,
)
from tensorboard.plugins.hparams.metadata import (
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)
from test_checkpoints import assert_same, contents

from fewshot.runs.checkpoints import checkpoints, read_run_state
from fewshot.runs.flags import run_name
from fewshot.runs.prepare import Options, prepare
from fewshot.runs.run_folder import lock_folder
from fewshot.runs.summaries import event_files, forget_summaries, read_events, read_scalars
from fewshot.runs.tasks import make_generators
from fewshot.runs.terminal import STOPPING, Signals, stopping_signals
from fewshot.runs.trainer import Schedule, Trainer, is_better
from fewshot.use.learner import Learner

SINUSOID = ['--norm=None', '--update_batch_size=5', '--meta_batch_size=4']
OMNIGLOT = [
    '--datasource=omniglot',
    '--num_classes=2',
    '--update_batch_size=1',
    '--meta_batch_size=2',
    '--norm=None',
    '--conv=False',
    '--validation_tasks=2',
]
INTERVALS = {
    'intervals': {'save': 1, 'summary': 20, 'validation': 50},
    'printing': 40,
}
SHORT_INTERVALS = {
    'intervals': {'save': 1, 'summary': 6, 'validation': 15},
    'printing': 12,
}
WITH_INTERVALS = """
import sys
sys.path.insert(0, {root!r})
from absl import app
import main
from fewshot.runs.flags import define_flags
define_flags()
options = main.TUNED._replace(**{intervals!r})
app.run(lambda arguments: main.program(arguments, options))
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_omniglot(tmp_path_factory.mktemp('omniglot'))


@pytest.fixture
def often(monkeypatch):
    """Everything that happens at intervals happens every few iterations."""
    settle(monkeypatch, **SHORT_INTERVALS)


def folder_of(logdir: Path, *arguments: str) -> Path:
    return logdir / run_name(parsed(*arguments))


def scalars(folder: Path) -> list[tuple]:
    """(step, tag, value) of a folder's summaries, by step and tag, repetitions included."""

    def content(value):
        if value.tag == SESSION_START_INFO_TAG:
            session = parse_session_start_info_plugin_data(value.metadata.plugin_data.content)
            return sorted((name, str(flag)) for name, flag in session.hparams.items())
        if value.tensor.dtype == tf.float32.as_datatype_enum:
            return float(tf.make_ndarray(value.tensor))
        return '' if value.tag == 'flags' else list(value.tensor.string_val)  # a picture's

    found = []
    for path in event_files(folder):
        for record in read_events(path):
            event = tf.compat.v1.Event.FromString(record)
            found += [(event.step, value.tag, content(value)) for value in event.summary.value]
    return sorted(found)


def assert_same_run(one: Path, other: Path, last: int):
    """The same weights, Adam's state, best checkpoint, run state and summaries, to the last bit."""
    assert_same(contents(one / f'model{last}'), contents(other / f'model{last}'))
    states = [read_run_state(str(folder / f'model{last}')) for folder in (one, other)]
    for state in states:
        state['flags'].pop('logdir')
    assert states[0] == states[1]
    assert [*checkpoints(one, 'best')] == [*checkpoints(other, 'best')]
    for iteration in checkpoints(one, 'best'):
        assert_same(contents(one / f'best{iteration}'), contents(other / f'best{iteration}'))
    assert scalars(one) == scalars(other)


# Continuing ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'number',
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_iteration_and_the_run_continues_exactly(
    tmp_path, eager, data, often, monkeypatch, number
):
    """Status 128 + signal, a checkpoint of that very iteration; printed lines go on, too."""
    settle(monkeypatch, intervals={'save': 1000})
    train = [*OMNIGLOT, f'--data_dir={data}', '--metatrain_iterations=35', '--original_output']
    once = succeeded(run(*train, f'--logdir={tmp_path}/once'))
    with monkeypatch.context() as patch:
        Stop(patch, number, 23)
        stopped = run(*train, f'--logdir={tmp_path}/often')
    folder = folder_of(tmp_path / 'often', *train)
    assert stopped.status == 128 + number and [*checkpoints(folder)] == [22]
    told = 'the same command continues at iteration 23 of 35.'
    assert f'Saved {folder}/model22; {told}' in stopped.out
    continued = succeeded(run(*train, f'--logdir={tmp_path}/often'))
    assert_same_run(folder_of(tmp_path / 'once', *train), folder, 34)

    def figures(lines):
        return [line for line in lines if re.match(r'Iteration \d+:|Validation|Accuracy', line)]

    assert figures(once.lines) == figures(stopped.lines + continued.lines)
    assert len(figures(once.lines)) == 6


def test_batch_systems_signals_stop_a_run(tmp_path, eager, monkeypatch):
    """As SIGTERM does."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        with monkeypatch.context() as patch:
            Stop(patch, number, 1)
            outcome = run(*SINUSOID, '--metatrain_iterations=3000', f'--logdir={tmp_path}/{number}')
        assert outcome.status == 128 + number and 'the same command continues' in outcome.out


def test_nohup_keeps_a_closed_terminal_from_stopping():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert {*stopping_signals()} == {*STOPPING} - {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stopping_signals()


def test_a_second_signal_stops_at_once(tmp_path, eager, monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, signal.SIGTERM, 1)
        Stop(patch, signal.SIGTERM, 1)
        outcome = run(*SINUSOID, '--metatrain_iterations=3000', f'--logdir={tmp_path}')
    assert outcome.status == 128 + signal.SIGTERM and not [*tmp_path.rglob('model*')]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_terminal_is_closed(tmp_path):
    """What would be printed has nowhere to go; the run is saved all the same."""
    flags = [*SINUSOID, '--metatrain_iterations=200000', f'--logdir={tmp_path}']
    folder = folder_of(tmp_path, *flags)
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, str(ROOT / 'main.py'), *flags])
    while not [*checkpoints(folder)]:
        os.read(terminal, 1000)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 128 + signal.SIGHUP and 1000 <= max(checkpoints(folder)) < 199999


def test_nohup():
    """It has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_summaries_of_a_process_that_died(tmp_path):
    """Those of later iterations than the checkpoint, and half a record, go; the others stay."""
    for steps in ((0, 1, 2), (3, 4), (5,)):
        writer = tf.summary.create_file_writer(str(tmp_path), filename_suffix=f'.{steps[0]}')
        with writer.as_default():
            for step in steps:
                tf.summary.scalar('x', step, step=step)
        writer.close()
    first, second, third = sorted(event_files(tmp_path), key=lambda path: path.suffix)
    before = first.read_bytes()
    second.write_bytes(second.read_bytes()[:-3])
    forget_summaries(tmp_path, 4)
    assert scalars(tmp_path) == [(i, 'x', float(i)) for i in (0, 1, 2, 3)]
    assert first.read_bytes() == before and not third.exists() and not [*tmp_path.glob('part.*')]


def test_leftovers_of_a_process_that_died(tmp_path, eager):
    train = [*SINUSOID, '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=2'))
    folder = folder_of(tmp_path, *train)
    left = ['model9.data-00000-of-00001', 'model1.index.tempstate77']
    left += ['best3.data-00000-of-00001.tempstate12']
    kept = ['notes.data-00000-of-00001', 'my.txt']
    for name in left + kept:
        (folder / name).write_text('x')
    succeeded(run(*train, '--metatrain_iterations=3'))
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left) and set(kept) <= names


@pytest.mark.slow
def test_a_trainer_that_tells_nothing(tmp_path, eager, data):
    """It trains, validates and saves as one with a log."""
    train = [*OMNIGLOT, f'--data_dir={data}', '--metatrain_iterations=4', '--log=False']
    f = parsed(*train, f'--logdir={tmp_path}/silent')
    with contextlib.ExitStack() as held:
        model, sources, silent, *_ = prepare(f, held, Options(compiled=False))
    schedule = Schedule(0, 4, summary=1, validation=2, save=2)
    trainer = Trainer(model, sources, 2, schedule, silent, validation_tasks=2)
    assert trainer.run() == 4
    intervals = {'summary': 1, 'validation': 2, 'save': 2}
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, intervals=intervals)
        succeeded(run(*train, f'--logdir={tmp_path}/told'))
    told = folder_of(tmp_path / 'told', *train)
    for kind in ('model', 'best'):
        assert [*checkpoints(silent, kind)] == [*checkpoints(told, kind)] != []
        for name in checkpoints(silent, kind):
            assert_same(contents(silent / f'{kind}{name}'), contents(told / f'{kind}{name}'))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, words',
    [
        (['--meta_lr=.01'], ['--meta_lr=0.001 (now 0.01)']),
        (['--pretrain_iterations=5'], ['--pretrain_iterations=0 (now 5)']),
        (['--num_classes=5', '--meta_lr=.1'], ['--meta_lr=0.001 (now 0.1)']),
    ],
)
def test_flags_that_contradict_the_run(tmp_path, eager, change, words):
    train = [*SINUSOID, '--num_classes=5', '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=2'))
    before = listing(tmp_path)
    outcome = run(*train, '--metatrain_iterations=4', *change)
    assert_refused(outcome, 'was trained with', *words, 'or another --logdir')
    assert listing(tmp_path) == before
    succeeded(run(*train, '--train=False', '--seed=1'))  # of no consequence for evaluation
    succeeded(run(*train, '--metatrain_iterations=4', '--validation_tasks=100'))


def test_longer_joint_training(tmp_path, eager):
    """It may be made longer, with the same weights as in one go, until meta-training begins."""
    joint = [*SINUSOID, '--log=False', '--metatrain_iterations=0']
    for logdir, lengths in ('whole', [4]), ('parts', [2, 4]):
        for length in lengths:
            flags = [f'--pretrain_iterations={length}', f'--logdir={tmp_path}/{logdir}']
            outcome = succeeded(run(*joint, *flags))
    assert 'Continuing at iteration 2 of 4.' in outcome.lines
    folders = [folder_of(tmp_path / logdir, *joint) for logdir in ('whole', 'parts')]
    whole, parts = (Learner.load(folder).model.weights for folder in folders)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value)
    more = ['--metatrain_iterations=2', f'--logdir={tmp_path}/parts', *SINUSOID, '--log=False']
    succeeded(run(*more, '--pretrain_iterations=4'))
    assert_refused(run(*more, '--pretrain_iterations=6'), '--pretrain_iterations=4 (now 6)')


def test_another_network_in_evaluation(tmp_path, eager, data):
    """The name of the run tells nothing of the source; the checkpoint does."""
    train = [*OMNIGLOT, f'--data_dir={data}', '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=1'))
    evaluate = [*train, '--train=False']
    assert_refused(run(*evaluate, '--conv=True'), '--conv=False (now True)')
    outcome = run(*evaluate, '--datasource=sinusoid')
    assert_refused(outcome, '--datasource=omniglot (now sinusoid)')


def test_two_processes_on_one_folder(tmp_path, eager):
    """The second may evaluate, not train."""
    train = [*SINUSOID, '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=2'))
    folder = folder_of(tmp_path, *train)
    before = listing(tmp_path)
    with contextlib.ExitStack() as held:
        lock_folder(folder, held)
        for more in ([], ['--resume=False', '--overwrite']):
            outcome = run(*train, '--metatrain_iterations=4', *more)
            assert_refused(outcome, f'{folder} is in use by another process')
        assert listing(tmp_path) == before
        succeeded(run(*train, '--train=False'))
    succeeded(run(*train, '--metatrain_iterations=4'))


NO_COUNTS = ('0', '-1', 'x', '1.5', '', '1e3')
# {flags: values that none of them takes}
BAD_VALUES = {
    'num_classes meta_batch_size update_batch_size num_updates num_filters': NO_COUNTS,
    'meta_lr update_lr': ('nan', 'inf', '-inf', '-1', 'x', ''),
    'metatrain_iterations pretrain_iterations seed': ('-1', 'x', '2.5', ''),
    'train log resume conv max_pool stop_grad test_set overwrite': ('perhaps',),
    'datasource norm baseline': ('x', '', 'NONE'),
    'test_iter': ('-2', 'last', '1.5', ''),
    'validation_tasks': ('0', '1', 'x'),
}
MALFORMED = [
    f'--{name}={value}'
    for names, values in BAD_VALUES.items()
    for name in names.split()
    for value in values
]
MALFORMED += [
    '--no_such_flag=1',
    '-x',
    'train',
    '--metatrain_iterations=0',
    '--overwrite',
    '--overwrite --resume=False --train=False',
    '--test_iter=best',
    '--test_iter=best --train=False',
    '--train=False',
    '--train=False --test_iter=3',
    '--test_iter=3',
    '--train_update_lr=1',
    '--train_update_batch_size=2',
    '--train=False --train_update_lr=-2',
    '--datasource=omniglot --baseline=oracle',
    '--datasource=omniglot --data_dir=/nowhere',
    '--datasource=miniimagenet --data_dir=',
    '--datasource=omniglot --data_dir=/dev/null',
    '--logdir=/dev/null/x',
    '--logdir=/proc/x',
]


def test_how_many_malformed_command_lines():
    assert len(set(MALFORMED)) >= 80


@pytest.mark.parametrize('line', MALFORMED)
def test_malformed_command_line(tmp_path, eager, line):
    """One sentence that names the culprit, and nothing on the disk."""
    try:
        outcome = run(*SINUSOID[:1], f'--logdir={tmp_path}/logs', *line.split(' '))
    except flags.Error as error:  # absl prints it and exits with 1
        outcome = Outcome(1, '', f'{error}\n')
    assert_refused(outcome)
    culprit = re.match(r'-*([a-z_]*)', line.split(' ')[-1])[1]
    named = culprit in outcome.err.strip().splitlines()[-1]
    others = 'holds no checkpoint|nothing to train|there is no folder'
    assert named or re.search(others, outcome.err)
    assert not [*tmp_path.iterdir()]


# Failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('source', [SINUSOID, OMNIGLOT], ids=['sinusoid', 'omniglot'])
def test_loss_that_is_no_number(tmp_path, eager, data, often, source):
    """The run names the iteration and the checkpoint before it, in which all numbers are finite."""
    train = [*source, f'--data_dir={data}', '--log=False', f'--logdir={tmp_path}']
    train += ['--metatrain_iterations=50', '--meta_lr=1e30']
    outcome = run(*train)
    assert_refused(outcome, 'so training has stopped', 'Try a smaller --update_lr or --meta_lr')
    told = re.search(r'in iteration (\d+)|after iteration (\d+)', outcome.err)
    folder = folder_of(tmp_path, *train)
    saved = max(checkpoints(folder), default=-1)
    assert told and saved < int(told[1] or told[2])
    if saved >= 0:
        assert f'{folder}/model{saved} is the last good checkpoint' in outcome.err
        for value in contents(folder / f'model{saved}').values():
            assert np.isfinite(value).all()
    else:
        assert 'there is no checkpoint yet' in outcome.err


@pytest.mark.slow
def test_best_checkpoint(tmp_path, eager, data, often):
    """That of the best validation, the earliest of equals; --test_iter=best evaluates it.

    Its results stand beside those of the last.
    """
    train = [*OMNIGLOT, f'--data_dir={data}', f'--logdir={tmp_path}']
    train += ['--metatrain_iterations=46', '--meta_lr=.01', '--conv=False']
    train += ['--validation_tasks=20', '--original_output']
    outcome = succeeded(run(*train))
    found = re.findall(r'^Validation results: \S+, (\S+)\n.*: ([\d.]+) % \+-', outcome.out, re.M)
    assert all(shown == f'{100 * float(exact):.1f}' for exact, shown in found)
    printed = (round(float(exact), 4) for exact, _ in found)
    accuracies = dict(zip((15, 30, 45), printed, strict=True))
    best = max(accuracies, key=accuracies.get)
    folder = folder_of(tmp_path, *train)
    assert [*checkpoints(folder, 'best')] == [best]
    state = read_run_state(str(folder / 'model45'))['best']
    assert state['iteration'] == best
    assert round(state['accuracy'], 4) == accuracies[best]
    accuracy = 'metaval_Post-update_accuracy__step_1'
    written = {step: round(value, 4) for step, tag, value in scalars(folder) if tag == accuracy}
    assert written == accuracies
    outcome = succeeded(run(*train, '--train=False', '--test_iter=best'))
    assert f'{folder}/best{best}' in outcome.lines[0]
    assert (folder / 'test_ubs1_stepsize0.001_val_best.csv').exists()
    succeeded(run(*train, '--train=False'))
    assert (folder / 'test_ubs1_stepsize0.001_val.csv').exists()


def test_event_files_that_are_none(tmp_path):
    """What is no event is where the reading ends; a folder of such a name is none."""
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        tf.summary.scalar('loss', 0.5, step=7)
    writer.close()
    with tf.io.TFRecordWriter(f'{tmp_path}/events.out.tfevents.1.x') as other:
        other.write(b'\xff no event')
    (tmp_path / 'events.out.tfevents.2.y').write_bytes(b'no record')
    (tmp_path / 'events.out.tfevents.3.z').mkdir()
    assert read_scalars(tmp_path) == {'loss': {7: 0.5}}
    forget_summaries(tmp_path, 8)
    assert read_scalars(tmp_path) == {'loss': {7: 0.5}} and len(event_files(tmp_path)) == 1


WILD_TASKS = """
import pathlib
import numpy as np

class Tasks:
    validates = True

    def batch(self, split, iteration, num_tasks):
        wild = split == 'val' and pathlib.Path(__file__).with_name('wild').exists()
        x = np.linspace(-1, 1, 4 * num_tasks).reshape(num_tasks, 4, 1)
        y = 1e30 * x if wild else x
        return {'inputa': x, 'labela': y, 'inputb': x, 'labelb': y}
"""


@pytest.mark.slow
def test_best_is_a_number(tmp_path, eager, often):
    """A validation that diverges is never the best, and the next that does not replaces none."""
    (tmp_path / 'tasks.py').write_text(WILD_TASKS)
    (tmp_path / 'wild').touch()
    train = [f'--datasource={tmp_path}/tasks.py:Tasks', '--norm=None', '--meta_batch_size=2']
    train += [f'--logdir={tmp_path}/logs', '--log=False', '--validation_tasks=2']
    outcome = succeeded(run(*train, '--metatrain_iterations=16'))
    folder = folder_of(tmp_path / 'logs', *train)
    assert re.search(r'tasks: (nan|inf) \+- nan, none was finite so far\.', outcome.out), outcome
    assert not checkpoints(folder, 'best')
    (tmp_path / 'wild').unlink()
    outcome = succeeded(run(*train, '--metatrain_iterations=31'))
    assert ', the best so far.' in outcome.out
    assert [*checkpoints(folder, 'best')] == [30]


@pytest.mark.parametrize(
    'objective, lower, higher', [('loss', True, False), ('accuracy', False, True)]
)
def test_better(objective, lower, higher):
    """As an older checkpoint may hold a best validation that is none, it is replaced."""
    assert is_better(0.5, 0.6, objective) == lower and is_better(0.6, 0.5, objective) == higher
    for none in (np.nan, np.inf):
        assert is_better(0.5, none, objective) and not is_better(none, 0.5, objective)
        assert not is_better(none, none, objective) and not is_better(0.5, 0.5, objective)


def test_no_best_checkpoint_yet(tmp_path, eager):
    train = [*SINUSOID, '--log=False', f'--logdir={tmp_path}']
    succeeded(run(*train, '--metatrain_iterations=1'))
    outcome = run(*train, '--train=False', '--test_iter=best')
    assert_refused(outcome, 'no best checkpoint', 'iteration 500')


def test_image_that_becomes_unreadable(tmp_path, eager):
    data = make_omniglot(tmp_path / 'data')
    train = [*OMNIGLOT, f'--data_dir={data}', '--log=False', f'--logdir={tmp_path}/logs']
    succeeded(run(*train, '--metatrain_iterations=1'))
    image = data / 'omniglot_resized/Alphabet1/character05/0005_01.png'
    image.write_bytes(image.read_bytes()[:50])
    outcome = run(*train, '--metatrain_iterations=2')
    assert_refused(outcome, 'character05/0005_01.png cannot be decoded')


# Damage -------------------------------------------------------------------------------------------


def spoil(folder: Path, names: list[str], dice: random.Random) -> str:
    """Cuts, empties, flips bits of, removes or swaps one file at random. Returns what was done."""
    path = folder / dice.choice(names)
    how = dice.choice(['cut', 'flip', 'flips', 'empty', 'remove', 'swap', 'garbage'])
    content = bytearray(path.read_bytes())
    if how == 'remove':
        path.unlink()
    elif how == 'swap':
        other = folder / dice.choice([name for name in names if name != path.name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        for _ in range({'flip': 1, 'flips': 8}.get(how, 0) if content else 0):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        if how == 'cut':
            content = content[: dice.randrange(len(content) + 1)]
        path.write_bytes({'empty': b'', 'garbage': dice.randbytes(len(content))}.get(how, content))
    return f'{how} {path.name}'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(logdir of a run with three checkpoints, {iteration: what its evaluation prints})."""
    logdir = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch, running_eagerly(patch):
        settle(patch, intervals={'save': 1})
        train = [*SINUSOID, '--log=False', f'--logdir={logdir}', '--meta_lr=.1']
        succeeded(run(*train, '--metatrain_iterations=4'))
        found = checkpoints(folder_of(logdir, *train))
        values = {i: evaluated(*train, f'--test_iter={i}')[1] for i in found}
    assert len(values) == 3 and len(set(values.values())) == 3
    return logdir, values


def evaluated(*arguments: str) -> tuple[Outcome, str]:
    """An evaluation, and the figures it printed."""
    outcome = run(*arguments, '--train=False')
    return outcome, outcome.out.partition('interval\n')[2].rpartition('Wrote')[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    'seeds',
    [range(30), pytest.param(range(30, 140), marks=pytest.mark.slow)],
    ids=['30', '110 more'],
)
def test_damaged_checkpoints_at_random(tmp_path, eager, trained, seeds):
    """The newest whole checkpoint is used, with a warning if it is not the newest, or none is."""
    logdir, values = trained
    for seed in seeds:
        dice, copy = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(logdir, copy)
        train = [*SINUSOID, '--log=False', f'--logdir={copy}', '--meta_lr=.1']
        folder = folder_of(copy, *train)
        files, done = [path.name for path in folder.glob('model*')], []
        for _ in range(dice.choice([1, 1, 2, 4])):
            done += [spoil(folder, [name for name in files if (folder / name).exists()], dice)]
        outcome, figures = evaluated(*train)
        assert 'Traceback' not in outcome.err, (seed, done)
        if outcome.status:
            assert_refused(outcome)
            continue
        used = int(re.search(r'model(\d+)\n', outcome.out)[1])
        assert figures == values[used], (seed, done)
        newer = [i for i in checkpoints(folder) if i > used]
        warnings = outcome.err.count('the one before it is used')
        assert len(newer) == warnings, (seed, done, outcome.err)
        assert not newer or max(newer) <= 3


def test_damaged_caches_at_random(tmp_path, eager, data, seeds=range(60)):
    """Decoded images whose checksums are wrong are decoded again: the tasks are always the same."""
    source = make_omniglot(tmp_path / 'data')
    train = [*OMNIGLOT, f'--data_dir={source}', '--log=False', '--metatrain_iterations=1']

    def draw():
        return make_generators(parsed(*train))['train'].batch('train', 0, 4)

    expected = draw()
    for seed in seeds:
        dice = random.Random(seed)
        (source / 'other').write_bytes(b'another file')
        spoil(source, ['omniglot_resized.cache.npy', 'other'], dice)
        for one, other in zip(draw(), expected):
            np.testing.assert_array_equal(one, other)


# Killed, and out of space: processes of their own -------------------------------------------------


class Process:
    """main.py with short intervals in a process of its own."""

    def __init__(self, *arguments: str, intervals: dict = INTERVALS, **more):
        code = WITH_INTERVALS.format(root=str(ROOT), intervals=intervals)
        line = [sys.executable, '-B', '-c', code, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, **more)

    def kill_after(self, text: str, seconds: float) -> bool:
        """Kills it some seconds after it printed a text. Returns whether it was still alive."""
        for line in self.process.stdout:
            if text in line:
                break
        time.sleep(seconds)
        alive = self.process.poll() is None
        self.process.kill()
        self.process.communicate()
        return alive

    def finish(self) -> Outcome:
        out, err = self.process.communicate(timeout=600)
        return Outcome(self.process.returncode, out, err)


def killed_again_and_again(train: list[str], kills: int, seconds: float, intervals: dict) -> int:
    """Kills a run at random moments, `kills` times, and lets it finish. Returns how many hit it."""
    dice, hits = random.Random(0), 0
    for _ in range(kills):
        text = dice.choice(['starting training', *3 * ['Compiled in']])
        hits += Process(*train, intervals=intervals).kill_after(text, dice.uniform(0, seconds))
    succeeded(Process(*train, intervals=intervals).finish())
    return hits


@pytest.mark.slow
def test_fifty_kills_of_an_omniglot_run(tmp_path, data):
    """Also while a checkpoint is being written, since one is every iteration."""
    train = [*OMNIGLOT, f'--data_dir={data}', '--metatrain_iterations=1500', '--meta_lr=.003']
    succeeded(Process(*train, f'--logdir={tmp_path}/once').finish())
    hits = killed_again_and_again([*train, f'--logdir={tmp_path}/often'], 50, 0.9, INTERVALS)
    assert hits >= 45
    once, often = (folder_of(tmp_path / name, *train) for name in ('once', 'often'))
    assert_same_run(once, often, 1499)


@pytest.mark.slow
def test_ten_kills_of_a_sinusoid_run(tmp_path):
    train = ['--norm=None', '--update_batch_size=10', '--metatrain_iterations=40000']
    succeeded(Process(*train, f'--logdir={tmp_path}/once', intervals={}).finish())
    hits = killed_again_and_again([*train, f'--logdir={tmp_path}/often'], 10, 1.2, {})
    assert hits >= 8
    once, often = (folder_of(tmp_path / name, *train) for name in ('once', 'often'))
    assert_same_run(once, often, 39999)


@pytest.mark.slow
def test_two_processes_with_one_seed(tmp_path, data):
    """The same weights to the last bit; another seed gives others."""
    train = [*OMNIGLOT, f'--data_dir={data}', '--metatrain_iterations=120']
    found = []
    for name, seed in [('a', 7), ('b', 7), ('c', 8)]:
        flags = [*train, f'--seed={seed}']
        succeeded(Process(*flags, f'--logdir={tmp_path}/{name}').finish())
        found.append(contents(folder_of(tmp_path / name, *flags) / 'model119'))
    a, b, c = found
    assert_same(a, b)
    assert any((a[key] != c[key]).any() for key in a)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 10 MB if this user may mount one, else a limit of the size of files.

    Yields the folder, and arguments for Popen.
    """
    folder = tmp_path / 'disk'
    folder.mkdir()
    line = ['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', folder]
    mounted = subprocess.run(line, capture_output=True).returncode == 0

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))

    yield folder, {} if mounted else {'preexec_fn': limit}
    if mounted:
        subprocess.run(['umount', folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize('most', [4096, 20480])
def test_files_of_limited_size(tmp_path, most):
    """As a full disk: of the summaries the first, of the checkpoints the second."""
    limits = {'preexec_fn': lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))}
    outcome = Process(*SINUSOID, '--log=True', f'--logdir={tmp_path}', **limits).finish()
    assert_refused(outcome, 'cannot be written', 'File too large')
    assert '{{' not in outcome.err and not [*tmp_path.rglob('*_temp')]


@pytest.mark.slow
def test_full_disk(tmp_path, data, small_disk):
    """A sentence; what was saved before can be read, and evaluated."""
    folder, limits = small_disk
    train = [*OMNIGLOT[:-2], '--conv=True', '--norm=batch_norm']
    train += [f'--data_dir={data}', f'--logdir={folder}']
    outcome = Process(*train, '--metatrain_iterations=2000', **limits).finish()
    assert_refused(outcome, 'cannot be written')
    found = checkpoints(folder_of(folder, *train))
    assert (found or limits) and not [*folder.rglob('*tempstate*')]
    for path in found.values():
        contents(path)


def memory() -> float:
    """Of this process, in MB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    not Path('/proc/self/statm').exists(), reason='the system does not tell the memory of a process'
)
def test_memory_of_100000_iterations(tmp_path, monkeypatch):
    """It grows by less than 20 MB after warm-up, and nothing is traced again."""
    sizes, models, after = {}, [], Trainer.after

    def watched(run, first, *arguments):
        sizes[first], models[:] = memory(), [run.model]
        return after(run, first, *arguments)

    monkeypatch.setattr(Trainer, 'after', watched)
    flags = ['--norm=None', '--update_batch_size=10', '--metatrain_iterations=100000']
    succeeded(run(*flags, f'--logdir={tmp_path}'))
    warm = sizes[5000]
    growth = max(size for first, size in sizes.items() if first > 5000) - warm
    print(f'memory after 5,000 iterations {warm:.1f} MB, largest growth {growth:.1f} MB')
    assert growth < 20
    names = ('_steps', '_evaluate')
    programs = {name: getattr(models[0], name) for name in names}
    counts = {name: p.experimental_get_tracing_count() for name, p in programs.items()}
    assert counts == {'_steps': 1, '_evaluate': 1}
