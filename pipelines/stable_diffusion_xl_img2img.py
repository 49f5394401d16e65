"""Written by diffuse_compress. No `import diffuse_compress` in your code; for other folders pass the path of this file:
DiffusionPipeline.from_pretrained(PATH_OR_REPO, custom_pipeline="pipeline", trust_remote_code=True)"""

import diffusers

try:
    from diffuse_compress.pipelines import mixin
except ImportError as error:
    raise ImportError(
        "this checkpoint needs diffuse_compress: pip install git+https://github.com/diffuse-compress/diffuse-compress"
    ) from error

# diffusers runs every local pipeline.py in one module and wants exactly one pipeline class there.
for key in [key for key, value in globals().items() if isinstance(value, type)]:
    del globals()[key]


class StableDiffusionXLImg2ImgPipeline(mixin.CompressedPipelineMixin, diffusers.StableDiffusionXLImg2ImgPipeline):
    __doc__ = diffusers.StableDiffusionXLImg2ImgPipeline.__doc__
