// Exact search for a plan below a given height: depth first over canonical plans, those in which no buffer can slide down.
//
// memory_mgmt/address_exact.py holds the readable twin and explains the search; this file follows it name by name. Ideas from
// MiniMalloc (Moffitt, ASPLOS'23): sections, decomposition into independent parts, dominance, several preorderings. Ours: always branch
// on what lies on the lowest free level of the tightest section, demand that every buffer rests on another, remember failed states.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

using i64 = int64_t;
using u64 = uint64_t;

namespace {

constexpr int FOUND = 1, INFEASIBLE = 0, STOPPED = -1;

u64 mix(u64 x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

struct Limits {
  i64 nodes;  // of one attempt
  std::chrono::steady_clock::time_point deadline;
  const volatile int32_t* stop;  // another thread sets it
};

// Positions waiting to be looked at again, each at most once.
struct Queue {
  std::vector<int> waiting;
  std::vector<char> queued;

  void resize(size_t n) { queued.assign(n, 0); }
  void push(int k) {
    if (queued[k]) return;
    queued[k] = 1;
    waiting.push_back(k);
  }
  bool pop(int& k) {
    if (waiting.empty()) return false;
    k = waiting.back();
    waiting.pop_back();
    queued[k] = 0;
    return true;
  }
  void clear() {
    for (int k : waiting) queued[k] = 0;
    waiting.clear();
  }
};

template <typename T>
struct Search {
  static constexpr T INF = std::numeric_limits<T>::max();

  int n = 0, sections = 0;
  T capacity;
  std::vector<int> first, end;            // per buffer: the sections it lives in, [first, end)
  std::vector<T> size, offset;
  std::vector<i64> rank;                  // lower is tried first
  std::vector<std::vector<int>> members;  // per section: its buffers, the unplaced ones first
  std::vector<int> unplaced;              // per section: how many
  std::vector<std::vector<int>> seat;     // per buffer: its position among the members of each of its sections
  std::vector<int> by_first, starting;    // the buffers by first section; where each section's begin
  std::vector<char> placed;
  // Per section: where the next buffer may start; the top of what lies there; bytes still to place; the lowest start and the two
  // lowest tops (and whose the first is) of its buffers to come.
  std::vector<T> floor, solid, rest, lowest, top1, top2, top1_of;
  std::vector<T> low;  // per buffer: the lowest offset it may still get
  std::vector<std::pair<T*, T>> trail;  // what to put back on the way up
  Queue raised, stale, unsure;          // sections whose floor changed, sections to summarise again, buffers to check
  std::vector<u64> failed;              // hashes of states known to fail
  Limits limits;
  i64 nodes = 0;
  bool fewest_first = false, stopped = false;

  Search(int n, T capacity, size_t table)
      : n(n), capacity(capacity), first(n, 0), end(n, 0), size(n, 0), offset(n, 0), rank(n, 0), placed(n, 0), low(n, 0), failed(table, 0) {}

  bool is_over() const { return *limits.stop || std::chrono::steady_clock::now() > limits.deadline; }

  bool out_of_time() {
    if (!stopped && (++nodes > limits.nodes || ((nodes & 63) == 0 && is_over()))) stopped = true;
    return stopped;
  }

  void set(T& place, T value) {
    trail.push_back({&place, place});
    place = value;
  }

  void undo(size_t mark) {
    for (; trail.size() > mark; trail.pop_back()) *trail.back().first = trail.back().second;
  }

  bool raise_low(int j, T value) {
    set(low[j], value);
    for (int s = first[j]; s < end[j]; ++s) stale.push(s);
    unsure.push(j);
    return value + size[j] <= capacity;
  }

  bool raise_floor(int s, T value) {
    set(floor[s], value);
    raised.push(s);
    return value + rest[s] <= capacity;
  }

  // Raises low and floor as far as what changed forces it; false when the rest cannot be placed canonically.
  bool propagate() {
    for (int k;;) {
      bool possible = true;
      if (raised.pop(k))
        possible = follow_floor(k);
      else if (stale.pop(k))
        possible = summarise(k);
      else if (unsure.pop(k))
        possible = check(k);
      else
        return true;
      if (!possible) {
        raised.clear(), stale.clear(), unsure.clear();
        return false;
      }
    }
  }

  bool follow_floor(int s) {
    for (int k = 0; k < unplaced[s]; ++k) {
      const int j = members[s][k];
      unsure.push(j);
      if (low[j] < floor[s] && !raise_low(j, floor[s])) return false;
    }
    return true;
  }

  bool summarise(int s) {
    T start = INF, t1 = INF, t2 = INF, of = -1;
    for (int k = 0; k < unplaced[s]; ++k) {
      const int j = members[s][k];
      const T top = low[j] + size[j];
      start = std::min(start, low[j]);
      if (top < t1)
        t2 = t1, t1 = top, of = T(j);
      else if (top < t2)
        t2 = top;
    }
    if (t1 != top1[s] || t2 != top2[s] || of != top1_of[s]) {
      set(top1[s], t1), set(top2[s], t2), set(top1_of[s], of);
      for (int k = 0; k < unplaced[s]; ++k) unsure.push(members[s][k]);
    }
    if (start != lowest[s]) set(lowest[s], start);
    return start == INF || start <= floor[s] || raise_floor(s, start);
  }

  bool check(int j) {
    T support = 0, lowest_floor = INF, next = INF;
    for (int s = first[j]; s < end[j]; ++s) {
      support = std::max(support, solid[s]);
      lowest_floor = std::min(lowest_floor, floor[s]);
      next = std::min(next, top1_of[s] == T(j) ? top2[s] : top1[s]);
    }
    if (support + size[j] <= lowest_floor) return false;    // it would fit into a hole left below
    if (support >= low[j] || next <= low[j]) return true;
    return next != INF && raise_low(j, next);               // nothing placed carries it there: it rests on one to come
  }

  // The unplaced buffers of a part, sections p to q.
  template <typename Visit>
  void each(int p, int q, Visit visit) const {
    for (int k = starting[p]; k < starting[q]; ++k)
      if (!placed[by_first[k]]) visit(by_first[k]);
  }

  // A state is what may still come and on what ground. Heights of the ground and of what lies there both count: where they differ is a
  // hole, and rules above look into holes.
  u64 state_hash(int p, int q) const {
    u64 h = 0;
    each(p, q, [&](int j) { h += mix(j + 1); });
    for (int s = p; s < q; ++s)
      if (rest[s]) h += mix(u64(floor[s]) * 0x9e3779b97f4a7c15ull + u64(solid[s]) * 0xc2b2ae3d27d4eb4full + u64(s) * 0x165667b19e3779f9ull);
    return h | 1;
  }

  // Places the buffers of sections p to q, none of which reaches beyond them.
  int solve(int p, int q) {
    if (out_of_time()) {
      raised.clear(), stale.clear(), unsure.clear();
      return STOPPED;
    }
    return propagate() ? split(p, q) : INFEASIBLE;
  }

  // Parts that share no buffer are placed independently: what fails in one is not retried with every plan of the other.
  int split(int p, int q) {
    struct Piece { int p, q, count; };
    std::vector<Piece> pieces;
    int reach = -1;
    each(p, q, [&](int j) {
      if (first[j] >= reach) pieces.push_back({first[j], 0, 0});
      reach = std::max(reach, end[j]);
      pieces.back().q = reach;
      ++pieces.back().count;
    });
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.count < b.count; });
    for (const Piece& piece : pieces) {
      const int result = branch(piece.p, piece.q);
      if (result != FOUND) return result;
    }
    return FOUND;
  }

