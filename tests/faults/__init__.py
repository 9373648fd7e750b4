"""The faults of a real host that the service survives.

``python -m tests.faults --minutes 20`` tries each fault at length and prints a line for each.
``test_faults.py`` tries each of them briefly in the test suite, with the same code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # pytest would add it, for conftest
