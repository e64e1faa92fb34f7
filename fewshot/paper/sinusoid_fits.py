"""A sinusoid model's fits to new tasks, and how pictures show them."""

from typing import NamedTuple

import numpy as np

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
    """A sinusoid model before and after 1 and 10 updates on random tasks.

    Its predictions are at `resolution` points all over [-5, 5].
    """
    # Here, so that what fails before needs no TensorFlow, which takes seconds to start.
    from data_generator import Batch, SinusoidGenerator

    batch = SinusoidGenerator(shots, 0, oracle=True, seed=seed).batch('test', 0, tasks)
    dim = 3 if oracle else 1  # inputs: (x, A, φ) or x
    a, phi = batch.inputa[:, :1, 1], batch.inputa[:, :1, 2]  # [T, 1]
    x = np.linspace(-5, 5, resolution, dtype=np.float32)
    truth = a * np.sin(x - phi)  # [T, points]
    inputs = np.stack(np.broadcast_arrays(x, a, phi), axis=-1)[..., :dim]  # [T, points, D]
    support = batch.inputa[..., :dim]  # [T, K, D]
    results = model.evaluate(Batch(support, batch.labela, inputs, truth[..., None]), max(CURVES))
    common = model.common_values()
    prepared, norms = model.prepare(inputs, *model.preparing(common)), model.at(common, 0)[0]
    outputs = [model.output(model.initial_weights(tasks), norms, prepared), *results.outputsb]
    predictions = {updates: np.asarray(outputs[updates])[..., 0] for updates in CURVES}
    points = np.concatenate([support[..., :1], batch.labela], axis=-1)  # [T, K, 2]
    found = []
    for i in range(tasks):
        curves = {updates: y[i] for updates, y in predictions.items()}
        found.append(Fit(x, truth[i], points[i], curves))
    return found
