"""The settings of the site: `sphinx-build -W docs docs/_build/html`."""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]  # main.py and utils.py are not installed

import fewshot.start  # noqa: E402, F401  loads TensorFlow quietly

project = 'MAML in TensorFlow 2'
copyright = 'the contributors, MIT licence'
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'myst_nb', 'flag_table']
html_theme = 'furo'
html_title = project
html_show_sphinx = False
html_static_path = ['static']
html_css_files = ['site.css']
exclude_patterns = ['_build']

myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3  # links to headings, as on GitHub
myst_links_external_new_tab = False
nb_execution_mode = 'off'  # the outputs in the notebook are shown; a test executes it
nb_merge_streams = True

autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
default_role = 'py:obj'  # `name` in a docstring is a link where the reference has that name


def as_text(line: str, names: set[str]) -> str:
    """A docstring's line: flags are code, arguments bold, and what would be markup is plain."""
    parts = re.split(r'(`[^`]+`|\*\w+\*|^:\w+ \S+:|^:\w+:)', line)
    parts[::2] = (re.sub(r'([*|\\]|_(?=\W|$))', r'\\\1', part) for part in parts[::2])
    parts[::2] = (re.sub(r'--[a-z]\w*(=\w+)?', r'``\g<0>``', part) for part in parts[::2])
    text = ''.join(parts)
    named = '|'.join(map(re.escape, names))
    return re.sub(rf'(^ *|[.;,] )({named}): ', r'\1**\2**: ', text) if names else text


def arguments(item) -> set[str]:
    try:
        return set(inspect.signature(item).parameters)
    except (TypeError, ValueError):  # a module, an attribute
        return set()


def plain_docstring(app, what, name, item, options, lines):
    """Docstrings are prose, not reStructuredText; paragraphs that are indented are commands."""
    names, found, literal = arguments(item), [], False
    for before, line in zip(['', *lines], lines):
        if line.strip() and not before.strip():
            if line.startswith('    ') and not literal:
                found += ['::', '']
            literal = line.startswith('    ')
        found.append(line if literal else as_text(line, names))
    lines[:] = found


def skip(app, what, name, item, skipped, options) -> bool | None:
    """Leaves out fields of named tuples, which the signature has, and read-only doors to others."""
    text = inspect.getdoc(item) or ''
    return True if text.startswith(('Alias for field number', 'attrgetter(')) else None


def setup(app):
    app.connect('autodoc-process-docstring', plain_docstring)
    app.connect('autodoc-skip-member', skip)
