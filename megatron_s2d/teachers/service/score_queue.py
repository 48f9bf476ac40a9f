"""Scores that are asked for before they are needed, within a bound of memory. No torch here.

Jobs start in the order in which they were submitted, as long as what has been computed and not taken, and what is in
flight, stays within ``capacity`` bytes. A job that is waited for starts at once, so that the bound never blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

Reply = dict[str, np.ndarray]


class Job:
    """A request and, once it is there, its reply."""

    def __init__(self, run: Callable[[], Reply], num_bytes: int):
        self.run, self.num_bytes = run, num_bytes
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.is_wanted = self.is_started = self.is_dropped = False

    @property
    def is_done(self) -> bool:
        return self.reply is not None or self.error is not None


class ScoreQueue:
    """Runs jobs in ``num_threads`` threads; with 0 threads, ``submit`` runs a job before it returns."""

    def __init__(self, num_threads: int, capacity: int):
        self._capacity, self._held = capacity, 0
        self._waiting: list[Job] = []
        self._condition = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"teacher request {number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, run: Callable[[], Reply], num_bytes: int) -> Job:
        """Add a job whose reply has about ``num_bytes``."""
        job = Job(run, num_bytes)
        if not self._threads:
            self._run(job)
            return job
        with self._condition:
            self._waiting.append(job)
            self._condition.notify_all()
        return job

    def wait(self, job: Job) -> Reply:
        """Return the reply, which stays held until ``drop``; raise the error that the job has met."""
        with self._condition:
            job.is_wanted = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: job.is_done or self._closed)
        if job.error is not None:
            raise job.error
        if job.reply is None:
            raise RuntimeError("the queue of scores was closed while a reply was waited for")
        return job.reply

    def drop(self, job: Job) -> None:
        """Forget a job: it does not start any more, and its reply is not held."""
        with self._condition:
            if job.is_dropped:
                return
            job.is_dropped = True
            if job in self._waiting:
                self._waiting.remove(job)
            elif job.is_started:
                self._held -= job.num_bytes
            self._condition.notify_all()

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that are held or in flight."""
        return self._held

    def close(self) -> None:
        """Start no further job; those in flight end by themselves."""
        with self._condition:
            self._closed = True
            self._waiting.clear()
            self._condition.notify_all()

    def _next(self) -> Job | None:
        """Return the job to start now, a wanted one first; None if none may."""
        wanted = next((job for job in self._waiting if job.is_wanted), None)
        if wanted is not None:
            return wanted
        first = self._waiting[0] if self._waiting else None
        fits = first is not None and (not self._held or self._held + first.num_bytes <= self._capacity)
        return first if fits else None

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                job = self._next()
                assert job is not None
                self._waiting.remove(job)
                job.is_started = True
                self._held += job.num_bytes
            self._run(job)

    def _run(self, job: Job) -> None:
        reply, error = None, None
        try:
            reply = job.run()
        except Exception as failure:  # the thread that waits raises it
            error = failure
        with self._condition:
            job.reply, job.error = reply, error
            self._condition.notify_all()
