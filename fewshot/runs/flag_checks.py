"""Refuses flags that make no sense, alone or together, by name."""

import importlib.util
import os
import sys

from absl import flags

from fewshot.runs.flags import FLAGS, iterations
from fewshot.sources import source_of


def check_flags(f: flags.FlagValues):
    """Raises ValueError with one sentence for flags that make no sense, alone or together."""
    for flag in FLAGS:
        value = f[flag.name].value
        if flag.rule and not flag.rule.holds(value):
            raise ValueError(f'--{flag.name} must be {flag.rule.text}, but it is {value}')
    for name in ('data_dir', 'cache_dir', 'logdir'):
        if os.path.expanduser(f[name].value).startswith('~'):  # else a folder ~ would be made
            raise ValueError(f'--{name}={f[name].value}: the home folder is not known; set HOME')
    check_tasks(f)
    check_inner_loop(f)
    if f.train:
        check_training(f)
    if f.overwrite and (f.resume or not f.train):
        raise ValueError(
            '--overwrite removes an earlier run of the same name, so it needs --resume=False and '
            '--train=True'
        )


def check_tasks(f: flags.FlagValues):
    """Checks, for `check_flags`, that flags suit the source of the tasks."""
    if f.baseline == 'oracle' and f.datasource != 'sinusoid':
        raise ValueError(
            '--baseline=oracle knows amplitude and phase, so it needs --datasource=sinusoid, not '
            f'{f.datasource}'
        )
    if f.num_query != -1 and not source_of(f.datasource).has_images:
        raise ValueError(
            f'--num_query={f.num_query} is for images, so it needs --datasource=omniglot, '
            f'miniimagenet or folder, not {f.datasource}'
        )
    if source_of(f.datasource).queries and f.metatrain_iterations == 0 and f.update_batch_size != 1:
        raise ValueError(
            'a plain network on miniimagenet (--metatrain_iterations=0) takes one image per class, '
            f'so it needs --update_batch_size=1, not {f.update_batch_size}'
        )
    if f.num_classes == 1 and source_of(f.datasource).has_images:
        raise ValueError('--num_classes=1: between images of one class there is nothing to learn')
    if f.network:
        check_network(f)
    elif f.max_pool and (source_of(f.datasource).sizes or not f.conv):
        print(
            '--max_pool is part of the name of the run, but does nothing without convolutions.',
            file=sys.stderr,
        )


def check_inner_loop(f: flags.FlagValues):
    """Checks, for `check_flags`, the flags on the inner loop's changes and on how it is learned."""
    if f.loss_steps_iterations and f.loss_steps == 'last':
        raise ValueError(
            f'--loss_steps_iterations={f.loss_steps_iterations} anneals the losses after all '
            'updates, so it needs --loss_steps=all'
        )
    if f.first_order_iterations and f.stop_grad:
        raise ValueError(
            '--stop_grad is of first order throughout, so it goes without '
            f'--first_order_iterations={f.first_order_iterations}'
        )
    if f.norm_steps and f.adapt == 'head':
        raise ValueError(
            '--norm_steps changes normalisation from update to update, but with --adapt=head all '
            'layers before the last are computed once: give one of the two'
        )
    if f.norm_steps and f.norm == 'None' and not f.network:
        raise ValueError('--norm_steps needs a normalisation, not --norm=None')
    if f.meta_lr_end and f.meta_lr_decay == 'none':
        raise ValueError(f'--meta_lr_end={f.meta_lr_end} needs --meta_lr_decay=cosine')
    if f.meta_lr_end > f.meta_lr:
        raise ValueError(
            f'--meta_lr_end={f.meta_lr_end} must not be above --meta_lr={f.meta_lr}, where β begins'
        )
    if f.meta_lr_decay != 'none' and (iterations(f)[0] or not f.metatrain_iterations):
        raise ValueError(
            f'--meta_lr_decay={f.meta_lr_decay} is over meta-training alone, so it goes without '
            '--pretrain_iterations and --baseline=oracle, and needs --metatrain_iterations above 0'
        )


def check_network(f: flags.FlagValues):
    """Checks, for `check_flags`, the flags that go with --network."""
    if source_of(f.datasource).sizes:
        raise ValueError(
            f'--network={f.network} needs images or tasks of your own: --datasource=omniglot, '
            f'miniimagenet, folder or FILE.py:FUNCTION, not {f.datasource}'
        )
    names = ('num_filters', 'conv', 'max_pool', 'norm')
    changed = [f'--{name}' for name in names if f[name].value != f[name].default]
    if changed:
        print(
            f'{" and ".join(changed)} may be part of the name of the run, but --network makes '
            'another network.',
            file=sys.stderr,
        )


def check_training(f: flags.FlagValues):
    """Checks, for `check_flags`, that training can use the flags."""
    for name, is_asked in {
        'run': f.run != '',
        'test_query': f.test_query != -1,
        'transductive': not f.transductive,
        'test_iter': f.test_iter == 'best',
    }.items():
        if is_asked:
            text = f'--{name}={f[name].value} is for evaluation, so it needs --train=False'
            raise ValueError(text)
    if f.test_iter != -1 and not f.resume:
        raise ValueError(
            f'--test_iter={f.test_iter} continues from a checkpoint, and --resume=False begins '
            'afresh: give one of them'
        )
    if sum(iterations(f)) == 0:
        raise ValueError(
            'there is nothing to train: set --metatrain_iterations or --pretrain_iterations above 0'
        )
    same_shots = f.train_update_batch_size in (-1, f.update_batch_size)
    if not same_shots or f.train_update_lr not in (-1, f.update_lr):
        raise ValueError(
            '--train_update_batch_size and --train_update_lr name the run to evaluate, so they '
            'need --train=False'
        )
    if f.log and importlib.util.find_spec('tensorboard') is None:
        raise ValueError(
            '--log writes summaries with the package tensorboard, which is not installed: run '
            '`pip install tensorboard` or give --log=False'
        )
