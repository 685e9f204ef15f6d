// The shapes that both sets of products share, products.h and products_amx.h: groups of rows, and
// words of 32 bits, one float or two neighbouring bfloat16 of the dimension that is summed over.
#pragma once

#include "attention/cpu/source.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kPanelVecs = 3;  // registers of rows in a group; AVX-512 holds two panels of sums
constexpr int kGroupRows = kPanelVecs * Vec::kLanes;
constexpr int kRowWords = kMaxHeadDim + 16;  // between packed rows: no power of two

// Elements in a word.
template <typename T>
constexpr int kPerWord = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kPerWord<BFloat16> = 2;
#endif

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
