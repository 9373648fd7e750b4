"""Each fault, briefly. ``python -m tests.faults`` tries them at length, with the same code."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import why_no_redis

from . import clock, crowd, disk, fuzz, heavy, instances, kill, power
from .base import Verdict


def expect_sound(found: Verdict | Coroutine[Any, Any, Verdict]) -> None:
    verdict = found if isinstance(found, Verdict) else asyncio.run(found)
    if not verdict.tried and verdict.is_sound:
        pytest.skip("this machine does not let us")
    assert verdict.is_sound, "\n".join([str(verdict), *verdict.broken[:10]])


def test_sigkill_under_load_loses_nothing(tmp_path: Path) -> None:
    expect_sound(kill.survive_kills(tmp_path, kills=2, producers=6, readers=8, longest=0.4))


@pytest.mark.skipif(bool(why_no_redis()), reason=why_no_redis())
def test_instances_and_redis_killed_under_load_lose_nothing(tmp_path: Path) -> None:
    faults = [(instances.kill_an_instance, 1), (instances.kill_redis, 1), (instances.fill_redis, 1)]
    size = {"instances": 2, "producers": 3, "readers": 4, "longest": 0.2}
    expect_sound(instances.survive_on_redis(tmp_path, faults=faults, **size))


@pytest.mark.skipif(bool(power.why_not()), reason=power.why_not())
def test_a_power_cut_loses_nothing_that_anybody_was_told_of(tmp_path: Path) -> None:
    expect_sound(power.survive_power_cuts(tmp_path, cuts=25, appends=10))


def test_a_full_disk_is_used_again_once_there_is_room(tmp_path: Path) -> None:
    expect_sound(disk.survive_full_disk(tmp_path, times=1))


def test_a_read_only_file_system_is_refused_in_one_line(tmp_path: Path) -> None:
    expect_sound(disk.survive_read_only(tmp_path))


@pytest.mark.skipif(bool(power.why_not()), reason=power.why_not())
def test_a_disk_that_fails_for_a_while_loses_nothing(tmp_path: Path) -> None:
    expect_sound(disk.survive_failing_disk(tmp_path, errors=("EIO",), calls=("fdatasync",)))


def test_a_damaged_file_is_refused_or_served_as_well_as_sqlite_can_know(tmp_path: Path) -> None:
    expect_sound(disk.survive_damage(tmp_path, places=10))


def test_a_file_that_is_taken_away_takes_nothing_acknowledged_later_with_it(tmp_path: Path) -> None:
    expect_sound(disk.survive_taken_away(tmp_path, disk.TAKEN_AWAY[:1]))


@pytest.mark.parametrize("step", [-clock.HOUR, clock.DAY], ids=["back an hour", "forward a day"])
def test_the_clock_may_be_set(tmp_path: Path, step: int) -> None:
    expect_sound(clock.survive_clock(tmp_path, step=step))


def test_readers_that_do_not_read_cost_the_others_nothing(tmp_path: Path) -> None:
    expect_sound(crowd.survive_slow_readers(tmp_path, readers=2, mebibytes=1))


def test_clients_that_leave_in_every_state_leave_nothing_behind(tmp_path: Path) -> None:
    expect_sound(crowd.survive_rudeness(tmp_path, times=3))


def test_idle_readers_are_all_told(tmp_path: Path) -> None:
    expect_sound(crowd.survive_idle_readers(tmp_path, readers=300))


def test_what_one_asks_for_holds_up_no_other(tmp_path: Path) -> None:
    attacks = [heavy.chunks_without_text, heavy.clear_what_is_large, heavy.known_text_and_hang_up]
    expect_sound(heavy.survive_heavy_work(tmp_path, mebibytes=8, attacks=[attacks], timed=False))


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    expect_sound(fuzz.survive_fuzzing(tmp_path, examples=8))


@pytest.mark.skipif(bool(fuzz.why_no_schemathesis()), reason=fuzz.why_no_schemathesis())
def test_no_answer_is_another_than_the_document_says(tmp_path: Path) -> None:
    expect_sound(fuzz.survive_schemathesis(tmp_path, examples=3, phases="fuzzing"))
