"""Formats of other libraries for language models, written so that these load them without this package."""
