"""A user's own images and tasks: --datasource=folder, class Learner and scripts/model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from command_line import (
    ROOT,
    Outcome,
    assert_refused,
    draw,
    in_process,
    listing,
    make_miniimagenet,
    make_omniglot,
    parsed,
    run,
    succeeded,
)
from PIL import Image

from data_generator import Batch, SinusoidGenerator
from fewshot.data.image_files import folder_layout, read_image, run_layout
from fewshot.data.image_folders import load_miniimagenet
from fewshot.data.own_images import load_folder
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model
from fewshot.networks.paper_networks import FullyConnected
from fewshot.runs import flags as flags_module
from fewshot.runs.checkpoints import read_run_state, write_checkpoint
from fewshot.runs.results import confidence
from fewshot.runs.summaries import event_files, read_events, read_scalars
from fewshot.use.fit import MetaModel
from fewshot.use.learner import Learner
from maml import cross_entropy, mean_squared_error, repeated
from scripts.model import classify, export, publish

SUPPORT, QUERY = (ROOT / 'tests' / 'characters' / name for name in ('support', 'query'))


def make_folder(folder: Path, classes: int = 12, images: int = 4) -> Path:
    """Class folders of images of several formats and sizes."""
    for c in range(classes):
        for i in range(images):
            suffix = ('png', 'jpg', 'bmp', 'gif', 'webp', 'tiff')[(c + i) % 6]
            path = folder / f'class{c:02d}' / f'{i}.{suffix}'
            draw(path, (20 + c, 30 + i), 'L' if suffix == 'gif' else 'RGB', c, i)
    return folder


# Folders ------------------------------------------------------------------------------------------


def test_folders_of_splits_equal_miniimagenet(tmp_path):
    make_miniimagenet(tmp_path)
    ours, theirs = load_folder(tmp_path / 'miniImagenet'), load_miniimagenet(tmp_path)
    for split, classes in theirs.items():
        assert classes.names == ours[split].names
        np.testing.assert_array_equal(classes.images, ours[split].images)


def test_classes_are_shared_out(tmp_path, capsys):
    """By their names alone; each in one split; again without decoding."""
    folder = make_folder(tmp_path / 'photos')
    loaded = load_folder(folder, image_size=10, channels=1, proportions=(2, 1, 1))
    sizes = {split: len(classes.names) for split, classes in loaded.items()}
    assert sizes == {'train': 6, 'val': 3, 'test': 3}
    names = [name for classes in loaded.values() for name in classes.names]
    assert sorted(names) == [f'class{c:02d}' for c in range(12)]
    assert loaded['train'].images.shape == (48, 10, 10, 1) and 'Decoding' in capsys.readouterr().err
    again = load_folder(folder, image_size=10, channels=1, proportions=(2, 1, 1))
    assert again['val'].names == loaded['val'].names and not capsys.readouterr().err
    assert load_folder(folder, image_size=9)['train'].images.shape == (48, 9, 9, 3)  # another cache
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'photos', 'photos.10x10x1.crop.cache.npy', 'photos.9x9x3.crop.cache.npy'}


@pytest.mark.parametrize(
    'classes, shares, sizes',
    [
        (3, (1, 1, 1), (1, 1, 1)),
        (3, (0.98, 0.01, 0.01), (1, 1, 1)),
        (3, (1, 8, 1), (1, 1, 1)),
        (100, (0.64, 0.16, 0.2), (64, 16, 20)),
        (5, (1, 1, 8), (1, 1, 3)),
    ],
)
def test_every_split_gets_a_class(tmp_path, classes, shares, sizes):
    make_folder(tmp_path / 'photos', classes, images=1)
    loaded = load_folder(tmp_path / 'photos', 4, proportions=shares)
    counts = [len(loaded[split].names) for split in ('train', 'val', 'test')]
    assert sum(counts) == classes and min(counts) >= 1
    assert classes == 5 or tuple(counts) == sizes


def test_what_pillow_reads(tmp_path):
    """Transparency is white, 16 bits are scaled, a camera's orientation is kept, and more."""

    def read(name, channels=3):
        return read_image(str(tmp_path / name), folder_layout(2, channels))

    Image.new('RGBA', (5, 5), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert (read('clear.png') == 255).all()
    Image.fromarray(np.full((3, 3), 0x8000, np.uint16)).save(tmp_path / 'deep.png')
    assert (read('deep.png', 1) == 128).all() and (read('deep.png') == 128).all()
    Image.new('CMYK', (3, 3), (0, 255, 255, 0)).save(tmp_path / 'print.tiff')
    assert np.abs(read('print.tiff').astype(int) - [255, 0, 0]).max() < 5
    sideways = Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    sideways.save(tmp_path / 'turned.png', exif=exif)
    assert read('turned.png', 1)[..., 0].tolist() == [[0, 0], [255, 255]]


def unreadable(folder: Path) -> list[str]:
    (folder / 'class03/3.png').write_bytes(b'none')
    return ['class03/3.png', 'cannot be decoded']


def thirty_two_bits(folder: Path) -> list[str]:
    Image.fromarray(np.zeros((3, 3), np.float32)).save(folder / 'class03/x.tiff')
    return ['class03/x.tiff', 'at most 16 bits']


def empty_class(folder: Path) -> list[str]:
    (folder / 'class90').mkdir()
    (folder / 'class90/notes.txt').write_text('none')
    return ['class90 holds no images']


def two_classes(folder: Path) -> list[str]:
    for c in range(2, 12):
        shutil.rmtree(folder / f'class{c:02d}')
    return ['only 2 class folders']


def short_class(folder: Path) -> list[str]:
    (folder / 'class01/2.gif').unlink(missing_ok=True)
    for path in sorted((folder / 'class01').iterdir())[1:]:
        path.unlink()
    return ['class01', 'has 1 images', 'a task takes 2']


def no_folder(folder: Path) -> list[str]:
    shutil.rmtree(folder)
    return ['photos', 'folder of images for each class']


def no_classes(folder: Path) -> list[str]:
    for path in folder.iterdir():
        shutil.rmtree(path)
    return ['photos', 'folder of images for each class']


@pytest.mark.parametrize(
    'spoil',
    [unreadable, thirty_two_bits, empty_class, two_classes, short_class, no_folder, no_classes],
)
def test_spoilt_folders(tmp_path, spoil):
    folder = make_folder(tmp_path / 'photos')
    words = spoil(folder)
    flags = ['--datasource=folder', f'--data_dir={folder}', f'--logdir={tmp_path}/logs']
    flags += ['--num_classes=2', '--update_batch_size=1', '--image_size=8']
    splits = ['10,1,1', '1,10,1'] if spoil is short_class else ['10,1,1']
    outcomes = [run(*flags, f'--split={split}') for split in splits]
    assert_refused(next(outcome for outcome in outcomes if outcome.status), 'main.py: ', *words)


@pytest.mark.parametrize(
    'flag, words',
    [
        ('--split=1,2', 'three numbers above 0'),
        ('--split=a,b,c', 'three numbers above 0'),
        ('--split=1,0,1', 'three numbers above 0'),
        ('--channels=2', '--channels must be 1'),
        ('--image_size=0', '--image_size must be at least 1'),
        ('--test_query=0', '--test_query must'),
        ('--test_query=3', '--train=False'),
        ('--transductive=False', '--train=False'),
    ],
)
def test_flags_refused(tmp_path, flag, words):
    outcome = run('--datasource=folder', flag, f'--logdir={tmp_path}')
    assert_refused(outcome, flag.split('=')[0], words)


@pytest.mark.slow
def test_folder_from_the_command_line(tmp_path, eager):
    """Trains, continues, evaluates on each split, with more queries, without their statistics.

    Another split is refused.
    """
    folder = make_folder(tmp_path / 'photos')
    flags = ['--datasource=folder', f'--data_dir={folder}', f'--logdir={tmp_path}/logs']
    flags += ['--num_classes=2', '--update_batch_size=1', '--image_size=8', '--channels=1']
    flags += ['--num_filters=4', '--meta_batch_size=2', '--split=1,1,1']
    succeeded(run(*flags, '--metatrain_iterations=2'))
    continued = succeeded(run(*flags, '--metatrain_iterations=3'))
    assert 'Continuing at iteration 2 of 3.' in continued.lines
    inductive = ['--transductive=False', '--test_query=2']
    for more in ([], ['--test_set=True'], ['--test_query=3'], inductive):
        succeeded(run(*flags, '--train=False', *more))
    (run_folder,) = (tmp_path / 'logs').iterdir()
    names = {path.stem for path in run_folder.glob('*.csv')}
    evaluated = 'test_ubs1_stepsize0.001'
    parts = ('', '_val', '_query3_val', '_query2_inductive_val')
    assert names == {evaluated + part for part in parts}
    assert_refused(run(*flags, '--train=False', '--split=1,2,1'), '--split=1,1,1 (now 1,2,1)')
    assert_refused(run(*flags, '--train=False', '--image_size=9'), '--image_size=8 (now 9)')
    model = Learner.load(run_folder)
    assert model.model.network.image_shape == (8, 8, 1)
    assert run_layout(model.settings) == folder_layout(8, 1, 'crop')


def test_interval_of_small_samples():
    values = np.random.default_rng(0).random(12)
    low, high = scipy.stats.t.interval(0.95, 11, values.mean(), scipy.stats.sem(values))
    assert confidence(values) == pytest.approx((high - low) / 2)
    assert confidence(values) > 1.05 * 1.96 * values.std(ddof=1) / 12**0.5


# The API ------------------------------------------------------------------------------------------


SMALL = dict(
    datasource='omniglot',
    update_batch_size=1,
    update_lr=0.4,
    num_updates=2,
    num_filters=4,
    num_classes=3,
    compiled=False,
    dtype=tf.float64,
)


def small_model(**settings) -> Learner:
    """As of a run on images."""
    return Learner(make_model(**SMALL | settings), {'datasource': 'omniglot'})


def some_tasks(shots: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Support images and labels, and four queries, of two tasks."""
    random = np.random.default_rng(0)
    x = random.random((2, 3 * shots, 28, 28, 1))
    return x, np.tile(np.arange(3), (2, shots)), random.random((2, 4, 28, 28, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    'settings',
    [
        {},
        pytest.param({'conv': False}, marks=pytest.mark.slow),
        pytest.param({'max_pool': True}, marks=pytest.mark.slow),
        pytest.param({'norm': 'layer_norm'}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('transductive', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_api_is_what_evaluation_computes(settings, transductive):
    """Probabilities after two updates are the softmax of evaluation's outputs, of one task, too."""
    model, (x, y, queries) = small_model(update_batch_size=2, **settings), some_tasks()
    labels = np.eye(3)[np.zeros((2, 4), int)]
    batch = Batch(x.reshape(2, 6, 784), np.eye(3)[y], queries.reshape(2, 4, 784), labels)
    expected = model.model.evaluate(batch, 2, transductive)
    weights = model.adapt(x, y)
    found = model.predict(queries, weights, None if transductive else x)
    np.testing.assert_allclose(found, tf.nn.softmax(expected.outputsb[1]), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1)
    single = model.adapt(x[0], y[0], steps=2, lr=0.4)
    of_one = model.predict(queries[0], single, None if transductive else x[0])
    np.testing.assert_allclose(of_one, found[0], rtol=1e-9, atol=1e-12)
    assert weights.keys() == model.model.weights.keys()
    assert all(isinstance(value, np.ndarray) for value in weights.values())


@pytest.mark.parametrize(
    'norm, conv',
    [('batch_norm', True), ('batch_norm', False), ('layer_norm', True), ('None', True)],
)
def test_without_the_queries_statistics_an_answer_stands_alone(norm, conv):
    """With them it depends on the other queries, but only under batch normalisation."""
    model, (x, y, queries) = small_model(norm=norm, conv=conv), some_tasks()
    weights = model.adapt(x, y)
    alone, together = (model.predict(q, weights, x)[:, :1] for q in (queries[:, :1], queries))
    np.testing.assert_allclose(alone, together, rtol=1e-9, atol=1e-12)
    difference = np.abs(model.predict(queries, weights) - model.predict(queries, weights, x)).max()
    assert difference > 1e-3 if norm == 'batch_norm' else difference < 1e-12


def test_alpha_means_the_same_for_any_number_of_examples():
    """Every example twice changes nothing; as many as in training give training's own step."""
    model, (x, y, _) = small_model(), some_tasks(shots=1)
    once = model.adapt(x, y, 1)
    twice = model.adapt(np.concatenate([x, x], 1), np.concatenate([y, y], 1), 1)
    maml = model.model
    support = maml.network.prepare(tf.constant(x.reshape(2, 3, 784)))
    labels = tf.one_hot(y, 3, dtype=tf.float64)
    trained = maml.maml.update(repeated(maml.weights, 2), maml.norms, None, support, labels)
    for name in once:
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(trained[name], once[name], rtol=1e-9, atol=1e-11)


def test_steps_one_by_one_and_losses():
    model, (x, y, queries) = small_model(update_lr=0.05), some_tasks()
    weights, losses = model.adapt(x, y, 0), []
    for _ in range(3):
        losses.append(model.task_loss(x, y, weights))
        weights = model.adapt(x, y, 1, weights=weights)
    at_once = model.adapt(x, y, 3)
    found, expected = model.predict(queries, weights), model.predict(queries, at_once)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    probabilities = model.predict(x, model.adapt(x, y, 0))
    expected = -np.log(np.take_along_axis(probabilities, y[..., np.newaxis], -1)).mean((1, 2))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-9)
    assert (losses[2] < losses[0]).all()


def test_bytes_are_images():
    model, (x, y, _) = small_model(), some_tasks()
    pixels = np.uint8(255 * x)
    one, other = model.adapt(pixels, y), model.adapt(pixels / 255, y)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda x, y: (x[..., :-1, :], y), 'support_x must be'),
        (lambda x, y: (x[:, :-1], y), 'support_x must be'),
        (lambda x, y: (x[0], y), 'support_x must be'),
        (lambda x, y: (255 * x, y), 'from 0 to 1'),
        (lambda x, y: (x * np.nan, y), 'from 0 to 1'),
        (lambda x, y: (x, y + 1), 'from 0 to 2'),
        (lambda x, y: (x, y - 1), 'from 0 to 2'),
        (lambda x, y: (x, y.astype(float)), 'integers'),
        (lambda x, y: (x, y[..., np.newaxis]), r'labels must be \[examples\]'),
        (lambda x, y: (x[:, :0], y[:, :0]), 'labels must be'),
    ],
)
def test_arrays_that_do_not_fit(change, words):
    x, y, _ = some_tasks()
    with pytest.raises(ValueError, match=words):
        small_model().adapt(*change(x, y))


