"""Shapes of decoder models, which decide memory and the cost of a step.

A model is a stack of equal layers with seven projections each: q, k, v and o of the attention, and
gate, up and down of the feed-forward. Projections of the same input run as one packed product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """Linear layers that read the same input of size d_in, and the output size of each."""

    name: str
    d_in: int
    outputs: tuple[int, ...]

    @property
    def sides(self) -> int:
        """The sum of d_in + d_out over the layers: the size of their adapters of rank 1."""
        return len(self.outputs) * self.d_in + sum(self.outputs)


@dataclass(frozen=True)
class ModelShape:
    """The sizes in a decoder's config. Norms and biases, under 0.1 % of a model, are left out."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the LM head is the embedding

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The packed projections of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Projection("qkv", self.hidden, (queries, keys, keys)),
            Projection("o", queries, (self.hidden,)),
            Projection("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            Projection("down", self.intermediate, (self.hidden,)),
        )

    @property
    def modules(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of every target module of the model."""
        layer = tuple((p.d_in, d_out) for p in self.projections for d_out in p.outputs)
        return layer * self.layers

    @property
    def sides(self) -> int:
        """The sum of d_in + d_out over all target modules."""
        return self.layers * sum(projection.sides for projection in self.projections)

    @property
    def parameters(self) -> int:
        """The count of numbers in the base model's matrices."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + sum(d_in * d_out for d_in, d_out in self.modules)

    @property
    def kv_numbers(self) -> int:
        """The count of numbers in the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


MODELS = {
    "HuggingFaceTB/SmolLM2-135M": ModelShape(30, 576, 1536, 9, 3, 64, 49152, True),
    "Qwen/Qwen2.5-0.5B": ModelShape(24, 896, 4864, 14, 2, 64, 151936, True),
    "meta-llama/Llama-3.2-1B": ModelShape(16, 2048, 8192, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B": ModelShape(28, 3072, 8192, 24, 8, 128, 128256, True),
    "mistralai/Mistral-7B-v0.3": ModelShape(32, 4096, 14336, 32, 8, 128, 32768, False),
    "Qwen/Qwen2.5-7B": ModelShape(28, 3584, 18944, 28, 4, 128, 152064, False),
    "meta-llama/Llama-3.1-8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False),
    "meta-llama/Llama-3.1-70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, False),
}
