"""The worker, and how it does each kind of job."""
