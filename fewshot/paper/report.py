"""The results of the runs of the papers' cells, as one Markdown file with figures."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from fewshot.paper.cells import CELLS, OTHER_CELLS, SINUSOIDS, Cell
from fewshot.paper.figures import FIGURES, Runs
from fewshot.paper.runs import DIVERGED, Run, Table, pooled, read_runs
from fewshot.runs.results import write_whole

# The papers whose figures stand in the second table.
SOURCES = (
    'MAML on CIFAR-FS: [Bertinetto et al. 2019](https://arxiv.org/abs/1805.08136), the R2D2 paper; '
    "[Devos et al. 2019](https://openreview.net/forum?id=BJx0N2I6IN), the authors' program under "
    "TensorFlow 1.8, with [miniImagenet's settings](https://github.com/ArnoutDevos/maml-cifar-fs). "
    'ANIL: [Raghu et al. 2020](https://arxiv.org/abs/1909.09157), whose MAML has 93.7 ± 0.7. '
    'MAML++: [Antoniou et al. 2019](https://arxiv.org/abs/1810.09502), mean and standard deviation '
    'of three seeds; [the same program, run by another]'
    '(https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch/issues/20), likewise.'
)


def row(*values) -> str:
    """Returns a line of a Markdown table."""
    return f'| {" | ".join(map(str, values))} |'


def each_once(values: Iterable[str], separator: str) -> str:
    return separator.join(dict.fromkeys(values))


# Accuracies ---------------------------------------------------------------------------------------


def percent(table: Table | None, update: int) -> str:
    update = min(update, len(table.means) - 1) if table else 0
    if not table or not math.isfinite(table.means[update]):
        return '–'
    return f'{100 * table.means[update]:.2f} ± {100 * table.interval[update]:.2f}'


def published(cell: Cell) -> str:
    """Returns the paper's figure, or the figures of others, with their names."""
    return '; '.join(f'{figure} ({whose})' for figure, whose in cell.published) or cell.paper


def accuracy_row(cell: Cell, run: Run) -> str:
    shots = cell.settings['update_batch_size']
    last, best = (run.tables.get((shots, kind)) for kind in ('last', 'best'))
    return row(
        cell.title + run.variant,
        published(cell),
        percent(last, cell.updates),
        percent(best, cell.updates),
        f'{run.evaluated(shots):,}',
        run.seed,
        f'{run.hours:.1f} h' if run.hours >= 1 else f'{60 * run.hours:.0f} min',
        run.machine or '–',
    )


def accuracy_rows(cells: list[Cell], runs: Runs) -> Iterator[str]:
    for cell in cells:
        if not runs[cell.name]:
            yield f'| {cell.title} | {published(cell)} | not run | | | | | |'
        yield from (accuracy_row(cell, run) for run in runs[cell.name])


def more_rows(cell: Cell, runs: list[Run]) -> Iterator[str]:
    """Yields the rows of runs that were also evaluated on more tasks."""
    shots = cell.settings['update_batch_size']
    for run in runs:
        last, best = (run.more_tables.get((shots, kind)) for kind in ('last', 'best'))
        tasks = each_once((f'{table.tasks:,}' for table in (last, best) if table), ', ')
        if tasks:
            shown = (percent(table, cell.updates) for table in (last, best))
            yield row(cell.title + run.variant, published(cell), *shown, tasks, run.seed)


def on_more_tasks(runs: Runs) -> list[str]:
    """Returns a second table, whose intervals say more; empty if there are no such evaluations."""
    cells = CELLS + OTHER_CELLS
    rows = [line for cell in cells for line in more_rows(cell, runs.get(cell.name, []))]
    if not rows:
        return []
    head = '| | published | last | best of validation | test tasks | seed |'
    return ['', '## Accuracy on more test tasks, %', '', head, '|---|---|---|---|---|---|', *rows]


def accuracies(runs: Runs) -> list[str]:
    explanation = (
        'After the number of updates at which the paper evaluates (Omniglot 5-way 3, 20-way 5, '
        'miniImagenet and CIFAR-FS 10); ± is the 95 % interval over tasks of one run. The last '
        'checkpoint, and the one that was best on validation tasks. Training times are those that '
        'the runs themselves recorded; – where a machine was not.'
    )
    columns = 'last | best of validation | iterations | seed | training | machine |'
    rule = '|---|---|---|---|---|---|---|---|'
    return [
        '## Accuracy on 600 test tasks, %',
        '',
        explanation,
        '',
        f'| | paper | {columns}',
        rule,
        *accuracy_rows(CELLS, runs),
        '',
        '### Tables of other papers',
        '',
        SOURCES,
        '',
        f'| | published | {columns}',
        rule,
        *accuracy_rows(OTHER_CELLS, runs),
    ]


# Sinusoids ----------------------------------------------------------------------------------------


def error(table: Table, update: int) -> str:
    if table.means[update] < DIVERGED:
        return f'{table.means[update]:.3g} ± {table.interval[update]:.2g}'
    return 'diverged'


