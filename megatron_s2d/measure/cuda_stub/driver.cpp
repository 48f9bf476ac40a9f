// The driver: what Triton's launcher and PyTorch's allocator of expandable segments call.
#include "stub.h"

#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <unordered_map>

#undef cuDevicePrimaryCtxRelease
#undef cuDeviceTotalMem

#define ANSWER(name, parameters) EXPORTED CUresult name parameters
#define SUCCEED(name, parameters) \
  EXPORTED CUresult name parameters { return CUDA_SUCCESS; }

using namespace stub;

// -------------------------------------------------------------------------------- devices and contexts

static CUcontext the_context() { return reinterpret_cast<CUcontext>(1); }

SUCCEED(cuInit, (unsigned))
ANSWER(cuDriverGetVersion, (int *version)) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
ANSWER(cuDeviceGet, (CUdevice *device, int ordinal)) { *device = ordinal; return CUDA_SUCCESS; }
ANSWER(cuDeviceGetCount, (int *count)) { *count = device_count(); return CUDA_SUCCESS; }
ANSWER(cuDeviceGetName, (char *name, int size, CUdevice)) {
  snprintf(name, size, "NVIDIA H100 80GB HBM3");
  return CUDA_SUCCESS;
}
ANSWER(cuDeviceGetAttribute, (int *value, CUdevice_attribute attribute, CUdevice device)) {
  cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);  // the numbers are the same
  return CUDA_SUCCESS;
}
ANSWER(cuDeviceTotalMem_v2, (size_t *size, CUdevice)) { *size = device_memory(); return CUDA_SUCCESS; }
ANSWER(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice)) { *context = the_context(); return CUDA_SUCCESS; }
SUCCEED(cuDevicePrimaryCtxRelease_v2, (CUdevice))
ANSWER(cuDevicePrimaryCtxGetState, (CUdevice, unsigned *flags, int *active)) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
ANSWER(cuCtxGetCurrent, (CUcontext *context)) { *context = the_context(); return CUDA_SUCCESS; }
SUCCEED(cuCtxSetCurrent, (CUcontext))
ANSWER(cuStreamGetCtx, (CUstream, CUcontext *context)) { *context = the_context(); return CUDA_SUCCESS; }
ANSWER(cuCtxGetDevice, (CUdevice *device)) { *device = current_device; return CUDA_SUCCESS; }
ANSWER(cuCtxGetLimit, (size_t *value, CUlimit)) { *value = 0; return CUDA_SUCCESS; }
SUCCEED(cuCtxSetLimit, (CUlimit, size_t))
ANSWER(cuGetErrorString, (CUresult, const char **text)) { *text = "an error of the CUDA stub"; return CUDA_SUCCESS; }
ANSWER(cuGetErrorName, (CUresult, const char **text)) { *text = "CUDA_ERROR"; return CUDA_SUCCESS; }
ANSWER(cuPointerGetAttribute, (void *value, CUpointer_attribute, CUdeviceptr pointer)) {
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
// Libraries with a runtime of their own (cuDNN) look up everything by name.
ANSWER(cuGetProcAddress_v2, (const char *name, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *status)) {
  *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (*function == nullptr) *function = dlsym(RTLD_DEFAULT, name);
  if (status != nullptr) *status = *function != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// NVRTC asks for tables of functions without names, which begin with their size in bytes; these have none.
ANSWER(cuGetExportTable, (const void **table, const CUuuid *)) {
  static const size_t size = sizeof(size_t);
  *table = &size;
  return CUDA_SUCCESS;
}

// -------------------------------------------------------------------------------- expandable segments

struct Physical {
  size_t size;
  int device;
};

ANSWER(cuMemGetAllocationGranularity, (size_t *size, const CUmemAllocationProp *, CUmemAllocationGranularity_flags)) {
  *size = 2u << 20;
  return CUDA_SUCCESS;
}
ANSWER(cuMemAddressReserve, (CUdeviceptr *pointer, size_t size, size_t, CUdeviceptr, unsigned long long)) {
  void *reserved = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *pointer = reinterpret_cast<CUdeviceptr>(reserved);
  return CUDA_SUCCESS;
}
ANSWER(cuMemAddressFree, (CUdeviceptr pointer, size_t size)) {
  munmap(reinterpret_cast<void *>(pointer), size);
  return CUDA_SUCCESS;
}
ANSWER(cuMemCreate, (CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *,
                     unsigned long long)) {
  if (!take_memory(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = reinterpret_cast<CUmemGenericAllocationHandle>(new Physical{size, current_device});
  return CUDA_SUCCESS;
}
ANSWER(cuMemRelease, (CUmemGenericAllocationHandle handle)) {
  auto *physical = reinterpret_cast<Physical *>(handle);
  give_memory(physical->size, physical->device);
  delete physical;
  return CUDA_SUCCESS;
}
ANSWER(cuMemMap, (CUdeviceptr pointer, size_t size, size_t, CUmemGenericAllocationHandle, unsigned long long)) {
  enter_block(reinterpret_cast<void *>(pointer), {size, current_device, false});
  return CUDA_SUCCESS;
}
ANSWER(cuMemUnmap, (CUdeviceptr pointer, size_t size)) {
  forget_block(reinterpret_cast<void *>(pointer));
  madvise(reinterpret_cast<void *>(pointer), size, MADV_DONTNEED);
  return CUDA_SUCCESS;
}
SUCCEED(cuMemSetAccess, (CUdeviceptr, size_t, const CUmemAccessDesc *, size_t))
// Of memory that is shared between processes: PyTorch only looks the functions up.
ANSWER(cuMemExportToShareableHandle, (void *, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                                      unsigned long long)) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
ANSWER(cuMemImportFromShareableHandle, (CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType)) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
ANSWER(cuMemRetainAllocationHandle, (CUmemGenericAllocationHandle *, void *)) { return CUDA_ERROR_NOT_SUPPORTED; }
ANSWER(cuMemGetAllocationPropertiesFromHandle, (CUmemAllocationProp *, CUmemGenericAllocationHandle)) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
ANSWER(cuMemsetD32Async, (CUdeviceptr to, unsigned value, size_t count, CUstream)) {
  for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned *>(to)[i] = value;
  return CUDA_SUCCESS;
}
ANSWER(cuStreamWriteValue32_v2, (CUstream, CUdeviceptr, cuuint32_t, unsigned)) { return CUDA_ERROR_NOT_SUPPORTED; }

// -------------------------------------------------------------------------------- modules and kernels

static std::unordered_map<CUfunction, std::string> &function_names() {
  static auto *names = new std::unordered_map<CUfunction, std::string>;
  return *names;
}
static CUresult launch(CUfunction function) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  count_launch(function_names()[function]);
  return CUDA_SUCCESS;
}
ANSWER(cuModuleLoadData, (CUmodule *module, const void *)) { *module = new_handle<CUmodule>(); return CUDA_SUCCESS; }
ANSWER(cuModuleLoadDataEx, (CUmodule *module, const void *, unsigned, CUjit_option *, void **)) {
  *module = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
SUCCEED(cuModuleUnload, (CUmodule))
ANSWER(cuModuleGetFunction, (CUfunction *function, CUmodule, const char *name)) {
  *function = new_handle<CUfunction>();
  std::lock_guard<std::recursive_mutex> guard(mutex);
  function_names()[*function] = name;
  return CUDA_SUCCESS;
}
ANSWER(cuFuncGetAttribute, (int *value, CUfunction_attribute attribute, CUfunction)) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                : 0;
  return CUDA_SUCCESS;
}
SUCCEED(cuFuncSetAttribute, (CUfunction, CUfunction_attribute, int))
SUCCEED(cuFuncSetCacheConfig, (CUfunction, CUfunc_cache))
ANSWER(cuLaunchKernel, (CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream, void **, void **)) {
  return launch(function);
}
ANSWER(cuLaunchKernelEx, (const CUlaunchConfig *, CUfunction function, void **, void **)) { return launch(function); }
ANSWER(cuLaunchCooperativeKernel, (CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                   unsigned, CUstream, void **)) {
  return launch(function);
}
ANSWER(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *blocks, CUfunction, int, size_t)) {
  *blocks = 2;
  return CUDA_SUCCESS;
}
ANSWER(cuOccupancyMaxActiveClusters, (int *clusters, CUfunction, const CUlaunchConfig *)) {
  *clusters = 2;
  return CUDA_SUCCESS;
}
SUCCEED(cuTensorMapEncodeTiled, (CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill))
