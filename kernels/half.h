// fp16 as bits in memory: what it is in fp32. Exact for every half, subnormals, infinities and NaN included.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowprec {
namespace {

inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

// Nearest even, subnormals kept, beyond 65504 + half a step becomes infinity: what vcvtps2ph does. No NaN comes here.
inline std::uint16_t half_from_float(float value) {
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

// The largest half that is not above the value: rounded towards minus infinity.
inline std::uint16_t half_below(float value) {
  const std::uint16_t nearest = half_from_float(value);
  if (!(float_from_half(nearest) > value)) return nearest;
  if (nearest == 0) return 0x8001u;  // from zero to the first half below it
  return static_cast<std::uint16_t>(nearest & 0x8000u ? nearest + 1 : nearest - 1);
}

// A half that lies anywhere, little-endian.
inline float load_half(const std::uint8_t* in) {
  return float_from_half(static_cast<std::uint16_t>(in[0] | in[1] << 8));
}

}  // namespace
}  // namespace lowprec
