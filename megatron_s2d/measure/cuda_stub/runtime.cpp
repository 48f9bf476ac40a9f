// The CUDA runtime: devices, memory, streams, events, graphs and kernels.
#include "stub.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

#undef cudaGetDeviceProperties

#define ANSWER(name, parameters) EXPORTED cudaError_t name parameters
#define SUCCEED(name, parameters) \
  EXPORTED cudaError_t name parameters { return cudaSuccess; }

using namespace stub;

// -------------------------------------------------------------------------------- devices

ANSWER(cudaGetDeviceCount, (int *count)) { *count = device_count(); return cudaSuccess; }
ANSWER(cudaGetDevice, (int *device)) { *device = current_device; return cudaSuccess; }
ANSWER(cudaSetDevice, (int device)) {
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
ANSWER(cudaDriverGetVersion, (int *version)) { *version = CUDART_VERSION; return cudaSuccess; }
ANSWER(cudaRuntimeGetVersion, (int *version)) { *version = CUDART_VERSION; return cudaSuccess; }
ANSWER(cudaGetDeviceProperties, (cudaDeviceProp *answer, int device)) {
  memset(answer, 0, sizeof *answer);
  strcpy(answer->name, "NVIDIA H100 80GB HBM3");
  answer->totalGlobalMem = device_memory();
  answer->major = kComputeCapability[0], answer->minor = kComputeCapability[1];
  answer->multiProcessorCount = kMultiprocessors;
  answer->warpSize = 32, answer->textureAlignment = 512, answer->totalConstMem = 65536;
  answer->sharedMemPerBlock = 49152, answer->sharedMemPerBlockOptin = 232448;
  answer->sharedMemPerMultiprocessor = 233472, answer->reservedSharedMemPerBlock = 1024;
  answer->regsPerBlock = answer->regsPerMultiprocessor = 65536;
  answer->maxThreadsPerBlock = 1024, answer->maxThreadsPerMultiProcessor = 2048;
  answer->maxBlocksPerMultiProcessor = 32;
  answer->maxThreadsDim[0] = answer->maxThreadsDim[1] = 1024, answer->maxThreadsDim[2] = 64;
  answer->maxGridSize[0] = 2147483647, answer->maxGridSize[1] = answer->maxGridSize[2] = 65535;
  answer->memoryBusWidth = 5120, answer->l2CacheSize = 50 << 20, answer->asyncEngineCount = 3;
  answer->unifiedAddressing = answer->canMapHostMemory = answer->concurrentKernels = 1;
  answer->managedMemory = answer->cooperativeLaunch = 1;
  for (int i = 0; i < 16; ++i) answer->uuid.bytes[i] = static_cast<char>(i + device);
  return cudaSuccess;
}
ANSWER(cudaDeviceGetAttribute, (int *value, cudaDeviceAttr attribute, int)) {
  static const std::map<int, int> answers = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMultiProcessorCount, kMultiprocessors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrComputeCapabilityMajor, kComputeCapability[0]},
      {cudaDevAttrComputeCapabilityMinor, kComputeCapability[1]},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrL2CacheSize, 50 << 20},
  };
  auto found = answers.find(attribute);
  *value = found == answers.end() ? 0 : found->second;
  return cudaSuccess;
}
ANSWER(cudaDeviceGetPCIBusId, (char *id, int size, int device)) {
  snprintf(id, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
ANSWER(cudaDeviceCanAccessPeer, (int *can, int, int)) { *can = 1; return cudaSuccess; }
SUCCEED(cudaDeviceEnablePeerAccess, (int, unsigned))
ANSWER(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest)) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
ANSWER(cudaDeviceSynchronize, ()) { count_wait("cudaDeviceSynchronize"); return cudaSuccess; }
SUCCEED(cudaGetLastError, ())
SUCCEED(cudaPeekAtLastError, ())
EXPORTED const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
EXPORTED const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "an error of the CUDA stub";
  }
}
SUCCEED(cudaProfilerStart, ())
SUCCEED(cudaProfilerStop, ())

