"""Prepare, train, resume, evaluate as a user does: by commands, on a dozen generated classes."""

import csv
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command_line import Outcome, command, draw, listing, succeeded

from fewshot.runs.checkpoints import checkpoints
from scripts.data import prepare_omniglot

NUMBER = r'\d+\.\d+(e-\d+)?'


def run(*arguments) -> Outcome:
    return succeeded(command('main.py', *arguments))


def results(folder: Path, name: str) -> np.ndarray:
    values = pickle.loads((folder / f'{name}.pkl').read_bytes())['mses']
    header, means, _, _ = csv.reader((folder / f'{name}.csv').read_text().splitlines())
    assert header[:11] == [f'update{j}' for j in range(11)] and values.shape == (600, 11)
    np.testing.assert_allclose(np.array(means[:11], float), values.mean(0), rtol=1e-5)
    return values


def zipped(path: Path, folder: Path):
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*.*')):
            archive.write(file, file.relative_to(folder.parent))


@pytest.fixture
def official_omniglot(tmp_path) -> Path:
    """The two archives, of 26 characters in place of 1623, 4 images each; easily told apart."""
    source = tmp_path / 'official'
    for c in range(26):
        alphabet = 'images_background/Greek' if c < 15 else 'images_evaluation/Tengwar'
        for i in range(4):
            path = source / alphabet / f'character{c:02d}' / f'{c:04d}_{i:02d}.png'
            draw(path, (105, 105), '1', c, i)
    for archive in ('images_background', 'images_evaluation'):
        zipped(source / f'{archive}.zip', source / archive)
    return source


@pytest.fixture
def omniglot(tmp_path, official_omniglot) -> list[str]:
    """Flags, the data prepared."""
    counts = prepare_omniglot.Counts(alphabets=2, characters=26, images=4)
    target = tmp_path / 'data' / 'omniglot_resized'
    prepare_omniglot.prepare(official_omniglot, target, counts=counts)
    flags = ['--datasource=omniglot', '--num_classes=2', '--update_batch_size=1']
    flags += ['--meta_batch_size=4', '--num_filters=8']
    return [*flags, f'--data_dir={tmp_path}/data', f'--logdir={tmp_path}/logs']


def assert_trained(outcome: Outcome, folder: Path, iterations: int):
    line = rf'^Iteration 100 of \d+: accuracy {NUMBER} % before any update, {NUMBER} % after 1 '
    assert re.search(line, outcome.out, re.MULTILINE), outcome.out
    assert 'Traceback' not in outcome.err
    assert [*checkpoints(folder)] == [iterations - 1]


def assert_continued(outcome: Outcome, folder: Path, first: int, iterations: int):
    assert f'Restoring model weights from {folder}/model{first - 1}' in outcome.lines
    assert [*checkpoints(folder)] == [first - 1, iterations - 1]


@pytest.mark.slow
def test_omniglot_fully_connected(tmp_path, omniglot):
    flags = [*omniglot, '--conv=False', '--norm=None', '--update_lr=0.4', '--meta_lr=0.003']
    folder = tmp_path / 'logs' / 'cls_2.mbs_4.ubs_1.numstep1.updatelr0.4hidden8nonorm'
    assert_trained(run(*flags, '--metatrain_iterations=101'), folder, 101)
    assert_continued(run(*flags, '--metatrain_iterations=103'), folder, 101, 103)
    outcome = run(*flags, '--train=False', '--test_set=True')
    assert f'Restoring model weights from {folder}/model102' in outcome.lines
    values = results(folder, 'test_ubs1_stepsize0.4')
    assert values[:, 10].mean() > 0.65  # of two classes


@pytest.mark.slow
def test_omniglot(tmp_path, omniglot):
    """With convolutions, to accuracies of new classes that are far above chance."""
    flags = [*omniglot, '--update_lr=0.4']
    folder = tmp_path / 'logs' / 'cls_2.mbs_4.ubs_1.numstep1.updatelr0.4hidden8batchnorm'
    assert_trained(run(*flags, '--metatrain_iterations=901'), folder, 901)
    assert_continued(run(*flags, '--metatrain_iterations=911'), folder, 901, 911)
    run(*flags, '--train=False', '--test_set=True')
    assert results(folder, 'test_ubs1_stepsize0.4')[:, 1].mean() > 0.8
    before = listing(tmp_path / 'logs')
    assert 'complete' in run(*flags, '--metatrain_iterations=911').out
    assert listing(tmp_path / 'logs') == before
    outcome = command('main.py', *flags, '--train=False', '--test_iter=5')
    assert outcome.status == 1 and '--test_iter=5' in outcome.err and '900, 910' in outcome.err
    assert 'Traceback' not in outcome.err and listing(tmp_path / 'logs') == before


@pytest.fixture
def official_miniimagenet(tmp_path) -> Path:
    """images/ and the three csv files, of 4 classes per split in place of 64, 16 and 20."""
    source = tmp_path / 'official'
    for s, split in enumerate(('train', 'val', 'test')):
        rows = []
        for c in range(4):
            for i in range(16):
                rows.append((f'n{s}{c:07d}{i:08d}.jpg', f'n{s}{c:07d}'))
                draw(source / 'images' / rows[-1][0], (120, 100), 'RGB', 100 * s + c, i)
        with open(source / f'{split}.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('filename', 'label'), *rows])
    return source


@pytest.mark.slow
def test_miniimagenet(tmp_path, official_miniimagenet):
    folders = [f'--source={official_miniimagenet}', f'--target={tmp_path}/data/miniImagenet']
    succeeded(command('scripts/data/prepare_miniimagenet.py', *folders))
    flags = ['--datasource=miniimagenet', '--num_classes=4', '--update_batch_size=1']
    flags += ['--meta_batch_size=2', '--num_filters=4', '--max_pool=True', '--update_lr=0.01']
    flags += [f'--data_dir={tmp_path}/data', f'--logdir={tmp_path}/logs']
    folder = tmp_path / 'logs' / 'cls_4.mbs_2.ubs_1.numstep1.updatelr0.01hidden4maxpoolbatchnorm'
    assert_trained(run(*flags, '--metatrain_iterations=110'), folder, 110)
    assert_continued(run(*flags, '--metatrain_iterations=120'), folder, 110, 120)
    run(*flags, '--train=False')
    values = results(folder, 'test_ubs1_stepsize0.01_val')
    assert values[:, 10].mean() > 0.6  # of four classes


@pytest.mark.slow
def test_sinusoid(tmp_path):
    flags = ['--norm=None', '--update_batch_size=10', f'--logdir={tmp_path}']
    folder = tmp_path / 'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm'
    outcome = run(*flags, '--metatrain_iterations=1001')
    assert re.search(
        rf'^Iteration 1000 of 1001: loss {NUMBER} before any update, {NUMBER} ',
        outcome.out,
        re.MULTILINE,
    )
    run(*flags, '--train=False')
    losses = results(folder, 'test_ubs10_stepsize0.001_val').mean(0)
    assert losses[10] < losses[1] < losses[0]
