"""Finds, chooses and checks the classes in folders of one's own images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_generator import (
    SMALLEST_TASK,
    SPLITS,
    ClassImages,
    TaskSize,
    check_split,
    deal_out,
    held_out,
    listed,
)
from fewshot.data.image_cache import cache_places, tell
from fewshot.data.image_files import (
    ImageLayout,
    class_folders,
    folder_layout,
    image_entries,
    visible,
)
from fewshot.data.image_folders import (
    Classes,
    check_classes,
    check_folder,
    count_images,
    load_classes,
)
from fewshot.data.run_classes import Counts, classes_of_run

SPLIT_FOLDERS = {  # what people call them
    'train': ('train',),
    'val': ('val', 'valid', 'validation', 'dev'),
    'test': ('test',),
}
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
    """Loads the classes of each split in a folder of one's own images; see OwnImages.

    Any format that Pillow reads will do; images become image_size x image_size, grey (channels 1)
    or colour (3), and transparency becomes white. The pixels are kept beside the folder.

    proportions: see deal_classes. fit: see ImageLayout. cache_dir: see cache_places.
    splits: the splits that are needed; other folders need not exist.
    Raises FileNotFoundError and ValueError as OwnImages does, and ValueError if an image cannot be
    read.
    """
    own = OwnImages(folder, folder_layout(image_size, channels, fit), splits)
    own.choose(proportions)
    return own.load(cache_dir)


class OwnImages:
    """The classes in a folder of one's own images, checked before any image is decoded.

    A class is a folder of images at any one depth below the folder, and is called after its path.
    Either folders `train`, `val` (or `valid`, `validation`, `dev`) and `test` hold the classes, or
    these are dealt out by their names alone.

    splits: the splits that are needed; other folders need not exist, and may hold too little.
    Attributes: classes, {split: {class: its image files}}, from `choose` on; counts, {split:
    {class: how many images}}, which a run keeps in its checkpoints.
    Raises FileNotFoundError if there is no such folder, and ValueError if two are the same split's.
    """

    def __init__(self, folder: str | Path, layout: ImageLayout, splits: Iterable[str] = SPLITS):
        self.folder, self.layout, self.splits = Path(folder), layout, [*splits]
        check_folder(self.folder)
        self.paths = split_folders(self.folder)
        self.dealt = not self.paths
        self.paths = self.paths or dict.fromkeys(SPLITS, self.folder)
        for split in self.splits:
            check_folder(self.paths.setdefault(split, self.folder / split))
        found = {path: own_classes(path, layout) for path in {*self.paths.values()}}
        self.found = {split: found[path] for split, path in self.paths.items()}
        self.classes, self.counts = {}, {}

    def choose(
        self,
        proportions: Sequence[float] = (0.64, 0.16, 0.2),
        size: TaskSize = SMALLEST_TASK,
        skip_small: bool = False,
        known: Mapping[str, Counts] | None = None,
    ):
        """Chooses the classes of each split; says on stderr which are left out.

        proportions: see deal_classes. size: that of the tasks. skip_small: whether to leave out
        classes that are too small for them. known: the counts of a run that goes on or is
        evaluated, see classes_of_run: it keeps its classes, and those added since are left out.
        Raises ValueError if there are no classes or they lie at different depths, if they are too
        few or too small for the splits that are needed, or are not those of the run.
        """
        for split in self.splits:
            lenient = skip_small or bool(known)
            check_classes(self.found[split], self.paths[split], skip_empty=lenient)
        if not known:
            self._tell_of_files()
        found = {split: count_images(classes) for split, classes in self.found.items()}
        chosen = classes_of_run(found, self.splits, known, self.folder) if known else None
        if chosen and skip_small:
            chosen |= self._large({split: chosen[split] for split in self.splits}, size)
        if not chosen:
            chosen = self._large(found, size) if skip_small else found
            if self.dealt:
                names = [*chosen['train']]
                dealt = deal_classes(names, proportions, size.ways, self.splits, self.folder)
                chosen = {split: {n: found[split][n] for n in dealt[split]} for split in dealt}
        self._check_sizes(chosen, size, first=not known)
        self.counts = chosen
        for split, names in chosen.items():
            self.classes[split] = {name: self.found[split][name] for name in names}

    def load(self, cache_dir: str | None = None) -> dict[str, ClassImages]:
        """Decodes the splits that are needed, or all if the classes were dealt out.

        Raises ValueError if an image cannot be read. cache_dir: see cache_places.
        """
        if self.dealt:
            chosen = {name for classes in self.classes.values() for name in classes}
            found = self.found['train'].items()
            images = self._load({name: files for name, files in found if name in chosen}, cache_dir)
            return {split: images.named(names) for split, names in self.classes.items()}
        return {split: self._load(self.classes[split], cache_dir, split) for split in self.splits}

    def _load(self, classes: Classes, cache_dir: str | None, *split: str) -> ClassImages:
        """Loads the images of some classes, of one split or of all."""
        places = cache_places(self.folder, *split, self.layout.name(), cache_dir=cache_dir)
        folder = self.paths[split[0]] if split else self.folder
        return load_classes(folder, self.layout, classes, places)

    def _large(self, counts: dict[str, Counts], size: TaskSize) -> dict[str, Counts]:
        """Returns the classes that have enough images; says on stderr which do not."""
        small = {name: n for part in counts.values() for name, n in part.items() if n < size.images}
        if small:
            shown = listed([f'{name} ({n})' for name, n in small.items()])
            tell(
                f'--skip_small_classes leaves out of {self.folder} what has fewer than '
                f'{size.images} images: {shown}.'
            )
        return {
            split: {name: n for name, n in part.items() if n >= size.images}
            for split, part in counts.items()
        }

    def _check_sizes(self, counts: dict[str, Counts], size: TaskSize, first: bool):
        """Raises ValueError if a split that is needed cannot fill a task.

        Before the first training it warns of other splits: a run keeps the classes it begins with.
        """
        for split, classes in counts.items():
            try:
                check_split(split, self.folder, classes, size, own=True)
            except ValueError as error:
                if split in self.splits:
                    raise
                if first and 'train' in self.splits:
                    tell(f'Training can do without, but an evaluation cannot: {error}.')

    def _tell_of_files(self):
        """Says which files of classes are no images, and which classes of splits share a name."""
        others = []
        for split in ['train'] if self.dealt else self.paths:
            for name in self.found[split]:
                files = [entry for entry in visible(self.paths[split] / name) if entry.is_file()]
                strange = [e for e in files if not e.name.lower().endswith(self.layout.suffixes)]
                others += [f'{name}/{entry.name}' for entry in strange]
        if others:
            tell(
                f'{len(others)} files in {self.folder} are left out, since Pillow reads no such '
                f'files: {listed(others)}.'
            )
        splits = Counter(name for classes in self.found.values() for name in classes)
        namesakes = [name for name, count in splits.items() if count > 1]
        if namesakes and not self.dealt:
            tell(
                f'Several splits in {self.folder} have folders of these names: '
                f'{listed(namesakes)}. They are taken for different classes; if they are the same '
                'ones, put the images of a class into one folder: MAML is tested on new classes.'
            )


def split_folders(folder: Path) -> dict[str, Path]:
    """Returns {split: its folder of classes}; empty if none of them holds any.

    Raises ValueError if two are the same split's, or all lie one level further down.
    """
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        there = [folder / name for name in names if (folder / name).is_dir()]
        holding = [path for path in there if class_folders(path, 1)]
        if len(holding) > 1:
            raise ValueError(
                f'{holding[0]} and {holding[1]} both hold validation classes: move those of one '
                'into the other, and remove it'
            )
        if holding:
            found[split] = holding[0]
    inside = class_folders(folder, 1)
    if not found and len(inside) == 1 and split_folders(Path(inside[0][1])):
        raise ValueError(f'the folders of the splits lie in {inside[0][1]}: give it as --data_dir')
    return found


def own_classes(folder: Path, layout: ImageLayout) -> Classes:
    """Finds the class folders at the first depth that has images, sorted level by level.

    Folders above that hold nothing at all are among them, as classes without images.
    """
    empty = {}
    for depth in range(1, MAX_DEPTH + 1):
        found = class_folders(folder, depth)
        classes = {name: image_entries(path, layout) for name, path in found}
        if any(classes.values()):
            return empty | classes
        empty |= {name: [] for name, path in found if not class_folders(path, 1)}
    return empty


def deal_classes(
    names: Sequence[str],
    proportions: Sequence[float],
    ways: int,
    splits: Sequence[str],
    folder: str | Path,
) -> dict[str, list[str]]:
    """Deals the sorted classes out to the splits; the result is a function of their names alone.

    proportions: those of train, val and test, at least one class each. If these cannot fill tasks
    of `ways` classes, neither for training nor in the `splits` that are needed, they are moved just
    so far that each split can. folder: for messages. Raises ValueError if there are too few
    classes.
    """
    count = len(names)
    if count < len(SPLITS):
        raise ValueError(
            f'{folder} has only {count} class folders, but training, validation and test need at '
            'least one each'
        )
    val, test = held_out(count, proportions)
    dealt = deal_out(count, val, test)
    if not any(all(len(dealt[s]) >= ways for s in some) for some in (('train', 'val'), splits)):
        if count < 3 * ways:
            raise ValueError(
                f'{folder} has {count} classes, but --num_classes={ways} takes {3 * ways}: {ways} '
                f'each for training, validation and test; add classes{remedies(count, ways)}'
            )
        val = max(ways, min(val, count - 2 * ways))
        dealt = deal_out(count, val, max(ways, min(test, count - ways - val)))
    return {split: [names[i] for i in chosen] for split, chosen in dealt.items()}


def remedies(count: int, ways: int) -> str:
    """Returns the end of a sentence: the flags that would do for so few classes."""
    found, fewer = [], count // 3
    if fewer > 1:  # one class alone is nothing to learn
        found.append(f'--num_classes={fewer}')
    if count > 2 * ways:
        shares = f'{count - ways - 1},{ways},1'
        found.append(f'--split={shares}, which leaves nothing to test on')
    return f', or give {" or ".join(found)}' if found else ''
