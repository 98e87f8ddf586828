"""From a data set to a proven candidate:

jobs, adapters, releases, evaluations, gate, worker, training.
"""
