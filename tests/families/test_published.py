"""The bundled configurations: complete records, true parameter counts, layers and shapes on the meta device."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.families.published import (
    LayerShape,
    linear_shapes,
    list_published,
    meta_components,
    published_config,
)
from families import unknown_classes

NAMES = list_published()
DENOISERS = {
    "flux1_dev": 11_901_408_320,
    "flux1_schnell": 11_891_178_560,
    "sd15": 859_520_964,
    "sdxl_base": 2_567_463_684,
    "sd3_medium": 2_028_328_000,
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "pixart_xl_2_1024": 611_349_152,
    "dit_xl_2_256": 749_826_464,
    "wan21_t2v_1_3b": 1_418_996_800,
    "wan21_t2v_14b": 14_288_491_584,
    "wan22_t2v_a14b": 14_288_491_584,
    "cogvideox_2b": 1_693_783_872,
    "cogvideox_5b": 5_570_283_072,
    "hunyuanvideo": 12_821_012_544,
    "qwenimage": 20_430_401_088,
}
# Classes that many pipelines share are built once, under the first pipeline that has each configuration.
COMPONENTS: dict[str, tuple[str, str]] = {}
for _name in NAMES:
    for _key, _component in published_config(_name).components.items():
        _identity = json.dumps([_component.class_name, _component.config], sort_keys=True)
        COMPONENTS.setdefault(_identity, (_name, _key))


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_denoiser_is_listed() -> None:
    assert sorted(DENOISERS) == NAMES
    for name, count in DENOISERS.items():
        pipeline = published_config(name)
        assert {pipeline.components[key].parameters for key in pipeline.denoisers} == {count}
    assert published_config("wan22_t2v_a14b").denoisers == ("transformer", "transformer_2")


@pytest.mark.parametrize("name", NAMES)
def test_schema(name: str) -> None:
    folder = resources.files("diffuse_compress.families").joinpath("configs")
    raw = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    assert set(raw) == {"schema", "name", "repo", "pipeline_class", "licence", "source", "components"}
    assert raw["schema"] == 1
    assert raw["name"] == name
    assert raw["repo"].count("/") == 1
    assert raw["pipeline_class"].endswith("Pipeline")
    assert raw["licence"]
    assert raw["source"]
    assert "vae" in raw["components"]
    assert ("transformer" in raw["components"]) != ("unet" in raw["components"])
    for component in raw["components"].values():
        assert set(component) == {"library", "class", "parameters", "published_parameters", "source", "config"}
        assert component["library"] in ("diffusers", "transformers")
        assert component["source"]
        assert not any(key.startswith("_") for key in component["config"])
        published = component["published_parameters"]
        if published is not None:
            assert set(published) == {"count", "text", "source"}
            assert published["text"]
            assert published["source"]


@pytest.mark.parametrize(("name", "key"), list(COMPONENTS.values()), ids=lambda value: value)
def test_parameter_count(name: str, key: str) -> None:
    (model,) = meta_components(name, [key]).values()
    component = published_config(name).components[key]
    assert _parameters(model) == component.parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    published = component.published_parameters
    if published is not None and published["count"] is not None:
        # Checkpoint sizes count the persistent buffers too (SD3's position table).
        saved = model.state_dict()
        buffers = sum(buffer.numel() for buffer_name, buffer in model.named_buffers() if buffer_name in saved)
        assert published["count"] == component.parameters + buffers


@pytest.mark.parametrize(("name", "key"), list(COMPONENTS.values()), ids=lambda value: value)
def test_configuration_is_understood(name: str, key: str) -> None:
    """No key is silently dropped: each ends up in the built model's own configuration."""
    component = published_config(name).components[key]
    (model,) = meta_components(name, [key]).values()
    if component.library == "diffusers":
        built = dict(model.config)
        expected = {k: list(v) if isinstance(v, tuple) else v for k, v in built.items() if k in component.config}
        assert json.loads(json.dumps(expected)) == component.config
    else:
        unknown = {k for k in component.config if not hasattr(model.config, k)}
        assert unknown <= {"rope_theta"}  # moved into rope_parameters by transformers 5


def test_meta_components() -> None:
    parts = meta_components("flux1_dev", dtype=torch.bfloat16)
    assert list(parts) == ["transformer", "text_encoder", "text_encoder_2", "vae"]
    transformer = parts["transformer"]
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert not transformer.training
    assert len(transformer.transformer_blocks) == 19
    assert len(transformer.single_transformer_blocks) == 38
    assert list(meta_components("flux1_dev", "vae")) == ["vae"]


def test_linear_shapes_of_flux() -> None:
    shapes = linear_shapes("flux1_dev")
    by_size = {(shape.in_features, shape.out_features): shape for shape in shapes}
    assert all(isinstance(shape, LayerShape) and shape.kind == "linear" for shape in shapes)
    assert len(by_size) == len(shapes)
    # Attention: 8 per joint block, 3 per single block; feed-forward: 2 per joint block and one per single block.
    assert by_size[3072, 3072].count == 19 * 8 + 38 * 3 + 3
    assert by_size[3072, 12288].count == 19 * 2 + 38
    assert by_size[15360, 3072].count == 38
    assert by_size[3072, 18432].count == 19 * 2
    assert shapes[0].weight_elements * shapes[0].count == max(s.weight_elements * s.count for s in shapes)
    assert sum(shape.weight_elements * shape.count for shape in shapes) == pytest.approx(11.90e9, rel=1e-3)


def test_linear_shapes_of_a_unet() -> None:
    shapes = linear_shapes("sdxl_base")
    convolutions = [shape for shape in shapes if shape.kind == "conv2d"]
    assert {shape.kernel_size for shape in convolutions} == {(1, 1), (3, 3)}
    assert (4, 320, 1) in {(shape.in_features, shape.out_features, shape.count) for shape in convolutions}
    assert linear_shapes("sdxl_base", "unet") == shapes
    assert any(shape.kind == "conv3d" for shape in linear_shapes("wan21_t2v_1_3b", "vae"))


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'flux1_dev'"):
        published_config("flux1_dew")
    with pytest.raises(ConfigError, match="no component 'unet'"):
        meta_components("flux1_dev", ["unet"])
    with pytest.raises(ConfigError, match="Available: "):
        linear_shapes("sd15", "text_encoder_2")


def test_published_config_is_a_copy() -> None:
    published_config("sd15").components["unet"].config.clear()
    assert published_config("sd15").components["unet"].config["cross_attention_dim"] == 768


@pytest.mark.parametrize("name", list(unknown_classes.unknown_classes()))
def test_unknown_classes_run(name: str) -> None:
    model = unknown_classes.build(name)
    assert _parameters(model) < 5_000_000
    with torch.no_grad():
        output = model(**unknown_classes.forward_kwargs(name), return_dict=False)[0]
    samples = output if isinstance(output, torch.Tensor) else torch.stack(list(output))
    assert samples.isfinite().all()
    assert samples.std() > 0


def test_general_prompts() -> None:
    text = resources.files("diffuse_compress").joinpath("prompts").joinpath("general.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    prompts = [line for line in lines if not line.startswith("#")]
    assert "# SPDX-License-Identifier: Apache-2.0" in comments
    assert len(prompts) == len(set(prompts)) == 64
    assert all(line == line.strip() != "" for line in prompts)
    assert max(len(line.split()) for line in prompts) <= 20
