"""The test suite's own tools: tiny models, tolerances and fixtures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from diffuse_compress.components import model_components
from diffuse_compress.integrations.component import align_tensors
from tolerance import KERNEL, assert_close, assert_snr, relative_rms, snr_db


@pytest.mark.parametrize("name", tiny.MODELS)
def test_tiny_models_are_small_deterministic_and_sensitive_to_their_inputs(name: str, untouched_rng: None) -> None:
    model, twin = tiny.build(name), tiny.build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        outputs = model(**tiny.inputs_for(model, batch=3))[0]
        again = twin(**tiny.inputs_for(twin, batch=3))[0]
        other = model(**tiny.inputs_for(model, batch=3, seed=1))[0]
    assert outputs.shape[0] == 3
    assert torch.equal(outputs, again)
    assert relative_rms(outputs, other) > 0.1
    assert outputs.std() > 0.1


@pytest.mark.parametrize("name", tiny.MODELS)
def test_tiny_models_run_in_bfloat16(name: str) -> None:
    model = tiny.build(name, dtype=torch.bfloat16)
    with torch.no_grad():
        output = model(**tiny.inputs_for(model))[0]
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_tiny_pipelines_survive_save_and_reload(name: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline(name)
    image = torch.from_numpy(pipe(**tiny.call_kwargs(pipe))[0])
    assert image.shape == ((1, 5, 32, 32, 3) if name == "wan" else (1, 32, 32, 3))
    assert image.std() > 0.05
    pipe.save_pretrained(tmp_path)
    reloaded = type(pipe).from_pretrained(tmp_path)
    # A mapped file's tensors lie where they lie, and float32 products over unaligned ones differ in the last bit.
    for model in model_components(reloaded).values():
        align_tensors(model)
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(torch.from_numpy(reloaded(**tiny.call_kwargs(reloaded))[0]), image)


def test_tiny_tokenizers_tell_prompts_apart() -> None:
    for tokenizer in (tiny.t5_tokenizer(), tiny.clip_tokenizer()):
        red, blue = tokenizer(["a red cat", "a blue dog"], padding="max_length").input_ids
        assert len(red) == len(blue) == tiny.TEXT_LENGTH
        assert red != blue
        assert tokenizer.unk_token_id not in red[:4]


def test_assert_close_accepts_one_rounding_and_rejects_an_error_at_any_scale() -> None:
    reference = torch.randn(64, 64, dtype=torch.float64)
    for scale in (1e-3, 1.0, 1e3):
        for dtype in (torch.float16, torch.bfloat16):
            assert_close((reference * scale).to(dtype), reference * scale)
        wrong = (reference * scale).to(torch.bfloat16)
        wrong[3, 5] += scale
        with pytest.raises(AssertionError, match=r"relative maximum .*\n  \[3, 5\]"):
            assert_close(wrong, reference * scale)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(reference.float() * 1.01, reference, KERNEL[torch.float16])


def test_assert_close_compares_non_finite_places_first() -> None:
    reference = torch.tensor([1.0, math.inf, math.nan])
    assert_close(reference.clone(), reference)
    with pytest.raises(AssertionError, match=r"not finite.*\n  \[0\]: nan"):
        assert_close(torch.tensor([math.nan, math.inf, math.nan]), reference)
    with pytest.raises(AssertionError, match=r"not finite.*\n  \[1\]: -inf"):
        assert_close(torch.tensor([1.0, -math.inf, math.nan]), reference)


def test_snr_of_a_known_error_is_its_ratio_in_db() -> None:
    reference = torch.ones(100)
    assert snr_db(reference, reference * 0.9) == pytest.approx(20, abs=1e-3)
    assert snr_db(reference, reference) == math.inf
    assert math.isnan(snr_db(reference, reference * math.nan))
    assert_snr(reference, reference * 0.9, measured_db=20.9)
    with pytest.raises(AssertionError, match=r"head: SNR 20\.00 dB, at least 20\.50"):
        assert_snr(reference, reference * 0.9, measured_db=21.5, label="head")
    with pytest.raises(AssertionError, match="SNR nan"):
        assert_snr(reference, reference * math.nan, measured_db=21.5)


def test_nan_poison_marks_only_what_our_packages_allocate(nan_poison: None) -> None:
    ours = {"torch": torch, "__name__": "diffuse_compress.quantization.layers"}
    theirs = {"torch": torch, "__name__": "diffusers.models"}
    for source in ("torch.empty(4)", "torch.zeros(4).new_empty(4)", "torch.empty_like(torch.zeros(4))"):
        assert eval(source, ours).isnan().all()
        assert eval(source, theirs).shape == (4,)
    assert torch.equal(eval("torch.empty(2, dtype=torch.int8)", ours), torch.tensor([84, 84], dtype=torch.int8))
    assert eval("torch.empty(2, device='meta')", ours).is_meta
    assert eval("torch.empty(2, dtype=torch.float8_e4m3fn)", ours).float().isnan().all()


def test_nan_poison_leaves_compilation_whole(nan_poison: None) -> None:
    namespace: dict[str, Any] = {"torch": torch, "__name__": "diffuse_compress.quantization.layers"}
    exec("def double(x):\n    out = torch.empty_like(x)\n    out.copy_(x * 2)\n    return out", namespace)
    compiled = torch.compile(namespace["double"], fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def test_changed_global_state_fails_a_test_and_is_given_back(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(
        """
        import torch

        def test_first(): torch.set_default_dtype(torch.float64)
        def test_second(): assert torch.get_default_dtype() == torch.float32
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*global state left changed: default dtype*"])
