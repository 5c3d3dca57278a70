"""The committed table of the resources of Triton kernels, and the compilation behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.kernels.triton_resources import TARGETS, builds, compile_for

TABLE = Path(__file__).parents[2] / "results" / "triton_resources.md"


def rows() -> list[tuple[str, ...]]:
    """The cells of the committed table, without its header."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def test_table_holds_every_kernel_and_tile_for_every_target() -> None:
    expected = [(*build.key, f"sm_{target}") for build in builds() for target in TARGETS]
    assert [row[:4] for row in rows()] == expected


def test_no_kernel_spills() -> None:
    assert {row[5] for row in rows()} == {"0"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_compiles_without_a_gpu(
    target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build = next(build for build in builds() if build.kernel.__name__ == "pair_shrink_kernel")
    found = compile_for(build, target)
    assert found.registers > 0
    assert found.spilled == 0
    assert list(tmp_path.rglob("*.cubin"))
