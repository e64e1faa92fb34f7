"""Evaluations of a loaded model, for scripts: main.py's tasks, and the accuracy on tasks."""

import numpy as np
from absl import flags

from data_generator import DataGenerator
from fewshot.runs.flags import define_flags
from fewshot.runs.results import confidence
from fewshot.runs.tasks import make_generators
from fewshot.runs.trainer import evaluate_tasks
from fewshot.use.learner import Learner


def test_tasks(
    settings: dict, shots: int, data_dir: str, classes: dict | None = None
) -> DataGenerator:
    """Returns the generator of the tasks that main.py evaluates a run with these flags on.

    classes: those that the run knows. Raises ValueError and OSError without data.
    """
    values = flags.FlagValues()
    define_flags(values)
    wanted = {'update_batch_size': shots, 'data_dir': data_dir, 'train': False, 'test_set': True}
    given = {name: value for name, value in (settings | wanted).items() if value is not None}
    values(['main.py', *(f'--{name}={given[name]}' for name in given if name in values)])
    run = {'classes': classes, 'fit': 'squash'}  # which all did before it was among the flags
    return make_generators(values, run)['test']


def show_accuracy(name: str, learner: Learner, source: DataGenerator, tasks: int, updates: int):
    """Prints the mean accuracy on test tasks after so many updates, and half its 95 % interval."""
    parts = evaluate_tasks(learner.model, source, 'test', tasks=tasks, num_updates=updates)
    values = 100 * np.concatenate([*parts])[:tasks, updates]
    print(f'{name:20}{values.mean():6.2f} +- {confidence(values):.2f}', flush=True)
