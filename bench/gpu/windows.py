"""Milliseconds of an inner step of meta-training: a window's forward and backward, over its steps.

The digits MLP and CNN with two teachers, 1, 8 and 64 replicates, on the device with a graph and
without, and beside it on this machine's processor; the paper's CNN in the paper's windows of 100
steps; and a million coordinates, beside plain autograd through the same steps on the same device.
Of windows as graphs a profile says which kernels their time goes to.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from gpu.place import Case, Place, Row, start
from unrolls import Case as Window

from amalgam.meta import cuda_graph

cuda_graph.BEFORE = 1  # windows of a shape that run by themselves first: there is little time
STEPS = 10
REPEATS = {1: 5, 8: 3, 64: 1}


def window_case(
    place: Place,
    task: str,
    replicates: int,
    order: int,
    device: str,
    graph: bool,
    steps: int = STEPS,
    engine: str = "ours",
    stack: bool | None = None,
    autocast: Literal["bfloat16"] | None = None,
    fast: bool | None = None,
) -> Row:
    on_device = device == "cuda"
    steps = steps if place.real else 2
    backend = "auto" if place.real else "triton"
    window = Window(
        task,
        steps,
        engine,
        order=order,
        replicates=replicates,
        # A budget of its own, so that what is kept does not depend on the card.
        budget="40GB" if steps > STEPS or task == "million" else "2GB",
        device=place.device if on_device else "cpu",
        backend=backend if on_device else "auto",
        graph=graph,
        stack=stack,
        autocast=autocast,
        fast=fast,
    )
    if on_device and place.real:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(cuda_graph.BEFORE + 1 if graph else 1):
        window.run()
    place.wait()
    spent = []
    for _ in range(REPEATS[replicates] if place.real else 1):
        begin = time.perf_counter()
        window.run()
        place.wait()
        spent.append(time.perf_counter() - begin)
    row: Row = {
        "operation": "window",
        "task": task,
        "engine": engine,
        "stack": stack,
        "autocast": autocast,
        "fast": fast,
        "coordinates": window.coordinates,
        "replicates": replicates,
        "order": order,
        "device": device,
        "graph": graph and window.unroll.cuda_graphs is not None,
        "obstacle": getattr(window.unroll.cuda_graphs, "obstacle", None),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "ms_per_step": round(1e3 * min(spent) / steps, 3),
        "ms_per_step_most": round(1e3 * max(spent) / steps, 3),
    }
    if on_device and place.real:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if row["graph"] and row["obstacle"] is None:
            row |= kernels_of(place, window)
    return row


def kernels_of(place: Place, window: Window) -> Row:
    """What a window as a graph launches in a step, the kernels that take most of it first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        window.run()
        place.wait()
    found = sorted(profile.key_averages(), key=lambda each: -each.device_time_total)
    steps = window.steps
    return {
        "kernels_per_step": sum(each.count for each in found) / steps,
        "device_us_per_step": round(sum(each.device_time_total for each in found) / steps, 1),
        "kernels": [
            [each.key[:80], each.count / steps, round(each.device_time_total / steps, 2)]
            for each in found[:30]
        ],
    }


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    for device, graph in (("cuda", True), ("cuda", False), ("cpu", False)):
        # The stand-in sees what more of them are given to compile in eight.
        for replicates in (1, 8, 64) if place.real else (1, 8) if device == "cuda" else (1,):
            for task in ("digits-mlp", "digits-cnn"):
                orders = (2, 1) if replicates == 1 else (2,)
                for order in orders:
                    how = task, replicates, order, device, graph
                    label = f"{task} replicates={replicates} order={order} {device}"
                    label += " in a graph" if graph else ""
                    yield label, functools.partial(window_case, place, *how)
        if device == "cuda":
            for label, how in long_windows(place, graph):
                yield label, functools.partial(window_case, place, *how)


def long_windows(place: Place, graph: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The paper's windows, and a million coordinates by this package and by plain autograd."""
    in_graph = " in a graph" if graph else ""
    for replicates in (1, 8):
        label = f"the paper's CNN replicates={replicates} T=100{in_graph}"
        yield label, ("cnn", replicates, 2, "cuda", graph, 100)
        how = ("cnn", replicates, 2, "cuda", graph, 100, "ours", None, "bfloat16")
        yield label.replace("T=100", "T=100 bfloat16"), how
        for word, stack in (("stacked", True), ("one by one", False)):
            label = f"digits-cnn replicates={replicates} {word}{in_graph}"
            yield label, ("digits-cnn", replicates, 2, "cuda", graph, STEPS, "ours", stack)
    for replicates in (1, 8, 64) if place.real else (8,):
        how = ("digits-cnn", replicates, 2, "cuda", graph, STEPS, "ours", True, None, True)
        yield f"digits-cnn replicates={replicates} as products{in_graph}", how
    if not place.real:  # there is not memory enough
        return
    how = ("cnn", 8, 2, "cuda", graph, 100, "ours", True, None, True)
    yield f"the paper's CNN replicates=8 T=100 as products{in_graph}", how
    for steps in (10, 100):
        label = f"a million coordinates T={steps}{in_graph}"
        yield label, ("million", 1, 2, "cuda", graph, steps)
        if not graph:
            how = ("million", 1, 2, "cuda", False, steps, "eager")
            yield f"a million coordinates T={steps} eager", how


def main() -> None:
    place = start("windows")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
