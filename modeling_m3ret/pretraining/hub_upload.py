"""Checkpoints to the Hub while training goes on: in a thread, tried again when the network fails, never in the way."""

from __future__ import annotations

import logging
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi

from .training_state import STATE_FOLDER


logger = logging.getLogger(__name__)

ATTEMPTS = 5
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
FIRST_WAIT_SECONDS = 2.0  # doubled after each attempt: half a minute in all, then the next checkpoint has its turn


class HubUpload:
    """Uploads one checkpoint after another to one repository, made private if it does not exist.

    What a run would go on from (`training_state/`) stays here: it names folders and files of this machine.

    Args:
        repository: ORG/NAME. waiting: a folder beside the checkpoints, where those to be uploaded wait, as hard links,
            so that they may be pruned meanwhile.
    """

    def __init__(self, repository: str, waiting: Path):
        self.repository = repository
        self.waiting = waiting
        self.failed = 0
        self._api = HfApi()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-upload")
        self._jobs: list[Future[None]] = []
        shutil.rmtree(waiting, ignore_errors=True)

    def submit(self, checkpoint: Path, message: str) -> None:
        """Upload this whole checkpoint soon; those still waiting give way to it, since it is newer."""
        for job in self._jobs:
            job.cancel()
        links = self.waiting / f"{len(self._jobs):06d}"
        try:
            self.waiting.mkdir(parents=True, exist_ok=True)
            shutil.copytree(checkpoint, links, copy_function=_link, ignore=shutil.ignore_patterns(STATE_FOLDER))
        except (OSError, shutil.Error) as error:
            logger.warning("%s is not uploaded: %s", message, error)
            self.failed += 1
            return
        self._jobs.append(self._thread.submit(self._upload, links, message))

    def close(self) -> None:
        """Wait for what is under way, and remove what waited."""
        self._thread.shutdown(wait=True)
        shutil.rmtree(self.waiting, ignore_errors=True)
        if self.failed:
            logger.warning("%d checkpoints could not be uploaded to %s", self.failed, self.repository)

    def _upload(self, folder: Path, message: str) -> None:
        for attempt in range(ATTEMPTS):
            try:
                self._api.create_repo(self.repository, private=True, exist_ok=True)
                self._api.upload_folder(
                    repo_id=self.repository,
                    folder_path=folder,
                    commit_message=message,
                    delete_patterns=WEIGHTS,  # another objective's decoder or heads would seem to be this one's
                )
                return
            except Exception as error:  # whatever it is, a run of weeks does not end for an upload
                logger.warning("upload to %s failed (attempt %d): %s", self.repository, attempt + 1, error)
                if attempt + 1 < ATTEMPTS:
                    time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
        self.failed += 1


def _link(source: str, target: str) -> None:
    """A second name for the file, or a copy where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
