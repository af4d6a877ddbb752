"""Hostile batch files, and the child process that reads them: short of memory, and watched in all that it does.

`python tests/hostile.py FOLDER EXAMPLES` reads the files of that folder, then EXAMPLES mutations of valid files, and
prints a report in JSON.
"""

import base64
import codecs
import copyreg
import json
import os
import pickle
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import batches
from utils import UserError

ROOM = 2**30  # bytes that reading may take above the start of the child
LABELS, IDS = [3, 9], [7, 5]
# {labels: LABELS, data: the array of `two_images`, ids: IDS as int64 array} as other Pythons pickled it; zlib, base64.
WRITTEN = {
    "Python 2.7, NumPy 1.16, protocol 0":
        "eNrt3b9qwzAQx/H9XkReaiQ7aRLoC3jJUK+FIv+JMTiJsGVooA/fqxNK6ZAuncp3+Azi7qRDL/BLmuCkNIOv2mEyEjJJhpBLkYsvduKn0jQ+"
        "ei2spD7Nx3BJ6/PYpsd5iL0fR3+R17Gtz6cpjnMdJawlufbJqbnWw6MkhZVYmspIfA4bPTqV6SN2k0m89TfxEloJW0lKMzsjOqN9OrDT5lx3"
        "fDey3++LBycLvbIqrNXCy5t1KlO5WikLAAAAAADw9+otfwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA+L8OByOxmkrTN58BBs5Kt5ak"
        "+5E64NxX7EDsloyBfvstY8Blt5CBpzshA5tfllnfqy9Lph+Np0VM",
    "Python 2.7, NumPy 1.16, protocol 1":
        "eNrt2b1OwzAUBWA7Py01HRh5BE9RuzHwAmCRAeERITuxlEhpWjvXQyR4P96qhCYDQ18A6XyDPfjoWrrr+fJc6lVnrOsGn7z7VKpUbZzOakPG"
        "Z1UfD6exqI7BFYfYUWtCMKP4CK469gOFWJHwuZxjoq/nZ7+SipHmll79WiouVfLCtrSkahpPTvgbqZO4V0zxKbWZvtX8syzL5/Pkckwj7NNu"
        "J97YPWM8STMGAHDNN1YAAAAAAAAAAADwT53J6rStBy+aXDZ/6oXbuV6g5rdOaB+WOmF7qRMer9YJ+m69DM2Xm2wsfgCbF1MO",
    "Python 2.7, NumPy 1.16, protocol 2":
        "eNrt2T9qwzAYBXBJtvNHzdCxR/Bk6NYhJ4iIh1KNpUi2wAbHiWRpMKTQJQm9WW+VGsfQob1A4f0GadDjE3zr+2DvlqZy1ihtms6yVxulIhJL"
        "I+NSeWXjog27Q58Ve2eyXWh8rZxTPX9zpti3nXeh8NwmtxRvy9urnQlyklRfnu08FVSwLVmdp0zp+4PhdiFZeBRE0CGzHL6U9Jjn+eY6GA9B"
        "vP58IQ+EUBbFBADgL19YAQAAAAAAAAAAwD919VpGddlZXiXVT69wN/YKp2ohWf009QirsUdY/+4R5P18mpZMt9ch+wa8zFKN",
    "Python 3.11, NumPy 1.26, protocol 2":
        "eNrt2blOw0AQBuC1nRBiAgl3uG8whyKlo+AJsEixVRoU+ZJsKXHy2+siEkg0uZ6KIg8Ga8dUeQKk+QofO+uZldv/S/0EM5yO03c9J9a9MH3Q"
        "obRXGGNdy/a6MdT8RQRhE9oYBY7iO1YMUzPLnq+0C7LqWsJCyZfVVY6yEya9wbDh9COv0Uu6IrCiyBrqnchz+mEsosQROvTFLj10F1WsmWyE"
        "imyoyIY21tNuGxzVCWocm4apmOobq4yxlX/oiuFAnnW7rcr9SRM7s+kEuxx78mRZjw/st1qt1x8pu5hMoG7P5AS1zpiiaunJCSFk2XxK/4AQ"
        "QgghhBBCCCGEkH9q/o2DNGI45DgSOLZ9pa3J5cCNcZKun3Kc+bqfpRLnfnWCC47LLIUY4cpfpA7BM67T1OGG4/YvdXjB3VLqYGSpQ01WS/n0"
        "Yn7HfTrrgeNR4MlOGr9+nXgt",
    "Python 3.11, NumPy 1.26, protocol 4":
        "eNrt2b1qwzAUBWBZtmNCM2QptG+QydAtQ6Zqq6iH7qXItsAGxwmyPBha6NKfgLbcvlPfKrWdUDrkBQrnGyQER3e463kNvvg1G73QQkwqleqq"
        "oUdaSF9OtQhyZRW5y7pdb7s42xgdr9vKlsoY1ZGbPRmdberGmjaztCcXjkFyUZ0fI3uS7I2El9IHPfRTPcnv2eydisiFue22evjF2xvafR4D"
        "vvOeKUmSu0NvPCSzlO5u2RVjHvcDBgBwzjdWAAAAAAAAAAAA8E8dyFIq/DJvqJgU06FZKC5+e4X+MXe8XP6tElbnqgQxj04Dw9M9zG3jH5Lk"
        "ZRg=",
    "Python 3.11, NumPy 1.26, protocol 5":
        "eNrt2TuOglAYBeALiMZHoVazBCoSuymmo5NIYW8MyCWQ+ApCYeIk0/hKbufRNbkR1+EgoZjCDUxyvuI/t7g5xd/+P+b18SFK37Cc+twP5HyD"
        "CSzXcJvSqYV+5kP1l/livbVnq1TaxVOmyQyqPY3S1SLIo0imuMC6iapJ042aICJ6584VEBERERERERER/VNPKLO8FxQZZtu1xAVKzwc4n44Y"
        "vy4LStvB87zhs1AOV2QIXH0kOgcozUFW/HOMJNwgrlu3blXcqNKsEnFL6cnn396vt717xL1XZW7/Ak28V1g=",
}
FOREIGN = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "bytearray"),
    ("__builtin__", "eval"), ("__builtin__", "apply"), ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"),
    ("copyreg", "add_extension"), ("copy_reg", "_reconstructor"), ("_codecs", "decode"), ("codecs", "encode"),
    ("operator", "attrgetter"), ("functools", "partial"), ("types", "FunctionType"), ("torch", "load"),
    ("torch._utils", "_rebuild_tensor_v2"), ("batches", "write_batch"), ("__main__", "payloads"),
    ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"), ("numpy", "matrix"), ("numpy", "frombuffer"),
    ("numpy", "f2py.os.system"), ("numpy", "ndarray.__class__"), ("numpy", "ndarray.tofile"),
    ("numpy", "dtype.__new__"), ("numpy", "_reconstruct"), ("numpy", "ndarray "), ("", "numpy ndarray"),
    ("Numpy", "ndarray"), ("numpy", "ndarray ndarray"), ("numpy.core", "multiarray._reconstruct"),
    ("numpy.core.multiarray", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct.__globals__"), ("numpy._core.multiarray", "fromfile"),
    ("numpy._core.numeric", "frombuffer"), ("numpy._core.numeric", "load"), ("numpy._core.numeric", "os.system"),
    ("numpy.lib.npyio", "load"), ("numpy.testing._private.utils", "runstring"), ("numpy.f2py.capi_maps", "eval"),
]
OPCODES = {"INST": b"(ios\nsystem\n", "OBJ": b"(c_codecs\nencode\no", "NEWOBJ": b"c_codecs\nencode\n)\x81",
           "NEWOBJ_EX": b"c_codecs\nencode\n)}\x92", "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\0",
           "EXT4": b"\x84\x01\0\0\0", "PERSID": b"Pos\n", "BINPERSID": b"NQ", "NEXT_BUFFER": b"\x97",
           "READONLY_BUFFER": b"N\x98", "POP": b"N0", "POP_MARK": b"(1", "DUP": b"N2", "EMPTY_SET": b"\x8f",
           "ADDITEMS": b"](N\x90", "FROZENSET": b"(\x91", "LONG4": b"\x8b\x01\0\0\0\x01",
           "BINBYTES8": b"\x8e\x01\0\0\0\0\0\0\0x", "BINUNICODE8": b"\x8d\x01\0\0\0\0\0\0\0x", "b'\\xff'": b"\xff"}
