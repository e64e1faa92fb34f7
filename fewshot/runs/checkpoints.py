"""Checkpoints of this program and of the TensorFlow 1 original.

They are FOLDER/model{iteration}.index and .data-..., or FOLDER/best{iteration} of the best
validation; each is there whole or not at all.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import tensorflow as tf

from fewshot.checks import first_line
from maml import Arrays

CHECKPOINTS_KEPT = 10
OBJECT_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'  # in checkpoints of TensorFlow 2 only
RUN_STATE = 'run/.ATTRIBUTES/VARIABLE_VALUE'  # the entry that `write_checkpoint` adds
# The group of learned step sizes belongs to their names, as they may be called after weights.
PARAMETER_KEY = r'(?:weights/|norms/|(?=rates/))(.+)/\.ATTRIBUTES/VARIABLE_VALUE'
OPTIMIZERS = ('metatrain_optimizer', 'pretrain_optimizer')


def checkpoints(folder: str | Path, kind: str = 'model') -> dict[int, str]:
    """Returns {iteration: path without suffix} of a folder's checkpoints, the oldest first.

    kind: 'model' or 'best'.
    """
    names = (path.name for path in Path(folder).glob(f'{kind}*.index'))
    found = (re.fullmatch(kind + r'(0|[1-9][0-9]*)\.index', name) for name in names)
    iterations = sorted(int(match[1]) for match in found if match)
    return {i: str(Path(folder) / f'{kind}{i}') for i in iterations}


def other_runs(folder: str | Path) -> str:
    """Tells where there are runs near a folder that is none: the end of a clause, or ''."""
    folder = Path(folder)
    text = '' if folder.is_dir() else ', since there is no such folder'
    for place in (folder, folder.parent, folder.parent.parent):
        found = [*place.glob('*/*.index'), *place.glob('*/*/*.index')]
        runs = sorted({str(path.parent.relative_to(place)) for path in found})
        if runs:
            more = f' and {len(runs) - 3} more' if len(runs) > 3 else ''
            return f'{text}; {place} has the runs {", ".join(runs[:3])}{more}'
    return text


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or damaged; the text is one sentence for the user."""


def write_checkpoint(
    checkpoint: tf.train.Checkpoint,
    folder: str | Path,
    iteration: int,
    state: dict | None = None,
    kind: str = 'model',
) -> str:
    """Writes FOLDER/{kind}{iteration} whole, then removes all but the newest ten (best: one).

    state: all else that belongs to the run, kept as JSON. The original's checkpoints stay. Returns
    the path. Raises OSError if it cannot be written, and ValueError as `check_plain_path` does.
    """
    # tf.train.CheckpointManager would put a hyphen into the name, which the original does not have.
    path = check_plain_path(Path(folder) / f'{kind}{iteration}')
    run = tf.Variable(json.dumps({**(state or {}), 'iteration': iteration}))
    try:
        # The index comes last, so a checkpoint that has one is complete.
        tf.train.Checkpoint(checkpoint, run=run).write(path)
    except tf.errors.OpError as error:
        remove_leftovers(folder)
        raise OSError(f'{path} cannot be written ({first_line(error)})') from error
    kept = CHECKPOINTS_KEPT if kind == 'model' else 1
    for old in list(checkpoints(folder, kind).values())[:-kept]:
        with suppress(DamagedCheckpoint):
            if OBJECT_GRAPH in stored_values(old, OBJECT_GRAPH):  # it is this program's
                remove_checkpoint(old)
    return path


def is_plain_path(path: str | Path) -> bool:
    """Whether TensorFlow takes a path as it is; it takes others for patterns, or wants UTF-8."""
    return not re.search(r'[\[\]{}*?\\\udc80-\udcff]', Path(path).as_posix())


def check_plain_path(path: str | Path) -> str:
    """Returns a path as text. Raises ValueError if it is not plain."""
    if not is_plain_path(path):
        raise ValueError(
            f'{path}: TensorFlow cannot write or read checkpoints at such a path: rename the '
            'folder or give another, with a name in UTF-8 and without [ ] { } * ? \\'
        )
    return str(path)


def remove_checkpoint(path: str):
    """Removes a checkpoint, its index first: of a process that dies, leftovers remain."""
    files = Path(path).parent.glob(f'{Path(path).name}.*')
    for file in sorted(files, key=lambda file: file.suffix != '.index'):
        file.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path):
    """Removes the leftovers of checkpoints from a process that died, or found no space.

    These are files that have no index beside them, and TensorFlow's temporary files and folders.
    """
    for path in Path(folder).glob('*.data-*'):
        ours = re.fullmatch(r'((?:model|best)\d+)\.data-\d+-of-\d+(\.tempstate\d+)?', path.name)
        if ours and (ours[2] or not path.with_name(f'{ours[1]}.index').exists()):
            path.unlink(missing_ok=True)
    for path in Path(folder).glob('*.index.tempstate*'):
        path.unlink(missing_ok=True)
    for path in Path(folder).glob('*_temp'):
        if re.fullmatch(r'(model|best)\d+_temp', path.name):
            shutil.rmtree(path, ignore_errors=True)


