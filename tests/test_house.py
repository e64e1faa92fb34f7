"""The house: which file may import which, and how long it may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 450
FIVE = ('main.py', 'maml.py', 'data_generator.py', 'utils.py', 'special_grads.py')
# The floors: a file imports from lower ones, and from its own.
FLOORS = (
    {'special_grads'},
    {'maml', 'data_generator'},
    {'fewshot'},
    {'utils', 'main'},
    {'scripts'},
)


def files() -> list[str]:
    """The project's own, but for the tests: paths relative to the root."""
    places = [*ROOT.glob('*.py'), *(ROOT / 'fewshot').rglob('*.py'), *ROOT.glob('scripts/**/*.py')]
    return sorted(str(path.relative_to(ROOT)) for path in places)


def imports(text: str) -> Iterator[str]:
    """The modules that a file names, wherever it does: 'fewshot.runs.flags' and the like."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def floor(module: str) -> int | None:
    """Of a module of the project; None of others."""
    own = module.split('.')[0]
    return next((i for i, names in enumerate(FLOORS) if own in names), None)


def arrows(texts: dict[str, str]) -> dict[str, set[str]]:
    """{file: the files of the project that it imports}."""
    modules = {name.removesuffix('.py').replace('/', '.'): name for name in texts}
    modules |= {name.removesuffix('.__init__'): file for name, file in modules.items()}
    found = {}
    for file, text in texts.items():
        names = [part for name in imports(text) for part in (name, name.rpartition('.')[0])]
        found[file] = {modules[name] for name in names if name in modules} - {file}
    return found


def wrong_arrows(texts: dict[str, str]) -> list[str]:
    """The imports that run up, and those of main.py, which a program starts and nobody imports."""
    found = []
    for file, targets in arrows(texts).items():
        own = floor(file.split('/')[0].removesuffix('.py'))
        for target in targets:
            other = floor(target.split('/')[0].removesuffix('.py'))
            if other > own or target == 'main.py':
                found.append(f'{file} imports {target}')
    return found


def circle(texts: dict[str, str]) -> list[str]:
    """Files that import each other, if there are any."""
    left = {file: set(targets) for file, targets in arrows(texts).items()}
    left.pop('fewshot/__init__.py', None)  # it loads what it names when that is asked for
    for targets in left.values():
        targets.discard('fewshot/__init__.py')
    while free := [file for file, targets in left.items() if not targets & left.keys()]:
        for file in free:
            del left[file]
    return sorted(left)


@pytest.fixture(scope='module')
def texts() -> dict[str, str]:
    return {name: (ROOT / name).read_text() for name in files()}


def test_imports_run_one_way(texts):
    assert not wrong_arrows(texts)
    assert not circle(texts)


@pytest.mark.parametrize(
    'file, line, told',
    [
        ('maml.py', 'from fewshot.engine.fast import FastMAML', 'maml.py imports fewshot/engine'),
        ('maml.py', 'import fewshot.start', 'maml.py imports fewshot/start.py'),
        ('fewshot/runs/flags.py', 'import utils', 'fewshot/runs/flags.py imports utils.py'),
        ('scripts/measure/benchmark.py', 'import main', 'benchmark.py imports main.py'),
    ],
)
def test_an_arrow_that_runs_back_is_found(texts, file, line, told):
    assert told in ' '.join(wrong_arrows(texts | {file: f'{texts[file]}\n{line}\n'}))


def test_a_circle_is_found(texts):
    line = 'from fewshot.use.learner import Learner'
    file = 'fewshot/engine/fast.py'
    assert {file, 'fewshot/use/learner.py'} <= {*circle(texts | {file: f'{texts[file]}\n{line}\n'})}


def test_imported_names_exist(texts):
    """Also within functions, which no import of the module runs."""
    trees = {name: ast.parse(text) for name, text in texts.items()}
    there = {}  # {module: the names in it}
    for name, tree in trees.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in tree.body:
            names |= {alias.asname or alias.name for alias in getattr(node, 'names', [])}
            names |= {getattr(node, 'name', '')}
        there[name.removesuffix('.py').replace('/', '.')] = names
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in there:
                missing = {alias.name for alias in node.names} - there[node.module]
                assert not missing, f'{file}: {node.module} has no {missing}'


def test_sizes(texts):
    counts = {name: text.count('\n') for name, text in texts.items()}
    long = {name: n for name, n in counts.items() if n > MOST_LINES}
    assert not long
    assert sum(counts[name] for name in FIVE) <= 2000
    ordered = sorted(n for name, n in counts.items() if not name.endswith('__init__.py'))
    assert ordered[len(ordered) // 2] < 200


@pytest.mark.parametrize(
    'line',
    [
        'from fewshot import FastMAML, Learner, MetaModel, KerasNetwork, make_model, Trainer',
        'from maml import MAML; from data_generator import SinusoidGenerator',
    ],
)
def test_a_project_with_a_utils_and_a_main_of_its_own(tmp_path, line):
    """Nothing that a user imports imports a module of these names."""
    for name in ('utils', 'main'):
        (tmp_path / f'{name}.py').write_text('raise ImportError("this one is the user\'s own")\n')
    code = f'{line}; import sys; assert not {{"utils", "main"}} & sys.modules.keys()'
    path = {'PYTHONPATH': str(ROOT), 'PATH': ''}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_everything_that_the_package_offers_is_there():
    import fewshot

    for name in fewshot.__all__:
        assert getattr(fewshot, name).__module__ == f'fewshot.{fewshot.PLACES[name]}'
    with pytest.raises(AttributeError, match='FastMaml'):
        fewshot.FastMaml  # noqa: B018
    assert Path(fewshot.__file__).parent == ROOT / 'fewshot'
