"""Tables of evaluations, and files that are written whole or not at all."""

import csv
from pathlib import Path

import numpy as np
import scipy.special


def confidence(values: np.ndarray) -> np.ndarray:
    """Computes half of the 95 % interval of the mean of a small sample, by Student's t.

    values: [tasks or seeds, ...]. Returns [...]; nan where one is infinite.
    """
    count = len(values)
    # scipy.stats has both factors, and takes as long to import as a tenth of TensorFlow.
    with np.errstate(invalid='ignore'):  # inf - inf
        standard_error = np.std(values, axis=0, ddof=1) / count**0.5
    return standard_error * scipy.special.stdtrit(count - 1, 0.975)


def shown_value(objective: str, value: float) -> str:
    """Formats an accuracy in percent, or a loss, for people."""
    return f'{100 * value:.1f} %' if objective == 'accuracy' else f'{value:.4g}'


def guessing(source, mean: float, interval: float) -> str:
    """Tells that an accuracy of queries is no better than guessing: a clause, '' if it is better.

    source: of the tasks, a data_generator.DataGenerator.
    """
    measured = source.objective == 'accuracy' and source.has_queries
    if not measured or mean - interval > 1 / source.dim_output:
        return ''
    return f'no better than guessing, which is {100 / source.dim_output:.1f} %'


def read_evaluation(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads means, standard deviations and halves of the 95 % intervals out of a test_*.csv.

    Each is [1 + updates]. Raises ValueError if the file is no such table.
    """
    try:
        with open(path, newline='') as file:
            header, *rows = csv.reader(file)
        size = sum(name.startswith('update') for name in header)  # split and iteration may follow
        means, deviations, intervals = np.array([row[:size] for row in rows], float)
        if header[:size] != [f'update{i}' for i in range(size)] or size == 0:
            raise ValueError
    except (ValueError, csv.Error):
        raise ValueError(
            f'{path} is not the table main.py writes (a header, then means, standard deviations '
            'and confidence intervals); evaluate the run again with --train=False'
        ) from None
    return means, deviations, intervals


def write_whole(path: Path, content: bytes):
    """Writes a file so that it is there whole or, if the process dies, not at all."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes]):
    """Writes files together: none is replaced before all are written whole. Raises OSError."""
    beside = {path: path.with_name(path.name + '.part') for path in contents}
    try:
        for path, content in contents.items():
            beside[path].write_bytes(content)
        for path in contents:
            beside[path].replace(path)
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error.strerror or error})') from error
    finally:
        for part in beside.values():
            part.unlink(missing_ok=True)
