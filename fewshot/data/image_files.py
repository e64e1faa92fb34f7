"""Describes how images lie on disk, and decodes an image file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

FITS = ('crop', 'pad', 'squash')


class ImageLayout(NamedTuple):
    """The layout of a data set on disk, and the form in which its images are to be stored."""

    size: tuple  # (height, width) of the stored images
    mode: str  # Pillow mode they are converted to: 'L' (one channel) or 'RGB' (three)
    suffixes: tuple  # of its image files, lower case
    depth: int = 1  # of the class folders: 1 for <class>/, 2 for <Alphabet>/<character>/
    invert: bool = False  # store 255 - pixel
    resampling: int = Resampling.LANCZOS  # how images of another size are resized
    prepared: bool = False  # whether the files have that size already, so that others are mistakes
    # The treatment of images of another shape: 'crop' cuts off the longer side at both ends alike,
    # 'pad' fills the shorter one with white, 'squash' stretches.
    fit: str = 'squash'

    def name(self) -> str:
        """Returns a text that tells the caches of a folder apart, such as '84x84x3.crop'."""
        return f'{"x".join(map(str, self.shape(1)[1:]))}.{self.fit}'

    def shape(self, total: int) -> tuple:
        """Returns the shape of the array that holds `total` images."""
        return (total, *self.size, len(Image.new(self.mode, (1, 1)).getbands()))


OMNIGLOT = ImageLayout(
    (28, 28), 'L', ('.png',), depth=2, invert=True, resampling=Resampling.NEAREST, prepared=True
)
MINIIMAGENET = ImageLayout((84, 84), 'RGB', ('.jpg', '.jpeg', '.png'), prepared=True)


def folder_layout(image_size: int, channels: int, fit: str = 'crop') -> ImageLayout:
    """Returns the layout of class folders of any images.

    channels: 1 (grey) or 3 (colour). fit: one of FITS.
    """
    Image.init()  # Pillow knows few of its formats before
    formats = Image.registered_extensions().items()
    suffixes = tuple(sorted(suffix for suffix, name in formats if name in Image.OPEN))
    size, mode = (image_size, image_size), 'L' if channels == 1 else 'RGB'
    return ImageLayout(size, mode, suffixes, fit=fit)


def run_layout(settings: Mapping) -> ImageLayout:
    """Returns the layout of images given to a trained model: any file, any size.

    settings: the flags it was trained with, of which datasource, image_size, channels and fit
    count. Runs from before `fit` was a flag squash, and the original's data were squashed too.
    """
    if settings['datasource'] == 'omniglot':
        return OMNIGLOT._replace(prepared=False, suffixes=folder_layout(28, 1).suffixes)
    if settings['datasource'] == 'miniimagenet':
        return folder_layout(84, 3, 'squash')
    fit = settings.get('fit') or 'squash'
    return folder_layout(settings['image_size'], settings['channels'], fit)


def visible(folder: str | Path) -> list[os.DirEntry]:
    """Lists the entries of a folder, without the hidden ones, sorted by name."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith('.')]
    return sorted(visible, key=lambda entry: entry.name)


def class_folders(folder: str | Path, depth: int) -> list[tuple[str, str]]:
    """Lists (relative name, path) of the folders `depth` levels below, sorted level by level."""
    found = [('', str(folder))]
    for _ in range(depth):
        parents, found = found, []
        for parent, path in parents:
            folders = [entry for entry in visible(path) if entry.is_dir()]
            found += [(f'{parent}/{entry.name}'.lstrip('/'), entry.path) for entry in folders]
    return found


def image_files(folder: str | Path, layout: ImageLayout) -> list[str]:
    """Lists the paths of a folder's images, sorted by name."""
    return [file.path for file in image_entries(folder, layout)]


def image_entries(folder: str | Path, layout: ImageLayout) -> list[os.DirEntry]:
    """Lists the same images as entries, which know the size and the time of change."""
    files = [entry for entry in visible(folder) if entry.name.lower().endswith(layout.suffixes)]
    return [entry for entry in files if entry.is_file()]


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
            size, mode, fits = image.size[::-1], image.mode, _fits(image, layout)
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


def _fits(image: Image.Image, layout: ImageLayout) -> bool:
    """Whether an image has the layout's size, if that is for prepared images, and few enough bits.

    I and F are Pillow's modes of 32 bits; modes that begin with I; have 16.
    """
    if image.mode in ('I', 'F'):
        return False
    fits = image.size[::-1] == layout.size and not image.mode.startswith('I;')
    return fits or not layout.prepared


def _pixels(image: Image.Image, layout: ImageLayout) -> np.ndarray:
    """Converts an image to the layout, [height, width, channels] uint8.

    It is turned the way up that a camera noted, and is white where it is transparent.
    """
    if not layout.prepared:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;'):  # 16 bits, which Pillow's conversion would cut off at 255
        image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
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
