"""The training loop, and the evaluation of many tasks."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from data_generator import Batch
from fewshot.data.pictures import picture_of
from fewshot.engine.devices import machine
from fewshot.engine.fast import FastMAML
from fewshot.runs.checkpoints import write_checkpoint
from fewshot.runs.results import confidence, guessing, shown_value
from maml import TASK_AXIS, Results

GROUP = 10  # how many programs' tiny meta-batches are drawn together


class Schedule(NamedTuple):
    """The schedule of a training run, in iterations, that is, outer steps."""

    pretrain: int  # iterations of joint training, which come before meta-training
    end: int  # iterations of both
    summary: int = 100  # between summaries of what adaptation does to a training meta-batch
    picture: int = 5000  # between pictures, a multiple of the former
    validation: int = 500  # between validations, likewise
    save: int = 1000  # between checkpoints, likewise

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Splits start...end into (first, last + 1) that no summary, checkpoint or validation cuts.

        Summaries come before, checkpoints and validations after the first iteration of an interval,
        and pre-training ends with iteration `pretrain` - 1.
        """
        while start < end:
            stop = (start // self.summary + 1) * self.summary
            if start % self.save == 0:
                stop = start + 1
            stop = min(stop, end, self.pretrain if start < self.pretrain else end)
            yield start, stop
            start = stop


class Diverged(Exception):
    """The loss, or a weight, is no longer a number; the text is one sentence for the user."""


class Trainer:
    """The training loop: outer steps, and between them summaries, validations and checkpoints.

    model: a FastMAML. sources: {'train': ...} and, if that one validates, {'val': ...}; each a
    data_generator.DataGenerator or an object with its attributes and methods. tasks: T. schedule: a
    Schedule. folder: that of the checkpoints; it exists. log: a summaries.Log, or None to tell
    nothing. start: the first iteration, and state: that of the checkpoint before it, if training
    continues. settings: the settings of the model that checkpoints keep. validation_tasks: the
    number of tasks in a validation.
    Raises ValueError if the model's replicas cannot have equally many tasks.
    """

    def __init__(
        self,
        model: FastMAML,
        sources: dict,
        tasks: int,
        schedule: Schedule,
        folder: str | Path,
        log=None,
        start: int = 0,
        state: dict | None = None,
        settings: dict | None = None,
        validation_tasks: int = 100,
    ):
        self.model, self.sources, self.tasks, self.schedule = model, sources, tasks, schedule
        self.folder, self.log, self.start = Path(folder), log, start
        self.settings, self.validation_tasks = settings or {}, validation_tasks
        self.source, self.replicas = sources['train'], model.replicas
        self.slice = self.replicas.slice_of(tasks)  # of the tasks, which this process draws
        self.updates = max(model.num_updates, self.source.updates_shown)  # that are evaluated
        self.saved = start - 1  # iteration of the newest checkpoint
        # Of the best validation: {'iteration', 'accuracy' or 'loss', 'interval'}.
        self.best = (state or {}).get('best')

    def run(self, stopped: Callable = lambda: False, watch: Callable = iter) -> int:
        """Trains to the end of the schedule, or until `stopped()` in one of the processes.

        watch: wraps the iterator of the data. Returns the number of iterations done. Raises
        Diverged, and OSError if something cannot be written.
        """
        end, block = self.schedule.end, self.source.iterations_at_once
        for origin, batches in watch(self.batches()):
            begin = max(origin, self.start)
            for first, last in self.schedule.stretches(begin, min(origin + block, end)):
                if self.log and first % self.schedule.summary == 0:
                    self.summarize(Batch(*(values.numpy() for values in batches)), origin, first)
                self.steps(batches, origin, first, last)
                if last < end and self.replicas.any(stopped(), last):
                    if self.saved != last - 1:
                        self.save(last - 1)
                    return last
        return end

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yields groups of training meta-batches [block, T, ...] with the iteration of the first.

        The next ones are drawn while those before are in use. Groups begin at multiples of their
        length, wherever a run is continued: then all is as if it had not been interrupted. Small
        ones are drawn ten at a time, since Python's lock makes the loop wait at either's start.
        """
        block = self.source.iterations_at_once
        group = GROUP * block if block > 1 else 1

        def draw(origin: int) -> list[tuple[int, Batch]]:
            drawn = self.source.batches('train', origin, group, self.tasks, self.slice)
            blocks = []
            for i in range(0, group, block):
                batch = Batch(*(tf.constant(array[i : i + block]) for array in drawn))
                blocks.append((origin + i, batch))
            return blocks

        start, end = self.start, self.schedule.end
        for blocks in ahead(draw, range(start // group * group, end, group)):
            for origin, batch in blocks:
                if origin + block > start and origin < end:
                    yield origin, batch

    def summarize(self, batches: Batch, origin: int, iteration: int):
        """Logs the effect of adaptation on the meta-batch of an iteration; batches: arrays."""
        batch = Batch(*(values[iteration - origin] for values in batches))
        self.log.training(self.model.evaluate_together(batch, self.updates), iteration)
        if self.model.rates:
            rates = {name: rate.numpy() for name, rate in self.model.rates.items()}
            self.log.step_sizes(self.model.inner_loop.shown(rates), iteration)
        if iteration % self.schedule.picture == 0 and self.log.writer:
            picture = picture_of(self.source, batch, self.outputs)
            if picture is not None:
                self.log.picture(self.source.picture_name, picture, iteration)

    def outputs(self, batch: Batch) -> np.ndarray:
        """Computes outputs on the query set after each update, [J, T, examples, out]."""
        return self.model.evaluate(batch, self.updates).outputsb.numpy()

    def steps(self, batches: Batch, origin: int, first: int, last: int):
        """Takes the iterations first...last-1, and does all that is due after them."""
        positions, pretrain = (first - origin, last - origin), first < self.schedule.pretrain
        done, loss = self.model.steps(batches, *positions, pretrain=pretrain)
        if not np.isfinite(loss):
            self.stop(f'the loss is {loss} in iteration {origin + done - 1}')
        self.after(first, last, loss)

    def after(self, first: int, last: int, loss: float):
        """Logs, validates and saves as is due after the iterations first...last-1."""
        schedule = self.schedule
        if self.log:
            self.log.steps(first, last, loss)
        if first % schedule.validation == 0 and first != 0 and self.source.validates:
            self.validate(first)
        if first % schedule.save == 0 and first != 0 or last == schedule.end:
            self.save(last - 1)

    def validate(self, iteration: int):
        """Evaluates the same tasks each time; keeps the checkpoint with the best objective."""
        results, objective = self.validation_results(), self.source.objective
        values = results.of(objective)[1][self.model.num_updates - 1]  # [tasks]
        mean, interval = float(np.mean(values)), float(confidence(values))
        best = self.best or {objective: np.nan}
        verdict = 'none was finite so far'
        if np.isfinite(best[objective]):
            shown = shown_value(objective, best[objective])
            verdict = f'the best was {shown} at iteration {best["iteration"]}'
        better = is_better(mean, best[objective], objective)
        if better:
            verdict = 'the best so far'
            self.best = {'iteration': iteration, objective: mean, 'interval': interval}
        if self.log:
            self.log.validation(results, interval, iteration)
            what = f'{objective.capitalize()} on {self.validation_tasks} validation tasks'
            shown = f'{shown_value(objective, mean)} +- {shown_value(objective, interval)}'
            poor = guessing(self.source, mean, interval)
            self.log.line(f'{what}: {shown}, {verdict}{poor and f"; {poor}"}.')
        if better:
            self.save(iteration, 'best')

    def validation_results(self) -> Results:
        """Evaluates validation tasks by meta-batches, for which the evaluation is compiled."""
        whole = -(-self.validation_tasks // self.tasks) * self.tasks
        parts = []
        for i in range(0, whole, self.tasks):
            tasks = slice(i + self.slice.start, i + self.slice.stop)
            batch = self.sources['val'].batch('val', 0, whole, tasks)
            parts.append(self.model.evaluate_together(batch, self.updates))
        kept = range(self.validation_tasks)
        joined = map(np.concatenate, zip(*parts), TASK_AXIS)
        return Results(*(values.take(kept, axis) for values, axis in zip(joined, TASK_AXIS)))

    def save(self, iteration: int, kind: str = 'model'):
        """Writes a checkpoint after all output: nothing is missing when the run continues.

        Raises OSError, and Diverged if a weight is not a number.
        """
        if not self.model.is_finite():
            self.stop(f'a weight is not a number after iteration {iteration}')
        if not self.replicas.is_chief:
            return
        pretraining = iteration < self.schedule.pretrain
        checkpoint = self.model.pretrain_checkpoint if pretraining else self.model.checkpoint
        state = {'flags': self.settings, 'best': self.best, 'machine': machine()}
        state |= {'classes': self.source.classes} if self.source.classes else {}
        if self.log:
            self.log.flush()  # all output so far is on the disk before the checkpoint
            state |= self.log.state()
        write_checkpoint(checkpoint, self.folder, iteration, state, kind)
        if kind == 'model':
            self.saved = iteration

    def stop(self, what: str):
        """Raises Diverged, and names the last good checkpoint."""
        last = f'{self.folder}/model{self.saved} is the last good checkpoint'
        if self.saved < 0:
            last = 'there is no checkpoint yet'
        raise Diverged(
            f'{what}, so training has stopped; {last}. Try a smaller --update_lr or --meta_lr, or '
            '--norm=batch_norm, with another --logdir'
        )


def is_better(value: float, best: float, objective: str) -> bool:
    """Whether a loss is lower, or an accuracy higher; a value that is not finite never is."""
    if not np.isfinite(value) or not np.isfinite(best):
        return bool(np.isfinite(value))
    return value > best if objective == 'accuracy' else value < best


def evaluate_tasks(
    model: FastMAML, source, split: str, tasks: int, num_updates: int, transductive: bool = True
) -> Iterator[np.ndarray]:
    """Evaluates the source's objective for tasks of a split, before and after each update.

    The arguments are those of `Trainer` and FastMAML.evaluate. Yields [some tasks, 1 + num_updates]
    at a time, which bounds the memory, together `tasks` of them or a few more.
    """
    chunk = source.tasks_at_once * model.replicas.count
    part, whole = model.replicas.slice_of(chunk), -(-tasks // chunk) * chunk

    def draw(i: int) -> Batch:
        return source.batch(split, 0, whole, slice(i + part.start, i + part.stop))

    for batch in ahead(draw, range(0, whole, chunk)):
        results = model.evaluate_together(batch, num_updates, transductive)
        before, after = results.of(source.objective)
        yield np.concatenate([[before], after]).T  # [chunk, 1 + updates]


def ahead(draw: Callable, arguments: Iterable) -> Iterator:
    """Yields draw(argument) for each, drawn in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for argument in arguments:
            ready, coming = coming, thread.submit(draw, argument)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()
