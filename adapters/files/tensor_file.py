"""The safetensors files of inventories and routers: read strictly, and written atomically.

Files come from anywhere, so nothing is believed before it is checked: first the size of the file
and of its header, then the header, then each tensor's name, shape, dtype and values. Every error is
a FileError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from polyrex.adapters.errors import MalformedFile, TensorMismatch

FORMAT_VERSION = 1
_LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little endian

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that a file of ours may hold, as safetensors spells them."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """A complete file whose header has been read; its tensors are not checked yet."""

    source: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, Shape]]  # dtype as safetensors spells it, shape
    values: Mapping[str, Tensor]

    def text(self, key: str) -> str:
        """One entry of the metadata; raises MalformedFile where it is missing."""
        if key not in self.metadata:
            raise MalformedFile(f"{self.source}: the metadata has no {key!r}")
        return self.metadata[key]

    def json(self, key: str) -> Any:
        """One entry of the metadata that holds JSON."""
        text = self.text(key)
        try:
            return strict_json(text)
        except ValueError as error:
            raise MalformedFile(f"{self.source}: {key!r} is not readable JSON: {error}") from error

    def json_object(self, key: str) -> dict[str, Any]:
        """One entry of the metadata that holds a JSON object."""
        value = self.json(key)
        if not isinstance(value, dict):
            raise MalformedFile(f"{self.source}: {key!r} must be a JSON object, got {value!r:.80}")
        return value

    def only(self, names: Iterable[str]) -> TensorFile:
        """The same file with these tensors alone."""
        kept = set(names)
        tensors = {name: found for name, found in self.tensors.items() if name in kept}
        values = {name: value for name, value in self.values.items() if name in kept}
        return TensorFile(self.source, self.metadata, tensors, values)

    def checked(self, expected: Mapping[str, Shape], dtypes: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors, which must be exactly those expected, as finite float32.

        Raises TensorMismatch naming the first tensor that is missing, not expected, or of another
        shape or dtype, or that holds a value that is not finite.
        """
        for name in expected.keys() - self.tensors.keys():
            raise TensorMismatch(f"{self.source}: tensor {name} is missing")
        for name, (dtype, shape) in self.tensors.items():
            if name not in expected:
                raise TensorMismatch(f"{self.source}: tensor {name:.200} is not expected")
            if shape != expected[name]:
                raise TensorMismatch(
                    f"{self.source}: tensor {name} must have shape {list(expected[name])}, "
                    f"got {list(shape)}"
                )
            if dtype not in dtypes:
                raise TensorMismatch(
                    f"{self.source}: tensor {name} must be of dtype {' or '.join(dtypes)}, "
                    f"got {dtype}"
                )
        return {
            name: cast_finite(tensor, torch.float32, f"{self.source}: tensor {name}")
            for name, tensor in self.values.items()
        }


def strict_json(text: str) -> Any:
    """JSON that can be written out again as it came: no NaN or infinity, no repeated key, no
    lone surrogate, no bottomless nesting. Raises ValueError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is repeated")
    return values


def cast_finite(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`tensor` in `dtype`; raises TensorMismatch where a value is not finite, before or after."""
    cast = tensor.to(dtype)
    if not _finite(cast):
        if _finite(tensor):
            raise TensorMismatch(f"{what} overflows in {str(dtype).removeprefix('torch.')}")
        raise TensorMismatch(f"{what} holds values that are not finite")
    return cast


def _finite(tensor: Tensor) -> bool:
    # 0 times NaN or infinity is NaN. A registration waits for this, and isfinite takes several
    # times as long.
    return (tensor * 0).sum().item() == 0


def parse(data: bytes, source: str, file_format: str, header_limit: int) -> TensorFile:
    """Read the header of safetensors bytes; `source` names them in errors.

    `header_limit`: the most bytes that the header may have. Raises MalformedFile where the bytes
    are no complete safetensors file, of another format, or of a newer version of this one.
    """
    header, values = _decode(data, source, header_limit)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != file_format:
        raise MalformedFile(
            f"{source}: expected a {file_format} file, its metadata say "
            f"format {metadata.get('format')!r:.80}"
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        newer = version.isdecimal() and version.isascii() and int(version[:9]) > FORMAT_VERSION
        hint = "; a newer polyrex wrote it" if newer else ""
        raise MalformedFile(
            f"{source}: expected format_version {FORMAT_VERSION}, got {version!r:.80}{hint}"
        )
    tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    return TensorFile(source, metadata, tensors, values)


def _decode(data: bytes, source: str, limit: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > len(data) - _LENGTH_BYTES:
        raise MalformedFile(f"{source}: no complete safetensors file ({len(data)} bytes)")
    if length > limit:
        raise MalformedFile(f"{source}: the header has {length} bytes, at most {limit} are allowed")
    try:
        # The library checks types, shapes, and that the tensors fill the file without gap or
        # overlap; it does not hand out the metadata of bytes, so those are read once more here.
        values = load(data)
        header: dict[str, Any] = strict_json(data[_LENGTH_BYTES:][:length].decode())
    except (SafetensorError, ValueError, KeyError) as error:
        raise MalformedFile(f"{source}: no complete safetensors file: {error}") from error
    return header, values


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Safetensors bytes; the same input gives the same bytes.

    The library writes the metadata in a random order, which would give one router many hashes.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES:][:length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + data[_LENGTH_BYTES + length :]


def sha256(data: bytes) -> str:
    """The file's id: sha256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


PARTIAL_SUFFIX = ".partial"
"""Suffix of a file that is being written; a leftover means that a process crashed."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one, the new one, or none."""
    staged = stage(path, data)
    try:
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def stage(path: Path, data: bytes) -> Path:
    """Write `data` durably next to `path`, under a temporary name that is ready to be renamed."""
    handle, name = tempfile.mkstemp(PARTIAL_SUFFIX, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
