"""Valid, damaged and malicious batch files, and the child process that reads the malicious ones.

`python tests/malformed.py FOLDER` reads every file of that folder, with little memory and watched by an audit hook, and
prints the errors as JSON.
"""

import base64
import codecs
import copyreg
import json
import os
import pickle
import resource
import sys
import zlib
from pathlib import Path

import numpy as np

import cifar10
from utils import UserError

MAX_OPCODES = 50_000  # for the child, in place of the tenfold: fewer bytes to make and read
ROOM = 2**30  # bytes of memory that the child may use beyond what it has at its start
LABELS, IDS = [3, 9], [7, 5]
# {labels: LABELS, data: two_images(), ids: IDS as int64 array}, pickled by other versions; zlib and base64.
WRITTEN = {
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
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("__builtin__", "apply"),
    ("copyreg", "_reconstructor"), ("codecs", "encode"), ("_codecs", "decode"), ("torch", "load"),
    ("cifar10", "download"), ("numpy", "load"), ("numpy", "memmap"), ("numpy", "frombuffer"),
    ("numpy", "ndarray.tofile"), ("numpy", "dtype.__new__"), ("numpy", "f2py.os.system"),
    ("numpy.core", "multiarray._reconstruct"), ("numpy._core.multiarray", "fromfile"),
    ("numpy.core.multiarray", "_reconstruct.__globals__"), ("numpy.testing._private.utils", "runstring")]
REFUSED_OPCODES = {
    "INST": b"(ios\nsystem\n", "OBJ": b"(c_codecs\nencode\no", "NEWOBJ": b"c_codecs\nencode\n)\x81",
    "NEWOBJ_EX": b"c_codecs\nencode\n)}\x92", "EXT1": b"\x82\x01", "EXT4": b"\x84\x01\0\0\0", "PERSID": b"Pos\n",
    "BINPERSID": b"NQ", "NEXT_BUFFER": b"\x97", "POP": b"N0", "DUP": b"N2", "EMPTY_SET": b"\x8f", "FROZENSET": b"(\x91",
    "INT": b"I1\n", "LONG4": b"\x8b\x01\0\0\0\x01", "BINBYTES8": b"\x8e\x01\0\0\0\0\0\0\0x"}
ENCODE, FROMBUFFER = b"c_codecs\nencode\n", b"cnumpy.core.numeric\n_frombuffer\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR"
UINT8 = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR"


def two_images() -> np.ndarray:
    """Return planes (2, 3072) uint8: black with a few bright pixels."""
    planes = np.zeros((2, 3072), np.uint8)
    planes[0, :4] = 1, 2, 3, 4
    planes[0, 1024 + 33] = 200
    planes[1, 2048 + 1023] = 255
    return planes


def valid() -> dict[str, bytes]:
    """Return small valid files of other versions, and of this Python and NumPy."""
    content = {b"labels": LABELS, "data": two_images(), b"ids": np.array(IDS)}
    files = {name: zlib.decompress(base64.b64decode(text)) for name, text in WRITTEN.items()}
    files |= {f"this Python, protocol {protocol}": pickle.dumps(content, protocol) for protocol in range(2, 6)}
    return files | {"NumPy scalars": pickle.dumps({**content, b"labels": list(np.array(LABELS))}, 2)}


