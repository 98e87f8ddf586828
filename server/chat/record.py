"""The row of one answer: begun before a stream's first byte, ended once, taken back if need be.

A plain answer is one row, written at its end; the start of a streamed one is committed while the
engine is asked, before its first byte leaves.

Owns: which row is due when, and what a client is told whose answer is not recorded. Covered: a
client that leaves, a commit that fails or comes too late, an end that was committed and not sent.
Does not own: how rows get to the database (`recorder.py`), what was said (`reply.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from feedback.answers import MessagesHash
from feedback.errors import NotReady
from feedback.recording import NOT_RECORDED, EndedAnswer, StartedAnswer
from feedback.tables import AnswerStatus
from server.chat.recorder import NotRecorded, NotSent, Recorder, RefersToNothing
from server.chat.reply import Heard, count_in
from server.chat.tracing import Trace
from server.metrics import Figures


class Record:
    """The record of one answer. It ends exactly once: complete, interrupted or failed.

    `said` is the hash of what the caller sent; `engine` is set by whoever asks one.
    """

    def __init__(
        self,
        started: StartedAnswer,
        said: MessagesHash,
        *,
        stream: bool,
        recorder: Recorder,
        commit_timeout: float,
        figures: Figures,
        on_missing_person: Callable[[], None],
        trace: Trace | None = None,
    ) -> None:
        self.engine: str | None = started.engine
        self._started = started
        self._said = said
        self._stream = stream
        self._recorder = recorder
        self._commit_timeout = commit_timeout
        self._figures = figures
        self._on_missing_person = on_missing_person
        self._trace = trace
        self._starting: asyncio.Task[NotRecorded | None] | None = None  #: a stream's start
        self._start: StartedAnswer | None = started  #: None: it is recorded
        self._has_ended = False  #: from then on the row is the recorder's
        self._unsent: EndedAnswer | None = None  #: an end that is recorded and not yet sent

    @property
    def id(self) -> str:
        return self._started.id

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def begin(self) -> None:
        """Have a stream's start committed, while the engine is asked; a plain answer has none."""
        if self._stream:
            self._starting = asyncio.get_running_loop().create_task(self._record_start())

    async def wait_for_start(self) -> None:
        """Of a stream nothing leaves before its start is recorded. Raises NotReady."""
        starting, self._starting = self._starting, None
        error = None if starting is None else await starting
        if error is None:
            return
        self._has_ended = True
        if not isinstance(error, NotSent):  # the row may still get there, and nobody answers it
            self._recorder.record_soon(
                EndedAnswer(self.id, AnswerStatus.FAILED, [], error_code=NOT_RECORDED)
            )
        raise self._refuse(error, "the request could not be recorded; try again")

    async def complete(self, heard: Heard, choices: list[dict[str, Any]] | None = None) -> None:
        """Returns after COMMIT, and the end may be sent. Raises `not_recorded` after a time.

        `choices` are those of a plain answer. Cancelled meanwhile it is taken back: whoever left
        was not sent the end.
        """
        await self._commit(self._ended(AnswerStatus.COMPLETE, heard, choices=choices))

    async def fail(self, heard: Heard, error_code: str | None) -> None:
        """Returns after COMMIT: interrupted where something was said, failed otherwise."""
        partial = any(heard.texts.values())
        status = AnswerStatus.INTERRUPTED if partial else AnswerStatus.FAILED
        await self._commit(self._ended(status, heard, error_code))

    def interrupt(self, heard: Heard, why: str) -> None:
        """Record the answer as interrupted unless its end is recorded."""
        if not self._has_ended:
            self._has_ended = True
            self._recorder.record_soon(self._ended(AnswerStatus.INTERRUPTED, heard, why))
            self._count_end(AnswerStatus.INTERRUPTED)
            if self._trace is not None:
                self._trace.failed(why)

    def sent(self) -> None:
        """The end that is recorded was sent."""
        self._unsent = None

    def take_back(self) -> None:
        """An end that is recorded and was not sent will not be: its client is told to try again."""
        if self._unsent is not None:
            self._recorder.take_back(self._unsent)

    def close(self) -> None:
        """Wait for a start no longer: the end says how it began, where that isn't there yet."""
        if self._starting is not None:
            self._starting.cancel()

    async def _record_start(self) -> NotRecorded | None:
        """Returns after COMMIT: None, or why there was none."""
        committing = time.perf_counter()
        try:
            await self._recorder.record(self._started, self._commit_timeout)
        except NotRecorded as error:
            return error
        finally:
            if self._trace is not None:
                self._trace.committed(time.perf_counter() - committing)
        self._start = None
        return None

    async def _commit(self, ended: EndedAnswer) -> None:
        self._has_ended = True
        committing, status = time.perf_counter(), AnswerStatus.INTERRUPTED
        try:
            await self._recorder.record(ended, self._commit_timeout)
            status = ended.status
            self._unsent = ended if status is AnswerStatus.COMPLETE else None
        except NotRecorded as error:
            why = "the answer could not be recorded and is withheld; try again"
            raise self._refuse(error, why) from None
        finally:
            self._count_end(status)
            if self._trace is not None:
                self._trace.committed(time.perf_counter() - committing)

    def _refuse(self, error: NotRecorded, message: str) -> NotReady:
        """What a client is told whose answer is not recorded."""
        self._figures.not_recorded.inc()
        if isinstance(error, RefersToNothing):
            self._on_missing_person()  # an erasure elsewhere has taken their row
        return NotReady(message, code=NOT_RECORDED)

    def _count_end(self, status: AnswerStatus) -> None:
        whose = self._started.release, str(self._started.arm)
        self._figures.answers.of(*whose, str(status)).inc()

    def _ended(
        self,
        status: AnswerStatus,
        heard: Heard,
        error_code: str | None = None,
        *,
        choices: list[dict[str, Any]] | None = None,
    ) -> EndedAnswer:
        usage = heard.usage or {}
        if choices is None:
            choices = heard.choices()
        return EndedAnswer(
            id=self.id,
            status=status,
            choices=choices,
            hashes=[self._said.after(choice["message"]) for choice in choices],
            reasoning=heard.thoughts(),
            stored=self._started.stored,
            error_code=error_code,
            engine=self.engine,
            prompt_tokens=count_in(usage, "prompt_tokens"),
            completion_tokens=count_in(usage, "completion_tokens"),
            first_token_at=heard.first_token_at,
            start=self._start,
            start_may_be_there=self._start is not None and self._stream,
        )
