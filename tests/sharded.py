"""Run as a program: two processes, then four, train by sharded optimizers and keep what came out.

Every process has the same batch, so that a mean of gradients over processes is one's own, to the
bit, and what comes out can be held against one process's run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from amalgam import (
    AmalgamatedOptimizer,
    NominalConfig,
    NominalStudent,
    PolicyOptimizer,
    Student,
    StudentConfig,
    TeacherOptimizer,
)
from amalgam.optimizers import separate_units

STEPS = 4
EVERYTHING = ("time", "rank", "fan_in", "rms")


def nominal(*inputs: str, **config: Any) -> NominalStudent:
    student = NominalStudent(
        NominalConfig(hidden=4, inputs=inputs, **config), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        student.head.weight.copy_(torch.linspace(-1, 1, 8).view(2, 4))
    return student


def paper() -> Student:
    config = StudentConfig(layers=2, hidden=3, warmup_steps=2, warmup_lr=0.1)
    return Student(config, generator=torch.Generator().manual_seed(1))


STUDENTS: dict[str, Callable[[], Any]] = {
    "nominal": nominal,
    "told": lambda: nominal(*EVERYTHING),
    "orthogonal": lambda: nominal(orthogonal=True),
    "paced": lambda: nominal(pacing=0.3, pacing_steps=2, steady_agreement=0.1, rate_warmup=3),
    "paper": paper,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Checkpoints: whether they are flattened, and settings of the optimizer.
FORMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "nested": (False, {}),
    "flat": (True, {}),
    "codes": (False, {"cells_dtype": torch.int8}),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers of odd sizes: over four processes, some have no row of a weight or of a bias."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    return nn.Sequential(*layers).to(dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    loss_of(model, step, dtype).backward()


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(4, 6, generator=generator).to(dtype)
    return model(x).square().mean()


def train(
    model: nn.Module, optimizer: Any, steps: range, dtype: torch.dtype = torch.float32
) -> None:
    for step in steps:
        backward(model, step, dtype)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def params_of(model: nn.Module) -> list[Tensor]:
    with FullyShardedDataParallel.summon_full_params(model):
        return [whole(param) for param in model.parameters()]


def state_of(optimizer: Any) -> list[dict[str, Tensor]]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [{name: whole(t) for name, t in optimizer.state[p].items()} for p in params]


def sharded(model: nn.Sequential, **how: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **how)
    return fully_shard(model, **how)


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def spoil(param: Tensor, rank: int, value: float = torch.inf) -> None:
    """Make the first element that this process has of a gradient unusable, in one process."""
    grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
    if dist.get_rank() == rank and grad is not None and grad.numel():
        with torch.no_grad():
            grad.view(-1)[0] = value


# ---------------------------------------------------------------------------------------- FSDP2


def fsdp2(
    prefix: str = "fsdp2", dtypes: Iterable[str] = DTYPES, **how: Any
) -> Iterator[tuple[str, Any]]:
    for kind, make in STUDENTS.items():
        for name in dtypes:
            dtype = DTYPES[name]
            model = sharded(network(dtype), **how)
            optimizer = AmalgamatedOptimizer(model.parameters(), student=make())
            train(model, optimizer, range(STEPS), dtype)
            for param in model.parameters():
                for entry_name, entry in optimizer.state[param].items():
                    if entry_name not in ("step", "pace"):
                        assert isinstance(entry, DTensor)
                        assert entry.placements == param.placements
            yield f"{prefix}-{kind}-{name}", (params_of(model), state_of(optimizer))


def statistics() -> dict[str, tuple[float, ...]]:
    model = sharded(network())
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal(*EVERYTHING))
    train(model, optimizer, range(2))
    backward(model, 2)
    return {name: tuple(found) for name, found in optimizer.stats().items()}


def faults(model: nn.Module, first: Tensor, **how: Any) -> Any:
    """A gradient that the second process alone has unusable, between two steps.

    Args:
        model: A sharded network.
        first: A parameter of it, of which the second process has a part.
        **how: The optimizer's settings.
    """
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal(), **how)
    train(model, optimizer, range(1))
    backward(model, 1)
    spoil(first, 1)
    optimizer.step()
    train(model, optimizer, range(2, 3))
    return params_of(model), everywhere(optimizer.skipped_steps)


def scaled() -> Any:
    """A scaler finds an unusable gradient in the second process alone."""
    model = sharded(network())
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            spoil(model[0].weight, 1)
        scaler.step(optimizer)
        scaler.update()
    return params_of(model), everywhere(scaler.get_scale())


def raising() -> list[str]:
    model = sharded(network())
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal(), nonfinite="raise")
    backward(model, 0)
    spoil(model[0].weight, 0)
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    return everywhere(message)


def ones_to_round() -> Tensor:
    return torch.ones(4096, dtype=torch.bfloat16)


def rounded(param: nn.Parameter, **how: Any) -> Tensor:
    """Four steps, each far below bfloat16's last bit of what it is taken from."""
    optimizer = AmalgamatedOptimizer([param], student=nominal(), lr=0.1, **how)
    for _ in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return param.detach()


