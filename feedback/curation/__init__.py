"""From judged answers to training examples.

`extract` looks at one answer, `select` at all that came of them.

Both are pure. `policy` says how, `judged` reads the answers with their verdicts from the database,
`extractions` keeps what was made of them, `files` writes what was selected.
"""
