// A CUDA runtime without a GPU: device memory is host memory, kernels do nothing, and streams and events are kept as the partial order
// that they make. fake_use says that work issued on a stream uses a range of bytes; where other work on these bytes, of another tensor,
// is not ordered before it by streams and events, that is a race, counted and named. Nothing ever finishes by itself, so what is not
// ordered counts as not ordered.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {
using Stream = void*;
using Clock = std::map<Stream, int64_t>;            // how much of each stream's work comes before
struct Use { int64_t end; Stream stream; int64_t at, tensor; };

std::recursive_mutex g_mutex;
std::map<Stream, Clock> g_streams;                  // of the work issued last
std::map<void*, Clock> g_events;
std::map<char*, size_t> g_blocks;
std::multimap<int64_t, Use> g_uses;                 // by first byte
bool g_ignore_waits = false;
int64_t g_next = 1, g_races = 0, g_refuse = 0, g_live = 0, g_peak = 0, g_mallocs = 0, g_waits = 0, g_records = 0;
std::string g_first;

void merge(Clock& into, const Clock& from) {
  for (const auto& [stream, at] : from)
    if (into[stream] < at) into[stream] = at;
}
int give_block(void** p, size_t n) {
  std::lock_guard<std::recursive_mutex> guard(g_mutex);
  if (g_refuse > 0 && --g_refuse == 0) return 2;    // cudaErrorMemoryAllocation
  *p = aligned_alloc(512, (n + 511) / 512 * 512);
  g_blocks[(char*)*p] = n;
  ++g_mallocs, g_live += (int64_t)n, g_peak = g_live > g_peak ? g_live : g_peak;
  return 0;
}
}  // namespace

