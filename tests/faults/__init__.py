"""What the service survives: each fault of a real host, tried again and again.

``python -m tests.faults --minutes 20`` tries each of them at length and prints a line for each;
``test_faults.py`` tries each of them briefly, as part of the test suite, with the same code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for conftest, which pytest would have put there
