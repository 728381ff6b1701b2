"""The process of one training: `main` with the folder of a run and a device.

Its input is a pipe that nothing is written to: it closes when the process that started this one ends, however that
happens, and then this one ends too. So nobody goes on with a run that another process is still training.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from apd.errors import InputError, Interrupted


def main(run: str, device: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from apd.run import Run
    from apd.training.train import train_run

    try:
        train_run(Run(Path(run)), device)
    except (InputError, Interrupted) as error:
        sys.exit(f"Error: {error}")


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock Python wants when it ends
    os._exit(1)
