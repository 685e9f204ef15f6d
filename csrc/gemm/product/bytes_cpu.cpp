// out = a . b^T of bytes on the CPU: int8 exactly, in int32, and e4m3 in float32. Lanes run along
// k. An item is a block of out. Few rows of a are bound by reading b, once and as it lies; of more,
// b is copied first, four rows at a time, to what the products take. A matrix whose rows are not
// along k is turned first, a part at a time. Every sum has one order, so a row of out depends
// neither on the others nor on threads.
#include <type_traits>

#include "common/int_menu.h"
#include "cpu/parallel.h"
#include "gemm/product/byte_dots_cpu.h"
#include "gemm/product/epilogue_cpu.h"
#include "gemm/product/turn_bytes_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kItemRows = 64;
constexpr int kItemColumns = 64;
constexpr int kPanelColumns = 4;  // of b, which share each load of a
#if defined(LT_ISA_AVX512)
constexpr int kPanelRows = 4;  // 16 sums and 5 operands in 32 registers
#else
constexpr int kPanelRows = 2;  // 8 sums, 5 operands and a product in 16
#endif
// Up to here b is read as it lies; the products of so few rows cost less than a copy.
constexpr int kFewRows = 2 * kPanelRows;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// Whether rows of x are to be read side by side: those of a matrix that lies the other way round.
bool is_turned(const Operand& x) { return x.row_stride == 1 && x.k_stride != 1; }
int item_columns(const ProductParams& p) {
  return p.m > kFewRows || is_turned(p.b) ? kItemColumns : 32;
}

// Part of a row as to[depth], zeros up to a whole step.
template <typename Dots, bool kLeft, typename To>
void copy_row(const typename Dots::Code* from, int64_t k_stride, int depth, To* to) {
  using Code = typename Dots::Code;
  const auto convert = [](const Code* p) {
    if constexpr (kLeft) return Dots::left(p);
    return Dots::right(p);
  };
  Code gathered[Dots::kDepth];
  if (k_stride != 1) {
    for (int d = 0; d < depth; ++d) gathered[d] = from[d * k_stride];
    from = gathered;
  }
  int d = 0;
  for (; d + Dots::kStep <= depth; d += Dots::kStep) Dots::store(to + d, convert(from + d));
  if (d < depth) {
    Code rest[Dots::kStep];
    copy_first(from + d, depth - d, rest);
    Dots::store(to + d, convert(rest));
  }
}

