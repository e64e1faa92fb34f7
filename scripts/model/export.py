#!/usr/bin/env python
"""Writes a trained classifier as a SavedModel, which adapts and predicts without this project.

    python scripts/model/export.py RUN_FOLDER OUT

RUN_FOLDER is a folder that main.py trained in, LOGDIR/cls_.... The SavedModel OUT has two
signatures; any number of tasks T, of support examples and of queries will do:

    adapt(support_images, support_labels)                            the weights, [T, ...] each
    adapt_and_predict(support_images, support_labels, query_images)  probabilities [T, queries, N]

support_images [T, examples, height, width, channels] and query_images [T, queries, ...] are float32
from 0 to 1, support_labels [T, examples] int64 from 0 to N-1. What does not fit, and an adaptation
that diverges, is refused with an InvalidArgumentError.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import tensorflow as tf

from fewshot.networks.build import example_shape
from fewshot.runs.checkpoints import is_plain_path
from fewshot.runs.terminal import print_anything
from fewshot.use import programs
from fewshot.use.learner import PIXEL_TOLERANCE, Learner
from fewshot.use.loading import add_adaptation, chosen_steps, load, parser_of, refusals
from maml import repeated

# The checks of Learner as assertions of the graph, so that a server makes them too ----------------


def checked(array: tf.Tensor, holds: tf.Tensor, said: list) -> tf.Tensor:
    """Returns the array; all that is computed from it waits for the assertion."""
    with tf.control_dependencies([tf.debugging.Assert(holds, said, summarize=9)]):
        return tf.identity(array)


def with_sizes(name: str, array: tf.Tensor, wanted: Sequence) -> tf.Tensor:
    """Checks an array's sizes; a wanted size of 0 stands for any but 0."""
    wanted, found = tf.stack(wanted), tf.shape(array)
    holds = tf.reduce_all(tf.where(wanted == 0, found > 0, found == wanted))
    said = f'{name} must have the sizes (0: any, but not empty)'
    return checked(array, holds, [said, wanted, 'but they are', found])


def in_range(name: str, array: tf.Tensor, low: float, high: float, slack: float = 0) -> tf.Tensor:
    """Checks that values are in a range; NaN is out of range too."""
    holds = tf.reduce_all((array >= low - slack) & (array <= high + slack))
    least, most = tf.reduce_min(array), tf.reduce_max(array)
    said = f'{name} must be from {low} to {high}, but they are from'
    return checked(array, holds, [said, least, 'to', most])


def finite(name: str, array: tf.Tensor) -> tf.Tensor:
    said = f'{name} must be finite, but there are some that are NaN or infinite'
    return checked(array, tf.reduce_all(tf.math.is_finite(array)), [said])


