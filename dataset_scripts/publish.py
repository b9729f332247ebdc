"""A built data set to the Hub: its card, index and shards, and nothing else of the folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from modeling_m3ret.data.parquet import INDEX
from modeling_m3ret.hub import hub_retries


PUBLISHED = ("README.md", INDEX, "data/*.parquet")


def push(folder: Path, repository: str) -> None:
    """Upload, to a private repository if it is new. What was uploaded before an interruption is not sent again; shards
    of an older build that the new one has not go with the same commit."""
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
