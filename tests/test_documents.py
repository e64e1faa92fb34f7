"""The documents: commands, flags, links, files and names in them exist, and examples work.

Commands stand in blocks marked `sh`. A block marked `python` with a line `# prints ...` is run.
"""

import argparse
import builtins
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
from absl import flags
from command_line import ROOT, in_process, parsed

import data_generator
import fewshot
import main
import maml
import special_grads
import utils
from fewshot.runs.flags import settings

PACKAGE = sorted(
    str(path.relative_to(ROOT)).removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    for path in (ROOT / 'fewshot').rglob('*.py')
    if path.name != 'demo_page.py'  # imports NiceGUI, which is an extra
)
MODULES = (main, maml, data_generator, utils, special_grads, *map(importlib.import_module, PACKAGE))
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'docs').rglob('*.md')
    if '_build' not in path.parts
)
# At most so many words; with the pages, but for the reference and what one types, LIMIT.
WORDS = {
    'README.md': 1600,
    'scripts/README.md': 900,
    'logs/README.md': 900,
    'tests/README.md': 900,
    '.github/CONTRIBUTING.md': 1000,
    'CHANGELOG.md': 900,
}
LIMIT = 10_000
NAMES = [*WORDS, *PAGES]
SECTIONS = [
    'Run it',
    'MAML in this code',
    'Reproduce the paper',
    'Your own images',
    'Your own network, loss and loop',
    'The ten flags that matter',
    'Why not just run the original?',
    'Where the rest is',
    'Citing and licence',
]
PLACEHOLDERS = {'FLAGS', '…'}  # stand for flags of main.py
PYTEST = {'--slow', '--collect-only', '-q', '-x', '-k', '-m'}
OTHERS = {  # programs that are not the project's, and their flags
    'tensorboard': {'--logdir'},
    'jupyter': {'--inplace'},
    'ruff': {'--check', '--fix'},
    'mkdir': {'-p'},
    'cp': {'-r'},
    'git': set(),
    'ls': set(),
    'sphinx-build': {'-W', '--keep-going'},
    'cd': set(),
}
IN_CHECKOUT = ('scripts/', 'tests/', 'logs/results', '.github/')
FILE = re.compile(
    r'(scripts|tests|logs/results|results|\.github)/[\w./-]*|[\w./-]+\.(py|sh|md|cff|toml)'
)
NAME = re.compile(r'(?=.*[a-z])[A-Z]\w+(\(\))?|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(\(\))?')
documents = pytest.mark.parametrize('name', NAMES)


def read(name: str) -> str:
    return (ROOT / name).read_text()


# What is in a document ----------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r'^```(\w*)\n(.*?)^```$', text, re.S | re.M)


def prose(text: str) -> str:
    """What is outside of the blocks."""
    return re.sub(r'^```.*?^```$', '', text, flags=re.S | re.M)


def spans(text: str) -> list[str]:
    """What stands as `code` in the prose."""
    return re.findall(r'`([^`\n]+)`', prose(text))


