// One token a row from softmax(logits / temperature) after top-k, top-p and min-p, see row.h.
// Bound by reading the logits, once: the first launch leaves the largest of every group of 64, and
// what follows skips the groups that cannot hold a token. The k-th largest of those maxima is a
// lower bound of the k-th largest logit; top-p looks ever deeper below the best score until it has
// the weight it wants. So a few hundred tokens are gathered, and exact selection among them is
// cheap.
//   sample_maxima   item = segment: largest logit of every group
//   sample_weights  item = segment: weight of the segment, where a row needs the total of all
//   tokens sample_tokens   item = row: gather, filter, draw
#include "cpu/parallel.h"
#include "sampling/row.h"
#include "sampling/workspace_cpu.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int64_t kLanes = Vec::kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes elements, of which the first left exist; the rest are NaN, which nothing below selects.
template <typename T>
Vec load_of(const T* x, int64_t left) {
  return left >= kLanes ? vec_load(x) : vec_load_first(x, static_cast<int>(left), NAN);
}

// The largest number of x, -inf for none: vec_max gives its second operand where the first is NaN.
template <typename T>
float largest_of(const T* x, int64_t size) {
  Vec largest = vec_set(-INFINITY);
  for (int64_t i = 0; i < size; i += kLanes) largest = vec_max(load_of(x + i, size - i), largest);
  return vec_reduce_max(largest);
}

// A row and its part of the workspace. Scores are vectors of logits divided by the temperature.
template <typename T>
struct Row : SampleRow {
  const T* logits;
  int64_t vocab_size;
  uint64_t* segment_weight;
  float* group_max;
  float* scores;  // candidates: tokens that may be drawn, ids ascending
  float* exps;
  int32_t* ids;
  float largest;  // logit
  float best;     // score

  Row(const SampleParams& p, int64_t row) : SampleRow(sample_row(p, row)) {
    logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
    vocab_size = p.vocab_size;
    char* workspace = static_cast<char*>(p.workspace);
    workspace += row * row_workspace_bytes(vocab_size);
    segment_weight = reinterpret_cast<uint64_t*>(workspace);
    group_max = reinterpret_cast<float*>(segment_weight + num_segments(vocab_size));
    scores = group_max + num_groups(vocab_size);
    exps = scores + vocab_size + kPad;
    ids = reinterpret_cast<int32_t*>(exps + vocab_size + kPad);
  }

  // After the first launch.
  void find_best() {
    largest = largest_of(group_max, num_groups(vocab_size));
    best = largest / temperature;
    greedy = greedy || !(std::fabs(best) < INFINITY);
  }

  uint64_t total_of_segments() const {
    uint64_t total = 0;
    for (int64_t s = 0; s < num_segments(vocab_size); ++s) total += segment_weight[s];
    return total;
  }

  bool top_k_on() const { return top_k < vocab_size; }
  bool filtered() const { return top_k_on() || top_p_on || min_p_on; }
  // Where the weight of all tokens matters: for the draw, or for top-p.
  bool needs_total() const { return !greedy && (!filtered() || (top_p_on && !top_k_on())); }
};

template <typename T>
void maxima_of_segments(const SampleParams& p, int64_t begin, int64_t end) {
  const int64_t segments = num_segments(p.vocab_size);
  for (int64_t item = begin; item < end; ++item) {
    const Row<T> r(p, item / segments);
    const int64_t first = item % segments * (kSegment / kGroup);
    const int64_t last = smaller(first + kSegment / kGroup, num_groups(p.vocab_size));
    for (int64_t group = first; group < last; ++group) {
      const int64_t start = group * kGroup;
      r.group_max[group] = largest_of(r.logits + start, smaller(kGroup, p.vocab_size - start));
    }
  }
}

// round(x * 2^40) for x in [0, 1], in a form that compilers turn into vector instructions: the
// mantissa of 2^52 + n holds n.
LT_INLINE uint64_t weight_of(float x) {
  const double shifted = static_cast<double>(x * kWeightScale) + 0x1p52;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits & 0xfffffffffffff;
}

uint64_t total_weight(const float* exps, int64_t size) {
  uint64_t total = 0;
  for (int64_t i = 0; i < size; ++i) total += weight_of(exps[i]);
  return total;
}

template <typename T>
void weights_of_segments(const SampleParams& p, int64_t begin, int64_t end) {
  const int64_t segments = num_segments(p.vocab_size);
  for (int64_t item = begin; item < end; ++item) {
    Row<T> r(p, item / segments);
    r.find_best();
    if (!r.needs_total()) continue;
    const int64_t first = item % segments * kSegment;
    const int64_t size = smaller(kSegment, p.vocab_size - first);
    float exps[kSegment];
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec score = load_of(r.logits + first + i, size - i) / vec_set(r.temperature);
      // NaN becomes -inf, whose weight is 0.
      vec_store(exps + i, vec_exp(vec_max(score - vec_set(r.best), vec_set(-INFINITY))));
    }
    r.segment_weight[item % segments] = total_weight(exps, size);
  }
}

