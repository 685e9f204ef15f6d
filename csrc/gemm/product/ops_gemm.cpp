// Products of two matrices: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <string>
#include <vector>

#include "gemm/product/ops_common.h"

namespace llamatelemetry {
namespace {

// A matrix [rows, columns] or a batch of them, transposed where the call says so.
struct Matrix {
  int64_t batch;
  int64_t rows;
  int64_t columns;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;
};

Matrix matrix_of(const char* op, const char* arg, const Tensor& x, bool transposed) {
  check(x.dim() == 2 || x.dim() == 3, op, arg, "be a matrix or a batch of matrices",
        "shape " + shape_text(x));
  const int64_t last = x.dim() - 1;
  Matrix matrix{.batch = last == 2 ? x.size(0) : 1,
                .rows = x.size(last - 1),
                .columns = x.size(last),
                .batch_stride = last == 2 ? x.stride(0) : 0,
                .row_stride = x.stride(last - 1),
                .column_stride = x.stride(last)};
  if (transposed) {
    std::swap(matrix.rows, matrix.columns);
    std::swap(matrix.row_stride, matrix.column_stride);
  }
  return matrix;
}

// The implementation that backend names, or the fastest that serves the call.
ProductImpl check_backend(const char* op, const std::optional<std::string>& backend,
                          const ProductDescriptor& d) {
  if (!backend) return choose_product(d);
  std::string names;
  for (const NamedProductImpl& named : kProductImpls) {
    if (*backend == named.name) {
      check(serves(named.impl, d), op, "backend",
            std::string("serve the call, and ") + named.name + " needs " + named.needs, *backend);
      return named.impl;
    }
    names += (names.empty() ? "" : ", ") + std::string(named.name);
  }
  check(false, op, "backend", "be None or one of {" + names + "}", *backend);
  return ProductImpl::kCpu;
}

void check_c(const char* op, const std::optional<Tensor>& c, double beta, const Tensor& out,
             ProductParams& p) {
  if (beta == 0.0) return;  // as in BLAS: c is not read
  check(c.has_value(), op, "c", "be given where beta is not 0",
        "None and beta = " + std::to_string(beta));
  bool same = c->dim() == out.dim();
  for (int64_t d = 0; same && d < out.dim(); ++d) same = c->size(d) == out.size(d);
  check(same, op, "c", "have the shape of the result, " + shape_text(out), shape_text(*c));
  check_like(op, "c", *c, "the result", out);
  check_last_contiguous(op, "c", *c);
  p.c = c->const_data_ptr();
  p.c_row_stride = c->stride(c->dim() - 2);
  p.c_batch_stride = c->dim() == 3 ? c->stride(0) : 0;
}

struct Options {
  double alpha = 1.0;
  double beta = 0.0;
  std::optional<Tensor> c;
  std::optional<std::string> backend;
};

Tensor product(const char* op, const Tensor& a, const Tensor& b, bool trans_a, bool trans_b,
               const Options& options, DType dtype, ScalarType out_dtype, ProductOut out_type) {
  check_like(op, "b", b, "a", a);
  const Matrix left = matrix_of(op, "a", a, trans_a), right = matrix_of(op, "b", b, trans_b);
  check(a.dim() == b.dim(), op, "b", "have as many dimensions as a (" + shape_text(a) + ")",
        shape_text(b));
  check(left.batch == right.batch, op, "b",
        "have the batch of a (" + std::to_string(left.batch) + ")", shape_text(b));
  check(left.columns == right.rows, op, "b",
        "have " + std::to_string(left.columns) + (trans_b ? " columns" : " rows") +
            ", the depth of a",
        shape_text(b));
  const DeviceGuard guard(a);
  std::vector<int64_t> sizes{left.rows, right.columns};
  if (a.dim() == 3) sizes.insert(sizes.begin(), left.batch);
  Tensor out = allocate(a, sizes, out_dtype);
  ProductParams params{
      .a = {a.const_data_ptr(), left.rows, left.batch_stride, left.row_stride, left.column_stride},
      .b = {b.const_data_ptr(), right.columns, right.batch_stride, right.column_stride,
            right.row_stride},
      .c = nullptr,
      .c_batch_stride = 0,
      .c_row_stride = 0,
      .row_scales = nullptr,
      .column_scales = nullptr,
      .row_blocks = nullptr,
      .column_blocks = nullptr,
      .bias = nullptr,
      .out = nullptr,
      .batch = left.batch,
      .m = left.rows,
      .n = right.columns,
      .k = left.columns,
      .alpha = static_cast<float>(options.alpha),
      .beta = static_cast<float>(options.beta),
      .dtype = dtype,
      .out_type = out_type,
      .impl = ProductImpl::kCpu,
  };
  params.impl = check_backend(op, options.backend, descriptor_of(params));
  check_c(op, options.c, options.beta, out, params);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  const std::optional<Tensor> packed_a = pack_if_needed(op, params, dtype, a, params.a);
  const std::optional<Tensor> packed_b = pack_if_needed(op, params, dtype, b, params.b);
  launch(op, launch_product, params, a);
  return out;
}

Tensor gemm(const Tensor& a, const Tensor& b, double alpha, double beta, bool trans_a, bool trans_b,
            std::optional<Tensor> c, std::optional<StringHandle> backend) {
  constexpr const char* op = "gemm";
  const auto name = take_string(backend);
  const DType dtype = check_floating(op, "a", a);
  return product(op, a, b, trans_a, trans_b, {alpha, beta, c, name}, dtype, a.scalar_type(),
                 out_type_of(dtype));
}

Tensor tensor_core_gemm(const Tensor& a, const Tensor& b, double alpha, double beta, bool trans_a,
                        bool trans_b, std::optional<Tensor> c,
                        std::optional<StringHandle> backend) {
  constexpr const char* op = "tensor_core_gemm";
  const auto name = take_string(backend);
  check(a.scalar_type() == ScalarType::Half || a.scalar_type() == ScalarType::BFloat16, op, "a",
        "be float16 or bfloat16", dtype_text(a.scalar_type()));
  return product(op, a, b, trans_a, trans_b, {alpha, beta, c, name}, *dtype_of(a.scalar_type()),
                 ScalarType::Float, ProductOut::kFloat32);
}

Tensor tensor_core_gemm_int8(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b,
                             std::optional<StringHandle> backend) {
  constexpr const char* op = "tensor_core_gemm_int8";
  const auto name = take_string(backend);
  check_dtype(op, "a", a, ScalarType::Char);
  const int64_t k = a.dim() < 2 ? 0 : a.size(a.dim() - (trans_a ? 2 : 1));
  check(k <= kMaxInt8Depth, op, "a",
        "have a depth of at most " + std::to_string(kMaxInt8Depth) + ", whose sums fit int32",
        std::to_string(k));
  return product(op, a, b, trans_a, trans_b, {1.0, 0.0, std::nullopt, name}, DType::kInt8,
                 ScalarType::Int, ProductOut::kInt32);
}

}  // namespace

LT_IMPL(m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("tensor_core_gemm", TORCH_BOX(&tensor_core_gemm));
  m.impl("tensor_core_gemm_int8", TORCH_BOX(&tensor_core_gemm_int8));
}

}  // namespace llamatelemetry
