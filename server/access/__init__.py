"""Who may do what: keys, scopes, limits, tokens, and what a key sees."""
