#!/usr/bin/env python
"""Copies what is worth keeping of a training run.

    python scripts/model/publish.py RUN_FOLDER TARGET

TARGET/NAME, where NAME is the run folder's, gets the results, the summaries of every 500th
iteration, a few pictures, the command, and the newest and the best checkpoint without Adam's state.
main.py evaluates it, and Learner.load, scripts/model/classify.py and scripts/model/export.py use
it, as the run itself; training that continues from it starts with a fresh Adam.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import tensorflow as tf
from absl import flags

from fewshot.runs.checkpoints import checkpoints, read_run_state, write_checkpoint
from fewshot.runs.flags import define_flags
from fewshot.runs.summaries import event_files, read_events
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import load, parser_of, refusals

SUMMARIES, PICTURES = 500, 20000  # the iterations between those that are kept


def interval(event: tf.compat.v1.Event) -> int:
    """Returns the iterations between two kept summaries of this kind; the run's flags are kept."""
    plugins = {value.metadata.plugin_data.plugin_name for value in event.summary.value}
    if 'hparams' in plugins:
        return 1
    return PICTURES if 'images' in plugins else SUMMARIES


def thin(source: Path, target: Path):
    """Copies some of the summaries, and the last of all, which tells the time that the run took."""
    records = read_events(source)
    with tf.io.TFRecordWriter(os.fsencode(target)) as writer:
        for i, record in enumerate(records):
            event = tf.compat.v1.Event.FromString(record)
            if event.step % interval(event) == 0 or i == len(records) - 1:
                writer.write(record)


def training_command(settings: dict) -> str:
    """Returns the call of main.py that trained so, without defaults and names of places."""
    defaults = flags.FlagValues()
    define_flags(defaults)
    given = []
    for name, value in settings.items():
        told = name in defaults and name not in ('logdir', 'data_dir', 'cache_dir')
        if told and value != defaults[name].value:
            given.append(f'--{name}={value}')
    return shlex.join(['python', 'main.py', *given])


def copy_weights(run_folder: Path, target: Path, which: int | str, *own: str) -> dict:
    """Writes a checkpoint, `which` as in `load`, without Adam's state. Returns its flags."""
    learner = load(run_folder, which, *own)
    target.mkdir(parents=True, exist_ok=True)
    weights = tf.train.Checkpoint(**learner.model.groups)
    state = read_run_state(learner.checkpoint)
    kind = 'best' if which == 'best' else 'model'
    write_checkpoint(weights, target, state['iteration'], state, kind)
    return learner.settings


def publish(run_folder: Path, target: Path, network: str = '', loss: str = '') -> Path:
    """Makes the new folder and returns it. Raises ValueError and OSError; nothing is left then."""
    folder = target / run_folder.resolve().name
    if folder.exists():
        raise ValueError(
            f'{folder} is there already, and is not replaced: remove it, or give another TARGET'
        )
    beside = folder.with_name(folder.name + '.part')
    shutil.rmtree(beside, ignore_errors=True)
    try:
        settings = copy_weights(run_folder, beside, -1, network, loss)
        if checkpoints(run_folder, 'best'):  # none of sinusoids
            copy_weights(run_folder, beside, 'best', network, loss)
        for path in [*run_folder.glob('test_ubs*.csv'), *run_folder.glob('test_ubs*.pkl')]:
            shutil.copy(path, beside)
        for path in event_files(run_folder):
            thin(path, beside / path.name)
        command = training_command(settings)
        (beside / 'command.txt').write_bytes(os.fsencode(f'{command}\n'))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__, checkpoint=False)
    parser.add_argument('target', type=Path, metavar='TARGET')
    values = parser.parse_args(arguments)
    with refusals(__file__):
        print(publish(values.run_folder, values.target, values.network, values.loss))


if __name__ == '__main__':
    print_anything()
    main()
