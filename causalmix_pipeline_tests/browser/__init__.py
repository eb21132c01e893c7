"""The Dagster UI of a project, in a real browser."""
