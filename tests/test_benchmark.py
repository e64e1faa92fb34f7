"""scripts/measure/benchmark.py: what it measures, and what it refuses."""

import json

import numpy as np
import pytest
from absl import flags
from command_line import (
    ROOT,
    assert_refused,
    command,
    in_process,
    listing,
    make_omniglot,
    settle,
    succeeded,
)

from scripts.measure import benchmark

CASES = ROOT / 'tests' / 'reference'
TINY = [
    '--datasource=omniglot',
    '--num_classes=2',
    '--update_batch_size=1',
    '--num_filters=2',
    '--meta_batch_size=2',
]
FIGURES = {
    *('workload', 'first_loss', 'compile_s', 'median_ms', 'min_ms'),
    *('peak_rss_mb', 'gflops_per_s', 'versions'),
}


def run(*arguments):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    return in_process(benchmark.benchmark, values(['benchmark.py', *map(str, arguments)]), values)


def figures(outcome) -> dict:
    (line,) = succeeded(outcome).lines
    return json.loads(line)


def case(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(CASES / f'{name}.npz'))


def test_step():
    """The first loss is the original's; the figures hang together."""
    got = figures(run(CASES / 'sinusoid_10shot.npz', '--steps=5'))
    assert {*got} >= FIGURES
    assert got['workload'] == 'sinusoid_10shot' and got['steps'] == 5
    expected = float(case('sinusoid_10shot')['total_losses2'][0])
    assert got['first_loss'] == pytest.approx(expected, rel=1e-4)
    assert 0 < got['min_ms'] <= got['median_ms'] < 1e3 * got['compile_s']
    assert got['peak_rss_mb'] > 100
    # 25 tasks of 10 + 10 points; 2 operations per weight, point and pass: w1 takes 4 + 2 passes, w2
    # and w3 9 + 3.
    count = 25 * 10 * 2 * (40 * (4 + 2) + (1600 + 40) * (9 + 3))
    assert got['gflops_per_s'] == pytest.approx(count / got['median_ms'] / 1e6, abs=0.011)


MINIIMAGENET = dict(datasource='miniimagenet', num_updates=5, num_filters=32, max_pool=True)


