"""What a key sees of the loop, and that what it changes is written down.

Owns: the rule that everything of a deployment outside a key's list is as unknown as what does not
exist, and the audit entries of routes. Does not own: whose answers somebody sees
(`feedback/people.py`), scopes (`scopes.py`).
"""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import or_, select, true
from sqlalchemy.orm import Session

from feedback import audit
from feedback.db import canonical_json
from feedback.errors import Forbidden, NotFound, RateLimited
from feedback.tables import Dataset, File
from server.access.keyring import Caller
from server.access.keys import list_makers
from server.access.scopes import Scope
from server.settings import Settings
from tuner.jobs import count_unfinished
from tuner.tables import Adapter, Deployment, Evaluation, Job, Release

_JOB_SECONDS = 60  #: about what the shortest job takes


def sees(caller: Caller, deployment: str | None) -> bool:
    """True when the caller's key reaches this deployment; None is of no deployment."""
    allowed = caller.key.deployments
    return allowed is None or deployment in allowed


def reach(session: Session, caller: Caller, deployment: str | None) -> tuple[str, ...] | None:
    """The deployments that a list shows: the one asked for, else all that the key may use.

    None stands for every deployment. Raises NotFound.
    """
    if deployment is None:
        return caller.key.deployments
    return (get_deployment(session, caller, deployment, param="deployment").name,)


def check_unlimited(caller: Caller, what: str) -> None:
    """Raises Forbidden for a key that is limited to deployments; `what` is what covers them all."""
    allowed = caller.key.deployments
    if allowed is not None:
        raise Forbidden(
            f"{what} covers all deployments, and this key is limited to "
            f"{', '.join(allowed) or 'none'}"
        )


def get_deployment(
    session: Session, caller: Caller, name: str, *, param: str | None = None
) -> Deployment:
    """The deployment of that name (aliases don't count). Raises NotFound."""
    row = session.get(Deployment, name)
    if row is None or not sees(caller, row.name):
        raise _unknown("deployment", name, "deployments", param)
    return row


def get_release(
    session: Session, caller: Caller, name: str, *, param: str | None = None
) -> Release:
    """The release `assistant@7`. Raises NotFound."""
    row = session.get(Release, name)
    if row is None or not sees(caller, row.deployment):
        raise _unknown("release", name, "releases", param)
    return row


def get_adapter(session: Session, caller: Caller, adapter_id: str) -> tuple[Adapter, list[Release]]:
    """The adapter with those of its releases that the caller may see.

    Raises NotFound, also for a key limited to deployments that have no release of it.
    """
    row = session.get(Adapter, adapter_id)
    found = session.scalars(
        select(Release).where(Release.adapter_id == adapter_id).order_by(Release.name)
    )
    releases = [release for release in found if sees(caller, release.deployment)]
    if row is None or not (releases or caller.key.deployments is None):
        raise _unknown("adapter", adapter_id, "releases", None)
    return row, releases


def get_dataset(
    session: Session, caller: Caller, dataset_id: str, *, param: str | None = None
) -> Dataset:
    """The data set `ds_…`. Raises NotFound."""
    row = session.get(Dataset, dataset_id)
    if row is None or not sees(caller, row.deployment):
        raise _unknown("data set", dataset_id, "data sets", param)
    return row


def get_file(session: Session, caller: Caller, file_id: str, *, param: str | None = None) -> File:
    """The file `file-…`: of a data set that the caller sees, or an upload of theirs.

    An administrator of all deployments sees everybody's uploads. Raises NotFound.
    """
    row = session.get(File, file_id)
    if row is not None and row.dataset_id is not None:
        dataset = session.get(Dataset, row.dataset_id)
        if dataset is not None and sees(caller, dataset.deployment):
            return row
    elif row is not None and (_sees_all_uploads(caller) or row.person_id == caller.person_id):
        return row
    raise _unknown("file", file_id, "files", param)


