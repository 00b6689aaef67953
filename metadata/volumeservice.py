"""What sessions ask of a volume's home, each as one method that returns the answer of `vol.*`.

What is told is decided and put together without an await in between, at the end of each method:
the ballot is known to have been ours since the request arrived, no other session has the
delegation, and the asking one is not about to lose it.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dfs.errors import Busy, Corrupt, DfsError, Fenced, InvalidArgument
from dfs.ids import SYSTEM_VOLUME, SessionId
from dfs.volume.validation import validate
from metadata.batches import Answer, Verdicts
from metadata.delegation import SILENCE, Delegated
from metadata.exclusion import Excluded, in_use, rivals
from metadata.recall import RECALL_WAIT
from metadata.requests import (
    MANY,
    Close,
    Commit,
    Delegate,
    Open,
    Return,
    check_commit,
    checks,
    made_commit,
)
from metadata.volumehome import VolumeHome, fold_bytes
from metadata.volumes import HomeCore
from metadata.waiter import Told, Waiter

log = logging.getLogger(__name__)

MAX_WATCH = 0.5  # seconds that a watch waits
MAX_BACKLOG = 64 << 20  # bytes of effects that wait
SLOWED = 1.0  # seconds that a commit waits for checkpoints, at most
LOOKS = (0.001, 0.05)  # seconds between looks whether it still has to: shortest and longest


class VolumeService(VolumeHome):
    """A volume at a home that serves its sessions; the caller sees to it that the home is `ready`.

    Every method raises `OwnershipLost` when the ballot is lost before the outcome is known,
    `NoQuorum` when no majority answers, and `Busy` when it is to be asked again, unless it says
    otherwise.
    """

    async def open(self, sid: SessionId, mode: str, nonce: bytes, name: str) -> tuple[Any, ...]:
        """Open a session, or find the one of that nonce; the answer of `vol.open`.

        Raises `InUse` while a session that is heard of keeps it out.
        """
        core, give_up = self._current(), self._clock.monotonic() + RECALL_WAIT
        self._recall.heard(sid)
        while True:
            try:
                sid = await self._run(core, Open(sid, mode, nonce, name), sid)
                break
            except Excluded:
                await self._make_way(core, mode)
        await self._admitted(core, sid, give_up)
        self._recall.heard(sid)
        tail = self.entries_after(core.covered, core.seq)
        if tail is None:
            raise Corrupt(f"volume {self.volume.hex()}: entries after its checkpoint are missing")
        return sid, core.seq, core.covered, core.root, tail, self._number, core.params

    async def _make_way(self, core: HomeCore, mode: str) -> None:
        """Close the sessions that are in the way of one of `mode`, if all of them are silent.

        Raises `InUse` if one is not.  There is no await between the look at them and the queueing
        of their end, from which on they are told nothing.
        """
        standing, now = self._recall.standing, self._clock.monotonic()
        found = rivals(mode, core.sessions.values())
        for rival in found:
            if standing.silence(rival.sid, now) <= SILENCE:
                await self._confirm(core)
                volume = core.params.get("name") or self.volume.hex()
                raise in_use(volume, mode, rival, standing.heard_ago(rival.sid, now))
        if found:
            log.warning(
                "volume %s: sessions %s are silent and make way for an open of mode %s",
                self.volume.hex(),
                [rival.sid for rival in found],
                mode,
            )
            await self._run(core, Close(tuple(rival.sid for rival in found)))

    async def commit(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Judge and commit transactions; the answer of `vol.commit`."""
        # Sessions have one commit under way, so another that overtakes this one is not of its own.
        check_commit(args)
        for _ in checks(args, system=self.volume == SYSTEM_VOLUME):
            await trio.lowlevel.checkpoint()
        request, have = made_commit(args)
        if request.writing:
            await self._slow_down(request.size)
        core, recall = self._current(), self._recall
        if self._backlog > MAX_BACKLOG:
            raise Busy(f"{self._backlog} bytes of commits wait at volume {self.volume.hex()}")
        sid = request.sid
        recall.heard(sid)
        self._backlog += request.size
        mark = core.launched
        try:
            seq, verdicts = await self._run(core, request, sid)
        finally:
            if self.core is core:
                self._backlog -= request.size
        return await self._tell(core, request, have, mark, seq, verdicts)

    async def _slow_down(self, size: int) -> None:
        """Let checkpoints catch up, for a while, before a commit of `size` bytes.

        Whatever is in no checkpoint yet is kept in memory, here and by every session.  A fold runs
        at a low priority: on a busy machine commits could outrun it for ever.
        """
        began, pace = self._clock.monotonic(), self._pace
        while (core := self.core) is not None:
            loose, fold = self._tail.loose_bytes, fold_bytes(core)
            waited = self._clock.monotonic() - began
            wanted = SLOWED if pace.behind(loose, fold) else pace.delay(size, loose, fold)
            if waited >= min(wanted, SLOWED):
                return
            await trio.sleep(min(max(LOOKS[0], wanted - waited), LOOKS[1]))

    def _easy(self, core: HomeCore) -> bool:
        return self._pace.easy(self._tail.loose_bytes, fold_bytes(core))

    async def _tell(
        self, core: HomeCore, request: Commit, have: int, mark: int, seq: int, verdicts: Verdicts
    ) -> tuple[Any, ...]:
        """The answer to a commit that was judged; `mark`: batches launched when it arrived."""
        recall, sid = self._recall, request.sid
        # An entry that was proposed since proves, like a Confirm, that the ballot was ours.  Other
        # outcomes come from memory: final, but a client takes a `True` for a word about now.
        if core.proved <= mark and request.writing and (core.holder == sid or True in verdicts):
            await self._confirm(core)
        if True in verdicts or core.losing(sid):
            await self._admitted(core, sid, self._clock.monotonic() + RECALL_WAIT)
        recall.heard(sid)
        news = self.entries_after(have, seq)
        # A caller so far behind that entries are gone sees from `seq` that it misses some, and
        # catches up by a watch; its verdicts are final all the same.
        news = () if news is None else news
        return request.no, seq, verdicts, news, self._number, recall.state(sid)

    def commit_soon(
        self, args: tuple[Any, ...], then: Callable[[tuple[Any, ...] | DfsError], None]
    ) -> bool:
        """`commit` without a task in the common case; whether it was begun.

        If so, `then` is called once, perhaps before this returns: with the answer of `vol.commit`,
        in the very step that proved it unless something else has to be waited for, or with what
        `commit` would raise.  Raises `InvalidArgument`.
        """
        core, recall = self._current(), self._recall
        if check_commit(args) > MANY or not self._easy(core):
            return False
        for _, _, effects in args[4]:
            validate(effects, system=self.volume == SYSTEM_VOLUME)
        request, have = made_commit(args)
        if not request.writing or self._backlog > MAX_BACKLOG:
            return False
        sid, size, mark = request.sid, request.size, core.launched
        recall.heard(sid)
        if request.epoch:
            self._holder_has = (sid, have)
        self._backlog += size

        def decided(outcome: Answer) -> None:
            if self.core is core:
                self._backlog -= size
            if isinstance(outcome, Delegated):  # it has to wait for its turn
                self._nursery.start_soon(finish, self.commit(args))
            elif isinstance(outcome, DfsError):
                then(outcome)
            else:
                seq, verdicts = outcome
                # The holder of the delegation knows what it wrote: no need to send it back.
                own = request.epoch and have == seq - 1
                news = () if own else self._tail.between(have, seq)
                # See `_tell`, which does what has to be waited for.
                told = core.proved > mark or (core.holder != sid and True not in verdicts)
                if self.core is core and told and news is not None and recall.admits(sid):
                    recall.heard(sid)
                    then((request.no, seq, verdicts, news, self._number, recall.state(sid)))
                else:
                    tell = self._tell(core, request, have, mark, seq, verdicts)
                    self._nursery.start_soon(finish, tell)

        async def finish(rest: Awaitable[tuple[Any, ...]]) -> None:
            try:
                then(await rest)
            except DfsError as e:
                then(e)

        request.token = Told(decided)
        self._submit(core, request)
        return True

    async def watch(self, sid: SessionId, have: int, wait: float) -> tuple[Any, ...]:
        """Wait for entries after `have`; the answer of `vol.watch`."""
        core, recall = self._current(), self._recall
        recall.heard(sid)
        mark, start = core.launched, self._clock.monotonic()
        if sid in core.sessions:
            await self._admitted(core, sid, start + MAX_WATCH)
            if have >= core.seq and wait > 0 and not recall.untold(sid):
                waiter = Waiter()
                self._watchers[waiter] = sid
                with trio.move_on_after(min(wait, MAX_WATCH)):
                    await waiter.wait()
                self._watchers.pop(waiter, None)
        if core.proved <= mark:  # see `commit`
            await self._confirm(core)
        if sid in core.sessions:
            await self._admitted(core, sid, self._clock.monotonic() + MAX_WATCH)
        if sid not in core.sessions:
            raise Fenced(f"session {sid} is over or never was: open the volume again")
        recall.heard(sid)
        if self._holder_has[0] == sid:  # most of what it lacked when it asked is its own work
            have = max(have, self._holder_has[1])
        found = self.entries_after(have, core.seq)
        if found is not None:
            return core.seq, found, None, self._number, recall.state(sid)
        found = self.entries_after(core.covered, core.seq) or ()
        return core.seq, found, (core.covered, core.root), self._number, recall.state(sid)

    async def sync(self) -> tuple[Any, ...]:
        """The last committed sequence number; the answer of `vol.sync`."""
        core, give_up = self._current(), self._clock.monotonic() + RECALL_WAIT
        await self._confirm(core)
        await self._admitted(core, 0, give_up)
        return core.seq, self._number

    async def delegate(self, sid: SessionId) -> tuple[Any, ...]:
        """Give a session the delegation if all others are silent; the answer of `vol.delegate`."""
        core, recall = self._current(), self._recall
        recall.heard(sid)
        session = core.sessions.get(sid)
        if session is not None and not session.writes:
            raise InvalidArgument(f"session {sid} is read-only: a volume is delegated to writers")
        if session is None or core.claimant == sid:
            await self._confirm(core)
        else:
            wait = recall.wait(sid)
            if wait > 0:
                return 0, 0, wait, self._number
            await self._run(core, Delegate(sid), sid)
        await self._admitted(core, sid, self._clock.monotonic() + RECALL_WAIT)
        if sid not in core.sessions:
            raise Fenced(f"session {sid} is over or never was: open the volume again")
        if core.holder != sid:
            raise Busy(f"the delegation of volume {self.volume.hex()} is not settled: ask again")
        recall.heard(sid)
        return core.epoch, core.seq, 0.0, self._number

    async def give_back(self, sid: SessionId, epoch: int) -> tuple[Any, ...]:
        """End a delegation, if it has not ended; the answer of `vol.return`."""
        core = self._current()
        await self._run(core, Return(sid, epoch), sid)
        return core.seq, self._number

    async def close(self, sids: tuple[SessionId, ...]) -> tuple[Any, ...]:
        """End sessions; fine if they are over."""
        await self._run(self._current(), Close(sids))
        return ()
