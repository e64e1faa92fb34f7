"""The entries of the papers' tables, with the flags that reproduce them."""

import re
from typing import NamedTuple

from absl import flags

from fewshot.runs.flags import FLAGS, trained_settings


class Cell(NamedTuple):
    """One entry of a table, the paper's or another's."""

    name: str  # the script's and the folder's
    title: str
    group: str  # cells that are drawn together
    kind: str  # title within the group
    paper: str  # what it says
    updates: int  # the paper's number of updates in evaluation
    settings: dict  # flags of main.py, as in the script
    published: tuple = ()  # (figure, whose) where it is not in MAML's paper; the first is `paper`

    @property
    def numbers(self) -> list[float]:
        """The numbers in `paper`: a value and half of its interval.

        Of sinusoids they are the errors after 1, 5 and 10 updates.
        """
        return [float(number) for number in re.findall(r'[\d.]+', self.paper)]

    @property
    def figures(self) -> dict[int, str]:
        """{updates: what the paper says}."""
        if self.settings['datasource'] == 'sinusoid':
            return dict(zip((1, 5, 10), self.paper.split(' / '))) if self.paper else {}
        return {self.updates: self.paper.replace('±', '+-')}

    @property
    def test_shots(self) -> int:
        """K in the paper's evaluation; its sinusoid was trained with another."""
        is_sinusoid = self.settings['datasource'] == 'sinusoid'
        return 5 if is_sinusoid else self.settings['update_batch_size']


def omniglot(ways: int, shots: int, paper: str, conv: bool = True) -> Cell:
    few = ways == 5
    settings = dict(
        datasource='omniglot',
        num_classes=ways,
        update_batch_size=shots,
        update_lr=0.4 if few else 0.1,
        num_updates=1 if few else 5,
        meta_batch_size=32 if few else 16,
        conv=conv,
        num_filters=64,
        max_pool=False,
        stop_grad=False,
    )
    more = '' if conv else ', no convolutions'
    return Cell(
        f'omniglot_{ways}way_{shots}shot' + ('' if conv else '_no_conv'),
        f'Omniglot, {ways}-way {shots}-shot{more}',
        f'Omniglot, {ways}-way{more}',
        f'{shots}-shot',
        paper,
        3 if few else 5,
        settings,
    )


def miniimagenet(shots: int, paper: str, first_order: bool = False) -> Cell:
    settings = dict(
        datasource='miniimagenet',
        num_classes=5,
        update_batch_size=shots,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4 if shots == 1 else 2,
        conv=True,
        num_filters=32,
        max_pool=True,
        stop_grad=first_order,
    )
    kind = f'{shots}-shot' + ', first order' * first_order
    return Cell(
        f'miniimagenet_5way_{shots}shot' + '_first_order' * first_order,
        f'miniImagenet, 5-way {kind}',
        'miniImagenet, 5-way',
        kind,
        paper,
        10,
        settings,
    )


def cifar_fs(shots: int, *published: tuple[str, str]) -> Cell:
    settings = dict(
        datasource='folder',
        image_size=32,
        num_classes=5,
        update_batch_size=shots,
        num_query=15,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4,
        conv=True,
        num_filters=32,
        max_pool=True,
        stop_grad=False,
    )
    return Cell(
        f'cifar_fs_5way_{shots}shot',
        f'CIFAR-FS, 5-way {shots}-shot',
        'CIFAR-FS, 5-way',
        f'{shots}-shot',
        published[0][0],
        10,
        settings,
        published,
    )


def omniglot_variant(name: str, kind: str, *published: tuple[str, str], **settings) -> Cell:
    """Omniglot, 20-way 1-shot, by an inner loop that grew from MAML's."""
    cell = omniglot(20, 1, published[0][0])
    return cell._replace(
        name=f'{cell.name}_{name}',
        title=f'{cell.title}, {kind}',
        kind=f'{cell.kind}, {kind}',
        settings=cell.settings | settings,
        published=published,
    )


