// What the kernels do, whichever CPU path does it. Arguments are checked by the caller (bindings.cc).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowprec {

// An fp32 table: row i begins `stride` values after row i - 1, anywhere in memory; its `dim` values are contiguous.
struct Rows {
  const float* values;
  std::int64_t stride;
  std::size_t num_rows;
  std::size_t dim;

  const float* operator[](std::int64_t i) const { return values + i * stride; }
};

// Bag b holds ids[offsets[b]] up to ids[offsets[b + 1]]. Without `weights` every id counts once. A mean multiplies the
// sum by 1 / number of ids; an empty bag is zero.
struct Bags {
  const std::int64_t* ids;
  const std::int64_t* offsets;
  std::size_t num_bags;
  const float* weights;
  bool mean;
};

// The fp16 scale and bias of a row, as they stand in a stored row.
struct RowRange {
  std::uint16_t scale;
  std::uint16_t bias;
};

enum class RangeKind { kMinMax, kMse };

constexpr std::size_t row_bytes(std::size_t dim, int bits) { return (bits == 16 ? 0 : 4) + (dim * bits + 7) / 8; }

constexpr int kScoredBits[] = {16, 8, 4, 2};
constexpr std::size_t kNumScored = 4, kNumRowwise = 3;

// What the scored precisions change in each row of a small table: row i at words + i * change_words(dim). A value has
// two words of 32 bits, one with the changes at 16 and 8 bits, one with those at 4 and 2, in its upper and its lower
// half. A change is steps[kNumScored * i + k] times the whole word, a signed integer, for an upper half, and times its
// 16 bits less 32768 for a lower one.
struct Changes {
  const std::int32_t* words;
  const float* steps;
  std::size_t dim;
};

constexpr std::size_t kChangeLanes = 16;  // values whose words lie together: first those of 16 and 8 bits

constexpr std::size_t change_words(std::size_t dim) {
  return (dim + kChangeLanes - 1) / kChangeLanes * kChangeLanes * 2;
}

// One CPU path: plain functions of one thread. `bits` is 16 (fp16 values), 8, 4 or 2 (row-wise); lowprec/ops/reference
// defines every result to the bit.
struct Kernels {
  // Row ids[i], or row i without ids, as a stored row at out + i * row_bytes(dim, bits), for i in [begin, end).
  // Returns the first i whose row holds NaN or Inf, or -1; what lies behind that row is then unspecified.
  // `scratch`: kMseScratch * dim floats for kMse, else none.
  std::int64_t (*quantize)(const Rows&, const std::int64_t* ids, std::size_t begin, std::size_t end, int bits,
                           RangeKind kind, float* scratch, std::uint8_t* out);

  // The range of row ids[i], or of row i without ids, at out[i]; bits 8, 4 or 2. Returns as `quantize` does.
  std::int64_t (*row_ranges)(const Rows&, const std::int64_t* ids, std::size_t begin, std::size_t end, int bits,
                             RangeKind kind, float* scratch, RowRange* out);

  // What a pooled lookup of the quantized table returns, for bags [begin, end): float[num_bags, dim] at `out`. Without
  // `ranges` (one for each id) the range is minmax. A row with NaN or Inf, or one that overflows fp16, makes its bag
  // non-finite.
  void (*pooled)(const Rows&, const Bags&, std::size_t begin, std::size_t end, int bits, const RowRange* ranges,
                 float* out);

  // gradients[b] . (pooled at bits - pooled fp32) for every bag in [begin, end), at out[k][b] for each of the
  // kNumScored precisions whose out[k] is given; gradients: float[num_bags, dim]. Ranges as for `pooled`, for each
  // row-wise precision its own. `scratch`: kScoreScratch * dim floats.
  void (*scores)(const Rows&, const Bags&, std::size_t begin, std::size_t end, const float* gradients,
                 const RowRange* const* ranges, float* scratch, float* const* out);

  // Changes of rows [begin, end), to words and steps of all rows. `ranges`: for each row-wise precision those of all
  // rows, or none for minmax. Where a row has no form (it holds NaN or Inf, or overflows fp16), its step is NaN.
  // `scratch`: kNumScored * change_words(dim) / 2 floats.
  void (*row_changes)(const Rows&, std::size_t begin, std::size_t end, const RowRange* const* ranges, float* scratch,
                      std::int32_t* words, float* steps);

  // As `scores`, from changes: those of a value are exact to half a step.
  void (*scores_of_changes)(const Changes&, const Bags&, std::size_t begin, std::size_t end, const float* gradients,
                            float* const* out);

  // The first id that is not in [0, num_rows), or num_ids.
  std::size_t (*first_outside)(const std::int64_t* ids, std::size_t num_ids, std::size_t num_rows);

  // The first bag whose end is below its begin, or num_bags.
  std::size_t (*first_falling)(const std::int64_t* offsets, std::size_t num_bags);
};

constexpr std::size_t kScoreScratch = 7, kMseScratch = 32;

}  // namespace lowprec
