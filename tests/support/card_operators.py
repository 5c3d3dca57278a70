"""Tensors that say they lie on a card, and what happens to each operator that meets one.

`Calls` and `Operators` are the two modes that support/placement.py enters: the first sees calls of
Python, in which `cuda` is still a word; the second sees the operators that they come to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
"""What tensors on the card say that their device is."""

_META = torch.device("meta")  # what torch's C++ believes it is
_CPU = torch.device("cpu")
_ROOT = f"{Path(__file__).parents[2]}/"
_HERE = f"{Path(__file__).parent}/"
aten = torch.ops.aten


class PlacementError(BaseException):
    """Something that would fail, or be slow, on a card. No Exception: engines answer these."""


class Misplaced(PlacementError):
    """An operator's tensors lie on different devices."""


class Notes(Protocol):
    """What wants to know of the operators that meet the card."""

    def launched(self, operator: str, given: Sequence[object], made: Sequence[CardTensor]) -> None:
        """An operator ran on the card, or a kernel was launched."""

    def synced(self, operator: str) -> None:
        """The host waited for the card."""

    def copied(self, operator: str, source: Tensor) -> None:
        """A tensor of the host was copied to the card."""

    def pin(self, tensor: Tensor) -> Tensor:
        """The tensor's memory is pinned; returns the tensor."""

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is pinned."""


class CardTensor(Tensor):
    """A tensor on the card. `numbers` lies on the CPU and holds its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls: type[CardTensor], numbers: Tensor) -> CardTensor:
        made: CardTensor = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=_META,
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} on a card's tensor, outside of the card's context")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, CardTensor), "another type of device: modules make a new parameter"
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.numbers = value.numbers

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CardTensor({self.numbers!r})"


def caller() -> str:
    """The line of the repository that called torch, and that of a library between both."""
    library = ""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        # An editable installation has links to the files in a folder `polyrex`.
        line = f"{name.removeprefix(_ROOT).rpartition('/polyrex/')[2]}:{frame.f_lineno}"
        if not name.startswith(_HERE) and "/torch/" not in name:
            if name.startswith(_ROOT) and "/site-packages/" not in name:
                return line + (library and f" (by {library})")
            library = library or line.partition("/site-packages/")[2]
        frame = frame.f_back
    return library


class Calls(TorchFunctionMode):
    """Turns `cuda` into a device that torch has, before a build without CUDA refuses it."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else dict(kwargs)
        if func is Tensor.cuda:
            return args[0].to(_META)
        if func is Tensor.pin_memory:
            return self._notes.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self._notes.is_pinned(args[0])
        if func is Tensor.tolist and isinstance(args[0], CardTensor):
            return args[0].cpu().tolist()
        if func == _SET_DATA and isinstance(args[1], CardTensor):
            # Of a tensor on the CPU: a card's own setter is CardTensor.data.
            moved = nn.Parameter(args[1], requires_grad=args[0].requires_grad)
            return torch.utils.swap_tensors(args[0], moved)  # type: ignore[no-untyped-call]
        pinned = kwargs.pop("pin_memory", False)
        if func is Tensor.to:
            args = tuple(_real(a) if isinstance(a, torch.device | str) else a for a in args)
        else:
            args = tuple(_real(a) if isinstance(a, torch.device) else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = _real(kwargs["device"])
        if func in _FROM_NUMBERS:
            # For `meta`, torch would forget the numbers.
            here = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else None)
            made: Tensor = func(*args, **kwargs, device="cpu")
            return made if here is None else made.to(_real(here))
        out = func(*args, **kwargs)
        return self._notes.pin(out) if pinned else out


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


def _real(device: Any) -> Any:
    return _META if torch.device(device).type == "cuda" else device


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks every operator that meets the card, and runs it on the CPU's numbers."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._notes = notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = [*_flat(args), *_flat(kwargs.values())]
        on_card = {id(t.numbers): t for t in flat if isinstance(t, CardTensor)}
        asked: torch.device | None = kwargs.get("device")
        if not on_card and asked != _META:
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # inference mode alone leaves composite operators whole
                return func.decompose(*args, **kwargs)
        self._check(func, args, kwargs, flat)
        plain = {name: _plain(value) for name, value in kwargs.items()}
        if asked is not None:
            plain["device"] = _CPU
        out = func(*map(_plain, args), **plain)
        into_host = func is aten.copy_.default and not isinstance(args[0], CardTensor)
        if into_host or asked == _CPU:
            return out
        out = _wrapped(out, on_card)
        made = [t for t in _flat((out,)) if isinstance(t, CardTensor)]
        known = {memory(t) for t in on_card.values()}
        if func._schema.is_mutable or any(memory(t) not in known for t in made):
            self._notes.launched(func.name(), flat, made)  # a mere view launches nothing
        return out

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any]) -> None:
        """Refuse operators that a card refuses, and note those for which the host waits."""
        name = func.name()
        if func in _COPIES:
            self._copy(name, args, kwargs)
            return
        here = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, CardTensor)]
        scalars = torch.Tag.pointwise in func.tags or func in _TAKE_SCALARS
        if any(t.dim() or not scalars for t in here):
            shapes = ", ".join(str(tuple(t.shape)) for t in here)
            raise Misplaced(f"{name} at {caller()}: {shapes} on the CPU, others on the card")
        if any(isinstance(value, torch.Generator) for value in flat):
            raise Misplaced(f"{name} at {caller()}: a generator of the CPU draws on the card")
        if _waits(func, args, kwargs):
            self._notes.synced(name)

    def _copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Note a copy between the host and the card."""
        if name == "aten::copy_":
            into, source = args[:2]
            to_card = isinstance(into, CardTensor)
            later = (*args, kwargs.get("non_blocking"))[2] and self._notes.is_pinned(into)
        else:
            (source,) = args
            to_card, later = kwargs.get("device") != _CPU, kwargs.get("non_blocking")
        from_card = isinstance(source, CardTensor)
        if from_card and not to_card and not later:
            self._notes.synced(name)
        if to_card and not from_card:
            self._notes.copied(name, source)


_BY_INDICES = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
_COPIES = (aten.copy_.default, aten._to_copy.default)
_TAKE_SCALARS = (  # of the CPU, beside the operators that are tagged as pointwise
    aten.fill_.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the card, to read a number or to learn a size."""
    if func in _BY_INDICES:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One number goes to all places of a mask by `masked_fill`.
        return bool(masks) and (len(args) == 2 or args[2].numel() > 1)
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    return func is aten._linalg_check_errors.default or any(tag in func.tags for tag in tags)


def memory(tensor: CardTensor) -> int:
    """The address of the memory that a tensor is a part of."""
    return tensor.numbers.untyped_storage().data_ptr()


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others, for every device."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and the members of those that are lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _plain(value: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return value.numbers if isinstance(value, CardTensor) else value


def _wrapped(out: Any, known: dict[int, CardTensor]) -> Any:
    """A result on the card: each tensor is one of the arguments, or a new one."""
    if isinstance(out, list | tuple):
        return type(out)(_wrapped(member, known) for member in out)
    if not isinstance(out, Tensor):
        return out
    if id(out) in known:
        return known[id(out)]
    with torch.inference_mode(out.is_inference()):  # a view of a normal tensor is normal
        return CardTensor(out)
