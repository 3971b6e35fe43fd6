"""Policies on the Hugging Face hub: pushed with a model card, and found by ``hf://OWNER/NAME``.

The client is huggingface_hub, which comes with the extra ``hub``; tokens and caches are its own
business.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amalgam.extras import import_extra

if TYPE_CHECKING:
    from amalgam.policies import Policy

SCHEME = "hf://"
FILE = "student.safetensors"
CARD = "README.md"
_ADDRESS = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")


def fetch(address: str) -> Path:
    """Download a file from the hub, unless its cache has it.

    What it holds is not looked at: whoever reads it checks it as any other file.

    Args:
        address: ``"hf://OWNER/NAME"`` for the repository's ``student.safetensors``. ``@REVISION``
            after it is a branch, a tag or a commit, and ``/PATH`` after that another file.

    Returns:
        The file's place in the cache of huggingface_hub.

    Raises:
        FileNotFoundError: The hub or the file can't be reached.
        MissingExtra: huggingface_hub is not installed.
        ValueError: ``address`` is none.
    """
    parts = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if not address.startswith(SCHEME) or parts is None:
        raise ValueError(
            f"a student on the hub must be given as hf://OWNER/NAME[@REVISION][/FILE], "
            f"not {address!r}"
        )
    hub = _hub(f"{address!r}")
    try:
        found = hub.hf_hub_download(
            parts["repo"], parts["file"] or FILE, revision=parts["revision"], library_name="amalgam"
        )
    except (OSError, hub.errors.EntryNotFoundError, hub.errors.HTTPError) as error:
        raise FileNotFoundError(f"{address!r} can't be fetched: {error}") from error
    return Path(found)


def push(policy: Policy, repo: str, *, private: bool = False) -> str:
    """Upload a policy to the hub, as one commit.

    A repository that is missing is made. Its ``student.safetensors`` is replaced, and stays in its
    history; a model card is written where there is none.

    Args:
        policy: The policy.
        repo: The repository, ``"OWNER/NAME"``.
        private: Whether a repository that is made is private. One that is there stays as it is.

    Returns:
        The commit's address on the web.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        OSError: The hub can't be reached, or refuses; nothing is uploaded then.
        ValueError: ``repo`` is no name of a repository.
    """
    if not re.fullmatch(r"[^/@]+/[^/@]+", repo):
        raise ValueError(f"repo must be the name of a repository, OWNER/NAME, not {repo!r}")
    hub = _hub(f"a push to {repo!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        policy.save(path)
        files = {FILE: path.read_bytes()}
    try:
        api = hub.HfApi(library_name="amalgam")
        api.create_repo(repo, private=private, exist_ok=True)
        if not api.file_exists(repo, CARD):
            files[CARD] = card(policy, repo).encode()
        commit = api.create_commit(
            repo,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"Upload an amalgam {policy.kind}",
        )
    except (OSError, hub.errors.HTTPError) as error:
        raise OSError(f"the policy can't be pushed to {repo!r}: {error}") from error
    return str(commit.commit_url)


def card(policy: Policy, repo: str) -> str:
    """The text of a policy's model card: what it is, how to use it, where it comes from.

    Args:
        policy: The policy.
        repo: The repository that it will be in, ``"OWNER/NAME"``.
    """
    from amalgam.policies import FusedStudent

    told, description = policy.provenance, policy.description
    fused = isinstance(policy, FusedStudent)
    made, argument = ("AmalgamatedOptimizer", "student") if fused else ("PolicyOptimizer", "policy")
    facts = {
        "kind": policy.kind,
        "configuration": policy.config,
        "recipe": told.get("recipe"),
        "teachers": ", ".join(map(str, told.get("teachers", ()))),
        "data": told.get("data"),
        "meta-steps": told.get("meta_steps"),
        "weights of meta-step": told.get("kept_meta_step"),
        "seed": told.get("seed"),
        "amalgam": " ".join(str(told[key]) for key in ("amalgam_version", "commit") if key in told),
    }
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    rows = [f"| {name} | {_cell(value)} |" for name, value in known.items()]
    return "\n".join(
        [
            *("---", "library_name: amalgam", "tags:", "- learned-optimizer", "---", ""),
            *(f"# {repo.split('/')[1]}", ""),
            *([description, ""] if description else []),
            "A learned optimizer for PyTorch, meta-trained by amalgam.",
            *("", "```python", f"from amalgam import {made}", ""),
            f'optimizer = {made}(model.parameters(), {argument}="{SCHEME}{repo}")',
            *("```", ""),
            *("| where it comes from | |", "|---|---|", *rows, ""),
        ]
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")


def _hub(what: str) -> Any:
    """The module ``huggingface_hub``, its errors with it."""
    hub = import_extra("huggingface_hub", "hub", what)
    import_extra("huggingface_hub.errors", "hub", what)
    return hub
