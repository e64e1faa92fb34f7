"""Tasks of one's own: few-shot regression on the curves of a csv file.

    python main.py --datasource=scripts/examples/curves.py:tasks --norm=None

curves.csv has sixty dose-response curves of sixteen points. They are made, not measured: y = bottom
+ (top - bottom) / (1 + (ec50 / dose) ** slope), with random parameters and an error of 0.02. A task
is one of them: five of its points are the support set, the other eleven the query set.
"""

import csv
from pathlib import Path

import numpy as np

from data_generator import Batch

SHOTS = 5
SPLITS = {'train': slice(0, 40), 'val': slice(40, 50), 'test': slice(50, 60)}


class Curves:
    """A source of tasks; x: [points]; y: [curves, points]."""

    iterations_at_once = 100  # tasks are tiny, so that starting a step takes longer than the step
    updates_shown = 5

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y = x, y

    def batch(self, split: str, iteration: int, num_tasks: int) -> Batch:
        """Draws a Batch of arrays [tasks, examples, 1]."""
        random = np.random.default_rng([list(SPLITS).index(split), iteration])
        curves = self.y[SPLITS[split]]
        chosen = curves[random.integers(len(curves), size=num_tasks)]  # [tasks, points]
        order = random.permuted(np.tile(np.arange(len(self.x)), (num_tasks, 1)), axis=1)
        inputs = self.x[order][..., np.newaxis]
        labels = np.take_along_axis(chosen, order, axis=1)[..., np.newaxis]
        support, query = np.s_[:, :SHOTS], np.s_[:, SHOTS:]
        return Batch(
            inputa=inputs[support],
            labela=labels[support],
            inputb=inputs[query],
            labelb=labels[query],
        )


def tasks() -> Curves:
    """Reads the curves of curves.csv: a column per dose, a row per curve."""
    with open(Path(__file__).with_name('curves.csv'), newline='') as file:
        (_, *doses), *rows = csv.reader(file)
    x = np.log10(np.array(doses, float))  # -2 to 2
    return Curves(x / 2, np.array([row[1:] for row in rows], float))
