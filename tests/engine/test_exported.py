"""A run that another runtime trains: the same losses and weights, there and back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from command_line import (
    ROOT,
    Outcome,
    assert_refused,
    command,
    in_process,
    make_omniglot,
    parsed,
    run,
    succeeded,
)

import special_grads
from fewshot.engine.export import Step, export_step, state_variables, sums_in_parts
from fewshot.engine.exported import (
    Training,
    load_source,
    load_step,
    read_signature,
    read_state,
    states,
)
from fewshot.networks.build import make_model
from fewshot.runs.checkpoints import read_run_state
from fewshot.runs.prepare import build_model
from fewshot.runs.run_folder import run_folder
from fewshot.runs.tasks import make_generators
from fewshot.runs.transfer import flags_of, write_folder
from scripts.device import train, transfer

pytest.importorskip('jax', reason="JAX is an extra: pip install -e '.[jax]'")

SINE = '--datasource=sinusoid --norm=None --update_batch_size=10 --meta_batch_size=8'.split()
IMAGES = '--datasource=omniglot --num_classes=2 --update_batch_size=1 --update_lr=0.4'.split()
IMAGES += ['--meta_batch_size=4', '--num_filters=8']
PLUS_PLUS = '--num_updates=2 --learn_lr=layer_step --norm_steps --loss_steps=all'.split()
PLUS_PLUS += '--loss_steps_iterations=3 --first_order_iterations=2 --meta_lr_decay=cosine'.split()


def exported(folder: Path, *arguments, iterations: int = 6) -> Path:
    given = [*arguments, f'--metatrain_iterations={iterations}']
    succeeded(in_process(transfer.main, ['export', str(folder), *given]))
    return folder


@pytest.fixture(scope='module')
def sine(tmp_path_factory) -> Path:
    """An exported run on sinusoids; tests that change it take a copy."""
    place = tmp_path_factory.mktemp('sine')
    return exported(place / 'out', *SINE, f'--logdir={place}/logs')


@pytest.fixture
def copied(sine, tmp_path) -> Path:
    return shutil.copytree(sine, tmp_path / 'out')


def trained(folder: Path, *arguments: str) -> Outcome:
    return in_process(train.main, [str(folder), *arguments])


def train_without(modules: list[str], *arguments) -> Outcome:
    """The script in a process that cannot import some modules."""
    script = ROOT / 'scripts/device/train.py'
    code = 'import runpy, sys; sys.argv[1:] = {}; sys.modules.update(dict.fromkeys({})); '
    code = code.format([*map(str, arguments)], modules)
    line = [sys.executable, '-B', '-c', f"{code}runpy.run_path('{script}', run_name='__main__')"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def weights(folder: Path, iteration: int) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(folder / f'model{iteration}'))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith('weights/')]
    return {name: reader.get_tensor(name) for name in names}


# The step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments',
    [
        pytest.param(SINE, id='sinusoid'),
        pytest.param(IMAGES, id='images', marks=pytest.mark.slow),
        pytest.param([*IMAGES, *PLUS_PLUS], id='plus_plus', marks=pytest.mark.slow),
    ],
)
def test_each_step_is_tensorflows(tmp_path, arguments):
    """From the same state, since rounding grows with every step where a ReLU has its corner."""
    data = make_omniglot(tmp_path / 'data')
    folder = exported(tmp_path / 'out', *arguments, f'--data_dir={data}')
    training = Training(folder)
    signature, state = training.signature, training.state
    model = build_model(flags_of(signature['run']['flags']), {})
    source, variables, step = load_source(folder, signature), state_variables(model), None
    assert {*state} == {*variables}
    for i in range(5):
        batch, program = source.batch('train', i, signature['tasks']), folder / 'step.mlir'
        step = step or load_step(program.read_text(), batch, state, signature['written'])
        for name, variable in variables.items():
            variable.assign(np.array(state[name]))
        loss, state = step(batch, state)
        np.testing.assert_allclose(loss, model.metatrain_step(batch), rtol=1e-5)
        for name, variable in variables.items():
            size = np.linalg.norm(variable.numpy())
            far = np.linalg.norm(variable.numpy() - state[name])
            assert far <= 1e-3 * size + 1e-6, (i, name, far, size)


def test_tasks_are_those_of_main(tmp_path):
    f = parsed(*IMAGES, f'--data_dir={make_omniglot(tmp_path / "data")}', '--seed=3')
    here = make_generators(f)['train']
    write_folder(tmp_path / 'out', Step('', {}, []), {'start': 0}, here)
    there = load_source(tmp_path / 'out', read_signature(tmp_path / 'out'))
    for one, other in zip(there.batch('train', 5, 4), here.batch('train', 5, 4)):
        np.testing.assert_array_equal(one, other)


def test_sums_in_parts_are_product_outer():
    """To the second order; rows are many enough for 60 parts of each of two tasks."""
    random = np.random.default_rng(0)
    shapes = (2, 1920, 3), (2, 1920, 4), (2, 3, 4)
    left, right, along = (tf.constant(random.standard_normal(shape)) for shape in shapes)

    @tf.function(jit_compile=True, autograph=False)
    def derivatives() -> list:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([left, right])
            outer = special_grads.product_outer(left, right)
            first = tape.gradient(tf.reduce_sum(along * outer**2), [left, right])
            total = tf.add_n([tf.reduce_sum(f**2) for f in first])
        return [outer, *first, *tape.gradient(total, [left, right])]

    with sums_in_parts():
        program = derivatives.experimental_get_compiler_ir()(stage='stablehlo')
        found = derivatives()
    assert 'optimization_barrier' in program and '<120x32x3xf64>' in program
    expected = derivatives.python_function()
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


# There and back -----------------------------------------------------------------------------------


def test_there_and_back(copied, tmp_path):
    """Without TensorFlow there; interrupted; and main.py continues, as if it had trained itself."""
    succeeded(train_without(['tensorflow', 'keras'], copied, '--save=2', '--keep=4'))
    assert [*states(copied)] == [0, 4, 6]
    out, here = tmp_path / 'back', tmp_path / 'here'
    succeeded(in_process(transfer.main, ['import', str(copied), str(out)]))
    place = run_folder(parsed(*SINE, f'--logdir={out}'))
    assert 'JAX' in read_run_state(f'{place}/model3')['machine']
    more = [*SINE, '--metatrain_iterations=8']
    for logdir in (out, here):
        succeeded(run(*SINE, '--metatrain_iterations=6', f'--logdir={logdir}'))
        succeeded(run(*more, f'--logdir={logdir}'))
    folders = [run_folder(parsed(*more, f'--logdir={logdir}')) for logdir in (out, here)]
    for iteration in (5, 7):
        one, other = (weights(folder, iteration) for folder in folders)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)
    evaluated = succeeded(run('--train=False', f'--run={folders[0]}', '--test_iter=3'))
    assert 'updates' in evaluated.out


def test_interrupted_training_goes_on(copied, sine, tmp_path):
    other = shutil.copytree(sine, tmp_path / 'other')
    training, asked = Training(copied, keep=6), []
    assert training.run(lambda: len(asked) == 2 or asked.append(1)) == 3
    assert [*states(copied)] == [0, 3]
    for folder in (copied, other):
        assert 'at 6 of 6' in succeeded(trained(folder)).out
    signature = training.signature
    one, two = (read_state(states(f)[6], signature)[0] for f in (copied, other))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.slow
def test_a_run_of_main_is_exported(tmp_path):
    """The export goes on from the newest checkpoint, and the import adds to the same folder."""
    given = [*SINE, f'--logdir={tmp_path}/logs']
    succeeded(run(*given, '--metatrain_iterations=3'))
    folder = exported(tmp_path / 'out', *given)
    assert [*states(folder)] == [3]
    succeeded(trained(folder))
    for _ in range(2):  # the second time nothing is new
        succeeded(in_process(transfer.main, ['import', str(folder)]))
    place = run_folder(parsed(*given))
    assert {path.name for path in place.glob('model*.index')} == {
        f'model{i}.index' for i in (2, 3, 4, 5)
    }
    assert 'complete' in succeeded(run(*given, '--metatrain_iterations=6')).out


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--pretrain_iterations=5'], 'joint training'),
        (['--train=False'], '--train=False'),
        (['--datasource=scripts/examples/curves.py:tasks'], 'tasks of your own'),
        (['--num_updats=2'], 'num_updats'),
        (['omniglot'], 'is no flag'),
        (['--datasource=omniglot', '--data_dir=/nowhere'], '/nowhere'),
        (['--update_lr=-1'], '--update_lr'),
    ],
)
def test_exports_that_are_refused(tmp_path, arguments, words):
    outcome = in_process(transfer.main, ['export', str(tmp_path / 'out'), *SINE, *arguments])
    assert_refused(outcome, 'transfer.py', words)
    assert not [*tmp_path.iterdir()]


def test_layers_that_are_not_trained_are_refused():
    class Frozen(tf.Module):
        parameters, norm_parameters = {'w': ('ones', (1, 1))}, {}
        dim_input = dim_output = 1
        reads_variables = True
        frozen = tf.Variable(2.0)

        def prepare(self, inputs, leading=None):
            return inputs

        def __call__(self, x, weights, norms, leading=None):
            return self.frozen * x @ weights['w']

    from data_generator import SinusoidGenerator

    model = make_model('sinusoid', network=Frozen())
    with pytest.raises(ValueError, match='not trained'):
        export_step(model, SinusoidGenerator(5, 5).batch('train', 0, 2))


def test_folders_that_are_refused(copied, sine, tmp_path):
    assert_refused(trained(tmp_path), 'no exported step')
    assert_refused(in_process(transfer.main, ['import', str(tmp_path)]), 'no exported step')
    assert_refused(in_process(transfer.main, ['import', str(copied)]), 'train first')
    assert_refused(in_process(transfer.main, ['export', str(copied), *SINE]), 'is there already')
    assert_refused(in_process(transfer.main, ['export']), 'export FOLDER')
    (copied / 'state0.npz').write_bytes(b'no state')
    assert_refused(trained(copied), 'state0.npz', 'remove it')
    for name in ('state0.npz', 'step.mlir'):
        (copied / name).unlink()
        assert_refused(trained(copied), name.replace('0', 'N'), 'export it again')


def test_states_of_other_flags_are_refused(copied):
    with np.load(copied / 'state0.npz') as stored:
        state = dict(stored)
    for other in ({'parameters/w1': state['parameters/w1'][:, 1:]}, {'parameters/w9': np.ones(3)}):
        np.savez(copied / 'state2.npz', **state | other)
        assert_refused(trained(copied), 'state2.npz', 'other flags')


def test_a_device_that_computes_something_else_is_refused(copied):
    signature = json.loads((copied / 'signature.json').read_text())
    (copied / 'signature.json').write_text(json.dumps(signature | {'loss': 1.001 * 3}))
    assert_refused(trained(copied), 'the first loss is', 'something else')
    assert [*states(copied)] == [0]


def test_divergence_is_told(copied):
    with np.load(copied / 'state0.npz') as stored:
        state = dict(stored)
    state['parameters/w1'] = state['parameters/w1'] * np.nan
    np.savez(copied / 'state2.npz', **state)
    assert_refused(trained(copied), 'not a number after 3', 'state2.npz', '--meta_lr')
    assert_refused(trained(copied, '--keep=6'), 'a loss is nan', 'state2.npz')


def test_a_run_that_went_on_by_itself_is_kept(copied, tmp_path):
    succeeded(trained(copied))
    place = run_folder(parsed(*SINE, f'--logdir={tmp_path}/logs'))
    place.mkdir(parents=True)
    (place / 'model8.index').touch()
    outcome = in_process(transfer.main, ['import', str(copied), f'{tmp_path}/logs'])
    assert_refused(outcome, 'trained on by itself', 'another LOGDIR')


def test_without_jax(copied):
    assert_refused(train_without(['jax'], copied), "pip install -e '.[jax]'")


@pytest.mark.slow
def test_typed_commands(tmp_path):
    folder = str(tmp_path / 'out')
    line = ['export', folder, *SINE, '--metatrain_iterations=3', f'--logdir={tmp_path}/logs']
    succeeded(command('scripts/device/transfer.py', *line))
    succeeded(command('scripts/device/train.py', folder))
    done = succeeded(command('scripts/device/transfer.py', 'import', folder))
    assert 'model2 is the newest checkpoint' in done.out


def test_other_runs_are_not_taken_for_this_one(copied, sine):
    """Neither does an export begin where a run is, nor an import keep another's checkpoint."""
    logs = sine.parent / 'other'
    own = [*SINE, f'--logdir={logs}', '--metatrain_iterations=6']
    succeeded(run(*own, '--meta_lr=0.5'))
    refused = in_process(
        transfer.main, ['export', str(sine.parent / 'new'), *own, '--resume=False']
    )
    assert_refused(refused, 'transfer.py', 'holds a run', '--overwrite')
    succeeded(trained(copied))
    outcome = in_process(transfer.main, ['import', str(copied), str(logs)])
    assert_refused(outcome, 'transfer.py', '--meta_lr=0.5 (now 0.001)', 'another --logdir')
