"""A server with vLLM's surface and none of its weight: for tests, faults and benchmarks.

Its output is signed: an answer contains, and every figure depends on, a hash of the adapter files
that produced it. So a test can prove which weights answered. It mimics vLLM 0.32 in its bytes,
errors, slots and evictions; the contract suite runs on both. Where a request has tools it calls
them, and where it asks for JSON it says some that fits, as a vLLM with a tool parser does. It does
not sample, and knows nothing of `logprobs`.

In a test's own process: `with FakeEngine() as engine: …`; as a process that can be killed:
`python -m tests.fake_engine --port 8001`, steered by `POST /fake/faults` and read by
`GET /fake/state`.
"""

from tests.fake_engine.engine import FakeEngine, RecordedRequest
from tests.fake_engine.faults import Faults
from tests.fake_engine.weights import (
    BASE,
    fake_answer,
    fake_logprobs,
    fake_signature,
    fake_tokens,
)

__all__ = [
    "BASE",
    "FakeEngine",
    "Faults",
    "RecordedRequest",
    "fake_answer",
    "fake_logprobs",
    "fake_signature",
    "fake_tokens",
]
