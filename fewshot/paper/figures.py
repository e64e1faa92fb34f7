"""The figures of scripts/paper/report.py.

Each function figure_... draws one and returns its caption, or None if there is nothing to draw.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')  # pictures in files, on machines without a display too
import matplotlib.pyplot as plt

from fewshot.paper.cells import CELLS, OTHER_CELLS, SINUSOIDS, Cell
from fewshot.paper.runs import DIVERGED, Run, Table, pooled
from fewshot.paper.sinusoid_fits import CURVES, draw_fit, fits
from fewshot.runs.summaries import read_scalars
from fewshot.use.learner import Learner

Runs = dict[str, list[Run]]  # by cell
STYLES = ['-', '--', ':', '-.']  # of a cell's seeds
MEANS = dict(marker='o', markersize=3, capsize=2)  # how means with their intervals are drawn
STAR = dict(marker='*', markersize=9, markeredgecolor='black', markeredgewidth=0.6)
PAPER = dict(linestyle='none', zorder=3, **STAR)  # how the paper's figures are drawn
SIZED = dict(layout='constrained', squeeze=False)  # of all figures' panels
BELOW = dict(fontsize='x-small', loc='upper center', frameon=False)  # a panel's legend under it
AT_FOOT = dict(loc='outside lower center', fontsize='small', frameon=False)  # a figure's legend


def grouped(runs: Runs) -> dict[str, list[tuple[Cell, list[Run]]]]:
    """Returns {group: the cells in it that were run}; a group is a panel, or a column of them."""
    found = {}
    for cell in CELLS + OTHER_CELLS:
        if runs[cell.name]:
            found.setdefault(cell.group, []).append((cell, runs[cell.name]))
    return found


def label(cell: Cell, of: list[Run], run: Run) -> str:
    several = len({other.seed for other in of}) > 1
    return cell.kind + run.variant + (f', seed {run.seed}' if several else '')


def save(figure, path: Path):
    figure.savefig(path, dpi=200)
    plt.close(figure)


# Accuracies ---------------------------------------------------------------------------------------


def figure_updates(path: Path, runs: Runs) -> str | None:
    groups = grouped(runs)
    if not groups:
        return None
    size = (3 * len(groups) + 0.6, 5.4)
    figure, panels = plt.subplots(2, len(groups), figsize=size, sharex='col', **SIZED)
    for column, (group, cells) in zip(panels.T, groups.items()):
        for i, (cell, of) in enumerate(cells):
            draw_updates(column, cell, of, f'C{i}', 0.15 * i)
        column[0].set_title(group, fontsize='medium')
        column[0].set_ylim(0, 103)
        column[1].set_xlabel('inner updates')
        if column[1].get_legend_handles_labels()[0]:
            column[1].legend(bbox_to_anchor=(0.5, -0.2), **BELOW)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_xticks(range(0, 11, 2))
    for axes in panels[:, 0]:
        axes.set_ylabel('accuracy [%]')
    save(figure, path)
    return (
        'Accuracy over inner updates, mean and 95 % interval over 600 test tasks, above with the '
        'accuracy before the first update (of the support set, by chance), below without it. '
        "Stars: the paper's figures, after the number of updates for which it gives them. The "
        'checkpoints are those of the best validation, or else the last.'
    )


def draw_updates(column: np.ndarray, cell: Cell, of: list[Run], color: str, shift: float):
    """Draws a cell's curves in a column's upper and lower panel.

    shift: moves them to the right, so that intervals stand side by side.
    """
    shots = cell.settings['update_batch_size']  # a run may have been evaluated with other K too
    for style, run in zip(STYLES * len(of), of):
        table = run.tables.get((shots, 'best')) or run.tables.get((shots, 'last'))
        if not table:
            continue
        means, halves = 100 * table.means, 100 * table.interval
        x = np.arange(len(means)) + shift
        look = dict(color=color, linestyle=style, label=label(cell, of, run), **MEANS)
        for axes, first in zip(column, (0, 1)):
            axes.errorbar(x[first:], means[first:], yerr=halves[first:], **look)
    value, half = cell.numbers
    for axes in column:
        axes.errorbar(cell.updates + shift, value, yerr=half, color=color, **PAPER)


def figure_learning(path: Path, runs: Runs) -> str | None:
    groups = grouped(runs)
    if not groups:
        return None
    size = (3.2 * len(groups) + 0.4, 3.8)
    figure, panels = plt.subplots(1, len(groups), figsize=size, **SIZED)
    for axes, (group, cells) in zip(panels[0], groups.items()):
        for i, (cell, of) in enumerate(cells):
            for style, run in zip(STYLES * len(of), of):
                draw_learning(axes, run, label(cell, of, run), f'C{i}', style)
            axes.axhline(cell.numbers[0], color=f'C{i}', linestyle=(0, (1, 3)), linewidth=1)
        axes.set_title(group, fontsize='medium')
        axes.set(xlabel='iterations', xlim=(0, None), ylim=(None, min(axes.get_ylim()[1], 100.5)))
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.xaxis.set_major_formatter('{x:,.0f}')
        axes.grid(alpha=0.3)
        axes.legend(bbox_to_anchor=(0.5, -0.16), **BELOW)
    panels[0, 0].set_ylabel('accuracy [%]')
    save(figure, path)
    return (
        'Accuracy during training, after as many updates as in training: on 100 validation tasks '
        '(lines), on single training meta-batches (dots). Dotted lines: '
        'what the paper reports of test tasks.'
    )


def draw_learning(axes, run: Run, name: str, color: str, style: str):
    summaries = read_scalars(run.folder)
    tag = f'Post-update_accuracy__step_{run.flags["num_updates"]}'
    training, validation = (summaries.get(f'{kind}_{tag}', {}) for kind in ('metatrain', 'metaval'))
    shown = {step: value for step, value in training.items() if step > 0 and step % 500 == 0}
    dots = dict(s=5, color=color, alpha=0.3, linewidths=0)
    axes.scatter([*shown], 100 * np.array([*shown.values()]), **dots)
    look = dict(color=color, linestyle=style, linewidth=1.2, label=name)
    axes.plot([*validation], 100 * np.array([*validation.values()]), **look)


# Sinusoids ----------------------------------------------------------------------------------------


def figure_fits(path: Path, runs: Runs) -> str | None:
    shown = [(cell, runs[cell.name][0]) for cell in SINUSOIDS if runs[cell.name]]
    if not shown:
        return None
    size = (7.5, 2.2 * len(shown) + 0.4)
    figure, panels = plt.subplots(len(shown), 2, figsize=size, sharex=True, sharey='col', **SIZED)
    for row, (cell, run) in zip(panels, shown):
        is_oracle = run.flags['baseline'] == 'oracle'
        model, shots = Learner.load(run.folder).model, run.flags['update_batch_size']
        for axes, fit in zip(row, fits(model, shots, is_oracle)):
            draw_fit(axes, fit, [0] if cell.name == 'sinusoid_oracle' else CURVES)
            axes.set_title(cell.title + run.variant)
            axes.grid(alpha=0.3)
        row[0].set_ylabel('y')
    for axes in panels[-1]:
        axes.set_xlabel('x')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=5, **AT_FOOT)
    save(figure, path)
    return (
        'Fits of two new sinusoids from ten support points, before and after 1 and 10 updates '
        '(the oracle: without any).'
    )


def figure_errors(path: Path, runs: Runs) -> str | None:
    tables = {cell.name: last_tables(runs[cell.name]) for cell in SINUSOIDS}
    all_shots = sorted({shots for of in tables.values() for shots in of})
    if not all_shots:
        return None
    size = (3.4 * len(all_shots) + 0.6, 4.2)
    figure, panels = plt.subplots(1, len(all_shots), figsize=size, sharey=True, **SIZED)
    curves = {}  # {label: line}, each once
    for axes, shots in zip(panels[0], all_shots):
        for i, cell in enumerate(SINUSOIDS):
            draw_errors(axes, cell, tables[cell.name], shots, f'C{i}')
        axes.set(title=f'K = {shots}', xlabel='inner updates', yscale='log', ylim=(2e-3, 10))
        axes.set_xticks(range(2, 11, 2))
        axes.grid(alpha=0.3)
        lines, names = axes.get_legend_handles_labels()
        curves |= zip(names, lines)
    panels[0, 0].set_ylabel('mean squared error (query set)')
    titles = [cell.title for cell in SINUSOIDS]
    names = sorted(curves, key=lambda name: titles.index(name.removesuffix(', median')))
    figure.legend([curves[name] for name in names], names, ncols=4, **AT_FOOT)
    save(figure, path)
    return (
        'Error over inner updates on 600 tasks: mean with 95 % interval, over seeds where there '
        'are several, and median over tasks (dashed). A curve of means that leaves the panel is '
        'of a run in which single tasks diverge. The oracle needs no update, and its error does '
        "not depend on K. Stars: the paper's figures for K = 5, after 1, 5 and 10 updates."
    )


def last_tables(runs: list[Run]) -> dict[int, Table]:
    """Returns {K: the last checkpoints' table, over seeds}, from runs that are as the cell says."""
    found = {}
    for run in runs:
        for (shots, kind), table in run.tables.items():
            if kind == 'last' and not run.deviations:
                found.setdefault(shots, []).append(table)
    return {shots: pooled(found[shots]) for shots in sorted(found)}


def draw_errors(axes, cell: Cell, of: dict[int, Table], shots: int, color: str):
    """Draws a cell's mean and median over updates for one K; of: {K: its table}."""
    if cell.name == 'sinusoid_oracle':
        for table in [*of.values()][:1]:
            axes.axhline(table.means[0], color=color, linestyle=':', label=cell.title)
        return
    if shots not in of:
        return
    table, x = of[shots], np.arange(1, len(of[shots].means))
    means = np.where(table.means < DIVERGED, table.means, np.nan)
    lower = np.minimum(table.interval, 0.999 * means)  # the axis is logarithmic
    halves = [lower[1:], table.interval[1:]]
    axes.errorbar(x, means[1:], yerr=halves, color=color, label=cell.title, **MEANS)
    look = dict(color=color, linestyle='--', linewidth=1, label=f'{cell.title}, median')
    axes.plot(x, table.medians[1:], **look)
    if shots == 5 and cell.numbers:
        axes.plot([1, 5, 10], cell.numbers, color='white', **PAPER)


FIGURES = {
    'updates': figure_updates,
    'learning': figure_learning,
    'fits': figure_fits,
    'errors': figure_errors,
}
