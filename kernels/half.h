// fp16 as bits in memory: what it is in fp32. Exact for every half, subnormals, infinities and NaN included.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowprec {

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

// A half that lies anywhere, little-endian.
inline float load_half(const std::uint8_t* in) {
  return float_from_half(static_cast<std::uint16_t>(in[0] | in[1] << 8));
}

}  // namespace lowprec
