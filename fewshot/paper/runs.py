"""The runs of the tables' cells, as the scripts in scripts/paper leave them."""

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np
import tensorflow as tf

from fewshot.checks import first_line
from fewshot.data import unpickling
from fewshot.data.cifar100 import SPLITS
from fewshot.paper.cells import CELLS, SINUSOIDS, Cell
from fewshot.runs.checkpoints import DamagedCheckpoint, checkpoints, read_run_state
from fewshot.runs.flags import FLAGS
from fewshot.runs.results import confidence, read_evaluation
from fewshot.runs.summaries import event_files, read_events

# Mean squared error of a sinusoid: its largest amplitude is 5, so predicting 0 has 25 at most.
DIVERGED = 100.0

# Flags that make a run another cell's, or none's; other settings make it another run of the cell.
TELLING = {'datasource', 'num_classes', 'update_batch_size', 'conv', 'stop_grad', 'baseline'}

# Those of the flags that say how a run is trained; its seed and length make it no other run.
DEFAULTS = {flag.name: flag.default for flag in FLAGS if flag.makes_model or flag.in_name}
del DEFAULTS['seed'], DEFAULTS['metatrain_iterations']


class Table(NamedTuple):
    """The results of one evaluation, over 0, 1, ... updates."""

    means: np.ndarray
    interval: np.ndarray  # half of the 95 % interval
    medians: np.ndarray  # over tasks: a few that diverge say nothing of the others
    iteration: int = -1  # of the checkpoint; -1: not told
    split: str = ''  # 'test' or 'val'; '': not told
    tasks: int = 600


class Run(NamedTuple):
    folder: Path
    flags: dict  # that it was trained with
    iterations: int  # of the newest checkpoint
    hours: float  # of training, by the time stamps of its summaries
    machine: str
    # By shots and by 'last' or 'best', of 600 tasks; more_tables: of the most tasks, if of more.
    tables: dict[tuple, Table]
    more_tables: dict[tuple, Table]
    # {flag: (its value, the cell's)} of settings that are not the cell's
    deviations: dict[str, tuple]

    @property
    def seed(self) -> int:
        return self.flags.get('seed', 0)

    @property
    def variant(self) -> str:
        """The settings that are not the cell's, to be added to its title."""
        return ''.join(f', --{name}={value}' for name, (value, _) in self.deviations.items())

    def evaluated(self, shots: int) -> int:
        """The iterations after which the last checkpoint was evaluated.

        They are fewer than all if the run was trained further since.
        """
        iteration = self.tables[shots, 'last'].iteration if (shots, 'last') in self.tables else -1
        return self.iterations if iteration < 0 else iteration + 1


def read_table(path: Path) -> Table:
    """Reads the files of an evaluation. Raises ValueError if they are not what main.py writes."""
    try:
        means, _, interval = read_evaluation(path)
        with path.with_suffix('.pkl').open('rb') as file:
            stored = unpickling.load(file)
        values = stored['mses']  # [600, 1 + updates]
        same = values.shape[1:] == means.shape
        if not same or not np.allclose(values.mean(0), means, rtol=1e-4, equal_nan=True):
            raise ValueError
        medians = np.median(np.where(np.isnan(values), np.inf, values), axis=0)
        iteration, split = int(stored.get('iteration', -1)), str(stored.get('split', ''))
        return Table(means, interval, medians, iteration, split, len(values))
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path.with_suffix(".pkl")} {error}') from None
    except Exception:  # of a table that is none, nearly any
        raise ValueError(
            f'{path} and {path.stem}.pkl are not the tables that main.py writes, '
            'or not of one evaluation'
        ) from None


