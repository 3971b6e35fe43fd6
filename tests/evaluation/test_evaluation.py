"""The protocol compares like with like, and its tables say what it found."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from amalgam import Student, StudentConfig
from amalgam.evaluation import (
    Contender,
    Curve,
    Evaluation,
    Protocol,
    Reading,
    Readings,
    Result,
    Runner,
    evaluate,
    paper,
    plots,
    report,
    runs,
    spread,
    tables,
    train,
)
from amalgam.evaluation.contenders import (
    baseline,
    grid,
    muon,
    names_of,
    student_contender,
    teacher_contenders,
)
from amalgam.evaluation.protocol import (
    DEFAULTS,
    ONE_SETTING,
    TUNING_SEED,
    leader,
    oracle_of,
    reference_of,
)
from amalgam.policies import Pool, TorchTeacher
from amalgam.seeding import generator_for
from amalgam.tasks import Task


def linear(name: str = "linear", loss: Any = nn.functional.cross_entropy) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    data = (x[:40], y[:40]), (x[40:], y[40:])
    return Task(name, lambda: nn.Linear(4, 2), *data, loss=loss, batch_size=8)


@pytest.fixture
def task() -> Task:
    return linear()


SGD = Contender("sgd", partial(torch.optim.SGD, lr=0.5), "student")
STILL = Contender("still", partial(torch.optim.SGD, lr=0.0), "teacher")
EXPLODING = Contender("exploding", partial(torch.optim.SGD, lr=1e20, weight_decay=1e20), "student")

SMALL = Protocol(
    "small",
    horizon=8,
    budgets=(0.25, 1.0, 2.0),
    seeds=2,
    grids={
        "Adam": grid(lr=(1e-4, 0.1)),
        "AdamW": grid(lr=(0.1,), weight_decay=(0.0, 0.5)),
        "Muon": grid(lr=(0.1,)),
    },
    curve=4,
)


def test_readings_leave_each_part_in_its_mode() -> None:
    """Also a frozen batch norm, which a run of one's own keeps in evaluation mode."""

    def build() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        made[1].eval()
        return made

    modes = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            modes.append([part.training for part in module.modules()])
            super().step(closure)

    task = dataclasses.replace(linear(), build=build)
    module = task.init_module(generator_for(0, "modes"))
    task.init_module = lambda generator: module  # type: ignore[method-assign]
    train(task, partial(Spy, lr=0.1), steps=2, seed=0, readings=Readings(full=(1,)))
    assert modes == [[True, True, False, True]] * 2


def made(contenders: list[Contender], protocol: Protocol = SMALL, *of: Task) -> Evaluation:
    with Runner(of or [linear()]) as runner:
        return evaluate(runner, contenders, protocol)


def test_train_reads_where_asked(task) -> None:
    curve = train(task, SGD.make, steps=7, seed=0, readings=Readings((3, 6), (4,)))
    assert curve.steps == (0, 3, 6, 7)
    assert curve.losses[-1] < curve.losses[0]
    assert [reading.step for reading in curve.full] == [0, 4]
    assert curve.full[0].loss == curve.losses[0]
    assert curve.best == min(curve.losses)
    assert all(0 <= a <= 1 for a in curve.accuracies)
    assert curve.seconds > 0
    assert curve.state_bytes == 0
    with_momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    moved = train(task, with_momentum, steps=2, seed=0, readings=Readings())
    assert moved.state_bytes == 4 * task.layout.numel
    assert moved.final == moved.losses[-1]


def test_a_reading_is_of_the_same_samples_however_many(task) -> None:
    readings = Readings(full=(2,), curve_samples=5, training_samples=7, validation_samples=9)
    one, other = (
        train(task, make, steps=2, seed=0, readings=readings) for make in (SGD.make, STILL.make)
    )
    assert one.losses[0] == other.losses[0] == other.losses[-1]
    whole = train(task, SGD.make, steps=2, seed=0, readings=Readings(full=(2,)))
    assert one.full[0].loss != one.losses[0] != whole.losses[0]
    assert one.full[0].accuracy * 9 == pytest.approx(round(one.full[0].accuracy * 9))


def test_many_samples_are_read_in_pieces(task, monkeypatch) -> None:
    whole = train(task, SGD.make, steps=3, seed=0, readings=Readings(full=(3,)))
    monkeypatch.setattr("amalgam.evaluation.runs._CHUNK", 7)
    pieces = train(task, SGD.make, steps=3, seed=0, readings=Readings(full=(3,)))
    assert pieces.losses == pytest.approx(whole.losses)
    assert pieces.full[-1] == pytest.approx(whole.full[-1])