class Call:
    """Pickles as the call of a function with arguments."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def calls(sentinel: Path) -> dict[str, bytes]:
    """Return pickles that create the sentinel file when they are run."""
    system, python = Call(os.system, f"touch {sentinel}"), f"open({str(sentinel)!r}, 'w').close()"
    shapes = {"os.system": system, "eval": Call(eval, python), "as data": {"data": system, "labels": [1]},
              "as a key": {"labels": 1, Call(eval, python + " or 1"): 1},
              "as an argument": Call(codecs.encode, system, "latin1")}
    return {f"{name}, protocol {protocol}": pickle.dumps(shape, protocol)
            for name, shape in shapes.items() for protocol in range(2, 6)}


def bombs() -> dict[str, tuple[bytes, str]]:
    """Return files that ask for much memory or crash a plain unpickler, with a part of the expected error."""
    many, far = MAX_OPCODES + 100, b"J\xff\xff\xff\x7f"
    opcodes, opcode = f"more than {MAX_OPCODES:,} opcodes", "unexpected opcode"
    array, arguments, order = "an array of uint8 without", "that batch files do not have", b"X\x01\0\0\0CtR"
    buffer, call = FROMBUFFER + b"(C\x01x" + UINT8, b"h\0h\x01R" * many
    return {
        "ndarray of 2 GB": (b"cnumpy\nndarray\n((" + far + b"ttR.", arguments),
        "array of 2 GB": (RECONSTRUCT + b"(K\x01(" + far + b"t" + UINT8 + b"\x89C\0tb.", array),
        "array set twice": (RECONSTRUCT + (b"(K\x01K\x01\x85" + UINT8 + b"\x89C\x01xtb") * 2 + b".", arguments),
        "reconstructed with 2 GB": (RECONSTRUCT.replace(b"K\0", far) + b".", arguments),
        "buffer of 2 GB": (buffer + far + b"\x85" + order + b".", array),
        "negative sizes": (buffer + b"J\xff\xff\xff\xff" * 2 + b"\x86" + order + b".", array),
        "object array": (UINT8.replace(b"u1", b"O8") + b".", arguments),
        "state of a global": (ENCODE + b"}U\x08__code__Nsb.", "found"),
        "state of a long text": (UINT8 + b"X\0\0\0\x07" + b"x" * (7 * 2**24) + b"b.", arguments),
        "attribute of a global": (ENCODE + b"N}U\x08__name__Ns\x86b.", "found"),
        "memo index": (b"}r\xff\xff\xff\x7f.", opcode),
        # The C unpickler drops the AB at the frame's end, reads CDENK as the bytes, and continues with rNNNN.
        "memo index after a frame": (b"\x80\x04\x95\x04" + bytes(7) + b"C\x05ABCDENKrNNNN}.", "no data"),
        "tuples, doubled": (b"})q\0" + b"h\0h\0\x86q\0" * 70 + b"Ns.", opcode),
        "tuples, deep": (b"})" + b"\x85" * 40_000 + b"Ns.", opcode),
        "tuples, deep, after calls": (b"}c__builtin__\nbytes\nq\0)q\x01" + b"h\0h\x01R" * 99 + b"\x85" * 99 + b"Ns.",
                                      opcode),
        "tuples, deep, as arguments": (b"c__builtin__\nbytes\n)\x85\x85R.", arguments),
        "lists, deep": (b"]" * 20_000 + b"a" * 19_999 + b".", "a list of 1 list"),
        "dicts, deep": (b"}N" * 12_000 + b"}" + b"s" * 12_000 + b".", "found"),
        "many dicts": (b"}" * many, opcodes),
        "many marks": (b"(" * many, opcodes),
        "many arrays": (b"(" + buffer + b"K\x01\x85" + order[:-1] + b"q\x01" + FROMBUFFER + b"q\0" + call, opcodes),
        "encoded often": (b"X\0\0\x10\0" + b"x" * 2**20 + b"X\x06\0\0\0latin1\x86q\x01" + ENCODE + b"q\0("
                          + b"h\0h\x01R" * 10_000 + b"l.", opcode),
        "encoded often, to the end": (b"X\0\0\x10\0" + b"x" * 2**20 + b"X\x06\0\0\0latin1\x86q\x01" + ENCODE
                                      + b"q\0](" + b"h\0h\x01R" * 10_000 + b"e.", "a list of 10000 bytes"),
        "claimed text": (b"X\xff\xff\xff\x7fx.", "damaged pickle"),
        "claimed bytes": (b"\x96" + b"\xff" * 7 + b"\x7fx.", "damaged pickle"),
        "claimed frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "no data"),
        "nothing but zeros": (bytes(2**25), "damaged pickle"),
    }


def payloads(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Return every malicious file, with a part of the expected error."""
    files = {name: (content, "nothing was run") for name, content in calls(sentinel).items()}
    for module, name in FOREIGN:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        for way, content in (("GLOBAL", f"c{module}\n{name}\n".encode()), ("STACK_GLOBAL", texts + b"\x93")):
            files[f"{module}.{name} by {way}"] = (content + b")R.", f"the global {module}.{name}, ")
    files |= {f"opcode {name}": (content + b".", f"opcode {name} at") for name, content in REFUSED_OPCODES.items()}
    return files | bombs()


def main(folder: Path) -> None:
    """Print the error of each file; fail where more than reading was done."""
    copyreg.add_extension("os", "system", 1)  # so that the opcode EXT1 could run something
    cifar10.MAX_OPCODES = MAX_OPCODES
    events, errors = [], {}
    for content in valid().values():  # Python imports its codecs at their first use
        (folder / "warm-up").write_bytes(content)
        cifar10.read_labeled(folder / "warm-up")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    sys.addaudithook(lambda event, args: event == "open" and args[1] in ("r", "rb") or events.append(event))
    for path in sorted(folder.glob("[0-9]*")):
        events.clear()
        try:
            cifar10.read_labeled(path)
        except UserError as error:
            errors[path.name] = str(error)
        assert not events, (path.name, events)
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
