#include "quant/quant_embedding.cuh"

namespace llamatelemetry {

Error launch_quant_embedding(const QuantEmbeddingParams& p, Stream stream) {
  if (is_low_bit(kFormats[p.format].codes)) return launch_quant_embedding_low_bit(p, stream);
  return launch_quant_embedding_of<FormatSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