  int branch(int p, int q) {
    const u64 hash = state_hash(p, q);
    u64& slot = failed[mix(hash) & (failed.size() - 1)];
    if (slot == hash) return INFEASIBLE;
    T level = INF;
    each(p, q, [&](int j) { level = std::min(level, low[j]); });
    const int whole = spanning(p, q, level);
    const int at = whole >= 0 ? p : tightest(p, q, level);
    const std::vector<int> lying = whole >= 0 ? std::vector<int>{whole} : candidates(at, level);

    const size_t mark = trail.size();
    int result = INFEASIBLE;
    for (size_t c = 0; c < lying.size() && result == INFEASIBLE; ++c) {
      if (is_twin_of_earlier(lying, c)) continue;
      put(lying[c], level);
      result = solve(p, q);
      take_back(lying[c]);
      undo(mark);
    }
    if (result == INFEASIBLE && whole < 0 && raise_floor(at, level + 1)) result = solve(p, q);  // nothing lies there: a hole
    raised.clear();
    undo(mark);
    if (result == INFEASIBLE) slot = hash;
    return result;
  }

  // A buffer that lives throughout the part, if the part stands on level, solid ground; else -1. Any plan stays valid when such a buffer
  // moves to the ground and all below it move up, so nothing else need be tried.
  int spanning(int p, int q, T level) const {
    for (int s = p; s < q; ++s)
      if (solid[s] != level || floor[s] != level) return -1;
    int found = -1;
    each(p, q, [&](int j) {
      if (first[j] == p && end[j] == q) found = j;
    });
    return found;
  }

