"""Command line of the phantom: `python -m examples.akoa.phantom`."""

import sys
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

from examples.akoa.phantom.dataset import main

if __name__ == "__main__":
    sys.exit(main())
