"""Milliseconds of an inner step of meta-training: a window's forward and backward, over its steps.

The digits MLP and CNN with two teachers, 1, 8 and 64 replicates, on the device with a graph and
without, and beside it on this machine's processor.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from gpu.place import Case, Place, Row, start
from unrolls import Case as Window

from amalgam.meta.cuda_graph import BEFORE

STEPS = 10
REPEATS = {1: 5, 8: 3, 64: 1}


def window_case(
    place: Place, task: str, replicates: int, order: int, device: str, graph: bool
) -> Row:
    on_device = device == "cuda"
    steps = STEPS if place.real else 2
    backend = "auto" if place.real else "triton"
    window = Window(
        task,
        steps,
        order=order,
        replicates=replicates,
        budget="2GB",
        device=place.device if on_device else "cpu",
        backend=backend if on_device else "auto",
        graph=graph,
    )
    if on_device and place.real:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(BEFORE + 1 if graph else 1):
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
    return row


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


def main() -> None:
    place = start("windows")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
