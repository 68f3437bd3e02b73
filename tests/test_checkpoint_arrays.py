"""Files of arrays: they come back bit for bit, or as an error, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from minitransformer.checkpoint import pack_arrays, unpack_arrays
from minitransformer.errors import CheckpointError, DTypeError

DTYPES = ["?", "u1", "<u2", "<u4", "<u8", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"]
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
METADATA = st.dictionaries(st.text(), JSON, max_size=3)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any dtype, shape, byte order and memory layout."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))  # NaNs of any payload among them
    if dtype.kind == "b":
        array = (np.frombuffer(bits, "u1").reshape(shape) & 1).astype(bool)
    else:
        array = np.frombuffer(bits, dtype).reshape(shape)
    layout = draw(st.sampled_from(["as is", "transposed", "swapped", "strided"]))
    if layout == "transposed":
        return array.T
    if layout == "swapped":
        return array.astype(dtype.newbyteorder(">"))
    if layout == "strided" and shape:
        return np.repeat(array, 2, axis=0)[::2]
    return array


def unpacked(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(data)
        return unpack_arrays(path)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype.newbyteorder("=") == b[n].dtype.newbyteorder("=")
        and a[n].shape == b[n].shape
        and a[n].astype(a[n].dtype.newbyteorder("<")).tobytes() == b[n].astype(b[n].dtype.newbyteorder("<")).tobytes()
        for n in a
    )


@given(st.dictionaries(NAMES, arrays(), max_size=3), METADATA)
def test_arrays_and_metadata_come_back_bit_for_bit(packed: dict[str, np.ndarray], metadata: Any) -> None:
    got, got_metadata = unpacked(pack_arrays(packed, metadata))
    assert same(got, packed)
    assert got_metadata == metadata
    for array in got.values():
        assert array.flags.writeable and array.flags.owndata and array.flags.c_contiguous
        assert array.dtype.isnative


@given(st.dictionaries(NAMES, arrays(), max_size=3), METADATA, st.randoms())
def test_order_and_layout_leave_no_trace_in_the_bytes(
    packed: dict[str, np.ndarray], metadata: dict[str, Any], random: Any
) -> None:
    shuffled = random.sample(list(packed.items()), len(packed))
    other = {name: np.asfortranarray(array) if array.ndim else array for name, array in shuffled}
    reordered = dict(random.sample(list(metadata.items()), len(metadata)))
    assert pack_arrays(other, reordered) == pack_arrays(packed, metadata)


def test_two_processes_write_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np; from minitransformer.checkpoint import pack_arrays;"
        "arrays = {n: np.arange(6.0) for n in {'wte', 'wpe', 'b', 'qkv', 'ln_f'}};"
        "print(hashlib.sha256(pack_arrays(arrays, {n: n for n in arrays})).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1


SAMPLE = {"w": np.arange(6, dtype="f4").reshape(2, 3), "n": np.array(3), "mask": np.array([True, False])}
SAMPLE_METADATA = {"step": 7, "config": {"n_layer": 2}}
SAMPLE_BYTES = pack_arrays(SAMPLE, SAMPLE_METADATA)


@given(st.integers(0, len(SAMPLE_BYTES) - 1), st.integers(1, 255))
def test_a_changed_byte_never_gives_other_arrays(offset: int, flip: int) -> None:
    check_a_changed_byte(offset, flip)


@pytest.mark.parametrize("flip", [1, 0x20, 0x29, 0x80])  # 0x29 makes a tab of the blanks that pad the header
def test_no_byte_can_be_changed_unseen(flip: int) -> None:
    assert b"} " in SAMPLE_BYTES
    for offset in range(len(SAMPLE_BYTES)):
        check_a_changed_byte(offset, flip)


def check_a_changed_byte(offset: int, flip: int) -> None:
    damaged = bytearray(SAMPLE_BYTES)
    damaged[offset] ^= flip
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        unpacked(bytes(damaged))


@given(st.integers(0, len(SAMPLE_BYTES) - 1) | st.binary(min_size=1, max_size=9))
def test_a_cut_or_lengthened_file_of_arrays_is_refused(change: int | bytes) -> None:
    data = SAMPLE_BYTES[:change] if isinstance(change, int) else SAMPLE_BYTES + change
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        unpacked(data)


@given(st.binary(max_size=200) | st.binary(max_size=64).map(lambda b: len(b).to_bytes(8, "little") + b))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        unpacked(data)


@pytest.mark.parametrize(
    "header",
    ["[" * 100_000, "[]", "{}", '{"__metadata__": 1}', '{"__metadata__": {"minitransformer": "[]"}}'],
)
def test_foreign_headers_are_refused(header: str) -> None:
    with pytest.raises(CheckpointError, match="was not written by minitransformer"):
        unpacked(len(header).to_bytes(8, "little") + header.encode())


def test_seals_of_another_kind_are_refused() -> None:
    for seal in ({"metadata": "{}", "sha256": 5}, {"metadata": 5, "sha256": "x"}, {"metadata": "{}"}, {}, 5):
        header = json.dumps({"__metadata__": {"minitransformer": json.dumps(seal)}}).encode()
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            unpacked(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [2**40], [0, 2**42]),
        ("F32", [2**31, 2**31, 2**31], [0, 4]),
        ("F32", [2**62, 0], [0, 0]),
        ("F64", [1], [0, 4]),
        ("F32", [1], [2**63, 2**63 + 4]),
        ("BF16", [2], [0, 4]),
        ("F8_E4M3", [4], [0, 4]),
        ("C64", [1], [0, 4]),
        ("F32", [-1], [0, 4]),
        ("F32", [True], [0, 4]),
        ("F32", ["1"], [0, 4]),
        ("F32", [int("9" * 300)], [0, 4]),
    ],
)
def test_a_header_that_claims_what_is_not_there_is_refused(dtype: str, shape: Any, offsets: list[int]) -> None:
    """Without allocating it: the largest of these would take more than any machine has."""
    seal = {"minitransformer": json.dumps({"metadata": "{}", "sha256": "0" * 64})}
    claim = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    header = json.dumps({"__metadata__": seal, "x": claim}).encode()
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        unpacked(len(header).to_bytes(8, "little") + header + bytes(4))


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAMPLE_BYTES)
    monkeypatch.setattr("minitransformer.checkpoint.total_memory", lambda: 100)
    with pytest.raises(CheckpointError, match=r"the file of arrays has \d+ bytes, expected at most 100: .*x\.safe"):
        unpack_arrays(path)
    monkeypatch.setattr("minitransformer.checkpoint.total_memory", lambda: None)  # where the system does not say
    assert same(unpack_arrays(path)[0], SAMPLE)


class Trap:
    """What an attacker pickles: unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", 2, 3, 4, 5])
