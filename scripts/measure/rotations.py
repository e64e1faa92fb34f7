"""Evaluates an Omniglot run on other tasks: characters turned, not turned, or each turn a class.

    python scripts/measure/rotations.py omniglot-20way-1shot --data_dir=data

In the original a task turns each of its classes by a random quarter. Prints the accuracy after as
many updates as in training, and half of its 95 % interval.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np

from data_generator import EVALUATION_SEED, ClassImages, OmniglotGenerator
from fewshot import load_omniglot
from fewshot.use.evaluation import show_accuracy
from fewshot.use.loading import load, parser_of, refusals


def turned_classes(classes: ClassImages) -> ClassImages:
    """Returns four classes for each: its images, turned by 0, 90, 180 and 270 degrees."""
    size, turns = len(classes.images), range(4)
    return ClassImages(
        classes.folder,
        [f'{name}/{turn}' for turn in turns for name in classes.names],
        np.concatenate([classes.starts + turn * size for turn in turns]),
        np.tile(classes.counts, 4),
        np.concatenate([np.rot90(classes.images, turn, axes=(1, 2)) for turn in turns]),
    )


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__, checkpoint=False)
    parser.add_argument('--data_dir', default='data', help='has omniglot_resized')
    parser.add_argument('--tasks', type=int, default=600, help='how many to evaluate')
    values = parser.parse_args(arguments)
    with refusals(__file__):
        learner = load(values.run_folder, network=values.network, loss=values.loss, compiled=True)
        if learner.settings['datasource'] != 'omniglot':
            raise ValueError(f'{values.run_folder} was not trained on Omniglot')
        test = load_omniglot(values.data_dir)['test']
        settings = {
            'turned at random': (test, True),
            'not turned': (test, False),
            'each turn a class': (turned_classes(test), False),
        }
        ways, shots = learner.settings['num_classes'], learner.settings['update_batch_size']
        size, updates = (ways, shots, shots), learner.model.num_updates
        for name, (classes, rotate) in settings.items():
            folders = {'test': classes}
            source = OmniglotGenerator(folders, *size, rotate=rotate, seed=EVALUATION_SEED)
            show_accuracy(name, learner, source, values.tasks, updates)


if __name__ == '__main__':
    main()
