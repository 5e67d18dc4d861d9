#include "pooled_dots.h"

#include <cstring>
#include <type_traits>

#include "half.h"

namespace lowprec {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "stored rows are little-endian and are read as they lie");

// Sixteen lanes as four vectors of four, as every CPU has them; see rowwise.cc on why they are spelled out.
using Bytes = std::uint8_t __attribute__((vector_size(16)));
using Halves = std::uint16_t __attribute__((vector_size(16)));
using Words = std::uint32_t __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));
constexpr std::size_t kLanes = 16;
constexpr std::size_t kWidth = 4;
constexpr std::size_t kGroups = kLanes / kWidth;

#if defined(__clang__)
#define LOWPREC_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LOWPREC_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// Of the lower or upper half of a and b: a0 b0 a1 b1 ... One instruction (punpck, zip).
Bytes zip_low(Bytes a, Bytes b) {
  return LOWPREC_SHUFFLE(Bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Bytes zip_high(Bytes a, Bytes b) {
  return LOWPREC_SHUFFLE(Bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
Words widened_low(Halves a) {
  return reinterpret_cast<Words>(LOWPREC_SHUFFLE(Halves, a, Halves{}, 0, 8, 1, 9, 2, 10, 3, 11));
}
Words widened_high(Halves a) {
  return reinterpret_cast<Words>(LOWPREC_SHUFFLE(Halves, a, Halves{}, 4, 12, 5, 13, 6, 14, 7, 15));
}

#undef LOWPREC_SHUFFLE

// float_from_half without branches. A subnormal m stands for m * 2^-24 = (1 + m / 2^10) * 2^-14 - 2^-14, exactly.
// Signed comparisons: baseline x86 has no others.
Floats floats_from_halves(Words halves) {
  const Ints half = reinterpret_cast<Ints>(halves);
  const Ints magnitude = half & 0x7fff;
  const Ints subnormal = magnitude < 0x0400;
  const Ints infinite = magnitude > 0x7bff;  // or NaN: the exponent becomes 255
  const Ints rebias = 0x38000000 + (subnormal & 0x00800000) + (infinite & 0x38000000);
  const Floats value = reinterpret_cast<Floats>((magnitude << 13) + rebias) -
                       reinterpret_cast<Floats>(subnormal & 0x38800000);  // 2^-14, else 0
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) | (half & 0x8000) << 16);
}

// 4, 8 or 16 bytes, then zeros; through a register, as a store of few bytes stalls the load of many that follows it.
template <std::size_t kNum>
Bytes load_bytes(const std::uint8_t* in) {
  if constexpr (kNum == 16) {
    Bytes bytes;
    std::memcpy(&bytes, in, sizeof bytes);
    return bytes;
  } else {
    using Word = std::conditional_t<kNum == 8, std::uint64_t, std::uint32_t>;
    using Pair = std::uint64_t __attribute__((vector_size(16)));
    Word word;
    std::memcpy(&word, in, sizeof word);
    return reinterpret_cast<Bytes>(Pair{word, 0});
  }
}

// Copies under 64 bytes; a call of memcpy costs more than what it copies here.
void copy_rest(const void* from, std::size_t num_bytes, void* to) {
  const auto* in = static_cast<const std::uint8_t*>(from);
  auto* out = static_cast<std::uint8_t*>(to);
  const auto copy = [&](auto size) {
    if ((num_bytes & size) == 0) return;
    std::memcpy(out, in, size);
    in += size;
    out += size;
  };
  copy(std::integral_constant<std::size_t, 32>{});
  copy(std::integral_constant<std::size_t, 16>{});
  copy(std::integral_constant<std::size_t, 8>{});
  copy(std::integral_constant<std::size_t, 4>{});
  copy(std::integral_constant<std::size_t, 2>{});
  copy(std::integral_constant<std::size_t, 1>{});
}

// The next sixteen values of a row: codes, or what halves stand for.
template <int kBits>
void load(const std::uint8_t* in, Floats (&values)[kGroups]) {
  if constexpr (kBits == 16) {
    Halves low, high;
    std::memcpy(&low, in, sizeof low);
    std::memcpy(&high, in + sizeof low, sizeof high);
    values[0] = floats_from_halves(widened_low(low));
    values[1] = floats_from_halves(widened_high(low));
    values[2] = floats_from_halves(widened_low(high));
    values[3] = floats_from_halves(widened_high(high));
  } else {
    Bytes codes = load_bytes<kLanes * kBits / 8>(in);
    if constexpr (kBits <= 4) codes = zip_low(codes & 0x0f, codes >> 4);
    if constexpr (kBits == 2) codes = zip_low(codes & 0x03, codes >> 2);
    const Halves low = reinterpret_cast<Halves>(zip_low(codes, Bytes{}));
    const Halves high = reinterpret_cast<Halves>(zip_high(codes, Bytes{}));
    // Through signed integers: baseline x86 converts no unsigned ones.
    values[0] = __builtin_convertvector(reinterpret_cast<Ints>(widened_low(low)), Floats);
    values[1] = __builtin_convertvector(reinterpret_cast<Ints>(widened_high(low)), Floats);
    values[2] = __builtin_convertvector(reinterpret_cast<Ints>(widened_low(high)), Floats);
    values[3] = __builtin_convertvector(reinterpret_cast<Ints>(widened_high(high)), Floats);
  }
}

float folded(const Floats (&sums)[kGroups]) {
  const Floats four = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// A vector of dim floats; what is behind the last whole sixteen, filled up with zeros, so that sums need no other tail.
struct Gradient {
  const float* values;
  std::size_t num_whole;
  std::size_t num_rest;
  float rest[kLanes];

  Gradient(const float* values, std::size_t dim)
      : values(values), num_whole(dim / kLanes), num_rest(dim % kLanes), rest{} {
    if (num_rest > 0) copy_rest(values + num_whole * kLanes, num_rest * sizeof(float), rest);
  }
};

float sum(const Gradient& gradient) {
  Floats sums[kGroups] = {};
  const auto add = [&sums](const float* from) {
    for (std::size_t group = 0; group < kGroups; ++group) {
      Floats g;
      std::memcpy(&g, from + group * kWidth, sizeof g);
      sums[group] += g;
    }
  };
  for (std::size_t block = 0; block < gradient.num_whole; ++block) add(gradient.values + block * kLanes);
  if (gradient.num_rest > 0) add(gradient.rest);
  return folded(sums);
}

template <int kBits>
float dot(const std::uint8_t* row, const Gradient& gradient) {
  constexpr std::size_t kBlockBytes = kLanes * kBits / 8;
  Floats sums[kGroups] = {};
  const auto add = [&sums](const std::uint8_t* in, const float* from) {
    Floats values[kGroups];
    load<kBits>(in, values);
    for (std::size_t group = 0; group < kGroups; ++group) {
      Floats g;
      std::memcpy(&g, from + group * kWidth, sizeof g);
      sums[group] += values[group] * g;
    }
  };
  for (std::size_t block = 0; block < gradient.num_whole; ++block) {
    add(row + block * kBlockBytes, gradient.values + block * kLanes);
  }
  if (gradient.num_rest > 0) {
    // A copy: what lies behind the row is another row, or no memory of ours.
    std::uint8_t last[kBlockBytes] = {};
    copy_rest(row + gradient.num_whole * kBlockBytes, (gradient.num_rest * kBits + 7) / 8, last);
    add(last, gradient.rest);
  }
  return folded(sums);
}

template <int kBits>
void all_dots(const std::uint8_t* stored, std::int64_t row_stride, std::size_t dim, const std::int64_t* ids,
              const std::int64_t* offsets, std::size_t num_bags, const float* weights, bool mean,
              const float* gradients, float* out) {
  for (std::size_t bag = 0; bag < num_bags; ++bag) {
    const Gradient gradient(gradients + bag * dim, dim);
    const std::int64_t begin = offsets[bag], end = offsets[bag + 1];
    const float gradient_sum = kBits == 16 ? 0.0f : sum(gradient);
    float total = 0.0f;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint8_t* row = stored + ids[i] * row_stride;
      float value;
      if constexpr (kBits == 16) {
        value = dot<kBits>(row, gradient);
      } else {
        value = load_half(row) * dot<kBits>(row + 4, gradient) + load_half(row + 2) * gradient_sum;
      }
      total += weights == nullptr ? value : weights[i] * value;
    }
    out[bag] = mean && end > begin ? total / static_cast<float>(end - begin) : total;
  }
}

}  // namespace

void pooled_dots(const std::uint8_t* stored, std::int64_t row_stride, std::size_t dim, int bits,
                 const std::int64_t* ids, const std::int64_t* offsets, std::size_t num_bags, const float* weights,
                 bool mean, const float* gradients, float* out) {
  const auto all = bits == 16 ? all_dots<16> : bits == 8 ? all_dots<8> : bits == 4 ? all_dots<4> : all_dots<2>;
  all(stored, row_stride, dim, ids, offsets, num_bags, weights, mean, gradients, out);
}

std::int64_t first_wrong_offset(const std::int64_t* offsets, std::size_t num_bags, std::int64_t num_ids) {
  if (offsets[0] != 0) return 0;
  for (std::size_t bag = 0; bag < num_bags; ++bag) {
    if (offsets[bag + 1] < offsets[bag]) return static_cast<std::int64_t>(bag + 1);
  }
  return offsets[num_bags] == num_ids ? -1 : static_cast<std::int64_t>(num_bags);
}

}  // namespace lowprec
