"""Images of one's own as people have them: folders, sizes, what a run knows of them, the cache."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import (
    assert_refused,
    draw,
    make_miniimagenet,
    make_omniglot,
    parsed,
    run,
    succeeded,
)
from PIL import Image

import main
from data_generator import SMALLEST_TASK, TaskSize
from fewshot.data import image_cache
from fewshot.data.image_files import folder_layout, read_image, run_layout
from fewshot.data.image_folders import load_omniglot
from fewshot.data.own_images import OwnImages, deal_classes, load_folder
from fewshot.runs.checkpoints import checkpoints, read_run_state, write_checkpoint
from fewshot.runs.flags import run_name, split_proportions
from fewshot.runs.tasks import make_generators
from fewshot.use.learner import Learner

LAYOUT = folder_layout(4, 1)


def make(folder: Path, classes: dict[str, int]) -> Path:
    """{class: how many images}."""
    for c, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            draw(folder / name / f'{i}.png', (6, 6), 'RGB', c, i)
    return folder


def letters(count: int, images: int = 4) -> dict[str, int]:
    return {f'class{c:02d}': images for c in range(count)}


def chosen(folder: Path, size=SMALLEST_TASK, splits=('train', 'val'), **named) -> dict:
    """{split: [class]}."""
    own = OwnImages(folder, LAYOUT, splits)
    own.choose(size=size, **named)
    return {split: [*classes] for split, classes in own.classes.items()}


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'dev'])
def test_names_of_the_validation_folder(tmp_path, name):
    for split, classes in {'train': 'ab', name: 'cd', 'test': 'ef'}.items():
        make(tmp_path / 'photos' / split, dict.fromkeys(classes, 1))
    loaded = load_folder(tmp_path / 'photos', 4)
    assert {split: ''.join(c.names) for split, c in loaded.items()} == {
        'train': 'ab',
        'val': 'cd',
        'test': 'ef',
    }
    make(tmp_path / 'photos' / ('dev' if name == 'val' else 'val'), {'g': 1})
    with pytest.raises(ValueError, match='both hold validation classes'):
        load_folder(tmp_path / 'photos', 4)


def test_splits_one_level_down(tmp_path):
    for split in ('train', 'val', 'test'):
        make(tmp_path / 'photos/inner' / split, {'a': 1})
    with pytest.raises(ValueError, match=f'lie in {tmp_path}/photos/inner: give it as --data_dir'):
        load_folder(tmp_path / 'photos')


def test_classes_further_down(tmp_path):
    """They are called after their paths; what lies below a class is no class."""
    names = [f'{kind}/big/breed{i}' for kind in ('cats', 'dogs') for i in range(3)]
    folder = make(tmp_path / 'animals', dict.fromkeys(names, 2))
    make(folder / names[0], {'originals': 1})
    loaded = load_folder(folder, 4)
    assert sorted(name for c in loaded.values() for name in c.names) == names
    path = next(iter((folder / loaded['val'].names[0]).iterdir()))
    expected = read_image(str(path), folder_layout(4, 3))
    assert any((expected == image).all() for image in loaded['val'].images)
    make(folder, {'horse': 1})
    with pytest.raises(ValueError, match='cats, .*dogs holds no images but folders.*at one depth'):
        load_folder(folder, 4)


# Few and small classes ----------------------------------------------------------------------------


def test_few_classes_are_shared_out():
    """As before where that was enough to train or to evaluate; else so that each split has N.

    What cannot be comes with a number of classes that can.
    """
    for count in range(3, 40):
        names = [*letters(count)]
        for shares in ((0.64, 0.16, 0.2), (1, 8, 1), (8, 1, 1)):
            before = deal_classes(names, shares, 1, ('train', 'val'), 'x')
            sizes = [len(classes) for classes in before.values()]
            for ways in range(2, 8):
                try:
                    dealt = deal_classes(names, shares, ways, ('train', 'val'), 'x')
                except ValueError as error:
                    assert count < 3 * ways and f'has {count} classes' in str(error)
                    check_remedies(names, ways, shares, str(error).partition('; ')[2])
                    continue
                assert sorted(sum(dealt.values(), [])) == names
                if min(sizes[:2]) >= ways:
                    assert dealt == before
                else:
                    assert min(map(len, dealt.values())) >= ways


def check_remedies(names: list[str], ways: int, shares: tuple, message: str):
    fewer = re.search(r'--num_classes=(\d+)', message)
    assert bool(fewer) == (len(names) >= 6)
    if fewer:
        dealt = deal_classes(names, shares, int(fewer[1]), ('train', 'val'), 'x')
        assert 1 < int(fewer[1]) < ways and min(map(len, dealt.values())) >= int(fewer[1])
    split = re.search(r'--split=([\d,]+),', message)
    assert bool(split) == (len(names) > 2 * ways)
    if split:
        dealt = deal_classes(names, split_proportions(split[1]), ways, ('train', 'val'), 'x')
        assert [len(classes) for classes in dealt.values()] == [*map(int, split[1].split(','))]
        assert min(len(dealt[s]) for s in ('train', 'val')) >= ways


def test_a_deal_as_it_always_was():
    names = [*letters(10)]
    assert deal_classes(names, (0.64, 0.16, 0.2), 2, ('train', 'val'), 'x') == {
        'train': ['class06', 'class08', 'class09', 'class07', 'class05', 'class03'],
        'val': ['class00', 'class04'],
        'test': ['class01', 'class02'],
    }


def test_small_classes(tmp_path, monkeypatch, capsys):
    """They are found before anything is decoded, and left out if asked."""
    monkeypatch.setattr(image_cache, 'read_image', lambda *_: pytest.fail('decoded'))
    folder = make(tmp_path / 'photos', letters(9) | {'few': 1, 'none': 0})
    size = TaskSize(ways=2, support=1, query=2)
    with pytest.raises(ValueError, match='none holds no images.*--skip_small_classes'):
        chosen(folder, size)
    (folder / 'none').rmdir()
    with pytest.raises(
        ValueError, match='few of the train split .* has 1 images, but a task takes 3'
    ):
        chosen(folder, size)
    (folder / 'none').mkdir()
    capsys.readouterr()
    kept = sum(chosen(folder, size, skip_small=True).values(), [])
    assert sorted(kept) == [*letters(9)]
    assert 'fewer than 3 images: few (1), none (0).' in capsys.readouterr().err


def test_files_that_are_left_out(tmp_path, capsys):
    """Those of classes are counted and named, unless a run knows its data already."""
    folder = make(tmp_path / 'photos', letters(9))
    for name in ('class03/a.heic', 'class03/b.HEIC', 'class04/c', 'notes.txt', '.hidden'):
        (folder / name).write_text('')
    own = OwnImages(folder, LAYOUT)
    own.choose()
    told = capsys.readouterr().err
    assert '3 files in' in told and 'class03/a.heic, class03/b.HEIC, class04/c' in told
    OwnImages(folder, LAYOUT).choose(known=own.counts)
    assert not capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path):
    """All of them are named, since decoding takes long."""
    folder = make(tmp_path / 'photos', letters(9))
    for name in ('class01/2.png', 'class03/a.jpg', 'class08/3.png'):
        (folder / name).write_bytes(b'')
    others = f'2 more cannot be read: {folder}/class03/a.jpg, {folder}/class08/3.png'
    with pytest.raises(ValueError, match=f'class01/2.png cannot be decoded .*{others}'):
        load_folder(folder, 4)


def test_namesakes_in_two_splits(tmp_path, capsys):
    for split in ('train', 'val', 'test'):
        make(tmp_path / 'photos' / split, {'same': 1, f'of {split}': 1})
    load_folder(tmp_path / 'photos', 4)
    assert 'folders of these names: same. They are taken for different' in capsys.readouterr().err


# Photos that are not square -----------------------------------------------------------------------


@pytest.mark.parametrize(
    'fit, rows',
    [
        ('crop', [[80, 160], [80, 160]]),
        ('pad', [[255] * 4, [40, 80, 160, 200], [40, 80, 160, 200], [255] * 4]),
        ('squash', [[60, 180], [60, 180]]),
    ],
)
def test_fit(tmp_path, fit, rows):
    """An image of 4 columns and 2 rows, in a square."""
    columns = np.uint8([[40, 80, 160, 200]] * 2)
    Image.fromarray(columns).save(tmp_path / 'wide.png')
    layout = folder_layout(len(rows), 1, fit)._replace(resampling=Image.Resampling.BOX)
    found = read_image(str(tmp_path / 'wide.png'), layout)[..., 0]
    assert found.tolist() == rows


def test_fit_of_a_run():
    settings = {'datasource': 'folder', 'image_size': 4, 'channels': 1}
    assert run_layout(settings).fit == 'squash'  # from before the flag
    assert run_layout(settings | {'fit': 'pad'}).fit == 'pad'
    assert run_layout(settings | {'datasource': 'miniimagenet', 'fit': None}).fit == 'squash'


# A run knows its data -----------------------------------------------------------------------------


def add(folder: Path):
    make(folder, {'added': 4})
    make(folder, {'class': 4})


def test_classes_added_later_are_left_out(tmp_path, capsys):
    folder = make(tmp_path / 'photos', letters(12))
    own = OwnImages(folder, LAYOUT)
    own.choose()
    before = own.load()
    add(folder)
    known = json.loads(json.dumps(own.counts))  # as from a checkpoint
    again = OwnImages(folder, LAYOUT)
    again.choose(known=known)
    for split, classes in again.load().items():
        assert classes.names == before[split].names
        np.testing.assert_array_equal(classes.images, before[split].images)
    assert 'does not know are left out: added, class.' in capsys.readouterr().err
    fresh = chosen(folder)
    assert set(fresh['test']) & set(before['train'].names)  # without what the run knows


def remove(folder: Path, name: str):
    shutil.rmtree(folder / name)


def remove_image(folder: Path, name: str):
    next((folder / name).iterdir()).unlink()


@pytest.mark.parametrize(
    'change, words', [(remove, 'misses {}'), (remove_image, '{} has 3 images and had 4')]
)
def test_other_data_are_refused(tmp_path, change, words):
    """With the difference, where a split that is needed has one."""
    folder = make(tmp_path / 'photos', letters(12))
    own = OwnImages(folder, LAYOUT)
    own.choose()
    name = [*own.counts['val']][0]
    change(folder, name)
    for splits in ('train', 'val'), ('val',):
        with pytest.raises(ValueError, match=words.format(name)):
            chosen(folder, splits=splits, known=own.counts)
    assert chosen(folder, splits=('test',), known=own.counts)['test'] == [*own.counts['test']]


def test_new_classes_may_be_evaluated_but_not_those_of_training(tmp_path, capsys):
    known = {'train': letters(6), 'val': {'x': 4}}
    folder = make(tmp_path / 'other', {f'new{i}': 4 for i in range(9)})
    test = chosen(folder, splits=('test',), known=known)
    assert test == chosen(folder, splits=('test',))
    with pytest.raises(ValueError, match='the run has other data'):
        chosen(folder, known=known)
    with pytest.raises(ValueError, match='it knows no test classes, and used class03 otherwise'):
        chosen(make(folder, {'class03': 4}), splits=('test',), known=known)


FLAGS = ['--datasource=folder', '--image_size=8', '--channels=1', '--num_filters=2', '--log=False']
FLAGS += ['--num_classes=2', '--update_batch_size=1', '--meta_batch_size=1']


@pytest.mark.slow
def test_a_run_and_what_follows(tmp_path, eager, monkeypatch):
    """Trained, the commands that it names pasted; classes added; older checkpoints go on."""
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / 'my photos', letters(6))
    draw(folder / 'class00/0.png', (12, 6), 'L', 0, 0)
    logs = ['--logdir=my logs', f'--data_dir={folder}']
    outcome = succeeded(run(*FLAGS, *logs, '--metatrain_iterations=1'))
    (run_folder,) = (tmp_path / 'my logs').iterdir()
    where, evaluation, classification = outcome.lines[-3:]
    assert where.startswith(f'The run is in my logs/{run_folder.name}.')
    assert Path(shlex.split(evaluation)[1]).samefile(main.__file__)
    assert Path(shlex.split(classification)[1]).is_file()
    assert shlex.split(classification)[2] == f'my logs/{run_folder.name}'
    evaluate = shlex.split(evaluation)[2:]
    outcome = succeeded(run(*evaluate, '--test_tasks=2'))
    assert 'Note: all these tasks are of the same 2 classes' in outcome.out
    csv = {path.name: path.read_bytes() for path in run_folder.glob('*.csv')}
    add(folder)
    succeeded(run(*evaluate, '--test_tasks=2'))
    assert {path.name: path.read_bytes() for path in run_folder.glob('*.csv')} == csv
    other = make(tmp_path / 'other' / folder.name, {f'new{i}': 4 for i in range(6)})
    more = FLAGS + ['--logdir=my logs', f'--data_dir={other}', '--metatrain_iterations=2']
    assert_refused(run(*more), 'the run has other data', 'train classes')
    succeeded(run(*evaluate, '--test_tasks=2', f'--data_dir={other}'))
    (name,) = {path.name for path in run_folder.glob('*.csv')} - csv.keys()
    assert '_on_my' in name
    assert Learner.load(run_folder).settings['fit'] == 'crop'
    assert_refused(run(*FLAGS, *logs, '--metatrain_iterations=2', '--fit=pad'), '--fit=crop (now')
    make_older(run_folder)
    outcome = succeeded(run(*FLAGS, *logs, '--metatrain_iterations=2'))
    assert 'Continuing at iteration 1 of 2.' in outcome.lines
    state = read_run_state(f'{run_folder}/model1')
    assert state['flags']['fit'] == 'squash' and state['classes'].keys() == {'train', 'val', 'test'}


def make_older(run_folder: Path):
    """Its checkpoint as from before runs knew their data."""
    (path,) = checkpoints(run_folder).values()
    state = read_run_state(path)
    del state['classes']
    for name in ('fit', 'num_query', 'cache_dir', 'skip_small_classes'):
        del state['flags'][name]
    write_checkpoint(Learner.load(run_folder).model.checkpoint, run_folder, 0, state)


# Query images -------------------------------------------------------------------------------------


@pytest.mark.parametrize('source, paper', [('omniglot', 1), ('miniimagenet', 15), ('folder', 1)])
def test_query_images_in_training(tmp_path, source, paper):
    make_omniglot(tmp_path)
    make_miniimagenet(tmp_path)
    folder = tmp_path / 'omniglot_resized' if source == 'folder' else tmp_path
    flags = [f'--datasource={source}', f'--data_dir={folder}', '--num_classes=2']
    flags += ['--update_batch_size=1', '--image_size=8']
    for asked, wanted in {(): paper, ('--num_query=3',): 3}.items():
        f = parsed(*flags, *asked)
        for split, generator in make_generators(f).items():
            assert generator.batch(split, 0, 1).inputb.shape[1] == 2 * wanted
        assert ('.query_3' in run_name(f)) == bool(asked)
    (generator,) = make_generators(parsed(*flags, '--num_query=3', '--train=False')).values()
    assert generator.num_query == 1  # --test_query's


def test_query_images_of_sinusoids():
    assert_refused(run('--num_query=3'), '--num_query=3', '--datasource=omniglot')
    assert_refused(run('--num_query=0'), '--num_query must be at least 1')


# Where decoded images are kept --------------------------------------------------------------------


def test_cache_in_the_users_folder(tmp_path, monkeypatch, capsys):
    """If there is no place beside the data; it belongs to these data, as they are."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    for name in ('one', 'two'):
        make_omniglot(tmp_path / name, images=1 + (name == 'two'))
        (tmp_path / name / 'omniglot_resized.cache.npy').mkdir()  # in the way
    first = load_omniglot(tmp_path / 'one')
    told = capsys.readouterr().err
    assert f'but are in {tmp_path}/home/maml-tf2/omniglot_resized.' in told
    assert len(load_omniglot(tmp_path / 'two')['val'].images) == 52
    capsys.readouterr()
    again = load_omniglot(tmp_path / 'one')
    assert not capsys.readouterr().err
    np.testing.assert_array_equal(again['val'].images, first['val'].images)
    path = next((tmp_path / 'one/omniglot_resized').rglob('*.png'))
    Image.new('1', (28, 28)).save(path)
    assert not np.array_equal(load_omniglot(tmp_path / 'one')['val'].images, first['val'].images)
    assert len(os.listdir(tmp_path / 'home/maml-tf2')) == 2


def test_cache_dir(tmp_path, capsys):
    make_omniglot(tmp_path / 'data')
    for decodes in True, False:
        load_omniglot(tmp_path / 'data', cache_dir=tmp_path / 'a/b')
        assert ('Decoding' in capsys.readouterr().err) == decodes
    assert os.listdir(tmp_path / 'data') == ['omniglot_resized']
    assert len(os.listdir(tmp_path / 'a/b')) == 1
