"""Bodies of any length, NDJSON or plain text, of which each piece is committed as it arrives."""

from __future__ import annotations

import codecs
from contextlib import aclosing
from typing import cast

import msgspec
from resume_stream import (
    UNDECODABLE,
    Appended,
    Body,
    Change,
    Chunk,
    Conflict,
    InvalidContent,
    Parts,
    Problem,
    TooLarge,
    UnsupportedMediaType,
    answered_early,
    body_pieces,
    checked_sizes,
    granted,
    invalid_json,
)

LINES = msgspec.json.Decoder(Chunk)


def mount(parts: Parts) -> None:
    parts.bodies["application/x-ndjson"] = append_lines
    parts.bodies["text/plain"] = append_text


async def append_lines(body: Body) -> tuple[Appended, bool]:
    with answered_early():
        return await append_pieces(
            body, Lines(6 * body.buffer.settings.max_chunk + 1024)
        )  # JSON may take six bytes for one


async def append_text(body: Body) -> tuple[Appended, bool]:
    charset = body.request.content_type[1].get("charset", "utf-8")
    if charset.lower() not in ("utf-8", "us-ascii"):
        raise UnsupportedMediaType(f"Text in {charset!r:.80} cannot be appended; send it in UTF-8.")
    append, known = body.append, ""
    with answered_early():
        if append.index is not None:
            known, index = await body.buffer.stored_text(append.thread_id, append.message_id, append.index)
            body = body._replace(append=msgspec.structs.replace(append, index=index))
        return await append_pieces(body, Text(body.buffer.settings.max_chunk, known, is_whole=append.complete))


async def append_pieces(body: Body, decoder: Lines | Text) -> tuple[Appended, bool]:
    """Commit what each piece of the body brings before reading the next; whether anything was new.

    While it is being committed nothing more is read, so that the connection's flow control slows
    a producer that is too fast. Cut short with a Problem when somebody else ends the message.
    """
    request, buffer, append = body
    change: Change | None = None
    changed = False
    with buffer.holding() as hold:
        async with (
            buffer.while_active(append.thread_id, append.message_id, granted(request).expires) as lift,
            aclosing(body_pieces(request)) as pieces,
        ):
            async for piece, is_last in pieces:
                chunks, problem = decoder.feed(piece, is_last)
                hold(decoder.kept)
                sizes, refusal = checked_sizes(chunks, buffer.settings.max_chunk)
                if refusal is not None:
                    refusal.detail = f"{decoder.where(len(sizes))} is refused: {refusal.detail}"
                    chunks, problem = chunks[: len(sizes)], refusal
                ends = body.append.complete and is_last and problem is None
                if chunks or (is_last and problem is None and (ends or change is None)):
                    if ends:
                        lift()
                    await buffer.room()
                    change = await buffer.append(
                        msgspec.structs.replace(append, chunks=chunks, sizes=sizes, complete=ends)
                    )
                    changed = changed or change.changed
                    index = None if append.index is None else append.index + len(chunks)
                    append = msgspec.structs.replace(append, index=index, generation=change.state.generation)
                if problem is not None:
                    raise problem
    return cast(Change, change).answer, changed


class Lines:
    """Chunks from NDJSON that arrives in pieces: one on each line, of any length up to ``max_line``."""

    def __init__(self, max_line: int) -> None:
        self._max_line = max_line
        self._rest = bytearray()
        self._whole = b""
        self._lines = 0  # those before what is whole now

    def feed(self, piece: bytes, is_last: bool) -> tuple[list[Chunk], Problem | None]:
        """The chunks of the lines that are whole now, and what is wrong with the line after them."""
        self._lines += self._whole.count(b"\n")
        cut = len(piece) if is_last else piece.rfind(b"\n") + 1
        if cut or is_last:
            self._whole = bytes(self._rest) + piece[:cut]
            self._rest = bytearray(piece[cut:])
        else:
            self._whole = b""
            self._rest += piece
        chunks, problem = self._decode()
        if problem is None and len(self._rest) > self._max_line:
            problem = TooLarge(
                f"{self.where(len(chunks))} has over {self._max_line} bytes, more than any chunk of max_chunk; send it"
                " in parts."
            )
        return chunks, problem

    @property
    def kept(self) -> int:
        """Bytes of a line that is not whole yet."""
        return len(self._rest)

    def where(self, number: int) -> str:
        """The line of a chunk, by its number (from 0) among those that are whole now."""
        lines = [line for line, text in enumerate(self._whole.split(b"\n"), self._lines + 1) if text.strip()]
        after = self._lines + self._whole.count(b"\n") + 1
        return f"Line {lines[number] if number < len(lines) else after}"

    def _decode(self) -> tuple[list[Chunk], Problem | None]:
        try:
            return LINES.decode_lines(self._whole), None
        except UNDECODABLE:
            chunks: list[Chunk] = []
            for line in self._whole.split(b"\n"):
                try:
                    chunks += LINES.decode_lines(line)
                except UNDECODABLE as error:
                    return chunks, invalid_json(line, error, self.where(len(chunks)))
            raise


class Text:
    """Chunks from plain text that arrives in pieces: each becomes one, never cutting a character."""

    def __init__(self, max_chunk: int, known: str, is_whole: bool) -> None:
        self._is_whole = is_whole  # then nothing of what is known may be missing
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._max_characters = max(max_chunk // 4, 1)
        self._known = known
        self._compared = 0  # characters of it

    def feed(self, piece: bytes, is_last: bool) -> tuple[list[Chunk], Problem | None]:
        """The chunks that are whole now, less the ``known`` text that a retry sends again."""
        try:
            text = self._decoder.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            return [], InvalidContent(f"The body is not valid UTF-8: {error.reason}.")
        known = self._known[self._compared : self._compared + len(text)]
        self._compared += len(known)
        is_short = is_last and self._is_whole and self._compared < len(self._known)
        if is_short or not text.startswith(known):
            return [], Conflict("Another text is stored from this index on: another producer writes to this message.")
        text = text[len(known) :]
        step = self._max_characters
        return [Chunk(text[start : start + step]) for start in range(0, len(text), step)], None

    @property
    def kept(self) -> int:
        """Bytes of the text that is still to be compared, at the least."""
        return len(self._known) - self._compared

    def where(self, number: int) -> str:
        return "The text"
