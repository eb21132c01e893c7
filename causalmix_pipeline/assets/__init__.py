"""Dagster assets: read inputs, call core, return value, metadata and checks."""
