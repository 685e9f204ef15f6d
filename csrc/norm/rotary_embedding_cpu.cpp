// x[t, h, :rotary_dim] = x * cos[position] + rotate_half(x) * sin[position]      (Su et al. 2021)
// for the heads of q and k, in place. rotate_half gives (-x[i + half], x[i]) for halves and
// (-x[i + 1], x[i]) for interleaved pairs. Rounds each product to T, then the sum, as transformers
// does. One item per token: its row of cos and sin serves every head from L1.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// a * b + c * d as three operations on Ts.
template <typename T>
LT_INLINE Vec rounded_sum_of_products(Vec a, Vec b, Vec c, Vec d) {
  return vec_rounded_to<T>(a * b) + vec_rounded_to<T>(c * d);
}

template <typename T>
void rotate_halves(T* x, const T* cos, const T* sin, int64_t half) {
  const Vec zero = vec_set(0.0f);
  for_each_vec(half, [=](int64_t i, auto lanes) {
    const int64_t j = i + half;
    const Vec first = vec_load(x + i, lanes);
    const Vec second = vec_load(x + j, lanes);
    vec_store(x + i, lanes,
              rounded_sum_of_products<T>(first, vec_load(cos + i, lanes), zero - second,
                                         vec_load(sin + i, lanes)));
    vec_store(x + j, lanes,
              rounded_sum_of_products<T>(second, vec_load(cos + j, lanes), first,
                                         vec_load(sin + j, lanes)));
  });
}

template <typename T>
void rotate_pairs(T* x, const T* cos, const T* sin, int64_t size) {
  for_each_vec(size, [=](int64_t i, auto lanes) {
    const Vec value = vec_load(x + i, lanes);
    vec_store(x + i, lanes,
              rounded_sum_of_products<T>(value, vec_load(cos + i, lanes), vec_rotate_pairs(value),
                                         vec_load(sin + i, lanes)));
  });
}

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
        if (!known) {
          for_each_vec(p.rotary_dim,
                       [=](int64_t i, auto lanes) { vec_store(x + i, lanes, vec_set(NAN)); });
        } else if (p.interleaved) {
          rotate_pairs(x, cos, sin, p.rotary_dim);
        } else {
          rotate_halves(x, cos, sin, p.rotary_dim / 2);
        }
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
