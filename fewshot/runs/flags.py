"""The flags of a run, all of them in one table, and what a run is called after them."""

import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from absl import app, flags

from fewshot.data.entries import nfc
from fewshot.data.image_files import FITS
from fewshot.runs.user_code import is_spec
from fewshot.sources import SOURCES


class Parser(flags.ArgumentParser):
    """convert: from the argument to the value, None if it is not `text`, what there is."""

    def __init__(self, convert: Callable, text: str):
        self.convert, self.text = convert, text

    def parse(self, argument):
        value = self.convert(argument)
        if value is None:
            raise ValueError(f'it must be {self.text}, but it is {argument}')
        return value

    def flag_type(self) -> str:
        return self.text


def checkpoint_named(argument: str | int) -> str | int | None:
    """An iteration, -1 or 'best'; None if it is none of them."""
    if argument == 'best':
        return argument
    with suppress(ValueError):
        return int(argument) if int(argument) >= -1 else None


def source_named(argument: str) -> str | None:
    return argument if argument in SOURCES or is_spec(argument) else None


class Rule(NamedTuple):
    """What the value of a flag must be."""

    holds: Callable
    text: str  # --name must be ..., but it is ...


class Flag(NamedTuple):
    """A flag: all that is particular to it."""

    name: str
    kind: type | tuple | flags.ArgumentParser  # a tuple holds the values that there are
    default: object
    # Whether it may change when a run is continued or evaluated: ANYTIME; in EVALUATION only;
    # or NEVER, since the network or the classes would be others.
    may_change: str
    meaning: str
    rule: Rule | None = None
    lowest: int | None = None  # that absl lets pass
    makes_model: bool = False  # whether maml.make_model takes it
    # The value's part of the run's name: of every value; or a format of all but the default.
    in_name: Callable | str | None = None

    def part_of_name(self, value) -> str:
        if isinstance(self.in_name, str):
            return '' if value == self.default else self.in_name.format(value)
        return self.in_name(value) if self.in_name else ''


def split_proportions(text: str) -> tuple[float, ...] | None:
    """The value of --split; None if it is none."""
    try:
        values = tuple(map(float, text.split(',')))
    except ValueError:
        return None
    return values if len(values) == 3 and all(0 < v < float('inf') for v in values) else None


def or_minus_one(rule: Rule, meaning: str) -> Rule:
    return Rule(lambda value: value == -1 or rule.holds(value), f'{rule.text}, or -1 for {meaning}')


