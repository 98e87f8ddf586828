"""What can be wrong with the fake engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Faults:
    """Nothing is wrong by default. A change takes effect with the next request or load."""

    load_fails: bool = False  #: every load answers 500
    load_does_nothing: bool = False  #: a load answers 200, and the name has the base's weights
    load_wrong_weights: bool = False  #: a load answers 200, and the name has nobody's weights
    logprob_noise: float = 0.0  #: standard deviation of a figure in nats, as bf16 has it (0.05)
    logprob_shift: float = 0.0  #: largest fixed error in nats, as a quantised base has it
    error_status: int | None = None  #: generation answers this status instead of a first token
    hangs_up: bool = False  #: generation closes the connection instead of a first token
    first_token_seconds: float = 0.0
    token_seconds: float = 0.0  #: before each further token
    dies_after_tokens: int | None = None  #: then the connection closes in mid-answer
    errs_after_tokens: int | None = None  #: then a stream has an error event and ends
    stalls_after_tokens: int | None = None  #: then nothing comes, and the connection stays open
    endless: bool = False  #: no answer ends by itself
    lacks_tool_parser: bool = False  #: it runs without one, and refuses requests with tools
    lacks_tokenize: bool = False  #: `/tokenize` is not there, as behind a proxy
    answers_as: str | None = None  #: the model that answers claim to be from
    says: str | None = None  #: the body of a 200 in the place of every completion

    @property
    def takes_time(self) -> bool:
        """True when an answer can't be written at once."""
        return (
            self.endless
            or self.first_token_seconds > 0
            or self.token_seconds > 0
            or self.dies_after_tokens is not None
            or self.errs_after_tokens is not None
            or self.stalls_after_tokens is not None
        )