def usual_evaluation(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads the usual evaluation: means and halves of intervals, over updates; None without one.

    It is the one on test tasks as in training; the names of others tell how they differ.
    """
    tables = sorted(folder.glob('test_ubs?*_stepsize*.csv'))
    usual = [path for path in tables if path.stem.count('_') == 2]
    return read_evaluation(usual[0])[::2] if usual else None


def differing(trained: dict, cell: Cell) -> dict[str, tuple]:
    """Returns {flag: (its value, the cell's)} for the flags of a run that are not the cell's."""
    found = {}
    for name, wanted in (DEFAULTS | cell.settings).items():
        value = trained.get(name, wanted)
        if value != wanted and str(value) != str(wanted):  # --norm=None is the text 'None'
            found[name] = value, wanted
    return found


def paper_figures(trained: dict, shots: int) -> dict[int, str]:
    """Returns {updates: the paper's figure after as many} for an evaluation; {} if it has none.

    trained: the flags of the run. shots: that of the evaluation.
    """
    joint = trained['metatrain_iterations'] == 0
    for cell in CELLS + SINUSOIDS:
        as_trained = joint == (cell.name == 'sinusoid_pretrain') and not differing(trained, cell)
        if as_trained and shots == cell.test_shots:
            return cell.figures
    return {}


def paper_hint(trained: dict, given: set[str]) -> str:
    """Tells what the paper's cell has where a run is left with defaults; '' if it has the same.

    trained: the flags of the run. given: the names of those that are not left to their defaults.
    """
    hints = []
    for cell in CELLS + SINUSOIDS:
        found = differing(trained, cell)
        if TELLING & found.keys():
            continue
        wanted = {name: value for name, (_, value) in found.items()}
        wanted['metatrain_iterations'] = cell.iterations
        left = [f'--{name}={value}' for name, value in wanted.items() if name not in given]
        script = f'bash scripts/paper/{cell.name}.sh'
        hints.append(left and f'The paper has {" ".join(left)} for {cell.title}: {script}')
    return hints[0] if hints and all(hints) else ''


def deviations(folder: Path, flags: dict, cell: Cell) -> dict[str, tuple]:
    """Returns {flag: (value, the cell's)} where a run has other settings.

    Raises ValueError if it is no run of the cell.
    """
    if not flags:
        raise ValueError(f'{folder} does not tell the flags it was trained with')
    found = differing(flags, cell)
    joint = flags.get('metatrain_iterations') == 0 and flags.get('baseline') != 'oracle'
    no_run = f'{folder} is no run of {cell.name}: it was'
    if joint != (cell.name == 'sinusoid_pretrain'):
        raise ValueError(f'{no_run} {"jointly trained" if joint else "meta-trained"}')
    telling = TELLING | {'update_lr'} if cell in SINUSOIDS else TELLING
    wrong = [
        f'--{name}={value}, not {wanted}'
        for name, (value, wanted) in found.items()
        if name in telling
    ]
    if wrong:
        raise ValueError(f'{no_run} trained with {"; ".join(wrong)}')
    return found


def check_classes(folder: Path, classes: dict | None, cell: Cell):
    """Raises ValueError if a run with --datasource=folder was trained on other classes."""
    wanted = SPLITS['cifar_fs'] if cell.settings['datasource'] == 'folder' else {}
    for split, labels in wanted.items():
        if split in (classes or {}) and {*classes[split]} != {*labels}:
            raise ValueError(
                f'{folder} is no run of {cell.name}: its {split} classes are not those of CIFAR-FS'
            )


def training_hours(folder: Path) -> float:
    """Computes the hours of training by the time stamps of the summaries; 0 if there are none."""
    seconds = 0.0
    for path in event_files(folder):
        times = [tf.compat.v1.Event.FromString(record).wall_time for record in read_events(path)]
        # A clock that was put back takes nothing away, and adds nothing.
        seconds += float(np.clip(np.diff(times), 0, None).sum())
    return seconds / 3600


# Shots, step size, tasks if not 600, whether of the validation classes, whether of the best.
TABLE_NAME = re.compile(r'test_ubs(\d+)_stepsize([^_]+)(?:_tasks(\d+))?(_val)?(_best)?\.csv')


def read_tables(folder: Path, update_lr: str | None) -> tuple[dict, dict]:
    """Reads the evaluations with this step size: of 600 tasks, and of the most test tasks if more.

    Each is {(shots, 'last' or 'best'): a Table}. update_lr: as in files' names; None: any. Raises
    ValueError if a file is damaged.
    """
    tables, more_tables, most = {}, {}, {}
    for path in sorted(folder.glob('test_ubs*_stepsize*.csv')):  # those of the test classes first
        match = TABLE_NAME.fullmatch(path.name)
        if not match or update_lr not in (None, match[2]):
            continue  # others are of --test_query and the like
        kind, tasks = (int(match[1]), 'best' if match[5] else 'last'), int(match[3] or 600)
        if tasks == 600 and kind not in tables:
            tables[kind] = read_table(path)
        if tasks > most.get(kind, 600) and not match[4]:
            most[kind], more_tables[kind] = tasks, read_table(path)
    return tables, more_tables


def read_run(folder: Path, cell: Cell) -> Run:
    """Reads a run. Raises OSError, and ValueError for a run that cannot be reported.

    The latter says what is missing, wrong or damaged.
    """
    found = checkpoints(folder)
    if not found:
        raise ValueError(f'{folder} holds no checkpoint')
    try:
        state = read_run_state(found[max(found)])
    except DamagedCheckpoint as error:
        raise ValueError(str(error)) from None
    flags, machine = state.get('flags', {}), state.get('machine', '')
    differing = deviations(folder, flags, cell)
    check_classes(folder, state.get('classes'), cell)
    update_lr = str(flags['update_lr']) if 'update_lr' in flags else None
    tables, more_tables = read_tables(folder, update_lr)
    if not tables:
        raise ValueError(f'{folder} has not been evaluated')
    trained = max(found) + 1, training_hours(folder), machine
    return Run(folder, flags, *trained, tables, more_tables, differing)


def read_runs(logs: Path, cell: Cell) -> Iterator[Run]:
    """Yields the runs of a cell, one for each seed; says which folders are left out, and why."""
    for folder in sorted((logs / cell.name).glob('seed*/cls_*')):
        if not folder.is_dir():
            continue
        try:
            yield read_run(folder, cell)
            continue
        except (ValueError, OSError) as error:
            fault = error
        except tf.errors.OpError as error:
            fault = f'{folder} has summaries that cannot be read ({first_line(error)})'
        print(f'report.py: left out: {fault}.', file=sys.stderr)


def pooled(tables: list[Table]) -> Table:
    """Pools the tables of several seeds: the mean, and its 95 % interval by Student's t over seeds.

    One seed alone has its own table, whose interval is over tasks.
    """
    if len(tables) == 1:
        return tables[0]
    size = min(len(table.means) for table in tables)
    means = np.array([table.means[:size] for table in tables])  # [seeds, 1 + updates]
    medians = np.array([table.medians[:size] for table in tables])
    return Table(means.mean(0), confidence(means), medians.mean(0))
