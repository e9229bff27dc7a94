"""Run one script for a parent process, and end with it: `python -m gradlab.study.worker FILE SCRIPT [OPTION …]`.

What the script imported of gradlab is written to FILE, as a JSON list, when it has ended.

The parent holds the other end of the standard input. It closes when the parent ends, even by a signal that cannot be caught, so
nothing goes on writing into a folder that nobody holds.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path

from gradlab.study.resume import imported


def _follow() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Run the script named by the arguments as `__main__`."""
    threading.Thread(target=_follow, daemon=True).start()
    listed, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    listed.write_text(json.dumps(imported()), encoding="utf-8")


if __name__ == "__main__":
    main()
