// out = a . b^T on the CPU. An item is a block of out: both operands' rows are copied, kDepth of k
// at a time, to panels of floats that the loop over k reads in order. Sums over kDepth stay in
// registers. Every sum has one order, so a row of out depends neither on the others nor on threads.
// Products of bytes have kernels of their own: bytes_cpu.cpp.
#include "cpu/parallel.h"
#include "gemm/product/epilogue_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {

Error launch_product_bytes(const ProductParams& p, Stream stream);  // bytes_cpu.cpp

namespace {

constexpr int kPanelRows = 6;                   // of a
constexpr int kPanelColumns = 2 * Vec::kLanes;  // of b: 12 sums and 3 operands in registers
constexpr int kItemRows = 16 * kPanelRows;
constexpr int kItemColumns = 64 * (Vec::kLanes > 8 ? 2 : 1);
constexpr int kDepth = 128;
static_assert(kItemColumns % kPanelColumns == 0);

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
float element(float x) { return x; }
float element(Half x) { return to_float(x); }
float element(BFloat16 x) { return to_float(x); }

// Rows first to first + kWidth of x over `depth` of k as panel[depth][kWidth], zeros for rows that
// do not exist.
template <int kWidth, typename T>
void pack(const Operand& x, const T* base, int64_t first, int64_t first_k, int depth,
          float* panel) {
  const int rows = static_cast<int>(smaller(kWidth, x.rows - first));
  const T* from = base + first * x.row_stride + first_k * x.k_stride;
  if (x.row_stride == 1) {
    for (int d = 0; d < depth; ++d) {
      for (int r = 0; r < rows; ++r) panel[d * kWidth + r] = element(from[d * x.k_stride + r]);
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      const T* row = from + r * x.row_stride;
      for (int d = 0; d < depth; ++d) panel[d * kWidth + r] = element(row[d * x.k_stride]);
    }
  }
  for (int r = rows; r < kWidth; ++r) {
    for (int d = 0; d < depth; ++d) panel[d * kWidth + r] = 0.0f;
  }
}

// sums[kPanelRows][kPanelColumns] over depth.
void multiply(const float* a, const float* b, int depth, float* sums) {
  Vec low[kPanelRows], high[kPanelRows];
  for (int r = 0; r < kPanelRows; ++r) low[r] = high[r] = vec_set(0.0f);
  for (int d = 0; d < depth; ++d) {
    const Vec b_low = vec_load(b + d * kPanelColumns);
    const Vec b_high = vec_load(b + d * kPanelColumns + Vec::kLanes);
    for (int r = 0; r < kPanelRows; ++r) {
      const Vec x = vec_set(a[d * kPanelRows + r]);
      low[r] = vec_fma(x, b_low, low[r]);
      high[r] = vec_fma(x, b_high, high[r]);
    }
  }
  for (int r = 0; r < kPanelRows; ++r) {
    vec_store(sums + r * kPanelColumns, low[r]);
    vec_store(sums + r * kPanelColumns + Vec::kLanes, high[r]);
  }
}

template <typename T>
void block(const ProductParams& p, int64_t batch, int64_t first_row, int64_t first_column) {
  const int rows = static_cast<int>(smaller(kItemRows, p.m - first_row));
  const int columns = static_cast<int>(smaller(kItemColumns, p.n - first_column));
  const T* a = static_cast<const T*>(p.a.data) + batch * p.a.batch_stride;
  const T* b = static_cast<const T*>(p.b.data) + batch * p.b.batch_stride;
  alignas(64) float a_panels[kItemRows * kDepth], b_panels[kItemColumns * kDepth];
  alignas(64) float part[kPanelRows * kPanelColumns];
  float sums[kItemRows][kItemColumns];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) sums[r][c] = 0;
  }
  for (int64_t first_k = 0; first_k < p.k; first_k += kDepth) {
    const int depth = static_cast<int>(smaller(kDepth, p.k - first_k));
    for (int r = 0; r < rows; r += kPanelRows) {
      pack<kPanelRows>(p.a, a, first_row + r, first_k, depth, a_panels + r * kDepth);
    }
    for (int c = 0; c < columns; c += kPanelColumns) {
      pack<kPanelColumns>(p.b, b, first_column + c, first_k, depth, b_panels + c * kDepth);
      for (int r = 0; r < rows; r += kPanelRows) {
        multiply(a_panels + r * kDepth, b_panels + c * kDepth, depth, part);
        for (int i = 0; i < kPanelRows && r + i < rows; ++i) {
          const int width = static_cast<int>(smaller(kPanelColumns, columns - c));
          for (int j = 0; j < width; ++j) {
            sums[r + i][c + j] += part[i * kPanelColumns + j];
          }
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    store_row(p, batch, first_row + r, first_column, columns, sums[r]);
  }
}

int64_t row_blocks(const ProductParams& p) { return (p.m + kItemRows - 1) / kItemRows; }
int64_t column_blocks(const ProductParams& p) { return (p.n + kItemColumns - 1) / kItemColumns; }

void product_items(const ProductParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t in_batch = item % (row_blocks(p) * column_blocks(p));
    const int64_t batch = item / (row_blocks(p) * column_blocks(p));
    const int64_t row = in_batch % row_blocks(p) * kItemRows;
    const int64_t column = in_batch / row_blocks(p) * kItemColumns;
    dispatch_dtype(p.dtype,
                   [&](auto type) { block<typename decltype(type)::type>(p, batch, row, column); });
  }
}

}  // namespace

Error launch_product(const ProductParams& p, Stream stream) {
  if (dtype_bytes(p.dtype) == 1) return launch_product_bytes(p, stream);
  const auto rows = static_cast<double>(smaller(kItemRows, p.m));
  const auto columns = static_cast<double>(smaller(kItemColumns, p.n));
  const double item_ns = static_cast<double>(p.k) * (0.02 * rows * columns + rows + columns);
  parallel_over<product_items>("gemm", {p.batch * row_blocks(p) * column_blocks(p), item_ns}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_product, ProductParams)
