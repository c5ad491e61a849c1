"""``python -m dpo_cache build|info|…|train``: how the stages start their own processes."""

from .cli import dpo_cache, dpo_train
from .stages.processes.child_processes import die_with_parent


def main(arguments: list[str] | None = None) -> None:
    """Run a command; without arguments, those of this process."""
    die_with_parent()
    dpo_cache.add_command(dpo_train, "train")
    dpo_cache(arguments, prog_name="dpo-cache")


if __name__ == "__main__":  # a spawned tokenizing process imports this file too
    main()
