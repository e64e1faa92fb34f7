"""Tasks and class folders, on generated data; on real data if prepared (MAML_TEST_DATA)."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import draw, listing
from PIL import Image

import data_generator
from data_generator import Batch, ClassImages, ImageGenerator, SinusoidGenerator, split_classes
from fewshot.data import image_cache
from fewshot.data.image_folders import load_miniimagenet, load_omniglot
from fewshot.data.own_images import load_folder

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('MAML_TEST_DATA', ROOT.parent / 'shared' / 'data'))


def assert_equal(actual: Batch, expected: Batch):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def assert_differ(one: Batch, other: Batch):
    assert not np.array_equal(one.inputa, other.inputa)
    assert not np.array_equal(one.inputb, other.inputb)


# Every generator ----------------------------------------------------------------------------------

SIDE = 4


def class_images(counts, channels=1) -> ClassImages:
    """Images that tell: pixel (0, 0) is 1 + class, (0, 1) is 1 + image, the others are 0."""
    images = np.zeros((sum(counts), SIDE, SIDE, channels), np.uint8)
    owner = np.repeat(np.arange(len(counts)), counts)
    images[:, 0, 0] = 1 + owner[:, None]
    images[:, 0, 1] = 1 + np.concatenate([np.arange(n) for n in counts])[:, None]
    names, starts = [f'class{c}' for c in range(len(counts))], np.cumsum(counts) - counts
    return ClassImages('generated', names, starts, np.array(counts), images)


def read_back(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(class, image, quarter turns counter-clockwise) [T, shots*N] of images by class_images.

    inputs: [T, shots*N, D].
    """
    pixels = np.rint(inputs * 255).astype(int).reshape(*inputs.shape[:2], SIDE, SIDE)
    last = SIDE - 1
    # Where pixels (0, 0) and (0, 1) are after 0, 1, 2, 3 quarter turns.
    corners = [(0, 0), (last, 0), (last, last), (0, last)]
    beside = [(0, 1), (last - 1, 0), (last, last - 1), (1, last)]
    turns = sum(k * (pixels[..., r, c] > 0) for k, (r, c) in enumerate(corners))
    assert ((pixels > 0).sum((-2, -1)) == 2).all()
    classes = np.choose(turns, [pixels[..., r, c] for r, c in corners]) - 1
    images = np.choose(turns, [pixels[..., r, c] for r, c in beside]) - 1
    assert (classes >= 0).all() and (images >= 0).all()
    return classes, images, turns


def rotated_images(seed: int) -> ImageGenerator:
    folders = dict.fromkeys(data_generator.SPLITS, class_images([20] * 30, channels=3))
    return ImageGenerator(folders, 5, 2, 3, rotate=True, seed=seed)


GENERATORS = {
    'sinusoid': lambda seed: SinusoidGenerator(5, 7, seed=seed),
    'oracle': lambda seed: SinusoidGenerator(5, 5, oracle=True, seed=seed),
    'images': rotated_images,
}


@pytest.fixture(params=GENERATORS)
def make(request):
    return GENERATORS[request.param]


def test_batch_is_a_pure_function_of_seed_split_and_iteration(make):
    batch = make(3).batch('train', 11, 4)
    generator = make(3)
    generator.batch('val', 5, 9)
    assert_equal(generator.batch('train', 11, 4), batch)
    assert_equal(generator.batch('train', 11, 4), batch)
    assert_differ(batch, make(4).batch('train', 11, 4))
    for split, iteration in ('val', 11), ('test', 11), ('train', 12):
        assert_differ(batch, generator.batch(split, iteration, 4))
    tasks = batch.inputa.reshape(4, -1)
    assert len(np.unique(tasks, axis=0)) == 4


@pytest.mark.parametrize(
    'tasks', [slice(0, 3), slice(3, 7), slice(6, 7), slice(None), slice(1, 7, 2), slice(5, 99)]
)
def test_share_of_the_tasks_equals_slice_of_the_batch(make, tasks):
    generator = make(0)
    whole = generator.batch('test', 2, 7)
    assert_equal(generator.batch('test', 2, 7, tasks), Batch(*(array[tasks] for array in whole)))


def test_first_tasks_do_not_depend_on_the_number_of_tasks(make):
    generator = make(0)
    many = generator.batch('val', 0, 600)
    assert_equal(generator.batch('val', 0, 3), Batch(*(array[:3] for array in many)))


def test_batches_equal_single_ones(make):
    generator = make(0)
    stacked = generator.batches('train', 40, 3, 6)
    for i in range(3):
        assert_equal(Batch(*(array[i] for array in stacked)), generator.batch('train', 40 + i, 6))


