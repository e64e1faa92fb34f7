"""The scripts of the paper's cells, the report on their runs, the ablation of second order."""

import csv
import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from command_line import (
    ROOT,
    assert_refused,
    command,
    in_process,
    make_class_folders,
    make_miniimagenet,
    make_omniglot,
    parsed,
    run,
    settle,
    succeeded,
)
from PIL import Image
from sources import Calls

from data_generator import SinusoidGenerator
from fewshot.runs.checkpoints import checkpoints
from fewshot.use import evaluation
from fewshot.use.learner import Learner

pytest.importorskip('matplotlib')

from fewshot import load_omniglot
from fewshot.data.cifar100 import SPLITS
from fewshot.paper import figures as report_figures
from fewshot.paper import report as paper_report
from fewshot.paper import runs as cells
from fewshot.paper.cells import CELLS, OTHER_CELLS, SINUSOIDS
from fewshot.runs.flags import settings
from scripts.measure import jpeg, rotations, step_sizes
from scripts.paper import plot_sinusoid, report, second_order_ablation, variants

CASE = ROOT / 'tests' / 'reference' / 'omniglot_5way_1shot.npz'
ABLATION = 'scripts/paper/second_order_ablation.py'


@pytest.mark.slow
def test_meta_gradients_of_the_ablation():
    """Those of the original under TensorFlow 1.2.1, 1.15.5 and 1.3.0, and with stop_grad."""
    outcome = succeeded(command(ABLATION, 'check', CASE))
    found = {}
    for line in outcome.lines:
        found[line.split()[0]] = [float(x) for x in re.findall(r'-?\d\.\d{4}', line)]
    assert found == {
        'exact': [1.2686, 1.5460],
        'held': [-0.7766, 0.0039],
        'moments': [4.4321, 1.5576],
        'first_order': [0.0889, -0.0234],
    }


@pytest.mark.parametrize(
    'arguments', [[], ['neither'], ['check'], ['check', '/nowhere.npz'], ['plot', '/nowhere']]
)
def test_ablation_refuses(arguments):
    outcome = in_process(second_order_ablation.program, arguments)
    assert_refused(outcome, 'second_order_ablation.py', 'exact, held, moments, first_order')


def test_validations_of_the_ablation(tmp_path):
    """Read from among texts and pictures, which are summaries, too."""
    name = 'cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm'
    run_folder = tmp_path / 'omniglot_5way_1shot/held' / name
    writer = tf.summary.create_file_writer(str(run_folder))
    with writer.as_default():
        tf.summary.text('flags', 'x', step=0)
        tf.summary.image('task', np.zeros([1, 2, 2, 3], np.uint8), step=0)
        for step, value in (500, 0.5), (1000, 0.75):
            tf.summary.scalar('metaval_Post-update_accuracy__step_1', value, step=step)
            tf.summary.scalar('metaval_Post-update_accuracy_interval', value / 8, step=step)
    writer.close()
    write_table(run_folder, 'test_ubs1_stepsize0.4', [0.2, 0.625, 0.65])
    succeeded(in_process(second_order_ablation.program, ['plot', str(tmp_path)]))
    text = (tmp_path / 'ablation.md').read_text()
    assert '| Omniglot, 5-way 1-shot | held | 1000 | 75.0 ± 9.4 | 62.5 ± 1.0 |' in text
    assert text.count('not run') == 3
    assert (tmp_path / 'ablation.png').exists()


@pytest.mark.slow
def test_variants(tmp_path, eager, monkeypatch):
    """Two variants of two seeds, one of one: means and intervals are those of their evaluations."""
    settle(monkeypatch, intervals={'summary': 2})
    flags = ['--norm=None', '--update_batch_size=10', '--metatrain_iterations=5']
    for name, seeds, more in [
        ('maml', (0, 1), []),
        ('meta-sgd', (0, 1), ['--learn_lr=weight']),
        ('own', (0,), ['--adapt=body']),
    ]:
        for seed in seeds:
            line = [*flags, *more, f'--seed={seed}', f'--logdir={tmp_path}/sine/{name}/seed{seed}']
            succeeded(run(*line))
            if name != 'own':
                succeeded(run(*line, '--train=False', '--test_set=True'))
    (tmp_path / 'sine/own/seed1/cls_0').mkdir(parents=True)
    outcome = succeeded(in_process(variants.main, [str(tmp_path)]))
    assert 'seed1/cls_0 has no checkpoint' in outcome.err and 'left out' in outcome.err
    rows = [line.split(' | ') for line in (tmp_path / 'variants.md').read_text().splitlines()[2:]]
    assert [row[1:4] for row in rows] == [
        ['maml', '5', '2 seeds'],
        ['meta-sgd', '5', '2 seeds'],
        ['own', '5', 'tasks, one seed'],
    ]
    tables = sorted(tmp_path.glob('sine/maml/*/*/test_*.csv'))
    after_one = [float(list(csv.reader(path.open()))[1][1]) for path in tables]
    assert len(tables) == 2 and rows[0][4].startswith(f'{np.mean(after_one):.3f} ± ')
    assert rows[2][4] == 'not evaluated' and (tmp_path / 'variants.png').stat().st_size > 10_000


