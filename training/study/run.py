"""The comparison study: trains, scores and adapts every variant to new tasks, cell by cell.

A cell is one JSON file in the study's folder: `base`, `search/FAMILY`, `train/VARIANT`,
`search/adapt-FAMILY-MODE`, `adapt/VARIANT-MODE`. A run computes the cells that are missing, several
variants in parallel, so that it can be stopped at any time; training resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.bundle import INVENTORY
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base, resolve_base
from polyrex.adapters.model.intuition import Intuition
from polyrex.training.adapt import AdaptMode
from polyrex.training.loop.run import LoopConfig
from polyrex.training.model.multi_task import Groups, MultiTaskModel
from polyrex.training.records import current_commit, write_record
from polyrex.training.train import write_results

from .claims import claims_table, judge
from .plots import draw
from .report import ablation_table, constant_answers, main_table, summarise, task_table
from .router_watch import RouterWatch
from .search import (
    Trained,
    adaptation_rates,
    best_rates,
    mean_loss,
    search_rates,
    train_adapters,
)
from .setup import Bench
from .variants import (
    ADAPT_ROUTING,
    ADAPT_SCALES,
    RATES,
    TRAIN_ROUTING,
    VARIANTS,
    StudyConfig,
    Variant,
    cell,
    run_name,
)

logger = logging.getLogger(__name__)


def run_study(config: StudyConfig) -> None:
    """Compute all missing cells; raises DataError or SpecError if the study cannot be run."""
    bench = Bench.open(config)
    check_plan(config, bench)
    bench.fill_caches()
    context = get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, _start_worker, (config,)) as pool:
        families = {variant.family: variant for variant in reversed(config.variants)}
        scored = pool.submit(score_base, config)
        list(pool.map(partial(search_rates, config), families.values()))
        scored.result()
        for name in pool.map(partial(run_variant, config), config.variants):
            logger.info("%s: done", name)
        runs = [(v, seed) for v in config.variants for seed in config.seeds_of(v)]
        for done in [pool.submit(train_variant, config, *run) for run in runs]:
            done.result()


def check_plan(config: StudyConfig, bench: Bench) -> None:
    """Record the study's settings in its folder, so that a study with others does not go on there.

    Raises DataError if the folder holds cells of such a study.
    """
    plan: dict[str, Any] = {
        "tasks": {t.name: len(t.rows["train"]) for t in bench.held_in + bench.held_out},
        "base": config.base,
        "targets": config.targets,
        "dtype": config.dtype,
        "rows": config.rows,
        "test_rows": config.test_rows,
        "seeds": list(config.seeds),
        "train_seeds": list(config.train_seeds),
        "loops": {name: _loop(getattr(config, name)) for name in ("search", "train", "adapt")},
        "rates": {
            **{family: [asdict(rates) for rates in tried] for family, tried in RATES.items()},
            "routing": list(TRAIN_ROUTING),
            "adapt-routing": list(ADAPT_ROUTING),
            "adapt-scales": list(ADAPT_SCALES),
        },
    }
    path = cell(config, "plan")
    found = json.loads(path.read_text()) if path.exists() else plan
    differing = [key for key in plan if found.get(key) != plan[key]]
    if differing:
        raise DataError(
            f"{path}: the cells there are of another study ({', '.join(differing)} differ); "
            "give another folder"
        )
    write_record(path, plan)


def _loop(loop: LoopConfig) -> dict[str, Any]:
    """A loop's settings without its learning rates, which the search determines."""
    return {key: value for key, value in asdict(loop).items() if key != "rates"}


def _start_worker(config: StudyConfig) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights, each time
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
    torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the study ends: a worker that outlives a killed one would write into the next."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def inventory_of(config: StudyConfig, variant: Variant) -> Path:
    """The path of a variant's trained inventory, which adapting the variant reads. If only the
    results were copied from elsewhere, it is made again."""
    return config.work / variant.name / INVENTORY


