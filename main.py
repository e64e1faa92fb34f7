r"""Trains and evaluates MAML on sinusoids, Omniglot, miniImagenet, folders and tasks of your own.

    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 \
        --norm=None --update_batch_size=10
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 \
        --update_batch_size=1 --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/

trains in a folder of --logdir that is named after the flags. Repeat the command to continue; with
--train=False it evaluates the newest checkpoint on 600 validation tasks, with --train=False
--test_set=True on 600 test tasks. scripts/paper has a command for each result of the paper.
"""

import importlib.util
import os
import signal
import sys
from contextlib import ExitStack

from fewshot.runs.flags import read_command_line, settings
from fewshot.runs.terminal import Signals, keeps_programs, print_anything

if __name__ == '__main__':  # --help and a wrong flag need not wait for TensorFlow
    print_anything()
    read_command_line(sys.argv, __doc__)

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from fewshot.checks import first_line
from fewshot.data.user_tasks import BadTasks
from fewshot.paper.runs import paper_hint
from fewshot.runs.machine import tune, worker_index
from fewshot.runs.prepare import USUAL, Options, Prepared, compiling, make_trainer, prepare
from fewshot.runs.run_folder import take_run
from fewshot.runs.trainer import Diverged, evaluate_tasks
from fewshot.runs.user_code import UserCodeError, user_code

# By its place: in a notebook `utils` may be a module of the user's.
FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'utils.py')
SPEC = importlib.util.spec_from_file_location('maml_utils', FILE)
utils = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(utils)


def train(run: Prepared, f: flags.FlagValues, options: Options = USUAL):
    """Trains to the end, or until a signal; exits with 128 + its number then."""
    given = {name for name in settings(f) if f[name].present}
    if run.start == 0 and (hint := paper_hint(settings(f), given)):
        print(hint)
    trainer = make_trainer(run, f, options)
    with Signals() as signals:
        try:
            done = trainer.run(lambda: bool(signals.received))
            trainer.log.report(done)
        finally:
            trainer.log.close()
    end = trainer.schedule.end
    if done < end:
        print(
            f'Saved {run.folder}/model{done - 1}; {utils.command_again(settings(f))} continues at '
            f'iteration {done} of {end}.'
        )
        sys.exit(128 + (signals.received or signal.SIGTERM))  # another worker's signal stops all
    print(utils.next_steps(run, f))


def test(run: Prepared, f: flags.FlagValues, options: Options = USUAL):
    """Evaluates --test_tasks tasks before and after 1...10 updates; prints and writes it."""
    ((split, source),) = run.generators.items()
    updates, rows = max(f.num_updates, options.updates), []
    for row in evaluate_tasks(run.model, source, split, f.test_tasks, updates, f.transductive):
        rows.append(row)
        if sys.stdout.isatty():
            done = len(row) * len(rows)
            print(f'{done} of {f.test_tasks} tasks', end='\033[K\r', flush=True)
    values = np.concatenate(rows)[: f.test_tasks]  # [tasks, 1 + updates]
    values = values if source.has_queries else values[:, :1]
    statistics = utils.print_results(run, f, values)
    if run.model.replicas.is_chief:
        utils.write_results(run, f, values, statistics)


def main(arguments: list[str], f: flags.FlagValues = flags.FLAGS, options: Options = USUAL):
    """Trains or evaluates; arguments: the program and what else is there beside the flags."""
    logging.set_verbosity(logging.ERROR)
    if worker_index(f) > 0:
        sys.stdout = open(os.devnull, 'w', errors='ignore')  # the first one prints
    with ExitStack() as held:
        try:
            if len(arguments) > 1:
                raise ValueError(f'"{arguments[1]}" is no flag: flags are written --name=value')
            take_run(f)
            options.start(f)
            run = prepare(f, held, options)
        except (ValueError, OSError, UserCodeError) as error:
            sys.exit(f'main.py: {error}')
        if run.generators:
            what = 'training' if f.train else 'evaluation'
            print(f'Done initializing, starting {what}.\n{compiling(f)}', flush=True)
            carry_out(run, f, options)


def carry_out(run: Prepared, f: flags.FlagValues, options: Options):
    """Trains or evaluates; from now on, errors are told in one sentence."""
    try:
        with user_code(f.datasource, all_of_it=False), user_code(f.network, all_of_it=False):
            (train if f.train else test)(run, f, options)
    except BrokenPipeError:
        raise
    except (UserCodeError, BadTasks, Diverged, OSError) as error:  # the disk is full, say
        sys.exit(f'main.py: {error}')
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        sys.exit(
            f'main.py: there is not enough memory ({first_line(error)}): use a smaller '
            '--meta_batch_size, or other sizes of the tasks'
        )
    except tf.errors.OpError as error:
        if is_of_kept_program(error):
            sys.exit(
                f'main.py: a compiled program cannot be read or written ({first_line(error)}): see '
                'to the folder that TF_XLA_FLAGS names, or empty it'
            )
        if f.strategy != 'multi_worker':
            raise
        print(
            f'main.py: worker {worker_index(f)} lost another one ({first_line(error)}); start all '
            f'of them again: {utils.command_again(settings(f))} continues from the newest '
            f'checkpoint in {run.folder}',
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # leaving the cluster in order would wait for the one that is gone


def is_of_kept_program(error: tf.errors.OpError) -> bool:
    """Whether an error may come from the folder of compiled programs: absent, closed or damaged."""
    of_files = (
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.OutOfRangeError,
        tf.errors.DataLossError,
    )
    return keeps_programs() and (isinstance(error, of_files) or 'cache key' in str(error))


TUNED = Options(start=tune)


def program(arguments: list[str], options: Options = TUNED):
    """Runs main.py as a process of its own."""
    try:
        main(arguments, options=options)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == '__main__':
    app.run(program)
