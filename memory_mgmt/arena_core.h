// What every planned allocator is made of, whatever the device: which parts of a region are in use, and where the next request stands
// in the plan. Included by arena_cpu.cpp and arena_cuda.cpp; needs neither torch nor CUDA.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {
constexpr int64_t kChunk = 1024;                    // granules in a chunk
constexpr int64_t kWindow = 64;                     // requests searched each way for the place in the plan after a divergence

int64_t self() { return (int64_t)pthread_self(); }

template <class T>
T* zeroed(int64_t count) {                          // lazily backed: large arrays cost only the pages that are written
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

// Which granules are in use. A chunk that one block covers whole is marked by its count alone, so a block costs one step per 64 KiB
// and at most two partly covered chunks of 16 words each.
struct Occupancy {
  int64_t granules, chunks;
  uint64_t* bits;
  uint16_t* used;                                   // granules in use of each chunk

  explicit Occupancy(int64_t n) : granules(n), chunks((n + kChunk - 1) / kChunk) {
    bits = zeroed<uint64_t>(chunks * kChunk / 64);
    used = zeroed<uint16_t>(chunks);
  }
  ~Occupancy() {
    if (bits) munmap(bits, chunks * kChunk / 8);
    if (used) munmap(used, chunks * sizeof(uint16_t));
  }
  template <class F>
  static bool words(int64_t a, int64_t b, F f) {    // f(word index, mask) over the granules [a, b); stops when f is false
    for (int64_t w = a >> 6; w <= (b - 1) >> 6; ++w) {
      uint64_t mask = ~uint64_t{0};
      if (w == a >> 6) mask &= ~uint64_t{0} << (a & 63);
      if (w == (b - 1) >> 6) mask &= ~uint64_t{0} >> (63 - ((b - 1) & 63));
      if (!f(w, mask)) return false;
    }
    return true;
  }
  bool part_free(int64_t c, int64_t a, int64_t b) const {
    if (used[c] == 0) return true;
    if (used[c] == kChunk || b - a == kChunk) return false;
    return words(a, b, [&](int64_t w, uint64_t m) { return (bits[w] & m) == 0; });
  }
  void part_set(int64_t c, int64_t a, int64_t b, bool on) {
    used[c] += (uint16_t)(on ? b - a : a - b);
    if (b - a < kChunk) words(a, b, [&](int64_t w, uint64_t m) { bits[w] = on ? bits[w] | m : bits[w] & ~m; return true; });
  }
  bool is_free(int64_t a, int64_t b) const {
    const int64_t first = a / kChunk, last = (b - 1) / kChunk;
    if (first == last) return part_free(first, a, b);
    if (!part_free(first, a, (first + 1) * kChunk) || !part_free(last, last * kChunk, b)) return false;
    uint16_t any = 0;
    for (int64_t c = first + 1; c < last; ++c) any |= used[c];
    return any == 0;
  }
  void set(int64_t a, int64_t b, bool on) {
    const int64_t first = a / kChunk, last = (b - 1) / kChunk;
    if (first == last) return part_set(first, a, b, on);
    part_set(first, a, (first + 1) * kChunk, on);
    part_set(last, last * kChunk, b, on);
    std::fill(used + first + 1, used + last, (uint16_t)(on ? kChunk : 0));
  }
};

// First granule -> granules of every live block: open addressing, linear probing, deletion by shifting back.
struct Lengths {
  std::vector<int64_t> key, value;
  int64_t count = 0;
  Lengths() : key(1024, -1), value(1024) {}
  size_t home(int64_t k) const { return ((uint64_t)k * 0x9E3779B97F4A7C15u >> 32) & (key.size() - 1); }
  void put(int64_t k, int64_t v) {
    if (2 * ++count > (int64_t)key.size()) grow();
    size_t i = home(k);
    while (key[i] >= 0) i = (i + 1) & (key.size() - 1);
    key[i] = k, value[i] = v;
  }
  int64_t pop(int64_t k) {                          // -1: no such block
    const size_t mask = key.size() - 1;
    size_t i = home(k);
    while (key[i] != k) {
      if (key[i] < 0) return -1;
      i = (i + 1) & mask;
    }
    const int64_t v = value[i];
    for (size_t j = (i + 1) & mask; key[j] >= 0; j = (j + 1) & mask)
      if (((j - home(key[j])) & mask) >= ((j - i) & mask)) key[i] = key[j], value[i] = value[j], i = j;
    key[i] = -1, --count;
    return v;
  }
  void grow() {
    std::vector<int64_t> k(2 * key.size(), -1), v(2 * key.size());
    key.swap(k), value.swap(v), count = 1;
    for (size_t i = 0; i < k.size(); ++i)
      if (k[i] >= 0) put(k[i], v[i]);
  }
};

struct Plan {
  std::vector<int64_t> size, offset;                // offset -1: leave it to the normal allocator
  std::vector<int64_t> stream;                      // that asks; all 0 where there are none
  std::vector<uint8_t> event;                       // 1: its end is marked by an event, for a tenant on another stream
};

enum Stat { kServed, kServedBytes, kPassed, kPassedBytes, kMissed, kMissedBytes, kConflicts, kConflictBytes, kResyncs, kWaits, kPosition, kStats };

// A step on its way through its plan. Only the thread that opened it asks.
struct Session {
  const Plan* plan;
  int64_t smallest, next = 0, previous = -1;
  bool lost = false;
  int64_t stats[kStats] = {};

  // The place of a request of n bytes in the plan. Where the sequence is left: the place where it was left (something was added),
  // or the nearest place whose two last sizes are these two (something is missing, or was served out of order).
  int64_t place(int64_t n, int64_t stream) {
    const auto& size = plan->size;
    const int64_t count = (int64_t)size.size();
    const auto fits = [&](int64_t k) { return size[k] == n && plan->stream[k] == stream; };
    if (next < count && fits(next)) {
      stats[kResyncs] += lost;
      lost = false;
      return next;
    }
    if (lost) {
      for (int64_t d = 1; d <= kWindow; ++d)
        for (const int64_t k : {next + d, next - d})
          if (k >= 1 && k < count && fits(k) && size[k - 1] == previous) {
            ++stats[kResyncs];
            lost = false;
            return k;
          }
    }
    lost = true;
    return -1;
  }
  // The address of a request, null if it is the normal allocator's. take(k, offset): the address if nothing lives there, else null.
  template <class Take>
  void* serve(int64_t n, int64_t stream, Take take) {
    const int64_t k = place(n, stream);
    previous = n;
    int64_t kind = kMissed;
    void* p = nullptr;
    if (k >= 0) {
      next = k + 1;
      const int64_t offset = plan->offset[k];
      if (offset < 0) kind = kPassed;
      else if ((p = take(k, offset))) kind = kServed;
      else kind = kConflicts;
    }
    ++stats[kind];
    stats[kind + 1] += n;
    return p;
  }
};
}  // namespace
