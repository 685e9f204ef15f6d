// out[i, :] = W[ids[i], :] of packed W [n, k]; zeros for an id outside [0, n).
// A packed row shares its cache lines with the 15 others of its tile, so the tile is decoded whole.
// One item per id.
#include "cpu/parallel.h"
#include "format/decode_cpu.h"
#include "quant/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <int kFormat, typename T>
void embed_row(const QuantEmbeddingParams& p, int64_t id, T* out) {
  using Block = PackedBlock<kFormat>;
  const int64_t num_blocks = p.k / Block::kLayout.block_size;
  const uint8_t* tile = p.packed + id / kTileRows * num_blocks * Block::kBytes;
  for (int64_t i = 0; i < num_blocks; ++i, tile += Block::kBytes) {
    const Block block(tile);
    for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block) {
      Floats weight[kSubBlock];
      block.weights(sub_block, weight);
      float rows[kSubBlock][kTileRows];
      for (int j = 0; j < kSubBlock; ++j) floats_store(rows[j], weight[j]);
      for (int j = 0; j < kSubBlock; ++j) *out++ = from_float<T>(rows[j][id % kTileRows]);
    }
  }
}

template <int kFormat, typename T, typename Id>
void embed_rows(const QuantEmbeddingParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = static_cast<const Id*>(p.ids)[i];
    T* out = static_cast<T*>(p.out) + i * p.k;
    if (id >= 0 && id < p.n) {
      embed_row<kFormat>(p, id, out);
    } else {
      std::memset(out, 0, static_cast<size_t>(p.k) * sizeof(T));
    }
  }
}

void embed_items(const QuantEmbeddingParams& p, int64_t begin, int64_t end) {
  dispatch_format<FormatSet::kBlocks>(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (p.ids_are_int64) {
        embed_rows<format(), T, int64_t>(p, begin, end);
      } else {
        embed_rows<format(), T, int32_t>(p, begin, end);
      }
    });
  });
}

}  // namespace

Error launch_quant_embedding(const QuantEmbeddingParams& p, Stream) {
  parallel_over<embed_items>("quant_embedding", {p.num_ids, 3.0 * static_cast<double>(p.k)}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_quant_embedding, QuantEmbeddingParams)
