"""Many LoRAs onto shared bases: a static T-REX inventory, and a small core for every task.

For every module, the tasks' matrices `M_t = A_t^T B_t` [d_in, d_out] are approximated as
`A^T G_t B^T`, with orthonormal bases A [I, d_in] and B [d_out, I] that all tasks share: the Tucker
decomposition of the stacked matrices in two of their three modes, by alternating least squares
(higher-order orthogonal iteration). `delta = B G_t^T A x` is T-REX's static form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from polyrex.adapters.errors import DataError
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import AdaptedModel, attach
from polyrex.adapters.peft.lora import CONFIG, PeftLora, read_lora
from polyrex.adapters.spec import AdapterSpec, TargetModule

ROUNDS = 4
"""Of alternation: the bases that it starts from are nearly the best already."""


@dataclass(frozen=True)
class Compressed:
    """The bases in place on a model, and every task's cores as a router's logits."""

    adapted: AdaptedModel
    logits: Mapping[str, Tensor]  # by task, [M, I * I]
    errors: Mapping[str, float]  # by task, ||M - M'|| / ||M|| over all modules


def read_loras(folder: Path) -> list[PeftLora]:
    """Every LoRA checkpoint in the folders of a folder, in the order of their names.

    Raises DataError where there is none, and what `read_lora` raises.
    """
    found = [read_lora(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if not found:
        raise DataError(f"{folder}: none of its folders holds an {CONFIG}")
    return found


def compress(
    loras: Sequence[PeftLora],
    model: nn.Module,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> Compressed:
    """Compress LoRAs of any ranks to bases of `rank`, or of the least rank that keeps every task's
    relative error below `error`.

    `model` is the base model that they belong to; the bases are attached to it. A task without an
    adapter on some module gets a core of zeros there. Raises DataError where neither or both are
    given, or where no rank reaches `error`; SpecError where a module is not in the model or of
    another shape. No rank is above the narrowest module's width.
    """
    if (rank is None) == (error is None):
        raise DataError("give a rank, or an error, and not both")
    targets = _targets(loras, model)
    most = min(min(target.d_in, target.d_out) for target in targets)
    norms = torch.stack([_norm(lora) for lora in loras])
    if error is None:
        rank = min(rank or 0, most)
        found = _decompose(loras, targets, norms, rank)
    else:
        rank = _least_rank(loras, targets, norms, error)
        found = _decompose(loras, targets, norms, rank)
        while found.errors.max() > error and rank < most:  # bases better for most, not for all
            rank += 1
            found = _decompose(loras, targets, norms, rank)
        if found.errors.max() > error:
            raise DataError(
                f"no rank keeps every task's error below {error}: at {most}, the most that the "
                f"narrowest module allows, one is {found.errors.max():.4f}"
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
    bases: list[Side]  # of every module, A [I, d_in] and B^T [I, d_out]
    cores: Tensor  # [T, M, I * I]
    errors: Tensor  # [T], float64


def _decompose(
    loras: Sequence[PeftLora], targets: Sequence[TargetModule], norms: Tensor, rank: int
) -> _Decomposition:
    bases, cores = [], []
    for _, sides in _modules(loras, targets, "bases"):
        first, second = _bases(sides, norms, rank)
        core = torch.stack([(first @ a.T) @ (b @ second.T) for a, b in sides])  # [T, I, I]
        bases.append((first, second))
        cores.append(core.flatten(1))
    stacked = torch.stack(cores, 1)
    # The bases are orthonormal: what a core does not hold is the error.
    kept = stacked.double().square().sum((1, 2))
    return _Decomposition(bases, stacked, (1 - kept / norms.square()).clamp_min(0).sqrt())


def _modules(
    loras: Sequence[PeftLora], targets: Sequence[TargetModule], title: str
) -> Iterator[tuple[TargetModule, list[Side]]]:
    """Every module with its sides in all tasks, a [r, d_in] and b [r, d_out]."""
    for target in track(targets, description=title):
        none = LowRank(torch.zeros(1, 1, target.d_in), torch.zeros(1, 1, target.d_out))
        pairs = [lora.modules.get(target.name, none) for lora in loras]
        yield target, [(pair.a[0], pair.b[0]) for pair in pairs]


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
    """||M|| over all modules, without ever building M: ||A^T B||^2 = <A A^T, B B^T>."""
    pairs = [(pair.a[0], pair.b[0]) for pair in lora.modules.values()]
    norm = torch.stack([((a @ a.T) * (b @ b.T)).sum() for a, b in pairs]).sum().sqrt()
    if norm == 0:
        raise DataError(f"{lora.name}: the LoRA is zero")
    return norm.double()


def _gram(sides: Sequence[Side], norms: Tensor) -> Tensor:
    """sum_t M_t M_t^T / ||M_t||^2, [d_in, d_in]: every task counts the same."""
    rows: Tensor = torch.cat(
        [_root(b) @ a / n.float() for (a, b), n in zip(sides, norms, strict=True)]
    )
    return rows.T @ rows


def _root(side: Tensor) -> Tensor:
    """R with R^T R = b b^T, for b [r, d]."""
    root: Tensor = torch.linalg.qr(side.T, mode="r").R
    return root


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as rows, largest first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).T
    return vectors


def _bases(sides: Sequence[Side], norms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [I, d_in] and B^T [I, d_out]."""
    flipped = [(b, a) for a, b in sides]
    second = _leading(_gram(flipped, norms), rank)
    for _ in range(ROUNDS):
        first = _leading(_gram([(a, b @ second.T) for a, b in sides], norms), rank)
        second = _leading(_gram([(b, a @ first.T) for a, b in sides], norms), rank)
    return first, second


def _least_rank(
    loras: Sequence[PeftLora], targets: Sequence[TargetModule], norms: Tensor, error: float
) -> int:
    """The least rank at which the starting bases keep every task's error below `error`."""
    most = min(min(target.d_in, target.d_out) for target in targets)
    kept = torch.zeros(len(loras), most, dtype=torch.float64)
    for _, sides in _modules(loras, targets, "ranks"):
        first = _leading(_gram(sides, norms), most)
        second = _leading(_gram([(b, a) for a, b in sides], norms), most)
        for task, (a, b) in enumerate(sides):
            core = (first @ a.T) @ (b @ second.T)
            # What the leading k by k block holds, for every k.
            kept[task] += core.double().square().cumsum(0).cumsum(1).diagonal()
    errors = (1 - kept / norms.square().unsqueeze(1)).clamp_min(0).sqrt()
    enough = (errors <= error).all(0).nonzero()
    return int(enough[0]) + 1 if len(enough) else most
