# SPDX-License-Identifier: Apache-2.0
"""TensorRT: lowering, building and running, on machines without it."""
