# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for the package ``tensorrt``."""