// Entry points of the driver, which PyTorch asks for by name: those that driver.cpp answers.
// PyTorch does without these: parts of a device, and memory that several devices share.
static bool is_optional(const std::string &name) {
  for (const char *prefix : {"cuGreenCtx", "cuCtxFromGreenCtx", "cuCtxPopCurrent", "cuCtxPushCurrent", "cuDevSmResource",
                             "cuDeviceGetDevResource", "cuDevResource", "cuMulticast"})
    if (name.rfind(prefix, 0) == 0) return true;
  return false;
}
ANSWER(cudaGetDriverEntryPointByVersion, (const char *name, void **function, unsigned, unsigned long long,
                                          cudaDriverEntryPointQueryResult *status)) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (*function == nullptr && is_optional(name)) {
    if (status != nullptr) *status = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
  }
  if (*function == nullptr) unanswered(name);
  if (status != nullptr) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// -------------------------------------------------------------------------------- memory

ANSWER(cudaMalloc, (void **pointer, size_t size)) {
  *pointer = allocate(size, false);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
ANSWER(cudaFree, (void *pointer)) { release(pointer); return cudaSuccess; }
ANSWER(cudaMallocAsync, (void **pointer, size_t size, cudaStream_t)) { return cudaMalloc(pointer, size); }
ANSWER(cudaFreeAsync, (void *pointer, cudaStream_t)) { return cudaFree(pointer); }
ANSWER(cudaHostAlloc, (void **pointer, size_t size, unsigned)) {
  *pointer = allocate(size, true);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
ANSWER(cudaMallocHost, (void **pointer, size_t size)) { return cudaHostAlloc(pointer, size, 0); }
ANSWER(cudaFreeHost, (void *pointer)) { release(pointer); return cudaSuccess; }
ANSWER(cudaHostRegister, (void *pointer, size_t size, unsigned)) {
  enter_block(pointer, {size, current_device, true});
  return cudaSuccess;
}
ANSWER(cudaHostUnregister, (void *pointer)) { forget_block(pointer); return cudaSuccess; }
ANSWER(cudaHostGetDevicePointer, (void **device, void *host, unsigned)) { *device = host; return cudaSuccess; }
ANSWER(cudaMemGetInfo, (size_t *free, size_t *total)) {
  *total = device_memory(), *free = device_memory() - used_memory(current_device);
  return cudaSuccess;
}
ANSWER(cudaPointerGetAttributes, (cudaPointerAttributes *answer, const void *pointer)) {
  memset(answer, 0, sizeof *answer);
  Block block;
  answer->type = cudaMemoryTypeUnregistered;
  if (find_block(pointer, &block)) {
    answer->type = block.pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    answer->device = block.device;
    answer->devicePointer = const_cast<void *>(pointer);
    answer->hostPointer = block.pinned ? const_cast<void *>(pointer) : nullptr;
  }
  return cudaSuccess;
}
ANSWER(cudaMemcpy, (void *to, const void *from, size_t size, cudaMemcpyKind)) {
  count_copy(to, from, size, false);
  count_wait("cudaMemcpy");
  copy_values(to, from, size);
  return cudaSuccess;
}
ANSWER(cudaMemcpyAsync, (void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t)) {
  count_copy(to, from, size, true);
  copy_values(to, from, size);
  return cudaSuccess;
}
ANSWER(cudaMemcpyPeerAsync, (void *to, int, const void *from, int, size_t size, cudaStream_t)) {
  copy_values(to, from, size);
  return cudaSuccess;
}
ANSWER(cudaMemcpy2DAsync, (void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                           cudaMemcpyKind, cudaStream_t)) {
  count_copy(to, from, width * height, true);
  for (size_t row = 0; row < height; ++row)
    copy_values(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width);
  return cudaSuccess;
}
SUCCEED(cudaMemcpyToSymbol, (const void *, const void *, size_t, size_t, cudaMemcpyKind))
SUCCEED(cudaMemcpyToSymbolAsync, (const void *, const void *, size_t, size_t, cudaMemcpyKind, cudaStream_t))
ANSWER(cudaGetSymbolAddress, (void **pointer, const void *symbol)) {
  *pointer = const_cast<void *>(symbol);
  return cudaSuccess;
}
ANSWER(cudaMemset, (void *to, int value, size_t size)) { set_values(to, value, size); return cudaSuccess; }
ANSWER(cudaMemsetAsync, (void *to, int value, size_t size, cudaStream_t)) {
  count_launch("cudaMemsetAsync");
  set_values(to, value, size);
  return cudaSuccess;
}
ANSWER(cudaDeviceGetDefaultMemPool, (cudaMemPool_t *pool, int)) {
  *pool = new_handle<cudaMemPool_t>();
  return cudaSuccess;
}
ANSWER(cudaMemPoolGetAttribute, (cudaMemPool_t, cudaMemPoolAttr, void *value)) {
  *static_cast<uint64_t *>(value) = 0;
  return cudaSuccess;
}
SUCCEED(cudaMemPoolSetAttribute, (cudaMemPool_t, cudaMemPoolAttr, void *))
SUCCEED(cudaMemPoolSetAccess, (cudaMemPool_t, const cudaMemAccessDesc *, size_t))
SUCCEED(cudaMemPoolTrimTo, (cudaMemPool_t, size_t))
// A handle holds the pointer: the receiver is this process.
ANSWER(cudaIpcGetMemHandle, (cudaIpcMemHandle_t *handle, void *pointer)) {
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &pointer, sizeof pointer);
  return cudaSuccess;
}
ANSWER(cudaIpcOpenMemHandle, (void **pointer, cudaIpcMemHandle_t handle, unsigned)) {
  memcpy(pointer, &handle, sizeof *pointer);
  return cudaSuccess;
}
SUCCEED(cudaIpcCloseMemHandle, (void *))
ANSWER(cudaIpcGetEventHandle, (cudaIpcEventHandle_t *handle, cudaEvent_t)) {
  memset(handle, 0, sizeof *handle);
  return cudaSuccess;
}
ANSWER(cudaIpcOpenEventHandle, (cudaEvent_t *event, cudaIpcEventHandle_t)) {
  *event = new_handle<cudaEvent_t>();
  return cudaSuccess;
}

// -------------------------------------------------------------------------------- streams and events

static thread_local cudaStream_t capturing_stream = nullptr;
static thread_local bool capturing = false;
bool stub::is_capturing() { return capturing; }

// A wait cannot be recorded: the driver refuses it, and so does the stub.
static cudaError_t wait(const char *call) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  count_wait(call);
  return cudaSuccess;
}

