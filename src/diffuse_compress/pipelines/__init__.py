"""What makes a compressed checkpoint load through ``custom_pipeline=``."""
