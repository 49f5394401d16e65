"""diffuse_compress: make diffusers and transformers models smaller and faster, in place.

``import diffuse_compress`` adds ``compress``, ``compression_plan``, ``compression_report``, ``compression_recipe``,
``compression_stats`` and ``decompress`` to pipelines and models, and to those of diffusers ``enable_cache``,
``disable_cache``, ``cache_disabled``, ``save_cache``, ``load_cache``, ``push_cache_to_hub`` and ``cache_summary``. It
lets plain ``from_pretrained`` load what they saved. The same verbs are functions here.
``DIFFUSE_COMPRESS_NO_PATCH=1`` leaves the classes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffuse_compress.api import (
    METHODS,
    compress,
    compression_plan,
    compression_recipe,
    compression_report,
    compression_stats,
    decompress,
    sensitivity,
)
from diffuse_compress.caching.config import CacheConfig, FeatureCacheConfig, HarmoniCaConfig
from diffuse_compress.caching.schedule import Schedule as CacheSchedule
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.card_results import attach_results
from diffuse_compress.companions import complete_save, complete_upload
from diffuse_compress.compare import PairedComparison, compare
from diffuse_compress.errors import (
    CheckpointError,
    CompressionConflictError,
    ConfigError,
    DiffuseCompressError,
    DiffuseCompressWarning,
    IncompatibleShapeError,
    MissingDependencyError,
    ModelStateError,
    UnsupportedHardwareError,
)
from diffuse_compress.feature_cache import (
    CACHE_METHODS,
    cache_disabled,
    cache_summary,
    disable_cache,
    enable_cache,
    load_cache,
    push_cache_to_hub,
    save_cache,
)
from diffuse_compress.importing import import_quantized
from diffuse_compress.integrations.attach import attach, register_quantizers
from diffuse_compress.integrations.attention import set_attention
from diffuse_compress.integrations.kv_cache import CACHES, cache_class
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.layer_sensitivity import SensitivityReport
from diffuse_compress.logging import (
    set_verbosity_debug,
    set_verbosity_error,
    set_verbosity_from_environment,
    set_verbosity_info,
    set_verbosity_warning,
)
from diffuse_compress.plan import CompressionPlan
from diffuse_compress.quantization.algorithms.adadim import AdaDimConfig
from diffuse_compress.quantization.algorithms.adaround import AdaRoundConfig
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.quantization.algorithms.dgq import DGQConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.llm_int8 import LLMInt8Config
from diffuse_compress.quantization.algorithms.norm_tweaking import NormTweakingConfig
from diffuse_compress.quantization.algorithms.omniquant import OmniQuantConfig
from diffuse_compress.quantization.algorithms.osplus import OSPlusConfig
from diffuse_compress.quantization.algorithms.owq import OWQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.quik import QUIKConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.spinquant import SpinQuantConfig
from diffuse_compress.quantization.algorithms.spqr import SpQRConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig
from diffuse_compress.quantization.algorithms.tesseraq import TesseraQConfig
from diffuse_compress.quantization.attention import AttentionFormat
from diffuse_compress.quantization.fused_attention import AttentionStats, attention_stats, reset_attention_stats
from diffuse_compress.quantization.kv_cache import KIVIConfig
from diffuse_compress.quantization.kv_config import ShadowKVConfig, SinkKVConfig
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    Bilevel,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerInputGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    Scheme,
    TwoLevel,
    WeightScheme,
)
from diffuse_compress.recipe import Recipe
from diffuse_compress.report import CompressionReport
from diffuse_compress.runtime.stats import CompressionStats, PlanMissedError
from diffuse_compress.temporal.config import TableConfig, TFMQConfig
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.options import TrainerOptions
from diffuse_compress.training.trainer import QATTrainer, TrainingResult

if TYPE_CHECKING:
    from diffuse_compress.integrations.kv_layers import QuantizedKVCache
    from diffuse_compress.integrations.kv_shadow import ShadowKVCache
    from diffuse_compress.integrations.kv_sink import SinkKVCache

__version__ = "0.1.0.dev0"

__all__ = [
    "AWQConfig",
    "ActivationScheme",
    "AdaDimConfig",
    "AdaRoundConfig",
    "AttentionFormat",
    "AttentionStats",
    "BRECQConfig",
    "Bilevel",
    "CacheConfig",
    "CacheSchedule",
    "Calibration",
    "CheckpointError",
    "CompressionConflictError",
    "CompressionPlan",
    "CompressionReport",
    "CompressionStats",
    "ConfigError",
    "DGQConfig",
    "DiffuseCompressError",
    "DiffuseCompressWarning",
    "FeatureCacheConfig",
    "GPTQConfig",
    "HQQConfig",
    "HarmoniCaConfig",
    "IncompatibleShapeError",
    "KIVIConfig",
    "LLMInt8Config",
    "MissingDependencyError",
    "ModelStateError",
    "NormTweakingConfig",
    "NumberFormat",
    "OSPlusConfig",
    "OWQConfig",
    "ObserverConfig",
    "OmniQuantConfig",
    "PairedComparison",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerInputGroup",
    "PerTensor",
    "PerToken",
    "PlanMissedError",
    "QATTrainer",
    "QUIKConfig",
    "QVGenConfig",
    "QuaRotConfig",
    "QuantizationConfig",
    "QuantizedKVCache",
    "RTNConfig",
    "Recipe",
    "SVDQuantConfig",
    "ScaleRule",
    "Scheme",
    "SensitivityReport",
    "ShadowKVCache",
    "ShadowKVConfig",
    "SinkKVCache",
    "SinkKVConfig",
    "SmoothQuantConfig",
    "SpQRConfig",
    "SpinQuantConfig",
    "TFMQConfig",
    "TableConfig",
    "TesseraQConfig",
    "TrainerOptions",
    "TrainingResult",
    "TwoLevel",
    "UnsupportedHardwareError",
    "WeightScheme",
    "attach_results",
    "attention_stats",
    "cache_disabled",
    "cache_summary",
    "compare",
    "compress",
    "compression_plan",
    "compression_recipe",
    "compression_report",
    "compression_stats",
    "decompress",
    "disable_cache",
    "enable_cache",
    "import_quantized",
    "load_cache",
    "push_cache_to_hub",
    "reset_attention_stats",
    "save_cache",
    "sensitivity",
    "set_attention",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]


def __getattr__(name: str) -> Any:
    # Subclasses of transformers' cache: that library is imported where they are asked for, and need not be there.
    if name in CACHES:
        return cache_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


set_verbosity_from_environment()

register_quantizers()
attach(METHODS, CACHE_METHODS, complete_save, complete_upload)
