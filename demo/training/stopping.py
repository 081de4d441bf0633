"""Ctrl-C and SIGTERM: a training completes its step first, and everything else stops at once."""

import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_KEY = 1.0  # seconds: under torchrun one Ctrl-C comes from the terminal and from torchrun


class Signals:
    """Takes the two signals over while it is entered. A process that was told to ignore one of
    them, as by `nohup`, goes on ignoring it.

    Attributes:
        waits: Whether the first signal only counts when `of_all` asks for it, and a second one
            stops at once.
    """

    def __init__(self) -> None:
        self.waits = False
        self._received, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            with suppress(ValueError):
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take them over, also from Lightning, whose handler of SIGTERM begins a broadcast wherever
        the process may be, in another one for example."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                with suppress(ValueError):  # of a thread, which gets no signals
                    signal.signal(number, self._receive)

    def of_all(self, processes: int, device: torch.device) -> int:
        """The signal that one of the processes has received, 0 for none. Each has to ask."""
        if processes == 1:
            return self._received
        received = torch.tensor(self._received, device=device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.waits or (self._received and now - self._when > ONE_KEY):
            leave(number)
        if not self._received:
            self._received, self._when = number, now


def leave(number: int) -> NoReturn:
    """End with the exit code that shells expect after this signal."""
    raise SystemExit(128 + number)
