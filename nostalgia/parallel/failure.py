"""All ranks stop together: the first to fail says why, once, and the others follow with its exit code.

A rank that fails leaves its code and line in the process group's store. Every rank watches the store from a thread:
one that is stuck in a collective, waiting for the rank that failed, ends within seconds and not at its timeout. A rank
that cannot say anything any more is missed by its heartbeat (`heartbeat`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from nostalgia.parallel.heartbeat import Heartbeats, launcher_holds_store
from nostalgia.utils.exit_code import leave

KEY = "nostalgia/failure"
POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # for a rank to get out by itself once another has failed


@dataclass(frozen=True)
class Failure:
    rank: int
    exit_code: int
    message: str
    stuck: bool = False  # a rank has to be ended from outside: the launcher must see a failure


class FailureWatch:
    """Shares failures over the ranks of the default process group; does nothing for one process.

    ``heartbeat_seconds``: a rank silent for longer is lost and ends the run with exit code 4 (0: not watched).
    """

    def __init__(self, heartbeat_seconds: float = 60.0) -> None:
        self._store: Store | None = None
        self._stopped = threading.Event()
        self._beats: Heartbeats | None = None
        self._seen: Failure | None = None  # another rank's: the store may be gone when it is asked for
        self.rank = 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank = dist.get_rank()
            # A connection of our own: the group's is locked while a collective waits on it.
            self._store = dist.distributed_c10d._get_default_store().clone()
            if heartbeat_seconds:
                self._beats = Heartbeats(self.rank, dist.get_world_size(), heartbeat_seconds)
                # The watch itself is stuck when the process that holds the store is the one that stopped.
                threading.Thread(target=self._listen, daemon=True, name="heartbeat-watch").start()
            threading.Thread(target=self._watch, daemon=True, name="failure-watch").start()

    def announce(self, exit_code: int, message: str, *, stuck: bool = False) -> bool:
        """Tell the others; True when this rank is the first to fail and so the one to print."""
        if self._store is None:
            return True
        mine = json.dumps([self.rank, exit_code, message, stuck])
        try:
            return json.loads(self._store.compare_set(KEY, "", mine))[0] == self.rank
        except (RuntimeError, ValueError):  # the store died with the rank that held it
            return True

    def other(self, seconds: float = GRACE_SECONDS) -> Failure | None:
        """The failure of another rank, waiting ``seconds`` for one: an error here may only be its echo."""
        deadline = time.monotonic() + seconds
        while self._store is not None:
            failure = self._seen or self._read()
            if failure is not None and failure.rank != self.rank:
                return failure
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return None

    def let_others_hear(self) -> None:
        """Wait before a failed rank ends, where it holds the store, until the others have read of the failure there."""
        if self._store is not None and self.rank == 0 and not launcher_holds_store():
            time.sleep(2 * POLL_SECONDS)

    def stop(self) -> None:
        """The run is over: a rank that ends now is not one that failed."""
        self._stopped.set()

    def _read(self) -> Failure | None:
        assert self._store is not None
        try:
            if not self._store.check([KEY]):
                return None
            return Failure(*json.loads(self._store.get(KEY)))
        except (RuntimeError, ValueError):
            return None

    def _watch(self) -> None:
        beats, store, due = self._beats, self._store, 0.0
        assert store is not None
        while not self._stopped.wait(POLL_SECONDS if beats is None else min(POLL_SECONDS, beats.seconds)):
            failure = self._read()
            if failure is not None and failure.rank != self.rank:
                self._seen = failure
                time.sleep(GRACE_SECONDS)
                leave(failure.exit_code, stuck=failure.stuck)
            if beats is not None and time.monotonic() >= due:
                due = time.monotonic() + beats.seconds
                with contextlib.suppress(RuntimeError):  # no store, no answer: `_listen` counts that
                    beats.exchange(store)

    def _listen(self) -> None:
        beats = self._beats
        assert beats is not None
        while not self._stopped.wait(beats.seconds):
            beats.waited()
            complaint = beats.complaint()
            if complaint is not None:
                self._give_up(beats, f"error: {complaint}")

    def _give_up(self, beats: Heartbeats, line: str) -> None:
        """End this rank because another is lost; the store that settles who prints may be lost with it."""
        first: list[bool] = []
        ask = threading.Thread(target=lambda: first.append(self.announce(4, line, stuck=True)), daemon=True)
        ask.start()
        ask.join(GRACE_SECONDS)
        if first[0] if first and not beats.store_is_silent() else beats.speaks_alone():
            print(line, file=sys.stderr, flush=True)
        leave(4, stuck=True)
