// AMX: tile registers of 16 rows of 64 bytes, and the product of two of them as bfloat16.
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18)
#pragma once

#include "vec/vec.h"

#if defined(__AMX_BF16__)

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// Sets this thread's tile registers up, all to full size, whatever they were set to, and releases
// them. oneDNN looks at what they are set to before it uses them.
class AmxScope {
 public:
  AmxScope() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxScope() { asm volatile("tilerelease"); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

template <int kTile>
LT_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows row_words words apart.
template <int kTile>
LT_INLINE void amx_load(const float* words, int64_t row_words) {
  asm volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(words), "r"(row_words), "i"(kTile) : "memory");
}
template <int kTile>
LT_INLINE void amx_store(float* words, int64_t row_words) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(words), "r"(row_words), "i"(kTile)
               : "memory");
}
// sum[i][v] += the dot products of the pairs a[i][k] and b[k][v], over k.
template <int kSum, int kA, int kB>
LT_INLINE void amx_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// product[i][v] = the dot products of a[i][k] and b[k][v], summed over k < depth, a multiple of 16;
// of 16 rows i and kTiles <= 3 times 16 columns v. Words of a and b are pairs of bfloat16.
template <int kTiles>
LT_INLINE void amx_product(const float* a, int64_t a_row, const float* b, int64_t b_row,
                           int64_t depth, float* product, int64_t product_row) {
  amx_zero<0>();
  if constexpr (kTiles > 1) amx_zero<1>();
  if constexpr (kTiles > 2) amx_zero<2>();
  for (int64_t k = 0; k < depth; k += 16) {
    amx_load<3>(a + k, a_row);
    amx_load<4>(b + k * b_row, b_row);
    amx_multiply_add<0, 3, 4>();
    if constexpr (kTiles > 1) amx_load<5>(b + k * b_row + 16, b_row);
    if constexpr (kTiles > 1) amx_multiply_add<1, 3, 5>();
    if constexpr (kTiles > 2) amx_load<6>(b + k * b_row + 32, b_row);
    if constexpr (kTiles > 2) amx_multiply_add<2, 3, 6>();
  }
  amx_store<0>(product, product_row);
  if constexpr (kTiles > 1) amx_store<1>(product + 16, product_row);
  if constexpr (kTiles > 2) amx_store<2>(product + 32, product_row);
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry

#elif defined(LT_ISA_AMX)
#error "the level amx needs -mamx-bf16"
#endif
