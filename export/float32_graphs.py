"""What float32 graphs of ONNX and of OpenVINO have in common: they are compared with their origin, and made once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mpa_edge.errors import ExportError
from mpa_edge.records import write_atomic

# Float32 on both sides, so only the order of additions differs; 1e-4 of the largest value is far above that (1e-6 seen)
# and far below what a lost RoPE base, a transposed weight or a wrong epsilon does.
TOLERANCE = 1e-4
NOTES = "differences.json"

Export = Callable[[Path, Path], dict[str, float]]


def check_differences(differences: Mapping[str, float], file: str) -> None:
    """Raise `ExportError` for a graph that is not its origin. `differences` are by graph, as fractions of the largest
    output; `file` is a file's name with `{}` for the graph's."""
    for name, found in differences.items():
        if not found <= TOLERANCE:  # NaN fails too
            raise ExportError(f"{file.format(name)} differs from the model by {found:.2g} of its largest output")


def graphs_once(merged: Path, folder: Path, export_graphs: Export) -> dict[str, float]:
    """What `export_graphs(merged, folder)` returns; it is called unless its graphs are there. Notes are written last
    and vouch for them."""
    notes = folder / NOTES
    if not notes.is_file():
        write_atomic(notes, json.dumps(export_graphs(merged, folder)))
    differences: dict[str, float] = json.loads(notes.read_text())
    return differences


def scratch_in(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder inside `folder`, which is made. Not in the system's: that may lie in memory or be small, and
    what a kill leaves there nobody removes."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder, prefix="scratch-")
