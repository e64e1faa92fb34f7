#!/usr/bin/env python
"""How the error of sinusoid runs depends on the step sizes of the evaluation, over more tasks than main.py's 600.

    python scripts/sinusoid_step_sizes.py RUN_FOLDER... [--shots=5] [--tasks=6000]

RUN_FOLDERs are seeds of the same training. They meet the same tasks with the α of their training at each update, and with α at the
first and α/2 at the following. Prints a Markdown table.
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # no lines about CPU features and missing GPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402

from data_generator import SinusoidGenerator  # noqa: E402
from maml import MAML  # noqa: E402

UPDATES = 10
SHOWN = (1, 5, 10)
SEED = 2          # of the tasks: others than those of main.py's evaluation
DIVERGED = 100.   # mean squared error; the largest amplitude is 5, so that predicting 0 has 25 at most


def errors(model: MAML, shots: int, tasks: int, halved: bool) -> np.ndarray:
    """Mean squared errors on the query set before and after each update, [1 + UPDATES, tasks]."""
    batch = SinusoidGenerator(shots, shots, seed=SEED).batch('test', 0, tasks)
    weights, found = None, []
    for update in range(1 + UPDATES):
        lr = model.update_lr / (2 if halved and update > 1 else 1)
        weights = model.adapt(batch.inputa, batch.labela, steps=min(update, 1), lr=lr, weights=weights)
        found.append(model.task_loss(batch.inputb, batch.labelb, weights))
    return np.where(np.isfinite(found), found, np.inf)


def row(name: str, runs: list[np.ndarray]) -> str:
    """A line of the table; runs: for each seed, [1 + UPDATES, tasks]."""
    values = np.array(runs)[:, list(SHOWN)]                             # [seeds, shown, tasks]
    means, count = values.mean(-1), len(values)
    with np.errstate(invalid='ignore'):                                 # inf - inf, of seeds in which a task diverged
        seeds = scipy.stats.t.ppf(.975, count - 1) * means.std(0, ddof=1) / count ** .5 if count > 1 else np.full(len(SHOWN), np.nan)
    cells = [f'{mean:.2f}' + (f' ± {half:.2f}' if np.isfinite(half) else '') if mean < DIVERGED else 'diverges'
             for mean, half in zip(means.mean(0), seeds)]
    medians = ' / '.join(f'{value:.2f}' for value in np.median(values, -1).mean(0))
    apart = 100 * (values[:, -1] > DIVERGED).mean()
    return f'| {name} | {" | ".join(cells)} | {medians} | {apart:.2f} % |'


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('--shots', type=int, default=5)
    parser.add_argument('--tasks', type=int, default=6000)
    options = parser.parse_args(arguments)
    try:
        models = [MAML.load(run) for run in options.runs]
        settings = {(model.settings['datasource'], model.settings.get('baseline') or 'None', model.update_lr) for model in models}
        if len(settings) > 1 or next(iter(settings))[:2] != ('sinusoid', 'None'):
            raise ValueError('the runs must all be of the sinusoid, without the oracle, and with the same --update_lr')
        print(f'| step size | {" | ".join(f"after {i}" for i in SHOWN)} | medians | tasks above {DIVERGED:.0f} after {UPDATES} |')
        print('|---' * (len(SHOWN) + 3) + '|')
        for halved in (False, True):
            name = f'{models[0].update_lr:g}' + (f', then {models[0].update_lr / 2:g}' if halved else '')
            print(row(name, [errors(model, options.shots, options.tasks, halved) for model in models]))
    except ValueError as error:
        sys.exit(f'sinusoid_step_sizes.py: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
