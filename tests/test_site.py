"""The site: it builds, loads nothing from elsewhere, and has every public name, with shapes."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROOT

import data_generator
import fewshot
import main
import maml
import special_grads
import utils
from fewshot.runs.flags import FLAGS

FILES = (main, maml, data_generator, special_grads, utils)
# Arguments that are tensors or arrays: a docstring says of which shape.
TENSORS = {
    *('x', 'y', 'rows', 'matrix', 'output', 'label', 'batch', 'weights', 'images', 'kernel'),
    *('gradient', 'patches', 'support_x', 'inputs', 'values', 'theta', 'statistics', 'left'),
}
REFERENCE = ROOT / 'docs' / 'reference'


def public() -> Iterator[tuple[str, object]]:
    """(name in the reference, object): functions and classes."""
    for module in FILES:
        for name, item in vars(module).items():
            own = getattr(item, '__module__', '') == module.__name__ or callable_of(item, module)
            if not name.startswith('_') and own and callable(item):
                yield f'{module.__name__}.{name}', item
    for name in fewshot.__all__:
        yield f'fewshot.{name}', getattr(fewshot, name)


def callable_of(item, module) -> bool:
    """Whether it is an operation of special_grads, which is an object with its function's name."""
    return type(item).__module__ == module.__name__ and bool(getattr(item, '__name__', ''))


def with_methods() -> Iterator[tuple[str, object, str]]:
    """(name, function, its docstring and its class's)."""
    for name, item in public():
        of_class = inspect.getdoc(item) or ''
        yield name, item, of_class
        if isinstance(item, type):
            for method, function in vars(item).items():
                if not method.startswith('_') and inspect.isfunction(function):
                    yield f'{name}.{method}', function, f'{inspect.getdoc(function)}\n{of_class}'


def tensors_of(item) -> set[str]:
    try:
        return TENSORS & set(inspect.signature(item).parameters)
    except (TypeError, ValueError):
        return set()


def test_every_public_name_has_a_docstring():
    assert [name for name, item in public() if not inspect.getdoc(item)] == []


def test_shapes_are_told():
    without = [
        name
        for name, item, text in with_methods()
        if tensors_of(item) and not re.search(r'\[[^\]]*\]', text)
    ]
    assert without == []


def test_every_public_name_is_on_a_page():
    """Those of modules are found by Sphinx; those of the package are listed."""
    for module in FILES:
        assert f'.. automodule:: {module.__name__}\n' in read(f'{module.__name__}.rst')
    listed = re.findall(r'^\.\. auto(?:class|function):: (\w+)$', read('fewshot.rst'), re.M)
    assert sorted(listed) == fewshot.__all__


def read(name: str) -> str:
    return (REFERENCE / name).read_text()


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip('sphinx', reason="the site needs pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp('site')
    line = ['-W', '--keep-going', '-q', ROOT / 'docs', folder]
    done = subprocess.run([sys.executable, '-m', 'sphinx', *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_reference_has_every_public_name(site):
    pages = ''.join(path.read_text() for path in (site / 'reference').glob('*.html'))
    ids = set(re.findall(r'id="([\w.]+)"', pages))
    assert {name for name, _ in public()} - ids == set()
    assert {f'--{flag.name}' for flag in FLAGS} <= set(re.findall(r'--\w+', pages))


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob('*.html'):
        text = page.read_text()
        loaded = re.findall(r'(?:src|data)="(https?:[^"]+)|<link[^>]+href="(https?:[^"]+)', text)
        assert loaded == [], page


@pytest.mark.slow
def test_notebook_is_shown_with_its_outputs(site):
    page = (site / 'tutorials' / 'keras_fit.html').read_text()
    assert page.count('<img') >= 5 and 'accuracy_1 on Armenian letters' in page
