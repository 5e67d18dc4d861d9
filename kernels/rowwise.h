// Row-wise quantization in the row layout that FBGEMM serves.
//
// A row of `dim` floats becomes [fp16 scale, fp16 bias, codes], little-endian, 4 + ceil(dim * bits / 8) bytes. Codes
// lie low-order bits first in a byte; bits of the last byte that no value needs are zero. A code c stands for
// scale * c + bias. What scale, bias and codes are is defined by lowprec/ops/reference.py and agrees bit for bit with
// FBGEMM's FloatToFusedNBitRowwiseQuantizedSBHalf (which puts scale and bias last).
//
// All functions are pure, hold no state, and may be called from several threads at once. Results do not depend on
// num_threads. Pointers may have any alignment that their type has; `out` must not overlap an input.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowprec {

// Bytes of one stored row; bits is 2, 4 or 8.
constexpr std::size_t row_bytes(std::size_t dim, int bits) {
  return 4 + (dim * static_cast<std::size_t>(bits) + 7) / 8;
}

// Quantizes num_rows rows that begin row_stride floats apart into out[num_rows][row_bytes(dim, bits)].
// Returns the first row that holds NaN or Inf, or -1. On a bad row the contents of `out` are unspecified.
std::int64_t quantize_rows(const float* rows, std::int64_t row_stride, std::size_t num_rows, std::size_t dim, int bits,
                           std::uint8_t* out, int num_threads);

// The same for rows table[ids[i]], so that a caller needs no fp32 copy of the rows that it picks.
// Every id must be a row of the table (see first_outside). The row returned is a position in ids.
std::int64_t quantize_gathered(const float* table, std::int64_t row_stride, const std::int64_t* ids,
                               std::size_t num_ids, std::size_t dim, int bits, std::uint8_t* out, int num_threads);

// The first position whose id is outside [0, num_rows), or -1.
std::int64_t first_outside(const std::int64_t* ids, std::size_t num_ids, std::int64_t num_rows);

// Restores codes[num_rows][row_bytes(dim, bits)], rows beginning row_stride bytes apart, to out[num_rows][dim].
void dequantize_rows(const std::uint8_t* codes, std::int64_t row_stride, std::size_t num_rows, std::size_t dim,
                     int bits, float* out, int num_threads);

}  // namespace lowprec
