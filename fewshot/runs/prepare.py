"""Everything that a run needs, made from its flags."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from data_generator import DataGenerator
from fewshot.engine.devices import Replicas
from fewshot.engine.fast import FastMAML
from fewshot.networks.build import make_model, user_loss, user_network
from fewshot.networks.paper_networks import Convolutional, Normalization
from fewshot.runs.checkpoints import DamagedCheckpoint, checkpoints, read_run_state
from fewshot.runs.flag_checks import check_flags
from fewshot.runs.flags import iterations, model_settings, settings
from fewshot.runs.machine import make_replicas
from fewshot.runs.run_folder import begin_from, open_folder, restore_run, run_folder
from fewshot.runs.summaries import Log
from fewshot.runs.tasks import data_of_run, make_generators
from fewshot.runs.trainer import Schedule, Trainer
from fewshot.runs.user_code import is_spec
from fewshot.sources import source_of


class Options(NamedTuple):
    """What no flag says, but who calls the program may."""

    norm: Normalization | None = None  # instead of --norm
    start: Callable = lambda f: None  # is called with the flags before anything of TensorFlow
    compiled: bool = True
    updates: int = 10  # evaluated at least
    intervals: dict = {}  # of the Schedule, {name: iterations}
    printing: int = 100  # iterations between printed lines; times the source's print_factor


USUAL = Options()
LONG = 2000  # iterations, in which --one_program pays for its compilation
SMALL = 32  # pixels; of larger images that are pooled it saves 7 %, for up to a third more memory


class Prepared(NamedTuple):
    """Everything that a run needs; see `prepare`."""

    model: FastMAML
    generators: dict[str, DataGenerator]  # none if the run is complete
    folder: Path
    start: int  # the first iteration that is left
    state: dict  # of the checkpoint before it


def make_trainer(run: Prepared, f: flags.FlagValues, options: Options = USUAL) -> Trainer:
    """The training loop that the flags describe, and what it prints."""
    source, (pretrain, _) = run.generators['train'], iterations(f)
    schedule = Schedule(pretrain, sum(iterations(f)), **options.intervals)
    log = Log(
        source.objective,
        pretrain,
        schedule.end,
        f.num_updates if source.has_queries else None,
        options.printing * source.print_factor,
        run.start,
        run.state,
        run.folder if f.log and run.model.replicas.is_chief else None,
        f.original_output,
    )
    log.introduce(settings(f))
    return Trainer(
        run.model,
        run.generators,
        f.meta_batch_size,
        schedule,
        run.folder,
        log,
        run.start,
        run.state,
        settings(f) | source.model_settings | source.settled_flags,
        f.validation_tasks,
    )


def prepare(f: flags.FlagValues, held: ExitStack, options: Options = USUAL) -> Prepared:
    """Everything that can fail for the user's reasons, before anything is written.

    held: keeps the lock on the folder. Raises ValueError, OSError and UserCodeError.
    """
    check_flags(f)
    folder, total = run_folder(f), sum(iterations(f))
    replicas = make_replicas(f)
    replicas.slice_of(f.meta_batch_size)
    own = make_generators(f) if is_spec(f.datasource) else {}
    model = build_model(f, own, replicas, options, trained_seed(folder, f))
    iteration, state = restore_run(model, folder, f, held) if replicas.is_chief else (-1, {})
    if f.train and f.init and iteration < 0 and replicas.is_chief:
        begin_from(model, f)
    start = int(replicas.agree([np.int64(iteration)])[0]) + 1
    model.agree()
    f.one_program = bool(replicas.agree([np.int64(wants_one_program(f, model, state))])[0])
    model.set_programs(f.one_program)
    if f.train and start >= total:
        print(complete(start, f))
        return Prepared(model, {}, folder, start, state)
    generators = own or make_generators(f, data_of_run(replicas, iteration, state))
    if replicas.is_chief:
        open_folder(folder, f, start, held)
    if f.train and start > 0:
        print(f'Continuing at iteration {start} of {total}.')
    return Prepared(model, generators, folder, start, state)


def wants_one_program(f: flags.FlagValues, model: FastMAML, state: dict) -> bool:
    """Whether --one_program, or else the run, says so; of a new run, whether that pays.

    A run keeps its programs, since others round otherwise. state: of its checkpoint.
    """
    if f.one_program is not None:
        return f.one_program
    if 'flags' in state:
        return state['flags'].get('one_program') or False  # older ones do not tell
    network = model.network
    pays = isinstance(network, Convolutional) and (
        not f.max_pool or network.image_shape[0] <= SMALL
    )
    return f.train and pays and f.num_updates > 1 and f.metatrain_iterations >= LONG


def compiling(f: flags.FlagValues) -> str:
    """Says about how long compilation takes on two cores."""
    if f.train and f.one_program:
        return 'Compiling as one program, a minute or two.'
    return f'Compiling, about {"30" if source_of(f.datasource).has_images else "10"} s.'


def complete(done: int, f: flags.FlagValues) -> str:
    """Says that nothing is left to train."""
    total, joint = sum(iterations(f)), f.metatrain_iterations == 0
    if f.meta_lr_decay != 'none':
        return f'The run is complete: {done} of {total} iterations, and β has come to its end.'
    flag = '--pretrain_iterations' if joint else '--metatrain_iterations'
    of = f'of {total} iterations' if done == total else f'iterations, and {total} are asked for'
    return f'The run is complete: {done} {of}; raise {flag} for more.'


def build_model(
    f: flags.FlagValues,
    generators: dict[str, DataGenerator],
    replicas: Replicas | None = None,
    options: Options = USUAL,
    seed: int | None = None,
) -> FastMAML:
    """The model that the flags describe.

    generators: of the user's own tasks, whose sizes it takes. seed: if it is not --seed. Others as
    of `prepare`. Raises ValueError.
    """
    made = model_settings(f)
    for source in generators.values():
        made |= source.model_settings
    made |= {'norm': options.norm} if options.norm else {}
    made |= {} if seed is None else {'seed': seed}
    network = user_network(f.network, made, audit=f.train or None) if f.network else ''
    loss = user_loss(f.loss, made) if f.loss else None
    given = dict(replicas=replicas, network=network, loss=loss)
    return make_model(**made, compiled=options.compiled, **given)


def trained_seed(folder: Path, f: flags.FlagValues) -> int:
    """The seed of the run that is evaluated, --seed if it is not known.

    The weights come from the checkpoint, but what a user's network does not train, as a layer that
    is frozen, from the seed.
    """
    for path in () if f.train else reversed(checkpoints(folder).values()):
        with suppress(DamagedCheckpoint):
            return read_run_state(path).get('flags', {}).get('seed', f.seed)
    return f.seed