def lines(block: str) -> Iterator[list[str]]:
    """The words of each command of a block; quotations may go over several lines."""
    pending = ''
    for line in block.replace('\\\n', ' ').splitlines():
        pending += line + '\n'
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation is open
            continue
        pending = ''
        yield words


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, in blocks and in the prose, without variables before it."""
    found = [shlex.split(span) for span in spans(text) if re.match('(python|bash|pip) ', span)]
    for language, block in blocks(text):
        found += lines(block) if language == 'sh' else []
    for words in found:
        command = []
        for word in [*words, '&&']:
            if word == '&&' and command:
                yield command
                command = []
            elif command or not re.match('[A-Z_0-9]+=', word):
                command.append(word)


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall('^#+ (.*)', prose(text), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def table(text: str, pattern: str) -> dict[str, str]:
    """{first column: second column} of the rows whose first column matches."""
    return dict(re.findall(rf'^\| `{pattern}` \| ([^|]*?) \|', text, re.M))


# Whether a command can be typed -------------------------------------------------------------------


def check_commands(text: str):
    """Raises ValueError for a command that names a program, a file or a flag that is not there."""
    for words in commands(text):
        try:
            check_command(*words)
        except ValueError as error:
            raise ValueError(f'{" ".join(words)}: {error}') from error


def check_command(program: str, *arguments: str):
    check_paths(arguments)
    program = program.removeprefix('.venv/bin/')
    if program == 'python' and arguments[:2] == ('-m', 'pytest'):
        check_names(arguments[2:], PYTEST)
    elif program == 'python' and arguments[0] == '-m':
        importlib.import_module(arguments[1])
    elif program == '.':  # the environment that scripts/run.sh makes
        check_names(arguments, set())
    elif program in ('python', 'bash'):
        check_script(*arguments)
    elif program == 'pip':
        check_extras(arguments)
    elif program in OTHERS:
        check_names(arguments, OTHERS[program])
    else:
        raise ValueError(f'{program} is no program of this project, nor one of {", ".join(OTHERS)}')


def check_paths(words: tuple[str, ...]):
    """Files of the checkout, as arguments or as values of flags."""
    for word in words:
        path = word.split('=')[-1].split(':')[0]  # of FILE::TEST and FILE:FUNCTION
        if path.startswith(IN_CHECKOUT) and not (ROOT / path).exists():
            raise ValueError(f'there is no {path}')


def check_names(words: tuple[str, ...], known: set[str]):
    unknown = {word.split('=')[0] for word in words if word.startswith('-')} - known
    if unknown:
        raise ValueError(f'there is no flag {", ".join(unknown)}')


def check_extras(arguments: tuple[str, ...]):
    """Of `pip install -e '.[EXTRA]'`."""
    check_names(arguments, {'-e'})
    for extra in re.findall(r'\[(\w+)\]', ' '.join(arguments)):
        if f"'{extra}':" not in read('setup.py'):
            raise ValueError(f'setup.py has no extra {extra}')


def check_script(script: str, *arguments: str):
    """Parses the arguments as the script would; placeholders stand for flags of main.py."""
    if not (ROOT / script).is_file():
        raise ValueError(f'there is no {script}')
    given = [word for word in arguments if word not in PLACEHOLDERS]
    folder, _, name = script.rpartition('/')
    if name == 'test.sh':
        check_names(given, PYTEST)
    elif name in ('main.py', 'run.sh') or name.endswith('.sh') and folder == 'scripts/paper':
        check_main(given)
    elif name == 'launch_workers.py':
        end = given.index('--') if '--' in given else len(given)
        check_argparse(script, given[:end])
        check_main(given[end + 1 :])
    elif name == 'second_order_ablation.py':
        check_main(given[2:] if given[0] in ('check', 'plot') else given[1:])
    elif name == 'benchmark.py':
        check_benchmark(given)
    elif name == 'transfer.py':
        check_main(given[2:] if given[0] == 'export' else [])
    elif folder == 'scripts/examples':
        check_names(given, set())
    elif folder == 'scripts/data':
        check_names(given, flags_of(script))
    else:
        check_argparse(script, given)


def check_main(arguments: list[str]):
    arguments = [word for word in arguments if word != '--help']
    try:
        parsed(*arguments)
    except flags.Error as error:
        raise ValueError(error) from error
    if words := [word for word in arguments if not word.startswith('-')]:
        raise ValueError(f'{words[0]} is no flag of main.py')


def check_benchmark(arguments: list[str]):
    try:
        benchmark_flags()(['benchmark.py', *arguments])
    except flags.Error as error:
        raise ValueError(error) from error


def benchmark_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    importlib.import_module('scripts.measure.benchmark').define_flags(values)
    return values


@functools.cache
def flags_of(script: str) -> set[str]:
    """Of a program with absl's flags that are defined when it is run."""
    line = [sys.executable, '-B', ROOT / script, '--help']
    text = subprocess.run(line, capture_output=True, text=True, timeout=60).stdout
    return {f'--{name}' for name in re.findall(r'^  --(?:\[no\])?(\w+)', text, re.M)}


class Understood(Exception):
    """A parser has taken the arguments."""