#define LOCK std::lock_guard<std::recursive_mutex> guard(g_mutex)
extern "C" {
int cudaMalloc(void** p, size_t n) { return give_block(p, n); }
int cudaDeviceSynchronize() {
  LOCK;
  Clock all;
  for (auto& [stream, clock] : g_streams) merge(all, clock);
  for (auto& [stream, clock] : g_streams) clock = all;
  g_uses.clear();                                   // all of it has finished
  return 0;
}
int cudaFree(void* p) {
  LOCK;
  if (!p) return 0;
  const auto found = g_blocks.find((char*)p);
  if (found == g_blocks.end()) return 1;
  cudaDeviceSynchronize();                          // as the real one does
  g_live -= (int64_t)found->second;
  g_blocks.erase(found);
  free(p);
  return 0;
}
int cudaEventCreateWithFlags(void** e, unsigned) { LOCK; *e = (void*)(0x100 * g_next++); g_events[*e]; return 0; }
int cudaEventCreate(void** e) { return cudaEventCreateWithFlags(e, 0); }
int cudaEventDestroy(void* e) { LOCK; g_events.erase(e); return 0; }
int cudaEventRecord(void* e, Stream s) { LOCK; if (!g_events.count(e)) return 1; ++g_records; g_events[e] = g_streams[s]; return 0; }
int cudaEventRecordWithFlags(void* e, Stream s, unsigned) { return cudaEventRecord(e, s); }
int cudaStreamWaitEvent(Stream s, void* e, unsigned) {
  LOCK;
  if (!g_events.count(e)) return 1;
  ++g_waits;
  if (!g_ignore_waits) merge(g_streams[s], g_events[e]);
  return 0;
}

// ---- for tests
int64_t fake_use(char* p, int64_t n, Stream s, int64_t tensor) {  // 1: a race
  LOCK;
  const int64_t a = (int64_t)p, b = a + n;
  Clock& clock = g_streams[s];
  int64_t race = 0;
  for (auto it = g_uses.begin(); it != g_uses.end() && it->first < b;) {
    const Use& use = it->second;
    if (use.end <= a) { ++it; continue; }
    const bool ordered = use.stream == s || clock[use.stream] >= use.at;
    if (!ordered && use.tensor != tensor) {
      race = 1;
      if (g_first.empty()) g_first = "tensor " + std::to_string(tensor) + " while tensor " + std::to_string(use.tensor) + " is in use";
    }
    if (ordered && it->first >= a && use.end <= b) it = g_uses.erase(it);  // what comes after this use comes after that one
    else ++it;
  }
  g_uses.insert({a, Use{b, s, ++clock[s], tensor}});
  g_races += race;
  return race;
}
void fake_reset() { LOCK; g_ignore_waits = false, g_streams.clear(), g_uses.clear(), g_races = g_waits = g_records = g_refuse = 0, g_peak = g_live, g_first.clear(); }
void fake_ignore_waits() { g_ignore_waits = true; }
void fake_refuse(int64_t nth) { LOCK; g_refuse = nth; }     // the nth cudaMalloc from now finds no memory
int64_t fake_races() { return g_races; }
const char* fake_first_race() { return g_first.c_str(); }
int64_t fake_live_bytes() { return g_live; }
int64_t fake_peak_bytes() { return g_peak; }
int64_t fake_mallocs() { return g_mallocs; }
int64_t fake_waits() { return g_waits; }
int64_t fake_records() { return g_records; }

// ---- what else torch asks for where this library stands in front of the real one
int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
int cudaGetDevice(int* d) { *d = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(char* p, int) {          // the layout of CUDA 12 and 13
  const auto set = [p](int at, int value) { std::memcpy(p + at, &value, sizeof(int)); };
  std::strcpy(p, "Fake GPU");
  *(size_t*)(p + 288) = size_t{8} << 30;            // totalGlobalMem
  set(296, 48 << 10), set(304, 65536), set(308, 32);  // sharedMemPerBlock, regsPerBlock, warpSize
  set(320, 1024), set(324, 1024), set(328, 1024), set(332, 64);  // maxThreadsPerBlock, maxThreadsDim
  set(336, 1 << 30), set(340, 65535), set(344, 65535);  // maxGridSize
  set(360, 9), set(388, 132), set(624, 2048), set(640, 228 << 10), set(712, 32);  // major, multiProcessors, and per multiprocessor
  set(384, 132), set(604, 2048), set(688, 32);  // multiprocessors, threads and blocks of each, where CUDA 13 has them
  return 0;
}
int cudaDeviceGetAttribute(int* value, int, int) { *value = 1; return 0; }
int cudaMemGetInfo(size_t* free, size_t* total) { *total = size_t{8} << 30, *free = *total - (size_t)g_live; return 0; }
int cudaDriverGetVersion(int* v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int* v) { *v = 13000; return 0; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0, *greatest = -1; return 0; }
int cudaStreamCreateWithPriority(Stream* s, unsigned, int) { LOCK; *s = (Stream)(0x100 * g_next++); return 0; }
int cudaStreamQuery(Stream) { return 0; }
int cudaStreamSynchronize(Stream) { return 0; }
int cudaStreamIsCapturing(Stream, int* status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(Stream, int* status, ...) { *status = 0; return 0; }
int cudaStreamGetPriority(Stream, int* p) { *p = 0; return 0; }
int cudaDeviceGetDefaultMemPool(void** pool, int) { *pool = nullptr; return 0; }
int cudaMemPoolSetAttribute(...) { return 0; }
int cudaHostAlloc(void** p, size_t n, unsigned) { *p = aligned_alloc(512, (n + 511) / 512 * 512); return 0; }
int cudaFreeHost(void* p) { free(p); return 0; }
int cudaMemcpy(void* to, const void* from, size_t n, int) { std::memcpy(to, from, n); return 0; }
int cudaMemset(void* p, int value, size_t n) { std::memset(p, value, n); return 0; }
int cudaGetDriverEntryPointByVersion(...) { return 1; }
int cudaThreadExchangeStreamCaptureMode(int*) { return 0; }
int cudaEventQuery(void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t n, int, Stream) { std::memcpy(to, from, n); return 0; }
int cudaMemsetAsync(void* p, int value, size_t n, Stream) { std::memset(p, value, n); return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0, *active = 1; return 0; }  // of the driver, whose soname
int cudaLaunchKernel(...) { return 0; }
int cudaLaunchKernelExC(...) { return 0; }
int cudaFuncGetAttributes(char* p, const void*) {    // maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion after three sizes
  const int values[4] = {1024, 32, 90, 90};
  std::memcpy(p + 24, values, sizeof(values));
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, ...) { *blocks = 1; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cublasCreate_v2(void** handle) { *handle = (void*)1; return 0; }  // and the part of cuBLAS that products need
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
#define DOES_NOTHING(name) int name(...) { return 0; }
DOES_NOTHING(cudaFuncSetAttribute)
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSgemm_v2)
DOES_NOTHING(cublasSgemmEx)
DOES_NOTHING(cublasGemmEx)
DOES_NOTHING(cublasSgemmStridedBatched)
DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasSgemv_v2)
int cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return 0; }
}
