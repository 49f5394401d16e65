"""diffuse_compress: make diffusers and transformers models smaller and faster, in place."""
