"""What the optimizers share: closures, loads, refusals, and what becomes of unusable gradients."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from numbers import Real
from operator import attrgetter
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from amalgam.hints import did_you_mean
from amalgam.operations.checks import hollow, overlap
from amalgam.operations.largest_magnitude import largest_magnitudes
from amalgam.optimizers.capture import capturing
from amalgam.optimizers.identity import check_identity, identity_of
from amalgam.optimizers.schedule import PEAK, left_of_rate, note_rate, settle_peak
from amalgam.optimizers.sharding import (
    SKIP_GROUPS,
    any_process,
    any_sharded,
    check_group,
    groups_of,
    groups_of_all,
    local_part,
    place_gradients,
    sharding_of,
)
from amalgam.policies import Policy

NONFINITE = ("skip-step", "skip-tensor", "raise")
REMINDER = 100
"""So many steps skipped in a row bring the next warning."""

_LIKE_ADAMWS_LR = 0.01
_LARGE_DECAY = 0.005  # a step: half of a weight in 140

Loss = TypeVar("Loss")
_grad, _is_sparse = attrgetter("grad"), attrgetter("is_sparse")


class StepOptimizer(Optimizer):
    """What the optimizers here share: closures, loads, refusals, and unusable gradients.

    Args:
        params: Parameters or groups, as torch.optim takes them.
        defaults: The groups' settings.
        nonfinite: What becomes of a step in which a gradient is not finite, one of
            :data:`NONFINITE`.
        skip_group: Which processes skip a step together, as
            :class:`amalgam.AmalgamatedOptimizer` takes it.
    """

    _numbers: ClassVar[tuple[str, ...]] = ("lr",)
    _takes_shards: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        nonfinite: str = NONFINITE[0],
        skip_group: Any = "auto",
    ) -> None:
        check_choice("nonfinite", nonfinite, NONFINITE)
        if isinstance(skip_group, str):
            check_choice("skip_group", skip_group, SKIP_GROUPS)
        else:
            check_group(skip_group)
        self.nonfinite = nonfinite
        self.skip_group = skip_group
        self._agreeing: list[Any] | None = None
        self._skipped: int | Tensor = 0
        self._in_a_row = 0
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """Steps not taken, or not by all tensors, because of a gradient.

        It was not finite, or too large to be squared. What did not step stayed as it was. With
        ``capturable``, counted on the device: to read it waits for that.
        """
        return int(self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, and what others, schedulers say, put in the place of methods.

        That is bound to this optimizer: a copy's ``step`` would step this one. torch's own keeps
        three attributes, and copies would lack the rest.
        """
        of_class = type(self)
        return {
            name: value
            for name, value in self.__dict__.items()
            if "hook" not in name and not callable(getattr(of_class, name, None))
        } | {"_agreeing": None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: A parameter that requires gradients is not floating point, or a setting is of
                another type.
            ValueError: A setting is out of range, a parameter is there twice, or two share memory.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            self._check_memory()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless a group's settings are in range and its parameters can be stepped."""
        for name in self._numbers:
            check_number(name, group[name])
        for param in group["params"]:
            # Frozen integers, as of quantized layers, never have a gradient.
            if param.requires_grad and not param.is_floating_point():
                raise TypeError(f"params must be floating-point tensors, not {param.dtype}")
            if not self._takes_shards and sharding_of(param) is not None:
                raise TypeError(
                    f"params must be plain tensors, not DTensors: {type(self).__name__} keeps "
                    "state of other shapes, which can't be cut as a parameter is. "
                    "AmalgamatedOptimizer takes DTensors"
                )
        self._agreeing = None

    def _check_memory(self) -> None:
        """Raise ValueError where some share memory, or the last group has one twice."""
        group = self.param_groups[-1]["params"]
        if len(set(map(id, group))) < len(group):
            twice = next(p for i, p in enumerate(group) if any(p is q for q in group[:i]))
            raise ValueError(
                f"params must hold each parameter once, but {self._name_of(twice)} is in a group "
                "twice; list(dict.fromkeys(params)) has each once"
            )
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        parts = list(map(local_part, params))
        # What is frozen is not written, and may be a view of anything; a step asks once it is not.
        filled = [i for i, p in enumerate(params) if p.requires_grad and not hollow(parts[i])]
        if found := overlap([parts[index] for index in filled]):
            one, other = (self._name_of(params[filled[index]]) for index in found)
            if found[0] == found[1]:
                raise ValueError(
                    f"params must not share memory, but {one} is expanded, or overlaps itself; "
                    "its clone() does not"
                )
            raise ValueError(
                f"params must not share memory, but {one} and {other} do. Tie them as one "
                "Parameter (decoder.weight = encoder.weight), or pass one of them"
            )

    def _name_of(self, param: Tensor) -> str:
        """What messages call a parameter: its name where it has one, else its place and shape."""
        for number, group in enumerate(self.param_groups):
            for index, each in enumerate(group["params"]):
                if each is param:
                    if "param_names" in group:
                        return repr(group["param_names"][index])
                    return f"params[{index}] of group {number} of shape {tuple(param.shape)}"
        raise KeyError(param)

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Take one step; with ``capturable``, without waiting for a GPU.

        It computes in its own precision, whatever ``autocast`` surrounds it.

        Args:
            closure: Computes the loss anew, with gradients, and returns it.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: A gradient is sparse; or is not finite, and ``nonfinite`` is ``"raise"``;
                or a CUDA graph captures a step that can't be in one, or a first one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._compiled_step()
            return loss
        with _without_autocast():
            self._step()
        return loss

    def _step(self) -> None:
        gradients = self._gradients()
        self._check_dense(gradients)
        self._begin_step()
        if self._stays_on_device():
            self._step_on_device(gradients)
            return
        if capturing():
            raise RuntimeError("a step in a CUDA graph needs all groups' capturable=True")
        unusable: set[int] = set()
        if self._all_usable(gradients):
            self._in_a_row = 0
        else:
            unusable = self._meet_unusable()
            if self.nonfinite == "skip-step":
                return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if unusable:
                params = [p for p in params if id(p) not in unusable]
            self._step_group(group, params)

    def _check_dense(self, gradients: Iterable[Tensor]) -> None:
        """Raise RuntimeError where a gradient is sparse."""
        if any(map(_is_sparse, gradients)):
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only; for embeddings, sparse=False"
            )

    def _gradients(self) -> list[Tensor]:
        """All gradients; of those of DTensors this process's parts."""
        gradients = [
            grad
            for group in self.param_groups
            for grad in map(_grad, group["params"])
            if grad is not None
        ]
        if not any_sharded(gradients):
            return gradients
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        place_gradients(params)
        return [local_part(param.grad) for param in params]

    def _groups(self) -> list[Any]:
        """The groups of processes that take or skip a step together."""
        if self._agreeing is None:
            every = list(chain.from_iterable(group["params"] for group in self.param_groups))
            self._agreeing = groups_of_all(every, self.skip_group)
        return self._agreeing

    def _all_usable(self, gradients: list[Tensor]) -> bool:
        usable = self._usable(gradients)
        if not self._groups():
            return all(usable)
        return not self._any_unusable([~each for each in usable])

    def _usable(self, gradients: list[Tensor]) -> list[Tensor]:
        """Whether those of each device and dtype can be used, bool of shape () each."""
        largest = largest_magnitudes(gradients)
        if any(each.dtype == torch.float64 for each in largest):
            every = chain.from_iterable(group["params"] for group in self.param_groups)
            narrowed = any(
                p.grad.dtype == torch.float64 != computing_dtype(p.dtype)
                for p in every
                if p.grad is not None
            )
            if narrowed:
                return [finite(each, torch.float32) for each in largest]
        return [finite(each, computing_dtype(each.dtype)) for each in largest]

    def _any_unusable(self, flags: list[Tensor]) -> Tensor:
        """Whether a flag is set here, or in another process that skips steps with this one.

        Args:
            flags: Bool, of shape () each, on any devices; none where there is no gradient here.
        """
        home = flags[0].device if flags else self._some_device()
        on_it = [flag.to(home, non_blocking=True) for flag in flags]
        flag = torch.stack(on_it).any() if flags else torch.zeros((), dtype=torch.bool, device=home)
        return any_process([flag], [self._groups()])[0] if self._groups() else flag

    def _some_device(self) -> torch.device:
        every = chain.from_iterable(group["params"] for group in self.param_groups)
        return next((param.device for param in every), torch.device("cpu"))

    def _unusable_of_each(self) -> dict[Tensor, Tensor]:
        """Whether each parameter's gradient is unusable, in a process that has a part of it.

        Returns:
            A bool of shape () a parameter that has a gradient, on its device.
        """
        every = list(chain.from_iterable(group["params"] for group in self.param_groups))
        found: dict[Tensor, Tensor] = {}
        for param in every:
            grads = [] if param.grad is None else [local_part(param.grad)]
            largest = largest_magnitudes(grads)
            found[param] = (
                ~finite(largest[0], computing_dtype(param.dtype))
                if largest
                else torch.zeros((), dtype=torch.bool, device=param.device)
            )
        groups = [groups_of(param, self.skip_group) for param in every]
        if any(groups):
            home = every[0].device
            flags = [flag.to(home, non_blocking=True) for flag in found.values()]
            agreed = zip(every, any_process(flags, groups), strict=True)
            found = {param: flag.to(param.device, non_blocking=True) for param, flag in agreed}
        return {param: flag for param, flag in found.items() if param.grad is not None}

    def _meet_unusable(self) -> set[int]:
        """Count a step with unusable gradients; raise, or warn, as is due.

        Returns:
            The parameters that have them, as ``id``.

        Raises:
            RuntimeError: ``nonfinite`` is ``"raise"``.
        """
        found = [param for param, flag in self._unusable_of_each().items() if flag]
        named = ", ".join(map(self._name_of, found[:3])) or "parameters of another process"
        if len(found) > 3:
            named += f" and {len(found) - 3} more"
        if self.nonfinite == "raise":
            raise RuntimeError(
                f"gradients of {named} are not finite; parameters and state are as they were. "
                f"nonfinite='skip-step' or 'skip-tensor' goes on without them"
            )
        self._skipped += 1
        self._in_a_row += 1
        whole = self.nonfinite == "skip-step"
        what = "the step was skipped" if whole else "these were left as they are"
        if self.skipped_steps == 1:
            _warn(
                f"a gradient was not finite: {what}, parameters and state. Unusable were the "
                f"gradients of {named}. Skips are counted in skipped_steps; the next warning comes "
                f"after {REMINDER} in a row."
            )
        elif self._in_a_row % REMINDER == 0:
            hint = " nonfinite='skip-tensor' would step the others." if whole else ""
            _warn(
                f"gradients were not finite in {self._in_a_row} steps in a row, {what}. Unusable "
                f"were now the gradients of {named}.{hint}"
            )
        return set(map(id, found))

    def _compiled_step(self) -> None:
        """A step as torch.compile traces it."""
        raise NotImplementedError

    def _stays_on_device(self) -> bool:
        """Whether a step reads nothing that a device has computed."""
        return False

    def _begin_step(self) -> None:
        """What an optimizer does once a step, before any group's."""

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        raise NotImplementedError

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another's :meth:`state_dict`; a refused one changes nothing.

        Settings that its groups lack, as those of an earlier version, stay this optimizer's.

        Args:
            state_dict: As an optimizer with the same policy gave it; not changed.

        Raises:
            TypeError: A setting in its groups is of another type.
            ValueError: Its groups or its state do not fit, or it comes from another policy.
        """
        # torch's own casts state to the parameters' dtype, before anything could be refused.
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if missing := {"state", "param_groups"} - state_dict.keys():
            raise ValueError(f"state_dict must hold {sorted(missing)}, as an optimizer's does")
        groups = self._loaded_groups(state_dict["param_groups"])
        place_of = {
            key: (group, theirs, param)
            for group, theirs in zip(groups, state_dict["param_groups"], strict=True)
            for key, param in zip(theirs["params"], group["params"], strict=True)
        }
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key not in place_of:
                state[key] = entry
                continue
            group, theirs, param = place_of[key]
            state[param] = self._loaded_entry(group, theirs, param, entry)
        self._take_loaded({"state": state, "param_groups": groups}, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_loaded(self, own: dict[str, Any], state_dict: dict[str, Any]) -> None:
        """Make one's own what a ``state_dict`` was found to hold; nothing is refused any more."""
        self.__setstate__(own)

    def _loaded_groups(self, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """This optimizer's groups with another's settings, checked."""
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"loaded state dict has a different number of parameter groups, {len(saved)}, than "
                f"this optimizer, {len(self.param_groups)}"
            )
        groups = []
        for number, (ours, theirs) in enumerate(zip(self.param_groups, saved, strict=True)):
            if len(ours["params"]) != len(theirs["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: group {number} has {len(theirs['params'])} parameters, "
                    f"this optimizer's {len(ours['params'])}"
                )
            filled = {
                name: value
                for name, value in ours.items()
                if name in self.defaults or name == "param_names"
            }
            settings = {name: value for name, value in theirs.items() if name != "params"}
            group = filled | copy.deepcopy(settings) | {"params": ours["params"]}
            self._check_loaded(group, theirs)
            self._check_group(group)
            groups.append(group)
        return groups

    def _check_loaded(self, group: dict[str, Any], theirs: dict[str, Any]) -> None:
        """What a group with loaded settings is held to before it is checked as any other."""

    def _loaded_entry(
        self,
        group: dict[str, Any],
        theirs: dict[str, Any],
        param: Tensor,
        entry: dict[str, Any],
    ) -> dict[str, Any]:
        """A copy of a parameter's state from another's group, as this optimizer is to keep it."""
        return copy.deepcopy(entry)


class LearnedOptimizer(StepOptimizer):
    """What the optimizers with learned weights share: whose weights they are, and their state."""

    _subject: ClassVar[str] = "policy"
    _numbers = ("lr", PEAK, "weight_decay", "warmup_steps", "warmup_lr")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, perhaps by an earlier version, whose groups kept no peak."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault(PEAK, 0.0)

    def _check_group(self, group: dict[str, Any]) -> None:
        config = self._config()
        for name in ("warmup_steps", "warmup_lr"):
            if group[name] is None:
                group[name] = getattr(config, name)
        super()._check_group(group)
        settle_peak(group)
        check_whole("warmup_steps", group["warmup_steps"])
        own = self.defaults[self._subject]
        if group[self._subject] != own and self._identity(group[self._subject]) == own:
            group[self._subject] = own  # ZeRO's optimizer writes arguments of this one into groups
        if group[self._subject] != own:
            raise ValueError(
                f"a group's {self._subject!r} must be left out: an optimizer has one "
                f"{self._subject} for all groups"
            )

    def _paced(self) -> bool:
        """Whether the policy has a pace, to which a schedule's share is held."""
        raise NotImplementedError

    def _left_of(self, group: dict[str, Any], skip: Tensor | None = None) -> float | Tensor:
        """What a schedule has left of a group's rate in a step, where the policy has a pace.

        Args:
            group: The group.
            skip: Whether it skips the step, where that is not known on the host.
        """
        if not self._paced():
            return 1.0
        note_rate(group, skip)
        return left_of_rate(group)

    def _config(self) -> Any:
        """The policy's configuration."""
        raise NotImplementedError

    def _identity(self, given: Any) -> str | None:
        """The identity of a policy, as the constructor takes it; ``None`` of what is none."""
        return identity_of(given) if isinstance(given, Policy) else None

    def _check_loaded(self, group: dict[str, Any], theirs: dict[str, Any]) -> None:
        subject = self._subject
        check_identity(subject, theirs.get(subject), self.defaults[subject])
        group[subject] = self.defaults[subject]


def finite(largest: Tensor, computing: torch.dtype) -> Tensor:
    """Whether a magnitude is finite and small enough to be squared in the dtype of computing."""
    return largest < math.sqrt(torch.finfo(computing).max)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute and keep state in for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_number(name: str, value: Any) -> None:
    """Raise unless a setting is one finite number, 0 or more, or a tensor of it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must hold one number, not {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor, as schedulers write fractions into it, "
                f"not {value.dtype}"
            )
        if hollow(value):
            return
    elif not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be 0 or more and finite, not {float(value)}")


def check_whole(name: str, value: Any) -> None:
    """Raise TypeError unless a setting is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless a setting is one of these."""
    if value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {listed}, not {value!r}{hint}")


def warn_of_adamws_numbers(optimizer: LearnedOptimizer) -> None:
    """Warn, at the line that makes an optimizer, of numbers that are usual for AdamW alone."""
    name = type(optimizer).__name__
    settings = [
        (float(group["lr"]), float(group["weight_decay"]))
        for group in optimizer.param_groups
        if not any(
            isinstance(group[n], Tensor) and hollow(group[n]) for n in ("lr", "weight_decay")
        )
    ]
    largest = max((lr for lr, _ in settings), default=0.0)
    if 0 < largest <= _LIKE_ADAMWS_LR:
        warnings.warn(
            f"lr={largest:g} looks like AdamW's, but {name}'s is a factor on the student's own "
            f"step: 1 is a step as it was trained, and {largest:g} one {1 / largest:.0f} times "
            "smaller",
            stacklevel=3,
        )
        return
    for lr, decay in settings:
        if lr * decay >= _LARGE_DECAY:
            warnings.warn(
                f"weight_decay={decay:g} at lr={lr:g} takes {lr * decay:.2%} of every weight away "
                f"in each step: it is multiplied by lr, as AdamW's is by a much smaller one. What "
                f"AdamW(lr=1e-3, weight_decay={decay:g}) takes is weight_decay="
                f"{1e-3 * decay / lr:g} here",
                stacklevel=3,
            )
            return


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _warn(message: str) -> None:
    """Warn at the line that called ``step``, from below ``_meet_unusable``."""
    warnings.warn(message, RuntimeWarning, stacklevel=7)
