"""Meta-gradients as other software computes them, and their effect on training.

The variants differ in nothing but the derivative of batch normalisation's derivative; see
scripts/paper/second_order_ablation.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model
from fewshot.networks.paper_networks import Normalization
from fewshot.paper.cells import value_of
from fewshot.paper.runs import usual_evaluation
from fewshot.runs.summaries import read_scalars
from special_grads import BATCH_NORM_EPSILON

AXES = [1, 2, 3]  # examples, height, width


@tf.custom_gradient
def held(x: tf.Tensor, beta: tf.Tensor):
    """Batch normalisation whose derivative counts as a constant when it is differentiated.

    x: [T, examples, H, W, C].
    """
    count = x.shape[1] * x.shape[2] * x.shape[3]
    mean = tf.reduce_mean(x, AXES, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), AXES, keepdims=True)
    scale = tf.math.rsqrt(variance + BATCH_NORM_EPSILON)
    standard = (x - mean) * scale

    def derivative(gradient):
        along = tf.reduce_sum(gradient * standard, AXES, keepdims=True) / count
        mean_gradient = tf.reduce_mean(gradient, AXES, keepdims=True)
        of_x = scale * (gradient - mean_gradient - standard * along)
        return tf.stop_gradient(of_x), tf.stop_gradient(tf.reduce_sum(gradient, [0, *AXES]))

    return standard + beta, derivative


def moments(x: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """Batch normalisation by tf.nn.moments."""
    mean, variance = tf.nn.moments(x, AXES, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + BATCH_NORM_EPSILON) + beta


class Variant(Normalization):
    """Batch normalisation by one of the functions above."""

    removes_mean = True

    def __init__(self, function):
        self.function = function

    def parameters(self, channels: int) -> dict:
        return {'beta': ('zeros', (channels,))}

    def normalize(self, x: tf.Tensor, parameters: dict, leading: int | None = None) -> tf.Tensor:
        return self.function(x, parameters['beta'])


NORMALISATIONS = {
    'exact': None,
    'held': Variant(held),
    'moments': Variant(moments),
    'first_order': None,
}
CASE_SETTINGS = {
    *('datasource', 'update_batch_size', 'update_lr', 'num_updates', 'num_classes', 'num_filters')
}


def case_model(case: Mapping[str, np.ndarray], variant: str) -> FastMAML:
    """Makes a variant's model with the initial parameters of a case."""
    flags = json.loads(str(case['flags']))
    settings = {name: value_of(str(flags[name])) for name in CASE_SETTINGS & flags.keys()}
    settings |= {'stop_grad': variant == 'first_order', 'dtype': tf.float64, 'compiled': False}
    model = make_model(**settings, norm=NORMALISATIONS[variant] or 'batch_norm')
    for name, variable in (model.weights | model.norms).items():
        variable.assign(case[f'init/{name}'])
    return model


def check(path: str):
    """Prints derivatives of the query loss, exactly and by each variant.

    They are those along one direction in each of two kernels.
    """
    case = np.load(path)
    batch = Batch(*(tf.constant(case[f'input/{name}'], tf.float64) for name in Batch._fields))
    random, directions = np.random.RandomState(0), {}
    for name in ('conv1', 'conv2', 'conv4'):  # drawn one after another
        directions[name] = random.randn(*case[f'init/{name}'].shape)
    for variant in NORMALISATIONS:
        model = case_model(case, variant)
        gradients = dict(zip(model.weights | model.norms, model.meta_gradient(batch)[1]))
        along = {}
        for name, direction in directions.items():
            product = tf.reduce_sum(gradients[name] * direction)
            along[name] = float(product / np.linalg.norm(direction))
        print(f'{variant:12} conv1 {along["conv1"]:8.4f}  conv4 {along["conv4"]:8.4f}')


class Result(NamedTuple):
    """A variant's results; accuracies in percent, after as many updates as in training."""

    validations: np.ndarray  # [n, 3]: iteration, accuracy, half of its 95 % interval
    # On the test classes, of the last checkpoint: accuracy, half of its 95 % interval.
    test: tuple[float, float] | None
    updates: int


def read_result(folder: Path) -> Result | None:
    """Reads the results of the one run in a variant's folder; None if it has no validation."""
    run = next(iter(sorted(folder.glob('cls_*'))), None)
    if not run:
        return None
    summaries, tag = read_scalars(run), 'metaval_Post-update_accuracy'
    updates = int(re.search(r'numstep([0-9]+)', run.name)[1])
    halves = summaries.get(f'{tag}_interval', {})  # in older runs
    halves |= summaries.get('validation/interval_accuracy', {})
    accuracies = summaries.get(f'{tag}__step_{updates}', {})
    values = [[step, 100 * value, 100 * halves[step]] for step, value in accuracies.items()]
    if test := usual_evaluation(run):
        test = tuple(100 * values[updates] for values in test)
    return Result(np.array(sorted(values)), test, updates) if values else None


def draw(axes, cell: str, variant: str, result: Result | None) -> str:
    """Draws a variant's curve with its band; returns its row of the table."""
    title = re.sub(r'omniglot_(\d+)way_(\d+)shot', r'Omniglot, \1-way \2-shot', cell)
    if not result:
        return f'| {title} | {variant} | not run | | |'
    steps, accuracies, halves = result.validations.T
    name = variant.replace('_', ' ')
    (line,) = axes.plot(steps, accuracies, marker='o', markersize=3, label=name)
    band = dict(color=line.get_color(), alpha=0.12, linewidth=0)
    axes.fill_between(steps, accuracies - halves, accuracies + halves, **band)
    axes.set(title=f'{title}, after {result.updates} update{"s" * (result.updates > 1)}')
    axes.set(xlabel='iteration', ylabel='validation accuracy [%]')
    validation = f'{accuracies[-1]:.1f} ± {halves[-1]:.1f}'
    test = '{:.1f} ± {:.1f}'.format(*result.test) if result.test else 'not evaluated'
    return f'| {title} | {variant} | {steps[-1]:.0f} | {validation} | {test} |'


def plot(folder: Path) -> Path:
    """Draws the accuracy of all variants over iterations, and writes a table of their last ones.

    The picture has a panel for each cell of the folder. Returns the path of the table. Raises
    ValueError if the folder holds no runs.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = {path.parent.name for path in folder.glob('*/*') if path.name in NORMALISATIONS}
    cells = sorted(names, key=lambda name: (len(name), name))
    if not cells:
        raise ValueError(
            f'{folder} holds no CELL/VARIANT: give the folder that '
            'scripts/paper/second_order_ablation.sh wrote'
        )
    size = (4.2 * len(cells) + 0.4, 3.6)
    figure, panels = plt.subplots(1, len(cells), figsize=size, layout='constrained', squeeze=False)
    head = '| | meta-gradient | iterations | last validation, % | test classes, 600 tasks, % |'
    rows = [head, '|---|---|---|---|---|']
    curves = {}  # {label: line}, each once
    for axes, cell in zip(panels[0], cells):
        for variant in NORMALISATIONS:
            rows.append(draw(axes, cell, variant, read_result(folder / cell / variant)))
        axes.grid(alpha=0.3)
        lines, names = axes.get_legend_handles_labels()
        curves |= zip(names, lines)
    if curves:
        above = dict(loc='outside upper center', ncols=len(curves), frameon=False)
        figure.legend(curves.values(), curves.keys(), **above)
    figure.savefig(folder / 'ablation.png', dpi=150)
    (folder / 'ablation.md').write_text('\n'.join(rows) + '\n', encoding='utf-8')
    return folder / 'ablation.md'
