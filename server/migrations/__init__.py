"""The schema's history, for all tables of the three packages. Migrations go forward only."""
