"""Outputs that know few characters, and lines out of TensorFlow's errors."""

import io
import os
import subprocess
import sys

import pytest
from command_line import ROOT

from fewshot.checks import first_line
from fewshot.runs.terminal import print_anything

GRAPH_ERROR = (
    'Graph execution error:\n\nDetected at node A defined at (most recent call last):\n'
    '<stack traces unavailable>\nConnection reset\nmore'
)


@pytest.mark.parametrize(
    'text, line',
    [(GRAPH_ERROR, 'Connection reset'), ('disk full', 'disk full'), ('', 'ValueError')],
)
def test_first_line(text, line):
    assert first_line(ValueError(text)) == line


def test_any_text_is_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, 'ascii'))
    print_anything()
    print('α caf\udce9', flush=True)
    assert written.getvalue() == b'\\u03b1 caf\\udce9\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    'script', ['main.py', 'scripts/model/publish.py', 'scripts/paper/report.py']
)
def test_help_where_the_output_is_ascii(script):
    line = [sys.executable, ROOT / script, '--help']
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run(line, capture_output=True, env=environment, timeout=600)
    assert b'Traceback' not in done.stderr and len(done.stdout) > 300
    if script == 'main.py':
        assert b'\\u03b1, step size of the inner loop' in done.stdout
