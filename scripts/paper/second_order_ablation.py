#!/usr/bin/env python
"""Trains on the same tasks with the exact meta-gradient, and with those of other software.

    python scripts/paper/second_order_ablation.py VARIANT [main.py's flags]
    python scripts/paper/second_order_ablation.py check CASE.npz
    python scripts/paper/second_order_ablation.py plot FOLDER

The first trains, continues, or evaluates in LOGDIR/VARIANT. The second prints directional
derivatives of a case's meta-gradient. The third draws FOLDER/CELL/VARIANT/*, and writes
ablation.png and ablation.md there.

Other software silently computes these meta-gradients. The variants differ in nothing but the
derivative of batch normalisation's derivative:
    exact        the paper's meta-gradient
    held         batch normalisation's backward pass held constant, as the original has it under
                 TensorFlow 1.4 to 1.15
    moments      the gradient of the mean inside the variance stopped, as tf.nn.moments does,
                 the original under 1.3
    first_order  all second derivatives left out, as --stop_grad
"""

import re
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from absl import app

from fewshot.paper.ablation import NORMALISATIONS, check, plot
from fewshot.runs.flags import define_flags
from fewshot.runs.machine import tune
from fewshot.runs.prepare import Options
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import refusals


def train(variant: str, arguments: list[str]):
    """Trains a variant by main.py, in a folder of its own."""
    define_flags()
    logdir = re.findall(r'--logdir=(\S+)', ' '.join(arguments))
    more = ['--stop_grad=True'] if variant == 'first_order' else []
    folder = f'{(logdir or ["logs/ablation"])[-1]}/{variant}'
    line = ['second_order_ablation.py', *arguments, *more, f'--logdir={folder}']
    program = runpy.run_path(f'{sys.path[0]}/main.py')['program']  # as `python main.py` has it
    options = Options(norm=NORMALISATIONS[variant], start=tune)
    app.run(lambda rest: program(rest, options), line)


def program(arguments: list[str]):
    if arguments and arguments[0] in NORMALISATIONS:
        train(arguments[0], arguments[1:])
    elif len(arguments) == 2 and arguments[0] == 'check' and Path(arguments[1]).is_file():
        check(arguments[1])
    elif len(arguments) == 2 and arguments[0] == 'plot' and Path(arguments[1]).is_dir():
        with refusals(__file__):
            print(plot(Path(arguments[1])))
    else:
        sys.exit(
            f'second_order_ablation.py: give one of {", ".join(NORMALISATIONS)} and flags of '
            'main.py, or `check CASE.npz` or `plot FOLDER` with a file or folder that is there'
        )


if __name__ == '__main__':
    print_anything()
    program(sys.argv[1:])
