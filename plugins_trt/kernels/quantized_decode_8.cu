// SPDX-License-Identifier: Apache-2.0
// Decoding with codes of 8 bits, compiled on its own: there are many kernels of it.

#include "quantized_decode.cuh"

namespace starkv {

template bool decode_codes<8>(const QuantizedView& view, Stream stream);

}  // namespace starkv