def test_variants_refuses(tmp_path):
    assert_refused(in_process(variants.main, [str(tmp_path)]), 'variants.py: ', 'SET/VARIANT')


def test_hours_by_a_clock_that_was_put_back(tmp_path):
    """An hour back at 20 minutes past the start, which an hour later comes out as 80 minutes."""
    with tf.io.TFRecordWriter(f'{tmp_path}/events.out.tfevents.1.x') as writer:
        for minute in (0, 20, -40, 20):
            writer.write(tf.compat.v1.Event(wall_time=60 * (1000 + minute)).SerializeToString())
    assert cells.training_hours(tmp_path) == pytest.approx(80 / 60)


# The report ---------------------------------------------------------------------------------------


TABLE = 'test_ubs5_stepsize0.01'


def write_table(folder: Path, name: str, means: list[float]):
    header = [f'update{i}' for i in range(len(means))]
    rows = [header, means, [0.1] * len(means), [0.01] * len(means)]
    with open(folder / f'{name}.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    tasks = np.tile(np.float32(means), (3, 1)) * [[0.5], [0.5], [2]]
    (folder / f'{name}.pkl').write_bytes(pickle.dumps({'mses': tasks}))


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """Two seeds of the sinusoid, trained for a moment, with made-up results."""
    logs = tmp_path_factory.mktemp('report') / 'logs'
    for seed, scale in (0, 1.0), (1, 3.0):
        logdir = logs / f'sinusoid/seed{seed}'
        cell = ['--norm=None', '--update_batch_size=10', '--update_lr=.01', f'--seed={seed}']
        succeeded(run(*cell, '--metatrain_iterations=3', f'--logdir={logdir}'))
        (folder,) = logdir.iterdir()
        errors = [3.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1]
        write_table(folder, TABLE, [scale * error for error in errors])
    return logs


@pytest.fixture
def logs(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / 'logs'))


@pytest.mark.slow
def test_report(logs):
    """Means over seeds with Student's interval; cells without runs say so; figures are there."""
    outcome = succeeded(in_process(report.main, [str(logs)]))
    assert outcome.lines == [f'{logs}/report/report.md'] and not outcome.err
    text = (logs / 'report/report.md').read_text()
    # Two values, 2 and 6: their standard error is 2, the 95 % interval 12.706 times as large.
    row = (
        '| MAML | 5 | .67 / .38 / .35 '
        '| 6 ± 38 | 4 ± 25 | 3.2 ± 20 | 2.2 ± 14 | 2 / 1.6 / 1.1 | 3 | 0, 1 |'
    )
    assert row in text
    assert '| oracle | |  | not run |' in text and text.count('not run') == 3 + len(
        CELLS + OTHER_CELLS
    )
    names = {path.name for path in (logs / 'report').iterdir()}
    assert names == {'report.md', 'fits.png', 'errors.png'}


