// out[m, j] = x[m, perm[j]]. One item per row.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void permute_rows(const PermuteColumnsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    T* out = static_cast<T*>(p.out) + row * p.k;
    for (int64_t i = 0; i < p.k; ++i) {
      const int64_t from = p.perm[i];
      out[i] = from >= 0 && from < p.k ? x[from] : T{};
    }
  }
}

void permute_items(const PermuteColumnsParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kFloat32) {
    permute_rows<uint32_t>(p, begin, end);
  } else {
    permute_rows<uint16_t>(p, begin, end);
  }
}

}  // namespace

Error launch_permute_columns(const PermuteColumnsParams& p, Stream) {
  parallel_over<permute_items>("quant_linear.permute", {p.m, static_cast<double>(p.k)}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_permute_columns, PermuteColumnsParams)
