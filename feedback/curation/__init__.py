"""Curation: from judged answers to training examples.

`extract` turns one judged answer into examples, `select` chooses among the examples of all answers.
Both are pure. `policy` holds their rules, `judged` reads the answers with their verdicts from the
database, `extractions` keeps what was made of them, `files` writes what was selected.
"""
