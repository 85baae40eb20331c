"""Measuring: recall of an encoder, an index and a served collection, as tables, JSON and HTML."""
