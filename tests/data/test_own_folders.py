"""Folders as people have them: what is beside the images, names, lists, bits, data that moved."""

import csv
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_refused, make_omniglot, parsed, run, succeeded
from PIL import Image
from test_own_images import FLAGS, LAYOUT, add, chosen, letters, make

from data_generator import TaskSize
from fewshot.data.entries import visible
from fewshot.data.image_cache import cache_places
from fewshot.data.image_files import folder_layout, read_image, run_layout
from fewshot.data.own_images import OwnImages, load_folder
from fewshot.runs.checkpoints import read_run_state
from fewshot.runs.tasks import make_generators

BIRDS = [f'{i:03d}.Bird' for i in range(12)]
NAMES = ['naïve', 'café', 'Zürich', 'élan', 'über', 'ångström']


def touch(folder: Path, *names: str):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')


def all_of(folder: Path, **named) -> list[str]:
    return sorted(sum(chosen(folder, **named).values(), []))


# What is no data ----------------------------------------------------------------------------------


def test_own_outputs_are_no_classes(tmp_path, capsys):
    """Caches wherever they are, runs, folders of them, and downloads that broke off."""
    folder = make(tmp_path / 'nest/birds', letters(9))
    load_folder(folder, 4)
    load_folder(folder, 8, cache_dir=folder / 'cache')
    touch(folder, 'logs/cls_5/model10.index', 'logs/cls_5/picture.png', 'logs/.DS_Store')
    touch(folder, 'old/logs/cls_2/events.out.tfevents.1.x', 'birds.cache/0.png')
    touch(folder, 'miniImagenet.download/a.png')
    assert all_of(folder) == [*letters(9)]
    assert all_of(tmp_path / 'nest') == [f'birds/{name}' for name in letters(9)]
    assert [entry.name for entry in visible(tmp_path / 'nest')] == ['birds']
    touch(folder, 'class03/notes.npy')  # a file of the user's
    capsys.readouterr()
    assert all_of(folder) == [*letters(9)] and 'class03/notes.npy' in capsys.readouterr().err


def test_a_run_in_the_folder_of_its_data(tmp_path, eager):
    folder = make(tmp_path / 'photos', letters(6))
    flags = [*FLAGS, f'--data_dir={folder}', f'--logdir={folder}/logs']
    for end in 1, 2:
        succeeded(run(*flags, f'--metatrain_iterations={end}'))


def test_what_systems_leave(tmp_path, capsys):
    folder = make(tmp_path / 'photos', letters(9))
    touch(folder, '__MACOSX/class00/._0.png', '@eaDir/class00/0.png', 'class01/@eaDir/0.png/x.jpg')
    touch(folder, 'class02/Thumbs.db', 'class02/._0.png', 'class03/desktop.ini')
    assert all_of(folder) == [*letters(9)]
    assert not capsys.readouterr().err


# CUB, base and novel classes ----------------------------------------------------------------------


def test_cub_as_unpacked(tmp_path, capsys):
    """Photos and masks of a bird are one class, files about them none."""
    folder = tmp_path / 'CUB_200_2011'
    for part in 'images', 'segmentations':
        make(folder / part, dict.fromkeys(BIRDS, 3))
    touch(folder, 'attributes/a.txt', 'parts/p.txt', 'images.txt', 'train_test_split.txt', 'README')
    assert all_of(folder) == [f'images/{name}' for name in BIRDS]
    told = capsys.readouterr().err
    assert f'segmentations in {folder} is left out: images has classes of these names.' in told
    assert 'without images are left out: attributes, parts.' in told
    masks = {'train': {f'segmentations/{name}': 3 for name in BIRDS[:6]}}
    known = masks | {'val': {f'segmentations/{name}': 3 for name in BIRDS[6:]}}
    assert set(all_of(folder, known=known)) == {f'segmentations/{name}' for name in BIRDS}


def test_classes_of_one_name_under_two_parents(tmp_path, capsys):
    for parent in 'cats', 'dogs':
        make(tmp_path / 'pets' / parent, letters(5))
    assert len(all_of(tmp_path / 'pets')) == 10
    told = capsys.readouterr().err
    assert 'cats, dogs in' in told and 'the same names: class00, class01' in told


