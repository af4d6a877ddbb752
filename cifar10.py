"""Read CIFAR-10's batch files (https://www.cs.toronto.edu/~kriz/cifar.html).

A batch file is a pickle, and a pickle calls whatever it names. Here it can name only what arrays of numbers need, and
gets stand-ins for it. NumPy's own functions would not do: given the arguments of a crafted file they take its bytes for
pointers (`ndarray((1,), "O", b"AAAAAAAA")`), and given those of the official files some versions print a warning.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
NUMBERS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()  # the dtypes that a file can have


class _DType:
    """Stand-in for `numpy.dtype`; its state sets the byte order."""

    def __init__(self, code: str | bytes, *_: Any):
        code = code.decode() if isinstance(code, bytes) else code
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"the dtype {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for the array that `_reconstruct` makes; its state sets the content."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, buffer = state
        self.array = _from_buffer(buffer, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(buffer: bytes, dtype: _DType, shape: tuple, order: str, axes: tuple | None = None) -> np.ndarray:
    array = np.frombuffer(buffer, dtype.dtype)
    return array.reshape(shape).transpose(axes) if order == "K" else array.reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Each call makes new functions: a pickle can set their attributes."""
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy.core.multiarray", "scalar"): lambda dtype, buffer: np.frombuffer(buffer, dtype.dtype).item(),
            ("numpy.core.numeric", "_frombuffer"): lambda *args: _from_buffer(*args),
            ("numpy", "ndarray"): None,  # an argument of _reconstruct
            ("numpy", "dtype"): _DType,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
            ("__builtin__", "bytes"): bytes}
        key = module.replace("numpy._core.", "numpy.core."), name  # NumPy 2, NumPy 1
        if key not in stand_ins:
            raise pickle.UnpicklingError(f"the file names {module}.{name}; nothing was run")
        return stand_ins[key]


def _read(path: str | Path, *keys: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the images (N, 32, 32, 3) uint8 of a batch file, and all that it holds: at least these keys."""
    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
            if type(batch) is not dict or file.read(1):
                raise pickle.UnpicklingError(f"{_describe(batch)}, or more than that")
        batch = {key.decode() if isinstance(key, bytes) else key: value.array if isinstance(value, _Array) else value
                 for key, value in batch.items()}
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = ascii(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")[1:-1]
        raise UserError(f"{path} is no CIFAR-10 batch file of the Python version ({reason:.200})") from error
    if missing := [key for key in ("data", *keys) if key not in batch]:
        raise UserError(f"{path}: found the keys {ascii([*batch]):.200}; expected {' and '.join(missing)}, too")
    data = batch["data"]
    is_valid = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.size > 0
    if not is_valid or data.shape[1:] not in ((3072,), (32, 32, 3)):
        raise UserError(f"{path}: found data {_describe(data)}; expected uint8 (N, 3072) or (N, 32, 32, 3)")
    images = data if data.ndim == 4 else data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.array(images, order="C"), batch  # a copy, and so writable


def _integers(path: str | Path, key: str, values: Any, count: int) -> np.ndarray:
    """Check a list or array of integers; return it as (count,) int64."""
    if type(values) is list and {*map(type, values)} == {int}:
        values = np.array(values)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.shape != (count,):
        raise UserError(f"{path}: found {key} {_describe(values)}; expected {count} integers")
    return values.astype(np.int64)


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def read_labeled(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 32, 32, 3) uint8 and labels (N,) int64 of a training or test batch."""
    images, batch = _read(path, "labels")
    labels = _integers(path, "labels", batch["labels"], len(images))
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{path}: found labels from {labels.min()} to {labels.max()}; expected 0 to 9")
    return images, labels


def read_unlabeled(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images (N, 32, 32, 3) uint8 of a batch, and its ids (N,) int64 if it has any."""
    images, batch = _read(path)
    return images, _integers(path, "ids", batch["ids"], len(images)) if "ids" in batch else None


def find_folder(data_dir: str | Path) -> Path | None:
    """Return the folder of the batch files: `cifar-10-batches-py` in `data_dir` or beside that file, or `data_dir`."""
    data_dir = Path(data_dir).parent if Path(data_dir).is_file() else Path(data_dir)
    folders = (data_dir / FOLDER, data_dir)
    return next((folder for folder in folders for name in TRAIN_FILES + TEST_FILES if (folder / name).exists()), None)
