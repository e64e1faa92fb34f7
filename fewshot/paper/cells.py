"""The entries of the papers' tables, with the flags that reproduce them.

    python -m fewshot.paper.cells CELL [ITERATIONS [GIVEN]]

prints the flags of main.py that train a cell, one a line, see `command`; scripts/lib/experiment.sh
takes them from here.
"""

import ast
import re
import sys
from typing import NamedTuple


class Cell(NamedTuple):
    """One entry of a table, the paper's or another's."""

    name: str  # the script's and the folder's
    title: str
    group: str  # cells that are drawn together
    kind: str  # title within the group
    paper: str  # its figure, or figures
    updates: int  # the paper's number of updates in evaluation
    flags: str  # of main.py, with places that `command` fills
    published: tuple = ()  # (figure, whose) where it is not in MAML's paper; the first is `paper`

    @property
    def settings(self) -> dict:
        """The flags and their values, but for the place of the data and iterations."""
        found = dict(flag[2:].split('=') for flag in command(self))
        others = {'data_dir', 'pretrain_iterations', 'metatrain_iterations'}
        return {name: value_of(found[name]) for name in found if name not in others}

    @property
    def is_sinusoid(self) -> bool:
        return self.group == 'Sinusoid'

    @property
    def iterations(self) -> int:
        """The paper's iterations of training."""
        return 70000 if self.is_sinusoid else 60000

    @property
    def numbers(self) -> list[float]:
        """The numbers in `paper`: a value and half of its interval.

        For sinusoids they are the errors after 1, 5 and 10 updates.
        """
        return [float(number) for number in re.findall(r'[\d.]+', self.paper)]

    @property
    def figures(self) -> dict[int, str]:
        """The paper's figures, {updates: figure}."""
        if self.is_sinusoid:
            return dict(zip((1, 5, 10), self.paper.split(' / '))) if self.paper else {}
        return {self.updates: self.paper.replace('±', '+-')}

    @property
    def test_shots(self) -> int:
        """K in the paper's evaluation; its sinusoid was trained with another K."""
        return 5 if self.is_sinusoid else self.settings['update_batch_size']


