"""What the code may not do, whatever it is asked: run what it reads, or compare keys with `==`.

Every gate reads the product's source. What it forbids and finds all the same is named in ALLOWED,
with the reason; a name there that is not found any more fails as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "adapters", "server", "training")
PRODUCT = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = frozenset(
    {
        "cPickle",
        "cloudpickle",
        "code",
        "dill",
        "joblib",
        "jsonpickle",
        "marshal",
        "multiprocessing",
        "pickle",
        "pickletools",
        "runpy",
        "shelve",
    }
)
"""Modules that turn bytes into objects or code; multiprocessing does so between its processes."""

BUILTINS = frozenset({"__import__", "compile", "eval", "exec"})

CALLS = frozenset(
    {
        "os.popen",
        "os.system",
        "torch.hub.load",
        "torch.jit.load",
        "torch.load",
        "torch.package.PackageImporter",
        "torch.save",
        "yaml.full_load",
        "yaml.load",
        "yaml.unsafe_load",
    }
)
"""Calls that read or write pickles, or run text. There is no torch.load(weights_only=True): what is
kept are safetensors files, everywhere."""

ALLOWED = {
    ("training/study/run.py", "multiprocessing"): "one operator's own processes, without a server",
}
"""(file, what is found there) -> why that is no danger."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(source: str) -> Iterator[str]:
    """What a file does that could run, or unpickle, what it is given."""
    for node in ast.walk(ast.parse(source)):
        for name in imported(node):
            if name.partition(".")[0] in MODULES:
                yield name.partition(".")[0]
            if name in CALLS:
                yield name
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
        if dotted(node) in CALLS:
            yield dotted(node)
        if isinstance(node, ast.Call):
            yield from dangerous_arguments(node)


def dangerous_arguments(call: ast.Call) -> Iterator[str]:
    for name, harmless in (("trust_remote_code", False), ("shell", False), ("allow_pickle", False)):
        given = keyword(call, name)
        if given is not None and not is_constant(given, harmless):
            yield f"{name}={ast.unparse(given)}"
    if keyword(call, "weights_only") is not None:
        yield "weights_only"


def found_in_product() -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for path in PRODUCT:
        for danger in dangers(path.read_text()):
            place = (path.relative_to(ROOT).as_posix(), danger)
            found[place] = found.get(place, 0) + 1
    return found


def test_nothing_in_the_product_unpickles_or_runs_what_it_reads() -> None:
    assert set(found_in_product()) == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads as read", "pickle"),
        ("import numpy, marshal", "marshal"),
        ("from multiprocessing.connection import Client", "multiprocessing"),
        ("x = eval('1')", "eval"),
        ("run = exec", "exec"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("read = torch.load", "torch.load"),
        ("import os\nos.system('ls')", "os.system"),
        ("subprocess.run(command, shell=True)", "shell=True"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("AutoConfig.from_pretrained(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoConfig.from_pretrained(path, trust_remote_code=x)", "trust_remote_code=x"),
    ],
)
def test_the_gate_sees(source: str, danger: str) -> None:
    assert danger in set(dangers(source))


def test_the_gate_lets_through_what_is_harmless() -> None:
    harmless = (
        "import re\nfrom .pickle import x\nre.compile('a')\nmodel.eval()\n"
        "np.load(path, allow_pickle=False)\nf(trust_remote_code=False, shell=False)\n"
        "safetensors.torch.load(data)\n"
    )
    assert list(dangers(harmless)) == []


LOADERS = frozenset({"from_pretrained", "from_config"})


def undecided_loads(source: str) -> list[str]:
    """Calls that load a model, a config or a tokenizer, and do not say `trust_remote_code=False`.

    Where it is not said, transformers may ask on the terminal.
    """
    return [
        f"{node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and loads(node) and not says_no(node, source)
    ]


def loads(call: ast.Call) -> bool:
    """`X.from_pretrained(...)`, or the same by way of functools.partial."""
    functions = [call.func, *(call.args[:1] if dotted(call.func) == "partial" else [])]
    return any(isinstance(each, ast.Attribute) and each.attr in LOADERS for each in functions)


def says_no(call: ast.Call, source: str) -> bool:
    """The call says so itself, or unpacks a dictionary that is written out and does."""
    if is_constant(keyword(call, "trust_remote_code"), False):
        return True
    unpacked = {dotted(each.value) for each in call.keywords if each.arg is None}
    return any(
        re.search(rf"\b{name}\b[^=\n]*= \{{[^}}\n]*\"trust_remote_code\": False[^}}\n]*\}}", source)
        for name in unpacked
        if name
    )


