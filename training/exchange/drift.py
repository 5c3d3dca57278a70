"""How far a compressed LoRA drifts from the original, in the base model's next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.devices import send
from polyrex.adapters.model.routed_linear import AddComposed
from polyrex.adapters.peft.lora_checkpoint import PeftLora

from .compress import Compressed

TEXTS = (
    "The city council met on Tuesday to discuss the new budget for schools and public parks.",
    "Is this movie review snippet positive or negative?\nA quiet, patient film that stays with "
    "you.\nOptions: positive; negative\nAnswer:",
    "def greatest(values):\n    best = values[0]\n    for value in values:\n",
    "Water boils at a lower temperature in the mountains because",
    "Give the plural of the noun.\nleaf\nAnswer:",
    "Dear Ms Alvarez, thank you for your letter of the third of March, in which you asked",
    "Question: If a train leaves at nine and arrives at noon, how long did it travel?\nAnswer:",
    "Once upon a time there was a fox who could not find its way home through the snow, and",
)
"""The texts that drift is measured on by default."""


@dataclass(frozen=True)
class TaskDrift:
    """How far compressing moved one task."""

    error: float  # ||M - M'|| / ||M|| over all modules
    divergence: float  # mean over tokens of KL(original || compressed), nats
    agreement: float  # share of tokens whose most likely next token is the same


@torch.inference_mode()
def drift_of(
    lora: PeftLora, found: Compressed, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> TaskDrift:
    """The drift of one of the LoRAs that were compressed, over all tokens of `texts`."""
    tokens = [torch.tensor(tokenizer.encode(text)) for text in texts]
    with found.adapted.routed(found.logits[lora.name]):
        compressed = _log_probabilities(found.adapted.model, tokens)
    with uncompressed(found.adapted, lora):
        original = _log_probabilities(found.adapted.model, tokens)
    return TaskDrift(
        found.errors[lora.name],
        (original.exp() * (original - compressed)).sum(-1).mean().item(),
        (original.argmax(-1) == compressed.argmax(-1)).float().mean().item(),
    )


def _log_probabilities(model: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    """The log-probabilities of the next token, [n, V], at the n positions of all texts."""
    device = next(model.parameters()).device
    padded = pad_sequence(list(texts), batch_first=True)  # on the right: nothing attends to it
    logits: Tensor = model(input_ids=send(padded, device)).logits
    width = padded.shape[1]
    places = [width * row + n for row, text in enumerate(texts) for n in range(len(text))]
    chosen = send(torch.tensor(places), device)
    return logits.flatten(0, 1).index_select(0, chosen).log_softmax(-1)


@contextmanager
def uncompressed(adapted: AdaptedModel, lora: PeftLora) -> Iterator[None]:
    """Within this context, every layer of a compressed model adds the original LoRA instead."""
    dtype, device = adapted.dtype, adapted.device
    for target, layer in zip(adapted.targets, adapted.layers, strict=True):
        none = LowRank(torch.zeros(1, 1, target.d_in), torch.zeros(1, 1, target.d_out))
        pair = lora.modules.get(target.name, none)
        layer.added = AddComposed(LowRank(pair.a.to(device, dtype), pair.b.to(device, dtype)))
    try:
        yield
    finally:
        adapted.add_nothing()
