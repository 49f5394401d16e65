"""Measuring what a compression costs: paired picture metrics, intervals, seeded generation, controls."""