// sums[kRows][kPanelColumns] of rows of Left, kDepth apart, and rows of b, of which B is what they
// are made of: copies, or codes as they lie. Of these, what is `ahead` is asked for.
template <typename Dots, int kRows, typename B>
LT_INLINE void multiply(const typename Dots::Left* a, const B* const (&b)[kPanelColumns],
                        int64_t ahead, int depth, typename Dots::Sums (&sums)[kRows]) {
  constexpr bool kCopied = !std::is_same_v<B, typename Dots::Code>;
  typename Dots::Lanes lanes[kRows][kPanelColumns];
  for (auto& row : lanes) {
    for (auto& lane : row) lane = Dots::zero();
  }
  const B* from[kPanelColumns] = {b[0], b[1], b[2], b[3]};
  B rest[kPanelColumns][Dots::kStep];
  int stop = kCopied ? depth : depth / Dots::kStep * Dots::kStep;
  for (int d = 0;; stop = depth) {
    for (; d < stop; d += Dots::kStep) {
      typename Dots::Lanes right[kPanelColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kPanelColumns; ++c) {
        right[c] = Dots::right(from[c] + d);
        if constexpr (!kCopied) __builtin_prefetch(from[c] + d + ahead, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto left = Dots::left(a + r * Dots::kDepth + d);
#pragma GCC unroll 4
        for (int c = 0; c < kPanelColumns; ++c) {
          lanes[r][c] = Dots::add(lanes[r][c], left, right[c]);
        }
      }
    }
    if (kCopied || d >= depth) break;
    for (int c = 0; c < kPanelColumns; ++c) {  // the last step of rows that end within it
      copy_first(b[c] + d, depth - d, rest[c]);
      from[c] = rest[c] - d;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = Dots::sum4(lanes[r]);
}

// A block of out.
template <typename Dots>
class Item {
  using Code = typename Dots::Code;
  using Sum = typename Dots::Sum;
  using Sums = typename Dots::Sums;

 public:
  Item(const ProductParams& p, int64_t batch, int64_t row, int64_t column)
      : p_(p),
        row_(row),
        column_(column),
        rows_(static_cast<int>(smaller(kItemRows, p.m - row))),
        columns_(static_cast<int>(smaller(item_columns(p), p.n - column))),
        a_(static_cast<const Code*>(p.a.data) + batch * p.a.batch_stride + row * p.a.row_stride),
        b_(static_cast<const Code*>(p.b.data) + batch * p.b.batch_stride +
           column * p.b.row_stride) {}

  void run(int64_t batch) {
    for (int r = 0; r < rows_; ++r) {
      for (int c = 0; c < kItemColumns; ++c) sums_[r][c] = 0;
    }
    const int most = p_.row_blocks ? kScaleBlock : Dots::kDepth;
    for (int64_t first = 0; first < p_.k; first += most) {
      add_part(first, static_cast<int>(smaller(most, p_.k - first)));
    }
    for (int r = 0; r < rows_; ++r) {
      store_row(p_, batch, row_ + r, column_, columns_, sums_[r]);
    }
  }

 private:
  // Rows of an operand over a part of k.
  struct Part {
    const Code* data;
    int64_t row_stride;
    int64_t k_stride;
  };

  // As they lie, or in turned_.
  Part part_of(const Operand& x, const Code* rows, int count, int64_t first_k, int depth) {
    rows += first_k * x.k_stride;
    if (!is_turned(x)) return {rows, x.row_stride, x.k_stride};
    turn_bytes(reinterpret_cast<const uint8_t*>(rows), x.k_stride, depth, count,
               reinterpret_cast<uint8_t*>(turned_[0]), kPitch);
    return {turned_[0], kPitch, 1};
  }

  // Over depth of k from first_k on.
  void add_part(int64_t first_k, int depth) {
    const Part a = part_of(p_.a, a_, rows_, first_k, depth);
    for (int r = 0; r < rows_; ++r) {
      copy_row<Dots, true>(a.data + r * a.row_stride, a.k_stride, depth, left_[r]);
      excess_[r] = Dots::excess(left_[r], depth);
    }
    const Part b = part_of(p_.b, b_, columns_, first_k, depth);
    for (int c = 0; c < columns_; c += kPanelColumns) {
      const Code* codes[kPanelColumns];  // past the last row of b: that one once more
      for (int i = 0; i < kPanelColumns; ++i) {
        codes[i] = b.data + smaller(c + i, columns_ - 1) * b.row_stride;
      }
      if (rows_ <= kFewRows && b.k_stride == 1) {
        add_panel(codes, kPanelColumns * b.row_stride, first_k, depth, c);
        continue;
      }
      alignas(64) typename Dots::Right copies[kPanelColumns][Dots::kDepth];
      const typename Dots::Right* right[kPanelColumns];
      for (int i = 0; i < kPanelColumns; ++i) {
        copy_row<Dots, false>(codes[i], b.k_stride, depth, copies[i]);
        right[i] = copies[i];
      }
      add_panel(right, 0, first_k, depth, c);
    }
  }

  template <typename B>
  void add_panel(const B* const (&b)[kPanelColumns], int64_t ahead, int64_t first_k, int depth,
                 int column) {
    for (int r = 0; r < rows_;) {
      const int rows = rows_ - r >= kPanelRows ? kPanelRows : rows_ - r >= 2 ? 2 : 1;
      IntMenu<1, 2, 4>::dispatch(rows, [&](auto count) {
        if constexpr (count() <= kPanelRows) {
          Sums sums[count()];
          multiply<Dots, count()>(left_[r], b, ahead, depth, sums);
          for (int i = 0; i < count(); ++i) add_sums(sums[i], r + i, first_k, column);
        }
      });
      r += rows;
    }
  }

  void add_sums(Sums sums, int row, int64_t first_k, int column) {
    if constexpr (std::is_same_v<Sum, float>) {
      sums *= scale_of(row, first_k, column);
    } else {
      sums -= excess_[row];
    }
    Sums before;
    std::memcpy(&before, &sums_[row][column], sizeof before);
    before += sums;
    std::memcpy(&sums_[row][column], &before, sizeof before);
  }

  // Of the block that a sum over kScaleBlock of k belongs to.
  float scale_of(int row, int64_t first_k, int column) const {
    if (!p_.row_blocks) return 1.0f;
    const int64_t blocks = (p_.k + kScaleBlock - 1) / kScaleBlock, block = first_k / kScaleBlock;
    const int64_t of_columns = (column_ + column) / kScaleBlock * blocks + block;
    return p_.row_blocks[(row_ + row) * blocks + block] * p_.column_blocks[of_columns];
  }

  const ProductParams& p_;
  const int64_t row_, column_;
  const int rows_, columns_;
  const Code* a_;
  const Code* b_;
  static constexpr int kPitch = Dots::kDepth + 64;  // an odd number of cache lines, for all sets
  alignas(64) Code turned_[kItemColumns][kPitch];   // of a, then of b
  static_assert(kItemRows <= kItemColumns);
  alignas(64) typename Dots::Left left_[kItemRows][Dots::kDepth];
  Sum excess_[kItemRows];
  Sum sums_[kItemRows][kItemColumns];
};

int64_t row_blocks(const ProductParams& p) { return (p.m + kItemRows - 1) / kItemRows; }
int64_t column_blocks(const ProductParams& p) {
  return (p.n + item_columns(p) - 1) / item_columns(p);
}

void byte_items(const ProductParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t in_batch = item % (row_blocks(p) * column_blocks(p));
    const int64_t batch = item / (row_blocks(p) * column_blocks(p));
    const int64_t row = in_batch % row_blocks(p) * kItemRows;
    const int64_t column = in_batch / row_blocks(p) * item_columns(p);
    if (p.dtype == DType::kInt8) {
      Item<Int8Dots>(p, batch, row, column).run(batch);
    } else {
      Item<FloatDots<E4M3>>(p, batch, row, column).run(batch);
    }
  }
}

}  // namespace

Error launch_product_bytes(const ProductParams& p, Stream) {
  const auto rows = static_cast<double>(smaller(kItemRows, p.m));
  const double columns = static_cast<double>(smaller(item_columns(p), p.n));
  const double item_ns = static_cast<double>(p.k) * columns * (0.06 + 0.01 * rows);
  parallel_over<byte_items>("gemm", {p.batch * row_blocks(p) * column_blocks(p), item_ns}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry
