// NCCL: a communicator has its sizes only, a collective is counted, and other ranks send what this one would.
#include "stub.h"

#include <nccl.h>

#include <cstring>

#define ANSWER(name, parameters) EXPORTED ncclResult_t name parameters
#define SUCCEED(name, parameters) \
  EXPORTED ncclResult_t name parameters { return ncclSuccess; }

struct ncclComm {
  int size, rank;
};

using namespace stub;

static size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}
static const char *name_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: return "i8";
    case ncclUint8: return "u8";
    case ncclInt32: return "i32";
    case ncclUint32: return "u32";
    case ncclInt64: return "i64";
    case ncclUint64: return "u64";
    case ncclFloat16: return "f16";
    case ncclFloat32: return "f32";
    case ncclFloat64: return "f64";
    case ncclBfloat16: return "bf16";
    case ncclFloat8e4m3: return "e4m3";
    case ncclFloat8e5m2: return "e5m2";
    default: return "other";
  }
}

// Integers of any size: pickled objects are sent as bytes. Floats have no values.
static void deliver(void *to, const void *from, size_t count, ncclDataType_t type) {
  bool integers = type == ncclInt8 || type == ncclUint8 || type == ncclInt32 || type == ncclUint32 ||
                  type == ncclInt64 || type == ncclUint64;
  if (integers && to != from) memmove(to, from, count * size_of(type));
}

// NCCL dereferences its buffers on the device: a pageable host pointer is an error there.
static ncclResult_t collective(const char *kind, const void *buffer, size_t count, size_t copies, ncclDataType_t type,
                               ncclComm_t comm, cudaStream_t stream) {
  Block block;
  if (count != 0 && !find_block(buffer, &block)) return ncclInvalidArgument;
  count_launch(std::string("nccl") + kind);
  count_collective(kind, comm->size, name_of(type), count * copies * size_of(type), stream);
  return ncclSuccess;
}

// -------------------------------------------------------------------------------- communicators

ANSWER(ncclGetVersion, (int *version)) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ANSWER(ncclGetUniqueId, (ncclUniqueId *id)) { memset(id, 1, sizeof *id); return ncclSuccess; }
ANSWER(ncclCommInitRank, (ncclComm_t *comm, int size, ncclUniqueId, int rank)) {
  *comm = new ncclComm{size, rank};
  return ncclSuccess;
}
ANSWER(ncclCommInitRankConfig, (ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *)) {
  return ncclCommInitRank(comm, size, id, rank);
}
ANSWER(ncclCommInitRankScalable,
       (ncclComm_t *comm, int size, int rank, int, ncclUniqueId *ids, ncclConfig_t *)) {
  return ncclCommInitRank(comm, size, *ids, rank);
}
ANSWER(ncclCommDestroy, (ncclComm_t comm)) { delete comm; return ncclSuccess; }
ANSWER(ncclCommAbort, (ncclComm_t comm)) { delete comm; return ncclSuccess; }
SUCCEED(ncclCommFinalize, (ncclComm_t))
ANSWER(ncclCommGetAsyncError, (ncclComm_t, ncclResult_t *error)) { *error = ncclSuccess; return ncclSuccess; }
ANSWER(ncclCommCount, (const ncclComm_t comm, int *count)) { *count = comm->size; return ncclSuccess; }
ANSWER(ncclCommUserRank, (const ncclComm_t comm, int *rank)) { *rank = comm->rank; return ncclSuccess; }
ANSWER(ncclCommCuDevice, (const ncclComm_t, int *device)) { *device = current_device; return ncclSuccess; }
SUCCEED(ncclCommRegister, (const ncclComm_t, void *, size_t, void **))
SUCCEED(ncclCommDeregister, (const ncclComm_t, void *))
EXPORTED const char *ncclGetErrorString(ncclResult_t) { return "a buffer in host memory was given to NCCL"; }
EXPORTED const char *ncclGetLastError(ncclComm_t) { return ""; }
SUCCEED(ncclGroupStart, ())
SUCCEED(ncclGroupEnd, ())

// -------------------------------------------------------------------------------- collectives; bytes of the larger side

ANSWER(ncclAllReduce, (const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm,
                       cudaStream_t stream)) {
  deliver(to, from, count, type);
  return collective("AllReduce", from, count, 1, type, comm, stream);
}
ANSWER(ncclReduce, (const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t, int, ncclComm_t comm,
                    cudaStream_t stream)) {
  deliver(to, from, count, type);
  return collective("Reduce", from, count, 1, type, comm, stream);
}
ANSWER(ncclBroadcast, (const void *from, void *to, size_t count, ncclDataType_t type, int, ncclComm_t comm,
                       cudaStream_t stream)) {
  deliver(to, from, count, type);
  return collective("Broadcast", to, count, 1, type, comm, stream);
}
ANSWER(ncclBcast, (void *buffer, size_t count, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t stream)) {
  return collective("Broadcast", buffer, count, 1, type, comm, stream);
}
ANSWER(ncclAllGather, (const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream)) {
  size_t size = count * size_of(type);
  for (int rank = 0; rank < comm->size; ++rank) deliver(static_cast<char *>(to) + rank * size, from, count, type);
  return collective("AllGather", from, count, comm->size, type, comm, stream);
}
ANSWER(ncclReduceScatter, (const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm,
                           cudaStream_t stream)) {
  size_t size = count * size_of(type);
  deliver(to, static_cast<const char *>(from) + comm->rank * size, count, type);
  return collective("ReduceScatter", from, count, comm->size, type, comm, stream);
}
ANSWER(ncclAlltoAll, (const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream)) {
  deliver(to, from, count * comm->size, type);
  return collective("AllToAll", from, count, comm->size, type, comm, stream);
}
ANSWER(ncclSend, (const void *from, size_t count, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t stream)) {
  return collective("Send", from, count, 1, type, comm, stream);
}
ANSWER(ncclRecv, (void *to, size_t count, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t stream)) {
  return collective("Recv", to, count, 1, type, comm, stream);
}