@pytest.mark.parametrize(
    'settings, giga',
    [
        (dict(datasource='omniglot', num_updates=1), (32, 5, 5, 10.0)),
        (dict(datasource='omniglot', num_updates=5), (16, 20, 20, 79.6)),
        (MINIIMAGENET, (4, 5, 75, 88.6)),
    ],
)
def test_operations_of_the_paper_s_experiments(settings, giga):
    tasks, support, query, expected = giga
    sizes = (support, support, query, query)
    batch = benchmark.Batch(*(np.zeros((tasks, examples, 1)) for examples in sizes))
    model = benchmark.make_model(**settings, num_classes=20 if support == 20 else 5)
    assert benchmark.operations(model, batch) / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_training_loop(tmp_path, monkeypatch):
    settle(monkeypatch, intervals={'summary': 4})
    data = make_omniglot(tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    images = [*TINY, f'--data_dir={data}']
    got = figures(run('--train', *images, '--metatrain_iterations=12', '--seconds=100'))
    assert got['iterations'] == 11 and got['iterations_per_s'] > 0 and 0 <= got['input_share'] < 1
    assert got['first_step_s'] > 0 and got['flags']['num_filters'] == 2
    assert {path.name for path in tmp_path.iterdir()} == {'data'}, 'the run is not kept'
    got = figures(run('--train', '--norm=None', '--metatrain_iterations=100000', '--seconds=.5'))
    assert 100 < got['iterations'] < 50000, 'it stops when the time is over'
    assert abs(got['rss_growth_mb']) < 500


@pytest.mark.slow
def test_evaluation(tmp_path):
    few = [*TINY, '--test_tasks=40']
    got = figures(run('--evaluate', *few, f'--data_dir={make_omniglot(tmp_path)}'))
    assert (got['tasks'], got['updates']) == (40, 10)
    assert got['tasks_per_s'] == pytest.approx(40 / got['evaluation_s'], rel=0.05)


def changed(**arrays):
    """A case with arrays in place of its own, or without those that are None."""
    values = case('sinusoid_10shot') | arrays
    return {name: value for name, value in values.items() if value is not None}


def resized(name: str, *shape: int):
    return changed(**{name: np.zeros(shape)})


@pytest.mark.parametrize(
    'values, words',
    [
        (changed(flags=None), ['no array "flags"']),
        (changed(flags=np.array('{')), ['"flags" does not hold flags']),
        (changed(flags=np.array('[1]')), ['"flags" does not hold flags']),
        (changed(flags=np.array('{"no_such": 1}')), ['"flags" does not hold flags', 'no_such']),
        (changed(flags=np.array('{"num_updates": 0}')), ['--num_updates must be at least 1']),
        (changed(**{'input/inputb': None}), ['no array "input/inputb"']),
        (resized('input/inputa', 25, 10, 2), ['"input/inputa" is [25, 10, 2]', '[25, ?, 1]']),
        (resized('input/labelb', 25, 9, 1), ['"input/labelb" is [25, 9, 1]', '[25, 10, 1]']),
        (resized('input/inputb', 3), ['"input/inputb" is [3]']),
        (changed(**{'init/w2': None}), ['no array "init/w2"']),
        (resized('init/w2', 40, 41), ['"init/w2" is [40, 41]', '[40, 40]']),
    ],
    ids=lambda value: '' if isinstance(value, dict) else value[0],
)
def test_bad_cases(tmp_path, values, words):
    np.savez(tmp_path / 'case.npz', **values)
    assert_refused(run(tmp_path / 'case.npz'), 'case.npz' if '--' not in words[0] else '', *words)


@pytest.mark.parametrize(
    'content',
    [b'', b'text', (CASES / 'sinusoid_10shot.npz').read_bytes()[:5000]],
    ids=['empty', 'text', 'half'],
)
def test_files_that_are_no_cases(tmp_path, content):
    (tmp_path / 'case.npz').write_bytes(content)
    assert_refused(run(tmp_path / 'case.npz'), 'case.npz is no case file')


ABSENT = ['--datasource=omniglot', '--data_dir=absent']
NO_FOLDER = ['there is no folder absent/omniglot_resized']
ONE_STEP = ['--train', '--norm=None', '--metatrain_iterations=1']


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['absent.npz'], ['there is no file absent.npz']),
        (['.'], ['. is no case file']),
        ([], ['give either a case file, or --train, or --evaluate']),
        (['a.npz', 'b.npz'], ['give either']),
        (['a.npz', '--train'], ['give either']),
        (['--train', '--evaluate'], ['give either']),
        (['--train', '--num_classes=0'], ['--num_classes must be at least 1']),
        (['--train', *ABSENT], NO_FOLDER),
        (['--evaluate', *ABSENT], NO_FOLDER),
        (ONE_STEP, ['there was time for one step only']),
    ],
    ids=str,
)
def test_refusals(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*arguments), *words)
    assert not listing(tmp_path)


@pytest.mark.slow
def test_as_a_program():
    file = CASES / 'sinusoid_5shot_5steps.npz'
    outcome = command('scripts/measure/benchmark.py', file, '--steps=2')
    assert figures(outcome)['workload'] == 'sinusoid_5shot_5steps'


# The plot of the cost -----------------------------------------------------------------------------


def test_variants_of_a_case():
    """Its tasks again and again, or the first of them, and other flags."""
    pytest.importorskip('matplotlib')
    from scripts.measure import plot_cost

    values = case('sinusoid_10shot')
    tasks = values['input/inputa'].shape[0]
    for count in (1, 2 * tasks + 1):
        other = plot_cost.variant(values, count, 3)
        assert json.loads(str(other['flags']))['num_updates'] == 3
        last = values['input/inputa'][(count - 1) % tasks]
        np.testing.assert_array_equal(other['input/inputa'][-1], last)
        assert all(other[name] is values[name] for name in values if name.startswith('init/'))


def test_cost_of_a_file_that_is_no_case(tmp_path):
    pytest.importorskip('matplotlib')
    (tmp_path / 'x.npz').write_text('text')
    outcome = command('scripts/measure/plot_cost.py', tmp_path / 'x.npz', tmp_path / 'out')
    assert_refused(outcome, 'plot_cost.py', 'x.npz')


@pytest.mark.slow
def test_cost_is_measured_and_drawn(tmp_path):
    pytest.importorskip('matplotlib')
    counts = '--tasks 2 4 --updates 1 2 --steps 2'.split()
    file = CASES / 'sinusoid_10shot.npz'
    outcome = succeeded(command('scripts/measure/plot_cost.py', file, tmp_path, *counts))
    lines = [json.loads(line) for line in (tmp_path / 'cost.jsonl').read_text().splitlines()]
    assert [(line['tasks'], line['updates']) for line in lines][:2] == [(2, 1), (4, 1)]
    assert len(outcome.lines) == len(lines)
    assert all(line['median_ms'] > 0 for line in lines)
    assert (tmp_path / 'cost.png').stat().st_size > 10000
