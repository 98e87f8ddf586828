"""Deployments: their names and aliases."""

from __future__ import annotations

import pytest

from feedback.db import Database
from feedback.errors import BadRequest, Conflict
from tests.tuner.records import make_deployment
from tuner import deployments, releases
from tuner.releases import Role


def test_a_deployment_begins_with_its_base_as_release_0(database: Database) -> None:
    with database.write() as session:
        make_deployment(session, system_prompt="Be kind.", sampling={"temperature": 0.2})
    with database.read() as session:
        deployment = deployments.get_deployment(session, "assistant")
        origin = releases.production_of(session, deployment)
        assert (origin.name, origin.adapter_id, origin.engine_name) == ("assistant@0", None, "tiny")
        assert (origin.system_prompt, origin.sampling) == ("Be kind.", {"temperature": 0.2})
        assert releases.role_of(deployment, 0) == Role.PRODUCTION
        assert (deployment.previous, deployment.generation) == (None, 0)


@pytest.mark.parametrize("name", ["", "Assistant", "-a", "a b", "a@1", "a/b", "../a", "a" * 65])
def test_a_name_that_cannot_stand_in_a_url_is_refused(sqlite_database: Database, name: str) -> None:
    with sqlite_database.write() as session, pytest.raises(BadRequest, match="can't name"):
        make_deployment(session, name)


@pytest.mark.parametrize(
    ("name", "by"),
    [("assistant", "a deployment"), ("gpt-4o", "an alias"), ("tiny", "the name of a base model")],
)
def test_no_name_means_two_things(database: Database, name: str, by: str) -> None:
    with database.write() as session:
        make_deployment(session, aliases=["gpt-4o"])
        make_deployment(session, "second")
    with database.write() as session:
        with pytest.raises(Conflict, match=f"already {by}") as refused:
            make_deployment(session, name)
        assert refused.value.code == "name_taken"
        with pytest.raises(Conflict, match=f"already {by}"):
            deployments.set_aliases(session, "second", [name])


def test_aliases_are_replaced_and_lead_to_their_deployment(database: Database) -> None:
    with database.write() as session:
        make_deployment(session, aliases=["gpt-4o", "org/Model:1"])
        deployments.set_aliases(session, "assistant", ["gpt-5", "gpt-5"])
    with database.read() as session:
        assert deployments.list_aliases(session, "assistant") == ["gpt-5"]
        found = deployments.find_deployment_by_model(session, "gpt-5")
        assert found is not None
        assert found.name == "assistant"
        assert deployments.find_deployment_by_model(session, "gpt-4o") is None
    with database.write() as session, pytest.raises(BadRequest, match="can't be an alias"):
        deployments.set_aliases(session, "assistant", ["a b"])
