#!/usr/bin/env python
"""Writes what the runs of the paper's cells came to, as one Markdown file with figures.

    python scripts/paper/report.py [LOGS] [--output=LOGS/report]

LOGS (default: logs) is where scripts/paper/omniglot_5way_1shot.sh and its like keep their runs,
LOGS/CELL/seedN/RUN. Cells that were not run say so; a run folder that is incomplete, damaged or
another cell's is named and left out. What LOGS/note.txt and LOGS/CELL/note.txt say, if they are
there, is quoted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fewshot.data.preparation import as_path
from fewshot.paper.report import report
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import refusals


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('logs', type=Path, nargs='?', default=Path('logs'))
    of_output = 'folder of the report (default: LOGS/report)'
    parser.add_argument('--output', type=as_path, help=of_output)
    values = parser.parse_args(arguments)
    with refusals(__file__):
        if not values.logs.is_dir():
            raise ValueError(
                f'there is no folder {values.logs}: run a script such as '
                'scripts/paper/sinusoid_10shot.sh first'
            )
        output = values.output or values.logs / 'report'
        if output.exists() and not output.is_dir():
            raise ValueError(f'{output} is a file: give a folder with --output')
        print(report(values.logs, output))


if __name__ == '__main__':
    print_anything()
    main(sys.argv[1:])
