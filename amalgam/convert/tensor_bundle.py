"""Reads TensorFlow checkpoints (the tensor-bundle format, little-endian, one shard).

TensorFlow itself is not used: it is a 600 MB install for reading 20 KB. The format is small. A
bundle ``prefix`` is two files:

``prefix.index``
    A LevelDB table (https://github.com/google/leveldb/blob/main/doc/table_format.md): blocks of
    sorted entries whose keys share prefixes, each block followed by a byte for its compression and
    a masked CRC-32C; an index block of (offset, size) handles; a footer with the index block's
    handle and a magic number. Key ``""`` holds a ``BundleHeaderProto``, every other key is a
    tensor's name and holds a ``BundleEntryProto`` (TensorFlow's ``tensor_bundle.proto``).
``prefix.data-00000-of-00001``
    The tensors' bytes, row-major, where the entries say.

Files come from strangers, so every length is checked before it is used, and whatever does not fit
is a ``ValueError``.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FOOTER = 48
_MAGIC = 0xDB4775248B80FB57
_TRAILER = 5
_COMPRESSIONS = {1: "snappy", 2: "zstd"}
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 9: np.dtype("<i8")}
_DTYPE_NAMES = {3: "int32", 7: "string", 10: "bool", 14: "bfloat16", 19: "float16"}
_READABLE_VERSION = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of these bytes as LevelDB and TensorFlow store it.

    Args:
        data: Any bytes, small ones: a megabyte takes some 0.2 s.

    Returns:
        CRC-32C (Castagnoli), rotated right by 15 bits plus a constant, so that a checksum over
        bytes that hold checksums is not degenerate.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, as the index says.

    Attributes:
        dtype: TensorFlow's number of its dtype.
        shape: Its shape.
        offset: Its first byte in the data file.
        size: Its bytes.
        checksum: Their masked CRC-32C.
        sliced: Whether it is stored as slices under other keys.
    """

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int
    sliced: bool


class TensorBundle:
    """A TensorFlow checkpoint, opened for reading.

    Args:
        prefix: The checkpoint's path without ``.index``.

    Raises:
        FileNotFoundError: The index or the data file is missing.
        ValueError: The index is damaged, or is of a kind that is not supported: compressed blocks,
            several shards, big-endian, a newer version.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Read and check the index."""
        self._index = Path(f"{os.fspath(prefix)}.index")
        self._data = Path(f"{os.fspath(prefix)}.data-00000-of-00001")
        self._entries: dict[str, TensorEntry] = {}
        table = _read_table(self._index.read_bytes(), str(self._index))
        header = table.pop(b"", None)
        if header is None:
            raise ValueError(f"{str(self._index)!r} has no header entry; it is no checkpoint index")
        _check_header(header, str(self._index))
        for name, value in table.items():
            where = f"entry {name!r} of {str(self._index)!r}"
            try:
                self._entries[name.decode()] = _parse_entry(value, where)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not named in UTF-8") from error
        if not self._data.is_file():
            raise FileNotFoundError(f"{str(self._index)!r} lacks its data file {str(self._data)!r}")

    def names(self) -> tuple[str, ...]:
        """The names of all its tensors, sorted, readable or not."""
        return tuple(self._entries)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One tensor.

        Args:
            name: Its full name, from :meth:`names`.

        Returns:
            A new float32, float64 or int64 array.

        Raises:
            KeyError: There is no such tensor.
            ValueError: It is of another dtype or sliced, its place is outside the data file, or
                its bytes do not fit its shape or its checksum.
        """
        entry = self._entries[name]
        what = f"tensor {name!r} of {str(self._data)!r}"
        if entry.sliced:
            raise ValueError(f"{what} is stored in slices; only whole tensors are supported")
        if entry.dtype not in _DTYPES:
            found = _DTYPE_NAMES.get(entry.dtype, f"dtype number {entry.dtype}")
            raise ValueError(f"{what} must be float32, float64 or int64, not {found}")
        dtype = _DTYPES[entry.dtype]
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise ValueError(
                f"{what} is said to have shape {entry.shape} and {entry.size} bytes of {dtype}, "
                f"which do not agree"
            )
        with self._data.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            if entry.offset + entry.size > end:
                raise ValueError(
                    f"{what} should end at byte {entry.offset + entry.size}, but the file has "
                    f"{end}; was it cut short?"
                )
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size or masked_crc32c(data) != entry.checksum:
            raise ValueError(f"{what} does not match its checksum; the file is damaged")
        return np.frombuffer(data, dtype).reshape(entry.shape).copy()


def _read_table(table: bytes, path: str) -> dict[bytes, bytes]:
    """Every (key, value) of a LevelDB table, in order."""
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError(f"{path!r} does not end as a TensorFlow index does; was it cut short?")
    body, footer = table[:-_FOOTER], table[-_FOOTER:-8]
    _, _, position = _handle(footer, 0, path)
    offset, size, _ = _handle(footer, position, path)
    pairs: dict[bytes, bytes] = {}
    last: bytes | None = None
    for _, value in _entries(_block(body, offset, size, path), path):
        offset, size, _ = _handle(value, 0, path)
        for key, found in _entries(_block(body, offset, size, path), path):
            if last is not None and key <= last:
                raise ValueError(f"{path!r} is damaged: its keys are not in order")
            pairs[key] = found
            last = key
    return pairs


def _block(body: bytes, offset: int, size: int, path: str) -> bytes:
    """The contents of one block, its trailer checked."""
    end = offset + size
    if end + _TRAILER > len(body):
        raise ValueError(f"{path!r} is damaged: a block of {size} bytes at {offset} passes its end")
    compression, checksum = struct.unpack("<BI", body[end : end + _TRAILER])
    if masked_crc32c(body[offset : end + 1]) != checksum:
        raise ValueError(f"{path!r} is damaged: the block at {offset} does not match its checksum")
    if compression:
        name = _COMPRESSIONS.get(compression, f"number {compression}")
        raise ValueError(
            f"{path!r} has compressed blocks (compression {name}), which are not supported; "
            f"write the checkpoint with tf.train.Checkpoint, which does not compress"
        )
    return body[offset:end]


def _entries(block: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a block: entries, the restarts' offsets, their number."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if len(block) < 4 or end < 0:
        raise ValueError(f"{path!r} is damaged: a block has no room for its restarts")
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position, path)
        fresh, position = _varint(block, position, path)
        length, position = _varint(block, position, path)
        if shared > len(key) or position + fresh + length > end:
            raise ValueError(f"{path!r} is damaged: an entry passes the end of its block")
        key = key[:shared] + block[position : position + fresh]
        position += fresh + length
        yield key, block[position - length : position]


def _handle(data: bytes, position: int, path: str) -> tuple[int, int, int]:
    """Offset and size of a block, and where the handle ends."""
    offset, position = _varint(data, position, path)
    size, position = _varint(data, position, path)
    return offset, size, position


def _varint(data: bytes, position: int, where: str) -> tuple[int, int]:
    """An unsigned number in base 128, and where it ends."""
    value = 0
    for index, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >> 64:
                break
            return value, position + index + 1
    raise ValueError(f"{where} is damaged: a number is cut short or too long")


def _signed(value: int) -> int:
    """Protobuf's int64 of a varint's bits."""
    return value - (1 << 64) if value >> 63 else value


def _fields(message: bytes, where: str) -> Iterator[tuple[int, int, int | bytes]]:
    """Field number, wire type and value of everything in a protobuf message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position, where)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position, where)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(message, position, where)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"{where} is damaged: there is no protobuf wire type {wire}")
        if position + length > len(message):
            raise ValueError(f"{where} is damaged: field {number} passes its end")
        part = message[position : position + length]
        position += length
        yield number, wire, part if wire == _BYTES else int.from_bytes(part, "little")