def score_base(config: StudyConfig) -> None:
    """Compute the cell `base`: the scores of the model without any adapter."""
    path = cell(config, "base")
    if path.exists():
        return
    bench = Bench.open(config)
    adapted = bench.fresh(config.variants[0]).adapted
    nothing = dict.fromkeys(task.name for task in bench.held_in + bench.held_out)
    scores = score_tasks(bench, adapted, nothing)
    write_record(path, {"scores": scores, "commit": current_commit()})


def run_variant(config: StudyConfig, variant: Variant) -> str:
    """Train, score and adapt a variant, unless that is done already; returns its name."""
    if all(is_adapted(config, variant, mode) for mode in variant.modes):
        return variant.name
    trained = (cell(config, "train", variant.name), inventory_of(config, variant))
    if not all(path.exists() for path in trained):
        trained[0].unlink(missing_ok=True)
        train_variant(config, variant, config.train_seeds[0])
        for mode in variant.modes:  # a cell is of one inventory
            if not is_adapted(config, variant, mode):
                cell(config, "adapt", f"{variant.name}-{mode}").unlink(missing_ok=True)
    for mode in variant.modes:
        adapt_variant(config, variant, mode)
    return variant.name


def train_variant(config: StudyConfig, variant: Variant, seed: int) -> None:
    """Train on all held_in tasks; write the inventory, its routers, and the cell with the scores.

    Does nothing if the cell is there already. Held_out tasks are scored without adaptation, under
    the mean of the routers. If the variant has an intuition, that of its prompt routes each row.
    """
    name = run_name(config, variant, seed)
    path, folder = cell(config, "train", name), config.work / name
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench.open(config)
    model = bench.fresh(variant, seed)
    examples = bench.examples("train", model.intuition)
    loop = replace(config.train, rates=best_rates(config, variant), seed=seed)
    checkpoint = folder / "checkpoint.safetensors"
    watch = watch_routers(bench, model, folder / "routers.safetensors")
    groups, curve = train_adapters(bench, model, variant, examples, loop, checkpoint, watch)
    if model.intuition is not None:
        own = [bench.mean_intuition(model.intuition, task, None) for task in bench.held_in]
        model.logits.data.copy_(torch.stack(own))
    write_results(folder, model, bench.held_in, torch.float32)
    logits = {task.name: model.logits[i].detach() for i, task in enumerate(bench.held_in)}
    logits |= {task.name: model.logits.detach().mean(0) for task in bench.held_out}
    record = {
        "spec": asdict(variant.spec),
        "loop": asdict(loop),
        "rows": len(examples),
        "parameters": counts(groups),
        "valid_loss": round(mean_loss(model, bench.examples("valid", model.intuition)), 4),
        "curve": smoothed([record.loss for record in curve]),
        "token_routers": watch and watch.curve(),
        "tokens_per_second": round(sum(r.tokens_per_second for r in curve) / len(curve)),
        "scores": score_tasks(bench, model.adapted, logits, model.intuition),
        "commit": current_commit(),
    }
    write_record(path, record)


def watch_routers(bench: Bench, model: MultiTaskModel, path: Path) -> RouterWatch | None:
    """A watch on the token routers, if there are any, by the first valid row of each task."""
    if not model.adapted.layers[0].experts.routes_by_token:
        return None
    rows = bench.examples("valid", model.intuition)
    first = {example.task: example for example in reversed(rows)}
    probe = model.collate(list(first.values()), bench.tokenizer.eos_token_id)
    return RouterWatch(model, probe, path)


def score_tasks(
    bench: Bench,
    adapted: AdaptedModel,
    logits: Mapping[str, Tensor | None],
    intuition: Intuition | None = None,
) -> dict[str, Any]:
    """Every task's test score under its logits [groups, R], or by the base model alone for None.

    With an intuition, each row is routed by that of its prompt instead.
    """
    scores = {}
    for task in bench.held_in + bench.held_out:
        questions = bench.questions(task, intuition)
        scores[task.name] = entry(bench.right(adapted, task, questions, logits[task.name]))
        logger.info("%s %.3f", task.name, scores[task.name]["score"])
    return scores


