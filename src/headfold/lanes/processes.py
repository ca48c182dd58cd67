"""Processes that lanes hand jobs to: what is left of them is dropped where a lane ends early."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes. Jobs that wait when the block is left, by an error or Ctrl-C, are not run."""
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def answers(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], count: int) -> Generator[T | None]:
    """Yield function(*job) of every job in their order, made by so many processes; None where a process died of it.

    When a process dies, as for lack of memory, none of its pool answers any more: the first job that has no answer is
    then done alone, and those after it by new processes. Close what is not read to its end, as `processes` is left.
    """
    at = 0
    while at < len(jobs):
        with processes(count) as pool:
            try:
                for running in [pool.submit(function, *job) for job in jobs[at:]]:
                    answer = running.result()
                    at += 1
                    yield answer
            except BrokenProcessPool:
                pass
        if at < len(jobs):
            yield _alone(function, jobs[at])
            at += 1


def _alone(function: Callable[..., T], job: tuple[Any, ...]) -> T | None:
    with processes(1) as pool:
        try:
            return pool.submit(function, *job).result()
        except BrokenProcessPool:
            return None
