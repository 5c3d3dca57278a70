"""Ask a polyrex server with the official OpenAI client: a task per request, and streaming.

python examples/openai_client.py --server http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse

import openai

QUESTIONS = [
    ("plural", "Give the plural of the noun.\nwolf\nAnswer:"),
    ("past_tense", "Give the past tense of the verb.\nsing\nAnswer:"),
    ("question_form", "Turn the statement into a question.\nthe dog is sleeping\nAnswer:"),
    ("trec6", "What kind of answer does this question ask for?\nWho wrote Hamlet ?\n"
     "Options: ABBR; DESC; ENTY; HUM; LOC; NUM\nAnswer:"),
]  # fmt: skip


def complete(client: openai.OpenAI, model: str, prompt: str) -> str:
    """The likeliest answer of a model or task, on one line."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
    return " ".join(answer.choices[0].text.split()) or "(nothing)"


def stream(client: openai.OpenAI, base: str, task: str, prompt: str) -> None:
    """Print an answer while it is made. The task is a field beside OpenAI's own."""
    parts = client.completions.create(
        model=base, prompt=prompt, max_tokens=16, temperature=0, stream=True,
        extra_body={"task": task},
    )  # fmt: skip
    print(f"streamed, {task}:", end="", flush=True)
    for part in parts:
        print(part.choices[0].text, end="", flush=True)
    print()


def main() -> None:
    """Answer every question by its task and by the base model; stream one; meet an error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--key", default="none", help="an API key, where the server asks for one")
    options = parser.parse_args()
    with openai.OpenAI(base_url=f"{options.server}/v1", api_key=options.key) as client:
        base = client.models.list().data[0].id  # the base model comes first, then its tasks
        print(f"{'task':<15}{'question':<22}{'its answer':<24}{base}")
        for task, prompt in QUESTIONS:
            by_task, by_base = complete(client, task, prompt), complete(client, base, prompt)
            print(f"{task:<15}{prompt.splitlines()[1]:<22}{by_task:<24}{by_base}")
        stream(client, base, *QUESTIONS[2])
        try:
            complete(client, "no-such-task", "Hello")
        except openai.NotFoundError as error:
            body = error.body
            print("unknown task:", body.get("message") if isinstance(body, dict) else error)


if __name__ == "__main__":
    main()
