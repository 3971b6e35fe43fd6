"""Recipes: what can't be run is refused before it runs, by the key's name."""

import json
import tomllib
from dataclasses import replace

import pytest

from amalgam import recipes
from amalgam.meta import (
    Curriculum,
    MetaBatch,
    PersistentEvolution,
    Repeat,
    Stages,
    Training,
    Truncation,
)
from amalgam.meta.curriculum import choice_strategy, simple
from amalgam.meta.perturbation import FGSM, PGD, AdaptivePGD, Gaussian
from amalgam.policies import (
    POLICIES,
    ChoiceConfig,
    PolicyTeacher,
    ScaleHierarchicalConfig,
    Student,
    Teacher,
    TorchTeacher,
)
from amalgam.recipes import RecipeError

MINIMAL = """
[task]
name = "digits-mlp"
[[teachers]]
kind = "adam"
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_load(name) -> None:
    recipe = recipes.load(name)
    assert recipe.description
    assert recipes.from_dict(recipe.as_dict()) == recipe


def test_the_papers_own_size() -> None:
    """Its network, windows, stages and warm-up, as the authors' code has them."""
    recipe = recipes.load("min-max-small-paper")
    small = recipes.load("min-max-small")
    assert recipe.tasks[0].task.layout.numel == 18_122
    assert recipe.tasks[0].batch_size == 128
    assert recipe.teachers == small.teachers
    assert recipe.amalgamation == small.amalgamation
    assert recipe.policy.settings == replace(small.policy.settings, warmup_steps=100)
    assert recipe.training == Training(validation_data="train")
    assert recipe.strategy.settings == Curriculum(imitation_weight="il_more")


def test_defaults_and_overrides(minimal) -> None:
    recipe = recipes.load(
        minimal,
        [
            "strategy.kind=stages",
            "strategy.unroll=7",
            "teachers.0.lr=0.01",
            "amalgamation.mechanism=mean",
            "strategy.stages=[{episodes=2, windows=3}]",
            "evaluation.tasks=['digits-cnn']",
        ],
    )
    assert recipe.strategy.settings.unroll == 7
    assert recipe.teachers[0].lr == 0.01
    assert recipe.amalgamation.mechanism == "mean"
    assert [(s.episodes, s.windows) for s in recipe.strategy.settings.stages] == [(2, 3)]
    assert recipe.evaluation.tasks == ("digits-cnn",)
    assert json.loads(json.dumps(recipe.as_dict())) == recipe.as_dict()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.optimizes=3", "'training.optimizes'; the nearest is 'training.optimizees'"),
        ("unroll=3", "there is no key 'unroll'"),
        ("strategy.unrol=3", "'strategy.unrol'; the nearest is 'strategy.unroll'"),
        ("strategy.stages.0.windowz=2", "stages.0.windowz'; the nearest is .*stages.0.windows'"),
        ("strategy.unroll=0", "strategy: unroll must be 1 or more, not 0"),
        ("strategy.stages.0.windows=0", "strategy.stages.0: windows must be 1 or more, not 0"),
        ("strategy.unroll='3'", "strategy.unroll: .*valid integer, not '3'"),
        ("strategy.unroll=3.5", "strategy.unroll: .*valid integer, not 3.5"),
        ("strategy.unroll=true", "strategy.unroll"),
        ("training.optimizees=0", "training: optimizees must be 1 or more, not 0"),
        ("training.optimizees='3'", "training.optimizees: .*valid integer, not '3'"),
        ("amalgamation.second_order=1", "amalgamation.second_order: .*boolean, not 1"),
        ("amalgamation.mechanism=max", "amalgamation.mechanism: .*'mean' or 'min-max', not 'max'"),
        ("amalgamation.backend=gpu", "backend must be one of"),
        ("teachers.0.kind=adma", "teachers.0: kind must be one of .* not 'adma'"),
        ("teachers.3.kind=adam", "'3' must be an index below 1"),
        ("teachers.0.beta2=1.0", r"beta2 must be in \[0, 1\), not 1.0"),
        ("student.hidden=0", "hidden must be 1 or more"),
        ("task.name=digits", "did you mean"),
        ("task.batch_size=9999", "batch_size must be between 1 and the 1437"),
        ("evaluation.seeds=0", "seeds must be 1 or more"),
        ("strategy.stages=[]", "strategy: stages must hold at least one stage"),
        ("tasks=[]", "task and tasks can't both be given"),
        ("stages=[]", r"no key 'stages' any more; write \[strategy\] with kind = \"stages\", and"),
        ("stages.0.episodes=3", "no key 'stages' any more"),
        ("training.unroll=3", "no key 'training.unroll' any more; it is strategy.unroll now"),
        ("task.name.x=1", "which has no keys"),
        ("threads=0", "threads must be 1 or more"),
        ("device=gpu", "device must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', not 'gpu'"),
        ("device='cuda:99'", "device must be one of 'auto', 'cpu'.*, not 'cuda:99': PyTorch sees"),
        ("device=0", "device: .*valid string, not 0"),
        ("training", "key=value"),
        ("=3", "key=value"),
        ("student=digits", r"student must be a table, \[student\], .*, not 'digits'"),
        ("student=[{hidden=3}]", r"student must be a table, .*, not \[{'hidden': 3}\]"),
        ("teachers=adam", "teachers: .*list, not 'adam'"),
        ("tasks=3", "task and tasks can't both be given"),
        ("evaluation=[]", "evaluation: .* a table"),
        ("evaluation.tasks=[3]", "evaluation.tasks.0: .*string, not 3; .* a table, not 3"),
        ("conditions=x", "conditions: .* a table, not 'x'"),
        ("memory.budget=1e400GB", "budget must read as in '4GiB'"),
        ("training.meta_lr=inf", "training: meta_lr must be positive and finite, not inf"),
        ("strategy.stages.0.imitation_weight=inf", "imitation_weight must be 0 or more and finite"),
        ("teachers.0.eps=nan", "teachers.0: eps must be positive and finite, not nan"),
        ("conditions.weight_decay=[1e-4,inf]", "weight_decay must be positive and finite, not inf"),
        ("policy={kind='choice',teachers=[{kind='adam',lrr=1}]}", "'policy.teachers.0.lrr'; the"),
    ],
)
def test_bad_keys_are_named(minimal, override, named) -> None:
    if override.startswith("strategy"):
        stages = '[strategy]\nkind = "stages"\n[[strategy.stages]]\nepisodes = 1\n'
        minimal.write_text(MINIMAL + stages)
    with pytest.raises(RecipeError, match=named):
        recipes.load(minimal, [override])


