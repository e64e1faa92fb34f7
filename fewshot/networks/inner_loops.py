"""Variants of MAML's inner loop: which weights they change, and by which step sizes."""

import numpy as np
import tensorflow as tf

from fewshot.checks import check_choice
from fewshot.engine.shared import Shared, share
from fewshot.networks.keras_network import KerasNetwork
from maml import Arrays, InnerLoop, Leading, Tensors, repeated, row_of
from special_grads import sizes


class LearnedRates(InnerLoop):
    """Gradient descent with step sizes that the outer loop learns, from `update_lr` on.

    kind: 'layer' has one for each layer; 'layer_step' one for each layer and update, as MAML++;
    'weight' one for each weight, as Meta-SGD. More updates than there are step sizes use the last.
    """

    def __init__(self, kind: str, network, update_lr: float, num_updates: int):
        self.kind, self.parameters, self.names = kind, {}, {}
        layers = getattr(network, 'layer_names', {})
        for name, (_, shape) in network.parameters.items():
            of_layer = (max(num_updates, 1),) if kind == 'layer_step' else ()
            size = tuple(shape) if kind == 'weight' else of_layer
            rate = name if kind == 'weight' else layers.get(name, name)
            self.names[name] = rate
            self.parameters[rate] = (np.full(size, update_lr), size)

    def rates(self, values: Tensors, step: int | tf.Tensor) -> Tensors:
        """Returns {name of a weight: its α}."""
        if self.kind == 'layer_step':
            values = {name: row_of(value, step) for name, value in values.items()}
        return {name: values[rate] for name, rate in self.names.items()}

    def shown(self, values: Arrays) -> Arrays:
        if self.kind != 'layer_step':
            return values
        rows = {name: enumerate(value, start=1) for name, value in values.items()}
        return {f'{name}__step_{i}': rate for name in rows for i, rate in rows[name]}


LEARNED_RATES = ('layer', 'layer_step', 'weight')


def named_inner_loop(
    learn_lr: str, network, update_lr: float, num_updates: int, own: InnerLoop | None = None
) -> InnerLoop:
    """Returns the inner loop that `learn_lr` names, or the user's own. Raises ValueError."""
    if own is None:
        check_choice('learn_lr', learn_lr, ('none', *LEARNED_RATES))
        rates = learn_lr, network, update_lr, num_updates
        return InnerLoop() if learn_lr == 'none' else LearnedRates(*rates)
    if not isinstance(own, InnerLoop):
        raise ValueError(f'inner_loop must be a maml.InnerLoop, but it is {own!r:.60}')
    if learn_lr != 'none':
        raise ValueError(
            f'learn_lr={learn_lr!r} makes an inner loop, and inner_loop is another one: give one '
            'of the two'
        )
    return own


def last_layer(network) -> list[str]:
    """Lists the names of the weights of a network's last layer; none if it does not tell."""
    layers = getattr(network, 'layer_names', None) or {}
    of_last = [name for name in network.parameters if layers.get(name) == [*layers.values()][-1]]
    return getattr(network, 'head_names', of_last)


