"""Fused low-bit attention in models of both libraries: backends, processors, the configuration, and what falls back."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import diffuse_compress as dc
from diffuse_compress.integrations.attention import register_diffusers_backends, register_transformers_backends
from diffuse_compress.quantization.fused_attention import LEAST_KEYS, fused_attention
from tolerance import relative_rms

FORMATS = ["int8_qk", "fp8_pv"]
# On N(0, 1), as the kernels' tests hold them.
BOUND = {"int8_qk": 0.02, "fp8_pv": 0.05}


@pytest.fixture(autouse=True)
def _fresh_stats():
    dc.reset_attention_stats()
    yield
    dc.reset_attention_stats()


@pytest.fixture(scope="module")
def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model.eval()


def flux_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, LEAST_KEYS, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(LEAST_KEYS, 3, generator=generator),
        "txt_ids": torch.zeros(16, 3),
    }


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_backend_of_diffusers(flux, form):
    stock = flux(**flux_inputs()).sample
    flux.set_attention_backend(f"diffuse_compress_{form}")
    try:
        found = flux(**flux_inputs()).sample
        compiled = torch.compile(flux, fullgraph=True, backend="eager")(**flux_inputs()).sample
    finally:
        flux.set_attention_backend("native")
    assert torch.equal(compiled, found)
    assert 0 < relative_rms(stock, found) < 0.01
    assert dc.attention_stats().to_dict() == {"fused": {form: 2}, "stock": {}, "unmeasured": ["cpu"]}
    assert "unmeasured on cpu" in str(dc.attention_stats())
    assert torch.equal(flux(**flux_inputs()).sample, stock)


def test_backend_context_and_registration_twice():
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    register_diffusers_backends()
    register_transformers_backends()
    assert len([name for name in AttentionBackendName if name.startswith("diffuse_compress_")]) == len(FORMATS)
    query, key, value = (torch.randn(2, LEAST_KEYS, 2, 16) for _ in range(3))
    keep = torch.rand(2, LEAST_KEYS) > 0.5  # of keys, as some pipelines pass it
    with attention_backend("diffuse_compress_int8_qk"):
        found = dispatch_attention_fn(query, key, value, attn_mask=keep)
    assert 0 < relative_rms(dispatch_attention_fn(query, key, value, attn_mask=keep), found) < BOUND["int8_qk"]


def pixart():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=144, sample_size=32, caption_channels=32, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def pixart_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 32, 32, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "timestep": torch.tensor([5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.ones(1, 8),
    }


@torch.no_grad()
def test_processors_without_backends():
    model = pixart()
    stock = model(**pixart_inputs()).sample
    outputs = []
    for form in (*FORMATS, "int8", *FORMATS):
        dc.set_attention(model, form)
        outputs.append(model(**pixart_inputs()).sample)
    assert all(torch.equal(outputs[i], outputs[i + 3]) for i in range(2)), "formats replace each other"
    assert len({float(x.sum()) for x in outputs}) == 3
    assert dc.attention_stats().stock["int8_qk", f"fewer than {LEAST_KEYS} keys"] == 2, "the text is short"
    dc.set_attention(model, None)
    assert torch.equal(model(**pixart_inputs()).sample, stock)


@torch.no_grad()
def test_configuration_saves_and_loads_it(tmp_path):
    model = pixart().compress(dc.QuantizationConfig("w8a8", attention="int8_qk"), measure=False)
    found = model(**pixart_inputs()).sample
    assert dc.attention_stats().fused["int8_qk"] == 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.quantization_config.spec.attention is dc.AttentionFormat.INT8_QK
    assert torch.equal(loaded(**pixart_inputs()).sample, found)


@torch.no_grad()
def test_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, LEAST_KEYS + 20))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    stock, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    model.set_attn_implementation("diffuse_compress_int8_qk")
    assert 0 < relative_rms(stock, model(ids).logits) < 0.02
    kept = mask.bool()
    assert 0 < relative_rms(padded[kept], model(ids, attention_mask=mask).logits[kept]) < 0.02
    model.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert dc.attention_stats().stock == {("int8_qk", "fewer than 16 queries"): 1}
    with pytest.raises(dc.ConfigError, match=r"set_attn_implementation\(\"diffuse_compress_int8_qk\"\)"):
        dc.set_attention(model, "int8_qk")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("masked", ["not", "causal", "by a mask"])
def test_signature_of_the_stock_product(form, masked):
    masks = {"not": {}, "causal": {"is_causal": True}, "by a mask": {"attn_mask": torch.rand(300, 300) > 0.3}}
    given = masks[masked]
    query, key, value = (torch.randn(1, 2, 300, 32) for _ in range(3))
    found = fused_attention(query, key, value, **given, form=dc.AttentionFormat(form))
    stock = F.scaled_dot_product_attention(query, key, value, **given)
    assert 0 < relative_rms(stock, found) < BOUND[form]


def test_what_is_unsupported_falls_back_by_name_with_one_warning():
    form = dc.AttentionFormat.INT8_QK
    query, key, value = (torch.randn(1, 2, 300, 32) for _ in range(3))
    wide = torch.randn(1, 2, 300, 48)
    torch.manual_seed(0)
    stock = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    with pytest.warns(dc.DiffuseCompressWarning, match='"int8_qk" is computed by the stock product: dropout'):
        assert torch.equal(fused_attention(query, key, value, dropout_p=0.5, form=form), stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_attention(query, key, value, dropout_p=0.5, form=form)
        fused_attention(query, key[:, :, :50], value[:, :, :50], form=form)
    with pytest.warns(dc.DiffuseCompressWarning, match="no kernel for cpu"):
        assert fused_attention(query, key, wide, form=form).shape == wide.shape
    stats = dc.attention_stats()
    assert stats.stock["int8_qk", "dropout"] == 2
    assert "stock product 2 times: dropout" in str(stats)
    dc.reset_attention_stats()
    assert str(dc.attention_stats()) == "No attention ran on low-bit products."