def check_argparse(script: str, arguments: list[str]):
    """Calls the script's main function up to where it has parsed its arguments."""
    program = importlib.import_module(script.removesuffix('.py').replace('/', '.')).main
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, given=None):
        parser.allow_abbrev = False
        parse_args(parser, given)
        raise Understood

    takes = inspect.signature(program).parameters
    with (
        mock.patch.object(argparse.ArgumentParser, 'parse_args', parse),
        mock.patch.object(sys, 'argv', [script, *arguments]),
        contextlib.suppress(Understood),
    ):
        outcome = in_process(program, *([arguments] if takes else []))
        raise ValueError(outcome.err)


def known_flags() -> set[str]:
    """Of all programs: what a document may speak of without a command."""
    known = {f'--{name}' for name in benchmark_flags()} | PYTEST  # main.py's are among them
    for path in (ROOT / 'scripts').rglob('*.py'):
        known |= set(re.findall(r"add_argument\(\s*'(--\w+)'", path.read_text()))
    for name in ('omniglot', 'miniimagenet'):
        known |= flags_of(f'scripts/data/prepare_{name}.py')
    return known | {'--check', '--help'}


def check_spans(text: str):
    """Flags and names in the prose. Raises ValueError for one that is not there."""
    known = known_flags()
    for span in spans(text):
        words = shlex.split(span) if span.startswith('--') else []
        check_names(tuple(words), known)
        if not words and not is_known(span):
            raise ValueError(f'there is no {span}')


def is_known(span: str) -> bool:
    """Whether a file of the checkout, or a name such as `maml.MAML` or `MAML.update`, is there.

    True for what is neither, and for names of other projects, such as `tf.nn.moments`.
    """
    if FILE.fullmatch(span):
        return is_file(span)
    if not NAME.fullmatch(span):
        return True
    if span.startswith('fewshot.'):
        return has(fewshot, span.removesuffix('()').split('.')[1:])
    first, *rest = span.removesuffix('()').split('.')
    places = [place for place in (*MODULES, builtins) if hasattr(place, first)]
    owners = [getattr(place, first) for place in places]
    owners = [owner for owner in owners if isinstance(owner, type) or not rest]
    owners += [module for module in MODULES if module.__name__ == first]
    if not owners:
        return first[0].islower()
    return any(has(owner, rest) for owner in owners)


def has(owner, names: list[str]) -> bool:
    for name in names:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def is_file(name: str) -> bool:
    """By its path from the checkout's top folder or a document's, or by its name alone."""
    folders = ['', '.github', '.github/workflows', 'logs', 'scripts', 'tests']
    folders += [str(path.parent) for path in ROOT.glob('*/*/*.py')]
    return any((ROOT / folder / name).exists() for folder in folders)


# Tests --------------------------------------------------------------------------------------------


@documents
def test_commands(name):
    check_commands(read(name))


@documents
def test_flags_and_names_in_the_prose(name):
    check_spans(read(name))


