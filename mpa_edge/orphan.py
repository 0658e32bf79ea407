"""A process that was started to do one job does not outlive whoever waits for it."""

from __future__ import annotations

import os
import signal
import stat
import threading


def end_with_whoever_started_us(*, group: bool = False) -> None:
    """End this process as soon as the one that started it is gone, however that died: it holds the other end of our
    standard input, which is a pipe and read by nobody else from now on. With `group` what was started from here ends
    too; the process must lead a group of its own for that."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        if group and hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait, daemon=True).start()
