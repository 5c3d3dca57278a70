"""What was measured of the figures that are predicted: the names of both, and how they compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]
"""What a part measured, by the key of each figure."""
Results = Mapping[str, Figures]
"""The figures of all parts that ran."""

LORA = "lora in PyTorch"
LORAS = ", LoRAs"


def kernel_key(layer: str, tokens: int, mix: str = "distinct", *, loras: bool = False) -> str:
    """A layer of a model, such as `8B qkv`, in the part `kernels`; or the LoRAs beside it."""
    return f"{layer} T={tokens} {mix}{LORAS if loras else ''}"


def end_to_end_key(name: str, requests: int) -> str:
    """So many requests at once, to their end, in the part `engine`."""
    return f"{name}, graphs on, {requests} requests"


def decode_key(name: str, requests: int, *, graphs: bool = True) -> str:
    """Decode steps of so many requests, in the part `engine`."""
    return f"{name}, graphs {'on' if graphs else 'off'}, decode steps of {requests} requests"


def of_base(tasks: int) -> str:
    """A rate with so many distinct tasks over the rate without any."""
    return f"{tasks} of base"


def layer(results: Results, name: str, tokens: int, method: str) -> str:
    """The time of a layer of the 8B model with adapters, and its share of the roofline."""
    found = results.get("kernels", {}).get(kernel_key(f"8B {name}", tokens))
    return f"{found[method]['layer_of_roofline']}: {found[method]['layer_us']} µs" if found else ""


def engine(results: Results, method: str, tasks: int) -> str:
    """A method's rate with as many requests as tasks, over that without tasks."""
    figures, found = results.get("engine", {}), []
    if own := figures.get(decode_key(method, tasks)):
        found.append(f"{own[of_base(tasks)]}")
    if own := figures.get(end_to_end_key(method, tasks)):
        found.append(f"end to end {own[of_base(tasks)]}")
    return ", ".join(found)


def over_lora(results: Results, method: str, tasks: int) -> str:
    """A method's rate of decode steps, over that of LoRAs in plain PyTorch."""
    figures = results.get("engine", {})
    own, lora = (figures.get(decode_key(name, tasks)) for name in (method, LORA))
    if not own or not lora:
        return ""
    rate, of_lora = (each["tokens_per_second"][str(tasks)] for each in (own, lora))
    return f"{rate / of_lora:.2f}"


def over_peft_poly(results: Results) -> str:
    """The rows a second that poly trains, over PEFT's."""
    compared = results.get("training", {}).get("compared", {})
    return str(compared.get("poly", {}).get("of_peft_poly", ""))
