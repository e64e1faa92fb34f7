"""The printed lines of a run, its pages in TensorBoard, and its summaries' files."""

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from fewshot.checks import first_line
from fewshot.runs.flags import ANYTIME, FLAGS
from fewshot.runs.results import shown_value
from maml import Results


class Log:
    """Summaries for TensorBoard, the printed lines of a run, and a line of progress.

    objective: the source's, 'loss' or 'accuracy'. pretrain, end: the iterations of joint training,
    and of both. update: the inner update whose query result is printed; None without query sets.
    interval: iterations between printed lines. start: the first iteration; state: the result of
    `state` before it. folder: that of the summaries, if there are to be any; writer: what writes
    them, else None. original: whether the original's lines are printed too.
    """

    def __init__(
        self,
        objective: str,
        pretrain: int,
        end: int,
        update: int | None,
        interval: int,
        start: int = 0,
        state: dict | None = None,
        folder: Path | None = None,
        original: bool = False,
    ):
        self.objective, self.pretrain, self.end, self.start = objective, pretrain, end, start
        self.update, self.interval, self.original = update, interval, original
        before, after = (state or {}).get('printing', ([], []))
        # The next printed line shows their means.
        self.before, self.after = [*map(np.float32, before)], [*map(np.float32, after)]
        self.best = ((state or {}).get('best') or {}).get(objective, np.nan)  # of the validations
        self.folder, self.done = folder, start
        self.clock = self.shown = time.perf_counter()
        self.writer = tf.summary.create_file_writer(str(folder)) if folder else None

    def state(self) -> dict:
        return {'printing': [[*map(float, values)] for values in (self.before, self.after)]}

    def introduce(self, values: dict):
        """Writes the flags of a run that begins.

        TensorBoard's HPARAMS tab gets those of a run that goes on too: they may be others.
        """
        if self.writer:
            # TensorBoard refuses the bytes of a path, such as --data_dir, that is not UTF-8.
            shown = values | {
                name: str(value).encode(errors='backslashreplace').decode()
                for name, value in values.items()
                if not isinstance(value, bool | int | float)
            }
            with self.writer.as_default():
                write_session(shown, str(self.folder), self.end)
                if self.start == 0:
                    rows = [f'`--{name}` | {value}' for name, value in shown.items()]
                    text = '\n'.join(['flag | value', '--- | ---', *rows])
                    tf.summary.text('flags', text, step=0)

    def summaries(self, prefix: str, results: Results, iteration: int) -> list[float]:
        """Writes the scalars of one meta-batch under the original's tags.

        Returns the means of the objective to print: before any update, and after `update`.
        """
        for kind in ('loss',) if self.objective == 'loss' else ('loss', 'accuracy'):
            before, after = results.of(kind)
            pre, post = np.mean(before), np.mean(after, axis=1) if self.update else []
            tags = [f'Pre-update_{kind}']
            tags += [f'Post-update_{kind}__step_{j}' for j in range(1, len(post) + 1)]
            self._write(tuple(f'{prefix}_{tag}' for tag in tags), [pre, *post], iteration)
        return [pre, post[self.update - 1]] if self.update else [pre]  # the objective comes last

    def _write(self, tags: tuple[str, ...], values: list, iteration: int):
        if self.writer:
            with no_room():
                self._scalars(tags, tf.constant(values), tf.constant(iteration, tf.int64))

    @tf.function(autograph=False)  # one call for all of them takes a fifth of the time
    def _scalars(self, tags: tuple[str, ...], values: tf.Tensor, iteration: tf.Tensor):
        with self.writer.as_default():
            for i, tag in enumerate(tags):
                tf.summary.scalar(tag, values[i], step=iteration)

    def training(self, results: Results, iteration: int):
        """Prints the means of all meta-batches since the last line, if one is due."""
        means = self.summaries('metatrain', results, iteration)
        for shown, mean in zip((self.before, self.after), means):
            shown.append(mean)
        if self.update:
            self._write((f'training/{self.objective}',), [np.mean(self.after)], iteration)
        if iteration % self.interval == 0 and iteration != 0:
            self.report(iteration, self.original)
            self.before, self.after = [], []

    def report(self, iteration: int, original: bool = False):
        """Prints where the run is, and the means since the last line; nothing if there are none.

        original: whether the original's line follows.
        """
        means = [np.mean(shown) for shown in (self.before, self.after) if shown]
        if not means:
            return
        label, end = f'Iteration {iteration - self.pretrain}', self.end - self.pretrain
        if min(iteration, self.end - 1) < self.pretrain:
            label, end = f'Pretrain Iteration {iteration}', self.pretrain
        texts = [f'{shown_value(self.objective, means[0])} before any update']
        if len(means) > 1:
            updates = '1 update' if self.update == 1 else f'{self.update} updates'
            texts.append(f'{shown_value(self.objective, means[1])} after {updates}')
        self.line(f'{label} of {end}: {self.objective} {", ".join(texts)}{self.progress()}')
        if original:
            self.line(f'{label}: {", ".join(map(str, means))}')

    def step_sizes(self, rates: dict[str, np.ndarray], iteration: int):
        """Writes each step size as a scalar; those of many weights as a mean and a histogram."""
        means = [np.float32(np.mean(value)) for value in rates.values()]
        self._write(tuple(f'update_lr/{name}' for name in rates), means, iteration)
        for name, value in rates.items():
            if self.writer and np.ndim(value):
                with self.writer.as_default():
                    tf.summary.histogram(f'update_lr/{name}/all', value, step=iteration)

    def validation(self, results: Results, interval: float, iteration: int):
        """Writes the summaries of a validation; prints the original's line if it is asked for."""
        before, after = self.summaries('metaval', results, iteration)
        if self.original:
            self.line(f'Validation results: {before}, {after}')
        better = np.fmax if self.objective == 'accuracy' else np.fmin  # a nan is never the best
        self.best = better(self.best, after)
        tags = [f'validation/{name}{self.objective}' for name in ('', 'interval_', 'best_')]
        self._write(tuple(tags), [*map(np.float32, (after, interval, self.best))], iteration)

    def steps(self, first: int, last: int, loss: float):
        """Tells how long the first step took; on a terminal, shows where the run is, too."""
        now = time.perf_counter()
        if first == self.start:
            self.line(f'Compiled in {now - self.clock:.0f} s.')
            self.clock = now  # of the steps after it
        self.done = last
        if sys.stdout.isatty() and now - self.shown > 1:
            self.shown = now
            where = f'Iteration {last} of {self.end}: loss {loss:.4g}{self.progress()}'
            print(where, end='\033[K\r', flush=True)

    def progress(self) -> str:
        """Tells the speed and the time left: the end of a line, '' before the second step."""
        steps = self.done - self.start - 1
        if steps < 1:
            return ''
        rate = steps / (time.perf_counter() - self.clock)
        seconds = min((self.end - self.done) / rate, datetime.timedelta.max.total_seconds() / 2)
        left = datetime.timedelta(seconds=round(seconds))
        speed = f'{rate:,.0f} per second' if rate >= 10 else f'{rate:.1f} per second'
        speed = f'{1 / rate:.1f} s each' if rate < 1 else speed
        return f'; {speed}, {left} left' if self.done < self.end else f'; {speed}'

    def picture(self, name: str, picture: np.ndarray, iteration: int):
        with self.writer.as_default():
            tf.summary.image(name, picture[np.newaxis], step=iteration)

    def line(self, text: str):
        print(text + ('\033[K' if sys.stdout.isatty() else ''), flush=True)

    def flush(self):
        with no_room():
            if self.writer:
                self.writer.flush()

    def close(self):
        with suppress(tf.errors.OpError):
            if self.writer:
                self.writer.close()


