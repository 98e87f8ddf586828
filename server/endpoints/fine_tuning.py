"""`/v1/fine_tuning/jobs`: tuning jobs in OpenAI's words.

`model` is a deployment or an alias of one, `fine_tuned_model` the release that came of it: a
candidate, never production.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from sqlalchemy.orm import Session

from feedback.errors import BadRequest
from server.access.keyring import Caller
from server.access.visibility import (
    append_audit,
    check_job_quota,
    get_dataset,
    get_file,
    get_job,
    sees,
)
from server.chat.request import Metadata
from server.chat.routing import unknown_model
from server.endpoints.bodies import Body, JsonRoute, Part
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession, WriteSession
from server.endpoints.fields import Name
from server.gateway import Gateway
from server.http.replies import IGNORED_HEADER
from server.views.objects import Page, page
from server.views.tuning_jobs import (
    TuningCheckpoint,
    TuningEvent,
    TuningJob,
    view_checkpoint,
    view_event,
    view_tuning_job,
)
from tuner import job_events, jobs
from tuner.deployments import find_deployment_by_model
from tuner.methods import AUTO, HYPERPARAMETERS, Method
from tuner.tables import Deployment, JobKind
from tuner.tuning import LONGEST_SUFFIX, create_tuning_job

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=JsonRoute)

Limit = Annotated[int, Query(ge=1, le=1000)]

Hyperparameters = Annotated[dict[Annotated[str, Field(max_length=64)], Any], Field(max_length=32)]


class MethodOptions(Part):
    hyperparameters: Hyperparameters | None = Field(
        default=None, description='Numbers, or "auto" for the default.'
    )


class MethodChoice(Part):
    type: Name = str(Method.SUPERVISED)
    supervised: MethodOptions | None = None
    dpo: MethodOptions | None = None
    kto: MethodOptions | None = None
    combined: MethodOptions | None = None
    reinforcement: None = Field(default=None, description="OpenAI's; null only.")


class JobCreate(Body):
    """OpenAI's request."""

    model: Name
    training_file: Name = Field(description="`file-…`, or `ds_…`: all of it that the method uses.")
    validation_file: Name | None = Field(
        default=None, description="`file-…`, whose rows end the run early and never train."
    )
    method: MethodChoice | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="OpenAI's older place for them; `method` is the newer."
    )
    suffix: Annotated[str, Field(min_length=1, max_length=LONGEST_SUFFIX)] | None = Field(
        default=None, description="What you call the release; its name stays `assistant@3`."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[dict[str, Any]], Field(max_length=16)] | None = Field(
        default=None, description="Ignored: nothing is sent to other services."
    )


@router.post("")
def create_job(
    body: JobCreate,
    caller: CallerDep,
    gateway: GatewayDep,
    session: WriteSession,
    response: Response,
) -> TuningJob:
    """Queue a tuning job."""
    if body.integrations:
        if gateway.settings.gateway.strict:
            raise BadRequest(
                "integrations can't be served: nothing is sent to other services; this gateway is "
                "strict",
                param="integrations",
            )
        response.headers[IGNORED_HEADER] = "integrations"
    method = body.method or MethodChoice()
    deployment = _find_deployment(session, gateway, caller, body.model)
    if body.training_file.startswith("ds_"):
        get_dataset(session, caller, body.training_file, param="training_file")
    else:
        get_file(session, caller, body.training_file, param="training_file")
    validation_file = body.validation_file
    if validation_file is not None and not validation_file.startswith("ds_"):
        get_file(session, caller, validation_file, param="validation_file")
    check_job_quota(session, caller, gateway.settings)
    job = create_tuning_job(
        session,
        deployment,
        method=method.type,
        training_file=body.training_file,
        validation_file=validation_file,
        hyperparameters=_hyperparameters(body, method),
        suffix=body.suffix,
        seed=body.seed or 0,
        max_rank=gateway.settings.engine.max_lora_rank,
        person_id=caller.person_id,
        created_by=caller.key.user,
    )
    if body.metadata:
        job.spec = {**job.spec, "metadata": body.metadata}
        session.flush()
    append_audit(
        session,
        caller,
        "job_created",
        job.id,
        deployment=deployment.name,
        method=job.method,
        training_file=body.training_file,
        validation_file=validation_file,
    )
    return view_tuning_job(session, job)


