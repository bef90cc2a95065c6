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

using Clock = std::chrono::steady_clock;

// Squeaky wheel (Joslin & Clements 1999): what lies at the top of the plan moves forward in the order of placement; an order that is not
// worse is kept, a worse one seldom.
struct SqueakyWheel {
  const Problem& p;
  std::mt19937_64 random;
  Placed placed;
  std::vector<int32_t> order, trial;
  std::vector<i64> current, offsets;
  i64 height;

  SqueakyWheel(const Problem& p, const int32_t* start, uint64_t seed)
      : p(p), random(seed), placed(p.n), order(start, start + p.n), trial(p.n), current(p.n), offsets(p.n) {
    height = place_all(p, order.data(), false, INT64_MAX, placed, current.data());
  }

  double uniform() { return double(random() >> 11) * 0x1p-53; }

  // Moves up to eight of the buffers that end above a random line between the target and the top forward, and now and then any one.
  void shake(i64 target) {
    const i64 line = height - std::max<i64>(1, i64(double(height - target) * uniform()));
    std::vector<std::pair<double, int32_t>> key(p.n);
    std::vector<int> squeaking;
    for (int k = 0; k < p.n; ++k) {
      key[k] = {k, order[k]};
      if (current[order[k]] + p.size[order[k]] > line) squeaking.push_back(k);
    }
    const int moves = 1 + int(random() % std::min<size_t>(squeaking.size(), 8));
    for (int k = 0; k < moves; ++k) {
      const int at = squeaking[random() % squeaking.size()];
      key[at].first = at * uniform() - 0.5;
    }
    if (random() % 3 == 0) key[random() % p.n].first = p.n * uniform();
    std::stable_sort(key.begin(), key.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (int k = 0; k < p.n; ++k) trial[k] = key[k].second;
  }

  // One trial; true when it gave a lower plan.
  bool step(i64 target) {
    shake(target);
    const bool worse_too = random() % 200 == 0;
    const i64 found = place_all(p, trial.data(), false, worse_too ? INT64_MAX : height + 1, placed, offsets.data());
    if (found > height && !worse_too) return false;
    const bool lower = found < height;
    height = found;
    order.swap(trial);
    current.swap(offsets);
    return lower;
  }
};

}  // namespace

extern "C" {

// Fills offsets; returns the height.
int64_t address_place(int n, const i64* lower, const i64* upper, const i64* size, const int32_t* order, int best, i64* offsets) {
  Placed placed(n);
  return place_all({n, lower, upper, size}, order, best != 0, INT64_MAX, placed, offsets);
}

// Improves on placing first fit in `order` until the target, the time limit or the flag; fills offsets, returns the height.
int64_t address_squeaky(int n, const i64* lower, const i64* upper, const i64* size, const int32_t* order, i64 target, double seconds,
                        const int32_t* stop_flag, uint64_t seed, i64* offsets) {
  const volatile int32_t* stop = stop_flag;  // another thread sets it
  const auto deadline = Clock::now() + std::chrono::microseconds(i64(seconds * 1e6));
  const Problem problem{n, lower, upper, size};
  SqueakyWheel wheel(problem, order, seed);
  i64 best = wheel.height;
  std::copy(wheel.current.begin(), wheel.current.end(), offsets);
  while (best > target && !*stop && Clock::now() < deadline) {
    if (!wheel.step(target) || wheel.height >= best) continue;
    best = wheel.height;
    std::copy(wheel.current.begin(), wheel.current.end(), offsets);
  }
  return best;
}

}
