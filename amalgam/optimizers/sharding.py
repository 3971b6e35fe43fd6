"""Parameters of which every process has a part, and what the processes decide together.

A parameter may be a ``DTensor``, as ``fully_shard`` and tensor parallelism make them: each process
steps its part, and keeps that part of the state. FSDP1's are plain tensors, parts of flat vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amalgam.operations.sign_agreement import sign_agreements
from amalgam.policies.fused_student import norms_of as norms_of_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

SKIP_GROUPS = ("auto", "world")
_WHOLE = {Tensor, nn.Parameter}


class Sharding(NamedTuple):
    """How a tensor lies on processes.

    Attributes:
        mesh: The processes.
        placements: What each dimension of the mesh does to the tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def whole(self, part: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
        """The tensor of which this process has this part.

        Args:
            part: This process's.
            shape: The whole tensor's.
            stride: Likewise, of a tensor that lies in memory as this part does.
        """
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def part_of(self, value: Tensor) -> Tensor:
        """This process's part of a tensor that lies so, or otherwise, or is here as a whole.

        Args:
            value: If it lies otherwise on the same mesh, all processes have to call this.

        Raises:
            ValueError: It lies on another mesh.
        """
        found = sharding_of(value)
        if found == self:
            return local_part(value)
        if found is not None:
            if found.mesh != self.mesh:
                raise ValueError(f"must lie on {self.mesh}, not on {found.mesh}")
            return local_part(value.redistribute(self.mesh, self.placements))  # type: ignore[attr-defined]
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(
            value.shape, self.mesh, self.placements
        )
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            value = value.narrow(dim, min(offset, value.shape[dim]), size)
        return value.clone()

    def part_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of this process's part of a tensor of this shape."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        return torch.Size(
            compute_local_shape_and_global_offset(shape, self.mesh, self.placements)[0]
        )

    def split_by(self) -> list[int]:
        """The dimensions of the mesh over which the tensor is in parts."""
        return [
            dim
            for dim, placement in enumerate(self.placements)
            if not placement.is_replicate() and self.mesh.size(dim) > 1
        ]

    def number(self) -> int:
        """Which of the parts this process has, from 0; copies of a part have one number."""
        place = self.mesh.get_coordinate() or [0] * self.mesh.ndim
        number = 0
        for dim in self.split_by():
            number = number * self.mesh.size(dim) + place[dim]
        return number


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these is a DTensor; quick where all are plain."""
    return not _WHOLE.issuperset(map(type, tensors)) and any(
        sharding_of(tensor) is not None for tensor in tensors
    )


def sharding_of(tensor: Any) -> Sharding | None:
    """How a DTensor lies on processes; ``None`` of any other tensor."""
    if type(tensor) in _WHOLE or not (isinstance(tensor, Tensor) and dist.is_available()):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    return Sharding(tensor.device_mesh, tuple(tensor.placements))


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, by the same object in every call; other tensors as are."""
    if sharding_of(tensor) is None:
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    # to_local() makes a new view of a parameter's in every call.
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


def in_flat_vector(param: Tensor) -> bool:
    """Whether FSDP1 has made a parameter a part of a flat vector, by which its shape is lost."""
    return getattr(param, "_fsdp_flattened", False)


def place_gradients(params: Sequence[Tensor]) -> None:
    """Bring gradients to where their parameters lie: where they are partial sums, sum them.

    Args:
        params: Parameters with gradients. All processes have to call this.
    """
    for param in params:
        ours, theirs = sharding_of(param), sharding_of(param.grad)
        if ours is not None and theirs is not None and ours != theirs:
            param.grad = param.grad.redistribute(ours.mesh, ours.placements)  # type: ignore[union-attr]


