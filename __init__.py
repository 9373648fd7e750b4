"""The library's surface, which ``app.py`` lists: ``from resume_stream import ChunkBuffer``."""

from .app import *
from .app import __all__ as __all__
from .app import __version__ as __version__