def value_of(text: str):
    """Returns a flag's value: the number, truth value or None that the text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


META = '--metatrain_iterations={iterations}'
JOINT = '--pretrain_iterations={given} --metatrain_iterations=0'
# As far as MAML++'s program tells: the losses after all updates count in a tenth of training. Its
# paper has first order at the beginning, here a third of training.
PLUS_PLUS = (
    '--learn_lr=layer_step --loss_steps=all --loss_steps_iterations={tenth} '
    '--first_order_iterations={third} --meta_lr_decay=cosine --meta_lr_end=0.00001'
)
SINUSOID = '--datasource=sinusoid --norm=None --update_batch_size=10'
# {beginning of a cell's name: its title, the updates in evaluation, the flags}
TASKS = {
    'omniglot_5way': (
        'Omniglot, 5-way',
        3,
        '--datasource=omniglot --num_classes=5 --update_batch_size={shots} --update_lr=0.4 '
        '--num_updates=1 --meta_batch_size=32',
    ),
    'omniglot_20way': (
        'Omniglot, 20-way',
        5,
        '--datasource=omniglot --num_classes=20 --update_batch_size={shots} --update_lr=0.1 '
        '--num_updates=5 --meta_batch_size=16',
    ),
    'miniimagenet_5way': (
        'miniImagenet, 5-way',
        10,
        '--datasource=miniimagenet --num_classes=5 --update_batch_size={shots} --update_lr=0.01 '
        '--num_updates=5 --meta_batch_size={tasks} --num_filters=32 --max_pool=True',
    ),
    # With miniImagenet's settings, as R2D2's paper and Devos et al. have it.
    'cifar_fs_5way': (
        'CIFAR-FS, 5-way',
        10,
        '--datasource=folder --data_dir=cifar_fs --image_size=32 --num_classes=5 '
        '--update_batch_size={shots} --num_query=15 --update_lr=0.01 --num_updates=5 '
        '--meta_batch_size=4 --num_filters=32 --max_pool=True',
    ),
}
# {end of a cell's name: the end of its title, more flags}
VARIANTS = {
    '': ('', ''),
    '_no_conv': (', no convolutions', '--conv=False'),
    '_first_order': (', first order', '--stop_grad=True'),
    '_anil': (', ANIL', '--adapt=head'),
    '_maml_plus_plus': (', MAML++', f'{PLUS_PLUS} --norm_steps=True'),
}


def command(cell: Cell, iterations: str = '', given: str = '') -> list[str]:
    """Returns the flags that train a cell for so many iterations; '': as many as the paper.

    given: the iterations that follow in the command, which count; joint training and schedules go
    by them. Raises ValueError if those of a schedule are no number.
    """
    iterations = iterations or str(cell.iterations)
    given = given or iterations
    parts = {}
    if '{third}' in cell.flags:
        if not given.isdecimal():
            raise ValueError(f'--metatrain_iterations must be a whole number, but it is {given}')
        parts = dict(tenth=int(given) // 10, third=int(given) // 3)
    return cell.flags.format(iterations=iterations, given=given, **parts).split()


def images(name: str, paper: str, *others: str) -> Cell:
    """Makes the cell of a name such as omniglot_20way_1shot_anil.

    others: the paper whose table has the figure, if it is another one; then more figures, each
    followed by its source.
    """
    published = tuple(zip((paper, *others[1::2]), others[::2]))
    tasks, shots, ending = re.fullmatch(r'(\w+way)_(\d)shot(\w*)', name).groups()
    group, updates, flags = TASKS[tasks]
    more, own = VARIANTS[ending]
    flags = flags.replace('{shots}', shots).replace('{tasks}', '4' if shots == '1' else '2')
    flags, title, kind = f'{flags} {own} {META}', f'{group} {shots}-shot{more}', f'{shots}-shot'
    if ending == '_no_conv':
        return Cell(name, title, group + more, kind, paper, updates, flags)
    return Cell(name, title, group, kind + more, paper, updates, flags, published)


def sinusoid(name: str, title: str, paper: str, flags: str, update_lr: str = '0.01') -> Cell:
    flags = f'{SINUSOID} --update_lr={update_lr} {flags}'
    return Cell(name, title, 'Sinusoid', title, paper, 10, flags)


DEVOS = 'Devos et al. 2019'
CELLS = [
    images('omniglot_5way_1shot_no_conv', '89.7 ± 1.1'),
    images('omniglot_5way_5shot_no_conv', '97.5 ± 0.6'),
    images('omniglot_5way_1shot', '98.7 ± 0.4'),
    images('omniglot_5way_5shot', '99.9 ± 0.1'),
    images('omniglot_20way_1shot', '95.8 ± 0.3'),
    images('omniglot_20way_5shot', '98.9 ± 0.2'),
    images('miniimagenet_5way_1shot_first_order', '48.07 ± 1.75'),
    images('miniimagenet_5way_1shot', '48.70 ± 1.84'),
    images('miniimagenet_5way_5shot_first_order', '63.15 ± 0.91'),
    images('miniimagenet_5way_5shot', '63.11 ± 0.92'),
]
# Entries of tables in other papers: their figures, and whose they are.
OTHER_CELLS = [
    images('cifar_fs_5way_1shot', '58.9 ± 1.9', 'Bertinetto et al. 2019', '56.8 ± 1.9', DEVOS),
    images('cifar_fs_5way_5shot', '71.5 ± 1.0', 'Bertinetto et al. 2019', '70.8 ± 0.9', DEVOS),
    images('omniglot_20way_1shot_anil', '96.2 ± 0.5', 'Raghu et al. 2020'),
    images(
        *('omniglot_20way_1shot_maml_plus_plus', '97.65 ± 0.05', 'Antoniou et al. 2019'),
        *('96.65 ± 0.06', 'the same program, run by another'),
    ),
]
MAML_ERRORS = '.67 / .38 / .35'
SINUSOIDS = [
    sinusoid('sinusoid', 'MAML', MAML_ERRORS, META),
    sinusoid('sinusoid_published_command', 'MAML, α = 0.001', MAML_ERRORS, META, '0.001'),
    sinusoid('sinusoid_pretrain', 'pre-trained on all tasks', '2.41 / 2.23 / 2.19', JOINT),
    sinusoid('sinusoid_oracle', 'oracle', '', f'--baseline=oracle {JOINT}'),
]


def main(name: str, *iterations: str):
    """Prints a cell's flags, or those of MAML++ alone under the name maml_plus_plus."""
    cells = {cell.name: cell for cell in CELLS + OTHER_CELLS + SINUSOIDS}
    cells['maml_plus_plus'] = CELLS[0]._replace(flags=PLUS_PLUS)
    try:
        if name not in cells:
            raise ValueError(f'there is no cell {name}: give one of {", ".join(cells)}')
        print(*command(cells[name], *iterations), sep='\n')
    except ValueError as error:
        sys.exit(f'cells.py: {error}')


if __name__ == '__main__':
    main(*sys.argv[1:])
