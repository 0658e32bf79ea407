"""A missing library is said before anything starts, with the line that installs it."""

from __future__ import annotations

import pytest

from mpa_edge import errors
from mpa_edge.errors import MissingExtra, MpaEdgeError, require


def test_the_first_missing_library_is_named_with_the_pip_line() -> None:
    require("align", ["json", "pathlib"])
    with pytest.raises(MissingExtra, match=r'no_such_library is not installed. Run: pip install "mpa-edge\[align\]"'):
        require("align", ["json", "no_such_library"])


def test_every_error_of_ours_is_exported_and_is_the_right_builtin_too() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {cls.__name__ for cls in classes} == set(errors.__all__) - {"require"}
    assert errors.__all__ == sorted(errors.__all__)
    builtins = (ValueError, RuntimeError, ImportError)
    assert all(issubclass(cls, builtins) for cls in classes if cls is not MpaEdgeError)
