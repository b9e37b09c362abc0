"""What a checkpoint's manifest has to hold, whatever its checksum says."""

from __future__ import annotations

import pytest

from data_shards.files import FileRecord, file_xxh64, write_json

STATE = {
    "loader": {"step": 3}, "objective": {}, "guard": {}, "drafter": {}, "probe_loss": 1.5, "tokenizer": "0",
    "target": None,
}  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    """Path and content of a whole checkpoint's."""
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"abc")
    record = FileRecord(bytes=3, xxh64=file_xxh64(folder / "a.safetensors")).model_dump()
    content = {"step": 3, "world_size": 2, "updates": 3, "state": STATE, "files": {"a.safetensors": record}}
    write_json(folder / "manifest.json", content)
    return folder / "manifest.json", content


def test_a_whole_one_is_listed(command, tmp_path, manifest):
    code, said, _ = command("checkpoint", "verify", tmp_path)
    assert code == 0 and "written by 2 ranks  whole" in said


@pytest.mark.parametrize("action", ["ls", "verify"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"files": 0.5}, "files: "),
        ({"files": {"a.safetensors": {"bytes": "3", "xxh64": ""}}}, "files.a.safetensors.bytes: "),
        ({"world_size": "2"}, "world_size: "),
        ({"state": None}, "state: "),
        ({"state": {**STATE, "target": {"path": 7}}}, "state.target.path: "),
    ],
)
def test_one_of_another_form_is_named(command, tmp_path, manifest, action, change, told):
    path, content = manifest
    write_json(path, {**content, **change})
    code, said, complaint = command("checkpoint", action, tmp_path)
    assert (code, complaint) == (1, "")
    assert f"{path}: not as this version writes it: {told}" in said


def test_a_newest_one_whose_name_is_torn_is_found_all_the_same(tmp_path, manifest):
    from dist_train.models.drafter import find_model

    folder = manifest[0].parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for torn in (b"\xc2step", b"", b".", b"x" * 5000):
        (tmp_path / "checkpoints" / "latest").write_bytes(torn)
        assert find_model(tmp_path) == folder
