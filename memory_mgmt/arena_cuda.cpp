// The planned CUDA allocator, as the three functions that a pluggable allocator of torch has (lsa_malloc, lsa_free, lsa_record_stream).
//
// While a session is open, the k-th request of the session's thread, on the stream that the plan says, is served at its planned offset
// of one region; everything else goes to the allocator below (arena_cuda_torch.cpp: torch's own; else cudaMalloc). A plan is only ever
// a hint: an address is handed out only if no block lives in its range and all work on the blocks that lived there comes first.
//
// What comes first: work of one stream is in the order of issue. A block that is freed may be in use by work issued before on its own
// stream only (the rule of torch's caching allocator: a program that uses it on other streams makes its stream wait for them, or says
// record_stream). So a block of another stream may follow it only behind an event recorded on its stream when it was freed. The plan
// says which frees are marked by an event; where a block finds in its range one of another stream that was not, it is not served.
//
// Compiled without torch and without CUDA headers: the runtime that the process has loaded is looked up by name.
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "arena_core.h"

namespace {
constexpr int64_t kGranule = 512;                   // bytes: the alignment of torch's CUDA caching allocator
constexpr unsigned kNoTiming = 2;                   // cudaEventDisableTiming
using Stream = int64_t;                             // a cudaStream_t; 0 is the default stream

struct Runtime {                                    // all return 0 for success
  int (*malloc)(void**, size_t) = nullptr;
  int (*free)(void*) = nullptr;
  int (*synchronize)() = nullptr;
  int (*event_new)(void**, unsigned) = nullptr;
  int (*record)(void*, void*) = nullptr;
  int (*wait)(void*, void*, unsigned) = nullptr;
} g_cuda;

// The allocator that has everything the arena has not. It may throw; none of these is called with g_mutex held.
struct Below {
  void* (*malloc)(int64_t size, int device, Stream stream);
  void (*free)(void* p);
  void (*record_stream)(void* p, Stream stream);
};
void* cuda_malloc(int64_t size, int, Stream) {
  void* p = nullptr;
  return g_cuda.malloc(&p, (size_t)size) == 0 ? p : nullptr;
}
void cuda_free(void* p) { g_cuda.free(p); }         // waits for the device, so no use of another stream can be overtaken
void cuda_record_stream(void*, Stream) {}
constexpr Below kRuntime{cuda_malloc, cuda_free, cuda_record_stream};
Below g_below = kRuntime;

struct Event { void* handle; };
using EventPtr = std::shared_ptr<Event>;

// Events that nobody holds any more are used again: a wait looks at the record that was the last one when it was issued.
struct Events {
  std::vector<void*> unused;
  EventPtr get() {                                  // null: the runtime gives none
    void* handle = nullptr;
    if (!unused.empty()) handle = unused.back(), unused.pop_back();
    else if (g_cuda.event_new(&handle, kNoTiming) != 0) return nullptr;
    return EventPtr(new Event{handle}, [this](Event* e) { unused.push_back(e->handle), delete e; });
  }
};
Events& events() { static Events* instance = new Events; return *instance; }  // blocks are freed until the very end

// One block of the allocator below. Everything in it is under g_mutex. References: one per live block and one of whoever made it.
struct Region {
  struct Block { int64_t end; Stream stream; EventPtr event; std::vector<Stream> users; };
  struct Past { int64_t end; Stream stream; int64_t when; EventPtr event; };  // the block that was freed last in [key, end)
  char* base = nullptr;                             // null: given back until the next step
  int64_t bytes = 0, owner = self(), references = 1, clock = 0;
  int device = 0;
  Occupancy* occupancy = nullptr;
  std::map<int64_t, Block> blocks;                  // by first granule
  std::map<int64_t, Past> past;                     // disjoint
  std::map<std::pair<Stream, Stream>, int64_t> seen;  // (waiting, waited for) -> clock up to which the first comes after the second
  std::set<Stream> streams{0};                      // of all blocks so far, and the one that the memory itself was taken on

  int64_t first(const void* p) const { return ((const char*)p - base) / kGranule; }
  bool has(const void* p) const { return base && (uint64_t)((const char*)p - base) < (uint64_t)bytes; }

