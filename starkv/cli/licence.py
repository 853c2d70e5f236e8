# SPDX-License-Identifier: Apache-2.0
"""Says what the weights of a model may be used for, whenever they are turned into something else."""

from typing import TYPE_CHECKING

from starkv.cli.console import note

if TYPE_CHECKING:
    from starkv.export.cards import ModelCard


def note_licence(card: "ModelCard") -> None:
    """One line with the licence; a second one where it forbids commercial use."""
    where = f" ({card.licence_url})" if card.licence_url else ""
    note(f"{card.name}: licence of the weights is {card.licence}{where}")
    if card.research_only:
        note(f"warning: the licence of {card.name} allows research only, no commercial use")
