// logits[row, token] = -inf where the token's bit is not set. One item a word of 32 tokens; a word
// of tokens that are all allowed, as most are where a grammar leaves free text, touches no logits.
#include <cmath>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "sampling/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void words_of(const TokenBitmaskParams& p, int64_t begin, int64_t end) {
  T forbidden[Vec::kLanes];
  vec_store(forbidden, vec_set(-INFINITY));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.num_words;
    const int64_t word = item % p.num_words;
    const int64_t first = word * kTokensPerWord;
    const int64_t left = p.vocab_size - first;
    uint32_t cleared = ~static_cast<uint32_t>(p.bitmask[row * p.bitmask_row_stride + word]);
    if (left < kTokensPerWord) cleared &= (uint32_t{1} << left) - 1;
    T* logits = static_cast<T*>(p.logits) + row * p.logits_row_stride + first;
    for (; cleared != 0; cleared &= cleared - 1) logits[__builtin_ctz(cleared)] = forbidden[0];
  }
}

void token_bitmask_items(const TokenBitmaskParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { words_of<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_apply_token_bitmask(const TokenBitmaskParams& p, Stream) {
  parallel_over<token_bitmask_items>("apply_token_bitmask_", Work{p.batch * p.num_words, 15.0}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_apply_token_bitmask, TokenBitmaskParams)
