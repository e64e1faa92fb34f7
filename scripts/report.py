#!/usr/bin/env python
"""Writes what the runs of the paper's cells came to, as one Markdown file with figures.

    python scripts/report.py [LOGS] [--output=LOGS/report]

LOGS (default: logs) is where scripts/omniglot_5way_1shot.sh and its like keep their runs, LOGS/CELL/seedN/RUN. Cells that were
not run say so; a run folder that is incomplete is named and left out. What LOGS/CELL/note.txt says, if it is there, is quoted.
"""
import argparse
import os
import platform
import pickle
import re
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # no lines about CPU features and missing GPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use('Agg')  # pictures in files, on machines without a display too
import matplotlib.pyplot as plt  # noqa: E402
import tensorflow as tf  # noqa: E402

from main import confidence  # noqa: E402
from plot_sinusoid import CURVES, fits  # noqa: E402
from utils import DIVERGED, DamagedCheckpoint, checkpoints, event_files, read_evaluation, read_events, read_run_state, read_scalars  # noqa: E402


class Cell(NamedTuple):
    """One entry of the paper's tables."""
    name: str       # the script's and the folder's
    title: str
    paper: str      # what it says
    updates: int    # the paper's number of updates in evaluation


OMNIGLOT, MINIIMAGENET = 'Omniglot, {}-way {}-shot', 'miniImagenet, 5-way {}-shot'
CELLS = [
    Cell('omniglot_5way_1shot_no_conv', OMNIGLOT.format(5, 1) + ', no convolutions', '89.7 ± 1.1', 3),
    Cell('omniglot_5way_5shot_no_conv', OMNIGLOT.format(5, 5) + ', no convolutions', '97.5 ± 0.6', 3),
    Cell('omniglot_5way_1shot', OMNIGLOT.format(5, 1), '98.7 ± 0.4', 3),
    Cell('omniglot_5way_5shot', OMNIGLOT.format(5, 5), '99.9 ± 0.1', 3),
    Cell('omniglot_20way_1shot', OMNIGLOT.format(20, 1), '95.8 ± 0.3', 5),
    Cell('omniglot_20way_5shot', OMNIGLOT.format(20, 5), '98.9 ± 0.2', 5),
    Cell('miniimagenet_5way_1shot_first_order', MINIIMAGENET.format(1) + ', first order', '48.07 ± 1.75', 10),
    Cell('miniimagenet_5way_1shot', MINIIMAGENET.format(1), '48.70 ± 1.84', 10),
    Cell('miniimagenet_5way_5shot_first_order', MINIIMAGENET.format(5) + ', first order', '63.15 ± 0.91', 10),
    Cell('miniimagenet_5way_5shot', MINIIMAGENET.format(5), '63.11 ± 0.92', 10)]
SINUSOIDS = [Cell('sinusoid', 'MAML', '.67 / .38 / .35', 10), Cell('sinusoid_pretrain', 'pre-trained on all tasks', '2.41 / 2.23 / 2.19', 10),
             Cell('sinusoid_oracle', 'oracle', '', 0),
             Cell('sinusoid_published_command', 'MAML, α = 0.001', '.67 / .38 / .35', 10)]


class Table(NamedTuple):
    """The results of one evaluation of 600 tasks, over 0, 1, ... updates."""
    means: np.ndarray
    interval: np.ndarray   # half of the 95 % interval
    medians: np.ndarray    # over tasks: a few that diverge say nothing of the others


class Run(NamedTuple):
    folder: Path
    seed: int
    iterations: int
    hours: float                 # of training, by the time stamps of its summaries
    tables: dict[tuple, Table]   # by shots and by 'last' or 'best'


def read_table(path: Path) -> Table:
    """Raises ValueError if a file is not what main.py writes."""
    try:
        means, _, interval = read_evaluation(path)
        values = pickle.loads(path.with_suffix('.pkl').read_bytes())['mses']   # [600, 1 + updates]
        assert values.shape[1:] == means.shape
    except Exception:   # pickle has no error of its own
        raise ValueError(f'{path} and {path.stem}.pkl are not the tables that main.py writes') from None
    return Table(means, interval, np.median(np.where(np.isnan(values), np.inf, values), axis=0))


