# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks of GUI models: data sets, graders, runs that can be resumed, and their summaries."""
