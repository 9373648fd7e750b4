"""The library's surface: ``from resume_stream import ChunkBuffer`` (see ``app.py``)."""

from .app import (
    AccumulatedContent,
    Appended,
    Chunk,
    ChunkBuffer,
    MessageEnd,
    Problem,
    Settings,
    Signal,
    StoredChunk,
    ThreadStatus,
    __version__,
    create_app,
    router,
)

__all__ = [
    "AccumulatedContent",
    "Appended",
    "Chunk",
    "ChunkBuffer",
    "MessageEnd",
    "Problem",
    "Settings",
    "Signal",
    "StoredChunk",
    "ThreadStatus",
    "__version__",
    "create_app",
    "router",
]
