"""Feature caches: schedules of what to compute and what to reuse, their execution and fast calibration."""
