#include "rowwise.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "half.h"

namespace lowprec {
namespace {

// FBGEMM scans a row in eight lanes. Only the sign of a zero minimum shows it, but bytes are compared, so it is kept.
constexpr std::size_t kLanes = 8;

// Below this many rows a thread costs more than it saves (about 20 us to start one, 0.07 us a row of 64).
constexpr std::size_t kMinRowsPerThread = 1024;

// Nearest even, subnormals kept, beyond 65504 + half a step becomes infinity: what vcvtps2ph does. No NaN comes here.
std::uint16_t half_from_float(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65536 and above
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 leaves a last place of 2^-24, the step of subnormal halves, and rounds to it.
    return static_cast<std::uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  // Rebias the exponent and round; a carry out of the mantissa is the next exponent, and past the last one infinity.
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

struct Range {
  float min;
  float max;
  bool finite;
};

// 2^31 is reached by exactly the magnitudes of NaN and infinity, so OR-ing this over a row leaves a bit to look at.
std::uint32_t non_finite_bit(float value) { return (float_bits(value) & 0x7fffffffu) + 0x00800000u; }

// Four lanes, as every CPU has them; GCC and Clang compile them to plain vector instructions. GCC 12 does not vectorise
// the same scan written with arrays of lanes: 9.9 against 14.2 million rows/s of dim 64 on one thread of an EPYC 9004.
using Floats = float __attribute__((vector_size(16)));
using Words = std::uint32_t __attribute__((vector_size(16)));
constexpr std::size_t kWidth = 4;
constexpr std::size_t kGroups = kLanes / kWidth;

Range scan(const float* row, std::size_t dim) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  Floats min[kGroups], max[kGroups];
  Words bad[kGroups];
  for (std::size_t group = 0; group < kGroups; ++group) {
    min[group] = Floats{} + kLargest;
    max[group] = Floats{} - kLargest;
    bad[group] = Words{};
  }
  std::size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    for (std::size_t group = 0; group < kGroups; ++group) {
      Floats x;
      Words bits;
      std::memcpy(&x, row + i + group * kWidth, sizeof x);
      std::memcpy(&bits, &x, sizeof bits);
      // Between equals the newer one, as minps does.
      min[group] = min[group] < x ? min[group] : x;
      max[group] = max[group] > x ? max[group] : x;
      bad[group] |= (bits & 0x7fffffffu) + 0x00800000u;
    }
  }
  Range range{kLargest, -kLargest, true};
  std::uint32_t any_bad = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    range.min = std::min(range.min, min[lane / kWidth][lane % kWidth]);
    range.max = std::max(range.max, max[lane / kWidth][lane % kWidth]);
    any_bad |= bad[lane / kWidth][lane % kWidth];
  }
  for (; i < dim; ++i) {
    range.min = std::min(range.min, row[i]);
    range.max = std::max(range.max, row[i]);
    any_bad |= non_finite_bit(row[i]);
  }
  range.finite = (any_bad >> 31) == 0;
  return range;
}

void store_half(std::uint8_t* out, std::uint16_t half) {
  out[0] = static_cast<std::uint8_t>(half & 0xffu);
  out[1] = static_cast<std::uint8_t>(half >> 8);
}

// values: scratch for dim codes below 8 bits, one a byte, and the zeros that fill up the last output byte.
// False when the row holds NaN or Inf.
template <int kBits>
bool quantize_row(const float* __restrict row, std::size_t dim, std::uint8_t* __restrict values,
                  std::uint8_t* __restrict out) {
  constexpr std::size_t kPerByte = 8 / kBits;
  constexpr float kMaxCode = static_cast<float>((1 << kBits) - 1);
  const Range range = scan(row, dim);
  if (!range.finite) return false;

  const std::uint16_t bias_half = half_from_float(range.min);
  const float bias = float_from_half(bias_half);
  const float width = range.max - bias;  // negative when the bias was rounded up beyond the largest value
  float scale = float_from_half(half_from_float(width == 0.0f ? 1.0f : width / kMaxCode));
  if (scale == 0.0f) scale = 1.0f;
  const float inverse_scale = 1.0f / scale;  // finite: the smallest half above zero is 2^-24
  store_half(out, half_from_float(scale));
  store_half(out + 2, bias_half);

  std::uint8_t* codes = kBits == 8 ? out + 4 : values;
  for (std::size_t i = 0; i < dim; ++i) {
    float code = (row[i] - bias) * inverse_scale;
    // Clamped before it is rounded: the same result, and NaN (an infinite bias or scale) becomes 0 as in FBGEMM.
    code = code > 0.0f ? code : 0.0f;
    code = code < kMaxCode ? code : kMaxCode;
    // Adding 2^23 rounds to the nearest even integer and leaves it in the low bits; unlike lrintf it vectorises.
    codes[i] = static_cast<std::uint8_t>(float_bits(code + 0x1p23f));
  }
  if constexpr (kBits < 8) {
    const std::size_t num_bytes = (dim + kPerByte - 1) / kPerByte;
    std::uint8_t* packed = out + 4;
    for (std::size_t byte = 0; byte < num_bytes; ++byte) {
      const std::uint8_t* value = values + byte * kPerByte;
      unsigned bits = 0;
      for (std::size_t k = 0; k < kPerByte; ++k) bits |= static_cast<unsigned>(value[k]) << (k * kBits);
      packed[byte] = static_cast<std::uint8_t>(bits);
    }
  }
  return true;
}