def rounding(mesh: Any, placements: list[Any]) -> list[Tensor]:
    """What all processes have of a parameter that was rounded at random."""
    param = nn.Parameter(distribute_tensor(ones_to_round(), mesh, placements))
    return everywhere(rounded(param, rounding="stochastic").to_local())


def mixed_precision() -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(network(), mp_policy=policy, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal())
    train(model, optimizer, range(STEPS))
    return params_of(model)


def refusals() -> dict[str, str]:
    """What is refused, and how."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = AmalgamatedOptimizer([param], student=nominal())
    param.grad = torch.ones_like(param)
    optimizer.step()
    plain = AmalgamatedOptimizer([nn.Parameter(torch.ones(4))], student=nominal())
    flat = fsdp1(network())
    tries: dict[str, Callable[[], Any]] = {
        "policy": lambda: PolicyOptimizer([param], nominal()),
        "teacher": lambda: TeacherOptimizer([param], "adam"),
        "compiled": optimizer._compiled_step,
        "into-a-plain-one": lambda: plain.load_state_dict(optimizer.state_dict()),
        "flat": lambda: AmalgamatedOptimizer(flat.parameters(), student=nominal("rank")),
        "matrices": lambda: AmalgamatedOptimizer(
            flat.parameters(), student=nominal(orthogonal=True)
        ),
    }
    found = {}
    for name, attempt in tries.items():
        found[name] = "nothing"
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# ------------------------------------------------------------------------------------------ DCP


def checkpointed(folder: Path, flat: bool, **how: Any) -> Any:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = sharded(network())
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal(), lr=0.5, **how)
    train(model, optimizer, range(2))
    states = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(states, checkpoint_id=folder)
    train(model, optimizer, range(2, STEPS))
    return params_of(model)


def resumed(
    folder: Path, flat: bool, shard: Callable[[Any], nn.Module] = sharded, **how: Any
) -> Any:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = shard(network())
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal(), **how)
    states = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(states, checkpoint_id=folder)
    model.load_state_dict(states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    train(model, optimizer, range(2, STEPS))
    return params_of(model)


def broadcast() -> Any:
    """A sharded optimizer goes on from the full state that another's first process has."""
    models = [sharded(network()) for _ in range(2)]
    optimizers = [AmalgamatedOptimizer(m.parameters(), student=nominal()) for m in models]
    train(models[0], optimizers[0], range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(models[0], optimizers[0], options=options)
    models[1].load_state_dict(models[0].state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = saved if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(models[1], optimizers[1], given, options=options)
    train(models[1], optimizers[1], range(2, STEPS))
    return params_of(models[1])


def from_a_whole() -> Any:
    """A sharded optimizer goes on from the plain state_dict of one that is not."""
    model = network()
    optimizer = AmalgamatedOptimizer(model.parameters(), student=nominal())
    train(model, optimizer, range(2))
    other = sharded(model)
    theirs = AmalgamatedOptimizer(other.parameters(), student=nominal())
    theirs.load_state_dict(optimizer.state_dict())
    train(other, theirs, range(2, STEPS))
    return params_of(other)


# ---------------------------------------------------------------------------------------- FSDP1


def fsdp1(model: nn.Module, original: bool = True) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


def fsdp1_cases() -> Iterator[tuple[str, Any]]:
    forms: dict[str, tuple[Any, ...]] = {
        "full": (
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        ),
        "sharded": (
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(),
            ShardedOptimStateDictConfig(),
        ),
    }
    for kind in ("nominal", "paper"):
        for original in (True, False):
            for form, types in forms.items():
                if original and form == "full":
                    continue  # on a CPU torch gathers m, v and all others into one buffer
                models = [fsdp1(network(), original) for _ in range(2)]
                optimizers = [
                    AmalgamatedOptimizer(model.parameters(), student=STUDENTS[kind]())
                    for model in models
                ]
                for optimizer in optimizers:
                    optimizer.register_state_dict_post_hook(separate_units)
                train(models[0], optimizers[0], range(2))
                with FullyShardedDataParallel.state_dict_type(models[0], *types):
                    of_model = models[0].state_dict()
                    saved = FullyShardedDataParallel.optim_state_dict(models[0], optimizers[0])
                with FullyShardedDataParallel.state_dict_type(models[1], *types):
                    models[1].load_state_dict(of_model)
                    optimizers[1].load_state_dict(
                        FullyShardedDataParallel.optim_state_dict_to_load(
                            models[1], optimizers[1], saved
                        )
                    )
                found = []
                for model, optimizer in zip(models, optimizers, strict=True):
                    train(model, optimizer, range(2, STEPS))
                    found.append(params_of(model))
                yield f"fsdp1-{kind}-{'original' if original else 'flat'}-{form}", found


# ----------------------------------------------------------------------------------------- ZeRO


def zero() -> Any:
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), AmalgamatedOptimizer, student=nominal(), skip_group="world"
    )
    train(model, optimizer, range(2))
    backward(model, 2)
    spoil(next(model.parameters()), 0)
    spoil(next(model.parameters()), 1)
    optimizer.step()
    optimizer.consolidate_state_dict()
    train(model, optimizer, range(3, STEPS))
    return params_of(model), everywhere(optimizer.optim.skipped_steps)


