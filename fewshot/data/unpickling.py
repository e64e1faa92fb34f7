"""Reads pickles of NumPy arrays and plain containers, whoever made them, and nothing else.

A pickle is a program that may call anything. This module reads those that make dictionaries, lists,
tuples, texts, numbers and arrays of numbers, of Python 2 and 3, of NumPy 1 and 2. A call of
anything else is refused by name before it is imported.

The base class is the reader that Python keeps in Python itself. The one in C allocates whatever an
index claims, so that ten bytes can fill the memory; here nothing grows beyond what the file holds.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from fewshot.data.preparation import Item, PreparationError, blaming, check_no_page

MAX_BYTES = 16 * 2**30  # of a file; tieredImageNet's largest has 8
MAX_READS = 2**21  # of its pieces, up to six to an instruction; miniImagenet's has at most 240,000
PER_READ = 128  # bytes that allow one piece more; tieredImageNet's have at least 200 on average
PIECE = 2**24  # bytes read at once: claims of more are only believed as they come true
NUMBERS = re.compile(r'[<>=|]?(\?|b1|[iu][1248]|f[248])')  # names of dtypes
KEYS = (str, bytes, int, float, type(None))  # tuples as keys may take for ever to hash
PLAIN = (
    'MARK STOP POP POP_MARK PROTO NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 '
    'LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE '
    'BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE '
    'TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE '
    'GLOBAL STACK_GLOBAL REDUCE'
).split()  # instructions that are safe as Python has them


def load(file: BinaryIO):
    """Returns the content of a pickle; texts that Python 2 wrote are bytes.

    Raises pickle.UnpicklingError, whose text follows the file's name, as in 'NAME ends early'; and
    whatever the file itself raises when it is read.
    """
    pieces = Pieces(file)
    try:
        return Unpickler(pieces, encoding='bytes').load()
    except pickle.UnpicklingError:
        raise
    except EOFError as error:
        raise pickle.UnpicklingError('ends early') from error
    except MemoryError as error:
        raise pickle.UnpicklingError('needs more memory than there is') from error
    except Exception as error:
        if error is pieces.failure:
            raise
        # Instructions in a wrong order, texts that are none, ...: pickle has no error of its own.
        raise pickle.UnpicklingError(
            f'is no pickle, or damaged ({type(error).__name__})'
        ) from error


def read(item: Item):
    """Returns the content of a pickle.

    Raises PreparationError if the file is none, is damaged, or would call something.
    """
    with blaming(item.origin), item.open() as file:
        check_no_page(file.read(512), item.where)
        file.seek(0)
        try:
            return load(file)
        except pickle.UnpicklingError as error:
            raise PreparationError(
                f'{item.where} {error}; get it again from where you trust it.'
            ) from error


def read_dictionary(item: Item) -> dict:
    """Reads the dictionary in a pickle, its keys as texts; empty if the pickle is something else.

    Raises PreparationError as `read`.
    """
    stored = read(item)
    return {text(key): value for key, value in stored.items()} if type(stored) is dict else {}


def text(value) -> str | None:
    """Returns a text of a pickle, which is bytes if Python 2 wrote it; None if it is no text."""
    if isinstance(value, bytes):
        value = value.decode('latin-1')
    return value if isinstance(value, str) else None


class Pieces:
    """A file that raises EOFError at its end, and limits how much and how often it is read."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.total = 0  # bytes read so far
        self.reads = 0
        self.failure = None  # the file's own error, which is not the pickle's fault

    def read(self, size: int) -> bytes:
        """Reads exactly so many bytes; raises EOFError and UnpicklingError."""
        data = io.BytesIO()
        while piece := self._read(self.file.read, min(PIECE, size - data.tell())):
            data.write(piece)
        if data.tell() < size:
            raise EOFError
        return data.getvalue()

    def readline(self) -> bytes:
        """Reads to the next line feed; raises EOFError and UnpicklingError."""
        line = self._read(self.file.readline, MAX_BYTES + 1)
        if not line.endswith(b'\n'):
            raise EOFError
        return line

    def _read(self, method, size: int) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS + self.total // PER_READ:
            raise pickle.UnpicklingError('is refused: it has too many parts')
        try:
            data = method(size)
        except Exception as error:
            self.failure = error
            raise
        self.total += len(data)
        if self.total > MAX_BYTES:
            raise pickle.UnpicklingError(f'is refused: it has more than {MAX_BYTES >> 30} GiB')
        return data


