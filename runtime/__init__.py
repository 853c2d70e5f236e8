# SPDX-License-Identifier: Apache-2.0
"""Load an engine directory, step it, get actions. Never imports torch, transformers or export."""
