"""Dagster resources: configuration that builds an adapter."""
