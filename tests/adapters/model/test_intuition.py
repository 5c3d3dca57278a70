"""T-REX's intuition: from a text to gates, and through files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.errors import FileError, MalformedFile, SpecError, TensorMismatch
from polyrex.adapters.files.inventory import FORMAT, load_experts, read_inventory, write_inventory
from polyrex.adapters.files.tensor_file import parse, serialise
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec, TargetModule

MakeModel = Callable[..., nn.Module]
SPEC = AdapterSpec("trex", rank=3, rank_out=2, granularity="model", intuition=4)
ENCODER = EncoderIdentity("small", 5, "0" * 64)


def drawn(spec: AdapterSpec = SPEC) -> Intuition:
    generator = torch.Generator().manual_seed(2)
    centroids = torch.randn(spec.intuition or 0, 5, generator=generator)
    intuition = Intuition(nn.functional.normalize(centroids), ENCODER, spec.gates)
    intuition.reset(generator)
    return intuition


@pytest.fixture
def adapted(make_model: MakeModel) -> AdaptedModel:
    model = make_model()
    return attach(model, SPEC, find_targets(model), intuition=drawn())


def test_texts_alike_have_embeddings_alike() -> None:
    """The cosines of the packaged model's card, of its own example."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person"]
    embeddings = SentenceEncoder().embed([*texts, "Today is a sunny day"])
    cosines = embeddings[1:] @ embeddings[0]
    assert cosines.tolist() == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-3)


def test_embedding_does_not_depend_on_the_batch() -> None:
    encoder = SentenceEncoder()
    texts = ["A short one.", "A text that is longer than the other one, by some words."]
    together = encoder.embed(texts)
    apart = torch.cat([encoder.embed([text]) for text in texts])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_unknown_encoder_is_an_error() -> None:
    with pytest.raises(FileError, match="sentence encoder no/such-folder"):
        SentenceEncoder("no/such-folder")


def test_intuition_is_the_cosines_with_centroids_and_gates_their_map() -> None:
    intuition = drawn()
    embedding = nn.functional.normalize(torch.randn(2, 5))
    found = intuition.of(embedding)
    expected = torch.stack([(intuition.centroids * e).sum(-1) for e in embedding])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(intuition.gates(found)[1], intuition.map @ found[1])


def test_map_begins_with_the_identity_where_counts_agree() -> None:
    intuition = drawn(replace(SPEC, intuition=6))
    assert torch.equal(intuition.map, torch.eye(6))


def test_router_is_one_row_of_cosines_for_all_modules(adapted: AdaptedModel) -> None:
    assert adapted.routing_shape() == (1, 4)
    cosines = torch.randn(1, 4)
    rows = adapted.route(cosines)
    assert rows.shape == (len(adapted.targets), 1 + 6)
    assert adapted.intuition is not None
    for row in rows:  # the switch, then the gates
        torch.testing.assert_close(row[1:], adapted.intuition.gates(cosines)[0])


def test_intuition_survives_the_file(
    adapted: AdaptedModel, make_model: MakeModel, tmp_path: Path
) -> None:
    write_inventory(tmp_path / "i.safetensors", adapted)
    inventory = read_inventory(tmp_path / "i.safetensors")
    again = load_experts(inventory, make_model())
    assert again.intuition is not None
    assert again.intuition.encoder == ENCODER
    cosines = torch.randn(1, 4)
    torch.testing.assert_close(again.route(cosines), adapted.route(cosines))
    torch.testing.assert_close(inventory.route(cosines), adapted.route(cosines))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors, metadata: metadata.pop("encoder"), MalformedFile),
        (lambda tensors, metadata: tensors.pop("intuition.map"), TensorMismatch),
        (
            lambda tensors, metadata: tensors.update({"intuition.map": torch.zeros(6, 3)}),
            TensorMismatch,
        ),
    ],
    ids=["no encoder", "no map", "another map"],
)
def test_damaged_intuition_is_refused(
    adapted: AdaptedModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], object],
    error: type[Exception],
) -> None:
    path = tmp_path / "i.safetensors"
    write_inventory(path, adapted)
    file = parse(path.read_bytes(), "file", FORMAT, 1 << 20)
    tensors, metadata = dict(file.values), dict(file.metadata)
    change(tensors, metadata)
    path.write_bytes(serialise(tensors, metadata))
    with pytest.raises(error):
        read_inventory(path)


@pytest.mark.parametrize(
    "spec",
    [replace(SPEC, granularity="module"), replace(SPEC, form="static", rank_out=None)],
    ids=["by module", "static"],
)
def test_intuition_needs_one_row_and_gates(spec: AdapterSpec) -> None:
    with pytest.raises(SpecError, match="intuition needs granularity=model"):
        make_experts(spec, TargetModule("layer", 4, 4))


def test_spec_and_intuition_must_agree(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(SpecError, match="intuition of 4 centroids, got None"):
        attach(model, SPEC, find_targets(model))
