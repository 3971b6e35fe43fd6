"""Every rule by which the authors' strategies say what comes next."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from amalgam.meta.curriculum import STRATEGIES, Curriculum, Repeat, choice_strategy, simple
from amalgam.meta.objective import loss_weights
from amalgam.meta.periods import INITIAL, Finish, Period, Record, Strategy, UnrollSettings
from amalgam.meta.stages import Stage, Stages

NAN, INF = math.nan, math.inf
Losses = Callable[[Period], tuple[float, float]]


def follow(strategy: Strategy, losses: Losses) -> tuple[list[Period], Finish]:
    """Run to the end, keeping the records as JSON and nothing else."""
    stored, done = "[]", []
    while len(done) < 500:
        records = [Record.from_json(item) for item in json.loads(stored)]
        action = strategy.next(records)
        if isinstance(action, Finish):
            return done, action
        done.append(action)
        meta_loss, validation = losses(action)
        records.append(Record.of(action, meta_loss=meta_loss, validation=validation))
        stored = json.dumps([record.to_json() for record in records], allow_nan=False)
    raise AssertionError("a strategy that does not end")


def after(strategy: Strategy, *rows: tuple[int, int, int, float, float]) -> Period | Finish:
    return strategy.next([Record(*row) for row in rows])


def place(action: Period | Finish) -> tuple[int, int, int, str]:
    assert isinstance(action, Period)
    return action.stage, action.period, action.repeat, action.begin_from


def test_the_curriculum_is_the_papers() -> None:
    """Of depths 1, 2, 5, 10 by stage, validated on the next; 1,080 meta-steps at least."""
    done, finish = follow(
        Curriculum(imitation_weight="il_more"), lambda p: (-9.0, -1.0 - p.stage + 0.1 * p.period)
    )
    assert [(p.stage, p.period) for p in done] == [(s, p) for s in range(4) for p in range(6)]
    assert sum(p.training.meta_steps for p in done) == 1080
    firsts = done[::6]
    assert [p.training for p in firsts] == [
        UnrollSettings(100, w, 10, 1, 0.05) for w in (1, 2, 5, 10)
    ]
    assert [p.validation for p in firsts] == [
        UnrollSettings(100, w, 10, 1, 0.05) for w in (2, 5, 10, 20)
    ]
    assert [p.imitation_weight for p in firsts] == [0.2, 0.1, 0.05, 0.02]
    assert all(p.repeat == 0 for p in done)
    begins = [p.begin_from for p in firsts]
    assert begins == [INITIAL, "stage_0.0.0", "stage_1.0.0", "stage_2.0.0"]
    assert done[1].begin_from == done[0].name == "stage_0.0.0"
    assert finish == Finish("stage_3.0.0")


@pytest.mark.parametrize("best", [0, 1, 3, 7])
def test_a_stage_goes_on_until_its_chances_are_spent(best: int) -> None:
    """Best period + 6 periods, and the next stage begins from the best."""
    done, finish = follow(
        Curriculum(num_stages=2), lambda p: (-2.0, -1.0 - 0.01 * min(p.period, best))
    )
    of_first = [p.period for p in done if p.stage == 0]
    assert of_first == list(range(best + 6))
    (first_of_second,) = [p for p in done if (p.stage, p.period) == (1, 0)]
    assert first_of_second.begin_from == f"stage_0.{best}.0"
    assert finish == Finish(f"stage_1.{best}.0")


def test_chances_count_from_the_best_of_all_repeats() -> None:
    strategy = Curriculum(num_stages=1, num_periods=1, num_chances=2, max_repeat=1)
    rows = [(0, 0, 0, 0.0, -1.0), (0, 1, 0, 0.0, 9.0), (0, 1, 1, 0.0, -2.0)]
    assert place(after(strategy, *rows)) == (0, 2, 0, "stage_0.1.1")
    rows += [(0, 2, 0, 0.0, -1.5)]
    assert place(after(strategy, *rows)) == (0, 3, 0, "stage_0.2.0")
    rows += [(0, 3, 0, 0.0, -1.9)]
    assert after(strategy, *rows) == Finish("stage_0.1.1")


def test_of_equals_the_first_is_best() -> None:
    done, finish = follow(Curriculum(num_stages=1), lambda p: (0.0, -1.0))
    assert len(done) == 6
    assert finish == Finish("stage_0.0.0")


@pytest.mark.parametrize(
    ("before", "now", "repeats"),
    [
        (-1.0, -0.5, False),  # just at -1 + 0.5 |-1|
        (-1.0, -0.49, True),
        (2.0, 3.0, False),
        (2.0, 3.01, True),
        (0.0, 0.01, True),
        (-1.0, INF, True),
        (-1.0, NAN, False),
        (NAN, 5.0, False),
        (INF, 5.0, False),
        (-1.0, -3.0, False),
    ],
)
def test_a_period_that_exploded_is_done_again(before: float, now: float, repeats: bool) -> None:
    action = after(Curriculum(), (0, 0, 0, 9.0, before), (0, 1, 0, -9.0, now))
    expected = (0, 1, 1, "stage_0.0.0") if repeats else (0, 2, 0, "stage_0.1.0")
    assert place(action) == expected


@pytest.mark.parametrize("validation", [INF, NAN])
def test_what_is_not_finite_is_never_best(validation: float) -> None:
    strategy = Curriculum(num_stages=1, num_periods=1, num_chances=1)
    rows = [(0, 0, 0, 0.0, validation), (0, 1, 0, 0.0, validation)]
    assert after(strategy, *rows) == Finish(INITIAL)
    rows[0] = (0, 0, 0, 0.0, 3.0)
    strategy = Curriculum(num_stages=1, num_periods=1, num_chances=1, repeat_threshold=INF)
    assert after(strategy, *rows) == Finish("stage_0.0.0")


def test_the_first_period_of_all_is_never_repeated() -> None:
    assert place(after(Curriculum(), (0, 0, 0, INF, INF))) == (0, 1, 0, "stage_0.0.0")


def stage_of(number: int, *validations: float) -> list[tuple[int, int, int, float, float]]:
    return [(number, index, 0, -9.0, v) for index, v in enumerate(validations)]


@pytest.mark.parametrize(("training", "repeats"), [(-1.0, False), (-0.99, True), (NAN, False)])
def test_a_stages_first_period_is_judged_by_its_training(training: float, repeats: bool) -> None:
    """By the best validation of the stage before, here -2, whatever its own validation."""
    strategy = Curriculum(num_periods=1, num_chances=1)
    rows = [*stage_of(0, -2.0, -1.5), (1, 0, 0, training, INF)]
    expected = (1, 0, 1, "stage_0.0.0") if repeats else (1, 1, 0, "stage_1.0.0")
    assert place(after(strategy, *rows)) == expected


def test_repeats_have_a_limit() -> None:
    """After four the fifth try is taken as it is; the period after is judged by the best try."""
    rows = [(0, 0, 0, 0.0, -1.0)]
    for repeat in range(4):
        rows.append((0, 1, repeat, 0.0, 5.0 - repeat))
        assert place(after(Curriculum(), *rows)) == (0, 1, repeat + 1, "stage_0.0.0")
    rows.append((0, 1, 4, 0.0, 8.0))
    assert place(after(Curriculum(), *rows)) == (0, 2, 0, "stage_0.1.4")
    worse = [*rows, (0, 2, 0, 0.0, 3.1)]
    assert place(after(Curriculum(), *worse)) == (0, 2, 1, "stage_0.1.3")
    assert place(after(Curriculum(), *rows, (0, 2, 0, 0.0, 2.9))) == (0, 3, 0, "stage_0.2.0")


def test_no_limit_is_zero() -> None:
    rows = [(0, 0, 0, 0.0, -1.0), *((0, 1, repeat, 0.0, 5.0) for repeat in range(30))]
    assert place(after(Curriculum(max_repeat=0), *rows)) == (0, 1, 30, "stage_0.0.0")
    with_zero = Repeat(max_repeat=0, repeat_threshold=0.1)
    assert place(after(with_zero, *rows)) == (0, 1, 30, "stage_0.0.0")


def test_a_stage_of_nan_goes_back_to_the_one_before() -> None:
    strategy = Curriculum(num_stages=2, num_periods=1, num_chances=1)
    rows = [*stage_of(0, -2.0, -1.0), *stage_of(1, NAN, NAN)]
    assert after(strategy, *rows) == Finish("stage_0.0.0")
    assert place(after(strategy, *stage_of(0, NAN, NAN))) == (1, 0, 0, INITIAL)


def test_repeat_compares_validations_alone() -> None:
    strategy = Repeat(num_periods=3, repeat_threshold=0.8)
    first = (0, 0, 0, 0.0, -1.0)
    assert place(after(strategy)) == (0, 0, 0, INITIAL)
    assert place(after(strategy, (0, 0, 0, INF, INF))) == (0, 1, 0, "stage_0.0.0")
    assert place(after(strategy, first, (0, 1, 0, INF, -0.2))) == (0, 2, 0, "stage_0.1.0")
    assert place(after(strategy, first, (0, 1, 0, -9.0, -0.19))) == (0, 1, 1, "stage_0.0.0")
    assert place(after(strategy, first, (0, 1, 0, 0.0, NAN))) == (0, 2, 0, "stage_0.1.0")
    bad = [(0, 1, repeat, 0.0, 5.0 + repeat) for repeat in range(5)]
    assert place(after(strategy, first, *bad)) == (0, 2, 0, "stage_0.1.4")
    # The last try stands for its period, not the best one.
    on_top = (0, 2, 0, 0.0, 9.0 * 1.8)
    assert after(strategy, first, *bad, on_top) == Finish("stage_0.2.0")
    above = (0, 2, 0, 0.0, 9.0 * 1.81)
    assert place(after(strategy, first, *bad, above)) == (0, 2, 1, "stage_0.1.4")


def test_the_authors_choice_takes_180_windows() -> None:
    done, finish = follow(choice_strategy(), lambda p: (0.0, -1.0))
    assert [p.training.windows for p in done] == [1, 2, 5, 5, 5]
    assert sum(p.training.meta_steps for p in done) == 180
    assert [p.training.warmup_windows for p in done] == [0, 1, 1, 1, 1]
    assert [p.training.warmup_lr for p in done] == [0.0, 0.05, 0.05, 0.05, 0.05]
    assert {p.validation for p in done} == {UnrollSettings(100, 10, 1, 1, 0.05)}
    assert finish == Finish("stage_0.4.0")
    assert choice_strategy().repeat_threshold == 0.9


def test_simple_goes_straight_on() -> None:
    done, finish = follow(simple(num_periods=6), lambda p: (INF, 10.0**p.period))
    assert [(p.period, p.repeat) for p in done] == [(index, 0) for index in range(6)]
    assert [p.begin_from for p in done[1:]] == [p.name for p in done[:-1]]
    assert {p.training for p in done} == {UnrollSettings(20, 25, 10, 0, 0.0)}
    assert {p.validation for p in done} == {UnrollSettings(20, 25, 2, 0, 0.01)}
    assert finish == Finish("stage_0.5.0")


def test_fixed_stages_are_trained_straight_on() -> None:
    strategy = Stages((Stage(3, 1, 0.2), Stage(2, 2, 0.05)), unroll=4)
    done, finish = follow(strategy, lambda p: (NAN, NAN))
    assert [place(period) for period in done] == [(0, 0, 0, INITIAL), (1, 0, 0, "stage_0.0.0")]
    assert [p.training for p in done] == [
        UnrollSettings(4, 1, 3, 0, 0.0),
        UnrollSettings(4, 2, 2, 0, 0.0),
    ]
    assert [p.imitation_weight for p in done] == [0.2, 0.05]
    assert all(p.own_warmup and p.validation is None for p in done)
    assert finish == Finish("stage_1.0.0")
    assert sum(p.training.meta_steps for p in done) == strategy.meta_steps == 7
    assert Stages([{"episodes": 3}], 4) == Stages((Stage(3),), 4)  # type: ignore[list-item]


@pytest.mark.parametrize("name", STRATEGIES)
def test_who_goes_back_says_so(name: str) -> None:
    strategy: Strategy = STRATEGIES[name]()
    stays = name in ("stages", "meta-batch")
    assert strategy.goes_back == (strategy.meta_steps is None) == (not stays)
    first = strategy.next([])
    assert isinstance(first, Period)
    assert first.own_warmup == (first.validation is None) == stays


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("il_more", [0.2, 0.1, 0.05, 0.02, 0.02]),
        ("il_adjusted", [0.2, 0.04, 0.02, 0.01, 0.01]),
        ("il_staged", [1.0, 0.0, 0.0, 0.0, 0.0]),
        ([0.5, 0.25], [0.5, 0.25, 0.25, 0.25, 0.25]),
        (0.3, [0.3] * 5),
    ],
)
def test_imitation_weights_by_stage(name: Any, weights: list[float]) -> None:
    strategy = Curriculum(num_stages=5, num_periods=1, num_chances=1, imitation_weight=name)
    done, _ = follow(strategy, lambda p: (-1.0, -1.0))
    assert [p.imitation_weight for p in done if p.period == 0] == weights
    periods, _ = follow(Repeat(num_periods=5, imitation_weight=name), lambda p: (-1.0, -1.0))
    assert [p.imitation_weight for p in periods] == weights


def test_loss_weights() -> None:
    assert loss_weights("sum", 0.2) == (1.0, 0.2)
    assert loss_weights("imitation", 0.2) == (0.0, 1.0)
    assert loss_weights("meta", 0.2) == (1.0, 0.0)
    generator, n = torch.Generator().manual_seed(0), 4000
    before = torch.get_rng_state()
    drawn = [loss_weights("switch", 0.2, generator) for _ in range(n)]
    assert torch.equal(torch.get_rng_state(), before)
    assert set(drawn) == {(0.0, 1.0), (1.0, 0.0)}
    share = drawn.count((0.0, 1.0)) / n
    assert abs(share - 0.2) <= 5 * math.sqrt(0.2 * 0.8 / n)
    again = torch.Generator().manual_seed(0)
    assert drawn[:50] == [loss_weights("switch", 0.2, again) for _ in range(50)]
    assert loss_weights("switch", 0.0, again) == (1.0, 0.0)
    assert loss_weights("switch", 1.0, again) == (0.0, 1.0)
    with pytest.raises(ValueError, match="mode must be one of .*, not 'swich'; did you mean"):
        loss_weights("swich", 0.2)
    with pytest.raises(ValueError, match="generator must be given for the mode 'switch'"):
        loss_weights("switch", 0.2)


@pytest.mark.parametrize("value", [0.25, NAN, INF, -INF])
def test_records_survive_json(value: float) -> None:
    record = Record(1, 2, 3, value, -value)
    again = Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert repr(again) == repr(record)


def test_records_of_another_strategy_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stage_0.1.1 stands where it does stage_0.1.0"):
        after(Curriculum(), (0, 0, 0, 0.0, -1.0), (0, 1, 1, 0.0, -1.0))
    rows = [(0, 0, 0, 0.0, -1.0), (0, 1, 0, 0.0, -1.0)]
    with pytest.raises(ValueError, match="must end with the last period, not go on with stage_0.1"):
        after(Repeat(num_periods=1), *rows)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Curriculum(num_stages=0), "num_stages must be 1 or more, not 0"),
        (lambda: Curriculum(num_chances=0), "num_chances must be 1 or more, not 0"),
        (lambda: Curriculum(windows=()), "windows must be a number, or one or more, not none"),
        (lambda: Curriculum(windows=(1, 0)), "windows must be 1 or more, not 0"),
        (lambda: Curriculum(warmup_lr=NAN), "warmup_lr must be 0 or more and finite, not nan"),
        (lambda: Curriculum(imitation_weight=-0.1), "imitation_weight must be 0 or more"),
        (lambda: Curriculum(imitation_weight="il_mor"), "not 'il_mor'; did you mean 'il_more'"),
        (lambda: Curriculum(max_repeat=-1), "max_repeat must be 0 or more, not -1"),
        (lambda: Repeat(num_periods=0), "num_periods must be 1 or more, not 0"),
        (lambda: Repeat(unroll=0), "unroll must be 1 or more, not 0"),
        (
            lambda: Repeat(repeat_threshold=NAN),
            "repeat_threshold must be 0 or more and finite, not nan",
        ),
    ],
)
def test_settings_that_cannot_be_run_are_named(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


def test_recipes_may_hold_lists_and_tables() -> None:
    validation = {
        **{"unroll": 7, "windows": 1, "episodes": 1},
        **{"warmup_windows": 0, "warmup_lr": 0.0},
    }
    from_lists = Repeat(windows=[1, 2], validation=validation)  # type: ignore[arg-type]
    assert from_lists == Repeat(windows=(1, 2), validation=UnrollSettings(7, 1, 1, 0, 0.0))
