"""Formats in which people hold training data, read into the rows that the tuner trains on.

`containers` tells how records lie in a file; `json_text`, `csv_text` and `parquet` read them.
`shapes` tells which form a record has, `messages` and `sharegpt` read its parts, and `rows` makes
the training rows of a whole file. `python -m feedback.formats` does that in a child process
(`__main__.py`), so nothing here imports the database.
"""
