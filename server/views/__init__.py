"""What a caller is shown of a row: the shape of a reply, and the function that fills it.

One module per noun. A shape is a `TypedDict`: what a view builds is a plain dict, mypy checks its
keys, the API's description has them, and a page is handed the same. A view reads through the
session where a row alone does not tell, and shows what the caller's key may see; it never writes.
"""
