"""Pictures of tasks, [height, width, 3] uint8."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from data_generator import EVALUATION_SEED, Batch, ImageGenerator, SinusoidGenerator

MARGIN = 14  # pixels, for a line of text


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
    first = np.s_[task, : 2 * ways]  # [examples, D] of the inputs, [examples, N] of the labels
    support = batch.inputa[first], batch.labela[first]
    query = batch.inputb[first], batch.labelb[first]
    rows = sum(len(labels) // ways for _, labels in (support, query))
    width, height = image_shape[1] + 4, image_shape[0] + MARGIN + 2  # of an image and its label
    canvas = Image.new('RGB', (ways * width, rows * height + 2 * MARGIN), 'white')
    top = 0
    for title, (inputs, labels) in (('support', support), ('query', query)):
        ImageDraw.Draw(canvas).text((2, top), title, fill='red')
        top += MARGIN
        for i, (image, label) in enumerate(zip(inputs, labels)):
            corner = i % ways * width, top + i // ways * height
            _paste(canvas, corner, image.reshape(image_shape), str(label.argmax()))
        top += len(labels) // ways * height
    return np.asarray(canvas)


def _paste(canvas: Image.Image, corner: tuple[int, int], image: np.ndarray, label: str):
    """Puts an image [height, width, channels], values 0 to 1, below its label."""
    x, y = corner
    pixels = np.broadcast_to(np.uint8(255 * image), (*image.shape[:2], 3))  # grey in colours
    ImageDraw.Draw(canvas).text((x + 2, y), label, fill='black')
    canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x, y + MARGIN))


def fit_picture(
    curves: dict[str, np.ndarray], points: np.ndarray, size: tuple[int, int] = (480, 320)
) -> np.ndarray:
    """Draws curves and points of a regression task, x in [-5, 5] and y in [-6, 6].

    curves: {colour and name, as 'red truth': [n, 2]}; points: [K, 2]; size: (width, height).
    """
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    draw.line(_places(np.array([[-5, 0], [5, 0]]), size), fill='lightgray')
    for i, (name, curve) in enumerate(curves.items()):
        colour, _, text = name.partition(' ')
        draw.line(_places(curve, size), fill=colour, width=2)
        draw.text((4, 2 + i * MARGIN), text, fill=colour)
    for x, y in _places(points, size):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='purple')
    return np.asarray(canvas)


def _places(points: np.ndarray, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Returns where points [n, 2] of the plane stand in a picture."""
    width, height = size
    places = (np.clip(points, -6, 6) * [1, -1] + [5, 6]) / [10, 12] * [width - 1, height - 1]
    return [tuple(place) for place in places]
