# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a model card come from: a folder, a directory of models, or the Hugging Face Hub."""

import os
from collections.abc import Callable
from pathlib import Path

from starkv.errors import CheckpointError
from starkv.export.safetensors_header import shard_paths

HOME_VARIABLE = "STARKV_MODELS"
"""Environment variable: a directory of checkpoints, each in a folder named after its card or repository."""

FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "tokenization_*.py",
    "LICENSE*",
)
"""What is needed of a repository: weights, configs, tokenizer, chat template and licence."""

_DEFAULT_HOME = Path("checkpoints")

Download = Callable[[str, bool], Path]
"""Fetches a repository: its name, and whether only what is on this machine counts; returns the folder.

Raises whatever it likes where it can't.
"""


def find_checkpoint(
    name: str, repository: str, checkpoint: Path | None = None, download: Download | None = None
) -> Path:
    """Folder with the weights of a card.

    Looks at ``checkpoint`` if it is given. Otherwise in ``$STARKV_MODELS``, in the cache of the Hugging Face
    Hub, and last on the Hub, where an interrupted download is continued. ``HF_HUB_OFFLINE=1`` keeps it away
    from the network.

    Args:
        name: the card's.
        repository: on the Hub.
        checkpoint: the folder itself, or one that holds a folder named after card or repository.
        download: fetches the repository; the Hub by default.

    Raises:
        CheckpointError: there are no weights, with the command that gets them.
    """
    if checkpoint is not None:
        found = _in_directory(checkpoint, name, repository)
        if found is None:
            raise CheckpointError(
                f"{checkpoint} holds no checkpoint of {name}: no config.json, neither in it nor in a folder "
                f"{' or '.join(_folder_names(name, repository))}; {_advice(name, repository)}"
            )
        return found
    home = os.environ.get(HOME_VARIABLE)
    if home and (found := _in_directory(Path(home), name, repository, itself=False)):
        return found
    download = download or from_hub
    if cached := _complete_copy(repository, download):
        return cached
    try:
        return download(repository, False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the library passes on what its HTTP client raises
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"the weights of {name} are not here and {repository} can't be downloaded ({reason}); "
            f"{_advice(name, repository)}"
        ) from None


def _folder_names(name: str, repository: str) -> list[str]:
    return list(dict.fromkeys([name, repository.rpartition("/")[2], repository]))


def _in_directory(directory: Path, name: str, repository: str, itself: bool = True) -> Path | None:
    """The checkpoint that ``directory`` is, or that lies in it under one of its names."""
    candidates = [directory / folder for folder in _folder_names(name, repository)]
    for folder in [directory, *candidates] if itself else candidates:
        if (folder / "config.json").is_file():
            return folder
    return None


def _complete_copy(repository: str, download: Download) -> Path | None:
    """The repository as an earlier download left it on this machine, if nothing of it is missing."""
    try:
        folder = download(repository, True)
    except ModuleNotFoundError:
        raise
    except Exception:  # each version of the library says in its own way that it has no copy
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether no file with weights is missing; a download that broke off leaves such a folder."""
    try:
        shard_paths(folder)
    except CheckpointError:
        return False
    return (folder / "config.json").is_file()


def from_hub(repository: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=list(FILES), local_files_only=offline))


def _advice(name: str, repository: str) -> str:
    home = Path(os.environ.get(HOME_VARIABLE) or _DEFAULT_HOME)
    return (
        f"run `hf download {repository} --local-dir {home / name}` where there is a network and set "
        f"{HOME_VARIABLE}={home}, or measure without weights: `starkv export {name} --random-weights`"
    )
