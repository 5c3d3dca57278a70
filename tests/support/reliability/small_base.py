"""A tiny base model with a tokenizer, an inventory for it, and routers in any number."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polyrex.adapters.files.inventory import Inventory, read_inventory
from polyrex.adapters.spec import AdapterSpec
from support.random_inventory import make_inventory, random_router
from support.small_model import VOCABULARY, write_small_model

SPEC = AdapterSpec("tensorpoly-1", rank=4, experts=4)

_PLACES = 1 << 12
"""Values of each of the two numbers that make a router distinct: a float32 holds them exactly."""


@dataclass(frozen=True)
class SmallBase:
    """A folder in Hugging Face's format, and the file of an inventory of its model."""

    base: Path
    inventory: Path

    @classmethod
    def write(cls, folder: Path) -> SmallBase:
        """Write both under `folder`."""
        small = cls(folder / "base", folder / "inventory.safetensors")
        write_small_model(small.base)
        _tokenizer().save_pretrained(small.base)
        make_inventory(small.inventory, str(small.base), SPEC, spread=0.4)
        return small

    def read_inventory(self) -> Inventory:
        """The inventory."""
        return read_inventory(self.inventory)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words that are joined without a space: the first sixteen are the hexadecimal digits."""
    words = [f"{digit:x}" for digit in range(16)]
    words += [f"<{number}>" for number in range(16, VOCABULARY)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    chat = "{% for message in messages %}{{ message.content }} {% endfor %}"
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, chat_template=chat
    )
    return made


class Routers:
    """Distinct routers of one inventory, as fast as bytes can be copied."""

    def __init__(self, inventory: Inventory) -> None:
        # The last two of its numbers are replaced: everything else, and so the header, stays.
        self._kept = random_router(inventory, 0, "reliability")[:-8]

    def __call__(self, number: int) -> bytes:
        """The router of this number, from 0 to 2^24 - 1: no two have the same bytes."""
        high, low = divmod(number, _PLACES)
        return self._kept + struct.pack("<ff", high / 1024, low / 1024)


def resident_bytes(pid: int) -> int:
    """The anonymous memory of a process, with what was swapped out of it."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap"))


def quiet_threads() -> dict[str, str]:
    """The environment of a process whose threads do not take the cores from others."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
