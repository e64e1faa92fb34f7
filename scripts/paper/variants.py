#!/usr/bin/env python
"""Draws runs that differ in their inner loops, and writes a table of what they came to.

    python scripts/paper/variants.py FOLDER

FOLDER/SET/VARIANT/seedN/cls_... are runs of main.py, as scripts/paper/variants.sh leaves them; any
other names and flags will do. For each SET the figure FOLDER/variants.png has the objective over
iterations, on validation tasks or else on training meta-batches, and over inner updates on test
tasks; FOLDER/variants.md is the table. Intervals of 95 % are over seeds, and of a variant with one
seed over tasks, which the table says.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from fewshot.paper.variants import draw, read_sets, table
from fewshot.runs.terminal import print_anything
from fewshot.use.loading import refusals


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    folder = parser.parse_args(arguments).folder
    with refusals(__file__):
        sets = read_sets(folder)
        draw(folder / 'variants.png', sets)
        (folder / 'variants.md').write_text(table(sets), encoding='utf-8')
    print(folder / 'variants.md')


if __name__ == '__main__':
    print_anything()
    main()
