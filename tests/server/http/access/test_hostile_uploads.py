"""Uploads that would run code wherever somebody unpickled or unpacked them: nothing runs."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from support.fake_server import Serve, Served

BINARY = "application/octet-stream"


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._marker,)


def bombs(marker: Path) -> Mapping[str, bytes]:
    """What files of other formats look like that run code when they are loaded."""
    saved, archive, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": Bomb(marker)}, saved)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../router.safetensors", pickle.dumps(Bomb(marker)))
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))
    np.save(array, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    pickled = pickle.dumps(Bomb(marker))
    return {
        "pickle": pickled,
        "old pickle": pickle.dumps(Bomb(marker), protocol=0),
        "torch.save": saved.getvalue(),
        "zip": archive.getvalue(),
        "numpy": array.getvalue(),
        "safetensors that hold one": len(pickled).to_bytes(8, "little") + pickled,
        "yaml": f"!!python/object/apply:pathlib.Path.touch [{marker}]".encode(),
    }


def test_the_bombs_go_off(tmp_path: Path) -> None:
    made = bombs(tmp_path / "marker")
    for name in ("pickle", "old pickle"):
        pickle.loads(made[name])
        (tmp_path / "marker").unlink()
    torch.load(io.BytesIO(made["torch.save"]), weights_only=False)
    (tmp_path / "marker").unlink()
    np.load(io.BytesIO(made["numpy"]), allow_pickle=True)
    assert (tmp_path / "marker").exists()


def test_no_upload_is_loaded_as_anything_but_a_router(served: Served, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    answers = {
        name: served.client.put(
            "/v1/tasks/bomb", content=data, headers={"content-type": BINARY}
        ).status_code
        for name, data in bombs(marker).items()
    }
    assert set(answers.values()) == {422}
    assert served.client.get("/v1/tasks/bomb").status_code == 404
    assert not marker.exists()


@pytest.mark.parametrize(
    "kind",
    [
        *("application/x-pickle", "application/zip", "application/x-pytorch", "application/yaml"),
        *("application/python-pickle", "multipart/form-data; boundary=x", "text/plain"),
        "application/x-www-form-urlencoded",
    ],
)
def test_other_content_types_are_not_read(served: Served, tmp_path: Path, kind: str) -> None:
    data = bombs(tmp_path / "marker")["pickle"]
    for method, path in (
        ("PUT", "/v1/tasks/bomb"),
        ("POST", "/v1/tasks"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/tasks/bomb/fit"),
        ("POST", "/v1/tenants"),
    ):
        answer = served.client.request(method, path, content=data, headers={"content-type": kind})
        assert answer.status_code in (400, 415), (method, path, answer.text)
    assert not (tmp_path / "marker").exists()


def test_no_body_is_unpacked(served: Served) -> None:
    """A compressed body is bytes like any other: it cannot grow."""
    packed = gzip.compress(bytes(1 << 20))
    for kind, statuses in ((BINARY, {415, 422}), ("application/json", {400, 415})):
        headers = {"content-type": kind, "content-encoding": "gzip"}
        answer = served.client.put("/v1/tasks/bomb", content=packed, headers=headers)
        assert answer.status_code in statuses


def test_no_file_of_the_folder_of_routers_is_loaded_as_anything_else(
    serve: Serve, tmp_path: Path
) -> None:
    folder, marker = tmp_path / "loras", tmp_path / "marker"
    folder.mkdir()
    served = serve(lora_dir=folder)
    names = ("adapter_model.bin", "router.pt", "router.pkl", "router.safetensors")
    for data in bombs(marker).values():
        for name in names:
            (folder / name).write_bytes(data)
            body = {"lora_name": "bomb", "lora_path": name}
            assert served.client.post("/v1/load_lora_adapter", json=body).status_code == 422
    assert served.client.get("/v1/tasks/bomb").status_code == 404
    assert not marker.exists()