def sinusoid(
    name: str, title: str, paper: str, baseline: str | None = None, update_lr: float = 0.01
) -> Cell:
    settings = dict(
        datasource='sinusoid',
        update_batch_size=10,
        update_lr=update_lr,
        num_updates=1,
        meta_batch_size=25,
        norm='None',
        baseline=baseline,
        stop_grad=False,
    )
    return Cell(name, title, 'Sinusoid', title, paper, 10, settings)


CELLS = [
    omniglot(5, 1, '89.7 ± 1.1', conv=False),
    omniglot(5, 5, '97.5 ± 0.6', conv=False),
    omniglot(5, 1, '98.7 ± 0.4'),
    omniglot(5, 5, '99.9 ± 0.1'),
    omniglot(20, 1, '95.8 ± 0.3'),
    omniglot(20, 5, '98.9 ± 0.2'),
    miniimagenet(1, '48.07 ± 1.75', first_order=True),
    miniimagenet(1, '48.70 ± 1.84'),
    miniimagenet(5, '63.15 ± 0.91', first_order=True),
    miniimagenet(5, '63.11 ± 0.92'),
]
# Entries of tables in other papers.
OTHER_CELLS = [
    cifar_fs(1, ('58.9 ± 1.9', 'Bertinetto et al. 2019'), ('56.8 ± 1.9', 'Devos et al. 2019')),
    cifar_fs(5, ('71.5 ± 1.0', 'Bertinetto et al. 2019'), ('70.8 ± 0.9', 'Devos et al. 2019')),
    omniglot_variant('anil', 'ANIL', ('96.2 ± 0.5', 'Raghu et al. 2020'), adapt='head'),
    omniglot_variant(
        'maml_plus_plus',
        'MAML++',
        ('97.65 ± 0.05', 'Antoniou et al. 2019'),
        ('96.65 ± 0.06', 'the same program, run by another'),
        learn_lr='layer_step',
        loss_steps='all',
        loss_steps_iterations=6000,
        first_order_iterations=20000,
        norm_steps=True,
        meta_lr_decay='cosine',
        meta_lr_end=0.00001,
    ),
]
MAML_ERRORS = '.67 / .38 / .35'
SINUSOIDS = [
    sinusoid('sinusoid', 'MAML', MAML_ERRORS),
    sinusoid('sinusoid_published_command', 'MAML, α = 0.001', MAML_ERRORS, update_lr=0.001),
    sinusoid('sinusoid_pretrain', 'pre-trained on all tasks', '2.41 / 2.23 / 2.19'),
    sinusoid('sinusoid_oracle', 'oracle', '', 'oracle'),
]


def same(value, wanted) -> bool:
    """Whether two values of a flag are the same; --baseline=None is the text 'None'."""
    return value == wanted or str(value) == str(wanted) == 'None'


def paper_figures(state: dict, f: flags.FlagValues) -> dict[int, str]:
    """{updates: what the paper's tables have after as many}, for an evaluation of one of its cells.

    state: of the checkpoint, with the flags that it was trained with. Empty for other evaluations.
    """
    trained = trained_settings(f) | state.get('flags', {})
    if f.test_query != -1 or not f.transductive or f.update_lr != trained['update_lr']:
        return {}
    telling = [flag for flag in FLAGS if flag.makes_model or flag.in_name]
    others = ('seed', 'metatrain_iterations')
    joint = trained['metatrain_iterations'] == 0
    for cell in CELLS + SINUSOIDS:
        wanted = {flag.name: flag.default for flag in telling if flag.name not in others}
        wanted |= cell.settings
        differing = [name for name in wanted if not same(trained.get(name), wanted[name])]
        pretrained = cell.name == 'sinusoid_pretrain'
        if not differing and joint == pretrained and f.update_batch_size == cell.test_shots:
            return cell.figures
    return {}
