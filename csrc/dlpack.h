// Tensors from Python by DLPack (https://dmlc.github.io/dlpack/latest/): the structs of its stable C ABI, and a view
// that borrows a tensor for the length of one call. NumPy arrays and PyTorch tensors of either device speak it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace sdw {

struct DLDevice {
    int32_t device_type;  // 1 CPU, 2 CUDA, 3 CUDA pinned host
    int32_t device_id;
};

struct DLDataType {
    uint8_t code;  // 0 signed integer, 1 unsigned, 2 floating point
    uint8_t bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: C-contiguous
    uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};

// A C-contiguous tensor of type T (float, int64_t, uint8_t) borrowed from Python; keeps its owner alive. The
// constructor throws a TypeError or ValueError that names the argument when type, rank, layout or device is not as
// said.
template <typename T>
class TensorView {
  public:
    TensorView(const pybind11::handle& object, const char* name, int ndim, int device_type = 1) {
        namespace py = pybind11;
        if (!py::hasattr(object, "__dlpack__")) {
            throw py::type_error(std::string(name) + " must be a tensor or array, got " +
                                 std::string(py::str(py::type::of(object))));
        }
        // CUDA: the op runs on the stream that the tensor was made on (-1: no synchronization).
        const py::object to_dlpack = object.attr("__dlpack__");
        capsule_ = device_type == 2 ? to_dlpack(py::arg("stream") = -1) : to_dlpack();
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
        if (managed == nullptr) throw py::error_already_set();
        const DLTensor& t = managed->dl_tensor;
        constexpr uint8_t code = std::is_floating_point<T>::value ? 2 : std::is_unsigned<T>::value ? 1 : 0;
        if (t.dtype.code != code || t.dtype.bits != 8 * sizeof(T) || t.dtype.lanes != 1) {
            throw py::type_error(std::string(name) + " must be " +
                                 (code == 2   ? "float"
                                  : code == 1 ? "uint"
                                              : "int") +
                                 std::to_string(8 * sizeof(T)));
        }
        if (t.device.device_type != device_type) {
            throw py::value_error(std::string(name) + " is on the wrong device (DLPack device type " +
                                  std::to_string(t.device.device_type) + ", expected " + std::to_string(device_type) +
                                  ")");
        }
        if (t.ndim != ndim) {
            throw py::value_error(std::string(name) + " must have " + std::to_string(ndim) + " dimensions, got " +
                                  std::to_string(t.ndim));
        }
        device_id_ = t.device.device_id;
        shape_.assign(t.shape, t.shape + t.ndim);
        int64_t expected = 1;
        for (int i = t.ndim - 1; i >= 0 && t.strides != nullptr; --i) {
            if (shape_[i] > 1 && t.strides[i] != expected)
                throw py::value_error(std::string(name) + " must be contiguous");
            expected *= shape_[i];
        }
        data_ = reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
    }

    T* data() const { return data_; }
    int64_t size(int axis) const { return shape_[axis]; }
    int device_id() const { return device_id_; }

  private:
    pybind11::object capsule_;  // unconsumed: its destructor calls the tensor's deleter
    std::vector<int64_t> shape_;
    T* data_ = nullptr;
    int device_id_ = 0;
};

}  // namespace sdw
