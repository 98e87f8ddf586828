"""The fake engine's weights: pure functions of an adapter's bytes, and vLLM's two LRU caches.

Owns: signatures, the answers and figures that follow from them, and which adapters are in memory.
Tests call the same functions to know what to expect. Does not own: HTTP, and the bytes of a reply
(`answers.py`).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "base"  #: the signature of the base model
ANSWER_TOKENS = 32  #: length of an answer that `max_tokens` doesn't cut or stretch

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WORDS = (
    *(" amber", " basil", " cedar", " delta", " ember", " fjord", " grove", " hazel"),
    *(" inlet", " jetty", " kelp", " larch", " maple", " north", " ochre", " pearl"),
)


def fake_signature(folder: Path | str) -> str:
    """Eight hex digits over the two files of the adapter in `folder`.

    `FileNotFoundError` where one is missing.
    """
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(hashlib.sha256((Path(folder) / name).read_bytes()).digest())
    return digest.hexdigest()[:8]


def answer_pieces(
    signature: str, prompt: Any, index: int, tokens: int = ANSWER_TOKENS
) -> list[str]:
    """The tokens of an answer.

    Its signature, then words that follow from signature, prompt and `index`.
    """
    seed = f"{signature} {index} {json.dumps(prompt, sort_keys=True)}".encode(
        errors="surrogatepass"
    )
    letters = hashlib.shake_128(seed).digest(tokens - 1)
    return [signature, *[_WORDS[letter & 15] for letter in letters]]


def fake_answer(signature: str, prompt: Any, index: int = 0, tokens: int = ANSWER_TOKENS) -> str:
    """What the weights of `signature` answer to `prompt`, as choice `index`.

    A prompt is a list of messages, a text, or token ids.
    """
    return "".join(answer_pieces(signature, prompt, index, tokens))


def fake_logprobs(signature: str, ids: Sequence[int]) -> list[float]:
    """Log-probability of tokens 1…n-1 given those before them, in nats, below 0; `(len(ids) - 1)`.

    An adapter's figures lie ½ to 1½ nats from the base's, either way at each token.
    """
    base = [-2 - 6 * draw for draw in _draws(BASE, ids)]
    if signature == BASE:
        return base
    shifts = (2 * draw - 1 for draw in _draws(signature, ids))
    return [
        figure + shift + (0.5 if shift >= 0 else -0.5)
        for figure, shift in zip(base, shifts, strict=True)
    ]


def shifted(figures: Sequence[float], ids: Sequence[int], by: float) -> list[float]:
    """The figures as a quantised base gives them.

    Each is off by up to `by` nats, the same way every time.
    """
    draws = _draws("quantised", ids)
    return [figure + by * (2 * draw - 1) for figure, draw in zip(figures, draws, strict=True)]


def fake_tokens(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    default_system: str | None = None,
) -> list[int]:
    """Token ids of `messages`: the UTF-8 bytes of their ChatML rendering.

    `default_system` is what the template says as the system where the messages don't begin so.
    """
    if default_system is not None and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": default_system}, *messages]
    turns = [
        f"<|im_start|>{m.get('role')}\n{_text(m.get('content'))}<|im_end|>\n" for m in messages
    ]
    if add_generation_prompt:
        turns.append("<|im_start|>assistant\n")
    return list("".join(turns).encode(errors="surrogatepass"))


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def _draws(key: str, ids: Sequence[int]) -> Iterator[float]:
    """For each token after the first a number in [0, 1).

    It depends on `key` and on all tokens up to that one.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8)
    for position, token in enumerate(ids):
        digest.update(struct.pack("<q", token))
        if position:
            yield int.from_bytes(digest.copy().digest(), "little") / 2**64


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded name. vLLM never gives a number twice, also when the same name is loaded again."""

    number: int
    name: str
    path: str


class Slots:
    """Which adapters are served and which are in memory, as vLLM has it.

    `max_cpu_loras` adapters stay in memory; one more drops the least recently used, whose name
    stays and whose files are read again on its next request. At most `max_loras` adapters run at
    the same time; requests on others wait. Unloading forgets the name alone: what it had in memory
    ages out.
    """

    def __init__(self, max_loras: int, max_cpu_loras: int, read: Callable[[str], str]) -> None:
        self.max_loras = max_loras
        self.max_cpu_loras = max_cpu_loras
        self.served: dict[str, Adapter] = {}
        self.running: dict[int, int] = {}  #: requests in generation, by adapter number
        self.loads = 0  #: files read, first or again
        self.evictions = 0
        self._read = read
        self._last_number = 0
        # number → name, signature
        self._in_memory: OrderedDict[int, tuple[str, str]] = OrderedDict()
        self._prefix_cache: dict[tuple[str, str], str] = {}

    @property
    def in_memory(self) -> list[str]:
        """Names in memory, least recently used first; unloaded ones too, until they age out."""
        return [name for name, _ in self._in_memory.values()]

    def load(self, name: str, path: str) -> None:
        """Read the adapter and serve it as `name`. `FileNotFoundError` where a file is missing."""
        self._last_number += 1
        adapter = Adapter(self._last_number, name, path)
        self._bring(adapter)
        self.served[name] = adapter

    def has_room(self, adapter: Adapter | None) -> bool:
        """True when a request on `adapter` (None: the base) can start now."""
        return (
            adapter is None or adapter.number in self.running or len(self.running) < self.max_loras
        )

    def use(self, adapter: Adapter | None) -> str:
        """The signature of `adapter`, which becomes the most recently used.

        Its files are read again where it was evicted.
        """
        if adapter is None:
            return BASE
        if adapter.number not in self._in_memory:
            self._bring(adapter)
        self._in_memory.move_to_end(adapter.number)
        return self._in_memory[adapter.number][1]

    def cached(self, adapter: Adapter | None, signature: str) -> str:
        """The signature that generation shows.

        The prefix cache, keyed by name and path, outlives new weights.
        """
        if adapter is None:
            return signature
        return self._prefix_cache.setdefault((adapter.name, adapter.path), signature)

    def start(self, adapter: Adapter | None) -> None:
        """A request begins to generate."""
        number = adapter.number if adapter else 0
        if number:
            self.running[number] = self.running.get(number, 0) + 1

    def stop(self, adapter: Adapter | None) -> None:
        """It ended, however."""
        if adapter is None:
            return
        self.running[adapter.number] -= 1
        if not self.running[adapter.number]:
            del self.running[adapter.number]

    def _bring(self, adapter: Adapter) -> None:
        signature = self._read(adapter.path)
        self.loads += 1
        for number in self.running:  # vLLM uses these at every step
            if number in self._in_memory:
                self._in_memory.move_to_end(number)
        if len(self._in_memory) >= self.max_cpu_loras:
            self._in_memory.popitem(last=False)
            self.evictions += 1
        self._in_memory[adapter.number] = adapter.name, signature
