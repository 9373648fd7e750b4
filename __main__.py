"""``python -m resume_stream`` is ``resume-stream``."""

import sys

from .app import main

sys.exit(main())
