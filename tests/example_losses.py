"""The losses of examples/pair_losses.py, as a module."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from places import ROOT


def load() -> Any:
    """Once: its functions are compiled from the file."""
    if "pair_losses" not in sys.modules:
        spec = importlib.util.spec_from_file_location("pair_losses", ROOT / "examples" / "pair_losses.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["pair_losses"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pair_losses"])
    return sys.modules["pair_losses"]