FROMBUFFER, ENCODE = b"cnumpy.core.numeric\n_frombuffer\n", b"c_codecs\nencode\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR"
UINT8 = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR"
TOKENS = [b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"cbuiltins\neval\n", b"(ios\nsystem\n", b"\x82\x01",
          b"\x81", b"\x92", b"\x85", b"\x86", b"h\0", b"g0\n", b"q\0", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f",
          b"\x8b\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", ENCODE, RECONSTRUCT, UINT8, FROMBUFFER, b"cnumpy\nndarray\n",
          *(bytes([code]) for code in b"Rbo012(t}]eusaN.")]


def two_images() -> np.ndarray:
    """Make the planes (2, 3072) uint8 that `WRITTEN` holds: black with a few pixels."""
    planes = np.zeros((2, 3072), np.uint8)
    planes[0, :4] = 1, 2, 3, 4
    planes[0, 1024 + 33] = 200
    planes[1, 2048 + 1023] = 255
    return planes


def valid() -> dict[str, bytes]:
    """Give small valid files of every age and protocol: those of `WRITTEN`, and what this Python and NumPy write."""
    files = {name: zlib.decompress(base64.b64decode(text)) for name, text in WRITTEN.items()}
    content = {b"labels": LABELS, "data": two_images(), b"ids": np.array(IDS)}
    files |= {f"this Python, protocol {protocol}": pickle.dumps(content, protocol) for protocol in range(6)}
    return files | {"NumPy scalars": pickle.dumps({**content, b"labels": list(np.array(LABELS))}, 2)}


