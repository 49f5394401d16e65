"""Scheme: JSON round trip over every legal scheme, refusals with their messages, byte counts that are exact."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.quantization.numerics import quantize_weight
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    Scheme,
    TwoLevel,
    WeightScheme,
)

GRANULARITIES = (
    PerTensor(),
    PerChannel(),
    PerToken(),
    TwoLevel(),
    PerBlock(),
    *(PerGroup(size, pad) for size in (32, 64, 128) for pad in (False, True)),
)


def _legal(cls: Any, *options: Any) -> list[Any]:
    found = []
    for values in itertools.product(*options):
        try:
            found.append(cls(*values))
        except ConfigError:
            continue
    return found


WEIGHTS = _legal(WeightScheme, NumberFormat, GRANULARITIES, (True, False), ScaleRule, (True, False))
ACTIVATIONS = list(dict.fromkeys(_legal(ActivationScheme, NumberFormat, GRANULARITIES, (True, False), (True, False))))


def _schemes() -> list[Scheme]:
    return _legal(Scheme, WEIGHTS, (None, *ACTIVATIONS))


def test_number_of_legal_schemes() -> None:
    # Weights: 4 integer formats x 8 granularities x (3 symmetric rules + 2 asymmetric kinds), two-level, 3 float8.
    assert len(WEIGHTS) == 4 * 8 * 5 + 1 + 3
    # Activations: 4 formats x (2 dynamic granularities + static per tensor), asymmetric static int8, groups of float8.
    assert len(set(ACTIVATIONS)) == 4 * 3 + 1 + 1


def test_dict_through_json_gives_an_equal_scheme() -> None:
    schemes = _schemes()
    assert len(schemes) > 1000
    seen = set()
    for scheme in schemes:
        text = json.dumps(scheme.to_dict(), sort_keys=True)
        assert Scheme.from_dict(json.loads(text)) == scheme
        assert text not in seen
        seen.add(text)
    assert len(set(schemes)) == len(schemes)


def test_from_dict_reads_the_nulls_of_compressed_tensors() -> None:
    data = Scheme(WeightScheme(NumberFormat.INT8)).to_dict()
    data["weights"]["group_size"] = None
    assert Scheme.from_dict(data) == Scheme(WeightScheme(NumberFormat.INT8))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("strategy", "chanel", r"unknown strategy 'chanel'; did you mean 'channel'"),
        ("strategy", None, "unknown strategy None"),
        ("num_bits", 5, "no format of num_bits=5, type='int'"),
        ("type", "float", "no format of num_bits=4, type='float'"),
        ("type", "complex", "no format of num_bits=4, type='complex'"),
        ("scale_rule", "amax", "unknown scale_rule 'amax'; .*amax_over_qmax"),
        ("group_size", 48, r"PerGroup: group_size must be one of \(32, 64, 128\), got 48"),
        ("actorder", True, r"unknown keys \['actorder'\]"),
    ],
)
def test_from_dict_bad_weight_entries_are_refused(key: str, value: Any, message: str) -> None:
    data = Scheme(WeightScheme(NumberFormat.INT4, PerGroup(128))).to_dict()
    data["weights"][key] = value
    with pytest.raises(ConfigError, match=message):
        Scheme.from_dict(data)


def test_from_dict_other_bad_input_is_refused() -> None:
    data = Scheme(WeightScheme(NumberFormat.INT8)).to_dict()
    with pytest.raises(ConfigError, match=r"got keys \['input_activations', 'kv_cache', 'weights'\]"):
        Scheme.from_dict({**data, "kv_cache": {}})
    with pytest.raises(ConfigError, match="need 'weights'"):
        Scheme.from_dict({"weights": None})
    data["weights"]["group_size"] = 64
    with pytest.raises(ConfigError, match="strategy 'channel' has no group_size"):
        Scheme.from_dict(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerGroup(100), "group_size must be one of .*, got 100"),
        (lambda: TwoLevel(64), "TwoLevel: group_size must be 128, got 64"),
        (lambda: WeightScheme(NumberFormat.INT8, PerToken()), "a weight has no tokens"),
        (lambda: WeightScheme(NumberFormat.INT8, TwoLevel()), "TwoLevel needs symmetric int4, got int8"),
        (lambda: WeightScheme(NumberFormat.INT4, TwoLevel(), False), "TwoLevel needs symmetric int4"),
        (
            lambda: WeightScheme(NumberFormat.INT4, TwoLevel(), scale_rule=ScaleRule.MIN_MAX_NO_CLIP),
            "scale_rule='min_max_no_clip' needs symmetric integers",
        ),
        (
            lambda: WeightScheme(NumberFormat.INT8, symmetric=False, scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE),
            "scale_rule='amax_over_half_range' needs symmetric integers",
        ),
        (lambda: WeightScheme(NumberFormat.FLOAT8_E4M3, PerGroup()), "float8 weights are symmetric"),
        (lambda: WeightScheme(NumberFormat.FLOAT8_E4M3, symmetric=False), "float8 weights are symmetric"),
        (lambda: WeightScheme(NumberFormat.INT4, float_zero_point=True), "float_zero_point=True needs symmetric=False"),
        (
            lambda: WeightScheme(NumberFormat.INT4, symmetric=False, float_zero_point=True, additive_zero_point=True),
            "additive_zero_point=True needs symmetric=False and float_zero_point=False",
        ),
        (lambda: ActivationScheme(NumberFormat.INT2), "must be int8, int4, int3 or float8_e4m3fn, got int2"),
        (lambda: ActivationScheme(NumberFormat.INT8, PerChannel()), "must be PerTensor, PerToken or PerGroup"),
        (lambda: ActivationScheme(NumberFormat.INT8, PerToken(), dynamic=False), "static scales are per tensor"),
        (lambda: ActivationScheme(NumberFormat.INT8, PerTensor(), symmetric=False), "needs dynamic=False"),
        (
            lambda: ActivationScheme(NumberFormat.INT4, PerTensor(), dynamic=False, symmetric=False),
            "needs dynamic=False and format int8",
        ),
        (
            lambda: Scheme(WeightScheme(NumberFormat.INT8), ActivationScheme(NumberFormat.FLOAT8_E4M3)),
            "int8 weights with float8_e4m3fn activations have no matmul",
        ),
    ],
)
def test_illegal_combinations_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_check_shape_names_layer_and_remedy() -> None:
    scheme = WeightScheme(NumberFormat.INT4, PerGroup(128))
    scheme.check_shape("a", 256)
    with pytest.raises(
        IncompatibleShapeError, match=r"^blocks.3.ff: int4 .*in_features=3104. Use group_size=32, pad=T"
    ):
        scheme.check_shape("blocks.3.ff", 3104)
    with pytest.raises(IncompatibleShapeError, match=r'Use pad=True, or modules_to_not_convert=\["x"\]'):
        scheme.check_shape("x", 100)
    WeightScheme(NumberFormat.INT4, PerGroup(128, pad=True)).check_shape("x", 100)


@pytest.mark.parametrize("shape", [(6, 256), (3, 320), (5, 100)])
def test_weight_bytes_equal_the_stored_bytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    checked = 0
    for scheme in WEIGHTS:
        try:
            quantized = quantize_weight(weight, scheme)
        except IncompatibleShapeError:
            continue
        tensors = (quantized.qweight, quantized.scale, quantized.zero_point, quantized.group_scale)
        stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        assert Scheme(scheme).weight_bytes(shape) == stored, scheme
        assert Scheme(scheme).bits_per_weight(shape) == 8 * stored / weight.numel()
        checked += 1
    assert checked >= 103


def test_integer_path_needs_scales_outside_the_sum() -> None:
    act = ActivationScheme(NumberFormat.INT8)
    for weight in WEIGHTS:
        if not weight.format.is_integer:
            continue
        grouped, zero = isinstance(weight.granularity, PerGroup), not weight.symmetric
        assert Scheme(weight, act).has_integer_path == (not grouped and not zero)
        assert not Scheme(weight).has_integer_path


def test_replace_changes_own_and_weight_fields() -> None:
    scheme = Scheme(WeightScheme(NumberFormat.INT4), ActivationScheme(NumberFormat.INT8))
    assert scheme.name == "w4a8"
    changed = scheme.replace(weight_format=NumberFormat.INT8, activation=None)
    assert changed == Scheme(WeightScheme(NumberFormat.INT8))
    assert changed.name == "w8a16"
    assert Scheme(WeightScheme(NumberFormat.FLOAT8_E4M3)).name == "fp8-weight-only"