def is_adapted(config: StudyConfig, variant: Variant, mode: AdaptMode) -> bool:
    """Whether a variant has been adapted to all held_out tasks in a mode."""
    path = cell(config, "adapt", f"{variant.name}-{mode}")
    done = json.loads(path.read_text())["held_out"] if path.exists() else {}
    return all(name in done for name in config.held_out)


def adapt_variant(config: StudyConfig, variant: Variant, mode: AdaptMode) -> None:
    """Adapt to every held_out task from the few rows of each seed; the cell grows task by task."""
    if is_adapted(config, variant, mode):
        return
    path = cell(config, "adapt", f"{variant.name}-{mode}")
    done = json.loads(path.read_text()) if path.exists() else {"held_out": {}}
    bench = Bench.open(config)
    trained = Trained.load(bench, inventory_of(config, variant))
    rates = adaptation_rates(trained, variant, mode)
    for task in bench.held_out:
        if task.name in done["held_out"]:
            continue
        questions, seeds = bench.questions(task), {}
        for seed in config.seeds:
            start, logits, losses = trained.adapt(task, seed, mode, rates)
            found = entry(bench.right(trained.adapted, task, questions, logits))
            seeds[str(seed)] = {"start": start, "loss": smoothed(losses, 5), **found}
            logger.info("%s: %s seed %d %.3f", path.stem, task.name, seed, found["score"])
        done["held_out"][task.name] = seeds
        loop = replace(config.adapt, rates=rates)
        done |= {"mode": mode, "rows": config.rows, "loop": asdict(loop)}
        write_record(path, done | {"commit": current_commit()})


def entry(right: Sequence[bool]) -> dict[str, Any]:
    """A score and its rows, as in a cell: one bit for each row, from the first row on."""
    bits = sum(1 << i for i, each in enumerate(right) if each)
    return {"score": round(sum(right) / len(right), 4), "rows": len(right), "right": f"{bits:x}"}


def counts(groups: Groups) -> dict[str, int]:
    """The number of trained parameters by group."""
    return {role: sum(p.numel() for _, p in members) for role, members in groups.items()}


def smoothed(losses: Iterable[float], window: int = 20) -> list[float]:
    """The means of consecutive windows of a curve, which make it short enough for a small file."""
    values = list(losses)
    parts = [values[i : i + window] for i in range(0, len(values), window)]
    return [round(math.fsum(part) / len(part), 4) for part in parts]


def main() -> None:
    """Run the command behind `make study`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for files that can be made again"
    )
    parser.add_argument(
        "--variant", action="append", help="run only this variant; repeat it for more"
    )
    parser.add_argument("--dtype", default=StudyConfig.dtype, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen = [v for v in VARIANTS if not options.variant or v.name in options.variant]
    config = StudyConfig(
        options.data,
        options.out,
        options.work,
        dtype=options.dtype,
        device=options.device,
        variants=chosen,
    )
    if not options.report:
        run_study(config)
    base = load_base(resolve_base(config.base), torch.float32)
    config = replace(config, variants=VARIANTS)
    summary = summarise(config, base)
    summary["claims"] = judge(config, summary)
    summary["constant"] = constant_answers(config)
    write_record(options.out.with_name("study.json"), summary)
    draw(summary, config.out, config.work, "tensorpoly-1-e8-n2")
    tables = {
        "Every method": main_table(summary),
        "Held_out tasks, adapted from 32 rows": task_table(summary),
        "Ways of adapting": ablation_table(summary),
        "Claims": claims_table(summary["claims"]),
    }
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items())
    (config.out / "tables.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