def test_the_seed_decides_and_nothing_else() -> None:
    x = torch.randn(40, 4, generator=generator_for(1))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    task = Task(
        "dropout", build, (x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), batch_size=8
    )
    curves = []
    for elsewhere, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        readings = Readings((1, 2, 3, 4))
        curves.append(train(task, SGD.make, steps=5, seed=seed, readings=readings).untimed())
        assert torch.equal(torch.get_rng_state(), before)
    assert curves[0].losses == curves[1].losses
    assert curves[0].losses != curves[2].losses


def test_a_linear_decay_ends_at_zero(task) -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def two_groups(params: Any) -> Watched:
        first, *others = params
        return Watched([{"params": [first], "lr": 0.4}, {"params": others, "lr": 0.2}])

    train(task, two_groups, steps=4, seed=0, readings=Readings(), decay="linear")
    assert torch.tensor(rates).flatten().tolist() == pytest.approx(
        [0.4, 0.2, 0.3, 0.15, 0.2, 0.1, 0.1, 0.05]
    )


def test_a_run_that_is_not_finite_ends_and_counts_as_diverged(task) -> None:
    curve = train(task, EXPLODING.make, steps=9, seed=0, readings=Readings((3, 6), (3, 9)))
    assert curve.steps == (0, 3, 6, 9)
    assert [reading.step for reading in curve.full] == [0, 3, 9]
    assert math.isnan(curve.final)
    assert curve.diverged
    assert Curve.from_dict(curve.as_dict()).as_dict() == curve.as_dict()
    assert not curve.until(0).diverged
    worse = partial(torch.optim.SGD, lr=0.5, maximize=True)
    assert train(task, worse, steps=9, seed=0, readings=Readings(full=(9,))).diverged


def test_contenders_start_alike() -> None:
    found = made([SGD, STILL])
    (of_budgets,) = found.results
    for results in of_budgets:
        for seed in range(2):
            assert len({result.curves[seed].losses[0] for result in results}) == 1
        still = next(result for result in results if result.name == "still")
        assert all(curve.final == curve.losses[0] for curve in still.curves)
    assert len({curve.losses[0] for curve in of_budgets[0][0].curves}) == 2


def test_constant_rates_are_read_on_the_way_and_decaying_ones_run_for_each_budget() -> None:
    found = made([SGD])
    quarter, horizon, twice = found.results[0]
    for results in zip(quarter, horizon, twice, strict=True):
        assert [result.steps for result in results] == [2, 8, 16]
        assert [result.curves[0].steps[-1] for result in results] == [2, 8, 16]
        prefix = results[2].curves[0].until(8)
        assert (prefix.losses == results[1].curves[0].losses) == (results[0].decay == "constant")
    alone = train(linear(), SGD.make, steps=8, seed=1, decay="linear", readings=SMALL.readings(8))
    ours = next(result for result in horizon if result.name == "sgd, linear")
    assert ours.curves[1].untimed().as_dict() == alone.untimed().as_dict()


def test_tuning_finds_the_best_of_a_grid_on_other_seeds(monkeypatch) -> None:
    seeds = []
    monkeypatch.setattr(
        "amalgam.evaluation.runner.train",
        lambda *a, **o: seeds.append((o["seed"], o["steps"])) or train(*a, **o),
    )
    found = made([])
    by = {(tuned.optimizer, tuned.decay): tuned for tuned in found.tunings}
    adam = by["Adam", "constant"]
    assert adam.settings == ("lr=0.0001", "lr=0.1")
    assert adam.chosen == 1 == adam.losses.index(min(adam.losses))
    assert adam.edge == ("lr",)
    assert by["Muon", "linear"].edge == ()
    tuning = [steps for seed, steps in seeds if seed >= TUNING_SEED]
    assert tuning == [8] * 10
    assert sum(tuned.runs * tuned.steps for tuned in found.tunings) == sum(tuning)
    results = found.results[0][1]
    assert next(r for r in results if r.name == "Adam").settings == "lr=0.1"
    one = next(r for r in results if r.name == ONE_SETTING)
    assert one.settings in {
        f"lr=0.1, weight_decay={w}, {d}" for w in ("0", "0.5") for d in by_decay
    }
    oracle, reference = oracle_of(results), reference_of(results)
    assert oracle is not None
    assert reference is not None
    defaults = next(r for r in results if r.name == DEFAULTS)
    assert defaults.kind == "baseline"
    alone = train(linear(), torch.optim.AdamW, steps=8, seed=0, readings=Readings())
    assert defaults.curves[0].until(8).losses[-1] == alone.losses[-1]
    tuned_ones = [r for r in results if r.name not in (ONE_SETTING, DEFAULTS)]
    assert oracle.summary("final")[0] == min(r.summary("final")[0] for r in tuned_ones)
    assert reference.name.split(",")[0] == "Adam"


