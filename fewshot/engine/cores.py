"""How many processor cores there are to use."""

import os


def cores() -> int:
    """Returns how many cores this process may use, which not every system tells."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
