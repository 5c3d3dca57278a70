"""Chooses the examples that `polyrex serve` prints, and writes them beside an inventory.

    python -m polyrex.training.evaluation.examples --inventory FILE --data FOLDER --out FILE

An example is a test row that the task's router answers correctly and the base model does not.
Decoding is greedy, in float32 unless told otherwise, as the server does it for a request with
temperature 0.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.examples import MAX_TOKENS, Example, write_examples
from polyrex.adapters.files.inventory import load_experts
from polyrex.adapters.files.router import Router
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import (
    DEFAULT_BASE,
    load_base,
    load_tokenizer,
    resolve_base,
    torch_dtype,
)
from polyrex.adapters.model.devices import pick_device
from polyrex.training.data.tasks import Task, load_tasks, prompt_of

TASKS = ("past_tense", "question_form", "date_words")
"""Tasks whose answers anybody can judge at a glance."""

logger = logging.getLogger(__name__)


def choose_example(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    router: Router,
    *,
    tried: int,
) -> Example | None:
    """The shortest prompt that the router answers correctly and the base model visibly gets wrong.

    Only the `tried` shortest test prompts are looked at. The base model's answer must be visible:
    one that is empty convinces nobody.
    """
    rows = sorted(task.rows["test"], key=lambda row: len(prompt_of(task.instruction, row)))[:tried]
    for row in rows:
        prompt = prompt_of(task.instruction, row)
        with adapted.routed(router.logits):
            answer = _greedy(adapted, tokenizer, prompt)
        if answer != row.answer:
            continue
        with adapted.routed(None):
            base_answer = _greedy(adapted, tokenizer, prompt)
        if base_answer and answer.lower() not in base_answer.lower():
            return Example(task.name, router.sha256, prompt, answer, base_answer)
    return None


@torch.inference_mode()
def _greedy(adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    base: Any = adapted.model
    ids = torch.tensor([tokenizer.encode(prompt)], device=adapted.device)
    out = base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def examples(
    bundle: Bundle,
    data: Path,
    names: Sequence[str],
    *,
    base: str,
    tried: int,
    dtype: str = "float32",
    device: str = "auto",
) -> Iterator[Example]:
    """One example for each task that has one; a task without is logged."""
    place = pick_device(device)
    tasks = {task.name: task for task in load_tasks(data, names)}
    path = resolve_base(base)
    tokenizer = load_tokenizer(path)
    adapted = load_experts(bundle.inventory, load_base(path, torch_dtype(dtype), place))
    for name in names:
        found = choose_example(adapted, tokenizer, tasks[name], bundle.router(name), tried=tried)
        if found is None:
            logger.warning("%s: no example among its %d shortest prompts", name, tried)
        else:
            yield found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inventory", type=Path, required=True, help="with its routers beside it")
    parser.add_argument("--data", type=Path, required=True, help="the folder of rows")
    parser.add_argument("--out", type=Path, required=True, help="examples.json")
    parser.add_argument("--base", default=DEFAULT_BASE, help="the base model")
    parser.add_argument("--task", action="append", help="repeat for more, in the order printed")
    parser.add_argument("--tried", type=int, default=120, help="prompts to try for each task")
    parser.add_argument("--dtype", default="float32", help="data type that the model computes in")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    bundle = Bundle.read(options.inventory)
    names = options.task or TASKS
    found = list(
        examples(
            bundle,
            options.data,
            names,
            base=options.base,
            tried=options.tried,
            dtype=options.dtype,
            device=options.device,
        )
    )
    write_examples(options.out, found)
    for example in found:
        print(f"{example.prompt}\n  {example.task}: {example.answer}")
        print(f"  the base model: {example.base_answer!r}\n")


if __name__ == "__main__":
    main()
