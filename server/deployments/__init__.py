"""The effects of moves between releases."""