  // The waits that let `stream` use granules [a, b): by stream the last event that matters. False: some work was not marked.
  bool waits_for(int64_t a, int64_t b, Stream stream, std::map<Stream, const Past*>* waits) const {
    auto it = past.upper_bound(a);
    if (it != past.begin() && std::prev(it)->second.end > a) --it;
    for (; it != past.end() && it->first < b; ++it) {
      const Past& before = it->second;
      if (before.stream == stream) continue;
      const auto known = seen.find({stream, before.stream});
      if (known != seen.end() && known->second >= before.when) continue;
      if (!before.event) return false;
      const Past*& last = (*waits)[before.stream];
      if (!last || last->when < before.when) last = &before;
    }
    return true;
  }
  void* take(int64_t offset, int64_t size, Stream stream, bool marked, int64_t* stats) {
    const int64_t a = offset / kGranule, b = (offset + size + kGranule - 1) / kGranule;
    if (offset < 0 || offset % kGranule || b > occupancy->granules || !occupancy->is_free(a, b)) return nullptr;
    std::map<Stream, const Past*> waits;
    if (!waits_for(a, b, stream, &waits)) return nullptr;
    for (const auto& [source, before] : waits) {
      if (g_cuda.wait((void*)stream, before->event->handle, 0) != 0) return nullptr;
      seen[{stream, source}] = before->when;
      ++stats[kWaits];
    }
    occupancy->set(a, b, true);
    blocks[a] = Block{b, stream, marked ? events().get() : nullptr, {}};
    streams.insert(stream);
    ++references;
    return base + offset;
  }
  void release(void* p) {
    const auto found = blocks.find(first(p));
    if (found == blocks.end()) return;
    Block block = std::move(found->second);
    const int64_t a = found->first;
    blocks.erase(found);
    bool ordered = true;
    for (const Stream user : block.users) ordered = follow(block.stream, user) && ordered;
    --references;
    if (!ordered) return;                           // the place stays taken
    if (block.event && g_cuda.record(block.event->handle, (void*)block.stream) != 0) block.event = nullptr;
    forget(a, block.end);
    past[a] = Past{block.end, block.stream, ++clock, std::move(block.event)};
    occupancy->set(a, block.end, false);
  }
  bool follow(Stream stream, Stream source) {       // what is issued on `stream` from now on comes after all that is on `source`
    const EventPtr event = events().get();
    return event && g_cuda.record(event->handle, (void*)source) == 0 && g_cuda.wait((void*)stream, event->handle, 0) == 0;
  }
  void forget(int64_t a, int64_t b) {               // takes [a, b) out of the past
    auto it = past.upper_bound(a);
    if (it != past.begin() && std::prev(it)->second.end > a) {
      --it;
      const Past whole = it->second;
      const int64_t start = it->first;
      it = past.erase(it);
      if (start < a) past[start] = whole, past[start].end = a;
      if (whole.end > b) past[b] = whole;
      it = past.lower_bound(a);
    }
    while (it != past.end() && it->first < b) {
      const Past whole = it->second;
      it = past.erase(it);
      if (whole.end > b) past[b] = whole;
    }
  }
  bool settle(const Plan& plan) {                   // before a step: every stream comes after all of them, so the past does not matter
    streams.insert(plan.stream.begin(), plan.stream.end());
    std::map<Stream, EventPtr> marks;
    if (streams.size() > 1)
      for (const Stream stream : streams) {
        const EventPtr event = events().get();
        if (!event || g_cuda.record(event->handle, (void*)stream) != 0) return false;
        marks[stream] = event;
      }
    for (const auto& [source, event] : marks)
      for (const Stream stream : streams)
        if (stream != source && g_cuda.wait((void*)stream, event->handle, 0) != 0) return false;
    past.clear();
    seen.clear();
    return true;
  }
};

struct LogEvent { int64_t id, size, thread; Stream stream; };  // size: of an allocation; minus it for a free; 0: used by `stream`
struct Log {
  int64_t readers = 0, next_id = 0;
  std::vector<LogEvent> events;
  std::unordered_map<void*, std::pair<int64_t, int64_t>> live;  // (id, size)
};

enum Mode { kServing = 1, kLogging = 2 };
std::atomic<int> g_mode{0};
std::mutex g_mutex;                                 // over all that follows, and all regions
int64_t g_owner = 0;                                // thread of the open session
Session* g_session = nullptr;
Region* g_region = nullptr;                         // of the open session
std::vector<Region*>& regions() { static auto* instance = new std::vector<Region*>; return *instance; }
Log& log() { static Log* instance = new Log; return *instance; }

Region* region_of(const void* p) {
  for (Region* r : regions())
    if (r->has(p)) return r;
  return nullptr;
}

void* serve(int64_t size, int device, Stream stream) {
  std::lock_guard<std::mutex> guard(g_mutex);
  if (g_owner != self() || size < g_session->smallest || device != g_region->device) return nullptr;
  return g_session->serve(size, stream, [&](int64_t k, int64_t offset) {
    return g_region->take(offset, size, stream, g_session->plan->event[k], g_session->stats);
  });
}

// The memory of a region without blocks, taken out of it (with the lock held) and given back (without).
char* taken_out(Region* r) {
  char* p = r->base;
  r->base = nullptr;
  r->past.clear();
  r->seen.clear();
  return p;
}
void give(char* p) {
  if (!p) return;
  g_cuda.synchronize();                             // the allocator below knows nothing of the streams that used it
  g_below.free(p);
}
bool fill(Region* r) {                              // false: there is not so much memory
  if (r->base) return true;
  char* p = nullptr;
  try {
    p = static_cast<char*>(g_below.malloc(r->bytes, r->device, 0));
  } catch (...) {                                   // the caller is Python's ctypes
  }
  std::lock_guard<std::mutex> guard(g_mutex);
  r->base = p;
  return p != nullptr;
}
void drop(Region* r) {                              // its maker's reference is gone, or a block of it
  char* p = nullptr;
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (r->references) return;
    p = taken_out(r);
    auto& all = regions();
    all.erase(std::find(all.begin(), all.end(), r));
  }
  give(p);
  delete r->occupancy;
  delete r;
}
}  // namespace

