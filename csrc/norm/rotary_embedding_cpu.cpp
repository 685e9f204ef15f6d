// x[t, h, :rotary_dim] = x * cos[position] + rotate_half(x) * sin[position]      (Su et al. 2021)
// for the heads of q and k, in place. rotate_half gives (-x[i + half], x[i]) for halves and
// (-x[i + 1], x[i]) for interleaved pairs. Rounds each product to T, then the sum, as transformers
// does. One item per token: its row of cos and sin serves every head from L1.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/row_ops.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void rotary_embedding_tokens(const RotaryEmbeddingParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    int64_t position = token;
    if (p.positions) {
      position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                       : static_cast<const int32_t*>(p.positions)[token];
    }
    const bool known = position >= 0 && position < p.num_positions;
    const T* cos = static_cast<const T*>(p.cos) + position * p.cos_row_stride;
    const T* sin = static_cast<const T*>(p.sin) + position * p.sin_row_stride;
    const RotaryHeads both[] = {p.q, p.k};
    for (const RotaryHeads& heads : both) {
      for (int64_t head = 0; head < heads.num_heads; ++head) {
        T* x = static_cast<T*>(heads.x) + token * heads.token_stride + head * heads.head_stride;
        rotate_row(x, known ? cos : nullptr, sin, p.rotary_dim, p.interleaved);
      }
    }
  }
}

void rotary_embedding_items(const RotaryEmbeddingParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    rotary_embedding_tokens<typename decltype(type)::type>(p, begin, end);
  });
}

}  // namespace

Error launch_rotary_embedding(const RotaryEmbeddingParams& params, Stream) {
  const auto num_values =
      static_cast<double>((params.q.num_heads + params.k.num_heads) * params.rotary_dim);
  parallel_over<rotary_embedding_items>("rotary_embedding_",
                                        Work{params.num_tokens, 20.0 + 0.3 * num_values}, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_rotary_embedding, RotaryEmbeddingParams)