def test_a_share_does_not_gather_the_images_of_the_rest(monkeypatch):
    generator, gathered = GENERATORS['images'](0), []
    pixels = generator._pixels

    def counted(classes, indices, turns):
        gathered.append(indices.size)
        return pixels(classes, indices, turns)

    monkeypatch.setattr(generator, '_pixels', counted)
    generator.batch('val', 0, 600, slice(100, 102))
    assert gathered == [2 * 5 * 2, 2 * 5 * 3]


def test_arrays_are_contiguous_and_sized(make):
    generator = make(0)
    batch = generator.batch('train', 0, 2)
    assert all(array.flags.c_contiguous for array in batch)
    assert batch.inputa.shape[2] == batch.inputb.shape[2] == generator.dim_input
    assert batch.labela.shape[2] == batch.labelb.shape[2] == generator.dim_output


def test_unknown_split_and_bad_numbers(make):
    with pytest.raises(ValueError, match="no split 'tets'"):
        make(0).batch('tets', 0, 1)
    with pytest.raises(ValueError, match='--meta_batch_size must be at least 1, but it is 0'):
        make(0).batch('train', 0, 0)
    with pytest.raises(ValueError, match='seed'):
        make(-1)


# Sinusoids ----------------------------------------------------------------------------------------


def test_sinusoid_shapes_and_ranges():
    batch = SinusoidGenerator(10, 15, oracle=True).batch('train', 0, 4000)
    shapes = [(4000, 10, 3), (4000, 10, 1), (4000, 15, 3), (4000, 15, 1)]
    assert [array.shape for array in batch] == shapes
    inputs = np.concatenate([batch.inputa, batch.inputb], axis=1)
    for column, low, high in ((0, -5, 5), (1, 0.1, 5), (2, 0, np.pi)):
        values = inputs[..., column].astype(np.float64)
        assert low - 1e-6 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-6
        quarters = np.histogram(values, bins=4, range=(low, high))[0] / values.size
        # Uniform: the standard error of 4000 tasks is .007.
        np.testing.assert_allclose(quarters, 0.25, atol=0.03)
    assert (inputs[..., 1:] == inputs[:, :1, 1:]).all()  # one amplitude and phase per task


def test_sinusoid_labels_follow_from_the_oracle_inputs():
    batch = SinusoidGenerator(5, 5, oracle=True).batch('val', 3, 50)
    for inputs, labels in ((batch.inputa, batch.labela), (batch.inputb, batch.labelb)):
        x, amplitude, phase = np.moveaxis(inputs.astype(np.float64), -1, 0)
        np.testing.assert_allclose(labels[..., 0], amplitude * np.sin(x - phase), atol=1e-5)


def test_sinusoid_support_and_query_points_are_different():
    batch = SinusoidGenerator(5, 7).batch('train', 0, 50)
    for support, query in zip(batch.inputa, batch.inputb):
        assert len(np.unique(np.concatenate([support, query]))) == 12


def test_oracle_sees_the_same_tasks():
    plain = SinusoidGenerator(5, 5).batch('train', 1, 8)
    oracle = SinusoidGenerator(5, 5, oracle=True).batch('train', 1, 8)
    assert plain.inputa.shape == (8, 5, 1)
    np.testing.assert_array_equal(plain.inputa[..., 0], oracle.inputa[..., 0])
    np.testing.assert_array_equal(plain.labelb, oracle.labelb)


@pytest.mark.parametrize(
    'sizes, message',
    [
        ((0, 5), '--update_batch_size must be at least 1, but it is 0'),
        ((5, -1), 'query examples must not be negative, but it is -1'),
    ],
)
def test_sinusoid_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        SinusoidGenerator(*sizes)


# Image tasks --------------------------------------------------------------------------------------


def test_distinct_gives_every_ordered_sample_once():
    """The cells of a 5 x 4 x 3 grid of uniform numbers are the 60 ordered samples of 3 of 5."""
    cells = np.array(list(itertools.product(range(5), range(4), range(3))))
    draws = data_generator._distinct((cells + 0.5) / [5, 4, 3], 5)
    assert sorted(map(tuple, draws.tolist())) == sorted(itertools.permutations(range(5), 3))


def test_distinct_at_the_ends_of_the_unit_interval():
    for counts in (1, 20, 423, 1100, 10**6 + 3):
        size = min(counts, 20)
        assert data_generator._distinct(np.zeros((1, size)), counts).tolist() == [list(range(size))]
        top = data_generator._distinct(np.full((1, size), np.nextafter(1, 0)), counts)
        assert top.tolist() == [list(range(counts - 1, counts - 1 - size, -1))]


