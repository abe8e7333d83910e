#include "cpu/conv.h"

#include <algorithm>

#include "common/bits.h"
#include "cpu/conv_correlate.h"
#include "cpu/conv_sums.h"
#include "cpu/conv_units.h"

namespace granet::cpu {

void run_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                 const float* bias, const Finish& finish, const ImageView& target, const Parallel& parallel) {
  const int64_t parts = row_parts(plan.units(), s, parallel);
  parallel.for_each(plan.units() * parts, [&](int64_t index) {
    const Rows rows = rows_of_part(s, parts, index % parts);
    if (rows.count <= 0) return;
    sum_unit({s, plan, entries, source, bias, finish, target}, {}, index / parts, rows);
  });
}

int64_t gradient_parts(const Plan& plan) { return std::min<int64_t>(plan.units(), 16); }

namespace {

// gradient[rank[e]], or gradient[e] where there are no ranks, = the sum of an entry's parts, in their order.
void add_parts(const float* partial, int64_t parts, int64_t count, const int32_t* rank, float* gradient,
               const Parallel& parallel) {
  constexpr int64_t kChunk = 4096;
  parallel.for_each(ceil_div(count, kChunk), [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t e = chunk * kChunk; e < end; ++e) {
      float sum = partial[e];
      for (int64_t part = 1; part < parts; ++part) sum += partial[part * count + e];
      gradient[rank == nullptr ? e : rank[e]] = sum;
    }
  });
}

// visit(part, unit, rows) for all rows of every unit: those of a part, whose gradients are added up in one place, one
// after the other.
template <typename Visit>
void for_each_part(const Stencil& s, const Plan& plan, const Parallel& parallel, const Visit& visit) {
  const int64_t parts = gradient_parts(plan);
  const int64_t splits = row_parts(parts, s, parallel);
  parallel.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task / splits;
    const Rows rows = rows_of_part(s, splits, task % splits);
    if (rows.count <= 0) return;
    for (int64_t u = plan.units() * part / parts; u < plan.units() * (part + 1) / parts; ++u) visit(part, u, rows);
  });
}

}  // namespace

void correlate_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const int32_t* rank,
                       int64_t count, const ImageView& source, const ImageView& target, float* partial, float* gradient,
                       const Parallel& parallel) {
  const int64_t parts = gradient_parts(plan);
  const bool is_whole = parts == 1 && rank == nullptr;
  float* sums = is_whole ? gradient : partial;
  parallel.for_each(parts, [&](int64_t part) { std::fill_n(sums + part * count, count, 0.0f); });
  for_each_part(s, plan, parallel, [&](int64_t part, int64_t unit, Rows rows) {
    correlate_unit(s, plan, entries, source, {target, sums + part * count}, unit, rows);
  });
  if (!is_whole) add_parts(partial, parts, count, rank, gradient, parallel);
}

void differentiate_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const int32_t* rank,
                           int64_t count, const ImageView& grad_output, const ImageView& input,
                           const ImageView& grad_input, float* partial, float* gradient, const Parallel& parallel) {
  const Sums sums = {s, plan, entries, grad_output, nullptr, {nullptr, false}, grad_input};
  const int64_t parts = gradient_parts(plan);
  parallel.for_each(parts, [&](int64_t part) { std::fill_n(partial + part * count, count, 0.0f); });
  for_each_part(s, plan, parallel, [&](int64_t part, int64_t unit, Rows rows) {
    sum_unit(sums, {input, partial + part * count}, unit, rows);
  });
  add_parts(partial, parts, count, rank, gradient, parallel);
}

}  // namespace granet::cpu
