"""Losses of one's own from the command line: --loss."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from command_line import assert_refused, make_class_folders, parsed, run, succeeded

from data_generator import SinusoidGenerator
from fewshot.networks.build import make_model, user_loss
from fewshot.runs import trainer
from fewshot.runs.checkpoints import read_run_state, write_checkpoint
from fewshot.runs.flags import run_name
from fewshot.runs.user_code import UserCodeError
from fewshot.use.learner import Learner
from maml import cross_entropy, mean_squared_error

LOSSES = """
import keras
import tensorflow as tf

def huber(outputs, labels):
    error = tf.abs(outputs - labels)
    return tf.reduce_mean(tf.where(error < 1, error**2 / 2, error - 0.5), axis=[1, 2])

def smooth(outputs, labels):
    labels = 0.9 * labels + 0.1 / labels.shape[2]
    losses = tf.nn.softmax_cross_entropy_with_logits(labels, outputs)
    return tf.reduce_sum(losses, axis=1) / 2

def absolute(outputs, labels):
    return tf.reduce_mean(tf.abs(outputs - labels), axis=[1, 2])

def hinge(outputs, labels):
    return tf.reduce_sum(tf.nn.relu(1 - outputs * (2 * labels - 1)), axis=[1, 2])

def keras_s(outputs, labels):
    return keras.losses.MeanSquaredError()(labels, outputs)

def of_examples(outputs, labels):
    return tf.reduce_mean((outputs - labels) ** 2, axis=2)

def no_number(outputs, labels):
    return tf.reduce_mean(tf.math.log(-tf.abs(outputs)), axis=[1, 2])

def stopped(outputs, labels):
    error = outputs - labels
    return tf.reduce_mean(error * tf.stop_gradient(error), axis=[1, 2])

@tf.custom_gradient
def square(x):
    return x * x, lambda upstream: upstream * 2 * tf.stop_gradient(x)

def once(outputs, labels):
    return tf.reduce_mean(square(outputs - labels), axis=[1, 2])

def hits(outputs, labels):
    same = tf.argmax(outputs, 2) == tf.argmax(labels, 2)
    return tf.reduce_mean(tf.cast(same, outputs.dtype), axis=1)

def failing(outputs, labels):
    return undefined
