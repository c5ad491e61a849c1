"""What all uploads to the Hugging Face Hub have in common: a repository to write to, and refusals in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi

from ...errors import DpoCacheError, first_line

MAIN_BRANCH = "main"
LOGGED_IN = "to be logged in to the Hub with a token that may write there"


def make_writable(api: HfApi, repo_id: str, *, repo_type: str, private: bool, branch: str) -> None:
    """Make repository and branch where they are missing, and ask whether they may be written to.

    Args:
        api: The client.
        repo_id: ``owner/name``.
        repo_type: ``model`` or ``dataset``.
        private: Of a repository that has to be made.
        branch: Of the repository.

    Raises:
        Exception: Whatever the client raises; for :func:`refusals_explained`.
    """
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    api.auth_check(repo_id, repo_type=repo_type, write=True)
    if branch != MAIN_BRANCH:
        api.create_branch(repo_id, repo_type=repo_type, branch=branch, exist_ok=True)


@contextmanager
def refusals_explained(
    what_failed: str, *, expected: str | None = None, next_step: str | None = None
) -> Iterator[None]:
    """Turn a refusal of the Hub into a fault of ours.

    Raises:
        DpoCacheError: Says what failed, and in one line why.
    """
    try:
        yield
    except Exception as error:  # the client raises a dozen kinds of errors, of its own and of its HTTP library
        raise DpoCacheError(f"{what_failed}: {first_line(error)}", expected=expected, next_step=next_step) from error
