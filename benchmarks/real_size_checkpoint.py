# SPDX-License-Identifier: Apache-2.0
"""Write the random checkpoint of one model of ``real_size.py``.

python real_size_checkpoint.py 0.5b|1.5b|7b FOLDER
"""

import sys
from pathlib import Path

from peers_shapes import SIZES, checkpoint_config
from real_size_steps import CARD

from starkv.export.cards import config_of_card, load_card
from starkv.export.json_file import read_json_object
from starkv.export.random_checkpoint import write_random_checkpoint

if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    if model == "7b":
        card = load_card(CARD)
        limits = (card.min_pixels, card.max_pixels)
        sizes = read_json_object(config_of_card(card), "it has the sizes")
        write_random_checkpoint(sizes, folder, pixel_limits=limits)
    else:
        write_random_checkpoint(checkpoint_config(SIZES[model]), folder)
