"""Where this package meets diffusers, transformers and their neighbours."""
