// out = x . W^T and what follows, W [n, k] as torch has it, in float32 whatever the dtype. Bound by
// reading W for few rows of x. Lanes run along k; every sum has one order, so a row of out depends
// neither on the other rows nor on how many there are. An item makes kItemColumns columns of
// kItemTokens rows of x.
//
// Many rows of x are torch's matmul, which blocks for the caches; they come here while a recording
// is made, which torch's would not be part of (choice.h).
#include "cpu/parallel.h"
#include "gemm/params.h"
#include "vec/activation.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kItemColumns = 16;
constexpr int64_t kItemTokens = 64;
constexpr int kPanelRows = 4;  // of W, which share each load of x
#if defined(LT_ISA_AVX512)
constexpr int kMaxPanelTokens = 4;  // 16 sums and 8 operands in 32 registers
#else
constexpr int kMaxPanelTokens = 2;
#endif
constexpr int64_t kPart = 32 * Vec::kLanes;  // summed by itself: long sums round less that way

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// sums[t][r] of kPanelRows rows of W and kTokens rows of x, over k.
template <int kTokens, typename T>
void dot_rows(const T* const (&w)[kPanelRows], const T* x, int64_t x_row_stride, int64_t k,
              float (&sums)[kMaxPanelTokens][kPanelRows]) {
  Vec total[kTokens][kPanelRows];
  for (auto& row : total) {
    for (Vec& sum : row) sum = vec_set(0.0f);
  }
  for (int64_t first = 0; first < k; first += kPart) {
    Vec part[kTokens][kPanelRows];
    for (auto& row : part) {
      for (Vec& sum : row) sum = vec_set(0.0f);
    }
    for_each_vec(smaller(kPart, k - first), [&](int64_t i, auto lanes) {
      Vec weights[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r) weights[r] = vec_load(w[r] + first + i, lanes);
      for (int t = 0; t < kTokens; ++t) {
        const Vec value = vec_load(x + t * x_row_stride + first + i, lanes);
        for (int r = 0; r < kPanelRows; ++r) part[t][r] = vec_fma(weights[r], value, part[t][r]);
      }
    });
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kPanelRows; ++r) total[t][r] = total[t][r] + part[t][r];
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kPanelRows; ++r) sums[t][r] = vec_sum(total[t][r]);
  }
}

// y[t][i] = row `first + i` of W with the rows of x from token on, rounded, with its bias.
template <typename T, int kTokens>
void products(const LinearParams& p, int64_t first, int count, int64_t token,
              float (&y)[kMaxPanelTokens][kItemColumns]) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  const T* bias = static_cast<const T*>(p.epilogue.bias);
  for (int i = 0; i < count; i += kPanelRows) {
    const T* rows[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) {  // past the last row: that one once more
      rows[r] = weight + smaller(first + i + r, first + count - 1) * p.weight_row_stride;
    }
    float sums[kMaxPanelTokens][kPanelRows];
    dot_rows<kTokens>(rows, x, p.x_row_stride, p.k, sums);
    for (int r = 0; r < kPanelRows && i + r < count; ++r) {
      const float add = bias ? to_float(bias[first + i + r]) : 0.0f;
      for (int t = 0; t < kTokens; ++t) {
        y[t][i + r] = rounded_to<T>(bias ? sums[t][r] + add : sums[t][r]);
      }
    }
  }
}

// What follows the product, for `count` columns from column on of one row; Y: float32 or T.
template <typename T, typename Y>
void finish(const LinearEpilogue& e, int64_t row, int64_t column, int64_t count, const Y* y,
            const Y* up, T* out) {
  const T* residual = static_cast<const T*>(e.residual);
  if (residual) residual += row * e.residual_row_stride + column;
  for_each_vec(count, [&](int64_t i, auto lanes) {
    Vec value = vec_load(y + i, lanes);
    if (e.activation != Activation::kNone) {
      value = vec_rounded_to<T>(activated(e.activation, value));
    }
    if (e.gated) value = vec_rounded_to<T>(value * vec_load(up + i, lanes));
    if (residual) value = vec_load(residual + i, lanes) + value;
    vec_store(out + i, lanes, value);
  });
}

template <typename T, int kTokens>
void linear_panel(const LinearParams& p, int64_t column, int64_t token) {
  const int64_t out_n = p.epilogue.gated ? p.n / 2 : p.n;
  const int count = static_cast<int>(smaller(kItemColumns, out_n - column));
  float y[kMaxPanelTokens][kItemColumns];
  float up[kMaxPanelTokens][kItemColumns];
  products<T, kTokens>(p, column, count, token, y);
  if (p.epilogue.gated) products<T, kTokens>(p, out_n + column, count, token, up);
  for (int t = 0; t < kTokens; ++t) {
    finish(p.epilogue, token + t, column, count, y[t], up[t],
           static_cast<T*>(p.out) + (token + t) * out_n + column);
  }
}

int64_t num_chunks(const LinearParams& p) { return (p.m + kItemTokens - 1) / kItemTokens; }

void linear_items(const LinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item / num_chunks(p) * kItemColumns;
      int64_t token = item % num_chunks(p) * kItemTokens;
      const int64_t stop = smaller(token + kItemTokens, p.m);
      for (; token + kMaxPanelTokens <= stop; token += kMaxPanelTokens) {
        linear_panel<T, kMaxPanelTokens>(p, column, token);
      }
      for (; token < stop; ++token) linear_panel<T, 1>(p, column, token);
    }
  });
}

// An item is a run of columns of one row, so that a single wide row keeps several cores busy.
constexpr int64_t kEpilogueColumns = 2048;

int64_t epilogue_runs(const LinearEpilogueParams& p) {
  return (p.out_n + kEpilogueColumns - 1) / kEpilogueColumns;
}

void epilogue_items(const LinearEpilogueParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t columns = p.epilogue.gated ? 2 * p.out_n : p.out_n;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / epilogue_runs(p);
      const int64_t column = item % epilogue_runs(p) * kEpilogueColumns;
      const T* y = static_cast<const T*>(p.y) + row * columns + column;
      T* out = static_cast<T*>(p.out) + row * p.out_n + column;
      finish(p.epilogue, row, column, smaller(kEpilogueColumns, p.out_n - column), y, y + p.out_n,
             out);
    }
  });
}

}  // namespace

Error launch_linear(const LinearParams& p, Stream) {
  const int64_t columns = p.epilogue.gated ? p.n / 2 : p.n;
  const auto tokens = static_cast<double>(smaller(kItemTokens, p.m));
  const double rows = kItemColumns * (p.epilogue.gated ? 2.0 : 1.0);
  const double item_ns = rows * static_cast<double>(p.k) * (0.1 + 0.04 * tokens);
  const int64_t num_items = (columns + kItemColumns - 1) / kItemColumns * num_chunks(p);
  parallel_over<linear_items>("linear", {num_items, item_ns}, p);
  return nullptr;
}

Error launch_linear_epilogue(const LinearEpilogueParams& p, Stream) {
  const auto columns = static_cast<double>(smaller(kEpilogueColumns, p.out_n));
  parallel_over<epilogue_items>("linear.epilogue", {p.m * epilogue_runs(p), 20.0 + columns}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_linear, LinearParams)
LT_CPU_LAUNCHER(launch_linear_epilogue, LinearEpilogueParams)
