// AMX: tile registers of 16 rows of 64 bytes, and the product of two of them as bfloat16.
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18)
#pragma once

#include <atomic>

#include "vec/vec.h"

#if defined(__AMX_BF16__)

namespace llamatelemetry {
namespace LT_ISA {
namespace {

struct AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr AmxConfig kWholeTiles{};

// Sets this thread's tile registers up, all to full size, whatever they were set to, and releases
// them. oneDNN looks at what they are set to before it uses them.
class AmxScope {
 public:
  AmxScope() { _tile_loadconfig(&kWholeTiles); }
  ~AmxScope() { _tile_release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

// product[i][v] = the dot products of a[i][k] and b[k][v], summed over k < depth, a multiple of 16;
// of 16 rows i and kTiles <= 3 times 16 columns v. Words of a and b are pairs of bfloat16, rows are
// a_row, b_row and product_row words apart.
template <int kTiles>
LT_INLINE void amx_product(const float* a, int64_t a_row, const float* b, int64_t b_row,
                           int64_t depth, float* product, int64_t product_row) {
  constexpr int64_t kWord = sizeof(float);
  // GCC 12 does not know that loads of tiles read memory: what was stored must be there.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(3, a + k, a_row * kWord);
    _tile_loadd(4, b + k * b_row, b_row * kWord);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (kTiles > 1) _tile_loadd(5, b + k * b_row + 16, b_row * kWord);
    if constexpr (kTiles > 1) _tile_dpbf16ps(1, 3, 5);
    if constexpr (kTiles > 2) _tile_loadd(6, b + k * b_row + 32, b_row * kWord);
    if constexpr (kTiles > 2) _tile_dpbf16ps(2, 3, 6);
  }
  _tile_stored(0, product, product_row * kWord);
  if constexpr (kTiles > 1) _tile_stored(1, product + 16, product_row * kWord);
  if constexpr (kTiles > 2) _tile_stored(2, product + 32, product_row * kWord);
  // Nor may stores that come after overtake a load.
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry

#elif defined(LT_ISA_AMX)
#error "the level amx needs -mamx-tile and -mamx-bf16"
#endif
