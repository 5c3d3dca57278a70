"""What Schemathesis is told of this server, in its own process: SCHEMATHESIS_HOOKS names the file.

It lets uploads be routers now and then, keeps the server usable, and counts what is answered.
"""

from __future__ import annotations

import atexit
import json
import os
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st

from reliability.fuzz.rawsockets.run import INTERNAL

_TOLD = json.loads(Path(os.environ["POLYREX_FUZZ"]).read_text())
_ROUTERS = [b64decode(router) for router in _TOLD["routers"]]
_counts: Counter[str] = Counter()

_ASKED_FOR = {
    "x-polyrex-min-revision": ("revision_not_reached", "1"),
    "x-polyrex-timeout": ("deadline_exceeded", "60"),
    "x-envoy-expected-rq-timeout-ms": ("deadline_exceeded", "60000"),
}
"""Headers that may ask for what there is no time for: the error that is due then, and a value with
which none is."""

schemathesis.openapi.media_type(
    "application/octet-stream",
    st.one_of(
        st.sampled_from(_ROUTERS),
        st.binary(max_size=200),
        st.builds(lambda router, at: router[:at], st.sampled_from(_ROUTERS), st.integers(0, 2000)),
    ),
)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Change what would make the run useless, or take long."""
    asked = _ASKED_FOR.keys() & (case.headers or {}).keys()
    if asked:
        _counts["asked for"] += 1
        if _counts["asked for"] % 50:  # some of them wait for seconds
            for header in asked:
                case.headers[header] = _ASKED_FOR[header][1]
    names, body, path = case.path_parameters or {}, case.body, case.operation.path
    route = f"{case.method} {path}"
    if path.endswith("/fit") and isinstance(body, dict):
        names["name"] = _TOLD["held"]  # which is there: so no worker has to start
        body.pop("replace", None)
    if route == "DELETE /v1/tasks/{name}" and _TOLD["held"] in str(names.get("name")):
        names["name"] = "new"
    if path == "/v1/unload_lora_adapter" and isinstance(body, dict):
        body["lora_name"] = "new" if "lora_name" in body else ""
    if route == "PATCH /v1/tenants/{name}" and names.get("name") == "default":
        names["name"] = "acme"  # or the quotas would refuse all that follows


@schemathesis.hook
def after_call(_context: Any, _case: Any, response: Any) -> None:
    """Count what is answered."""
    _counts[str(response.status_code)] += 1


@schemathesis.check
def no_server_error(_context: Any, response: Any, _case: Any) -> None:
    """No 5xx, but those that a request may ask for."""
    if response.status_code < 500:
        return
    sent = response.request.headers
    due = {error for header, (error, _) in _ASKED_FOR.items() if header in sent}
    code = response.json()["error"]["code"] if response.status_code in (503, 504) else None
    assert code in due, f"{response.status_code} {response.text[:300]}"


@schemathesis.check
def nothing_internal(_context: Any, response: Any, _case: Any) -> None:
    """No answer tells of the server's inside."""
    found = INTERNAL.search(response.content)
    assert found is None, f"{found} in {response.text[:300]}"


@atexit.register
def _report() -> None:
    Path(_TOLD["statuses"]).write_text(json.dumps(_counts))
