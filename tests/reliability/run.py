"""`make reliability`: every proof of the registry at full length, and what each has shown.

    PYTHONPATH=tests PYTHONSAFEPATH=1 .venv/bin/python -m reliability.run --only kills-sqlite

Each proof also runs with a planted defect, shorter, and must then fail, in the figures that the
defect moves: an error of the run itself is no proof that it would be found. What a proof found is
written to `--out` as soon as it ends, with a table for people beside it (`.md`), and a proof that
is there already is left out, so a run that was broken off goes on where it stopped. Times want the
machine for themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import machine
from polyrex.training.records import write_record
from reliability.catalogue import PROOFS
from reliability.ground import Ground, prepared
from reliability.proofs.proof import Proof

RESULTS = Path(__file__).parents[1] / "results" / "reliability.json"


def names_of(text: str) -> list[str]:
    """The proofs of a list with commas."""
    chosen = text.split(",")
    unknown = sorted(set(chosen) - set(PROOFS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no proof {', '.join(unknown)}; there are {', '.join(PROOFS)}"
        )
    return chosen


def prove(name: str, proof: Proof, ground: Ground) -> dict[str, Any]:
    """Run one proof, and then the same with its defect: what they have shown."""
    began = time.monotonic()
    result = proof.full(ground)
    caught = proof.planted(ground).finds(proof.finds)
    return {
        **result.entry(),
        "passed": result.passed and caught,
        "planted_defect": {"what": proof.defect, "caught": caught, "finds": list(proof.finds)},
        "command": f"make reliability ARGS='--only {name}'",
        "machine": machine(),
        "seconds": round(time.monotonic() - began),
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what each proof did, the figures that have limits, and its planted defect."""
    lines = ["| proof | done | found, and its limit | planted defect |", "|---|---|---|---|"]
    for name, entry in sorted(entries.items()):
        found = [
            f"{key}: {entry['figure'][key]} ({limit})" for key, limit in entry["limit"].items()
        ]
        planted = entry["planted_defect"]
        cells = (
            f"`{name}`" + ("" if entry["passed"] else ", not passed"),
            f"{entry['goal']}; {entry['length']}",
            "; ".join(found),
            f"{planted['what']}: {'found' if planted['caught'] else 'NOT found'}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(chosen: list[str], out: Path, ground: Ground, *, again: bool) -> list[str]:
    """Run those of the proofs that have no result yet; those that failed, then or now."""
    entries: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in chosen:
        if name in entries and not again:
            print(f"{name}: there already", flush=True)
            continue
        print(f"== {name}", flush=True)
        try:
            entries[name] = prove(name, PROOFS[name], ground)
        except Exception:  # the other proofs still say something
            traceback.print_exc()
            entries.pop(name, None)
            continue
        write_record(out, entries)
        out.with_suffix(".md").write_text(table(entries))
        print(json.dumps(entries[name]), flush=True)
    return [name for name in chosen if not entries.get(name, {}).get("passed")]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=names_of, default=list(PROOFS), help=f"with commas: {','.join(PROOFS)}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--work", type=Path, help="folder for registries; a real disk, if given")
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    options = parser.parse_args()
    with prepared(options.work) as ground:
        failed = run(options.only, options.out.resolve(), ground, again=options.again)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