@pytest.mark.parametrize('rotate', [False, True])
@pytest.mark.parametrize(
    'ways, shots, queries', [(5, 1, 1), (5, 5, 15), (20, 1, 1), (2, 3, 0), (1, 1, 1)]
)
def test_image_tasks(ways, shots, queries, rotate):
    counts = list(range(20, 50))
    generator = ImageGenerator({'train': class_images(counts)}, ways, shots, queries, rotate)
    batch = generator.batch('train', 0, 40)
    assert batch.inputa.shape == (40, ways * shots, SIDE * SIDE)
    assert batch.labela.shape == (40, ways * shots, ways)
    assert batch.inputb.shape == (40, ways * queries, SIDE * SIDE)
    assert batch.labelb.shape == (40, ways * queries, ways)
    inputs = np.concatenate([batch.inputa, batch.inputb], axis=1)
    labels = np.concatenate([batch.labela, batch.labelb], axis=1)
    assert ((labels == 0) | (labels == 1)).all() and (labels.sum(-1) == 1).all()
    for classes, images, turns, numbers in zip(*read_back(inputs), labels.argmax(-1)):
        shots_of = numbers.reshape(-1, ways)
        assert (np.sort(shots_of, axis=1) == np.arange(ways)).all()  # each shot has each class once
        assert len(set(classes)) == ways
        # No image twice, in particular not in both sets.
        assert len(set(zip(classes, images))) == len(classes)
        for label in range(ways):
            mine = numbers == label
            assert len(set(classes[mine])) == 1 and len(set(turns[mine])) == 1
            assert images[mine].max() < counts[classes[mine][0]]
        assert rotate or not turns.any()


def test_image_draws_are_uniform():
    tasks, ways, per_class = 3000, 5, 6
    generator = ImageGenerator({'train': class_images([per_class] * 10)}, ways, 2, 1, rotate=True)
    batch = generator.batch('train', 0, tasks)
    classes, images, turns = read_back(batch.inputa)
    labels = batch.labela.argmax(-1)

    def assert_uniform(values, count):
        frequencies = np.bincount(np.ravel(values), minlength=count) / np.size(values)
        np.testing.assert_allclose(frequencies, 1 / count, atol=5 * np.sqrt(1 / count / tasks))

    for label in range(ways):
        mine = labels == label
        assert_uniform(classes[mine], 10)
        assert_uniform(images[mine], per_class)
        assert_uniform(turns[mine], 4)
    for position in range(2 * ways):
        assert_uniform(labels[:, position], ways)
    first, second = labels[:, :ways], labels[:, ways:]
    # Each shot has its own order: 1 / 120 agree by chance.
    assert np.mean((first == second).all(1)) < 0.05
    pairs = turns[:, 0] * 4 + turns[:, 1]  # classes of a task turn independently
    assert_uniform(pairs, 16)
    query = read_back(batch.inputb)
    assert_uniform(query[1], per_class)


def test_pixels_are_stored_values_over_255_flattened_row_by_row():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 2, 3, 3), dtype=np.uint8)
    source = ClassImages('generated', ['only'], np.array([0]), np.array([1]), images)
    inputs = ImageGenerator({'train': source}, 1, 1, 0).batch('train', 0, 1).inputa[0, 0]
    places = itertools.product(range(2), range(3), range(3))  # row, column, channel
    expected = [np.float32(images[0][place]) / np.float32(255) for place in places]
    np.testing.assert_array_equal(inputs, expected)


def test_rotation_keeps_the_colours_of_a_pixel_together():
    folders = {'train': class_images([1] * 8, channels=3)}
    batch = ImageGenerator(folders, 8, 1, 0, rotate=True).batch('train', 0, 5)
    inputs = batch.inputa.reshape(5, 8, SIDE, SIDE, 3)
    assert (inputs == inputs[..., :1]).all()
    assert len(np.unique(read_back(inputs[..., 0].reshape(5, 8, -1))[2])) == 4


def test_turns_are_counter_clockwise():
    folders = {'train': class_images([1])}
    generator = ImageGenerator(folders, 1, 1, 0, rotate=True)
    turns = np.arange(4).reshape(1, 4, 1)
    turned = generator._pixels(folders['train'], np.zeros_like(turns), turns)
    np.testing.assert_array_equal(read_back(turned)[2], [[0, 1, 2, 3]])
    picture = Image.fromarray(folders['train'].images[0, :, :, 0])
    for quarter in range(4):
        expected = np.asarray(picture.rotate(90 * quarter)).ravel()  # counter-clockwise
        np.testing.assert_array_equal(np.rint(turned[0, quarter] * 255), expected)


