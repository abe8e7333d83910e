#include "cpu/shifts.h"

#include <algorithm>

namespace granet::cpu {
namespace {

// The lowest `count` bits of a word; none below 0, all from 64 on.
uint64_t ones(int64_t count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

template <typename Pixels>
void add(Pixels& pixels, int64_t begin, int64_t end) {
  for (size_t i = 0; i < pixels.size(); ++i) {
    const auto before = static_cast<int64_t>(i) * 64;
    pixels[i] |= ones(end - before) & ~ones(begin - before);
  }
}

}  // namespace

Shifts::Shifts(const Stencil& stencil, const Plan& plan) : stencil_(stencil), width_(plan.tile * plan.vector) {
  if (plan.shifted) table_.resize(static_cast<size_t>(stencil.filter.h * stencil.filter.w));
}

// Pixels for which the one so many columns away is in their own row.
Shifts::Pixels Shifts::in_columns(int64_t start, int64_t away) const {
  const int64_t columns = stencil_.grid.w;
  Pixels inside{};
  for (int64_t row = start / columns * columns - start; row < width_; row += columns) {
    add(inside, std::max<int64_t>(row + std::max<int64_t>(0, -away), 0), row + std::min(columns, columns - away));
  }
  return inside;
}

// Pixels for which the one so many rows away is in the image.
Shifts::Pixels Shifts::in_rows(int64_t start, int64_t away) const {
  const int64_t first = -away * stencil_.grid.w - start;
  Pixels inside{};
  add(inside, std::max<int64_t>(first, 0), first + stencil_.grid.h * stencil_.grid.w);
  return inside;
}

void Shifts::find(int64_t start) {
  const Stencil& s = stencil_;
  if (table_.empty()) return;
  for (int64_t j = 0; j < s.filter.w; ++j) {
    const int64_t columns = s.first.w + j * s.step.w;
    const Pixels in_row = in_columns(start, columns);
    for (int64_t i = 0; i < s.filter.h; ++i) {
      const int64_t rows = s.first.h + i * s.step.h;
      const Pixels in_column = in_rows(start, rows);
      Shift& shift = table_[static_cast<size_t>(i * s.filter.w + j)];
      shift.offset = static_cast<int32_t>(rows * s.grid.w + columns);
      for (size_t t = 0; t < kMostVectors; ++t) {
        constexpr size_t kWord = 64 / kWidestVector;  // vectors
        const uint64_t inside = in_row[t / kWord] & in_column[t / kWord];
        shift.inside[t] = static_cast<uint16_t>(inside >> (t % kWord * kWidestVector));
      }
    }
  }
}

}  // namespace granet::cpu
