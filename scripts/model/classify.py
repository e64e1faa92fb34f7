#!/usr/bin/env python
"""Classifies images with a trained model and a few labelled examples of each class.

    python scripts/model/classify.py RUN_FOLDER SUPPORT_DIR IMAGE... [--json]

RUN_FOLDER is a folder that main.py trained in, LOGDIR/cls_...; SUPPORT_DIR holds a folder for each label, named after it, with one
or more images; IMAGE is an image, or a folder of images. The model adapts to the labelled images by gradient descent, the loss per
step is shown; then each image is printed with the likeliest label and its probability.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # no lines about CPU features and missing GPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data_generator import ImageLayout, image_files, read_image, run_layout
from maml import Learner


class Support(NamedTuple):
    """The labelled examples."""

    labels: list[str]
    x: np.ndarray  # [examples, height, width, channels] uint8
    y: np.ndarray  # [examples], index into labels


def read_support(folder: Path, layout: ImageLayout, ways: int) -> Support:
    """Raises ValueError for what makes no task for a model of `ways` classes."""
    if not folder.is_dir():
        raise ValueError(
            f'there is no folder {folder}; SUPPORT_DIR must hold a folder of images for each label'
        )
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')
    )
    if len(classes) < 2:
        raise ValueError(
            f'{folder} holds {len(classes) or "no"} class folder{"s" * (not classes)}, but there must be at least two: a '
            'folder of images for each label'
        )
    if len(classes) > ways:
        raise ValueError(
            f'{folder} holds {len(classes)} class folders, but the model was trained for {ways} ways: it can tell at most '
            f'{ways} labels apart'
        )
    files = {path: image_files(path, layout) for path in classes}
    for path, found in files.items():
        if not found:
            raise ValueError(f'{path} holds no images: each label needs at least one')
    images = [read_image(file, layout) for found in files.values() for file in found]
    return Support(
        [path.name for path in classes],
        np.stack(images),
        np.repeat(np.arange(len(classes)), [*map(len, files.values())]),
    )


def read_queries(paths: list[Path], layout: ImageLayout) -> tuple[list[str], np.ndarray]:
    """The images' paths, those in folders one by one, and the images [queries, height, width, channels] uint8."""
    files = []
    for path in paths:
        if path.is_dir() and not image_files(path, layout):
            raise ValueError(f'{path} holds no images')
        if not path.exists():
            raise ValueError(f'there is no image {path}')
        files += image_files(path, layout) if path.is_dir() else [str(path)]
    return files, np.stack([read_image(file, layout) for file in files])


def adapt(
    learner: Learner, support: Support, steps: int, lr: float | None
) -> tuple[dict, list[float]]:
    """The adapted weights, and the loss on the support set before and after each step."""
    weights = learner.adapt(support.x, support.y, 0)
    losses = [float(learner.task_loss(support.x, support.y, weights))]
    for _ in range(steps):
        weights = learner.adapt(support.x, support.y, 1, lr, weights)
        losses.append(float(learner.task_loss(support.x, support.y, weights)))
    return weights, losses


def classify(values: argparse.Namespace) -> dict:
    """{'labels': ..., 'losses': ..., 'images': [{'image', 'label', 'probability', 'probabilities'}]}. Raises ValueError."""
    learner = Learner.load(values.run_folder, values.checkpoint)
    if not learner.is_classifier:
        raise ValueError(
            f'{values.run_folder} is a run on {learner.settings["datasource"]}, which has no images'
        )
    layout = run_layout(learner.settings)
    support = read_support(values.support_dir, layout, learner.model.network.dim_output)
    files, x = read_queries(values.image, layout)
    steps = learner.model.num_updates if values.steps is None else values.steps
    if not 0 <= steps <= 1000 or values.lr is not None and not 0 <= values.lr < float('inf'):
        raise ValueError(
            f'--steps must be from 0 to 1000 and --lr at least 0, but they are {values.steps} and {values.lr}'
        )
    weights, losses = adapt(learner, support, steps, values.lr)
    probabilities = learner.predict(x, weights, None if values.transductive else support.x)[
        :, : len(support.labels)
    ]
    probabilities /= probabilities.sum(1, keepdims=True)  # outputs without a label do not count
    images = [
        {
            'image': file,
            'label': support.labels[row.argmax()],
            'probability': float(row.max()),
            'probabilities': dict(zip(support.labels, map(float, row))),
        }
        for file, row in zip(files, probabilities)
    ]
    return {'labels': support.labels, 'losses': losses, 'images': images}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run_folder', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('support_dir', type=Path, metavar='SUPPORT_DIR')
    parser.add_argument('image', type=Path, nargs='+', metavar='IMAGE')
    parser.add_argument('--steps', type=int, help='gradient steps; default: as in training')
    parser.add_argument('--lr', type=float, help='step size; default: as in training')
    parser.add_argument(
        '--checkpoint',
        choices=['last', 'best'],
        default='last',
        help='best: that of the best validation',
    )
    parser.add_argument(
        '--transductive',
        action='store_true',
        help='normalise by the statistics of the images to classify, together, '
        'as the paper does; default: by those of the labelled images, so that an answer depends on its image alone',
    )
    parser.add_argument('--json', action='store_true', help='print everything as JSON')
    values = parser.parse_args(arguments)
    values.checkpoint = {'last': -1}.get(values.checkpoint, values.checkpoint)
    return values


def main(arguments: list[str] | None = None):
    values = parse(arguments)
    try:
        found = classify(values)
    except (ValueError, OSError) as error:
        sys.exit(f'classify.py: {error}')
    if values.json:
        print(json.dumps(found, indent=1))
        return
    for step, loss in enumerate(found['losses']):
        print(f'step {step}: loss {loss:.4f} on the labelled images')
    width = max(len(image['image']) for image in found['images'])
    for image in found['images']:
        print(f'{image["image"]:{width}}  {image["label"]}  {image["probability"]:.3f}')


if __name__ == '__main__':
    main()