class Call:
    """Pickles as the call of a function with arguments."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def calls(sentinel: Path) -> dict[str, bytes]:
    """Pickle calls that write the sentinel when they are run, in every protocol, alone and within other calls."""
    system, python = Call(os.system, f"touch {sentinel}"), f"open({str(sentinel)!r}, 'w').close()"
    shapes = {"os.system": system, "eval": Call(eval, python), "exec": Call(exec, python), "in a list": [system],
              "as data": {"data": system, "labels": [1]}, "as a key": {"labels": 1, Call(eval, python + " or 1"): 1},
              "as an argument": Call(codecs.encode, system, "latin1"), "twice": Call(eval, Call(eval, repr(python)))}
    return {f"{name}, protocol {protocol}": pickle.dumps(shape, protocol)
            for name, shape in shapes.items() for protocol in range(6)}


def foreign(module: str, name: str) -> dict[str, bytes]:
    """Name a global in the two ways that there are, and call it."""
    texts = [b"X" + struct.pack("<I", len(text)) + text.encode() for text in (module, name)]
    return {f"{module}.{name} as text": f"c{module}\n{name}\n(S'id'\ntR.".encode(),
            f"{module}.{name} from the stack": b"\x80\x04" + b"".join(texts) + b"\x93(S'id'\ntR."}


def bombs() -> dict[str, tuple[bytes, str]]:
    """Make files that are small or of bounded size and ask for much, with a part of the message that they get."""
    many, far, huge = 510_000, b"J\xff\xff\xff\x7f", b"\x8a\x08" + (2**62).to_bytes(8, "little")
    opcodes, array, tuples = f"more than {batches.MAX_OPCODES} opcodes", "an array of uint8 without", "a tuple of other"
    order, buffer, call = b"X\x01\0\0\0CtR", FROMBUFFER + b"(C\x01x" + UINT8, b"h\0h\x01R" * many
    return {
        "ndarray of 2 GB": (b"cnumpy\nndarray\n((" + far + b"ttR.", "ndarray(a tuple)"),
        "array of 2 GB": (RECONSTRUCT + b"(K\x01(" + far + b"t" + UINT8 + b"I00\nU\0tb.", array),
        "array set twice": (RECONSTRUCT + (b"(K\x01K\x01\x85" + UINT8 + b"I00\nU\x01xtb") * 2 + b".",
                            "an array(1, a tuple,"),
        "reconstructed with 2 GB": (RECONSTRUCT.replace(b"K\0", far) + b".", "_reconstruct("),
        "buffer of 2 GB": (buffer + far + b"\x85" + order + b".", array),
        "no bytes, huge sides": (buffer.replace(b"\x01x", b"\0") + b"(K\0" + huge * 3 + b"t" + order + b".", "found"),
        "negative sides": (buffer + b"J\xff\xff\xff\xff" * 2 + b"\x86" + order + b".", array),
        "shape of bytes": (buffer + b"B\0\0\x08\0" + b"\xff" * 2**19 + order + b".", "_frombuffer("),
        "axes twice": (buffer + b"K\x01K\x01\x86X\x01\0\0\0KK\0K\0\x86tR.", "found"),
        "object array": (UINT8.replace(b"u1", b"O8") + b".", "dtype(b'O8', 0, 1)"),
        "long text items": (b"cnumpy\ndtype\n(U\x0bU2000000000K\0K\x01tR.", "dtype(b'U2000000000', 0, 1)"),
        "records": (b"cnumpy\ndtype\n(](U\x02u1U\x02u1eK\0K\x01tR.", tuples),
        "state of a function": (ENCODE + b"}U\x08__code__Nsb.", "found"),
        "attribute of a function": (ENCODE + b"(N}U\x08__name__NstR.", tuples),
        "memo index": (b"}r\xff\xff\xff\x7f.", "the memo index 2147483647"),
        "memo index as text": (b"}p99999999999999\n.", "the memo index 99999999999999"),
        "memo index below 0": (b"}p-1\n.", "the memo index -1"),
        "tuples, doubled": (b"})q\0" + b"h\0h\0\x86q\0" * 25 + b"Ns.", tuples),
        "tuples, deep": (b")" + b"\x85" * 100_000 + b".", tuples),
        "tuple, wide": (b"(" + b"K\x01" * 100_000 + b"t.", tuples),
        "lists, deep": (b"]" * 100_000 + b"a" * 99_999 + b".", "a list of other"),
        "list in itself": (b"]q\0h\0a.", "a list of other"),
        "dicts, deep": (b"}N" * 50_000 + b"}" + b"s" * 50_000 + b".", "found"),
        "dict in itself": (b"}q\0U\x01ah\0s.", "a dict within a dict"),
        "keys of one hash": (b"}(" + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N"
                                              for n in range(30_000)) + b"u.", "a key that is no text"),
        "many dicts": (b"}" * many, opcodes),
        "many marks": (b"(" * many, opcodes),
        "many lists": (b"]\x94" * many, opcodes),
        "many texts": (b"(S'data'\np0\n" + b"g0\n" * many, opcodes),
        "many arrays": (b"(" + buffer + b"K\x01\x85" + order[:-1] + b"q\x01" + FROMBUFFER + b"q\0" + call, opcodes),
        "many orders": (b"(" + UINT8 + b"q\0(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tq\x01"
                        + call.replace(b"R", b"b"), opcodes),
        "encoded often": (b"V" + b"x" * 2**20 + b"\nVlatin1\n\x86q\x01" + ENCODE + b"q\0" + call, "encode('xxx"),
        "long number": (b"\x8b\0\0\0\x04" + b"\x7f" * 2**26 + b".", "the opcode LONG4,"),
        "long number as text": (b"L" + b"1" * 2**21 + b"L\n.", "truncated or damaged"),
        # One character of four bytes makes all of them so: this may just fit into memory, or not.
        "wide text": (b"X\0\0\0\x07" + "\U0001f600".encode() + b"x" * (7 * 2**24 - 4) + b".", "found"),
        "claimed text": (b"X\xff\xff\xff\x7f" + b"x.", "truncated or damaged"),
        "claimed bytes": (b"\x96" + b"\xff" * 7 + b"\x7f" + b"x.", "truncated or damaged"),
        "quotes without end": (b"S" + b"'" * 2**25, "truncated or damaged"),
        "nothing but zeros": (bytes(2**25), "the opcode b'\\x00'"),
    }


def payloads(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Give every hostile file, with a part of the message that it gets."""
    files = {name: (content, "foreign global") for name, content in calls(sentinel).items()}
    for module, name in FOREIGN:
        files |= {key: (content, f"foreign global {module}.{name} (") for key, content in foreign(module, name).items()}
    files |= {f"opcode {name}": (content + b".", f"the opcode {name},") for name, content in OPCODES.items()}
    return files | bombs()


