// Sixteen lanes in plain C++, for every CPU. See lanes.h.
#pragma once

#include <cmath>

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr std::size_t kScoredLanes = 1;
constexpr std::size_t kSearched = 1;

struct Lanes {
  float v[kLanes];
};

// Always inline: GCC 12 takes a function that only prefetches for one without effect, and drops it.
[[gnu::always_inline]] inline void prefetch(const char* line) { __builtin_prefetch(line, 0, 2); }
// Into the first one.
[[gnu::always_inline]] inline void prefetch_nearest(const char* line) { __builtin_prefetch(line, 0, 3); }
[[gnu::always_inline]] inline void prefetch_to_write(const char* line) { __builtin_prefetch(line, 1, 3); }

template <typename Of>
Lanes each(Of of) {
  Lanes out;
  for (std::size_t i = 0; i < kLanes; ++i) out.v[i] = of(i);
  return out;
}

inline Lanes zero() { return Lanes{}; }
inline Lanes all(float value) {
  return each([=](std::size_t) { return value; });
}
inline Lanes load(const float* in) {
  Lanes out;
  std::memcpy(out.v, in, sizeof out.v);
  return out;
}
inline void store(float* out, Lanes a) { std::memcpy(out, a.v, sizeof a.v); }
inline Lanes load_part(const float* in, std::size_t n) {
  Lanes out{};
  std::memcpy(out.v, in, n * sizeof(float));
  return out;
}
inline void store_part(float* out, Lanes a, std::size_t n) { std::memcpy(out, a.v, n * sizeof(float)); }
inline Lanes keep_first(Lanes a, std::size_t n) {
  return each([&](std::size_t i) { return i < n ? a.v[i] : 0.0f; });
}

inline Lanes operator+(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] + b.v[i]; });
}
inline Lanes operator-(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] - b.v[i]; });
}
inline Lanes operator*(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] * b.v[i]; });
}
inline Lanes operator/(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] / b.v[i]; });
}
// A call of the library where the CPU has no such instruction: slow, and right.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](std::size_t i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes min(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes max(Lanes a, Lanes b) {
  return each([&](std::size_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// Beyond 2^23 every float is an integer; below, adding and taking away 2^23 rounds to even. NaN stays.
inline Lanes rounded(Lanes a) {
  return each([&](std::size_t i) {
    const float magnitude = __builtin_fabsf(a.v[i]);
    const float nearest = magnitude < 0x1p23f ? (magnitude + 0x1p23f) - 0x1p23f : magnitude;
    return __builtin_copysignf(nearest, a.v[i]);
  });
}
inline Lanes as_half(Lanes a) {
  return each([&](std::size_t i) { return float_from_half(half_from_float(a.v[i])); });
}
// Rounded towards minus and plus infinity.
inline Lanes as_half_down(Lanes a) {
  return each([&](std::size_t i) { return float_from_half(half_below(a.v[i])); });
}
inline Lanes as_half_up(Lanes a) {
  return each([&](std::size_t i) { return -float_from_half(half_below(-a.v[i])); });
}
inline void store_halves(std::uint16_t* out, Lanes a) {
  for (std::size_t i = 0; i < kLanes; ++i) out[i] = half_from_float(a.v[i]);
}
inline Lanes load_halves(const std::uint16_t* in) {
  return each([&](std::size_t i) { return float_from_half(in[i]); });
}
struct Words {
  std::int32_t v[kLanes];
};
inline Words load_words(const std::int32_t* in) {
  Words out;
  std::memcpy(out.v, in, sizeof out.v);
  return out;
}
inline Lanes upper_half(Words a) {
  return each([&](std::size_t i) { return static_cast<float>(a.v[i]); });
}
inline Lanes lower_half(Words a) {
  return each([&](std::size_t i) { return static_cast<float>(a.v[i] & 0xffff); });
}
inline Lanes where_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return each([&](std::size_t i) { return a.v[i] == b.v[i] ? then.v[i] : otherwise.v[i]; });
}
inline Lanes where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return each([&](std::size_t i) { return a.v[i] < b.v[i] ? then.v[i] : otherwise.v[i]; });
}
inline std::uint32_t outside(Lanes a, Lanes low, Lanes high) {
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(!(a.v[i] >= low.v[i] && a.v[i] <= high.v[i])) << i;
  return bits;
}

struct Bytes {
  std::uint8_t v[kLanes];
};
inline Bytes bytes(Lanes a) {
  Bytes out;
  for (std::size_t i = 0; i < kLanes; ++i) out.v[i] = static_cast<std::uint8_t>(__builtin_lrintf(a.v[i]));
  return out;
}

// Lane k of row[i] and lane i of row[k] change places.
inline void transpose(Lanes (&row)[kLanes]) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      const float x = row[i].v[k];
      row[i].v[k] = row[k].v[i];
      row[k].v[i] = x;
    }
  }
}

// Lane i is lane i + by; the last ones stay.
inline Lanes shifted(Lanes a, std::size_t by) {
  return each([&](std::size_t i) { return i + by < kLanes ? a.v[i + by] : a.v[i]; });
}

template <typename Op>
float folded(Lanes a, Op op) {
  for (std::size_t apart = kLanes / 2; apart > 0; apart /= 2) a = op(a, shifted(a, apart));
  return a.v[0];
}

template <typename Op>
Lanes in_fours(Lanes a, Lanes b, Lanes c, Lanes d, Op op) {
  const Lanes* of[] = {&a, &b, &c, &d};
  Lanes out;
  for (std::size_t k = 0; k < 4; ++k) {
    const Lanes halved = op(*of[k], shifted(*of[k], 8)), quartered = op(halved, shifted(halved, 4));
    for (std::size_t i = 0; i < 4; ++i) out.v[4 * k + i] = quartered.v[i];
  }
  return out;
}

template <typename Op>
Lanes folded_fours(const Lanes (&row)[4], Op op) {
  Lanes out;
  for (std::size_t i = 0; i < 4; ++i) {
    const Lanes pairs = op(row[i], shifted(row[i], 2)), ones = op(pairs, shifted(pairs, 1));
    for (std::size_t c = 0; c < 4; ++c) out.v[4 * c + i] = ones.v[4 * c];
  }
  return out;
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
