// lowprec._native: checks arguments and releases the GIL; the arithmetic is in the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Rows may begin any distance apart; the values of a row are contiguous (checked by require_rows).
template <typename T>
using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = Vector<const std::int64_t>;
using Ranges = Matrix<const std::uint16_t>;

static_assert(sizeof(lowprec::RowRange) == 4, "ranges are read as uint16[n, 2]");

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_bits(int bits, bool plain) {
  require(bits == 2 || bits == 4 || bits == 8 || (plain && bits == 16),
          std::string("bits must be 2, 4") + (plain ? ", 8 or 16" : " or 8") + "; got " + std::to_string(bits));
}

lowprec::RangeKind range_kind(const std::string& name) {
  if (name == "minmax") return lowprec::RangeKind::kMinMax;
  require(name == "mse", "range must be minmax or mse; got " + name);
  return lowprec::RangeKind::kMse;
}

template <typename T>
void require_rows(const Strided<T>& rows, const char* name) {
  require(rows.shape(1) > 0, std::string(name) + " must have at least one column");
  require(rows.shape(0) == 0 || rows.shape(1) == 1 || rows.stride(1) == 1,
          std::string(name) + " must be contiguous along a row");
}

template <typename Array>
void require_shape(const Array& array, std::size_t num_rows, std::size_t num_columns, const char* name) {
  require(array.shape(0) == num_rows && array.shape(1) == num_columns,
          std::string(name) + " must be [" + std::to_string(num_rows) + ", " + std::to_string(num_columns) +
              "]; got [" + std::to_string(array.shape(0)) + ", " + std::to_string(array.shape(1)) + "]");
}

void require_ids(const Ids& ids, std::size_t num_rows) {
  const std::int64_t outside = lowprec::first_outside(ids.data(), ids.shape(0), num_rows);
  if (outside >= 0) {
    throw std::out_of_range("ids[" + std::to_string(outside) + "] is " + std::to_string(ids.data()[outside]) +
                            ", outside the " + std::to_string(num_rows) + " rows of the table");
  }
}

void require_offsets(const Ids& offsets, std::size_t num_ids) {
  require(offsets.shape(0) > 0, "offsets must be one more than the bags");
  const std::int64_t wrong =
      lowprec::first_wrong_offset(offsets.data(), offsets.shape(0) - 1, static_cast<std::int64_t>(num_ids));
  require(wrong < 0, "offsets must rise from 0 to the " + std::to_string(num_ids) + " ids; offsets[" +
                         std::to_string(wrong) + "] is " + std::to_string(wrong < 0 ? 0 : offsets.data()[wrong]));
}

lowprec::Rows rows_of(const Strided<const float>& table) {
  return {table.data(), table.stride(0), table.shape(0), table.shape(1)};
}

const lowprec::RowRange* ranges_of(const Ranges& ranges, std::size_t num_ids, const char* name) {
  if (!ranges.is_valid()) return nullptr;
  require_shape(ranges, num_ids, 2, name);
  return reinterpret_cast<const lowprec::RowRange*>(ranges.data());
}

std::size_t num_picked(const Strided<const float>& table, const Ids& ids) {
  return ids.is_valid() ? ids.shape(0) : table.shape(0);
}

std::int64_t quantize(Strided<const float> table, Ids ids, int bits, const std::string& range,
                      Matrix<std::uint8_t> out, int num_threads) {
  require_bits(bits, true);
  require_rows(table, "table");
  const lowprec::RangeKind kind = range_kind(range);
  const std::size_t num_rows = num_picked(table, ids);
  require_shape(out, num_rows, lowprec::row_bytes(table.shape(1), bits), "out");
  nb::gil_scoped_release release;
  if (ids.is_valid()) require_ids(ids, table.shape(0));
  return lowprec::quantize(rows_of(table), ids.is_valid() ? ids.data() : nullptr, num_rows, bits, kind, out.data(),
                           num_threads);
}

std::int64_t row_ranges(Strided<const float> table, Ids ids, int bits, const std::string& range,
                        Matrix<std::uint16_t> out, int num_threads) {
  require_bits(bits, false);
  require_rows(table, "table");
  const lowprec::RangeKind kind = range_kind(range);
  const std::size_t num_rows = num_picked(table, ids);
  require_shape(out, num_rows, 2, "out");
  nb::gil_scoped_release release;
  if (ids.is_valid()) require_ids(ids, table.shape(0));
  return lowprec::row_ranges(rows_of(table), ids.is_valid() ? ids.data() : nullptr, num_rows, bits, kind,
                             reinterpret_cast<lowprec::RowRange*>(out.data()), num_threads);
}

