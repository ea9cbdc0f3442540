"""Whether a file of weights can be loaded, found out without loading it: nothing that it holds is executed.

Formats: torch's zip archives and its older plain streams, other pickles, safetensors, and the lists of what
other files there must be: those of torch.distributed.checkpoint and of sharded models. Pickles are read opcode
by opcode with ``pickletools``, which builds no objects.
"""

from __future__ import annotations

import json
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from gradwatch.checkpoints.manifest import Fault, Problem, is_folder, open_file
from gradwatch.checkpoints.names import DISTRIBUTED, is_index, is_weights

# What files with these endings hold is known; a `.bin` may be anything.
_OURS: Final = frozenset({".pt", ".pth", ".ckpt", ".safetensors"})
_PICKLE: Final = b"\x80"
_ZIP: Final = b"PK"
# torch writes five pickles and then the storages; see torch/serialization.py, _legacy_save.
_LEGACY_START: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES: Final = 5
_SAFETENSORS_MOST_HEADER: Final = 100_000_000
# Bits, by the names of https://github.com/huggingface/safetensors.
_SAFETENSORS_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_STORAGE_BYTES: Final = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "UntypedStorage": 1,
    "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
# What pickletools, zipfile and struct raise at bytes that are not what they should be.
_BROKEN: Final = (
    ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error, zipfile.BadZipFile, zlib.error,
    NotImplementedError, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip

_LONGEST_REFERENCE: Final = 8
# Right after saving, no more than about half a second goes into opcodes.
_QUICK_PICKLE_BYTES: Final = 1 << 20
# What makes more of a pickle than one number or text.
_BUILDING: Final = frozenset({
    "EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_SET", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "INST", "OBJ", "BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "PERSID", "BINPERSID", "GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4",
})  # fmt: skip
_REMEMBERING: Final = frozenset({"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"})
_RECALLING: Final = frozenset({"BINGET", "LONG_BINGET", "GET"})
# Names that only an archive of torch.save's, or of torch.export's, has.
_RECORDS: Final = frozenset({"data.pkl", "archive_format"})

Storages = dict[str, int | None]


class _FaultError(Exception):
    def __init__(self, fault: Fault, evidence: str) -> None:
        super().__init__(evidence)
        self.problem = Problem(fault, evidence)


def problem_of(checkpoint: Path, *, as_written: bool = False, quick: bool = False) -> Problem | None:
    """Why a file, or one in a folder, cannot be loaded; None where nothing speaks against it.

    ``as_written``: its checksum is right, so that an empty file or an unknown format is what was meant.
    ``quick``: only headers and ends of files, and small pickles.
    """
    files = [checkpoint]
    if is_folder(checkpoint):
        files = [file for file in sorted(checkpoint.rglob("*")) if is_weights(file) and not is_folder(file)]
    problems = (problem_of_file(file, as_written=as_written, quick=quick) for file in files)
    return next(filter(None, problems), None)


def problem_of_file(path: Path, *, as_written: bool = False, quick: bool = False) -> Problem | None:
    """The same of one file."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(_LEGACY_START))
            file.seek(0)
            known = _examine(file, start, size, path.suffix, quick)
            if not known and not as_written:
                _refuse_unknown(path, size)
            if not as_written and path.suffix in _OURS:
                file.seek(0)
                _refuse_empty(file, start)
            _check_parts(file, path, quick)
    except _FaultError as error:
        return error.problem
    except FileNotFoundError:
        return Problem(Fault.MISSING, f"{path.name} is not there")
    except OSError as error:
        return Problem(Fault.UNLOADABLE, f"cannot read {path.name}: {error.strerror or error}")
    except _BROKEN as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return Problem(Fault.UNLOADABLE, f"{path.name} is broken: {reason[:200]}")
    return None


def _examine(file: IO[bytes], start: bytes, size: int, suffix: str, quick: bool) -> bool:
    """Whether it is of a known format; raises what is wrong with it then."""
    if start.startswith(_ZIP):
        _examine_zip(file, quick)
    elif start == _LEGACY_START:
        _examine_legacy(file, size)
    elif start.startswith(_PICKLE):
        if not quick or size <= _QUICK_PICKLE_BYTES:
            _walk(file)
    elif start and suffix in _OURS and (suffix == ".safetensors" or start[8:9] == b"{"):
        _examine_safetensors(file, size)
    else:
        return False
    return True


def _refuse_unknown(path: Path, size: int) -> None:
    if not size:
        raise _FaultError(Fault.TRUNCATED, f"{path.name} is empty")
    if path.suffix in _OURS:
        raise _FaultError(Fault.UNLOADABLE, f"{path.name} is no zip archive, pickle or safetensors file")


def _refuse_empty(file: IO[bytes], start: bytes) -> None:
    """Refuse what is whole, but nothing that anything could be loaded from."""
    if start.startswith(_ZIP):
        with zipfile.ZipFile(file) as archive:
            if not any(name.rpartition("/")[2] in _RECORDS for name in archive.namelist()):
                raise _FaultError(Fault.UNLOADABLE, "the archive has no data.pkl")
    elif start != _LEGACY_START and start.startswith(_PICKLE):
        builds = any(name in _BUILDING for name, _ in _opcodes(file))
        if not builds:
            raise _FaultError(Fault.UNLOADABLE, "the pickle is of a single value")


def _check_parts(file: IO[bytes], path: Path, quick: bool) -> None:
    """Whether the files that a list names are there, and long enough."""
    file.seek(0)
    needed: dict[str, int] = {}
    if path.name == DISTRIBUTED and not (quick and os.fstat(file.fileno()).st_size > _QUICK_PICKLE_BYTES):
        needed = _distributed_parts(file)
    elif is_index(path):
        index = json.load(file)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            raise _FaultError(Fault.UNLOADABLE, f"{path.name} has no weight_map")
        needed = dict.fromkeys(map(str, shards.values()), 0)
    for name, bytes_ in needed.items():
        try:
            held = (path.parent / name).stat().st_size
        except FileNotFoundError as error:
            raise _FaultError(Fault.MISSING, f"{name} is not there, and {path.name} lists it") from error
        if held < bytes_:
            raise _FaultError(Fault.TRUNCATED, f"{name} has {held} of {bytes_} bytes")


def _distributed_parts(file: IO[bytes]) -> dict[str, int]:
    """The files of a distributed checkpoint, and how long each is at least.

    Its ``_StorageInfo`` is pickled as a dictionary of ``relative_path``, ``offset`` and ``length``.
    """
    needed: dict[str, int] = {}
    memory: dict[int, Any] = {}
    seen: deque[Any] = deque([None], maxlen=6)
    for name, value in _opcodes(file):
        if name in _REMEMBERING:
            memory[len(memory) if name == "MEMOIZE" else value] = seen[-1]
            continue
        seen.append(memory.get(value) if name in _RECALLING else value)
        match tuple(seen):
            case ("relative_path", str(part), "offset", int(offset), "length", int(length)):
                needed[part] = max(needed.get(part, 0), offset + length)
    return needed


def _examine_zip(file: IO[bytes], quick: bool) -> None:
    if not zipfile.is_zipfile(file):
        # The directory of an archive is its end.
        raise _FaultError(Fault.TRUNCATED, "the end of the archive is not there")
    with zipfile.ZipFile(file) as archive:
        if quick:
            return
        bad = archive.testzip()
        if bad is not None:
            raise _FaultError(Fault.ALTERED, f"{bad} in the archive has another checksum than what was written")
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        for name in sizes:
            folder, slash, last = name.rpartition("/")
            if last == "data.pkl":
                with archive.open(name) as pickled:
                    _check_storages(f"{folder}{slash}data/", sizes, _walk(pickled))


def _check_storages(folder: str, sizes: dict[str, int], storages: Storages) -> None:
    for key, bytes_ in storages.items():
        held = sizes.get(folder + key)
        if held is None:
            raise _FaultError(Fault.UNLOADABLE, f"{folder}{key} is not in the archive")
        if bytes_ is not None and held != bytes_:
            raise _FaultError(Fault.UNLOADABLE, f"{folder}{key} has {held} bytes, its tensors need {bytes_}")


def _examine_legacy(file: IO[bytes], size: int) -> None:
    """Five pickles, the fourth of which refers to storages, then these, each with its length in front."""
    storages: Storages = {}
    for _ in range(_LEGACY_PICKLES):
        storages |= _walk(file)
    known = [bytes_ for bytes_ in storages.values() if bytes_ is not None]
    expected = file.tell() + sum(8 + bytes_ for bytes_ in known)
    if len(known) == len(storages) and size != expected:
        fault = Fault.TRUNCATED if size < expected else Fault.ALTERED
        raise _FaultError(fault, f"{size} of {expected} bytes are there")


def _walk(file: IO[bytes]) -> Storages:
    """Read one pickle to its end; the storages that it refers to, with the bytes that their tensors need.

    torch refers to a storage as ("storage", class, key, device, elements, ...). Only what such a tuple is made
    of is followed: names, numbers, and where the pickle remembers them.
    """
    storages: Storages = {}
    memory: dict[int, Any] = {}
    recent: list[Any] = [None]
    for name, value in _opcodes(file):
        if name in _REMEMBERING:
            memory[len(memory) if name == "MEMOIZE" else value] = recent[-1]
        elif name == "BINPERSID":
            storages |= _storage(recent)
        elif name == "MARK":
            recent = [None]
        elif name in {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}:
            recent.append(tuple(recent[:_LONGEST_REFERENCE]) if name == "TUPLE" else None)
        elif name in _RECALLING:
            recent.append(memory.get(value))
        else:
            recent.append(value)
    return storages


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, value, _ in pickletools.genops(file):
            yield opcode.name, value
    except ValueError as error:
        ended = "exhausted" in str(error) or "not enough data" in str(error) or "expected" in str(error)
        fault = Fault.TRUNCATED if ended and not file.read(1) else Fault.UNLOADABLE
        raise _FaultError(fault, f"the pickle is broken: {str(error).splitlines()[0][:200]}") from error


def _storage(recent: list[Any]) -> Storages:
    told = next((each for each in reversed(recent) if isinstance(each, tuple)), ())
    match told:
        case (None, "storage", str(kind), str(key), _, int(elements), *_):
            width = _STORAGE_BYTES.get(kind.rpartition(" ")[2])
            return {key: None if width is None else width * elements}
    return {}


def _examine_safetensors(file: IO[bytes], size: int) -> None:
    length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else _SAFETENSORS_MOST_HEADER + 1
    if length > _SAFETENSORS_MOST_HEADER:
        raise _FaultError(Fault.UNLOADABLE, "it has no safetensors header")
    if 8 + length > size:
        raise _FaultError(Fault.TRUNCATED, "its header is cut off")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise _FaultError(Fault.UNLOADABLE, "its header does not name tensors")
    spans = sorted(_span(name, told) for name, told in header.items() if name != "__metadata__")
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _FaultError(Fault.UNLOADABLE, f"{name} does not begin where the tensor before it ends")
        end = stop
    if size != 8 + length + end:
        fault = Fault.TRUNCATED if size < 8 + length + end else Fault.ALTERED
        raise _FaultError(fault, f"{size} of {8 + length + end} bytes are there")


def _span(name: str, told: Any) -> tuple[int, int, str]:
    try:
        start, stop = map(int, told["data_offsets"])
        elements, bits = math.prod(map(int, told["shape"])), _SAFETENSORS_BITS.get(told["dtype"])
    except (KeyError, TypeError) as error:
        raise _FaultError(Fault.UNLOADABLE, f"the header does not describe {name}") from error
    if bits is not None and (stop - start) * 8 != elements * bits:
        raise _FaultError(
            Fault.UNLOADABLE, f"{name} has {stop - start} bytes, its shape needs {elements * bits / 8:g}"
        )
    return start, stop, name
