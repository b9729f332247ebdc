"""Upload a built dataset to the Hub: card, index and shards, and nothing else from its folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from modeling_m3ret.data.parquet import INDEX
from modeling_m3ret.hub import hub_retries


PUBLISHED = ("README.md", INDEX, "data/*.parquet")


def push(folder: Path, repository: str) -> None:
    """Upload a built dataset in one commit; a new repository is private.

    Files that are on the Hub already are not sent again. Shards of an older build that the new one lacks are deleted in
    the same commit.
    """
    api = HfApi()
    for attempt in hub_retries(f"upload to {repository}"):
        with attempt:
            api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=list(PUBLISHED),
                delete_patterns=list(PUBLISHED[1:]),
                commit_message="Build",
            )
