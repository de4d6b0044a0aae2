"""Arrays in one safetensors file, written so that they are digested on the way and held in memory once."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.errors import CheckpointError

BLOCK_BYTES = 4 << 20
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

Array: TypeAlias = npt.NDArray[np.generic]


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> tuple[int, str]:
    """Writes arrays as one safetensors file, synced; returns its size in bytes and SHA-256.

    Ours instead of the library's writer, because that holds all bytes a second time in memory and they must be digested anyway.
    Format: 8 bytes length of the header, JSON header (dtype, shape, offsets), then the data, little-endian and without gaps.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that every tensor is aligned
    header, offset = {}, 0
    for name in order:
        value = arrays[name]
        if value.dtype.name not in _DTYPES or value.dtype.byteorder == ">":
            raise CheckpointError(f"'{name}' has dtype {value.dtype}, which checkpoints cannot hold; expected one of {', '.join(_DTYPES)}.")
        header[name] = {"dtype": _DTYPES[value.dtype.name], "shape": value.shape, "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        prefix = np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
        for data in (prefix, *(arrays[name].reshape(-1).view(np.uint8) for name in order)):
            view = data.data
            while view:  # a write to a full disk may be partial
                written = file.write(view[:BLOCK_BYTES])
                digest.update(view[:written])
                view = view[written:]
        os.fsync(file.fileno())
    return 8 + len(text) + offset, digest.hexdigest()