KINDS = """
[[tasks]]
name = "digits-mlp"
[[tasks]]
name = "digits-cnn"
batch_size = 32
weight = 0.5
[[teachers]]
kind = "adam"
lr = 0.01
[[teachers]]
kind = "torch.optim.Muon"
arguments = { lr = 0.02 }
others = { kind = "torch.optim.AdamW", arguments = { lr = 0.01, betas = [0.9, 0.99] } }
[[teachers]]
kind = "policy"
file = "digits"
[policy]
kind = "scale-hierarchical"
param_units = 5
[strategy]
kind = "simple"
unroll = 7
windows = [1, 2]
imitation_weight = "il_more"
[estimator]
kind = "pes"
pairs = 3
[memory]
budget = "1GiB"
[perturbation]
kind = "gaussian_rel"
std = 2e-3
"""


@pytest.fixture
def kinds(tmp_path):
    path = tmp_path / "kinds.toml"
    path.write_text(KINDS)
    return path


def test_tables_of_a_kind(kinds) -> None:
    recipe = recipes.load(kinds)
    assert [(task.name, task.weight) for task in recipe.tasks] == [
        ("digits-mlp", 1.0),
        ("digits-cnn", 0.5),
    ]
    adam, muon, student = recipe.pool.teachers
    assert adam == Teacher("adam", 0.01)
    others = ("torch.optim.AdamW", {"lr": 0.01, "betas": (0.9, 0.99)})
    assert muon == TorchTeacher("torch.optim.Muon", {"lr": 0.02}, others=others)
    assert student == PolicyTeacher(Student.load("digits"))
    assert recipe.policy.settings == ScaleHierarchicalConfig(param_units=5)
    assert recipe.strategy.settings == simple(
        unroll=7, windows=(1, 2), imitation_weight=(0.2, 0.1, 0.05, 0.02)
    )
    assert recipe.perturbation.settings == Gaussian(2e-3, relative=True)
    assert recipe.estimator.settings == PersistentEvolution(pairs=3)
    assert recipe.memory.budget == "1GiB"
    assert recipes.from_dict(recipe.as_dict()) == recipe


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_has_a_name(kind, minimal) -> None:
    recipe = recipes.load(minimal, [f"policy.kind={kind}", "policy.warmup_steps=7"])
    policy = POLICIES[kind]
    assert recipe.policy.settings == policy.config_type(warmup_steps=7)
    assert recipes.from_dict(recipe.as_dict()) == recipe
    with pytest.raises(RecipeError, match=r"'policy.warmup_stepz'; the nearest is .*warmup_steps'"):
        recipes.load(minimal, [f"policy.kind={kind}", "policy.warmup_stepz=7"])