def list_files(
    session: Session,
    caller: Caller,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 20,
    descending: bool = True,
) -> tuple[list[File], bool]:
    """A page of the files that `get_file` finds for the caller, and whether more follow."""
    of_datasets = select(Dataset.id)
    if caller.key.deployments is not None:
        of_datasets = of_datasets.where(Dataset.deployment.in_(caller.key.deployments))
    theirs = true() if _sees_all_uploads(caller) else File.person_id == caller.person_id
    own = File.dataset_id.is_(None) & theirs
    query = select(File).where(or_(File.dataset_id.in_(of_datasets), own))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if after is not None:
        last = get_file(session, caller, after, param="after").id
        query = query.where(File.id < last if descending else File.id > last)
    by = File.id.desc() if descending else File.id.asc()
    rows = session.scalars(query.order_by(by).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def _sees_all_uploads(caller: Caller) -> bool:
    """Uploads belong to nobody's deployment, so an administrator's key must reach all of them."""
    return caller.key.allows(Scope.ADMIN) and caller.key.deployments is None


def get_evaluation(session: Session, caller: Caller, evaluation_id: str) -> Evaluation:
    """The evaluation `eval_…`. Raises NotFound."""
    row = session.get(Evaluation, evaluation_id)
    if row is None or not sees(caller, row.deployment):
        raise _unknown("evaluation", evaluation_id, "evaluations", None)
    return row


def get_job(session: Session, caller: Caller, job_id: str, *, kind: str | None = None) -> Job:
    """The job, of that kind where one is given. Raises NotFound."""
    row = session.get(Job, job_id)
    if row is None or not sees(caller, row.deployment) or kind not in (None, row.kind):
        raise _unknown("job", job_id, "jobs", None)
    return row


def check_job_quota(session: Session, caller: Caller, settings: Settings) -> None:
    """Raises RateLimited where as many of the caller's jobs are unfinished as may be."""
    most = settings.limits.unfinished_jobs
    if most is None:
        return
    there = count_unfinished(session, caller.person_id)
    if there >= most:
        raise RateLimited(
            f"{there} jobs of {caller.key.user!r} wait, run or are paused, and "
            f"limits.unfinished_jobs is {most}: wait until one has ended, or cancel one",
            retry_after_seconds=_JOB_SECONDS,
        )


_ABRIDGED_CHARS = 400  #: of a detail that is too long for the audit log


def append_audit(
    session: Session, caller: Caller, action: str, subject: str, **details: Any
) -> None:
    """Write down what the caller did; it stands with the transaction that did it."""
    append_audit_of(session, caller.key.user, caller.key.id, action, subject, details)


def append_audit_of(
    session: Session,
    actor: str,
    key_id: str | None,
    action: str,
    subject: str,
    details: dict[str, Any],
) -> None:
    """Write down what `actor` did, with that key; details that are too long are abridged."""
    audit.append(
        session,
        actor=actor,
        key_id=key_id,
        made_by=list_makers(session, key_id),
        action=action,
        subject=subject,
        details=_abridge(details),
    )


def _abridge(details: dict[str, Any]) -> dict[str, Any]:
    """`details` as an entry has room for them: of the longest the beginning, its length and hash.

    What a caller may set can be longer than what the log keeps of it: many aliases, a policy, a
    note; so can the proofs of many engines.
    """
    kept = dict(details)
    texts = {name: canonical_json(value) for name, value in details.items()}
    for name in sorted(texts, key=lambda name: -len(texts[name])):
        if len(canonical_json(kept)) <= audit.MAX_DETAILS_CHARS:
            break
        text = texts[name]
        kept[name] = {
            "begins": text[:_ABRIDGED_CHARS],
            "characters": len(text),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    return kept


def _unknown(what: str, name: str, listed: str, param: str | None) -> NotFound:
    return NotFound(
        f"no {what} {name[:200]!r}; the list of {listed} names those that exist", param=param
    )
