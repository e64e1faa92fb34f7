#!/usr/bin/env python
"""Draws what a trained sinusoid model does: its fits to two new tasks, its error after each update.

    python scripts/paper/plot_sinusoid.py logs/sine/cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm

The errors are those that `main.py --train=False` wrote into the run's folder.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from fewshot.data.preparation import as_path
from fewshot.paper.sinusoid_fits import draw_run, fits, load_model, read_errors
from fewshot.runs.results import write_whole
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import refusals


def warn(text: str):
    print(f'plot_sinusoid.py: {text}', file=sys.stderr)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description='Draws the fits and errors of a trained and evaluated sinusoid run.'
    )
    of_folder = 'the folder with checkpoints and results that main.py made'
    of_output = 'picture to write (default: sinusoid.png in the run folder)'
    parser.add_argument('run_folder', type=Path, help=of_folder)
    parser.add_argument('--output', type=as_path, help=of_output)
    parser.add_argument('--seed', type=int, default=0, help='of the tasks drawn')
    values = parser.parse_args(arguments)
    folder = values.run_folder
    output = values.output or folder / 'sinusoid.png'
    with refusals(__file__):
        if not folder.is_dir():
            raise ValueError(f'there is no folder {folder}; train a sinusoid run first')
        errors = read_errors(folder)
        drawn = fits(*load_model(folder, warn), seed=values.seed)
        picture = draw_run(drawn, errors, output.suffix[1:] or 'png')
        try:
            write_whole(output, picture)
        except OSError as error:
            raise OSError(f'{error}; name another file with --output') from error
    print(f'Wrote {output}')


if __name__ == '__main__':
    print_anything()
    main()
