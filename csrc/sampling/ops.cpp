// Sampling: checks, allocation and Params, compiled once for each library.
#include "binding/checks.h"
#include "binding/launch.h"
#include "sampling/params.h"

namespace llamatelemetry {
namespace {

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
              const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& offset) {
  constexpr const char* op = "sample";
  const DType dtype = check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[batch, vocab_size]");
  check_last_contiguous(op, "logits", logits);
  const int64_t batch = logits.size(0);
  const int64_t vocab_size = logits.size(1);
  check(vocab_size >= 1 && vocab_size <= kMaxVocabSize, op, "logits",
        "have a vocab_size of 1 to " + std::to_string(kMaxVocabSize), std::to_string(vocab_size));
  const auto check_column = [&](const char* arg, const Tensor& x, ScalarType column_dtype) {
    check_shape(op, arg, x, "[batch]", {batch});
    check_dtype(op, arg, x, column_dtype);
    check_device(op, arg, x, "logits", logits);
    check_contiguous(op, arg, x);
  };
  check_column("temperature", temperature, ScalarType::Float);
  check_column("top_k", top_k, ScalarType::Int);
  check_column("top_p", top_p, ScalarType::Float);
  check_column("min_p", min_p, ScalarType::Float);
  check_column("seed", seed, ScalarType::Long);
  check_column("offset", offset, ScalarType::Long);
  const DeviceGuard guard(logits);
  Tensor out = allocate(logits, {batch}, ScalarType::Long);
  if (batch == 0) return out;
  Tensor workspace =
      allocate(logits, {batch * sample_workspace_bytes(vocab_size)}, ScalarType::Byte);
  const SampleParams params{
      .logits = logits.const_data_ptr(),
      .temperature = temperature.const_data_ptr<float>(),
      .top_k = top_k.const_data_ptr<int32_t>(),
      .top_p = top_p.const_data_ptr<float>(),
      .min_p = min_p.const_data_ptr<float>(),
      .seed = seed.const_data_ptr<int64_t>(),
      .offset = offset.const_data_ptr<int64_t>(),
      .out = out.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr(),
      .batch = batch,
      .vocab_size = vocab_size,
      .logits_row_stride = logits.stride(0),
      .dtype = dtype,
  };
  launch(op, launch_sample, params, logits);
  return out;
}

void apply_token_bitmask_(Tensor logits, const Tensor& bitmask) {
  constexpr const char* op = "apply_token_bitmask_";
  const DType dtype = check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[batch, vocab_size]");
  check_last_contiguous(op, "logits", logits);
  const int64_t batch = logits.size(0);
  const int64_t vocab_size = logits.size(1);
  check_apart(op, "logits", batch, logits.stride(0), vocab_size);
  const int64_t num_words = (vocab_size + kTokensPerWord - 1) / kTokensPerWord;
  check_shape(op, "bitmask", bitmask, "[batch, ceil(vocab_size / 32)]", {batch, num_words});
  check_dtype(op, "bitmask", bitmask, ScalarType::Int);
  check_device(op, "bitmask", bitmask, "logits", logits);
  check_last_contiguous(op, "bitmask", bitmask);
  if (batch == 0 || vocab_size == 0) return;
  const DeviceGuard guard(logits);
  const TokenBitmaskParams params{
      .logits = logits.mutable_data_ptr(),
      .bitmask = bitmask.const_data_ptr<int32_t>(),
      .batch = batch,
      .vocab_size = vocab_size,
      .num_words = num_words,
      .logits_row_stride = logits.stride(0),
      .bitmask_row_stride = bitmask.stride(0),
      .dtype = dtype,
  };
  launch(op, launch_apply_token_bitmask, params, logits);
}

}  // namespace

LT_IMPL(m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("apply_token_bitmask_", TORCH_BOX(&apply_token_bitmask_));
}

}  // namespace llamatelemetry
