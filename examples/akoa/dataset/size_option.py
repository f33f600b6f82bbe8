"""Command-line option for the size of the images."""

from __future__ import annotations

import argparse
from typing import Any

MAX_SIZE = 4096


class SizeAction(argparse.Action):
    """Action of an option with `nargs="+"`: one number, or height and width. Stores (height, width)."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        """Check and store the numbers."""
        if len(values) > 2 or not all(1 <= value <= MAX_SIZE for value in values):
            got = " ".join(map(str, values))
            raise argparse.ArgumentError(
                self, f"must be one number, or height and width, from 1 to {MAX_SIZE:,} pixels; got {got}"
            )
        setattr(namespace, self.dest, (values[0], values[-1]))
