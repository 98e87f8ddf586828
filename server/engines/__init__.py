"""Inference engines: the seam, vLLM, the conductor, the chooser."""
