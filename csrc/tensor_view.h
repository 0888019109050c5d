// The only file that knows DLPack, the exchange format in which tensors reach the kernels (bf16, strides and CUDA
// included). The structs restate its stable C ABI (github.com/dmlc/dlpack, version 0.8, unversioned form).
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace mudsc {

namespace dlpack {
enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};

// The newer form of the same (DLPack 1.0).
struct VersionedTensor {
    uint32_t major, minor;
    void* manager;
    void (*deleter)(VersionedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// What a type's __dlpack_c_exchange_api__ points at (DLPack 1.3; newer versions of torch have one): tensors made of
// memory and described in place, without a capsule. Only what is used here has its type.
struct ExchangeApi {
    uint32_t major, minor;
    void* previous;
    void *allocate, *managed_from_object;
    int (*make)(VersionedTensor* memory, void** object);  // takes the memory over; 0, or a Python error is set
    int (*describe)(void* object, Tensor* out);  // not owning: the object has to live on; 0, or a Python error is set
    void* current_stream;
};
}  // namespace dlpack

// A typed, strided view; it does not own the memory.
struct TensorView {
    void* data = nullptr;
    Dtype dtype = Dtype::other;
    int element_bytes = 0;
    bool cuda = false;
    int device = 0;
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};  // in elements

    explicit TensorView(const dlpack::Tensor& t, const char* name) {
        if (t.ndim > kMaxDims) {
            throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(kMaxDims) +
                                        " dimensions, got " + std::to_string(t.ndim));
        }
        if (t.lanes != 1) throw std::invalid_argument(std::string(name) + ": vector element types are not supported");
        cuda = t.device_type == dlpack::kCuda || t.device_type == dlpack::kCudaManaged;
        if (!cuda && t.device_type != dlpack::kCpu && t.device_type != dlpack::kCudaHost) {
            throw std::invalid_argument(std::string(name) + ": expected a CPU or CUDA tensor");
        }
        data = static_cast<char*>(t.data) + t.byte_offset;
        dtype = dtype_of(t.code, t.bits);
        element_bytes = t.bits / 8;
        device = t.device_id;
        ndim = t.ndim;
        int64_t contiguous = 1;
        for (int d = ndim - 1; d >= 0; --d) {
            shape[d] = t.shape[d];
            strides[d] = t.strides != nullptr ? t.strides[d] : contiguous;
            contiguous *= t.shape[d];
        }
        if (t.data == nullptr && contiguous != 0) {  // inside functionalize, or of a tensor that is only described
            throw std::invalid_argument(std::string(name) +
                                        ": has no memory of its own, as inside torch.func transforms; call it outside");
        }
    }

    int64_t numel() const {
        int64_t n = 1;
        for (int d = 0; d < ndim; ++d) n *= shape[d];
        return n;
    }

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }

  private:
    static Dtype dtype_of(uint8_t code, uint8_t bits) {
        using namespace dlpack;
        switch (code) {
            case kFloat:
                return bits == 64 ? Dtype::f64 : bits == 32 ? Dtype::f32 : bits == 16 ? Dtype::f16 : Dtype::other;
            case kBfloat: return bits == 16 ? Dtype::bf16 : Dtype::other;
            case kInt:
                return bits == 64   ? Dtype::i64
                       : bits == 32 ? Dtype::i32
                       : bits == 16 ? Dtype::i16
                       : bits == 8  ? Dtype::i8
                                    : Dtype::other;
            case kUInt: return bits == 8 ? Dtype::u8 : Dtype::other;
            case kBool: return Dtype::boolean;
            default: return Dtype::other;
        }
    }
};

}  // namespace mudsc
