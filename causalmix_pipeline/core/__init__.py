"""The method: plain functions on arrays, free of Dagster, torch, econml and the disk."""
