#include <algorithm>

#include "common/bits.h"
#include "cpu/slab.h"

namespace granet::cpu {
namespace {

// One column of pixels, in pieces that end with an image.
void add_pixel_runs(const RunsOf& what, const ImageView& view, Runs& result) {
  result.step = view.y_stride;
  const int64_t end = std::min(what.first_row + what.rows, what.size.h);
  for (int64_t y = what.first_row; y < end;) {
    const int64_t pixel = y % view.pixels;
    const int64_t length = std::min(end - y, view.pixels - pixel);
    result.runs.push_back({y - what.first_row, length, y / view.pixels * view.image_stride + pixel * view.y_stride});
    y += length;
  }
}

}  // namespace

Runs make_runs(const RunsOf& what, const ImageView& view) {
  Runs result{{}, {}, what.lanes, what.scale.w * view.x_stride, what.floats, false};
  const auto add_gap = [&](int64_t position, int64_t length) {
    if (length <= 0) return;
    if (!result.gaps.empty() && result.gaps.back().position + result.gaps.back().length == position) {
      result.gaps.back().length += length;
    } else {
      result.gaps.push_back({position, length});
    }
  };
  if (view.pixels != 0) {
    add_pixel_runs(what, view, result);
    const int64_t covered = std::max<int64_t>(0, std::min(what.rows, what.size.h - what.first_row));
    add_gap(covered, what.floats - covered);
    return result;
  }
  const int64_t shift = what.before.w - what.phase.w;
  const int64_t first = ceil_div(std::max<int64_t>(0, shift), what.scale.w);
  const int64_t last = std::min(what.columns, ceil_div(std::max<int64_t>(0, what.size.w + shift), what.scale.w));
  const int64_t images = std::min(what.lanes, what.images - what.first_image);
  const int64_t row_floats = what.row * what.lanes;
  result.interleaved = what.lanes > 1 && images == what.lanes;
  for (int64_t t = 0; t < what.rows; ++t) {
    const int64_t y = (what.first_row + t) * what.scale.h + what.phase.h - what.before.h;
    const bool empty = y < 0 || y >= what.size.h || last <= first;
    if (empty || images < what.lanes) {
      add_gap(t * row_floats, row_floats);
    } else {
      add_gap(t * row_floats, first * what.lanes);
      add_gap(t * row_floats + last * what.lanes, row_floats - last * what.lanes);
    }
    for (int64_t lane = 0; lane < images && !empty; ++lane) {
      result.runs.push_back({t * row_floats + first * what.lanes + lane, last - first,
                             (what.first_image + lane) * view.image_stride + y * view.y_stride +
                                 (first * what.scale.w - shift) * view.x_stride});
    }
  }
  add_gap(what.rows * row_floats, what.floats - what.rows * row_floats);
  return result;
}

}  // namespace granet::cpu
