"""The study's plots: accuracy against parameters, routing, experts, tasks, convergence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.lines import Line2D
from torch import Tensor

from polyrex.adapters.files.bundle import INVENTORY, Bundle
from polyrex.adapters.files.inventory import Inventory, read_experts, read_inventory
from polyrex.adapters.methods.composed import LowRank

matplotlib.use("agg")


MARKS = {"routing": "o", "token-routers": "D", "modules": "s", "both": "^"}


def accuracy_against_parameters(summary: Mapping[str, Any], path: Path) -> None:
    """Plot held_in accuracy against the parameters of training, and held_out accuracy against those
    of adaptation."""
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    colours = dict(zip(summary["methods"], pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    for name, entry in summary["methods"].items():
        value, error = entry["held_in_mean"], entry["held_in_standard_error"]
        hollow = len(entry["held_in_by_seed"]) == 1
        _point(axes[0], entry["multi_task_params"], value, error, colours[name], "o", hollow)
    for entry in summary["ablations"].values():
        value, error, mark = entry["held_out_mean"], entry["standard_error"], MARKS[entry["mode"]]
        _point(axes[1], entry["adaptation_params"], value, error, colours[entry["variant"]], mark)
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_xlabel("parameters trained on all held_in tasks; hollow: one seed of training")
    axes[1].set_xlabel("parameters adapted per task")
    axes[0].set_ylabel("held_in accuracy, %")
    axes[1].set_ylabel("held_out accuracy, %, 32 rows a task")
    names = [Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in colours.items()]
    figure.legend(handles=names, loc="outside right upper", fontsize=8)
    modes = [
        Line2D([], [], color="grey", marker=mark, ls="", label=mode) for mode, mark in MARKS.items()
    ]
    figure.legend(handles=modes, loc="outside right lower", fontsize=8, title="adapted, right")
    _save(figure, path)


def _point(
    axis: Any, x: float, value: float, error: float, colour: Any, mark: str, hollow: bool = False
) -> None:
    fill = "white" if hollow else colour
    axis.errorbar(x, 100 * value, yerr=100 * error, fmt=mark, ms=6, lw=1, color=colour, mfc=fill)


def routing_heat_map(inventory: Inventory, path: Path) -> None:
    """Plot each task's routing weights by layer and expert, as means over a layer's modules."""
    routers = Bundle(inventory).logits()
    layers = [_layer(target.name) for target in inventory.targets]
    numbers = sorted(set(layers))
    figure, axes = pyplot.subplots(
        3, -(-len(routers) // 3), figsize=(16, 8), layout="constrained", squeeze=False
    )
    by_task = {}
    for name, logits in routers.items():
        weights = inventory.route(logits)  # [M, W]
        by_task[name] = torch.stack(
            [weights[[own == number for own in layers]].mean(0) for number in numbers]
        )
    most = max((weights.max().item() for weights in by_task.values()), default=1.0)
    image = None
    for axis, (name, weights) in zip(axes.flat, by_task.items(), strict=False):
        image = axis.imshow(weights.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=most)
        axis.set_title(name, size=8)
        axis.set_yticks(range(0, len(numbers), 3), [str(n) for n in numbers[::3]], size=6)
        axis.tick_params(labelsize=6)
    figure.supxlabel("expert")
    figure.supylabel("layer")
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6)
    _save(figure, path)


def expert_similarity(inventory: Inventory, path: Path) -> None:
    """Plot the cosines between the experts' matrices B_e A_e, as means over modules."""
    total = None
    experts = read_experts(inventory)
    for each in experts:
        count = each.table_size(each.spec)
        with torch.no_grad():
            composed = each.compose(each.operands(torch.float32), torch.eye(count), torch.float32)
        assert isinstance(composed, LowRank)
        total = cosines(composed) if total is None else total + cosines(composed)
    assert total is not None
    _matrix(total / len(experts), None, "cosine of experts, a mean over modules", path)


def cosines(experts: LowRank) -> Tensor:
    """The cosines [E, E] of experts, from their sides alone: <A_i^T B_i, A_j^T B_j> =
    <A_i A_j^T, B_i B_j^T>."""
    a = torch.einsum("ird,jsd->ijrs", experts.a, experts.a)
    b = torch.einsum("ird,jsd->ijrs", experts.b, experts.b)
    inner = (a * b).sum((2, 3))
    norms = inner.diagonal().clamp_min(1e-12).sqrt()
    return inner / norms.outer(norms)


def task_similarity(inventory: Inventory, path: Path) -> None:
    """Plot the cosines between tasks' routing weights, less their mean over tasks."""
    routers = Bundle(inventory).logits()
    weights = torch.stack([inventory.route(logits).flatten() for logits in routers.values()])
    centred = torch.nn.functional.normalize(weights - weights.mean(0), dim=-1)
    _matrix(centred @ centred.T, list(routers), "cosine of tasks' routing", path)


def convergence(cells: Mapping[str, Any], path: Path) -> None:
    """Plot the training loss of several variants, where each point is a mean of 20 steps."""
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for name, cell in cells.items():
        _loss(axis, name, cell)
    axis.legend(fontsize=7)
    _save(figure, path)


def router_convergence(cells: Mapping[str, Any], path: Path) -> None:
    """Plot the loss of variants whose tokens choose, the distance of their token routers' weights
    from the final ones, and the entropy of these weights."""
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for name, cell in cells.items():
        _loss(axes[0], name, cell)
        routers = cell["token_routers"]
        axes[1].plot(routers["steps"], routers["distance"], label=name)
        axes[2].plot(routers["steps"], routers["entropy"], label=name)
    axes[1].set_ylabel("distance of token routers' weights from the last ones")
    axes[2].set_ylabel("entropy of token routers' weights, 1 is even")
    for axis in axes:
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _loss(axis: Any, name: str, cell: Mapping[str, Any]) -> None:
    curve = cell["curve"]
    axis.plot([20 * (i + 1) for i in range(len(curve))], curve, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.set_yscale("log")


def draw(summary: Mapping[str, Any], out: Path, work: Path, routed: str) -> None:
    """Draw all plots into `out`; `routed` is the variant whose routing and experts are shown."""
    accuracy_against_parameters(summary, out / "accuracy.png")
    inventory = read_inventory(work / routed / INVENTORY)
    routing_heat_map(inventory, out / "routing.png")
    expert_similarity(inventory, out / "experts.png")
    task_similarity(inventory, out / "tasks.png")
    cells = {
        name: json.loads((out / "train" / f"{name}.json").read_text())
        for name in summary["methods"]
    }
    convergence(cells, out / "convergence.png")
    watched = {name: each for name, each in cells.items() if each.get("token_routers")}
    if watched:
        router_convergence(watched, out / "intuition.png")


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _matrix(values: Tensor, names: Sequence[str] | None, title: str, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(7, 6), layout="constrained")
    image = axis.imshow(values.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    if names is not None:
        axis.set_xticks(range(len(names)), names, rotation=90, size=7)
        axis.set_yticks(range(len(names)), names, size=7)
    axis.set_title(title, size=9)
    figure.colorbar(image)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
