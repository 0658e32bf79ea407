"""Memory between the steps of an export."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back_memory() -> None:
    """Give what is freed back to the system. glibc keeps freed tensors of up to 32 MB for itself, after a float32 model
    of 256M weights 0.4 GB, and the next step's peak is higher by that; other C libraries need no telling."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
