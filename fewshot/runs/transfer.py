"""Takes a run to another device and back: an exported folder has all that the device needs.

FOLDER/step.mlir is the outer step, signature.json tells what its arguments are and of the run,
images.npy are the training images if there are any, and state{N}.npz the parameters and Adam's
state after N iterations.
"""

import inspect
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import flags

from data_generator import Batch, ClassImages, DataGenerator
from fewshot.engine.devices import Replicas, machine
from fewshot.engine.export import Step, export_step, state_variables
from fewshot.engine.exported import (
    IMAGES,
    PROGRAM,
    SIGNATURE,
    read_signature,
    read_state,
    states,
    write_state,
)
from fewshot.engine.fast import FastMAML
from fewshot.runs.checkpoints import (
    CHECKPOINTS_KEPT,
    checkpoints,
    read_run_state,
    write_checkpoint,
)
from fewshot.runs.flag_checks import check_flags
from fewshot.runs.flags import define_flags, iterations, settings
from fewshot.runs.prepare import build_model, complete, wants_one_program
from fewshot.runs.run_folder import (
    begin_from,
    check_contradictions,
    lock_folder,
    restore_run,
    run_folder,
)
from fewshot.runs.tasks import data_of_run, make_generators
from fewshot.runs.user_code import is_spec


def export_run(folder: Path, f: flags.FlagValues) -> str:
    """Writes the folder, whole or not at all, and returns a report.

    The run begins, or goes on, as main.py would with these flags. Raises ValueError, OSError and
    UserCodeError.
    """
    check_exportable(folder, f)
    model = build_model(f, {})
    with ExitStack() as held:
        iteration, run = restore_run(model, run_folder(f), f, held)
    if f.init and iteration < 0:
        begin_from(model, f)
    start, end = iteration + 1, f.metatrain_iterations
    if start >= end:
        raise ValueError(complete(start, f))
    f.one_program = wants_one_program(f, model, run)
    source = make_generators(f, data_of_run(Replicas(), iteration, run))['train']
    batch = source.batch('train', start, f.meta_batch_size)
    step = export_step(model, batch)
    loss, _ = model.meta_gradient(Batch(*map(tf.constant, batch)))
    kept = {'flags': settings(f) | source.settled_flags, 'classes': source.classes}
    kept |= {name: run[name] for name in ('best', 'printing') if name in run}
    signature = {'run': kept, 'start': start, 'end': end, 'loss': float(loss)}
    signature |= {'tasks': f.meta_batch_size, 'written': step.written}
    signature['state'] = {name: [*array.shape] for name, array in step.state.items()}
    write_folder(folder, step, signature, source)
    return f'{folder}: iterations {start} to {end}, {len(step.state)} arrays; first loss {loss:.6f}'


def check_exportable(folder: Path, f: flags.FlagValues):
    """Raises ValueError if these flags describe nothing that can be exported there."""
    check_flags(f)
    if folder.exists():
        raise ValueError(
            f'{folder} is there already, and is not replaced: remove it, or give another FOLDER'
        )
    if not f.train:
        raise ValueError('--train=False evaluates, and only training can be exported')
    if iterations(f)[0]:
        raise ValueError('joint training cannot be exported, but only meta-training')
    if is_spec(f.datasource):
        raise ValueError(
            f'--datasource={f.datasource}: tasks of your own cannot be exported, but sinusoids and '
            'images can'
        )


def write_folder(folder: Path, step: Step, signature: dict, source: DataGenerator):
    """Writes all files of an exported folder, whole or not at all. Raises OSError."""
    own = inspect.signature(type(source)).parameters.keys() - {'folders', 'splits'}
    signature |= {'generator': type(source).__name__, 'classes': {}}
    signature['arguments'] = {name: getattr(source, name) for name in own}
    beside = folder.with_name(f'{folder.name}.part')
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        if hasattr(source, 'folders'):
            classes = source.folders['train']
            signature['classes'] = classes.sizes()
            np.save(beside / IMAGES, images_of(classes))
        (beside / PROGRAM).write_text(step.program)
        (beside / SIGNATURE).write_text(json.dumps(signature, indent=1))
        write_state(beside, signature['start'], step.state, machine())
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def images_of(classes: ClassImages) -> np.ndarray:
    """Gathers the images of some classes, one class after the other: [total, H, W, C] uint8."""
    ranges = [np.arange(s, s + n) for s, n in zip(classes.starts, classes.counts)]
    return classes.images[np.concatenate(ranges)]


def import_run(folder: Path, logdir: str | None = None) -> str:
    """Makes checkpoints of the newest ten states of an exported folder, and returns a report.

    logdir: instead of the --logdir that was exported. The checkpoints that are there already stay
    as they are. Raises ValueError, OSError and UserCodeError.
    """
    signature = read_signature(folder)
    f = flags_of(signature['run']['flags'])
    f.logdir = logdir or f.logdir
    run, start = run_folder(f), signature['start']
    new = {done - 1: path for done, path in states(folder).items() if done > start}
    if not new:
        raise ValueError(f'{folder} holds no state but the exported one: train first')
    if later := [i for i in checkpoints(run) if i >= start and i not in new]:
        raise ValueError(
            f'{run} has trained on by itself, until iteration {later[-1]}: give another LOGDIR'
        )
    model = build_model(f, {})
    with ExitStack() as held:
        run.mkdir(parents=True, exist_ok=True)
        lock_folder(run, held)
        for iteration in [*new][-CHECKPOINTS_KEPT:]:
            if there := checkpoints(run).get(iteration):
                check_contradictions(there, iteration, read_run_state(there).get('flags', {}), f)
            else:
                trained_on = restore(model, new[iteration], signature)
                kept = {'best': None, 'printing': [[], []], 'machine': trained_on}
                write_checkpoint(model.checkpoint, run, iteration, kept | signature['run'])
    return f'{run}: model{max(new)} is the newest checkpoint'


def flags_of(stored: dict) -> flags.FlagValues:
    """Returns the flags of a run by their values."""
    values = flags.FlagValues()
    define_flags(values)
    values.mark_as_parsed()
    for name in stored.keys() & {*values}:
        values[name].value = stored[name]
    return values


def restore(model: FastMAML, path: Path, signature: dict) -> str:
    """Gives a model the values of a state; returns which machine wrote it. Raises ValueError."""
    state, trained_on = read_state(path, signature)
    variables = state_variables(model)
    for name, value in state.items():
        variables[name].assign(value)
    return trained_on
