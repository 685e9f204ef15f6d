// activation(x . W^T + bias) of packed weights, of gates act(gate) * up, each step rounded to the
// dtype of x: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <vector>

#include "binding/launch.h"
#include "common/device.h"
#include "format/checks.h"
#include "gemm/choice_checks.h"
#include "gemm/epilogue.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace {

QuantLinearDescriptor descriptor_of(const Tensor& x, const Rows& rows, int64_t n, int format,
                                    const GroupScales& groups, DType dtype, bool exact) {
  QuantLinearDescriptor d{
      .m = rows.num_rows,
      .n = n,
      .k = rows.row_size,
      .codes = kFormats[format].codes,
      .scale_rule = kFormats[format].scale_rule,
      .group_shift = groups.shift,
      .dtype = dtype,
      .aligned = false,
      .exact = exact,
      .on_cuda = kOnCuda,
      .capability = 0,
      .code_capability = 0,
      .has_sm90_code = false,
      .num_sms = 0,
      .max_shared_bytes = 0,
  };
#ifdef LT_CUDA
  constexpr int64_t kVector = 8;  // elements of two bytes
  d.aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
              (rows.num_rows <= 1 || rows.row_stride % kVector == 0);
  d.capability = current_device().capability;
  d.code_capability = current_device().code_capability;
  d.num_sms = current_device().num_sms;
  d.max_shared_bytes = current_device().max_shared_bytes;
#ifdef LT_SM90
  d.has_sm90_code = true;
#endif
#else
  static_cast<void>(x);
#endif
  return d;
}

// The weights in the dtype of x, for torch's matmul.
Tensor dense_linear(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                    DenseWeightsParams params) {
  Tensor weights = allocate(x, {params.n, params.k});
  params.weights = weights.mutable_data_ptr();
  launch(op, launch_dense_weights, params, x);
  return call_torch_linear(x, weights, bias);
}

// x with its columns in the order that perm names.
Tensor permute_columns(const char* op, const Tensor& x, const Rows& rows, DType dtype,
                       const Tensor& perm) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor out = allocate(x, sizes);
  if (out.numel() == 0) return out;
  const PermuteColumnsParams params{
      .x = x.const_data_ptr(),
      .perm = static_cast<const int32_t*>(perm.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .m = rows.num_rows,
      .k = rows.row_size,
      .x_row_stride = rows.row_stride,
      .dtype = dtype,
  };
  launch(op, launch_permute_columns, params, x);
  return out;
}

void check_perm(const char* op, const Tensor& perm, const Tensor& x, int64_t k) {
  check_dtype(op, "perm", perm, ScalarType::Int);
  check_shape(op, "perm", perm, "[k]", {k});
  check_device(op, "perm", perm, "x", x);
  check_contiguous(op, "perm", perm);
}

Tensor quant_linear(const Tensor& given_x, const Tensor& packed, StringHandle format_name,
                    int64_t n, std::optional<Tensor> bias, bool exact, std::optional<Tensor> scales,
                    std::optional<Tensor> zeros, std::optional<Tensor> perm,
                    std::optional<StringHandle> activation_name) {
  constexpr const char* op = "quant_linear";
  const int format = check_format(op, take_string(format_name));
  check_side_tensors(op, format, scales, zeros, perm);
  const NamedActivation activation = check_activation(op, take_string(activation_name));
  // On the CPU floating-point codes have no products in int8: x stays as it is.
  if (!kOnCuda && is_floating(kFormats[format].codes)) exact = true;
  const DType dtype = check_floating(op, "x", given_x);
  Rows rows = rows_of(op, "x", given_x);
  check_packed(op, packed, format, n, rows.row_size);
  check_device(op, "packed", packed, "x", given_x);
  const void* bias_data = checked_vector(op, "bias", bias, "[n]", n, "x", given_x);
  const GroupScales groups = check_groups(op, packed, rows.row_size, scales, zeros);
  if (perm) check_perm(op, *perm, given_x, rows.row_size);
  check_gated_rows(op, "packed", n, activation);
  const DeviceGuard guard(given_x);
  const Tensor x = perm ? permute_columns(op, given_x, rows, dtype, *perm) : given_x;
  if (perm) rows.row_stride = rows.row_size;
  const auto* packed_data = static_cast<const uint8_t*>(packed.const_data_ptr());
  const QuantLinearImpl impl =
      choose_quant_linear(descriptor_of(x, rows, n, format, groups, dtype, exact));
  const bool follows =
      activation.activation != Activation::kNone && !applies_activation(impl, n, activation.gated);
  const LinearEpilogue epilogue{
      .bias = nullptr,  // already in what it takes
      .residual = nullptr,
      .residual_row_stride = 0,
      .activation = activation.activation,
      .gated = activation.gated,
  };
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = activation.gated ? n / 2 : n;
  if constexpr (kHasDenseWeights) {
    if (impl == QuantLinearImpl::kDense) {
      Tensor y = dense_linear(op, x, bias,
                              {.packed = packed_data,
                               .groups = groups,
                               .weights = nullptr,
                               .n = n,
                               .k = rows.row_size,
                               .format = format,
                               .dtype = dtype});
      return follows ? with_epilogue(op, y, rows.num_rows, sizes, epilogue, dtype) : y;
    }
  }
  std::vector<int64_t> product_sizes = sizes;
  if (follows) product_sizes.back() = n;
  Tensor out = allocate(x, product_sizes);
  if (out.numel() == 0) return follows ? allocate(x, sizes) : out;
  QuantLinearParams params{
      .x = x.const_data_ptr(),
      .packed = packed_data,
      .bias = bias_data,
      .groups = groups,
      .out = out.mutable_data_ptr(),
      .workspace = nullptr,
      .m = rows.num_rows,
      .n = n,
      .k = rows.row_size,
      .x_row_stride = rows.row_stride,
      .format = format,
      .dtype = dtype,
      .exact = exact,
      .impl = impl,
      .activation = follows ? Activation::kNone : activation.activation,
      .gated = !follows && activation.gated,
  };
  std::optional<Tensor> workspace;
  if (const int64_t num_bytes = quant_linear_workspace_bytes(params)) {
    workspace = allocate(x, {num_bytes}, ScalarType::Byte);
    params.workspace = workspace->mutable_data_ptr();
  }
  launch(op, launch_quant_linear, params, x);
  return follows ? with_epilogue(op, out, rows.num_rows, sizes, epilogue, dtype) : out;
}

}  // namespace

LT_IMPL(m) { m.impl("quant_linear", TORCH_BOX(&quant_linear)); }

}  // namespace llamatelemetry
