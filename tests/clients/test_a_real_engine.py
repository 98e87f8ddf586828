"""OpenAI's client against a Burnish over a real vLLM: what the fake engine can't show.

The model is tiny and random, so it can be told what form to answer in and not what to say.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engines.base import EngineAddress
from tests.clients.conftest import run_program
from tests.clients.environments import Client
from tests.clients.service import start_service

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("engine")]


@pytest.mark.parametrize("client", ["openai-3"], indirect=True, scope="session")
def test_it_chats_streams_keeps_to_a_schema_and_asks_what_it_has_fine_tuned(
    client: Client, real_engine: EngineAddress, tiny_model: Path, tmp_path: Path
) -> None:
    with start_service(tmp_path, tiny_model, real_engine) as service:
        environment = service.environment(client.name)
        scenarios = ("chat", "streamed_chat", "json_schema", "fine_tuning")
        report = run_program(client, environment, *scenarios)
        assert report["chat"]["model"] == "assistant@0"
        assert report["chat"]["usage"]["completion_tokens"] == 8
        assert report["streamed_chat"]["usages"] == [report["chat"]["usage"]]
        assert report["streamed_chat"]["finish_reasons"] == ["length"]
        for answer in report["json_schema"].values():
            assert answer["phase"] in ("high", "low")
            assert answer["is_spring_tide"] in (True, False)

        # This engine has one slot, kept for evaluations until a release has a role: promoted, it is
        # loaded and proven there, and answers.
        name = report["fine_tuning"]["job"]["fine_tuned_model"]
        service.promote(name)
        environment = {**environment, "FINE_TUNED_MODEL": name}
        answer = run_program(client, environment, "fine_tuned_model")["fine_tuned_model"]
        assert (name, answer["model"]) == ("assistant@1", "assistant@1")
        assert answer["usage"]["completion_tokens"] == 8
        assert service.problems() == []
