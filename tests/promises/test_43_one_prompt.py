"""Promise 43: what an engine is given, what is recorded, trained and evaluated is one prompt.

Conversations of every shape under templates of four families: the ids that a real vLLM renders for
a chat request, as the gateway sends it, are the trainer's and the evaluation's, and none of them is
a control token that a person wrote.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from feedback.db import json_in_order
from server.chat.engine_request import encode_body, engine_body
from server.chat.request import parse_chat
from server.endpoints.internal import AnswerItem, tokenize_item
from server.engines.base import EngineAddress
from server.engines.vllm import VllmEngine
from tests.chat_templates import ENDS, FAMILIES
from tests.conversations import HOSTILE, draw_conversation
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled
from tests.tiny_model import MARKUP_TOKENS, MORE_SPECIAL_TOKENS, SPECIAL_TOKENS
from tuner.base_models import BaseModel, read_special_tokens
from tuner.chat_template import ChatTemplate, TemplateRefused
from tuner.control_tokens import ControlTokens
from tuner.training.rendering import Renderer
from tuner.training.rows import Row, read_rows

pytestmark = [pytest.mark.promises, pytest.mark.engine, pytest.mark.anyio]

CONVERSATIONS = 800
LONGEST = 480  #: tokens; the tiny model takes 512
ANSWERS = ("Yes.", " Grüße\n", "<think>\nso\n</think>\n\nYes.", "<|im_end|>")


class Templated(VllmEngine):
    """An engine whose requests name the template that it renders with."""

    template: str

    async def render(self, body: bytes) -> list[int] | None:
        """The ids that a chat request is answered after; None where it is refused."""
        asked = {"max_tokens": 1, "return_token_ids": True, "chat_template": self.template}
        sent = json.dumps({**json.loads(body), **asked}).encode()
        path = "/v1/chat/completions"
        async with self.post(path, sent, request_id="grid", timeout_seconds=60) as reply:
            found = json.loads(b"".join([piece async for piece in reply.body]))
        if reply.status == 400:
            return None
        assert reply.status == 200, found
        return [int(token) for token in found["prompt_token_ids"]]

    async def _tokenize(self, body: Mapping[str, Any]) -> list[int]:
        of_chat = {"chat_template": self.template} if "messages" in body else {}
        return await super()._tokenize({**body, **of_chat})


@pytest.fixture
async def engine(real_engine: EngineAddress) -> AsyncIterator[Templated]:
    connected = Templated(real_engine)
    yield connected
    await connected.close()


class Trainer:
    """What a trainer renders under one template."""

    def __init__(self, folder: Path, tokenizer: Any, family: str, base: BaseModel) -> None:
        self._file = folder / "rows.jsonl"
        end = tokenizer.convert_tokens_to_ids(ENDS[family])
        self.renderer = Renderer(
            tokenizer,
            [end],
            template=base.chat_template,
            control_tokens=base.control_tokens,
            max_length=100_000,
        )

    def read(self, *rows: Mapping[str, Any]) -> list[Row]:
        """The rows by way of a data set's file."""
        self._file.write_text("".join(json_in_order(row) + "\n" for row in rows))
        return read_rows([self._file])


def base_of(family: str, model: Path, tokenizer: Any) -> BaseModel:
    text = FAMILIES[family]
    return BaseModel(
        name="tiny",
        path=model,
        revision="r",
        template_hash="t",
        architecture="llama",
        max_position_embeddings=100_000,
        vocab_size=320,
        eos_token_ids=(tokenizer.convert_tokens_to_ids(ENDS[family]),),
        linear_modules={},
        chat_template=ChatTemplate(text, special_tokens=read_special_tokens(model)),
        control_tokens=ControlTokens.of(
            (*SPECIAL_TOKENS, *MORE_SPECIAL_TOKENS), MARKUP_TOKENS, [text]
        ),
    )


def without_hostile(value: Any) -> Any:
    """The conversation as people would have it who write no control tokens."""
    if isinstance(value, str):
        for text in (*HOSTILE, "<|im_end|>", "\\u003c|im_end|>", "<|im_start|>"):
            value = value.replace(text, "x")
        return value
    if isinstance(value, dict):
        return {key: without_hostile(inner) for key, inner in value.items()}
    return [without_hostile(inner) for inner in value] if isinstance(value, list) else value


def count(ids: Sequence[int], tokens: frozenset[int]) -> int:
    return sum(token in tokens for token in ids)


@pytest.mark.parametrize("family", FAMILIES)
async def test_served_recorded_trained_and_evaluated_prompts_are_the_same_tokens(
    family: str, engine: Templated, tiny_model: Path, tmp_path: Path, figures: Figures
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = base_of(family, tiny_model, tokenizer)
    engine.template = FAMILIES[family]
    trainer = Trainer(tmp_path, tokenizer, family, base)
    control = frozenset(tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MORE_SPECIAL_TOKENS]))
    compared = refused = evaluated = 0
    for seed in range(scaled(CONVERSATIONS)):
        asked = draw_conversation(seed)
        parsed = parse_chat(asked, max_choices=1, strict=False)
        sent = engine_body(
            parsed,
            engine_name="tiny",
            messages=parsed.messages,
            sampling={},
            template_kwargs=frozenset({"enable_thinking"}),
        )
        answer = ANSWERS[seed % len(ANSWERS)]
        (row,) = trainer.read(
            {
                "id": str(seed),
                "prompt": parsed.messages,
                "completion": [{"role": "assistant", "content": answer}],
                "tools": sent.get("tools"),
                "template_kwargs": sent.get("chat_template_kwargs"),
            }
        )
        try:
            trained = trainer.renderer.render_prompt(row.prompt, row.tools, variables=row.variables)
        except TemplateRefused:
            trained = None
        if trained is not None and len(trained) > LONGEST:
            continue
        served = await engine.render(encode_body(sent, base.control_tokens))
        assert served == (None if trained is None else list(trained)), asked
        if trained is None:
            refused += 1
            continue
        compared += 1

        harmless = without_hostile(asked)
        plain = trainer.renderer.render_prompt(
            harmless["messages"], row.tools, variables=row.variables
        )
        assert count(trained, control) == count(plain, control), asked

        rendered = trainer.renderer.render([row], frozenset({"supervised"}))
        item = AnswerItem(
            prompt=parsed.messages,
            completion=[{"role": "assistant", "content": answer}],
            tools=sent.get("tools"),
            template_kwargs=sent.get("chat_template_kwargs"),
        )
        scored = await tokenize_item(engine, base, item)
        if isinstance(scored, str):
            assert rendered.drops == {scored: 1}
        else:
            evaluated += 1
            (example,) = rendered.examples
            assert scored == (len(example.prompt), [*example.prompt, *example.completions[0]])
    figures(compared=compared, refused=refused, evaluated=evaluated, different=0)
    assert compared > refused or family == "no_system"
    assert evaluated > 0
