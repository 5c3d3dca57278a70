"""Counts the parameters of a method: of multi-task training, and of adapting to a new task."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polyrex.adapters.errors import FileError
from polyrex.adapters.methods.registry import make_experts, routing_shape
from polyrex.adapters.spec import AdapterSpec, TargetModule

from .attach import ALL_PROJECTIONS, find_targets


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of an adapter on a base model, for a number of training tasks."""

    modules: int
    tasks: int
    experts: int  # the inventory, shared by all tasks
    token_routers: int  # those of them by which tokens choose
    routing_per_task: int  # a router

    @property
    def multi_task(self) -> int:
        """Parameters that multi-task training learns: the inventory, and a router for each task."""
        return self.experts + self.tasks * self.routing_per_task

    @property
    def adaptation(self) -> int:
        """Parameters that adapting to a new task learns: a router, or all where there is none."""
        return self.routing_per_task or self.experts


def count_parameters(
    spec: AdapterSpec, targets: tuple[TargetModule, ...], tasks: int
) -> ParameterCounts:
    """Count the parameters that training would make; raises SpecError as `make_experts` does."""
    with torch.device("meta"):
        sizes = [
            (name, parameter.numel())
            for target in targets
            for name, parameter in make_experts(spec, target).named_parameters()
        ]
    experts = sum(size for _, size in sizes) + (spec.intuition or 0) * spec.gates
    token_routers = sum(size for name, size in sizes if name == "token_router")
    groups, logits = routing_shape(spec, targets)
    return ParameterCounts(len(targets), tasks, experts, token_routers, groups * logits)


def base_targets(base: str, pattern: str = ALL_PROJECTIONS) -> tuple[TargetModule, ...]:
    """The target modules of a base model: one named here, or a folder that transformers loads.

    Of a folder only the config is read. `pattern` is a regular expression on their names; of
    t0-3b all are targets without one. Raises FileError where there is no such model, SpecError
    where no module matches.
    """
    if base in _NAMED:
        matches = re.compile(pattern).fullmatch
        known = _NAMED[base]
        return tuple(t for t in known if matches(t.name)) if pattern != ALL_PROJECTIONS else known
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise FileError(f"{base}: neither {' nor '.join(_NAMED)}, and {error}") from error
    return find_targets(model, pattern)


def describe(counts: ParameterCounts) -> str:
    """The counts as a small table for people."""
    rows = [("experts (the inventory)", counts.experts)]
    if counts.token_routers:
        rows.append(("of them token routers", counts.token_routers))
    rows += [
        ("routing per task", counts.routing_per_task),
        (f"multi-task ({counts.tasks} tasks)", counts.multi_task),
        ("adaptation (one new task)", counts.adaptation),
    ]
    lines = [f"{label:<28}{count:>16,}{abbreviate(count):>9}" for label, count in rows]
    return "\n".join([f"{counts.modules} target modules", *lines])


def abbreviate(count: int) -> str:
    """A count as papers print it: 3456 -> 3.5k, 12213216 -> 12.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _t0_3b() -> tuple[TargetModule, ...]:
    """T5 v1.1 XL: 24 + 24 layers, d_model 2048, d_ff 5120, 32 heads of 64."""
    model, inner, feed_forward = 2048, 32 * 64, 5120
    attention = (("q", model, inner), ("k", model, inner), ("v", model, inner), ("o", inner, model))
    dense = (
        ("wi_0", model, feed_forward),
        ("wi_1", model, feed_forward),
        ("wo", feed_forward, model),
    )
    stacks = {
        "encoder": (("SelfAttention", attention), ("DenseReluDense", dense)),
        "decoder": (
            ("SelfAttention", attention),
            ("EncDecAttention", attention),
            ("DenseReluDense", dense),
        ),
    }
    return tuple(
        TargetModule(f"{stack}.block.{block}.layer.{layer}.{part}.{name}", d_in, d_out)
        for stack, layers in stacks.items()
        for block in range(24)
        for layer, (part, modules) in enumerate(layers)
        for name, d_in, d_out in modules
    )


def _smollm2_135m() -> tuple[TargetModule, ...]:
    """30 layers, hidden size 576, 9 query and 3 key-value heads of 64, feed-forward 1536."""
    hidden, keys, feed_forward = 576, 3 * 64, 1536
    modules = (
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", hidden, keys),
        ("self_attn.v_proj", hidden, keys),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", hidden, feed_forward),
        ("mlp.up_proj", hidden, feed_forward),
        ("mlp.down_proj", feed_forward, hidden),
    )
    return tuple(
        TargetModule(f"model.layers.{layer}.{name}", d_in, d_out)
        for layer in range(30)
        for name, d_in, d_out in modules
    )


_NAMED = {"t0-3b": _t0_3b(), "smollm2-135m-instruct": _smollm2_135m()}
