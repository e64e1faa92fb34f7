"""Runs that differ in their inner loops, as one figure and a table."""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use('Agg')  # pictures in files, on machines without a display too
import matplotlib.pyplot as plt

from fewshot.paper.runs import DIVERGED, usual_evaluation
from fewshot.runs.checkpoints import DamagedCheckpoint, checkpoints, read_run_state
from fewshot.runs.results import confidence
from fewshot.runs.summaries import read_scalars

POINTS = 30  # of a curve over training meta-batches: each is a mean
SHOWN = (1, 2, 5, 10)  # inner updates in the table
ORDER = ('maml', 'first_order', 'anil', 'boil', 'meta-sgd', 'maml++')  # others after them


class Seed(NamedTuple):
    """One run of a variant."""

    objective: str  # 'accuracy' or 'loss'
    iterations: int
    curve: np.ndarray  # [n, 2]: iteration, objective after as many updates as in training
    test: np.ndarray | None  # [1 + updates], means over test tasks
    interval: np.ndarray | None  # [1 + updates], half of that over tasks


class Variant(NamedTuple):
    name: str
    seeds: list[Seed]

    @property
    def is_accuracy(self) -> bool:
        return self.seeds[0].objective == 'accuracy'

    def test(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns means and halves of intervals, over seeds or one seed's tasks: [1 + updates]."""
        seeds = [seed for seed in self.seeds if seed.test is not None]
        if len(seeds) > 1:
            values = np.array([seed.test for seed in seeds])
            return values.mean(0), confidence(values)
        return (seeds[0].test, seeds[0].interval) if seeds else None

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns iterations that all seeds have, their means, and half intervals (one: nan)."""
        shared = set.intersection(*({*seed.curve[:, 0]} for seed in self.seeds))
        curves = [seed.curve[np.isin(seed.curve[:, 0], [*shared]), 1] for seed in self.seeds]
        values = np.array(curves)  # [seeds, n]
        halves = confidence(values) if len(values) > 1 else np.full(values.shape[1], np.nan)
        return np.array(sorted(shared)), values.mean(0), halves


def binned(values: dict[int, float], size: int) -> dict[int, float]:
    """Averages over so many iterations each: {their middle: the mean}."""
    found = {}
    for step, value in values.items():
        found.setdefault(step // size * size + size // 2, []).append(value)
    return {step: float(np.mean(of)) for step, of in found.items()}


def read_seed(run: Path) -> Seed:
    """Reads a run. Raises ValueError if a folder holds no run with flags and summaries."""
    path = [*checkpoints(run).values()]
    flags = read_run_state(path[-1]).get('flags') if path else None
    if not flags:
        raise ValueError(f'{run} has no checkpoint that tells its flags')
    summaries, iterations = read_scalars(run), max(checkpoints(run)) + 1
    step = f'__step_{flags["num_updates"]}'
    objective = 'accuracy' if f'metatrain_Post-update_accuracy{step}' in summaries else 'loss'
    tag = f'Post-update_{objective}{step}'
    values = summaries.get(f'metaval_{tag}')
    if values is None:
        values = binned(summaries.get(f'metatrain_{tag}', {}), max(iterations // POINTS, 1))
    if not values:
        raise ValueError(f'{run} has no summaries: it was trained with --log=False')
    means, interval = usual_evaluation(run) or (None, None)
    return Seed(objective, iterations, np.array(sorted(values.items())), means, interval)


def read_sets(folder: Path) -> dict[str, list[Variant]]:
    """Returns {set: its variants}; says what is unreadable. Raises ValueError without any run."""
    found = {}
    for run in sorted(folder.glob('*/*/seed*/cls_*')):
        try:
            seed = read_seed(run)
        except (ValueError, DamagedCheckpoint) as error:
            print(f'variants.py: {error}; it is left out.', file=sys.stderr)
            continue
        of_set = found.setdefault(run.parents[2].name, {})
        of_set.setdefault(run.parents[1].name, []).append(seed)
    if not found:
        raise ValueError(
            f'{folder} holds no SET/VARIANT/seedN/cls_...: give the folder that '
            'scripts/paper/variants.sh wrote'
        )
    for name, of_set in found.items():
        known = [variant for variant in ORDER if variant in of_set]
        names = known + sorted(of_set.keys() - {*ORDER})
        found[name] = [Variant(variant, of_set[variant]) for variant in names]
    return found


def diverged(variant: Variant, means: np.ndarray) -> np.ndarray:
    """Tells where a mean is ruled by tasks whose errors grow with the updates: [1 + updates]."""
    highest = np.inf if variant.is_accuracy else DIVERGED
    return ~(means < highest)


def draw_set(column, title: str, variants: list[Variant]):
    """Draws over iterations in the upper panel of a column, over inner updates in the lower one."""
    accuracy = variants[0].is_accuracy
    scale, name = (100, 'accuracy [%]') if accuracy else (1, 'squared error')
    upper, lower = column
    for i, variant in enumerate(variants):
        steps, means, halves = (scale * values for values in variant.curve())
        steps = steps / scale
        (line,) = upper.plot(steps, means, label=variant.name, color=f'C{i}')
        band = dict(color=line.get_color(), alpha=0.15, linewidth=0)
        upper.fill_between(steps, means - halves, means + halves, **band)
        if tested := variant.test():
            means, halves = (scale * values for values in tested)
            updates = 1 + np.flatnonzero(~diverged(variant, means)[1:])
            look = dict(color=f'C{i}', marker='o', markersize=3, capsize=2)
            lower.errorbar(updates + 0.06 * i, means[updates], yerr=halves[updates], **look)
    source = 'validation tasks' if accuracy else 'training meta-batches'
    upper.set(title=title, xlabel='iteration', ylabel=f'{name}, {source}')
    lower.set(xlabel='inner updates', ylabel=f'{name}, test tasks')
    for axes in column:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not accuracy:
            axes.set_yscale('log')
    upper.legend(fontsize='small', frameon=False)


def draw(path: Path, sets: dict[str, list[Variant]]):
    size = (4.6 * len(sets) + 0.4, 7.2)
    figure, panels = plt.subplots(2, len(sets), figsize=size, layout='constrained', squeeze=False)
    for column, (name, variants) in zip(panels.T, sets.items()):
        draw_set(column, name.replace('_', ' '), variants)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def cells(variant: Variant) -> list[str]:
    """Lists the objective after SHOWN updates, with its interval."""
    tested = variant.test()
    if not tested:
        return ['not evaluated'] * len(SHOWN)
    scale, digits = (100, '.1f') if variant.is_accuracy else (1, '.3f')
    means, halves = (scale * values for values in tested)
    shown = [f'{mean:{digits}} ± {half:{digits}}' for mean, half in zip(means, halves)]
    shown = np.where(diverged(variant, means), 'diverges', shown)
    return [shown[update] if update < len(shown) else '' for update in SHOWN]


def table(sets: dict[str, list[Variant]]) -> str:
    """Returns the table in Markdown."""
    rows = ['| | variant | iterations | ± over | ' + ' | '.join(f'after {u}' for u in SHOWN) + ' |']
    rows.append('|---' * (4 + len(SHOWN)) + '|')
    for name, variants in sets.items():
        for variant in variants:
            seeds = len(variant.seeds)
            counts = sorted({seed.iterations for seed in variant.seeds})
            over = f'{seeds} seeds' if seeds > 1 else 'tasks, one seed'
            told = [name.replace('_', ' '), variant.name, ' or '.join(map(str, counts)), over]
            rows.append(f'| {" | ".join([*told, *cells(variant)])} |')
    return '\n'.join(rows) + '\n'
