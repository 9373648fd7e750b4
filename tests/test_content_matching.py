"""Resuming by known text: right after it, wherever its chunks are cut, and never with a silent gap."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from buffers import attached, take
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from resume_stream.app import Chunk, ChunkBuffer, MessageEnd, Settings, Signal

RESET = Signal.RESET
STORES = ("sqlite", "redis")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    """Return a function that runs a coroutine with a buffer that all of these tests share."""
    folder: Path = tmp_path_factory.mktemp("matching")
    buffer = ChunkBuffer(Settings(db=str(folder / "chunks.db"), store=store(), synchronous="NORMAL"))
    with asyncio.Runner() as runner:
        runner.run(buffer.__aenter__())
        yield lambda work, *arguments: runner.run(work(buffer, *arguments))
        runner.run(buffer.__aexit__(None, None, None))


async def put(buffer: ChunkBuffer, pieces: Sequence[Chunk | str], others: Sequence[str] = ()) -> None:
    """Write the message "run" of a new thread, with chunks of another message between its own."""
    for thread in (await buffer.get_threads()).threads:
        await buffer.clear_thread_buffer(thread.thread_id)
    for place, piece in enumerate(pieces):
        if place < len(others):
            await buffer.add_chunks("thread", "other", [others[place]])
        await buffer.add_chunks("thread", "run", [piece])
    await buffer.open_message("thread", "run")


async def resumed(buffer: ChunkBuffer, known: str) -> list[Any]:
    """Return what a reader with this text gets of an active message: (seq, content), or a signal."""
    found = await take(buffer.resume_stream("thread", "run", known, idle_timeout=1e-9))
    assert found.pop() is Signal.TIMEOUT
    return found


async def resume_of(buffer: ChunkBuffer, pieces: Sequence[Chunk | str], known: str, others: Sequence[str] = ()) -> Any:
    await put(buffer, pieces, others)
    return await resumed(buffer, known)


ROCKET = "👩\u200d🚀"  # one grapheme of three characters, 11 bytes


@pytest.mark.parametrize(
    ("pieces", "known", "expected"),
    [
        # a prefix
        (["Hello", " world"], "", [(1, "Hello"), (2, " world")]),
        (["Hello", " world"], "H", [(1, "ello"), (2, " world")]),
        (["Hello", " world"], "Hello", [(2, " world")]),
        (["Hello", " world"], "Hello wor", [(2, "ld")]),
        (["Hello", " world"], "Hello world", []),
        (["aaa", "aaa"], "aa", [(1, "a"), (2, "aaa")]),  # a prefix, although it occurs again
        (["aaa", "aaa"], "aaaaaa", []),
        # a tail that occurs once
        (["Hello", " world"], "lo wor", [(2, "ld")]),
        (["Hello", " world"], "world", []),
        (["Hello", " world"], "w", [(2, "orld")]),
        (["Hello", " world"], "ello", [(2, " world")]),
        # more than once, overlapping or not
        (["Hello", " world"], "o", [RESET, (1, "Hello"), (2, " world")]),
        (["x", "abab", "a"], "aba", [RESET, (1, "x"), (2, "abab"), (3, "a")]),
        (["x", "aa", "a"], "aa", [RESET, (1, "x"), (2, "aa"), (3, "a")]),
        # not at all
        (["Hello", " world"], "Hello world!", [RESET, (1, "Hello"), (2, " world")]),
        (["Hello", " world"], "hello", [RESET, (1, "Hello"), (2, " world")]),
        (["Hello", " world"], "Hello\n", [RESET, (1, "Hello"), (2, " world")]),
        ([], "", []),
        ([], "a", [RESET]),
        (["", ""], "", [(1, ""), (2, "")]),
        (["", ""], "a", [RESET, (1, ""), (2, "")]),
        # control characters, and characters of several bytes or code points
        (["a\r", "\nb\r\nc"], "a\r", [(2, "\nb\r\nc")]),
        (["a\r", "\nb\r\nc"], "a\r\nb\r", [(2, "\nc")]),
        (["a\r", "\nb"], "a\n", [RESET, (1, "a\r"), (2, "\nb")]),
        (["a\0b", "\0\0c"], "a\0b\0", [(2, "\0c")]),
        (["a\0b", "\0\0c"], "b\0", [(2, "\0c")]),
        (["\0", "\0"], "\0", [(2, "\0")]),
        (["e", "\u0301x"], "e", [(2, "\u0301x")]),
        (["e\u0301x"], "e", [(1, "\u0301x")]),
        (["e\u0301x"], "é", [RESET, (1, "e\u0301x")]),  # it only looks the same
        ([ROCKET[:1], ROCKET[1:] + "!"], ROCKET[:2], [(2, "🚀!")]),
        ([ROCKET[:1], ROCKET[1:] + "!"], ROCKET, [(2, "!")]),
        (["🇪🇺🇪🇺"], "🇪🇺🇪", [(1, "🇺")]),
        (["é", "ê", "ë"], "ê", [(3, "ë")]),
        (["\ufeffa", "b"], "\ufeff", [(1, "a"), (2, "b")]),
        (["%_?*[a]'\"", "--"], "%_?*[a]'\"", [(2, "--")]),
    ],
)
def test_the_reader_gets_exactly_what_it_does_not_have(
    run: Callable[..., Any], pieces: list[str], known: str, expected: list[Any]
) -> None:
    assert run(resume_of, pieces, known) == expected


def test_empty_chunks_right_after_the_text_are_not_skipped(run: Callable[..., Any]) -> None:
    pieces = [Chunk("", "start"), "ab", Chunk("", "tool"), Chunk("", "result"), "c", Chunk("", "stop")]
    assert run(resume_of, pieces, "") == [(1, ""), (2, "ab"), (3, ""), (4, ""), (5, "c"), (6, "")]
    assert run(resumed, "a") == [(2, "b"), (3, ""), (4, ""), (5, "c"), (6, "")]
    assert run(resumed, "ab") == [(3, ""), (4, ""), (5, "c"), (6, "")]
    assert run(resumed, "b") == [(3, ""), (4, ""), (5, "c"), (6, "")]
    assert run(resumed, "abc") == [(6, "")]
    assert run(resumed, "x") == [RESET, (1, ""), (2, "ab"), (3, ""), (4, ""), (5, "c"), (6, "")]


def test_a_cut_chunk_keeps_its_event_and_a_reader_with_the_whole_text_gets_the_end(run: Callable[..., Any]) -> None:
    async def check(buffer: ChunkBuffer) -> None:
        await put(buffer, ["a", Chunk("bcd", "tool")])
        end = await buffer.complete_message("thread", "run")
        first, last = [item async for item in buffer.resume_stream("thread", "run", "ab")]
        assert (first.content, first.event, first.seq) == ("cd", "tool", 2)
        assert last == MessageEnd("run", "completed", None, end.seq)
        assert [item async for item in buffer.resume_stream("thread", "run", "abcd")] == [last]

    run(check)


def test_other_messages_do_not_count_as_the_text(run: Callable[..., Any]) -> None:
    assert run(resume_of, ["ab", "cd", "ef"], "abc", ["x", "abc", "cd"]) == [(4, "d"), (6, "ef")]
    assert run(resumed, "cd") == [(6, "ef")], "once in this message, whatever the other one says"
    assert run(resumed, "xab") == [RESET, (2, "ab"), (4, "cd"), (6, "ef")]


def test_a_reader_with_all_chunks_waits_for_the_next_one(run: Callable[..., Any]) -> None:
    async def check(buffer: ChunkBuffer) -> None:
        await put(buffer, ["ab"])
        reading = await attached(buffer, buffer.resume_stream("thread", "run", "ab"), 1)
        await buffer.add_chunks("thread", "run", ["c"])
        assert await reading == [(2, "c")]

    run(check)


def test_a_long_text_is_matched_too(run: Callable[..., Any]) -> None:
    pieces = [f"{number:05} é{'.' * (number % 13)}\n" for number in range(3000)]
    text = "".join(pieces)

    async def check(buffer: ChunkBuffer) -> None:
        await put(buffer, [])
        for start in range(0, len(pieces), 500):
            await buffer.add_chunks("thread", "other", ["x"] * 7)
            await buffer.add_chunks("thread", "run", pieces[start : start + 500])
        for cut in [1, 30, 31, 20_000, len(text) - 1, len(text)]:
            for known in (text[:cut], text[max(0, cut - 30) : cut]):
                found = await resumed(buffer, known)
                assert "".join(content for _, content in found) == text[cut:]

    run(check)


# Few letters, so that texts occur in themselves, and characters that are hard to cut.
LETTERS = st.sampled_from(["a", "b", "é", "e", "\u0301", "\r", "\n", "\0", "漢", "😀", "👩", "\u200d", "🇪", "\ufeff"])
PIECES = st.lists(st.text(LETTERS, max_size=5), max_size=8)


@given(pieces=PIECES, others=st.lists(st.text(LETTERS, max_size=3), max_size=4))
@how(max_examples=40, deadline=None)
def test_a_reader_with_any_prefix_gets_the_rest(run: Callable[..., Any], pieces: list[str], others: list[str]) -> None:
    text = "".join(pieces)

    async def check(buffer: ChunkBuffer) -> None:
        await put(buffer, pieces, others)
        for cut in range(len(text) + 1):
            found = await resumed(buffer, text[:cut])
            assert RESET not in found
            assert "".join(content for _, content in found) == text[cut:]

    run(check)


def occurrences(text: str, known: str) -> list[int]:
    return [start for start in range(len(text) - len(known) + 1) if text.startswith(known, start)]


@given(data=st.data(), pieces=PIECES)
@how(max_examples=60, deadline=None)
def test_any_text_is_found_where_it_occurs_once_or_answered_with_everything(
    run: Callable[..., Any], data: st.DataObject, pieces: list[str]
) -> None:
    text = "".join(pieces)
    start = data.draw(st.integers(0, len(text)))
    parts = st.integers(start, len(text)).map(lambda stop: text[start:stop])
    known = data.draw(st.one_of(parts, st.text(LETTERS, max_size=4)))
    found = run(resume_of, pieces, known)
    places = occurrences(text, known)
    if text.startswith(known) or len(places) == 1:
        cut = 0 if text.startswith(known) else places[0]
        assert RESET not in found
        assert "".join(content for _, content in found) == text[cut + len(known) :]
    else:
        assert found == [RESET, *enumerate(pieces, 1)]
