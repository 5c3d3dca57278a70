"""Compiles every Triton kernel ahead of time; writes a table of the GPU resources each takes.

    python -m bench.kernels.triton_resources --out tests/results/triton_resources.md

No GPU is needed. Tiles are those that the launchers choose in bfloat16, for E = 8 experts of rank
16 (I = J = 16 pairs) at the widths of SmolLM2-135M and of an 8B model.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.cases import EXPERTS, RANK, SHAPES_8B, SHAPES_135M
from polyrex.kernels.gpu import factored, pair_space, rank_space
from polyrex.kernels.gpu.rank_space import MOST_PARTS, Tile
from polyrex.kernels.leaf_size import leaf_size

TARGETS = (80, 90)  # A100, H100
BYTES = 2  # of a number in bfloat16
WIDTHS = sorted({width for shapes in (SHAPES_135M, SHAPES_8B) for width, *_ in shapes.values()})
ALIGNED = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

Types = dict[str, str | tuple[str, ...] | None]
"""The types of a kernel's arguments that are no 32-bit numbers; None where one is left out."""
PACKED = ("i32",) * 2
"""The type of a number for each of two packed modules."""
COLUMNS = 8192
"""The outputs of both."""


class Build(NamedTuple):
    """One compilation: a kernel, its use, and its constants."""

    kernel: Any
    use: str
    tile: Tile
    types: Types

    @property
    def key(self) -> tuple[str, str, str]:
        """The first columns of the table."""
        named = ((re.fullmatch("(?:BLOCK|num)_(.*)", name), name) for name in self.tile)
        tile = " ".join(f"{match[1]}={self.tile[name]}" for match, name in named if match)
        return self.kernel.__name__, self.use, tile


class Resources(NamedTuple):
    """The resources of a compiled kernel: registers a thread, and bytes."""

    registers: int
    spilled: int
    shared: int


def builds() -> Iterator[Build]:
    """Every kernel with each tile that the launchers choose at these shapes, two modules packed."""
    types: Types = dict.fromkeys(("x", "a", "b", "y", "states"), "*bf16")
    types |= dict.fromkeys(("table", "parts", "weights"), "*fp32")
    types |= dict.fromkeys(("rows", "places", "indices"), "*i64")
    types |= dict.fromkeys(("starts", "columns", "begins", "widths", "offsets"), PACKED)
    packed = {"MODULES": len(PACKED)}
    tile = rank_space.shrink_tile(EXPERTS, RANK, BYTES)
    yield Build(rank_space.routed_shrink_kernel, "any T", tile, types)
    for tokens in (32, 64, 2048):
        use, parts = f"T={tokens}", MOST_PARTS if tokens <= 64 else 1
        for form, experts in (("experts", EXPERTS), ("pairs", 1)):
            tile = rank_space.expand_tile(tokens, COLUMNS, experts, RANK, BYTES, parts)
            own = types if experts > 1 else types | {"weights": None}
            yield Build(rank_space.routed_expand_kernel, f"{form} {use}", packed | tile, own)
        tile = pair_space.pair_tile(tokens, RANK, RANK, BYTES)
        yield Build(pair_space.pair_shrink_kernel, use, tile, types)
    for width in WIDTHS:
        leaf = leaf_size(width, 2)
        sides = [factored.LeafSide(0, RANK, leaf, leaf, 0, width)] * len(PACKED)
        for tokens in (8, 2048):
            use, tile = f"d={width} T={tokens}", factored.shrink_tile(tokens, sides, BYTES)
            yield Build(factored.factored_shrink_kernel, use, tile, types)
            parts = sides[0].blocks(tile["BLOCK_U"])
            tile = factored.expand_tile(tokens, sides, BYTES, parts)
            yield Build(factored.factored_expand_kernel, use, tile, types)


def compile_for(build: Build, target: int) -> Resources:
    """Compile for compute capability `target` (80 for sm_80) and read the result's resources."""
    names = build.kernel.arg_names
    constants: dict[str, Any] = {name: build.tile[name] for name in names if name in build.tile}
    signature = dict[str, str | tuple[str, ...]]()
    attributes = dict[tuple[int, ...], list[list[Any]]]()
    for position, name in enumerate(names):
        kind = build.types.get(name, "i32")
        if name in constants or kind is None:
            constants.setdefault(name, None)
            signature[name] = "constexpr"
            continue
        signature[name] = kind
        if isinstance(kind, tuple):
            for member in range(len(kind)):
                attributes[(position, member)] = ALIGNED
        elif name != "tokens":  # addresses, widths and strides come in sixteens
            attributes[(position,)] = ALIGNED
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {name: build.tile[name] for name in OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, *spilled = _resource_usage(compiled.asm["cubin"])
    return Resources(registers, sum(spilled), compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> list[int]:
    """Registers a thread, bytes of stack and of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = USAGE.search(report)
    if match is None:
        raise RuntimeError(f"no resource usage in the report of {command[0]}: {report!r}")
    return [int(number) for number in match.groups()]


def table() -> str:
    """The Markdown document."""
    lines = [
        "# What the Triton kernels need of a GPU",
        "",
        f"Written by `make triton-table` with Triton {triton.__version__}:",
        "`python -m bench.kernels.triton_resources --out tests/results/triton_resources.md`.",
        "bfloat16, E = 8, r = 16, I = J = 16; two modules are packed.",
        "",
        "| kernel | use | tile | target | registers/thread | spilled bytes | shared KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for build in builds():
        for target in TARGETS:
            found = compile_for(build, target)
            cells = *build.key, f"sm_{target}", found.registers, found.spilled
            lines.append(" | ".join(map(str, ("|", *cells, f"{found.shared / 1024:.1f} |")))[2:])
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown")
    parser.parse_args().out.write_text(table())


if __name__ == "__main__":
    main()