def test_weights_that_do_not_fit():
    model, (x, y, queries) = small_model(), some_tasks()
    weights, single = model.adapt(x, y, 0), model.adapt(x[0], y[0], 0)
    for wrong, words in [
        ({}, 'adapt'),
        (weights | {'w9': 0}, 'w9'),
        (weights | {'b5': single['b5']}, 'one axis of tasks'),
        (
            {name: value[:1] for name, value in weights.items()},
            r'query_x must be \[1, examples, 28',
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            model.predict(queries, wrong)
    with pytest.raises(ValueError, match='query_x must be'):
        model.predict(queries, single)
    with pytest.raises(ValueError, match='labels must be'):
        model.adapt(x[0, 0], np.int64(1))
    with pytest.raises(ValueError, match='one axis of tasks'):
        model.adapt(x, y, weights=single)
    for arguments, words in [
        ((-1, None), 'steps must not be negative'),
        ((1, -0.1), 'lr must be'),
        ((1, np.inf), 'lr must be'),
    ]:
        with pytest.raises(ValueError, match=words):
            model.adapt(x, y, *arguments)


FALSE = (('steps', 2.0), ('steps', '2'), ('steps', np.nan), ('lr', 'a'), ('lr', 1j), ('lr', [1, 2]))
FALSE += (('weights', [1]), ('weights', 'abc'), ('weights', 3))


@pytest.fixture(scope='module')
def line() -> Learner:
    """Of regression, small."""
    return Learner(FastMAML(FullyConnected(1, (4,), 1), mean_squared_error, 0.1, compiled=False))


def points(count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(-1, 1, count)[:, np.newaxis]
    return x, np.sin(x)


def spoiled(array: np.ndarray, value) -> np.ndarray:
    changed = np.array(array, np.result_type(array, type(value)))
    changed.flat[0] = value
    return changed


@pytest.mark.parametrize('name, value', FALSE)
def test_arguments_of_adapt_are_refused_by_name(line, name, value):
    with pytest.raises(ValueError, match=f'{name}.* must be'):
        line.adapt(*points(), **{name: value})


@pytest.mark.parametrize(
    'change',
    [
        lambda a: spoiled(a, np.nan),
        lambda a: spoiled(a, np.inf),
        lambda a: 1e300 * a,
        lambda a: a * 1j,
        lambda a: a.astype(str),
        lambda a: a.astype('datetime64[D]'),
        lambda a: [[1], [1, 2]],
        lambda a: {},
    ],
)
def test_no_numbers_are_refused_by_name(line, change):
    """As examples, labels, queries and weights, with ValueError."""
    (x, y), weights = points(), line.adapt(*points())
    wrong = weights | {'w1': change(weights['w1'])}
    for call, name in [
        (lambda: line.adapt(change(x + 2), y), 'support_x'),
        (lambda: line.adapt(x, change(y + 2)), 'labels'),
        (lambda: line.predict(change(x + 2), weights), 'query_x'),
        (lambda: line.predict(x, weights, change(x + 2)), 'support_x'),
        (lambda: line.task_loss(change(x + 2), y, weights), 'x'),
        (lambda: line.predict(x, wrong), 'weight w1'),
        (lambda: line.predict(x, change(x)), 'weights'),
    ]:
        with pytest.raises(ValueError, match=rf'\b{name}\b'):
            call()


def test_what_lists_and_tensors_hold_is_taken(line):
    (x, y), weights = points(), line.adapt(*points())
    expected = line.predict(x, weights)
    lists = {name: value.tolist() for name, value in line.adapt(x.tolist(), y.tolist()).items()}
    np.testing.assert_array_equal(line.predict(tf.constant(x), lists), expected)
    assert line.adapt(x, y, steps=np.int64(1), lr=np.float32(0.1)).keys() == weights.keys()


def test_the_type_alone_says_what_pixels_are():
    """uint8 is divided by 255, whatever its values; 0 and 1 of other types are not."""
    model, (x, y, _) = small_model(conv=False), some_tasks()
    drawn = x > 0.5
    expected = model.adapt(drawn.astype(float), y)
    for kind in (int, bool, np.float16):
        found = model.adapt(drawn.astype(kind), y)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    dark = model.adapt(drawn.astype(np.uint8), y)
    assert not np.array_equal(dark['w1'], expected['w1'])
    with pytest.raises(ValueError, match='or be uint8 from 0 to 255, but it is int64'):
        model.adapt(np.int64(255 * x), y)
    rounded = spoiled(spoiled(x, 1.0000002)[..., ::-1, :], -1e-7)
    assert np.isfinite(model.adapt(rounded, y)['w1']).all()


def small_line(**given) -> FastMAML:
    network = FullyConnected(1, (4,), 1, initial='glorot')
    return FastMAML(network, mean_squared_error, 0.1, compiled=False, **given)


def trained_line() -> FastMAML:
    """After two steps, with an outer loss that changes."""
    given = {'loss_steps': 'all', 'loss_steps_iterations': 7, 'first_order_iterations': 3}
    model = small_line(num_updates=2, clip=0.5, **given)
    for i in range(2):
        model.metatrain_step(SinusoidGenerator(3, 3).batch('train', i, 4))
    return model


def after_one_more(model: FastMAML) -> list[np.ndarray]:
    """All variables after the third step."""
    model.metatrain_step(SinusoidGenerator(3, 3).batch('train', 2, 4))
    return [v.numpy() for v in [*model.parameters, *model.metatrain_optimizer.variables]]


def test_save_and_load_go_on_exactly(tmp_path):
    """Bit for bit, with all that makes the next step what it is."""
    model = trained_line()
    Learner(model).save(tmp_path)
    loaded = Learner.load(tmp_path, network=small_line().network).model
    for one, other in zip(after_one_more(model), after_one_more(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    'lost', ['clip', 'loss_steps loss_steps_iterations', 'first_order_iterations', 'trained_on']
)
def test_what_older_files_do_not_hold(tmp_path, lost):
    """They are loaded; the next step is another one, as far as it depends on that."""
    model = trained_line()
    Learner(model).save(tmp_path)
    settings = read_run_state(f'{tmp_path}/model0')['flags']
    for name in lost.split():
        del settings[name]
    write_checkpoint(model.checkpoint, tmp_path, 0, {'flags': settings})
    loaded = Learner.load(tmp_path, network=small_line().network).model
    same = [*map(np.array_equal, after_one_more(model), after_one_more(loaded))]
    assert all(same) == (lost == 'trained_on')


def classifier() -> FastMAML:
    return FastMAML(FullyConnected(3, (4,), 2), cross_entropy(1), 0.1, compiled=False)


def test_a_classifier_takes_numbers_of_any_range():
    """Signals, z-scores, token ids: only of a run on images there is a range."""
    random = np.random.default_rng(0)
    x, y = random.normal(0, 100, (4, 3)), np.array([0, 1, 1, 0])
    for learner in Learner(classifier()), MetaModel(classifier()):
        assert np.isfinite(learner.adapt(x, y, lr=1e-6)['w1']).all()
        assert np.isfinite(learner.adapt(np.int64(x), y, lr=1e-6)['w1']).all()
    for source, takes in ('omniglot', True), ('folder', True), ('a.py:f', False), ('own', False):
        assert Learner(classifier(), {'datasource': source}).takes_images is takes


@pytest.mark.parametrize('kind', [np.uint8, np.float64, np.int32, None])
@pytest.mark.parametrize('step', ['metatrain_step', 'pretrain_step'])
def test_bytes_go_in_as_in_training(tmp_path, kind, step):
    """A model that was trained on floats refuses them, loaded too; others take them as they are."""
    x, y = np.random.default_rng(0).integers(0, 255, (2, 4, 3)), np.tile(np.eye(2), (2, 2, 1))
    model = classifier()
    if kind:
        getattr(model, step)(Batch(kind(x), y, kind(x), y))
    Learner(model).save(tmp_path)
    for learner in Learner(model), Learner.load(tmp_path, network=classifier().network):
        weights = learner.adapt(x[0], [0, 1, 0, 1], lr=1e-6)
        if kind == np.float64:
            with pytest.raises(ValueError, match='trained on floats; give numbers as in training'):
                learner.predict(np.uint8(x[0]), weights)
        else:
            answers = (learner.predict(values, weights) for values in (x[0], np.uint8(x[0])))
            np.testing.assert_array_equal(*answers)


def test_bytes_for_the_model_of_a_run_on_images(run_folder):
    """Training had values from 0 to 1; without the run's settings nothing would divide."""
    learner, images = Learner.load(run_folder), np.zeros((5, 28, 28, 1), np.uint8)
    assert np.isfinite(learner.adapt(images, np.arange(5))['w5']).all()
    with pytest.raises(ValueError, match='support_x is uint8, but the model was trained on floats'):
        MetaModel(learner.model).adapt(images, np.arange(5))


def test_what_diverges_is_an_error(line):
    """After adaptation, and where weights that are finite give no finite answers."""
    (x, y), huge = points(), {name: 0 * value for name, value in line.adapt(*points()).items()}
    huge = {name: value + 1e30 for name, value in huge.items()}
    with pytest.raises(ValueError, match='after 9 steps with lr=1e[+]30 the weights .* smaller lr'):
        line.adapt(x, y, 9, 1e30)
    for call in (lambda: line.predict(x, huge), lambda: line.task_loss(x, y, huge)):
        with pytest.raises(ValueError, match='adaptation diverged'):
            call()


class CountingNetwork(FullyConnected):
    """Knows how often it was called, which a program of TensorFlow does once."""

    calls = 0

    def __call__(self, *arguments):
        CountingNetwork.calls += 1
        return super().__call__(*arguments)


class StubbornNetwork(FullyConnected):
    """Must know the numbers of tasks and examples."""

    def __call__(self, x, *others):
        return super().__call__(tf.reshape(x, [int(n) for n in x.shape]), *others)


@pytest.mark.parametrize('kind', [CountingNetwork, StubbornNetwork])
def test_any_size_without_a_program_for_each(kind):
    """As FastMAML's evaluation says, whatever the numbers; of one task and of several."""
    model = FastMAML(kind(1, (4,), 1, 'batch_norm'), mean_squared_error, 0.1, compiled=False)
    learner = Learner(model)
    before = CountingNetwork.calls
    for i in range(1, 13):
        x, y = points(i)
        weights = learner.adapt(x, y, steps=2)
        several = learner.adapt(np.stack([x] * (i + 1)), np.stack([y] * (i + 1)), steps=2)
        np.testing.assert_allclose(several['w1'][i], weights['w1'], rtol=1e-5)
        learner.predict(points(14 - i)[0], weights)
        learner.predict(points(14 - i)[0], weights, x)
        learner.task_loss(x, y, weights)
    assert kind is StubbornNetwork or CountingNetwork.calls - before <= 5
    x, y = points(5)
    arrays = [np.float32(array[np.newaxis]) for array in (x, y, x, y)]
    expected = model.evaluate(Batch(*arrays), 2).outputsb[1, 0]
    np.testing.assert_allclose(learner.predict(x, learner.adapt(x, y, 2)), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True])
def test_memory_stays_over_a_thousand_sizes(compiled):
    model = FastMAML(FullyConnected(1, (40, 40), 1), mean_squared_error, 0.01, compiled=compiled)
    learner = Learner(model)

    def megabytes() -> float:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        return pages * os.sysconf('SC_PAGESIZE') / 2**20

    def use(sizes: range):
        for size in sizes:
            x, y = points(size)
            learner.predict(points(2 * size)[0], learner.adapt(x, y))

    use(range(1, 1050))  # oneDNN keeps the 1,024 operations that it made last
    before = megabytes()
    use(range(1050, 2050))
    assert megabytes() < before + 60


NUMBERS = [('update_lr', ['a', None, 1j, np.nan]), ('num_updates', [2.0, '2', -1])]
NUMBERS += [('meta_lr', ['a', None, -1]), ('clip', ['a', 0, np.nan]), ('seed', ['a', -1, 1.5])]
NUMBERS += [('dtype', ['float16', 'int32', 'none'])]


@pytest.mark.parametrize('name, values', NUMBERS)
def test_numbers_of_a_model_are_refused_by_name(name, values):
    for value in values:
        given = {'update_lr': 0.1} | {name: value}
        with pytest.raises(ValueError, match=f'{name} must (not )?be'):
            FastMAML(FullyConnected(1, (4,), 1), mean_squared_error, **given)


def test_sizes_are_refused_by_name(line):
    batch, source = Batch(*np.zeros((4, 2, 3, 1))), SinusoidGenerator(1, 1)
    for call, words in [
        (lambda: line.model.evaluate(batch, 2.0), 'num_updates must be'),
        (lambda: line.model.evaluate(None, 1), 'four arrays, inputa, labela.* type NoneType'),
        (lambda: line.model.evaluate([*batch], 1), 'of type list: write Batch[(]inputa='),
        (lambda: line.model.evaluate(Batch(1, 2, 3, 4), 1), 'inputa must be'),
        (lambda: line.model.evaluate(Batch(1, 2, 3, [1, [2]]), 1), 'labelb must be an array'),
        (lambda: cross_entropy(0), 'shots must be'),
        (lambda: FullyConnected(1, 40, 1), 'a tuple of numbers'),
        (lambda: FullyConnected(1, (2.5,), 1), 'at least one unit'),
        (lambda: source.batch('train', 0, 2.0), '--meta_batch_size must be'),
        (lambda: source.batch('train', 1.5, 2), 'iteration must be'),
        (lambda: SinusoidGenerator('5', 1), '--update_batch_size must be'),
        (lambda: SinusoidGenerator(1, 1, seed=None), 'seed must be'),
        (lambda: Learner(None), 'model must be a FastMAML'),
        (lambda: MetaModel(line.model, updates=1.5), 'updates must be'),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def saved(folder: Path, settings: dict, flags: dict | None = None) -> Path:
    """A run folder with an untrained model."""
    folder.mkdir(parents=True)
    model = make_model(**settings, compiled=False)
    write_checkpoint(model.checkpoint, folder, 3, {'flags': settings if flags is None else flags})
    return folder


SETTINGS = dict(
    datasource='omniglot',
    update_batch_size=1,
    update_lr=0.1,
    num_updates=2,
    num_filters=4,
    num_classes=5,
    image_size=84,
    channels=3,
)


def test_load(tmp_path):
    folder = saved(tmp_path / 'cls_5', SETTINGS | {'seed': 7})
    model, same = Learner.load(folder), make_model(**SETTINGS, seed=7, compiled=False)
    for loaded, made in zip(model.model.parameters, same.parameters, strict=True):
        np.testing.assert_array_equal(loaded, made)
    assert model.settings['update_lr'] == 0.1
    for path, checkpoint, words in [
        (tmp_path, -1, 'has the runs cls_5, x: give a folder that main.py trained in'),
        (folder, 2, 'iterations that are there: 3'),
        (folder, 'last', "'best' or -1 .* but it is 'last'"),
        (folder, 2.5, "'best' or -1 .* but it is 2.5"),
        (tmp_path / 'none', -1, 'there is no folder .*none'),
        (None, -1, 'run_folder must be the path of a folder'),
        (folder, 'best', 'no best checkpoint.* the newest, of iteration 3'),
        (saved(tmp_path / 'x', SETTINGS, {}), -1, 'does not tell the flags'),
    ]:
        with pytest.raises(ValueError, match=words):
            Learner.load(path, checkpoint)
    for given, words in ({'network': 'a'}, 'network must be'), ({'loss': 'a'}, 'the loss fails'):
        with pytest.raises(ValueError, match=words):
            Learner.load(folder, **given)


def test_saved_where_load_finds_it(tmp_path, line):
    """Not among the checkpoints of a run, of which load takes the newest."""
    line.save(tmp_path)
    line.save(tmp_path)
    loaded = Learner.load(tmp_path, network=FullyConnected(1, (4,), 1))
    np.testing.assert_array_equal(loaded.model.weights['w1'], line.model.weights['w1'])
    run_folder = saved(tmp_path / 'run', SETTINGS)
    before = listing(run_folder)
    with pytest.raises(ValueError, match='holds checkpoints of a run, 3 the newest'):
        line.save(run_folder)
    assert listing(run_folder) == before


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    """Python and all scripts take it, and say so; all damaged, it is an error."""
    folder = saved(tmp_path / 'cls_5', SETTINGS)
    path = Path(write_checkpoint(small_model().model.checkpoint, folder, 9, {'flags': SETTINGS}))
    for damaged in path.with_name('model9.data-00000-of-00001'), folder / 'model3.index':
        damaged.write_bytes(b'x')
        programs = [
            (publish.main, [str(folder), f'{tmp_path}/{damaged.name}']),
            (classify.main, [str(folder), str(SUPPORT), str(QUERY)]),
            (export.main, [str(folder), f'{tmp_path}/{damaged.name}.out']),
        ]
        if damaged.name.startswith('model9'):
            with pytest.warns(
                UserWarning, match='model9 cannot be read.*the one before it is used'
            ):
                assert Learner.load(folder).checkpoint == str(folder / 'model3')
            for program, arguments in programs[:2]:
                outcome = succeeded(in_process(program, arguments))
                assert outcome.err.count('model9 cannot be read') == 1
            assert (tmp_path / damaged.name / 'cls_5/model3.index').exists()
        else:
            for program, arguments in programs:
                assert_refused(in_process(program, arguments), 'model3 cannot be read', 'is whole')
    with pytest.raises(ValueError, match='model9 cannot be read'):
        Learner.load(folder, 9)


@pytest.mark.slow
def test_readme_example():
    """Every Python block of the README, as it stands there."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert blocks
    for block in blocks:
        line = [sys.executable, '-B', '-c', block]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = re.findall(r'# prints (.*)', block)
        assert done.stdout.split('\n')[:-1] == printed


# scripts/model/classify.py ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp('use') / 'cls_5', SETTINGS)


def classified(*arguments) -> dict:
    """What classify.py answers, as JSON."""
    line = [*map(str, arguments), '--json']
    return json.loads(succeeded(in_process(classify.main, line)).out)


def test_classify(run_folder):
    """Steps lower the loss, probabilities sum to one; text and JSON say the same."""
    arguments = [str(run_folder), str(SUPPORT), str(QUERY), '--steps=3']
    found = classified(*arguments)
    assert found['labels'] == sorted(path.name for path in SUPPORT.iterdir())
    losses, images = found['losses'], found['images']
    assert len(losses) == 4 and losses[3] < losses[0]
    names = [Path(image['image']).name for image in images]
    assert names == sorted(path.name for path in QUERY.iterdir())
    for image in images:
        assert sum(image['probabilities'].values()) == pytest.approx(1)
        assert image['probabilities'][image['label']] == image['probability']
    lines = succeeded(in_process(classify.main, arguments)).lines
    assert lines[0] == f'step 0: loss {losses[0]:.4f} on the labelled images'
    first = images[0]
    assert lines[4].split() == [first['image'], first['label'], f'{first["probability"]:.3f}']


@pytest.mark.slow
def test_answers_of_classify_stand_alone(run_folder):
    """Unless --transductive says otherwise."""
    images = sorted(QUERY.iterdir())

    def probability(*arguments):
        return classified(run_folder, SUPPORT, *arguments)['images'][0]['probability']

    for more, alike in ([], True), (['--transductive'], False):
        alone, together = probability(images[0], *more), probability(*images, *more)
        assert (alone == pytest.approx(together, abs=1e-5)) == alike


def test_fewer_labels_than_ways(run_folder, tmp_path):
    for name in sorted(path.name for path in SUPPORT.iterdir())[:2]:
        shutil.copytree(SUPPORT / name, tmp_path / name)
    for image in classified(run_folder, tmp_path, QUERY)['images']:
        assert len(image['probabilities']) == 2
        assert sum(image['probabilities'].values()) == pytest.approx(1)


def remove_classes(support: Path, but: int = 0):
    for path in sorted(support.iterdir())[but:]:
        shutil.rmtree(path)


def remove_images(support: Path):
    for path in (support / 'Armenian').iterdir():
        path.unlink()


def spoil_image(support: Path):
    (support / 'Armenian/b.png').write_bytes(b'x')


@pytest.mark.parametrize(
    'change, words',
    [
        (shutil.rmtree, ['there is no folder']),
        (remove_classes, ['holds no class folders']),
        (lambda support: remove_classes(support, but=1), ['holds 1 class folder', 'at least two']),
        (lambda support: (support / 'sixth').mkdir(), ['holds 6 class folders', '5 ways']),
        (remove_images, ['Armenian holds no images']),
        (spoil_image, ['Armenian/b.png cannot be decoded']),
    ],
)
def test_bad_support_folders(run_folder, tmp_path, change, words):
    support = Path(shutil.copytree(SUPPORT, tmp_path / 'support'))
    change(support)
    outcome = in_process(classify.main, [str(run_folder), str(support), str(QUERY)])
    assert_refused(outcome, 'classify.py: ', *words)


def test_classify_refuses(run_folder, tmp_path):
    support, query = str(SUPPORT), str(QUERY)
    sinusoid = saved(tmp_path / 'sine', {'datasource': 'sinusoid', 'norm': 'None'})
    for arguments, words in [
        ([str(tmp_path), support, query], 'has no checkpoint'),
        ([str(sinusoid), support, query], 'has no images'),
        ([str(run_folder), support, str(tmp_path / 'none.png')], 'there is no image'),
        ([str(run_folder), support, str(tmp_path)], 'holds no images'),
        ([str(run_folder), support, query, '--steps=-1'], '--steps'),
        ([str(run_folder), support, query, '--lr=1e39', '--json'], 'diverged'),
    ]:
        assert_refused(in_process(classify.main, arguments), 'classify.py: ', words)


# scripts/model/export.py --------------------------------------------------------------------------

SERVE = """
import sys
import numpy as np
import tensorflow as tf
module, arrays = tf.saved_model.load(sys.argv[1]), np.load(sys.argv[2])
assert not {'maml', 'main', 'utils', 'special_grads'} & sys.modules.keys()
adapt, adapt_and_predict = (module.signatures[name] for name in ('adapt', 'adapt_and_predict'))
query, found = tf.constant(arrays['query']), {}
for shots in (1, 3, 5):
    images, labels = (tf.constant(arrays[f'{name}{shots}']) for name in 'xy')
    support = {'support_images': images, 'support_labels': labels}
    found[f'p{shots}'] = adapt_and_predict(**support, query_images=query)['probabilities']
    found |= {f'{name}/{shots}': value for name, value in adapt(**support).items()}
np.savez(sys.argv[3], **found)
"""


def tasks_to_serve() -> dict[str, np.ndarray]:
    """Queries of two tasks, and 1, 3 and 5 shots: {x1, y1, x3, ...}."""
    random = np.random.default_rng(1)
    arrays = {'query': random.random((2, 7, 28, 28, 1), np.float32)}
    for shots in (1, 3, 5):
        arrays[f'x{shots}'] = random.random((2, 5 * shots, 28, 28, 1), np.float32)
        arrays[f'y{shots}'] = np.tile(np.arange(5), (2, shots))
    return arrays


def served(model: Path, arrays: dict, folder: Path) -> dict[str, np.ndarray]:
    """What SERVE finds with a saved model in a process of its own."""
    np.savez(folder / 'in.npz', **arrays)
    line = [sys.executable, '-c', SERVE, model, folder / 'in.npz', folder / 'found.npz']
    subprocess.run(line, check=True, cwd=folder, timeout=300)
    return np.load(folder / 'found.npz')


@pytest.mark.slow
@pytest.mark.parametrize('transductive', [pytest.param(True, marks=pytest.mark.slow), False])
def test_saved_model(run_folder, tmp_path, transductive):
    """As Learner.predict, in a process that knows nothing of this project; 1, 3 and 5 shots."""
    arrays, out = tasks_to_serve(), tmp_path / 'out'
    arguments = [str(run_folder), str(out / 'model')]
    more = ['--steps=3', '--lr=.2', *(['--transductive'] if transductive else [])]
    outcome = succeeded(in_process(export.main, [*arguments, *more]))
    assert '5 ways, images 28x28x1, 3 steps' in outcome.out
    found, model = served(out / 'model', arrays, tmp_path), Learner.load(run_folder)
    for shots in (1, 3, 5):
        x, y = arrays[f'x{shots}'], arrays[f'y{shots}']
        weights = model.adapt(x, y, 3, 0.2)
        expected = model.predict(arrays['query'], weights, None if transductive else x)
        np.testing.assert_allclose(found[f'p{shots}'], expected, atol=1e-5)
        for name, value in weights.items():
            np.testing.assert_allclose(found[f'{name}/{shots}'], value, atol=1e-5)
    assert_served_refuses(out / 'model', arrays)
    before = listing(out)
    assert_refused(in_process(export.main, arguments), 'export.py: ', 'is there already')
    assert listing(out) == before and [path.name for path in out.iterdir()] == ['model']


def assert_served_refuses(folder: Path, arrays: dict):
    """What Learner.adapt refuses; images that rounding has moved beyond 1 are taken."""
    signature = tf.saved_model.load(folder).signatures['adapt_and_predict']
    good = {'support_images': arrays['x1'], 'support_labels': arrays['y1']}
    good |= {'query_images': arrays['query']}
    x, y, query = good.values()

    def call(changed: dict):
        arguments = {name: np.asarray(value, good[name].dtype) for name, value in changed.items()}
        arguments = {name: tf.constant(value) for name, value in (good | arguments).items()}
        return signature(**arguments)['probabilities']

    assert np.isfinite(call({'query_images': spoiled(query, 1.0000002)})).all()
    for name, value, words in [
        ('support_labels', spoiled(y, 9), 'support_labels must be from 0 to 4'),
        ('support_labels', spoiled(y, -1), 'support_labels must be from 0 to 4'),
        ('support_labels', y[:, :4], 'support_images must have the sizes'),
        ('support_images', 255 * x, 'support_images must be from 0 to 1'),
        ('support_images', x[:, :, :20], 'support_images must have the sizes'),
        ('query_images', spoiled(query, np.nan), 'query_images must be from 0 to 1'),
        ('query_images', query[:1], 'query_images must have the sizes'),
        ('query_images', query[:, :0], 'query_images must have the sizes'),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=words):
            call({name: value})


@pytest.mark.slow
def test_served_divergence_is_an_error(run_folder, tmp_path):
    arrays, out = tasks_to_serve(), tmp_path / 'out'
    flags = ['--steps=3', '--lr=1e38']
    succeeded(in_process(export.main, [str(run_folder), str(out), *flags]))
    adapt = tf.saved_model.load(out).signatures['adapt']
    with pytest.raises(tf.errors.InvalidArgumentError, match='adaptation diverged'):
        adapt(support_images=tf.constant(arrays['x1']), support_labels=tf.constant(arrays['y1']))


def test_export_refuses(tmp_path):
    sinusoid = saved(tmp_path / 'sine', {'datasource': 'sinusoid', 'norm': 'None'})
    for folder, words in (sinusoid, 'only classifiers'), (tmp_path, 'has no checkpoint'):
        outcome = in_process(export.main, [str(folder), str(tmp_path / 'out')])
        assert_refused(outcome, 'export.py: ', words)
    assert not (tmp_path / 'out').exists()


# scripts/model/publish.py -------------------------------------------------------------------------


def publish_run(run_folder: Path, target: Path) -> Outcome:
    return in_process(publish.main, [str(run_folder), str(target)])


def assert_command_of(run_folder: Path, text: str):
    """The text is a command line with the settings of the run, but for its folders."""
    python, program, *flags = shlex.split(text)
    assert (python, program) == ('python', 'main.py')
    here = {'data_dir': '', 'logdir': ''}
    assert flags_module.settings(parsed(*flags)) | here == Learner.load(run_folder).settings | here


@pytest.mark.slow
def test_publish(tmp_path, eager):
    """The same figures; without Adam's state, so that training goes on with a fresh one."""
    make_omniglot(tmp_path)
    flags = ['--datasource=omniglot', '--num_classes=2', '--update_batch_size=1']
    flags += ['--num_filters=4', '--meta_batch_size=2', f'--data_dir={tmp_path}']
    succeeded(run(*flags, '--metatrain_iterations=2', f'--logdir={tmp_path}/logs'))
    succeeded(run(*flags, '--train=False', f'--logdir={tmp_path}/logs'))
    (folder,) = (tmp_path / 'logs').iterdir()
    outcome = succeeded(publish_run(folder, tmp_path / 'kept'))
    kept = tmp_path / 'kept' / folder.name
    assert outcome.lines == [str(kept)]
    names = {name for name in listing(folder) if not name.startswith('model0')}
    assert listing(kept).keys() == names | {'command.txt'}
    assert_command_of(folder, (kept / 'command.txt').read_text())
    data, table = 'model1.data-00000-of-00001', kept / 'test_ubs1_stepsize0.001_val.csv'
    assert (kept / data).stat().st_size < 0.4 * (folder / data).stat().st_size
    expected = table.read_text()
    succeeded(run(*flags, '--train=False', f'--logdir={tmp_path}/kept'))
    assert table.read_text() == expected
    lines = succeeded(run(*flags, '--metatrain_iterations=3', f'--logdir={tmp_path}/kept')).lines
    assert 'The checkpoint holds the weights only, so Adam starts afresh.' in lines
    assert 'Continuing at iteration 2 of 3.' in lines
    again, nothing = publish_run(folder, tmp_path / 'kept'), publish_run(tmp_path, tmp_path / 'x')
    assert_refused(again, 'publish.py: ', 'is there already')
    assert_refused(nothing, 'publish.py: ', 'has no checkpoint')
    assert not (tmp_path / 'x').exists()


def test_published_summaries(tmp_path):
    """Numbers of every 500th iteration and the last of all; pictures, which are large, of fewer."""
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        for step in (0, 100, 500, 5000, 20000, 20100, 20200):
            tf.summary.scalar('loss', 1.0, step=step)
            if step != 20200:
                tf.summary.image('task', np.zeros([1, 2, 2, 3], np.uint8), step=step)
    writer.close()
    (source,) = event_files(tmp_path)
    (tmp_path / 'thin').mkdir()
    publish.thin(source, tmp_path / 'thin' / source.name)
    assert [*read_scalars(tmp_path / 'thin')['loss']] == [0, 500, 5000, 20000, 20200]
    steps = []
    for record in read_events(tmp_path / 'thin' / source.name):
        event = tf.compat.v1.Event.FromString(record)
        steps += [event.step for value in event.summary.value if value.tag == 'task']
    assert steps == [0, 20000]
