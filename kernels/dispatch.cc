#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>

#include "half.h"

namespace lowprec {

namespace portable {
extern const Kernels kernels;
}
#if defined(LOWPREC_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Path {
  const char* name;
  const Kernels* kernels;
};

std::vector<Path> paths() {
  std::vector<Path> found;
#if defined(LOWPREC_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &avx512::kernels});
  }
  if (avx2) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels});
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{paths().front().kernels};
  return kernels;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

// Work below this many values is not worth another thread: 20 to 50 us to start one, 1 ns for three to eight values.
constexpr std::size_t kMinValuesPerThread = 1 << 18;

// Calls body(begin, end) on contiguous ranges that cover [0, count), one a thread. begin_of(part, parts) is where a
// range begins.
template <typename BeginOf, typename Body>
void split(std::size_t num_values, int num_threads, const BeginOf& begin_of, const Body& body) {
  const std::size_t useful = std::max<std::size_t>(1, num_values / kMinValuesPerThread);
  const std::size_t parts = std::min<std::size_t>(useful, static_cast<std::size_t>(std::max(1, num_threads)));
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (std::size_t part = 1; part < parts; ++part) {
    try {
      threads.emplace_back([&, part] { body(begin_of(part, parts), begin_of(part + 1, parts)); });
    } catch (...) {
      body(begin_of(part, parts), begin_of(part + 1, parts));  // the system gives no more threads: do this part here
    }
  }
  body(begin_of(0, parts), begin_of(1, parts));
  for (std::thread& thread : threads) thread.join();
}

// Each range stops at its first bad row; the smallest of those is the first of all.
template <typename Run>
std::int64_t first_bad(std::size_t num_rows, std::size_t dim, int num_threads, const Run& run) {
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> first{kNone};
  const auto begin_of = [=](std::size_t part, std::size_t parts) { return num_rows * part / parts; };
  split(num_rows * dim, num_threads, begin_of, [&](std::size_t begin, std::size_t end) {
    const std::int64_t bad = run(begin, end);
    if (bad < 0) return;
    for (std::int64_t seen = first; bad < seen && !first.compare_exchange_weak(seen, bad);) {
    }
  });
  return first == kNone ? -1 : first.load();
}

// Ranges of bags with about the same number of ids.
template <typename Run>
void each_range(const Bags& bags, std::size_t dim, int num_threads, const Run& run) {
  const auto num_ids = static_cast<std::size_t>(bags.offsets[bags.num_bags]);
  const auto begin_of = [&](std::size_t part, std::size_t parts) {
    if (part == 0) return std::size_t{0};
    if (part == parts) return bags.num_bags;
    const auto wanted = static_cast<std::int64_t>(num_ids * part / parts);
    return static_cast<std::size_t>(std::lower_bound(bags.offsets, bags.offsets + bags.num_bags, wanted) -
                                    bags.offsets);
  };
  split(num_ids * dim, num_threads, begin_of, run);
}

std::vector<float> mse_scratch(RangeKind kind, std::size_t dim) {
  return std::vector<float>(kind == RangeKind::kMse ? kMseScratch * dim : 0);
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

}  // namespace

std::vector<std::string> cpu_paths() {
  std::vector<std::string> names;
  for (const Path& path : paths()) names.emplace_back(path.name);
  return names;
}

std::string cpu_path() {
  for (const Path& path : paths()) {
    if (path.kernels == &kernels()) return path.name;
  }
  return "";
}

bool use_cpu_path(const std::string& name) {
  for (const Path& path : paths()) {
    if (path.name != name) continue;
    chosen() = path.kernels;
    return true;
  }
  return false;
}

std::int64_t quantize(const Rows& rows, const std::int64_t* ids, std::size_t num_rows, int bits, RangeKind kind,
                      std::uint8_t* out, int num_threads) {
  return first_bad(num_rows, rows.dim, num_threads, [&](std::size_t begin, std::size_t end) {
    std::vector<float> scratch = mse_scratch(kind, rows.dim);
    return kernels().quantize(rows, ids, begin, end, bits, kind, scratch.data(), out);
  });
}

std::int64_t row_ranges(const Rows& rows, const std::int64_t* ids, std::size_t num_rows, int bits, RangeKind kind,
                        RowRange* out, int num_threads) {
  return first_bad(num_rows, rows.dim, num_threads, [&](std::size_t begin, std::size_t end) {
    std::vector<float> scratch = mse_scratch(kind, rows.dim);
    return kernels().row_ranges(rows, ids, begin, end, bits, kind, scratch.data(), out);
  });
}

void pooled(const Rows& rows, const Bags& bags, int bits, const RowRange* ranges, float* out, int num_threads) {
  each_range(bags, rows.dim, num_threads, [&](std::size_t begin, std::size_t end) {
    kernels().pooled(rows, bags, begin, end, bits, ranges, out);
  });
}

void scores(const Rows& rows, const Bags& bags, const float* gradients, const RowRange* const* ranges,
            float* const* out, int num_threads) {
  each_range(bags, rows.dim, num_threads, [&](std::size_t begin, std::size_t end) {
    std::vector<float> scratch(kScoreScratch * rows.dim);
    kernels().scores(rows, bags, begin, end, gradients, ranges, scratch.data(), out);
  });
}

void row_changes(const Rows& rows, const RowRange* const* ranges, std::int32_t* words, float* steps, int num_threads) {
  const auto begin_of = [&](std::size_t part, std::size_t parts) { return rows.num_rows * part / parts; };
  split(rows.num_rows * rows.dim, num_threads, begin_of, [&](std::size_t begin, std::size_t end) {
    std::vector<float> scratch(kNumScored * change_words(rows.dim) / 2);
    kernels().row_changes(rows, begin, end, ranges, scratch.data(), words, steps);
  });
}

void scores_of_changes(const Changes& changes, const Bags& bags, const float* gradients, float* const* out,
                       int num_threads) {
  each_range(bags, changes.dim, num_threads, [&](std::size_t begin, std::size_t end) {
    kernels().scores_of_changes(changes, bags, begin, end, gradients, out);
  });
}

void dequantize(const std::uint8_t* stored, std::int64_t row_stride, std::size_t num_rows, std::size_t dim, int bits,
                float* out, int num_threads) {
  const auto row = bits == 8 ? dequantize_row<8> : bits == 4 ? dequantize_row<4> : dequantize_row<2>;
  const auto begin_of = [=](std::size_t part, std::size_t parts) { return num_rows * part / parts; };
  split(num_rows * dim, num_threads, begin_of, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) row(stored + static_cast<std::int64_t>(i) * row_stride, dim, out + i * dim);
  });
}

std::int64_t first_outside(const std::int64_t* ids, std::size_t num_ids, std::size_t num_rows) {
  const std::size_t first = kernels().first_outside(ids, num_ids, num_rows);
  return first == num_ids ? -1 : static_cast<std::int64_t>(first);
}

std::int64_t first_wrong_offset(const std::int64_t* offsets, std::size_t num_bags, std::int64_t num_ids) {
  if (offsets[0] != 0) return 0;
  const std::size_t falling = kernels().first_falling(offsets, num_bags);
  if (falling < num_bags) return static_cast<std::int64_t>(falling + 1);
  return offsets[num_bags] == num_ids ? -1 : static_cast<std::int64_t>(num_bags);
}

}  // namespace lowprec
