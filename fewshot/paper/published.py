"""The trained models of the paper's cells that come with the project, by name.

    python -m fewshot.paper.published

prints their table. A name stands for the folder of its run in Learner.load, in the scripts, in
--run and in --init.
"""

import os
from pathlib import Path

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from fewshot.paper.cells import CELLS, OTHER_CELLS
from fewshot.paper.runs import usual_evaluation

RESULTS = Path(__file__).parents[2] / 'logs/results/paper'
# What the images of a data set are, and their terms; the models have this project's licence.
IMAGES = {
    'omniglot': 'characters, 28 pixels, MIT',
    'miniimagenet': 'photos, 84 pixels, for non-commercial research, as ImageNet',
    'cifar_fs': 'photos, 32 pixels, of CIFAR-100, which states no terms',
}


def published() -> dict[str, Path]:
    """Returns {name: folder of a run} of the models on images that were trained to the end."""
    found = {}
    for cell in CELLS + OTHER_CELLS:
        for path in RESULTS.glob(f'{cell.name}/seed0/cls_*/model{cell.iterations - 1}.index'):
            found[cell.name.replace('_', '-')] = path.parent
    return found


def run_named(run: str | Path) -> Path:
    """Returns the folder of a run that is named by its path or, if there is none, as published."""
    folder = Path(os.path.expanduser(run))
    return folder if folder.exists() else published().get(str(run), folder)


def known_names() -> str:
    """Tells the names of the published models: the end of a clause, '' if they are not here."""
    return f'; published models are {", ".join(published())}' if published() else ''


def table() -> list[str]:
    """Returns the lines of the models' table; accuracies are those on 600 test tasks."""
    lines = ['| name | images | way | shot | accuracy, % | size |', '|---|---|---|---|---|---|']
    cells = {cell.name: cell for cell in CELLS + OTHER_CELLS}
    for name, folder in published().items():
        cell = cells[name.replace('-', '_')]
        size = sum(file.stat().st_size for file in folder.glob('model*'))
        means, halves = (100 * values for values in usual_evaluation(folder))
        accuracy = f'{means[cell.updates]:.1f} ± {halves[cell.updates]:.1f}'
        images = next(text for source, text in IMAGES.items() if cell.name.startswith(source))
        way, shot = cell.settings['num_classes'], cell.settings['update_batch_size']
        lines.append(f'| {name} | {images} | {way} | {shot} | {accuracy} | {size / 1e6:.1f} MB |')
    return lines


if __name__ == '__main__':
    print(*table(), sep='\n')
