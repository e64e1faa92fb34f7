#!/usr/bin/env python
"""Takes a run to another device, where TensorFlow need not be, and back.

    python scripts/device/transfer.py export FOLDER [main.py's flags]
    python scripts/device/transfer.py import FOLDER [LOGDIR]

The first writes all that scripts/device/train.py needs: the outer step as a program, the training
images, and the state that main.py would begin or go on with. The second makes checkpoints in
LOGDIR/NAME of the newest ten states that train.py has left in FOLDER, without flags, as FOLDER
knows them; main.py evaluates them (--train=False, with --test_iter for an earlier one) or trains
on. LOGDIR is that of the export if it is not given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from absl import flags

from fewshot.runs.flags import define_flags
from fewshot.runs.terminal import print_anything
from fewshot.runs.transfer import export_run, import_run
from fewshot.use.loading import refusals


def parsed(arguments: list[str]) -> flags.FlagValues:
    """Reads main.py's flags. Raises ValueError."""
    values = flags.FlagValues()
    define_flags(values)
    try:
        rest = values(['transfer.py', *arguments])[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f'"{rest[0]}" is no flag: flags are written --name=value')
    return values


def main(arguments: list[str] | None = None):
    words = sys.argv[1:] if arguments is None else arguments
    if {'--help', '-h'} & {*words}:
        print(__doc__)
    elif len(words) > 1 and words[0] == 'export':
        with refusals(__file__):
            print(export_run(Path(words[1]), parsed(words[2:])))
    elif len(words) in (2, 3) and words[0] == 'import':
        with refusals(__file__):
            print(import_run(Path(words[1]), *words[2:]))
    else:
        sys.exit('transfer.py: give `export FOLDER FLAGS` or `import FOLDER LOGDIR`')


if __name__ == '__main__':
    print_anything()
    main()