ANSWER(cudaStreamCreate, (cudaStream_t *stream)) { *stream = new_handle<cudaStream_t>(); return cudaSuccess; }
ANSWER(cudaStreamCreateWithFlags, (cudaStream_t *stream, unsigned)) { return cudaStreamCreate(stream); }
ANSWER(cudaStreamCreateWithPriority, (cudaStream_t *stream, unsigned, int)) { return cudaStreamCreate(stream); }
SUCCEED(cudaStreamDestroy, (cudaStream_t))
ANSWER(cudaStreamGetPriority, (cudaStream_t, int *priority)) { *priority = 0; return cudaSuccess; }
SUCCEED(cudaStreamQuery, (cudaStream_t))
ANSWER(cudaStreamSynchronize, (cudaStream_t)) { return wait("cudaStreamSynchronize"); }
ANSWER(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned)) {
  wait_for_event(stream, event);
  return cudaSuccess;
}
ANSWER(cudaStreamAddCallback, (cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned)) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
ANSWER(cudaLaunchHostFunc, (cudaStream_t, cudaHostFn_t function, void *data)) { function(data); return cudaSuccess; }
ANSWER(cudaEventCreate, (cudaEvent_t *event)) { *event = new_handle<cudaEvent_t>(); return cudaSuccess; }
ANSWER(cudaEventCreateWithFlags, (cudaEvent_t *event, unsigned)) {
  *event = new_handle<cudaEvent_t>();
  return cudaSuccess;
}
SUCCEED(cudaEventDestroy, (cudaEvent_t))
SUCCEED(cudaEventQuery, (cudaEvent_t))
ANSWER(cudaEventRecord, (cudaEvent_t event, cudaStream_t stream)) {
  record_event(event, stream);
  return cudaSuccess;
}
ANSWER(cudaEventRecordWithFlags, (cudaEvent_t event, cudaStream_t stream, unsigned)) {
  record_event(event, stream);
  return cudaSuccess;
}
ANSWER(cudaEventSynchronize, (cudaEvent_t)) { return wait("cudaEventSynchronize"); }
ANSWER(cudaEventElapsedTime, (float *milliseconds, cudaEvent_t, cudaEvent_t)) {
  *milliseconds = 1;
  return cudaSuccess;
}

// -------------------------------------------------------------------------------- graphs: recorded, launched, not run