template <int kBits>
void dequantize_row(const std::uint8_t* __restrict row, std::size_t dim, float* __restrict out) {
  constexpr std::size_t kPerByte = 8 / kBits;
  constexpr unsigned kMask = (1u << kBits) - 1;
  const float scale = load_half(row);
  const float bias = load_half(row + 2);
  const std::uint8_t* codes = row + 4;
  // scale has 11 significant bits and a code at most 8, so the product is exact and one rounding is left, fused or not.
  const std::size_t num_whole = dim / kPerByte;
  for (std::size_t byte = 0; byte < num_whole; ++byte) {
    for (std::size_t k = 0; k < kPerByte; ++k) {
      const int code = static_cast<int>(codes[byte] >> (k * kBits) & kMask);
      out[byte * kPerByte + k] = scale * static_cast<float>(code) + bias;
    }
  }
  for (std::size_t i = num_whole * kPerByte; i < dim; ++i) {
    const int code = static_cast<int>(codes[num_whole] >> (i % kPerByte * kBits) & kMask);
    out[i] = scale * static_cast<float>(code) + bias;
  }
}

// Calls body(begin, end) on contiguous ranges that cover [0, num_rows), one a thread.
template <typename Body>
void split_rows(std::size_t num_rows, int num_threads, const Body& body) {
  const std::size_t useful = std::max<std::size_t>(1, num_rows / kMinRowsPerThread);
  const std::size_t count = std::min<std::size_t>(useful, static_cast<std::size_t>(std::max(1, num_threads)));
  const auto begin_of = [&](std::size_t part) { return num_rows * part / count; };
  std::vector<std::thread> threads;
  threads.reserve(count - 1);
  for (std::size_t part = 1; part < count; ++part) {
    try {
      threads.emplace_back([&, part] { body(begin_of(part), begin_of(part + 1)); });
    } catch (...) {
      body(begin_of(part), begin_of(part + 1));  // the system gives no more threads: do this part here
    }
  }
  body(0, begin_of(1));
  for (std::thread& thread : threads) thread.join();
}

// row_at(i) is the i-th input row. Each range stops at its first bad row; the smallest of those is the first of all.
template <int kBits, typename RowAt>
std::int64_t quantize_all(const RowAt& row_at, std::size_t num_rows, std::size_t dim, std::uint8_t* out,
                          int num_threads) {
  const std::size_t out_stride = row_bytes(dim, kBits);
  std::atomic<std::int64_t> first_bad{std::numeric_limits<std::int64_t>::max()};
  split_rows(num_rows, num_threads, [&](std::size_t begin, std::size_t end) {
    std::vector<std::uint8_t> values(kBits == 8 ? 0 : dim + 8 / kBits, 0);
    for (std::size_t i = begin; i < end; ++i) {
      if (quantize_row<kBits>(row_at(i), dim, values.data(), out + i * out_stride)) continue;
      const auto bad = static_cast<std::int64_t>(i);
      for (std::int64_t seen = first_bad; bad < seen && !first_bad.compare_exchange_weak(seen, bad);) {
      }
      return;
    }
  });
  return first_bad == std::numeric_limits<std::int64_t>::max() ? -1 : first_bad.load();
}

template <typename RowAt>
std::int64_t quantize_bits(int bits, const RowAt& row_at, std::size_t num_rows, std::size_t dim, std::uint8_t* out,
                           int num_threads) {
  if (bits == 8) return quantize_all<8>(row_at, num_rows, dim, out, num_threads);
  if (bits == 4) return quantize_all<4>(row_at, num_rows, dim, out, num_threads);
  return quantize_all<2>(row_at, num_rows, dim, out, num_threads);
}

template <int kBits>
void dequantize_all(const std::uint8_t* codes, std::int64_t row_stride, std::size_t num_rows, std::size_t dim,
                    float* out, int num_threads) {
  split_rows(num_rows, num_threads, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      dequantize_row<kBits>(codes + static_cast<std::int64_t>(i) * row_stride, dim, out + i * dim);
    }
  });
}

}  // namespace

std::int64_t quantize_rows(const float* rows, std::int64_t row_stride, std::size_t num_rows, std::size_t dim, int bits,
                           std::uint8_t* out, int num_threads) {
  const auto row_at = [=](std::size_t i) { return rows + static_cast<std::int64_t>(i) * row_stride; };
  return quantize_bits(bits, row_at, num_rows, dim, out, num_threads);
}

std::int64_t quantize_gathered(const float* table, std::int64_t row_stride, const std::int64_t* ids,
                               std::size_t num_ids, std::size_t dim, int bits, std::uint8_t* out, int num_threads) {
  const auto row_at = [=](std::size_t i) { return table + ids[i] * row_stride; };
  return quantize_bits(bits, row_at, num_ids, dim, out, num_threads);
}

std::int64_t first_outside(const std::int64_t* ids, std::size_t num_ids, std::int64_t num_rows) {
  for (std::size_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= num_rows) return static_cast<std::int64_t>(i);
  }
  return -1;
}

void dequantize_rows(const std::uint8_t* codes, std::int64_t row_stride, std::size_t num_rows, std::size_t dim,
                     int bits, float* out, int num_threads) {
  if (bits == 8) return dequantize_all<8>(codes, row_stride, num_rows, dim, out, num_threads);
  if (bits == 4) return dequantize_all<4>(codes, row_stride, num_rows, dim, out, num_threads);
  return dequantize_all<2>(codes, row_stride, num_rows, dim, out, num_threads);
}

}  // namespace lowprec
