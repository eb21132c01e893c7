"""Recommends the data mixture to train a language model on, from the state of its data pool."""
