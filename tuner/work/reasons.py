"""Why a job ended otherwise than by success: a stable code and a sentence for people."""

from __future__ import annotations

from feedback.errors import AppError
from tuner.adapters import AdapterRefused
from tuner.base_models import BaseModelError
from tuner.crashes import describe_crash
from tuner.evaluation.gateway_client import GatewayError, GatewayUnreachable, SlotLost
from tuner.jobs import JobFailed, LeaseLost
from tuner.training.config import ConfigError
from tuner.work.lease import JobCancelled, JobPaused, WorkerStopping
from tuner.work.trainer import TrainingFailed

UNFORESEEN = "internal_error"
"""The code of an error that nobody foresaw."""


def reason_of(error: Exception) -> tuple[str, str]:
    """The code and the sentence of the error that ended a job."""
    match error:
        case JobFailed() | TrainingFailed() | AdapterRefused():
            return error.code, error.message
        case AppError():
            return error.code or "refused", error.message
        case SlotLost():
            return "evaluation_slot_lost", str(error)
        case GatewayError():
            return error.code or "gateway_refused", str(error)
        case GatewayUnreachable():
            return "gateway_unreachable", str(error)
        case BaseModelError():
            return "base_unfit", str(error)
        case ConfigError():
            return "bad_hyperparameters", str(error)
        case LeaseLost():
            return "lease_lost", str(error)
        case WorkerStopping():
            return "worker_stopping", "the worker is shutting down"
        case JobCancelled():
            return "cancelled", "somebody asked for it"
        case JobPaused():
            return "paused", "somebody asked for it"
        case OSError():
            return "storage_failed", str(error)
        case _:
            return UNFORESEEN, f"{describe_crash(error)}; see the worker's log."


def for_the_log(error: Exception) -> str:
    """The sentence of `reason_of`, or its code alone where the words may be people's.

    A refusal's words may be an engine's, which may repeat a prompt: the job alone has them.
    """
    code, message = reason_of(error)
    return code if isinstance(error, GatewayError | GatewayUnreachable) else message
