"""Class MetaModel: Keras's fit, evaluate and callbacks."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from data_generator import Batch, whole_number
from fewshot.checks import tells_names
from fewshot.data.batches import fitting_batch, named_batch
from fewshot.engine.fast import FastMAML
from fewshot.use.learner import Learner, checked_finite
from maml import Arrays, Results

# What Keras takes beside examples.
OTHERS = ('batch_size', 'sample_weight', 'class_weight', 'validation_split')


def takes_tasks(function: Callable) -> Callable:
    """Decorates a method of Keras: errors of data, and data other than tasks, are ValueErrors."""

    @functools.wraps(function)
    def call(self, x=None, y=None, **named):
        if any(part is not None for part in (y, *map(named.get, OTHERS))):
            raise ValueError(
                'tasks are whole meta-batches: give each as a Batch or a tuple (support_x, '
                f'support_y, query_x, query_y), and neither y nor {", ".join(OTHERS)}'
            )
        try:
            return function(self, x, **named)
        except tf.errors.InvalidArgumentError as error:  # of a generator, from within a graph
            found = re.search('(?:Value|Type)Error: (.+?)\nTraceback', str(error), re.DOTALL)
            if not found:
                raise
            raise ValueError(found[1]) from error

    return call


class MetaModel(keras.Model):
    """A FastMAML with Keras's `compile`, `fit` and `evaluate`, and a Learner's `adapt`.

    A batch of Keras is a meta-batch here, see `as_dataset`; its callbacks work, and so do
    `save_weights` and `load_weights`.

    model: a FastMAML; or a keras.Model or other network, from which one is made with `loss`,
    `update_lr` and FastMAML's other arguments. updates: how many updates the metrics tell of, at
    least as many as in training. transductive: that of evaluation, as in FastMAML.evaluate.
    Attributes: maml, the FastMAML; learner, its Learner.
    Raises ValueError for arguments that do not fit each other, and the errors of their makers.
    """

    supports_jit = False  # as a whole: pieces of it are compiled

    @tells_names(FastMAML)
    def __init__(
        self,
        model,
        loss: Callable | None = None,
        updates: int = 1,
        transductive: bool = True,
        name: str = 'maml',
        **given,
    ):
        super().__init__(name=name)
        maml = as_maml(model, loss, given)
        self.maml, self.learner = maml, Learner(maml)
        updates = whole_number('updates', updates)
        self.updates, self.transductive = max(updates, maml.num_updates), transductive
        self.measured = TaskMeans(self.updates, maml, self.learner.is_classifier)
        self.watches, self.sizes = True, {}
        self.theta = KerasVariables(maml.weights, 'theta')
        if maml.norms:
            self.norms = KerasVariables(maml.norms, 'norms')
        if maml.rates:
            self.rates = KerasVariables(maml.rates, 'rates')
        self.built = True

    @tells_names(keras.Model.compile)
    def compile(
        self,
        optimizer=None,
        *,
        training_metrics: bool = True,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        **others,
    ):
        """Prepares for training as Keras's `compile` does.

        optimizer: that of the outer loop; None, the FastMAML's own, Adam. training_metrics: whether
        to measure all metrics of the training tasks too, which takes an evaluation per step, else
        the loss alone. Raises ValueError for a loss or metrics: the tasks' own are taken.
        """
        if others:
            raise ValueError(
                f'compile takes no {", ".join(others)} here: the loss was given when the model was '
                'made, and losses and accuracies of tasks are the metrics'
            )
        if optimizer is not None:
            self.maml.set_optimizer(keras.optimizers.get(optimizer))
        self.watches = training_metrics
        given = {'run_eagerly': run_eagerly, 'steps_per_execution': steps_per_execution}
        super().compile(optimizer=self.maml.metatrain_optimizer, jit_compile=False, **given)

    @tells_names(keras.Model.fit)
    @takes_tasks
    def fit(
        self, x, *, steps_per_epoch=None, validation_data=None, validation_steps=None, **named
    ) -> keras.callbacks.History:
        """Trains as Keras's `fit`; x, validation_data: batches [T, ...] of tasks, see `as_dataset`.

        Tasks that never end go on from epoch to epoch, and begin again for each validation. Raises
        ValueError for anything but tasks.
        """
        tasks = as_dataset(x, 'steps_per_epoch', steps_per_epoch)
        named = {'steps_per_epoch': steps_per_epoch, 'shuffle': False} | named
        if validation_data is not None:
            data = as_dataset(validation_data, 'validation_steps', validation_steps)
            named |= {'validation_data': data, 'validation_steps': validation_steps}
        self.sized('train', tasks.element_spec)
        return super().fit(tasks, **named)

    @takes_tasks
    def evaluate(self, x=None, *, steps=None, **named):
        """Evaluates as Keras; x: batches [T, ...], see `as_dataset`, else ValueError."""
        tasks = as_dataset(x, 'steps', steps)
        self.sized('test', tasks.element_spec)
        return super().evaluate(tasks, steps=steps, **named)

    @takes_tasks
    def predict(self, x, *, steps=None, **named) -> np.ndarray:
        """Predicts the queries of tasks after the updates of training: [tasks, examples, out].

        It works as Keras's `predict`; x: tasks, see `as_dataset`. Returns class probabilities, or
        outputs of regression. Raises ValueError for others, and if an adaptation diverges.
        """
        tasks = as_dataset(x, 'steps', steps)
        self.sized('predict', tasks.element_spec)
        output = super().predict(tasks, steps=steps, **named)
        return checked_finite({'output': output}, 'the answers')['output']

    # Keras's, of which x is a meta-batch, see `as_batch`.

    @takes_tasks
    def train_on_batch(self, x, **named):
        """Takes one outer step on a batch [T, ...] of tasks, and returns the metrics before it."""
        return super().train_on_batch(self.sized('train', x), **named)

    @takes_tasks
    def test_on_batch(self, x, **named):
        """Returns the metrics of a batch [T, ...] of tasks."""
        return super().test_on_batch(self.sized('test', x), **named)

    @takes_tasks
    def predict_on_batch(self, x) -> np.ndarray:
        """Predicts the queries of a batch [T, ...] of tasks: [T, examples, out], as `predict`."""
        output = super().predict_on_batch(self.sized('predict', x))
        return checked_finite({'output': output}, 'the answers')['output']

    def sized(self, kind: str, tasks) -> Batch:
        """Returns a Batch. For other sizes than the last Keras makes its function of a kind anew.

        It would go on with unknown sizes, and programs need to know them.
        """
        batch = as_batch(tasks)
        sizes = [tuple(part.shape) for part in batch]
        if self.sizes.get(kind, sizes) != sizes:
            getattr(self, f'make_{kind}_function')(force=True)
        self.sizes[kind] = sizes
        return batch

    # Keras calls these for each meta-batch.

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """Takes one outer step. The metrics are those of the weights before it."""
        batch = batch_in(data)
        if self.watches:
            self.measured.update(self.maml.evaluate(batch, self.updates))
        loss = self.maml.metatrain_step(batch)
        if self.watches:
            return self.measured.results()
        self.measured.means['loss'].update_state(loss)
        return self.measured.results(['loss'])

    def test_step(self, data) -> dict[str, tf.Tensor]:
        """Computes the metrics of a meta-batch."""
        batch = batch_in(data)
        self.measured.update(self.maml.evaluate(batch, self.updates, self.transductive))
        return self.measured.results()

    def predict_step(self, data) -> tf.Tensor:
        maml, batch = self.maml, batch_in(data)
        output = maml.evaluate(batch, maml.num_updates, self.transductive).outputsb[-1]
        return tf.nn.softmax(output) if self.learner.is_classifier else output

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The means over the tasks of an epoch."""
        return [*self.measured.means.values()]

    # One task, from arrays.

    def adapt(self, *arguments, **named) -> Arrays:
        """Adapts to a task, see Learner.adapt."""
        return self.learner.adapt(*arguments, **named)

    def predict_task(self, *arguments, **named) -> np.ndarray:
        """Predicts as Learner.predict; Keras's `predict` takes no weights, and data in batches."""
        return self.learner.predict(*arguments, **named)

    def get_config(self) -> dict:
        """Raises NotImplementedError: weights can be saved, the model is code."""
        raise NotImplementedError(
            'only the weights of this model can be saved: save_weights(PATH.weights.h5), or '
            'ModelCheckpoint(PATH.weights.h5, save_weights_only=True)'
        )