def test_a_pickle_is_refused_by_name_and_not_run(kind: str | int, tmp_path: Path) -> None:
    path, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    data = pickle.dumps(Trap(str(sprung)), protocol=kind if isinstance(kind, int) else 2)
    path.write_bytes(data)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    with pytest.raises(CheckpointError) as caught:
        unpack_arrays(path)
    assert str(caught.value) == (
        f"unpack_arrays: {path}: this looks like a pickled PyTorch file; minitransformer never unpickles. "
        "Load a safetensors file that minitransformer saved."
    )
    assert not sprung.exists()


def test_a_header_whose_length_begins_like_a_pickle_is_not_called_one() -> None:
    candidates = (pack_arrays({"x": np.ones(2)}, {"pad": "x" * n}) for n in range(700))
    data = next(data for data in candidates if data[:2] == b"\x80\x02")
    assert unpacked(data)[0]["x"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="is damaged, cut off or was not written by minitransformer"):
        unpacked(data[:-1])


def test_a_missing_file_of_arrays_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the file of arrays is missing, expected at .*gone"):
        unpack_arrays(tmp_path / "gone")


@pytest.mark.parametrize("dtype", ["complex128", "complex64", object, "U3", "M8[s]", np.longdouble])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(DTypeError, match=r"pack_arrays: array 'x' has dtype .*, expected bool, an integer"):
        pack_arrays({"x": np.zeros(2, dtype)}, {})


def test_pack_arrays_refuses_what_the_format_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match="the name '__metadata__' is taken by the format"):
        pack_arrays({"__metadata__": np.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="the metadata cannot be written as JSON"):
        pack_arrays({}, {"loss": float("nan")})