def test_tables_of_more_tasks(tmp_path):
    """Beside those of 600: of the most test tasks, in a table of their own."""
    for i, suffix in enumerate(
        ['', '_best', '_tasks100', '_tasks6000', '_tasks900', '_tasks9000_val', '_query15']
    ):
        write_table(tmp_path, f'test_ubs1_stepsize0.4{suffix}', [0.2, 0.5 + i / 100])
    tables, more_tables = cells.read_tables(tmp_path, '0.4')
    assert {kind: table.means[1] for kind, table in tables.items()} == {
        (1, 'last'): 0.5,
        (1, 'best'): 0.51,
    }
    assert {kind: table.means[1] for kind, table in more_tables.items()} == {(1, 'last'): 0.53}
    assert cells.read_tables(tmp_path, '0.04') == ({}, {})
    cell = next(cell for cell in CELLS if cell.name == 'omniglot_5way_1shot')
    run = cells.Run(tmp_path, {}, 5, 0.0, '', tables, more_tables, {})
    lines = paper_report.on_more_tasks({cell.name: [run]})
    assert lines[-1] == f'| {cell.title} | {cell.paper} | 53.00 ± 1.00 | – | 3 | 0 |'
    assert paper_report.on_more_tasks({cell.name: [run._replace(more_tables={})]}) == []


def put_another(folder: Path, *arguments: str):
    """A run that was trained with these flags for a moment, in the place of one of the cell."""
    shutil.rmtree(folder)
    succeeded(run('--norm=None', '--update_lr=.01', *arguments, f'--logdir={folder.parent}'))


def foreign_table(folder: Path):
    (folder / f'{TABLE}.csv').write_text('update0\n1\n')


def foreign_values(folder: Path):
    (folder / f'{TABLE}.pkl').write_bytes(pickle.dumps([1]))


def calling_values(folder: Path):
    (folder / f'{TABLE}.pkl').write_bytes(pickle.dumps({'mses': Calls()}))


def mixed_tables(folder: Path):
    write_table(folder, TABLE, [3.0, 2.0])
    (folder / f'{TABLE}.csv').write_text('update0,update1\n3,1\n1,1\n1,1\n')


def trained_with_other_shots(folder: Path):
    put_another(folder, '--update_batch_size=7', '--metatrain_iterations=2')


def jointly_trained(folder: Path):
    joint = ['--metatrain_iterations=0', '--pretrain_iterations=2']
    put_another(folder, '--update_batch_size=10', *joint)


def no_checkpoints(folder: Path):
    for path in folder.glob('model*'):
        path.unlink()


def spoilt_checkpoint(folder: Path):
    (folder / 'model2.data-00000-of-00001').write_bytes(b'x')


NO_TABLES = 'are not the tables that main.py writes'


@pytest.mark.slow
@pytest.mark.parametrize(
    'damage, words',
    [
        (foreign_table, NO_TABLES),
        (lambda folder: (folder / f'{TABLE}.pkl').unlink(), NO_TABLES),
        (foreign_values, NO_TABLES),
        (calling_values, f'{TABLE}.pkl is refused: it would call {os.system.__module__}.system'),
        (mixed_tables, 'not of one evaluation'),
        (trained_with_other_shots, 'it was trained with --update_batch_size=7, not 10'),
        (jointly_trained, 'it was jointly trained'),
        (lambda folder: (folder / f'{TABLE}.csv').unlink(), 'has not been evaluated'),
        (no_checkpoints, 'holds no checkpoint'),
        (spoilt_checkpoint, 'cannot be read'),
    ],
)
def test_report_leaves_out_what_is_damaged(logs, eager, damage, words):
    """With a sentence that names it; the rest is reported."""
    folder = next((logs / 'sinusoid/seed1').iterdir())
    damage(folder)
    outcome = succeeded(in_process(report.main, [str(logs)]))
    (line,) = outcome.err.splitlines()
    assert line.startswith(f'report.py: left out: {folder.parent}') and words in line
    assert '| MAML | 5 | .67 / .38 / .35 | 3 ± 0.01 |' in (logs / 'report/report.md').read_text()


def test_classes_of_cifar_fs(tmp_path):
    """A run on other folders is none of its cells."""
    cell = next(cell for cell in OTHER_CELLS if cell.name == 'cifar_fs_5way_1shot')
    splits = {split: dict.fromkeys(labels, 600) for split, labels in SPLITS['cifar_fs'].items()}
    cells.check_classes(tmp_path, splits, cell)
    cells.check_classes(tmp_path, None, cell)  # not told
    with pytest.raises(ValueError, match='its val classes are not those of CIFAR-FS'):
        cells.check_classes(tmp_path, splits | {'val': {'beaver': 600}}, cell)


