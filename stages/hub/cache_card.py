"""The README of a shared cache: what it is of, what it holds, how it is read. No paths of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import RepoCard

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.data.printable_text import one_line
from ..addresses.location import hub_address
from .public_name import public_name
from .recorded_reference import RecordedReference

BEGIN, END = "<!-- dpo-cache push writes from here -->", "<!-- to here; what you write outside stays -->"
TAGS = ("dpo", "preference", "dpo-cache")
LICENCE_NOTE = """\
## Licence

None is stated here yet, and dpo-cache cannot know it. The rows hold the token ids of the datasets above, which is
their text: their licences apply, and perhaps that of the reference. State the result as `license:` in this file's
header and here; uploading again keeps both."""


def cache_card(
    repo_id: str, cache: ReferenceCache, mixtures: Sequence[Mixture], *, branch: str | None, previous: str | None
) -> str:
    """The card as Markdown, with the header from which the Hub's viewer and ``load_dataset`` know the files.

    Args:
        repo_id: The repository.
        cache: The cache.
        mixtures: All mixtures of the repository, those of earlier uploads included.
        branch: Where in it; None for the main one.
        previous: The card that is there; what people wrote into it, such as the licence, stays.
    """
    written = f"{BEGIN}\n\n{_written(repo_id, cache, mixtures, branch)}\n\n{END}"
    header: dict[str, Any] = {}
    body = f"\n# {repo_id.rpartition('/')[2]}\n\n{written}\n\n{LICENCE_NOTE}\n"
    if previous is not None:
        card = RepoCard(previous, ignore_metadata_errors=True)
        header = card.data.to_dict()  # type: ignore[no-untyped-call]
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        body = f"{before}{written}{after}" if begin and end else f"{card.text.rstrip()}\n\n{written}\n"
    header["tags"] = list(dict.fromkeys([*(header.get("tags") or []), *TAGS]))
    header["configs"] = _configs(mixtures)
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{body}"


def _configs(mixtures: Sequence[Mixture]) -> list[dict[str, Any]]:
    """``pairs`` are the rows of all shards; each mixture's table is a dataset of its own."""

    def config(name: str, path: str, **more: Any) -> dict[str, Any]:
        return {"config_name": name, **more, "data_files": [{"split": "train", "path": path}]}

    return [
        config("pairs", "shards/*.parquet", default=True),
        *(config(f"mixture-{mixture.name}", f"mixtures/{mixture.table.path.name}") for mixture in mixtures),
    ]


def _written(repo_id: str, cache: ReferenceCache, mixtures: Sequence[Mixture], branch: str | None) -> str:
    identity, recorded = cache.identity, RecordedReference.of(cache.recorded)
    reference = public_name(recorded.name)
    commit = f" at commit `{recorded.commit}`" if recorded.commit else ""
    address, first = hub_address(repo_id, branch), mixtures[0]
    pulled = f"{repo_id} my-cache" + (f" --revision {branch}" if branch else "")
    loaded = f'"{repo_id}", "pairs", split="train"' + (f', revision="{branch}"' if branch else "")
    lines = [
        f"Preference pairs with the log-probabilities that **{reference}**{commit} gives both responses, scored "
        "once with dpo-cache: DPO trains from them without loading a reference model.",
        "",
        "## Reference",
        "",
        "| | |",
        "|---|---|",
        f"| model | {reference}{commit} |",
        f"| identity | `{cache.reference_id}` |",
        f"| weights, SHA-256 | `{identity.weights_sha256}` |",
        *([f"| adapter, SHA-256 | `{identity.adapter_sha256}` |"] if identity.adapter_sha256 else []),
        f"| weights in | {identity.weight_dtype} |",
        *([f"| weights quantized to | {identity.quantization} |"] if identity.quantization else []),
        f"| scored in | {identity.compute_dtype}, {identity.attention} attention |",
        "",
        "## Mixtures",
        "",
        "| name | pairs | distinct | tokens | longest | mask | not used | digest |",
        "|---|---|---|---|---|---|---|---|",
        *map(_mixture_line, mixtures),
        "",
        "Made from:",
        "",
        *(line for mixture in mixtures for line in _source_lines(mixture)),
        "",
        "## Train from it",
        "",
        "```bash",
        f"dpo-train --cache {address} --mixture {first.name} --output runs/first",
        "",
        f"dpo-cache pull {pulled}    # or copy it first; every digest is checked",
        "dpo-train --cache my-cache --output runs/first",
        "```",
        "",
        "## Read it without dpo-cache",
        "",
        "`shards/` holds a scored pair a row (token ids, summed log-probabilities in nats, numbers of scored "
        "tokens), `mixtures/` the training sets in order.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f"pairs = load_dataset({loaded})",
        "```",
        "",
        f"The training pairs of `{first.name}` in their order, in DuckDB:",
        "",
        "```sql",
        "SELECT m.*, s.* EXCLUDE (example_key)",
        f"FROM read_parquet('{address}/mixtures/{first.table.path.name}') m",
        f"JOIN (SELECT DISTINCT ON (example_key) * FROM read_parquet('{address}/shards/*.parquet', filename=true)",
        "      ORDER BY example_key, filename) s USING (example_key)",
        "ORDER BY m.repeat, m.prompt_hash, m.example_key",
        "```",
    ]
    return "\n".join(map(one_line, lines))  # most of them quote a cache that anybody may have made


def _mixture_line(mixture: Mixture) -> str:
    settings = mixture.settings
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in mixture.dropped.items()) or "none"
    cells = [
        mixture.name,
        f"{mixture.num_pairs:,}",
        f"{mixture.num_distinct_pairs:,}",
        f"{sum(mixture.num_ids.values()):,}",
        f"{settings.get('max_seq_length', '?')}, {settings.get('truncation', '?')}",
        settings.get("mask", "?"),
        dropped,
        f"`{mixture.digest}`",
    ]
    return f"| {' | '.join(_in_cell(cell) for cell in cells)} |"


def _source_lines(mixture: Mixture) -> list[str]:
    lines = []
    for source in mixture.sources:
        name = public_name(str(source.get("path")))
        details = [f"{part} {source[part]}" for part in ("config", "split", "revision") if source.get(part)]
        rows = source.get("picked_rows")
        details += [f"{rows:,} rows"] if isinstance(rows, int) else []
        lines.append(f"- {mixture.name}: {_in_cell(name)} ({', '.join(details) or 'no details'})")
    return lines


def _in_cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
