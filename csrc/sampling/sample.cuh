// One token a row from softmax(logits / temperature) after top-k, top-p and min-p, see row.h.
// Three launches, each over all slices of all rows, because one multiprocessor cannot read a row in
// the time that all of them take for it; the last block of a row to arrive does what needs the
// whole row. Bound by latency for few rows, by reading the logits up to three times (from L2, where
// they fit) for many.
//   sample_maxima   largest logit of every slice, which gives the best score of the row
//   sample_bins     tokens and weight of every bin of scores below the best; the last block finds
//                   the bins in which top-k and top-p end. Without both: weight of every slice, and
//                   the last block draws.
//   sample_tokens   weight of every slice in the bins before these, and the few tokens in them; the
//                   last block selects among them exactly and draws
// A row of one slice takes one launch: all its tokens are candidates. Which block arrives last and
// in what order candidates are listed changes nothing, for integer sums and keys decide.
// Grid [batch * num_slices], block kNumThreads.
#pragma once

#include <cstdint>

#include "sampling/block_select.cuh"
#include "sampling/row.h"
#include "tile/four.cuh"
#include "tile/overlap.cuh"

namespace llamatelemetry {

static_assert(kSlice == kBlockValues);
static_assert(kMaxVocabSize <= int64_t{kSlice} * kBlockValues, "draw scans the slices once");

constexpr float kBinsPerUnit = 32.0f;
static_assert(kNumBins == -kSmallestScore * kBinsPerUnit);
constexpr int kBinsPerThread = (kNumBins + kNumThreads - 1) / kNumThreads;

__device__ inline uint32_t rank_of(float score) {
  return rank_of_bits(__float_as_uint(score + 0.0f));
}
// The float that has this rank.
__device__ inline float score_of_rank(uint32_t rank) {
  return __uint_as_float(rank & 0x80000000 ? rank : ~rank & 0x7fffffff);
}

// A token and its logit in one number, larger for a larger logit, then for a lower id; 0 for NaN.
__device__ inline Weight packed_logit(float logit, int id) {
  return logit == logit ? Weight{~rank_of(logit)} << 32 | ~static_cast<uint32_t>(id) : 0;
}
__device__ inline float logit_of_packed(Weight packed) {
  return score_of_rank(~static_cast<uint32_t>(packed >> 32));
}
__device__ inline int64_t token_of_packed(Weight packed) {
  return packed == 0 ? 0 : ~static_cast<uint32_t>(packed);
}

// What top-k and top-p keep: ranks below last_rank, and of those equal to it ids from first_equal.
struct Kept {
  uint32_t last_rank = 0xffffffff;
  int first_equal = 0;

  __device__ bool holds(uint32_t rank, int id) const {
    return rank < last_rank || (rank == last_rank && id >= first_equal);
  }
};

template <typename T>
struct Row : SampleRow {
  const T* logits;
  int vocab_size;
  float best = 0.0f;  // score
  int64_t seed;       // read with the other parameters, although only the draw needs them
  int64_t offset;
  SampleRowState* state;
  Weight* bin_weights;
  Weight* slice_largest;  // packed
  Weight* slice_weights;
  uint32_t* bin_counts;
  int32_t* candidates;

  __device__ Row(const SampleParams& p, int64_t row)
      : SampleRow(sample_row(p, row)), seed(p.seed[row]), offset(p.offset[row]) {
    logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
    vocab_size = static_cast<int>(p.vocab_size);
    char* workspace = static_cast<char*>(p.workspace);
    state = reinterpret_cast<SampleRowState*>(workspace + row * sample_workspace_bytes(vocab_size));
    bin_weights = reinterpret_cast<Weight*>(state + 1);
    slice_largest = bin_weights + kNumBins;
    slice_weights = slice_largest + slices();
    bin_counts = reinterpret_cast<uint32_t*>(slice_weights + slices());
    candidates = reinterpret_cast<int32_t*>(bin_counts + kNumBins);
  }

  __device__ int slices() const { return (vocab_size + kSlice - 1) / kSlice; }
  __device__ bool top_k_on() const { return top_k < vocab_size; }

  // True where the largest logit is all that matters.
  __device__ bool is_settled_by(Weight largest) {
    best = logit_of_packed(largest) / temperature;
    return greedy || largest == 0 || !(fabsf(best) < INFINITY);
  }

