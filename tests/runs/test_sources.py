"""A data source is a row and a class."""

import numpy as np
import pytest
from command_line import parsed, run, succeeded

from data_generator import Batch, DataGenerator
from fewshot.networks.build import make_model
from fewshot.sources import OWN, SOURCES, Source, source_of
from maml import mean_squared_error


class Planes(DataGenerator):
    """Regression tasks y = a x1 + b x2."""

    objective, validates = 'loss', False

    def __init__(self, shots: int, seed: int):
        super().__init__(2, 1, num_draws=2 + 4 * shots, seed=seed)
        self.shots = shots

    def _tasks(self, split, uniform) -> Batch:
        slopes, x = uniform[:, :2], uniform[:, 2:].reshape(len(uniform), 2 * self.shots, 2)
        y = np.einsum('tnd,td->tn', x, slopes)[..., np.newaxis]
        arrays = x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :]
        return Batch(*map(np.float32, arrays))


@pytest.fixture
def planes(monkeypatch):
    row = Source(
        Planes,
        make=lambda shots, baseline, seed: Planes(shots, seed),
        sizes=lambda baseline: (2, 1),
    )
    monkeypatch.setitem(SOURCES, 'planes', row)


def test_a_row_and_a_class_make_a_source(tmp_path, eager, planes):
    """Trained, continued and evaluated by its name, with a network and a loss that fit it."""
    flags = ['--datasource=planes', '--norm=None', '--update_batch_size=3', f'--logdir={tmp_path}']
    succeeded(run(*flags, '--metatrain_iterations=2', '--log=False'))
    again = succeeded(run(*flags, '--metatrain_iterations=3', '--log=False'))
    assert 'Continuing at iteration 2 of 3.' in again.out
    outcome = succeeded(run(*flags, '--train=False', '--test_set=True'))
    assert 'Mean squared error on 20 test tasks' in outcome.out
    model = make_model('planes', norm='None')
    assert model.loss is mean_squared_error and model.network.dim_input == 2


def test_rows():
    """Each is of images, or says how its generator and network are made; others are the user's."""
    for name, source in SOURCES.items():
        assert source.has_images != bool(source.make and source.sizes), name
        assert parsed(f'--datasource={name}').datasource == name
    assert source_of('own.py:tasks') is OWN and source_of(None) is OWN
