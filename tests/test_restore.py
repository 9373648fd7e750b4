"""After a restore, cursors of the lost database do not count as places in the restored one."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import Service, append
from resume_stream.app import main
from wire import Stream, generation


def told_after(service: Service, cursor: str) -> bytes:
    with Stream(service, f"/threads/t/stream?after={cursor}&idle_timeout=0.05") as stream:
        return stream.rest()


def is_told_to_begin_anew(service: Service, cursor: str, *texts: str) -> bool:
    told = told_after(service, cursor)
    assert all(f'"content":"{text}"'.encode() in told for text in texts)
    return b"event: reset\n" in told


def by_restore(db: Path, copy: Path) -> None:
    assert main(["restore", "--db", str(db), str(copy)]) == 0


def by_hand(db: Path, copy: Path) -> None:
    for rest in ("-wal", "-shm"):
        Path(f"{db}{rest}").unlink(missing_ok=True)
    shutil.copy(copy, db)


@pytest.mark.parametrize("put_back", [by_restore, by_hand])
def test_a_cursor_from_before_a_restore_is_told_to_begin_anew(
    service: Service, client: httpx.Client, tmp_path: Path, put_back: Callable[[Path, Path], None]
) -> None:
    copy = tmp_path / "copy.db"
    append(client, "t", "m", "one")
    assert main(["backup", "--db", str(service.db), str(copy)]) == 0
    append(client, "t", "m", "two, which is lost")
    cursor = f"{generation(client, 't')}-2"
    service.end()
    put_back(service.db, copy)
    service.start()
    assert append(client, "t", "m", "another two").json()["seq"] == 2
    assert is_told_to_begin_anew(service, cursor, "one", "another two")
    now = f"{generation(client, 't')}-2"
    service.restart()
    assert not is_told_to_begin_anew(service, now)  # once is enough


def test_a_plain_copy_of_the_file_is_restored_too(service: Service, client: httpx.Client, tmp_path: Path) -> None:
    append(client, "t", "m", "one")
    service.end()
    shutil.copy(service.db, tmp_path / "plain.db")
    service.start()
    append(client, "t", "m", "two, which is lost")
    cursor = f"{generation(client, 't')}-2"
    service.kill()  # it leaves a WAL, which must not be taken for one of the restored file
    by_restore(service.db, tmp_path / "plain.db")
    service.start()
    append(client, "t", "m", "another two")
    assert is_told_to_begin_anew(service, cursor, "one", "another two")
    assert service.db.stat().st_mode & 0o777 == 0o600


def test_a_restore_refuses_a_served_database_and_a_damaged_copy(
    service: Service, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(client, "t", "m", "one")
    copy = tmp_path / "copy.db"
    assert main(["backup", "--db", str(service.db), str(copy)]) == 0
    assert main(["restore", "--db", str(service.db), str(copy)]) == 1
    assert "is already served" in capsys.readouterr().err
    service.end()
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as edited:
        edited.execute("update messages set chunk_count = 7")
    assert main(["restore", "--db", str(service.db), str(copy)]) == 1
    assert "is not sound" in capsys.readouterr().err
    service.start()
    assert client.get("/threads/t/content").json()["content"] == "one"


@pytest.mark.parametrize(("synchronous", "begins_anew"), [("NORMAL", True), ("FULL", False)])
def test_after_a_kill_only_synchronous_full_keeps_cursors(
    start_service: Callable[..., Service], synchronous: str, begins_anew: bool
) -> None:
    service = start_service("--synchronous", synchronous)
    with httpx.Client(base_url=service.api) as client:
        append(client, "t", "m", "one")
        cursor = f"{generation(client, 't')}-1"
        service.restart()
        append(client, "t", "m", "two")
        assert is_told_to_begin_anew(service, cursor, "two") == begins_anew
        cursor = f"{generation(client, 't')}-1"
        service.end()
        service.start()
        assert not is_told_to_begin_anew(service, cursor, "two")
