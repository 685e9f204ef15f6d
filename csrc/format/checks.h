// The checks of quantised weights that rooms share.
#pragma once

#include <optional>
#include <string>

#include "binding/checks.h"
#include "format/format.h"
#include "format/groups.h"

namespace llamatelemetry {

// The row of kFormats with the name that an op was given.
inline int check_format(const char* op, const std::string& name) {
  for (int format = 0; format < kNumFormats; ++format) {
    if (name == kFormats[format].name) return format;
  }
  std::string names;
  for (const FormatDescriptor& format : kFormats) {
    names += (names.empty() ? "{" : ", ") + std::string(format.name);
  }
  check(false, op, "format", "be one of " + names + "}", name);
  return 0;
}

// How packed weights are arranged, format/layout.h.
inline void check_packed_layout(const char* op, const std::string& layout) {
  check(layout == kPackedLayouts[0], op, "layout",
        std::string("be one of {") + kPackedLayouts[0] + "}", layout);
}

// A format whose blocks hold all that it needs: the others are quant_linear's alone.
inline int check_block_format(const char* op, const std::string& name) {
  const int format = check_format(op, name);
  check(!kFormats[format].takes_scales(), op, "format",
        "be one whose blocks hold their scales, as " + std::string(kFormats[0].name), name);
  return format;
}

// Scales [ceil(n / 16), groups, 16] and zero points of formats that take them.
inline GroupScales check_groups(const char* op, const Tensor& packed, int64_t k,
                                const std::optional<Tensor>& scales,
                                const std::optional<Tensor>& zeros) {
  GroupScales groups{nullptr, nullptr, 1, 31};
  if (!scales) return groups;
  check_dtype(op, "scales", *scales, ScalarType::Float);
  check_dim(op, "scales", *scales, 3, "[ceil(n / 16), groups, 16]");
  groups.groups = scales->size(1);
  const int64_t tiles = packed.size(0);
  check_shape(op, "scales", *scales, "[ceil(n / 16), groups, 16]",
              {tiles, groups.groups, kTileRows});
  const int64_t size = groups.groups > 0 && k % groups.groups == 0 ? k / groups.groups : 0;
  check(
      groups.groups == 1 || size == 32 || size == 64 || size == 128, op, "scales",
      "have one group of each 32, 64, 128 or all of the " + std::to_string(k) + " weights of a row",
      std::to_string(groups.groups) + " groups");
  if (groups.groups != 1) groups.shift = size == 32 ? 0 : size == 64 ? 1 : 2;
  const auto check_side = [&](const char* arg, const Tensor& tensor) {
    check_device(op, arg, tensor, "packed", packed);
    check_contiguous(op, arg, tensor);
    const auto misaligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16;
    check(misaligned == 0, op, arg, "start at a multiple of 16 bytes",
          std::to_string(misaligned) + " bytes past one; call .clone()");
  };
  check_side("scales", *scales);
  groups.scales = static_cast<const float*>(scales->const_data_ptr());
  if (zeros) {
    check_dtype(op, "zeros", *zeros, ScalarType::Byte);
    check_shape(op, "zeros", *zeros, "the shape of scales", {tiles, groups.groups, kTileRows});
    check_side("zeros", *zeros);
    groups.zeros = static_cast<const uint8_t*>(zeros->const_data_ptr());
  }
  return groups;
}

// Tensors beside the blocks: there where the format takes them, and only there.
inline void check_side_tensors(const char* op, int format, const std::optional<Tensor>& scales,
                               const std::optional<Tensor>& zeros,
                               const std::optional<Tensor>& perm) {
  const FormatDescriptor& descriptor = kFormats[format];
  const auto check_one = [&](const char* arg, const std::optional<Tensor>& tensor, bool takes) {
    check(tensor.has_value() == takes, op, arg,
          std::string(takes ? "be given for " : "be None for ") + descriptor.name +
              (takes ? "" : ", whose blocks hold all that it needs"),
          tensor ? "a tensor of shape " + shape_text(*tensor) : "None");
  };
  check_one("scales", scales, descriptor.takes_scales());
  check_one("zeros", zeros, descriptor.takes_zeros);
  if (!descriptor.takes_scales()) check_one("perm", perm, false);
}

// Bytes of a row of k weights.
inline int64_t check_row_bytes(const char* op, int format, int64_t k) {
  const BlockLayout& layout = kFormats[format].fields;
  check(k >= 0 && k % layout.block_size == 0, op, "k",
        "be a multiple of " + std::to_string(layout.block_size) + " for " + kFormats[format].name,
        std::to_string(k));
  return k / layout.block_size * layout.block_bytes;
}

inline int64_t num_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

// packed is what repack makes of [n, k] weights.
inline void check_packed(const char* op, const Tensor& packed, int format, int64_t n, int64_t k) {
  check(n >= 0, op, "n", "be at least 0", std::to_string(n));
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_shape(op, "packed", packed, "[ceil(n / 16), 16 * row_bytes]",
              {num_tiles(n), kTileRows * check_row_bytes(op, format, k)});
  check_contiguous(op, "packed", packed);
  const auto misaligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16;
  check(misaligned == 0, op, "packed", "start at a multiple of 16 bytes",
        std::to_string(misaligned) + " bytes past one; call .clone()");
}

}  // namespace llamatelemetry
