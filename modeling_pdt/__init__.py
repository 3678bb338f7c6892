"""Parallel Decoder Transformer: model, configurations and parallel decoding."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .callbacks import ParallelDecodingCallback
from .conditioning_check import ConditioningCheck
from .configuration_adapter import PDTAdapterConfig
from .configuration_generation import PDTGenerationConfig
from .configuration_pdt import PDTConfig
from .modeling_pdt import PDTForParallelDecoding
from .outputs import ParallelGenerateOutput, PDTOutput, StreamResult
from .rollout import Rollout

AutoConfig.register("pdt", PDTConfig, exist_ok=True)
AutoModel.register(PDTConfig, PDTForParallelDecoding, exist_ok=True)
AutoModelForCausalLM.register(PDTConfig, PDTForParallelDecoding, exist_ok=True)

__all__ = [
    "ConditioningCheck",
    "PDTAdapterConfig",
    "PDTConfig",
    "PDTForParallelDecoding",
    "PDTGenerationConfig",
    "PDTOutput",
    "ParallelDecodingCallback",
    "ParallelGenerateOutput",
    "Rollout",
    "StreamResult",
]
