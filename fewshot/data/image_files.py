"""Describes how images lie on disk, and decodes an image file."""

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

from fewshot.data.entries import visible

FITS = ('crop', 'pad', 'squash')


class ImageLayout(NamedTuple):
    """The layout of a data set on disk, and the form in which its images are to be stored."""

    size: tuple  # (height, width) of the stored images
    mode: str  # Pillow mode they are converted to, 'L' or 'RGB'; each letter is a channel
    suffixes: tuple  # of its image files, lower case
    depth: int = 1  # of the class folders: 1 for <class>/, 2 for <Alphabet>/<character>/
    invert: bool = False  # store 255 - pixel
    resampling: int = Resampling.LANCZOS  # how images of another size are resized
    prepared: bool = False  # whether the files have that size already, so that others are mistakes
    # The treatment of images of another shape: 'crop' cuts off the longer side at both ends alike,
    # 'pad' fills the shorter one with white, 'squash' stretches.
    fit: str = 'squash'
    bits: int | None = 16  # of values in grey files of 16 bits; None: see `bits_of`

    def name(self) -> str:
        """Returns a text that tells the caches of a folder apart, such as '84x84x3.crop'."""
        bits = '' if self.bits == 16 else f'.{self.bits}bits'
        return f'{"x".join(map(str, self.shape(1)[1:]))}.{self.fit}{bits}'

    def shape(self, total: int) -> tuple:
        """Returns the shape of the array that holds `total` images."""
        return (total, *self.size, len(self.mode))


OMNIGLOT = ImageLayout(
    (28, 28), 'L', ('.png',), depth=2, invert=True, resampling=Resampling.NEAREST, prepared=True
)
MINIIMAGENET = ImageLayout((84, 84), 'RGB', ('.jpg', '.jpeg', '.png'), prepared=True)


def folder_layout(
    image_size: int, channels: int, fit: str = 'crop', bits: int | None = 16
) -> ImageLayout:
    """Returns the layout of class folders of any images.

    channels: 1 (grey) or 3 (colour). fit: one of FITS. bits: see ImageLayout.
    """
    Image.init()  # Pillow knows few of its formats before
    formats = Image.registered_extensions().items()
    suffixes = tuple(sorted(suffix for suffix, name in formats if name in Image.OPEN))
    size, mode = (image_size, image_size), 'L' if channels == 1 else 'RGB'
    return ImageLayout(size, mode, suffixes, fit=fit, bits=bits)


def run_layout(settings: Mapping) -> ImageLayout:
    """Returns the layout of images given to a trained model: any file, any size.

    settings: the flags it was trained with, of which datasource, image_size, channels, fit and
    bits count. Runs from before `fit` was a flag squash, and the original's data were squashed too.
    """
    if settings['datasource'] == 'omniglot':
        return OMNIGLOT._replace(prepared=False, suffixes=folder_layout(28, 1).suffixes)
    if settings['datasource'] == 'miniimagenet':
        return folder_layout(84, 3, 'squash')
    fit, bits = settings.get('fit') or 'squash', settings.get('bits') or 16
    return folder_layout(settings['image_size'], settings['channels'], fit, bits)


def image_files(folder: str | Path, layout: ImageLayout) -> list[str]:
    """Lists the paths of a folder's images, sorted by name."""
    return [file.path for file in image_entries(folder, layout)]


def image_entries(folder: str | Path, layout: ImageLayout) -> list[os.DirEntry]:
    """Lists the same images as entries, which know the size and the time of change."""
    files = [entry for entry in visible(folder) if entry.name.lower().endswith(layout.suffixes)]
    return [entry for entry in files if entry.is_file()]


def bits_of(images: Sequence[Sequence[os.DirEntry]]) -> int:
    """Returns how many bits hold the values of a data set's grey images of 16 bits: 8 to 16.

    Cameras and scanners write 10, 12 or 14, which would look black as 16. images: the files of each
    class; others than the first are read only if some of these have 16 bits.
    """
    largest = 0
    if any(largest_value(files[0]) for files in images if files):
        for file in itertools.chain(*images):
            largest = max(largest, largest_value(file))
            if largest >> 14:
                break
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits) if largest else 16


def largest_value(file: os.DirEntry) -> int:
    """Returns the largest value of a grey image of 16 bits; 0 of all others."""
    with contextlib.suppress(Exception), Image.open(file.path) as image:  # as in read_image
        return int(np.max(image)) if image.mode.startswith('I;') else 0
    return 0


def read_image(path: str, layout: ImageLayout, command: str | None = None) -> np.ndarray:
    """Reads one image, [height, width, channels] uint8.

    command: the command that makes the data, for messages. Raises ValueError if the image cannot be
    decoded, or is not of the layout's size if that is for prepared images.
    """
    remedy = 'replace it or remove it'
    if command:
        remedy = f'replace it, or move the data away and make it again with {command}'
    try:
        with Image.open(path) as image:
            size, mode = image.size[::-1], image.mode
            fits = mode not in ('I', 'F')  # of 32 bits; those that begin with I; have 16
            if layout.prepared:
                fits = fits and size == layout.size and not mode.startswith('I;')
            pixels = _pixels(image, layout) if fits else None
    except Exception as error:  # on damaged files OSError, SyntaxError, struct.error and others
        raise ValueError(f'{path} cannot be decoded ({error}); {remedy}') from error
    if not fits:
        expected = '{}x{} with at most 8'.format(*layout.size) if layout.prepared else 'at most 16'
        raise ValueError(
            f'{path} is {size[0]}x{size[1]} of mode {mode}, but images of {expected} bits per '
            f'channel are expected; {remedy}'
        )
    return ~pixels if layout.invert else pixels


def _pixels(image: Image.Image, layout: ImageLayout) -> np.ndarray:
    """Converts an image to the layout, [height, width, channels] uint8.

    It is turned the way up that a camera noted, and is white where it is transparent.
    """
    if not layout.prepared:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;'):  # 16 bits, which Pillow's conversion would cut off at 255
        values = np.asarray(image)
        if values.max() >> layout.bits:
            raise ValueError(f'{values.max()} is more than the {layout.bits} bits of the others')
        image = Image.fromarray(np.uint8(values >> layout.bits - 8))
    if image.has_transparency_data and not layout.prepared:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    image = image.convert(layout.mode)
    if image.size[::-1] != layout.size:
        image = _fitted(image, layout)
    return np.asarray(image).reshape(layout.shape(1)[1:])


def _fitted(image: Image.Image, layout: ImageLayout) -> Image.Image:
    """Returns the image in the layout's size, by its `fit`."""
    size = layout.size[::-1]  # (width, height)
    if layout.fit == 'crop':
        return ImageOps.fit(image, size, layout.resampling)
    if layout.fit == 'pad':
        return ImageOps.pad(image, size, layout.resampling, color='white')
    return image.resize(size, layout.resampling)