  // The section at this level with the least slack, or with the fewest choices; the other one decides between equals.
  int tightest(int p, int q, T level) {
    i64 best = INT64_MAX, least = INT64_MAX;
    if (!fewest_first)
      for (int s = p; s < q; ++s)
        if (rest[s] && lowest[s] == level) least = std::min<i64>(least, slack(s));
    int at = -1;
    for (int s = p; s < q; ++s) {
      if (!rest[s] || lowest[s] != level || slack(s) > least) continue;
      int choices = 0;
      for (int k = 0; k < unplaced[s]; ++k) choices += low[members[s][k]] == level;
      const i64 key = fewest_first ? i64(choices + (slack(s) > 0)) * (i64(1) << 48) + slack(s) : choices;
      if (key < best) best = key, at = s;
    }
    return at;
  }

  i64 slack(int s) const { return capacity - floor[s] - rest[s]; }

  // What may lie at this level of the section, in the order to try.
  std::vector<int> candidates(int at, T level) const {
    std::vector<int> lying;
    for (int k = 0; k < unplaced[at]; ++k)
      if (low[members[at][k]] == level) lying.push_back(members[at][k]);
    std::sort(lying.begin(), lying.end(), [&](int a, int b) { return rank[a] < rank[b]; });
    return lying;
  }

  void put(int j, T level) {
    offset[j] = level;
    placed[j] = 1;
    for (int s = first[j]; s < end[j]; ++s) {
      set(floor[s], level + size[j]), set(solid[s], level + size[j]), set(rest[s], rest[s] - size[j]);
      raised.push(s), stale.push(s);
      leave(s, j);
    }
  }

  void take_back(int j) {
    placed[j] = 0;
    for (int s = first[j]; s < end[j]; ++s) ++unplaced[s];  // last to leave, first to return: its seat is the first free one
  }

  void leave(int s, int j) {
    auto& here = members[s];
    int &mine = seat[j][s - first[j]], last = here[--unplaced[s]];
    std::swap(here[mine], here[unplaced[s]]);
    seat[last][s - first[last]] = mine;
    mine = unplaced[s];
  }

  bool is_twin_of_earlier(const std::vector<int>& lying, size_t c) const {
    for (size_t d = 0; d < c; ++d)
      if (first[lying[d]] == first[lying[c]] && end[lying[d]] == end[lying[c]] && size[lying[d]] == size[lying[c]]) return true;
    return false;
  }

