"""A sinusoid model's fits to new tasks, and how pictures show them."""

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use('Agg')  # pictures in files, on machines without a display too
import matplotlib.pyplot as plt

from data_generator import Batch, SinusoidGenerator
from fewshot.networks.build import make_model
from fewshot.runs.checkpoints import checkpoints, first_whole
from fewshot.runs.results import read_evaluation
from fewshot.use.programs import output
from maml import repeated

CURVES = {  # number of updates: how it is drawn
    0: dict(label='before the first update', linestyle=':', color='tab:gray'),
    1: dict(label='after 1 update', linestyle='--', color='tab:green'),
    10: dict(label='after 10 updates', color='tab:blue'),
}


class Fit(NamedTuple):
    """One task, and the model's predictions for it."""

    x: np.ndarray  # [points], evenly spaced
    truth: np.ndarray  # [points]
    support: np.ndarray  # [K, 2]: x, y
    predictions: dict  # {number of updates: [points]}


def fits(
    model, shots: int, oracle: bool, tasks: int = 2, seed: int = 0, resolution: int = 201
) -> list[Fit]:
    """Fits a sinusoid model to random tasks, before and after 1 and 10 updates.

    Its predictions are at `resolution` points all over [-5, 5].
    """
    batch = SinusoidGenerator(shots, 0, oracle=True, seed=seed).batch('test', 0, tasks)
    dim = 3 if oracle else 1  # inputs: (x, A, φ) or x
    a, phi = batch.inputa[:, :1, 1], batch.inputa[:, :1, 2]  # [T, 1]
    x = np.linspace(-5, 5, resolution, dtype=np.float32)
    truth = a * np.sin(x - phi)  # [T, points]
    inputs = np.stack(np.broadcast_arrays(x, a, phi), axis=-1)[..., :dim]  # [T, points, D]
    support = batch.inputa[..., :dim]  # [T, K, D]
    results = model.evaluate(Batch(support, batch.labela, inputs, truth[..., None]), max(CURVES))
    theta = repeated(model.weights, tasks)
    outputs = [output(model.maml, inputs, theta, done=0), *results.outputsb]
    predictions = {updates: np.asarray(outputs[updates])[..., 0] for updates in CURVES}
    points = np.concatenate([support[..., :1], batch.labela], axis=-1)  # [T, K, 2]
    curves = [{updates: y[i] for updates, y in predictions.items()} for i in range(tasks)]
    return [Fit(x, *of_task) for of_task in zip(truth, points, curves)]


def draw_fit(axes, fit: Fit, updates: Iterable[int] = CURVES):
    """Draws a fit; updates: the numbers of updates after which predictions are shown."""
    axes.plot(fit.x, fit.truth, color='tab:red', label='truth')
    for count in updates:
        axes.plot(fit.x, fit.predictions[count], **CURVES[count])
    axes.plot(*fit.support.T, '^', color='tab:purple', label='support', zorder=3)


RUN = re.compile(
    r'cls_\d+\.mbs_\d+\.ubs_(\d+)\.numstep(\d+)\.updatelr([-+.\de]+?)(?:hidden\d+)?(?:maxpool)?'
    r'(stopgrad)?(oracle)?(batchnorm|layernorm|nonorm)(?:\.\d+)?(?:\.seed\d+)?'
)
NORMS = {'batchnorm': 'batch_norm', 'layernorm': 'layer_norm', 'nonorm': 'None'}


def load_model(run_folder: Path, warn: Callable):
    """Returns (model with the newest weights, K, whether it is the oracle), by the folder's name.

    Older runs have no flags in their checkpoints. warn: is told of damaged checkpoints. Raises
    ValueError if the name is not that of a sinusoid run, or no checkpoint fits it.
    """
    name = RUN.fullmatch(run_folder.resolve().name)
    if not name:
        raise ValueError(
            f'{run_folder} is not named like a run (cls_5.mbs_25.ubs_10.numstep1.updatelr0.001'
            'nonorm); give the folder that main.py made in --logdir'
        )
    shots, num_updates, update_lr, stop_grad, baseline, norm = name.groups()
    model = make_model(
        'sinusoid',
        int(shots),
        float(update_lr),
        int(num_updates),
        norm=NORMS[norm],
        stop_grad=bool(stop_grad),
        baseline=baseline,
        compiled=False,  # a few steps, once
    )
    found = checkpoints(run_folder)
    if not found:
        raise ValueError(f'{run_folder} holds no checkpoint; train it first')
    _, path, _ = first_whole(dict(reversed(found.items())), warn)
    model.restore(path)
    return model, int(shots), bool(baseline)


def read_errors(run_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads all evaluations: {label: means and halves of the intervals, over updates 0, 1, ...}.

    Raises ValueError if there is none, or a file is not what main.py writes.
    """
    found = {}
    for path in sorted(run_folder.glob('test_ubs*_stepsize*.csv')):
        shots, told = re.fullmatch(r'test_ubs(.+)_stepsize(.+)\.csv', path.name).groups()
        label = f'{shots}-shot, α = {told.replace("_", ", ")}'  # settings that are not usual follow
        found[label] = read_evaluation(path)[::2]
    if not found:
        raise ValueError(
            f'{run_folder} holds no test_ubs*_stepsize*.csv; evaluate the run first, with the '
            'flags it was trained with and --train=False --test_set=True'
        )
    return found


def draw_run(all_fits: list[Fit], errors: dict[str, tuple], kind: str) -> bytes:
    """Draws the picture of fits, and of errors as `read_errors` returns them.

    kind: its format, such as 'png'. Raises ValueError if there is no such format.
    """
    size = (5 * len(all_fits) + 5, 4.2)
    figure, panels = plt.subplots(1, len(all_fits) + 1, figsize=size, layout='constrained')
    for axes, fit in zip(panels, all_fits):
        draw_fit(axes, fit)
        axes.set(xlabel='x', ylabel='y', title=f'A new task, {len(fit.support)} support points')
    panels[0].legend(fontsize='small')
    for label, (means, halves) in errors.items():
        look = dict(marker='o', markersize=4, capsize=3, label=label)
        panels[-1].errorbar(range(len(means)), means, yerr=halves, **look)
    panels[-1].set(
        title='Mean over test tasks, 95 % intervals',
        xlabel='updates (0: support set before the first, then query set)',
        xticks=range(max(len(means) for means, _ in errors.values())),
        ylabel='mean squared error',
        ylim=(0, None),
    )
    panels[-1].grid(alpha=0.3)
    panels[-1].legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=kind)
    plt.close(figure)
    return picture.getvalue()
