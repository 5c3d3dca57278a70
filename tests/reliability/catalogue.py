"""The proofs of `make reliability`: each at full length, and with a defect that it must find."""

from __future__ import annotations

from functools import partial

from support.reliability.planted import (
    ACKNOWLEDGED_FIRST,
    DEAF,
    HOARDING,
    HURRIED,
    LABELLED,
    LAZY,
    MUTE,
    SLOW,
    UNPINNED,
)

from .fuzz.planted import GULLIBLE, ODD_HEADER, ODD_QUERY, SILENT, UNDECLARED
from .fuzz.proofs import fuzzed_document, fuzzed_parsers, fuzzed_sockets
from .ground import Ground
from .proofs.borrowed import access, prefix_cache, ray
from .proofs.faults import disk_faults
from .proofs.history import history
from .proofs.kills import kills
from .proofs.many_tasks import SAMPLES, SIZES, TIMES, many_tasks
from .proofs.one_killed import one_killed
from .proofs.proof import Proof, Prove
from .proofs.stress.catalogue import STRESS
from .proofs.tenants import cached_prefixes, guesses, times_of_prefixes
from .proofs.two_servers import two_servers
from .proofs.updates import updates
from .result import Result


def _kills(kind: str, killed: int, acknowledged: int, *defects: str) -> Prove:
    def prove(ground: Ground) -> Result:
        url = ground.sqlite() if kind == "sqlite" else ground.postgresql()
        return kills(
            ground.forks,
            url,
            kills=killed,
            acknowledged=acknowledged,
            defects=defects,
        )

    return prove


def _killed(kind: str) -> Proof:
    return Proof(
        _kills(kind, 2000, 500_000),
        _kills(kind, 20, 2000, ACKNOWLEDGED_FIRST),
        "registrations are acknowledged 5 ms before they are committed",
        ["lost"],
    )


def _updates(count: int, routers: int, *defects: str) -> Prove:
    def prove(ground: Ground) -> Result:
        return updates(
            ground.forks,
            ground.postgresql(),
            updates=count,
            routers=routers,
            defects=defects,
        )

    return prove


def _history(
    operations: int, *defects: str, with_revisions: bool, one_writes: bool = False
) -> Prove:
    def prove(ground: Ground) -> Result:
        return history(
            ground.forks,
            ground.postgresql(),
            operations=operations,
            with_revisions=with_revisions,
            one_writes=one_writes,
            defects=defects,
        )

    return prove


def _one_killed(registrations: int, forget: int = 0) -> Prove:
    def prove(ground: Ground) -> Result:
        return one_killed(
            ground.forks,
            ground.postgresql(),
            registrations=registrations,
            forget=forget,
        )

    return prove


def _two_servers(ground: Ground, *, same_folder: bool) -> Result:
    return two_servers(ground.small, ground.folder(), same_folder=same_folder)


def _many_tasks(ground: Ground, count: int, samples: int, *defects: str) -> Result:
    return many_tasks(ground.forks, ground.folder(), count=count, samples=samples, defects=defects)


def _faults(error: str) -> Proof:
    return Proof(
        lambda ground: disk_faults(ground.folder(), error=error, syncs=200),
        lambda ground: disk_faults(ground.folder(), error=error, syncs=10, settling=False),
        "failed transactions stay in SQLite's log, from which a restart would take them",
        ["refused and there"],
    )


