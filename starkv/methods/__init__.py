# SPDX-License-Identifier: Apache-2.0
"""KV cache compression methods.

The files that the runtime shares (configuration, budget, host plan, row metadata, expected information) need
numpy alone. The others are pure PyTorch functions: the reference that every faster implementation is tested
against. Nothing is imported here, so that the first kind stays usable without PyTorch.
"""