def read_run(folder: Path) -> Run:
    """Raises ValueError, with what is missing or damaged, for a run that cannot be reported."""
    found = checkpoints(folder)
    if not found:
        raise ValueError(f'{folder} holds no checkpoint')
    try:
        state = read_run_state(found[max(found)])
    except DamagedCheckpoint as error:
        raise ValueError(str(error)) from None
    tables = {}
    for path in sorted(folder.glob('test_ubs*_stepsize*.csv')):
        if match := re.fullmatch(r'test_ubs(\d+)_stepsize[^_]+(_best)?\.csv', path.name):   # others are of --test_query and the like
            tables[int(match[1]), 'best' if match[2] else 'last'] = read_table(path)
    if not tables:
        raise ValueError(f'{folder} has not been evaluated')
    seconds = 0.
    for path in event_files(folder):
        times = [tf.compat.v1.Event.FromString(record).wall_time for record in read_events(path)]
        seconds += max(times) - min(times) if times else 0
    return Run(folder, state.get('flags', {}).get('seed', 0), max(found) + 1, seconds / 3600, tables)


def read_runs(logs: Path, cell: Cell) -> list[Run]:
    """The runs of a cell, one for each seed; says which folders are left out, and why."""
    runs = []
    for folder in sorted(path for path in (logs / cell.name).glob('seed*/cls_*') if path.is_dir()):
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            print(f'report.py: left out: {error}.', file=sys.stderr)
    return runs


def pooled(tables: list[Table]) -> Table:
    """Of several seeds: the mean, and the 95 % interval of it by Student's t over seeds; of one, its own over tasks."""
    if len(tables) == 1:
        return tables[0]
    size = min(len(table.means) for table in tables)
    means = np.array([table.means[:size] for table in tables])
    return Table(means.mean(0), confidence(means), np.mean([table.medians[:size] for table in tables], axis=0))


# Text -----------------------------------------------------------------------------------------------------------------

def percent(table: Table, update: int) -> str:
    update = min(update, len(table.means) - 1)
    return f'{100 * table.means[update]:.2f} ± {100 * table.interval[update]:.2f}'


def accuracy_rows(cell: Cell, runs: list[Run]) -> list[str]:
    if not runs:
        return [f'| {cell.title} | {cell.paper} | not run | | | | |']
    rows = []
    shots = int(re.search(r'(\d)shot', cell.name)[1])
    for run in runs:
        shown = {kind: percent(run.tables[shots, kind], cell.updates) if (shots, kind) in run.tables else '–' for kind in ('last', 'best')}
        rows.append(f'| {cell.title} | {cell.paper} | {shown["last"]} | {shown["best"]} | {run.iterations:,} | {run.seed} | {run.hours:.1f} h |')
    return rows


def accuracies(logs: Path, runs: dict[str, list[Run]]) -> list[str]:
    lines = ['## Accuracy on 600 test tasks, %', '',
             'After the number of updates at which the paper evaluates (Omniglot 5-way 3, 20-way 5, miniImagenet 10); ± is the 95 % interval over '
             'tasks of one run. The last checkpoint, and the one that was best on validation tasks.', '',
             '| | paper | last | best of validation | iterations | seed | training |', '|---|---|---|---|---|---|---|']
    lines += [row for cell in CELLS for row in accuracy_rows(cell, runs[cell.name])]
    notes = [f'{cell.title}: {path.read_text().strip()}' for cell in CELLS if (path := logs / cell.name / 'note.txt').is_file()]
    return lines + ['', *notes] if notes else lines