def test_published_figures_and_their_sources(logs):
    succeeded(in_process(report.main, [str(logs)]))
    text = (logs / 'report/report.md').read_text()
    told = '58.9 ± 1.9 (Bertinetto et al. 2019); 56.8 ± 1.9 (Devos et al. 2019)'
    assert f'| CIFAR-FS, 5-way 1-shot | {told} | not run |' in text
    for cell in OTHER_CELLS:
        for _, whose in cell.published:
            assert f'[{whose}](http' in text


def test_report_quotes_notes(logs):
    (logs / 'omniglot_5way_1shot').mkdir()
    (logs / 'omniglot_5way_1shot/note.txt').write_text('not this year.\n')
    succeeded(in_process(report.main, [str(logs)]))
    lines = (logs / 'report/report.md').read_text().splitlines()
    assert 'Omniglot, 5-way 1-shot: not this year.' in lines


@pytest.mark.slow
def test_picture_of_a_sinusoid_run(trained, tmp_path):
    """By the name of its folder; in the format of the output's ending."""
    folder = str(next(trained.glob('sinusoid/seed0/cls_*')))
    for name, start in ('a.png', b'\x89PNG'), ('a.svg', b'<?xml'):
        outcome = succeeded(in_process(plot_sinusoid.main, [folder, f'--output={tmp_path / name}']))
        assert outcome.lines == [f'Wrote {tmp_path / name}']
        assert (tmp_path / name).read_bytes().startswith(start)
    for arguments, words in [
        ([str(tmp_path / 'none')], ['there is no folder', 'none']),
        ([str(tmp_path)], ['holds no test_ubs', 'evaluate the run first']),
        ([folder, f'--output={tmp_path}/no/a.png'], ['cannot be written', '--output']),
        ([folder, '--output=a.txt'], ['txt', 'png']),
    ]:
        outcome = in_process(plot_sinusoid.main, arguments)
        assert_refused(outcome, 'plot_sinusoid.py', *words)
    write_table(tmp_path, TABLE, [3.0, 2.0])
    outcome = in_process(plot_sinusoid.main, [str(tmp_path)])
    assert_refused(outcome, 'plot_sinusoid.py', 'is not named like a run')


def test_step_sizes_of_errors(trained):
    """Two seeds: main.py's evaluation; α halved after the first update leaves this one the same."""
    folders = [str(folder) for folder in sorted(trained.glob('sinusoid/seed*/cls_*'))]
    outcome = succeeded(in_process(step_sizes.main, [*folders, '--shots=3', '--tasks=700']))
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in outcome.lines]
    _, _, whole, halved = rows
    assert (whole[0], halved[0]) == ('0.01', '0.01, then 0.005')
    assert whole[1] == halved[1] and whole[2:5] != halved[2:5]
    model = Learner.load(folders[0])
    batch = SinusoidGenerator(3, 3).batch('test', 1, 50)
    found = step_sizes.outcomes(model, batch, halved=False)
    np.testing.assert_allclose(found[1:], model.model.evaluate(batch, 10).losses2, rtol=1e-4)


@pytest.mark.slow
def test_step_sizes_of_accuracies(tmp_path, eager):
    make_omniglot(tmp_path / 'data')
    flags = ['--datasource=omniglot', '--num_classes=2', '--num_filters=4', '--update_lr=.4']
    flags += ['--update_batch_size=2', '--metatrain_iterations=1']
    data = f'--data_dir={tmp_path}/data'
    succeeded(run(*flags, data, f'--logdir={tmp_path}/logs'))
    (folder,) = (tmp_path / 'logs').iterdir()
    outcome = succeeded(in_process(step_sizes.main, [str(folder), '--tasks=20', data]))
    model = Learner.load(folder)
    batch = evaluation.test_tasks(model.settings, 2, f'{tmp_path}/data').batch('test', 0, 20)
    accuracies = 100 * np.array(model.model.evaluate(batch, 10).accuracies2).mean(1)  # [10]
    found = [float(cell.split('±')[0]) for cell in outcome.lines[2].split('|')[2:-1]]
    np.testing.assert_allclose(found, accuracies[[i - 1 for i in step_sizes.SHOWN]], atol=0.006)


