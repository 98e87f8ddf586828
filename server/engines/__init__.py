"""Inference engines: the seam, vLLM, its process, the shipped fake, the fleet."""