extern "C" {
// ---- the allocator
void* lsa_malloc(int64_t size, int device, Stream stream) {
  const int mode = g_mode.load(std::memory_order_acquire);
  if (mode & kServing)
    if (void* p = serve(size, device, stream)) return p;
  void* p = g_below.malloc(size, device, stream);
  if (p && (mode & kLogging)) {
    std::lock_guard<std::mutex> guard(g_mutex);
    Log& l = log();
    if (l.readers) {
      l.live[p] = {l.next_id, size};
      l.events.push_back({l.next_id++, size, self(), stream});
    }
  }
  return p;
}
void lsa_free(void* p, int64_t, int, Stream) {
  Region* r = nullptr;
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if ((r = region_of(p))) {
      r->release(p);
      if (r->references) return;
    } else if (const auto found = log().live.find(p); found != log().live.end()) {
      if (log().readers) log().events.push_back({found->second.first, -found->second.second, self(), 0});
      log().live.erase(found);
    }
  }
  r ? drop(r) : g_below.free(p);
}
void lsa_record_stream(void* p, Stream stream) {
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (Region* r = region_of(p)) {
      const auto found = r->blocks.find(r->first(p));
      if (found != r->blocks.end() && found->second.stream != stream) {
        auto& users = found->second.users;
        if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
      }
      return;
    }
    const auto found = log().live.find(p);
    if (found != log().live.end() && log().readers) log().events.push_back({found->second.first, 0, self(), stream});
  }
  g_below.record_stream(p, stream);
}
const std::atomic<int>* lsa_mode() { return &g_mode; }  // 0: nothing to serve and nothing to log
int lsa_runtime(const char* library) {              // null: what the process has loaded. 0: there is no CUDA runtime
  void* from = library ? dlopen(library, RTLD_NOW) : RTLD_DEFAULT;
  const auto find = [&](const char* name, auto& target) {
    return (target = reinterpret_cast<std::decay_t<decltype(target)>>(dlsym(from, name))) != nullptr;
  };
  return (!library || from) && find("cudaMalloc", g_cuda.malloc) && find("cudaFree", g_cuda.free) &&
         find("cudaDeviceSynchronize", g_cuda.synchronize) && find("cudaEventCreateWithFlags", g_cuda.event_new) &&
         find("cudaEventRecord", g_cuda.record) && find("cudaStreamWaitEvent", g_cuda.wait);
}
void lsa_stand_on(void* (*malloc)(int64_t, int, Stream), void (*free)(void*), void (*record_stream)(void*, Stream)) {
  g_below = malloc ? Below{malloc, free, record_stream} : kRuntime;
}
int64_t lsa_thread() { return self(); }

