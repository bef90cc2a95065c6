// Puts arena_cuda.cpp in front of torch's CUDA caching allocator. Every virtual function goes through to the caching allocator, which
// keeps its statistics, its expandable segments, its pools and what it handed out before; only while a step is watched or served do
// requests for tensors pass the arena first.
//
// Functions that some supported releases of torch do not have are written without `override` and forwarded where they exist.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

namespace {
namespace cca = c10::cuda::CUDACachingAllocator;
using c10::DataPtr;
using c10::DeviceIndex;
using c10::MempoolId_t;

struct Arena {                                      // functions of arena_cuda.cpp
  void* (*malloc)(int64_t size, int device, int64_t stream);
  void (*free)(void* p, int64_t, int, int64_t);
  void (*record_stream)(void* p, int64_t stream);
  const std::atomic<int>* mode;
} g_arena;
cca::CUDAAllocator* g_torch = nullptr;

void release(void* p) {                             // a block of any origin
  if (p) g_arena.free(p, 0, 0, 0);
}

void* torch_malloc(int64_t size, int, int64_t stream) { return g_torch->raw_alloc_with_stream((size_t)size, (cudaStream_t)stream); }
void torch_free(void* p) { g_torch->raw_delete(p); }
void torch_record_stream(void* p, int64_t stream) {
  const auto device = c10::Device(c10::kCUDA, c10::cuda::current_device());
  DataPtr borrowed(p, p, g_torch->raw_deleter(), device);  // torch's allocator looks at nothing else
  g_torch->recordStream(borrowed, c10::cuda::getStreamFromExternal((cudaStream_t)stream, device.index()));
  borrowed.release_context();
}

struct PlannedAllocator final : cca::CUDAAllocator {
  std::atomic<int> pools{0};                        // private pools that requests go to now: graphs are captured there

