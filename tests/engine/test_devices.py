"""GPUs as TensorFlow is told of them."""

import pytest
import tensorflow as tf
from command_line import parsed

from fewshot.engine import devices
from fewshot.engine.devices import set_up_gpus
from fewshot.runs.machine import tune


@pytest.fixture
def gpus(monkeypatch) -> dict:
    """What TensorFlow is told of the two GPUs that it seems to have."""
    told = {}
    config = tf.config.experimental
    monkeypatch.setattr(
        config, 'enable_tensor_float_32_execution', told.setdefault('tf32', []).append
    )
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [f'{kind}:0', f'{kind}:1'])
    monkeypatch.setattr(config, 'set_memory_growth', told.__setitem__)
    monkeypatch.setattr(devices, 'has_nvidia_gpu', lambda: True)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return told


@pytest.mark.parametrize('tf32', [False, True])
def test_gpus_are_exact_and_shared(gpus, capsys, tf32):
    tune(parsed('--datasource=miniimagenet', f'--tf32={tf32}'))
    assert gpus == {'tf32': [tf32], 'GPU:0': True, 'GPU:1': True}
    assert capsys.readouterr().err == ''


def test_gpus_in_use(gpus, monkeypatch):
    def refuse(*_):
        raise RuntimeError('Physical devices cannot be modified after being initialized')

    monkeypatch.setattr(tf.config.experimental, 'set_memory_growth', refuse)
    set_up_gpus()
    assert gpus == {'tf32': [False]}


def test_gpu_that_tensorflow_does_not_find(gpus, monkeypatch, capsys):
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
    set_up_gpus()
    assert "pip install -e '.[gpu]'" in capsys.readouterr().err
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # on purpose
    set_up_gpus()
    assert capsys.readouterr().err == ''
