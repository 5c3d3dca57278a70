"""The diff in docs/adding-a-method adds a method that works everywhere, and touches two files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCH = ROOT / "docs" / "adding-a-method" / "toy.patch"

TRAIN = """
import torch
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, run
from polyrex.training.model.multi_task import MultiTaskModel
from support.small_model import random_llama

base = random_llama(initializer_range=0.2)
adapted = attach(base, AdapterSpec("shared-a", rank=4, experts=3), find_targets(base))
model = MultiTaskModel(adapted, 2, seed=0)
examples = [Example(i % 2, (i + 1, 7), (3 + i % 2, 0)) for i in range(8)]
groups = model.parameter_groups()
loop = LoopConfig(steps=40, batch_rows=4, warmup=2, rates=method_class("shared-a").rates)
curve = run(model, groups, examples, loop, pad=0)
print({name: len(members) for name, members in groups.items()})
print(curve[0].loss, curve[-1].loss)
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `polyrex.adapters` has the toy method."""
    folder: Path = tmp_path_factory.mktemp("patched")
    package = folder / "polyrex"
    shutil.copytree(ROOT / "adapters", package / "adapters")
    for name in ("kernels", "server", "training"):
        (package / name).symlink_to(ROOT / name)
    subprocess.run(["git", "apply", f"--directory={package.name}", PATCH], cwd=folder, check=True)
    path = os.pathsep.join((str(folder), str(ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def python(patched: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=patched, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_diff_adds_a_file_and_a_row() -> None:
    text = PATCH.read_text()
    files = set(re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE))
    assert files == {"adapters/methods/registry.py", "adapters/methods/shared_a.py"}
    registry = text.partition("adapters/methods/shared_a.py")[0]
    changed = re.findall(r"^[+-](?![+-])(.+)$", registry, re.MULTILINE)
    assert changed == ["from .shared_a import SharedAExperts", "    SharedAExperts,"]


def test_the_tests_of_every_method_pass_for_it(patched: dict[str, str]) -> None:
    folders = [f"tests/adapters/{room}" for room in ("methods", "serving", "files")]
    found = python(patched, "-m", "pytest", "-q", "--no-header", "-k", "shared", *folders)
    passed = re.search(r"(\d+) passed", found)
    assert passed is not None
    assert int(passed[1]) >= 20, found


def test_it_trains(patched: dict[str, str]) -> None:
    groups, losses = python(patched, "-c", TRAIN).splitlines()[-2:]
    assert groups == "{'experts': 28, 'gates': 0, 'token_routers': 0, 'routing': 1}"
    first, last = map(float, losses.split())
    assert last < 0.9 * first


def test_the_command_line_knows_it(patched: dict[str, str]) -> None:
    polyrex = str(Path(sys.executable).with_name("polyrex"))
    found = python(patched, polyrex, "params", "--method", "shared-a", "--experts", "4")
    assert "210 target modules" in found