def check_group(group: Any) -> None:
    """Raise TypeError unless this is ``None`` or a group of processes."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"skip_group must be 'auto', 'world', None or a torch.distributed.ProcessGroup, not "
            f"{group!r}"
        )


def groups_of(param: Tensor, skip_group: Any) -> list[ProcessGroup]:
    """The groups of processes that have parts of a parameter, and skip its steps together.

    Args:
        param: The parameter.
        skip_group: As :class:`amalgam.AmalgamatedOptimizer` takes it.
    """
    if skip_group is None or not (dist.is_available() and dist.is_initialized()):
        return []
    sharding = sharding_of(param)
    if sharding is not None:
        return [sharding.mesh.get_group(dim) for dim in sharding.split_by()]
    if in_flat_vector(param):
        return _more_than_one(skip_group)
    return []


def groups_of_all(params: Sequence[Tensor], skip_group: Any) -> list[ProcessGroup]:
    """The groups of processes that take or skip a whole step together, each once.

    Args:
        params: All parameters of an optimizer.
        skip_group: As :class:`amalgam.AmalgamatedOptimizer` takes it.

    Raises:
        RuntimeError: Processes are asked for that have not met.
    """
    if skip_group not in (None, "auto"):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"skip_group={skip_group!r} needs torch.distributed.init_process_group first"
            )
        return _more_than_one(skip_group)
    found = {}
    for param in params:
        found.update({group.group_name: group for group in groups_of(param, skip_group)})
    return list(found.values())


def _more_than_one(skip_group: Any) -> list[ProcessGroup]:
    group: Any = dist.group.WORLD if skip_group in SKIP_GROUPS else skip_group
    return [group] if dist.get_world_size(group) > 1 else []


def reduced(
    values: Sequence[Tensor], groups: Sequence[Sequence[ProcessGroup]], operation: Any
) -> list[Tensor]:
    """Each value reduced over its processes, without waiting for a GPU.

    Args:
        values: Of one shape, dtype and device.
        groups: Those of each value; all their processes call this with as many values, and groups
            in the same order.
        operation: A ``torch.distributed.ReduceOp``.

    Returns:
        As many, in the values' dtype.
    """
    found = list(values)
    by_name = {group.group_name: group for each in groups for group in each}
    for name, group in by_name.items():
        where = [i for i, each in enumerate(groups) if any(g.group_name == name for g in each)]
        sent = torch.stack([found[i] for i in where])
        there = sent.to(_device_for(group, sent.device), non_blocking=True)
        dist.all_reduce(there, operation, group)
        back = there.to(sent.device, non_blocking=there.device.type == "cpu")
        for i, value in zip(where, back.unbind(), strict=True):
            found[i] = value
    return found


def _device_for(group: ProcessGroup, device: torch.device) -> torch.device:
    """The device itself where a group exchanges what it holds, else one that it exchanges."""
    kinds = [each.split(":")[0] for each in dist.get_backend_config(group).split(",")]
    if device.type in kinds:
        return device
    kind = kinds[0]
    return (
        torch.device(kind, torch.accelerator.current_device_index())
        if kind != "cpu"
        else (torch.device("cpu"))
    )


def any_process(flags: Sequence[Tensor], groups: Sequence[Sequence[ProcessGroup]]) -> list[Tensor]:
    """Which flags are set in one of their processes; see :func:`reduced`.

    Args:
        flags: Bool, of shape () each, on one device.
        groups: Those of each flag.
    """
    found = reduced([flag.float() for flag in flags], groups, dist.ReduceOp.MAX)
    return [flag != 0 for flag in found]


def summed(values: Sequence[Tensor], groups: Sequence[ProcessGroup]) -> list[Tensor]:
    """Each value's sum over processes; see :func:`reduced`.

    Args:
        values: Of shape () each, on one device.
        groups: The processes' groups, those of all values.
    """
    return reduced(values, [groups] * len(values), dist.ReduceOp.SUM) if groups else list(values)


def agreements_of(params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor]) -> Tensor:
    """What :func:`amalgam.ops.sign_agreements` says of gradients and first moments.

    Of DTensors all processes' parts count together, of FSDP1's flat vectors this process's part.

    Args:
        params: The parameters. All processes have to call this.
        grads: This process's parts of their gradients.
        m: Likewise of their first moments.
    """
    counts = sign_agreements(grads, m)
    groups = [groups_of(p, "auto") if sharding_of(p) is not None else [] for p in params]
    if not any(groups):
        return counts
    return torch.stack(reduced(list(counts.unbind()), groups, dist.ReduceOp.SUM))


def norms_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each parameter, all processes' parts together, float64 of shape ().

    Args:
        params: Parameters on one device. All processes have to call this.
    """
    norms = norms_of_whole(list(map(local_part, params)))
    groups = [groups_of(param, "auto") for param in params]
    if not any(groups):
        return list(norms)
    squares = reduced([norm * norm for norm in norms], groups, dist.ReduceOp.SUM)
    return [square.sqrt() for square in squares]
