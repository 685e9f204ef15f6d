#include "quant/quant_embedding.cuh"

namespace llamatelemetry {

Error launch_quant_embedding_low_bit(const QuantEmbeddingParams& p, Stream stream) {
  return launch_quant_embedding_of<FormatSet::kLowBit>(p, stream);
}

}  // namespace llamatelemetry