def _number(value: int | bytes, wire: int, expected: int, where: str) -> int:
    if wire != expected or isinstance(value, bytes):
        raise ValueError(f"{where} is damaged: a field has wire type {wire}, not {expected}")
    return value


def _message(value: int | bytes, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"{where} is damaged: a message is missing")
    return value


def _check_header(header: bytes, path: str) -> None:
    """Refuse bundles that this reader would misread."""
    where = f"the header of {path!r}"
    shards = endianness = oldest_reader = 0
    for number, wire, value in _fields(header, where):
        if number == 1:
            shards = _number(value, wire, _VARINT, where)
        elif number == 2:
            endianness = _number(value, wire, _VARINT, where)
        elif number == 3:
            for part, part_wire, part_value in _fields(_message(value, where), where):
                if part == 2:
                    oldest_reader = _signed(_number(part_value, part_wire, _VARINT, where))
    if shards != 1:
        raise ValueError(f"{path!r} belongs to {shards} data files; only one is supported")
    if endianness != 0:
        raise ValueError(f"{path!r} is big-endian; only little-endian checkpoints are supported")
    if oldest_reader > _READABLE_VERSION:
        raise ValueError(
            f"{path!r} asks for a reader of version {oldest_reader}; this one is of version "
            f"{_READABLE_VERSION}"
        )


def _parse_entry(message: bytes, where: str) -> TensorEntry:
    """A ``BundleEntryProto``; fields that are zero are absent from it."""
    dtype = shard = offset = size = checksum = 0
    shape: tuple[int, ...] = ()
    sliced = False
    for number, wire, value in _fields(message, where):
        if number == 1:
            dtype = _number(value, wire, _VARINT, where)
        elif number == 2:
            shape = _parse_shape(_message(value, where), where)
        elif number == 3:
            shard = _signed(_number(value, wire, _VARINT, where))
        elif number == 4:
            offset = _signed(_number(value, wire, _VARINT, where))
        elif number == 5:
            size = _signed(_number(value, wire, _VARINT, where))
        elif number == 6:
            checksum = _number(value, wire, _FIXED32, where)
        elif number == 7:
            sliced = True
    if shard != 0:
        raise ValueError(f"{where} lies in data file {shard}; there is only number 0")
    if offset < 0 or size < 0:
        raise ValueError(f"{where} is damaged: {size} bytes at {offset}")
    return TensorEntry(dtype, shape, offset, size, checksum, sliced)


def _parse_shape(message: bytes, where: str) -> tuple[int, ...]:
    """A ``TensorShapeProto`` whose dimensions are all known."""
    shape = []
    for number, wire, value in _fields(message, where):
        if number == 2:
            size = 0
            for part, part_wire, part_value in _fields(_message(value, where), where):
                if part == 1:
                    size = _signed(_number(part_value, part_wire, _VARINT, where))
            if size < 0:
                raise ValueError(f"{where} has a dimension of unknown size")
            shape.append(size)
        elif number == 3 and _number(value, wire, _VARINT, where):
            raise ValueError(f"{where} has a shape of unknown rank")
    return tuple(shape)
