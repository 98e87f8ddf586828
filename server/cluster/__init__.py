"""What several gateways of one database know of each other."""