  __device__ float score(float logit) const {
    const float quotient = logit / temperature;
    return quotient == quotient ? quotient : -INFINITY;
  }
  __device__ Weight weight(float score) const {
    return __float2ull_rn(expf(score - best) * kWeightScale);
  }
  // 0 for what min-p drops.
  __device__ Weight weight_after_min_p(float score) const {
    const float relative = expf(score - best);
    return min_p_on && relative < min_p ? 0 : __float2ull_rn(relative * kWeightScale);
  }
  // Not smaller for a smaller score; kNumBins for those that weigh nothing for sure.
  __device__ int bin(float score) const {
    const float depth = best - score;
    return depth < -kSmallestScore ? static_cast<int>(depth * kBinsPerUnit) : kNumBins;
  }

  // The logits of kPerThread consecutive ids from first on, NaN past the end.
  __device__ void load(int first, float (&values)[kPerThread]) const {
    const bool aligned = reinterpret_cast<uint64_t>(logits) % (4 * sizeof(T)) == 0;
#pragma unroll
    for (int start = 0; start < kPerThread; start += 4) {
      float four[4] = {NAN, NAN, NAN, NAN};
      if (first + start + 4 <= vocab_size) {
        load_four(logits + first + start, aligned, four);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + start + i < vocab_size) four[i] = to_float(logits[first + start + i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) values[start + i] = four[i];
    }
  }
};

__device__ inline int first_of_thread(int slice) {
  return slice * kSlice + static_cast<int>(threadIdx.x) * kPerThread;
}

__device__ inline Weight largest_of(const float (&logits)[kPerThread], int first) {
  Weight largest = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const Weight packed = packed_logit(logits[i], first + i);
    largest = packed > largest ? packed : largest;
  }
  return block_largest(largest);
}

// The token of one slice at which the weight of what is kept exceeds target.
template <typename T>
struct SliceWeights : Sums<kPerThread> {
  int start;

  __device__ SliceWeights(const Row<T>& row, int slice, const float (&logits)[kPerThread],
                          Kept kept)
      : start(slice * kSlice) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float score = row.score(logits[i]);
      values[i] = kept.holds(rank_of(score), first_of_thread(slice) + i)
                      ? row.weight_after_min_p(score)
                      : 0;
    }
    scan();
  }
  __device__ int64_t token(Weight target) const { return start + find(target).index; }
};

// By the last block, when slice_weights holds the weight of what is kept of each slice.
template <typename T>
__device__ int64_t draw(const Row<T>& row, Kept kept) {
  Sums<kPerThread> slices;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int slice = first_of_thread(0) + i;
    slices.values[i] = slice < row.slices() ? __ldcg(row.slice_weights + slice) : 0;
  }
  slices.scan();
  const Weight target = random_below(slices.total, random_bits(row.seed, row.offset));
  const Found slice = slices.find(target);
  float logits[kPerThread];
  row.load(first_of_thread(slice.index), logits);
  return SliceWeights(row, slice.index, logits, kept).token(target - slice.before);
}

