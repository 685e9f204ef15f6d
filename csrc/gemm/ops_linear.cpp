// Dense linear layers: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <string>
#include <vector>

#include "binding/launch.h"
#include "common/device.h"
#include "gemm/choice.h"
#include "gemm/epilogue.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace {

LinearEpilogue check_epilogue(const char* op, const Tensor& x, int64_t n,
                              const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual,
                              const std::vector<int64_t>& out_sizes,
                              const NamedActivation& activation) {
  LinearEpilogue epilogue{
      .bias = checked_vector(op, "bias", bias, "[n]", n, "x", x),
      .residual = nullptr,
      .residual_row_stride = 0,
      .activation = activation.activation,
      .gated = activation.gated,
  };
  if (residual) {
    bool same = residual->dim() == static_cast<int64_t>(out_sizes.size());
    std::string wanted;
    for (size_t d = 0; d < out_sizes.size(); ++d) {
      same = same && residual->size(static_cast<int64_t>(d)) == out_sizes[d];
      wanted += (d ? ", " : "") + std::to_string(out_sizes[d]);
    }
    check(same, op, "residual", "have the shape of the result, [" + wanted + "]",
          "shape " + shape_text(*residual));
    check_like(op, "residual", *residual, "x", x);
    epilogue.residual = residual->const_data_ptr();
    epilogue.residual_row_stride = rows_of(op, "residual", *residual).row_stride;
  }
  return epilogue;
}

LinearDescriptor descriptor_of(const LinearParams& p) {
  LinearDescriptor d{
      .m = p.m,
      .n = p.n,
      .k = p.k,
      .dtype = p.dtype,
      .aligned = false,
      .on_cuda = kOnCuda,
      .recording = false,
      .code_capability = 0,
      .num_sms = 0,
  };
#ifdef LT_CUDA
  constexpr int64_t kVector = 8;  // elements of two bytes
  const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
  d.aligned = bits % 16 == 0 && (p.k | p.x_row_stride | p.weight_row_stride) % kVector == 0;
  d.code_capability = current_device().code_capability;
  d.num_sms = current_device().num_sms;
#else
  d.recording = recording_in_progress();
#endif
  return d;
}

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
              std::optional<Tensor> residual, std::optional<StringHandle> activation_name) {
  constexpr const char* op = "linear";
  const NamedActivation activation = check_activation(op, take_string(activation_name));
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check_dim(op, "weight", weight, 2, "[n, k]");
  const int64_t n = weight.size(0);
  check_shape(op, "weight", weight, "[n, k]", {n, rows.row_size});
  check_like(op, "weight", weight, "x", x);
  check_last_contiguous(op, "weight", weight);
  check_gated_rows(op, "weight", n, activation);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = activation.gated ? n / 2 : n;
  const LinearEpilogue epilogue = check_epilogue(op, x, n, bias, residual, sizes, activation);
  const DeviceGuard guard(x);
  LinearParams params{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = nullptr,
      .m = rows.num_rows,
      .n = n,
      .k = rows.row_size,
      .x_row_stride = rows.row_stride,
      .weight_row_stride = n > 1 ? weight.stride(0) : rows.row_size,
      .epilogue = epilogue,
      .dtype = dtype,
  };
  Tensor out;
  if (choose_linear(descriptor_of(params)) == LinearImpl::kMatmul) {
    out = call_torch_linear(x, weight, bias);
    if (!residual && activation.activation == Activation::kNone) return out;
    return with_epilogue(op, out, rows.num_rows, sizes, epilogue, dtype);
  }
  out = allocate(x, sizes);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  launch(op, launch_linear, params, x);
  return out;
}

}  // namespace

LT_IMPL(m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace llamatelemetry