  // Sections are the largest sets of buffers alive together; times matter no more once these are known.
  void set_lives(const i64* lower, const i64* upper, const i64* bytes, i64 unit) {
    std::vector<int> by_upper;
    for (int i = 0; i < n; ++i) {
      size[i] = T(bytes[i] / unit);
      if (size[i]) by_first.push_back(i), by_upper.push_back(i);
    }
    const int count = int(by_first.size());
    std::sort(by_first.begin(), by_first.end(), [&](int a, int b) { return lower[a] < lower[b]; });
    std::sort(by_upper.begin(), by_upper.end(), [&](int a, int b) { return upper[a] < upper[b]; });
    for (int started = 0, closed = 0; closed < count;) {
      const i64 t = upper[by_upper[closed]];  // the next life to end
      if (started < count && lower[by_first[started]] < t) {  // a buffer began since the last section: a new largest set
        starting.push_back(started);
        while (started < count && lower[by_first[started]] < t) first[by_first[started++]] = sections;
        ++sections;
      }
      while (closed < count && upper[by_upper[closed]] == t) end[by_upper[closed++]] = sections;
    }
    starting.push_back(count);
  }

  // The ground of the search: buffers with a fixed offset and, where none is fixed, those that live throughout (see spanning). Nothing
  // goes below the fixed ones. The search is over the others.
  void ground(const i64* fixed, i64 unit) {
    floor.assign(sections, 0);
    const bool none_fixed = std::all_of(fixed, fixed + n, [](i64 at) { return at < 0; });
    std::vector<int> others, begins{0};
    T base = 0;
    for (int s = 0; s < sections; ++s) {
      for (int k = starting[s]; k < starting[s + 1]; ++k) {
        const int j = by_first[k];
        const bool throughout = none_fixed && s == 0 && end[j] == sections;
        if (fixed[j] < 0 && !throughout) {
          others.push_back(j);
          continue;
        }
        offset[j] = throughout ? base : T(fixed[j] / unit);
        base += size[j];
        for (int t = first[j]; t < end[j]; ++t) floor[t] = std::max<T>(floor[t], offset[j] + size[j]);
      }
      begins.push_back(int(others.size()));
    }
    by_first.swap(others);
    starting.swap(begins);
    solid = floor;
  }

  void prepare() {
    members.resize(sections);
    seat.resize(n);
    unplaced.assign(sections, 0);
    raised.resize(sections), stale.resize(sections), unsure.resize(n);
    for (auto* column : {&rest, &lowest, &top1, &top2, &top1_of}) column->assign(sections, 0);
    for (int j : by_first)
      for (int s = first[j]; s < end[j]; ++s) {
        rest[s] += size[j];
        seat[j].push_back(int(members[s].size()));
        members[s].push_back(j);
      }
  }

  // One attempt from an empty plan.
  int attempt() {
    nodes = 0;
    stopped = false;
    for (int s = 0; s < sections; ++s) raised.push(s), stale.push(s), unplaced[s] = int(members[s].size());
    for (int j : by_first) unsure.push(j);
    const int result = solve(0, sections);
    undo(0);
    return result;
  }
};

struct Instance {
  int n;
  const i64 *lower, *upper, *size;
  i64 unit, capacity;
  const i64* fixed;  // offsets, multiples of the unit; -1 for those to place
  const double* features;  // 3 x n: duration, size, pressure, in logarithms and standardised
};

// MiniMalloc's preorderings as weights of duration, size and pressure.
constexpr double NAMED[][3] = {{1.05, 0.05, 0.01}, {1.05, 1, 0.01}, {0.05, 1, 0}, {0.06, 0.05, 1}, {0.05, 0.01, 1}};
constexpr int N_NAMED = sizeof(NAMED) / sizeof(NAMED[0]);