// Exact selection among size candidates, of rank rank_at(i) and id id_at(i).
template <typename T, typename RankAt, typename IdAt>
__device__ Kept select_kept(const Row<T>& row, const SampleEdge& edge, int size, RankAt rank_at,
                            IdAt id_at) {
  enum Step { kTopK, kTopP, kEquals };  // a loop has one select: see block_scan
  Kept kept;
  Weight budget = edge.k_left;
#pragma unroll 1
  for (int step = edge.k_left >= 0 ? kTopK : kTopP;; ++step) {
    const auto weight_between = [&](uint32_t rank, int first, int last) -> Weight {
      const float score = score_of_rank(rank);
      const int bin = row.bin(score);
      if (rank > kept.last_rank || bin < first || bin > last) return 0;
      return step == kTopK ? 1 : row.weight(score);
    };
    if (step == kTopP) {
      if (!row.top_p_on) return kept;
      Weight sum = 0;
#pragma unroll 1
      for (int i = threadIdx.x; i < size; i += kNumThreads) {
        sum += weight_between(rank_at(i), edge.k_first, edge.k_last);
      }
      const Weight total = edge.weight_before_k + block_sum(sum);
      budget = top_p_weight(row.top_p, total) - 1 - edge.weight_before_p;
    }
    const int first = step == kTopK ? edge.k_first : edge.p_first;
    const int last = step == kTopK ? edge.k_last : edge.p_last;
    const auto key_of = [&](int i) { return step == kEquals ? id_at(i) : rank_at(i); };
    const auto weight_of = [&](int i) {
      const uint32_t rank = rank_at(i);
      return step == kEquals ? Weight{rank == kept.last_rank} : weight_between(rank, first, last);
    };
    const Selected selected = select(size, key_of, weight_of, budget);
    if (step == kEquals) {
      kept.first_equal = static_cast<int>(selected.key);
      return kept;
    }
    kept.last_rank = selected.key;
    if (step == kTopP) {
      const Weight each = row.weight(score_of_rank(selected.key));
      const Weight removed = selected.at / each - ((budget - selected.before) / each + 1);
      if (removed == 0) return kept;
      budget = removed;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads)
    sample_one_slice_kernel(const __grid_constant__ SampleParams p) {
  __shared__ uint32_t s_ranks[kSlice];
  let_successors_start();
  wait_for_predecessors();
  const int64_t row_index = blockIdx.x;
  Row<T> row(p, row_index);
  float logits[kPerThread];
  const int first = first_of_thread(0);
  row.load(first, logits);
  const Weight largest = largest_of(logits, first);
  if (row.is_settled_by(largest)) {
    if (threadIdx.x == 0) p.out[row_index] = token_of_packed(largest);
    return;
  }
  Kept kept;
  if (row.top_k_on() || row.top_p_on) {
    Weight count = 0;  // of tokens in bins
    for (int i = 0; i < kPerThread; ++i) {
      const float score = row.score(logits[i]);
      s_ranks[first + i] = rank_of(score);
      count += row.bin(score) < kNumBins;
    }
    count = block_sum(count);
    const bool cuts = row.top_k_on() && static_cast<Weight>(row.top_k) <= count;
    const SampleEdge edge{
        .k_first = 0,
        .k_last = kNumBins - 1,
        .k_left = cuts ? static_cast<int>(row.top_k) - 1 : -1,
        .p_first = 0,
        .p_last = kNumBins - 1,
        .weight_before_k = 0,
        .weight_before_p = 0,
    };
    const auto rank_at = [&](int i) { return s_ranks[i]; };
    const auto id_at = [](int i) { return static_cast<uint32_t>(i); };
    kept = select_kept(row, edge, row.vocab_size, rank_at, id_at);
  }
  const SliceWeights weights(row, 0, logits, kept);
  const Weight target = random_below(weights.total, random_bits(row.seed, row.offset));
  const int64_t token = weights.token(target);
  if (threadIdx.x == 0) p.out[row_index] = token;
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads)
    sample_maxima_kernel(const __grid_constant__ SampleParams p) {
  let_successors_start();
  wait_for_predecessors();
  const int slices = static_cast<int>(num_slices(p.vocab_size));
  const int slice = blockIdx.x % slices;
  const Row<T> row(p, blockIdx.x / slices);
  float logits[kPerThread];
  row.load(first_of_thread(slice), logits);
  for (int bin = slice * kNumThreads + threadIdx.x; bin < kNumBins; bin += slices * kNumThreads) {
    row.bin_weights[bin] = 0;
    row.bin_counts[bin] = 0;
  }
  if (slice == 0 && threadIdx.x == 0) {
    row.state->num_arrived[0] = 0;
    row.state->num_arrived[1] = 0;
    row.state->num_candidates = 0;
  }
  const Weight largest = largest_of(logits, first_of_thread(slice));
  if (threadIdx.x == 0) row.slice_largest[slice] = largest;
}

struct BinScratch {
  uint32_t count[kNumBins];
  uint32_t low[kNumBins];
  uint32_t high[kNumBins];
};

// Adds the tokens of one slice to the bins of the row.
template <typename T>
__device__ void add_to_bins(BinScratch& s_bins, const Row<T>& row,
                            const float (&logits)[kPerThread]) {
  for (int bin = threadIdx.x; bin < kNumBins; bin += kNumThreads) {
    s_bins.count[bin] = 0;
    s_bins.low[bin] = 0;
    s_bins.high[bin] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float score = row.score(logits[i]);
    const int bin = row.bin(score);
    if (bin == kNumBins) continue;
    if (row.top_k_on()) atomicAdd(&s_bins.count[bin], 1);
    if (row.top_p_on) add_weight(&s_bins.low[bin], &s_bins.high[bin], row.weight(score));
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kNumBins; bin += kNumThreads) {
    const Weight weight = s_bins.low[bin] + (Weight{s_bins.high[bin]} << kLowBits);
    if (s_bins.count[bin]) atomicAdd(row.bin_counts + bin, s_bins.count[bin]);
    if (weight) atomicAdd(row.bin_weights + bin, weight);
  }
}

// By the last block: the bins where top-k and top-p end. How much top-k keeps is known up to the
// tokens of one bin, so top-p may end in one of several.
template <typename T>
__device__ SampleEdge find_edge(const Row<T>& row) {
  Sums<kBinsPerThread> counts;
  Sums<kBinsPerThread> weights;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    const int bin = threadIdx.x * kBinsPerThread + i;
    counts.values[i] = bin < kNumBins ? __ldcg(row.bin_counts + bin) : 0;
    weights.values[i] = bin < kNumBins ? __ldcg(row.bin_weights + bin) : 0;
  }
  weights.scan();
  SampleEdge edge{
      .k_first = kNumBins,
      .k_last = -1,
      .k_left = -1,
      .p_first = kNumBins,
      .p_last = -1,
      .weight_before_k = weights.total,
      .weight_before_p = 0,
  };
  Weight weight_through_k = weights.total;
  if (row.top_k_on()) {
    counts.scan();
    if (static_cast<Weight>(row.top_k) <= counts.total) {
      const Found kth = counts.find(row.top_k - 1);
      edge.k_first = edge.k_last = kth.index;
      edge.k_left = static_cast<int>(row.top_k - 1 - kth.before);
      edge.p_first = kth.index;
      // The weight of the bins before the k-th's: what the sums of all threads that hold any add.
      Weight before = 0;
      Weight at = 0;
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        const int bin = threadIdx.x * kBinsPerThread + i;
        if (bin < kth.index) before += weights.values[i];
        if (bin == kth.index) at = weights.values[i];
      }
      edge.weight_before_k = block_sum(before);
      weight_through_k = edge.weight_before_k + block_sum(at);
    }
  }
  if (row.top_p_on) {
    const Found least = weights.find(top_p_weight(row.top_p, edge.weight_before_k) - 1);
    const Found most = weights.find(top_p_weight(row.top_p, weight_through_k) - 1);
    edge.p_first = least.index;
    edge.p_last = most.index;
    edge.weight_before_p = least.before;
  }
  return edge;
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads)
    sample_bins_kernel(const __grid_constant__ SampleParams p) {
  __shared__ BinScratch s_bins;
  let_successors_start();
  wait_for_predecessors();
  const int slices = static_cast<int>(num_slices(p.vocab_size));
  const int slice = blockIdx.x % slices;
  const int64_t row_index = blockIdx.x / slices;
  Row<T> row(p, row_index);
  if (row.greedy && slice > 0) return;
  float logits[kPerThread];  // on their way while the best score is found
  row.load(first_of_thread(slice), logits);
  Weight largest = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < slices; i += kNumThreads) {
    const Weight other = row.slice_largest[i];
    largest = other > largest ? other : largest;
  }
  largest = block_largest(largest);
  if (row.is_settled_by(largest)) {
    if (slice == 0 && threadIdx.x == 0) {
      p.out[row_index] = token_of_packed(largest);
      row.state->finished = 1;
    }
    return;
  }
  const bool to_select = row.top_k_on() || row.top_p_on;
  if (to_select) {
    add_to_bins(s_bins, row, logits);
  } else {
    const Weight weight = SliceWeights(row, slice, logits, Kept{}).total;
    if (threadIdx.x == 0) row.slice_weights[slice] = weight;
  }
  if (!arrives_last(row.state->num_arrived[0], slices)) return;
  if (to_select) {
    const SampleEdge edge = find_edge(row);
    if (threadIdx.x == 0) row.state->edge = edge;
  } else {
    const int64_t token = draw(row, Kept{});
    if (threadIdx.x == 0) p.out[row_index] = token;
  }
  if (threadIdx.x == 0) {
    row.state->best = row.best;
    row.state->finished = !to_select;
  }
}

