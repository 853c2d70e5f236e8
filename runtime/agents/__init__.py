# SPDX-License-Identifier: Apache-2.0
"""An agent's loop: screenshots of an environment go to a model, its actions go back."""
