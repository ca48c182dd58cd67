"""Processes that time rows: each is given one row at a time, and replaced when it takes too long or breaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from measuring.rows import Place, Row, measured

STARTING = 90.0  # seconds for a process to import torch and find its device
# A fork would inherit a CUDA context that it cannot use.
_SPAWN = get_context("spawn")


class Worker:
    """A process that times rows at a place."""

    def __init__(self, place: Place) -> None:
        """Start it."""
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, place))
        self._process.start()
        theirs.close()

    def facts(self) -> dict[str, Any]:
        """Return the device's facts, once it has started.   Raises: RuntimeError where it does not."""
        found = self._ask("facts", STARTING)
        if "device" not in found:
            raise RuntimeError(f"the process that measures did not start: {found}")
        return found

    def time(self, row: Row, seconds: float) -> dict[str, Any]:
        """Return the answer of a row; after one that says "failed" or "slow" the process may be of no more use."""
        return {**row.key, **self._ask((row, seconds), seconds)}

    def rehearse(self, row: Row) -> None:
        """Have it run a row once; what it answers says only that it has."""
        self.connection.send((row, 0.0))

    def end(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _ask(self, question: Any, seconds: float) -> dict[str, Any]:
        try:
            self.connection.send(question)
            if not self.connection.poll(seconds):
                return {"slow": seconds}
            answer: dict[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            return {"failed": "the process that ran it ended"}
        return answer


def rehearsed(rows: Sequence[Row], place: Place, workers: int, seconds: float) -> Iterator[Row]:
    """Run rows once each by several processes, whose compiled kernels stay on disk, and yield each that has run.

    What fails here is left for its measurement to say. After `seconds` the rest compiles when it is measured.
    """
    waiting, ends = list(reversed(rows)), time.monotonic() + seconds
    busy: dict[Connection, tuple[Worker, Row]] = {}

    def give(worker: Worker) -> None:
        if waiting:
            row = waiting.pop()
            worker.rehearse(row)
            busy[worker.connection] = worker, row
        else:
            worker.end()

    try:
        for _ in range(min(workers, len(rows))):
            give(Worker(place))
        while busy and time.monotonic() < ends:
            for connection in wait(list(busy), timeout=max(0.0, ends - time.monotonic())):
                assert isinstance(connection, Connection)
                worker, row = busy.pop(connection)
                try:
                    connection.recv()
                except (EOFError, OSError):
                    worker.end()
                    worker = Worker(place)
                give(worker)
                yield row
    finally:
        for worker, _ in busy.values():
            worker.end()


def _serve(connection: Connection, place: Place) -> None:
    """Answer questions until nobody asks."""
    # What a peer or a compiler prints is no part of the lines on standard output.
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        if question == "facts":
            connection.send(facts(place.device))
        else:
            row, seconds = question
            connection.send(measured(row, place, seconds))


def facts(device: torch.device) -> dict[str, Any]:
    """Return what tells a card and its software from others."""
    from headfold.lanes.gpu import environment

    found = environment(device)
    return {
        "device": found.get("gpu", found["cpu"]),
        **{name: found[name] for name in ("driver", "torch", "triton", "cuda", "headfold") if name in found},
        "memory_bytes": found.get("gpu_memory_bytes", found["memory_bytes"]),
    }
