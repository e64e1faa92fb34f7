#!/usr/bin/env python
"""Classifies images with a trained model and a few labelled examples of each class.

    python scripts/model/classify.py RUN_FOLDER SUPPORT_DIR IMAGE... [--json]

RUN_FOLDER is a folder that main.py trained in, LOGDIR/cls_...; SUPPORT_DIR holds a folder for each
label, named after it, with one or more images; IMAGE is an image, or a folder of images. The model
adapts to the labelled images by gradient descent, the loss per step is shown; then each image is
printed with the likeliest label and its probability.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np

from fewshot.data.entries import visible
from fewshot.data.image_files import ImageLayout, image_files, read_image, run_layout
from fewshot.runs.terminal import print_anything
from fewshot.use.learner import Learner
from fewshot.use.loading import add_adaptation, chosen_steps, load_of_images, parser_of, refusals


class Support(NamedTuple):
    """The labelled examples."""

    labels: list[str]
    x: np.ndarray  # [examples, height, width, channels] uint8
    y: np.ndarray  # [examples], index into labels


def class_folders(folder: Path, ways: int) -> list[Path]:
    """Lists a folder per label. Raises ValueError if `ways` classes cannot tell them apart."""
    if not folder.is_dir():
        raise ValueError(
            f'there is no folder {folder}; SUPPORT_DIR must hold a folder of images for each label'
        )
    classes = [Path(entry.path) for entry in visible(folder) if entry.is_dir()]
    if len(classes) < 2:
        found = '1 class folder' if classes else 'no class folders'
        raise ValueError(
            f'{folder} holds {found}, but there must be at least two: a folder of images for each '
            'label'
        )
    if len(classes) > ways:
        raise ValueError(
            f'{folder} holds {len(classes)} class folders, but the model was trained for {ways} '
            f'ways: it can tell at most {ways} labels apart'
        )
    return classes


def read_support(folder: Path, layout: ImageLayout, ways: int) -> Support:
    """Reads the labelled images. Raises ValueError if they are no task for `ways` classes."""
    classes = class_folders(folder, ways)
    files = [image_files(path, layout) for path in classes]
    for path, found in zip(classes, files):
        if not found:
            raise ValueError(f'{path} holds no images: each label needs at least one')
    images = [read_image(file, layout) for found in files for file in found]
    y = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return Support([path.name for path in classes], np.stack(images), y)


def read_queries(paths: list[Path], layout: ImageLayout) -> tuple[list[str], np.ndarray]:
    """Returns the images' paths, and [queries, height, width, channels] uint8."""
    files = []
    for path in paths:
        if not path.exists():
            raise ValueError(f'there is no image {path}')
        found = image_files(path, layout) if path.is_dir() else [str(path)]
        if not found:
            raise ValueError(f'{path} holds no images')
        files += found
    return files, np.stack([read_image(file, layout) for file in files])


def adapt(
    learner: Learner, support: Support, steps: int, lr: float | None
) -> tuple[dict, list[float]]:
    """Returns the adapted weights, and the loss on the support set before and after each step."""
    weights = learner.adapt(support.x, support.y, 0)
    losses = [float(learner.task_loss(support.x, support.y, weights, 0))]
    for done in range(steps):
        weights = learner.adapt(support.x, support.y, 1, lr, weights, done)
        losses.append(float(learner.task_loss(support.x, support.y, weights, done + 1)))
    return weights, losses


def classify(values: argparse.Namespace) -> dict:
    """Returns the JSON to print: labels, losses of adaptation, and answers for the images.

    Raises ValueError.
    """
    learner = load_of_images(values)
    layout = run_layout(learner.settings)
    support = read_support(values.support_dir, layout, learner.model.network.dim_output)
    files, x = read_queries(values.image, layout)
    steps, lr = chosen_steps(values, learner)
    weights, losses = adapt(learner, support, steps, lr)
    outputs = learner.predict(x, weights, None if values.transductive else support.x, steps)
    probabilities = outputs[:, : len(support.labels)]  # [queries, labels]
    total = probabilities.sum(1, keepdims=True)  # outputs without a label do not count
    if not (total > 0).all():
        raise ValueError('none of the labels has a probability: adaptation diverged, lower --lr')
    probabilities /= total
    images = []
    for file, row in zip(files, probabilities):
        of_labels = dict(zip(support.labels, map(float, row)))
        label, probability = support.labels[row.argmax()], float(row.max())
        found = {'image': file, 'label': label, 'probability': probability}
        images.append(found | {'probabilities': of_labels})
    return {'labels': support.labels, 'losses': losses, 'images': images}


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument('support_dir', type=Path, metavar='SUPPORT_DIR')
    parser.add_argument('image', type=Path, nargs='+', metavar='IMAGE')
    add_adaptation(parser)
    parser.add_argument('--json', action='store_true', help='print everything as JSON')
    values = parser.parse_args(arguments)
    with refusals(__file__):
        found = classify(values)
    if values.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    for step, loss in enumerate(found['losses']):
        print(f'step {step}: loss {loss:.4f} on the labelled images')
    width = max(len(image['image']) for image in found['images'])
    for image in found['images']:
        print(f'{image["image"]:{width}}  {image["label"]}  {image["probability"]:.3f}')


if __name__ == '__main__':
    print_anything()
    main()
