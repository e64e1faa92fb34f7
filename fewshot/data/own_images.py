"""Folders of one's own images: their classes found, chosen and checked."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_generator import (
    SMALLEST_TASK,
    SPLITS,
    ClassImages,
    TaskSize,
    _deal_out,
    _held_out,
    check_split,
    listed,
)
from fewshot.data.image_cache import _tell
from fewshot.data.image_files import (
    ImageLayout,
    _class_folders,
    _image_files,
    _visible,
    folder_layout,
)
from fewshot.data.image_folders import _cache_of, _check_classes, _check_folder, _counts, _load
from fewshot.data.run_classes import Counts, classes_of_run

VALIDATION_FOLDERS = ('val', 'valid', 'validation', 'dev')  # what people call it
MAX_DEPTH = 5  # of class folders


def load_folder(
    folder: str,
    image_size: int = 84,
    channels: int = 3,
    proportions: Sequence[float] = (0.64, 0.16, 0.2),
    splits: Iterable[str] = SPLITS,
    fit: str = 'crop',
    cache_dir: str | None = None,
) -> dict[str, ClassImages]:
    """The classes of a folder of one's own, of each split; see OwnImages.

    Any format that Pillow reads; images become image_size x image_size, grey (channels 1) or colour
    (3), transparency white. The pixels are kept beside the folder.

    proportions: see deal_classes. fit: see ImageLayout. cache_dir: see load_class_folders.
    splits: those that are needed; other folders need not exist.
    Raises FileNotFoundError and ValueError as OwnImages does, and ValueError if an image cannot be
    read.
    """
    own = OwnImages(folder, folder_layout(image_size, channels, fit), splits)
    own.choose(proportions)
    return own.load(cache_dir)


class OwnImages:
    """The classes in a folder of one's own: found, chosen and checked before any is decoded.

    A class is a folder of images at any one depth below the folder, and is called after its path.
    Either folders `train`, `val` (or `valid`, `validation`, `dev`) and `test` hold the classes, or
    these are dealt out by their names alone.

    splits: those that are needed; other folders need not exist, and may hold too little.
    Attributes: classes, {split: {class: its image files}}, from `choose` on; counts, {split:
    {class: how many images}}, which a run keeps in its checkpoints.
    Raises FileNotFoundError if there is no such folder, and ValueError if two are the same split's.
    """

    def __init__(self, folder: str | Path, layout: ImageLayout, splits: Iterable[str] = SPLITS):
        self.folder, self.layout, self.splits = Path(folder), layout, [*splits]
        _check_folder(self.folder)
        self.paths = split_folders(self.folder)  # none if the classes are to be dealt out
        for split in self.splits if self.paths else ():
            _check_folder(self.paths.get(split, self.folder / split))
        if self.paths:
            self.found = {split: own_classes(path, layout) for split, path in self.paths.items()}
        else:
            self.found = dict.fromkeys(SPLITS, own_classes(self.folder, layout))
        self.classes, self.counts = {}, {}

    def choose(
        self,
        proportions: Sequence[float] = (0.64, 0.16, 0.2),
        size: TaskSize = SMALLEST_TASK,
        skip_small: bool = False,
        known: Mapping[str, Counts] | None = None,
    ):
        """Chooses the classes of each split; says on stderr what is left out.

        proportions: see deal_classes. size: of the tasks. skip_small: leaves out classes that are
        too small for them. known: the counts of a run that goes on or is evaluated, see
        classes_of_run: it keeps its classes, and those added since are left out.
        Raises ValueError if there are no classes or they lie at different depths, if they are too
        few or too small for the splits that are needed, or are not those of the run.
        """
        for split in self.splits:
            lenient = skip_small or bool(known)
            _check_classes(self.found[split], self.path(split), self.layout, None, lenient)
        if not known:
            self._tell_of_files()
        found = {split: _counts(classes) for split, classes in self.found.items()}
        chosen = classes_of_run(found, self.splits, known, self.folder) if known else None
        if chosen:
            needed = {split: chosen[split] for split in self.splits}
            chosen |= self._large(needed, size, skip_small)
        elif self.paths:
            chosen = self._large(found, size, skip_small)
        else:
            names = [*self._large(found, size, skip_small)['train']]
            dealt = deal_classes(names, proportions, size.ways, self.splits, self.folder)
            chosen = {split: {name: found[split][name] for name in dealt[split]} for split in dealt}
        self._check_sizes(chosen, size, first=not known)
        self.counts = chosen
        self.classes = {
            split: {name: self.found[split][name] for name in names}
            for split, names in chosen.items()
        }

    def load(self, cache_dir: str | None = None) -> dict[str, ClassImages]:
        """Decodes the splits that are needed, or all if the classes were dealt out.

        Raises ValueError if an image cannot be read. cache_dir: see load_class_folders.
        """
        kind, given = self.layout.kind(), (None, cache_dir)
        if self.paths:
            loaded = {}
            for split in self.splits:
                cache = _cache_of(self.folder, split, *kind)
                classes = self.classes[split]
                loaded[split] = _load(self.paths[split], self.layout, cache, classes, *given)
            return loaded
        chosen = {name for classes in self.classes.values() for name in classes}
        classes = {name: files for name, files in self.found['train'].items() if name in chosen}
        images = _load(self.folder, self.layout, _cache_of(self.folder, *kind), classes, *given)
        return {split: images.named(names) for split, names in self.classes.items()}

    def path(self, split: str) -> Path:
        """The folder that the split's classes lie in."""
        return self.paths[split] if self.paths else self.folder

    def _large(self, counts: dict[str, Counts], size: TaskSize, skip: bool) -> dict[str, Counts]:
        """The classes that have enough images; all, unless the others are to be skipped."""
        if not skip:
            return counts
        small = {name: n for part in counts.values() for name, n in part.items() if n < size.images}
        if small:
            shown = listed([f'{name} ({n})' for name, n in small.items()])
            _tell(
                f'--skip_small_classes leaves out of {self.folder} what has fewer than '
                f'{size.images} images: {shown}.'
            )
        return {
            split: {name: n for name, n in part.items() if n >= size.images}
            for split, part in counts.items()
        }

    def _check_sizes(self, counts: dict[str, Counts], size: TaskSize, first: bool):
        """Raises ValueError if a split that is needed cannot fill a task; warns of others."""
        for split in self.splits:
            check_split(split, self.folder, counts[split], size, own=True)
        for split in set(counts) - set(self.splits) if first and 'train' in self.splits else ():
            try:
                check_split(split, self.folder, counts[split], size, own=True)
            except ValueError as error:
                _tell(f'Training can do without, but an evaluation cannot: {error}.')

    def _tell_of_files(self):
        """Says which files are no images, and which classes of different splits are namesakes."""
        left_out = []
        for split in self.paths or ['train']:
            left_out += _other_files(self.path(split), self.found[split], self.layout)
        if left_out:
            kinds = Counter(Path(file).suffix.lower() or 'no suffix' for file in left_out)
            listed_kinds = ', '.join(f'{count} {kind}' for kind, count in kinds.most_common())
            _tell(
                f'{len(left_out)} files in {self.folder} are left out, since Pillow reads no such '
                f'files ({listed_kinds}): {listed(left_out)}.'
            )
        places = Counter(name for split in self.paths for name in self.found[split])
        namesakes = [name for name, count in places.items() if count > 1]
        if namesakes:
            folders = ', '.join(path.name for path in self.paths.values())
            _tell(
                f'Several of {folders} in {self.folder} have folders of these names: '
                f'{listed(namesakes)}. They are taken for different classes; if they are the same '
                'ones, put the images of a class into one folder: MAML is tested on new classes.'
            )


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of classes of each split; empty if none of them holds any.

    Raises ValueError if two are the same split's, or all lie one level further down.
    """
    found, inside = _split_folders(folder), _class_folders(folder, 1)
    if not found and len(inside) == 1 and _split_folders(Path(inside[0][1])):
        raise ValueError(f'the folders of the splits lie in {inside[0][1]}: give it as --data_dir')
    return found


def _split_folders(folder: Path) -> dict[str, Path]:
    """As split_folders, in this folder only."""
    found = {}
    for split in SPLITS:
        names = VALIDATION_FOLDERS if split == 'val' else (split,)
        there = [folder / name for name in names if (folder / name).is_dir()]
        holding = [path for path in there if _class_folders(path, 1)]
        if len(holding) > 1:
            raise ValueError(
                f'{holding[0]} and {holding[1]} both hold validation classes: move those of one '
                'into the other, and remove it'
            )
        if there:
            found[split] = (holding or there)[0]
    return found if any(_class_folders(path, 1) for path in found.values()) else {}


def own_classes(folder: Path, layout: ImageLayout) -> dict[str, list[os.DirEntry]]:
    """{class: image files}, sorted level by level: the folders where images begin.

    Folders without any at that depth or above, which have no folders either, are among them.
    """
    ends, level = {}, [('', str(folder))]
    for _ in range(MAX_DEPTH):
        below = []
        for name, path in level:
            inside = _class_folders(path, 1)
            below += [(f'{name}/{child}'.lstrip('/'), place) for child, place in inside]
            if name and not inside:
                ends[name] = []
        classes = {name: _image_files(path, layout) for name, path in below}
        if any(classes.values()):
            return ends | classes
        level = below
    return ends


def _other_files(folder: Path, classes: Iterable[str], layout: ImageLayout) -> list[str]:
    """Paths relative to the folder of the files in it and its classes that are no images."""
    places = {'': None}
    for name in classes:
        parts = name.split('/')
        places |= {'/'.join(parts[:i]): None for i in range(1, len(parts) + 1)}
    found = []
    for place in places:
        names = [entry.name for entry in _visible(str(folder / place)) if entry.is_file()]
        others = [name for name in names if not name.lower().endswith(layout.suffixes)]
        found += [f'{place}/{name}'.lstrip('/') for name in others]
    return found


def deal_classes(
    names: Sequence[str],
    proportions: Sequence[float],
    ways: int,
    splits: Sequence[str],
    folder: str | Path,
) -> dict[str, list[str]]:
    """Which of the sorted classes belong to which split; a function of their names alone.

    proportions: of train, val and test, at least one class each. If these cannot fill tasks of
    `ways` classes, neither for training nor in the `splits` that are needed, they are moved just so
    far that each split can. folder: for messages. Raises ValueError if there are too few classes.
    """
    count = len(names)
    if count < len(SPLITS):
        raise ValueError(
            f'{folder} has only {count} class folders, but training, validation and test need at '
            'least one each'
        )
    val, test = _held_out(count, proportions)
    dealt = _deal_out(count, val, test)
    if not any(all(len(dealt[s]) >= ways for s in some) for some in (('train', 'val'), splits)):
        _check_count(count, ways, folder)
        val = max(ways, min(val, count - 2 * ways))
        dealt = _deal_out(count, val, max(ways, min(test, count - ways - val)))
    return {split: [names[i] for i in chosen] for split, chosen in dealt.items()}


def _check_count(count: int, ways: int, folder: str | Path):
    """Raises ValueError, with what would do, if not every split can have `ways` classes."""
    if count >= 3 * ways:
        return
    remedies, most = [], count // 3
    if most > 1:
        remedies.append(f'--num_classes={most} --split={count - 2 * most},{most},{most}')
    if count > 2 * ways:
        shares = f'{count - ways - 1},{ways},1'
        remedies.append(f'--split={shares}, which leaves nothing to test on')
    remedy = f', or give {" or ".join(remedies)}' if remedies else ''
    raise ValueError(
        f'{folder} has {count} classes, but --num_classes={ways} takes {3 * ways}: {ways} each for '
        f'training, validation and test; add classes{remedy}'
    )
