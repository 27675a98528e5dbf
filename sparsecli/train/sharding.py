"""Models that are sharded over processes: FSDP and DeepSpeed, as `accelerate launch` sets them in the environment.

A checkpoint of FSDP has the same files as one of a single process or of DDP, so a run can go on with another number of
processes. A checkpoint of DeepSpeed holds its own shards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sparsecli.console import Failure

DEEPSPEED_MARK = "latest"
"""A file that only checkpoints of DeepSpeed have."""


def uses_fsdp() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def is_of_deepspeed(checkpoint: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint."""
    return (checkpoint / DEEPSPEED_MARK).is_file()


def prepare_fsdp(accelerator: Accelerator) -> None:
    """Make FSDP write whole weights, and use it on CPUs too, where accelerate would use DDP without a warning.

    Raises:
        Failure: FSDP 1 on CPUs, which accelerate cannot prepare.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        if os.environ.get("FSDP_VERSION", "1") == "1":
            raise Failure("FSDP 1 needs GPUs; set fsdp_version: 2 in accelerate's configuration")
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")


def whole_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of a sharded model's optimizer as `Optimizer.state_dict` of the whole model gives it.

    All processes have to call this. Only the first one gets the tensors.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    sharded: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer, options=options)}
    numbers: dict[str, int] = {}
    groups = []
    for group in sharded.get("param_groups", []):
        names = [numbers.setdefault(name, len(numbers)) for name in group["params"]]
        groups.append({**group, "params": names})
    state = {numbers[name]: values for name, values in sharded.get("state", {}).items()}
    return {"state": state, "param_groups": groups}


def set_whole_optimizer_state(model: nn.Module, optimizer: Optimizer, whole: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave, into each process its shard. All processes pass the same."""
    plain = StateDictOptions(full_state_dict=True, cpu_offload=True)
    before: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer, options=StateDictOptions())}
    names = [name for group in before["param_groups"] for name in group["params"]]
    sharded: dict[str, Any] = {
        "state": {names[number]: values for number, values in whole["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in whole["param_groups"]
        ],
    }
    set_optimizer_state_dict(model, optimizer, sharded, options=plain)
