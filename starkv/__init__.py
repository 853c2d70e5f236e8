# SPDX-License-Identifier: Apache-2.0
"""starkv: compile GUI vision-language models into quantized engines and run them offline.

Importing this package pulls in nothing heavy: no torch, no ONNX Runtime, no TensorRT.
"""

__version__ = "0.1.0"
