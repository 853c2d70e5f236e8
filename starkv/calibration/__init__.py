# SPDX-License-Identifier: Apache-2.0
"""GUI prompts with images: what quantization is calibrated on, and what it is judged by."""