PROOFS = {
    "kills-sqlite": _killed("sqlite"),
    "kills-postgresql": _killed("postgresql"),
    "faults-eio": _faults("EIO"),
    "faults-enospc": _faults("ENOSPC"),
    "two-servers": Proof(
        partial(_two_servers, same_folder=True),
        partial(_two_servers, same_folder=False),
        "the second server has a folder of its own, and starts",
        ["second servers that refused to start", "messages that name the file"],
    ),
    "updates": Proof(
        _updates(2000, 200),
        _updates(100, 50, UNPINNED),
        "the second half of an answer comes from the version that is current by then",
        ["answers of no version"],
    ),
    "following": Proof(
        _updates(400, 200),
        _updates(100, 100, DEAF),
        "replicas do not follow each other's changes",
        ["replicas that do not serve the last version"],
    ),
    "following-without-notify": Proof(
        _updates(400, 200, MUTE),
        _updates(100, 100, MUTE, LAZY),
        "replicas are not told of each other's changes, and ask every six seconds",
        ["answers older than 1 s"],
    ),
    "history-with-revisions": Proof(
        _history(10_000, with_revisions=True),
        _history(2000, DEAF, HURRIED, with_revisions=True),
        "a request with a revision does not wait for it, on replicas that do not follow",
        ["tasks with no possible order"],
    ),
    "history-without-revisions": Proof(
        _history(10_000, with_revisions=False),
        _history(2000, DEAF, with_revisions=False, one_writes=True),
        "a replica does not follow the other's changes",
        ["gets that are too old"],
    ),
    "one-killed": Proof(
        _one_killed(5000),
        _one_killed(100, forget=5),
        "the newest five changes are taken out of the database before it is examined",
        ["lost"],
    ),
    "many-tasks": Proof(
        partial(_many_tasks, count=100_000, samples=SAMPLES),
        lambda ground: _many_tasks(ground, 10_000, 20, HOARDING, LABELLED, SLOW),
        "8 KiB of memory and a line of /metrics for each task, and everything that is timed takes"
        " longer",
        [*SIZES, *TIMES],
    ),
    "guesses": Proof(
        lambda ground: guesses(ground.small, ground.folder(), count=5000),
        lambda ground: guesses(ground.small, ground.folder(), count=500, open_index=True),
        "the index does not look at who asks",
        ["routes with more than one answer", "statuses other than 404"],
    ),
    "cached-prefixes": Proof(
        lambda ground: cached_prefixes(ground.small, pairs=20_000, salts=5000),
        lambda ground: cached_prefixes(ground.small, pairs=200, salts=50, same_salt=True),
        "the salt of the prefix cache forgets the tenant",
        ["requests that found what another had cached"],
    ),
    "times-of-prefixes": Proof(
        lambda _: times_of_prefixes(rounds=500),
        lambda _: times_of_prefixes(rounds=100, same_salt=True),
        "the salt of the prefix cache forgets the tenant",
        ["likelihood of times across tenants by chance"],
    ),
    "access": Proof(
        lambda ground: access(ground.folder()),
        lambda ground: access(ground.folder(), plugins=["reliability.plugins.open_routes"]),
        "every role may use every route",
        ["test_every_identity_gets_from_every_route_what_the_table_says"],
    ),
    "prefix-cache": Proof(
        lambda ground: prefix_cache(ground.folder()),
        lambda ground: prefix_cache(ground.folder(), useless=True),
        "the prefix cache finds nothing, and takes 2 ms for each token",
        [
            f"{name}, with the cache over without"
            for name in ("chat", "system_prompt", "system_prompt_at_once", "unlike_prompts")
        ],
    ),
    "ray": Proof(
        lambda ground: ray(ground.folder()),
        lambda ground: ray(ground.folder(), plugins=["reliability.plugins.losing_kill"]),
        "the newest task is lost when the replica is killed",
        ["test_a_killed_replica_takes_nothing_with_it_but_what_ran_on_it"],
    ),
    "fuzz-document": Proof(
        partial(fuzzed_document, cases=100_000, examples=300),
        lambda ground: fuzzed_document(ground, ODD_QUERY, UNDECLARED, cases=1000, examples=1),
        "a 500 for one odd query, and a status that the document does not know",
        ["5xx and requests without an answer", "statuses that are not declared"],
    ),
    "fuzz-sockets": Proof(
        partial(fuzzed_sockets, count=20_000),
        lambda ground: fuzzed_sockets(ground, ODD_HEADER, SILENT, GULLIBLE, count=1000),
        "a 500 for a header that is not ASCII, no answer to TRACE, and a Host with a"
        " slash that opens every route",
        ["5xx", "hangs", "let in without a key"],
    ),
    "fuzz-parsers": Proof(
        partial(fuzzed_parsers, executions=2_000_000),
        partial(fuzzed_parsers, executions=100_000, planted=True),
        "a KeyError for inputs with a character DEL",
        ["errors that are not declared"],
    ),
    **STRESS,
}
"""Name -> proof, in the order in which they run."""
