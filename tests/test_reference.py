"""The port against the original's losses, gradients and updates, and against exact float64 arithmetic.

The cases are the .npz files of the folder MAML_REFERENCE_DIR, by default tests/reference.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.cases import load_case, build_model

FOLDER = Path(os.environ.get('MAML_REFERENCE_DIR', Path(__file__).parent / 'reference'))
CASES = sorted(FOLDER.glob('*.npz'))
