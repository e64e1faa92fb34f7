"""Compares the classes that a run knows with those that are there."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from data_generator import ClassImages, listed
from fewshot.data.image_cache import tell

Counts = Mapping[str, int]  # {class: how many images}


def as_in_run(
    folders: Mapping[str, ClassImages], splits: Iterable[str], known: Mapping[str, Counts] | None
) -> dict[str, ClassImages]:
    """Returns the prepared data's classes that a run knows; raises the errors of classes_of_run."""
    folder = next(iter(folders.values())).folder
    found = {split: classes.sizes() for split, classes in folders.items()}
    chosen = classes_of_run(found, splits, known, folder) if known else None
    return {split: folders[split].named(names) for split, names in (chosen or found).items()}


def classes_of_run(
    found: Mapping[str, Counts],
    splits: Iterable[str],
    known: Mapping[str, Counts],
    folder: str | Path,
) -> dict[str, Counts] | None:
    """Returns the classes of each split that a run knows, in its order.

    Returns None if the data are others, of which the run knows no class: these may be evaluated on.

    found: the classes among which those of a split are. splits: the splits that are needed.
    known: the classes of the run, from its checkpoint.
    Raises ValueError with the difference if the run knows some of them, or is to be trained.
    """
    splits, used = [*splits], {name for classes in known.values() for name in classes}
    wrong = [text for split in splits for text in differences(split, found[split], known)]
    if wrong and 'train' not in splits and all(used.isdisjoint(found[s]) for s in splits):
        if used and all(split in known for split in splits):
            tell(f'The run knows no class of {folder}: they are new to it.')
        return None
    if wrong:
        raise ValueError(
            f'the run has other data than {folder}: {"; ".join(wrong)}. Give the --data_dir that '
            'it was trained with, or to train anew another --logdir; to evaluate on new classes, '
            "a folder with none of the run's"
        )
    chosen = {}
    for split in [split for split in known if split in found]:
        chosen[split] = {name: found[split][name] for name in known[split] if name in found[split]}
    added = [*dict.fromkeys(name for s in chosen for name in found[s] if name not in used)]
    if added:
        tell(f'Classes in {folder} that the run does not know are left out: {listed(added)}.')
    return chosen


def differences(split: str, found: Counts, known: Mapping[str, Counts]) -> list[str]:
    """Lists, as texts, how a split's classes differ from those that the run knows."""
    if split not in known:
        used = [name for name in found if any(name in classes for classes in known.values())]
        return [f'it knows no {split} classes, and used {listed(used)} otherwise']
    wanted = known[split]
    missing = [name for name in wanted if name not in found]
    texts = [f'of {len(wanted)} {split} classes it misses {listed(missing)}'] if missing else []
    others = [name for name in wanted if found.get(name, wanted[name]) != wanted[name]]
    return texts + [f'{n} has {found[n]} images and had {wanted[n]}' for n in others]
