"""Configuration of the composite model: the trunk it stands on and the block protocol it was trained with."""

from typing import Any

from huggingface_hub.dataclasses import strict
from peft import PeftConfig
from transformers import PreTrainedConfig

from .configuration_adapter import PDTAdapterConfig, check_range

ADAPTER_FIELDS = frozenset(PDTAdapterConfig.__dataclass_fields__) - frozenset(PeftConfig.__dataclass_fields__)
# Keys that `PreTrainedConfig` takes through its keyword arguments.
INHERITED_KEYS = ("output_attentions", "attn_implementation", "experts_implementation", "name_or_path")
# `Trainer` sets them on every model's configuration.
TRUNK_FIELDS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


@strict
class PDTConfig(PreTrainedConfig):
    """
    Configuration of [`PDTForParallelDecoding`].

    Fields of the loaded [`PDTAdapterConfig`] (`num_streams`, `notes_dim`, ...) can be read from here; they are owned
    by the adapter configuration and cannot be set here.

    Args:
        trunk_name_or_path (`str`, *optional*):
            Hub id of the trunk, or a path; a relative path is relative to the folder that holds `config.json`.
        trunk_revision (`str`, *optional*): Revision of the trunk on the Hub.
        trunk_config (`dict`, *optional*): The trunk's configuration as it was when the adapters were made.
        adapter_subfolder (`str`, *optional*, defaults to `"adapter"`): Folder of the adapter inside the repository.
        block_size (`int`, *optional*, defaults to 12): Tokens of a stream between two synchronisation points.
        bus_lag (`int`, *optional*, defaults to 1): A first writing of round v reads rounds <= v - bus_lag.
        bus_capacity (`int`, *optional*, defaults to 16): Rounds kept readable; snapshot 0 is not counted.
        plan_on_bus (`bool`, *optional*, defaults to `True`): Plan items are readable as snapshot 0. Without, only the
            coverage head reads them; seeds of a call stay readable.
        commit_horizon (`int`, *optional*): Newest tokens that may be withdrawn. Defaults to `block_size`.
        plan_hash_salt (`str`, *optional*): Salt of the hash that maps plan items to planner buckets.
    """

    model_type = "pdt"
    keys_to_ignore_at_inference = ["tap", "past_key_values", "last_hidden_state"]

    trunk_name_or_path: str | None = None
    trunk_revision: str | None = None
    trunk_config: dict | None = None
    adapter_subfolder: str = "adapter"
    block_size: int = 12
    bus_lag: int = 1
    bus_capacity: int = 16
    plan_on_bus: bool = True
    commit_horizon: int | None = None
    plan_hash_salt: str = "parallel-decoder-v1"

    def __post_init__(self, **kwargs: Any) -> None:
        known = {"auto_map", "torch_dtype", "model_type", *INHERITED_KEYS}
        unknown = [key for key in kwargs if key not in known and not key.startswith("_")]
        if unknown:
            raise ValueError(f"PDTConfig does not know {sorted(unknown)}; its fields are {sorted(self.own_fields())}.")
        if self.commit_horizon is None:
            self.commit_horizon = self.block_size
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raises `ValueError` for an impossible value, naming field, value and range."""
        for name in ("block_size", "bus_lag", "bus_capacity"):
            check_range("PDTConfig", name, getattr(self, name), 1)
        check_range("PDTConfig", "commit_horizon", self.commit_horizon, self.block_size)
        parts = self.adapter_subfolder.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise ValueError(
                f"PDTConfig.adapter_subfolder must be a folder inside the model's folder, "
                f"got {self.adapter_subfolder!r}."
            )

    @staticmethod
    def own_fields() -> tuple[str, ...]:
        """Names of the fields that this configuration owns."""
        return (
            "trunk_name_or_path",
            "trunk_revision",
            "trunk_config",
            "adapter_subfolder",
            "block_size",
            "bus_lag",
            "bus_capacity",
            "plan_on_bus",
            "commit_horizon",
            "plan_hash_salt",
        )

    def attach_adapter(self, adapter_config: PDTAdapterConfig) -> None:
        """Makes the adapter's fields readable here; checks values that were set after construction."""
        self.check()
        object.__setattr__(self, "_adapter_config", adapter_config)

    def __getattr__(self, name: str) -> Any:
        adapter_config = self.__dict__.get("_adapter_config")
        if adapter_config is not None and not name.startswith("_") and hasattr(adapter_config, name):
            return getattr(adapter_config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ADAPTER_FIELDS:
            raise ValueError(f"PDTConfig.{name} cannot be set to {value!r}: PDTAdapterConfig owns it.")
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Own fields only: the adapter's are in `adapter_config.json`, those of a plain causal LM in the trunk's."""
        output = super().to_dict()
        for name in ("_adapter_config", *TRUNK_FIELDS):
            output.pop(name, None)
        return output
