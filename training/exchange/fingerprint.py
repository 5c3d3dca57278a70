"""Notes beside an inventory for which weights it was made, where its file does not say so.

    python -m polyrex.training.exchange.fingerprint --inventory FILE [--base NAME]

Inventories say it themselves since there are fingerprints; this is for those from before. Whoever
runs it vouches for the base model: it can be the right one, or another of the same shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.inventory import read_inventory, write_fingerprint
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.adapters.model.fingerprint import fingerprint


def note_weights(inventory: Path, base: str) -> str:
    """Write the fingerprint of a base model's weights beside an inventory, and return it.

    Raises BaseModelMismatch where the inventory names other weights already, or the base model has
    no safetensors files.
    """
    read = read_inventory(inventory)
    weights = fingerprint(resolve_base(base))
    if weights is None:
        raise BaseModelMismatch(f"{base}: no safetensors files on this machine")
    if read.base.weights is not None:
        read.base.check_weights(weights, str(inventory))
    write_fingerprint(read, weights)
    return weights


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inventory", type=Path, required=True, help="the inventory's file")
    parser.add_argument("--base", default=DEFAULT_BASE, help="the base model that it was made for")
    options = parser.parse_args()
    print(note_weights(options.inventory, options.base))


if __name__ == "__main__":
    main()
