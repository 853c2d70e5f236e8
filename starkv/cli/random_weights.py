# SPDX-License-Identifier: Apache-2.0
"""``starkv export --random-weights``: a checkpoint that is made up where the real one would be looked for."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starkv.export.cards import ModelCard
    from starkv.export.progress import Progress

SEED = 0


def card_for_random_weights(model: str) -> "tuple[ModelCard, Path]":
    """Card of a model with random weights, and the ``config.json`` that has its sizes.

    The card has a name of its own, so that an engine built from it is never taken for the real one.

    Raises:
        StarkvError: no such card or folder.
    """
    from starkv.export.cards import FAMILY_PIXELS, card_of_folder, config_of_card, is_folder, load_card

    if is_folder(model):
        card, config = card_of_folder(Path(model), FAMILY_PIXELS), Path(model) / "config.json"
    else:
        card = load_card(model)
        config = config_of_card(card)
    changes = {
        "name": f"{card.name}-random",
        "source": f"random weights, seed {SEED}",
        "folder": "",
        "licence": "none: the weights are random",
        "licence_url": "",
        "research_only": False,
    }
    return card.model_copy(update=changes), config


@contextmanager
def random_checkpoint(
    card: "ModelCard",
    config: Path,
    out: Path,
    keep: Path | None,
    dtype: str | None,
    layers: int | None,
    progress: "Progress",
) -> Iterator[Path]:
    """A folder with random weights.

    Args:
        card: of :func:`card_for_random_weights`.
        config: has the sizes.
        out: of the export; the checkpoint lies beside it while it is needed.
        keep: where to keep the checkpoint instead; one that is there already is used again.
        dtype: of the weights, bf16 by default.
        layers: of the text decoder; all by default.
        progress: told about each tensor.

    Raises:
        StarkvError: see ``write_random_checkpoint``.
    """
    from starkv.export.json_file import read_json_object
    from starkv.export.random_checkpoint import write_random_checkpoint
    from starkv.export.random_checkpoint_values import parse_random_dtype

    sizes = read_json_object(config, "random weights need the sizes in it")
    stored = parse_random_dtype(dtype or "bf16")
    limits = (card.min_pixels, card.max_pixels)
    if keep is not None:
        write_random_checkpoint(sizes, keep, stored, SEED, layers, limits, progress=progress)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.random-", dir=out.absolute().parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        write_random_checkpoint(sizes, folder, stored, SEED, layers, limits, progress=progress)
        yield folder
