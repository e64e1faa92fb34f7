"""The folder of a run: which checkpoint continues it, and who may write there."""

import os
import shlex
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from absl import flags

from fewshot.engine.fast import FastMAML
from fewshot.networks.inner_loops import LEARNED_RATES
from fewshot.paper.published import known_names, run_named
from fewshot.runs.checkpoints import (
    DamagedCheckpoint,
    check_plain_path,
    checkpoints,
    first_whole,
    other_runs,
    read_run_state,
    remove_checkpoint,
    remove_leftovers,
)
from fewshot.runs.flags import ANYTIME, FLAGS, INNER_LOOPS, NEVER, original_name, run_name
from fewshot.runs.summaries import event_files, forget_summaries
from fewshot.runs.trainer import Schedule
from fewshot.runs.user_code import is_spec


def run_folder(f: flags.FlagValues) -> Path:
    """Returns the folder of --run, or the one that is named after the flags.

    Runs of 1.0.0 have the original's names for all tasks and seeds, and keep them. Raises
    ValueError if no checkpoints can be there.
    """
    if f.run:
        return Path(check_plain_path(run_named(f.run)))
    logdir = Path(check_plain_path(os.path.expanduser(f.logdir)))
    folder, older = logdir / run_name(f), logdir / original_name(f)
    if not checkpoints(folder) and checkpoints(older):
        with suppress(DamagedCheckpoint):
            stored = read_run_state([*checkpoints(older).values()][-1]).get('flags', {})
            names = ('datasource', 'seed') if f.train else ()
            return older if all(stored.get(name) == f[name].value for name in names) else folder
    return folder


def begin_from(model: FastMAML, f: flags.FlagValues):
    """Gives a new run the weights of --init; a last layer that does not fit begins afresh.

    Raises ValueError if it is no run, or other layers do not fit.
    """
    folder = run_named(f.init)
    found = checkpoints(folder)
    if not found:
        raise ValueError(
            f'--init={f.init} must be a folder that main.py trained in, but it has no checkpoint'
            f'{other_runs(folder)}{known_names()}'
        )
    _, path, _ = first_whole(dict(reversed(found.items())), tell)
    try:
        left = model.begin_from(path)
    except ValueError as error:
        raise ValueError(f'{error}; give the flags of that run for the network') from error
    afresh = f'; {" and ".join(left)} begin afresh, since they do not fit' if left else ''
    print(f'Beginning with the weights of {path}{afresh}')


def find_checkpoints(folder: Path, f: flags.FlagValues) -> dict[int, str]:
    """Returns {iteration: path}, the best choice first, {} to start afresh. Raises ValueError."""
    found = checkpoints(folder, 'best' if f.test_iter == 'best' else 'model')
    if f.train and (not f.resume or not found and f.test_iter == -1):
        return {}
    if not found and f.test_iter == 'best' and checkpoints(folder):
        raise ValueError(
            f'--test_iter=best: {folder} has no best checkpoint; training keeps one from its first '
            f'validation on, at iteration {Schedule(0, 0).validation}: train on, or leave '
            f'--test_iter away for the newest, of iteration {max(checkpoints(folder))}'
        )
    if not found:
        raise ValueError(
            f'{folder} holds no checkpoint{other_runs(folder)}: train first with the same flags, '
            'or give --run=FOLDER, or --logdir, --train_update_batch_size and --train_update_lr of '
            'the training run'
        )
    if f.test_iter in (-1, 'best'):
        return dict(reversed(found.items()))
    if f.test_iter not in found:
        raise ValueError(
            f'--test_iter={f.test_iter}: {folder} has no such checkpoint, but those of the '
            f'iterations {", ".join(map(str, found))}'
        )
    return {f.test_iter: found[f.test_iter]}


