"""Evaluates a run on the images of its test classes as they are, and compressed as JPEG.

    python scripts/measure/jpeg.py cifar-fs-5way-5shot --data_dir=data/cifar_fs

Small images lose much: JPEG works on squares of 8 pixels, and halves the resolution of colours.
Prints the accuracy after 10 updates and half of its 95 % interval; the tasks are main.py's.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np
from PIL import Image

from data_generator import whole_number
from fewshot.runs.checkpoints import read_run_state
from fewshot.runs.terminal import print_anything
from fewshot.use.evaluation import show_accuracy, test_tasks
from fewshot.use.loading import load_of_images, parser_of, refusals
from fewshot.use.saved_models import find_checkpoint

UPDATES = 10  # as main.py evaluates


def compressed(images: np.ndarray, quality: int) -> np.ndarray:
    """Returns the images, [total, height, width, 1 or 3] uint8, as JPEG gives them back.

    quality: 1 to 95, as in Pillow, which halves the resolution of colours.
    """

    def once(pixels: np.ndarray) -> np.ndarray:
        file, gray = io.BytesIO(), pixels.shape[-1] == 1
        image = Image.fromarray(pixels[..., 0] if gray else pixels)
        image.save(file, 'JPEG', quality=quality)
        return np.asarray(Image.open(file)).reshape(pixels.shape)

    return np.stack([once(pixels) for pixels in images])


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument('--data_dir', default='data', help='has the images')
    parser.add_argument('--tasks', type=int, default=600, help='how many to evaluate')
    parser.add_argument('--quality', type=int, default=75, help="JPEG's, 1 to 95")
    values = parser.parse_args(arguments)
    with refusals(__file__):
        whole_number('--tasks', values.tasks, lowest=1)
        if not 1 <= values.quality <= 95:
            raise ValueError(f'--quality must be from 1 to 95, not {values.quality}')
        learner = load_of_images(values, compiled=True)
        known = read_run_state(find_checkpoint(values.run_folder)).get('classes')
        shots = learner.settings['update_batch_size']
        source = test_tasks(learner.settings, shots, values.data_dir, known)
        show_accuracy('as they are', learner, source, values.tasks, UPDATES)
        test = source.folders['test']
        images = compressed(test.images, values.quality)
        source.folders['test'] = test._replace(images=images)
        show_accuracy(f'JPEG, {values.quality}', learner, source, values.tasks, UPDATES)


if __name__ == '__main__':
    print_anything()
    main()