void dequantize(Strided<const std::uint8_t> stored, int bits, Matrix<float> out, int num_threads) {
  require_bits(bits, false);
  require_rows(stored, "stored");
  const std::size_t dim = out.shape(1);
  require(dim > 0, "out must have at least one column");
  require_shape(stored, out.shape(0), lowprec::row_bytes(dim, bits), "stored");
  nb::gil_scoped_release release;
  lowprec::dequantize(stored.data(), stored.stride(0), stored.shape(0), dim, bits, out.data(), num_threads);
}

// After everything else that can be wrong has been looked at.
lowprec::Bags bags_of(std::size_t num_rows, const Ids& ids, const Ids& offsets, const Vector<const float>& weights,
                      bool mean) {
  require(!weights.is_valid() || weights.shape(0) == ids.shape(0), "every id needs one weight");
  require(!weights.is_valid() || !mean, "weights need sum pooling");
  require_offsets(offsets, ids.shape(0));
  require_ids(ids, num_rows);
  return {ids.data(), offsets.data(), offsets.shape(0) - 1, weights.is_valid() ? weights.data() : nullptr, mean};
}

void pooled(Strided<const float> table, int bits, Ids ids, Ids offsets, Matrix<float> out, bool mean,
            Vector<const float> weights, Ranges ranges, int num_threads) {
  require_bits(bits, true);
  require_rows(table, "table");
  require(offsets.shape(0) > 0, "offsets must be one more than the bags");
  require_shape(out, offsets.shape(0) - 1, table.shape(1), "out");
  const lowprec::RowRange* given = ranges_of(ranges, ids.shape(0), "ranges");
  nb::gil_scoped_release release;
  lowprec::pooled(rows_of(table), bags_of(table.shape(0), ids, offsets, weights, mean), bits, given, out.data(),
                  num_threads);
}

using Outputs = std::array<std::optional<Vector<float>>, lowprec::kNumScored>;
using GivenRanges = std::array<std::optional<Ranges>, lowprec::kNumRowwise>;

std::array<float*, lowprec::kNumScored> outputs_of(Outputs& out, std::size_t num_bags) {
  std::array<float*, lowprec::kNumScored> outputs;
  for (std::size_t k = 0; k < out.size(); ++k) {
    require(!out[k] || out[k]->shape(0) == num_bags, "out must have a value for each bag");
    outputs[k] = out[k] ? out[k]->data() : nullptr;
  }
  return outputs;
}

std::array<const lowprec::RowRange*, lowprec::kNumRowwise> given_ranges(const GivenRanges& ranges, std::size_t num) {
  std::array<const lowprec::RowRange*, lowprec::kNumRowwise> given;
  for (std::size_t p = 0; p < ranges.size(); ++p) {
    given[p] = ranges[p] ? ranges_of(*ranges[p], num, "ranges") : nullptr;
  }
  return given;
}

void scores(Strided<const float> table, Ids ids, Ids offsets, Matrix<const float> gradients, Outputs out, bool mean,
            Vector<const float> weights, GivenRanges ranges, int num_threads) {
  require_rows(table, "table");
  require(offsets.shape(0) > 0, "offsets must be one more than the bags");
  const std::size_t num_bags = offsets.shape(0) - 1;
  require_shape(gradients, num_bags, table.shape(1), "gradients");
  const auto outputs = outputs_of(out, num_bags);
  const auto given = given_ranges(ranges, ids.shape(0));
  nb::gil_scoped_release release;
  lowprec::scores(rows_of(table), bags_of(table.shape(0), ids, offsets, weights, mean), gradients.data(), given.data(),
                  outputs.data(), num_threads);
}

void row_changes(Strided<const float> table, GivenRanges ranges, Matrix<std::int32_t> words, Matrix<float> steps,
                 int num_threads) {
  require_rows(table, "table");
  require_shape(words, table.shape(0), lowprec::change_words(table.shape(1)), "words");
  require_shape(steps, table.shape(0), lowprec::kNumScored, "steps");
  const auto given = given_ranges(ranges, table.shape(0));
  nb::gil_scoped_release release;
  lowprec::row_changes(rows_of(table), given.data(), words.data(), steps.data(), num_threads);
}

