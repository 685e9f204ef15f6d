// What linear and quant_linear check of an activation, and its launch after a product.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "binding/launch.h"
#include "gemm/params.h"

namespace llamatelemetry {

inline NamedActivation check_activation(const char* op, const std::optional<std::string>& name) {
  if (!name) return {"None", Activation::kNone, false};
  std::string names = "None";
  for (const NamedActivation& known : kNamedActivations) {
    if (*name == known.name) return known;
    names += std::string(", ") + known.name;
  }
  check(false, op, "activation", "be one of {" + names + "}", *name);
  return {};
}

// Of the rows of a weight: argument is what the caller gave their number as.
inline void check_gated_rows(const char* op, const char* argument, int64_t n,
                             const NamedActivation& activation) {
  check(!activation.gated || n % 2 == 0, op, argument,
        std::string("have an even number of rows for ") + activation.name + " (gate, then up)",
        std::to_string(n));
}

// The result for y [m, n], the product and its bias: y itself, written over, where nothing is
// gated.
inline Tensor with_epilogue(const char* op, const Tensor& y, int64_t m,
                            const std::vector<int64_t>& out_sizes, const LinearEpilogue& epilogue,
                            DType dtype) {
  Tensor out = epilogue.gated ? allocate(y, out_sizes) : y;
  if (out.numel() == 0) return out;
  const LinearEpilogueParams params{
      .y = y.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .m = m,
      .out_n = out_sizes.back(),
      .epilogue = epilogue,
      .dtype = dtype,
  };
  launch(op, launch_linear_epilogue, params, y);
  return out;
}

}  // namespace llamatelemetry
