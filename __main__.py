"""``python -m resume_stream`` is ``resume-stream``."""

import sys

from resume_stream import main

sys.exit(main())
