# SPDX-License-Identifier: Apache-2.0
"""A package, so that its ``conftest.py`` is not the one that other tests import from."""
