"""Named arrays as one message of bytes, between the job and its labelling processes.

A message is a JSON header (names, types, shapes, and one free ``note``) and the raw arrays after
it; nothing in it can run code. Streams carry messages with their length before them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from orbq.preprocess.flat import ragged_rows
from orbq.schema import Structure

_LENGTH = struct.Struct("<Q")
POSITION = struct.Struct("<q")  # which structure of a chunk is under way, kept in shared memory
IDLE = -1


class Message(NamedTuple):
    """arrays: named NumPy arrays. note: whatever JSON can hold."""

    arrays: dict[str, np.ndarray]
    note: Any = None


def pack(message: Message) -> bytes:
    """The message as bytes."""
    arrays = {name: np.ascontiguousarray(a) for name, a in message.arrays.items()}
    layout = [(name, a.dtype.str, a.shape) for name, a in arrays.items()]
    header = json.dumps([layout, message.note]).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays.values())])


def unpack(data: bytes) -> Message:
    """The message that ``pack`` made these bytes from; its arrays are read-only views."""
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    layout, note = json.loads(data[_LENGTH.size : start])
    arrays = {}
    for name, dtype, shape in layout:
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        start += arrays[name].nbytes
    return Message(arrays, note)


def send(stream: BinaryIO, data: bytes) -> None:
    """Write one message to a stream."""
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """Read one message from a stream; None when the other side is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    data = stream.read(size)
    return data if len(data) == size else None


PER_ATOM = ("numbers", "positions")
PER_STRUCTURE = ("total_charge", "spin_multiplicity", "cell", "pbc")


def structures(arrays: dict[str, np.ndarray]) -> list[Structure]:
    """The structures of a request: flat arrays with ``offsets``, as in a data set."""
    offsets = arrays["offsets"].tolist()
    pieces = []
    for i in range(len(offsets) - 1):
        rows = slice(offsets[i], offsets[i + 1])
        pieces.append(
            Structure(
                numbers=arrays["numbers"][rows],
                positions=arrays["positions"][rows],
                cell=arrays["cell"][i],
                pbc=arrays["pbc"][i],
                total_charge=int(arrays["total_charge"][i]),
                spin_multiplicity=int(arrays["spin_multiplicity"][i]),
            )
        )
    return pieces


def select(arrays: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The request for the structures ``chosen`` of a data set's arrays or of another request."""
    starts = arrays["offsets"][chosen]
    counts = arrays["offsets"][chosen + 1] - starts
    rows = ragged_rows(starts, counts)
    picked = {name: arrays[name][rows] for name in PER_ATOM}
    picked |= {name: arrays[name][chosen] for name in PER_STRUCTURE}
    return {"offsets": np.concatenate([[0], np.cumsum(counts)]), **picked}
