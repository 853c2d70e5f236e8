# SPDX-License-Identifier: Apache-2.0
"""The command ``starkv``: one file per subcommand, each importing its rooms lazily."""
