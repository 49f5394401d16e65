"""RTN and the registry that finds it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.algorithms import base
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    algorithm_from_dict,
    algorithm_to_dict,
    quantize_with,
    register,
)
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.numerics import dequantize, quantize_weight
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import NumberFormat, PerGroup, TwoLevel, WeightScheme
from tolerance import assert_snr, snr_db

INT4_CHANNEL = WeightScheme(NumberFormat.INT4)
SCHEMES = {
    "int8": WeightScheme(NumberFormat.INT8),
    "int4-channel": INT4_CHANNEL,
    "int4-group128-asymmetric": WeightScheme(NumberFormat.INT4, PerGroup(128, pad=True), symmetric=False),
    "two-level": WeightScheme(NumberFormat.INT4, TwoLevel()),
    "int2-group32": WeightScheme(NumberFormat.INT2, PerGroup(32, pad=True)),
    "fp8": WeightScheme(NumberFormat.FLOAT8_E4M3),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())

KINDS = (
    "adadim, adaround, awq, brecq, dgq, gptq, hqq, llm_int8, norm_tweaking, omniquant, osplus, owq, quarot, quik, rtn, "
    "smoothquant, spinquant, spqr, svdquant, tesseraq"
)


def _weight() -> torch.Tensor:
    weight = torch.randn(48, 330)
    weight[:, ::50] *= 6
    return weight


def _bytes(quantized: QuantizedWeight) -> list[bytes]:
    tensors = (quantized.qweight.view(torch.int8), quantized.scale, quantized.zero_point, quantized.group_scale)
    return [tensor.numpy().tobytes() for tensor in tensors if tensor is not None]


@every_scheme
def test_minmax_equals_plain_rounding(scheme: WeightScheme) -> None:
    weight = _weight()
    assert _bytes(quantize_with(RTNConfig("minmax"), weight, scheme)) == _bytes(quantize_weight(weight, scheme))


@every_scheme
def test_mse_beats_minmax(scheme: WeightScheme) -> None:
    weight = _weight()
    plain, best = (dequantize(quantize_with(RTNConfig(name), weight, scheme)) for name in ("minmax", "mse"))
    assert snr_db(weight, best) >= snr_db(weight, plain) - 1e-3
    if scheme.format.bits < 8:
        assert snr_db(weight, best) > snr_db(weight, plain) + 0.2


@every_scheme
def test_equal_input_gives_equal_bytes_and_no_random_number_is_drawn(scheme: WeightScheme, untouched_rng: None) -> None:
    weight = torch.linspace(-1, 1, 20 * 330).sin().reshape(20, 330) ** 3
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    first = quantize_with(RTNConfig(), weight, scheme, generator)
    second = quantize_with(RTNConfig(), weight.clone(), scheme)
    assert _bytes(first) == _bytes(second)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("name", "measured"), [("int4-channel", 18.9), ("int4-group128-asymmetric", 20.4), ("two-level", 19.4)]
)
def test_snr_of_gaussian_weights_is_the_measured_one(name: str, measured: float) -> None:
    weight = torch.randn(128, 2048)
    assert_snr(weight, dequantize(quantize_with(RTNConfig(), weight, SCHEMES[name])), measured)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_equal_their_float32_values(dtype: torch.dtype) -> None:
    weight = _weight().to(dtype)
    for scheme in SCHEMES.values():
        assert _bytes(quantize_with(RTNConfig(), weight, scheme)) == _bytes(
            quantize_with(RTNConfig(), weight.float(), scheme)
        )


@pytest.mark.parametrize(
    ("field", "value"), [("observer", "minmax"), ("norm", 4.0), ("num_ratios", 3), ("min_ratio", 0.9)]
)
def test_every_field_changes_the_result(field: str, value: object) -> None:
    assert field in {f.name for f in dataclasses.fields(RTNConfig)}
    changed = dataclasses.replace(RTNConfig(), **{field: value})
    weight = _weight()
    assert _bytes(quantize_with(changed, weight, INT4_CHANNEL)) != _bytes(
        quantize_with(RTNConfig(), weight, INT4_CHANNEL)
    )


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"observer must be one of \('mse', 'minmax'\), got 'histogram'"):
        RTNConfig("histogram")
    for options in ({"norm": 0.0}, {"num_ratios": 1}, {"min_ratio": 1.0}):
        with pytest.raises(ConfigError, match=r"RTNConfig: need norm > 0, num_ratios >= 2 and 0 < min_ratio < 1"):
            RTNConfig(**options)  # type: ignore[arg-type]


def test_wrong_weights_are_refused() -> None:
    for config in (RTNConfig(), RTNConfig("minmax")):
        with pytest.raises(IncompatibleShapeError, match="in_features divisible by 64, got in_features=330"):
            quantize_with(config, _weight(), WeightScheme(NumberFormat.INT4, PerGroup(64)))
        with pytest.raises(ModelStateError, match="finite in float32"):
            quantize_with(config, _weight().log(), INT4_CHANNEL)


# --- registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RTNConfig(), RTNConfig("minmax", 2.4, 9, 0.5), HQQConfig(), HQQConfig(3, 0.5)])
def test_config_round_trips_through_json(config: AlgorithmConfig) -> None:
    data = json.loads(json.dumps(algorithm_to_dict(config)))
    assert data["kind"] in ("rtn", "hqq")
    restored = algorithm_from_dict(data)
    assert restored == config
    assert hash(restored) == hash(config)
    assert algorithm_from_dict({"kind": data["kind"]}) == type(config)()


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=rf"unknown kind 'hq'; did you mean 'hqq'\? Available: {KINDS}",
    ):
        algorithm_from_dict({"kind": "hq"})
    with pytest.raises(ConfigError, match="unknown kind None; "):
        algorithm_from_dict({"norm": 2.0})
    with pytest.raises(ConfigError, match=r"RTNConfig: unknown field 'norms'; did you mean 'norm'"):
        algorithm_from_dict({"kind": "rtn", "norms": 2.0})


def test_register_collisions_and_missing_quantizers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @dataclass(frozen=True)
    class OtherConfig(AlgorithmConfig):
        kind: ClassVar[str] = "rtn"

    def quantize(weight, scheme, config, generator=None):  # type: ignore[no-untyped-def]
        return quantize_weight(weight, scheme)

    with pytest.raises(
        ConfigError,
        match=rf"no quantizer for OtherConfig\. Available: {KINDS}",
    ):
        quantize_with(OtherConfig(), _weight(), INT4_CHANNEL)
    with pytest.raises(ConfigError, match=r"annotate config of .*quantize with an AlgorithmConfig class"):
        register(quantize)
    quantize.__annotations__["config"] = OtherConfig
    with pytest.raises(ConfigError, match=r"OtherConfig \(kind 'rtn'\) collides with .*rtn\.RTNConfig"):
        register(quantize)
    OtherConfig.kind = "other"
    register(quantize)
    assert _bytes(quantize_with(OtherConfig(), _weight(), INT4_CHANNEL))
    assert algorithm_from_dict({"kind": "other"}) == OtherConfig()
    with pytest.raises(ConfigError, match=r"OtherConfig .* collides"):
        register(quantize)
