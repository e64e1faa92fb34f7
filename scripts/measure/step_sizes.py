#!/usr/bin/env python
r"""What the step sizes of an evaluation do to its results.

    python scripts/measure/step_sizes.py RUN_FOLDER... [--shots=K] [--tasks=600] \
        [--data_dir=data]

The step size is the α of training at each update, or half of it after the first.

RUN_FOLDERs are seeds of the same training. They meet the same tasks of the test classes (the
sinusoid: of its one distribution), of which main.py's 600 are the first. Prints a Markdown table:
accuracy in percent, or mean squared error, over updates. ± is the 95 % interval, over seeds if
there are several, else over tasks.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np
import tensorflow as tf

from data_generator import Batch, whole_number
from fewshot.paper.runs import DIVERGED
from fewshot.runs.checkpoints import read_run_state
from fewshot.runs.results import confidence
from fewshot.runs.terminal import print_anything
from fewshot.use.evaluation import test_tasks
from fewshot.use.learner import Learner
from fewshot.use.loading import load, refusals
from fewshot.use.saved_models import find_checkpoint
from maml import accuracy, repeated

SHOWN = (1, 3, 5, 10)  # updates
UPDATES = SHOWN[-1]


def outcomes(learner: Learner, batch: Batch, halved: bool) -> np.ndarray:
    """Computes accuracy, or mean squared error, on the query set before and after each update.

    The result's shape is [1 + UPDATES, T].
    """
    model, run = learner.model, learner.programs  # adapt and predict refuse what diverges
    batch = Batch(*(tf.constant(values, model.dtype) for values in batch))
    tasks, examples, _ = batch.inputa.shape
    scale, found = learner.example_scale(examples), []
    weights = repeated(model.weights, tasks)
    for update in range(1 + UPDATES):
        alpha = scale * model.update_lr / (2 if halved and update > 1 else 1)
        if update:
            inner = batch.inputa, batch.labela, weights, alpha
            weights = run.adapt(*inner, update - 1, update)
        if learner.is_classifier:
            found.append(accuracy(run.output(batch.inputb, weights, update), batch.labelb))
        else:
            found.append(run.losses(batch.inputb, batch.labelb, weights, update))
    return np.where(np.isfinite(found), found, np.inf)


def row(name: str, values: np.ndarray, is_error: bool) -> str:
    """Returns a line of the table; values: [seeds, 1 + UPDATES, tasks]."""
    values = values[:, list(SHOWN)] * (1 if is_error else 100)
    means = values.mean(-1)
    halves = confidence(means if len(means) > 1 else values[0].T)
    shown = [f'{mean:.2f} ± {half:.2f}' for mean, half in zip(means.mean(0), halves)]
    cells = [*np.where(is_error & ~(means.mean(0) < DIVERGED), 'diverges', shown)]
    if is_error:
        medians = np.median(values, -1).mean(0)
        cells.append(' / '.join(f'{value:.2f}' for value in medians))
        cells.append(f'{100 * (values[:, -1] > DIVERGED).mean():.2f} %')
    return f'| {" | ".join([name, *cells])} |'


def training(learner: Learner) -> tuple:
    """Returns the settings that seeds of the same training have in common."""
    settings, alpha = learner.settings, learner.model.update_lr
    baseline = settings.get('baseline') or 'None'
    return settings['datasource'], baseline, alpha, settings['update_batch_size']


def table(models: list[Learner], options: argparse.Namespace, classes: dict | None):
    """Prints the table; classes: those that the first run knows.

    Raises ValueError if the runs do not belong together.
    """
    first, alpha = models[0], models[0].model.update_lr
    if any(learner.model.rates for learner in models):
        raise ValueError('the runs have learned their step sizes, so halving α tells nothing')
    if len({training(learner) for learner in models}) > 1 or 'oracle' in training(first):
        raise ValueError('the runs must be seeds of the same training, and not of the oracle')
    is_error, tasks = not first.is_classifier, options.tasks
    shots = options.shots or first.settings['update_batch_size']
    generator = test_tasks(first.settings, shots, options.data_dir, classes)
    more = ['medians', f'above {DIVERGED:.0f} after {UPDATES}'] if is_error else []
    print(f'| {" | ".join(["step size", *(f"after {i}" for i in SHOWN), *more])} |')
    print('|---' * (1 + len(SHOWN) + len(more)) + '|')
    chunk = generator.tasks_at_once
    slices = [slice(i, i + chunk) for i in range(0, tasks, chunk)]
    batches = [generator.batch('test', 0, tasks, of_tasks) for of_tasks in slices]
    for halved, name in (False, f'{alpha:g}'), (True, f'{alpha:g}, then {alpha / 2:g}'):
        values = []  # [seeds, 1 + UPDATES, tasks]
        for learner in models:
            parts = [outcomes(learner, batch, halved) for batch in batches]
            values.append(np.concatenate(parts, -1))
        print(row(name, np.array(values), is_error), flush=True)


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('--shots', type=int, help="default: training's")
    parser.add_argument('--tasks', type=int, default=600)
    parser.add_argument('--data_dir', default='data')
    options = parser.parse_args(arguments)
    with refusals(__file__):
        whole_number('--shots', 1 if options.shots is None else options.shots, lowest=1)
        whole_number('--tasks', options.tasks, lowest=1)
        models = [load(run) for run in options.runs]
        classes = read_run_state(find_checkpoint(options.runs[0])).get('classes')
        table(models, options, classes)


if __name__ == '__main__':
    print_anything()
    main(sys.argv[1:])
