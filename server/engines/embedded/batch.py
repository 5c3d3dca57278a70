"""The tokens of one forward pass, and the rows of its logits that each request reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .generation import Generation
from .paged_cache import Span


@dataclass(frozen=True)
class LogitRows:
    """The rows of a batch's logits that belong to one of its spans."""

    scored: slice  # the rows that score tokens of the prompt
    following: Sequence[int]  # the tokens that they score
    last: int | None
    """The row to draw the next token from; None while tokens of the request are still pending."""


@dataclass(frozen=True)
class Batch:
    """One row of T tokens of many requests, of which n tokens get logits."""

    spans: Sequence[Span[Generation]]
    rows: list[LogitRows]  # of each span
    tokens: list[int]  # [T]
    positions: list[int]  # [T], each in its own request
    slots: list[int]  # [T], of the routing table
    kept: list[int]  # [n], the tokens that get logits

    @property
    def only_decodes(self) -> bool:
        """Whether every token is the last of its request, from which the next one is drawn."""
        one_each = len(self.tokens) == len(self.spans)
        return one_each and all(own.last is not None for own in self.rows)

    @classmethod
    def pack(cls, spans: Sequence[Span[Generation]]) -> Batch:
        """Put the tokens of the spans in one row, in the order of the spans."""
        rows: list[LogitRows] = []
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kept: list[int] = []
        for span in spans:
            generation, count = span.request, span.count
            start, end = generation.computed, generation.computed + count
            shift = len(tokens) - start  # from a position of the request to its place in the row
            scored, first = generation.unscored(count), len(kept)
            kept += [shift + position for position in scored]
            last, ready = len(kept), end == len(generation.tokens)
            if ready:
                kept.append(shift + end - 1)
            following = generation.tokens[scored.start + 1 : scored.stop + 1]
            rows.append(LogitRows(slice(first, last), following, last if ready else None))
            tokens += generation.tokens[start:end]
            positions += range(start, end)
            slots += [generation.slot] * count
        return cls(spans, rows, tokens, positions, slots, kept)
