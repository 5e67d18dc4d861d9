// The last step of scores: what the lanes of a bag hold, to one number for each precision.
#pragma once

#include "lookup.h"

namespace lowprec::LOWPREC_PATH {
namespace {

// The bags [first, last), one after the other; four of them are folded together.
class PendingBags {
 public:
  // `gradients` are asked for ahead. out[k]: float[num_bags], for each scored precision that is wanted.
  PendingBags(const Bags& bags, std::size_t first, std::size_t last, const float* gradients, std::size_t dim,
              float* const* out)
      : bag(first), bags_(bags), last_(last), folded_to_(first), gradients_(gradients), dim_(dim), out_(out) {}

  std::size_t bag;  // the one whose turn it is

  const float* gradient() const { return gradients_ + bag * dim_; }

  // Lanes of products for each precision; of those that are not wanted, any.
  void finish_bag(const Lanes (&products)[kNumScored]) {
    pending_[bag - folded_to_] = in_fours(products[0], products[1], products[2], products[3], Add{});
    ++bag;
    if (bag + kBagsAhead < last_) each_line(gradients_ + (bag + kBagsAhead) * dim_, dim_, prefetch);
    if (bag - folded_to_ == kTogether || bag == last_) fold();
  }

  void finish_empty_bag() { finish_bag({zero(), zero(), zero(), zero()}); }

 private:
  static constexpr std::size_t kTogether = 4;
  static_assert(kNumScored * kTogether == kLanes);

  void fold() {
    const std::size_t num = bag - folded_to_;
    for (std::size_t i = num; i < kTogether; ++i) pending_[i] = zero();
    float scores[kLanes];
    store(scores, folded_fours(pending_, Add{}));
    for (std::size_t k = 0; k < kNumScored; ++k) {
      if (out_[k] == nullptr) continue;
      float* of_bags = out_[k] + folded_to_;
      if (num == kTogether) {
        std::memcpy(of_bags, scores + k * kTogether, kTogether * sizeof(float));
      } else {
        for (std::size_t i = 0; i < num; ++i) of_bags[i] = scores[k * kTogether + i];
      }
      if (bags_.mean) divide(num, of_bags);
    }
    folded_to_ = bag;
  }

  [[gnu::noinline]] void divide(std::size_t num, float* of_bags) const {
    for (std::size_t i = 0; i < num; ++i) scale_mean(bags_, folded_to_ + i, 1, of_bags + i);
  }

  const Bags& bags_;
  std::size_t last_, folded_to_;
  const float* gradients_;
  std::size_t dim_;
  float* const* out_;
  Lanes pending_[kTogether];
};

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
