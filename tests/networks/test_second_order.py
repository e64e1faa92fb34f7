"""The audit of a Keras model's second derivatives, and functions out of the user's files."""

import contextlib
import re
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from command_line import ROOT, Outcome, assert_refused, command, in_process

import maml
from fewshot.networks import keras_network
from fewshot.runs.user_code import UserCodeError, user_function
from fewshot.use import second_order
from scripts.model import check_second_order

NETWORKS = ROOT / 'tests/networks.py'
NUMBER = r'-?\d+\.\d+(?:e[-+]\d+)?'


@pytest.fixture(autouse=True)
def uncompiled():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def audit(function: str, *arguments: str) -> Outcome:
    """Of a function in tests/networks.py, on small images."""
    line = [
        f'{NETWORKS}:{function}',
        '--input_shape=8,8,1',
        '--classes=3',
        '--examples=3',
        *arguments,
    ]
    return in_process(check_second_order.main, line)


def verdicts(outcome: Outcome) -> dict[str, str]:
    """{variable without its number: verdict}, and '': the last sentence."""
    found = {}
    for line in outcome.lines[1:-1]:
        match = re.fullmatch(rf'\d+/(\S+)(?: +{NUMBER}){{4}}  (\S.*)', line)
        assert match, line
        found[match[1]] = match[2]
    return found | {'': outcome.lines[-1]}


# What it says -------------------------------------------------------------------------------------


@pytest.mark.parametrize('updates', ['1', '2'])
def test_right_model(updates):
    outcome = audit('plain', '--tasks=2', f'--updates={updates}')
    assert outcome.status == 0, outcome.err
    heading = 'variable this project plain Keras difference first order verdict'
    assert outcome.lines[0].split() == heading.split()
    found = verdicts(outcome)
    said = 'This project is right for 4 of 4 variables, and so is plain Keras.'
    assert found.pop('') == said
    assert len(found) == 4 and {*found.values()} == {'right'}


def test_first_order_differs():
    for line in audit('plain').lines[1:-1]:
        this, plain, difference, first_order = map(float, re.findall(f' ({NUMBER})', line))
        assert this == plain == difference != first_order


@pytest.mark.slow
def test_plain_keras_is_wrong_with_batch_normalization():
    outcome = audit('batch_norm')
    assert outcome.status == 0, outcome.err
    found = verdicts(outcome)
    assert re.fullmatch(r'plain Keras \d+\.\d+ % off', found['conv2d/kernel'])
    assert found['conv2d/bias'] == 'plain Keras not zero'  # normalisation takes the bias away
    assert found['dense/kernel'] == 'right'
    assert found[''].startswith('This project is right for 6 of 6 variables; plain Keras is wrong')
    assert '0/conv2d/kernel' in found['']


@pytest.mark.slow
def test_status_if_this_project_is_wrong(monkeypatch):
    """As it would be without its correction."""
    assert audit('group_norm').status == 0
    monkeypatch.setattr(keras_network, 'exact', lambda *arguments: contextlib.nullcontext())
    outcome = audit('group_norm')
    assert outcome.status == 1
    found = verdicts(outcome)
    assert found['conv2d/kernel'].startswith('this project ')
    assert found[''].startswith('This project is wrong for 0/conv2d/kernel')


def test_model_that_stops_gradients():
    outcome = audit('stopped')
    assert outcome.status == 1
    assert re.match(r'this project \d+\.\d+ % off', verdicts(outcome)['conv2d/kernel'])


@pytest.mark.slow
def test_differences_that_do_not_agree(monkeypatch):
    """Nobody is called wrong then, and the audit has not succeeded."""
    monkeypatch.setattr(second_order, 'DIRECTIONS', 1)
    outcome = audit('jumps')
    found = verdicts(outcome)
    assert 'kinks' in found.pop('') and {*found.values()} == {'undecided'}
    assert outcome.status == 1


def test_an_operation_that_rounds_to_float32():
    """Larger steps tell that such a model is right."""
    outcome = audit('rounded', '--input_shape=2', '--classes=1', '--examples=2', '--tasks=1')
    assert outcome.status == 0, outcome.err
    found = verdicts(outcome)
    assert 'right for 4 of 4' in found.pop('') and {*found.values()} == {'right'}


def test_regression():
    outcome = audit('regression', '--input_shape=2', '--classes=1', '--examples=10', '--lr=0.01')
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_the_same_seed_prints_the_same():
    numbers = ['--input_shape=2', '--seed=1']
    assert audit('regression', *numbers) == audit('regression', *numbers)


def test_precision_of_keras_stays_as_it_was():
    for function in ('regression', 'dropout', 'raises'):
        audit(function, '--input_shape=8,8,1' if function == 'dropout' else '--input_shape=2')
        policy, floatx = keras.config.dtype_policy().name, keras.config.floatx()
        assert (policy, floatx) == ('float32', 'float32')