@contextmanager
def no_room() -> Iterator[None]:
    """Turns TensorFlow's error about a file of summaries into an OSError of one sentence."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f'the summaries cannot be written ({first_line(error)})') from error


def write_session(values: dict, run: str, end: int):
    """Writes the flags that tell a run from others, for TensorBoard's HPARAMS tab.

    values: those of all flags. run: its folder. end: the iteration it is to end with; the flags are
    written as if they belonged to it, so that a run that goes on forgets them and writes its own.
    """
    from tensorboard.plugins.hparams import summary_v2  # --log=False does without the package

    telling = [flag.name for flag in FLAGS if flag.may_change != ANYTIME]
    shown = {name: values[name] for name in (*telling, 'metatrain_iterations')}
    session = summary_v2.hparams_pb(shown, trial_id=run)
    tf.summary.experimental.write_raw_pb(session.SerializeToString(), step=end)


def event_files(folder: str | Path) -> list[Path]:
    """Lists the files of a run's summaries, the oldest first."""
    found = Path(folder).glob('events.out.tfevents.*')
    return sorted(path for path in found if path.is_file())


def forget_summaries(folder: str | Path, start: int):
    """Removes the summaries of iteration `start` and later, which the run writes again.

    The unreadable end of a file whose writer died goes with them.
    """
    for path in event_files(folder):
        records = read_events(path)  # the first one, of step 0, tells the version of the file
        kept = [r for r in records if tf.compat.v1.Event.FromString(r).step < start]
        if len(kept) < 2:
            path.unlink()
            continue
        beside = path.with_name(path.name.replace('events.', 'part.'))
        with tf.io.TFRecordWriter(str(beside)) as writer:
            for record in kept:
                writer.write(record)
        beside.replace(path)


def read_events(path: Path) -> list[bytes]:
    """Reads the serialised events of a file, up to the first that is damaged or none."""
    records = []
    with suppress(tf.errors.DataLossError, tf.errors.OutOfRangeError, DecodeError):
        for record in tf.data.TFRecordDataset(str(path)):
            tf.compat.v1.Event.FromString(record.numpy())
            records.append(record.numpy())
    return records


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """Reads the numbers in a run's summaries: {tag: {iteration: value}} in order of iteration."""
    number = tf.float32.as_datatype_enum  # others are texts and pictures
    found = {}
    for path in event_files(folder):
        for event in map(tf.compat.v1.Event.FromString, read_events(path)):
            for value in event.summary.value:
                if value.tensor.dtype == number and not value.tensor.tensor_shape.dim:
                    values = found.setdefault(value.tag, {})
                    values[event.step] = float(tf.make_ndarray(value.tensor))
    return {tag: dict(sorted(values.items())) for tag, values in found.items()}