class KerasVariables(keras.Layer):
    """Variables of a FastMAML as Keras sees them, for counting, saving and histograms."""

    def __init__(self, variables: dict[str, tf.Variable], name: str):
        super().__init__(name=name)
        for key, variable in variables.items():
            shape, dtype = tuple(variable.shape), variable.dtype.name
            own = self.add_weight(shape, 'zeros', dtype, name=key.replace('/', '.'))
            own._value = variable  # the same one, not a copy: Keras has no other way to say so
        self.built = True


class TaskMeans:
    """Means over tasks of losses and, for a classifier, accuracies.

    {'loss_0': before any update, on the support set; 'loss_1': after one, on the query set; ...;
    'loss': after as many as in training; 'accuracy_0': ...}
    """

    def __init__(self, updates: int, maml: FastMAML, is_classifier: bool):
        self.objectives = ['loss', 'accuracy'] if is_classifier else ['loss']
        self.trained, self.means = maml.num_updates, {}
        for objective in self.objectives:
            for name in (objective, *(f'{objective}_{i}' for i in range(updates + 1))):
                self.means[name] = keras.metrics.Mean(name, maml.dtype.name)

    def update(self, results: Results):
        for objective in self.objectives:
            before, after = results.of(objective)
            values = [before, *tf.unstack(after)]  # [T] each
            for i, value in enumerate(values):
                self.means[f'{objective}_{i}'].update_state(value)
            self.means[objective].update_state(values[self.trained])

    def results(self, names: Iterable[str] | None = None) -> dict[str, tf.Tensor]:
        return {name: self.means[name].result() for name in names or self.means}