def test_a_strategy_that_is_none_is_stages_and_a_table_has_a_kind(minimal) -> None:
    """No table without a kind: it was a curriculum once, and stages have the same keys."""
    recipe = recipes.load(minimal)
    assert recipe.strategy.settings == Stages()
    assert recipe.estimator.settings == Truncation()
    assert recipe.as_dict()["strategy"]["unroll"] == 100
    with pytest.raises(RecipeError, match=r"strategy: kind is missing; it must be .*'stages', 'cu"):
        recipes.load(minimal, ["strategy.unroll=7"])


@pytest.mark.parametrize(
    "kind", ["stages", "curriculum", "repeat", "meta-batch", "simple", "choice"]
)
def test_every_strategy_has_a_name(kind, minimal) -> None:
    recipe = recipes.load(minimal, [f"strategy.kind={kind}"])
    made = {
        "stages": Stages(),
        "curriculum": Curriculum(),
        "repeat": Repeat(),
        "meta-batch": MetaBatch(),
        "simple": simple(),
        "choice": choice_strategy(),
    }
    assert recipe.strategy.settings == made[kind]
    assert recipes.from_dict(recipe.as_dict()) == recipe


PRESETS = [
    ({"kind": "gaussian", "std": 1e-3}, Gaussian(1e-3)),
    ({"kind": "gaussian_rel", "std": 5e-4}, Gaussian(5e-4, relative=True)),
    ({"kind": "fgsm", "step_size": 1e-3}, FGSM(1e-3)),
    (
        {"kind": "pgd", "steps": 1, "magnitude": 1e-4, "norm": "inf", "lr": 0.1},
        PGD(1, 1e-4, "inf", 0.1),
    ),
    ({"kind": "cgd", "steps": 1, "magnitude": 1e-3}, AdaptivePGD(1, 1e-3, normalise=False)),
]


@pytest.mark.parametrize(("table", "made"), PRESETS, ids=[table["kind"] for table, _ in PRESETS])
def test_every_preset_of_the_authors_perturbations_is_a_table(table, made, minimal) -> None:
    content = tomllib.loads(minimal.read_text()) | {"perturbation": table}
    recipe = recipes.from_dict(content)
    assert recipe.perturbation.settings == made
    assert recipes.from_dict(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("policy.kind=scale-hier", "policy: kind must be .*; did you mean 'scale-hierarchical'"),
        ("policy.kind=rnnprop_ext", "policy: kind 'rnnprop_ext' is now called 'rnnprop-ext'"),
        ("policy.kind=adam_lr", "policy: kind 'adam_lr' is now called 'adam-lr'"),
        ("policy.kind=rmsprop_lr", "policy: kind 'rmsprop_lr' is now called 'rmsprop-lr'"),
        ("policy.kind=scale", "policy: kind 'scale' is now called 'scale-hierarchical'"),
        ("policy.hidden=3", "'policy.hidden'; the nearest is"),
        ("policy.param_units='5'", "policy.param_units: .*valid integer, not '5'"),
        ("policy.param_units=0", "policy: param_units must be 1 or more, not 0"),
        ("policy=3", "policy must be a table, not 3"),
        ("policy.kind=..", r"policy must be a class .*, not '\.\.' \(that is no dotted path\)"),
        ("policy.kind={a=1}", "policy: kind must be one of .*, not {'a': 1}"),
        ("teachers.1.kind=torch..optim", r"not 'torch\.\.optim' \(that is no dotted path\)"),
        ("teachers.1.arguments=3", "teachers.1.arguments: .* a table, not 3"),
        ("teachers.1.arguments={lr=inf}", "teachers.1: arguments.lr must be finite, not inf"),
        ("teachers.1.arguments={lr=[[1]]}", "arguments.lr must be a number, a word or a list of"),
        ("teachers.1.others={kind=3}", "others.kind must be a dotted path .*, not 3"),
        ("teachers.1.others.arguments=3", "others.arguments must be a table, not 3"),
        ("student.hidden=3", "student and policy can't both be given"),
        ("strategy.kind=curriculun", "did you mean 'curriculum'"),
        ("strategy.repeat_threshold=1.0", "no key 'strategy.repeat_threshold'"),
        ("strategy.unrol=1", "'strategy.unrol'; the nearest is 'strategy.unroll'"),
        ("strategy.unroll=0", "strategy: unroll must be 1 or more"),
        ("strategy.imitation_weight=il_mor", "did you mean 'il_more'"),
        ("strategy.validation.unrol=3", "no key 'strategy.validation.unrol'"),
        ("strategy.stages=[{episodes=1}]", "no key 'strategy.stages'"),
        ("strategy.kind=stagez", "strategy: kind must be .*; did you mean 'stages'"),
        ("strategy.kind=[3]", r"strategy: kind must be one of .*, not \[3\]"),
        ("replicates=2", "replicates must be 1 with a strategy that .* as 'simple' does, not 2"),
        ("replicates=0", "replicates must be 1 or more, not 0"),
        ("estimator.kind=es", r"estimator: kind must be one of \['truncation', 'pes'\], not 'es'"),
        ("estimator.kind=truncation", "no key 'estimator.pairs'"),
        ("estimator.std=0.0", "estimator: std must be positive"),
        ("memory.budget=much", "budget must read as in '4GiB'"),
        ("perturbation.kind=gauss", "did you mean 'gaussian'"),
        ("perturbation={}", "perturbation: kind is missing; it must be one of .*'cgd'"),
        ("perturbation={kind='fgsm', step=0.1}", "'perturbation.step'; the nearest is .*step_size"),
        ("perturbation={kind='cgd', normalise=true}", "no key 'perturbation.normalise'"),
        ("perturbation.stdd=1.0", "'perturbation.stdd'; the nearest is 'perturbation.std'"),
        ("perturbation.relative=true", "no key 'perturbation.relative'"),
        ("perturbation.std=x", "perturbation.std: .*valid number, not 'x'"),
        ("tasks.1.weight=0", "weight must be positive and finite, not 0"),
        ("task.name=digits-mlp", "task and tasks can't both be given"),
        ("teachers.1.kind=torch.optim.Muom", "teachers.1: kind must be a class .*'torch.optim.M"),
        ("teachers.1.arguments={lrr=1}", "can't be made"),
        ("teachers.1.others={knd=1}", "others must hold kind and arguments"),
        ("teachers.1.argument={}", "'teachers.1.argument'; the nearest is 'teachers.1.arguments'"),
        ("teachers.2.file=none", "teachers.2: file: 'none' is neither a file nor"),
        ("choice.policy.hidden=4", "teachers must be none beside a choice"),
        ("choice.polcy=4", "'choice.polcy'; the nearest is 'choice.policy'"),
    ],
)
def test_bad_keys_of_kinds_are_named(kinds, override, named) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.load(kinds, [override])