struct Selected {
  uint32_t key;
  uint64_t below;  // weight of smaller keys
};

// The smallest key at which the weight of it and all smaller keys exceeds budget, digit by digit;
// the largest possible key when none does.
template <typename KeyOf, typename WeightOf>
Selected select(int64_t size, KeyOf key_of, WeightOf weight_of, uint64_t budget) {
  Selected selected{0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t bins[256] = {};
    for (int64_t i = 0; i < size; ++i) {
      const uint64_t key = key_of(i);
      if (key >> (shift + 8) == selected.key) bins[key >> shift & 255] += weight_of(i);
    }
    uint32_t bin = 0;
    while (bin < 255 && selected.below + bins[bin] <= budget) selected.below += bins[bin++];
    selected.key = selected.key << 8 | bin;
  }
  return selected;
}

uint32_t rank_of(float score) { return rank_of_bits(float_to_bits(score + 0.0f)); }

template <typename T>
void exponentiate(const Row<T>& r, int64_t size) {
  for (int64_t i = size; i < size + kLanes; ++i) r.scores[i] = -INFINITY;
  for (int64_t i = 0; i < size; i += kLanes) {
    vec_store(r.exps + i, vec_exp(vec_load(r.scores + i) - vec_set(r.best)));
  }
}

// Gathers and exponentiates the tokens of [begin, end), whole groups, with score - best >= floor;
// returns how many.
template <typename T>
int64_t gather(const Row<T>& r, int64_t begin, int64_t end, float floor) {
  int64_t size = 0;
  for (int64_t start = begin; start < end; start += kGroup) {
    if (!(r.group_max[start / kGroup] / r.temperature - r.best >= floor)) continue;
    for (int64_t i = start; i < smaller(start + kGroup, end); i += kLanes) {
      const Vec score = load_of(r.logits + i, r.vocab_size - i) / vec_set(r.temperature);
      uint32_t reached = vec_at_least(score - vec_set(r.best), vec_set(floor));
      if (reached == 0) continue;
      float scores[kLanes];
      vec_store(scores, score);
      for (; reached != 0; reached &= reached - 1) {
        const int lane = __builtin_ctz(reached);
        r.scores[size] = scores[lane];
        r.ids[size++] = static_cast<int32_t>(i + lane);
      }
    }
  }
  exponentiate(r, size);
  return size;
}

// Gathers ever deeper below the best score until enough(size) holds, or all whose weight is not 0.
template <typename T, typename Enough>
int64_t gather_until(const Row<T>& r, Enough enough) {
  for (float floor = -4.0f;; floor *= 2.0f) {
    const int64_t size = gather(r, 0, r.vocab_size, floor);
    if (floor <= kSmallestScore || enough(size)) return size;
  }
}

// Keeps the candidates that keep(i) names, in order; returns how many.
template <typename T, typename Keep>
int64_t retain(const Row<T>& r, int64_t size, Keep keep) {
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!keep(i)) continue;
    r.scores[kept] = r.scores[i];
    r.exps[kept] = r.exps[i];
    r.ids[kept++] = r.ids[i];
  }
  return kept;
}

// Gathers at least the k best tokens and keeps those and their equals. The k-th largest group
// maximum is a tight floor; there is none for k beyond the number of groups.
template <typename T>
int64_t gather_top_k(const Row<T>& r) {
  const auto one = [](int64_t) { return 1; };
  int64_t size;
  if (r.top_k <= num_groups(r.vocab_size)) {
    const auto rank = [&](int64_t group) { return rank_of(r.group_max[group]); };
    const uint32_t kth = select(num_groups(r.vocab_size), rank, one, r.top_k - 1).key;
    int64_t group = 0;
    while (rank(group) != kth) ++group;
    const float floor = r.group_max[group] / r.temperature - r.best;
    size = gather(r, 0, r.vocab_size, floor > kSmallestScore ? floor : kSmallestScore);
  } else {
    size = gather_until(r, [&](int64_t found) { return found >= r.top_k; });
  }
  if (size <= r.top_k) return size;
  const auto rank = [&](int64_t i) { return rank_of(r.scores[i]); };
  const uint32_t kth = select(size, rank, one, r.top_k - 1).key;
  return retain(r, size, [&](int64_t i) { return rank(i) <= kth; });
}