@router.get("")
def list_jobs(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[TuningJob]:
    """Tuning jobs, newest first."""
    if any(name.startswith("metadata") for name in request.query_params):
        raise BadRequest("tuning jobs can't be filtered by metadata", param="metadata")
    if after is not None:
        get_job(session, caller, after, kind=JobKind.TUNE)
    rows, has_more = jobs.list_jobs(
        session,
        kind=JobKind.TUNE,
        deployments=caller.key.deployments,
        after=after,
        limit=limit,
    )
    return page([view_tuning_job(session, row) for row in rows], has_more)


@router.get("/{job_id}")
def get_one_job(job_id: str, caller: CallerDep, session: ReadSession) -> TuningJob:
    """One tuning job."""
    return view_tuning_job(session, get_job(session, caller, job_id, kind=JobKind.TUNE))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: CallerDep, session: WriteSession) -> TuningJob:
    """Cancel it: a queued one at once, a running one as soon as its worker hears of it."""
    get_job(session, caller, job_id, kind=JobKind.TUNE)
    job = jobs.request_cancel(session, job_id)
    append_audit(session, caller, "job_cancelled", job.id, deployment=job.deployment)
    return view_tuning_job(session, job)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: CallerDep, session: WriteSession) -> TuningJob:
    """Put it aside: a queued one at once, a running one as soon as its worker hears of it."""
    get_job(session, caller, job_id, kind=JobKind.TUNE)
    job = jobs.request_pause(session, job_id)
    append_audit(session, caller, "job_paused", job.id, deployment=job.deployment)
    return view_tuning_job(session, job)


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: CallerDep, session: WriteSession) -> TuningJob:
    """Queue a paused job again; it goes on from its last checkpoint."""
    get_job(session, caller, job_id, kind=JobKind.TUNE)
    job = jobs.resume(session, job_id)
    append_audit(session, caller, "job_resumed", job.id, deployment=job.deployment)
    return view_tuning_job(session, job)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 10,
) -> Page[TuningCheckpoint]:
    """Steps at which the run was saved, newest first. They serve to resume it, not to answer."""
    get_job(session, caller, job_id, kind=JobKind.TUNE)
    rows, has_more = job_events.list_checkpoints(session, job_id, after=after, limit=limit)
    return page([view_checkpoint(row, figures) for row, figures in rows], has_more)


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[TuningEvent]:
    """What happened in it, newest first."""
    get_job(session, caller, job_id, kind=JobKind.TUNE)
    rows, has_more = job_events.list_events(session, job_id, after=after, limit=limit)
    return page([view_event(row) for row in rows], has_more)


def _find_deployment(session: Session, gateway: Gateway, caller: Caller, model: str) -> Deployment:
    found = find_deployment_by_model(session, model)
    if found is None or not sees(caller, found.name):
        raise unknown_model(model, gateway.directory.snapshot, caller.key.deployments)
    return found


def _hyperparameters(body: JobCreate, method: MethodChoice) -> dict[str, Any]:
    """Those of the chosen method, or of the older place, where some scripts repeat "auto".

    Raises BadRequest where both have values.
    """
    chosen: dict[str, Any] | None = None
    for name in Method:
        options: MethodOptions | None = getattr(method, name)
        if options is not None and name != method.type:
            raise BadRequest(
                f"method.{name} was given, but method.type is {method.type!r}",
                param=f"method.{name}",
            )
        chosen = options.hyperparameters if options is not None else chosen
    newer, older = _without_auto(chosen), _without_auto(body.hyperparameters)
    if newer and older:
        raise BadRequest(
            f"found hyperparameters and method.{method.type}.hyperparameters; give one of them",
            param="hyperparameters",
        )
    return newer or older


def _without_auto(given: dict[str, Any] | None) -> dict[str, Any]:
    """What was set. An unknown name stays, whatever its value, to be refused."""
    return {
        name: value
        for name, value in (given or {}).items()
        if name not in HYPERPARAMETERS or value not in (AUTO, None)
    }