class Watch:
    """Notes what Python does, by its audit events, while a batch file is read."""

    def __init__(self):
        self.events, self.active = [], False
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        """Take the events, but for the opening of a file to be read."""
        if self.active and not (event == "open" and arguments[1] in ("r", "rb")):
            self.events.append(event)

    def read(self, path: Path, reader) -> tuple[object, str]:
        """Read a file and return its content or None, and its error; fail where more was done than reading."""
        self.events.clear()
        content, error = None, ""
        self.active = True
        try:
            content = reader(path)
        except UserError as caught:
            error = str(caught)
        finally:
            self.active = False
        assert not self.events, f"{path.name}: {self.events}"
        assert content is not None or (error.startswith(f"{path}: ") and error.isprintable()), f"{path.name}: {error!r}"
        return content, error


class AllowedUnpickler(pickle.Unpickler):
    """Python's own unpickler, for files that were read: those must not name anything foreign."""

    def find_class(self, module: str, name: str) -> object:
        """Import an allowed global."""
        assert (module, name) in batches.ALLOWED, f"a file was read that names {module}.{name}"
        return super().find_class(module, name)


def check_content(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Assert that a file holds what Python's own unpickler finds in it, where that takes it."""
    try:
        with open(path, "rb") as file:
            content = AllowedUnpickler(file, encoding="bytes").load()
    except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError,
            pickle.UnpicklingError):
        return  # it minds, and makes room for, the length of a frame, for example, which batches.py passes by
    content = {key if isinstance(key, str) else key.decode("latin1"): value for key, value in content.items()}
    planes = content["data"]
    wanted = planes if planes.ndim == 4 else planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert images.dtype == np.uint8 and np.array_equal(images, wanted)
    assert labels.dtype == np.int64 and labels.tolist() == list(content["labels"])