template <typename T>
int64_t retain_top_p(const Row<T>& r, int64_t size, uint64_t wanted) {
  const auto rank = [&](int64_t i) { return rank_of(r.scores[i]); };
  const auto weight = [&](int64_t i) { return weight_of(r.exps[i]); };
  const Selected last = select(size, rank, weight, wanted - 1);
  // Of the tokens equal to the last one kept, those with the lowest ids go first.
  uint64_t equal = 0;
  uint64_t weight_of_one = 1;
  for (int64_t i = 0; i < size; ++i) {
    if (rank(i) != last.key) continue;
    ++equal;
    weight_of_one = weight(i);
  }
  const uint64_t kept = (wanted - 1 - last.below) / weight_of_one + 1;
  uint64_t removed = equal > kept ? equal - kept : 0;
  return retain(r, size, [&](int64_t i) {
    if (rank(i) != last.key) return rank(i) < last.key;
    return removed == 0 || (removed--, false);
  });
}

template <typename T>
int64_t greedy_token(const Row<T>& r) {
  for (int64_t group = 0; group < num_groups(r.vocab_size); ++group) {
    if (r.group_max[group] != r.largest) continue;
    for (int64_t i = group * kGroup; i < smaller((group + 1) * kGroup, r.vocab_size); i += kLanes) {
      const uint32_t found =
          vec_at_least(load_of(r.logits + i, r.vocab_size - i), vec_set(r.largest));
      if (found != 0) return i + __builtin_ctz(found);
    }
  }
  return 0;  // all NaN
}

// The first candidate at which the cumulative weight exceeds target.
template <typename T>
int64_t walk(const Row<T>& r, int64_t size, uint64_t target) {
  int64_t i = 0;
  for (; i < size - 1; ++i) {
    const uint64_t weight = weight_of(r.exps[i]);
    if (target < weight) break;
    target -= weight;
  }
  return r.ids[i];
}

template <typename T>
int64_t draw_unfiltered(const Row<T>& r, uint64_t random) {
  uint64_t target = random_below(r.total_of_segments(), random);
  int64_t segment = 0;
  while (target >= r.segment_weight[segment]) target -= r.segment_weight[segment++];
  const int64_t begin = segment * kSegment;
  const int64_t end = smaller(begin + kSegment, r.vocab_size);
  return walk(r, gather(r, begin, end, kSmallestScore), target);
}

template <typename T>
int64_t draw_filtered(const Row<T>& r, uint64_t random) {
  int64_t size;
  if (r.top_k_on()) {
    size = gather_top_k(r);
    if (r.top_p_on) {
      size = retain_top_p(r, size, top_p_weight(r.top_p, total_weight(r.exps, size)));
    }
  } else if (r.top_p_on) {
    const uint64_t wanted = top_p_weight(r.top_p, r.total_of_segments());
    size = gather_until(r, [&](int64_t found) { return total_weight(r.exps, found) >= wanted; });
    size = retain_top_p(r, size, wanted);
  } else {
    size = gather(r, 0, r.vocab_size, logf(r.min_p) - 0.01f);  // far more than logf rounds
  }
  if (r.min_p_on) size = retain(r, size, [&](int64_t i) { return r.exps[i] >= r.min_p; });
  return walk(r, size, random_below(total_weight(r.exps, size), random));
}

template <typename T>
void tokens_of_rows(const SampleParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Row<T> r(p, row);
    r.find_best();
    const uint64_t random = random_bits(p.seed[row], p.offset[row]);
    p.out[row] = r.greedy       ? greedy_token(r)
                 : r.filtered() ? draw_filtered(r, random)
                                : draw_unfiltered(r, random);
  }
}

void sample_maxima(const SampleParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    maxima_of_segments<typename decltype(type)::type>(p, begin, end);
  });
}

void sample_weights(const SampleParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    weights_of_segments<typename decltype(type)::type>(p, begin, end);
  });
}

void sample_tokens(const SampleParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { tokens_of_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_sample(const SampleParams& p, Stream) {
  const int64_t items = p.batch * num_segments(p.vocab_size);
  parallel_over<sample_maxima>("sample_maxima", Work{items, 600.0}, p);
  // Deliberately low: most rows have no work here.
  parallel_over<sample_weights>("sample_weights", Work{items, 200.0}, p);
  const double row_ns = 2000.0 + 0.05 * static_cast<double>(p.vocab_size);
  parallel_over<sample_tokens>("sample_tokens", Work{p.batch, row_ns}, p);
  return nullptr;
}

}  // namespace LT_ISA

#if defined(LT_ISA_SCALAR)
int64_t sample_workspace_bytes(int64_t vocab_size) {  // the same at every level
  return row_workspace_bytes(vocab_size);
}
#endif

}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_sample, SampleParams)