@pytest.mark.slow
def test_rotations(tmp_path, eager):
    """Turned at random is main.py's own evaluation; each turn as a class has four times as many."""
    make_omniglot(tmp_path / 'data')
    flags = ['--datasource=omniglot', '--num_classes=2', '--num_filters=4', '--update_lr=.4']
    flags += ['--update_batch_size=1', '--metatrain_iterations=1', f'--data_dir={tmp_path}/data']
    succeeded(run(*flags, f'--logdir={tmp_path}/logs'))
    (folder,) = (tmp_path / 'logs').iterdir()
    more = ['--tasks=20', f'--data_dir={tmp_path}/data']
    lines = succeeded(in_process(rotations.main, [str(folder), *more])).lines
    found = [float(re.search(r'([\d.]+) \+-', line)[1]) for line in lines]
    options = [f'--run={folder}', '--train=False', '--test_set=True', '--test_tasks=20']
    succeeded(run(*options, f'--data_dir={tmp_path}/data'))
    with open(folder / 'test_ubs1_stepsize0.4.csv') as file:
        expected = 100 * float(list(csv.DictReader(file))[0]['update1'])
    assert found[0] == pytest.approx(expected, abs=0.006) and len(found) == 3
    test = load_omniglot(tmp_path / 'data')['test']
    turned = rotations.turned_classes(test)
    assert len(turned.names) == 4 * len(test.names)
    image = turned.images[turned.starts[len(test.names)]]
    np.testing.assert_array_equal(image, np.rot90(test.images[test.starts[0]]))


def test_rotations_refuses(trained):
    folder = str(next(trained.glob('sinusoid/seed0/cls_*')))
    assert_refused(in_process(rotations.main, [folder]), 'rotations.py', 'not trained on Omniglot')


@pytest.mark.slow
def test_jpeg(tmp_path, eager, monkeypatch):
    """Both lines are main.py's own evaluations, of the images and of files that Pillow wrote."""
    monkeypatch.setattr(jpeg, 'UPDATES', 2)  # as main.py's are in tests
    data, jpegs = tmp_path / 'data', tmp_path / 'jpegs'
    make_class_folders(data, images=20, size=16)
    flags = ['--datasource=folder', '--image_size=16', '--num_classes=2', '--num_filters=4']
    flags += ['--update_batch_size=1', '--metatrain_iterations=1', '--update_lr=.4']
    succeeded(run(*flags, f'--data_dir={data}', f'--logdir={tmp_path}/logs'))
    (folder,) = (tmp_path / 'logs').iterdir()
    options = ['--tasks=50', f'--data_dir={data}', '--quality=1']
    lines = succeeded(in_process(jpeg.main, [str(folder), *options])).lines
    found = [float(re.search(r'([\d.]+) \+-', line)[1]) for line in lines]
    shutil.copytree(data, jpegs)
    for path in jpegs.glob('test/*/*'):
        Image.open(path).copy().save(path, quality=1)
    expected = []
    for images in data, jpegs:
        options = [f'--run={folder}', '--train=False', '--test_set=True', '--test_tasks=50']
        succeeded(run(*options, f'--data_dir={images}'))
        with open(folder / 'test_ubs1_stepsize0.4_tasks50.csv') as file:
            expected.append(100 * float(list(csv.DictReader(file))[0]['update2']))
    assert found == pytest.approx(expected, abs=0.006) and found[0] != found[1]


@pytest.mark.parametrize('channels', [1, 3])
def test_jpeg_of_images(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 12, channels), np.uint8)
    found = jpeg.compressed(images, 75)
    Image.fromarray(images[1].squeeze()).save(tmp_path / 'image.jpg')
    expected = np.asarray(Image.open(tmp_path / 'image.jpg')).reshape(images[1].shape)
    np.testing.assert_array_equal(found[1], expected)
    assert found.shape == images.shape and np.any(found[0] != images[0])


def test_jpeg_refuses(trained):
    folder = str(next(trained.glob('sinusoid/seed0/cls_*')))
    assert_refused(in_process(jpeg.main, [folder]), 'jpeg.py', 'which has no images')
    outcome = in_process(jpeg.main, [folder, '--quality=96'])
    assert_refused(outcome, 'jpeg.py', '--quality must be from 1 to 95, not 96')


def test_step_sizes_refuses(tmp_path, trained):
    folder = str(next(trained.glob('sinusoid/seed0/cls_*')))
    outcome = in_process(step_sizes.main, [str(tmp_path)])
    assert_refused(outcome, 'step_sizes.py', str(tmp_path), 'no checkpoint')
    assert_refused(in_process(step_sizes.main, [folder, '--tasks=0']), 'step_sizes.py', '--tasks')


