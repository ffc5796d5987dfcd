"""Whether the Hugging Face hub can be asked: one short question before those that are tried again and again."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from geep.folder.files import HubOptions

logger = logging.getLogger(__name__)

# The libraries behind ask six times, with waits in between: 23 seconds until they say that there is no network.
_SECONDS_TO_ANSWER = 5


def reachable(model: str | Path, hub: HubOptions) -> HubOptions:
    """Return the options by which a model is had: of the cache alone, where the hub does not answer in some seconds.

    Args:
        model: Folder or model id; of a folder nothing is asked.
        hub: How the model was to be had.

    Raises:
        FileNotFoundError: If `model` is no folder and cannot be a name on the hub.
        OSError: If the hub does not answer, and the model is not in the cache.
    """
    name = str(model)
    if Path(model).exists():
        return hub
    try:
        cached = try_to_load_from_cache(name, "config.json", cache_dir=hub.cache_dir, revision=hub.revision)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no model folder {name}; make one with `geep train`.") from error
    is_cached = isinstance(cached, str)
    if not is_cached:
        logger.warning("There is no folder %s; asking the Hugging Face hub for a model of that name.", name)
    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        return hub
    try:
        HfApi().model_info(name, revision=hub.revision, token=hub.token, timeout=_SECONDS_TO_ANSWER)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            return hub  # it answers: that there is no such model, or that a token is needed, is said by who loads it
        reason: Exception = error
    except Exception as error:  # the client's library, and with it the kind of its errors, is not the same everywhere
        reason = error
    else:
        return hub
    if is_cached:
        logger.info("The hub does not answer (%s): %s is taken from the cache.", reason, name)
        return replace(hub, local_files_only=True)
    raise OSError(
        f"There is no folder {name}, and the Hugging Face hub does not answer within {_SECONDS_TO_ANSWER} seconds "
        f"({reason}). Check the name of the folder, or the network."
    ) from reason
