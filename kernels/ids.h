// Whether ids and offsets fit, many at a time: a lookup of hot rows is soon slower than looking at its ids one by one.
#pragma once

#include "kernels.h"

namespace lowprec::LOWPREC_PATH {
namespace {

// The first i below num for which is_wrong(i), or num. Written so that a compiler looks at several together.
template <typename IsWrong>
std::size_t first_wrong(std::size_t num, const IsWrong& is_wrong) {
  constexpr std::size_t kTogether = 256;
  for (std::size_t begin = 0; begin < num; begin += kTogether) {
    const std::size_t end = num - begin < kTogether ? num : begin + kTogether;
    std::uint64_t any = 0;
    for (std::size_t i = begin; i < end; ++i) any |= static_cast<std::uint64_t>(is_wrong(i));
    if (any == 0) continue;
    for (std::size_t i = begin; i < end; ++i) {
      if (is_wrong(i)) return i;
    }
  }
  return num;
}

inline std::size_t first_outside(const std::int64_t* ids, std::size_t num_ids, std::size_t num_rows) {
  return first_wrong(num_ids, [=](std::size_t i) { return static_cast<std::uint64_t>(ids[i]) >= num_rows; });
}

inline std::size_t first_falling(const std::int64_t* offsets, std::size_t num_bags) {
  return first_wrong(num_bags, [=](std::size_t bag) { return offsets[bag + 1] < offsets[bag]; });
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
