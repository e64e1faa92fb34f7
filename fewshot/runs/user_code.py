"""Functions of the user that flags name as FILE.py:FUNCTION."""

import functools
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserCodeError(Exception):
    """A failure inside the user's own code; the text is its traceback, from the user's file on."""


@contextmanager
def user_code(spec: str, all_of_it: bool = True) -> Iterator[None]:
    """Turns a failure, while entered, of the code that FILE.py:FUNCTION names into a UserCodeError.

    all_of_it: whether all code is the user's; else this program runs too, and only a failure with a
    line in the file is the user's.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error.__cause__, StopIteration):  # Python's own error takes its place
            error = error.__cause__
        file, place = str(Path(spec.rpartition(':')[0]).resolve()), error.__traceback__
        while place and place.tb_frame.f_code.co_filename != file:
            place = place.tb_next
        if place is None and not all_of_it:
            raise
        # Without a place if none is in the file: a wrong number of arguments, say.
        lines = traceback.format_exception(type(error), error, place)
        text = ''.join(lines).rstrip()
        raise UserCodeError(f'{spec} failed, not this program:\n{text}') from error


def is_spec(text: str) -> bool:
    """Whether a text has the form FILE.py:FUNCTION."""
    return re.fullmatch(r'.+\.py:[^\W\d]\w*', text) is not None


def user_function(spec: str) -> Callable:
    """Returns the function that FILE.py:FUNCTION names, out of a module of its own.

    A failure in it raises UserCodeError, at the import and when it is called. Raises ValueError for
    a spec that is none, a file that is not there, and one without the function.
    """
    file, colon, name = spec.rpartition(':')
    if not colon or not file or not name.isidentifier():
        raise ValueError(f'{spec!r} must be FILE.py:FUNCTION, the name of a function after a colon')
    if not Path(file).is_file():
        raise ValueError(f'there is no file {file}, which {spec!r} names')
    with user_code(spec):
        module = user_module(Path(file).resolve())
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if is_defined_in(value, module)]
        there = f'has {", ".join(own)}' if own else 'has none'
        raise ValueError(f'there is no function {name!r} in {file}, which {there}')

    @functools.wraps(function)
    def call(*arguments, **named):
        with user_code(spec):
            return function(*arguments, **named)

    return call


def is_defined_in(value, module) -> bool:
    return callable(value) and getattr(value, '__module__', None) == module.__name__


def user_module(path: Path):
    """Runs a file as a module of a unique name. It may import files that lie beside it."""
    name = f'user_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}'
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ImportError(f'{path} is no Python file: its name must end with .py')
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that it hides nothing
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and Keras look for its classes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