def test_report_without_logs(tmp_path):
    assert_refused(in_process(report.main, [str(tmp_path / 'none')]), 'there is no folder', 'none')
    (tmp_path / 'file').touch()
    outcome = in_process(report.main, [str(tmp_path), f'--output={tmp_path}/file'])
    assert_refused(outcome, 'file is a file', '--output')


def test_report_tells_other_settings_and_late_training(logs, eager):
    """And on what a run was trained."""
    (folder,) = (logs / 'sinusoid/seed1').iterdir()
    shutil.rmtree(folder)
    flags = ['--norm=None', '--update_batch_size=10', '--update_lr=.01', '--meta_batch_size=3']
    flags += ['--seed=1', f'--logdir={logs}/sinusoid/seed1']
    succeeded(run(*flags, '--metatrain_iterations=2'))
    succeeded(run(*flags, '--train=False'))
    succeeded(run(*flags, '--metatrain_iterations=3'))
    outcome = succeeded(in_process(report.main, [str(logs)]))
    text = (logs / 'report/report.md').read_text()
    assert not outcome.err
    other = 'MAML, --meta_batch_size=3'
    assert f'{other}, seed 1: the cell has --meta_batch_size=25.' in text
    late = 'trained on to iteration 3, which has not been evaluated.'
    assert f'{other}, seed 1: {late}' in text
    assert '| MAML | 5 | .67 / .38 / .35 | 3 ± 0.01 |' in text  # the other seed, alone
    (row,) = (line for line in text.splitlines() if line.startswith(f'| {other} | 10 |'))
    assert [cell.strip() for cell in row.split('|')][9:11] == ['2', '1']
    assert f'TensorFlow {tf.__version__}' in row


@pytest.mark.slow
def test_report_tells_validation_classes(tmp_path, eager, monkeypatch):
    """Where the images of the test classes were not at hand."""
    make_omniglot(tmp_path)
    name = 'omniglot_5way_1shot_no_conv'
    cell = next(cell for cell in CELLS if cell.name == name)
    few = cell._replace(flags=cell.flags.replace('num_classes=5', 'num_classes=2'))
    assert few.settings['num_classes'] == 2  # so few classes are enough
    for module in (paper_report, report_figures):
        monkeypatch.setattr(module, 'CELLS', [few if of is cell else of for of in CELLS])
    flags = ['--datasource=omniglot', '--conv=False', '--num_classes=2', '--update_batch_size=1']
    flags += ['--update_lr=.4', '--metatrain_iterations=1', '--meta_batch_size=32']
    flags += [f'--data_dir={tmp_path}', f'--logdir={tmp_path}/{name}/seed0']
    succeeded(run(*flags))
    for more, told in ([], True), (['--test_set=True'], False):
        succeeded(run(*flags, '--train=False', *more))
        succeeded(in_process(report.main, [str(tmp_path)]))
        text = (tmp_path / 'report/report.md').read_text()
        assert (f'{cell.title}, seed 0: evaluated on the validation classes.' in text) == told
        assert 'seed 0: the cell' not in text
        names = {path.name for path in (tmp_path / 'report').iterdir()}
        assert names == {'report.md', 'updates.png', 'learning.png'}
    # Evaluated with another K alone: neither the row nor the figure takes that for the cell's.
    (folder,) = (tmp_path / name / 'seed0').iterdir()
    for path in folder.glob('test_ubs1_*'):
        path.rename(path.with_name(path.name.replace('ubs1', 'ubs2')))
    drawn = []

    def label(*arguments):
        drawn.append(arguments)
        return 'a run'

    monkeypatch.setattr(report_figures, 'label', label)
    monkeypatch.setattr(report_figures, 'draw_learning', lambda *arguments: None)
    succeeded(in_process(report.main, [str(tmp_path)]))
    text = (tmp_path / 'report/report.md').read_text()
    assert f'| {cell.title} | {cell.paper} | – | – |' in text
    assert len(drawn) == 1  # for learning


@pytest.mark.slow
def test_report_of_damaged_summaries(logs):
    """What can be read of them is used."""
    for i, path in enumerate(sorted(logs.glob('sinusoid/seed*/cls_*/events*'))):
        path.write_bytes(path.read_bytes()[:40] if i else b'none')
    outcome = succeeded(in_process(report.main, [str(logs)]))
    assert not outcome.err and '| MAML | 5 |' in (logs / 'report/report.md').read_text()


