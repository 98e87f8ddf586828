"""From a data set to a proven candidate.

Jobs, adapters, releases, evaluations, gate, worker, training.
"""