def errors(runs: dict[str, list[Run]]) -> list[str]:
    lines = ['## Sinusoid: mean squared error on 600 tasks', '',
             'K = 10 in training, α = 0.01 where nothing else is said. Before any update on the support set, then on the query set; ± is the 95 % '
             'interval, over seeds where there are several (Student\'s t), else over tasks. A few tasks that diverge may rule a mean; the median '
             'over tasks (mean of the seeds\' medians) tells of the others.', '',
             '| | K | paper, 1 / 5 / 10 updates | before | 1 | 5 | 10 | medians, 1 / 5 / 10 | iterations | seeds |',
             '|---|---|---|---|---|---|---|---|---|---|']
    for cell in SINUSOIDS:
        if not runs[cell.name]:
            lines.append(f'| {cell.title} | | {cell.paper} | not run | | | | | | |')
        for shots in sorted({shots for run in runs[cell.name] for shots, _ in run.tables}):
            of = [run for run in runs[cell.name] if (shots, 'last') in run.tables]
            table = pooled([run.tables[shots, 'last'] for run in of])
            number = lambda i: f'{table.means[i]:.3g} ± {table.interval[i]:.2g}' if table.means[i] < DIVERGED else 'diverged'
            shown = [number(0), *('–' if cell.name == 'sinusoid_oracle' else number(i) for i in (1, 5, 10))]
            medians = '–' if cell.name == 'sinusoid_oracle' else ' / '.join(f'{table.medians[i]:.3g}' for i in (1, 5, 10) if i < len(table.medians))
            iterations = ', '.join(sorted({f'{run.iterations:,}' for run in of}))
            seeds = ', '.join(str(run.seed) for run in of)
            lines.append(f'| {cell.title} | {shots} | {cell.paper if shots == 5 else ""} | {" | ".join(shown)} | {medians} | {iterations} | {seeds} |')
    return lines


# Figures: each returns its caption, or None if there is nothing to draw --------------------------------------------------

def figure_updates(path: Path, runs: dict[str, list[Run]]) -> str | None:
    shown = [(cell, run) for cell in CELLS for run in runs[cell.name]]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for cell, run in shown:
        key = next(iter(sorted(run.tables, key=lambda key: (key[1] != 'best', key[0]))))
        table = run.tables[key]
        axes.errorbar(range(len(table.means)), 100 * table.means, yerr=100 * table.interval, marker='o', markersize=3, capsize=2,
                      label=f'{cell.title} (seed {run.seed})')
    axes.set(xlabel='inner updates (0: support set before the first, then query set)', ylabel='accuracy [%]', ylim=(0, 101))
    axes.grid(alpha=.3)
    axes.legend(fontsize='x-small')
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return 'Accuracy over inner updates, mean and 95 % interval over 600 tasks.'


