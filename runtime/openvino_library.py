"""The `openvino` package without its telemetry: everything of ours imports it from here.

Its import alone reports to Google Analytics, unless the package for that is missing. A device that answers questions
about pictures should not, so that package is hidden from it.
"""

from __future__ import annotations

import sys
from typing import Any, cast

sys.modules.setdefault("openvino_telemetry", cast("Any", None))

import openvino as ov  # noqa: E402
from openvino import opset13  # noqa: E402

__version__ = str(ov.__version__).split("-")[0]
__all__ = ["opset13", "ov"]