ANYTIME, EVALUATION, NEVER = 'anytime', 'in evaluation', 'never'
POSITIVE = Rule(lambda value: value >= 1, 'at least 1')
STEP_SIZE = Rule(lambda value: 0 <= value < float('inf'), 'a step size of 0 or more')
SPLIT = Rule(split_proportions, 'three numbers above 0, for train, val and test, as 0.64,0.16,0.2')
CHANNELS = Rule(lambda value: value in (1, 3), '1 (grey) or 3 (colour)')
TRAIN_SHOTS = or_minus_one(POSITIVE, 'that of --update_batch_size')
TRAIN_STEP_SIZE = or_minus_one(STEP_SIZE, 'that of --update_lr')
NETWORK = Rule(lambda value: value == '' or is_spec(value), 'FILE.py:FUNCTION')
FOLDER = Rule(lambda value: '://' not in value, 'a folder, not an address')
TEST_QUERY = or_minus_one(POSITIVE, 'as many as shots')
# Symbols are the paper's. The flags that name a run stand in the order of the name.
# fmt: off
TASKS = (
    Flag('datasource', Parser(source_named, f'{", ".join(SOURCES)}, or FILE.py:FUNCTION'),
         'sinusoid', NEVER,
         'where tasks come from: sinusoid, omniglot, miniimagenet, folder, or FILE.py:FUNCTION, '
         'which returns tasks of your own', makes_model=True),
    Flag('data_dir', str, 'data', ANYTIME,
         'folder of the prepared data, or of your own class folders', FOLDER),
    Flag('split', str, '0.64,0.16,0.2', NEVER,
         'shares of the classes that train, val and test get, where the data has no split '
         '(folder only)', SPLIT),
    Flag('image_size', int, 84, NEVER,
         'height and width that images are resized to (folder only)', POSITIVE, makes_model=True),
    Flag('channels', int, 3, NEVER, '3: colour, 1: grey (folder only)', CHANNELS, makes_model=True),
    Flag('fit', FITS, None, EVALUATION,
         'images that are not square: crop, pad (with white) or squash (folder only; default: as '
         'the run has it, a new one crops)'),
    Flag('skip_small_classes', bool, False, ANYTIME,
         'leave out classes that have too few images for a task (folder only)'),
    Flag('cache_dir', str, '', ANYTIME,
         "where decoded images are kept (default: beside the data or, if that cannot be written, "
         "in the user's cache folder)"),
)
TRAINING = (
    Flag('seed', int, 0, EVALUATION,
         'random seed of initial weights and training tasks', lowest=0, makes_model=True),
    Flag('init', str, '', EVALUATION,
         'start from the weights of this run, a folder or a published model'),
    Flag('pretrain_iterations', int, 0, EVALUATION,
         'iterations of joint training on all tasks, before meta-training', lowest=0),
    Flag('metatrain_iterations', int, 15000, ANYTIME,
         'iterations of meta-training', lowest=0, makes_model=True),
    Flag('num_classes', int, 5, NEVER,
         'N, ways: classes of a task (images only)', POSITIVE, makes_model=True,
         in_name='cls_{}'.format),
    Flag('meta_batch_size', int, 25, EVALUATION,
         'T, tasks per iteration', POSITIVE, in_name='.mbs_{}'.format),
    Flag('update_batch_size', int, 5, EVALUATION,
         'K, shots: support examples per class', POSITIVE, makes_model=True,
         in_name='.ubs_{}'.format),
    Flag('num_query', int, -1, EVALUATION,
         'Q, query images per class in training (-1: 15 for miniimagenet, else K; images only)',
         TEST_QUERY, in_name='.query_{}'),
    Flag('num_updates', int, 1, EVALUATION,
         'inner updates in training', POSITIVE, makes_model=True, in_name='.numstep{}'.format),
    Flag('update_lr', float, 1e-3, EVALUATION,
         'α, step size of the inner loop', STEP_SIZE, makes_model=True,
         in_name='.updatelr{}'.format),
    Flag('meta_lr', float, 1e-3, EVALUATION,
         'β, step size of the outer loop (Adam)', STEP_SIZE, makes_model=True),
)
MODEL = (
    Flag('num_filters', int, 64, NEVER,
         'filters per convolution: 64 for Omniglot, 32 for miniImagenet', POSITIVE,
         makes_model=True, in_name='hidden{}'),
    Flag('conv', bool, True, NEVER,
         'True: convolutional network (images only); False: fully connected', makes_model=True),
    Flag('max_pool', bool, False, NEVER,
         'True: max-pooling; False: strided convolutions', makes_model=True, in_name='maxpool'),
    Flag('stop_grad', bool, False, EVALUATION, 'first-order MAML: faster', makes_model=True,
         in_name='stopgrad'),
    Flag('baseline', ('oracle', 'None'), None, NEVER,
         'oracle: amplitude and phase are inputs (sinusoid only)', makes_model=True,
         in_name=lambda value: 'oracle' if value == 'oracle' else ''),
    Flag('norm', ('batch_norm', 'layer_norm', 'None'), 'batch_norm', NEVER,
         'normalisation: batch_norm, layer_norm or None', makes_model=True,
         in_name={'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}.get),
    Flag('network', str, '', NEVER,
         'FILE.py:FUNCTION(image_shape, num_classes), returns the Keras model to use (not for '
         'sinusoid)', NETWORK,
         in_name=lambda value: f'.{value.rpartition(":")[2]}' if value else ''),
    Flag('loss', str, '', NEVER,
         'FILE.py:FUNCTION(outputs, labels), from [T, examples, out] each to losses [T]', NETWORK,
         in_name=lambda value: f'.loss_{value.rpartition(":")[2]}' if value else ''),
)
VARIANTS = (
    Flag('adapt', ('all', 'head', 'body'), 'all', NEVER,
         'what the inner loop changes: all; head, the last layer (ANIL); body, the others (BOIL)',
         makes_model=True, in_name='.{}'),
    Flag('learn_lr', ('none', 'layer', 'layer_step', 'weight'), 'none', NEVER,
         'learn α, from --update_lr on: none; layer; layer_step, one per layer and update '
         '(MAML++); weight (Meta-SGD)', makes_model=True, in_name='.lr_{}'),
    Flag('loss_steps', ('last', 'all'), 'last', EVALUATION,
         'query losses that count: last, after the last update; all, weighted over the updates '
         '(MAML++)', makes_model=True, in_name='.losses_{}'),
    Flag('loss_steps_iterations', int, 0, EVALUATION,
         'iterations over which --loss_steps=all moves its weights to the last update (0: equal '
         'weights, always)', lowest=0, makes_model=True, in_name='{}'),
    Flag('first_order_iterations', int, 0, EVALUATION,
         'first-order iterations at the start (MAML++)', lowest=0, makes_model=True,
         in_name='.first{}'),
    Flag('norm_steps', bool, False, NEVER,
         'separate normalisation parameters for each update (MAML++)', makes_model=True,
         in_name='.normsteps'),
    Flag('meta_lr_decay', ('none', 'cosine'), 'none', EVALUATION,
         'none, or cosine: let β fall over --metatrain_iterations (MAML++)', makes_model=True,
         in_name='.{}'),
    Flag('meta_lr_end', float, 0.0, EVALUATION,
         'β at the end of the decay', STEP_SIZE, makes_model=True, in_name='{}'),
)
OUTPUT = (
    Flag('log', bool, True, ANYTIME, 'write summaries for TensorBoard'),
    Flag('original_output', bool, False, ANYTIME,
         "also print the original program's lines"),
    Flag('logdir', str, 'logs', ANYTIME, 'folder in which runs get a folder each', FOLDER),
    Flag('resume', bool, True, ANYTIME, 'continue from the newest checkpoint of the same run'),
    Flag('overwrite', bool, False, ANYTIME,
         'with --resume=False: delete the earlier run of that name'),
    Flag('validation_tasks', int, 100, EVALUATION,
         'tasks of a validation during training (images only)', lowest=2),
)
EVALUATING = (
    Flag('train', bool, True, ANYTIME, 'True: train; False: evaluate'),
    Flag('run', str, '', ANYTIME,
         'run to evaluate, a folder or a published model; its flags count unless you give others'),
    Flag('test_iter', Parser(checkpoint_named, 'an iteration, -1 or best'), -1, ANYTIME,
         'checkpoint to load: an iteration, -1 (newest) or best (best validation)'),
    Flag('test_set', bool, False, ANYTIME,
         'True: evaluate on test classes; False: on validation classes'),
    Flag('test_tasks', int, 600, ANYTIME, 'tasks of an evaluation', lowest=2),
    Flag('test_query', int, -1, ANYTIME,
         'query images per class in evaluation (-1: K; images only)', TEST_QUERY),
    Flag('transductive', bool, True, ANYTIME,
         'True: normalise queries by their own batch; False: by the support set, so that each is '
         'answered alone'),
    Flag('train_update_batch_size', int, -1, ANYTIME,
         'K used in training, when evaluating with another K (-1: the same)', TRAIN_SHOTS),
    Flag('train_update_lr', float, -1, ANYTIME,
         'α used in training, when evaluating with another α (-1: the same)', TRAIN_STEP_SIZE),
)
DEVICES = (
    Flag('strategy', ('none', 'mirrored', 'multi_worker'), 'none', ANYTIME,
         'none; mirrored: all GPUs of this machine share the tasks; multi_worker: several '
         'processes do, set by TF_CONFIG'),
    Flag('tf32', bool, False, ANYTIME,
         'let GPUs compute float32 products faster and less exactly'),
    Flag('one_program', bool, None, ANYTIME,
         'compile several updates as one program: faster steps, twice the time to compile '
         '(default: as the run has it; a new one of 2,000 iterations or more does, if it has '
         'several updates, and strided convolutions or images of up to 32 pixels)'),
)
# fmt: on
GROUPS = {
    'Tasks': TASKS,
    'Training': TRAINING,
    'The network': MODEL,
    'Variants of the inner loop': VARIANTS,
    'Runs and what they write': OUTPUT,
    'Evaluation': EVALUATING,
    'Devices and speed': DEVICES,
}
FLAGS = tuple(itertools.chain(*GROUPS.values()))
FIRST = tuple(  # that most runs need
    'datasource data_dir num_classes update_batch_size update_lr num_updates meta_batch_size '
    'metatrain_iterations train logdir'.split()
)
# What runs of 1.0.0 did, among them seven cells of logs/results, which do not have these flags.
INNER_LOOPS = {flag.name: flag.default for flag in VARIANTS}


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """The command line."""
    kinds = {int: 'integer', float: 'float', bool: 'boolean', str: 'string'}
    for flag in FLAGS:
        if values.find_module_defining_flag(flag.name) == __name__:
            delattr(values, flag.name)  # of an earlier run in this process, as %run has it
        given = dict(name=flag.name, default=flag.default, help=flag.meaning, flag_values=values)
        if isinstance(flag.kind, tuple):
            flags.DEFINE_enum(enum_values=list(flag.kind), **given)
        elif isinstance(flag.kind, flags.ArgumentParser):
            flags.DEFINE(flag.kind, **given)
        else:
            lowest = {} if flag.lowest is None else {'lower_bound': flag.lowest}
            getattr(flags, f'DEFINE_{kinds[flag.kind]}')(**given, **lowest)


def help_text(program: str) -> str:
    """Returns what --help prints: what the program does, and the flags by purpose."""
    by_name = {flag.name: flag for flag in FLAGS}
    groups = {'The ten that matter': [by_name[name] for name in FIRST]} | GROUPS
    lines = [program.rstrip()]
    for title, members in groups.items():
        lines += ['', f'{title}:']
        for flag in members:
            default = '' if flag.default is None else flag.default
            text = f'--{flag.name}={default}'.ljust(32) + flag.meaning
            lines.append(textwrap.fill(text, 100, initial_indent='  ', subsequent_indent=' ' * 34))
    return '\n'.join(lines)


def read_command_line(arguments: list[str], program: str):
    """Defines and reads the flags, answers --help, before TensorFlow takes seconds to load."""
    define_flags()
    if {'--help', '-help', '-h', '--helpshort', '--helpfull'} & {*arguments}:
        print(help_text(program))
        sys.exit()
    app.parse_flags_with_usage(arguments)


def settings(f: flags.FlagValues) -> dict:
    """{name: value} of the flags above, without absl's own."""
    return {flag.name: f[flag.name].value for flag in FLAGS}


def model_settings(f: flags.FlagValues) -> dict:
    """The flags that `make_model` takes."""
    return {flag.name: f[flag.name].value for flag in FLAGS if flag.makes_model}


def trained_settings(f: flags.FlagValues) -> dict:
    """As `settings`, with the K and α of training."""
    trained = settings(f)
    for name in ('update_batch_size', 'update_lr'):
        if trained[f'train_{name}'] != -1:
            trained[name] = trained[f'train_{name}']
    return trained


def run_name(f: flags.FlagValues) -> str:
    """The name of the run's folder, after the flags it was trained with."""
    return original_name(f) + tasks_in_name(f)


def original_name(f: flags.FlagValues) -> str:
    """The name as the original has it, which says nothing of the tasks and of the seed."""
    trained = trained_settings(f)
    return ''.join(flag.part_of_name(trained[flag.name]) for flag in FLAGS)


def tasks_in_name(f: flags.FlagValues) -> str:
    """The end of the name: tasks that the original does not have, and a seed other than 0."""
    place = f.data_dir if f.datasource == 'folder' else ''
    place = f.datasource.rpartition(':')[2] if is_spec(f.datasource) else place
    name = nfc(os.path.basename(os.path.abspath(place))) if place else ''
    name = re.sub(r'[^\w.-]', '_', name)
    return f'{name and "."}{name[:60]}' + (f'.seed{f.seed}' if f.seed else '')


def iterations(f: flags.FlagValues) -> tuple[int, int]:
    """(pre-training, meta-training) iterations. The oracle is jointly trained throughout."""
    if f.baseline == 'oracle':
        return f.pretrain_iterations + f.metatrain_iterations, 0
    return f.pretrain_iterations, f.metatrain_iterations
