"""Compresses many LoRAs to shared bases: a static T-REX inventory, and a small core for each task.

In every module, the tasks' matrices `M_t = A_t^T B_t` [d_in, d_out] are approximated by
`A^T G_t B^T`, with orthonormal bases A [I, d_in] and B [d_out, I] that all tasks share. This is the
Tucker decomposition of the stacked matrices in two of their three modes, computed by alternating
least squares (higher-order orthogonal iteration). `delta = B G_t^T A x` is T-REX's static form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from polyrex.adapters.errors import DataError
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import AdaptedModel, attach
from polyrex.adapters.peft.lora_checkpoint import PeftLora
from polyrex.adapters.spec import AdapterSpec, TargetModule

ROUNDS = 4
"""Rounds of alternation; few are enough, as the initial bases are nearly optimal already."""


@dataclass(frozen=True)
class Compressed:
    """A model with the bases attached, and every task's cores as the logits of a router."""

    adapted: AdaptedModel
    logits: Mapping[str, Tensor]  # by task, [M, I * I]
    errors: Mapping[str, float]  # by task, ||M - M'|| / ||M|| over all modules


def compress(
    loras: Sequence[PeftLora],
    model: nn.Module,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> Compressed:
    """Compress LoRAs of any ranks to bases of `rank`, or of the least rank that keeps every task's
    relative error below `error`. The rank is at most the width of the narrowest module.

    `model` is the base model of the LoRAs; the bases are attached to it, and found on its device.
    Where a task has no adapter on a module, its core is zero. Raises DataError unless exactly one
    of rank and error is given, or if no rank reaches `error`; SpecError if the model lacks a
    module, or has it in another shape.
    """
    if (rank is None) == (error is None):
        raise DataError("give a rank, or an error, and not both")
    targets = _targets(loras, model)
    most = min(min(target.d_in, target.d_out) for target in targets)
    norms = torch.stack([_norm(lora) for lora in loras])
    device = next(model.parameters()).device
    if error is None:
        rank = min(rank or 0, most)
        found = _decompose(loras, targets, norms, rank, device)
    else:
        rank = _least_rank(loras, targets, norms, error, device)
        found = _decompose(loras, targets, norms, rank, device)
        # Alternation lowers the errors together, but may raise that of a single task.
        while found.errors.max() > error and rank < most:
            rank += 1
            found = _decompose(loras, targets, norms, rank, device)
        if found.errors.max() > error:
            raise DataError(
                f"no rank keeps every task's error below {error}: at {most}, the most that the "
                f"narrowest module allows, the largest is {found.errors.max():.4f}"
            )
    adapted = attach(model, AdapterSpec("trex", rank=rank, form="static"), targets)
    with torch.no_grad():
        for layer, (first, second) in zip(adapted.layers, found.bases, strict=True):
            layer.experts.get_parameter("lora_a").copy_(first)
            layer.experts.get_parameter("lora_b").copy_(second.T)
    names = [lora.name for lora in loras]
    return Compressed(
        adapted,
        dict(zip(names, found.cores, strict=True)),
        dict(zip(names, found.errors.tolist(), strict=True)),
    )


Side = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Decomposition:
    bases: list[Side]  # of every module, A [I, d_in] and B^T [I, d_out], on the device
    cores: Tensor  # [T, M, I * I]
    errors: Tensor  # [T], float64


def _decompose(
    loras: Sequence[PeftLora],
    targets: Sequence[TargetModule],
    norms: Tensor,
    rank: int,
    device: torch.device,
) -> _Decomposition:
    bases, cores = [], []
    for _, sides in _modules(loras, targets, "bases", device):
        first, second = _bases(sides, norms, rank)
        core = torch.stack([(first @ a.T) @ (b @ second.T) for a, b in sides])  # [T, I, I]
        bases.append((first, second))
        cores.append(core.flatten(1).cpu())
    stacked = torch.stack(cores, 1)
    # The bases are orthonormal, so the error is the part of the norm that the cores lack.
    kept = stacked.double().square().sum((1, 2))
    return _Decomposition(bases, stacked, (1 - kept / norms.square()).clamp_min(0).sqrt())


def _modules(
    loras: Sequence[PeftLora], targets: Sequence[TargetModule], title: str, device: torch.device
) -> Iterator[tuple[TargetModule, list[Side]]]:
    """Yield every module with its sides in all tasks, a [r, d_in] and b [r, d_out] on a device."""
    for target in track(targets, description=title):
        none = LowRank(torch.zeros(1, 1, target.d_in), torch.zeros(1, 1, target.d_out))
        pairs = [lora.modules.get(target.name, none) for lora in loras]
        yield target, [(pair.a[0].to(device), pair.b[0].to(device)) for pair in pairs]


def _targets(loras: Sequence[PeftLora], model: nn.Module) -> tuple[TargetModule, ...]:
    shapes: dict[str, TargetModule] = {}
    for lora in loras:
        for name, pair in lora.modules.items():
            target = TargetModule(name, pair.a.shape[2], pair.b.shape[2])
            if shapes.setdefault(name, target) != target:
                raise DataError(f"{lora.name}: {name} has another shape than in the LoRAs before")
    order = [name for name, _ in model.named_modules() if name in shapes]
    return tuple(shapes[name] for name in [*order, *sorted(shapes.keys() - set(order))])


def _norm(lora: PeftLora) -> Tensor:
    """||M|| over all modules, without building M: ||A^T B||^2 = <A A^T, B B^T>."""
    pairs = [(pair.a[0], pair.b[0]) for pair in lora.modules.values()]
    norm = torch.stack([((a @ a.T) * (b @ b.T)).sum() for a, b in pairs]).sum().sqrt()
    if norm == 0:
        raise DataError(f"{lora.name}: the LoRA is zero")
    return norm.double()


def _gram(sides: Sequence[Side], norms: Tensor) -> Tensor:
    """sum_t M_t M_t^T / ||M_t||^2, [d_in, d_in]: every task has the same weight."""
    rows: Tensor = torch.cat(
        [_root(b) @ a / n.float() for (a, b), n in zip(sides, norms, strict=True)]
    )
    return rows.T @ rows


def _root(side: Tensor) -> Tensor:
    """R with R^T R = b b^T, for b [r, d]."""
    root: Tensor = torch.linalg.qr(side.T, mode="r").R
    return root


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors with the largest eigenvalues, as rows, in descending order."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).T
    return vectors


def _bases(sides: Sequence[Side], norms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The bases of one module, A [I, d_in] and B^T [I, d_out]."""
    flipped = [(b, a) for a, b in sides]
    second = _leading(_gram(flipped, norms), rank)
    for _ in range(ROUNDS):
        first = _leading(_gram([(a, b @ second.T) for a, b in sides], norms), rank)
        second = _leading(_gram([(b, a @ first.T) for a, b in sides], norms), rank)
    return first, second


def _least_rank(
    loras: Sequence[PeftLora],
    targets: Sequence[TargetModule],
    norms: Tensor,
    error: float,
    device: torch.device,
) -> int:
    """The least rank at which the initial bases keep every task's error below `error`."""
    most = min(min(target.d_in, target.d_out) for target in targets)
    kept = torch.zeros(len(loras), most, dtype=torch.float64)
    for _, sides in _modules(loras, targets, "ranks", device):
        first = _leading(_gram(sides, norms), most)
        second = _leading(_gram([(b, a) for a, b in sides], norms), most)
        for task, (a, b) in enumerate(sides):
            core = (first @ a.T) @ (b @ second.T)
            # The norm of the leading k by k block, for every k.
            kept[task] += core.double().square().cumsum(0).cumsum(1).diagonal().cpu()
    errors = (1 - kept / norms.square().unsqueeze(1)).clamp_min(0).sqrt()
    enough = (errors <= error).all(0).nonzero()
    return int(enough[0]) + 1 if len(enough) else most
