"""Measuring a candidate against production, and deciding about it."""
