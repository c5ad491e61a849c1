"""A trained model on the Hugging Face Hub: permission asked before step 1, files sent after everything is saved."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ...errors import first_line
from .hub_access import LOGGED_IN, make_writable, refusals_explained


@dataclass(frozen=True, kw_only=True, slots=True)
class HubTarget:
    """Where on the Hub a model goes.

    Attributes:
        repo_id: ``owner/name``.
        branch: Made where it is missing.
        private: Of a repository that does not exist yet.
    """

    repo_id: str
    branch: str
    private: bool

    def repeat_command(self, folder: Path) -> str:
        """The command that uploads a folder by hand."""
        privacy = "--private" if self.private else "--no-private"
        return shlex.join(["hf", "upload", self.repo_id, str(folder), ".", "--revision", self.branch, privacy])


@dataclass(frozen=True, kw_only=True, slots=True)
class HubUpload:
    """What came of an upload.

    Attributes:
        repo_id, branch: Where to.
        url: Of the commit; None where it failed.
        failure: Why it failed.
        repeat_with: The command that tries again.
    """

    repo_id: str
    branch: str
    url: str | None
    failure: str | None
    repeat_with: str | None

    def summary(self) -> str:
        """One line, or two, for a terminal."""
        if self.failure is None:
            return f"on the Hub: {self.repo_id}, branch {self.branch}: {self.url}"
        return (
            f"the upload to {self.repo_id} failed: {self.failure}\nthe model is whole here; repeat the upload with\n  "
            + str(self.repeat_with)
        )


def prepare_hub_target(repo_id: str | None, *, branch: str, private: bool) -> HubTarget:
    """Make sure that the model may be uploaded: log in, make repository and branch where they are missing.

    Args:
        repo_id: ``owner/name``, or a name alone for the user's own; None for the branch's name.
        branch: Where the files go.
        private: Of a repository that has to be made.

    Raises:
        DpoCacheError: The Hub does not know the user, or does not let them write there.
    """
    api = HfApi()
    with refusals_explained(
        f"--push-to-hub: nothing could be uploaded as {repo_id or branch}",
        expected=LOGGED_IN,
        next_step="run `hf auth login`, check --hub-model-id, or leave --push-to-hub out",
    ):
        user = str(api.whoami()["name"])
        given = repo_id or branch
        target = HubTarget(repo_id=given if "/" in given else f"{user}/{given}", branch=branch, private=private)
        make_writable(api, target.repo_id, repo_type="model", private=private, branch=branch)
    return target


def upload_model(target: HubTarget, folder: Path, *, message: str) -> HubUpload:
    """Upload a folder; the client tries failing requests several times, and goes on where an upload was cut short.

    A failure is reported, never raised: the model is saved and training was a success.
    """
    url = failure = None
    try:
        commit: Any = HfApi().upload_folder(
            repo_id=target.repo_id, folder_path=folder, revision=target.branch, commit_message=message
        )
        url = str(commit.commit_url)
    except Exception as error:  # the client raises a dozen kinds of errors, of its own and of its HTTP library
        failure = first_line(error)
    return HubUpload(
        repo_id=target.repo_id,
        branch=target.branch,
        url=url,
        failure=failure,
        repeat_with=target.repeat_command(folder) if failure else None,
    )
