"""The examples run against a real server, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 80


def run(name: str, server: str, *options: str) -> str:
    """What an example prints; it must succeed."""
    command = [sys.executable, str(EXAMPLES / name), "--server", server, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < MOST_LINES


def test_openai_client(shipped_server_url: str) -> None:
    printed = run("openai_client.py", shipped_server_url)
    assert re.search(r"plural +wolf +wolves +The answer is: wolf", printed)
    assert re.search(r"past_tense +sing +sang ", printed)
    assert "streamed, question_form: is the dog sleeping\n" in printed
    assert "unknown task: no such model or task" in printed


def test_new_task(shipped_server_url: str) -> None:
    printed = run("new_task.py", shipped_server_url)
    assert "step 24 of 24" in printed
    assert re.search(r"live: comparative, version \d+, [78],\d+ bytes", printed)
    answers = dict(re.findall(r"^(\w+) +(\w+) +base model: ", printed, re.MULTILINE))
    expected = {"long": "longer", "clean": "cleaner", "heavy": "heavier", "brave": "braver"}
    assert answers.keys() == expected.keys()
    assert sum(answers[word] == expected[word] for word in expected) >= 3, printed


def test_many_tasks(shipped_server_url: str) -> None:
    printed = run("many_tasks.py", shipped_server_url, "--tasks", "12")
    assert re.search(r"registered 12 tasks of 7,\d+ bytes, [\d.]+ ms each", printed)
    rates = re.findall(r"^(12 tasks|one task|no task) +([\d.]+) tokens/s", printed, re.MULTILINE)
    assert [label for label, _ in rates] == ["12 tasks", "one task", "no task"]
    assert all(float(rate) > 0 for _, rate in rates)
