"""Makes the tasks that flags describe."""

import json
import os

import numpy as np
from absl import flags

from data_generator import EVALUATION_SEED, DataGenerator, TaskSize
from fewshot.data.entries import nfc
from fewshot.data.image_files import folder_layout
from fewshot.data.own_images import OwnImages
from fewshot.data.run_classes import as_in_run
from fewshot.data.user_tasks import UserTasks
from fewshot.engine.devices import Replicas
from fewshot.runs.flags import split_proportions
from fewshot.runs.user_code import is_spec, user_code, user_function
from fewshot.sources import source_of


def make_generators(f: flags.FlagValues, run: dict | None = None) -> dict[str, DataGenerator]:
    """Returns {'train': ..., 'val': ...} for training, {'val' or 'test': ...} for evaluation.

    run: the run's knowledge of its data, see `data_of_run`.
    """
    splits = {'test' if f.test_set else 'val': EVALUATION_SEED}
    if f.train:
        splits = {'train': f.seed, 'val': EVALUATION_SEED}
    shots, source = f.update_batch_size, source_of(f.datasource)
    if source.make:
        return {split: source.make(shots, f.baseline, seed) for split, seed in splits.items()}
    if is_spec(f.datasource):
        own = user_function(f.datasource)()
        with user_code(f.datasource, all_of_it=False):
            return dict.fromkeys(splits, UserTasks(own, f.datasource, splits, f.meta_batch_size))
    run = run or {}
    try:
        folders, counts, settled = load_images(f, [*splits], run)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error} ({who_named(f)})') from error
    counts |= (f.train and run.get('classes')) or {}  # of splits that are not there any more too
    generators, given = {}, (folders, f.num_classes, shots, query_images(f))
    for split, seed in splits.items():
        generators[split] = made = source.generator(*given, seed=seed, splits=[split])
        made.classes, made.settled_flags = counts, settled
    return generators


def who_named(f: flags.FlagValues) -> str:
    """Says where --data_dir comes from."""
    if f.data_dir == f['data_dir'].default:
        return '--data_dir was not given'
    given = f['data_dir'].present or not f.run
    return '--data_dir names it' if given else f'the run in {f.run} names it as its --data_dir'


def load_images(f: flags.FlagValues, splits: list[str], run: dict) -> tuple[dict, dict, dict]:
    """Loads the classes of each split, with the counts and flags that `data_of_run` keeps."""
    data_dir, cache_dir = os.path.expanduser(f.data_dir), f.cache_dir or None
    source = source_of(f.datasource)
    known = run.get('classes') and {
        split: {nfc(name): n for name, n in classes.items()}
        for split, classes in run['classes'].items()
    }
    if source.load is None:
        fit = f.fit or run.get('fit', 'crop')
        layout = folder_layout(f.image_size, f.channels, fit, run.get('bits'))
        own = OwnImages(data_dir, layout, splits)
        size = TaskSize(f.num_classes, f.update_batch_size, query_images(f))
        own.choose(split_proportions(f.split), size, f.skip_small_classes, known)
        return own.load(cache_dir), own.counts, {'fit': fit, 'bits': own.layout.bits}
    folders = as_in_run(source.load(data_dir, splits, cache_dir), splits, known)
    counts = {split: classes.sizes() for split, classes in folders.items()}
    return folders, counts, {'fit': f.fit}


def data_of_run(replicas: Replicas, iteration: int, state: dict) -> dict:
    """Returns a run's knowledge of its data, the same in all workers; empty for a new run.

    'classes': {split: {class: how many images}}, None in checkpoints from before they were kept;
    'fit', 'bits': those of images of one's own. iteration, state: those of the checkpoint, as from
    `restore_run`.
    """
    stored = state.get('flags', {})
    data = {'fit': stored.get('fit') or 'squash', 'bits': stored.get('bits') or 16}
    data['classes'] = state.get('classes')
    text = np.frombuffer(json.dumps(data if iteration >= 0 else {}).encode(), np.uint8)
    (length,) = replicas.agree([np.int64(len(text))])
    numbers = np.int64(text) if replicas.is_chief else np.zeros(int(length), np.int64)
    (numbers,) = replicas.agree([numbers])
    return json.loads(bytes(np.uint8(numbers)))


def query_images(f: flags.FlagValues) -> int:
    """Returns Q, per class: the original's, unless --num_query or --test_query says otherwise."""
    asked = f.num_query if f.train else f.test_query
    if asked != -1:
        return asked
    queries = source_of(f.datasource).queries
    if queries and f.metatrain_iterations == 0:  # a plain network, which takes one image per class
        return 0
    return queries if queries and f.train else f.update_batch_size
