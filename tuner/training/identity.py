"""What makes two runs the same run: everything that the adapter depends on.

Owns: the identity by which a checkpoint is taken up and which the manifest tells. Does not own:
which settings count (`TrainingConfig.fingerprint`).
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from typing import Any

from tuner.adapters import WEIGHTS_FILE
from tuner.base_models import BaseModelError, content_revision, read_chat_template, template_hash
from tuner.methods import METHODS
from tuner.training.config import ConfigError, TrainingConfig

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


def run_identity(config: TrainingConfig) -> dict[str, Any]:
    """All that decides the adapter: two runs that agree in this are the same run."""
    try:
        revision = config.base_revision or content_revision(config.base_path)
        template = template_hash(read_chat_template(config.base_path))
    except BaseModelError as error:
        raise ConfigError(f"base_path: {error}") from None
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in config.train_files]
    validation = config.validation_file
    warm_start = config.warm_start and config.warm_start / WEIGHTS_FILE
    return {
        "config": config.fingerprint(),
        "files": files,
        # Absent otherwise, so that a run that an earlier version began is still the same run.
        **(
            {"validation_file": hashlib.sha256(validation.read_bytes()).hexdigest()}
            if validation is not None
            else {}
        ),
        # The order of kinds in an epoch was another once, so such a run can't be taken up.
        **({"order": "dealt"} if len(METHODS[config.method].reads) > 1 else {}),
        "base_revision": revision,
        "template_hash": template,
        "warm_start": (
            hashlib.sha256(warm_start.read_bytes()).hexdigest()
            if warm_start is not None and warm_start.is_file()
            else None
        ),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
    }
