// Refusals: "<op>: <arg> must <rule>, got <value>[; <way out>]", raised as RuntimeError.
#pragma once

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "binding/stable.h"

namespace llamatelemetry {

[[noreturn]] inline void refuse(const std::string& sentence) { throw std::runtime_error(sentence); }

inline void check(bool holds, const char* op, const char* arg, const std::string& rule,
                  const std::string& got) {
  if (!holds) refuse(std::string(op) + ": " + arg + " must " + rule + ", got " + got);
}

inline std::string shape_text(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "]";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& x) {
  return x.is_cpu() ? "cpu" : "device " + std::to_string(x.get_device_index());
}

// Ours for torch's; nothing where no kernel of any op takes it.
inline std::optional<DType> dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Float8_e4m3fn: return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2: return DType::kFloat8E5M2;
    case ScalarType::Char: return DType::kInt8;
    default: return std::nullopt;
  }
}

inline DType check_floating(const char* op, const char* arg, ScalarType dtype) {
  const std::optional<DType> ours = dtype_of(dtype);
  check(ours && is_floating(*ours), op, arg, "be float32, float16 or bfloat16", dtype_text(dtype));
  return *ours;
}

inline DType check_floating(const char* op, const char* arg, const Tensor& x) {
  return check_floating(op, arg, x.scalar_type());
}

inline void check_dtype(const char* op, const char* arg, const Tensor& x, ScalarType dtype) {
  check(x.scalar_type() == dtype, op, arg, std::string("be ") + dtype_text(dtype),
        dtype_text(x.scalar_type()));
}

inline void check_device(const char* op, const char* arg, const Tensor& x, const char* like_arg,
                         const Tensor& like) {
  check(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(), op, arg,
        std::string("be on the device of ") + like_arg + " (" + device_text(like) + ")",
        device_text(x));
}

// dtype and device of like.
inline void check_like(const char* op, const char* arg, const Tensor& x, const char* like_arg,
                       const Tensor& like) {
  check(x.scalar_type() == like.scalar_type(), op, arg,
        std::string("have the dtype of ") + like_arg + " (" + dtype_text(like.scalar_type()) + ")",
        dtype_text(x.scalar_type()));
  check_device(op, arg, x, like_arg, like);
}

inline void check_dim(const char* op, const char* arg, const Tensor& x, int64_t dim,
                      const char* meaning) {
  check(x.dim() == dim, op, arg, std::string("be ") + meaning, "shape " + shape_text(x));
}

// meaning names the dimensions ("[hidden_size]"), sizes are what they must be here.
inline void check_shape(const char* op, const char* arg, const Tensor& x, const char* meaning,
                        std::initializer_list<int64_t> sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted = "[";
  int64_t d = 0;
  for (const int64_t size : sizes) {
    same = same && x.size(d) == size;
    wanted += (d++ ? ", " : "") + std::to_string(size);
  }
  check(same, op, arg, std::string("be ") + meaning + " = " + wanted + "]",
        "shape " + shape_text(x));
}

inline void check_last_contiguous(const char* op, const char* arg, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  check(last < 0 || x.size(last) <= 1 || x.stride(last) == 1, op, arg,
        "have a contiguous last dimension",
        "stride " + std::to_string(last < 0 ? 1 : x.stride(last)) + "; call .contiguous()");
}

inline void check_contiguous(const char* op, const char* arg, const Tensor& x) {
  check(x.is_contiguous(), op, arg, "be contiguous", "strides that are not; call .contiguous()");
}

// A vector of so many values in the dtype of like; meaning names its size ("[hidden_size]"). Its
// data, or null where there is none.
inline const void* checked_vector(const char* op, const char* arg, const std::optional<Tensor>& x,
                                  const char* meaning, int64_t size, const char* like_arg,
                                  const Tensor& like) {
  if (!x) return nullptr;
  check_shape(op, arg, *x, meaning, {size});
  check_like(op, arg, *x, like_arg, like);
  check_contiguous(op, arg, *x);
  return x->const_data_ptr();
}

// Rows that are written must not share memory, as those of an expanded tensor do.
inline void check_apart(const char* op, const char* arg, int64_t count, int64_t stride,
                        int64_t size) {
  check(count <= 1 || stride >= size, op, arg,
        "not overlap itself (stride >= " + std::to_string(size) + ")",
        "stride " + std::to_string(stride));
}

// The leading dimensions folded into one: row r starts row_stride elements after row r - 1.
struct Rows {
  int64_t num_rows;
  int64_t row_size;
  int64_t row_stride;
};

// Any [..., row_size] whose rows are contiguous and evenly spaced, which views of the leading
// dimensions that torch calls .view()-able are.
inline Rows rows_of(const char* op, const char* arg, const Tensor& x) {
  check(x.dim() >= 1, op, arg, "have at least one dimension", "a scalar");
  check_last_contiguous(op, arg, x);
  const int64_t last = x.dim() - 1;
  Rows rows{1, x.size(last), x.size(last)};
  bool first = true;
  bool even = true;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (first) rows.row_stride = x.stride(d);
    even = even && (first || x.size(d) == 0 || x.stride(d) == expected);
    rows.num_rows *= x.size(d);
    expected = x.stride(d) * x.size(d);
    first = false;
  }
  check(even || rows.num_rows == 0, op, arg, "have evenly spaced rows",
        "strides that fold into no single row stride; call .contiguous()");
  return rows;
}

}  // namespace llamatelemetry
