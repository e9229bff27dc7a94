"""Run one script for a parent process, and end with it: `python -m gradlab.study.worker SCRIPT [OPTION …]`.

The parent holds the other end of the standard input. It closes when the parent ends, even by a signal that cannot be caught, so
nothing goes on writing into a folder that nobody holds.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _follow() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Run the script named by the arguments as `__main__`."""
    threading.Thread(target=_follow, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
