"""The way of one answer: from a request to its row."""
