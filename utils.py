"""The printed and written output that main.py and the scripts share."""

import csv
import io
import os
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

import numpy as np
from absl import flags

from fewshot.paper.runs import paper_figures
from fewshot.runs.flags import trained_settings
from fewshot.runs.prepare import Prepared
from fewshot.runs.results import guessing, write_together
from fewshot.runs.user_code import is_spec
from fewshot.sources import IMAGE_SOURCES, SOURCES

SPLITS = {'val': 'validation', 'test': 'test'}


def command_again(given: dict) -> str:
    """The command that resumes the run: the same flags without those that begin it once."""
    usual = {'resume': True, 'overwrite': False, 'test_iter': -1}
    once = [f'--{name}={given[name]}' for name in usual if given[name] != usual[name]]
    return 'the same command' + (f' without {" and ".join(once)}' if once else '')


def print_results(run: Prepared, f: flags.FlagValues, values: np.ndarray) -> tuple:
    """Prints means, standard deviations and 95 % intervals, and returns them: [1 + updates] each.

    The original's lines follow the table if --original_output asks for them. values:
    [tasks, 1 + updates].
    """
    ((split, source),) = run.generators.items()
    if not source.has_queries:
        print(
            'There are no query images, as in the original, to tell of updates: '
            f'--test_query={SOURCES[f.datasource].queries} takes some.'
        )
    with np.errstate(invalid='ignore', over='ignore'):  # of tasks that diverge
        mean, stddev = values.mean(0), values.std(0)
    interval = 1.96 * stddev / np.sqrt(len(values))
    objective = 'accuracy' if source.objective == 'accuracy' else 'squared error'
    objective = 'loss' if f.loss and objective != 'accuracy' else objective
    what = f'{objective} on {len(values)} {SPLITS[split]} tasks'
    paper = {} if other_data(run, f) else figures_of_paper(run.state, f)
    print(*result_table(what, mean, interval, paper), sep='\n')
    if caution := source.caution(split):
        print(caution)
    if poor := guessing(source, mean[-1], interval[-1]):
        print(
            f'The last accuracy is {poor}. A published model may do better, by '
            'scripts/model/classify.py or --init: python -m fewshot.paper.published lists them.'
        )
    if f.original_output:
        print('Mean validation accuracy/loss, stddev, and confidence intervals')
        print((mean, stddev, interval))
    return mean, stddev, interval


def write_results(run: Prepared, f: flags.FlagValues, values: np.ndarray, statistics: tuple):
    """Writes an evaluation as csv and pkl, and says where; the latter has the original's `mses`.

    Both tell the split and the iteration of the checkpoint. values: [tasks, 1 + updates].
    statistics: the result of `print_results`.
    """
    ((split, _),) = run.generators.items()
    path = run.folder / f'{evaluation_name(f)}{other_data(run, f)}'
    content = {'mses': values, 'iteration': run.start - 1, 'split': split}
    header = [f'update{j}' for j in range(values.shape[1])]
    rows = [[*row, split, run.start - 1] for row in statistics]
    text = io.StringIO()
    csv.writer(text).writerows([header + ['split', 'iteration'], *rows])
    written = {'pkl': pickle.dumps(content), 'csv': text.getvalue().encode()}
    write_together({path.with_name(f'{path.name}.{end}'): of for end, of in written.items()})
    print(f'Wrote {path}.csv and .pkl')


def figures_of_paper(state: dict, f: flags.FlagValues) -> dict[int, str]:
    """Returns {updates: the paper's figure} of such an evaluation; state: the checkpoint's."""
    trained = trained_settings(f) | state.get('flags', {})
    as_usual = f.test_query == -1 and f.transductive and f.update_lr == trained['update_lr']
    return paper_figures(trained, f.update_batch_size) if as_usual else {}


def other_data(run: Prepared, f: flags.FlagValues) -> str:
    """Returns an ending for a result's name if it is on classes unknown to the run, else ''."""
    ((split, source),) = run.generators.items()
    known = (run.state.get('classes') or {}).get(split)
    if known in (None, source.classes.get(split)):
        return ''
    return f'_on_{os.path.basename(os.path.abspath(os.path.expanduser(f.data_dir)))}'


def result_table(what: str, mean: np.ndarray, interval: np.ndarray, paper: dict) -> list[str]:
    """Returns the lines of a table of means and halves of their 95 % intervals, [1 + updates] each.

    what: a name of the values that begins with the objective: accuracies are shown in percent.
    paper: {updates: its figure}. A mean that does not exist is shown as a hyphen.
    """
    scale, digits = (100, '.2f') if what.startswith('accuracy') else (1, '.4g')
    unit = ', %' if scale == 100 else ''
    lines = [f'Mean {what}{unit}', 'updates      mean    95 % interval']
    for update, (value, half) in enumerate(zip(scale * mean, scale * interval)):
        shown = (f'{value:{digits}}', f'+- {half:{digits}}') if np.isfinite(value) else ('-', '-')
        note = '   on the support sets' if update == 0 else ''
        if update in paper:
            note += f'   paper, on test tasks: {paper[update]}'
        lines.append(f'{update:7} {shown[0]:>9}    {shown[1]:<13}{note}'.rstrip())
    return lines


def evaluation_name(f: flags.FlagValues) -> str:
    """Returns the name, without suffix, of the files that hold an evaluation.

    It is the original's for the test classes and the newest checkpoint, and tells all that differs.
    """
    parts = [
        f'test_ubs{f.update_batch_size}_stepsize{f.update_lr}',
        f'_query{f.test_query}' if f.test_query != -1 else '',
        f'_tasks{f.test_tasks}' if f.test_tasks != f['test_tasks'].default else '',
        '' if f.transductive else '_inductive',
        '' if f.test_set else '_val',
        {-1: '', 'best': '_best'}.get(f.test_iter, f'_iteration{f.test_iter}'),
    ]
    return ''.join(parts)


def command_line(script: str, *arguments: str | Path) -> str:
    """Returns a shell command that starts a script of this project from the current folder."""
    own, script = sys.executable, os.path.relpath(Path(__file__).resolve().parent / script)
    python = 'python' if shutil.which('python') == own else own
    return shlex.join([python, script, *map(str, arguments)])


def next_steps(run: Prepared, f: flags.FlagValues) -> str:
    """Tells where a finished run is, and what can be done with it."""
    # The user's own files: a run names them, but they are not run unasked.
    given = [
        f'--{n}={f[n].value}' for n in ('datasource', 'network', 'loss') if is_spec(f[n].value)
    ]
    evaluation = ['main.py', '--train=False', '--test_set=True', f'--run={run.folder}', *given]
    commands = [command_line(*evaluation)]
    if f.datasource in IMAGE_SOURCES:
        own = [text for text in given if not text.startswith('--datasource')]
        classify = ['scripts/model/classify.py', run.folder, 'SUPPORT_DIR', 'IMAGE', *own]
        commands.append(command_line(*classify))
    if f.log:
        commands.append(shlex.join(['tensorboard', f'--logdir={run.folder}']))
    uses = 'Test it, use it, see its curves:' if f.log else 'Test it, use it:'
    return '\n    '.join([f'The run is in {run.folder}. {uses}', *commands])
