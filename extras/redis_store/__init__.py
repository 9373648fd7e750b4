"""The Redis store (``--store redis://…``): any number of processes serve the same threads, and none owns anything.

A thread is four keys that expire together: ``rs:{thread}:entries`` is a stream whose ids are our cursors,
``rs:{thread}:state`` a hash of JSON (the thread under the empty name, each message under its id),
``rs:{thread}:messages`` a list of the message ids in the order they began, and ``rs:{thread}:marks`` the place of
every 64th chunk of a message. All threads share four keys: ``rs:clock`` is the latest generation, ``rs:threads``
has the thread ids by generation, ``rs:expiries`` the thread ids by the time at which they expire, and ``rs:active``
the active messages by the time of their last append. Each write is one run of a script, which also publishes it on
the thread's channel. Redis stands alone or is a primary with replicas; a cluster is refused.

The rooms, from the lowest: ``scripts.py`` has the Lua, ``records.py`` translates between Redis and the service,
``connections.py`` sends commands, ``reading.py``, ``listening.py`` and ``copying.py`` each do what they say, and
``store.py`` commits.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...app import Settings, StartupError, Store


def store_for(settings: Settings) -> Store:
    """Return the store at the address in ``settings.store``. Raise StartupError if that is no address of a Redis."""
    if find_spec("..elsewhere", __package__) is None:
        raise StartupError("--store takes extras/elsewhere.py, to hear of other processes; put it in place")
    try:
        from .store import RedisStore
    except ModuleNotFoundError as error:
        scheme = settings.store.partition("://")[0]
        raise StartupError(
            f"--store {scheme}:// needs {error.name}, which is not here; pip install 'resume-stream[redis]'"
        ) from error
    return RedisStore(settings)