def test_second_generator_on_the_same_folders_shares_the_images():
    folders = {'train': class_images([20] * 6), 'val': class_images([20] * 6)}
    first, second = (ImageGenerator(folders, 5, 1, queries) for queries in (15, 1))
    assert first.folders['val'].images is second.folders['val'].images
    assert first.image_shape == (SIDE, SIDE, 1)
    assert (first.dim_input, first.dim_output) == (SIDE * SIDE, 5)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(num_classes=0), '--num_classes must be at least 1, but it is 0'),
        (
            dict(num_classes=4),
            '--num_classes=4 is more than the 3 classes of the val split in generated',
        ),
        (
            dict(num_support=0),
            '--update_batch_size must be at least 1, but it is 0',
        ),
        (dict(num_query=-2), 'must not be negative, but it is -2'),
        (
            dict(num_support=3, num_query=2),
            'class class1 of the val split in generated has 4 images, but a task takes 5 '
            '.*smaller --update_batch_size',
        ),
    ],
)
def test_image_sizes_are_checked_at_construction(arguments, message):
    folders = {'train': class_images([9] * 5), 'val': class_images([9, 4, 6])}
    defaults = dict(num_classes=2, num_support=1, num_query=1)
    with pytest.raises(ValueError, match=message):
        ImageGenerator(folders, **defaults | arguments)


def test_only_the_splits_in_use_are_checked():
    folders = {'train': class_images([9] * 5), 'val': class_images([9, 4, 6])}
    generator = ImageGenerator(folders, 5, 3, 3, splits=['train'])
    assert generator.batch('train', 0, 1).inputa.shape == (1, 15, SIDE * SIDE)
    with pytest.raises(ValueError, match='made for the splits train, not for val'):
        generator.batch('val', 0, 1)


def test_only_square_images_rotate():
    images = np.zeros((2, 3, 4, 1), np.uint8)
    folders = {'train': ClassImages('x', ['a'], np.array([0]), np.array([2]), images)}
    ImageGenerator(folders, 1, 1, 1)
    with pytest.raises(ValueError, match='square'):
        ImageGenerator(folders, 1, 1, 1, rotate=True)


# Splits -------------------------------------------------------------------------------------------


def test_official_split():
    names = [f'character{i:04}' for i in range(1623)]
    splits = split_classes(1623)
    sizes = {split: len(classes) for split, classes in splits.items()}
    assert sizes == {'train': 1100, 'val': 100, 'test': 423}
    random.seed(1)
    random.shuffle(names)  # the original shuffles the names themselves, by the global generator
    found = [*splits['train'], *splits['val'], *splits['test']]
    assert [f'character{i:04}' for i in found] == names


@pytest.mark.parametrize(
    'total, sizes',
    [
        (3, (1, 1, 1)),
        (4, (2, 1, 1)),
        (20, (14, 1, 5)),
        (162, (110, 10, 42)),
        (1200, (813, 74, 313)),
        (1201, (1100, 100, 1)),
        (2000, (1100, 100, 800)),
    ],
)
def test_split_of_other_sets(total, sizes):
    splits = split_classes(total)
    assert tuple(len(splits[split]) for split in ('train', 'val', 'test')) == sizes
    assert sorted(sum(splits.values(), [])) == list(range(total))


# Class folders ------------------------------------------------------------------------------------

ALPHABETS, CHARACTERS, IMAGES = ('Aa', 'Bb_(x)', 'Bb'), 4, 3


