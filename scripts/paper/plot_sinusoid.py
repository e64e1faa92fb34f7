#!/usr/bin/env python
"""Draws what a trained sinusoid model does: its fits to two new tasks, its error after each update.

    python scripts/paper/plot_sinusoid.py logs/sine/cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm

The errors are those that `main.py --train=False` wrote into the run's folder.
"""

import argparse
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import numpy as np

matplotlib.use('Agg')  # a picture in a file, on machines without a display too
import matplotlib.pyplot as plt

from fewshot.data.preparation import as_path
from fewshot.paper.sinusoid_fits import CURVES, Fit, fits

NORMS = {'batchnorm': 'batch_norm', 'layernorm': 'layer_norm', 'nonorm': 'None'}


class Errors(NamedTuple):
    """The results of one evaluation, each an array over updates 0, 1, ..."""

    label: str
    means: np.ndarray
    ci95: np.ndarray


def read_errors(run_folder: Path) -> list[Errors]:
    """The run's test_ubs{K}_stepsize{α}.csv files, an entry for each.

    Raises:
      FileNotFoundError: the run has not been evaluated.
      ValueError: a file does not hold the three rows of numbers (means, standard deviations,
        confidence intervals).
    """
    from fewshot.runs.results import read_evaluation

    found = []
    for path in sorted(run_folder.glob('test_ubs*_stepsize*.csv')):
        shots, told = re.fullmatch(r'test_ubs(.+)_stepsize(.+)\.csv', path.name).groups()
        means, _, ci95 = read_evaluation(path)
        label = f'{shots}-shot, α = {told.replace("_", ", ")}'  # what was not as usual follows
        found.append(Errors(label, means, ci95))
    if not found:
        raise FileNotFoundError(
            f'{run_folder} holds no test_ubs*_stepsize*.csv; evaluate the run first, with the '
            'flags it was trained with and --train=False --test_set=True'
        )
    return found


def draw_fit(axes, fit: Fit) -> None:
    axes.plot(fit.x, fit.truth, color='tab:red', label='ground truth')
    for updates, prediction in fit.predictions.items():
        axes.plot(fit.x, prediction, **CURVES[updates])
    axes.plot(*fit.support.T, '^', color='tab:purple', label='support points', zorder=3)
    axes.set(xlabel='x', ylabel='y', title=f'A new task, {len(fit.support)} support points')


def draw_errors(axes, errors: list[Errors]) -> None:
    for label, means, ci95 in errors:
        axes.errorbar(
            range(len(means)), means, yerr=ci95, marker='o', markersize=4, capsize=3, label=label
        )
    axes.set(
        xlabel='updates (0: support set before the first, then query set)',
        ylabel='mean squared error',
        xticks=range(max(len(e.means) for e in errors)),
        ylim=(0, None),
        title='Mean over test tasks, 95 % intervals',
    )
    axes.grid(alpha=0.3)
    axes.legend()


def draw(all_fits: list[Fit], errors: list[Errors], output: Path) -> None:
    """Writes the picture, in the format that the ending of `output` says.

    The file is complete or untouched.

    Raises:
      ValueError: there is no such format.
      OSError: the file cannot be written.
    """
    # Here and below: what fails before needs no TensorFlow, which takes seconds to start.
    from fewshot.runs.results import write_whole

    size = (5 * len(all_fits) + 5, 4.2)
    figure, axes = plt.subplots(1, len(all_fits) + 1, figsize=size, layout='constrained')
    for panel, fit in zip(axes, all_fits):
        draw_fit(panel, fit)
    axes[0].legend(fontsize='small')
    draw_errors(axes[-1], errors)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=output.suffix[1:] or 'png')
    try:
        write_whole(output, picture.getvalue())
    except OSError as error:
        raise OSError(
            f'{output} cannot be written ({error.strerror}); name another file with --output'
        ) from error


def load_model(run_folder: Path):
    """(the model with the newest weights, K, whether it is the oracle), as the folder's name says.

    Raises:
      ValueError: the name is not that of a sinusoid run, or the checkpoint does not fit it.
      FileNotFoundError: there is no checkpoint.
    """
    from fewshot.networks.build import make_model
    from fewshot.runs.checkpoints import checkpoints, first_whole

    name = re.fullmatch(
        r'cls_\d+\.mbs_\d+\.ubs_(\d+)\.numstep(\d+)\.updatelr([-+.\de]+?)(?:hidden\d+)?(?:maxpool)?'
        r'(stopgrad)?(oracle)?(batchnorm|layernorm|nonorm)(?:\.\d+)?',
        run_folder.resolve().name,
    )
    if not name:
        raise ValueError(
            f'{run_folder} is not named like a run '
            '(cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm); '
            'give the folder that main.py made in --logdir'
        )
    shots, num_updates, update_lr, stop_grad, baseline, norm = name.groups()
    model = make_model(
        'sinusoid',
        norm=NORMS[norm],
        update_batch_size=int(shots),
        num_updates=int(num_updates),
        update_lr=float(update_lr),
        stop_grad=bool(stop_grad),
        baseline=baseline,
        compiled=False,  # a few steps, once
    )
    found = checkpoints(run_folder)
    if not found:
        raise FileNotFoundError(f'{run_folder} holds no checkpoint; train it first')
    _, path, _ = first_whole(dict(reversed(found.items())), tell)
    model.restore(path)
    return model, int(shots), bool(baseline)


def tell(text: str) -> None:
    print(f'plot_sinusoid.py: {text}', file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Draws the fits and errors of a trained and evaluated sinusoid run.'
    )
    of_folder = 'the folder with checkpoints and results that main.py made'
    of_output = 'picture to write (default: sinusoid.png in the run folder)'
    parser.add_argument('run_folder', type=Path, help=of_folder)
    parser.add_argument('--output', type=as_path, help=of_output)
    parser.add_argument('--seed', type=int, default=0, help='of the tasks drawn')
    args = parser.parse_args()
    folder = args.run_folder
    output = args.output or folder / 'sinusoid.png'
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f'there is no folder {folder}; train a sinusoid run first')
        errors = read_errors(folder)
        draw(fits(*load_model(folder), seed=args.seed), errors, output)
    except (OSError, ValueError) as error:
        sys.exit(f'{parser.prog}: {error}')
    from fewshot.runs.terminal import print_anything

    print_anything()
    print(f'Wrote {output}')


if __name__ == '__main__':
    main()