@pytest.mark.parametrize(
    'line, words',
    [
        ('python main.py --datasource=omniglot --metatrain_iteration=5', 'metatrain_iteration'),
        ('python main.py --datasource=omniglott', 'omniglott'),
        ('python main.py --num_classes=five', 'five'),
        ('python main.py omniglot', 'omniglot is no flag'),
        ('python mian.py', 'there is no mian.py'),
        ('cd x && TF_CONFIG="{}" python main.py FLAGS --strategi=mirrored', 'strategi'),
        ('bash scripts/run.sh --datasource=sine', 'sine'),
        ('bash scripts/test.sh --slwo', '--slwo'),
        ('bash scripts/paper/omniglot_6way_1shot.sh', 'there is no scripts/paper/omniglot_6way'),
        ('bash scripts/paper/omniglot_5way_1shot.sh --sed=1', 'sed'),
        ('python scripts/paper/second_order_ablation.py held --updatelr=0.4', 'updatelr'),
        ('python scripts/model/classify.py RUN_FOLDER SUPPORT_DIR IMAGE --step=3', '--step=3'),
        ('python scripts/model/classify.py RUN_FOLDER SUPPORT_DIR IMAGE --steps=many', 'many'),
        ('python scripts/model/export.py RUN_FOLDER', 'OUT'),
        ('python scripts/data/prepare_omniglot.py --sources=FOLDER', '--sources'),
        ('python scripts/measure/benchmark.py --train --second=3', 'second'),
        ('python scripts/measure/benchmark.py tests/reference/omniglot.npz', 'omniglot.npz'),
        ('python scripts/launch_workers.py 2 --pins -- FLAGS', '--pins'),
        ('python scripts/launch_workers.py 2 -- --datasource=sin', 'sin'),
        ("pip install -e '.[plot]'", 'no extra plot'),
        ('tensorboard --logs=logs', '--logs'),
        ('make test', 'make is no program'),
    ],
)
def test_mistakes_are_found(line, words):
    """In a block, over two lines, and where it may be in the prose, there too."""
    texts = [f'```sh\n{line}\n```\n', '```sh\n' + line.replace(' ', ' \\\n    ') + '  # why\n```\n']
    if line.startswith(('python', 'bash', 'pip')):
        texts.append(f'Type `{line}` for that.')
    for text in texts:
        with pytest.raises(ValueError, match=re.escape(words)):
            check_commands(text)


@pytest.mark.parametrize(
    'span',
    ['--updatelr', '--seed=1 --sed', 'MAML.updates', 'maml.FastMAMl', 'Lerner', 'scripts/tset.sh'],
)
def test_mistakes_in_the_prose_are_found(span):
    with pytest.raises(ValueError, match=span.split()[-1]):
        check_spans(f'See `{span}` for that.')


@documents
def test_links(name):
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(read(name))):
        path, _, anchor = target.partition('#')
        if re.match('https?:', path):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in headings(file.read_text()), target


@documents
def test_form(name):
    """Blocks say what they hold, and prose is wrapped; tables and pictures cannot be."""
    text = read(name)
    assert {language for language, _ in blocks(text)} <= {'sh', 'text', 'python'}
    assert len(re.findall('^```', text, re.M)) == 2 * len(blocks(text))
    assert [line for line in text.splitlines() if len(line) > 100 and line[0] not in '|!'] == []


def words(text: str) -> int:
    """How many there are; lone signs, as the bars of tables, do not count."""
    return len([word for word in text.split() if re.search(r'\w', word)])


def test_documents_are_short():
    assert {name for name, most in WORDS.items() if len(read(name).split()) > most} == set()
    pages = [prose(read(name)) for name in NAMES if not name.startswith('docs/reference/')]
    assert sum(map(words, pages)) <= LIMIT


def test_readme_is_in_order():
    assert re.findall('^## (.*)', prose(read('README.md')), re.M) == SECTIONS


def test_ten_flags_are_in_the_readme():
    """With their defaults; the site's table of all is made from the flags."""
    defaults = {name: str(value) for name, value in settings(parsed()).items()}
    ten = table(read('README.md'), r'--(\w+)')
    assert len(ten) == 10 and ten.items() <= defaults.items()


def test_every_script_has_an_example():
    words = [word for words in commands(read('scripts/README.md')) for word in words[1:]]
    typed = {re.sub(':.*', '', word.split('=')[-1]) for word in words}
    scripts = [*(ROOT / 'scripts').rglob('*.py'), *(ROOT / 'scripts').rglob('*.sh')]
    paths = {path.relative_to(ROOT).as_posix() for path in scripts if path.name != '__init__.py'}
    assert {path for path in paths if not path.startswith('scripts/lib/')} <= typed


@pytest.mark.parametrize('name', NAMES[1:])
def test_python(name, monkeypatch):
    """Blocks that say what they print; test_use.py runs those of README.md."""
    monkeypatch.chdir(ROOT)
    for block in (block for language, block in blocks(read(name)) if language == 'python'):
        program = compile(block, f'<{name}>', 'exec')  # of no file: AutoGraph would read it
        if printed := re.findall('# prints (.*)', block):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(program, {})
            assert out.getvalue().splitlines() == printed