def places(content: bytes) -> list[int]:
    """Give the offsets to change: all that do not lie amid thousands of equal pixels, and as many of the others."""
    dense = [at for at in range(len(content)) if len(set(content[max(0, at - 8):at + 8])) > 4]
    sparse = sorted(set(range(len(content))) - set(dense))
    return dense + sparse[::max(1, len(sparse) // len(dense))]


def mutate(content: bytes, offsets: list[int], edits: list[tuple[int, str, bytes]]) -> bytes:
    """Replace, insert, delete or repeat bytes."""
    for where, kind, piece in edits:
        at = offsets[where % len(offsets)]
        end = at if kind == "insert" else at + len(piece)
        new = content[at:end] * 2 if kind == "repeat" else b"" if kind == "delete" else piece
        content = content[:at] + new + content[end:]
    return content


def fuzz(folder: Path, watch: Watch, examples: int) -> dict[str, int]:
    """Read mutations of valid files; each loads as Python's own unpickler does or gives a UserError."""
    bases = [(content, places(content)) for content in valid().values()]
    counts, path = {"read": 0, "refused": 0}, folder / "fuzzed"
    edit = st.tuples(st.integers(0, 2**12), st.sampled_from(["replace"] * 5 + ["insert", "delete", "repeat"]),
                     st.binary(min_size=1, max_size=4) | st.sampled_from(TOKENS))

    # No phase that explains a failure: its tracing would show among the events.
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
              phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(bases), st.lists(edit, min_size=1, max_size=3))
    def check(base, edits):
        path.write_bytes(mutate(*base, edits))
        content, _ = watch.read(path, batches.read_labelled)
        counts["read" if content else "refused"] += 1
        if content:
            check_content(path, *content)

    check()
    return counts


def main(folder: Path, examples: int) -> None:
    """Read the files of a folder and the fuzzed ones, and print what became of them."""
    copyreg.add_extension("os", "system", 1)  # so that the opcode EXT1 has something to run
    watch, readers = Watch(), (batches.read_labelled, batches.read_unlabelled, batches.read_label_names)
    for content in valid().values():  # once before, as Python imports its codecs when they are first used
        (folder / "fuzzed").write_bytes(content)
        check_content(folder / "fuzzed", *batches.read_labelled(folder / "fuzzed"))
    start = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (start + ROOM, start + ROOM))
    errors = {}
    for path in sorted(folder.glob("[0-9]*")):
        # All that is large needs one look only: the three readers differ in what follows the pickle.
        for reader in readers if path.stat().st_size < 10_000 else readers[:1]:
            errors[f"{path.name} {reader.__name__}"] = watch.read(path, reader)[1]
    print(json.dumps({"errors": errors, "counts": fuzz(folder, watch, examples) if examples else {}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
