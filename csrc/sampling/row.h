// What CPU and CUDA share, so that both draw the same token: the parameters of a row, its random
// number, the order of scores and the weight of a token.
//
// score  = logit / temperature, NaN counted as -inf; best is the largest of the row
// weight = e^(score - best) as an integer multiple of 2^-40. Integers sum to the same total in any
//          order, so histograms by atomics and vectors of any width agree, and a cumulative sum
//          meets its total exactly.
#pragma once

#include <cstdint>

#include "sampling/params.h"

namespace llamatelemetry {

struct SampleRow {
  float temperature;
  float top_p;
  float min_p;
  int64_t top_k;  // vocab_size when off
  bool greedy;
  bool top_p_on;
  bool min_p_on;
};

// Comparisons are written so that a NaN parameter turns its filter off.
static inline constexpr SampleRow sample_row(const SampleParams& p, int64_t row) {
  const int64_t k = p.top_k[row];
  return {
      .temperature = p.temperature[row],
      .top_p = p.top_p[row] > 0.0f ? p.top_p[row] : 0.0f,
      .min_p = p.min_p[row] < 1.0f ? p.min_p[row] : 1.0f,
      .top_k = k > 0 && k < p.vocab_size ? k : p.vocab_size,
      .greedy = !(p.temperature[row] > 0.0f),
      .top_p_on = p.top_p[row] < 1.0f,
      .min_p_on = p.min_p[row] > 0.0f,
  };
}

constexpr float kWeightScale = 0x1p40f;
// e^score below half of 2^-40 has weight 0.
constexpr float kSmallestScore = -28.5f;

// Top-p keeps the best tokens up to the one that reaches this weight. What a float32 top_p may have
// gained by rounding is taken off, or 0.3 of ten equal tokens would be four.
static inline constexpr uint64_t top_p_weight(float top_p, uint64_t total) {
  const double wanted = static_cast<double>(top_p) * (1.0 - 0x1p-23) * static_cast<double>(total);
  const auto whole = static_cast<uint64_t>(wanted);
  return whole < wanted || whole == 0 ? whole + 1 : whole;
}

// Smaller is better: orders scores from the largest to the smallest. bits are those of a score that
// is no NaN and no -0.
static inline constexpr uint32_t rank_of_bits(uint32_t bits) {
  return bits & 0x80000000 ? bits : ~bits & 0x7fffffff;
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), key seed,
// counter (offset, 0): the first two words of the block.
static inline constexpr uint64_t random_bits(int64_t seed, int64_t offset) {
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t x[4] = {static_cast<uint32_t>(offset),
                   static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53} * x[0];
    const uint64_t b = uint64_t{0xcd9e8d57} * x[2];
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1;
    x[0] = next0;
    x[1] = static_cast<uint32_t>(b);
    x[2] = next2;
    x[3] = static_cast<uint32_t>(a);
    key0 += 0x9e3779b9;
    key1 += 0xbb67ae85;
  }
  return uint64_t{x[1]} << 32 | x[0];
}

// floor(total * random / 2^64): uniform below total.
static inline constexpr uint64_t random_below(uint64_t total, uint64_t random) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(total) * random >> 64);
}

}  // namespace llamatelemetry