def test_cells_are_what_the_scripts_train(tmp_path):
    """The settings by which the report knows a cell's runs are the flags that its script gives."""
    printing(tmp_path)
    for name in ('omniglot_resized', 'miniImagenet/test', 'cifar_fs'):
        (tmp_path / 'data' / name).mkdir(parents=True)
    for cell in CELLS + OTHER_CELLS + SINUSOIDS:
        script = 'sinusoid_10shot' if cell.name == 'sinusoid' else cell.name
        training, *_ = bash(tmp_path, script).stdout.splitlines()
        flags = parsed(*training.split())
        assert flags.logdir == f'logs/{cell.name}/seed0'
        assert cells.deviations(Path(cell.name), settings(flags), cell) == {}


def test_cells_need_no_tensorflow():
    """The scripts read their flags at once."""
    code = 'import sys, fewshot.paper.cells; sys.exit("tensorflow" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_scripts_refuse_schedules_without_a_number(tmp_path):
    """In one sentence, before anything is trained."""
    printing(tmp_path)
    (tmp_path / 'data/omniglot_resized').mkdir(parents=True)
    flag = '--metatrain_iterations=many'
    outcome = bash(tmp_path, 'omniglot_20way_1shot_maml_plus_plus', flag)
    told = 'cells.py: --metatrain_iterations must be a whole number, but it is many\n'
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (1, '', told)


def test_data_of_the_scripts(tmp_path):
    """--data_dir is where prepared data is; of class folders main.py gets the one that is meant."""
    printing(tmp_path)
    (tmp_path / 'mine/cifar_fs').mkdir(parents=True)
    lines = bash(tmp_path, 'cifar_fs_5way_1shot', '--data_dir=mine', '--seed=2').stdout.splitlines()
    assert [parsed(*line.split()).data_dir for line in lines] == ['mine/cifar_fs'] * 2
    assert '--test_set=True' in lines[1]


# The cells, as a user calls them ------------------------------------------------------------------


SET_UP = f'set_up() {{ PATH={Path(sys.executable).parent}:$PATH; }}\n'


@pytest.mark.slow
def test_variants_by_the_script(checkout, monkeypatch):
    """Trains, evaluates and draws; a second call does only the latter."""
    monkeypatch.setenv('SETS', 'omniglot_20way_1shot')
    flags = [
        '--metatrain_iterations=6',
        '--num_filters=4',
        '--meta_batch_size=2',
        '--num_updates=2',
    ]
    first, second = (bash(checkout, 'variants', *flags) for _ in range(2))
    for outcome in (first, second):
        assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert first.stdout.count('starting training') == first.stdout.count('starting eval') == 5
    assert 'starting' not in second.stdout and second.stdout.count('The run is complete') == 5
    folder = checkout / 'logs/variants'
    text = (folder / 'variants.md').read_text()
    for name in ('maml', 'first_order', 'anil', 'meta-sgd', 'maml++'):
        assert f' {name} | 6 | tasks, one seed | ' in text
    assert (folder / 'variants.png').exists() and 'not evaluated' not in text


@pytest.fixture(scope='module')
def checkout(tmp_path_factory) -> Path:
    """The scripts with this environment as their .venv, and data like Omniglot and miniImagenet."""
    folder = tmp_path_factory.mktemp('checkout')
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    for name in ('fewshot', 'scripts'):
        shutil.copytree(ROOT / name, folder / name)
    (folder / 'scripts/lib/environment.sh').write_text(SET_UP)
    make_omniglot(folder / 'data', characters=340, images=10)  # 20 validation classes
    make_miniimagenet(folder / 'data', classes=5, images=20)
    make_class_folders(folder / 'data/cifar_fs', classes=5, images=20, size=32)
    return folder


