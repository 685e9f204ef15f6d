// One token a row from softmax(logits / temperature) after top-k, top-p and min-p, see row.h.
// Three launches, each over all slices of all rows, because one multiprocessor cannot read a row in
// the time that all of them take for it; the last block of a row to arrive does what needs the
// whole row. Bound by latency for few rows, by reading the logits up to three times (from L2, where
// they fit) for many.
//   sample_maxima   largest logit of every slice, which gives the best score of the row
//   sample_bins     tokens and weight of every bin of scores below the best; the last block finds
//                   the bins in which top-k and top-p end. Without both: weight of every slice, and
//                   the last block draws.
//   sample_tokens   weight of every slice in the bins before these, and the tokens in them, the
//                   candidates; the last block selects among them exactly and draws
// A row of one slice takes one launch: all its tokens are candidates. Which block arrives last and
// in what order candidates are listed changes nothing, for integer sums and keys decide.
// Grid [batch * num_slices], block kNumThreads.
#pragma once

#include <cstdint>

#include "sampling/sample_row.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry::sampling {

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
        .few = false,
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
    atomicAdd(&s_bins.count[bin], 1);
    if (row.bins_have_weights()) add_weight(&s_bins.low[bin], &s_bins.high[bin], row.weight(score));
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kNumBins; bin += kNumThreads) {
    const Weight weight = s_bins.low[bin] + (Weight{s_bins.high[bin]} << kLowBits);
    if (s_bins.count[bin]) atomicAdd(row.bin_counts + bin, s_bins.count[bin]);
    if (weight) atomicAdd(row.bin_weights + bin, weight);
  }
}

// By the last block: the bins where top-k and top-p end.
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
  counts.scan();
  Found kth{kNumBins - 1, 0, 0};
  const bool cuts = row.top_k_on() && static_cast<Weight>(row.top_k) <= counts.total;
  if (cuts) kth = counts.find(row.top_k - 1);
  if (row.top_k <= kMaxListedTopK) {
    const Weight size = cuts ? kth.before + kth.at : counts.total;
    return {
        .k_first = 0,
        .k_last = kth.index,
        .k_left = cuts ? static_cast<int>(row.top_k) - 1 : -1,
        .p_first = 0,
        .p_last = row.top_p_on ? kth.index : -1,
        .weight_before_k = 0,
        .weight_before_p = 0,
        .few = size <= kNumThreads,
    };
  }
  weights.scan();
  SampleEdge edge{
      .k_first = cuts ? kth.index : kNumBins,
      .k_last = cuts ? kth.index : -1,
      .k_left = cuts ? static_cast<int>(row.top_k - 1 - kth.before) : -1,
      .p_first = cuts ? kth.index : kNumBins,
      .p_last = -1,
      .weight_before_k = weights.total,
      .weight_before_p = 0,
      .few = false,
  };
  if (!row.top_p_on) return edge;
  // Sums over the bins from first to last.
  const auto sum_of = [](const Sums<kBinsPerThread>& bins, int first, int last) {
    Weight sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const int bin = threadIdx.x * kBinsPerThread + i;
      if (first <= bin && bin <= last) sum += bins.values[i];
    }
    return block_sum(sum);
  };
  Weight weight_through_k = weights.total;
  if (cuts) {
    edge.weight_before_k = sum_of(weights, 0, kth.index - 1);
    weight_through_k = edge.weight_before_k + sum_of(weights, kth.index, kth.index);
  }
  // How much top-k keeps is known up to the tokens of one bin, so top-p ends in one of several.
  const Found least = weights.find(top_p_weight(row.top_p, edge.weight_before_k) - 1);
  const Found most = cuts ? weights.find(top_p_weight(row.top_p, weight_through_k) - 1) : least;
  edge.p_first = least.index;
  edge.p_last = most.index;
  edge.weight_before_p = least.before;
  if (!cuts && sum_of(counts, 0, edge.p_last) <= kNumThreads) {
    edge.p_first = 0;
    edge.weight_before_p = 0;
    edge.few = true;
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
    if ((edge.p_first <= bin && bin <= edge.p_last) ||
        (edge.k_first <= bin && bin <= edge.k_last)) {
      s_list[atomicAdd(&s_size, 1)] = first_of_thread(slice) + i;
    }
  }
  weight = edge.p_first > 0 ? block_sum(weight) : 0;
  __syncthreads();
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

struct FewScratch {
  Weight key[kNumThreads];  // smaller for a better rank, then for a higher id
  Weight weight[kNumThreads];
};

// By the last block: the token drawn from a few candidates, one a thread, which looks at all the
// others instead of sorting them. No branch in the loops, so that their loads overlap.
template <typename T>
__device__ int64_t draw_from_few(FewScratch& s_few, const Row<T>& row, const SampleEdge& edge) {
  __shared__ int s_token;
  const int size = __ldcg(&row.state->num_candidates);
  const int i = threadIdx.x;
  const int id = i < size ? __ldcg(row.candidates + i) : 0;
  const float score = i < size ? row.score(to_float(row.logits[id])) : -INFINITY;
  const uint32_t rank = rank_of(score);
  const Weight key = Weight{rank} << 32 | ~static_cast<uint32_t>(id);
  s_few.key[i] = key;
  s_few.weight[i] = row.weight(score);
  __syncthreads();
  int num_better = 0;
  Weight before = 0;  // of better ones, and of equal ones that top-p keeps rather
  if (i < size) {
#pragma unroll 4
    for (int j = 0; j < size; ++j) {
      const Weight other = s_few.key[j];
      const Weight weight = s_few.weight[j];
      num_better += static_cast<uint32_t>(other >> 32) < rank;
      before += other < key ? weight : 0;
    }
  }
  bool kept = i < size && (edge.k_left < 0 || num_better <= edge.k_left);
  if (row.top_p_on) {
    const Weight at_edge = kept && edge.k_last >= 0 ? row.weight(score) : 0;
    const Weight total = edge.weight_before_k + block_sum(at_edge);
    kept = kept && before < top_p_weight(row.top_p, total);
  }
  __syncthreads();
  const Weight weight = kept ? row.weight_after_min_p(score) : 0;
  s_few.weight[i] = weight;
  __syncthreads();
  if (i < size) {
    Weight total = 0;
    before = 0;  // of lower ids
#pragma unroll 4
    for (int j = 0; j < size; ++j) {
      const Weight other = s_few.weight[j];
      const auto inverted_id = static_cast<uint32_t>(s_few.key[j]);
      total += other;
      before += inverted_id > static_cast<uint32_t>(key) ? other : 0;
    }
    const Weight target = random_below(total, random_bits(row.seed, row.offset));
    if (before <= target && target < before + weight) s_token = id;  // true in one thread
  }
  __syncthreads();
  return s_token;
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
  __shared__ union {
    uint32_t list[kSlice];
    FewScratch few;
  } s_scratch;
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
    list_candidates(s_scratch.list, row, edge, slice);
  } else if (threadIdx.x == 0) {
    row.slice_weights[slice] = 0;
  }
  if (!arrives_last(row.state->num_arrived[1], slices)) return;
  int64_t token;
  if (edge.few) {
    token = draw_from_few(s_scratch.few, row, edge);
  } else {
    const Kept kept = keep_candidates(s_scratch.list, row, edge);
    token = draw(row, kept);
  }
  if (threadIdx.x == 0) p.out[row_index] = token;
}

}  // namespace llamatelemetry::sampling
