// What the ops that add x to a residual in place ask of the two.
#pragma once

#include <cstdint>
#include <string>

#include "binding/checks.h"

namespace llamatelemetry {

// Of rows whose written ones are apart in themselves: rows side by side in one buffer, as halves of
// its columns are, do not meet.
inline bool rows_meet(int64_t distance, const Rows& x, const Rows& residual) {
  const auto extent = [](const Rows& rows) {
    return (rows.num_rows - 1) * rows.row_stride + rows.row_size;
  };
  if (distance >= extent(x) || -distance >= extent(residual)) return false;
  const int64_t stride = x.row_stride, size = x.row_size;
  if (stride != residual.row_stride || stride < 2 * size) return true;
  const int64_t offset = (distance % stride + stride) % stride;
  return offset < size || offset + size > stride;
}

// residual is written before x, or another row of x, has been read by all.
inline void check_apart_from_x(const char* op, const Tensor& residual, const Rows& residual_rows,
                               const Tensor& x, const Rows& x_rows) {
  if (x.numel() == 0) return;
  const int64_t bytes = reinterpret_cast<int64_t>(residual.const_data_ptr()) -
                        reinterpret_cast<int64_t>(x.const_data_ptr());
  const int64_t distance = bytes / static_cast<int64_t>(x.element_size());
  check(!rows_meet(distance, x_rows, residual_rows), op, "residual", "not overlap x",
        "memory " + std::to_string(distance) + " elements from it");
}

// Of residual, which x is added to in place: its rows.
inline Rows check_residual(const char* op, const Tensor& residual, const Tensor& x,
                           const Rows& x_rows) {
  check(residual.sizes().equals(x.sizes()), op, "residual",
        "have the shape of x (" + shape_text(x) + ")", "shape " + shape_text(residual));
  check_like(op, "residual", residual, "x", x);
  const Rows rows = rows_of(op, "residual", residual);
  check_apart(op, "residual", rows.num_rows, rows.row_stride, rows.row_size);
  check_apart_from_x(op, residual, rows, x, x_rows);
  return rows;
}

}  // namespace llamatelemetry
