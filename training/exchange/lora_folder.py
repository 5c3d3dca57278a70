"""A folder of PEFT LoRAs, compressed to one inventory with a report of its savings and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.bundle import Bundle, NewRouter, write_bundle
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base, torch_dtype
from polyrex.adapters.model.devices import pick_device
from polyrex.adapters.peft.lora_checkpoint import CONFIG, WEIGHTS, PeftLora, read_lora
from polyrex.adapters.task_name import TASK_NAME
from polyrex.training.records import write_record

from .compress import Compressed, compress
from .drift import TEXTS, TaskDrift, drift_of


def compress_loras(
    folder: Path,
    out: Path,
    base: str,
    *,
    rank: int | None = None,
    error: float | None = None,
    texts: Sequence[str] = TEXTS,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Compress a folder of PEFT LoRAs to a static T-REX inventory in `out`, a router for each LoRA.

    The base model, on which drift is measured, computes in `dtype`; bases are found in float32.
    Returns the report, which is also written to `out`. Raises what `read_loras` and `compress`
    raise, DataError if a folder's name cannot be the name of a task, and DeviceError for a device
    that is not there.
    """
    place = pick_device(device)
    loras = read_loras(folder)
    for lora in loras:
        if not TASK_NAME.fullmatch(lora.name):
            raise DataError(f"{folder / lora.name}: a task's name matches {TASK_NAME.pattern}")
    path = resolve_base(base)
    model, tokenizer = load_base(path, torch_dtype(dtype), place), load_tokenizer(path)
    found = compress(loras, model, rank=rank, error=error)
    origin = {"compressed": "from a PEFT LoRA"}
    routers = {name: NewRouter(logits, provenance=origin) for name, logits in found.logits.items()}
    write_bundle(out, found.adapted, routers)
    drifts = {
        lora.name: drift_of(lora, found, tokenizer, texts)
        for lora in track(loras, description="drift")
    }
    report = _report(folder, Bundle.read(out), found, drifts)
    write_record(out / "report.json", report)
    return report


def read_loras(folder: Path) -> list[PeftLora]:
    """The LoRA checkpoints in the sub-folders of a folder, in the order of their names.

    Raises DataError if there are none, and what `read_lora` raises.
    """
    found = [read_lora(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if not found:
        raise DataError(f"{folder}: none of its folders holds an {CONFIG}")
    return found


def _report(
    folder: Path, bundle: Bundle, found: Compressed, drifts: Mapping[str, TaskDrift]
) -> dict[str, Any]:
    before = [(folder / name / WEIGHTS).stat().st_size for name in drifts]
    routers = [bundle.router_path(name).stat().st_size for name in drifts]
    inventory = bundle.inventory.path.stat().st_size
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
    """The totals of a report, in a few lines of text."""
    ratio = report["bytes_before"] / report["bytes_after"]
    return (
        f"{report['tasks']} LoRAs on shared bases of rank {report['rank']}\n"
        f"bytes: {report['bytes_before']:,} before, {report['bytes_after']:,} after "
        f"({ratio:.1f} times less); per task {report['bytes_per_task_before']:,} before, "
        f"{report['bytes_per_task_after']:,} after\n"
        f"relative error: {report['mean_error']:.4f} on average, "
        f"{report['worst_error']:.4f} at most\n"
        f"next tokens: {100 * report['mean_agreement']:.1f} % the same, "
        f"divergence {report['mean_divergence']:.4f} nats"
    )
