// The planned CPU allocator and the log of the real one, behind torch's CPU allocator interface (c10::SetCPUAllocator).
//
// Installed and switched off it hands every request to the allocator it found. While a session is open, the k-th request of the
// session's thread is served at its planned offset of one mapped region. A plan is only ever a hint: an address is handed out only
// if no block lives in its range (Occupancy), and whatever is in doubt goes to the normal allocator and is counted.
//
// oneDNN takes memory through Allocator::raw_allocate, so every block has its address as context and raw_deleter() decides by address.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "arena_core.h"

namespace {
constexpr int64_t kGranule = 64;                    // bytes: the alignment of torch's own CPU allocator

// One mapping. Only its owner thread hands out addresses and keeps the books; another thread that frees a block leaves it on a list
// (linked through the freed memory itself). References: one per live block and one of whoever made it; the last one unmaps.
struct Region {
  struct Freed { Freed* next; };
  char* base = nullptr;
  std::atomic<int64_t> bytes{0};                    // 0: unmapped; the struct itself stays, since any thread may look at it
  int64_t mapped = 0, owner = self();
  std::atomic<int64_t> references{1};
  std::atomic<Freed*> freed{nullptr};
  Occupancy* occupancy = nullptr;
  Lengths* lengths = nullptr;
  Region* older = nullptr;

