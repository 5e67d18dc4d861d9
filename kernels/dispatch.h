// Which CPU path runs, and the kernels on several threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lowprec {

// The paths that this CPU has, best first; "portable" is always the last one.
std::vector<std::string> cpu_paths();

// The path that runs: the best one, until another is chosen.
std::string cpu_path();

// False when the name is not one of cpu_paths(). Not to be called while kernels run.
bool use_cpu_path(const std::string& name);

// As in Kernels, over rows [0, num_rows) or bags [0, num_bags), which `num_threads` threads share where there are
// enough of them. No result depends on the number of threads or the path.
std::int64_t quantize(const Rows& rows, const std::int64_t* ids, std::size_t num_rows, int bits, RangeKind kind,
                      std::uint8_t* out, int num_threads);
std::int64_t row_ranges(const Rows& rows, const std::int64_t* ids, std::size_t num_rows, int bits, RangeKind kind,
                        RowRange* out, int num_threads);
void pooled(const Rows& rows, const Bags& bags, int bits, const RowRange* ranges, float* out, int num_threads);
void scores(const Rows& rows, const Bags& bags, const float* gradients, const RowRange* const* ranges,
            float* const* out, int num_threads);
void row_changes(const Rows& rows, const RowRange* const* ranges, std::int32_t* words, float* steps, int num_threads);
void scores_of_changes(const Changes& changes, const Bags& bags, const float* gradients, float* const* out,
                       int num_threads);

// Stored rows (bits 8, 4 or 2), `row_stride` bytes apart, to float[num_rows, dim].
void dequantize(const std::uint8_t* stored, std::int64_t row_stride, std::size_t num_rows, std::size_t dim, int bits,
                float* out, int num_threads);

// The first position whose id is not in [0, num_rows), or -1.
std::int64_t first_outside(const std::int64_t* ids, std::size_t num_ids, std::size_t num_rows);

// The first of num_bags + 1 offsets that does not fit: not 0 at first, below the one before it, or beyond num_ids at
// last; -1 when all fit.
std::int64_t first_wrong_offset(const std::int64_t* offsets, std::size_t num_bags, std::int64_t num_ids);

}  // namespace lowprec
