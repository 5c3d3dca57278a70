"""Steps in parts: one after the other, and on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.ranks import Ranks
from polyrex.training.loop.run import LoopConfig, run
from polyrex.training.model.multi_task import MultiTaskModel

MakeAdapted = Callable[[AdapterSpec], AdaptedModel]
CPU = torch.device("cpu")
SPEC = AdapterSpec("poly", rank=3, experts=4)
LOOP = LoopConfig(steps=6, batch_rows=5, warmup=2, sample_routing=False)


def test_accumulated_steps_are_the_same_steps(
    make_adapted: MakeAdapted, examples: list[Example]
) -> None:
    """The wrong case: smaller batches, which are other steps."""

    def curve(loop: LoopConfig) -> torch.Tensor:
        model = MultiTaskModel(make_adapted(SPEC), 2, seed=0)
        records = run(model, model.parameter_groups(), examples, loop, pad=0)
        return torch.tensor([record.loss for record in records])

    whole = curve(LOOP)
    torch.testing.assert_close(curve(replace(LOOP, accumulate=3)), whole, rtol=1e-4, atol=1e-5)
    assert (curve(replace(LOOP, batch_rows=2)) - whole).abs().max() > 1e-2


def test_parts_hold_every_row_once() -> None:
    rows = [Example(number, (1,), (2,)) for number in range(7)]
    for parts in range(1, 10):
        found = list(Ranks(CPU).own_parts(rows, parts))
        assert [row for part in found for row in part] == rows
        assert all(found)
        assert len(found) <= parts


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_processes_meet_where_their_gradients_lie(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    """Even where there is a card that they do not use."""
    joined: list[str] = []
    cards: list[torch.device] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, **_: joined.append(name)
    )
    Ranks(torch.device(device))
    assert joined == [backend]
    assert cards == ([torch.device(device)] if backend == "nccl" else [])


def test_two_processes_train_what_one_does(
    tiny_base: Path, rows_folder: Path, tmp_path: Path
) -> None:
    """With an odd number of rows a step, of which one process has more."""

    def train(name: str, processes: int) -> dict[str, torch.Tensor]:
        script = (
            "from pathlib import Path\n"
            "from polyrex.adapters.spec import AdapterSpec\n"
            "from polyrex.training.loop.run import LoopConfig\n"
            "from polyrex.training.train import TrainConfig, train\n"
            f"train(TrainConfig(Path({str(rows_folder)!r}), Path({str(tmp_path / name)!r}),\n"
            "    AdapterSpec('poly', rank=3, experts=4), "
            f"base={str(tiny_base)!r}, dtype='float32', store_dtype='float32',\n"
            "    loop=LoopConfig(steps=6, batch_rows=5, warmup=2, sample_routing=False)))\n"
        )
        (tmp_path / "script.py").write_text(script)
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-P", "-m", *launch, str(tmp_path / "script.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(tmp_path / name / "inventory.safetensors")

    alone, together = train("alone", 1), train("together", 2)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-4)
    moved = max(tensor.abs().max().item() for name, tensor in alone.items() if "lora_b" in name)
    assert moved > 5e-3
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            {name: 1.1 * tensor for name, tensor in together.items()}, alone, rtol=1e-3, atol=1e-4
        )
