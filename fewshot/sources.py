"""The data sources, a row each, with all that is particular to one of them."""

from collections.abc import Callable
from typing import NamedTuple

from data_generator import DataGenerator, ImageGenerator, OmniglotGenerator, SinusoidGenerator
from fewshot.data.image_folders import load_miniimagenet, load_omniglot


class Source(NamedTuple):
    """A row of SOURCES. The generator tells more of its tasks: see DataGenerator's attributes."""

    generator: type[DataGenerator]
    # For a source without images: (shots, baseline, seed) -> its generator, and baseline -> the
    # numbers per example that its network takes and returns.
    make: Callable | None = None
    sizes: Callable | None = None
    # For a source with images of classes, N of which make a task:
    has_images: bool = False
    image_shape: tuple[int, int] | None = None  # height = width, channels; None: as flags say
    # (data_dir, splits, cache_dir) -> {split: ClassImages}; None: a folder of the user's own
    load: Callable | None = None
    flatten: bool = False  # the last layer of the network sees all pixels, else their mean
    queries: int | None = None  # Q, per class, in training; None: as many as shots
    clip: float | None = None  # of the meta-gradient
    # How it runs fast, see runs.machine.tune:
    threads: int | None = None  # for an operation; None: TensorFlow's choice
    # Whether XLA's older loops were tried: False, with the paper's network; True, with another.
    fusion_tried: tuple[bool, ...] = ()


SOURCES = {
    'sinusoid': Source(
        SinusoidGenerator,
        make=lambda shots, baseline, seed: SinusoidGenerator(
            shots, shots, oracle=baseline == 'oracle', seed=seed
        ),
        sizes=lambda baseline: (3 if baseline == 'oracle' else 1, 1),
        threads=1,
    ),
    'omniglot': Source(
        OmniglotGenerator,
        has_images=True,
        image_shape=(28, 1),
        load=lambda data_dir, splits, cache_dir: load_omniglot(data_dir, cache_dir),
        fusion_tried=(True, False),
    ),
    'miniimagenet': Source(
        ImageGenerator,
        has_images=True,
        image_shape=(84, 3),
        load=load_miniimagenet,
        flatten=True,
        queries=15,
        clip=10.0,
        fusion_tried=(False,),
    ),
    'folder': Source(
        ImageGenerator, has_images=True, flatten=True, clip=10.0, fusion_tried=(False,)
    ),
}
OWN = Source(DataGenerator)  # tasks of the user's own, FILE.py:FUNCTION
IMAGE_SOURCES = [name for name, source in SOURCES.items() if source.has_images]


def source_of(name: str | None) -> Source:
    """Returns the row of a --datasource."""
    return SOURCES.get(name, OWN)
