"""Variables of a MATLAB file (level 5), for the partitions that come with GRID.

A file is 128 bytes of header and a row of elements: type, number of bytes, content, filled up to 8 bytes. An array is
an element (type 14) of elements: its class, its dimensions, its name, its values; type 15 is a compressed one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apd.errors import InputError
from apd.files import reading

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ARRAY, _COMPRESSED = 14, 15
_CELL, _STRUCT = 1, 2
_NUMERIC = range(6, 16)  # double to uint64
_NAME_WITHIN = 4096  # decompressed bytes in which an array's name is found
_LARGEST = 1 << 26  # decompressed bytes of an array; that of GRID has some thousand


def read_variable(path: Path, name: str) -> Any:
    """One variable of a .mat file; the others are skipped.

    Args:
        path: a file as MATLAB writes it with ``-v5`` to ``-v7``.
        name: of the variable.

    Returns:
        numbers as an array of their shape; a cell array as a list, in MATLAB's order (by columns); a struct as a list
        of one dict an element.

    Raises:
        InputError: the file is missing, damaged, of MATLAB 7.3 (which is HDF5), or has no such variable.
    """
    with reading(path):
        content = path.read_bytes()
    if content[:10] == b"MATLAB 7.3" or content[1:4] == b"HDF":
        raise InputError(f"{path}: a file of MATLAB 7.3 (HDF5), which is not read; save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise InputError(f"{path}: not a MATLAB file of level 5")
    with reading(path, f"{name}: cut off or damaged, or no plain numbers, cells and structs"):
        for kind, data in _elements(memoryview(content)[128:], order):
            if kind == _COMPRESSED:
                if _name(zlib.decompressobj().decompress(data, _NAME_WITHIN)[8:], order) != name:
                    continue
                ((_, data),) = _elements(memoryview(zlib.decompressobj().decompress(data, _LARGEST)), order)
            elif kind != _ARRAY or _name(data, order) != name:
                continue
            return _array(memoryview(data), order)
    raise InputError(f"{path}: no variable {name!r}")


def _elements(data: memoryview | bytes, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element. Up to four bytes of content may stand within the tag."""
    data = memoryview(data)
    while len(data) >= 8:
        kind, size = struct.unpack_from(order + "II", data)
        if kind >> 16:
            kind, size, start, step = kind & 0xFFFF, kind >> 16, 4, 8
        else:
            start, step = 8, 8 + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError("an element ends behind the end of the file")
        yield kind, data[start : start + size]
        data = data[step:]


def _name(data: memoryview | bytes, order: str) -> str:
    """The name of an array, of which only the beginning needs to be there."""
    head = _elements(data, order)
    next(head)  # its class
    next(head)  # its dimensions
    return bytes(next(head)[1]).decode("ascii")


def _array(data: memoryview, order: str) -> Any:
    parts = list(_elements(data, order))
    if not parts:  # an empty array within a cell or struct
        return np.empty((0, 0))
    (_, flags), (_, dimensions), _, *values = parts
    kind = struct.unpack_from(order + "I", flags)[0] & 0xFF
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    if kind in _NUMERIC:
        numbers = np.frombuffer(values[0][1], np.dtype(order + _NUMBERS[values[0][0]]))
        return numbers.reshape(shape, order="F")
    if kind == _CELL:
        return [_array(content, order) for _, content in values]
    if kind != _STRUCT:
        raise ValueError(f"class {kind}")
    (_, width), (_, names), *fields = values
    length = struct.unpack_from(order + "i", width)[0]
    keys = [bytes(names[i : i + length]).partition(b"\0")[0].decode("ascii") for i in range(0, len(names), length)]
    contents = [_array(content, order) for _, content in fields]
    return [dict(zip(keys, contents[i : i + len(keys)], strict=True)) for i in range(0, len(contents), len(keys))]