def bash(checkout: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', f'scripts/paper/{script}.sh', *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'cell',
    [
        *('sinusoid_5shot', 'sinusoid_10shot', 'sinusoid_pretrain', 'sinusoid_oracle'),
        'sinusoid_published_command',
        *(cell.name for cell in CELLS + OTHER_CELLS),
    ],
)
def test_cell(checkout, cell):
    """Trains, evaluates, and a second call continues."""
    more = [] if 'sinusoid' in cell or 'no_conv' in cell else ['--num_filters=4']
    shutil.rmtree(checkout / 'logs', ignore_errors=True)  # two of the cells share a run
    first = bash(checkout, cell, '--metatrain_iterations=2', *more)
    assert first.returncode == 0, first.stderr[-2000:]
    assert '95 % interval' in first.stdout
    end = 2 if 'plus_plus' in cell else 4  # its schedules are of one length
    second = bash(checkout, cell, f'--metatrain_iterations={end}', *more)
    assert second.returncode == 0, second.stderr[-2000:]
    told = 'The run is complete' if end == 2 else 'Continuing at iteration 2 of 4.'
    assert told in second.stdout
    name = 'sinusoid' if cell.endswith(('sinusoid_5shot', 'sinusoid_10shot')) else cell
    folder = next((checkout / f'logs/{name}/seed0').iterdir())
    assert end - 1 in checkpoints(folder) and [*folder.glob('test_ubs*.csv')]


def printing(folder: Path):
    """The scripts, with a main.py that prints its arguments."""
    for name in ('fewshot', 'scripts'):
        shutil.copytree(ROOT / name, folder / name)
    (folder / 'scripts/lib/environment.sh').write_text(SET_UP)
    (folder / 'main.py').write_text('import sys\nprint(*sys.argv[1:])\n')


@pytest.mark.parametrize(
    'arguments',
    [
        ['--seed=3', '--metatrain_iterations=4'],
        ['--seed', '3', '-metatrain_iterations', '4'],
        ['--seed=1', '-seed=3', '--metatrain_iterations=9', '--metatrain_iterations=4'],
    ],
)
def test_arguments_of_the_scripts(tmp_path, arguments):
    """As main.py takes them: the last one counts."""
    printing(tmp_path)
    training, *evaluations = bash(tmp_path, 'sinusoid_pretrain', *arguments).stdout.splitlines()
    flags = parsed(*training.split())
    assert (flags.pretrain_iterations, flags.metatrain_iterations) == (4, 0)
    assert (flags.seed, flags.logdir) == (3, 'logs/sinusoid_pretrain/seed3')
    assert [parsed(*line.split()).update_batch_size for line in evaluations] == [5, 10, 20]


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize(
    'cell, name, iterations, seen',
    [
        ('sinusoid_5shot', 'sinusoid', 20000, 'Iteration 2000 of'),
        ('omniglot_5way_1shot_no_conv', 'omniglot_5way_1shot_no_conv', 1300, 'Iteration 1100 of'),
    ],
)
def test_interrupted_cell(checkout, cell, name, iterations, seen, number, status):
    """As by Ctrl-C, a batch system or force; main.py is reached, too. The same command goes on."""
    shutil.rmtree(checkout / 'logs', ignore_errors=True)
    line = ['bash', f'scripts/paper/{cell}.sh', f'--metatrain_iterations={iterations}']
    with subprocess.Popen(
        line,
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        before = list(itertools.takewhile(lambda line: not line.startswith(seen), process.stdout))
        os.killpg(process.pid, number)
        after = process.stdout.read()
    assert process.returncode in (status, -number)
    assert '95 % interval' not in ''.join(before) + after
    last = max(checkpoints(next((checkout / f'logs/{name}/seed0').iterdir())))
    again = bash(checkout, cell, f'--metatrain_iterations={iterations}')
    told = f'Continuing at iteration {last + 1} of {iterations}.'
    assert told in again.stdout, again.stderr[-2000:]
    assert '95 % interval' in again.stdout
    assert last >= 1000


@pytest.mark.slow
def test_ablation(checkout):
    """All variants, drawn."""
    first = bash(checkout, 'second_order_ablation', '--metatrain_iterations=2', '--num_filters=4')
    assert first.returncode == 0, first.stderr[-2000:]
    text = (checkout / 'logs/ablation/ablation.md').read_text()
    assert text.count('not run') == 8  # no validation yet
    for cell in ('omniglot_5way_1shot', 'omniglot_20way_1shot'):
        for variant in ('exact', 'held', 'moments', 'first_order'):
            folder = next((checkout / f'logs/ablation/{cell}/{variant}').iterdir())
            assert [*checkpoints(folder)] == [1] and [*folder.glob('test_ubs1_stepsize*.csv')]
