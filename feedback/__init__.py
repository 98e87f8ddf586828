"""The record: people, answers, judgements, curation, data sets, audit."""