def test_a_choice_comes_instead_of_teachers(tmp_path) -> None:
    path = tmp_path / "choice.toml"
    path.write_text('[task]\nname = "digits-mlp"\n[choice.policy]\nteachers = "large"\n')
    recipe = recipes.load(path, ["choice.strategy.num_periods=2"])
    assert recipe.choice.policy == ChoiceConfig("large")
    assert recipe.choice.strategy.settings == replace(choice_strategy(), num_periods=2)
    assert recipe.pool.teachers == ()
    assert recipes.from_dict(recipe.as_dict()) == recipe
    assert recipes.load(path, ["choice.training.meta_lr=0.5"]).choice.training == Training(
        meta_lr=0.5
    )
    with pytest.raises(RecipeError, match=r"choice.training.unroll' any more; it is choice.strat"):
        recipes.load(path, ["choice.training.unroll=3"])
    with pytest.raises(RecipeError, match=r"'choice.policy.teacher'; the nearest is"):
        recipes.load(path, ["choice.policy.teacher=small"])


def test_missing_keys_are_named(tmp_path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(
        RecipeError, match="task or tasks is missing; teachers or choice is missing"
    ):
        recipes.load(path)


def test_twin_teachers_are_refused(minimal) -> None:
    minimal.write_text(MINIMAL + '[[teachers]]\nkind = "adam"\n')
    with pytest.raises(RecipeError, match="teachers must differ"):
        recipes.load(minimal)
    recipes.load(minimal, ["teachers.1.lr=0.02"])


def test_twin_tasks_to_evaluate_are_refused(minimal) -> None:
    with pytest.raises(RecipeError, match="evaluation.tasks must differ in their names"):
        recipes.load(minimal, ["evaluation.tasks=['digits-mlp', 'digits-mlp']"])


def test_not_toml(tmp_path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe not toml")
    with pytest.raises(RecipeError, match="not a TOML file"):
        recipes.load(path)


def test_unknown_recipe() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'digits'"):
        recipes.load("digit")


def test_a_shipped_name_wins_over_a_file_of_that_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(MINIMAL)
    assert recipes.load("digits").description
    assert not recipes.load("./digits").description