  DataPtr allocate(size_t n) override {
    if (__builtin_expect(g_arena.mode->load(std::memory_order_acquire) == 0 || n == 0 || pools.load(std::memory_order_relaxed), 1))
      return g_torch->allocate(n);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    void* p = g_arena.malloc((int64_t)n, stream.device_index(), (int64_t)stream.stream());
    return {p, p, &release, stream.device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void raw_delete(void* p) override { release(p); }
  void recordStream(const DataPtr& block, c10::cuda::CUDAStream stream) override {
    if (block.get_deleter() != &release) return g_torch->recordStream(block, stream);
    if (block.get()) g_arena.record_stream(block.get(), (int64_t)stream.stream());
  }
  void beginAllocateToPool(DeviceIndex device, MempoolId_t id, std::function<bool(cudaStream_t)> filter) override {
    g_torch->beginAllocateToPool(device, id, std::move(filter));
    ++pools;
  }
  void endAllocateToPool(DeviceIndex device, MempoolId_t id) override {
    g_torch->endAllocateToPool(device, id);
    --pools;
  }

  // ---- handed through
  void copy_data(void* to, const void* from, std::size_t n) const override { g_torch->copy_data(to, from, n); }
  bool initialized() override { return g_torch->initialized(); }
  void emptyCache(MempoolId_t id) override { g_torch->emptyCache(id); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override { return g_torch->getDeviceStats(device); }
  void resetAccumulatedStats(DeviceIndex device) override { g_torch->resetAccumulatedStats(device); }
  void resetPeakStats(DeviceIndex device) override { g_torch->resetPeakStats(device); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override { return g_torch->getMemoryInfo(device); }
  void* raw_alloc(size_t n) override { return g_torch->raw_alloc(n); }
  void* raw_alloc_with_stream(size_t n, cudaStream_t stream) override { return g_torch->raw_alloc_with_stream(n, stream); }
  void init(int devices) override { g_torch->init(devices); }
  double getMemoryFraction(DeviceIndex device) override { return g_torch->getMemoryFraction(device); }
  void setMemoryFraction(double fraction, DeviceIndex device) override { g_torch->setMemoryFraction(fraction, device); }
  std::vector<cca::StreamSegmentSize> getExpandableSegmentSizes(DeviceIndex device) override {
    return g_torch->getExpandableSegmentSizes(device);
  }
  void enable(bool value) override { g_torch->enable(value); }
  bool isEnabled() const override { return g_torch->isEnabled(); }
  void cacheInfo(DeviceIndex device, size_t* largest) override { g_torch->cacheInfo(device, largest); }
  void* getBaseAllocation(void* p, size_t* size) override { return g_torch->getBaseAllocation(p, size); }
  cca::SnapshotInfo snapshot(MempoolId_t id, bool traces) override { return g_torch->snapshot(id, traces); }
  void releasePool(DeviceIndex device, MempoolId_t id) override { g_torch->releasePool(device, id); }
  int getPoolUseCount(DeviceIndex device, MempoolId_t id) override { return g_torch->getPoolUseCount(device, id); }
  void createOrIncrefPool(DeviceIndex device, MempoolId_t id, std::shared_ptr<cca::CUDAAllocator> allocator) override {
    g_torch->createOrIncrefPool(device, id, std::move(allocator));
  }
  void setUseOnOOM(DeviceIndex device, MempoolId_t id, bool use) override { g_torch->setUseOnOOM(device, id, use); }
  void setNoSplit(DeviceIndex device, MempoolId_t id) override { g_torch->setNoSplit(device, id); }
  bool checkPoolLiveAllocations(DeviceIndex device, MempoolId_t id, const std::unordered_set<void*>& expected) override {
    return g_torch->checkPoolLiveAllocations(device, id, expected);
  }
  cca::ShareableHandle shareIpcHandle(void* p) override { return g_torch->shareIpcHandle(p); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override { return g_torch->getIpcDevPtr(std::move(handle)); }
  bool isHistoryEnabled() override { return g_torch->isHistoryEnabled(); }
  void recordHistory(bool enabled, cca::CreateContextFn recorder, size_t entries, cca::RecordContext when, bool clear,
                     const std::vector<std::string>& skip) override {
    g_torch->recordHistory(enabled, recorder, entries, when, clear, skip);
  }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& what) override { g_torch->recordAnnotation(what); }
  void pushCompileContext(std::string& text) override { g_torch->pushCompileContext(text); }
  void popCompileContext() override { g_torch->popCompileContext(); }
  void setUserMetadata(const std::string& text) override { g_torch->setUserMetadata(text); }
  std::string getUserMetadata() override { return g_torch->getUserMetadata(); }
  void attachOutOfMemoryObserver(cca::OutOfMemoryObserver observer) override { g_torch->attachOutOfMemoryObserver(std::move(observer)); }
  void attachAllocatorTraceTracker(cca::AllocatorTraceTracker tracker) override {
    g_torch->attachAllocatorTraceTracker(std::move(tracker));
  }
  void enablePeerAccess(DeviceIndex from, DeviceIndex to) override { g_torch->enablePeerAccess(from, to); }
  cudaError_t memcpyAsync(void* to, int to_device, const void* from, int from_device, size_t n, cudaStream_t stream, bool p2p) override {
    return g_torch->memcpyAsync(to, to_device, from, from_device, n, stream, p2p);
  }
  std::shared_ptr<cca::AllocatorState> getCheckpointState(DeviceIndex device, MempoolId_t id) override {
    return g_torch->getCheckpointState(device, id);
  }
  cca::CheckpointDelta setCheckpointPoolState(DeviceIndex device, std::shared_ptr<cca::AllocatorState> state) override {
    return g_torch->setCheckpointPoolState(device, std::move(state));
  }
  std::string name() override { return g_torch->name(); }

  // ---- of some releases
  void markCaptureBegin(DeviceIndex device) {
    [](auto* a, auto... x) { if constexpr (requires { a->markCaptureBegin(x...); }) a->markCaptureBegin(x...); }(g_torch, device);
  }
  void markCaptureEnd(DeviceIndex device) {
    [](auto* a, auto... x) { if constexpr (requires { a->markCaptureEnd(x...); }) a->markCaptureEnd(x...); }(g_torch, device);
  }
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* p) {
    return [](auto* a, auto... x) -> std::shared_ptr<c10::GatheredContext> {
      if constexpr (requires { a->getContextForPointer(x...); }) return a->getContextForPointer(x...);
      else return nullptr;
    }(g_torch, p);
  }
  void attachOomRejectionObserver(std::function<void(int64_t, size_t, size_t, size_t)> f) {
    [](auto* a, auto... x) { if constexpr (requires { a->attachOomRejectionObserver(x...); }) a->attachOomRejectionObserver(x...); }(g_torch, f);
  }
  DataPtr allocateWithAddress(size_t n, void* address) {
    return [](auto* a, auto... x) -> DataPtr {
      if constexpr (requires { a->allocateWithAddress(x...); }) return a->allocateWithAddress(x...);
      else return {};
    }(g_torch, n, address);
  }
};
PlannedAllocator& allocator() { static PlannedAllocator* instance = new PlannedAllocator; return *instance; }  // storages refer to it
}  // namespace

extern "C" {
// 0: torch's allocator is another one than its caching allocator.
int lsa_install(decltype(Arena::malloc) malloc, decltype(Arena::free) free, decltype(Arena::record_stream) record_stream,
                const std::atomic<int>* mode,
                void (*stand_on)(decltype(&torch_malloc), decltype(&torch_free), decltype(&torch_record_stream))) {
  cca::CUDAAllocator* found = cca::get();
  if (found == &allocator()) return 1;
  if (found->name() != "native") return 0;
  g_torch = found;
  g_arena = {malloc, free, record_stream, mode};
  stand_on(&torch_malloc, &torch_free, &torch_record_stream);
  cca::allocator.store(&allocator());
  return 1;
}
}