// Leaves the weight of the tokens that are kept for sure in slice_weights and lists those at the
// edge. s_list has room for a slice.
template <typename T>
__device__ void list_candidates(uint32_t* s_list, const Row<T>& row, const SampleEdge& edge,
                                int slice) {
  __shared__ int s_size;
  __shared__ int s_start;
  float logits[kPerThread];
  row.load(first_of_thread(slice), logits);
  if (threadIdx.x == 0) s_size = 0;
  __syncthreads();
  Weight weight = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float score = row.score(logits[i]);
    const int bin = row.bin(score);
    if (bin == kNumBins) continue;
    if (bin < edge.p_first) weight += row.weight_after_min_p(score);
    if ((edge.p_first <= bin && bin <= edge.p_last) || bin == edge.k_first) {
      s_list[atomicAdd(&s_size, 1)] = first_of_thread(slice) + i;
    }
  }
  weight = block_sum(weight);
  if (threadIdx.x == 0) {
    row.slice_weights[slice] = weight;
    if (s_size > 0) s_start = atomicAdd(&row.state->num_candidates, s_size);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < s_size; i += kNumThreads) {
    if (s_start + i < max_candidates(row.vocab_size)) row.candidates[s_start + i] = s_list[i];
  }
}

// By the last block: which of the candidates are kept; their weight joins their slices'.
template <typename T>
__device__ Kept keep_candidates(uint32_t* s_ranks, const Row<T>& row, const SampleEdge& edge) {
  // More than there is room for: every token of the row stands for itself.
  int size = __ldcg(&row.state->num_candidates);
  const bool listed = size <= max_candidates(row.vocab_size);
  if (!listed) size = row.vocab_size;
  const auto id_at = [&](int i) {
    return static_cast<uint32_t>(listed ? __ldcg(row.candidates + i) : i);
  };
  const auto rank_of_id = [&](uint32_t id) { return rank_of(row.score(to_float(row.logits[id]))); };
#pragma unroll 1
  for (int i = threadIdx.x; i < min(size, kSlice); i += kNumThreads) {
    s_ranks[i] = rank_of_id(id_at(i));
  }
  __syncthreads();
  const auto rank_at = [&](int i) { return i < kSlice ? s_ranks[i] : rank_of_id(id_at(i)); };
  const Kept kept = select_kept(row, edge, size, rank_at, id_at);
#pragma unroll 1
  for (int i = threadIdx.x; i < size; i += kNumThreads) {
    const uint32_t rank = rank_at(i);
    const float score = score_of_rank(rank);
    const int bin = row.bin(score);
    if (bin < edge.p_first || !kept.holds(rank, id_at(i))) continue;
    if (const Weight weight = row.weight_after_min_p(score)) {
      atomicAdd(row.slice_weights + id_at(i) / kSlice, weight);
    }
  }
  __threadfence();  // draw reads it past L1
  __syncthreads();
  return kept;
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads)
    sample_tokens_kernel(const __grid_constant__ SampleParams p) {
  __shared__ uint32_t s_list[kSlice];
  let_successors_start();
  wait_for_predecessors();
  const int slices = static_cast<int>(num_slices(p.vocab_size));
  const int slice = blockIdx.x % slices;
  const int64_t row_index = blockIdx.x / slices;
  Row<T> row(p, row_index);
  const Weight largest = row.slice_largest[slice];
  const SampleEdge edge = row.state->edge;
  row.best = row.state->best;
  if (row.state->finished) return;
  const int best_bin = row.bin(row.score(logit_of_packed(largest)));
  if (best_bin < edge.p_first || best_bin <= max(edge.p_last, edge.k_last)) {
    list_candidates(s_list, row, edge, slice);
  } else if (threadIdx.x == 0) {
    row.slice_weights[slice] = 0;
  }
  if (!arrives_last(row.state->num_arrived[1], slices)) return;
  const Kept kept = keep_candidates(s_list, row, edge);
  const int64_t token = draw(row, kept);
  if (threadIdx.x == 0) p.out[row_index] = token;
}

}  // namespace llamatelemetry