def save(path: Path, pixels: np.ndarray, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_omniglot(folder: Path, reverse: bool = False) -> dict[str, np.ndarray]:
    """A small Omniglot of random images; returns the pixels of each character, [images, 28, 28]."""
    rng = np.random.default_rng(0)
    characters = {}
    for alphabet, c in itertools.product(ALPHABETS, range(1, CHARACTERS + 1)):
        images = 255 * rng.integers(0, 2, (IMAGES, 28, 28), dtype=np.uint8)
        characters[f'{alphabet}/character{c:02}'] = images
    for name, images in reversed(characters.items()) if reverse else characters.items():
        for i, pixels in enumerate(images):
            path = folder / 'omniglot_resized' / name / f'{i:02}.png'
            # 1-bit PNG, as in the real data, but all of one size
            save(path, pixels > 0, compress_level=0)
            os.utime(path, (10**9, 10**9))  # and of one time, as if unpacked from an archive
    return characters


def make_miniimagenet(
    folder: Path, splits=('train', 'val', 'test'), side: int = 84
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = {}
    for split, c, i in itertools.product(splits, range(2), range(3)):
        name = f'{split}/n{c}/{i}'
        pixels[name] = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        save(folder / 'miniImagenet' / f'{name}.png', pixels[name])
    return pixels


@pytest.fixture
def omniglot(tmp_path):
    make_omniglot(tmp_path)
    return tmp_path


def contents(folders) -> dict[str, dict[str, bytes]]:
    """{split: {class: pixels}}."""
    found = {}
    for split, classes in folders.items():
        places = zip(classes.starts, classes.counts, strict=True)
        pixels = [classes.images[start : start + count].tobytes() for start, count in places]
        found[split] = dict(zip(classes.names, pixels, strict=True))
    return found


def load(folder: Path, capsys) -> tuple[dict, str]:
    """What a start finds, and what it prints."""
    capsys.readouterr()
    found = contents(load_omniglot(folder))
    return found, capsys.readouterr().err


def test_omniglot_folders(tmp_path):
    characters = make_omniglot(tmp_path)
    folders = load_omniglot(str(tmp_path))
    names = [name for split in ('train', 'val', 'test') for name in folders[split].names]
    # Bb before Bb_(x), which '/' would turn round.
    expected = sorted(characters, key=lambda name: name.split('/'))
    random.seed(1)
    random.shuffle(expected)
    assert names == expected
    assert [len(folders[split].names) for split in ('train', 'val', 'test')] == [8, 1, 3]
    for classes in contents(folders).values():
        for name, data in classes.items():
            # Stored inverted, in the order of the file names.
            assert data == (255 - characters[name]).tobytes()
    assert folders['train'].images.shape[1:] == (28, 28, 1)
    inputs = ImageGenerator(folders, 3, 1, 1, splits=['train']).batch('train', 0, 5).inputa
    assert set(np.unique(inputs)) == {0, 1}


def test_value_is_one_minus_pixel(tmp_path):
    ramp = np.arange(784, dtype=np.uint8).reshape(28, 28)
    for name in 'abc':
        save(tmp_path / 'omniglot_resized' / 'A' / name / '0.png', ramp)
    inputs = ImageGenerator(load_omniglot(tmp_path), 1, 1, 0).batch('val', 0, 1).inputa
    np.testing.assert_allclose(inputs.ravel(), 1 - ramp.ravel() / 255, atol=1e-7)


def test_directory_order_does_not_matter(tmp_path, monkeypatch):
    make_omniglot(tmp_path / 'one')
    make_omniglot(tmp_path / 'two', reverse=True)
    expected = contents(load_omniglot(tmp_path / 'one'))

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', Reversed)
    found = contents(load_omniglot(tmp_path / 'two'))
    assert found == expected and [*map(list, found.values())] == [*map(list, expected.values())]


def test_hidden_and_stray_files_are_ignored(omniglot, capsys):
    expected, _ = load(omniglot, capsys)
    data = omniglot / 'omniglot_resized'
    for stray in ('.DS_Store', 'README.txt', 'Aa/notes'):
        (data / stray).write_text('?')
    for stray in ('._00.png', 'Thumbs.db'):
        (data / 'Aa/character01' / stray).write_text('?')
    for folder in ('.git/x', 'Aa/.hidden', 'Aa/character01/folder.png'):
        (data / folder).mkdir(parents=True)
    found, printed = load(omniglot, capsys)
    assert found == expected and printed == ''


def test_miniimagenet_folders(tmp_path, capsys):
    pixels = make_miniimagenet(tmp_path)
    folders = load_miniimagenet(tmp_path)
    assert list(folders) == ['train', 'val', 'test']
    for split, classes in contents(folders).items():
        assert [*classes] == ['n0', 'n1']
        for name, data in classes.items():
            images = [pixels[f'{split}/{name}/{i}'].tobytes() for i in range(3)]
            assert data == b''.join(images)
    shutil.rmtree(tmp_path / 'miniImagenet' / 'test')
    capsys.readouterr()
    found = contents(load_miniimagenet(tmp_path, ['train', 'val']))
    assert found['val'] == contents(folders)['val']
    # Each split has a cache of its own, and none lies among the data.
    assert capsys.readouterr().err == ''
    assert sorted(os.listdir(tmp_path / 'miniImagenet')) == ['train', 'val']


def test_jpeg_and_other_modes(tmp_path):
    grey = np.add.outer(np.arange(84), np.arange(84)).astype(np.uint8)
    folder = tmp_path / 'miniImagenet' / 'val' / 'n0'
    save(folder / 'a.JPG', np.stack([grey] * 3, -1), quality=95)
    save(folder / 'b.jpeg', grey, quality=95)
    Image.fromarray(grey).convert('P').save(folder / 'c.png')
    images = load_miniimagenet(tmp_path, ['val'])['val'].images
    assert images.shape == (3, 84, 84, 3)
    assert np.abs(images.astype(int) - grey[..., None]).max() <= 3


# The cache of decoded images ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    """Of the user, for what cannot be kept beside the data; test_own_images.py has one."""
    monkeypatch.setenv('XDG_CACHE_HOME', os.path.join(os.devnull, 'cache'))


CACHE = 'omniglot_resized.cache.npy'


def test_second_start_decodes_nothing(omniglot, capsys, monkeypatch):
    first, printed = load(omniglot, capsys)
    assert 'Decoding the 36 images of' in printed and 'damaged' not in printed
    monkeypatch.setattr(Image, 'open', lambda *_: pytest.fail('decoded again'))
    assert load(omniglot, capsys) == (first, '')
    assert sorted(os.listdir(omniglot)) == ['omniglot_resized', CACHE]
    assert np.load(omniglot / CACHE).shape == (36, 28, 28, 1)


def test_cache_survives_moving_the_folder(omniglot, capsys):
    first, _ = load(omniglot, capsys)
    os.rename(omniglot, omniglot.with_name('moved'))
    assert load(omniglot.with_name('moved'), capsys) == (first, '')


def replace_image(data: Path):
    """By one of the same size in bytes: only the time of change tells."""
    path, other = data / 'Aa' / 'character01' / '00.png', data / 'Bb' / 'character01' / '00.png'
    before = path.stat()
    shutil.copyfile(other, path)
    os.utime(path, ns=(before.st_mtime_ns + 1, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


def resize_image(data: Path):
    """Another image with the old time of change: only the size tells."""
    path = data / 'Aa' / 'character01' / '00.png'
    before = path.stat()
    save(path, np.zeros((28, 28), bool))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert path.stat().st_size != before.st_size


def rename_image(data: Path):
    (data / 'Aa' / 'character01' / '00.png').rename(data / 'Aa' / 'character01' / '99.png')


def add_image(data: Path):
    save(data / 'Aa' / 'character01' / 'new.png', np.zeros((28, 28), bool))


CHANGES = {
    'replaced': replace_image,
    'resized': resize_image,
    'renamed': rename_image,
    'image removed': lambda data: (data / 'Aa' / 'character01' / '00.png').unlink(),
    'class removed': lambda data: shutil.rmtree(data / 'Aa' / 'character01'),
    'class renamed': lambda data: (data / 'Aa').rename(data / 'Zz'),
    'image added': add_image,
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_data_is_decoded_again(omniglot, capsys, change):
    first, _ = load(omniglot, capsys)
    CHANGES[change](omniglot / 'omniglot_resized')
    found, printed = load(omniglot, capsys)
    assert found != first and f'{omniglot}/{CACHE} is out of date or damaged' in printed
    assert printed.count('\n') == 1
    (omniglot / CACHE).unlink()
    assert load(omniglot, capsys)[0] == found
    assert load(omniglot, capsys) == (found, '')


def flip(path: Path, position: int):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, count: int):
    """Removes bytes at the end."""
    os.truncate(path, path.stat().st_size - count)


def turn_header(path: Path):
    """What stands there is a valid array of as many bytes, but another one."""
    path.write_bytes(path.read_bytes().replace(b'36, 28, 28, 1', b'28, 36, 28, 1'))


def sign_header(path: Path):
    path.write_bytes(path.read_bytes().replace(b'|u1', b'|i1'))


SEAL = 64 + 1 + 8  # bytes at the end: the fingerprint of the files and the checksum
DAMAGES = {
    'truncated': lambda cache: cut(cache, 28 * 28),
    'one byte short': lambda cache: cut(cache, 1),
    'without a seal': lambda cache: cut(cache, SEAL),
    'empty': lambda cache: os.truncate(cache, 0),
    'too long': lambda cache: cache.write_bytes(cache.read_bytes() + bytes(28 * 28)),
    'first bit': lambda cache: flip(cache, -SEAL - 36 * 28 * 28),
    'middle bit': lambda cache: flip(cache, -SEAL - 10007),
    'last bit': lambda cache: flip(cache, -SEAL - 1),
    'key': lambda cache: flip(cache, -SEAL),
    'checksum': lambda cache: flip(cache, -1),
    'magic': lambda cache: flip(cache, 0),
    'header': lambda cache: flip(cache, 20),
    'other shape': turn_header,
    'other type': sign_header,
    'garbage': lambda cache: cache.write_bytes(b'\xff\x00\x80' * 100),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_cache_is_never_used(omniglot, capsys, damage):
    first, _ = load(omniglot, capsys)
    before = (omniglot / CACHE).read_bytes()
    DAMAGES[damage](omniglot / CACHE)
    assert (omniglot / CACHE).read_bytes() != before
    found, printed = load(omniglot, capsys)
    assert found == first and f'{omniglot}/{CACHE} is out of date or damaged' in printed
    assert load(omniglot, capsys) == (first, '')


def test_folders_that_older_versions_kept_are_not_in_the_way(omniglot, capsys):
    (omniglot / 'omniglot_resized.cache').mkdir()
    first, _ = load(omniglot, capsys)
    assert load(omniglot, capsys) == (first, '')


@pytest.mark.parametrize('inside, data_dir', [('photos', '.'), ('photos/0', '..'), ('photos', '')])
def test_folders_relative_to_where_one_is(tmp_path, monkeypatch, inside, data_dir):
    """The cache lies beside the folder, and not in it: that one is the user's."""
    for c in range(3):
        draw(tmp_path / f'photos/{c}/image.png', (8, 8), 'RGB', c, 0)
    before = listing(tmp_path / 'photos')
    monkeypatch.chdir(tmp_path / inside)
    classes = load_folder(data_dir, image_size=8)
    assert {len(of.names) for of in classes.values()} == {1}
    assert listing(tmp_path / 'photos') == before
    assert {path.name for path in tmp_path.iterdir()} == {'photos', 'photos.8x8x3.crop.cache.npy'}


def test_data_without_a_place_for_the_cache(omniglot, capsys):
    (omniglot / CACHE).mkdir()  # so that no file can be made here
    found, printed = load(omniglot, capsys)
    assert printed.count('cannot be kept') == 1 and CACHE in printed
    (omniglot / CACHE).rmdir()
    assert load(omniglot, capsys)[0] == found


def test_read_only_data(omniglot, capsys):
    omniglot.chmod(0o555)
    try:
        if os.access(omniglot, os.W_OK):
            pytest.skip('this user (root?) may write to read-only folders')
        found, printed = load(omniglot, capsys)
    finally:
        omniglot.chmod(0o755)
    assert printed.count('cannot be kept') == 1
    assert load(omniglot, capsys)[0] == found


def test_full_disk_leaves_nothing_behind(omniglot, capsys):
    """A limit on the size of files stands for the full disk: the images go over it half-way."""
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15000, hard))
        found, printed = load(omniglot, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert printed.count('cannot be kept') == 1
    assert os.listdir(omniglot) == ['omniglot_resized']
    assert load(omniglot, capsys)[0] == found


def test_files_of_killed_processes_are_removed(omniglot, capsys):
    """The second may still be at work."""
    for name, age in (f'{CACHE}.1.tmp', 4000), (f'{CACHE}.2.tmp', 10):
        (omniglot / name).write_text('half')
        os.utime(omniglot / name, (time.time() - age,) * 2)
    load(omniglot, capsys)
    assert sorted(os.listdir(omniglot)) == ['omniglot_resized', CACHE, f'{CACHE}.2.tmp']


@pytest.mark.slow
def test_processes_that_start_together(omniglot, capsys):
    code = f"""if True:
        from fewshot.data.image_folders import load_omniglot
        print(load_omniglot({str(omniglot)!r})['train'].images.sum())"""
    line, pipe = [sys.executable, '-c', code], subprocess.PIPE
    runs = [subprocess.Popen(line, cwd=ROOT, stdout=pipe, text=True) for _ in range(3)]
    sums = {run.communicate()[0] for run in runs}
    assert all(run.returncode == 0 for run in runs) and len(sums) == 1
    _, printed = load(omniglot, capsys)
    assert printed == '' and sorted(os.listdir(omniglot)) == ['omniglot_resized', CACHE]


def test_many_chunks_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, 'CHUNK', 2)
    monkeypatch.setattr(image_cache, 'cores', lambda: 1)
    characters = make_omniglot(tmp_path)
    for _ in range(2):
        for classes in contents(load_omniglot(tmp_path)).values():
            assert all(data == (255 - characters[name]).tobytes() for name, data in classes.items())


# What can be wrong with the data ------------------------------------------------------------------


def test_missing_folders(tmp_path):
    folder = tmp_path / 'my data'
    with pytest.raises(FileNotFoundError) as error:
        load_omniglot(folder)
    message, target = str(error.value), f"--target='{folder}/omniglot_resized'"
    assert f'no folder {folder}/omniglot_resized;' in message
    assert f'`python scripts/data/prepare_omniglot.py {target}`' in message
    make_miniimagenet(tmp_path, ['train'])
    with pytest.raises(FileNotFoundError) as error:
        load_miniimagenet(tmp_path, ['train', 'val'])
    message, target = str(error.value), f'--target={tmp_path}/miniImagenet'
    assert f'no folder {tmp_path}/miniImagenet/val;' in message
    assert f'`python scripts/data/prepare_miniimagenet.py {target}`' in message


def named_scripts_exist(message: str) -> bool:
    return all((ROOT / word).is_file() for word in message.split() if word.startswith('scripts/'))


def empty(data: Path) -> str:
    shutil.rmtree(data)
    data.mkdir()
    return f'{data} holds no class folders'


def empty_class(data: Path) -> str:
    (data / 'Aa' / 'character09').mkdir()
    return f'{data}/Aa/character09 holds no images'


def two_classes(data: Path) -> str:
    shutil.rmtree(data / 'Bb')
    shutil.rmtree(data / 'Bb_(x)')
    shutil.rmtree(data / 'Aa' / 'character01')
    shutil.rmtree(data / 'Aa' / 'character02')
    return f'{data} has only 2 character folders'


def garbage(data: Path) -> str:
    path = data / 'Aa' / 'character02' / '01.png'
    path.write_bytes(b'not a picture')
    return f'{path} cannot be decoded'


def truncated(data: Path) -> str:
    path = data / 'Bb' / 'character02' / '01.png'
    path.write_bytes(path.read_bytes()[:60])
    return f'{path} cannot be decoded'


def no_bytes(data: Path) -> str:
    path = data / 'Bb' / 'character02' / '01.png'
    path.write_bytes(b'')
    return f'{path} cannot be decoded'


def not_resized(data: Path) -> str:
    save(data / 'Aa' / 'character03' / '00.png', np.zeros((105, 104), np.uint8))
    return f'{data}/Aa/character03/00.png is 105x104 of mode L, but images of 28x28'


def sixteen_bits(data: Path) -> str:
    save(data / 'Aa' / 'character03' / '00.png', np.zeros((28, 28), np.uint16))
    # I;16, which Pillow before 11 calls I
    return f'{data}/Aa/character03/00.png is 28x28 of mode I'


@pytest.mark.parametrize(
    'spoil',
    [empty, empty_class, two_classes, garbage, truncated, no_bytes, not_resized, sixteen_bits],
)
def test_spoilt_data(omniglot, spoil, capsys):
    expected = spoil(omniglot / 'omniglot_resized')
    with pytest.raises(ValueError) as error:
        load_omniglot(omniglot)
    message, target = str(error.value), f'--target={omniglot}/omniglot_resized'
    assert message.startswith(expected), message
    assert f'`python scripts/data/prepare_omniglot.py {target}`' in message
    assert named_scripts_exist(message) and '\n' not in message
    leftovers = [path.name for path in omniglot.rglob('*.tmp')]
    assert not leftovers
    if spoil is not two_classes:
        assert not (omniglot / CACHE).exists()


def test_colour_images_of_another_size(tmp_path):
    make_miniimagenet(tmp_path, ['val'], side=80)
    found = r'n0/0\.png is 80x80 of mode RGB, but images of 84x84 .*'
    told = r'prepare_miniimagenet\.py --target=.*--source=FOLDER'
    with pytest.raises(ValueError, match=found + told) as error:
        load_miniimagenet(tmp_path, ['val'])
    assert named_scripts_exist(str(error.value))


def test_decompression_bomb_is_refused_like_any_damage(omniglot):
    path = omniglot / 'omniglot_resized' / 'Aa' / 'character01' / '00.png'
    data = bytearray(path.read_bytes())
    data[16:24] = (2 * 10**5).to_bytes(4, 'big') * 2  # the width and height its header claims
    path.write_bytes(data)
    with pytest.raises(ValueError, match='00.png cannot be decoded'):
        load_omniglot(omniglot)


# Real data ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def real_omniglot():
    if not (REAL / 'omniglot_resized').is_dir():
        pytest.skip(f'no prepared Omniglot in {REAL} (set MAML_TEST_DATA)')
    return load_omniglot(REAL)


def test_real_omniglot(real_omniglot):
    sizes = {split: len(classes.names) for split, classes in real_omniglot.items()}
    assert sizes == {'train': 1100, 'val': 100, 'test': 423}
    names = [name for classes in real_omniglot.values() for name in classes.names]
    assert len(set(names)) == 1623 and len({name.split('/')[0] for name in names}) == 50
    assert all((classes.counts == 20).all() for classes in real_omniglot.values())
    inputs = ImageGenerator(real_omniglot, 20, 1, 1, rotate=True).batch('test', 0, 16).inputa
    assert inputs.shape == (16, 20, 784) and set(np.unique(inputs)) == {0, 1}
    assert 0.02 < inputs.mean() < 0.3  # thin strokes: ink is 1, paper 0


def test_real_omniglot_images_against_pillow(real_omniglot):
    classes = real_omniglot['val']
    for c in (0, 57, 99):
        files = sorted((REAL / 'omniglot_resized' / classes.names[c]).glob('*.png'))
        expected = [255 - np.asarray(Image.open(file).convert('L')) for file in files]
        np.testing.assert_array_equal(classes.images[classes.starts[c] :][:20, :, :, 0], expected)


def test_real_miniimagenet():
    folder = REAL / 'miniImagenet'
    splits = [split for split in ('val', 'train', 'test') if (folder / split).is_dir()][:1]
    if not splits:
        pytest.skip(f'no prepared miniImagenet in {REAL} (set MAML_TEST_DATA)')
    folders = load_miniimagenet(REAL, splits)
    batch = ImageGenerator(folders, 5, 1, 15).batch(splits[0], 0, 4)
    assert batch.inputb.shape == (4, 75, 84 * 84 * 3) and batch.inputa.shape == (4, 5, 84 * 84 * 3)
    assert batch.inputb.min() == 0 and batch.inputb.max() == 1 and 0.3 < batch.inputb.mean() < 0.6
