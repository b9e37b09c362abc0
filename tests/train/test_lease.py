"""Who may write into a run folder, when the file system has bad moments."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data_shards.files import write_json
from dist_train.errors import UserError
from dist_train.train import lease
from dist_train.train.lease import Lease


@pytest.fixture
def held(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_SECONDS_BETWEEN_LOOKS", -1.0)
    mine = Lease(tmp_path)
    mine.take()
    return mine


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT, errno.EACCES])
def test_a_look_that_fails_ends_no_run(held, tmp_path, monkeypatch, number):
    def fails(path):
        raise OSError(number, "a bad moment", str(path))

    with monkeypatch.context() as moment:
        moment.setattr(Path, "read_bytes", fails)
        assert not held.lost
        held.check()
    assert not held.lost
    Lease(tmp_path).take()
    assert held.lost


@pytest.mark.parametrize("torn", [None, b"", b'{"id": "x"', b"[]"])
def test_a_lease_that_is_gone_or_torn_is_nobody_elses(held, torn):
    held.path.unlink()
    if torn is not None:
        held.path.write_bytes(torn)
    assert not held.lost
    held.check()


def test_anothers_id_ends_it_for_good(held, tmp_path):
    write_json(held.path, {"id": "another", "job": "12", "start": 3, "host": "n2", "pid": 77})
    assert held.lost
    with pytest.raises(UserError, match="now written by job 12, start 3, process 77 on n2; this process ends"):
        held.check()
    held.path.unlink()
    assert held.lost  # once seen
