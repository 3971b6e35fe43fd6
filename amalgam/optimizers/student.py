"""The student as an optimizer, by its fused step."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.operations.cell_codes import numbers_of
from amalgam.operations.checks import hollow
from amalgam.operations.kept import Kept
from amalgam.operations.rounding import PLACE_HIGH, ROW
from amalgam.operations.sign_agreement import sign_agreements
from amalgam.operations.student_step_in_place import control_of
from amalgam.ops import StudentState
from amalgam.optimizers.base import (
    NONFINITE,
    LearnedOptimizer,
    check_choice,
    check_whole,
    computing_dtype,
    finite,
    warn_of_adamws_numbers,
)
from amalgam.optimizers.batch import Batch, paces_after, same, units_in
from amalgam.optimizers.capture import check_before_capture
from amalgam.optimizers.identity import identity_of, is_identity
from amalgam.optimizers.orthogonal import PendingUpdates, orthogonalize_
from amalgam.optimizers.schedule import PEAK, keep_peak_on
from amalgam.optimizers.sharding import (
    agreements_of,
    any_sharded,
    groups_of,
    in_flat_vector,
    local_part,
    norms_of,
    place_gradients,
    sharding_of,
    summed,
)
from amalgam.optimizers.source import EXTRA, described, student_of, undisturbed
from amalgam.optimizers.state import (
    NUMBERS,
    StateFormat,
    joined_units,
    names_of,
    planar,
    shape_first,
)
from amalgam.optimizers.stats import StepStats, stats_of
from amalgam.policies import FusedStudent, NominalStudent
from amalgam.policies.fused_student import ContextConstants

DEFAULT_STUDENT = "standard"
MOMENTS_DTYPES = torch.float32, torch.bfloat16
CELLS_DTYPES = *MOMENTS_DTYPES, torch.int8
_CONSTANTS = "betas", "eps", "amsgrad", "differentiable"
_OF_ALL_GROUPS = (
    *("backend", "cells_dtype", "moments_dtype", "nonfinite", "skip_group", "include_student"),
)
_shape, _device, _dtype = attrgetter("shape"), attrgetter("device"), attrgetter("dtype")


class AmalgamatedOptimizer(LearnedOptimizer):
    """A learned optimizer where AdamW was: the student steps on every coordinate.

    Every parameter becomes ``p (1 - lr weight_decay) - lr update``. A :class:`NominalStudent`
    steps from the beginning. The paper's :class:`Student` needs ``warmup_steps`` of SGD first,
    during which it only watches (its moments follow, its LSTM waits): so it was meta-trained.
    Source: Optimizer Amalgamation (ICLR 2022).

    docs/optimizer.md says, for all that torch.optim's optimizers do, what this one does.

    Args:
        params: Parameters, pairs of names and parameters, or groups; floating point, but for those
            that require no gradient. float64 ones are computed in float64, all others in float32,
            in which their state is kept.
        lr: Factor on the student's updates and on warm-up's, 1 for as it was trained, and not a
            learning rate of AdamW's; schedulers may drive it.
        student: A :class:`NominalStudent` or a :class:`Student`, a shipped one's name, a path to a
            file it was saved to, or the ``state_dict`` of an optimizer, for the student in it. Its
            weights are taken once, here.
        backend: ``"auto"`` for the fastest that works, or a backend's name.
        warmup_steps: SGD steps before the student takes over; 0 for none, ``None`` for what the
            student was trained with.
        warmup_lr: Their learning rate; ``None`` for what the student was trained with.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as in AdamW; as ``lr`` is 1 here
            and not 1e-3, useful values are a thousand times smaller.
        cells_dtype: ``torch.bfloat16`` keeps the LSTM's state of parameters that are computed in
            float32 in half the memory, rounded after every step; ``torch.int8`` in about a quarter,
            as codes of 8 bits with a scale for each coordinate and layer.
        moments_dtype: ``torch.bfloat16`` keeps m and v likewise; it needs ``"stochastic"``
            rounding, as v changes by less than its last bit in a step.
        rounding: ``"nearest"``, or ``"stochastic"``: state and parameters, where they are bfloat16
            or codes, are rounded up or down at random and right on average, so that updates below a
            parameter's last bit are not lost. (To float16, always nearest.)
        seed: Of that, in [0, 2^32): the same seed, steps and gradients give the same bits.
        nonfinite: What becomes of a step in which a gradient is not finite, or too large to be
            squared: ``"skip-step"``, ``"skip-tensor"``, by which the other parameters step, or
            ``"raise"``. What is skipped keeps its parameters and state, and is counted in
            ``skipped_steps``; a warning names the gradients, the first time and after every 100
            such steps in a row.
        skip_group: Which processes take or skip a step together. ``"auto"``: those that have parts
            of one DTensor; all processes, where FSDP1 has flattened parameters; none otherwise, for
            in data parallelism all have the same gradients. ``"world"`` for all, or a
            ``torch.distributed.ProcessGroup``, where other means shard parameters, as
            ``ZeroRedundancyOptimizer`` does; ``None`` for each process on its own. All processes of
            a group must then call ``step`` equally often.
        include_student: Whether ``state_dict`` holds the student's weights and configuration.
        capturable: As PyTorch's optimizers have it: a step waits for no GPU, so that a CUDA graph
            can hold it. ``lr`` and ``weight_decay`` may be tensors on the device and count when the
            graph is replayed; steps are counted, warm-up ended and non-finite gradients skipped on
            the device, without the warning. Take a step before capturing, so that all state exists.
        maximize: Whether to make the objective larger.
        orthogonal: Whether updates of whole matrices are orthogonalised; ``None`` for as the
            student was trained. Groups may differ: of embeddings, whose matrices are large, it
            costs much. It takes four more bytes a parameter.
        foreach: Taken, as torch.optim's are; every step is one call for many tensors anyway.
        fused: Likewise.
        differentiable: Must be ``False``: steps are in place. :mod:`amalgam.meta` differentiates.
        betas: Must be the student's own, or absent; likewise ``eps``.
        eps: See ``betas``.
        amsgrad: Must be ``False``: no student keeps the largest second moment.

    Raises:
        TypeError: A parameter that requires gradients is not floating point, or a setting is of
            another type.
        ValueError: A setting is out of range, a backend's name unknown, or the file no student; or
            two parameters share memory.
        FileNotFoundError: ``student`` is neither a name nor a file.
    """

    _subject = "student"
    _takes_shards = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        student: FusedStudent | str | os.PathLike[str] | Mapping[str, Any] = DEFAULT_STUDENT,
        backend: str = "auto",
        warmup_steps: int | None = None,
        warmup_lr: float | None = None,
        weight_decay: float | Tensor = 0.0,
        *,
        cells_dtype: torch.dtype | None = None,
        moments_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        nonfinite: str = NONFINITE[0],
        skip_group: Any = "auto",
        include_student: bool = True,
        capturable: bool = False,
        maximize: bool = False,
        orthogonal: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        amsgrad: bool = False,
    ) -> None:
        ops.check_backend(backend)
        check_stored("cells_dtype", cells_dtype, CELLS_DTYPES)
        check_stored("moments_dtype", moments_dtype, MOMENTS_DTYPES)
        student = student_of(student)
        self.backend = backend
        self.cells_dtype = cells_dtype
        self.moments_dtype = moments_dtype
        self.include_student = include_student
        self.config = config = student.config
        _check_constants(student, betas, eps, amsgrad, differentiable)
        with undisturbed():
            identity = identity_of(student)
            self._student = copy.deepcopy(student).cpu().requires_grad_(False)
            own = [
                w.detach().clone(memory_format=torch.contiguous_format)
                for w in self._student.weights()
            ]
            weights = _weights_of(self._student, own)
        self._weights = {(torch.device("cpu"), own[0].dtype): weights}
        self._kept = Kept()
        self._constants: dict[Any, ContextConstants | None] = {}
        self._batches: dict[Any, _Made] = {}
        self._entries: list[dict[str, Any]] = []
        self._warned_of_betas = False
        defaults = {
            "lr": lr,
            PEAK: 0.0,
            "weight_decay": weight_decay,
            "warmup_steps": config.warmup_steps if warmup_steps is None else warmup_steps,
            "warmup_lr": config.warmup_lr if warmup_lr is None else warmup_lr,
            "student": identity,
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
            "maximize": maximize,
            "orthogonal": student.orthogonal if orthogonal is None else orthogonal,
            "foreach": foreach,
            "fused": fused,
            "betas": (config.beta1, config.beta2),
        }
        super().__init__(params, defaults, nonfinite, skip_group)
        warn_of_adamws_numbers(self)
        self._add_to_state_dicts()

    def _config(self) -> Any:
        return self.config

    def _identity(self, given: Any) -> str | None:
        if is_identity(given):
            return str(given)
        try:
            return identity_of(student_of(given))
        except (TypeError, ValueError, FileNotFoundError):
            return None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether step() reads its scale and flag, and the host need not."""
        return all(group["capturable"] for group in self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_batches": {}, "_entries": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_batches" in state:  # a copy, and not load_state_dict
            self._add_to_state_dicts()
            self._count_all_together()

    def _add_to_state_dicts(self) -> None:
        # Ahead of users' own hooks, which then see all of it.
        self.register_state_dict_post_hook(_add_extra, prepend=True)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["orthogonal"] is None:
            group["orthogonal"] = self._student.orthogonal
        check_choice("rounding", group["rounding"], ("nearest", "stochastic"))
        check_whole("seed", group["seed"])
        if not 0 <= group["seed"] < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), not {group['seed']}")
        for name in ("capturable", "maximize", "orthogonal"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} must be True or False, not {group[name]!r}")
        if self.moments_dtype == torch.bfloat16 and group["rounding"] != "stochastic":
            raise ValueError(
                "moments_dtype=torch.bfloat16 needs rounding='stochastic', as the second moment "
                "changes by less than its last bit in a step; rounding is "
                f"{group['rounding']!r}"
            )
        if group["capturable"] and self.nonfinite == "raise":
            raise ValueError(
                "nonfinite='raise' must read gradients' magnitudes, and a step with capturable "
                "reads nothing; take 'skip-step' or 'skip-tensor'"
            )
        constants = {name: group[name] for name in _CONSTANTS if name in group}
        _check_constants(self._student, **constants)
        for name in _OF_ALL_GROUPS:
            if name in group and group[name] != getattr(self, name):
                raise ValueError(
                    f"a group's {name!r} must be left out: an optimizer has one for all groups, "
                    f"{getattr(self, name)!r}, and this one is {group[name]!r}"
                )
        flat = any(map(in_flat_vector, group["params"]))
        if flat and self._student.sees_shapes:
            raise ValueError(
                "student must not depend on tensors' shapes or RMS where FSDP1 has made parts of "
                f"flat vectors of them, but it has {_on_tensors(self._student)}; fully_shard keeps "
                "tensors, in parts, and 'digits' depends on none"
            )
        if flat and group["orthogonal"]:
            raise ValueError(
                "orthogonal must be False where FSDP1 has made parts of flat vectors of matrices; "
                "fully_shard keeps them, in parts"
            )

    def _check_loaded(self, group: dict[str, Any], theirs: dict[str, Any]) -> None:
        super()._check_loaded(group, theirs)
        group["betas"] = self.defaults["betas"]  # those that a scheduler has set have no effect

    def _loaded_entry(
        self,
        group: dict[str, Any],
        theirs: dict[str, Any],
        param: Tensor,
        entry: dict[str, Any],
    ) -> dict[str, Any]:
        if not entry:
            return {}
        copied = {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in entry.items()
        }
        if not is_identity(theirs[self._subject]):  # earlier versions kept coordinates last
            copied |= {name: shape_first(copied[name]) for name in ("h", "c") if name in copied}
        kept = self._format(group, param)
        return kept.fitted(joined_units(copied, kept.architecture), lambda: self._name_of(param))

    def _take_loaded(self, own: dict[str, Any], state_dict: dict[str, Any]) -> None:
        skipped = state_dict.get(EXTRA, {}).get("skipped_steps", self.skipped_steps)
        self._batches.clear()
        self._entries.clear()
        super()._take_loaded(own, state_dict)
        if isinstance(self._skipped, Tensor):
            self._skipped.fill_(skipped)
        else:
            self._skipped = skipped
        self._count_all_together()

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        left = self._left_of(group)
        if group["rounding"] == "stochastic":
            self._step_with_steps(group, params, left, {})
            return
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        for batch in self._batches_of(group, params):
            warming = [] if hollow(params[0]) else batch.below(group["warmup_steps"])
            grads = batch.gradients(group["maximize"])
            self._warm_up(group, batch, grads, warming)
            trained = batch
            if warming:
                trained = batch.without(warming, self._constants_of)
                skipped = set(warming)
                grads = [grad for index, grad in enumerate(grads) if index not in skipped]
            self._run(trained, grads, lr=lr, weight_decay=decay, left=left)
            batch.count(1)

    def _paced(self) -> bool:
        return self._student.paced

    def _warm_up(
        self, group: dict[str, Any], batch: Batch, grads: list[Tensor], warming: list[int]
    ) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        tensors = batch.tensors
        for index in warming:
            ops.warm_up_(
                *(batch.parts[index], grads[index], tensors.m[index], tensors.v[index]),
                self.config.settings,
                keep=1 - lr * decay,
                rate=lr * float(group["warmup_lr"]),
            )

    def _stays_on_device(self) -> bool:
        return all(group["capturable"] for group in self.param_groups)

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        scale, found = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            for device in {grad.device for grad in gradients}:
                on_device = [grad for grad in gradients if grad.device == device]
                torch._foreach_div_(on_device, scale.to(device, non_blocking=True))
        if self.nonfinite == "skip-tensor":
            self._step_each_on_device()
            return
        flags = [~usable for usable in self._usable(gradients)]
        flags += [] if found is None else [found.reshape(()) != 0]
        skip: dict[torch.device, Tensor] = {}
        if flags or self._groups():
            flag = self._any_unusable(flags)
            self._count_skip(flag)
            for device in {grad.device for grad in gradients}:
                skip[device] = flag.to(device, torch.float32, non_blocking=True)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                left = self._left_of(group, skip.get(params[0].device))
                self._step_with_steps(group, params, left, skip)

    def _step_each_on_device(self) -> None:
        """A call for each tensor, which is skipped by a flag of its own, and not by a scaler's."""
        flags = self._unusable_of_each()
        for group in self.param_groups:
            own = [(n, param) for n, param in enumerate(group["params"]) if param.grad is not None]
            if not own:
                continue
            home = own[0][1].device
            each = torch.stack([flags[param].to(home, non_blocking=True) for _, param in own])
            left = self._left_of(group, each.all())
            for index, param in own:
                skip = {param.device: flags[param].to(torch.float32)}
                self._step_with_steps(group, [param], left, skip, index)
        if flags or self._groups():
            self._count_skip(self._any_unusable(list(flags.values())))

    def _count_skip(self, flag: Tensor) -> None:
        counted = self._counted_on(flag.device)
        counted += flag.to(counted.device, non_blocking=True)

    def _counted_on(self, device: torch.device) -> Tensor:
        """The count of skipped steps as a tensor; made on this device where it was a number."""
        if not isinstance(self._skipped, Tensor):
            check_before_capture()
            self._skipped = torch.full((), self._skipped, dtype=torch.int64, device=device)
        return self._skipped

    def _step_with_steps(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        left: float | Tensor,
        skip: dict[torch.device, Tensor],
        unit: int | None = None,
    ) -> None:
        """A step by what the devices hold: how many steps were taken, and whether to skip this."""
        seeds = None
        if group["rounding"] == "stochastic":
            every = chain.from_iterable(g["params"] for g in self.param_groups)
            seeds = {p: _seed_of(group["seed"], number, p) for number, p in enumerate(every)}
        for batch in self._batches_of(group, params, unit):
            device = batch.params[0].device
            self._run(
                batch,
                batch.gradients(group["maximize"]),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                left=left,
                steps=batch.steps,
                warmup_steps=group["warmup_steps"],
                warmup_lr=float(group["warmup_lr"]),
                skip=skip.get(device),
                seeds=None if seeds is None else [seeds[param] for param in batch.params],
            )
            batch.count(1 - skip[device] if device in skip else 1)

    def _run(
        self,
        batch: Batch,
        grads: list[Tensor],
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor,
        left: float | Tensor,
        **how: Any,
    ) -> None:
        params, updates = batch.tensors.params, batch.updates
        if not params:
            return
        if updates is not None:
            updates.clear()
        weights = self._weights_for(params[0])
        context = batch.context(self._student, weights.own[0], grads, left)
        operation, settings = self._student.with_context(weights.operation, weights.own, context)
        with self._kept:
            ops.step_tensors_(
                batch.tensors,
                grads,
                operation,
                settings._replace(sizes=()),
                lr=lr if updates is None else 1.0,
                weight_decay=weight_decay if updates is None else 0.0,
                backend=self.backend,
                **how,
            )
        if updates is not None:
            how.pop("warmup_lr", None)
            updates.take(lr, weight_decay, **how)
        batch.keep_pace(context, how.get("skip"), how.get("warmup_steps", 0))
        if batch.sharded:
            torch.autograd.graph.increment_version(batch.params)

    def _compiled_step(self) -> None:
        """A step as torch.compile traces it: one operator a group, which reads nothing back.

        Its arguments lie where they lay when it was traced; where they do not, it is traced anew.
        """
        groups = []
        # The compiler guards on what groups hold as soon as it reads them, so this goes first.
        self._init_group(None)
        for group in self.param_groups:
            tensors: list[list[Tensor]] = [[] for _ in range(11)]
            self._init_group(group, *tensors)
            params = tensors[0]
            if params:
                groups.append((group, tensors))
        skip = _unusable(chain.from_iterable(zip(*some[:2], strict=True) for _, some in groups))
        for group, tensors in groups:
            params, grads, m, v, h, c, steps, paces, own, operation, skipped = tensors
            flag = None if skip is None else skip.to(params[0].device)
            lr = _left_open(group["lr"], params[0].device)
            shapes = [param.shape for param in params]
            constants = self._student.constants_of(shapes, own[0])
            taken = torch.stack(steps)
            if group["maximize"]:
                grads = [-grad for grad in grads]
            context = self._student.context_of(
                *(constants, taken.to(own[0]), params),
                pace=torch.stack(paces).to(own[0]) if paces else None,
                agreements=partial(sign_agreements, grads, m, backend="reference")
                if paces
                else None,
                left=self._left_of({**group, "lr": lr}, flag),
            )
            weights, settings = self._student.with_context(operation, own, context)
            rates: tuple[float | Tensor, float | Tensor] = (lr, group["weight_decay"])
            written, updates = params, None
            if group["orthogonal"]:
                updates = PendingUpdates(params, units_in(h[0]))
                rates, written = (1.0, 0.0), updates.tensors
            control = control_of(*rates, group["warmup_lr"], flag, params[0].device)
            torch.ops.amalgam.student_step_(
                *(written, grads, m, v, list(map(planar, h)), list(map(planar, c)), list(weights)),
                *settings._replace(sizes=()),
                *(0.0, 0.0, control, steps, group["warmup_steps"], [], self.backend),
            )
            if updates is not None:
                updates.take(
                    *(lr, group["weight_decay"]),
                    steps=steps,
                    warmup_steps=group["warmup_steps"],
                    skip=flag,
                )
            if paces and context is not None and context.pace is not None:
                new, old = context.pace.to(paces[0]), torch.stack(paces)
                new = paces_after(new, old, taken, group["warmup_steps"], flag)
                torch._foreach_copy_(paces, list(new.unbind()))
            torch._foreach_add_(steps, 1.0 if flag is None else 1.0 - flag.to(steps[0]))
            if flag is not None and group is groups[0][0]:
                skipped[0] += flag.to(skipped[0].device)

    @torch.no_grad()
    def stats(self) -> dict[str, StepStats]:
        """What the next step will do, for gradients as they are: ask between backward and step.

        It computes that step, of one parameter after another, and keeps nothing; it waits for the
        device. Where parameters are DTensors, all processes have to ask; of those that FSDP1 has
        flattened it says what this process's part does.

        Returns:
            A :class:`StepStats` for every parameter that has a gradient and elements, by its name,
            or, where parameters were passed without names, ``"GROUP.INDEX"``.
        """
        found = {}
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.numel():
                    names = group.get("param_names")
                    name = f"{number}.{index}" if names is None else names[index]
                    found[name] = self._stats_of(group, param)
        return found

    def _stats_of(self, group: dict[str, Any], param: Tensor) -> StepStats:
        self._check_dense([param.grad] if param.grad is not None else [])
        kept = self._format(group, param)
        entry = self.state.get(param) or kept._replace(home=param.device).initial()
        dtype = computing_dtype(param.dtype)
        place_gradients([param])
        grad = local_part(param.grad).to(dtype).reshape(-1)  # type: ignore[arg-type]
        grad = -grad if group["maximize"] else grad
        m, v, h, c = (local_part(entry[name]) for name in StudentState._fields)
        layers, hidden = kept.architecture
        flat = StudentState(
            *(moment.to(dtype).reshape(-1) for moment in (m, v)),
            *(numbers_of(planar(cells)).to(dtype).reshape(layers, hidden, -1) for cells in (h, c)),
        )
        taken, settings = float(entry["step"]), self.config.settings
        if taken < group["warmup_steps"]:
            update = float(group["warmup_lr"]) * grad
            m, v = ops.update_moments(grad, flat.m, flat.v, settings)
        else:
            weights, steps = self._weights_for(param), entry["step"].reshape(1)
            constants = self._constants_of([param])
            context = None
            if constants is not None:
                like, paced = weights.own[0], self._student.paced
                context = self._student.context_of(
                    *(constants, steps.to(like), [param], norms_of),
                    pace=entry["pace"].reshape(1).to(like) if paced else None,
                    agreements=partial(agreements_of, [param], [grad], [flat.m]) if paced else None,
                    left=self._left_of({**group, PEAK: copy.deepcopy(group[PEAK])}),
                )
            folded, settings = self._student.with_context(weights.operation, weights.own, context)
            if context is not None:
                settings = settings._replace(sizes=(grad.numel(),))
            update, new = ops.student_step(grad, flat, folded, settings, backend=self.backend)
            update, m, v = torch.where(new.v == 0, 0, update), new.m, new.v
            if group["orthogonal"]:
                part = local_part(param)
                orthogonalize_([param], [update.view(part.shape)])
        before, groups = local_part(param).to(dtype).reshape(-1), groups_of(param, "auto")
        return stats_of(
            *(before, float(group["lr"]) * update, grad, m, v, taken + 1),
            betas=self.defaults["betas"],
            total=lambda sums: summed(sums, groups),
        )

    def _init_group(
        self,
        group: dict[str, Any] | None,
        *columns: list[Tensor],
    ) -> None:
        """Fill these with a group's tensors; torch.compile calls this by name, and not traces it.

        Args:
            group: The group; ``None`` to have all groups make their state.
            *columns: Parameters, gradients, m, v, h, c, steps, paces, weights, what the operation
                makes of them, and the count of skipped steps.

        Raises:
            RuntimeError: What a compiled step does not do is asked of it.
        """
        if group is None:
            for each in self.param_groups:
                self._init_group(each, *([] for _ in range(11)))
            return
        params, grads, m, v, h, c, steps, paces, own, operation, skipped = columns
        kinds = {(p.device, computing_dtype(p.dtype)) for p in group["params"]}
        apart = any_sharded(group["params"]) or bool(self._groups())
        otherwise = group["rounding"] == "stochastic" or self.nonfinite != "skip-step"
        if len(kinds) > 1 or otherwise or apart:
            raise RuntimeError(
                "a compiled step takes groups of one device and computing dtype, "
                "rounding='nearest' and nonfinite='skip-step', and parameters that are whole in "
                "every process; call step() outside torch.compile"
            )
        params += [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        grads += [param.grad for param in params if param.grad is not None]
        self._check_dense(grads)
        if self._paced():
            keep_peak_on(params[0].device, group)
        self._new_batches(group, params)
        made = (m, v, h, c, steps, paces)
        for name, column in zip(names_of(self._student.paced), made, strict=False):
            column += [self.state[param][name] for param in params]
        weights = self._weights_for(params[0])
        own += weights.own
        operation += weights.operation
        skipped.append(self._counted_on(params[0].device))

    def _begin_step(self) -> None:
        if not self._warned_of_betas:
            self._warn_of_betas()
        # Looking a parameter up in the dictionary would hash it, which takes longer than all this.
        entries = list(self.state.values())
        if not (same(entries, self._entries) and all(entries)):
            self._entries = entries
            self._batches.clear()

    def _warn_of_betas(self) -> None:
        own = self.defaults["betas"]
        changed = [group["betas"] for group in self.param_groups if tuple(group["betas"]) != own]
        if changed:
            self._warned_of_betas = True
            warnings.warn(
                f"betas were set to {changed[0]}, by a scheduler that cycles them perhaps, which "
                f"has no effect: the student keeps those it was trained with, {own}. "
                "cycle_momentum=False has schedulers leave them",
                RuntimeWarning,
                stacklevel=7,
            )

    def _batches_of(
        self, group: dict[str, Any], params: list[Tensor], unit: int | None = None
    ) -> list[Batch]:
        """The group's parameters in batches of one device and computing dtype, one call each.

        They are kept while these parameters are stepped, stay where they are, and keep their state.

        Args:
            group: The group.
            params: Those of its parameters that step.
            unit: Tells apart what one step takes of a group one after another.
        """
        if not params:
            return []
        if hollow(local_part(params[0])):
            return self._new_batches(group, params, kept=False)
        key = id(group), unit
        made = self._batches.get(key)
        places: list[Any] = [list(map(_device, params)), list(map(_dtype, params))]
        places += [_home(group, params[0]), group["orthogonal"]]
        if (
            made is not None
            and same(made.params, params)
            and made.places == places
            and all(batch.has_its_state() for batch in made.batches)
        ):
            return made.batches
        batches = self._new_batches(group, params)
        self._batches[key] = _Made(params, places, batches)
        self._entries = list(self.state.values())
        return batches

    def _new_batches(
        self, group: dict[str, Any], params: list[Tensor], kept: bool = True
    ) -> list[Batch]:
        self._make_state(group, [param for param in params if not self.state[param]])
        self._fit_state(group, params)
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            kinds.setdefault((param.device, computing_dtype(param.dtype)), []).append(param)
        return [
            Batch(
                *(alike, [self.state[p] for p in alike], self._constants_of(alike)),
                paced=self._student.paced,
                orthogonal=group["orthogonal"],
                kept=kept,
            )
            for alike in kinds.values()
        ]

    def _constants_of(self, params: list[Tensor]) -> ContextConstants | None:
        """What the student is told of parameters that stays, kept as long as the optimizer.

        A CUDA graph that captured a step of theirs reads it.
        """
        if not params:
            return None
        like = self._weights_for(params[0]).own[0]
        shapes = tuple(map(_shape, params))
        if hollow(like):
            return self._student.constants_of(shapes, like)
        key = shapes, like.device, like.dtype
        if key not in self._constants:
            if isinstance(self._student, NominalStudent):
                check_before_capture()
            self._constants[key] = self._student.constants_of(shapes, like)
        return self._constants[key]

    def _format(self, group: dict[str, Any], param: Tensor) -> StateFormat:
        """What a parameter's state is to be.

        Raises:
            TypeError: The parameter is not floating point.
        """
        if not param.is_floating_point():
            raise TypeError(
                f"params must be floating-point tensors where they have gradients, but "
                f"{self._name_of(param)} is {param.dtype}"
            )
        wide = computing_dtype(param.dtype)
        narrow = wide == torch.float32
        return StateFormat(
            shape=param.shape,
            device=param.device,
            architecture=(self.config.layers, self.config.hidden),
            moments=(narrow and self.moments_dtype) or wide,
            cells=(narrow and self.cells_dtype) or wide,
            home=_home(group, param),
            sharding=sharding_of(param),
            paced=self._student.paced,
        )

    def _make_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if params:
            check_before_capture()
        for param in params:
            self.state[param].update(self._format(group, param).initial())
        self._count_together(group, params)

    def _fit_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Bring state that was edited, or moved, to what it is to be; refuse it whole or not."""
        fitted = [
            self._format(group, p).fitted(self.state[p], lambda p=p: self._name_of(p))  # type: ignore[misc]
            for p in params
        ]
        numbers_moved = False
        for param, found in zip(params, fitted, strict=True):
            entry = self.state[param]
            numbers_moved = numbers_moved or any(
                name in found and found[name] is not entry[name] for name in NUMBERS
            )
            if any(found[name] is not value for name, value in entry.items()):
                check_before_capture()
                entry.update(found)
        if numbers_moved:
            self._count_together(group, params)

    def _count_all_together(self) -> None:
        for group in self.param_groups:
            self._count_together(group, [p for p in group["params"] if self.state.get(p)])

    def _count_together(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make the parameters' counts of steps views of one tensor a device; likewise their paces.

        One operation then counts a step of them all. It is done when numbers are made, loaded,
        copied or moved, and never later: a CUDA graph reads them where they are.
        """
        kinds: dict[tuple[str, torch.device, torch.dtype], list[dict[str, Any]]] = {}
        for param in params:
            for name, kind in self._format(group, param).numbers.items():
                kinds.setdefault((name, *kind), []).append(self.state[param])
        for (name, where, dtype), entries in kinds.items():
            numbers = torch.stack([entry[name].to(where, dtype) for entry in entries])
            for entry, number in zip(entries, numbers.unbind(), strict=True):
                entry[name] = number

    def _weights_for(self, param: Tensor) -> _Weights:
        device, dtype = param.device, computing_dtype(param.dtype)
        if hollow(param):
            shapes = [weight.shape for weight in next(iter(self._weights.values())).own]
            own = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
            return _weights_of(self._student, own)
        if (device, dtype) not in self._weights:
            first = next(iter(self._weights.values()))
            own = [w.to(device, dtype) for w in first.own]
            self._weights[device, dtype] = _weights_of(self._student, own)
        return self._weights[device, dtype]


def _left_open(number: float | Tensor, device: torch.device) -> Tensor:
    """A number as a tensor, such that torch.compile takes any number there is in a later step.

    Of arguments of operations it does so where it can make them tensors: of products, and not of
    ``torch.full``.
    """
    if isinstance(number, Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device=device) * number


def _unusable(given: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Whether one of the gradients beside parameters can't be used, as torch.compile traces it."""
    pairs, flags = list(given), []
    for dtype in (torch.float32, torch.float64):
        grads = [g for p, g in pairs if g.numel() and computing_dtype(p.dtype) == dtype]
        if grads:
            norms = [norm.to(dtype) for norm in torch._foreach_norm(grads, math.inf)]
            flags.append(~finite(torch.stack(norms).max(), dtype))
    return torch.stack(flags).any() if flags else None


def check_stored(name: str, dtype: torch.dtype | None, known: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless a dtype is ``None`` or one of these."""
    if dtype is not None and dtype not in known:
        names = ", ".join(str(each).removeprefix("torch.") for each in known)
        raise ValueError(f"{name} must be {names} or None, not {dtype}")


def _on_tensors(student: Any) -> str:
    """What of a student's configuration depends on tensors as a whole, for a message."""
    inputs = tuple(name for name in student.config.inputs if name != "time")
    told = {"inputs": inputs, "full_width": student.config.full_width}
    return " and ".join(f"{name}={value!r}" for name, value in told.items() if value)


def _check_constants(
    student: FusedStudent,
    betas: Any = None,
    eps: float | None = None,
    amsgrad: bool = False,
    differentiable: bool = False,
) -> None:
    """Raise ValueError where settings of AdamW's are others than the student has."""
    config = student.config
    own = (config.beta1, config.beta2)
    if betas is not None and not isinstance(betas, Iterable):
        raise TypeError(f"betas must be a pair of numbers, not {betas!r}")
    if betas is not None and tuple(betas) != own:
        raise ValueError(f"betas must be those the student was trained with, {own}, not {betas}")
    if eps is not None and eps != config.eps:
        raise ValueError(f"eps must be that the student was trained with, {config.eps}, not {eps}")
    if amsgrad:
        raise ValueError("amsgrad must be False: no student keeps the largest second moment")
    if differentiable:
        raise ValueError(
            "differentiable must be False: a step is in place and records no graph; "
            "amalgam.meta differentiates through students' steps"
        )


def _add_extra(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add to a state_dict what is the optimizer's as a whole."""
    extra: dict[str, Any] = {"skipped_steps": optimizer.skipped_steps}
    if optimizer.include_student:
        extra["student"] = described(optimizer._student)
    return state_dict | {EXTRA: extra}


def _home(group: dict[str, Any], param: Tensor) -> torch.device:
    """Where a parameter's steps are counted: where they are read."""
    on_device = group["capturable"] or group["rounding"] == "stochastic"
    return param.device if on_device else torch.device("cpu")


class _Weights(NamedTuple):
    """The student's weights, and as the operation takes them."""

    own: list[Tensor]
    operation: list[Tensor]


def _weights_of(student: FusedStudent, own: list[Tensor]) -> _Weights:
    return _Weights(own, list(student.operation_weights(own)))


class _Made(NamedTuple):
    """A group's batches, and of which parameters, where and how they were made."""

    params: list[Tensor]
    places: list[Any]
    batches: list[Batch]


def _seed_of(seed: int, number: int, param: Tensor) -> int:
    """A parameter's own seed, and of each part of a DTensor; of neighbours, far apart."""
    sharding = sharding_of(param)
    part = 0 if sharding is None else sharding.number()
    return (seed + number * ROW + part * PLACE_HIGH) % 2**32