by_decay = ("constant", "linear")


def test_muon_steps_matrices_and_kernels_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    twins = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
    twins[0] = nn.Parameter(twins[0].detach().reshape(2, 9))
    optimizer = muon(module.parameters(), lr=0.1)
    apart = (
        torch.optim.Muon(twins[::2], lr=0.05, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(twins[1::2], lr=0.05, weight_decay=0),
    )
    for group in optimizer.param_groups:
        group["lr"] /= 2
    for _ in range(2):
        optimizer.zero_grad()
        assert all(p.grad is None for p in module.parameters())
        module(torch.ones(2, 1, 4, 4)).square().sum().backward()
        for param, twin in zip(module.parameters(), twins, strict=True):
            assert param.grad is not None
            twin.grad = param.grad.reshape(twin.shape).clone()
        optimizer.step()
        for one in apart:
            one.step()
        for param, twin in zip(module.parameters(), twins, strict=True):
            assert torch.equal(param.reshape(twin.shape), twin)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert len(optimizer.state) == 4
    for alone in (nn.Linear(2, 2, bias=False), nn.LayerNorm(2)):
        assert len(muon(alone.parameters(), lr=0.1).param_groups) == 1


def test_rates_that_fall_may_be_tuned_from_the_best_constant_one_on() -> None:
    rates = (1e-4, 1e-3, 0.03, 0.1)
    grids = {
        "Adam": grid(lr=rates),
        "AdamW": grid(lr=rates, weight_decay=(0.0, 0.5)),
        "SGD": grid(lr=(0.1, 1e20, 1e21), momentum=(0.9,)),
    }
    whole = made([], dataclasses.replace(SMALL, grids=grids))
    less = made([], dataclasses.replace(SMALL, grids=grids, falling_rates=True))
    for ours, theirs in zip(less.tunings, whole.tunings, strict=True):
        assert (ours.task, ours.optimizer, ours.decay) == (
            *(theirs.task, theirs.optimizer, theirs.decay),
        )
        losses = dict(zip(theirs.settings, theirs.losses, strict=True))
        assert all(losses[name] == x for name, x in zip(ours.settings, ours.losses, strict=True))
        if ours.decay == "constant" or ours.optimizer == "AdamW":
            assert ours == theirs
            if ours.optimizer == "AdamW":
                continue  # all its settings are ranked over tasks
            least = float(ours.settings[ours.chosen].split(",")[0].removeprefix("lr="))
            assert ours.chosen > 0 or ours.optimizer == "SGD"  # or nothing is left out
        else:
            tried = [float(name.split(",")[0].removeprefix("lr=")) for name in ours.settings]
            of_all = [float(name.split(",")[0].removeprefix("lr=")) for name in theirs.settings]
            assert tried == [rate for rate in of_all if rate >= least]
            assert ours.runs == len(ours.settings)
            assert (ours.runs < theirs.runs) == (ours.optimizer == "Adam")
            if ours.chosen == 0:
                assert "lr" in ours.edge
    assert {one.name for one in less.results[0][1]} == {one.name for one in whole.results[0][1]}


def test_a_diverged_contender_is_a_row_and_the_rest_stands(tmp_path) -> None:
    found = made([EXPLODING, SGD])
    at = found.results[0][1]
    text = tables.of_task(found.results[0], 1).text(300)
    assert text.count("diverged 2 of 2") >= 4
    row = next(line for line in text.splitlines() if line.startswith("exploding "))
    assert "nan" not in text
    assert "never" in row
    summary = tables.over_all_tasks(found).text(300)
    assert "2 of 2" in next(line for line in summary.splitlines() if line.startswith("exploding "))
    ours = next(line for line in summary.splitlines() if line.startswith("sgd "))
    assert "0 of 2" in ours
    assert "diverged" not in ours
    report.record(found, tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json", "evaluation.csv", "evaluation.md", "report.html", "plots",
    }  # fmt: skip
    again = report.read(tmp_path)
    assert again.protocol == found.protocol
    assert again.tasks == found.tasks
    assert again.tunings == found.tunings
    assert [one.as_dict() for one in again.results[0][1]] == [one.as_dict() for one in at]
    alone = dataclasses.replace(found, results=((at[:1],),))
    plots.curves(alone.results[0][0], tmp_path / "alone.png")
    assert spread(at[:2]) != spread(at[:2])  # NaN


def test_a_closing_evaluation_with_diverged_replicates_is_written(tmp_path) -> None:
    protocol = dataclasses.replace(
        SMALL, budgets=(1.0,), decays=("constant",), one_setting=False, timed=False
    )
    found = made([EXPLODING, SGD], protocol)
    report.record_closing(found, tmp_path / "one", replicates=2)
    report.record_closing(made([EXPLODING, SGD], protocol), tmp_path / "two", replicates=2)
    one, two = (tmp_path / name / "evaluation.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "one diverged" in (tmp_path / "one" / "evaluation.md").read_text()


def negative(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target) - 5


def test_negative_losses_have_no_ratios_and_are_otherwise_compared(tmp_path) -> None:
    found = made([SGD], SMALL, linear(), linear("negative", negative))
    table = tables.over_all_tasks(found)
    assert any("no logarithm: negative." in note for note in table.notes)
    assert table.rows[0][1] == tables.over_all_tasks(made([SGD])).rows[0][1]
    of_negative = tables.of_task(found.results[1], 1)
    assert all(float(row[2].split()[0]) < 0 for row in of_negative.rows)
    assert of_negative.best == tables.of_task(found.results[0], 1).best
    report.record(found, tmp_path, {})
    assert (tmp_path / "plots" / "negative.png").stat().st_size > 5000
    alone = made([SGD], SMALL, linear("negative", negative))
    assert {row[1] for row in tables.over_all_tasks(alone).rows} == {""}


def test_names_differ() -> None:
    with pytest.raises(ValueError, match="contenders' names must differ, and 'Adam' is there twic"):
        made([dataclasses.replace(SGD, name="Adam")])
    with pytest.raises(ValueError, match="tasks' names must differ, and 'linear' is there twice"):
        made([], SMALL, linear(), linear())
    assert names_of(["digits", "runs/x/student.safetensors"]) == ["digits", "student"]
    paths = ["a/x/student.safetensors", "b/x/student.safetensors", "a/y/student.safetensors"]
    assert names_of([*paths, "digits"]) == ["a/x/student", "b/x/student", "y/student", "digits"]
    with pytest.raises(ValueError, match="'digits' is given twice"):
        names_of(["digits", "digits"])


def test_teachers_do_not_collide_with_baselines() -> None:
    pool = Pool([TorchTeacher(torch.optim.AdamW, lr=0.1), "adam"])
    teachers = teacher_contenders(pool)
    assert [one.name for one in teachers] == ["AdamW (teacher)", "adam"]
    found = made(teachers)
    names = [result.name for result in found.results[0][1]]
    assert names[:3] == ["AdamW (teacher)", "adam", "Adam"]
    assert len(set(names)) == len(names)


def test_wrong_protocols_are_refused() -> None:
    for changes, message in (
        ({"seeds": 0}, "seeds must be 1 or more, not 0"),
        ({"every": 0}, "every must be 1 or more, not 0"),
        ({"training_samples": 0}, "training_samples must be 1 or more, not 0"),
        ({"budgets": (1.0, math.inf)}, "budgets must be positive and finite, not inf"),
        ({"seeds": TUNING_SEED + 1}, "seeds must be at most 10000"),
        ({"budgets": (0.5, 2.0)}, "budgets must ascend and have 1 among them"),
        ({"budgets": (2.0, 1.0)}, "budgets must ascend"),
        ({"budgets": (0.01, 1.0), "horizon": 10}, "budgets must be 1 step or more"),
        ({"budgets": (0.24, 0.25, 1.0), "horizon": 10}, "budgets must be of different steps"),
        ({"grids": {"Adagrad": ()}}, "grids must be of some of .*'Adagrad'"),
        ({"grids": {"SGD": grid(lr=())}}, "grids must hold one setting or more of 'SGD', .* leave"),
        ({"decays": ("cosine",)}, "decays must be some of .*'cosine'"),
        ({"decays": ()}, "decays must be some of .*not \\[\\]"),
        ({"decays": ("linear", "linear")}, "decays must be some of .*'linear', 'linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks must be one or more, such as .*, not none"):
        Runner([])
    with Runner([linear()]) as runner:
        with pytest.raises(ValueError, match="contenders must be one or more where grids has no"):
            evaluate(runner, [], dataclasses.replace(SMALL, grids={}))
        with pytest.raises(ValueError, match="contenders must be 1 or more, not 0"):
            paper.evaluate(runner, [])
        for name in ("epochs", "runs"):
            with pytest.raises(ValueError, match=f"{name} must be 1 or more, not 0"):
                paper.evaluate(runner, [baseline("SGD", (), "constant")], **{name: 0})


def test_what_is_no_task_and_no_contender_is_named() -> None:
    with pytest.raises(TypeError, match="tasks must be a NamedTask, .* not 'digits-mlp'"):
        Runner("digits-mlp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tasks\[0\] must be a NamedTask, .* not 'digits-mlp'"):
        Runner(["digits-mlp"])  # type: ignore[list-item]
    student: Any = Student(StudentConfig(layers=1, hidden=2))
    with Runner(linear()) as runner:
        with pytest.raises(
            TypeError, match=r"contenders\[0\] must be a Contender, such as .*Student"
        ):
            evaluate(runner, [student], SMALL)
        with pytest.raises(TypeError, match="contenders must be .* an object of Student"):
            paper.evaluate(runner, student)
        with pytest.raises(TypeError, match="protocol must be a Protocol, .* not 'short'"):
            evaluate(runner, [], "short")  # type: ignore[arg-type]


def test_readings_are_of_a_sample_or_more() -> None:
    for name in ("curve_samples", "training_samples", "validation_samples"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, or None, not 0"):
            Readings(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "target", "expected"),
    [
        ((8, 3), (8,), 1),
        ((8, 3, 5), (8, 5), 1),  # PyTorch's order
        ((8, 5, 3), (8, 5), 2),  # language models'
        ((8, 5, 5), (8, 5), None),  # either
        ((8, 1), (8,), None),  # one number is no class
        ((8, 4, 5, 3), (8, 4, 5), 3),
        ((8, 3), (8, 3), None),
        ((8, 3, 2), (8, 5), None),
    ],
)
def test_where_an_output_has_its_classes(output: Any, target: Any, expected: int | None) -> None:
    classes = torch.zeros(target, dtype=torch.long)
    assert runs._dimension_of_classes(torch.zeros(output), classes) == expected
    assert runs._dimension_of_classes(torch.zeros(output), classes.float()) is None
    assert runs._dimension_of_classes((torch.zeros(output), 1), classes) is None


def test_accuracies_of_language_models_and_of_outputs_that_are_no_tensor() -> None:
    class Model(nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            self.table, self.named = nn.Embedding(7, 7), named

        def forward(self, x: torch.Tensor) -> Any:
            out = self.table(x)
            return {"logits": out} if self.named else out

    tokens = torch.arange(160).view(32, 5) % 7
    for named in (False, True):

        def loss(out: Any, target: torch.Tensor, named: bool = named) -> torch.Tensor:
            logits = out["logits"] if named else out
            return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

        made_of = (tokens, tokens)
        task = Task("lm", lambda named=named: Model(named), made_of, made_of, loss, 16)
        make = partial(torch.optim.Adam, lr=0.5)
        curve = train(task, make, steps=20, seed=0, readings=Readings())
        assert curve.final < 0.01
        accuracy = curve.accuracies[-1]
        assert math.isnan(accuracy) if named else accuracy == 1


def test_a_diverged_run_counts_as_an_infinite_loss() -> None:
    """Also where its validation loss is finite, and small."""

    def of(name: str, *ends: tuple[float, float]) -> Result:
        curves = tuple(
            Curve(
                (0, 2),
                (3.0, final),
                (0.1, 0.1),
                (Reading(0, 3.0, 0.1, 3.0, 0.1), Reading(2, final, 0.1, training, 0.1)),
            )
            for final, training in ends
        )
        return Result(name, "task", curves, steps=2)

    diverged, sound = of("a", (0.5, 9.0), (0.5, 1.0)), of("b", (2.0, 2.0), (2.0, 2.0))
    assert diverged.scores == [math.inf, 0.5]
    assert diverged.values("final") == [0.5, 0.5]
    assert leader([diverged, sound]) is sound
    assert leader([diverged]) is diverged


def test_identities_tell_students_apart() -> None:
    one, other = (
        Student(StudentConfig(layers=1, hidden=3), generator=generator_for(seed)) for seed in (0, 1)
    )
    longer = Student(StudentConfig(layers=1, hidden=3, warmup_steps=7), generator=generator_for(0))
    identities = [student_contender("x", each).identity for each in (one, other, longer)]
    assert identities[0] == student_contender("y", one).identity
    assert identities[0] != identities[1]
    assert identities[0] != identities[2]
    assert (
        baseline("Adam", (("lr", 0.1),), "linear").identity
        == baseline("Adam", (("lr", 0.1),), "constant").identity
    )


def results() -> list[Result]:
    def curve(final: float, training: float) -> Curve:
        full = (Reading(0, 3.0, 0.1, 3.0, 0.1), Reading(2, final, 0.4, training, 0.5))
        return Curve((0, 1, 2), (3.0, 1.0, final), (0.1, 0.5, 0.4), full, 0.002, 80)

    ours = Result("ours", "task", (curve(2.0, 0.25), curve(2.5, 0.75)), "student", steps=2)
    lost = Result("lost", "task", (curve(math.nan, 1.0), curve(1.0, 4.0)), steps=2)
    return [lost, ours]


def test_summaries_and_tables() -> None:
    lost, ours = results()
    assert ours.summary("final") == (2.25, pytest.approx(math.sqrt(0.125)))
    assert ours.summary("best") == (1.0, 0.0)
    assert ours.summary("accuracy") == (pytest.approx(0.4), 0.0)
    assert lost.diverged == 2
    table = tables.of_task([[lost, ours]], parameters=10)
    assert table.headings == (
        "optimizer", "loss after 2", "best loss", "training loss", "accuracy", "ms a step",
        "bytes a parameter", "settings",
    )  # fmt: skip
    assert "| **ours** | **2.250 ± 0.354** | **1.000 ± 0.000** |" in table.markdown()
    assert [tables.number(x) for x in (0.0, 1.0, 123456.0, 1.5e7, 2e-4, 3e-7, -0.25)] == [
        "0.0000", "1.000", "123456", "1.500e+07", "0.0002000", "3.000e-07", "-0.2500",
    ]  # fmt: skip
    assert "| lost | diverged 2 of 2 |" in table.markdown()
    assert table.rows[1][-3:] == ("2.00", "8.0", "")


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("ascii", "+-")])
def test_tables_are_readable_on_narrow_and_ascii_terminals(encoding, sign) -> None:
    table = tables.of_task([results()])
    for width in (40, 200):
        console = Console(width=width, force_terminal=False, legacy_windows=False)
        options = dataclasses.replace(console.options, encoding=encoding)
        lines = console.render_lines(table, options, pad=False)
        shown = ["".join(segment.text for segment in line) for line in lines]
        assert max(map(len, shown)) <= width
        text = "\n".join(shown)
        assert f"2.250 {sign} 0.354" in text
        text.encode(encoding)
    assert "loss after 2: 2.250 +- 0.354" in table.text(40, ascii_only=True)


def test_the_page_loads_nothing_and_marks_stand_ins(tmp_path) -> None:
    stand_in = dataclasses.replace(linear("linear-glyphs"), stand_in=True)
    found = made([dataclasses.replace(SGD, name="<mine>")], SMALL, linear(), stand_in)
    report.record(found, tmp_path, {})
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(href|src)=\"(?!#)|url\((?!#)|@import", page)
    assert "<mine>" not in page
    assert "&lt;mine&gt;" in page
    assert page.count("stand-in data</span>") == 1
    ids = re.findall(r"\bid=\"([^\"]+)\"", page)
    named = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", page))
    assert named <= set(ids)
    # Plots of one page share no id that anything points to.
    assert all(ids.count(name) == 1 for name in named)
    assert "published sets: linear-glyphs." in (tmp_path / "evaluation.md").read_text()
    rows = (tmp_path / "evaluation.csv").read_text().splitlines()
    results = found.results
    assert len(rows) == 1 + sum(len(r.curves) for t in results for b in t for r in b)