class Serving(NamedTuple):
    """The functions of the SavedModel; tasks and examples are of unknown number."""

    learner: Learner
    steps: int
    lr: float | None  # None: what was learned
    transductive: bool

    def module(self, image_shape: tuple[int, ...]) -> tf.Module:
        """Makes the module that is to be saved."""
        images = [None, None, *image_shape]  # [T, examples, height, width, channels]
        support = (
            tf.TensorSpec(images, tf.float32, 'support_images'),
            tf.TensorSpec([None, None], tf.int64, 'support_labels'),
        )
        query = tf.TensorSpec(images, tf.float32, 'query_images')
        module, model = tf.Module(), self.learner.model
        module.weights, module.norms, module.rates = model.weights, model.norms, model.rates
        keras_model = getattr(model.network, 'model', None)
        if keras_model:  # the graphs below read them
            module.others = [variable.value for variable in keras_model.variables]
        signature = functools.partial(tf.function, autograph=False)
        module.adapt = signature(self.adapt, support)
        module.adapt_and_predict = signature(self.adapt_and_predict, (*support, query))
        return module

    def images(self, name: str, images: tf.Tensor, tasks, examples) -> tf.Tensor:
        """Checks images; tasks, examples: the numbers that are wanted, 0: any."""
        images = with_sizes(name, images, [tasks, examples, *images.shape[2:]])
        if self.learner.takes_images:
            return in_range(name, images, 0, 1, PIXEL_TOLERANCE)
        return finite(name, images)

    def support(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Checks the images and labels of the support set."""
        labels = with_sizes('support_labels', labels, [0, 0])
        highest = self.learner.model.network.dim_output - 1
        labels = in_range('support_labels', labels, 0, highest)
        return self.images('support_images', images, *tf.unstack(tf.shape(labels))), labels

    def flat(self, images: tf.Tensor) -> tf.Tensor:
        sizes = [*tf.unstack(tf.shape(images)[:2]), self.learner.model.network.dim_input]
        return tf.reshape(images, sizes)

    def adapt(self, support_images: tf.Tensor, support_labels: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.adapted(*self.support(support_images, support_labels))

    def adapted(self, support_images: tf.Tensor, support_labels: tf.Tensor) -> dict[str, tf.Tensor]:
        model = self.learner.model
        label = tf.one_hot(support_labels, model.network.dim_output)  # [T, examples, N]
        x, weights = self.flat(support_images), repeated(model.weights, tf.shape(label)[0])
        scale = self.learner.example_scale(tf.cast(tf.shape(label)[1], tf.float32))
        lr = scale if self.lr is None else self.lr * scale
        weights = programs.adapt(model.maml, x, label, weights, lr, 0, self.steps, self.lr is None)
        what = 'adaptation diverged, export with a smaller --lr: the weights'
        return {name: finite(f'{what} {name}', value) for name, value in weights.items()}

    def adapt_and_predict(
        self, support_images: tf.Tensor, support_labels: tf.Tensor, query_images: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        model = self.learner.model
        support_images, support_labels = self.support(support_images, support_labels)
        weights = self.adapted(support_images, support_labels)
        tasks, examples = tf.unstack(tf.shape(support_images)[:2])
        x, leading = self.flat(self.images('query_images', query_images, tasks, 0)), None
        if not self.transductive:
            x, leading = tf.concat([self.flat(support_images), x], axis=1), examples
        output = programs.output(model.maml, x, weights, self.steps, leading)
        what = 'adaptation diverged, export with a smaller --lr: the answers'
        return {'probabilities': finite(what, tf.nn.softmax(output))}


def save(module: tf.Module, out: Path) -> None:
    """Writes the folder, whole or not at all."""
    signatures = {'adapt': module.adapt, 'adapt_and_predict': module.adapt_and_predict}
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.export') as beside:
        tf.saved_model.save(module, f'{beside}/out', signatures, options)
        os.replace(f'{beside}/out', out)


def export(values: argparse.Namespace) -> str:
    """Writes the SavedModel and returns a report. Raises ValueError and OSError."""
    learner = load(values.run_folder, values.checkpoint, values.network, values.loss)
    if not learner.is_classifier:
        source = learner.settings['datasource']
        raise ValueError(f'{values.run_folder} is a run on {source}; only classifiers are exported')
    steps, lr = chosen_steps(values, learner)
    if not is_plain_path(values.out):
        raise ValueError(
            f'{values.out}: TensorFlow takes such a path for a pattern, and could not load the '
            'SavedModel from there: give an OUT without brackets, *, ? and \\'
        )
    if values.out.exists():
        raise ValueError(
            f'{values.out} is there already, and is not replaced: remove it, or give another OUT'
        )
    shape = example_shape(learner.settings)
    save(Serving(learner, steps, lr, values.transductive).module(shape), values.out)
    ways, transductive = learner.model.network.dim_output, '' if values.transductive else 'not '
    size = 'the learned step sizes' if lr is None else f'α = {lr}'
    return (
        f'{values.out}: {ways} ways, images {"x".join(map(str, shape))}, '
        f'{steps} steps with {size}, {transductive}transductive'
    )


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument('out', type=Path, metavar='OUT')
    add_adaptation(parser)
    values = parser.parse_args(arguments)
    with refusals(__file__):
        print(export(values))


if __name__ == '__main__':
    print_anything()
    main()
