"""Formats in which people hold training data, read into the rows that the tuner trains on.

`containers` knows JSON Lines, a JSON array, CSV and parquet; `shapes` knows what one record of
OpenAI's, TRL's, alpaca's and ShareGPT's form teaches.
"""
