"""The files of a checkpoint."""

import numpy as np
import pytest
import tensorflow as tf

from fewshot.runs.checkpoints import checkpoints, read_checkpoint, write_checkpoint


def test_ten_newest_checkpoints_are_kept(tmp_path):
    """Newest by number, not by name: model11000 is newer than model9000."""
    checkpoint = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0, 2.0])})
    for i in range(1, 13):
        path = write_checkpoint(checkpoint, tmp_path, 1000 * i)
        assert path == str(tmp_path / f'model{1000 * i}')
    assert [*checkpoints(tmp_path)] == [1000 * i for i in range(3, 13)]
    stems = {path.name.split('.')[0] for path in tmp_path.iterdir()}
    assert stems == {f'model{1000 * i}' for i in range(3, 13)}
    assert checkpoints(tmp_path)[12000] == str(tmp_path / 'model12000')
    assert checkpoints(tmp_path / 'absent') == {}


@pytest.mark.parametrize('adam', [True, False])
def test_checkpoint_is_read_back_by_parameter_name(tmp_path, adam):
    """It is complete with Adam's state only."""
    values = {'w1': np.float32([[1, 2]]), '0/beta': np.float32([3]), '2/gamma': np.float32([4])}
    variables = {name: tf.Variable(value) for name, value in values.items()}
    more = {'metatrain_optimizer': tf.train.Checkpoint(step=tf.Variable(1))} if adam else {}
    checkpoint = tf.train.Checkpoint(weights={'w1': variables.pop('w1')}, norms=variables, **more)
    read, optimizers = read_checkpoint(write_checkpoint(checkpoint, tmp_path, 7), [*values])
    complete = optimizers == ['metatrain_optimizer']
    assert complete == adam and read.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    'names, stored',
    [
        (
            'conv1 b1 conv2 b2 w5 b5 0/beta 1/beta',
            'conv1 Variable conv2 Variable_1 w5 Variable_2 0/beta 1/beta',
        ),
        ('w1 b1 w2 b2 0/beta', 'Variable Variable_1 Variable_2 Variable_3 0/beta'),
    ],
    ids=['convolutional', 'fully connected'],
)
def test_checkpoint_of_the_original(tmp_path, names, stored):
    """The TensorFlow 1 format, and the names that TensorFlow made up for variables without one."""
    names, path = names.split(), str(tmp_path / 'model59999')
    values = [np.full([2], i, np.float32) for i in range(len(names))]
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=[f'model/{name}' for name in stored.split()],
        shape_and_slices=[''] * len(names),
        tensors=values,
    )
    read, optimizers = read_checkpoint(path, names)
    complete = bool(optimizers)
    assert not complete and read.keys() == set(names)
    for name, value in zip(names, values):
        np.testing.assert_array_equal(read[name], value)


def damaged(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    'damage',
    [lambda path: path.unlink(), damaged, lambda path: path.write_bytes(b'')],
    ids=['absent', 'cut', 'empty'],
)
def test_unreadable_checkpoint(tmp_path, damage):
    checkpoint = tf.train.Checkpoint(weights={'w1': tf.Variable([1.0, 2.0])})
    path = write_checkpoint(checkpoint, tmp_path, 7)
    damage(tmp_path / 'model7.index')
    with pytest.raises(ValueError, match='model7 cannot be read as a checkpoint'):
        read_checkpoint(path, ['w1'])
