"""A job of several processes that trains nothing, and saves a model as torch.distributed.checkpoint does: in every way
that it can be sharded, for three steps each. `torchrun … distributed_job.py DIRECTORY KIND…`
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

dcp: Any = torch.distributed.checkpoint

STEPS = (10, 20, 30)


class Model(nn.Module):
    """Sizes that no number of processes divides, next to some that all do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, dtype=torch.bfloat16)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv2d(5, 3, (3, 2))
        self.norm = nn.BatchNorm1d(3)
        self.wide = nn.Parameter(torch.empty(3, 40_000))


def weights(step: int) -> dict[str, Tensor]:
    """The model as it is at a step."""
    model, draw = Model(), torch.Generator().manual_seed(step)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else torch.tensor(step))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def model_at(step: int) -> Model:
    """The same as a module."""
    model = Model()
    model.load_state_dict(weights(step))
    return model


def optimizer_state(tensors: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer would have, sharded alike."""
    return {"state": {name: {"exp_avg": tensor * 2, "step": torch.tensor(3.0)} for name, tensor in tensors.items()}}


def placed(step: int, placement: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Every tensor on a mesh of one dimension, as its placement says."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(each, mesh, [placement(each)]) for name, each in weights(step).items()}


def fsdp_model(step: int) -> Model:
    """FSDP2, as torch wraps a model."""
    from torch.distributed.fsdp import fully_shard

    model = model_at(step)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    return model


def fully_sharded(step: int) -> dict[str, Any]:
    """The same, as torch names its state."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(fsdp_model(step))


def tensor_parallel(step: int) -> dict[str, Any]:
    """Columns of one layer, rows of the next, the embedding by rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
    return dict(parallelize_module(model_at(step), mesh, plan).state_dict())


def two_dimensional(step: int) -> dict[str, Any]:
    """Tensor-parallel layers that FSDP2 shards once more."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(model_at(step), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return get_model_state_dict(model)


def grid(step: int) -> dict[str, Any]:
    """Both dimensions of a matrix cut, on a mesh of two."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    return {
        name: distribute_tensor(each, mesh, [Shard(0), Shard(1)] if each.ndim > 1 else [Replicate(), Replicate()])
        for name, each in weights(step).items()
    }


def sharded_tensors(step: int) -> dict[str, Any]:
    """Rows of each tensor in the class that the first FSDP saves them in; what has no rows is whole."""
    sharded_tensor: Any = importlib.import_module("torch.distributed._shard.sharded_tensor")

    rank, world = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {}
    for name, whole in weights(step).items():
        parts = whole.chunk(world) if whole.ndim else []
        begin = [sum(map(len, parts[:rank])), *[0] * (whole.ndim - 1)]
        shards = [
            sharded_tensor.Shard(
                each.clone(), sharded_tensor.ShardMetadata(begin, list(each.shape), f"rank:{rank}/cpu")
            )
            for each in parts[rank : rank + 1]
        ]
        state[name] = sharded_tensor.init_from_local_shards(shards, *whole.shape) if whole.ndim else whole
    return state


KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "fsdp2": fully_sharded,
    "tensor-parallel": tensor_parallel,
    "two-dimensional": two_dimensional,
    "grid": grid,
    "replicated": lambda step: placed(step, lambda each: Replicate()),
    "uneven": lambda step: placed(step, lambda each: Shard(0) if each.ndim else Replicate()),
    "last dimension": lambda step: placed(step, lambda each: Shard(each.ndim - 1) if each.ndim else Replicate()),
    "whole": weights,
    "accelerate": fully_sharded,
    "sharded tensors": sharded_tensors,
}


def save(kind: str, state: dict[str, Any], target: Path, step: int) -> None:
    """Write it as the kind says."""
    extra = {} if kind == "sharded tensors" else {"optim": optimizer_state(state)}
    nested = {"model": state, **extra, "step": torch.tensor(step), "lr": 0.1}
    if kind == "hf":
        writer = dcp.HuggingFaceStorageWriter(str(target), save_distributed=True)
        dcp.save(state, storage_writer=writer)
    elif kind == "hf, two files":
        files = {name: 1 + place % 2 for place, name in enumerate(state)}
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(target), files, save_distributed=True))
    elif kind == "accelerate":
        from accelerate import FullyShardedDataParallelPlugin, PartialState
        from accelerate.utils.fsdp_utils import save_fsdp_model

        PartialState(cpu=True)
        sharded = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **sharded)
        save_fsdp_model(plugin, None, fsdp_model(step), target)
    elif kind == "async":
        dcp.async_save(nested, checkpoint_id=target).result()
    elif kind == "a file each":
        dcp.save(nested, storage_writer=dcp.FileSystemWriter(target, single_file_per_rank=False, thread_count=2))
    else:
        dcp.save(nested, checkpoint_id=target)


def main() -> None:
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        for step in STEPS:
            state = KINDS[kind if kind in KINDS else "uneven"](step)
            state = {name: each.detach() if type(each) in (Tensor, DTensor) else each for name, each in state.items()}
            save(kind, state, root / kind / f"step-{step}", step)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo do not always end in order


if __name__ == "__main__":
    main()
