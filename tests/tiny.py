"""Tiny stock models and pipelines for tests: built from configurations, about a million parameters, no hub.

`build(name)` makes a model of `MODELS`, `inputs_for(model)` the keyword arguments of its forward,
`build_pipeline(name)` a complete stock pipeline of `PIPELINES` and `call_kwargs(pipe)` a cheap call of it. The global
random state is never touched, and the same seed gives the same bytes. Widths are multiples of 128 where that size
allows it, so that every preset's group size divides them; pass `config` overrides to get awkward shapes on purpose.
Biases and norm weights are moved off their initial zeros and ones: a test on them must be able to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_LENGTH = 16
VOCABULARY = 128
WORDS = "a the red blue green yellow cat dog house tree sun moon face with of and on in small large".split()


def _builder(make: Callable[..., nn.Module], **defaults: Any) -> Callable[..., nn.Module]:
    """`make` with a tiny configuration, of which every entry can be given otherwise."""
    return lambda **config: make(**{**defaults, **config})


def _from_config(config_class: Any, model_class: Any) -> Callable[..., nn.Module]:
    """What transformers builds from a configuration object."""
    return lambda **config: model_class(config_class(**config))


_pixart = _builder(
    PixArtTransformer2DModel,
    sample_size=8,
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=2,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    cross_attention_dim=128,
    caption_channels=64,
    use_additional_conditions=False,
)


_dit = _builder(
    DiTTransformer2DModel,
    sample_size=8,
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=2,
    in_channels=4,
    out_channels=8,
    num_embeds_ada_norm=10,
)


_unet_sd1 = _builder(
    UNet2DConditionModel,
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,
    norm_num_groups=8,
)


_unet_sdxl = _builder(
    UNet2DConditionModel,
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    reverse_transformer_layers_per_block=(1, 1),
    cross_attention_dim=128,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=8 * 6 + 32,
    norm_num_groups=8,
)


_flux = _builder(
    FluxTransformer2DModel,
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)


_sd3 = _builder(
    SD3Transformer2DModel,
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=128,
    caption_projection_dim=128,
    pooled_projection_dim=64,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)


_wan = _builder(
    WanTransformer3DModel,
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    text_dim=128,
    freq_dim=64,
    ffn_dim=256,
    num_layers=2,
    rope_max_seq_len=32,
)


_unet = _builder(
    UNet2DModel,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=16,
    norm_num_groups=8,
)


_sd35 = _builder(_sd3, dual_attention_layers=(0,))


_cogvideox = _builder(
    CogVideoXTransformer3DModel,
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    time_embed_dim=64,
    text_embed_dim=128,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=5,
    temporal_compression_ratio=4,
    max_text_seq_length=TEXT_LENGTH,
)


_hunyuan_video = _builder(
    HunyuanVideoTransformer3DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=2,
    mlp_ratio=1.0,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=128,
    pooled_projection_dim=64,
    rope_axes_dim=(8, 12, 12),
)


_qwenimage = _builder(
    QwenImageTransformer2DModel,
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=128,
    axes_dims_rope=(8, 12, 12),
)


def _decoder(config_class: Any, model_class: Any) -> Callable[..., nn.Module]:
    return _builder(
        _from_config(config_class, model_class),
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


_t5_encoder = _builder(
    _from_config(T5Config, T5EncoderModel),
    vocab_size=VOCABULARY,
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)


_umt5_encoder = _builder(
    _from_config(UMT5Config, UMT5EncoderModel),
    vocab_size=VOCABULARY,
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=1,
    num_heads=4,
    dropout_rate=0.0,
)


_CLIP = dict(
    vocab_size=VOCABULARY * 8,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=TEXT_LENGTH,
    projection_dim=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
_clip_text = _builder(_from_config(CLIPTextConfig, CLIPTextModel), **_CLIP)
# With a pooled projection of 32, as SDXL's second text encoder and both of SD3 have one.
_clip_projected = _builder(
    _from_config(CLIPTextConfig, CLIPTextModelWithProjection),
    **{**_CLIP, "hidden_size": 64, "num_hidden_layers": 2, "projection_dim": 32},
)


_llama = _builder(
    _from_config(LlamaConfig, LlamaForCausalLM),
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "unet": _unet,
    "sd35": _sd35,
    "cogvideox": _cogvideox,
    "hunyuan_video": _hunyuan_video,
    "qwenimage": _qwenimage,
    "qwen2": _decoder(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": _decoder(Qwen3Config, Qwen3ForCausalLM),
    "mistral": _decoder(MistralConfig, MistralForCausalLM),
    "gemma": _decoder(GemmaConfig, GemmaForCausalLM),
    "gemma2": _decoder(Gemma2Config, Gemma2ForCausalLM),
    "gemma3": _decoder(Gemma3TextConfig, Gemma3ForCausalLM),
    "pixart": _pixart,
    "dit": _dit,
    "unet_sd1": _unet_sd1,
    "unet_sdxl": _unet_sdxl,
    "flux": _flux,
    "sd3": _sd3,
    "wan": _wan,
    "t5_encoder": _t5_encoder,
    "umt5_encoder": _umt5_encoder,
    "clip_text": _clip_text,
    "clip_projected": _clip_projected,
    "llama": _llama,
}
DENOISERS = ("pixart", "dit", "unet_sd1", "unet_sdxl", "flux", "sd3", "wan")
TRANSFORMERS_MODELS = ("t5_encoder", "umt5_encoder", "clip_text", "llama")


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The tiny model `name` of `MODELS`, in eval mode on the CPU; `config` overrides its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return _cast(model, dtype)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """`model` in `dtype`, but for what a `from_pretrained` in that dtype would keep in float32."""
    kept: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    if not isinstance(model, ModelMixin) and dtype != torch.float16:
        kept = ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not set(name.split(".")) & set(kept):
            tensor.data = tensor.data.to(dtype)
    return model


def inputs_for(model: nn.Module, batch: int = 2, seed: int = 0, side: int | None = None) -> dict[str, Any]:
    """Keyword arguments for `model.forward`: of a denoiser `denoiser_inputs`, else tokens and a mask."""
    if isinstance(model, ModelMixin):
        # Of this package, which must not be imported where stock libraries read a checkpoint without it.
        from diffuse_compress.evaluation.denoiser_inputs import denoiser_inputs

        return denoiser_inputs(model, batch, seed, side, TEXT_LENGTH)
    config: Any = model.config
    generator = torch.Generator("cpu").manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY - 2, (batch, TEXT_LENGTH), generator=generator) + 2
    input_ids[:, -1] = config.eos_token_id
    mask = torch.ones(batch, TEXT_LENGTH, dtype=torch.long)
    mask[batch // 2 :, -TEXT_LENGTH // 2 :] = 0
    return dict(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device))


def vae(*, seed: int = 0, latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """A tiny VAE: 4 pixels for each latent, along each side."""
    defaults = dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**{**defaults, **config}).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of `WORDS` and single letters, made here."""
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz,.-0123456789"]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [(piece, -2.0 if len(piece) > 1 else -6.0) for piece in pieces]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single letters, made here."""
    letters = "abcdefghijklmnopqrstuvwxyz,.-0123456789"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=TEXT_LENGTH)


