"""Background uploads of checkpoints to the Hub, which never delay or stop training."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future, wait
from pathlib import Path

from huggingface_hub import HfApi

from ..hub import hub_retries
from .training_state import STATE_FOLDER


logger = logging.getLogger(__name__)

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


class HubUpload:
    """Upload checkpoints one after the other in the thread of `HfApi.run_as_future`.

    A repository that does not exist is created as a private one. `training_state/` is left out, because it names
    folders and files of this machine. Until an upload ends, `staging`, a folder on the same disk as the checkpoints,
    holds hard links to its files, so that the checkpoint can be pruned.
    """

    def __init__(self, repo_id: str, staging: Path):
        self.repo_id, self.staging = repo_id, staging
        self._unlinked = 0  # checkpoints that could not be linked
        self._api = HfApi()
        self._uploads: list[Future[None]] = []
        shutil.rmtree(staging, ignore_errors=True)

    @property
    def failed(self) -> int:
        """Number of checkpoints that could not be uploaded."""
        ended = [upload for upload in self._uploads if upload.done() and not upload.cancelled()]
        return self._unlinked + sum(upload.exception() is not None for upload in ended)

    def submit(self, checkpoint: Path, message: str) -> None:
        """Schedule the upload of a checkpoint. It replaces an older one that is still waiting."""
        if self._uploads and self._uploads[-1].cancel():  # a running upload cannot be cancelled
            shutil.rmtree(self._links(len(self._uploads) - 1), ignore_errors=True)
        links = self._links(len(self._uploads))
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            shutil.copytree(checkpoint, links, copy_function=link_or_copy, ignore=shutil.ignore_patterns(STATE_FOLDER))
        except OSError as error:
            logger.warning("%s is not uploaded: %s", message, error)
            self._unlinked += 1
            shutil.rmtree(links, ignore_errors=True)
            return
        self._uploads.append(self._api.run_as_future(self._upload, links, message))

    def close(self) -> None:
        """Wait for the running and the waiting upload."""
        wait(self._uploads)
        shutil.rmtree(self.staging, ignore_errors=True)
        if self.failed:
            logger.warning("%d checkpoints were not uploaded to %s", self.failed, self.repo_id)

    def _links(self, upload: int) -> Path:
        return self.staging / f"{upload:06d}"

    def _upload(self, folder: Path, message: str) -> None:
        try:
            for attempt in hub_retries(f"upload to {self.repo_id}"):
                with attempt:
                    self._api.create_repo(self.repo_id, private=True, exist_ok=True)
                    self._api.upload_folder(
                        repo_id=self.repo_id,
                        folder_path=folder,
                        commit_message=message,
                        delete_patterns=WEIGHTS,  # weights of another objective would look like part of this checkpoint
                    )
        except Exception as error:
            logger.warning("%s is not uploaded to %s: %s", message, self.repo_id, error)
            raise
        finally:  # a callback of the future could still run after `close` and remove the folder of a later upload
            shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
