"""Adapters from elsewhere, as an inventory and routers that polyrex serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.inventory import write_inventory
from polyrex.adapters.files.registry import TASK_NAME
from polyrex.adapters.files.router import RouterMetadata, write_router
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base
from polyrex.adapters.peft.lora import WEIGHTS, PeftLora
from polyrex.adapters.peft.poly import import_poly
from polyrex.kernels.routing import StepRouting
from polyrex.training.evaluation.evaluate import routed
from polyrex.training.loop.loop import write_record

from .compress import Compressed, compress, read_loras

TEXTS = (
    "The city council met on Tuesday to discuss the new budget for schools and public parks.",
    "Is this movie review snippet positive or negative?\nA quiet, patient film that stays with "
    "you.\nOptions: positive; negative\nAnswer:",
    "def greatest(values):\n    best = values[0]\n    for value in values:\n",
    "Water boils at a lower temperature in the mountains because",
    "Give the plural of the noun.\nleaf\nAnswer:",
    "Dear Ms Alvarez, thank you for your letter of the third of March, in which you asked",
    "Question: If a train leaves at nine and arrives at noon, how long did it travel?\nAnswer:",
    "Once upon a time there was a fox who could not find its way home through the snow, and",
)
"""What logits are compared on, where nobody names other texts."""


def import_poly_checkpoint(checkpoint: Path, out: Path, base: str) -> Path:
    """Write a PEFT `poly` checkpoint as an inventory with the routers of its tasks; returns `out`.

    Exactly: every task's logits are those that PEFT computes. Tasks are named `task-0`, `task-1`
    and so on, as PEFT numbers them.
    """
    model = load_base(resolve_base(base), torch.float32)
    imported = import_poly(checkpoint, model)
    routers = {f"task-{i}": logits for i, logits in enumerate(imported.logits)}
    _write(out, imported.adapted, routers, {"imported": f"PEFT poly, {checkpoint.name}"})
    return out


@dataclass(frozen=True)
class TaskDrift:
    """What compressing did to one task."""

    error: float  # ||M - M'|| / ||M|| over all modules
    divergence: float  # mean over tokens of KL(original || compressed), nats
    agreement: float  # share of tokens whose most likely next token is the same


def compress_loras(
    folder: Path,
    out: Path,
    base: str,
    *,
    rank: int | None = None,
    error: float | None = None,
    texts: Sequence[str] = TEXTS,
) -> dict[str, Any]:
    """Compress a folder of PEFT LoRAs to a static T-REX inventory, one router a LoRA, in `out`.

    Returns the report, which is also written there. Raises what `read_loras` and `compress` raise,
    and DataError where a folder's name cannot be a task's.
    """
    loras = read_loras(folder)
    for lora in loras:
        if not TASK_NAME.fullmatch(lora.name):
            raise DataError(f"{folder / lora.name}: a task's name matches {TASK_NAME.pattern}")
    path = resolve_base(base)
    model, tokenizer = load_base(path, torch.float32), load_tokenizer(path)
    found = compress(loras, model, rank=rank, error=error)
    _write(out, found.adapted, found.logits, {"compressed": "from a PEFT LoRA"})
    drifts = {
        lora.name: _drift(found, lora, tokenizer, texts)
        for lora in track(loras, description="drift")
    }
    report = _report(folder, out, found, drifts)
    write_record(out / "report.json", report)
    return report


def _write(
    out: Path, adapted: AdaptedModel, routers: Mapping[str, Tensor], provenance: dict[str, str]
) -> None:
    (out / "routers").mkdir(parents=True, exist_ok=True)
    sha256 = write_inventory(out / "inventory.safetensors", adapted)
    for name, logits in routers.items():
        metadata = RouterMetadata(sha256, name, provenance=provenance)
        write_router(out / "routers" / f"{name}.safetensors", logits, adapted.spec, metadata)


@torch.inference_mode()
def _drift(
    found: Compressed, lora: PeftLora, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> TaskDrift:
    tokens = [torch.tensor(tokenizer.encode(text)) for text in texts]
    with routed(found.adapted, found.logits[lora.name]):
        ours = _log_probabilities(found.adapted.model, tokens)
    with uncompressed(found.adapted, lora):
        theirs = _log_probabilities(found.adapted.model, tokens)
    return TaskDrift(
        found.errors[lora.name],
        (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
        (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
    )


def _log_probabilities(model: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    """Of every token that may come next, [n, V], at the n positions of all texts."""
    padded = pad_sequence(list(texts), batch_first=True)  # on the right: nothing attends to it
    logits: Tensor = model(input_ids=padded).logits
    lengths = torch.tensor([len(text) for text in texts]).unsqueeze(1)
    return logits[torch.arange(padded.shape[1]) < lengths].log_softmax(-1)


@contextmanager
def uncompressed(adapted: AdaptedModel, lora: PeftLora) -> Iterator[None]:
    """Within it, every layer of a compressed model adds the LoRA itself."""
    dtype = cast(Any, adapted.model).dtype
    row = torch.zeros(1, dtype=torch.int64)
    adapted.context.step = StepRouting(torch.ones(1, len(adapted.layers), 1), row, dtype)
    for target, layer in zip(adapted.targets, adapted.layers, strict=True):
        none = LowRank(torch.zeros(1, 1, target.d_in), torch.zeros(1, 1, target.d_out))
        pair = lora.modules.get(target.name, none)
        layer.composed = LowRank(pair.a.to(dtype), pair.b.to(dtype))
    try:
        yield
    finally:
        adapted.release()


def _report(
    folder: Path, out: Path, found: Compressed, drifts: Mapping[str, TaskDrift]
) -> dict[str, Any]:
    before = [(folder / name / WEIGHTS).stat().st_size for name in drifts]
    routers = [(out / "routers" / f"{name}.safetensors").stat().st_size for name in drifts]
    inventory = (out / "inventory.safetensors").stat().st_size
    errors = [drift.error for drift in drifts.values()]
    return {
        "tasks": len(drifts),
        "rank": found.adapted.spec.rank,
        "bytes_before": sum(before),
        "bytes_after": inventory + sum(routers),
        "inventory_bytes": inventory,
        "bytes_per_task_before": round(sum(before) / len(before)),
        "bytes_per_task_after": round(sum(routers) / len(routers)),
        "mean_error": round(sum(errors) / len(errors), 5),
        "worst_error": round(max(errors), 5),
        "mean_divergence": round(sum(d.divergence for d in drifts.values()) / len(drifts), 5),
        "mean_agreement": round(sum(d.agreement for d in drifts.values()) / len(drifts), 4),
        "by_task": {
            name: {
                "error": round(drift.error, 5),
                "divergence": round(drift.divergence, 5),
                "agreement": round(drift.agreement, 4),
            }
            for name, drift in drifts.items()
        },
    }


def describe(report: Mapping[str, Any]) -> str:
    """A report's sums as a few lines for people."""
    ratio = report["bytes_before"] / report["bytes_after"]
    return (
        f"{report['tasks']} LoRAs on shared bases of rank {report['rank']}\n"
        f"bytes: {report['bytes_before']:,} before, {report['bytes_after']:,} after "
        f"({ratio:.1f} times less); a task {report['bytes_per_task_before']:,} before, "
        f"{report['bytes_per_task_after']:,} after\n"
        f"relative error: {report['mean_error']:.4f} in the mean, "
        f"{report['worst_error']:.4f} at most\n"
        f"next tokens: {100 * report['mean_agreement']:.1f} % the same, "
        f"divergence {report['mean_divergence']:.4f} nats"
    )