def read_run_state(path: str, whole: bool = False) -> dict:
    """Returns the `state` that a checkpoint was written with, and its 'iteration'; empty without.

    whole: whether all else in it must be undamaged too. Raises DamagedCheckpoint, also if the file
    is that of another iteration by another name, and ValueError as `check_plain_path` does.
    """
    stored = stored_values(path, *([] if whole else [RUN_STATE]))
    if RUN_STATE not in stored:
        return {}
    state = json.loads(stored[RUN_STATE])
    if re.search(r'\d*$', str(path))[0] != str(state['iteration']):
        raise DamagedCheckpoint(
            f'{path} is not what its name says, but the checkpoint of iteration '
            f'{state["iteration"]}'
        )
    return state


def stored_values(path: str, *keys: str) -> dict[str, np.ndarray]:
    """Reads a checkpoint's values by TensorFlow's keys, and compares its checksums.

    keys: the keys that are asked for, if they are there; all if none is named. Raises
    DamagedCheckpoint, OSError if this process may not read it, which is no damage, and ValueError
    as `check_plain_path` does.
    """
    path = check_plain_path(path)
    for file in Path(path).parent.glob(f'{Path(path).name}.*'):
        open(file, 'rb').close()
    try:
        reader = tf.train.load_checkpoint(path)
        found = reader.get_variable_to_shape_map()
        return {key: reader.get_tensor(key) for key in found if not keys or key in keys}
    except Exception as error:  # OpError, ValueError, IndexError ...: it depends on the damage
        raise DamagedCheckpoint(
            f'{path} cannot be read as a checkpoint, it is damaged ({first_line(error)})'
        ) from error


def first_whole(candidates: dict[int, str], tell: Callable[[str], None]) -> tuple[int, str, dict]:
    """Finds the first whole one of a run's checkpoints: iteration, path, and state of the run.

    candidates: {iteration: path}, the best choice first. tell: is told of those that are damaged.
    Raises DamagedCheckpoint if all are.
    """
    for number, (iteration, path) in enumerate(candidates.items(), start=1):
        try:
            return iteration, path, read_run_state(path, whole=True)
        except DamagedCheckpoint as error:
            if number == len(candidates):
                raise
            tell(f'{error}; the one before it is used.')
    raise ValueError('there are no checkpoints')


def read_checkpoint(path: str, names: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads a checkpoint's parameters by name, and the names of optimizers whose state it holds.

    That is one of OPTIMIZERS, both in some of logs/results, none in those published without. names:
    those of the network's parameters, in the order in which it creates them. Raises
    DamagedCheckpoint, and ValueError if it has parameters that are not in `names`.
    """
    stored = stored_values(path)
    if OBJECT_GRAPH in stored:
        found = (re.fullmatch(PARAMETER_KEY, key) for key in stored)
        values = {match[1].replace('.S', '/'): stored[match[0]] for match in found if match}
    else:
        values = original_parameters(stored, names)
    if unknown := [name for name in values if name not in names]:
        raise ValueError(
            f'{path} is of another architecture: it has {", ".join(unknown)}, and the network that '
            'the flags describe has not'
        )
    optimizers = [name for name in OPTIMIZERS if any(key.startswith(f'{name}/') for key in stored)]
    return values, optimizers


def read_objects(path: str, objects: dict):
    """Gives objects of TensorFlow and Keras the state that a checkpoint has by these names."""
    status = tf.train.Checkpoint(**objects).read(path)
    # There is more in a checkpoint than this: the run's own state.
    status.assert_existing_objects_matched().expect_partial()


def original_parameters(stored: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Reads parameters by name from a checkpoint of the TensorFlow 1 original.

    The original left its biases, and all weights of the fully connected network, without names;
    TensorFlow called them Variable, Variable_1, ... in the order of `names`.
    """
    keys = [key for key in stored if re.match(r'model/(?!.*/Adam)', key)]
    values = {key.removeprefix('model/'): stored[key] for key in keys}
    for i, name in enumerate([name for name in names if name not in values]):
        unnamed = f'Variable_{i}' if i else 'Variable'
        if unnamed in values:
            values[name] = values.pop(unnamed)
    return values


def check_parameters(path: str, values: Arrays, variables: dict[str, tf.Variable]):
    """Raises ValueError if the parameters in a checkpoint are not those of the network."""
    for name, variable in variables.items():
        if name not in values:
            raise ValueError(
                f'{path} is of another architecture: it has no {name}, but {", ".join(values)}'
            )
        if values[name].shape != tuple(variable.shape):
            raise ValueError(
                f'{path} is of another architecture: {name} is {list(values[name].shape)} in it '
                f'and {variable.shape.as_list()} in the network that the flags describe'
            )
