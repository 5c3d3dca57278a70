"""Every error that polyrex raises on purpose.

PolyrexError
├── SpecError            hyperparameters that do not make an adapter
│   └── UnknownMethod    no method has that name
├── DeviceError          a device that this machine does not have, or that cannot hold the model
├── FileError            a file that cannot be used
│   ├── MalformedFile    truncated, not safetensors, foreign or newer format, missing metadata
│   ├── TensorMismatch   a tensor's name, shape, dtype or values
│   ├── BaseModelMismatch    an inventory for another base model
│   └── InventoryMismatch    a router for another inventory
├── TaskError            the registry refuses an operation
│   ├── UnknownTask
│   ├── TaskExists
│   └── InvalidTaskName
└── DataError            rows or a manifest that cannot be read
The server adds its own below this root (server/errors.py), and server/http/error_handlers.py turns
all of them into HTTP.
"""

from __future__ import annotations


class PolyrexError(Exception):
    """Root of the tree: catch this to catch everything polyrex raises on purpose."""


class SpecError(PolyrexError):
    """Hyperparameters that do not make an adapter."""


class UnknownMethod(SpecError):
    """No adapter method has that name."""


class DeviceError(PolyrexError):
    """A device that this machine does not have, or that cannot hold or run the model."""


class FileError(PolyrexError):
    """A file that cannot be used; the message names it."""


class MalformedFile(FileError):
    """Truncated, not safetensors, of a foreign or newer format, or without its metadata."""


class TensorMismatch(FileError):
    """A tensor is missing, unexpected, or has the wrong shape, dtype or values."""


class BaseModelMismatch(FileError):
    """The inventory was made for another base model."""


class InventoryMismatch(FileError):
    """The router was made for another inventory."""


class TaskError(PolyrexError):
    """The task registry refuses an operation."""


class UnknownTask(TaskError):
    """No task has that name, or it is none of the asker's.

    The message is always the same, so that nobody learns which names others use.
    """

    def __init__(self) -> None:
        super().__init__("no such task, or not for this key")


class TaskExists(TaskError):
    """The name is taken by a different router."""


class InvalidTaskName(TaskError):
    """The name does not match the allowed pattern."""


class DataError(PolyrexError):
    """Rows or a manifest that cannot be read."""
