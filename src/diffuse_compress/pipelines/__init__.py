"""Pipeline classes of diffusers with what compressed models gain from them, and the files that load through
``custom_pipeline=``."""