@pytest.mark.slow
def test_as_a_command():
    outcome = command('scripts/model/check_second_order.py', f'{NETWORKS}:batch_norm')
    assert outcome.status == 0 and 'plain Keras is wrong' in outcome.lines[-1], outcome.err


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'function, words',
    [
        ('dropout', ['drop (Dropout)']),
        ('no_model', ['keras.Model', 'Dense']),
        ('one_too_many', ['4 outputs', '--classes is 3']),
        ('single', ['float32', 'float64']),
        ('nothing', ["'nothing'", 'batch_norm']),
    ],
)
def test_refused(function, words):
    outcome = audit(function)
    assert_refused(outcome, 'check_second_order.py: ', *words)
    assert outcome.status == 2 and outcome.out == ''


def test_another_input_shape():
    line = [f'{NETWORKS}:plain', '--input_shape=8']
    outcome = in_process(check_second_order.main, line)
    assert outcome.status == 2 and 'failed' in outcome.err  # the convolution's complaint


@pytest.mark.parametrize(
    'flag, words',
    [
        ('--input_shape=28,x', '28,28,1'),
        ('--classes=0', 'at least 1'),
        ('--updates=1.5', 'at least 1'),
        ('--lr=-1', 'above 0'),
        ('--lr=nan', 'above 0'),
    ],
)
def test_refused_flags(flag, words):
    assert_refused(audit('plain', flag), words)


def test_loss_that_is_no_number():
    assert_refused(audit('plain', '--lr=1e300', '--updates=3'), 'outer loss', '--lr')


@pytest.mark.parametrize(
    'function, words, last',
    [
        ('raises', 'in raises', 'ValueError: these filters are no filters'),
        ('raises_when_called', 'in call', 'not finished'),
    ],
)
def test_failures_of_the_user_are_theirs(function, words, last):
    outcome = audit(function)
    assert outcome.status == 2
    first, heading, place, *rest = outcome.err.strip().splitlines()
    assert first == f'{NETWORKS}:{function} failed, not this program:'
    assert heading.startswith('Traceback')
    assert str(NETWORKS) in place and words in place  # the first line is theirs, not ours
    assert last in '\n'.join(rest)


# Functions out of the user's files ----------------------------------------------------------------


@pytest.mark.parametrize(
    'spec, words',
    [
        ('networks.py', 'FILE.py:FUNCTION'),
        ('networks.py:', 'FILE.py:FUNCTION'),
        (':plain', 'FILE.py:FUNCTION'),
        ('networks.py:a b', 'FILE.py:FUNCTION'),
        ('no.py:plain', 'there is no file no.py'),
        (f'{NETWORKS.parent}:plain', 'there is no file'),
        (f'{NETWORKS}:plane', "no function 'plane'"),
        (f'{NETWORKS}:__doc__', "no function '__doc__'"),
    ],
)
def test_user_function_refuses(spec, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        user_function(spec)
    assert '\n' not in str(error.value)


def written(folder: Path, text: str, name: str = 'mine.py') -> str:
    (folder / name).write_text(text)
    return f'{folder / name}:f'


def test_user_function_has_a_module_of_its_own(tmp_path):
    """Its name hides no other, nor is hidden by one, and what lies beside it can be imported."""
    written(tmp_path, 'value = 3', 'beside.py')
    (tmp_path / 'other').mkdir()
    first = user_function(
        written(tmp_path, 'import beside\ndef f(): return beside.value', 'maml.py')
    )
    second = user_function(written(tmp_path / 'other', 'def f(x, y=1): return x + y', 'maml.py'))
    assert (first(), second(1), second(1, y=2)) == (3, 2, 3)
    assert sys.modules['maml'] is maml
    assert first.__module__ != second.__module__ and first.__module__ in sys.modules


@pytest.mark.parametrize(
    'text, words',
    [
        ('def f(x:', 'SyntaxError'),
        ('import no_such_module\n', 'ModuleNotFoundError'),
        ('raise ValueError("at import")', 'ValueError: at import'),
    ],
)
def test_failures_at_import(tmp_path, text, words):
    spec = written(tmp_path, text)
    with pytest.raises(UserCodeError) as error:
        user_function(spec)
    said = str(error.value)
    assert (
        said.startswith(f'{spec} failed') and words in said and f'"{tmp_path / "mine.py"}"' in said
    )
    assert 'importlib' not in said and 'utils.py' not in said
    assert not [name for name in sys.modules if name.startswith('user_mine_')]


def test_wrong_number_of_arguments(tmp_path):
    function = user_function(written(tmp_path, 'def f(x): return x'))
    with pytest.raises(UserCodeError, match='TypeError: .*2 were given'):
        function(1, 2)


def test_causes_within_the_file_are_shown(tmp_path):
    text = 'def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        '
    function = user_function(written(tmp_path, text + 'raise KeyError("so") from e\n'))
    with pytest.raises(UserCodeError) as error:
        function()
    said = str(error.value)
    assert 'ZeroDivisionError' in said and said.endswith("KeyError: 'so'")
    assert 'utils.py' not in said
