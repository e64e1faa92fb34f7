"""Finds, chooses and checks the classes in folders of one's own images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from posixpath import basename, dirname

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
from fewshot.data.entries import class_folders, visible
from fewshot.data.image_cache import cache_places, tell
from fewshot.data.image_files import ImageLayout, bits_of, folder_layout
from fewshot.data.image_folders import Classes, load_classes, no_classes
from fewshot.data.own_folders import different, find_classes
from fewshot.data.run_classes import Counts, classes_of_run


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

    proportions: see deal_classes. splits: see OwnImages. fit: see ImageLayout. cache_dir: see
    cache_places. Raises FileNotFoundError and ValueError as OwnImages and its methods do.
    """
    own = OwnImages(folder, folder_layout(image_size, channels, fit, bits=None), splits)
    own.choose(proportions)
    return own.load(cache_dir)


class OwnImages:
    """The classes in a folder of one's own images, checked before any image is decoded.

    A class is a folder of images at any one depth below the folder, and is called after its path,
    in Unicode's form NFC. The folders of the splits, or lists, assign the classes to the splits,
    see find_classes; without these they are dealt out by their names alone.

    layout: if its bits are None, `load` finds them. splits: the splits that are needed; other
    folders need not exist, and may hold too little.
    Attributes: classes, {split: {class: its image files}}, from `choose` on; counts, {split:
    {class: how many images}}, which a run keeps in its checkpoints.
    Raises FileNotFoundError and ValueError as find_classes does.
    """

    def __init__(self, folder: str | Path, layout: ImageLayout, splits: Iterable[str] = SPLITS):
        self.folder, self.layout, self.splits = Path(folder), layout, [*splits]
        self.trees = find_classes(self.folder, layout, self.splits)
        self.dealt = len(different(self.trees.values())) == 1 < len(self.trees)
        self.found = {split: tree.classes for split, tree in self.trees.items()}
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
        Raises ValueError, with all that is wrong, if classes lie at different depths, are too few
        or too small for the splits that are needed, or are not those of the run.
        """
        self._leave_out_twins(known or {})
        if not known:
            self._tell_of_files()
        faults = self._faults(lenient=skip_small or bool(known))
        found = {
            split: {name: len(files) for name, files in classes.items() if files or not faults}
            for split, classes in self.found.items()
        }
        try:
            self.counts = self._chosen(found, proportions, size, skip_small, known)
            faults += self._unfilled(size, first=not known)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError('; '.join(faults))
        for split, names in self.counts.items():
            self.classes[split] = {name: self.found[split][name] for name in names}

    def _chosen(self, found: dict[str, Counts], proportions, size, skip_small, known) -> dict:
        """Chooses among {split: {class: how many images}}; other arguments as of `choose`."""
        chosen = classes_of_run(found, self.splits, known, self.folder) if known else None
        if chosen and skip_small:
            chosen |= self._large({split: chosen[split] for split in self.splits}, size)
        if not chosen:
            chosen = self._large(found, size) if skip_small else found
            if self.dealt:
                names = [*chosen['train']]
                dealt = deal_classes(names, proportions, size.ways, self.splits, self.folder)
                chosen = {split: {n: found[split][n] for n in dealt[split]} for split in dealt}
        return chosen

    def load(self, cache_dir: str | None = None) -> dict[str, ClassImages]:
        """Decodes the splits that are needed, or all if the classes were dealt out.

        Raises ValueError if an image cannot be read. cache_dir: see cache_places.
        """
        if self.layout.bits is None:
            files = [files for classes in self.found.values() for files in classes.values()]
            self.layout = self.layout._replace(bits=bits_of(files))
            if self.layout.bits < 16:
                tell(
                    f'No grey image of 16 bits in {self.folder} has a value of more than '
                    f'{self.layout.bits} bits, so that {2**self.layout.bits - 1} is white.'
                )
        if self.dealt:
            chosen = {name for classes in self.classes.values() for name in classes}
            found = self.found['train'].items()
            images = self._load({name: files for name, files in found if name in chosen}, cache_dir)
            return {split: images.named(names) for split, names in self.classes.items()}
        return {split: self._load(self.classes[split], cache_dir, split) for split in self.splits}

    def _load(self, classes: Classes, cache_dir: str | None, *split: str) -> ClassImages:
        """Loads the images of some classes, of one split or of all."""
        places = cache_places(self.folder, *split, self.layout.name(), cache_dir=cache_dir)
        folder = self.trees[split[0]].folder if split else self.folder
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

    def _unfilled(self, size: TaskSize, first: bool) -> list[str]:
        """Tells which splits that are needed cannot fill a task.

        Before the first training it warns of other splits: a run keeps the classes it begins with.
        """
        faults = []
        for split, classes in self.counts.items():
            try:
                check_split(split, self.folder, classes, size, own=True)
            except ValueError as error:
                if split in self.splits:
                    faults.append(str(error))
                elif first and 'train' in self.splits:
                    tell(f'Training can do without, but an evaluation cannot: {error}.')
        return faults

    def _faults(self, lenient: bool) -> list[str]:
        """Tells of classes without images in the splits that are needed, unless `lenient`.

        Raises ValueError if there are no classes, or they lie at different depths.
        """
        faults = []
        for tree in different(self.trees[split] for split in self.splits):
            fault = no_classes(tree.classes, tree.folder)
            if not tree.classes:
                raise ValueError(fault)
            empty = [tree.folders[name] for name, files in tree.classes.items() if not files]
            if mixed := [path for path in empty if class_folders(path, 1)]:
                raise ValueError(
                    f'{listed(mixed)} holds no images but folders, and other classes of '
                    f'{tree.folder} hold images: move folders so that all classes lie at one depth'
                )
            if fault and not lenient:
                faults.append(fault)
        return [*dict.fromkeys(faults)]

    def _leave_out_twins(self, known: Mapping[str, Counts]):
        """Leaves out what is beside a folder `images` and has its classes, as CUB's masks are.

        Says so, and which other folders hold classes of the same names. known: see `choose`.
        """
        used = {name for classes in known.values() for name in classes}
        for tree in different(self.trees.values()):
            count = Counter(map(basename, tree.classes))
            twins = [name for name in tree.classes if count[basename(name)] > 1]
            others = [name for name in twins if basename(dirname(name)) != 'images']
            if not twins or not used.isdisjoint(others):
                continue
            parents = listed([*dict.fromkeys(map(dirname, others))])
            if len(others) < len(twins):
                tell(f'{parents} in {tree.folder} is left out: images has classes of these names.')
                for name in others:
                    del tree.classes[name]
            elif not known:
                tell(
                    f'{parents} in {tree.folder} have classes of the same names: '
                    f'{listed([*dict.fromkeys(map(basename, twins))])}. They are taken for '
                    'different classes; if they are the same ones, give --data_dir one of these.'
                )

    def _tell_of_files(self):
        """Says what was read, what is left out, and which splits share the name of a class."""
        others, idle = [], []
        trees = different(self.trees.values())
        if lists := [str(tree.file) for tree in trees if tree.file]:
            tell(f'Classes and splits are those that {", ".join(lists)} tell.')
        for tree in trees:
            idle += tree.idle
            for name, path in tree.folders.items():
                files = [entry for entry in visible(path) if entry.is_file()]
                strange = [e for e in files if not e.name.lower().endswith(self.layout.suffixes)]
                others += [f'{name}/{entry.name}' for entry in strange]
        if others:
            tell(
                f'{len(others)} files in {self.folder} are left out, since Pillow reads no such '
                f'files: {listed(others)}.'
            )
        if idle:
            tell(f'Folders in {self.folder} without images are left out: {listed(idle)}.')
        splits = Counter(name for classes in self.found.values() for name in classes)
        namesakes = [name for name, count in splits.items() if count > 1]
        if namesakes and not self.dealt:
            tell(
                f'Several splits in {self.folder} have folders of these names: '
                f'{listed(namesakes)}. They are taken for different classes; if they are the same '
                'ones, put the images of a class into one folder: MAML is tested on new classes.'
            )


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
