// Placing buffers at addresses: greedy placement in a given order, and a squeaky-wheel local search over orders.
//
// Times and sizes are 64-bit integers, lives are half-open. memory_mgmt/address_greedy.py and address_local_search.py hold the
// readable twins and call this through ctypes; `place` gives the same offsets as its twin for the same order.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

using i64 = int64_t;

namespace {

// The placed buffers in ascending order of offset, as columns: a scan reads them one after another. A scan needs no list of
// conflicting pairs (a million for a training step) and stops at the first gap that fits.
struct Placed {
  std::vector<i64> lower, upper, start, end;

  explicit Placed(size_t n) {
    for (auto* column : {&lower, &upper, &start, &end}) column->reserve(n);
  }
  void clear() {
    for (auto* column : {&lower, &upper, &start, &end}) column->clear();
  }
  void insert(i64 lo, i64 up, i64 offset, i64 size) {
    const auto at = std::upper_bound(start.begin(), start.end(), offset) - start.begin();
    lower.insert(lower.begin() + at, lo);
    upper.insert(upper.begin() + at, up);
    start.insert(start.begin() + at, offset);
    end.insert(end.begin() + at, offset + size);
  }
  i64 gap(i64 lo, i64 up, i64 size, bool best) const {
    i64 floor = 0, found = -1, tightest = INT64_MAX;
    for (size_t k = 0; k < start.size(); ++k) {
      if (lower[k] >= up || upper[k] <= lo) continue;
      const i64 room = start[k] - floor;
      if (room >= size && room < tightest) {
        found = floor;
        if (!best) return found;
        tightest = room;
      }
      floor = std::max(floor, end[k]);
    }
    return found >= 0 ? found : floor;
  }
};

struct Problem {
  int n;
  const i64 *lower, *upper, *size;
};

// Places in the given order; gives the height, or stops early with `ceiling` when that height is reached or passed.
i64 place_all(const Problem& p, const int32_t* order, bool best, i64 ceiling, Placed& placed, i64* offsets) {
  placed.clear();
  i64 height = 0;
  for (int k = 0; k < p.n; ++k) {
    const int i = order[k];
    offsets[i] = 0;
    if (p.size[i] == 0) continue;
    offsets[i] = placed.gap(p.lower[i], p.upper[i], p.size[i], best);
    height = std::max(height, offsets[i] + p.size[i]);
    if (height >= ceiling) return ceiling;
    placed.insert(p.lower[i], p.upper[i], offsets[i], p.size[i]);
  }
  return height;
}

}  // namespace

extern "C" {

// Fills offsets; returns the height.
int64_t address_place(int n, const i64* lower, const i64* upper, const i64* size, const int32_t* order, int best, i64* offsets) {
  Placed placed(n);
  return place_all({n, lower, upper, size}, order, best != 0, INT64_MAX, placed, offsets);
}

}
