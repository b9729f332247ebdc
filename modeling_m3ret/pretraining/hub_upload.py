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
            so that they may be pruned meanwhile. Links go when their upload has ended or gave way: they hold the disk.
    """

    def __init__(self, repository: str, waiting: Path):
        self.repository = repository
        self.waiting = waiting
        self.failed = 0
        self._api = HfApi()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-upload")
        self._submitted = 0
        self._newest: tuple[Future[None], Path] | None = None
        shutil.rmtree(waiting, ignore_errors=True)

    def submit(self, checkpoint: Path, message: str) -> None:
        """Upload this whole checkpoint soon; one that still waits gives way to it, since it is newer."""
        if self._newest and self._newest[0].cancel():  # a running one is not cancelled, and needs its links
            shutil.rmtree(self._newest[1], ignore_errors=True)
        links = self.waiting / f"{self._submitted:06d}"
        self._submitted += 1
        try:
            self.waiting.mkdir(parents=True, exist_ok=True)
            shutil.copytree(checkpoint, links, copy_function=_link, ignore=shutil.ignore_patterns(STATE_FOLDER))
        except (OSError, shutil.Error) as error:
            logger.warning("%s is not uploaded: %s", message, error)
            self.failed += 1
            shutil.rmtree(links, ignore_errors=True)
            return
        self._newest = self._thread.submit(self._upload, links, message), links

    def close(self) -> None:
        """Wait for what is under way or waits."""
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
                break
            except Exception as error:  # whatever it is, a run of weeks does not end for an upload
                logger.warning("upload to %s failed (attempt %d): %s", self.repository, attempt + 1, error)
                if attempt + 1 < ATTEMPTS:
                    time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
        else:
            self.failed += 1
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A second name for the file, or a copy where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
