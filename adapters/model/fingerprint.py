"""The fingerprint of a base model's weights, from a sample of its safetensors files.

The configuration does not tell two fine-tunes of one model apart; their weights do. A few blocks
are read of every tensor, so that a fine-tune of a few layers differs as well, and a model of 8
billion parameters takes a fraction of a second. The fingerprint is the same for copies that

- are cut into other files, or have their tensors in another order,
- name their tensors with another prefix (`model.layers.0...` or `layers.0...`),
- hold a tied output layer once or twice,
- are stored in float32, bfloat16 or float16, where their values are equal once they are rounded to
  bfloat16. A float32 checkpoint and the bfloat16 copy that was rounded from it are therefore the
  same; a float16 copy of a float32 checkpoint is not, because some values are rounded twice.

What it does not see: a difference that lies between the blocks, as in the embeddings of a few
tokens, and one below the precision of bfloat16.

A model that is quantised as it is loaded has the fingerprint of its files. One that was saved
quantised has other files, whose fingerprint compares only with those that the same library made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from polyrex.adapters.errors import MalformedFile

FINGERPRINT = re.compile(r"[a-z0-9_-]{1,40}-\d{1,4}:[0-9a-f]{32}")
"""What a fingerprint looks like: `KIND-VERSION:DIGEST`."""

_VERSION = 1  # of how fingerprints are made
_BLOCKS, _BLOCK = 4, 512  # blocks of a tensor, values of a block
_TINY = 2.0**-16  # smaller values need not be exact in float16
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMBERED = re.compile(r"(?:^|\.)(\d+\..*)")  # from the number of a layer on
_BUFFER = ".inv_freq"  # follows from the configuration; only old checkpoints hold it
_LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little endian


def fingerprint(model: str) -> str | None:
    """`KIND-VERSION:DIGEST` for a model's folder, or for a hub id whose files are on this machine.

    None where there are no safetensors files. Two fingerprints of other kinds or versions say
    nothing about each other. Raises MalformedFile where a file is missing or damaged.
    """
    files = _files(model)
    if not files:
        return None
    digests = {digest for path in files for digest in _digests(path)}  # tied weights count once
    digest = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return f"{_kind(model)}-{_VERSION}:{digest[:32]}"


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of one kind and version, so that they must be equal."""
    return one.partition(":")[0] == other.partition(":")[0]


def _file(model: str, name: str) -> Path | None:
    """A file of a model, or None where it is not on this machine."""
    try:
        found = cached_file(model, name, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found)


def _files(model: str) -> list[Path]:
    """The safetensors files that transformers loads."""
    whole = _file(model, "model.safetensors")
    if whole is not None:
        return [whole]
    index = _file(model, "model.safetensors.index.json")
    if index is None:
        return []
    found = []
    for name in sorted(set(_json(index.read_bytes(), index).get("weight_map", {}).values())):
        path = _file(model, name)
        if path is None:
            raise MalformedFile(f"{index}: it names {name}, which is not there")
        found.append(path)
    return found


def _kind(model: str) -> str:
    """`float`, or the library that the files were quantised with."""
    config = _file(model, "config.json")
    if config is None:
        return "float"
    quantised = _json(config.read_bytes(), config).get("quantization_config") or {}
    return re.sub(r"[^a-z0-9_-]", "_", str(quantised.get("quant_method", "float")).lower())[:40]


def _json(data: bytes, source: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise MalformedFile(f"{source}: is no readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise MalformedFile(f"{source}: must hold a JSON object")
    return found


def _digests(path: Path) -> Iterator[bytes]:
    """A digest of every tensor in a file: of its place, its shape, and its sample."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        data = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if data > size:
            raise MalformedFile(f"{path}: no complete safetensors file ({size} bytes)")
        header = _json(file.read(data - _LENGTH_BYTES), path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if data + entry["data_offsets"][1] > size:
                raise MalformedFile(f"{path}: no complete safetensors file ({size} bytes)")
            if not name.endswith(_BUFFER):
                place = _place(name)
                sample = _sample(file.fileno(), data, place, entry)
                yield hashlib.sha256(f"{place} {entry['shape']} ".encode() + sample).digest()


def _place(name: str) -> str:
    """A tensor's name without its prefix; nothing for one that is in no layer.

    So the output layer is called what the embeddings are called, which it may be tied to.
    """
    numbered = _NUMBERED.search(name)
    return numbered[1] if numbered else ""


def _sample(file: int, data: int, place: str, entry: Mapping[str, Any]) -> bytes:
    """The blocks of a tensor: floating point in bfloat16, anything else byte for byte.

    `data` is where the tensors begin in the file.
    """
    begin, end = entry["data_offsets"]
    dtype = _FLOATS.get(entry["dtype"])
    size = 1 if dtype is None else dtype.itemsize
    blocks = _blocks(place, (end - begin) // size)
    read = b"".join(os.pread(file, size * n, data + begin + size * at) for at, n in blocks)
    return read if dtype is None else _rounded(read, dtype)


def _blocks(place: str, values: int) -> Iterator[tuple[int, int]]:
    """Begin and length of the blocks of so many values: one in each part, at a hash of the place,
    so that layers are sampled differently."""
    if values <= _BLOCKS * _BLOCK:
        yield 0, values
        return
    part = values // _BLOCKS
    jumps = hashlib.sha256(place.encode()).digest()
    for index in range(_BLOCKS):
        jump = int.from_bytes(jumps[8 * index : 8 * index + 8], "little")
        yield index * part + jump % (part - _BLOCK + 1), _BLOCK


def _rounded(data: bytes, dtype: torch.dtype) -> bytes:
    if not data:
        return data
    values = torch.frombuffer(bytearray(data), dtype=dtype).bfloat16()
    values[values.abs() < _TINY] = 0
    return values.view(torch.uint8).numpy().tobytes()