def _pixart_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=build("t5_encoder", seed=seed, dtype=dtype),
        vae=_cast(vae(seed=seed), dtype),
        transformer=build("pixart", seed=seed, dtype=dtype, caption_channels=128),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _stable_diffusion_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_cast(vae(seed=seed), dtype),
        text_encoder=build("clip_text", seed=seed, dtype=dtype),
        tokenizer=clip_tokenizer(),
        unet=build("unet_sd1", seed=seed, dtype=dtype),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=_cast(vae(seed=seed), dtype),
        text_encoder=build("clip_projected", seed=seed, dtype=dtype),
        text_encoder_2=build("clip_projected", seed=seed + 1, dtype=dtype),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=build("unet_sdxl", seed=seed, dtype=dtype),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def _sd3_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        transformer=build("sd3", seed=seed, dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_cast(vae(seed=seed, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1), dtype),
        text_encoder=build("clip_projected", seed=seed, dtype=dtype),
        tokenizer=clip_tokenizer(),
        text_encoder_2=build("clip_projected", seed=seed + 1, dtype=dtype),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=build("t5_encoder", seed=seed + 2, dtype=dtype),
        tokenizer_3=t5_tokenizer(),
    )


def _flux_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_cast(vae(seed=seed, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1), dtype),
        text_encoder=build("clip_text", seed=seed, dtype=dtype),
        tokenizer=clip_tokenizer(),
        text_encoder_2=build("t5_encoder", seed=seed + 1, dtype=dtype),
        tokenizer_2=t5_tokenizer(),
        transformer=build("flux", seed=seed, dtype=dtype),
    )


def _wan_pipeline(seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        video_vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval()
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=build("umt5_encoder", seed=seed, dtype=dtype),
        vae=_cast(video_vae, dtype),
        transformer=build("wan", seed=seed, dtype=dtype, in_channels=16, out_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


PIPELINES: dict[str, Callable[[int, torch.dtype], DiffusionPipeline]] = {
    "pixart": _pixart_pipeline,
    "stable_diffusion": _stable_diffusion_pipeline,
    "stable_diffusion_xl": _stable_diffusion_xl_pipeline,
    "sd3": _sd3_pipeline,
    "flux": _flux_pipeline,
    "wan": _wan_pipeline,
}


def build_pipeline(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny stock pipeline `name` of `PIPELINES`, on the CPU, with its progress bar off."""
    pipe = PIPELINES[name](seed, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(pipe: DiffusionPipeline, *, seed: int = 0, steps: int = 2, output_type: str = "np") -> dict[str, Any]:
    """Keyword arguments for one cheap call of a pipeline made by `build_pipeline`: one 32x32 picture or clip."""
    kwargs: dict[str, Any] = dict(
        prompt="a red cat",
        num_inference_steps=steps,
        height=32,
        width=32,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
    )
    if isinstance(pipe, PixArtAlphaPipeline):
        kwargs.update(use_resolution_binning=False, clean_caption=False, max_sequence_length=TEXT_LENGTH)
    elif isinstance(pipe, FluxPipeline | StableDiffusion3Pipeline):
        kwargs.update(max_sequence_length=TEXT_LENGTH)
    elif isinstance(pipe, WanPipeline):
        kwargs.update(max_sequence_length=TEXT_LENGTH, num_frames=5)
    return kwargs


def denoiser(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def reloaded(pipe: Any, folder: Any) -> Any:
    """A pipeline saved to a folder, as stock ``from_pretrained`` brings it back."""
    pipe.save_pretrained(folder)
    again = DiffusionPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    return again


def sample(pipe: DiffusionPipeline, **kwargs: Any) -> torch.Tensor:
    """Latents of one cheap call; `kwargs` go to the pipeline on top of `call_kwargs`."""
    output = pipe(**{**call_kwargs(pipe, output_type="latent"), **kwargs})
    found: torch.Tensor = output.frames if hasattr(output, "frames") else output.images
    return found
