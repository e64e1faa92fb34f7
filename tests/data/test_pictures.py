"""Pictures of tasks."""

import numpy as np

from data_generator import Batch
from fewshot.data.pictures import fit_picture, task_picture


def test_picture_of_a_task():
    """Every image of the first two shots stands in its place, unchanged; later ones do not."""
    random = np.random.default_rng(0)

    def examples(shots):
        images = random.integers(0, 256, (2, shots * 3, 20 * 30 * 3)) / 255
        return images, np.tile(np.eye(3)[[2, 0, 1]], (2, shots, 1))

    batch = Batch(*examples(1), *examples(4))
    picture = task_picture(batch, (20, 30, 3), task=1)
    assert picture.shape == (3 * 36 + 28, 3 * 34, 3) and picture.dtype == np.uint8
    expected = [
        (14 + 14, batch.inputa[1, :3]),
        (14 + 36 + 14 + 14, batch.inputb[1, :3]),
        (14 + 36 + 14 + 36 + 14, batch.inputb[1, 3:6]),
    ]
    for top, row in expected:
        for i, image in enumerate(row):
            place = picture[top : top + 20, 34 * i : 34 * i + 30]
            np.testing.assert_array_equal(place, np.uint8(255 * image.reshape(20, 30, 3)))
    assert (picture[14:28] < 128).any()  # the labels


def test_picture_of_a_fit():
    """A curve goes through its points, y upwards."""
    x = np.linspace(-5, 5, 50)
    picture = fit_picture({'red line': np.stack([x, x], 1)}, np.array([[0.0, 5.0]]))
    assert picture.shape == (320, 480, 3)
    red, purple, white = (255, 0, 0), (128, 0, 128), (255, 255, 255)
    for at, colour in [((-4, -4), red), ((4, 4), red), ((0, 5), purple), ((-4, 4), white)]:
        column, row = round((at[0] + 5) / 10 * 479), round((6 - at[1]) / 12 * 319)
        assert (picture[row - 1 : row + 2, column - 1 : column + 2] == colour).all(-1).any(), at
