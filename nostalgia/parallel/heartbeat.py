"""Heartbeats of the ranks: finds those that are stopped, or whose machine is gone.

Every rank's watch thread leaves a growing count in the group's store; a rank that is busy, however long, goes on
counting, a process that is stopped does not. Silence is measured in the watcher's own rounds, never by a clock: a
laptop that slept, or a whole run that was stopped and continued, has not missed any.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

KEY = "nostalgia/heartbeat"
ROUNDS = 12  # rounds in which a rank must fail to answer: enough for a slow store or a busy machine
LONGEST_ROUND = 5.0  # seconds


@dataclass(frozen=True)
class Beat:
    count: int
    host: str


class Heartbeats:
    """What the rounds so far tell of every rank. ``bound``: seconds of silence after which a rank counts as lost."""

    def __init__(self, rank: int, world_size: int, bound: float) -> None:
        self.rank, self.bound = rank, bound
        self.seconds = min(bound / ROUNDS, LONGEST_ROUND)  # of one round
        self.count = 0
        self.last: dict[int, Beat | None] = dict.fromkeys(range(world_size))
        self._missed = dict.fromkeys(range(world_size), 0)
        self._all_known = False
        self._unanswered = 0  # rounds since the store last answered

    def exchange(self, store: Store) -> None:
        """One round: leave this rank's count, take in the others'. Raises RuntimeError where the store is gone."""
        self.count += 1
        store.set(f"{KEY}/{self.rank}", f"{self.count} {socket.gethostname()}")
        self.heard(self._read(store))

    def heard(self, beats: Mapping[int, Beat]) -> None:
        """Take in what the store holds (ranks that have not begun to count may lack)."""
        self._unanswered = 0
        for rank, known in self.last.items():
            beat = beats.get(rank)
            fresh = beat is not None and (known is None or beat.count != known.count)
            self._missed[rank] = 0 if fresh else self._missed[rank] + 1
            self.last[rank] = beat

    def waited(self) -> None:
        """A round's time has passed; the store may or may not have answered in it."""
        self._unanswered += 1

    def silent_ranks(self) -> list[int]:
        """Ranks that have left no new count for ``bound`` seconds while the store answered."""
        return [r for r, missed in self._missed.items() if r != self.rank and missed * self.seconds > self.bound]

    def store_is_silent(self) -> bool:
        """Whether the process that holds the store has not answered for ``bound`` seconds."""
        return self._unanswered * self.seconds > self.bound

    def complaint(self) -> str | None:
        """The line that names what is silent; None while all is well."""
        if self.store_is_silent():
            who = f"rank 0{self._host([0])}"
            if launcher_holds_store():
                who = f"the launcher on {os.environ.get('MASTER_ADDR', 'the first machine')}"
            return self._line(who)
        ranks = self.silent_ranks()
        if not ranks:
            return None
        numbers = ", ".join(map(str, ranks))
        return self._line(f"rank{'s' if len(ranks) > 1 else ''} {numbers}{self._host(ranks)}")

    def speaks_alone(self) -> bool:
        """Whether this rank prints where the store cannot settle who does: the first on its machine that can."""
        first = self.last[0]
        beside = not launcher_holds_store() and (first is None or first.host == socket.gethostname())
        return int(os.environ.get("LOCAL_RANK", "0")) <= beside  # rank 0 would be the one that is silent

    def _host(self, ranks: list[int]) -> str:
        known = (self.last[rank] for rank in ranks)
        hosts = sorted({beat.host for beat in known if beat is not None})
        return f" (host {', '.join(hosts)})" if hosts else ""

    def _line(self, who: str) -> str:
        plural = who.startswith("ranks ")
        return (
            f"{who} {'have' if plural else 'has'} not answered for {self.bound:g} s: "
            f"{'they are' if plural else 'it is'} stopped or {'their' if plural else 'its'} machine is gone; look at "
            "that machine, then go on with --resume (train.heartbeat_seconds sets this limit; 0: the timeout does)"
        )

    def _read(self, store: Store) -> dict[int, Beat]:
        keys = {rank: f"{KEY}/{rank}" for rank in self.last}
        if not self._all_known:
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
            self._all_known = len(keys) == len(self.last)
        values = store.multi_get(list(keys.values()))  # one request, however many ranks
        beats = {}
        for rank, value in zip(keys, values, strict=True):
            count, _, host = value.decode().partition(" ")
            beats[rank] = Beat(int(count), host)
        return beats


def launcher_holds_store() -> bool:
    """Whether torchrun keeps the group's store, as it does unless told not to; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
