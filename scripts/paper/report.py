#!/usr/bin/env python
"""Writes what the runs of the paper's cells came to, as one Markdown file with figures.

    python scripts/paper/report.py [LOGS] [--output=LOGS/report]

LOGS (default: logs) is where scripts/paper/omniglot_5way_1shot.sh and its like keep their runs, LOGS/CELL/seedN/RUN. Cells that were
not run say so; a run folder that is incomplete, damaged or another cell's is named and left out. What LOGS/note.txt and
LOGS/CELL/note.txt say, if they are there, is quoted.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # no lines about CPU features and missing GPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib.cells import CELLS, DIVERGED, SINUSOIDS, Cell, Run, Table, pooled, read_runs
from scripts.lib.report_figures import FIGURES, Runs
from utils import write_whole


def percent(table: Table, update: int) -> str:
    update = min(update, len(table.means) - 1)
    return f'{100 * table.means[update]:.2f} ± {100 * table.interval[update]:.2f}'


def accuracy_rows(cell: Cell, runs: list[Run]) -> list[str]:
    if not runs:
        return [f'| {cell.title} | {cell.paper} | not run | | | | | |']
    rows, shots = [], cell.settings['update_batch_size']
    for run in runs:
        shown = [
            percent(run.tables[shots, kind], cell.updates) if (shots, kind) in run.tables else '–'
            for kind in ('last', 'best')
        ]
        rows.append(
            f'| {cell.title}{run.variant} | {cell.paper} | {" | ".join(shown)} | {run.evaluated(shots):,} | {run.seed} | {run.hours:.1f} h | '
            f'{run.machine or "–"} |'
        )
    return rows


def accuracies(runs: Runs) -> list[str]:
    return [
        '## Accuracy on 600 test tasks, %',
        '',
        'After the number of updates at which the paper evaluates (Omniglot 5-way 3, 20-way 5, miniImagenet 10); ± is the 95 % interval over '
        'tasks of one run. The last checkpoint, and the one that was best on validation tasks. Training times are those that the runs '
        'themselves recorded; – where a machine was not.',
        '',
        '| | paper | last | best of validation | iterations | seed | training | machine |',
        '|---|---|---|---|---|---|---|---|',
        *(row for cell in CELLS for row in accuracy_rows(cell, runs[cell.name])),
    ]


def error_rows(cell: Cell, runs: list[Run]) -> list[str]:
    """A row for each K and, if some seeds were trained with other settings than the others, for each of those."""
    if not runs:
        return [f'| {cell.title} | | {cell.paper} | not run | | | | | | | | |']
    rows, oracle = [], cell.name == 'sinusoid_oracle'
    for variant, shots in sorted({(run.variant, shots) for run in runs for shots, _ in run.tables}):
        of = [run for run in runs if run.variant == variant and (shots, 'last') in run.tables]
        table = pooled([run.tables[shots, 'last'] for run in of])
        number = lambda i: (
            f'{table.means[i]:.3g} ± {table.interval[i]:.2g}'
            if table.means[i] < DIVERGED
            else 'diverged'
        )
        shown = [
            number(0),
            *('–' if oracle or i >= len(table.means) else number(i) for i in (1, 5, 10)),
        ]
        medians = (
            '–'
            if oracle
            else ' / '.join(f'{table.medians[i]:.3g}' for i in (1, 5, 10) if i < len(table.medians))
        )
        joined = lambda values, separator: separator.join(dict.fromkeys(values))  # each once
        rows.append(
            f'| {cell.title}{variant} | {shots} | {cell.paper if shots == 5 else ""} | {" | ".join(shown)} | {medians} | '
            f'{joined((f"{run.evaluated(shots):,}" for run in of), ", ")} | {joined((str(run.seed) for run in of), ", ")} | '
            f'{joined((f"{60 * run.hours:.1f}" for run in of if run.hours), " / ") or "–"} | {joined((run.machine for run in of if run.machine), "; ") or "–"} |'
        )
    return rows


def errors(runs: Runs) -> list[str]:
    return [
        '## Sinusoid: mean squared error on 600 tasks',
        '',
        'K = 10 in training, α = 0.01 where nothing else is said. Before any update on the support set, then on the query set; ± is the 95 % '
        "interval, over seeds where there are several (Student's t), else over tasks. A few tasks that diverge may rule a mean; the median "
        "over tasks (mean of the seeds' medians) tells of the others.",
        '',
        '| | K | paper, 1 / 5 / 10 updates | before | 1 | 5 | 10 | medians, 1 / 5 / 10 | iterations | seeds | training, minutes | machine |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
        *(row for cell in SINUSOIDS for row in error_rows(cell, runs[cell.name])),
    ]


def remarks(logs: Path, runs: Runs) -> list[str]:
    """Other settings than the paper's, evaluations of earlier checkpoints, and the cells' notes; a paragraph each."""
    lines = []
    for cell in CELLS + SINUSOIDS:
        for run in runs[cell.name]:
            where = f'{cell.title}{run.variant}, seed {run.seed}'
            if run.deviations:
                wanted = ', '.join(
                    f'--{name}={wanted}' for name, (_, wanted) in run.deviations.items()
                )
                lines += [f'{where}: the cell has {wanted}.', '']
            if cell in CELLS and any(table.split == 'val' for table in run.tables.values()):
                lines += [f'{where}: evaluated on the validation classes.', '']
            late = sorted(
                {run.evaluated(shots) for shots, kind in run.tables if kind == 'last'}
                - {run.iterations}
            )
            lines += [
                f'{where}: trained on to iteration {run.iterations:,}, which has not been evaluated.',
                '',
            ] * bool(late)
        lines += note(logs / cell.name, f'{cell.title}: ')
    return lines


def note(folder: Path, title: str = '') -> list[str]:
    """What FOLDER/note.txt says, as a paragraph."""
    path = folder / 'note.txt'
    return (
        [title + path.read_text(encoding='utf-8', errors='replace').strip(), '']
        if path.is_file()
        else []
    )


def report(logs: Path, output: Path) -> Path:
    """Writes OUTPUT/report.md and its figures. Returns the path of the former."""
    plain_first = lambda run: (len(run.deviations), run.seed)
    runs = {cell.name: sorted(read_runs(logs, cell), key=plain_first) for cell in CELLS + SINUSOIDS}
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        '# Results',
        '',
        'Made by `scripts/paper/report.py`.',
        '',
        *note(logs),
        *accuracies(runs),
        '',
        *errors(runs),
        '',
        *remarks(logs, runs),
    ]
    for name, draw in FIGURES.items():
        if caption := draw(output / f'{name}.png', runs):
            lines += [f'![{name}]({name}.png)', '', f'*{caption}*', '']
    write_whole(output / 'report.md', '\n'.join(lines).encode())
    return output / 'report.md'


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('logs', type=Path, nargs='?', default=Path('logs'))
    parser.add_argument('--output', type=Path, help='folder of the report (default: LOGS/report)')
    values = parser.parse_args(arguments)
    try:
        if not values.logs.is_dir():
            raise FileNotFoundError(
                f'there is no folder {values.logs}: run a script such as scripts/paper/sinusoid_10shot.sh first'
            )
        output = values.output or values.logs / 'report'
        if output.exists() and not output.is_dir():
            raise FileExistsError(f'{output} is a file: give a folder with --output')
        print(report(values.logs, output))
    except OSError as error:
        sys.exit(f'report.py: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
