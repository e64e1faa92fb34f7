"""Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017): networks, inner loop, outer loop.

The task axis is explicit. After the first inner step each task has weights of its own, so weights are [T, ...] like
the data, and every layer acts on all T tasks of a meta-batch at once. "a" is the support set (inner gradient), "b" the
query set (outer gradient).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from special_grads import Shared, max_pool2x2, patches3x3, per_task, sizes
from utils import (
    Batch,
    Replicas,
    accuracy,
    checkpoints,
    convolve,
    convolve_normalized,
    convolve_patches,
    cross_entropy,
    dense,
    initial_value,
    mean_squared_error,
    norm_parameters,
    normalize,
    normalize_patches,
    read_checkpoint,
    read_run_state,
)

SHARE_SIZE = 2**15  # input values of the tasks that run together, see `shares`
IMAGE_SHAPES = {'omniglot': (28, 1), 'miniimagenet': (84, 3)}  # height = width, channels
MODEL_SETTINGS = (
    'datasource',
    'num_classes',
    'norm',
    'num_filters',
    'conv',
    'max_pool',
    'baseline',
    'image_size',
    'channels',
    'update_batch_size',
    'update_lr',
    'num_updates',
    'meta_lr',
    'stop_grad',
    'seed',
)  # that `make_model` takes
Weights = dict[str, np.ndarray]  # of a task: {name: [...]}; of several: {name: [T, ...]}


class Results(NamedTuple):
    """What adaptation does to each task; J is the number of updates evaluated."""

    loss1: tf.Tensor  # [T], support, before any update
    losses2: tf.Tensor  # [J, T], query, after update 1...J
    accuracy1: tf.Tensor  # [T]
    accuracies2: tf.Tensor  # [J, T]
    outputa: tf.Tensor  # [T, examples, out], support, before any update
    outputsb: tf.Tensor  # [J, T, examples, out], query, after update 1...J


# Networks: functions of inputs and weights that know nothing of meta-learning ---------------------------------------


class FullyConnected:
    """Affine layers, each but the last followed by normalisation and ReLU.

    Attributes: parameters and norm_parameters, {name: (kind of initial value, shape)}; the former are adapted by the
    inner loop, the latter common to all tasks. Optional: takes_shared, whether weights may come as special_grads.Shared;
    dim_input and dim_output, sizes of an example and of its output, for error messages.
    """

    takes_shared = True

    def __init__(
        self, dim_input: int, dim_hidden: tuple[int, ...], dim_output: int, norm: str = 'None'
    ):
        sizes = [dim_input, *dim_hidden, dim_output]
        if min(sizes) < 1:
            raise ValueError(f'every layer needs at least one unit, but the sizes are {sizes}')
        self.dim_input, self.dim_output = dim_input, dim_output
        self.norm = norm
        self.scopes = [
            '0',
            *(str(i + 1) for i in range(1, len(dim_hidden))),
        ]  # the original's: 0, 2, 3, ...
        self.parameters, self.norm_parameters = {}, {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:]), start=1):
            self.parameters |= {
                f'w{i}': ('truncated', (fan_in, fan_out)),
                f'b{i}': ('zeros', (fan_out,)),
            }
        for scope, size in zip(self.scopes, dim_hidden):
            self.norm_parameters |= norm_parameters(norm, scope, size)

    def prepare(self, inputs: tf.Tensor, leading: int | tf.Tensor | None = None) -> tf.Tensor:
        """The part of the forward pass that no weight enters: none here."""
        return inputs

    def __call__(
        self, x: tf.Tensor, weights: dict, norms: dict, leading: int | tf.Tensor | None = None
    ) -> tf.Tensor:
        """x: [T, examples, D]; weights: [T, ...] each; leading: see utils.batch_norm. Returns [T, examples, out]."""
        for i, scope in enumerate(self.scopes, start=1):
            x = dense(x, weights[f'w{i}'], weights[f'b{i}'])
            x = tf.nn.relu(normalize(x, self.norm, scope, norms, leading=leading))
        last = len(self.scopes) + 1
        return dense(x, weights[f'w{last}'], weights[f'b{last}'])


class Convolutional:
    """Four blocks of 3x3 convolution, normalisation and ReLU, halving the image each, then an affine layer.

    max_pool: halve by 2x2 pooling (image size rounded down), else by stride 2 (rounded up). flatten: the last layer
    sees all pixels (miniImagenet, Glorot initial values), else their mean (Omniglot, normal ones).
    Attributes: as FullyConnected.
    """

    takes_shared = True

    def __init__(
        self,
        image_size: int,
        channels: int,
        filters: int,
        classes: int,
        norm: str = 'batch_norm',
        max_pool: bool = False,
        flatten: bool = False,
    ):
        if min(image_size, channels, filters, classes) < 1 or max_pool and image_size < 16:
            raise ValueError(
                f'no network for {image_size}x{image_size}x{channels} images, {filters} filters and {classes} classes: '
                'each must be at least 1, and the images 16x16 if they are pooled four times'
            )
        self.image_shape = (image_size, image_size, channels)
        self.dim_input, self.dim_output = image_size * image_size * channels, classes
        self.norm, self.max_pool, self.flatten = norm, max_pool, flatten
        self.stride = 1 if max_pool else 2
        self.parameters, self.norm_parameters = {}, {}
        for i, fan_in in enumerate([channels, filters, filters, filters], start=1):
            self.parameters |= {
                f'conv{i}': ('glorot', (3, 3, fan_in, filters)),
                f'b{i}': ('zeros', (filters,)),
            }
            self.norm_parameters |= norm_parameters(norm, str(i - 1), filters)
            image_size = image_size // 2 if max_pool else -(-image_size // 2)
        features = filters * image_size**2 if flatten else filters
        self.parameters |= {
            'w5': ('glorot' if flatten else 'normal', (features, classes)),
            'b5': ('zeros', (classes,)),
        }

    def prepare(self, inputs: tf.Tensor, leading: int | tf.Tensor | None = None):
        """The part of the forward pass that no weight enters: patches of the images [T, examples, H*W*C]."""
        patches = patches3x3(
            tf.reshape(inputs, [*sizes(inputs)[:2], *self.image_shape]), self.stride
        )
        return (
            normalize_patches(patches, leading) if self.norm == 'batch_norm' else patches
        )  # [T, examples, H', W', 9*C]

    def __call__(
        self, x, weights: dict, norms: dict, leading: int | tf.Tensor | None = None
    ) -> tf.Tensor:
        """x: from `prepare`; weights: [T, ...] each; leading: see utils.batch_norm. Returns logits [T, examples, classes]."""
        for i in range(1, 5):
            x = self._block(i, x, weights[f'conv{i}'], weights[f'b{i}'], norms, leading)
        flat = [*sizes(x)[:2], int(np.prod(x.shape[2:]))]
        features = (
            tf.reshape(x, flat) if self.flatten else tf.reduce_mean(x, [2, 3])
        )  # [T, examples, F']
        return dense(features, weights['w5'], weights['b5'])

    def _block(
        self,
        i: int,
        x,
        kernel: tf.Tensor,
        bias: tf.Tensor,
        norms: dict,
        leading: int | tf.Tensor | None,
    ) -> tf.Tensor:
        """Convolution, normalisation, ReLU and pooling, which commutes with the ReLU and comes first.

        Batch normalisation takes any bias away again, so adding it would change nothing but the rounding.
        """
        if self.norm == 'batch_norm' and i == 1:
            x = convolve_normalized(x, kernel, norms['0/beta'])
            x = max_pool2x2(x) if self.max_pool else x
        else:
            x = convolve_patches(x, kernel) if i == 1 else convolve(x, kernel, self.stride)
            x = (
                x
                if self.norm == 'batch_norm'
                else x + per_task(bias)[:, tf.newaxis, tf.newaxis, tf.newaxis]
            )
            x = normalize(x, self.norm, str(i - 1), norms, self.max_pool, leading)
        return tf.nn.relu(x)


# The algorithm ------------------------------------------------------------------------------------------------------


class MAML(tf.Module):
    """Meta-learned initial weights θ of a network, and the loops that learn them.

    Args:
        network: FullyConnected, Convolutional or anything with their attributes and methods.
        loss: function of outputs and labels, [T, examples, out] each, to one loss per task, [T].
        update_lr: α, inner step size. meta_lr: β, outer step size (Adam). num_updates: inner updates in training.
        stop_grad: first-order approximation. clip: bound on each element of the meta-gradient, or None.
        seed: of the initial weights. dtype: of everything. compiled: by XLA, else plain TensorFlow.
        replicas: the devices that share the tasks of a meta-batch.
    """

    def __init__(
        self,
        network,
        loss: Callable,
        update_lr: float,
        num_updates: int = 1,
        meta_lr: float = 1e-3,
        stop_grad: bool = False,
        clip: float | None = None,
        seed: int = 0,
        dtype=tf.float32,
        compiled: bool = True,
        replicas: Replicas | None = None,
    ):
        super().__init__()
        if num_updates < 0 or not 0 <= update_lr < float('inf') or not 0 <= meta_lr < float('inf'):
            raise ValueError(
                f'step sizes and the number of updates must not be negative or infinite, but update_lr is {update_lr}, '
                f'meta_lr {meta_lr} and num_updates {num_updates}'
            )
        self.network, self.loss, self.dtype, self.replicas = (
            network,
            loss,
            tf.as_dtype(dtype),
            replicas or Replicas(),
        )
        self.update_lr, self.num_updates, self.stop_grad, self.clip = (
            update_lr,
            num_updates,
            stop_grad,
            clip,
        )
        kinds = network.parameters | network.norm_parameters
        variables = {
            name: tf.Variable(tf.cast(initial_value(kind, shape, [seed, i]), dtype))
            for i, (name, (kind, shape)) in enumerate(kinds.items())
        }
        self.weights = {name: variables[name] for name in network.parameters}  # θ
        self.norms = {
            name: variables[name] for name in network.norm_parameters
        }  # learned by the outer loop only
        # ε as TensorFlow 1's Adam has it; Keras's own default is ten times larger.
        self.metatrain_optimizer = tf.keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        self.pretrain_optimizer = tf.keras.optimizers.Adam(meta_lr, epsilon=1e-8)
        for optimizer in (self.metatrain_optimizer, self.pretrain_optimizer):
            optimizer.build(self.parameters)
        self.checkpoint = tf.train.Checkpoint(
            weights=self.weights,
            norms=self.norms,
            metatrain_optimizer=self.metatrain_optimizer,
            pretrain_optimizer=self.pretrain_optimizer,
        )
        self._compile(compiled)

    def _compile(self, compiled: bool):
        """Each piece of the algorithm becomes one program; the outer loop differentiates through the calls of them.

        Piece by piece, XLA compiles one inner update, however many there are, instead of all of them unrolled.
        """
        piece = lambda function: tf.function(function, jit_compile=compiled, autograph=False)
        self._prepare, self._update, self._outcome, self._output = map(
            piece, (self.network.prepare, self.update, self.outcome, self.output)
        )
        self._apply = {
            optimizer: piece(optimizer.apply)
            for optimizer in (self.metatrain_optimizer, self.pretrain_optimizer)
        }
        self._steps = piece(self._steps)
        self.metatrain_step, self.pretrain_step, self._evaluate, self._evaluate_replicas = (
            tf.function(function, autograph=False)
            for function in (
                self._metatrain_step,
                self._pretrain_step,
                self._evaluate,
                self._evaluate_replicas,
            )
        )

    @property
    def parameters(self) -> list[tf.Variable]:
        """All that the outer loop learns: weights, then normalisation parameters."""
        return [*self.weights.values(), *self.norms.values()]

    # Algorithm 1 (and 2, for regression), line by line. Line 3, sampling the tasks, is data_generator.py's.

    def update(
        self,
        weights: dict,
        norms: dict,
        x: tf.Tensor,
        label: tf.Tensor,
        lr: float | tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """One inner update of every task: θ' = θ − α ∇_θ L_Ti(f_θ), lines 5 to 7 (6) and equation 1.

        weights: {name: [T, ...] or Shared}; x: prepared support inputs; label: [T, examples, out]; lr: α, if not
        `update_lr`. Returns {name: [T, ...]}.
        """
        alpha = self.update_lr if lr is None else lr
        own = {name: w.perturbation if isinstance(w, Shared) else w for name, w in weights.items()}
        with tf.GradientTape() as inner:
            inner.watch(own)
            losses = self.loss(self.network(x, weights, norms), label)  # L_Ti(f_θ), [T]
        gradients = inner.gradient(
            losses, own, unconnected_gradients='zero'
        )  # of one task each, [T, ...]
        if self.stop_grad:  # first order: they count as constants
            gradients = tf.nest.map_structure(tf.stop_gradient, gradients)
        return {name: per_task(theta) - alpha * gradients[name] for name, theta in weights.items()}

    def outcome(
        self, weights: dict, norms: dict, x: tf.Tensor, label: tf.Tensor, leading: int | None = None
    ) -> tuple:
        """Loss [T], accuracy [T] and output [T, examples, out] of tasks with the weights {name: [T, ...]}.

        leading: so many examples at the beginning have no label; they give batch normalisation its statistics.
        """
        output = self.output(weights, norms, x, leading)
        return self.loss(output, label), accuracy(output, label), output

    def output(
        self, weights: dict, norms: dict, x: tf.Tensor, leading: int | tf.Tensor | None = None
    ) -> tf.Tensor:
        """What the network makes of prepared inputs, [T, examples, out]; without the leading ones, see `outcome`."""
        if leading is None:
            return self.network(x, weights, norms)
        return self.network(x, weights, norms, leading)[:, leading:]

    def initial_weights(self, tasks: int | tf.Tensor) -> dict[str, tf.Tensor]:
        """θ, once per task: {name: [T, ...]}."""
        return {name: per_task(theta) for name, theta in self.shared_weights(tasks).items()}

    def shared_weights(self, tasks: int | tf.Tensor) -> dict[str, Shared]:
        """θ, which the tasks have in common until the first update."""
        return {
            name: Shared(tf.convert_to_tensor(theta), tf.zeros([tasks, *theta.shape], self.dtype))
            for name, theta in self.weights.items()
        }

    def shared_norms(self) -> dict[str, tf.Tensor]:
        """The normalisation parameters, read where the variables are: a compiled piece may run on another device."""
        return {name: tf.convert_to_tensor(value) for name, value in self.norms.items()}

    def first_weights(self, tasks: int) -> dict:
        """θ as `shared_weights` where that is faster, as `initial_weights` elsewhere.

        An update of shared weights is a program of its own, which takes longer to compile than it saves if more follow.
        """
        shared = self.num_updates == 1 and getattr(self.network, 'takes_shared', False)
        return self.shared_weights(tasks) if shared else self.initial_weights(tasks)

    def outer_loss(self, batch: Batch) -> tf.Tensor:
        """Σ_Ti L_Ti(f_θ'i), a scalar: the query losses after `num_updates` updates; the sum in line 10 (8)."""
        weights, norms = self.first_weights(batch.inputa.shape[0]), self.shared_norms()  # θ'i ← θ
        support, query = self._prepare(batch.inputa), self._prepare(batch.inputb)
        for _ in range(self.num_updates):
            weights = self._update(
                weights, norms, support, batch.labela
            )  # θ'i ← θ'i − α ∇ L_Ti(f_θ'i)
        losses, _, _ = self._outcome(weights, norms, query, batch.labelb)
        return tf.reduce_sum(losses)

    def meta_gradient(self, batch: Batch) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Σ_Ti L_Ti(f_θ'i) / T and its gradient for `parameters`, unclipped.

        A sum over tasks can be taken share by share: shares run side by side and need little memory each.
        Raises ValueError for a meta-batch of wrong shape or type.
        """
        check_batch(batch, self.network, self.dtype)
        tasks = batch.inputa.shape[0]
        losses, gradients = [], []
        for share in shares(batch):
            with tf.GradientTape() as outer:
                losses.append(self.outer_loss(share))
            gradients.append(
                outer.gradient(losses[-1], self.parameters, unconnected_gradients='zero')
            )
        return pairwise_sum(losses) / tasks, [
            pairwise_sum(parts) / tasks for parts in zip(*gradients)
        ]

    def _metatrain_step(self, batch: Batch) -> tf.Tensor:
        """θ ← θ − β ∇_θ Σ_Ti L_Ti(f_θ'i) / T, line 10 (8), by Adam. Returns the outer loss before the step."""
        loss, *gradients = self.replicas.mean(
            lambda share: tf.nest.flatten(self.meta_gradient(share)), batch
        )
        if self.clip is not None:
            gradients = [
                tf.clip_by_value(gradient, -self.clip, self.clip) for gradient in gradients
            ]
        self._apply[self.metatrain_optimizer](gradients, self.parameters)
        return loss

    def train(
        self, batches: Batch, first: int, last: int, pretrain: bool = False
    ) -> tuple[int, float]:
        """One outer step on each of the meta-batches first...last-1 of `batches`, [count, T, ...].

        Returns the number of the meta-batch after the last one used, and the loss of that one; if it is not `last`, the
        loss is not finite. Many steps on tiny tasks are one program, since starting each would take longer than the
        step; its length is an argument, so it is the same program for all.
        """
        step = self.pretrain_step if pretrain else self.metatrain_step
        if self.replicas.strategy:
            return self._distributed_steps(step, batches, first, last)
        if batches.inputa.shape[0] > 1:
            end, loss = self._steps(step, batches, tf.constant(first), tf.constant(last))
            return int(end), float(loss)
        return first + 1, float(step(Batch(*(values[0] for values in batches))))

    def _steps(
        self, step: Callable, batches: Batch, first: tf.Tensor, last: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        def body(i, _):
            return i + 1, step(Batch(*(values[i] for values in batches)))

        unfinished = lambda i, loss: (i < last) & tf.math.is_finite(loss)
        return tf.while_loop(unfinished, body, [first, tf.zeros([], self.dtype)])

    def _distributed_steps(
        self, step: Callable, batches: Batch, first: int, last: int
    ) -> tuple[int, float]:
        """One by one; batches: this process's tasks."""
        for i in range(first, last):
            loss = float(step(self.replicas.place(Batch(*(values[i] for values in batches)))))
            if not np.isfinite(loss):
                break
        return i + 1, loss

    def agree(self):
        """Gives the model of every process the variables of the first one's."""
        variables = [
            *self.parameters,
            *self.metatrain_optimizer.variables,
            *self.pretrain_optimizer.variables,
        ]
        for variable, value in zip(
            variables, self.replicas.agree([variable.numpy() for variable in variables])
        ):
            variable.assign(value)

    def is_finite(self) -> bool:
        """Whether all parameters are numbers."""
        return all(np.isfinite(parameter.numpy()).all() for parameter in self.parameters)

    # The joint-training baseline, and evaluation.

    def _pretrain_step(self, batch: Batch) -> tf.Tensor:
        """One Adam step on the mean support loss *before* any update. Returns that loss."""
        loss, *gradients = self.replicas.mean(self._pretrain_gradient, batch)
        self._apply[self.pretrain_optimizer](gradients, self.parameters)
        return loss

    def _pretrain_gradient(self, batch: Batch) -> list[tf.Tensor]:
        """The loss, and its gradient for `parameters`."""
        check_batch(batch, self.network, self.dtype)
        with tf.GradientTape() as tape:
            weights, x = self.initial_weights(batch.inputa.shape[0]), self._prepare(batch.inputa)
            losses, _, _ = self._outcome(weights, self.shared_norms(), x, batch.labela)
            loss = tf.reduce_mean(losses)
        return [loss, *tape.gradient(loss, self.parameters, unconnected_gradients='zero')]

    def evaluate(self, batch: Batch, num_updates: int, transductive: bool = True) -> Results:
        """Losses, accuracies and outputs of each task before and after each of `num_updates` inner updates.

        transductive: batch normalisation takes the queries' own statistics, as in training and in the paper, so that an
        answer depends on the other queries; else the statistics of the support set with the same weights.
        Raises ValueError for a meta-batch of wrong shape or type, or fewer than one update.
        """
        if num_updates < 1:
            raise ValueError(f'num_updates must be at least 1, but it is {num_updates}')
        return self._evaluate(Batch(*map(tf.convert_to_tensor, batch)), num_updates, transductive)

    def evaluate_shared(self, batch: Batch, num_updates: int, transductive: bool = True) -> Results:
        """As `evaluate`, each replica its share of the tasks, without outputs if there are several.

        batch: this process's tasks; returns the results of all. Raises ValueError as `evaluate`.
        """
        if not self.replicas.strategy:
            return self.evaluate(batch, num_updates, transductive)
        table = self._evaluate_replicas(
            self.replicas.place(batch), num_updates, transductive
        )  # [2 + 2J, T]
        loss1, losses2, accuracy1, accuracies2 = tf.split(table, [1, num_updates, 1, num_updates])
        none = tf.zeros([table.shape[1], 0, 0], self.dtype)
        return Results(
            loss1[0], losses2, accuracy1[0], accuracies2, none, tf.stack([none] * num_updates)
        )

    def _evaluate_replicas(self, batch: Batch, num_updates: int, transductive: bool) -> tf.Tensor:
        def table(share):
            results = self._evaluate(share, num_updates, transductive)
            return tf.concat(
                [
                    results.loss1[tf.newaxis],
                    results.losses2,
                    results.accuracy1[tf.newaxis],
                    results.accuracies2,
                ],
                axis=0,
            )

        return self.replicas.gather(table, batch)

    def _evaluate(self, batch: Batch, num_updates: int, transductive: bool) -> Results:
        check_batch(batch, self.network, self.dtype)
        parts = [self._evaluate_share(share, num_updates, transductive) for share in shares(batch)]
        task_axis = Results(loss1=0, losses2=1, accuracy1=0, accuracies2=1, outputa=0, outputsb=1)
        return Results(*(tf.concat(values, axis) for values, axis in zip(zip(*parts), task_axis)))

    def _evaluate_share(self, batch: Batch, num_updates: int, transductive: bool) -> Results:
        support, query, leading = self._prepare(batch.inputa), batch.inputb, None
        if not transductive:
            leading, query = (
                batch.inputa.shape[1],
                tf.concat([batch.inputa, query], axis=1),
            )  # the support set leads
        query = self._prepare(query, *([] if transductive else [leading]))
        weights, norms = self.initial_weights(batch.inputa.shape[0]), self.shared_norms()
        loss1, accuracy1, outputa = self._outcome(weights, norms, support, batch.labela)
        outcomes = []
        for _ in range(num_updates):
            weights = self._update(weights, norms, support, batch.labela)
            outcomes.append(self._outcome(weights, norms, query, batch.labelb, leading))
        losses2, accuracies2, outputsb = map(tf.stack, zip(*outcomes))
        return Results(loss1, losses2, accuracy1, accuracies2, outputa, outputsb)

    def restore(self, path: str) -> bool:
        """Loads a checkpoint of this program, or the weights in one of the TensorFlow 1 original.

        Returns whether Adam's state came with the weights. Raises ValueError, with nothing loaded, if the parameters
        in it are not those of this network.
        """
        variables = self.weights | self.norms
        values, complete = read_checkpoint(path, [*variables])
        for name, variable in variables.items():
            if name not in values:
                raise ValueError(
                    f'{path} is of another architecture: it has no {name}, but {", ".join(values)}'
                )
            if values[name].shape != tuple(variable.shape):
                raise ValueError(
                    f'{path} is of another architecture: {name} is {list(values[name].shape)} in it and '
                    f'{variable.shape.as_list()} in the network that the flags describe'
                )
        if complete:
            self.checkpoint.read(
                path
            ).assert_existing_objects_matched().expect_partial()  # the run's state is not ours
        else:
            for name, variable in variables.items():
                variable.assign(tf.cast(values[name], variable.dtype))
        return complete

    # One's own tasks, as NumPy arrays. Of one task, x [examples, ...], y [examples] and weights [...]; of several, with an axis
    # of tasks before: x [T, examples, ...], y [T, examples], weights [T, ...]. An example is an array of any shape of the
    # network's size, such as an image [height, width, channels] with values from 0 to 1, or uint8 from 0 to 255. y are
    # the classes' numbers, 0 to N-1; of regression, [(T,) examples, out].

    @classmethod
    def load(
        cls, run_folder: str | Path, checkpoint: int | str = -1, compiled: bool = False
    ) -> 'MAML':
        """The model of a training run, with the flags it was trained with, which are in the attribute `settings`.

        checkpoint: an iteration, -1 for the newest, or 'best' for that of the best validation. compiled: see MAML; it
        takes seconds for each new number of tasks or examples, and pays for many tasks.
        Raises ValueError if there is no such checkpoint, or it is damaged or does not tell its flags.
        """
        found = checkpoints(run_folder, 'best' if checkpoint == 'best' else 'model')
        if not found or checkpoint not in (-1, 'best', *found):
            there = ', '.join(map(str, checkpoints(run_folder))) or 'none'
            raise ValueError(
                f'{run_folder} has no checkpoint {"" if checkpoint == -1 else checkpoint!r}; it should be a folder that '
                f'main.py trained in, LOGDIR/cls_...; iterations that are there: {there}'
            )
        path = found[checkpoint if checkpoint in found else max(found)]
        settings = read_run_state(path).get('flags')
        if not settings:
            raise ValueError(
                f"{path} does not tell the flags it was trained with; if it is the TensorFlow 1 original's, "
                'scripts/model/import_tf1_checkpoint.py makes one that does'
            )
        model = make_model(
            **{name: settings[name] for name in MODEL_SETTINGS if name in settings},
            compiled=compiled,
        )
        model.restore(path)
        model.settings = settings
        return model

    def adapt(
        self,
        support_x: np.ndarray,
        support_y: np.ndarray,
        steps: int | None = None,
        lr: float | None = None,
        weights: Weights | None = None,
    ) -> Weights:
        """The weights after `steps` inner updates on the support set of a task, or of several; equation 1.

        steps: `num_updates` if None. lr: α, `update_lr` if None; for a classifier it is scaled so that it means the same
        for any number of examples. weights: where to start, θ if None. Raises ValueError for arrays that do not fit.
        """
        steps, lr = (
            (self.num_updates if steps is None else steps),
            (self.update_lr if lr is None else lr),
        )
        if steps < 0 or not 0 <= lr < float('inf'):
            raise ValueError(
                f'steps and lr must not be negative or infinite, but they are {steps} and {lr}'
            )
        label, single = self._labels(support_y)  # [T, examples, out]
        x = self._prepare(self._examples(support_x, 'support_x', single, label.shape[:2]))
        adapted = (
            self.initial_weights(label.shape[0])
            if weights is None
            else self._given(weights, label.shape[0], single)
        )
        lr = tf.constant(lr * self.example_scale(label.shape[1]), self.dtype)
        for _ in range(steps):
            adapted = self._update(adapted, self.norms, x, label, lr)
        return {
            name: value.numpy()[0] if single else value.numpy() for name, value in adapted.items()
        }

    def predict(
        self, query_x: np.ndarray, weights: Weights, support_x: np.ndarray | None = None
    ) -> np.ndarray:
        """Class probabilities of the queries, [(T,) queries, N]; of regression, the outputs.

        weights: from `adapt`. support_x: if given, batch normalisation takes its statistics of this support set alone, so
        that an answer does not depend on the other queries; else of the queries, as in training and in the paper.
        Raises ValueError for arrays that do not fit.
        """
        single = self._is_single(weights)
        x, leading = self._examples(query_x, 'query_x', single), None
        if support_x is not None:
            support = self._examples(support_x, 'support_x', single)
            x, leading = tf.concat([support, x], axis=1), support.shape[1]
        given = self._given(weights, x.shape[0], single)
        output = self._output(
            given, self.norms, self._prepare(x, *([] if leading is None else [leading])), leading
        )
        output = (tf.nn.softmax(output) if self.is_classifier else output).numpy()
        return output[0] if single else output

    def task_loss(self, x: np.ndarray, y: np.ndarray, weights: Weights) -> np.ndarray:
        """The mean loss of a task's examples, a number; of several tasks, [T]. Arguments and errors as of `adapt`."""
        label, single = self._labels(y)
        inputs = self._prepare(self._examples(x, 'x', single, label.shape[:2]))
        loss = self._outcome(
            self._given(weights, label.shape[0], single), self.norms, inputs, label
        )[0].numpy()
        loss *= self.loss.shots / label.shape[1] if self.is_classifier else 1
        return loss[0] if single else loss

    def example_scale(self, examples: float | tf.Tensor) -> float | tf.Tensor:
        """What α is to be multiplied by for a support set of so many examples: the loss of a classifier is a sum over them
        divided by training's K, and α is meant for N times their mean, whatever their number."""
        return self.loss.shots * self.network.dim_output / examples if self.is_classifier else 1

    @property
    def is_classifier(self) -> bool:
        return hasattr(self.loss, 'shots')

    def _labels(self, y: np.ndarray) -> tuple[tf.Tensor, bool]:
        """Labels [T, examples, out] of what `adapt` takes, and whether they are of one task without an axis for it."""
        y, out = np.asarray(y), self.network.dim_output
        single = y.ndim == (1 if self.is_classifier else 2)
        if y.ndim != 2 - single + (not self.is_classifier) or not y.size:
            raise ValueError(
                f'labels must be [examples{"" if self.is_classifier else f", {out}"}], or that with an axis of tasks before, '
                f'but they are {list(y.shape)}'
            )
        if self.is_classifier and (
            not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= out
        ):
            raise ValueError(
                f'labels must be integers from 0 to {out - 1}, but they are {y.dtype} from {y.min()} to {y.max()}'
            )
        if not self.is_classifier and y.shape[-1] != out:
            raise ValueError(
                f'labels must have {out} values per example, but they are {list(y.shape)}'
            )
        label = np.eye(out)[y] if self.is_classifier else y
        return tf.constant(label[np.newaxis] if single else label, self.dtype), single

    def _examples(
        self, x: np.ndarray, name: str, single: bool, axes: tuple | None = None
    ) -> tf.Tensor:
        """Inputs [T, examples, D] of what `adapt` takes; axes: (T, examples), if known."""
        x, size = np.asarray(x), self.network.dim_input
        x = x[np.newaxis] if single else x
        if (
            x.ndim < 3
            or not x.size
            or int(np.prod(x.shape[2:])) != size
            or axes
            and x.shape[:2] != tuple(axes)
        ):
            shape = list(getattr(self.network, 'image_shape', [size]))
            tasks, examples = axes or ('T', 'examples')
            raise ValueError(
                f'{name} must be {[*([] if single else [tasks]), examples, *shape]}, but it is {list(x.shape[single:])}'
            )
        if np.issubdtype(x.dtype, np.integer) and self.is_classifier:
            x = x / 255
        if self.is_classifier and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f'{name} must have values from 0 to 1, or integers up to 255, but they are from {x.min()} to {x.max()}'
            )
        return tf.constant(x.reshape(*x.shape[:2], size), self.dtype)

    def _is_single(self, weights: Weights) -> bool:
        """Whether weights are of one task, without an axis for it. Raises ValueError if they are not of this network."""
        wrong = [
            name
            for name in {**self.weights, **weights}
            if name not in weights or name not in self.weights
        ]
        ranks = (
            set()
            if wrong
            else {np.ndim(weights[name]) - theta.shape.rank for name, theta in self.weights.items()}
        )
        if wrong or ranks not in ({0}, {1}):
            raise ValueError(
                f'weights must be what adapt() returns, with {", ".join(self.weights)}, but they have {", ".join(weights)}'
                + (' of other shapes than one task or one axis of tasks gives' if not wrong else '')
            )
        return ranks == {0}

    def _given(self, weights: Weights, tasks: int, single: bool) -> dict[str, tf.Tensor]:
        """Weights [T, ...] from what `adapt` returns."""
        if self._is_single(weights) != single:
            raise ValueError(
                f'weights are of {"several tasks" if single else "one task"}, examples of {"one" if single else "several"}'
            )
        for name, theta in self.weights.items():
            if (
                tuple(np.shape(weights[name])[not single :]) != tuple(theta.shape)
                or not single
                and len(weights[name]) != tasks
            ):
                raise ValueError(
                    f'the weight {name} is {list(np.shape(weights[name]))}, but {tasks} tasks of {theta.shape.as_list()} are needed'
                )
        return {
            name: tf.constant(weights[name][np.newaxis] if single else weights[name], self.dtype)
            for name in self.weights
        }


def check_batch(batch: Batch, network, dtype: tf.DType):
    """Raises ValueError if a meta-batch does not fit the network, see utils.Batch."""
    for name, values in zip(Batch._fields, batch):
        if (
            values.shape.rank != 3
            or values.shape[0] != batch.inputa.shape[0]
            or values.dtype != dtype
        ):
            raise ValueError(
                f'{name} must be [tasks, examples, size] of {dtype.name}, with the {batch.inputa.shape[0]} tasks of inputa, '
                f'but it is {values.shape.as_list()} of {values.dtype.name}'
            )
        size = getattr(network, 'dim_input' if name.startswith('input') else 'dim_output', None)
        if size not in (None, values.shape[2]):
            raise ValueError(
                f'{name} is {values.shape.as_list()}, but the network takes [tasks, examples, {size}]'
            )
    for inputs, labels, name in [
        (batch.inputa, batch.labela, 'a'),
        (batch.inputb, batch.labelb, 'b'),
    ]:
        if inputs.shape[1] != labels.shape[1]:
            raise ValueError(
                f'input{name} has {inputs.shape[1]} examples per task, but label{name} has {labels.shape[1]}'
            )


def pairwise_sum(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Of neighbours, then of their sums, and so on: the same numbers are added, whether one device has all of the values or two, or
    four, have equal parts. Rounding otherwise grows to percents of the weights within 20 iterations."""
    while len(values) > 1:
        values = [tf.add_n(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def shares(batch: Batch) -> list[Batch]:
    """A meta-batch in parts: enough of them for all cores, each small enough for their caches.

    Of equally many tasks, as XLA compiles for each number of them, unless that made the parts less than half as large
    as they can be. One part on a GPU, which wants all the work at once, and where the tasks are tiny.
    """
    tasks, size = (
        batch.inputa.shape[0],
        max(batch.inputa.shape[1], batch.inputb.shape[1]) * batch.inputa.shape[2],
    )
    if tasks * size <= SHARE_SIZE // 4 or tf.config.list_physical_devices('GPU'):
        return [batch]
    most = min(max(SHARE_SIZE // size, 1), tasks)
    equal = max(n for n in range(1, most + 1) if tasks % n == 0)
    share = equal if 2 * equal >= most else most
    return [Batch(*(values[i : i + share] for values in batch)) for i in range(0, tasks, share)]


# From the command line's settings to a model ------------------------------------------------------------------------


def make_network(
    datasource: str,
    num_classes: int = 5,
    norm: str = 'batch_norm',
    num_filters: int = 64,
    conv: bool = True,
    max_pool: bool = False,
    baseline: str | None = None,
    image_size: int = 84,
    channels: int = 3,
):
    """The paper's network for a data source, miniImagenet's for folders; arguments as the flags of the same names."""
    if datasource == 'sinusoid':
        return FullyConnected(3 if baseline == 'oracle' else 1, (40, 40), 1, norm)
    if datasource not in (*IMAGE_SHAPES, 'folder'):
        raise ValueError(
            f'there is no datasource {datasource!r}, but sinusoid, {", ".join(IMAGE_SHAPES)} and folder'
        )
    size, channels = IMAGE_SHAPES.get(datasource, (image_size, channels))
    if not conv:
        return FullyConnected(size * size * channels, (256, 128, 64, 64), num_classes, norm)
    return Convolutional(
        size, channels, num_filters, num_classes, norm, max_pool, flatten=datasource != 'omniglot'
    )


def make_model(
    datasource: str,
    update_batch_size: int = 5,
    update_lr: float = 1e-3,
    num_updates: int = 1,
    meta_lr: float = 1e-3,
    stop_grad: bool = False,
    seed: int = 0,
    dtype=tf.float32,
    compiled: bool = True,
    replicas: Replicas | None = None,
    **network,
) -> MAML:
    """A model with the paper's network, loss and clipping; arguments as the flags, `network` as for `make_network`."""
    loss = mean_squared_error if datasource == 'sinusoid' else cross_entropy(update_batch_size)
    clip = 10.0 if datasource in ('miniimagenet', 'folder') else None
    return MAML(
        make_network(datasource, **network),
        loss,
        update_lr,
        num_updates,
        meta_lr,
        stop_grad,
        clip,
        seed,
        dtype,
        compiled,
        replicas,
    )
