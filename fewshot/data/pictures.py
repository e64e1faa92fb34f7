"""Pictures of tasks, [height, width, 3] uint8."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from data_generator import EVALUATION_SEED, Batch, ImageGenerator, SinusoidGenerator

MARGIN = 14  # pixels, for a line of text
FIT_SIZE = (480, 320)  # width and height of the picture of a fit


def picture_of(source, batch: Batch, evaluate: Callable[[Batch], np.ndarray]) -> np.ndarray | None:
    """Draws the picture that TensorBoard shows in training: [height, width, 3] uint8, or None.

    source: that of the tasks; the user's own may have a method `picture`. batch: the meta-batch at
    hand, arrays. evaluate: gives the outputs on the query set of a Batch after update 1...J, [J, T,
    examples, out].
    """
    if isinstance(source, SinusoidGenerator):
        return sinusoid_picture(source, batch, evaluate)
    if isinstance(source, ImageGenerator):
        return task_picture(batch, source.image_shape)
    own = getattr(source, 'picture', None)
    return own(batch, evaluate) if own else None


def sinusoid_picture(
    source: SinusoidGenerator, batch: Batch, evaluate: Callable[[Batch], np.ndarray]
) -> np.ndarray:
    """Draws one sinusoid, and its fits after 1 and after all updates.

    Points all over [-5, 5] are the query points of many copies of the task, which makes a
    meta-batch of the usual shape, for which the evaluation is compiled.
    """
    tasks, shots, dim = batch.inputa.shape[0], source.num_support, source.dim_input
    task = SinusoidGenerator(shots, 0, oracle=True, seed=EVALUATION_SEED).batch('val', 0, 1)
    amplitude, phase = task.inputa[0, 0, 1:]
    x = np.linspace(-5, 5, tasks * shots, dtype=np.float32)  # [T*K]
    truth = amplitude * np.sin(x - phase)
    inputs = np.stack([x, np.full_like(x, amplitude), np.full_like(x, phase)], axis=1)
    outputs = evaluate(
        Batch(
            np.repeat(task.inputa[..., :dim], tasks, axis=0),  # [T, K, D]
            np.repeat(task.labela, tasks, axis=0),  # [T, K, 1]
            inputs[:, :dim].reshape(tasks, shots, dim),
            truth.reshape(tasks, shots, 1),
        )
    )  # [J, T, K, 1]
    curves = {'red truth': truth}
    for colour, update in (('green', 1), ('blue', len(outputs))):
        curves[f'{colour} after {update} updates'] = np.reshape(outputs[update - 1], -1)
    return fit_picture(
        {name: np.stack([x, y], axis=1) for name, y in curves.items()},
        points=np.stack([task.inputa[0, :, 0], task.labela[0, :, 0]], axis=1),
    )


def task_picture(batch: Batch, image_shape: tuple[int, int, int], task: int = 0) -> np.ndarray:
    """Draws a task's support images above its query images, each below its label.

    Both have a row for each of the first two shots.
    batch: arrays; image_shape: (height, width, channels).
    """
    ways = batch.labela.shape[2]
    # [examples, D] of the inputs, [examples, N] of the labels
    inputa, labela, inputb, labelb = (array[task, : 2 * ways] for array in batch)
    rows = len(labela) // ways + len(labelb) // ways
    width, height = image_shape[1] + 4, image_shape[0] + MARGIN + 2  # of an image and its label
    canvas = Image.new('RGB', (ways * width, rows * height + 2 * MARGIN), 'white')
    draw, top = ImageDraw.Draw(canvas), 0
    for title, inputs, labels in (('support', inputa, labela), ('query', inputb, labelb)):
        draw.text((2, top), title, fill='red')
        top += MARGIN
        pixels = np.uint8(255 * inputs).reshape(-1, *image_shape)
        for i, (image, label) in enumerate(zip(pixels, labels)):
            x, y = i % ways * width, top + i // ways * height
            draw.text((x + 2, y), str(label.argmax()), fill='black')
            colours = np.broadcast_to(image, (*image_shape[:2], 3))  # grey in colours
            canvas.paste(Image.fromarray(np.ascontiguousarray(colours)), (x, y + MARGIN))
        top += len(labels) // ways * height
    return np.asarray(canvas)


def fit_picture(curves: dict[str, np.ndarray], points: np.ndarray) -> np.ndarray:
    """Draws curves and points of a regression task, x in [-5, 5] and y in [-6, 6].

    curves: {colour and name, as 'red truth': [n, 2]}; points: [K, 2].
    """
    canvas = Image.new('RGB', FIT_SIZE, 'white')
    draw = ImageDraw.Draw(canvas)
    draw.line(_places(np.array([[-5, 0], [5, 0]])), fill='lightgray')
    for i, (name, curve) in enumerate(curves.items()):
        colour, _, text = name.partition(' ')
        draw.line(_places(curve), fill=colour, width=2)
        draw.text((4, 2 + i * MARGIN), text, fill=colour)
    for x, y in _places(points):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='purple')
    return np.asarray(canvas)


def _places(points: np.ndarray) -> list[tuple[float, float]]:
    """Returns where points [n, 2] of the plane stand in the picture of a fit."""
    width, height = FIT_SIZE
    places = (np.clip(points, -6, 6) * [1, -1] + [5, 6]) / [10, 12] * [width - 1, height - 1]
    return [tuple(place) for place in places]