class Partly:
    """A network with some weights that the inner loop adapts; the others are common to all tasks.

    adapt: 'head' adapts the last layer, 'body' all the others. Other attributes are the network's.
    Raises ValueError if the network does not tell its layers, or no weight is left to adapt.
    """

    def __init__(self, network, adapt: str):
        self.network = network
        layers = getattr(network, 'layer_names', None)
        if not layers:
            raise ValueError(
                f'adapt={adapt!r} needs to know the layers of the network: give it an attribute '
                'layer_names, {name of a parameter: its layer}'
            )
        head = last_layer(network)
        names = [name for name in network.parameters if (name in head) == (adapt == 'head')]
        if not names:
            raise ValueError(
                f'adapt={adapt!r} leaves nothing for the inner loop to change: the network adapts '
                f'{", ".join(network.parameters)}, and its last layer has {", ".join(head)}'
            )
        self.parameters = {name: network.parameters[name] for name in names}
        self.common = {name: made for name, made in network.parameters.items() if name not in names}
        self.norm_parameters = self.common | network.norm_parameters
        self.order = [*network.parameters, *network.norm_parameters]

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def prepare(self, *inputs):
        """Prepares inputs as the network does."""
        return self.network.prepare(*inputs)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        """Computes [T, examples, out] from x, see `prepare`, and weights, [T, ...] each."""
        first = next(iter(weights.values()))
        tasks = sizes(first.perturbation if isinstance(first, Shared) else first)[0]
        whole = weights | self.common_weights(norms, tasks, x)
        return self.network(x, whole, self.norms_in(norms), *([] if leading is None else [leading]))

    def common_weights(self, norms: Tensors, tasks: int | tf.Tensor, x) -> dict:
        """Returns the weights that are not adapted, as the network takes them.

        They are Shared, one product of matrices for all tasks, if the network takes that and all
        sizes are known; x: the input of its call.
        """
        known = all(part.shape.is_fully_defined() for part in tf.nest.flatten(x))
        common = {name: norms[name] for name in self.common}
        together = known and takes_shared(self.network)
        return share(common, tasks) if together else repeated(common, tasks)

    def norms_in(self, norms: Tensors) -> Tensors:
        """Returns the normalisation parameters that the network itself knows as such."""
        return {name: norms[name] for name in self.network.norm_parameters}


class HeadOnly(Partly):
    """A network with `features` and `head`, of which the inner loop adapts the last layer alone.

    `prepare` computes the features once for all updates, and the outer loop differentiates through
    them.
    """

    prepares_features = True

    def prepare(self, inputs: tf.Tensor, leading: Leading, norms: Tensors) -> tf.Tensor:
        """Computes features of inputs [T, examples, D]: [T, examples, F]."""
        x = self.network.prepare(inputs, *([] if leading is None else [leading]))
        weights = self.common_weights(norms, sizes(inputs)[0], x)
        return self.network.features(x, weights, self.norms_in(norms), leading)

    def __call__(self, x, weights: Tensors, norms: Tensors, leading: Leading = None) -> tf.Tensor:
        return self.network.head(x, weights)


def part_of(network, adapt: str):
    """Returns the network as the inner loop of `adapt` sees it. Raises ValueError."""
    check_choice('adapt', adapt, ('all', 'head', 'body'))
    if adapt == 'all':
        return network
    splits = adapt == 'head' and said_with_call(network, 'features')
    return HeadOnly(network, adapt) if splits else Partly(network, adapt)


def step_norms(network, adapt: str) -> list[str]:
    """Lists the normalisation parameters of which `norm_steps` has one for each update.

    Raises ValueError if there are none, or they do not change from update to update.
    """
    names = [*network.norm_parameters]
    if isinstance(network, KerasNetwork):  # these may be any that its own `adapt` leaves out
        names = [name for name in names if name.endswith(('/gamma', '/beta'))]
    if not names:
        raise ValueError(
            'norm_steps needs normalisation parameters that the inner loop does not change, and '
            'this network has none: give it a norm, or leave norm_steps away'
        )
    if adapt == 'head':
        raise ValueError(
            "norm_steps has normalisation change with the updates, but with adapt='head' all "
            'layers before the last are computed once: give one of the two'
        )
    return names


def takes_shared(network) -> bool:
    """Whether weights may be engine.shared.Shared: the class that defines __call__ says so."""
    network = network.network if isinstance(network, Partly) else network
    return said_with_call(network, 'takes_shared') or False


def said_with_call(network, name: str):
    """Looks an attribute up on the class that defines `__call__`.

    A subclass with its own `__call__` may not keep the promise of the attribute.
    """
    for kind in type(network).__mro__:
        if '__call__' in vars(kind):
            return vars(kind).get(name)
    return None
