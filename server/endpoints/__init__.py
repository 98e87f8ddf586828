"""The routes of the API, one module per noun.

A route reads like a table of contents; the rules are elsewhere.
"""

from server.endpoints import (
    adapters,
    audit,
    chat,
    comparisons,
    datasets,
    deployments,
    evaluations,
    explain,
    feedback,
    files,
    fine_tuning,
    health,
    internal,
    jobs,
    keys,
    metrics,
    models,
    pages,
    releases,
    stored,
    whoami,
)

ROUTERS = (
    health.router,
    chat.router,
    stored.router,
    models.router,
    feedback.router,
    comparisons.router,
    files.router,
    fine_tuning.router,
    whoami.router,
    deployments.router,
    releases.router,
    adapters.router,
    datasets.router,
    evaluations.router,
    explain.router,
    jobs.router,
    keys.router,
    audit.router,
    metrics.router,
    internal.router,
    pages.router,
)