def take_run(f: flags.FlagValues):
    """Sets flags that are not given to those that the run of --run was trained with.

    These are the ones that could not change in training, and where the data are, if they are there.
    Raises ValueError for a folder that is no run, and for flags that --run contradicts.
    """
    if not f.run or f.train:  # which `check_flags` refuses together
        return
    naming = ('logdir', 'train_update_batch_size', 'train_update_lr')
    if given := [f'--{name}' for name in naming if f[name].present]:
        raise ValueError(f'--run={f.run} names the folder already: leave {given[0]} away')
    stored = stored_flags(run_folder(f), f)
    for name in ('data_dir', 'cache_dir'):
        # Of another machine. A folder of one's own is told of; prepared data are the same anywhere.
        own = name == 'data_dir' and stored.get('datasource') == 'folder'
        if not own and not os.path.isdir(os.path.expanduser(stored.get(name, ''))):
            stored.pop(name, None)
    for name in ('datasource', 'network', 'loss'):
        # A checkpoint may come from anywhere: no file is run because it names it.
        if is_spec(stored.get(name, '')) and not f[name].present:
            raise ValueError(
                f'{f.run} was trained with --{name}={stored[name]}, which is not run unasked: give '
                'it again'
            )
    besides = ('data_dir', 'cache_dir', 'skip_small_classes', 'metatrain_iterations')
    for flag in FLAGS:
        taken = flag.may_change != ANYTIME or flag.name in besides
        if taken and flag.name in stored and not f[flag.name].present:
            f[flag.name].value = stored[flag.name]


def stored_flags(folder: Path, f: flags.FlagValues) -> dict:
    """Returns the flags in the checkpoint that --test_iter asks for. Raises ValueError if none."""
    if not any(checkpoints(folder, kind) for kind in ('model', 'best')):
        raise ValueError(
            f'--run={f.run} must be a folder that main.py trained in, LOGDIR/cls_..., but it has '
            f'no checkpoint{other_runs(folder)}{known_names()}'
        )
    _, _, state = first_whole(find_checkpoints(folder, f), lambda _: None)  # `load` tells of others
    if not state.get('flags'):
        raise ValueError(
            f'--run={f.run} does not tell the flags it was trained with: give them, and --logdir'
        )
    return state['flags']


def load(model: FastMAML, candidates: dict[int, str], f: flags.FlagValues) -> tuple[int, dict]:
    """Loads the first checkpoint that is whole; says which are not.

    Returns its iteration and state (-1 and {} if none). Raises ValueError if all are damaged, the
    flags contradict those that it was written with, or it is another network's.
    """
    if not candidates:
        return -1, {}
    try:
        iteration, path, state = first_whole(candidates, tell)
    except DamagedCheckpoint as error:
        raise ValueError(f'{error}; remove it, or name another with --test_iter') from error
    check_contradictions(path, iteration, state.get('flags', {}), f)
    try:
        complete = model.restore(path)
    except ValueError as error:
        raise ValueError(
            f'{error}; give the flags of the run that wrote it, or another --logdir'
        ) from error
    print(f'Restoring model weights from {path}')
    if f.train and not complete:
        print('The checkpoint holds the weights only, so Adam starts afresh.')
    return iteration, state


def tell(text: str):
    print(f'main.py: {text}', file=sys.stderr)