def test_no_model_brings_code_of_its_own() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): calls
        for path in PRODUCT
        if (calls := undecided_loads(path.read_text()))
    }
    assert found == {}


def test_that_gate_sees_a_call_that_does_not_say() -> None:
    assert undecided_loads("AutoModel.from_pretrained(path)")
    assert undecided_loads("partial(kind.from_pretrained, path, config=config)")
    assert undecided_loads("load = {'x': 1}\nAutoModel.from_pretrained(path, **load)")
    assert not undecided_loads('load: X = {"trust_remote_code": False}\nA.from_config(c, **load)')


KNOW_KEYS = sorted(
    [
        ROOT / "server" / "http" / "access.py",
        ROOT / "server" / "http" / "auth.py",
        *(ROOT / "server" / "registry" / "tenants").rglob("*.py"),
    ]
)
"""The files that see keys, or the digests that they are known by."""

SECRET = re.compile(r"(^|_)(api_?keys?|authorization|bearer|digests?|nobody|secrets?|text)$")
"""Names of what is a key, or could be: of `authenticate(text)`, too."""

COMPARISONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)


def comparisons_of_keys(source: str) -> list[str]:
    """Comparisons of a key whose time could tell how much of it is right."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(operator, COMPARISONS) for operator in node.ops)
        and any(is_secret(each) for each in (node.left, *node.comparators))
    ]


def is_secret(node: ast.expr) -> bool:
    """A name, an attribute, or a call's function, that is one of a key."""
    inner = node.func if isinstance(node, ast.Call) else node
    return bool(SECRET.search(dotted(inner).rpartition(".")[2]))


def test_keys_are_compared_in_constant_time_alone() -> None:
    found = {path.name: comparisons_of_keys(path.read_text()) for path in KNOW_KEYS}
    assert {name: lines for name, lines in found.items() if lines} == {}
    used = [path.name for path in KNOW_KEYS if "hmac.compare_digest(" in path.read_text()]
    assert used == ["auth.py", "directory.py"]


@pytest.mark.parametrize(
    "source",
    [
        "digest(key) == known.digest",
        "if text in keys: pass",
        "api_key != given",
        "given in self._file_digests",
    ],
)
def test_that_gate_sees_other_comparisons(source: str) -> None:
    assert len(comparisons_of_keys(source)) == 1


def test_nobody_else_sees_keys() -> None:
    """Whoever hashes keys, or takes them apart, is among the files that the gate reads."""
    imports = re.compile(r"from [\w.]*secret_keys import")
    found = {path for path in (ROOT / "server").rglob("*.py") if imports.search(path.read_text())}
    assert found
    assert found <= set(KNOW_KEYS)


def test_the_image_runs_without_rights_and_says_when_it_is_ready() -> None:
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
    last = {line.split(" ", 1)[0]: line.split(" ", 1)[-1] for line in lines if line}
    assert int(last["USER"]) > 0  # a number: Kubernetes cannot tell who a name is
    assert "/state" in last["VOLUME"]
    assert "/readyz" in last["HEALTHCHECK"]
    assert "--api-key-file" in last["CMD"]
    assert "HF_HUB_OFFLINE=1" in last["ENV"]
    assert "PYTHONSAFEPATH=1" in last["ENV"]
    assert not [line for line in lines if line.startswith("ADD")]  # which would fetch addresses


def test_every_version_that_is_installed_is_exact() -> None:
    pins = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    assert len(pins) > 100
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin)] == []


AUDITED = """#!/bin/sh
case "$*" in
*known.txt) echo "{known}" ;;
*installed.txt) echo "{installed}"; exit {status} ;;
esac
"""


@pytest.mark.parametrize(
    ("known", "status", "said"),
    [
        ("jinja2 2.4.1 PYSEC-2014-8 2.7.2", 0, "No known vulnerabilities"),
        ("jinja2 2.4.1 PYSEC-2014-8 2.7.2", 1, "urllib3 1.0 CVE-1"),
        ("jinja2 could not be audited: not found", 0, "nothing was audited"),
        ("Could not connect to PyPI's vulnerability feed", 0, "nothing was audited"),
    ],
)
def test_an_audit_passes_only_where_somebody_looked(
    tmp_path: Path, known: str, status: int, said: str
) -> None:
    """A script plays pip-audit."""
    (tmp_path / "python").symlink_to(sys.executable)
    tool = tmp_path / "pip-audit"
    tool.write_text(AUDITED.format(known=known, installed=said, status=status))
    tool.chmod(0o700)
    done = subprocess.run(
        [ROOT / ".ci" / "audit", tmp_path, "torch==2.13.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (known.startswith("jinja2 2") and not status)
