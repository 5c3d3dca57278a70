"""Adapters in and out of PEFT's files, against PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyrex.adapters.errors import FileError, MalformedFile, SpecError, TensorMismatch
from polyrex.adapters.files.inventory import load_experts, read_inventory, write_inventory
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.routed_linear import AddComposed
from polyrex.adapters.peft.lora_checkpoint import (
    CONFIG,
    WEIGHTS,
    export_lora,
    read_lora,
    write_lora,
)
from polyrex.adapters.peft.poly_checkpoint import import_poly
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.routing import StepRouting

MakeModel = Callable[..., nn.Module]
TOKENS = torch.arange(14).view(2, 7)


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, **inputs).logits
    return found


def routed_logits(adapted: AdaptedModel, router: Tensor) -> Tensor:
    weights = adapted.route(router).unsqueeze(0)
    adapted.add_by_step(StepRouting(weights, torch.tensor([0]), torch.float32))
    found = logits_of(adapted.model)
    adapted.add_nothing()
    return found


@pytest.fixture
def exported(
    small_spec: AdapterSpec, make_model: MakeModel, tmp_path: Path
) -> tuple[Path, Tensor, Tensor]:
    """An inventory's file, a router, and the logits of the model under it."""
    model = make_model()
    adapted = attach(model, small_spec, find_targets(model))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted.layers:
            for parameter in layer.experts.parameters():
                parameter.normal_(0, 0.9, generator=generator)
    router = torch.randn(adapted.routing_shape(), generator=generator)
    write_inventory(tmp_path / "inventory.safetensors", adapted)
    return tmp_path / "inventory.safetensors", router, routed_logits(adapted, router)


def test_exported_lora_gives_the_same_logits_in_peft(
    exported: tuple[Path, Tensor, Tensor], make_model: MakeModel, tmp_path: Path
) -> None:
    """Or the export is refused, with the reason. The wrong case: another task's router."""
    path, router, expected = exported
    inventory = read_inventory(path)
    if inventory.spec.method == "tensorpoly-x":
        with pytest.raises(SpecError, match="a tensor train of full rank"):
            export_lora(inventory, router, tmp_path / "lora", "small")
        return
    if load_experts(inventory, make_model()).layers[0].experts.routes_by_token:
        with pytest.raises(SpecError, match="every token has its own adapter"):
            export_lora(inventory, router, tmp_path / "lora", "small")
        return
    export_lora(inventory, router, tmp_path / "lora", "small")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
    assert (logits_of(make_model()) - expected).abs().max() > 1e-3
    if router.numel():
        export_lora(inventory, router.flip(-1), tmp_path / "other", "small")
        other = PeftModel.from_pretrained(make_model(), tmp_path / "other")
        assert (logits_of(other) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7},
        {"r": 3, "lora_alpha": 7, "use_rslora": True},
        {"r": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.0.mlp.up_proj": 11}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_lora_of_peft_is_read_with_its_scales(
    options: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    targets = ["q_proj", "up_proj"]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(1)
    original = get_peft_model(make_model(), config)
    original.save_pretrained(str(tmp_path / "original"))
    lora = read_lora(tmp_path / "original")
    model = make_model()
    adapted = attach(model, AdapterSpec("lora"), find_targets(model, r".*(q|up)_proj"))
    for target, layer in zip(adapted.targets, adapted.layers, strict=True):
        layer.added = AddComposed(lora.modules[target.name])
    torch.testing.assert_close(logits_of(model), logits_of(original), rtol=0, atol=1e-5)


def test_written_lora_is_read_again(tmp_path: Path) -> None:
    sides = LowRank(torch.randn(1, 2, 5), torch.randn(1, 2, 3))
    write_lora(tmp_path, {"model.layer": sides}, "small")
    (found,) = read_lora(tmp_path).modules.values()
    torch.testing.assert_close(found.a, sides.a)
    torch.testing.assert_close(found.b, sides.b)


@pytest.mark.parametrize(
    ("config", "tensors", "error", "message"),
    [
        ({"use_dora": True}, {}, MalformedFile, "use_dora True is not supported"),
        ({"bias": "all"}, {}, MalformedFile, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, MalformedFile, "modules_to_save"),
        ({"peft_type": "IA3"}, {}, MalformedFile, "expected peft_type LORA, got 'IA3'"),
        ({}, {"other": torch.ones(1)}, MalformedFile, "'?other'? is no part of an adapter"),
        ({}, {"base_model.model.x.lora_B.weight": None}, TensorMismatch, "do not fit"),
        ({}, {"base_model.model.x.lora_A.weight": torch.ones(4, 5)}, TensorMismatch, "do not fit"),
        ({}, {"base_model.model.x.lora_A.weight": torch.full((2, 5), torch.nan)}, FileError, "not"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_checkpoint_that_is_no_plain_lora_is_refused(
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    write_lora(tmp_path, {"x": LowRank(torch.ones(1, 2, 5), torch.ones(1, 2, 3))}, "small")
    there = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(there | config))
    changed = dict(load_file(tmp_path / WEIGHTS)) | tensors
    save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / WEIGHTS)
    with pytest.raises(error, match=message):
        read_lora(tmp_path)


def test_pickled_checkpoint_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(FileError, match="pickles, and not read"):
        read_lora(tmp_path)


@pytest.mark.parametrize("splits", [1, 2])
def test_poly_of_peft_is_taken_over_exactly(
    splits: int, make_model: MakeModel, tmp_path: Path
) -> None:
    """With a wrong case: the next task's routers."""
    torch.manual_seed(1)
    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=3,
        n_tasks=3,
        n_skills=4,
        n_splits=splits,
        target_modules=["q_proj", "up_proj", "down_proj"],
        init_weights=False,
    )
    original = get_peft_model(make_model(), config)
    for name, parameter in original.named_parameters():
        if "module_logits" in name:
            nn.init.normal_(parameter)
    original.save_pretrained(str(tmp_path))
    original.eval()
    found = import_poly(tmp_path, make_model())
    assert found.adapted.spec.method == ("poly" if splits == 1 else "mhr")
    for task, router in enumerate(found.logits):
        expected = logits_of(original, task_ids=torch.tensor([task, task]))
        torch.testing.assert_close(
            routed_logits(found.adapted, router), expected, rtol=0, atol=1e-5
        )
        wrong = routed_logits(found.adapted, found.logits[(task + 1) % 3])
        assert (wrong - expected).abs().max() > 1e-4


def test_poly_checkpoint_with_a_wrong_tensor_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    config = PolyConfig(r=3, n_tasks=3, n_skills=4, target_modules=["q_proj"])
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("module_logits"))
    changed = deepcopy(tensors) | {key: torch.zeros(2, 4)}
    save_file(changed, tmp_path / WEIGHTS)
    with pytest.raises(TensorMismatch, match=r"must have shape \[3, 4\], got \[2, 4\]"):
        import_poly(tmp_path, make_model())
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / WEIGHTS)
    with pytest.raises(TensorMismatch, match="got nothing"):
        import_poly(tmp_path, make_model())
