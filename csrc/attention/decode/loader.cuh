// Copies of keys and values from where they lie, dense or in pages, to the stages of a warp.
#pragma once

#include <climits>

#include "attention/decode/config.h"
#include "attention/params.h"
#include "ptx/mma.cuh"
#include "ptx/prefetch.cuh"
#include "ptx/shared.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry::decode {

// Keys of a sequence that are read.
struct KeysRead {
  int begin, end;
};

// n / by and what is left; sizes of pages are mostly powers of two, and a division takes long.
struct Quotient {
  int whole, rest;
  __device__ Quotient(int n, int by) {
    if ((by & (by - 1)) == 0) {
      whole = n >> (31 - __clz(by));
      rest = n & (by - 1);
    } else {
      whole = static_cast<int>(static_cast<unsigned>(n) / static_cast<unsigned>(by));
      rest = n - whole * by;
    }
  }
};

// Copies a warp's 16 keys and values of one tile of kStep keys after another. Lanes 0 to 15 find
// rows of keys, the others rows of values. Rows are counted in chunks, which 32 bits hold.
template <typename Keys, int kStep = kTileKeys>
struct Loader {
  using Element = typename Keys::Element;
  using Stage = typename Keys::Stage;
  static constexpr int kChunkBytes = 16;
  static constexpr int kRowChunks = Keys::kRowChunks;
  static constexpr bool kOneChunk = kWarpSize % kRowChunks == 0;  // a lane's, of all its rows
  const int32_t* table;                                           // nullptr: dense, one page
  const char* k_rows;  // of the head, from the lane's chunk on; dense: of the sequence
  const char* v_rows;
  const float* scales;  // of this lane's side, of the head
  int64_t page_scales, token_scales;
  uint32_t page_chunks, token_chunks;
  int num_chunks;  // of a row
  int page_size;
  uint32_t step_pages, step_slots;  // a tile's
  int key;                          // that this lane finds next
  int page_index, slot;             // where it lies in the table and in its page
  int page;                         // as find_page found it
  KeysRead keys;

  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  Loader() = default;
  // sequence_key: dense and packed, the sequence's first in k and v. first_key: of the first tile.
  __device__ Loader(const AttentionParams& p, int index, int kv_head, int64_t sequence_key,
                    int first_key, KeysRead keys)
      : table(nullptr),
        num_chunks(static_cast<int>(p.head_dim * int64_t{sizeof(Element)}) / kChunkBytes),
        page_size(INT_MAX),
        page(0),
        keys(keys) {
    const KeyValueView& view = lane() < kWarpKeys ? p.k : p.v;
    const auto chunks = [](int64_t elements) {
      return static_cast<uint32_t>(elements * int64_t{sizeof(Element)} / kChunkBytes);
    };
    page_chunks = chunks(view.rows.batch_stride);
    token_chunks = chunks(view.rows.token_stride);
    if constexpr (Keys::kHasScales) {
      scales = static_cast<const float*>(view.scales.data) + kv_head * view.scales.head_stride;
      page_scales = view.scales.batch_stride;
      token_scales = view.scales.token_stride;
    }
    if (view.page_size > 0) {
      table = p.block_table + index * p.block_table_stride;
      page_size = static_cast<int>(min(view.page_size, int64_t{INT_MAX}));
    }
    const auto rows_of = [&](const Heads& rows) {
      int64_t elements = kv_head * rows.head_stride;
      if (table == nullptr) {
        elements += index * rows.batch_stride + sequence_key * rows.token_stride;
      }
      const char* first = static_cast<const char*>(rows.data) + elements * int64_t{sizeof(Element)};
      return kOneChunk ? first + lane() % kRowChunks * kChunkBytes : first;
    };
    k_rows = rows_of(p.k.rows);
    v_rows = rows_of(p.v.rows);
    key = first_key + static_cast<int>(threadIdx.x) / kWarpSize * kWarpKeys + lane() % kWarpKeys;
    const Quotient place(key, page_size), step(kStep, page_size);
    page_index = place.whole;
    slot = place.rest;
    step_pages = static_cast<uint32_t>(step.whole);
    step_slots = static_cast<uint32_t>(step.rest);
    ptx::keep(step_pages);  // divided once, not at each tile
    ptx::keep(step_slots);
  }

  __device__ bool exists() const { return key >= keys.begin && key < keys.end; }
  __device__ void find_page() {
    if (table != nullptr && exists()) page = table[page_index];
  }
  __device__ void advance() {
    key += kStep;
    slot += static_cast<int>(step_slots);
    page_index += static_cast<int>(step_pages);
    if (slot >= page_size) {
      slot -= page_size;
      ++page_index;
    }
    find_page();
  }

  // Brings this lane's row to L2. Reads no more than where its page lies, as a guess, so it may
  // come before wait_for_predecessors.
  __device__ void prefetch(int64_t num_pages) const {
    if (!exists()) return;
    const int64_t at = table == nullptr ? 0 : __ldcg(table + page_index);
    if (table != nullptr && (at < 0 || at >= num_pages)) return;
    const char* row = lane() < kWarpKeys ? k_rows : v_rows;
    if constexpr (kOneChunk) row -= lane() % kRowChunks * kChunkBytes;
    row += (at * page_chunks + uint64_t{static_cast<uint32_t>(slot)} * token_chunks) * kChunkBytes;
    ptx::prefetch_bulk_l2(row, static_cast<uint32_t>(num_chunks) * kChunkBytes);
  }