  bool take(int64_t offset, int64_t size) {
    const int64_t a = offset / kGranule, b = (offset + size + kGranule - 1) / kGranule;
    if (offset < 0 || offset % kGranule || b > occupancy->granules) return false;
    if (!occupancy->is_free(a, b) && !(collect() && occupancy->is_free(a, b))) return false;
    occupancy->set(a, b, true);
    lengths->put(a, b - a);
    references.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  void forget(void* p) {                            // owner only
    const int64_t a = ((char*)p - base) / kGranule, n = lengths->pop(a);
    if (n > 0) occupancy->set(a, a + n, false);
  }
  bool collect() {                                  // owner only: what other threads freed
    Freed* list = freed.load(std::memory_order_relaxed) ? freed.exchange(nullptr, std::memory_order_acquire) : nullptr;
    const bool any = list != nullptr;
    while (list) {
      Freed* next = list->next;
      forget(list);
      list = next;
    }
    return any;
  }
  void release(void* p) {
    if (self() == owner) {
      forget(p);
    } else {
      Freed* node = static_cast<Freed*>(p);
      node->next = freed.load(std::memory_order_relaxed);
      while (!freed.compare_exchange_weak(node->next, node, std::memory_order_release, std::memory_order_relaxed)) {}
    }
    unreference();
  }
  void unreference() {
    if (references.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    bytes.store(0);
    delete occupancy;
    delete lengths;
    munmap(base, mapped);
  }
  int64_t give_back() {                             // free whole chunks to the kernel; returns their bytes
    collect();
    int64_t given = 0;
    for (int64_t c = 0; c < occupancy->chunks;) {
      int64_t end = c;
      while (end < occupancy->chunks && occupancy->used[end] == 0) ++end;
      if (end > c) {
        const int64_t length = (end - c) * kChunk * kGranule;
        madvise(base + c * kChunk * kGranule, length, MADV_DONTNEED), given += length;
      }
      c = end + 1;
    }
    return given;
  }
};
std::atomic<Region*> g_regions{nullptr};

Region* region_of(const void* p) {
  for (Region* r = g_regions.load(std::memory_order_acquire); r; r = r->older)
    if ((uint64_t)((const char*)p - r->base) < (uint64_t)r->bytes.load(std::memory_order_relaxed)) return r;
  return nullptr;
}

struct Event { int64_t id, size, thread; };          // size of an allocation, minus it for a free
struct Tracked { int64_t id, size; c10::DataPtr block; };
struct Log {
  std::mutex mutex;
  int64_t readers = 0, next_id = 0;
  std::vector<Event> events;
  std::unordered_map<void*, Tracked> live;
};

enum Mode { kServing = 1, kLogging = 2 };
std::atomic<int> g_mode{0};
std::atomic<int64_t> g_tracked{0};
std::atomic<int64_t> g_owner{0};                     // thread of the open session; only it touches the session
Session* g_session = nullptr;
Region* g_region = nullptr;                          // of the open session
c10::Allocator* g_base = nullptr;
Log& log() { static Log* instance = new Log; return *instance; }  // never destroyed: blocks are freed until the very end

void release_served(void* p) {
  c10::profiledCPUMemoryReporter().Delete(p);
  region_of(p)->release(p);
}
bool release_tracked(void* p) {
  c10::DataPtr block;                                // freed after the lock is given back
  Log& l = log();
  std::lock_guard<std::mutex> guard(l.mutex);
  auto found = l.live.find(p);
  if (found == l.live.end()) return false;
  if (l.readers) l.events.push_back({found->second.id, -found->second.size, self()});
  block = std::move(found->second.block);
  l.live.erase(found);
  g_tracked.fetch_sub(1, std::memory_order_relaxed);
  return true;
}
void release(void* p) {                              // any block, of whatever origin
  if (!p || (g_tracked.load(std::memory_order_relaxed) && release_tracked(p))) return;
  region_of(p) ? release_served(p) : g_base->raw_deleter()(p);
}

struct PlannedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const int mode = g_mode.load(std::memory_order_acquire);
    if (__builtin_expect(mode == 0 || n == 0, 1)) return g_base->allocate(n);
    c10::DataPtr block = mode & kServing ? served(n) : g_base->allocate(n);
    return mode & kLogging ? tracked(std::move(block), n) : std::move(block);
  }
  c10::DataPtr served(size_t n) {
    if (g_owner.load(std::memory_order_relaxed) != self() || (int64_t)n < g_session->smallest) return g_base->allocate(n);
    void* p = g_session->serve((int64_t)n, 0, [n](int64_t, int64_t offset) {
      return g_region->take(offset, (int64_t)n) ? g_region->base + offset : nullptr;
    });
    if (!p) return g_base->allocate(n);
    c10::profiledCPUMemoryReporter().New(p, n);
    return {p, p, &release_served, c10::Device(c10::kCPU)};
  }
  c10::DataPtr tracked(c10::DataPtr block, size_t n) {
    void* p = block.get();
    Log& l = log();
    std::lock_guard<std::mutex> guard(l.mutex);
    if (l.readers == 0 || p != block.get_context()) return block;
    const int64_t id = l.next_id++;
    l.events.push_back({id, (int64_t)n, self()});
    auto [entry, added] = l.live.try_emplace(p);
    if (added) g_tracked.fetch_add(1, std::memory_order_relaxed);
    else entry->second.block.release_context();      // freed behind our back: its memory is this block's now
    entry->second = Tracked{id, (int64_t)n, std::move(block)};
    return {p, p, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};
PlannedAllocator& allocator() { static PlannedAllocator* instance = new PlannedAllocator; return *instance; }

// A child process has this thread only and its own copy of everything: it goes on with the normal allocator.
void before_fork() { log().mutex.lock(); }
void after_fork() { log().mutex.unlock(); }
void in_child() {
  log().readers = 0;
  g_mode.store(0);
  g_owner.store(0);
  log().mutex.unlock();
}
}  // namespace

extern "C" {
// ---- the allocator
int lsa_installed() { return c10::GetCPUAllocator() == &allocator(); }
int lsa_install() {                                  // 0: what is installed cannot be wrapped, or is not what was wrapped before
  if (lsa_installed()) return 1;
  c10::Allocator* found = c10::GetCPUAllocator();
  if (!found->raw_deleter() || (g_base && g_base != found)) return 0;
  static const int once = pthread_atfork(before_fork, after_fork, in_child);
  (void)once;
  g_base = found;
  c10::SetCPUAllocator(&allocator(), 255);
  return lsa_installed();
}
int lsa_uninstall() {                                // 0: not while it is in use, a region is mapped or a logged block lives
  if (g_mode.load() || g_tracked.load()) return 0;
  for (Region* r = g_regions.load(); r; r = r->older)
    if (r->bytes.load()) return 0;
  if (lsa_installed()) c10::SetCPUAllocator(g_base, 255);
  return 1;
}
int64_t lsa_thread() { return self(); }

// ---- the log
void lsa_log_start() {
  std::lock_guard<std::mutex> guard(log().mutex);
  if (log().readers++ == 0) log().events.clear();
  g_mode.fetch_or(kLogging);
}
void lsa_log_stop() {
  std::lock_guard<std::mutex> guard(log().mutex);
  if (log().readers && --log().readers == 0) {
    g_mode.fetch_and(~kLogging);
    std::vector<Event>().swap(log().events);
  }
}
int64_t lsa_log_size() {
  std::lock_guard<std::mutex> guard(log().mutex);
  return (int64_t)log().events.size();
}
void lsa_log_read(int64_t first, int64_t count, int64_t* out) {  // rows of id, size, thread
  std::lock_guard<std::mutex> guard(log().mutex);
  if (first >= 0 && first + count <= (int64_t)log().events.size()) std::memcpy(out, log().events.data() + first, count * sizeof(Event));
}

// ---- regions
void* lsa_region_new(int64_t bytes) {                // huge pages (madvise) made no measurable difference to a training step
  auto* r = new Region;
  const int64_t chunk = kChunk * kGranule, size = (bytes + chunk - 1) / chunk * chunk;
  r->base = zeroed<char>(size);
  r->occupancy = new Occupancy(size / kGranule);
  if (!r->base || !r->occupancy->bits || !r->occupancy->used) {
    if (r->base) munmap(r->base, size);
    delete r->occupancy;
    delete r;
    return nullptr;
  }
  r->mapped = size, r->lengths = new Lengths;
  r->bytes.store(size);
  r->older = g_regions.load();
  while (!g_regions.compare_exchange_weak(r->older, r)) {}
  return r;
}
void lsa_region_close(void* region) { static_cast<Region*>(region)->unreference(); }
int64_t lsa_region_give_back(void* region) { return static_cast<Region*>(region)->give_back(); }
int64_t lsa_region_blocks(void* region) { return static_cast<Region*>(region)->references.load() - 1; }
void* lsa_region_take(void* region, int64_t offset, int64_t size) {  // what a session does, for tests
  auto* r = static_cast<Region*>(region);
  return r->take(offset, size) ? r->base + offset : nullptr;
}
void lsa_region_release(void* p) { region_of(p)->release(p); }

// ---- plans and sessions
void* lsa_plan_new(int64_t count, const int64_t* size, const int64_t* offset) {
  return new Plan{{size, size + count}, {offset, offset + count}, std::vector<int64_t>(count), {}};
}
void lsa_plan_delete(void* plan) { delete static_cast<Plan*>(plan); }
int lsa_begin(void* plan, void* region, int64_t smallest) {          // 0: another session is open; -1: not the region's thread
  auto* r = static_cast<Region*>(region);
  if (r->owner != self()) return -1;
  int64_t none = 0;
  if (!g_owner.compare_exchange_strong(none, r->owner)) return 0;
  delete g_session;
  g_session = new Session{static_cast<const Plan*>(plan), smallest};
  g_region = r;
  r->collect();
  g_mode.fetch_or(kServing);
  return 1;
}
void lsa_end(int64_t* stats) {                       // by the thread that began
  g_mode.fetch_and(~kServing);
  g_owner.store(0);
  g_session->stats[kPosition] = g_session->next;
  std::memcpy(stats, g_session->stats, sizeof(g_session->stats));
}
}