// The order to try buffers in, and the choice of section: first the named ones with either choice, then random ones.
template <typename T>
void diversify(Search<T>& search, const double* features, u64 seed, int attempt, std::mt19937_64& random) {
  const auto uniform = [&] { return double(random() >> 11) * 0x1p-53; };
  double weight[3], noise = 0;
  const int modes = search.n > 1000 ? 1 : 2;  // of a large instance, counting the choices of every section costs more than all else
  search.fewest_first = attempt < modes * N_NAMED ? attempt % modes == 1 : random() % modes == 1;
  if (attempt < modes * N_NAMED) {
    const auto& named = NAMED[(attempt / modes + seed) % N_NAMED];  // searches side by side begin with different ones
    std::copy(named, named + 3, weight);
  } else {
    // Half of the attempts lean on size: on MiniMalloc's instances they succeed ten times as often. The others are for what differs.
    do
      for (double& w : weight) w = uniform() < 0.5 ? 0 : uniform();
    while (weight[0] + weight[1] + weight[2] == 0);
    if (random() % 2) weight[0] *= 0.3, weight[1] = 1, weight[2] *= 0.3;
    noise = 0.4 * uniform();
  }
  std::vector<double> score(search.n, 0);
  for (int i = 0; i < search.n; ++i) {
    for (int k = 0; k < 3; ++k) score[i] += weight[k] * features[k * search.n + i];
    score[i] += noise * (uniform() + uniform() + uniform() - 1.5);  // near enough to a normal deviate
  }
  std::vector<int> order(search.n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
  for (int k = 0; k < search.n; ++k) search.rank[order[k]] = k;
}

// 1, 1, 2, 1, 1, 2, 4, ...: restarts that are within a constant of the best schedule, whatever the chances of an attempt.
i64 luby(int attempt) {
  for (int k = 1;; ++k)
    if (attempt == (1 << k) - 2) return i64(1) << (k - 1);
    else if (attempt < (1 << k) - 2) return luby(attempt - (1 << (k - 1)) + 1);
}

template <typename T>
int run(const Instance& instance, u64 seed, int table_bits, Limits limits, i64* offsets, i64* nodes) {
  Search<T> search(instance.n, T(instance.capacity / instance.unit), size_t(1) << table_bits);
  search.set_lives(instance.lower, instance.upper, instance.size, instance.unit);
  search.ground(instance.fixed, instance.unit);
  search.prepare();
  for (int s = 0; s < search.sections; ++s)
    if (search.floor[s] + search.rest[s] > search.capacity) return INFEASIBLE;
  std::mt19937_64 random(seed);
  for (int attempt = 0;; ++attempt) {
    diversify(search, instance.features, seed, attempt, random);
    search.limits = limits;
    search.limits.nodes = limits.nodes * luby(attempt % 1022);
    const int result = search.attempt();
    *nodes += search.nodes;
    if (result == FOUND)
      for (int i = 0; i < instance.n; ++i) offsets[i] = i64(search.offset[i]) * instance.unit;
    if (result != STOPPED || search.is_over()) return result;
  }
}

struct Call {
  Instance instance;
  u64 seed;
  int table_bits;
  Limits limits;
  i64 *offsets, *nodes;
  int result;
};

void* answer(void* pointer) {
  Call& c = *static_cast<Call*>(pointer);
  // Four bytes hold twice as many heights per vector register.
  const bool small = c.instance.capacity / c.instance.unit < (i64(1) << 29);
  c.result = small ? run<int32_t>(c.instance, c.seed, c.table_bits, c.limits, c.offsets, c.nodes)
                   : run<i64>(c.instance, c.seed, c.table_bits, c.limits, c.offsets, c.nodes);
  return nullptr;
}

}  // namespace

extern "C" {

// 1: offsets hold a plan no higher than capacity. 0: proven that there is none. -1: stopped by the time limit or the flag; -2: no thread.
// `nodes_of_attempt` is the length of the shortest attempt; failed states are remembered across attempts.
int address_exact(int n, const i64* lower, const i64* upper, const i64* size, i64 unit, i64 capacity, const i64* fixed,
                  const double* features, u64 seed, int table_bits, i64 nodes_of_attempt, double seconds, const int32_t* stop, i64* offsets, i64* nodes) {
  *nodes = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(i64(seconds * 1e6));
  Call call{{n, lower, upper, size, unit, capacity, fixed, features}, seed, table_bits, {nodes_of_attempt, deadline, stop}, offsets, nodes, STOPPED};
  // One level of recursion per buffer and per hole: more than the stack of an ordinary thread. Untouched stack costs nothing.
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, (size_t(64) << 20) + size_t(n) * 16384);
  const int failure = pthread_create(&thread, &attributes, answer, &call);
  pthread_attr_destroy(&attributes);
  if (failure) return -2;
  pthread_join(thread, nullptr);
  return call.result;
}

}
