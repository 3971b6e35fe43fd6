"""Policies are found by their kind, one's own by their class's dotted path, in any process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own import LearnedSign, SignConfig

from amalgam import PolicyOptimizer, Student, weight_files
from amalgam.meta import Amalgamation, Stage, Stages, Trainer, Training
from amalgam.policies import (
    DM,
    POLICIES,
    Policy,
    PolicyTeacher,
    Pool,
    StudentConfig,
    load_policy,
    policy_type,
)
from amalgam.seeding import generator_for
from amalgam.tasks import load


@pytest.fixture
def _registry():
    """Takes out of the registry what a test enters."""
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


def test_every_policy_of_the_package_has_entered_itself() -> None:
    assert set(POLICIES) == {
        "student",
        "choice",
        "dm",
        "rnnprop-ext",
        "nominal",
        "adam-lr",
        "rmsprop-lr",
        "scale-hierarchical",
    }
    for kind, policy in POLICIES.items():
        assert policy.kind == kind
        assert policy_type(kind) is policy


def test_a_dotted_path_leads_to_ones_own() -> None:
    assert LearnedSign.kind == "own.LearnedSign"
    assert policy_type("own.LearnedSign") is LearnedSign
    assert "own.LearnedSign" not in POLICIES
    assert policy_type("amalgam.policies.DM") is DM


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "rnnprop_ext",
            "must be one of .*'student'.*'my.package.MyPolicy', not 'rnnprop_ext'; did ",
        ),
        (
            "no.such.Policy",
            "must be a class that can be imported, such as .*, not 'no.such.Policy'",
        ),
        ("own.NoSuch", "must be a class that can be imported, .* has no attribute 'NoSuch'"),
        ("torch.nn.Linear", "must be an amalgam.policies.Policy, which 'torch.nn.Linear' is not"),
        ("own.torch", "must be an amalgam.policies.Policy, which 'own.torch' is not"),
        ("own.Unfinished", "'own.Unfinished' does not define initial_state, step, warm_up"),
    ],
)
def test_names_that_lead_to_no_policy_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"policy must be.*{why}|policy {why}"):
        policy_type(name)


def test_ones_own_policy_is_trained_saved_and_found_by_another_process(tmp_path: Path) -> None:
    begin = LearnedSign(SignConfig(beta=0.5, warmup_steps=1), generator=generator_for(1))
    before = [weight.detach().clone() for weight in begin.weights()]
    training = Training(validate_every=2, validation_steps=3, validation_seeds=1)
    trained = Trainer(
        begin,
        load("digits-mlp", 16),
        Pool(["adam", PolicyTeacher(begin)]),
        folder=tmp_path,
        amalgamation=Amalgamation(backend="reference"),
        training=training,
        strategy=Stages((Stage(1, 1, 0.1),), unroll=3),
        device="cpu",
    ).run()
    assert not all(map(torch.equal, trained.weights(), before))
    path = tmp_path / "student.safetensors"
    code = (
        "import sys; from amalgam.policies import load_policy; "
        "policy = load_policy(sys.argv[1]); "
        "print(policy.kind, policy.config.beta, policy.weights()[0].item().hex())"
    )
    paths = [str(Path(__file__).parent), *sys.path]
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [
        "own.LearnedSign",
        "0.5",
        trained.weights()[0].item().hex(),
    ]
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    PolicyOptimizer([param], path, warmup_steps=0).step()
    expected = 1 - trained.weights()[0] * torch.tensor(10 * 0.5).tanh()
    assert torch.allclose(param, expected.expand(3))


@pytest.mark.usefixtures("_registry")
def test_a_short_kind_enters_the_registry(tmp_path: Path) -> None:
    class Mine(LearnedSign):
        kind = "mine"

    mine = Mine(generator=generator_for(2))
    mine.save(tmp_path / "mine.safetensors")
    loaded = load_policy(tmp_path / "mine.safetensors")
    assert type(loaded) is Mine
    assert all(map(torch.equal, loaded.weights(), mine.weights()))
    del POLICIES["mine"]
    with pytest.raises(ValueError, match="but is an amalgam mine.* import its module first"):
        load_policy(tmp_path / "mine.safetensors")


@pytest.mark.usefixtures("_registry")
def test_a_kind_belongs_to_one_class() -> None:
    def define() -> type[Policy]:
        class Mine(LearnedSign):
            kind = "mine"

        return Mine

    define()
    again = define()
    assert POLICIES["mine"] is again
    with pytest.raises(
        ValueError, match="kind must be unlike .*'mine', is the kind of .*Mine; cho"
    ):

        class Other(LearnedSign):
            kind = "mine"

    assert POLICIES["mine"] is again


def test_a_subclass_is_not_taken_for_its_base(tmp_path: Path) -> None:
    class Mine(Student):
        pass

    assert Mine.kind.endswith("<locals>.Mine")
    assert POLICIES["student"] is Student
    mine = Mine(StudentConfig(layers=1, hidden=3))
    with pytest.warns(UserWarning, match=r"load_policy can't read .*Mine.load can. Define the cl"):
        mine.save(tmp_path / "mine.safetensors")
    assert all(map(torch.equal, Mine.load(tmp_path / "mine.safetensors").weights(), mine.weights()))
    with pytest.raises(ValueError, match="holds a .*Mine: policy must be a class that can be imp"):
        load_policy(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="must be an amalgam student, but is an amalgam .*Mine"):
        Student.load(tmp_path / "mine.safetensors")


def test_files_whose_class_is_no_policy_are_refused(tmp_path: Path) -> None:
    weight_files.write(tmp_path / "it", "torch.nn.Linear", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="/it' holds a torch.nn.Linear: .*which .* is not"):
        load_policy(tmp_path / "it")