// ---- the log
void lsa_log_start() {
  std::lock_guard<std::mutex> guard(g_mutex);
  if (log().readers++ == 0) log().events.clear(), log().live.clear();
  g_mode.fetch_or(kLogging);
}
void lsa_log_stop() {
  std::lock_guard<std::mutex> guard(g_mutex);
  if (log().readers && --log().readers == 0) {
    g_mode.fetch_and(~kLogging);
    std::vector<LogEvent>().swap(log().events);
    log().live.clear();
  }
}
int64_t lsa_log_size() {
  std::lock_guard<std::mutex> guard(g_mutex);
  return (int64_t)log().events.size();
}
void lsa_log_read(int64_t start, int64_t count, int64_t* out) {  // rows of id, size, thread, stream
  std::lock_guard<std::mutex> guard(g_mutex);
  if (start >= 0 && start + count <= (int64_t)log().events.size()) std::memcpy(out, log().events.data() + start, count * sizeof(LogEvent));
}

// ---- regions
void* lsa_region_new(int64_t bytes, int device) {   // null: there is not so much memory
  auto* r = new Region;
  r->bytes = (bytes + kGranule - 1) / kGranule * kGranule, r->device = device;
  r->occupancy = new Occupancy(r->bytes / kGranule);
  if (!r->occupancy->bits || !r->occupancy->used || !fill(r)) {
    delete r->occupancy;
    delete r;
    return nullptr;
  }
  std::lock_guard<std::mutex> guard(g_mutex);
  regions().push_back(r);
  return r;
}
void lsa_region_close(void* region) {
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (--static_cast<Region*>(region)->references) return;
  }
  drop(static_cast<Region*>(region));
}
int64_t lsa_region_give_back(void* region) {        // all or nothing; the next step takes it again
  auto* r = static_cast<Region*>(region);
  char* p = nullptr;
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (r->references == 1 && g_region != r) p = taken_out(r);
  }
  give(p);
  return p ? r->bytes : 0;
}
int64_t lsa_region_blocks(void* region) {
  std::lock_guard<std::mutex> guard(g_mutex);
  return static_cast<Region*>(region)->references - 1;
}

// ---- plans and sessions
void* lsa_plan_new(int64_t count, const int64_t* size, const int64_t* offset, const int64_t* stream, const uint8_t* event) {
  return new Plan{{size, size + count}, {offset, offset + count}, {stream, stream + count}, {event, event + count}};
}
void lsa_plan_delete(void* plan) { delete static_cast<Plan*>(plan); }
int lsa_begin(void* plan, void* region, int64_t smallest) {  // 0: another session is open; -1: not the region's thread; -2: no memory, or
  auto* r = static_cast<Region*>(region);                    // streams that cannot be waited for
  if (r->owner != self()) return -1;
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (g_owner) return 0;
    g_owner = r->owner;
  }
  const bool filled = fill(r);
  std::lock_guard<std::mutex> guard(g_mutex);
  if (!filled || !r->settle(*static_cast<const Plan*>(plan))) {
    g_owner = 0;
    return -2;
  }
  delete g_session;
  g_session = new Session{static_cast<const Plan*>(plan), smallest};
  g_region = r;
  g_mode.fetch_or(kServing);
  return 1;
}
void lsa_end(int64_t* stats) {                      // by the thread that began
  std::lock_guard<std::mutex> guard(g_mutex);
  g_mode.fetch_and(~kServing);
  g_owner = 0;
  g_region = nullptr;
  g_session->stats[kPosition] = g_session->next;
  std::memcpy(stats, g_session->stats, sizeof(g_session->stats));
}
}
