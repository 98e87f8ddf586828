"""What is made or looked at before anything serves."""
