#!/usr/bin/env python
"""Trains an exported run by JAX's runtime, on whatever device that has: a GPU, for example.

    python scripts/device/train.py FOLDER

FOLDER is from scripts/device/transfer.py. Only JAX and NumPy are needed, and this checkout, not
TensorFlow. The tasks are those that main.py would draw. The first loss is compared with
TensorFlow's before training goes on. The same line again continues from the newest
FOLDER/stateN.npz, after whatever stopped it.

Tried with JAX 0.6.2 to 0.12.0.1 on CPUs. This version has not been run on a GPU; an earlier one
has, on an H200.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fewshot.engine.exported import Training
from fewshot.runs.terminal import Signals, print_anything


def keep_products_exact():
    """Has NVIDIA's libraries round no factors to TF32; call it before JAX is imported.

    XLA's own products, by Triton, would round them too.
    """
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'
    others = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{others} --xla_gpu_enable_triton_gemm=false'


def positive(text: str) -> int:
    """Reads a number of iterations. Raises ValueError, which argparse tells, for less than one."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def train(folder: Path, save: int, keep: int | None):
    """Trains to the end, or until a signal; exits with 128 + its number then."""
    training = Training(folder, save, keep)
    with Signals() as signals:
        done = training.run(lambda: bool(signals.received))
    print(f'{folder} is at {done} of {training.end} iterations')
    if done < training.end:
        sys.exit(128 + (signals.received or signal.SIGTERM))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    every = 'iterations between states that '
    parser.add_argument('--save', type=positive, default=1000, help=f'{every}are written')
    parser.add_argument('--keep', type=positive, help=f'{every}stay; default: a tenth of the run')
    values = parser.parse_args(arguments)
    keep_products_exact()
    try:
        train(values.folder, values.save, values.keep)
    except ImportError as error:
        wanted = "`pip install -e '.[jax]'` installs a version that was tried"
        sys.exit(f'train.py: JAX cannot be imported ({error}): {wanted}')
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        sys.exit(f'train.py: {(str(error) or type(error).__name__).splitlines()[0]}')


if __name__ == '__main__':
    print_anything()
    main()