def errors_shown(cell: Cell, table: Table) -> list[str]:
    """Lists errors before and after 1, 5, 10 updates, then medians; the oracle needs no update."""
    if cell.name == 'sinusoid_oracle':
        return [error(table, 0), '–', '–', '–', '–']
    size = len(table.means)
    after = [error(table, i) if i < size else '–' for i in (1, 5, 10)]
    medians = [f'{table.medians[i]:.3g}' for i in (1, 5, 10) if i < size]
    return [error(table, 0), *after, ' / '.join(medians)]


def error_row(cell: Cell, variant: str, shots: int, runs: list[Run]) -> str:
    """Returns the row of runs that differ in their seeds alone."""
    table = pooled([run.tables[shots, 'last'] for run in runs])
    return row(
        cell.title + variant,
        shots,
        cell.paper if shots == 5 else '',
        *errors_shown(cell, table),
        each_once((f'{run.evaluated(shots):,}' for run in runs), ', '),
        each_once((str(run.seed) for run in runs), ', '),
        each_once((f'{60 * run.hours:.1f}' for run in runs if run.hours), ' / ') or '–',
        each_once((run.machine for run in runs if run.machine), '; ') or '–',
    )


def error_rows(cell: Cell, runs: list[Run]) -> list[str]:
    """Returns a row for each K, and for each of the settings that some seeds were trained with."""
    if not runs:
        return [f'| {cell.title} | | {cell.paper} | not run | | | | | | | | |']
    groups = {}  # {(settings, K): runs}
    for run in runs:
        for shots in (shots for shots, kind in run.tables if kind == 'last'):
            groups.setdefault((run.variant, shots), []).append(run)
    return [error_row(cell, *group, of) for group, of in sorted(groups.items())]


def errors(runs: Runs) -> list[str]:
    explanation = (
        'K = 10 in training, α = 0.01 where nothing else is said. Before any update on the '
        'support set, then on the query set; ± is the 95 % interval, over seeds where there are '
        "several (Student's t), else over tasks. A few tasks that diverge may rule a mean; the "
        "median over tasks (mean of the seeds' medians) tells of the others."
    )
    return [
        '## Sinusoid: mean squared error on 600 tasks',
        '',
        explanation,
        '',
        '| | K | paper, 1 / 5 / 10 updates | before | 1 | 5 | 10 | medians, 1 / 5 / 10 '
        '| iterations | seeds | training, minutes | machine |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
        *(line for cell in SINUSOIDS for line in error_rows(cell, runs[cell.name])),
    ]


# The whole report ---------------------------------------------------------------------------------


def remarks_on(cell: Cell, run: Run) -> Iterator[str]:
    """Yields the remarks on a run that a reader of the tables must know."""
    if run.deviations:
        wanted = (f'--{name}={value}' for name, (_, value) in run.deviations.items())
        yield f'the cell has {", ".join(wanted)}.'
    if cell not in SINUSOIDS and any(table.split == 'val' for table in run.tables.values()):
        yield 'evaluated on the validation classes.'
    evaluated = {run.evaluated(shots) for shots, kind in run.tables if kind == 'last'}
    if evaluated - {run.iterations}:
        yield f'trained on to iteration {run.iterations:,}, which has not been evaluated.'


def remarks(logs: Path, runs: Runs) -> list[str]:
    """Lists the remarks on runs, and cells' notes: a paragraph each."""
    lines = []
    for cell in CELLS + OTHER_CELLS + SINUSOIDS:
        for run in runs[cell.name]:
            for remark in remarks_on(cell, run):
                lines += [f'{cell.title}{run.variant}, seed {run.seed}: {remark}', '']
        lines += note(logs / cell.name, f'{cell.title}: ')
    return lines


def note(folder: Path, title: str = '') -> list[str]:
    """Returns the text of FOLDER/note.txt, as a paragraph."""
    path = folder / 'note.txt'
    if not path.is_file():
        return []
    return [title + path.read_text(encoding='utf-8', errors='replace').strip(), '']


def report(logs: Path, output: Path) -> Path:
    """Writes OUTPUT/report.md and its figures. Returns the path of the former."""
    runs = {}
    for cell in CELLS + OTHER_CELLS + SINUSOIDS:
        found = read_runs(logs, cell)
        runs[cell.name] = sorted(found, key=lambda run: (len(run.deviations), run.seed))
    output.mkdir(parents=True, exist_ok=True)
    lines = ['# Results', '', 'Made by `scripts/paper/report.py`.', '', *note(logs)]
    lines += [*accuracies(runs), *on_more_tasks(runs), '', *errors(runs), '', *remarks(logs, runs)]
    for name, draw in FIGURES.items():
        if caption := draw(output / f'{name}.png', runs):
            lines += [f'![{name}]({name}.png)', '', f'*{caption}*', '']
    write_whole(output / 'report.md', '\n'.join(lines).encode())
    return output / 'report.md'
