"""The data sources, a row each: what is particular to where tasks come from."""

from collections.abc import Callable
from typing import NamedTuple

from data_generator import DataGenerator, ImageGenerator, OmniglotGenerator, SinusoidGenerator
from fewshot.data.image_folders import load_miniimagenet, load_omniglot


class Source(NamedTuple):
    """A row of SOURCES. Of its tasks the generator tells more: see DataGenerator's attributes."""

    generator: type[DataGenerator]
    has_images: bool = True  # of classes, N of which make a task
    image_shape: tuple[int, int] | None = None  # height = width, channels; None: as flags say
    # (data_dir, splits, cache_dir) -> {split: ClassImages}; None: a folder of the user's own
    load: Callable | None = None
    flatten: bool = False  # the last layer of the network sees all pixels, else their mean
    clip: float | None = None  # of the meta-gradient
    queries: int | None = None  # Q, per class, in training; None: as many as shots
    arenas: int = 4  # of memory, see engine.devices.keep_freed_memory


SOURCES = {
    'sinusoid': Source(SinusoidGenerator, has_images=False),
    'omniglot': Source(
        OmniglotGenerator,
        image_shape=(28, 1),
        load=lambda data_dir, splits, cache_dir: load_omniglot(data_dir, cache_dir),
    ),
    'miniimagenet': Source(
        ImageGenerator,
        image_shape=(84, 3),
        load=load_miniimagenet,
        flatten=True,
        clip=10.0,
        queries=15,
        arenas=1,
    ),
    'folder': Source(ImageGenerator, flatten=True, clip=10.0, arenas=1),
}
OWN = Source(DataGenerator, has_images=False)  # tasks of the user's own, FILE.py:FUNCTION
IMAGE_SOURCES = [name for name, source in SOURCES.items() if source.has_images]


def source_of(name: str | None) -> Source:
    """The row of a --datasource."""
    return SOURCES.get(name, OWN)
