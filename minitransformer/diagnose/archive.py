"""A bad op as one small `.npz` file: the arrays, and the rest as JSON. Nothing in it is ever executed."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.autograd import OPS, as_array
from minitransformer.diagnose.bad_op import BadOp
from minitransformer.diagnose.shrink import shrunk
from minitransformer.errors import DataError, nearest
from minitransformer.files import json_bytes, read_bytes, write_bytes
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.ops.decoder_layer import DecoderOptions
from minitransformer.ops.encoder_layer import EncoderOptions
from minitransformer.ops.gpt_block import BlockOptions
from minitransformer.random import DrawKey

_FORMAT = 1
_LARGEST = 1 << 30  # bytes, unpacked; what `shrunk` leaves is a few kilobytes
# What zipfile, json and the conversions below raise for bytes that nobody meant for them.
_NOT_OURS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RecursionError, OverflowError),
    *(LookupError, TypeError, ValueError, AttributeError),
)
_RECORDS: dict[str, Any] = {
    record.__name__: record for record in (Problem, Sparse, DrawKey, BlockOptions, EncoderOptions, DecoderOptions)
}


def save(path: str | Path, bad: BadOp, context: Mapping[str, Any] | None = None) -> None:
    """Write `bad`, shrunk to little that still goes wrong, and `context`: strings, numbers and arrays by name.

    Functions among its settings (a user's `score_mod`) leave only their name. Raises `CheckpointError` if
    the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    fields = {**shrunk(bad)._asdict(), "op": bad.op.name, "context": {"found": str(bad), **(context or {})}}
    text = json_bytes("the bad op", {"minitransformer_bad_op": _FORMAT, **_encode(fields, arrays)})
    file = io.BytesIO()
    np.savez(file, json=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    write_bytes(Path(path), file.getvalue())


def load(path: str | Path) -> tuple[BadOp, dict[str, Any]]:
    """What `save` wrote; `DataError` naming `path` for anything else."""
    data = read_bytes(Path(path), "the bad op")
    try:
        arrays = _read_arrays(data)
        content = json.loads(arrays.pop("json").tobytes())
        version, op = content.pop("minitransformer_bad_op"), content["op"]
        if version == _FORMAT and op in OPS:
            fields = {name: _decode(value, arrays) for name, value in content.items()}
            context = dict(fields.pop("context"))
            return _checked(**{**fields, "op": OPS[op]}), context
    except _NOT_OURS as error:
        problem = f"is no bad op that minitransformer left, or is damaged ({error})"
        raise DataError(str(path), problem, "Pass such a .npz file") from error
    if version != _FORMAT:
        raise DataError(str(path), f"has format {version!r}, expected {_FORMAT}", "Read it with another version")
    raise DataError(str(path), f"holds the op {op!r}, which is not registered", nearest(str(op), OPS))


def _checked(**fields: Any) -> BadOp:
    """A `BadOp` whose fields are of the right kinds; `TypeError` otherwise."""
    bad = BadOp(**fields)
    kinds = {"layer": str, **dict.fromkeys(("inputs", "douts", "results", "outside"), tuple)}
    kinds |= dict.fromkeys(("static", "names"), dict)
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise TypeError(f"{name} is a {type(fields[name]).__name__}")
    for x in (*bad.inputs, *bad.douts, *bad.results):
        as_array(bad.op.name, x)
    if not all(isinstance(x, np.ndarray) for x in bad.douts):
        raise TypeError("an upstream gradient is no array")
    return bad._replace(names={int(position): str(name) for position, name in bad.names.items()})


def _read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; `ValueError` for one that claims more than it holds, or holds pickles."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        for entry in archive.infolist():
            member = io.BytesIO(archive.read(entry))
            version = np.lib.format.read_magic(member)
            if version != (1, 0):
                raise ValueError(f"{entry.filename} has version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype.hasobject or dtype.itemsize * int(np.prod(shape, dtype=object)) != entry.file_size - member.tell():
                raise ValueError(f"{entry.filename} has another size than it says")
            member.seek(0)
            arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """`value` as JSON; what JSON lacks becomes a pair of its kind and its content, arrays go to `arrays`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, np.ndarray):
        arrays[f"array{len(arrays)}"] = value
        return ["array", f"array{len(arrays) - 1}"]
    if isinstance(value, np.generic):
        return _encode(value.item(), arrays)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return ["dtype", np.dtype(value).str]
    if isinstance(value, (slice, range)):
        return [type(value).__name__, [_encode(part, arrays) for part in (value.start, value.stop, value.step)]]
    if value is Ellipsis:
        return ["ellipsis", None]
    if type(value).__name__ in _RECORDS:
        return [type(value).__name__, {name: _encode(part, arrays) for name, part in value._asdict().items()}]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, [_encode(part, arrays) for part in value]]
    if isinstance(value, dict):
        return {str(name): _encode(part, arrays) for name, part in value.items()}
    return ["foreign", getattr(value, "__qualname__", type(value).__name__)]


class Foreign:
    """Stands for an object that no file holds, such as a user's own function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not in the file>"


def _decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `_encode`; `ValueError`, `TypeError` or `KeyError` for what it does not write."""
    if isinstance(value, dict):
        return {name: _decode(part, arrays) for name, part in value.items()}
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*(float.fromhex(part) for part in content))
    if kind == "array":
        return arrays[content]
    if kind == "dtype":
        return np.dtype(str(content))
    if kind in ("slice", "range"):
        return (slice if kind == "slice" else range)(*(_decode(part, arrays) for part in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind in _RECORDS:
        return _RECORDS[kind](**_decode(content, arrays))
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_decode(part, arrays) for part in content)
    if kind == "foreign":
        return Foreign(str(content))
    raise ValueError(f"unknown kind {kind!r}")