@pytest.mark.parametrize(
    'names',
    [('base', 'val', 'novel'), ('Training', 'Validation', 'Testing'), ('train', 'dev', 'test')],
)
def test_names_of_splits(tmp_path, names):
    for name, classes in zip(names, ('ab', 'cd', 'ef')):
        make(tmp_path / 'birds' / name, dict.fromkeys(classes, 2))
    found = chosen(tmp_path / 'birds', splits=('train', 'val', 'test'))
    assert {split: ''.join(c) for split, c in found.items()} == {
        'train': 'ab',
        'val': 'cd',
        'test': 'ef',
    }


def test_novel_alone_is_a_class_like_others(tmp_path):
    for kind in 'novel', 'poem':
        make(tmp_path / 'texts' / kind, {f'{kind}{i}': 2 for i in range(3)})
    assert len(all_of(tmp_path / 'texts')) == 6


@pytest.mark.parametrize('names', [('base', 'novel'), ('train', 'test')])
def test_no_folder_for_validation(tmp_path, names):
    for name in names:
        make(tmp_path / 'birds' / name, {f'{name}{i}': 2 for i in range(4)})
    with pytest.raises(ValueError) as error:
        OwnImages(tmp_path / 'birds', LAYOUT)
    place = tmp_path / 'birds'
    assert f'none for val: move some of {place}/{names[0]} to {place}/val;' in str(error.value)
    assert len(chosen(tmp_path / 'birds', splits=('test',))['test']) == 4


def test_all_problems_at_once(tmp_path):
    folder = make(tmp_path / 'photos', letters(9) | {'empty': 0, 'void': 0, 'zz': 1})
    with pytest.raises(ValueError) as error:
        chosen(folder, TaskSize(2, 1, 2))
    message = str(error.value)
    assert f'{folder}/empty, {folder}/void holds no images' in message
    assert 'zz of the train split' in message and '\n' not in message


# Names in two forms of Unicode --------------------------------------------------------------------


def forms(folder: Path) -> list[Path]:
    """The same photos, with names as Linux and as macOS write them."""
    for form in 'NFC', 'NFD':
        for c, name in enumerate(NAMES):
            place = folder / form / 'photos' / unicodedata.normalize(form, name)
            place.mkdir(parents=True)
            for i, letter in enumerate('zöo'):
                pixels = np.full((6, 6), 40 * c + 10 * i, np.uint8)
                file = unicodedata.normalize(form, f'{letter}.png')
                Image.fromarray(pixels).save(place / file)
    return [folder / form / 'photos' for form in ('NFC', 'NFD')]


def test_a_copy_with_other_unicode_names(tmp_path, eager):
    """Classes, images and tasks are the same, and a run goes on."""
    one, other = forms(tmp_path)
    own = OwnImages(one, LAYOUT)
    own.choose()
    again = OwnImages(other, LAYOUT)
    again.choose(known=own.counts)
    assert again.counts == own.counts
    for first, second in zip(own.load().values(), again.load().values()):
        assert first.names == second.names
        np.testing.assert_array_equal(first.images, second.images)
    flags = [*FLAGS, f'--logdir={tmp_path}/logs']
    succeeded(run(*flags, f'--data_dir={other}', '--metatrain_iterations=1'))
    succeeded(run(*flags, f'--data_dir={one}', '--metatrain_iterations=2'))


def test_a_run_that_recorded_names_in_the_other_form(tmp_path):
    one, _ = forms(tmp_path)
    counts = {unicodedata.normalize('NFD', name): 3 for name in NAMES}
    half = len(counts) // 2
    known = {'train': dict([*counts.items()][:half]), 'val': dict([*counts.items()][half:])}
    flags = [*FLAGS, f'--data_dir={one}']
    generators = make_generators(parsed(*flags), {'classes': known, 'fit': 'crop', 'bits': 16})
    assert generators['train'].folders['train'].names == NAMES[:half]