  // find_page has been called before the first.
  __device__ void load(Stage& stage) {
    const bool found = exists() && page >= 0;
    const uint32_t row = found ? page * page_chunks + slot * token_chunks : 0;
    if constexpr (Keys::kHasScales) {
      const float* from = found ? scales + (page * page_scales + slot * token_scales) : scales;
      ptx::cp_async_4_or_zeros(ptx::shared_address(&stage.scales[0][0] + lane()), from, found);
    }
    const unsigned all_found = __ballot_sync(~0u, found);
    advance();
    copy(ptx::shared_address(stage.k), k_rows, row, 0, all_found);
    copy(ptx::shared_address(stage.v), v_rows, row, kWarpKeys, all_found);
    ptx::cp_async_commit();
  }
  // Rows of the lanes from first_lane on.
  __device__ void copy(uint32_t to, const char* rows, uint32_t row_of_lane, int first_lane,
                       unsigned found) const {
    for_each_chunk<0, kWarpKeys>(rows, row_of_lane, first_lane, found,
                                 [&](int, int row, int chunk, const char* from, bool valid) {
                                   ptx::cp_async_16_or_zeros(to + Keys::offset(row, chunk), from,
                                                             valid);
                                 });
  }

  // ---- Through registers ----

  // Rows of a tile's keys, or of its values, that a warp holds at once; all of long ones would
  // spill. The others are loaded when those are stored.
  static constexpr int kHeldRows = kRowChunks <= 16 ? kWarpKeys : kWarpKeys / 2;
  // What a lane holds of them, and which rows the tile has.
  struct Held {
    uint32_t row_of_lane;
    unsigned found;
    uint4 chunks[kHeldRows * kRowChunks / kWarpSize];
  };

  // Asks for the next tile's keys. find_page has been called before the first.
  __device__ void fetch_keys(Held& held) {
    const bool found = exists() && page >= 0;
    held.row_of_lane = found ? page * page_chunks + slot * token_chunks : 0;
    held.found = __ballot_sync(~0u, found);
    advance();
    fetch<0>(k_rows, 0, held);
  }
  // Asks for the same tile's values.
  __device__ void fetch_values(Held& held) const { fetch<0>(v_rows, kWarpKeys, held); }
  // Puts what was asked for where it belongs in the stage.
  __device__ void store_keys(Held& held, char* to) const { store(k_rows, 0, held, to); }
  __device__ void store_values(Held& held, char* to) const { store(v_rows, kWarpKeys, held, to); }

 private:
  // Past L1, as cp.async does: another kernel may yet be writing what L1 would keep.
  template <int kFirstRow>
  __device__ void fetch(const char* rows, int first_lane, Held& held) const {
    for_each_chunk<kFirstRow, kHeldRows>(rows, held.row_of_lane, first_lane, held.found,
                                         [&](int i, int, int, const char* from, bool valid) {
                                           held.chunks[i] = uint4{};
                                           if (valid)
                                             held.chunks[i] =
                                                 __ldcg(reinterpret_cast<const uint4*>(from));
                                         });
  }
  template <int kFirstRow = 0>
  __device__ void store(const char* rows, int first_lane, Held& held, char* to) const {
#pragma unroll
    for (int i = 0; i < kHeldRows * kRowChunks / kWarpSize; ++i) {
      const int at = i * kWarpSize + lane();
      *reinterpret_cast<uint4*>(to + Keys::offset(kFirstRow + at / kRowChunks, at % kRowChunks)) =
          held.chunks[i];
    }
    if constexpr (kFirstRow + kHeldRows < kWarpKeys) {
      fetch<kFirstRow + kHeldRows>(rows, first_lane, held);
      store<kFirstRow + kHeldRows>(rows, first_lane, held, to);
    }
  }

  // Calls body(number of the chunk among this lane's, its row and its column in the tile, where it
  // lies, whether it is one) for kRows rows of the tile. Lanes from first_lane on found them.
  template <int kFirstRow, int kRows, typename Body>
  __device__ void for_each_chunk(const char* rows, uint32_t row_of_lane, int first_lane,
                                 unsigned found, Body&& body) const {
    if constexpr (kOneChunk) {
      const int lane_row = lane() / kRowChunks, chunk = lane() % kRowChunks;
      const unsigned valid = chunk < num_chunks ? found >> lane_row : 0;
#pragma unroll
      for (int row = kFirstRow; row < kFirstRow + kRows; row += kWarpSize / kRowChunks) {
        const uint32_t first = __shfl_sync(~0u, row_of_lane, first_lane + row + lane_row);
        body((row - kFirstRow) * kRowChunks / kWarpSize, row + lane_row, chunk,
             rows + uint64_t{first} * kChunkBytes, (valid >> (first_lane + row) & 1) != 0);
      }
    } else {
#pragma unroll
      for (int i = kFirstRow * kRowChunks + lane(); i < (kFirstRow + kRows) * kRowChunks;
           i += kWarpSize) {
        const int row = first_lane + i / kRowChunks, chunk = i % kRowChunks;
        const uint32_t first = __shfl_sync(~0u, row_of_lane, row);
        const bool valid = chunk < num_chunks && (found >> row & 1) != 0;
        body(i / kWarpSize - kFirstRow * kRowChunks / kWarpSize, i / kRowChunks, chunk,
             rows + (uint64_t{first} + (valid ? chunk : 0)) * kChunkBytes, valid);
      }
    }
  }
};

}  // namespace llamatelemetry::decode
