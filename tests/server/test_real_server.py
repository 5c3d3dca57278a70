"""`polyrex serve` as users run it: a process, the embedded engine, the real base model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from polyrex.adapters.files.examples import MAX_TOKENS, Example, read_examples
from polyrex.adapters.files.inventory import Inventory
from polyrex.server.launch.loading import shipped_inventory
from support.reliability.ports import reserved_port

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter

POLYREX = str(Path(sys.executable).with_name("polyrex"))
BINARY = {"content-type": "application/octet-stream"}
PROMPT = "The capital of France is"
BASE = "smollm2-135m-instruct"
QUESTION: ChatCompletionUserMessageParam = {
    "role": "user",
    "content": "What is the capital of France?",
}
TASKS = [f"task-{index}" for index in range(32)]


@dataclass
class Process:
    """A server process that is ready."""

    url: str
    popen: subprocess.Popen[str]
    client: httpx.Client
    output: Path

    def text(self, prompt: str = PROMPT, **fields: Any) -> str:
        """A greedy completion."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def openai(self) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@contextmanager
def serving(inventory: Path, folder: Path, *options: str) -> Iterator[Process]:
    """Run a server process until it is stopped or the context ends."""
    command = [POLYREX, "serve", "--inventory", str(inventory)]
    command += ["--tasks-dir", str(folder / "tasks"), *options]
    output = folder / "output"
    with (
        reserved_port() as port,
        output.open("w") as out,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
        subprocess.Popen(
            [*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, text=True
        ) as popen,
    ):
        try:
            while "curl" not in output.read_text():
                assert popen.poll() is None, output.read_text()
                time.sleep(0.1)
            yield Process(f"http://127.0.0.1:{port}", popen, client, output)
        finally:
            popen.kill()


@pytest.fixture(scope="module")
def server(
    random_inventory: Inventory,
    make_router: MakeRouter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Process]:
    """A server with 32 random tasks."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tasks").mkdir()
    for index, name in enumerate(TASKS):
        router = make_router(index, provenance={"example_prompt": "It's a test: 'quoted'"})
        (folder / "tasks" / f"{name}@1.safetensors").write_bytes(router)
    with serving(random_inventory.path, folder) as process:
        yield process


def test_the_official_client_completes_with_a_task(server: Process) -> None:
    with server.openai() as client:
        by_field = client.completions.create(
            model=BASE, prompt=PROMPT, temperature=0, max_tokens=8,
            extra_body={"task": "task-1"},
        )  # fmt: skip
        by_model = client.completions.create(
            model="task-1", prompt=PROMPT, temperature=0, max_tokens=8
        )
    expected = server.text(task="task-1")
    assert by_field.choices[0].text == by_model.choices[0].text == expected
    assert expected != server.text()


def test_the_official_client_streams_with_a_task(server: Process) -> None:
    with server.openai() as client:
        parts = client.completions.create(
            model="task-2", prompt=PROMPT, temperature=0, max_tokens=8, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        *chunks, last = list(parts)
    assert "".join(chunk.choices[0].text for chunk in chunks) == server.text(task="task-2")
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_the_official_client_chats(server: Process) -> None:
    with server.openai() as client:
        whole = client.chat.completions.create(
            model=BASE, messages=[QUESTION], temperature=0, max_tokens=8
        )
        parts = client.chat.completions.create(
            model=BASE, messages=[QUESTION], temperature=0, max_tokens=8, stream=True
        )
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert whole.choices[0].message.content == streamed
    assert "Paris" in streamed


def test_the_official_client_lists_models(server: Process) -> None:
    with server.openai() as client:
        assert {model.id for model in client.models.list()} >= {BASE, *TASKS}


def test_logprobs_are_those_of_the_text(server: Process) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, "logprobs": 2, "echo": True}
    choice = server.client.post("/v1/completions", json=body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])
    # Greedy decoding draws the likeliest token.
    for text, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[-4:]:
        assert max(top, key=top.get) == text
        assert top[text] == pytest.approx(logprob)


def test_tasks_that_come_and_go_leave_the_others_answers_alone(
    server: Process, make_router: MakeRouter
) -> None:
    alone = {name: server.text(task=name) for name in TASKS}

    def come_and_go(worker: int) -> None:
        for turn in range(3):
            name = f"guest-{worker}"
            for seed, method, path in (
                (100 + turn, "POST", f"/v1/tasks?name={name}"),
                (200 + turn, "PUT", f"/v1/tasks/{name}"),
            ):
                router = make_router(seed)
                answer = server.client.request(method, path, content=router, headers=BINARY)
                assert answer.status_code in (200, 201), answer.text
                server.text(task=name, max_tokens=2)
            assert server.client.delete(f"/v1/tasks/{name}").status_code == 200

    def ask(name: str) -> bool:
        return server.text(task=name) == alone[name]

    with ThreadPoolExecutor(len(TASKS) + 2) as pool:
        guests = [pool.submit(come_and_go, worker) for worker in range(2)]
        right = list(pool.map(ask, TASKS))
        for guest in guests:
            guest.result()
    assert all(right)
    assert len(set(alone.values())) > len(TASKS) / 2  # else a mix-up could go unnoticed


def test_a_new_version_answers_what_it_answers_from_cold(
    server: Process, make_router: MakeRouter
) -> None:
    def put(seed: int) -> str:
        router = make_router(seed)
        server.client.put("/v1/tasks/changing", content=router, headers=BINARY)
        return server.text(task="changing")

    first, second = put(0), put(2)
    assert first != second
    assert put(0) == first
    assert put(2) == second


@pytest.mark.parametrize(
    ("method", "path", "request_", "status"),
    [
        ("POST", "/v1/completions", {"json": {"prompt": "x", "task": "nobody"}}, 404),
        ("POST", "/v1/completions", {"json": {"prompt": "x", "field": 1}}, 400),
        ("POST", "/v1/tasks?name=bad", {"content": b"x" * 99, "headers": BINARY}, 422),
        ("POST", "/v1/tasks?name=big", {"content": b"x" * (2 << 20), "headers": BINARY}, 413),
    ],
)
def test_after_a_refusal_the_server_still_answers(
    server: Process, method: str, path: str, request_: dict[str, Any], status: int
) -> None:
    before = server.text(task="task-3")
    assert server.client.request(method, path, **request_).status_code == status
    assert server.text(task="task-3") == before


def paste(server: Process) -> Any:
    """The answer to the one command that the server printed."""
    (command,) = (line for line in server.output.read_text().split("\n") if "curl" in line)
    done = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_the_printed_command_works_when_pasted(server: Process) -> None:
    answer = paste(server)
    assert answer["model"] == "task-0"
    assert answer["choices"][0]["text"]


def gold_answer(example: Example) -> str:
    """The answer of the test row that the example's prompt was made of."""
    rows = Path(__file__).parents[2] / "training" / "rows" / "tasks" / f"{example.task}.jsonl"
    question = example.prompt.split("\n")[1]
    found = map(json.loads, rows.read_text().splitlines())
    (answer,) = {r["answer"] for r in found if (r["split"], r["input"]) == ("test", question)}
    assert isinstance(answer, str)
    return answer


def test_the_printed_examples_are_answered_as_they_say(base_path: str, tmp_path: Path) -> None:
    inventory = shipped_inventory(BASE)
    examples = read_examples(inventory)
    assert 2 <= len(examples) <= 3
    with serving(inventory, tmp_path) as server:
        printed = server.output.read_text()
        for example in examples:
            answer = server.text(example.prompt, max_tokens=MAX_TOKENS, task=example.task)
            base_answer = server.text(example.prompt, max_tokens=MAX_TOKENS)
            assert (answer.strip(), base_answer.strip()) == (example.answer, example.base_answer)
            assert example.answer == gold_answer(example)
            assert example.answer not in example.base_answer
            assert f"{example.task} " in printed
            assert example.answer in printed
        pasted = paste(server)
    assert pasted["model"] == examples[0].task
    assert pasted["choices"][0]["text"].strip() == examples[0].answer


def tasks_command(server: Process, *words: str) -> subprocess.CompletedProcess[str]:
    command = [POLYREX, "tasks", "--server", server.url, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tasks_command_adds_shows_lists_and_drops(
    server: Process, make_router: MakeRouter, tmp_path: Path
) -> None:
    file = tmp_path / "from-file.safetensors"
    file.write_bytes(make_router(400, description="from a file"))
    assert tasks_command(server, "add", str(file)).returncode == 0
    assert json.loads(tasks_command(server, "show", "from-file").stdout)["version"] == 1
    file.write_bytes(make_router(401))
    refused = tasks_command(server, "add", str(file))
    assert (refused.returncode, "exists" in refused.stderr) == (1, True)
    assert tasks_command(server, "add", "--replace", str(file)).returncode == 0
    assert "from-file" in tasks_command(server, "list").stdout
    assert tasks_command(server, "drop", "from-file").returncode == 0
    assert tasks_command(server, "show", "from-file").returncode == 1


def test_a_taken_port_is_told_before_anything_is_loaded(server: Process) -> None:
    port = server.url.rpartition(":")[2]
    command = [POLYREX, "serve", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "torch" not in done.stderr


def test_an_open_server_without_keys_is_refused() -> None:
    with reserved_port() as port:
        command = [POLYREX, "serve", "--host", "0.0.0.0", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--api-key-file" in done.stderr


def test_sigterm_lets_a_stream_end_and_the_process_with_it(
    random_inventory: Inventory, tmp_path: Path
) -> None:
    with serving(random_inventory.path, tmp_path, "--drain-seconds", "60") as process:
        body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "stream": True}
        with process.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(process.popen.pid, signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.popen.wait(60) == 0
        assert "leaked" not in process.output.read_text()  # as extension modules would say