def test_two_folders_of_one_name(tmp_path):
    for form in 'NFC', 'NFD':
        make(tmp_path / 'photos', {unicodedata.normalize(form, 'café'): 2})
    with pytest.raises(
        ValueError, match='two folders café, whose names differ in the Unicode form'
    ):
        OwnImages(tmp_path / 'photos', LAYOUT)


# Grey images of more than 8 bits ------------------------------------------------------------------


def save_deep(path: Path, largest: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, largest, 36).reshape(6, 6).astype(np.uint16)).save(path)


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_bits_of_a_data_set(tmp_path, bits, capsys):
    """The fewest that hold all values, the same for dim images, and kept by the run."""
    folder, white = tmp_path / 'scans', 2**bits - 1
    for c in range(6):
        save_deep(folder / f'c{c}/a.png', white // 3)
        save_deep(folder / f'c{c}/b.tif', white if c == 4 else white // 3)
    flags = [*FLAGS, f'--data_dir={folder}']
    generators = make_generators(parsed(*flags))
    settled = generators['train'].settled_flags
    assert settled['bits'] == bits
    told = capsys.readouterr().err
    assert (f'more than {bits} bits, so that {white} is white' in told) == (bits < 16)
    layout = run_layout(parsed(*flags).flag_values_dict() | settled)
    assert read_image(folder / 'c4/b.tif', layout).max() == 255
    assert abs(int(read_image(folder / 'c4/a.png', layout).max()) - 85) <= 1
    if bits < 16:
        save_deep(tmp_path / 'brighter.png', white + 1)
        with pytest.raises(ValueError, match=f'{white + 1} is more than the {bits} bits'):
            read_image(tmp_path / 'brighter.png', layout)


def test_a_run_from_before_bits_were_found(tmp_path, capsys):
    """It goes on as it was, and is told that its images are black."""
    for c in range(6):
        for name in 'ab':
            save_deep(tmp_path / f'scans/c{c}/{name}.png', 4095)
    flags = [*FLAGS, f'--data_dir={tmp_path}/scans']
    run_before = {'classes': None, 'fit': 'crop', 'bits': 16}
    settled = make_generators(parsed(*flags), run_before)['train'].settled_flags
    assert settled['bits'] == 16
    assert '12 images are nearly black, with no value above 63 of 255' in capsys.readouterr().err


def test_a_run_keeps_its_bits(tmp_path, eager):
    for c in range(6):
        for name in 'ab':
            save_deep(tmp_path / f'scans/c{c}/{name}.png', 4000)
    flags = [*FLAGS, f'--data_dir={tmp_path}/scans', f'--logdir={tmp_path}/logs']
    succeeded(run(*flags, '--metatrain_iterations=1'))
    for c in range(6):
        for name in 'ab':
            save_deep(tmp_path / f'scans/c{c}/{name}.png', 1000)
    succeeded(run(*flags, '--metatrain_iterations=2'))
    (folder,) = (tmp_path / 'logs').iterdir()
    assert read_run_state(f'{folder}/model1')['flags']['bits'] == 12


# Lists --------------------------------------------------------------------------------------------

SPLITS = {'train': (0, 6), 'val': (6, 9), 'test': (9, 12)}
EXPECTED = {split: [*letters(12)][slice(*ends)] for split, ends in SPLITS.items()}


def write_csv(path: Path, rows: list[tuple[str, str]], header=('filename', 'label')):
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([header, *rows])


def flat(folder: Path, images: str = 'images') -> list[tuple[str, str]]:
    """All images in one folder; returns the rows of a csv file."""
    make(folder / 'made', letters(12, images=3))
    (folder / images).mkdir(exist_ok=True)
    rows = []
    for path in sorted((folder / 'made').rglob('*.png')):
        name = f'{path.parent.name}_{path.name}'
        path.rename(folder / images / name)
        rows.append((name, path.parent.name))
    shutil.rmtree(folder / 'made')
    return rows


@pytest.mark.parametrize('images', ['images', '.'])
def test_csv_files_of_splits(tmp_path, images, capsys):
    rows = flat(tmp_path, images)
    for split, names in EXPECTED.items():
        write_csv(tmp_path / f'{split}.csv', [row for row in rows if row[1] in names])
    assert chosen(tmp_path, splits=('train', 'val', 'test')) == EXPECTED
    assert f'that {tmp_path}/train.csv, {tmp_path}/val.csv' in capsys.readouterr().err
    loaded = load_folder(tmp_path, 4, 1)
    for split, classes in loaded.items():
        assert classes.names == EXPECTED[split] and set(classes.counts) == {3}
        first = read_image(tmp_path / images / f'{EXPECTED[split][0]}_0.png', LAYOUT)
        np.testing.assert_array_equal(classes.images[classes.starts[0]], first)
    capsys.readouterr()
    load_folder(tmp_path, 4, 1)
    assert 'Decoding' not in capsys.readouterr().err


def test_csv_beside_class_folders(tmp_path):
    """Of names that tell the folder, or that leave it to the label."""
    make(tmp_path, letters(9))
    rows = [(f'{c}/{i}.png' if i else f'{i}.png', c) for c in letters(9) for i in range(2)]
    write_csv(tmp_path / 'labels.csv', rows)
    own = OwnImages(tmp_path, LAYOUT)
    own.choose()
    assert {n: c for counts in own.counts.values() for n, c in counts.items()} == letters(9, 2)


def test_one_csv_is_dealt_out(tmp_path):
    rows = flat(tmp_path)
    write_csv(tmp_path / 'labels.csv', rows)
    dealt = chosen(tmp_path)
    make(tmp_path / 'tree', letters(12, images=3))
    assert dealt == chosen(tmp_path / 'tree') and all_of(tmp_path) == [*letters(12)]


def test_csv_files_that_do_not_fit(tmp_path, capsys):
    rows = flat(tmp_path)
    write_csv(tmp_path / 'labels.csv', [*rows, ('gone.png', 'class00'), ('lost.png', 'class01')])
    with pytest.raises(ValueError, match='labels.csv lists 2 images .*: gone.png, lost.png'):
        OwnImages(tmp_path, LAYOUT)
    (tmp_path / 'labels.csv').unlink()
    make(tmp_path, letters(9))
    shutil.rmtree(tmp_path / 'images')
    write_csv(tmp_path / 'train.csv', rows, header=('image', 'class'))
    assert all_of(tmp_path) == [*letters(9)]
    assert 'train.csv is not read, since it has no columns' in capsys.readouterr().err
    (tmp_path / 'train.csv').write_bytes(b'\xff\xfe\0')
    with pytest.raises(ValueError, match='train.csv cannot be read as a csv file'):
        OwnImages(tmp_path, LAYOUT)


@pytest.mark.parametrize('place', ['data', '.', 'splits/bertinetto', 'data/splits'])
def test_lists_of_classes(tmp_path, place):
    folder = make(tmp_path / 'data', letters(12) | {'other': 4})
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for split, names in EXPECTED.items():
        (tmp_path / place / f'{split}.txt').write_text('\n'.join(names) + '\n')
    assert chosen(folder, splits=('train', 'val', 'test')) == EXPECTED
    assert {s: c.names for s, c in load_folder(folder, 4, 1).items()} == EXPECTED
    (tmp_path / place / 'val.txt').unlink()
    with pytest.raises(
        ValueError, match='for train and test, but none for val: move some of .*train.txt'
    ):
        OwnImages(folder, LAYOUT)


def test_lists_of_cub_with_its_masks(tmp_path):
    """The lists name the folders of photos and of masks."""
    for part in 'images', 'segmentations':
        make(tmp_path / part, letters(12))
    for split, names in EXPECTED.items():
        (tmp_path / f'{split}.txt').write_text('\n'.join(names))
    found = chosen(tmp_path, splits=('train', 'val', 'test'))
    assert found == {s: [f'images/{name}' for name in names] for s, names in EXPECTED.items()}


def test_lists_that_are_something_else_or_wrong(tmp_path):
    folder = make(tmp_path / 'data', letters(12))
    (tmp_path / 'train.txt').write_text('call me Ishmael\n')
    assert all_of(folder) == [*letters(12)]
    (folder / 'train.txt').write_text('class00\nclass99\n')
    with pytest.raises(ValueError, match='train.txt names classes that .* does not have: class99'):
        OwnImages(folder, LAYOUT)
    (folder / 'train.txt').unlink()
    for name in 'one', 'two':
        (folder / 'splits' / name).mkdir(parents=True)
        (folder / 'splits' / name / 'train.txt').write_text('class00\n')
    with pytest.raises(ValueError, match='both list classes of .*take one of them away'):
        OwnImages(folder, LAYOUT)


def test_a_run_on_lists(tmp_path, eager):
    """CUB's form, trained, continued and tested; classes that are added to no list do not count."""
    folder = make(tmp_path / 'CUB/images', letters(12))
    for split, names in EXPECTED.items():
        (tmp_path / f'CUB/{split}.txt').write_text('\n'.join(names))
    flags = [*FLAGS, f'--data_dir={tmp_path}/CUB', f'--logdir={tmp_path}/logs']
    succeeded(run(*flags, '--metatrain_iterations=1'))
    add(folder)
    succeeded(run(*flags, '--metatrain_iterations=2'))
    (run_folder,) = (tmp_path / 'logs').iterdir()
    classes = read_run_state(f'{run_folder}/model1')['classes']
    assert {s: [*c] for s, c in classes.items()} == {
        split: [f'images/{name}' for name in names] for split, names in EXPECTED.items()
    }
    succeeded(run('--train=False', '--test_set=True', f'--run={run_folder}', '--test_tasks=2'))


# Data that moved, and no home ---------------------------------------------------------------------


def test_data_that_moved(tmp_path, eager, monkeypatch):
    """The sentence says who named the folder."""
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / 'photos', letters(6))
    flags = [*FLAGS, f'--logdir={tmp_path}/logs', f'--data_dir={folder}']
    succeeded(run(*flags, '--metatrain_iterations=1'))
    folder.rename(tmp_path / 'elsewhere')
    (run_folder,) = (tmp_path / 'logs').iterdir()
    evaluation = ['--train=False', f'--run={run_folder}', '--test_tasks=2']
    (tmp_path / 'data').mkdir()  # the default is not taken for it
    words = f'no folder {folder};', 'give --data_dir', f'the run in {run_folder} names it'
    assert_refused(run(*evaluation), *words)
    assert_refused(run(*evaluation, '--data_dir=/none'), 'no folder /none;', '--data_dir names it')
    assert_refused(run(*flags, '--metatrain_iterations=2'), f'{folder};', '--data_dir names it')
    (tmp_path / 'data').rmdir()
    assert_refused(run(*FLAGS), 'no folder data;', '--data_dir was not given')
    succeeded(run(*evaluation, f'--data_dir={tmp_path}/elsewhere'))


def test_prepared_data_that_moved(tmp_path, eager, monkeypatch):
    """They are the same in the default place."""
    monkeypatch.chdir(tmp_path)
    make_omniglot(tmp_path / 'far')
    flags = ['--datasource=omniglot', *FLAGS[4:], '--conv=False', f'--logdir={tmp_path}/logs']
    succeeded(run(*flags, '--data_dir=far', '--metatrain_iterations=1'))
    (tmp_path / 'far').rename(tmp_path / 'data')
    (run_folder,) = (tmp_path / 'logs').iterdir()
    succeeded(run('--train=False', f'--run={run_folder}', '--test_tasks=2'))


def test_no_home(tmp_path, monkeypatch):
    """No folder ~ is made."""
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as with an unknown user
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert len(cache_places(tmp_path)) == 1
    for name in 'data_dir', 'cache_dir', 'logdir':
        assert_refused(run(f'--{name}=~/x'), f'--{name}=~/x', 'set HOME')


def test_layouts_of_16_bits_name_their_caches_as_before():
    assert folder_layout(84, 3).name() == '84x84x3.crop'
    assert folder_layout(84, 3, bits=12).name() == '84x84x3.crop.12bits'
