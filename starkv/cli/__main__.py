# SPDX-License-Identifier: Apache-2.0
"""``python -m starkv.cli`` is the command ``starkv``."""

from starkv.cli.main import main

main()