def check_contradictions(path: str, iteration: int, stored: dict, f: flags.FlagValues):
    """Raises ValueError with flags that are not those stored by the run up to this iteration."""
    # Runs of 1.0.0 have no such flags.
    stored = {'fit': 'squash', 'loss': ''} | INNER_LOOPS | stored
    held = {  # flags by which something has been learned: β so far would have been another
        'metatrain_iterations': f.train and stored.get('meta_lr_decay') == 'cosine',
        'update_lr': stored.get('learn_lr') in LEARNED_RATES,  # it was the beginning only
        'num_updates': stored.get('learn_lr') == 'layer_step' or stored.get('norm_steps'),
    }
    pretrained = min(stored.get('pretrain_iterations', 0), f.pretrain_iterations)
    sources = {stored.get('datasource'), f.datasource}
    free = {
        'fit': not f.fit,  # then it is the run's
        # So far it has trained jointly, and so it would have with the other number.
        'pretrain_iterations': f.baseline == 'oracle' or iteration < pretrained,
        # To evaluate the model of one on the other is no mistake.
        'datasource': not f.train and sources <= {'miniimagenet', 'folder'},
    }
    wrong = []
    for flag in FLAGS:
        name, value = flag.name, f[flag.name].value
        fixed = flag.may_change == NEVER or f.train and flag.may_change != ANYTIME or held.get(name)
        if fixed and not free.get(name) and stored.get(name, value) != value:
            wrong.append(f'--{name}={stored[name]} (now {value})')
    if wrong:
        remedy = 'give the same flags, or another --logdir'
        if f.run:
            remedy = 'no evaluation can change that, so leave it away'
        raise ValueError(f'{path} was trained with {", ".join(wrong)}: {remedy}')


def restore_run(
    model: FastMAML, folder: Path, f: flags.FlagValues, held: ExitStack
) -> tuple[int, dict]:
    """Locks a run's folder for training, and loads its checkpoint. Returns and raises as `load`."""
    if f.train and folder.is_dir():
        lock_folder(folder, held)
    candidates = find_checkpoints(folder, f)
    if f.train and not f.resume and checkpoints(folder) and not f.overwrite:
        raise ValueError(
            f'{folder} holds a run: leave --resume=False away to continue it, add --overwrite to '
            'remove it, or give another --logdir'
        )
    if f.train and f.test_iter != -1:
        check_nothing_later(folder, f.test_iter)
    return load(model, candidates, f)


def check_nothing_later(folder: Path, iteration: int):
    """Raises ValueError if a run has gone on after an iteration: it has one history."""
    last = max(checkpoints(folder))
    if last > iteration:
        names = [f'model{iteration}']
        names += [f'best{i}' for i in checkpoints(folder, 'best') if i <= iteration]
        copied = ' '.join(f'{shlex.quote(str(folder))}/{name}.*' for name in names)
        branch = f'OTHER/{folder.name}'
        raise ValueError(
            f'{folder} goes on after --test_iter={iteration} until iteration {last}: leave '
            f'--test_iter away to continue at the end, or branch off by `mkdir -p {branch}; cp -r '
            f'{copied} {branch}` and --logdir=OTHER'
        )


def lock_folder(folder: Path, held: ExitStack):
    """Keeps other processes from training in a folder, until `held` is left or this one has died.

    Does nothing where the system has no locks. Raises ValueError if another process trains there.
    """
    try:
        import fcntl  # not on Windows

        descriptor = os.open(folder, os.O_RDONLY)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f'{folder} is in use by another process that trains there: wait for it, or give '
            'another --logdir'
        ) from None
    except (ImportError, OSError):  # some network file systems have no locks either
        pass


def open_folder(folder: Path, f: flags.FlagValues, start: int, held: ExitStack):
    """Makes the run's folder, checks that it can be written, and clears what must not stay.

    With --overwrite that is the earlier run, else the files of later iterations from a process that
    died. Raises OSError and ValueError.
    """
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if f.train:
                lock_folder(folder, held)
        tempfile.TemporaryFile(dir=folder).close()
        if f.train:
            if f.overwrite:
                remove_run(folder)
            remove_leftovers(folder)
            forget_summaries(folder, start)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f'{folder} cannot be written ({reason}): give another --logdir') from error


def remove_run(folder: Path):
    """Removes the files that a run has written, and says so; other files in the folder stay."""
    count = len(checkpoints(folder))
    for kind in ('model', 'best'):
        for path in checkpoints(folder, kind).values():
            remove_checkpoint(path)
    tables = [*folder.glob('test_ubs*_stepsize*.csv'), *folder.glob('test_ubs*_stepsize*.pkl')]
    for path in [*event_files(folder), *tables]:
        path.unlink()
    print(f'Removed the earlier run in {folder}: {count} checkpoints, summaries and results.')