void scores_of_changes(Matrix<const std::int32_t> words, Matrix<const float> steps, Ids ids, Ids offsets,
                       Matrix<const float> gradients, Outputs out, bool mean, Vector<const float> weights,
                       int num_threads) {
  const std::size_t dim = gradients.shape(1), num_rows = words.shape(0);
  require(dim > 0, "gradients must have at least one column");
  require_shape(words, num_rows, lowprec::change_words(dim), "words");
  require_shape(steps, num_rows, lowprec::kNumScored, "steps");
  require(offsets.shape(0) > 0, "offsets must be one more than the bags");
  const std::size_t num_bags = offsets.shape(0) - 1;
  require_shape(gradients, num_bags, dim, "gradients");
  const auto outputs = outputs_of(out, num_bags);
  nb::gil_scoped_release release;
  lowprec::scores_of_changes({words.data(), steps.data(), dim}, bags_of(num_rows, ids, offsets, weights, mean),
                             gradients.data(), outputs.data(), num_threads);
}

void use_cpu_path(const std::string& name) {
  require(lowprec::use_cpu_path(name), "this CPU has no kernels called " + name);
}

}  // namespace

// noconvert: nanobind would else copy an argument of another dtype or layout, and what is written to the copy is lost.
NB_MODULE(_native, m) {
  m.doc() = "Compiled kernels of lowprec; lowprec.ops is their public face.";
  m.attr("SOURCE_DIGEST") = LOWPREC_SOURCE_DIGEST;
  m.def("cpu_paths", &lowprec::cpu_paths, "The CPU paths that run here, best first.");
  m.def("cpu_path", &lowprec::cpu_path, "The CPU path in use.");
  m.def("use_cpu_path", &use_cpu_path, "name"_a, "Chooses a CPU path for the process.");
  m.def("quantize", &quantize, nb::arg("table").noconvert(), nb::arg("ids").noconvert().none(), "bits"_a, "range"_a,
        nb::arg("out").noconvert(), "num_threads"_a = 1,
        "Stores table[ids] (or all rows) in out uint8[n, row_bytes]; returns the first position with NaN or Inf, or -1.");
  m.def("row_ranges", &row_ranges, nb::arg("table").noconvert(), nb::arg("ids").noconvert().none(), "bits"_a, "range"_a,
        nb::arg("out").noconvert(), "num_threads"_a = 1,
        "Writes fp16 scale and bias of table[ids] to out uint16[n, 2]; returns as quantize does.");
  m.def("dequantize", &dequantize, nb::arg("stored").noconvert(), "bits"_a, nb::arg("out").noconvert(),
        "num_threads"_a = 1, "Restores uint8[n, row_bytes] to out float32[n, dim].");
  m.def("pooled", &pooled, nb::arg("table").noconvert(), "bits"_a, nb::arg("ids").noconvert(),
        nb::arg("offsets").noconvert(), nb::arg("out").noconvert(), "mean"_a,
        nb::arg("weights").noconvert().none() = nb::none(), nb::arg("ranges").noconvert().none() = nb::none(),
        "num_threads"_a = 1, "Writes the bags of the quantized table to out float32[num_bags, dim].");
  m.def("scores", &scores, nb::arg("table").noconvert(), nb::arg("ids").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("gradients").noconvert(), nb::arg("out").noconvert(), "mean"_a,
        nb::arg("weights").noconvert().none() = nb::none(), nb::arg("ranges").noconvert(), "num_threads"_a = 1,
        "Writes gradients[b] . (low precision - fp32) of each bag to out[k] float32[num_bags], for bits 16, 8, 4, 2; "
        "ranges[p] uint16[num_ids, 2] for bits 8, 4, 2.");
  m.def("row_changes", &row_changes, nb::arg("table").noconvert(), nb::arg("ranges").noconvert(),
        nb::arg("words").noconvert(), nb::arg("steps").noconvert(), "num_threads"_a = 1,
        "Writes what bits 16, 8, 4, 2 change in each row to words int32[n, change_words] and steps float32[n, 4].");
  m.def("scores_of_changes", &scores_of_changes, nb::arg("words").noconvert(), nb::arg("steps").noconvert(),
        nb::arg("ids").noconvert(), nb::arg("offsets").noconvert(), nb::arg("gradients").noconvert(),
        nb::arg("out").noconvert(), "mean"_a, nb::arg("weights").noconvert().none() = nb::none(), "num_threads"_a = 1,
        "As scores, from the changes of rows.");
}