def figure_learning(path: Path, runs: dict[str, list[Run]]) -> str | None:
    shown = [(cell, run) for cell in CELLS for run in runs[cell.name]]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for i, (cell, run) in enumerate(shown):
        updates = re.search(r'numstep(\d+)', run.folder.name)[1]
        summaries = read_scalars(run.folder)
        training, validation = (np.array([*summaries.get(f'{kind}_Post-update_accuracy__step_{updates}', {}).items()]).reshape(-1, 2)
                                for kind in ('metatrain', 'metaval'))   # [n, 2]: iteration, accuracy
        if len(training) >= 10:   # single meta-batches: the mean of ten
            blocks = training[:len(training) // 10 * 10].reshape(-1, 10, 2).mean(1)
            axes.plot(blocks[:, 0], 100 * blocks[:, 1], color=f'C{i % 10}', alpha=.4, linewidth=1)
        axes.plot(validation[:, 0], 100 * validation[:, 1], color=f'C{i % 10}', label=f'{cell.title} (seed {run.seed})')
    axes.set(xlabel='iteration', ylabel='accuracy after the updates of training [%]', xlim=(0, None))
    axes.grid(alpha=.3)
    axes.legend(fontsize='x-small')
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return 'Accuracy during training: on validation tasks, and, paler, on training tasks (means of ten meta-batches).'


def figure_fits(path: Path, runs: dict[str, list[Run]]) -> str | None:
    shown = [(cell, runs[cell.name][0]) for cell in SINUSOIDS if runs[cell.name]]
    if not shown:
        return None
    figure, axes = plt.subplots(len(shown), 2, figsize=(8, 2.6 * len(shown)), layout='constrained', squeeze=False, sharex=True)
    for row, (cell, run) in zip(axes, shown):
        for panel, fit in zip(row, fits(run.folder)):
            panel.plot(fit.x, fit.truth, color='tab:red', label='truth')
            for updates, prediction in fit.predictions.items():
                if updates == 0 or cell.name != 'sinusoid_oracle':
                    panel.plot(fit.x, prediction, **CURVES[updates])
            panel.plot(*fit.support.T, '^', color='tab:purple', label='support', zorder=3)
            panel.set(title=cell.title, xlabel='x' if cell == shown[-1][0] else '', ylabel='y')
    axes[0, 0].legend(fontsize='x-small')
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return 'Fits of two new sinusoids from ten support points, before and after 1 and 10 updates (the oracle: without any).'


def figure_errors(path: Path, runs: dict[str, list[Run]]) -> str | None:
    shots_of = {cell: sorted({shots for run in runs[cell.name] for shots, _ in run.tables}) for cell in SINUSOIDS}
    all_shots = sorted({shots for shots in sum(shots_of.values(), [])})
    if not all_shots:
        return None
    figure, panels = plt.subplots(1, len(all_shots), figsize=(3.4 * len(all_shots) + 1, 3.4), layout='constrained', squeeze=False, sharey=True)
    for panel, shots in zip(panels[0], all_shots):
        for i, cell in enumerate(SINUSOIDS):
            tables = [run.tables[shots, 'last'] for run in runs[cell.name] if (shots, 'last') in run.tables]
            if not tables:
                continue
            table = pooled(tables)
            if cell.name == 'sinusoid_oracle':
                panel.axhline(table.means[0], color=f'C{i}', linestyle=':', label=cell.title)
            else:
                x = np.arange(1, len(table.means))
                shown = np.where(table.means < DIVERGED, table.means, np.nan)[1:]
                panel.errorbar(x, shown, yerr=table.interval[1:], color=f'C{i}', marker='o', markersize=3, capsize=2, label=cell.title)
                panel.plot(x, table.medians[1:], color=f'C{i}', linestyle='--', linewidth=1, label=f'{cell.title}, median')
        panel.set(title=f'K = {shots}', xlabel='inner updates', ylim=(0, 4))   # untrained, it is 4
        panel.grid(alpha=.3)
    panels[0, 0].set_ylabel('mean squared error (query set)')
    curves = {label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(curves.values(), curves.keys(), loc='outside lower center', ncols=4, fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return ('Error over inner updates: mean with 95 % interval, over seeds where there are several, and median over tasks (dashed). A curve of '
            'means ends where they exceed 100, because single tasks diverge.')


def report(logs: Path, output: Path) -> str:
    """Writes OUTPUT/report.md and its figures. Returns the path of the former."""
    runs = {cell.name: read_runs(logs, cell) for cell in CELLS + SINUSOIDS}
    output.mkdir(parents=True, exist_ok=True)
    lines = ['# Results', '', f'Made by `scripts/report.py` on a machine with {os.cpu_count()} cores ({platform.machine()}, Python '
             f'{platform.python_version()}, TensorFlow {tf.__version__}). Training times are those that the runs themselves recorded.', '']
    lines += [*accuracies(logs, runs), '', *errors(runs), '']
    for name, draw in [('updates', figure_updates), ('learning', figure_learning), ('fits', figure_fits), ('errors', figure_errors)]:
        if caption := draw(output / f'{name}.png', runs):
            lines += [f'![{caption}]({name}.png)', '', f'*{caption}*', '']
    (output / 'report.md').write_text('\n'.join(lines))
    return str(output / 'report.md')


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logs', type=Path, nargs='?', default=Path('logs'))
    parser.add_argument('--output', type=Path, help='folder of the report (default: LOGS/report)')
    values = parser.parse_args(arguments)
    try:
        if not values.logs.is_dir():
            raise FileNotFoundError(f'there is no folder {values.logs}: run a script such as scripts/sinusoid_10shot.sh first')
        print(report(values.logs, values.output or values.logs / 'report'))
    except OSError as error:
        sys.exit(f'report.py: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