class Unpickler(pickle._Unpickler):
    """Reads one pickle; see `load`."""

    def __init__(self, file: Pieces, **options):
        super().__init__(file, **options)
        self.file = file
        self.made = 0  # bytes of what `copied` was given
        self.admitted = {
            'numpy.ndarray': 'numpy.ndarray',  # only an argument of the next
            'numpy.core.multiarray._reconstruct': self.empty_array,
            'numpy.core.numeric._frombuffer': self.array,
            'numpy.core.multiarray.scalar': self.scalar,
            'numpy.dtype': self.dtype,
            '_codecs.encode': self.encode,
        }

    def find_class(self, module: str, name: str):
        called = f'{module}.{name}'
        admitted = self.admitted.get(re.sub(r'^numpy\._core\.', 'numpy.core.', called))
        if not admitted:
            text = ascii(called)[1:101].removesuffix("'")
            raise pickle.UnpicklingError(f'is refused: it would call {text}')
        return admitted

    def copied(self, data: str | bytes) -> str | bytes:
        """Returns data that a call may copy. Data read once may be copied twice, but not often.

        Small things are free.
        """
        self.made += len(data)
        if self.made > 2 * self.file.total + PIECE:
            raise pickle.UnpicklingError('is refused: it makes much more than it holds')
        return data

    # The functions that a pickle may call

    def dtype(self, name: str | bytes, align=False, copy=True) -> np.dtype:
        name = name.decode('latin-1') if isinstance(name, bytes) else name
        if not isinstance(name, str) or not NUMBERS.fullmatch(name):
            text = ascii(name)[:40]
            raise pickle.UnpicklingError(f'is refused: it has an array of {text}, not of numbers')
        return np.dtype(name, False, True)  # a copy of its own, for `load_build`

    def empty_array(self, kind: str, shape: tuple, code: str | bytes) -> np.ndarray:
        """Makes the array that NumPy's pickles begin with; `load_build` gives it its values."""
        if (kind, shape) != ('numpy.ndarray', (0,)):
            raise ValueError('not as NumPy writes it')
        return np.ndarray((0,), np.uint8)

    def array(self, data: bytes, dtype: np.dtype, shape: tuple, order: str, *_) -> np.ndarray:
        """Makes an array of protocol 5."""
        check_types(data, dtype)
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def scalar(self, dtype: np.dtype, data: bytes) -> np.generic:
        check_types(data, dtype)
        (value,) = np.frombuffer(data, dtype)
        return value

    def encode(self, text: str, encoding: str) -> bytes:
        """Makes bytes of protocol 2, as Python 3 writes them."""
        if encoding not in ('latin1', b'latin1'):
            raise pickle.UnpicklingError('is refused: it would call _codecs.encode')
        return self.copied(text).encode('latin-1')

    # Instructions that are not as Python has them

    def load_build(self):
        """Gives the last object its state: an array its values, a dtype its byte order."""
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) is np.ndarray:
            _, shape, dtype, fortran, data = state
            check_types(data, dtype)
            # Only once: the memory of values that are there may be another's too.
            if made.size or min(shape, default=0) < 0:
                raise ValueError('not as NumPy writes it')
            made.__setstate__((1, shape, dtype, bool(fortran), self.copied(data)))
        elif isinstance(made, np.dtype):
            version, order, *rest = state
            order = order.decode() if isinstance(order, bytes) else order
            if order not in tuple('<>=|') or rest != [None, None, None, -1, -1, 0]:
                raise ValueError('not as NumPy writes it')
            made.__setstate__((version, order, *rest))
        else:
            raise TypeError('a state for what has none')

    def load_frame(self):
        self.read(8)  # how far one may read ahead

    def load_bytearray8(self):
        self.append(self.read(int.from_bytes(self.read(8), 'little')))

    def load_inst(self):
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        self.find_class(module, name)
        raise TypeError('nothing that is admitted is made so')

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.add([key, value])

    def load_setitems(self):
        self.add(self.pop_mark())

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.add(items)

    def add(self, items: list):
        """Puts keys and values, in turn, into the dictionary on top of the stack."""
        dictionary = self.stack[-1]
        if type(dictionary) is not dict:
            raise TypeError('not a dictionary')
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, KEYS):
                raise pickle.UnpicklingError('is refused: a key is no text and no number')
            dictionary[key] = value


def check_types(data, dtype):
    """Raises TypeError for data that NumPy takes too: arrays whose memory is not theirs to keep."""
    if type(data) is not bytes or not isinstance(dtype, np.dtype):
        raise TypeError('not as NumPy writes it')


def method_of(opcode: pickletools.OpcodeInfo) -> Callable:
    """Returns what one of Python's instructions does: Python's method, one above, or a refusal."""

    def refuse(_):
        raise pickle.UnpicklingError(f'is refused: it has the instruction {opcode.name}')

    if opcode.name in PLAIN:
        return pickle._Unpickler.dispatch[ord(opcode.code)]
    return vars(Unpickler).get(f'load_{opcode.name.lower()}', refuse)


Unpickler.dispatch = {ord(opcode.code): method_of(opcode) for opcode in pickletools.opcodes}
