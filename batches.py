"""Read and write CIFAR-10 batch files without running them.

A pickle is a program; this module reads it as data. `_Machine` carries out the opcodes that batch files have, as Python
2 and Python 3 write them (protocols 0 to 5), on plain values. Nothing that a file names is imported or called: the
names that NumPy's arrays need become inert parts, and the arrays are built here from checked bytes.
"""

import codecs
import io
import math
import pickletools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import UserError, write_atomically

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH_FILE = "a whole CIFAR-10 batch file of the python version: copy or download it again"
MAX_BYTES = 128 * 2**20  # 43,000 images; the official files have 31 MB
MAX_OPCODES = 500_000  # 40,000 images with NumPy scalars as labels; the official files have 30,000
ALLOWED = frozenset({
    ("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes"), ("numpy", "ndarray"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),  # NumPy 1, NumPy 2
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")})
DTYPES = {form: np.dtype(name) for name in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()
          for form in (name, name.encode())}
ORDERS = frozenset({"<", ">", "|", b"<", b">", b"|"})
PLAIN = frozenset({type(None), bool, int, float, str, bytes, bytearray})
VALUES = frozenset("""BININT1 BININT2 BININT INT LONG1 LONG BINFLOAT FLOAT SHORT_BINSTRING BINSTRING STRING
    SHORT_BINBYTES BINBYTES BYTEARRAY8 SHORT_BINUNICODE BINUNICODE UNICODE NONE""".split())  # push their argument
TAKES = {"EMPTY_LIST": 0, "LIST": None, "APPEND": 1, "APPENDS": None, "EMPTY_DICT": 0, "DICT": None, "SETITEM": 2,
         "SETITEMS": None, "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "STACK_GLOBAL": 2,
         "REDUCE": 2, "BUILD": 1}  # how many values an opcode takes off the stack; None: all since the last MARK
READERS = {op.code.encode("latin1"): (op.name, op.arg and op.arg.reader) for op in pickletools.opcodes} | {
    # Python 2's strings as bytes: pickletools makes them text, and before Python 3.12.8 fails on arrays in protocol 0.
    b"S": ("STRING", lambda stream: codecs.escape_decode(pickletools.read_stringnl(stream, decode=False))[0]),
    b"T": ("BINSTRING", pickletools.read_bytes4), b"U": ("SHORT_BINSTRING", pickletools.read_bytes1)}


@dataclass(eq=False)
class _Part:
    """A stand-in for an allowed global, or for a dtype or an array, whose value a BUILD opcode may set."""
    name: str
    value: np.dtype | np.ndarray | None = None


class _Machine:
    """A pickle machine for flat containers of plain values; whatever else a pickle has raises an error."""

    def __init__(self) -> None:
        self.stack, self.marks, self.memo = [], [], {}
        self.room = MAX_BYTES  # what `_codecs.encode` may still give: one text can be encoded again and again

    def run(self, stream: io.BytesIO) -> dict:
        """Carry out a whole pickle and return the dict that it holds."""
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            _demand(code, f"the end of the file after {stream.tell()} bytes, in the middle of a pickle")
            opcode, reader = READERS.get(code, (ascii(code), None))
            # Numbers as text: a short line, as the time that int() takes grows with the square of its length.
            source = io.BytesIO(stream.readline(64)) if code in b"IFLgp" else stream
            self.step(opcode, reader and reader(source))
            if opcode == "STOP":
                alone = not self.marks and [type(value) for value in self.stack] == [dict] and not stream.read(1)
                _demand(alone, "something else than one dict")
                return self.stack[0]
        raise UserError(f"found more than {MAX_OPCODES} opcodes")

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one opcode."""
        items = self.take(TAKES[opcode]) if opcode in TAKES else []
        match opcode:
            case _ if opcode in VALUES:
                self.stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(opcode == "NEWTRUE")
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                index = len(self.memo) if opcode == "MEMOIZE" else argument
                _demand(0 <= index < MAX_OPCODES, f"the memo index {index}")
                self.memo[index] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                self.stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "EMPTY_LIST" | "LIST" | "APPEND" | "APPENDS":
                target = self.stack.pop() if "APPEND" in opcode else []
                _demand(type(target) is list and set(map(type, items)) <= PLAIN, "a list of other things than values")
                target.extend(items)
                self.stack.append(target)
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                target = self.stack.pop() if "SETITEM" in opcode else {}
                _demand(type(target) is dict and set(map(type, items[::2])) <= {str, bytes}, "a key that is no text")
                _demand(set(map(type, items[1::2])) <= PLAIN | {list, tuple, _Part}, "a dict within a dict")
                target.update(zip(items[::2], items[1::2], strict=True))
                self.stack.append(target)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                inner = {type(value) for item in items if type(item) is tuple for value in item}
                flat = inner <= {int} and set(map(type, items)) <= PLAIN | {tuple, _Part}  # only shapes lie in tuples
                _demand(flat and len(items) <= 16, "a tuple of other things than values")
                self.stack.append(tuple(items))
            case "GLOBAL" | "STACK_GLOBAL":
                pair = tuple(argument.split(" ", 1) if opcode == "GLOBAL" else items)
                shown = ".".join(_show(part).strip("'") for part in pair)
                _demand(pair in ALLOWED, f"the foreign global {shown} (nothing of it was run)")
                self.stack.append(_Part(pair[1]))
            case "REDUCE":
                self.stack.append(self.call(*items))
            case "BUILD":
                self.stack[-1].value = self.call(self.stack[-1], *items)
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise UserError(f"found the opcode {opcode}, which batch files do not have")

    def take(self, count: int | None) -> list:
        """Take `count` values off the stack, or all since the last mark."""
        if count is not None:
            return [self.stack.pop() for _ in range(count)][::-1]
        items, self.stack = self.stack, self.marks.pop()
        return items

    def call(self, part: _Part, arguments: tuple) -> object:
        """Return what a function, or a new state of a part, gives in batch files; nothing is called by its name."""
        match part, arguments:
            case _Part("_reconstruct"), (_Part("ndarray"), (0,), b"b"):
                return _Part("an array")
            case _Part("an array", None), (1, tuple() as shape, _Part("a dtype", dtype), 0 | 1 as fortran, buffer):
                return _array(buffer, dtype, shape, "F" if fortran else "C")
            case _Part("_frombuffer"), (buffer, _Part("a dtype", dtype), tuple() as shape, "C" | "F" as order):
                return _Part("an array", _array(buffer, dtype, shape, order))
            case _Part("_frombuffer"), (buffer, _Part("a dtype", dtype), tuple() as shape, "K", axes):  # newer NumPy 2
                return _Part("an array", _array(buffer, dtype, shape, "C").transpose(axes))
            case _Part("scalar"), (_Part("a dtype", dtype), buffer):
                return _array(buffer, dtype, (), "C").item()
            case _Part("dtype"), (code, 0, 1) if code in DTYPES:
                return _Part("a dtype", DTYPES[code])
            case _Part("a dtype", dtype), (3, order, None, None, None, -1, -1, 0) if order in ORDERS:
                return dtype.newbyteorder(order)
            case _Part("encode"), (str() as text, "latin1") if len(text) <= self.room:
                self.room -= len(text)
                return text.encode("latin1")
            case _Part("bytes"), ():
                return b""
        shown = ", ".join(map(_show, arguments[:16]))
        raise UserError(f"found {part.name}({shown}), which batch files do not have")


def _array(buffer: object, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """Make a read-only array over bytes that have just the size that its shape and dtype tell."""
    known = type(buffer) in (bytes, bytearray) and set(map(type, shape)) <= {int} and min(shape, default=0) >= 0
    if not known or math.prod(shape) * dtype.itemsize != len(buffer):
        raise UserError(f"found an array of {dtype} without the bytes that its shape needs")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _demand(condition: object, found: str) -> None:
    if not condition:
        raise UserError(f"found {found}")


def _show(value: object) -> str:
    """Describe a value in a few characters of ASCII."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, list):
        return f"a list of {len(value)} {'/'.join(sorted({type(item).__name__ for item in value}))}"
    if isinstance(value, str | bytes | bytearray):
        value = value[:60]
    return ascii(value)[:60] if type(value) in PLAIN else getattr(value, "name", f"a {type(value).__name__}")


@contextmanager
def _explained(path: str | Path, expected: str = BATCH_FILE) -> Iterator[None]:
    """Turn what a bad file raises into a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        damage = f"found a truncated or damaged pickle ({type(error).__name__}: {str(error)[:100]})"
        raise UserError(f"{path}: {error if isinstance(error, UserError) else damage}; expected {expected}") from error


def _read(path: str | Path, *keys: str) -> dict:
    """Read the dict of a batch file, its keys as text; `keys` must be among them."""
    path = Path(path)
    _demand(path.stat().st_size <= MAX_BYTES and path.is_file(), f"no regular file of up to {MAX_BYTES} bytes")
    batch = {key if isinstance(key, str) else key.decode("latin1"): value.value if isinstance(value, _Part) else value
             for key, value in _Machine().run(io.BytesIO(path.read_bytes())).items()}
    lacking = " and no ".join(key for key in keys if key not in batch)
    _demand(not lacking, f"no {lacking} among the keys {', '.join(map(_show, batch))[:200]}")
    return batch


def _images(data: object) -> np.ndarray:
    """Check images of either form; return them as (N, 32, 32, 3) uint8, C-contiguous."""
    good = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.size > 0
    good = good and data.shape[1:] in ((3072,), (32, 32, 3))
    _demand(good, f"data {_show(data)}, not uint8 (N, 3072) or (N, 32, 32, 3)")
    if data.ndim == 4:
        return np.array(data, order="C")
    images = np.empty((len(data), 32, 32, 3), np.uint8)  # plane by plane: twice as fast as a transposed copy
    return np.stack(list(data.reshape(-1, 3, 32, 32).swapaxes(0, 1)), axis=-1, out=images)


def _integers(values: object, key: str, count: int) -> np.ndarray:
    """Check a list or array of integers, one for each image; return it as (N,) int64."""
    if type(values) is list and set(map(type, values)) <= {int}:
        values = np.array(values)
    good = isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.shape == (count,)
    _demand(good and values.max() < 2**63, f"{key} {_show(values)}, not {count} integers below 2**63")
    return values.astype(np.int64)


def read_labelled(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a training or test batch.

    Returns:
        Images (N, 32, 32, 3) uint8, C-contiguous, and labels (N,) int64 of 0 to 9.

    Raises:
        UserError: The file cannot be read, or is no such batch.
    """
    with _explained(path):
        batch = _read(path, "data", "labels")
        images = _images(batch["data"])
        labels = _integers(batch["labels"], "labels", len(images))
        wrong = labels[(labels < 0) | (labels > 9)]
        _demand(not len(wrong), f"the labels {', '.join(map(str, wrong[:3]))}, not 0 to 9")
        return images, labels


def read_unlabelled(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read images to predict, and their ids (N,) int64 if the file has any; see `read_labelled`."""
    with _explained(path, "a pickle of images like CIFAR-10's batch files, or a picture named .png, .jpg or .jpeg"):
        batch = _read(path, "data")
        images = _images(batch["data"])
        return images, _integers(batch["ids"], "ids", len(images)) if "ids" in batch else None


def read_label_names(path: str | Path) -> list[str]:
    """Read the ten class names of a `batches.meta`; see `read_labelled`."""
    with _explained(path):
        names = _read(path, "label_names")["label_names"]
        good = type(names) is list and len(names) == 10 and set(map(type, names)) <= {str, bytes}
        _demand(good, f"label_names {_show(names)}, not 10 names")
        return [name if isinstance(name, str) else name.decode() for name in names]


def _pickled(value: object) -> bytes:
    """Return a value as Python 2 writes it in protocol 2.

    No pickler of Python 3 does: its byte strings stay bytes with `pickle.load(file, encoding="latin1")`.
    """
    match value:
        case dict():
            return b"}(" + b"".join(_pickled(part) for item in value.items() for part in item) + b"u"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01%b%b\x86cnumpy\ndtype\n"
            b"(U\x02u1\x89\x88tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89%btb"
            % (*map(_pickled, value.shape), _pickled(value.tobytes())))


def _write(path: str | Path, content: dict) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(b"\x80\x02" + _pickled(content) + b"."))


def write_batch(path: str | Path, images: np.ndarray, labels: np.ndarray, batch_label: str) -> None:
    """Write images (N, 32, 32, 3) uint8 and labels (N,) of 0 to 9 in the official form, atomically."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    _write(path, {b"batch_label": batch_label.encode(), b"labels": labels.tolist(), b"data": planes,
                  b"filenames": [b"%06d.png" % index for index in range(len(images))]})


def write_label_names(path: str | Path, names: Sequence[str]) -> None:
    """Write the class names as a `batches.meta` in the official form, atomically."""
    _write(path, {b"num_cases_per_batch": 10000, b"label_names": [name.encode() for name in names], b"num_vis": 3072})
