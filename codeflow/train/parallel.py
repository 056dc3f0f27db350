"""Data parallelism: one process, or several under torchrun, with the same arithmetic.

Every process ("rank") runs the same program on other rows. Small models are replicated (DDP), large
ones sharded (FSDP2: each rank keeps a slice of every weight and gathers a layer when it runs).
Gradients are *summed* over ranks and not averaged, as they are over micro-batches: a loss that is
a sum divided by the targets of the whole step then gives the gradient of a single process, however
unequally the targets fall on ranks.

The weights of rank 0 count; those of the others are overwritten, so they may build their model on
the meta device, which spares the host all copies but one. When all ranks do, the host holds none,
and the distributed model is given values by `LoopCoder.initialise` or `checkpoint.restore`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from codeflow.errors import UsageError, did_you_mean
from codeflow.train.model import LoopCoder

T = TypeVar("T")

STRATEGIES = ("auto", "ddp", "fsdp")

_REPLICA_BYTES = 16
"""Per parameter on every rank under DDP: weight, gradient and two moments of Adam, in float32."""

_PATIENCE = timedelta(hours=2)
"""Others wait for rank 0 while it draws, reads or writes the whole model: 480 GB at 40B."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Of this process, from 0.
        world_size: Number of processes.
        local_rank: Of this process among those of its machine.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def start(device: str) -> World:
    """Join the other processes, when torchrun's environment says that there are any.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, or, for one process, any device of
            torch. Of several processes on `cuda` each takes the GPU of its local rank.

    Raises:
        UsageError: The device is not usable here, or the processes do not find each other.
    """
    rank, world_size, local_rank = _environment()
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if world_size == 1:
        return World(0, 1, 0, usable_device(name))
    if name not in ("cpu", "cuda"):
        raise UsageError(
            f"train.device={device}: {world_size} processes run on cpu or cuda, and each takes the "
            "GPU of its local rank"
        )
    chosen = usable_device(name if name == "cpu" else f"cuda:{local_rank}")
    try:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            dist.init_process_group("nccl", device_id=chosen, timeout=_PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, dist.DistError) as e:
        raise UsageError(
            f"rank {rank} cannot reach the other {world_size - 1} processes: {e}. Start them with "
            "torchrun, which says where they meet (MASTER_ADDR, MASTER_PORT)."
        ) from e
    return World(rank, world_size, local_rank, chosen)


def stop(world: World) -> None:
    """Leave the group; nothing to do for a single process."""
    if world.world_size > 1:
        dist.destroy_process_group()


def usable_device(name: str, option: str = "train.device=") -> torch.device:
    """A device by name; `auto` is cuda where there is one, else the CPU.

    Raises:
        UsageError: It cannot be used here; the message begins with `option`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:  # the latter: torch without CUDA
        raise UsageError(f"{option}{name}: not usable here: {e}") from e
    if chosen.type == "cuda":
        # cuDNN's attention makes a plan for each length that it meets, and keeps it: documents, and
        # the caches of generation, have all lengths.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def activation_dtype(name: str, device: torch.device) -> torch.dtype:
    """`train.dtype`, with `auto` decided: bfloat16 on GPUs since Ampere, which compute in it."""
    if name == "auto":
        ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if ampere else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def distribute(
    model: LoopCoder,
    world: World,
    *,
    strategy: str = "auto",
    dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Move the model to its device and spread it over the ranks; to be called before the optimizer.

    The model itself is changed and stays the one to save, to clip and to make an optimizer of.

    Args:
        model: On rank 0 with its weights or on the meta device; see above. Sharding needs room on
            the device for a shard and the largest weight.
        world: The processes.
        strategy: `ddp`, `fsdp`, or `auto`: DDP when weights, gradients and moments of Adam, 16
            bytes per parameter, take at most half of the device's memory, so that activations have
            the other half. On CPUs `auto` is DDP.
        dtype: Of the activations. Under FSDP2 with bfloat16, weights are gathered in it (the gates'
            too, which DDP uses in float32) and gradients summed in float32.
        reshard_after_forward: FSDP2 only: free a layer's gathered weights after each run of it.
            A looped model then gathers each layer `loop_num` times in the forward pass and as often
            in the backward pass; False gathers once, at the price of room for all weights.

    Returns:
        The module to call: the model itself, or DDP around it.

    Raises:
        UsageError: An unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"train.parallel={strategy!r}: {did_you_mean(strategy, STRATEGIES)}")
    if world.world_size == 1:
        return _place(model, world.device)
    if strategy == "ddp" or (strategy == "auto" and _fits(model, world.device)):
        return _replicate(model, world)
    return _shard(model, world, dtype, reshard_after_forward)


def total(value: Tensor, world: World) -> Tensor:
    """Sum of a tensor over ranks; every rank must call. The argument is left as it is."""
    if world.world_size == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def from_rank_0(value: T, world: World) -> T:
    """What rank 0 passed, on every rank; every rank must call. Any object that pickles."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: T, world: World) -> list[T]:
    """What each rank passed, by rank, on every rank; every rank must call."""
    if world.world_size == 1:
        return [value]
    values = [value] * world.world_size
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def accumulate(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward pass of every micro-batch: exchange gradients when needed.

    All ranks must run as many micro-batches as the others. DDP exchanges after the last one alone.
    FSDP2 sums every micro-batch into the shards at once: to wait would keep the gradients of the
    whole model on every rank, which is what sharding is there to avoid. The result is the same.
    """
    if last or not isinstance(module, DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield


def clip_gradients(model: nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Returns:
        The norm before clipping: a float32 scalar, the same on every rank, on the world's device.
    """
    parameters = list(model.parameters())
    norm = get_total_norm(p.grad for p in parameters if p.grad is not None)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.to(world.device)


def _place(model: LoopCoder, device: torch.device) -> LoopCoder:
    return model.to_empty(device=device) if model.head_weight.is_meta else model.to(device)


def _replicate(model: LoopCoder, world: World) -> nn.Module:
    model = _place(model, world.device)
    # The graph of a step is always the same one: also without a target the loss reaches every
    # trainable parameter. So DDP need not look for unused ones.
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, lambda _, bucket: _sum(bucket))  # torch checks annotations
    return replica


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed


def _shard(
    model: LoopCoder, world: World, dtype: torch.dtype, reshard_after_forward: bool
) -> nn.Module:
    has_values = from_rank_0(not model.head_weight.is_meta, world)
    weights = model.state_dict() if world.rank == 0 else {}
    model.to("meta")  # so that a device never holds more than its shard and one whole weight
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the model casts what it wants cast
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The rest, embedding and output layer, is needed from the start of a pass to its end.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    model.to_empty(device=world.device)
    if has_values:
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=whole)
    return model


def _fits(model: nn.Module, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    needed = _REPLICA_BYTES * sum(p.numel() for p in model.parameters())
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return needed <= memory // 2


def _environment() -> tuple[int, int, int]:
    """Rank, world size and local rank; (0, 1, 0) when not started by torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as e:
        raise UsageError(
            f"WORLD_SIZE is set, but RANK and LOCAL_RANK are not as torchrun sets them: {e}. Start "
            "with torchrun, or unset WORLD_SIZE."
        ) from e
    return rank, size, local
