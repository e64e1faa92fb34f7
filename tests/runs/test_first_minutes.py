"""What a newcomer meets first: --help, the paper's cell, names of runs, published models."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, assert_refused, listing, make_omniglot, parsed, run, succeeded

from data_generator import ImageGenerator, SinusoidGenerator
from fewshot import Learner
from fewshot.networks.inner_loops import LEARNED_RATES
from fewshot.paper.published import published, table
from fewshot.paper.runs import paper_hint
from fewshot.paper.sinusoid_fits import RUN
from fewshot.runs.flags import FIRST, FLAGS, original_name, run_name, settings
from fewshot.runs.results import guessing

pytestmark = pytest.mark.usefixtures('eager')
OMNIGLOT = ['--datasource=omniglot', '--num_classes=2', '--update_batch_size=1']
SMALL = ['--meta_batch_size=2', '--num_filters=2', '--log=False', '--metatrain_iterations=1']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_omniglot(tmp_path_factory.mktemp('data'), characters=50)


@pytest.mark.parametrize('arguments, status', [(['--help'], 0), (['--updat_lr=1'], 1)])
def test_flags_are_read_before_tensorflow(tmp_path, arguments, status):
    """With a TensorFlow that cannot be imported: by purpose, the first ten first."""
    (tmp_path / 'tensorflow.py').write_text('raise SystemExit("TensorFlow was imported")')
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    line = [sys.executable, ROOT / 'main.py', *arguments]
    outcome = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == status, outcome.stderr
    if status:
        assert 'Did you mean: update_lr' in outcome.stderr
        return
    names = [part.split('=')[0] for part in outcome.stdout.split('\n  --')[1:]]
    assert tuple(names[: len(FIRST)]) == FIRST
    assert names[len(FIRST) :] == [flag.name for flag in FLAGS]


def test_learned_rates_are_those_of_the_flag():
    (flag,) = (flag for flag in FLAGS if flag.name == 'learn_lr')
    assert flag.kind == ('none', *LEARNED_RATES)


@pytest.mark.parametrize(
    'flags, told',
    [
        (
            OMNIGLOT[::2] + ['--num_classes=5'],
            '--meta_batch_size=32 --update_lr=0.4 --metatrain_iterations=60000 for Omniglot, 5-way '
            '1-shot: bash scripts/paper/omniglot_5way_1shot.sh',
        ),
        (OMNIGLOT, ''),  # 2-way is in no table
        ([], ''),
        (['--norm=None', '--update_batch_size=10', '--metatrain_iterations=70000'], ''),
        (
            ['--datasource=miniimagenet', '--update_batch_size=1', '--metatrain_iterations=5'],
            '--update_lr=0.01',
        ),
    ],
)
def test_the_cell_of_the_paper_is_told(flags, told):
    """Of flags that were not given."""
    f = parsed(*flags)
    hint = paper_hint(settings(f), {name for name in settings(f) if f[name].present})
    assert told in hint and bool(told) == bool(hint)
    assert '--metatrain_iterations' not in hint or '--metatrain_iterations=5' not in flags


def test_guessing_is_told():
    source = ImageGenerator.__new__(ImageGenerator)
    source.dim_output = 4
    assert '25.0 %' in guessing(source, 0.3, 0.06)
    source.has_queries = False  # then it is that of the support sets before any update
    assert not guessing(source, 0.3, 0.06)
    source.has_queries = True
    assert not guessing(source, 0.3, 0.04) and not guessing(SinusoidGenerator(1, 1), 0.1, 1)


def test_names_tell_tasks_and_seeds():
    usual = 'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm'
    names = {
        '': '',
        '--datasource=omniglot --data_dir=x': '',
        '--seed=3': '.seed3',
        '--datasource=folder --data_dir=some/birds/': '.birds',
        '--datasource=folder --data_dir=a[b --seed=1': '.a_b.seed1',
        '--datasource=own.py:waves': '.waves',
    }
    assert {flags: run_name(parsed(*flags.split())) for flags in names} == {
        flags: usual + end for flags, end in names.items()
    }


@pytest.mark.parametrize('more', ['', '--seed=1', '--baseline=oracle --seed=12'])
def test_plots_know_the_names_of_sinusoids(more):
    assert RUN.fullmatch(run_name(parsed('--norm=None', *more.split())))


def test_older_runs_keep_their_names(tmp_path, data):
    """And a run of another seed begins beside that of seed 0."""
    train = [*OMNIGLOT, *SMALL, f'--data_dir={data}']
    seed = [*train, '--seed=1', f'--logdir={tmp_path}/older']
    succeeded(run(*seed))
    f = parsed(*seed)
    (tmp_path / 'older' / run_name(f)).rename(tmp_path / 'older' / original_name(f))
    assert 'complete' in succeeded(run(*seed)).out
    for more in ([], ['--seed=1']):
        succeeded(run(*train, *more, f'--logdir={tmp_path}/new'))
    assert {path.name for path in (tmp_path / 'new').iterdir()} == {run_name(f), original_name(f)}


def test_published_models_by_name(monkeypatch, tmp_path):
    names = published()
    assert {'omniglot-5way-1shot', 'miniimagenet-5way-1shot'} <= names.keys()
    assert len(table()) == 2 + len(names)
    assert '\n'.join(table()) in (ROOT / 'docs/reference/models.md').read_text()
    monkeypatch.chdir(tmp_path)
    learner = Learner.load('omniglot-5way-1shot')
    assert Path(learner.checkpoint).parent == names['omniglot-5way-1shot']
    with pytest.raises(ValueError, match='no folder omniglot: .*published models are'):
        Learner.load('omniglot')


def test_training_begins_with_another_run(tmp_path, data):
    """With its weights; a last layer of other ways begins afresh, other networks are refused."""
    train = [*OMNIGLOT, *SMALL, f'--data_dir={data}']
    succeeded(run(*train, f'--logdir={tmp_path}/first', '--meta_lr=1', '--metatrain_iterations=3'))
    (first,) = (tmp_path / 'first').iterdir()
    for ways in (2, 3):
        more = ['--meta_lr=0', f'--num_classes={ways}', f'--init={first}']
        outcome = succeeded(run(*train, *more, f'--logdir={tmp_path}/{ways}'))
        assert ('w5 and b5 begin afresh' in outcome.out) == (ways == 3)
        (second,) = (tmp_path / str(ways)).iterdir()
        theirs, ours = (Learner.load(folder).model.weights for folder in (first, second))
        for name in theirs.keys() - ({'w5', 'b5'} if ways == 3 else set()):
            np.testing.assert_array_equal(theirs[name], ours[name])
    logdir = f'--logdir={tmp_path}/other'
    before = listing(tmp_path)
    assert_refused(run(*train, '--init=nowhere', logdir), '--init=nowhere', 'published models')
    other = run(*train, '--num_filters=4', f'--init={first}', logdir)
    assert_refused(other, 'of another architecture', 'flags of that run')
    assert listing(tmp_path) == before


def test_the_last_line_of_joint_training(tmp_path):
    """Which goes on to the end: it is no line of meta-training."""
    joint = ['--norm=None', '--meta_batch_size=2', '--pretrain_iterations=3']
    outcome = succeeded(run(*joint, '--metatrain_iterations=0', f'--logdir={tmp_path}'))
    assert 'Pretrain Iteration 3 of 3: loss' in outcome.out
