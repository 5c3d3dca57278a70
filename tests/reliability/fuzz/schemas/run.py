"""Schemathesis over the whole OpenAPI document, in all of its phases, on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reliability.fuzz.served import HELD, Served, environment
from reliability.result import Result
from support.reliability.small_base import Routers, SmallBase
from support.tenants.identities import OPERATOR_KEY

ROUTERS = 40
"""Distinct routers that uploads may be."""
_REFUSED = ["4xx"]
_UNDERSTOOD = ["2xx", "400", "403", "404", "409", "412", "422", "503", "504"]

_CONFIG = """
seed = {seed}
continue-on-failure = true
request-timeout = 20.0
suppress-health-check = ["all"]
warnings = false
cache.enabled = false

[auth.openapi.bearer]
bearer = "{key}"

[generation]
max-examples = {examples}
no-shrink = true
with-security-parameters = false
database = "none"

[checks]
# hooks.py has one of its own, which knows the 503 that a request can ask for
not_a_server_error.enabled = false
# what a schema cannot say is a 400: a prompt that is too long, a version that there is not
positive_data_acceptance.expected-statuses = {understood}
negative_data_rejection.expected-statuses = {refused}

[phases.stateful]
max-steps = 6

[dictionaries.names]
values = {names}

[dictionaries.routers]
values = {routers}

[dictionaries.prompts]
values = ["1 2 3", "a b", "<17> <18>"]

[parameters]
"path.name" = {{ dictionary = "names", probability = 0.6 }}
"body.task" = {{ dictionary = "names", probability = 0.3 }}
"body.model" = {{ dictionary = "names", probability = 0.3 }}
"body.prompt" = {{ dictionary = "prompts", probability = 0.5 }}
"body.router" = {{ dictionary = "routers", probability = 0.5 }}
"body.lora_path" = {{ dictionary = "names", probability = 0.2 }}

# what only a GET may ask without a key is a 401 for any other method
[[operations]]
include-path = ["/livez", "/readyz"]
checks.unsupported_method.enabled = false
"""


@dataclass
class Tally:
    """What the shards have found."""

    cases: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # by kind, as KINDS has them
    remarks: list[str] = field(default_factory=list)


OTHER = "other breaches of the document"
KINDS = {
    "no_server_error": "5xx and requests without an answer",
    "Network Error": "5xx and requests without an answer",
    "nothing_internal": "answers that tell of the inside",
    "UndefinedStatusCode": "statuses that are not declared",
}
"""What Schemathesis, or hooks.py, calls a failure -> the figure that counts it; else OTHER."""


def schema(
    served: Served,
    small: SmallBase,
    folder: Path,
    *,
    cases: int,
    examples: int,
    first_seed: int = 1,
) -> Result:
    """Run shards, each with the next seed, until so many cases were sent, or one has failed.

    `examples`: cases of a shard for each route in the phase of fuzzing, and sequences of requests
    in the stateful phase; the other phases have as many as the document gives them.
    """
    routers = [Routers(small.read_inventory())(number) for number in range(ROUTERS)]
    before = served.canary(), served.processes()
    tally, shards = Tally(), 0
    while tally.cases < cases and not tally.failures:
        served.forget(routers[0])
        _shard(tally, served, routers, folder, first_seed + shards, examples)
        shards += 1
    after = served.canary(), served.processes()
    figures: dict[str, float] = {name: tally.failures[name] for name in (*KINDS.values(), OTHER)}
    figures["canaries that differ"] = float(before[0] != after[0])
    figures["processes that ended"] = float(before[1] != after[1])
    return Result(
        goal="the OpenAPI document holds, with valid and invalid data, and nothing is a 5xx",
        length=f"{tally.cases} cases, {shards} shards from seed {first_seed}",
        figures={**figures, "cases": tally.cases, "statuses": len(tally.statuses)},
        at_most=dict.fromkeys(figures, 0),
        at_least={"cases": cases, "statuses": 8},
        remarks=tally.remarks,
    )


def _shard(
    tally: Tally,
    served: Served,
    routers: Sequence[bytes],
    folder: Path,
    seed: int,
    examples: int,
) -> None:
    """One run of Schemathesis. Raises RuntimeError where it could not run."""
    spelt = [b64encode(router).decode() for router in routers]
    told = {"routers": spelt, "statuses": str(folder / "statuses.json"), "held": HELD}
    (folder / "told.json").write_text(json.dumps(told))
    (folder / "config.toml").write_text(_config(served, spelt[:8], seed, examples))
    with served.client() as client:
        (folder / "openapi.json").write_bytes(client.send("GET", "/openapi.json").body)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "config.toml", "run"]
    command += ["openapi.json", "--url", f"http://127.0.0.1:{served.port}"]
    command += ["--report", "json", "--report-json-path", str(report)]
    hooks = {"SCHEMATHESIS_HOOKS": "reliability.fuzz.schemas.hooks", "POLYREX_FUZZ": "told.json"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment() | hooks,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = done.stdout.decode()
    if not report.exists():
        raise RuntimeError(output[-4000:])
    found = json.loads(report.read_text())
    tally.cases += found["test_cases"]["generated"]
    tally.statuses.update(json.loads((folder / "statuses.json").read_text()))
    for failure in [*found["failures"], *found["errors"]]:
        called = f"{failure.get('type')} {failure['title']}"
        kinds = [kind for name, kind in KINDS.items() if name in called]
        tally.failures[kinds[0] if kinds else OTHER] += failure["count"]
        where = ", ".join(failure.get("operations", ()))
        tally.remarks.append(f"seed {seed}: {failure['title']}: {where}")
    if tally.failures:
        (folder / "output.txt").write_text(output)
        tally.remarks.append(output.partition(" FAILURES ")[2][:6000])


def _config(served: Served, routers: Sequence[str], seed: int, examples: int) -> str:
    names = [HELD, f"default:{HELD}", f"{HELD}@1", served.model, "acme", "default", "new", "router"]
    return _CONFIG.format(
        seed=seed,
        key=OPERATOR_KEY,
        examples=examples,
        understood=json.dumps(_UNDERSTOOD),
        refused=json.dumps(_REFUSED),
        names=json.dumps(names),
        routers=json.dumps(routers),
    )
