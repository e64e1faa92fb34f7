#!/usr/bin/env python
r"""Measures and draws how the time of a meta-training step grows with tasks and inner updates.

    python scripts/measure/plot_cost.py CASE.npz FOLDER [--tasks 8 16 32 64] \
        [--updates 1 2 4 6 8 10] [--steps 10]

Times scripts/measure/benchmark.py on the case with other numbers of tasks (the case's own, repeated
or cut) and of inner updates, and writes its lines to FOLDER/cost.jsonl and the picture to
FOLDER/cost.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')  # a picture in a file, on machines without a display too
import matplotlib.pyplot as plt


def variant(values: dict[str, np.ndarray], tasks: int, updates: int) -> dict[str, np.ndarray]:
    """Returns the case with so many tasks, its own again and again, and so many inner updates."""
    flags = json.loads(str(values['flags'])) | {'meta_batch_size': tasks, 'num_updates': updates}
    inputs = {name: array for name, array in values.items() if name.startswith('input/')}
    resized = {name: np.resize(x, (tasks, *x.shape[1:])) for name, x in inputs.items()}
    return values | resized | {'flags': np.array(json.dumps(flags))}


def measure(values: dict[str, np.ndarray], tasks: int, updates: int, steps: int) -> dict:
    """Runs the benchmark on a variant, in a process of its own, and returns its figures.

    Raises ValueError with its words if it fails.
    """
    benchmark = Path(__file__).with_name('benchmark.py')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'{tasks}_tasks_{updates}_updates.npz'
        np.savez(path, **variant(values, tasks, updates))
        command = [sys.executable, benchmark, path, f'--steps={steps}']
        outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise ValueError((outcome.stderr.splitlines() or ['the benchmark failed'])[-1])
    return {'tasks': tasks, 'updates': updates, **json.loads(outcome.stdout.splitlines()[-1])}


def draw_panel(panel, points: list[tuple], label: str, title: str):
    """Draws times over a number of tasks or updates, and a line through them.

    points: (number, median, fastest) each, in milliseconds.
    """
    x, median, least = np.array(sorted(points)).T
    slope, offset = np.polyfit(x, median, 1) if len(x) > 1 else (0, median[0])
    panel.plot(x, median, 'o', color='tab:blue', label='median')
    panel.plot(x, least, '.', color='tab:gray', label='fastest')
    line = dict(color='tab:blue', linewidth=1, label=f'{offset:.0f} + {slope:.3g} ms each')
    panel.plot([0, x.max()], [offset, offset + slope * x.max()], **line)
    panel.set(xlabel=label, ylabel='time of a step [ms]', title=title)
    panel.set(xlim=(0, None), ylim=(0, None))
    panel.legend(frameon=False)


def draw(path: Path, results: list[dict], tasks: int, updates: int):
    """Draws two panels: over tasks, with `updates` updates; over updates, with `tasks` tasks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)

    def points(over: str, fixed: str, value: int) -> list[tuple]:
        own = [result for result in results if result[fixed] == value]
        return [(result[over], result['median_ms'], result['min_ms']) for result in own]

    title = f'{updates} inner update' + 's' * (updates > 1)
    draw_panel(left, points('tasks', 'updates', updates), 'tasks in the meta-batch', title)
    draw_panel(right, points('updates', 'tasks', tasks), 'inner updates', f'{tasks} tasks')
    figure.savefig(path, dpi=150)


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('case', type=Path)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--tasks', type=int, nargs='+', default=[8, 16, 32, 64])
    parser.add_argument('--updates', type=int, nargs='+', default=[1, 2, 4, 6, 8, 10])
    parser.add_argument('--steps', type=int, default=10)
    a = parser.parse_args(arguments)
    try:
        with np.load(a.case) as case:
            values = dict(case)
        own = json.loads(str(values['flags']))
        tasks, updates = own.get('meta_batch_size', 25), own.get('num_updates', 1)
        a.folder.mkdir(parents=True, exist_ok=True)
        pairs = [(t, updates) for t in a.tasks]
        pairs += [(tasks, u) for u in a.updates if u != updates or tasks not in a.tasks]
        results = []
        with open(a.folder / 'cost.jsonl', 'w') as file:
            for pair in pairs:
                results.append(measure(values, *pair, a.steps))
                print(json.dumps(results[-1]), file=file, flush=True)
                median = results[-1]['median_ms']
                print(f'{pair[0]} tasks, {pair[1]} updates: {median} ms', flush=True)
        draw(a.folder / 'cost.png', results, tasks, updates)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f'plot_cost.py: {a.case}: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