ANSWER(cudaStreamBeginCapture, (cudaStream_t stream, cudaStreamCaptureMode)) {
  capturing = true, capturing_stream = stream;
  return cudaSuccess;
}
ANSWER(cudaStreamEndCapture, (cudaStream_t, cudaGraph_t *graph)) {
  capturing = false, capturing_stream = nullptr;
  *graph = new_handle<cudaGraph_t>();
  return cudaSuccess;
}
ANSWER(cudaStreamIsCapturing, (cudaStream_t stream, cudaStreamCaptureStatus *status)) {
  *status = capturing && stream == capturing_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                              unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                              const cudaGraphEdgeData **edges, size_t *count) {
  if (id != nullptr) *id = 1;
  if (graph != nullptr) *graph = nullptr;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
SUCCEED(cudaThreadExchangeStreamCaptureMode, (cudaStreamCaptureMode *))
ANSWER(cudaGraphInstantiate, (cudaGraphExec_t *executable, cudaGraph_t, unsigned long long)) {
  *executable = new_handle<cudaGraphExec_t>();
  return cudaSuccess;
}
ANSWER(cudaGraphInstantiateWithFlags, (cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)) {
  return cudaGraphInstantiate(executable, graph, flags);
}
ANSWER(cudaGraphGetNodes, (cudaGraph_t, cudaGraphNode_t *, size_t *count)) { *count = 1; return cudaSuccess; }
ANSWER(cudaGraphLaunch, (cudaGraphExec_t, cudaStream_t)) { count_launch("cudaGraphLaunch"); return cudaSuccess; }
SUCCEED(cudaGraphUpload, (cudaGraphExec_t, cudaStream_t))
SUCCEED(cudaGraphDestroy, (cudaGraph_t))
SUCCEED(cudaGraphExecDestroy, (cudaGraphExec_t))

// -------------------------------------------------------------------------------- kernels: counted, not run

static std::unordered_map<const void *, std::string> &kernel_names() {
  static auto *names = new std::unordered_map<const void *, std::string>;
  return *names;
}
static cudaError_t launch(const void *function) {
  std::string name = "kernel without a name";
  {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    auto found = kernel_names().find(function);
    if (found != kernel_names().end()) name = found->second;
  }
  count_launch(name);
  return cudaSuccess;
}
EXPORTED void **__cudaRegisterFatBinary(void *) { static void *handle[4]; return handle; }
EXPORTED void __cudaRegisterFatBinaryEnd(void **) {}
EXPORTED void __cudaUnregisterFatBinary(void **) {}
EXPORTED void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                                     void *, int *) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  kernel_names()[host] = name;
}
EXPORTED void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
EXPORTED void __cudaRegisterManagedVar(void **, void **, char *, const char *, int, size_t, int, int) {}
EXPORTED char __cudaInitModule(void **) { return 0; }

static thread_local struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configuration;
EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<cudaStream_t *>(stream) = configuration.stream;
  return cudaSuccess;
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
  kernel_stream = stream;
  return launch(kernel);
}
EXPORTED cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
  kernel_stream = stream;
  return launch(kernel);
}
ANSWER(cudaLaunchKernel, (const void *function, dim3, dim3, void **, size_t, cudaStream_t stream)) {
  kernel_stream = stream;
  return launch(function);
}
ANSWER(cudaLaunchKernelExC, (const cudaLaunchConfig_t *, const void *function, void **)) { return launch(function); }
ANSWER(cudaLaunchCooperativeKernel, (const void *function, dim3, dim3, void **, size_t, cudaStream_t)) {
  return launch(function);
}
ANSWER(cudaFuncGetAttributes, (cudaFuncAttributes *answer, const void *)) {
  memset(answer, 0, sizeof *answer);
  answer->maxThreadsPerBlock = 1024, answer->numRegs = 32;
  answer->ptxVersion = answer->binaryVersion = 10 * kComputeCapability[0] + kComputeCapability[1];
  answer->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
SUCCEED(cudaFuncSetAttribute, (const void *, cudaFuncAttribute, int))
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessor, (int *blocks, const void *, int, size_t)) {
  *blocks = 2;
  return cudaSuccess;
}
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, (int *blocks, const void *, int, size_t, unsigned)) {
  *blocks = 2;
  return cudaSuccess;
}
ANSWER(cudaOccupancyMaxActiveClusters, (int *clusters, const void *, const cudaLaunchConfig_t *)) {
  *clusters = kMultiprocessors / 2;
  return cudaSuccess;
}
