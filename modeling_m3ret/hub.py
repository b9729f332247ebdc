"""Cache folder, retry policy and checkpoint loading, shared by all uses of the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from .configuration_m3ret import M3RetConfig
from .convert import convert_vit, is_convertible
from .encoder_files import OPEN_CLIP
from .errors import InputError
from .image_processing_m3ret import M3RetImageProcessor
from .modeling_m3ret import M3RetModel


if TYPE_CHECKING:
    from tenacity import RetryCallState, Retrying

logger = logging.getLogger(__name__)

CACHE_FOLDER = Path(HF_HOME) / "m3ret"  # phantoms, embeddings, galleries, and this machine's secrets
ATTEMPTS = 5
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, AttributeError, RuntimeError),  # of transformers and torch
    *(SafetensorError, StrictDataclassError),
)
FIRST_WAIT_SECONDS = 2.0  # doubled after each attempt: 30 s in all, longer than most gateway outages


def hub_retries(action: str) -> Retrying:
    """Return a retry policy for a network action: call it with a function, or iterate over its attempts.

    It makes `ATTEMPTS` attempts with exponential backoff, logs each failure, and re-raises the last exception.

    Args:
        action: what is attempted, for the log: "upload to ORG/NAME". Must not contain a path of this machine.

    Example:
        hub_retries("upload to org/name")(api.upload_folder, repo_id="org/name", folder_path=folder)
    """

    from tenacity import Retrying, stop_after_attempt, wait_exponential  # training without the Hub needs none

    def log_failure(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s failed (attempt %d of %d): %s", action, state.attempt_number, ATTEMPTS, error)

    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_SECONDS),
        before_sleep=log_failure,
        reraise=True,
    )


def load_pretrained(name: str | Path) -> tuple[M3RetModel, M3RetImageProcessor]:
    """Load an encoder in evaluation mode, and its image processor.

    Args:
        name: checkpoint folder or `ORG/NAME[@REVISION]` on the Hub; also of a 2D vision transformer, which is converted
            in memory.

    Raises:
        InputError: if there is no such checkpoint, it holds another kind of model, or weights that are missing, of
            other shapes or not finite.
    """
    name = str(name)
    kinds = "an M3Ret checkpoint or a 2D vision transformer (docs/start-from-a-vit.md)"
    problem = f"cannot load a model: expected a folder or Hub id of {kinds}, got {shorten(name, 200)!r}."
    try:
        is_folder = Path(name).is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder and name.count("/") != 1:  # not ORG/NAME: a missing folder, no need to ask the Hub
        raise InputError(f"{problem} The folder does not exist.")
    if name.startswith(OPEN_CLIP) or is_convertible(name):
        return convert_vit(name)
    repository, _, revision = (name, "", "") if is_folder else name.partition("@")
    version: dict[str, Any] = {"revision": revision or None}
    try:
        # without trust_remote_code=False, transformers asks on the terminal whether to run the code of a checkpoint
        model_type = AutoConfig.from_pretrained(repository, trust_remote_code=False, **version).model_type
        if model_type != M3RetConfig.model_type:
            raise ValueError(f"Its model type is {model_type!r}.")
        with_info: Any = M3RetModel.from_pretrained(repository, output_loading_info=True, **version)
        processor = M3RetImageProcessor.from_pretrained(repository, **version)
    except LOADING_ERRORS as error:
        lines = (
            str(error).strip().splitlines()[:2]
        )  # the second one says what to do about a gated or private repository
        reason = shorten(" ".join(lines), 400) or type(error).__name__
        raise InputError(f"{problem} {reason}") from error
    model, loaded = with_info
    if missing := sorted(loaded["missing_keys"]):  # transformers would initialise them at random
        raise InputError(f"{problem} Its weights lack {len(missing)} tensors, the first is {missing[0]}.")
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"{problem} Its weights hold values that are not finite, in {key}.")
    return cast(M3RetModel, model.eval()), processor
