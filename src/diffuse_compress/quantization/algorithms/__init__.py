"""Algorithms that choose the codes of a weight: one file, one config and one entry point each."""
