"""Detects that another rank of a run is lost: it died, is frozen, failed, or does not reach a collective.

Every two seconds each rank writes a heartbeat and its current activity into the rendezvous store. The process groups
themselves never time out, so that ranks can wait for an evaluation or a checkpoint as long as the working rank is
alive. A run ends when

- a rank has sent no heartbeat for ``timeout`` seconds (frozen, or its host is gone);
- this rank has been in one optimizer step for ``timeout`` seconds (another rank does not reach it);
- another rank failed and reported it;
- a connection broke, and the rank behind it sends no more heartbeats (killed).

The first rank that detects it writes the reason into the store; all ranks end for that reason, and one prints it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypedDict

import torch.distributed as dist

EXIT_CODE = 3
"""Exit code of a process whose run ended because another rank was lost."""

_HEARTBEAT_SECONDS = 2.0
_MISSED_HEARTBEATS = 3
"""Heartbeats after which a rank behind a broken connection counts as dead."""
_ENDED = "ended"
_GRACE_SECONDS = 3.0
"""Time for the main thread to end by its own exception before the process is ended."""


class RankLost(RuntimeError):
    """Another rank died, froze or failed, so that this run cannot continue. The last checkpoint is whole."""


class Activity(NamedTuple):
    """What a rank is doing."""

    step: int = 0
    what: str = "starting"
    timed: bool = False
    """Whether all ranks should finish it within the timeout."""

    def __str__(self) -> str:
        return f"at step {self.step} ({self.what})"


class _Reason(TypedDict):
    """Why a run ends; JSON in the store."""

    by: int
    """The rank that detected it."""
    rank: int | None
    """The rank that was lost; None if it is not known."""
    what: str
    activity: str


class _Heartbeat:
    """The last heartbeat of a rank, and how long ago it was in time that this process was running."""

    def __init__(self) -> None:
        self.number = -1
        self.activity = Activity()
        self.silent = 0.0


class RankWatch:
    """One per process, from the rendezvous to the end of the process; it is active while ``run`` is entered."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.advice: Callable[[], str] = str
        """How to continue, for the end of the message."""
        self.log: Callable[[str], object] = str
        """Where the message goes besides stderr."""
        self.reported = False
        """Whether another rank was first to report the failure that ended this run."""
        self._store = store
        self._heartbeats = [_Heartbeat() for _ in range(world_size)]
        self._activity, self._in_activity = Activity(), 0.0
        self._number = 0
        self._runs, self._active = 0, False
        self._reason: _Reason | None = None
        self._reason_seen = 0.0
        self._stop = threading.Event()
        self._keys = [f"heartbeat/{rank}" for rank in range(world_size)]
        for key in self._keys:
            store.compare_set(key, "", json.dumps([self._number, *Activity()]))
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last run ended with a failure of some rank."""
        return self._reason is not None

    @property
    def interval(self) -> float:
        return min(_HEARTBEAT_SECONDS, self.timeout / 5)

    def doing(self, activity: Activity) -> None:
        """Sets what this rank does from now on."""
        self._activity, self._in_activity = activity, 0.0

    @contextmanager
    def run(self, timeout: float) -> Iterator[None]:
        """Watches a run. An exception that ends it is reported to the other ranks.

        Raises:
            RankLost: in place of the error of a broken connection.
        """
        self.timeout = timeout
        self._runs += 1
        self._reason, self.reported = None, False
        self.advice, self.log = str, str
        self.doing(Activity())
        self._active = True
        try:
            with self.explained():
                yield
        except RankLost:
            raise
        except BaseException as error:
            self._report(self.rank, f"failed: {type(error).__name__}: {' '.join(str(error).split())}", self._activity)
            raise
        finally:
            self._active = False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises RankLost in place of the error of a broken connection."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankLost) or not _broke_connection(error):
                raise
            self._explain(error)
            self._active = False
            raise RankLost(self._message()) from error

    def stop(self) -> None:
        """Call before the process ends."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.interval)
        if any(thread.is_alive() for thread in self._threads):
            return  # the store blocks
        with suppress(RuntimeError):
            self._store.set(self._keys[self.rank], json.dumps([self._number + 1, *Activity(what=_ENDED)]))

    def _explain(self, error: RuntimeError) -> None:
        """Waits until it is known which rank was lost."""
        for _ in range(8 * _MISSED_HEARTBEATS):
            silent = [heartbeat.silent > _MISSED_HEARTBEATS * self.interval for heartbeat in self._heartbeats]
            if self._reason is not None:
                return
            if silent[self.rank]:
                what = "the rendezvous store is gone, with rank 0 or torchrun, which held it"
                self._report(None, what, self._activity)
            elif any(silent):
                lost = silent.index(True)
                what = "ended without an error message (killed, perhaps for lack of memory)"
                self._report(lost, what, self._heartbeats[lost].activity)
            time.sleep(self.interval / 4)
        self._report(None, f"the connection to another rank broke ({str(error).splitlines()[0]})", self._activity)

    def _report(self, rank: int | None, what: str, activity: Activity) -> None:
        """Publishes why the run ends, unless another rank was first."""
        reason = self._reason_of(rank, what, activity)
        try:
            reason = json.loads(self._store.compare_set(f"reason/{self._runs}", "", json.dumps(reason)))
        except RuntimeError:  # the store is gone, with the rank that held it
            pass
        self._adopt(reason)

    def _reason_of(self, rank: int | None, what: str, activity: Activity) -> _Reason:
        return {"by": self.rank, "rank": rank, "what": what, "activity": str(activity)}

    def _adopt(self, reason: _Reason) -> None:
        if self._reason is None:
            self.reported = reason["by"] != self.rank
            self._reason, self._reason_seen = reason, time.monotonic()

    def _message(self) -> str:
        reason = self._reason
        assert reason is not None  # the run ends
        who = "" if reason["rank"] is None else f"rank {reason['rank']} of {self.world_size} "
        try:
            advice = self.advice()
        except Exception as error:  # the run ends in any case, and for another reason
            advice = f"The last checkpoint could not be looked up ({error})"
        return f"{who}{reason['what']}, {reason['activity']}. {advice}".rstrip()

    def _exchange(self) -> None:
        """Sends heartbeats and receives those of the others. It may block with the store; ``_watch`` does not."""
        while not self._stop.is_set():
            try:
                self._number += 1
                self._store.set(self._keys[self.rank], json.dumps([self._number, *self._activity]))
                for heartbeat, value in zip(self._heartbeats, self._store.multi_get(self._keys), strict=True):
                    number, *activity = json.loads(value)
                    if number != heartbeat.number:
                        heartbeat.number, heartbeat.silent = number, 0.0
                        heartbeat.activity = Activity(*activity)
                key = f"reason/{self._runs}"
                if self._active and self._store.check([key]):
                    self._adopt(json.loads(self._store.get(key)))
            except RuntimeError:  # the store is gone or slow; missing heartbeats are counted
                pass
            self._stop.wait(self.interval)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval / 2):
            now = time.monotonic()
            passed, last = min(now - last, self.interval), now  # less when this process itself was stopped
            for heartbeat in self._heartbeats:
                heartbeat.silent += passed
            self._in_activity += passed
            if self._active and self._reason is None:
                self._check_timeouts()
            if self._active and self._reason is not None and time.monotonic() - self._reason_seen > _GRACE_SECONDS:
                self._end()

    def _check_timeouts(self) -> None:
        if self._heartbeats[self.rank].silent > self.timeout:
            what = f"the store of rank 0 or torchrun has not answered for {self.timeout:g} s (frozen or cut off)"
            self._adopt(self._reason_of(None, what, self._activity))  # without the store, which may block
            return
        for rank, heartbeat in enumerate(self._heartbeats):
            if heartbeat.silent > self.timeout and heartbeat.activity.what != _ENDED:
                what = f"has given no sign of life for {self.timeout:g} s (frozen or cut off)"
                self._report(rank, what, heartbeat.activity)
                return
        if self._activity.timed and self._in_activity > self.timeout:
            reached = [(heartbeat.activity.step, heartbeat.activity.timed) for heartbeat in self._heartbeats]
            if len(set(reached)) == 1:
                self._report(None, f"no rank has finished the step in {self.timeout:g} s", self._activity)
            else:
                last = reached.index(min(reached))
                what = f"has kept the others waiting for {self.timeout:g} s"
                self._report(last, what, self._heartbeats[last].activity)

    def _end(self) -> None:
        """Ends the process, whose main thread waits for a rank that will not reach it."""
        message = self._message()
        self.log(message)
        sys.stdout.flush()
        if not self.reported:
            print(f"clipup train: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _broke_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it. Gloo's errors do not have a class of their own."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection closed", "nccl"))
