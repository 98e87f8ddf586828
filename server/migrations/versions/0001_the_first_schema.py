"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import feedback.db

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("content_hash", sa.String(), nullable=False),
        sa.Column("r", sa.Integer(), nullable=False),
        sa.Column("lora_alpha", sa.Integer(), nullable=False),
        sa.Column("target_modules", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("base_revision", sa.String(), nullable=False),
        sa.Column("template_hash", sa.String(), nullable=True),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("probe", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("content_hash", name=op.f("uq_adapters_content_hash")),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("details", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("previous_hash", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_audit_subject"), ["subject"], unique=False)

    op.create_table(
        "datasets",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("policy", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("policy_hash", sa.String(), nullable=True),
        sa.Column("counts", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("dropped", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("content_hash", sa.String(), nullable=True),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("ready_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
    )
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_datasets_deployment"), ["deployment"], unique=False)

    op.create_table(
        "deployments",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("production", sa.Integer(), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=True),
        sa.Column("rolled_back", sa.Boolean(), nullable=False),
        sa.Column("canary", sa.Integer(), nullable=True),
        sa.Column("canary_percent", sa.Double(), nullable=False),
        sa.Column("canary_id", sa.String(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("policies", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("sources", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_deployments")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("method", sa.String(), nullable=True),
        sa.Column("deployment", sa.String(), nullable=True),
        sa.Column("spec", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("result", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("beat", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("pause_requested", sa.Boolean(), nullable=False),
        sa.Column("person_id", sa.String(), nullable=True),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("started_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("finished_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_jobs_deployment"), ["deployment"], unique=False)
        batch_op.create_index("ix_jobs_kind_id", ["kind", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_jobs_person_id"), ["person_id"], unique=False)
        batch_op.create_index("ix_jobs_status_id", ["status", "id"], unique=False)

    op.create_table(
        "keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("scopes", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("deployments", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("end_users", sa.Boolean(), nullable=False),
        sa.Column("limits", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("sha256", name=op.f("uq_keys_sha256")),
    )
    with op.batch_alter_table("keys", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_keys_user"), ["user"], unique=False)

    op.create_table(
        "secrets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secrets")),
    )
    op.create_table(
        "idempotent_requests",
        sa.Column("caller", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("reply", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("beat_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("caller", "key", name=op.f("pk_idempotent_requests")),
    )
    with op.batch_alter_table("idempotent_requests", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_idempotent_requests_created_at"), ["created_at"], unique=False
        )

    op.create_table(
        "people",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("end_user", sa.String(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_people")),
        sa.UniqueConstraint("user", "end_user", name=op.f("uq_people_user_end_user")),
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("person_id", sa.String(), nullable=False),
        sa.Column("external_id", sa.String(), nullable=True),
        sa.Column("root_hash", sa.String(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["person_id"],
            ["people.id"],
            name=op.f("fk_conversations_person_id_people"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversations")),
        sa.UniqueConstraint(
            "person_id", "external_id", name=op.f("uq_conversations_person_id_external_id")
        ),
    )
    with op.batch_alter_table("conversations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_conversations_person_id"), ["person_id"], unique=False)

    op.create_table(
        "dataset_rows",
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("example_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("side", sa.String(), nullable=False),
        sa.Column("answer_id", sa.String(), nullable=True),
        sa.Column("person_id", sa.String(), nullable=True),
        sa.Column("judgement_id", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["datasets.id"],
            name=op.f("fk_dataset_rows_dataset_id_datasets"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("dataset_id", "example_id", name=op.f("pk_dataset_rows")),
    )
    with op.batch_alter_table("dataset_rows", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_dataset_rows_answer_id"), ["answer_id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_dataset_rows_judgement_id"), ["judgement_id"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_dataset_rows_person_id"), ["person_id"], unique=False)

    op.create_table(
        "deployment_aliases",
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["deployment"],
            ["deployments.name"],
            name=op.f("fk_deployment_aliases_deployment_deployments"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("alias", name=op.f("pk_deployment_aliases")),
    )
    with op.batch_alter_table("deployment_aliases", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_deployment_aliases_deployment"), ["deployment"], unique=False
        )

    op.create_table(
        "files",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=True),
        sa.Column("side", sa.String(), nullable=True),
        sa.Column("dialect", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=True),
        sa.Column("person_id", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["datasets.id"],
            name=op.f("fk_files_dataset_id_datasets"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_files_dataset_id"), ["dataset_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_files_person_id"), ["person_id"], unique=False)

    op.create_table(
        "job_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    with op.batch_alter_table("job_events", schema=None) as batch_op:
        batch_op.create_index("ix_job_events_job_id_seq", ["job_id", "seq"], unique=True)

    op.create_table(
        "releases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.String(), nullable=True),
        sa.Column("engine_name", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("base_revision", sa.String(), nullable=False),
        sa.Column("template_hash", sa.String(), nullable=True),
        sa.Column("system_prompt", sa.Text(), nullable=True),
        sa.Column("sampling", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("acceptance", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("dataset_id", sa.String(), nullable=True),
        sa.Column("sources_left_out", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_releases_adapter_id_adapters")
        ),
        sa.ForeignKeyConstraint(
            ["deployment"], ["deployments.name"], name=op.f("fk_releases_deployment_deployments")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_releases")),
        sa.UniqueConstraint("deployment", "number", name=op.f("uq_releases_deployment_number")),
    )
    with op.batch_alter_table("releases", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_releases_adapter_id"), ["adapter_id"], unique=False)

    op.create_table(
        "answers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("person_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("deployment", sa.String(), nullable=True),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("requested_model", sa.String(), nullable=False),
        sa.Column("arm", sa.String(), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("engine", sa.String(), nullable=True),
        sa.Column("gateway", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("parent_id", sa.String(), nullable=True),
        sa.Column("regenerates_id", sa.String(), nullable=True),
        sa.Column("prefix_hash", sa.String(), nullable=False),
        sa.Column("stored", sa.Boolean(), nullable=False),
        sa.Column("trainable", sa.Boolean(), nullable=False),
        sa.Column("template_hash", sa.String(), nullable=True),
        sa.Column("sampling", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("started_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("first_token_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("ended_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_answers_conversation_id_conversations"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["person_id"],
            ["people.id"],
            name=op.f("fk_answers_person_id_people"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_answers")),
    )
    with op.batch_alter_table("answers", schema=None) as batch_op:
        batch_op.create_index(
            "ix_answers_conversation_id_id", ["conversation_id", "id"], unique=False
        )
        batch_op.create_index("ix_answers_deployment_id", ["deployment", "id"], unique=False)
        batch_op.create_index("ix_answers_gateway_status", ["gateway", "status"], unique=False)
        batch_op.create_index("ix_answers_person_id_id", ["person_id", "id"], unique=False)
        batch_op.create_index("ix_answers_prefix_hash", ["prefix_hash", "id"], unique=False)
        batch_op.create_index("ix_answers_release_id", ["release", "id"], unique=False)

    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("baseline", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=True),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("decision", sa.String(), nullable=True),
        sa.Column("reasons", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("checks", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("metrics", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("finished_at", feedback.db.UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["baseline"], ["releases.name"], name=op.f("fk_evaluations_baseline_releases")
        ),
        sa.ForeignKeyConstraint(
            ["release"], ["releases.name"], name=op.f("fk_evaluations_release_releases")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    with op.batch_alter_table("evaluations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_evaluations_deployment"), ["deployment"], unique=False)
        batch_op.create_index(batch_op.f("ix_evaluations_release"), ["release"], unique=False)

    op.create_table(
        "answer_continuations",
        sa.Column("answer_id", sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_answer_continuations_answer_id_answers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("answer_id", "choice_index", name=op.f("pk_answer_continuations")),
    )
    with op.batch_alter_table("answer_continuations", schema=None) as batch_op:
        batch_op.create_index("ix_answer_continuations_hash", ["hash", "answer_id"], unique=False)

    op.create_table(
        "answer_metadata",
        sa.Column("answer_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_answer_metadata_answer_id_answers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("answer_id", "key", name=op.f("pk_answer_metadata")),
    )
    with op.batch_alter_table("answer_metadata", schema=None) as batch_op:
        batch_op.create_index("ix_answer_metadata_key_value", ["key", "value"], unique=False)

    op.create_table(
        "answer_texts",
        sa.Column("answer_id", sa.String(), nullable=False),
        sa.Column("messages", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("tools", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("choices", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("reasoning", feedback.db.CanonicalJson(), nullable=True),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_answer_texts_answer_id_answers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("answer_id", name=op.f("pk_answer_texts")),
    )
    op.create_table(
        "comparisons",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("person_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("answer_a", sa.String(), nullable=False),
        sa.Column("choice_a", sa.Integer(), nullable=False),
        sa.Column("answer_b", sa.String(), nullable=False),
        sa.Column("choice_b", sa.Integer(), nullable=False),
        sa.Column("preferred", sa.String(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("source_type", sa.String(), nullable=False),
        sa.Column("source_id", sa.String(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("updated_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_a"],
            ["answers.id"],
            name=op.f("fk_comparisons_answer_a_answers"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["answer_b"],
            ["answers.id"],
            name=op.f("fk_comparisons_answer_b_answers"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["person_id"],
            ["people.id"],
            name=op.f("fk_comparisons_person_id_people"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comparisons")),
        sa.UniqueConstraint(
            "person_id",
            "answer_a",
            "choice_a",
            "answer_b",
            "choice_b",
            "source_type",
            "source_id",
            name="uq_comparisons_pair",
        ),
        sa.UniqueConstraint(
            "person_id", "client_id", name=op.f("uq_comparisons_person_id_client_id")
        ),
    )
    with op.batch_alter_table("comparisons", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_comparisons_answer_a"), ["answer_a"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparisons_answer_b"), ["answer_b"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparisons_person_id"), ["person_id"], unique=False)

    op.create_table(
        "extractions",
        sa.Column("answer_id", sa.String(), nullable=False),
        sa.Column("policy_hash", sa.String(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("examples", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("drops", feedback.db.CanonicalJson(), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_extractions_answer_id_answers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("answer_id", "policy_hash", name=op.f("pk_extractions")),
    )
    op.create_table(
        "judgements",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("person_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("target_id", sa.String(), nullable=False),
        sa.Column("answer_id", sa.String(), nullable=True),
        sa.Column("conversation_id", sa.String(), nullable=True),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("source_type", sa.String(), nullable=False),
        sa.Column("source_id", sa.String(), nullable=False),
        sa.Column("value", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("reasons", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("metadata", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("updated_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_judgements_answer_id_answers"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_judgements_conversation_id_conversations"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["person_id"],
            ["people.id"],
            name=op.f("fk_judgements_person_id_people"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judgements")),
        sa.UniqueConstraint(
            "person_id", "client_id", name=op.f("uq_judgements_person_id_client_id")
        ),
        sa.UniqueConstraint(
            "target_id",
            "choice_index",
            "kind",
            "name",
            "source_type",
            "source_id",
            "person_id",
            name="uq_judgements_target",
        ),
    )
    with op.batch_alter_table("judgements", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_judgements_answer_id"), ["answer_id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_judgements_conversation_id"), ["conversation_id"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_judgements_person_id"), ["person_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_judgements_target_id"), ["target_id"], unique=False)

    op.create_table(
        "comparison_revisions",
        sa.Column("comparison_id", sa.String(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("client_id", sa.String(), nullable=True),
        sa.Column("preferred", sa.String(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["comparison_id"],
            ["comparisons.id"],
            name=op.f("fk_comparison_revisions_comparison_id_comparisons"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("comparison_id", "revision", name=op.f("pk_comparison_revisions")),
    )
    with op.batch_alter_table("comparison_revisions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_comparison_revisions_client_id"), ["client_id"], unique=False
        )

    op.create_table(
        "judgement_revisions",
        sa.Column("judgement_id", sa.String(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("client_id", sa.String(), nullable=True),
        sa.Column("value", feedback.db.CanonicalJson(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("reasons", feedback.db.CanonicalJson(), nullable=False),
        sa.Column("at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["judgement_id"],
            ["judgements.id"],
            name=op.f("fk_judgement_revisions_judgement_id_judgements"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("judgement_id", "revision", name=op.f("pk_judgement_revisions")),
    )
    with op.batch_alter_table("judgement_revisions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_judgement_revisions_client_id"), ["client_id"], unique=False
        )


def downgrade() -> None:
    with op.batch_alter_table("judgement_revisions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_judgement_revisions_client_id"))

    op.drop_table("judgement_revisions")
    with op.batch_alter_table("comparison_revisions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_comparison_revisions_client_id"))

    op.drop_table("comparison_revisions")
    with op.batch_alter_table("judgements", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_judgements_target_id"))
        batch_op.drop_index(batch_op.f("ix_judgements_person_id"))
        batch_op.drop_index(batch_op.f("ix_judgements_conversation_id"))
        batch_op.drop_index(batch_op.f("ix_judgements_answer_id"))

    op.drop_table("judgements")
    op.drop_table("extractions")
    with op.batch_alter_table("comparisons", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_comparisons_person_id"))
        batch_op.drop_index(batch_op.f("ix_comparisons_answer_b"))
        batch_op.drop_index(batch_op.f("ix_comparisons_answer_a"))

    op.drop_table("comparisons")
    op.drop_table("answer_texts")
    with op.batch_alter_table("answer_metadata", schema=None) as batch_op:
        batch_op.drop_index("ix_answer_metadata_key_value")

    op.drop_table("answer_metadata")
    with op.batch_alter_table("answer_continuations", schema=None) as batch_op:
        batch_op.drop_index("ix_answer_continuations_hash")

    op.drop_table("answer_continuations")
    with op.batch_alter_table("evaluations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_evaluations_release"))
        batch_op.drop_index(batch_op.f("ix_evaluations_deployment"))

    op.drop_table("evaluations")
    with op.batch_alter_table("answers", schema=None) as batch_op:
        batch_op.drop_index("ix_answers_release_id")
        batch_op.drop_index("ix_answers_prefix_hash")
        batch_op.drop_index("ix_answers_person_id_id")
        batch_op.drop_index("ix_answers_gateway_status")
        batch_op.drop_index("ix_answers_deployment_id")
        batch_op.drop_index("ix_answers_conversation_id_id")

    op.drop_table("answers")
    with op.batch_alter_table("releases", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_releases_adapter_id"))

    op.drop_table("releases")
    with op.batch_alter_table("job_events", schema=None) as batch_op:
        batch_op.drop_index("ix_job_events_job_id_seq")

    op.drop_table("job_events")
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_files_person_id"))
        batch_op.drop_index(batch_op.f("ix_files_dataset_id"))

    op.drop_table("files")
    with op.batch_alter_table("deployment_aliases", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_deployment_aliases_deployment"))

    op.drop_table("deployment_aliases")
    with op.batch_alter_table("dataset_rows", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_dataset_rows_person_id"))
        batch_op.drop_index(batch_op.f("ix_dataset_rows_judgement_id"))
        batch_op.drop_index(batch_op.f("ix_dataset_rows_answer_id"))

    op.drop_table("dataset_rows")
    with op.batch_alter_table("conversations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_conversations_person_id"))

    op.drop_table("conversations")
    op.drop_table("people")
    with op.batch_alter_table("idempotent_requests", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_idempotent_requests_created_at"))

    op.drop_table("idempotent_requests")
    op.drop_table("secrets")
    with op.batch_alter_table("keys", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_keys_user"))

    op.drop_table("keys")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_status_id")
        batch_op.drop_index(batch_op.f("ix_jobs_person_id"))
        batch_op.drop_index("ix_jobs_kind_id")
        batch_op.drop_index(batch_op.f("ix_jobs_deployment"))

    op.drop_table("jobs")
    op.drop_table("deployments")
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_datasets_deployment"))

    op.drop_table("datasets")
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_audit_subject"))

    op.drop_table("audit")
    op.drop_table("adapters")
