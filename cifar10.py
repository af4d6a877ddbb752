"""Read CIFAR-10's batch files (https://www.cs.toronto.edu/~kriz/cifar.html).

A batch file is a pickle, and a pickle can run any program. These functions treat the files as untrusted: they check
the opcodes before unpickling, import and call nothing that a file names, and build arrays from checked bytes.

Raises:
    UserError: A file is not as expected.
"""

import functools
import io
import math
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)

MAX_BYTES = 128 * 2**20  # per file; the official ones are 31 MB
MAX_OPCODES = 500_000  # per file; the official ones have 30,000
MAX_TUPLES = 64  # per file, besides the arguments of calls; an array takes two
GLOBALS = frozenset({
    ("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes"), ("numpy", "ndarray"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),  # NumPy 1, NumPy 2
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")})
OPCODES = frozenset("""PROTO FRAME STOP MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BYTEARRAY8 BINUNICODE
    SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL REDUCE BUILD""".split())
DTYPES = {code: np.dtype(name) for name in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()
          for code in (name, name.encode())}


@dataclass(eq=False)
class _Inert:
    """Stand-in for a global that a batch file names, or for a dtype or array that it builds."""

    name: str
    value: Any = None

    def __call__(self, *args: Any) -> Any:
        """Return what the arguments (opcode REDUCE) or the state (opcode BUILD) give in batch files."""
        match self.name, self.value, args:
            case "dtype", _, (code, 0, 1) if code in DTYPES:
                return _Inert("a dtype", DTYPES[code])
            case "a dtype", dtype, (3, order, None, None, None, -1, -1, 0) if order in (*"<>|", b"<", b">", b"|"):
                return _Inert("a dtype", dtype.newbyteorder(order))
            case "scalar", _, (_Inert("a dtype", dtype), buffer):
                return _array(buffer, dtype, ()).item()
            case "_reconstruct", _, (_Inert("ndarray"), (0,), b"b"):
                return _Inert("an array")
            case "an array", None, (1, shape, _Inert("a dtype", dtype), 0 | 1 as fortran, buffer):
                return _Inert("an array", _array(buffer, dtype, shape, "F" if fortran else "C"))
            case "_frombuffer", _, (buffer, _Inert("a dtype", dtype), shape, "C" | "F" as order):
                return _Inert("an array", _array(buffer, dtype, shape, order))
            case "_frombuffer", _, (buffer, _Inert("a dtype", dtype), shape, "K", axes):  # NumPy 2.3 or newer
                return _Inert("an array", _array(buffer, dtype, shape).transpose(axes))
            case "encode", encode, (str() as text, "latin1"):
                return encode(text)
            case "bytes", _, ():
                return b""
        raise UserError(f"arguments of {self.name} that batch files do not have")

    def __setstate__(self, state: tuple) -> None:
        self.value = self(*state[:8]).value  # no state has more items; a long text must not become so many arguments


def _array(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    """Return an array over bytes whose number must match the shape and dtype."""
    valid = type(buffer) in (bytes, bytearray) and type(shape) is tuple and len(shape) <= 4
    valid = valid and all(type(size) is int and size >= 0 for size in shape)
    if not valid or math.prod(shape) * dtype.itemsize != len(buffer):
        raise UserError(f"an array of {dtype} without the bytes that its shape needs")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        # Cached, because a small file could encode one long text a hundred thousand times.
        self.encode = functools.cache(lambda text: text.encode("latin1"))

    def find_class(self, module: str, name: str) -> _Inert:
        if (module, name) not in GLOBALS:
            raise UserError(f"the global {module[:60]}.{name[:60]}, which batch files do not have (nothing was run)")
        return _Inert(name, self.encode if name == "encode" else None)


def _check_opcodes(content: bytes) -> bytes:
    """Refuse a pickle that could crash the unpickler or exhaust memory; return it without its frames.

    Frames are optional, and the C unpickler skips bytes where a frame ends within an opcode: it would then read other
    opcodes than the ones checked here.
    """
    pieces, start, tuples, after_tuple = [], 0, 0, False
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        name = opcode.name
        is_put = name in ("BINPUT", "LONG_BINPUT", "MEMOIZE")
        # Hashing deeply nested tuples overflows the C stack. Arguments of a call do not count: they cannot be nested.
        tuples += ("TUPLE" in name) - (after_tuple and name == "REDUCE")
        after_tuple = "TUPLE" in name or (after_tuple and is_put)
        too_far = is_put and (argument or 0) > count  # the memo is an array, which grows up to this index
        if name not in OPCODES or too_far or tuples > MAX_TUPLES:
            raise UserError(f"an unexpected opcode {name} at byte {position:,}")
        if count >= MAX_OPCODES:
            raise UserError(f"more than {MAX_OPCODES:,} opcodes")
        if name == "FRAME":
            pieces.append(content[start:position])
            start = position + 9
    if position + 1 < len(content):
        raise UserError(f"{len(content) - position - 1:,} bytes after the end of the pickle")
    return b"".join([*pieces, content[start:]])


def _load(path: str | Path, *keys: str) -> dict[str, Any]:
    """Return the dict of a batch file, which must have these keys."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES or not path.is_file():
            raise UserError(f"no regular file of at most {MAX_BYTES:,} bytes")
        batch = _Unpickler(_check_opcodes(path.read_bytes())).load()
        if type(batch) is not dict:
            raise UserError(_describe(batch))
        batch = {key.decode("latin1") if isinstance(key, bytes) else key: value.value if isinstance(value, _Inert)
                 else value for key, value in batch.items()}
        if missing := " and no ".join(key for key in keys if key not in batch):
            raise UserError(f"no {missing} among the keys {', '.join(k[:30] for k in batch if isinstance(k, str))}")
        return batch
    except Exception as error:  # a damaged pickle can raise almost anything
        found = "" if isinstance(error, UserError) else f"a damaged pickle or no pickle, {type(error).__name__}: "
        message = f"found {found}{ascii(str(error))[1:-1]:.200}; expected a CIFAR-10 batch file of the Python version"
        if isinstance(error, OSError):
            message = f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {message}") from error


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _images(path: str | Path, data: Any) -> np.ndarray:
    """Check images; return them as a C-contiguous, writable copy (N, 32, 32, 3) uint8."""
    valid = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.size > 0
    if not valid or data.shape[1:] not in ((3072,), (32, 32, 3)):
        raise UserError(f"{path}: found data {_describe(data)}; expected uint8 (N, 3072) or (N, 32, 32, 3)")
    return np.array(data if data.ndim == 4 else data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), order="C")


def _integers(path: str | Path, key: str, values: Any, count: int, low: int, high: int) -> np.ndarray:
    """Check a list or array of `count` integers from `low` to `high`; return it as (N,) int64."""
    if type(values) is list and {*map(type, values)} == {int}:
        values = np.array(values)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.shape != (count,):
        raise UserError(f"{path}: found {key} {_describe(values)}; expected {count} integers")
    if len(wrong := values[(values < low) | (values > high)]):
        raise UserError(f"{path}: found the {key} {', '.join(map(str, wrong[:3]))}; expected {low} to {high}")
    return values.astype(np.int64)


def read_labeled(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 32, 32, 3) uint8 and labels (N,) int64 of a training or test batch."""
    batch = _load(path, "data", "labels")
    images = _images(path, batch["data"])
    return images, _integers(path, "labels", batch["labels"], len(images), 0, 9)


def read_unlabeled(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images (N, 32, 32, 3) uint8 of a batch, and its ids (N,) int64 if it has any."""
    batch = _load(path, "data")
    images = _images(path, batch["data"])
    return images, _integers(path, "ids", batch["ids"], len(images), -2**63, 2**63 - 1) if "ids" in batch else None


def find_folder(data_dir: str | Path) -> Path | None:
    """Return the folder of the batch files: `cifar-10-batches-py` in `data_dir` or beside that file, or `data_dir`."""
    data_dir = Path(data_dir).parent if Path(data_dir).is_file() else Path(data_dir)
    folders = (data_dir / FOLDER, data_dir)
    return next((folder for folder in folders for name in TRAIN_FILES + TEST_FILES if (folder / name).exists()), None)
