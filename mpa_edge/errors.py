"""Every error that the tool raises on purpose.

    MpaEdgeError
      InputError (ValueError)        what the user gave is wrong: a flag, a path, a file, a picture
        ImageError                   one picture cannot be used; carries a short reason for counts
      RunError (RuntimeError)        a run folder cannot be continued
        FingerprintMismatch          it holds the work of other settings
        RunLocked                    another process works in it
      ModelError (RuntimeError)      a model cannot be loaded, or does not answer
        UnknownFamily (ValueError)   it has no export
      BudgetSpent (RuntimeError)     as many requests are sent as the user allowed; the run can go on
      ExportError (RuntimeError)     a check on the way to the bundle failed
      BundleError (ValueError)       a bundle is damaged, or says what it may not say
      MissingExtra (ImportError)     an optional dependency is not installed; names the pip line

The command line prints these as one clean line and exits with 1. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

__all__ = [
    "BudgetSpent",
    "BundleError",
    "ExportError",
    "FingerprintMismatch",
    "ImageError",
    "InputError",
    "MissingExtra",
    "ModelError",
    "MpaEdgeError",
    "RunError",
    "RunLocked",
    "UnknownFamily",
    "require",
]


# What to do after an interruption. Where --fresh was typed the command line adds that it has to go.
AGAIN = "type the same command again"


class MpaEdgeError(Exception):
    """Base of all; `str(error)` is the line that the user reads."""


class InputError(MpaEdgeError, ValueError):
    """What the user gave is wrong."""


class ImageError(InputError):
    """One picture cannot be used. `reason` is a short stable slug such as `unreadable` or `too_small`."""

    def __init__(self, path: object, reason: str, detail: str = "") -> None:
        super().__init__(f"{path}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = detail


class RunError(MpaEdgeError, RuntimeError):
    """A run folder cannot be continued."""


class FingerprintMismatch(RunError):
    """The folder holds the output of other settings. `differences` maps a key to (there, now)."""

    def __init__(self, folder: object, differences: Mapping[str, tuple[object, object]]) -> None:
        lines = "; ".join(f"{key}: was {old!r}, is {new!r}" for key, (old, new) in sorted(differences.items()))
        super().__init__(
            f"{folder} holds the output of other settings ({lines}). Use another --out, or --fresh to start over."
        )
        self.differences = dict(differences)


class RunLocked(RunError):
    """Another process works in the folder."""

    def __init__(self, folder: object, flag: str | None = "--out") -> None:
        instead = f", or choose another {flag}" if flag else ""
        super().__init__(f"{folder} is in use by another mpa-edge process. Wait for it{instead}.")


class ModelError(MpaEdgeError, RuntimeError):
    """A model cannot be loaded, or does not answer."""


class UnknownFamily(ModelError, ValueError):
    """The model can be aligned but has no export."""

    def __init__(self, model_type: str, known: Iterable[str]) -> None:
        super().__init__(
            f"no export for models of type {model_type!r}; known: {', '.join(sorted(known))}. "
            "It can still be aligned: the adapter works with transformers and peft."
        )


class BudgetSpent(MpaEdgeError, RuntimeError):
    """As many requests are sent to a chat server as the user allowed."""

    def __init__(self, max_requests: int) -> None:
        super().__init__(
            f"--max-requests {max_requests} is used up. What is finished is kept: {AGAIN} to go on "
            "with as many once more."
        )
        self.max_requests = max_requests


class ExportError(MpaEdgeError, RuntimeError):
    """A check on the way to the bundle failed; nothing that failed a check is kept as a bundle."""


class BundleError(MpaEdgeError, ValueError):
    """A bundle is damaged, or says what it may not say."""


class MissingExtra(MpaEdgeError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f'{module} is not installed. Run: pip install "mpa-edge[{extra}]"')
        self.extra = extra


def require(extra: str, modules: Iterable[str]) -> None:
    """Raise `MissingExtra` for the first of these modules that is not installed; imports none of them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module, extra)
