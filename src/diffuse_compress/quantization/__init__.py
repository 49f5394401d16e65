"""The shared core: number formats, packing and quantized layers. Knows torch and the kernels, no model class."""