# ------------------------------------------------------------------------------ tensor parallel


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


PLAN = {
    "norm": SequenceParallel(sequence_dim=0),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def tensor_parallel(mesh: Any, kind: str) -> Any:
    model = parallelize_module(Blocks(), mesh, PLAN)
    optimizer = AmalgamatedOptimizer(model.parameters(), student=STUDENTS[kind]())
    train(model, optimizer, range(STEPS))
    return params_of(model), state_of(optimizer)


def fully_sharded_blocks(mesh: Any, kind: str) -> Any:
    """Tensor parallelism within, FSDP2 around it: some tensors are split twice."""
    model = fully_shard(parallelize_module(Blocks(), mesh["tp"], PLAN), mesh=mesh["dp"])
    optimizer = AmalgamatedOptimizer(model.parameters(), student=STUDENTS[kind]())
    train(model, optimizer, range(2))
    backward(model, 2)
    spoil(model.up.weight, 1)
    optimizer.step()
    train(model, optimizer, range(3, STEPS))
    return params_of(model), state_of(optimizer), everywhere(optimizer.skipped_steps)


def two(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from fsdp2()
    yield "statistics", statistics()
    for nonfinite in ("skip-step", "skip-tensor"):
        for capturable in (False, True):
            how = {"nonfinite": nonfinite, "capturable": capturable}
            name = f"{nonfinite}-{'capturable' if capturable else 'plain'}"
            model = sharded(network())
            yield f"fault-fsdp2-{name}", faults(model, model[0].weight, **how)
            flat = fsdp1(network())
            # Its part of the second process begins within the third parameter.
            yield f"fault-fsdp1-{name}", faults(flat, list(flat.parameters())[2], **how)
    flat = fsdp1(network(), original=False)
    yield "fault-fsdp1-flat", faults(flat, next(flat.parameters()))
    yield "scaled", scaled()
    yield "raising", raising()
    mesh = init_device_mesh("cpu", (2,))
    yield "rounding", rounding(mesh, [Shard(0)])
    yield "mixed-precision", mixed_precision()
    yield "refusals", refusals()
    for form, (flat, how) in FORMS.items():
        yield form, checkpointed(folder / form, flat, **how)
    yield "from-a-whole", from_a_whole()
    yield "broadcast", broadcast()
    yield from fsdp1_cases()
    yield "zero", zero()
    for kind in STUDENTS:
        yield f"tensor-parallel-{kind}", tensor_parallel(mesh, kind)


def four(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from fsdp2()
    for form, (flat, how) in FORMS.items():
        yield form, resumed(folder / form, flat, **how)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    yield from fsdp2("hybrid", ["float32"], mesh=mesh)
    yield "rounding", rounding(mesh, [Replicate(), Shard(0)])
    for kind in STUDENTS:
        yield f"both-{kind}", fully_sharded_blocks(mesh, kind)


def process(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world
    )
    found = dict({2: two, 4: four}[world](folder))
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    for world in map(int, sys.argv[2:] or ("2", "4")):
        # Forked, as importing PyTorch takes longer than all that they do.
        torch.multiprocessing.start_processes(
            process, (world, out), nprocs=world, start_method="fork"
        )