def as_maml(model, loss: Callable | None, given: dict) -> FastMAML:
    """Returns the FastMAML of a MetaModel, whose arguments and errors it has."""
    if isinstance(model, FastMAML):
        if loss is not None or given:
            raise ValueError('a FastMAML has a loss and settings already: give none')
    elif loss is None or 'update_lr' not in given:
        raise ValueError('a network needs a loss and update_lr, the inner step size')
    else:
        model = FastMAML(model, loss, **given)
    if model.num_updates < 1 or model.replicas.strategy or tf.distribute.has_strategy():
        raise ValueError(
            'MetaModel needs num_updates of at least 1, and one device: for several there is '
            'Trainer, main.py --strategy'
        )
    return model


def batch_in(data) -> Batch:
    """Returns the meta-batch in what Keras hands to a step: it, or (it, None, None)."""
    return Batch(*(data[0] if isinstance(data[0], tuple) else data))


def is_plain(tasks) -> bool:
    """Whether these are four arrays, tensors or specs without names."""
    return type(tasks) is tuple and len(tasks) == 4 and all(hasattr(x, 'shape') for x in tasks)


def as_batch(values, *words: str) -> Batch:
    """Returns a Batch, a dict of its names or (support_x, support_y, query_x, query_y) as a Batch.

    words: those of named_batch. Raises ValueError as fitting_batch does, and for a tuple if inputs
    and labels have the same size, so that no check would find them in another order.
    """
    batch = fitting_batch(Batch(*values) if is_plain(values) else named_batch(values, *words))
    if is_plain(values) and batch.inputa.shape[2] == batch.labela.shape[2] is not None:
        raise ValueError(
            'inputs and labels have the same size, so nothing tells the order in a tuple: write '
            'Batch(inputa=support_x, labela=support_y, inputb=query_x, labelb=query_y)'
        )
    return batch


def as_dataset(tasks, steps_name: str, steps: int | None) -> tf.data.Dataset:
    """Returns tasks as a tf.data.Dataset of Batches.

    tasks: such a dataset, see `DataGenerator.dataset`; a Batch; or a list or generator of Batches.
    For a Batch, see `as_batch`. steps_name, steps: how many meta-batches are wanted, by the name of
    the argument that says so. Raises ValueError as `as_batch` does, if sizes are not known, or
    tasks never end and nothing says how many are wanted.
    """
    if not isinstance(tasks, tf.data.Dataset):
        is_one = isinstance(tasks, Batch | Mapping) or is_plain(tasks)
        tasks = dataset_of_batches([tasks] if is_one else tasks)
    remedy = 'dataset.map(lambda a, b, c, d: Batch(inputa=a, labela=b, inputb=c, labelb=d))'
    spec = as_batch(tasks.element_spec, 'what a dataset of tasks holds must be', remedy)
    if any(None in part.shape for part in spec):
        raise ValueError(
            'the sizes of tasks must be fixed (batch(T, drop_remainder=True) fixes their number), '
            f'but they are {spec}'
        )
    if isinstance(tasks.element_spec, Mapping):
        tasks = tasks.map(lambda arrays: Batch(**arrays))
    if steps is None and tasks.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f'these tasks never end: say by {steps_name} how many meta-batches')
    return tasks


def dataset_of_batches(batches: Iterable[Batch]) -> tf.data.Dataset:
    """Makes a dataset of a list of Batches, or of a generator, once. Raises ValueError for none."""
    fixed = isinstance(batches, Sequence)
    if fixed:
        batches = [*map(as_batch, batches)]
        sizes = {tuple(tuple(values.shape) for values in batch) for batch in batches}
        if len(sizes) > 1:
            raise ValueError(f'all Batches must have the same sizes, but there are {sizes}')
    try:
        iterator = iter(batches)
        first = as_batch(next(iterator))
    except (TypeError, StopIteration):
        raise ValueError(
            'tasks must be a tf.data.Dataset, as source.dataset(split, num_tasks) is, a Batch, or '
            f'a list or generator of Batches, but this is {type(batches).__name__}'
        ) from None
    rest = batches if fixed else itertools.chain([first], iterator)
    spec = Batch(*(tf.TensorSpec(values.shape, values.dtype) for values in first))
    made = tf.data.Dataset.from_generator(lambda: map(as_batch, rest), output_signature=spec)
    return made.apply(tf.data.experimental.assert_cardinality(len(batches))) if fixed else made
