"""Notices when another rank of a run is lost: it died, it is frozen, it failed, or it does not reach a collective.

Every rank tells the others through the rendezvous store, every other second, that it is alive and what it is doing. The
process groups themselves never time out, so that a rank may wait for an evaluation or a checkpoint as long as the rank
that works is alive. What ends a run:

- a rank gives no sign of life for ``timeout`` seconds (frozen, or its host is gone);
- this rank has been in one optimizer step for ``timeout`` seconds (another one does not come);
- another rank failed, and said so;
- a connection broke, and its rank gives no more signs of life (killed).

The first rank to find out writes the reason into the store; all ranks end for that reason, and one of them prints it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist

EXIT_CODE = 3
"""Of a process whose run ended because another rank was lost."""

_BEAT = 2.0
_BEATS_OF_THE_DEAD = 3
_ENDED = "ended"
_GRACE = 3.0
"""Seconds for the main thread to end by its own exception before the process is ended."""


class RankLost(RuntimeError):
    """Another rank died, froze or failed, so that this run cannot continue; the last checkpoint is whole."""


class Place(NamedTuple):
    """What a rank is doing."""

    step: int = 0
    doing: str = "starting"
    timed: bool = False
    """Whether all ranks should come through it within the timeout."""

    def __str__(self) -> str:
        return f"at step {self.step} ({self.doing})"


class _Heard:
    """The last sign of life of a rank, and how long ago it was in time that this process was running."""

    def __init__(self) -> None:
        self.beat = -1
        self.place = Place()
        self.silent = 0.0


class RankWatch:
    """One per process, from the rendezvous to the end of the process; it acts while ``run`` is entered."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.last_words: Callable[[], str] = str
        """What to do now, for the end of the message."""
        self.log: Callable[[str], object] = str
        """Where the message goes besides stderr."""
        self.reported = False
        """Whether another rank was first to report the failure that ended this run."""
        self._store = store
        self._heard = [_Heard() for _ in range(world_size)]
        self._place, self._in_place = Place(), 0.0
        self._beat = 0
        self._runs, self._active = 0, False
        self._reason: dict[str, Any] | None = None
        self._reason_seen = 0.0
        self._stop = threading.Event()
        self._life = [f"life/{rank}" for rank in range(world_size)]
        for key in self._life:
            store.compare_set(key, "", json.dumps([self._beat, *Place()]))
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last run ended by a failure, of whichever rank."""
        return self._reason is not None

    @property
    def interval(self) -> float:
        return min(_BEAT, self.timeout / 5)

    def at(self, place: Place) -> None:
        """From now on this rank is doing this."""
        self._place, self._in_place = place, 0.0

    @contextmanager
    def run(self, timeout: float) -> Iterator[None]:
        """While a run is under way. An exception that leaves it is reported to the other ranks.

        Raises:
            RankLost: in place of the error of a broken connection.
        """
        self.timeout = timeout
        self._runs += 1
        self._reason, self.reported = None, False
        self.last_words, self.log = str, str
        self.at(Place())
        self._active = True
        try:
            with self.explained():
                yield
        except RankLost:
            raise
        except BaseException as error:
            self._report(self.rank, f"failed: {type(error).__name__}: {' '.join(str(error).split())}", self._place)
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
        """Before the process ends."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.interval)
        if any(thread.is_alive() for thread in self._threads):
            return  # the store blocks
        with suppress(RuntimeError):
            self._store.set(self._life[self.rank], json.dumps([self._beat + 1, *Place(doing=_ENDED)]))

    def _explain(self, error: RuntimeError) -> None:
        """Waits until it is known which rank was lost."""
        for _ in range(8 * _BEATS_OF_THE_DEAD):
            silent = [heard.silent > _BEATS_OF_THE_DEAD * self.interval for heard in self._heard]
            if self._reason is not None:
                return
            if silent[self.rank]:
                self._report(None, "the rendezvous store is gone, with rank 0 or torchrun, which held it", self._place)
            elif any(silent):
                lost = silent.index(True)
                what = "ended without an error message (killed, perhaps for want of memory)"
                self._report(lost, what, self._heard[lost].place)
            time.sleep(self.interval / 4)
        self._report(None, f"the connection to another rank broke ({str(error).splitlines()[0]})", self._place)

    def _report(self, rank: int | None, what: str, place: Place) -> None:
        """Says why the run ends, unless another rank has said it before."""
        reason = self._reason_of(rank, what, place)
        try:
            reason = json.loads(self._store.compare_set(f"reason/{self._runs}", "", json.dumps(reason)))
        except RuntimeError:  # the store is gone, with the rank that held it
            pass
        self._adopt(reason)

    def _reason_of(self, rank: int | None, what: str, place: Place) -> dict[str, Any]:
        return {"by": self.rank, "rank": rank, "what": what, "place": str(place)}

    def _adopt(self, reason: dict[str, Any]) -> None:
        if self._reason is None:
            self.reported = reason["by"] != self.rank
            self._reason, self._reason_seen = reason, time.monotonic()

    def _message(self) -> str:
        reason = self._reason
        who = "" if reason["rank"] is None else f"rank {reason['rank']} of {self.world_size} "
        try:
            last_words = self.last_words()
        except Exception as error:  # the run ends in any case, and for another reason
            last_words = f"The last checkpoint could not be looked up ({error})"
        return f"{who}{reason['what']}, {reason['place']}. {last_words}".rstrip()

    def _exchange(self) -> None:
        """Gives signs of life and takes those of the others. It may block with the store; ``_watch`` does not."""
        while not self._stop.is_set():
            try:
                self._beat += 1
                self._store.set(self._life[self.rank], json.dumps([self._beat, *self._place]))
                for rank, value in enumerate(self._store.multi_get(self._life)):
                    beat, *place = json.loads(value)
                    if beat != self._heard[rank].beat:
                        self._heard[rank].beat, self._heard[rank].silent = beat, 0.0
                        self._heard[rank].place = Place(*place)
                key = f"reason/{self._runs}"
                if self._active and self._store.check([key]):
                    self._adopt(json.loads(self._store.get(key)))
            except RuntimeError:  # the store is gone or slow; its silence is counted
                pass
            self._stop.wait(self.interval)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval / 2):
            now = time.monotonic()
            passed, last = min(now - last, self.interval), now  # less when this process itself was stopped
            for heard in self._heard:
                heard.silent += passed
            self._in_place += passed
            if self._active and self._reason is None:
                self._look()
            if self._active and self._reason is not None and time.monotonic() - self._reason_seen > _GRACE:
                self._end()

    def _look(self) -> None:
        if self._heard[self.rank].silent > self.timeout:
            what = f"the store of rank 0 or torchrun has not answered for {self.timeout:g} s (frozen or cut off)"
            self._adopt(self._reason_of(None, what, self._place))  # without the store, which may block
            return
        for rank, heard in enumerate(self._heard):
            if heard.silent > self.timeout and heard.place.doing != _ENDED:
                self._report(rank, f"has given no sign of life for {self.timeout:g} s (frozen or cut off)", heard.place)
                return
        if self._place.timed and self._in_place > self.timeout:
            behind = [(heard.place.step, heard.place.timed) for heard in self._heard]
            if len(set(behind)) == 1:
                self._report(None, f"no rank has come to the end of the step in {self.timeout:g} s", self._place)
            else:
                last = behind.index(min(behind))
                what = f"has kept the others waiting for {self.timeout:g} s"
                self._report(last, what, self._heard[last].place)

    def _end(self) -> None:
        """Ends the process, whose main thread waits for a rank that will not come."""
        message = self._message()
        self.log(message)
        sys.stdout.flush()
        if not self.reported:
            print(f"clipup train: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _broke_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it. Gloo's errors have no class of their own."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection closed", "nccl"))