"""
SINE = ['--norm=None', '--update_batch_size=5', '--meta_batch_size=2', '--log=False']


@pytest.fixture(scope='module')
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('own') / 'losses.py'
    path.write_text(LOSSES)
    return path


def test_sinusoids_with_a_huber_loss(file, tmp_path, eager):
    """Trained, continued and evaluated; another name than without; not run unasked."""
    flags = [*SINE, f'--logdir={tmp_path}']
    own = f'--loss={file}:huber'
    for end in 3, 5:
        succeeded(run(*flags, own, f'--metatrain_iterations={end}'))
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith('nonorm.loss_huber') and run_name(parsed(*SINE)) != folder.name
    evaluation = ['--train=False', f'--run={folder}', '--test_tasks=2']
    assert_refused(run(*evaluation), f'was trained with --loss={file}:huber', 'not run unasked')
    succeeded(run(*evaluation, own))
    assert_refused(run(*evaluation, f'--loss={file}:absolute'), '--loss=', ':huber', ':absolute')
    with pytest.raises(ValueError, match='trained with a loss of its own: give it as loss='):
        Learner.load(folder)
    assert read_run_state(f'{folder}/model4')['flags']['loss'] == f'{file}:huber'


def test_the_loss_is_the_one_that_is_trained(file):
    """Far from the curve Huber's gradient is bounded, that of squares is not."""
    batch = SinusoidGenerator(5, 5).batch('train', 0, 3)
    batch = batch._replace(labela=batch.labela + 100, labelb=batch.labelb + 100)
    model = make_model('sinusoid', 5, 1e-3, norm='None', loss=user_loss(f'{file}:huber', SINUSOID))
    usual = make_model('sinusoid', 5, 1e-3, norm='None')
    outputs = usual.evaluate(batch, 1).outputa
    error = np.abs(outputs - batch.labela)
    found, squares = model.evaluate(batch, 1).loss1, usual.evaluate(batch, 1).loss1
    np.testing.assert_allclose(found, np.mean(error - 0.5, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(squares, mean_squared_error(outputs, batch.labela), rtol=1e-5)


def test_images_with_label_smoothing(file, tmp_path, eager):
    make_class_folders(tmp_path / 'photos', classes=2, images=4, size=8)
    flags = ['--datasource=folder', f'--data_dir={tmp_path}/photos', '--image_size=8']
    flags += ['--num_classes=2', '--update_batch_size=2', '--num_query=1', '--num_filters=2']
    flags += ['--meta_batch_size=1', '--log=False', f'--logdir={tmp_path}/logs']
    own = f'--loss={file}:smooth'
    outcome = succeeded(run(*flags, own, '--metatrain_iterations=2'))
    assert 'accuracy' in outcome.out
    succeeded(run(*flags, own, '--train=False', '--test_set=True', '--test_tasks=2'))


SINUSOID = {'datasource': 'sinusoid'}
IMAGES = {'datasource': 'folder', 'num_classes': 3}


@pytest.mark.parametrize(
    'name, settings',
    [
        *[('huber', SINUSOID), ('absolute', SINUSOID), ('smooth', IMAGES), ('hinge', IMAGES)],
        ('huber', {'datasource': 'own.py:tasks', 'objective': 'loss', 'dim_output': 4}),
        ('smooth', {'datasource': 'own.py:tasks', 'objective': 'accuracy', 'dim_output': 4}),
    ],
)
def test_losses_that_fit(file, name, settings):
    loss = user_loss(f'{file}:{name}', settings)
    assert loss(tf.zeros([2, 3, 4]), tf.ones([2, 3, 4])).shape == (2,)


@pytest.mark.parametrize(
    'name, words',
    [
        *[
            (name, 'finite number for each task')
            for name in ('keras_s', 'of_examples', 'no_number')
        ],
        *[(name, 'wrong derivative') for name in ('stopped', 'once', 'hits')],
    ],
)
def test_losses_that_do_not_fit(file, name, words):
    for settings in SINUSOID, IMAGES:
        with pytest.raises(ValueError, match=words) as error:
            user_loss(f'{file}:{name}', settings)
        assert '\n' not in str(error.value)


def test_a_loss_that_fails(file, tmp_path):
    """It is shown as the user's, before anything is written; so is a name that is not there."""
    with pytest.raises(UserCodeError, match='(?s)losses.py.*undefined'):
        user_loss(f'{file}:failing', SINUSOID)
    outcome = run(*SINE, f'--logdir={tmp_path}/logs', f'--loss={file}:failing')
    assert outcome.status == 1 and f'{file}:failing failed, not this program' in outcome.err
    for spec, words in (
        (f'{file}:none', "no function 'none'"),
        ('huber', 'must be FILE.py:FUNCTION'),
    ):
        assert_refused(run(*SINE, f'--logdir={tmp_path}/logs', f'--loss={spec}'), words)
    assert not [*tmp_path.iterdir()]


def test_a_loss_of_a_classifier_tells_the_shots():
    """By which a Learner knows a classifier."""
    model = make_model(**IMAGES, update_batch_size=7, image_size=8, loss=cross_entropy(1))
    assert model.loss.shots == 7


def test_checkpoints_from_before_the_flag(file, tmp_path, eager, monkeypatch):
    flags = [*SINE, f'--logdir={tmp_path}']

    def write(checkpoint, folder, iteration, state, kind):
        del state['flags']['loss']
        return write_checkpoint(checkpoint, folder, iteration, state, kind)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'write_checkpoint', write)
        succeeded(run(*flags, '--metatrain_iterations=1'))
    (folder,) = tmp_path.iterdir()
    assert 'loss' not in read_run_state(f'{folder}/model0')['flags']
    evaluation = ['--train=False', f'--run={folder}', '--test_tasks=2']
    succeeded(run(*evaluation))
    assert_refused(run(*evaluation, f'--loss={file}:huber'), 'was trained with --loss= (now ')
    outcome = succeeded(run(*flags, '--metatrain_iterations=2'))
    assert 'Continuing at iteration 1 of 2.' in outcome.out
