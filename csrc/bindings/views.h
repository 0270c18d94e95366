// Tensors from Python by DLPack (https://dmlc.github.io/dlpack/latest/): the structs of its stable C ABI, and views
// that borrow a tensor. NumPy arrays and PyTorch tensors of either device speak it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
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

// Where an op's tensors lie, as DLPack counts devices. Emulated, the CUDA ops take tensors of the host.
constexpr int kHost = 1;
#ifdef SDW_EMULATE_CUDA
constexpr int kDevice = kHost;
#else
constexpr int kDevice = 2;
#endif

inline void require(bool condition, const char* message) {
    if (!condition) throw pybind11::value_error(message);
}

// "(256, 17)", as Python writes it.
inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

// A C-contiguous tensor borrowed from Python, of any type; keeps its owner alive. The constructor throws a TypeError or
// ValueError that names the argument when rank, layout or device is not as said.
class AnyView {
  public:
    AnyView(const pybind11::handle& object, const char* name, int ndim, int device) {
        namespace py = pybind11;
        const py::object to_dlpack = py::getattr(object, "__dlpack__", py::none());
        if (to_dlpack.is_none()) {
            throw py::type_error(std::string(name) + " must be a tensor or array, got " +
                                 std::string(py::str(py::type::of(object))));
        }
        // CUDA: the op runs on the stream that the tensor was made on (-1: no synchronization).
        capsule_ = device == 2 ? to_dlpack(py::arg("stream") = -1) : to_dlpack();
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
        if (managed == nullptr) throw py::error_already_set();
        const DLTensor& t = managed->dl_tensor;
        dtype_ = t.dtype;
        if (t.device.device_type != device) {
            throw py::value_error(std::string(name) + " is on the wrong device (DLPack device type " +
                                  std::to_string(t.device.device_type) + ", expected " + std::to_string(device) + ")");
        }
        if (t.ndim != ndim) {
            throw py::value_error(std::string(name) + " must have " + std::to_string(ndim) + " dimensions, got " +
                                  std::to_string(t.ndim));
        }
        shape_.assign(t.shape, t.shape + t.ndim);
        int64_t expected = 1;
        for (int i = t.ndim - 1; i >= 0 && t.strides != nullptr; --i) {
            if (shape_[i] > 1 && t.strides[i] != expected)
                throw py::value_error(std::string(name) + " must be contiguous");
            expected *= shape_[i];
        }
        address_ = static_cast<char*>(t.data) + t.byte_offset;
    }

    int64_t size(int axis) const { return shape_[axis]; }
    const std::vector<int64_t>& shape() const { return shape_; }

  protected:
    // Whether the elements are of type T: float, double, an integer or unsigned integer.
    template <typename T>
    bool holds() const {
        constexpr uint8_t code = std::is_floating_point<T>::value ? 2 : std::is_unsigned<T>::value ? 1 : 0;
        return dtype_.code == code && dtype_.bits == 8 * sizeof(T) && dtype_.lanes == 1;
    }
    void* address() const { return address_; }

  private:
    pybind11::object capsule_;  // unconsumed: its destructor calls the tensor's deleter
    DLDataType dtype_{};
    std::vector<int64_t> shape_;
    void* address_ = nullptr;
};

// The same of elements of type T (float, double, int64_t, int32_t, uint8_t), else a TypeError.
template <typename T>
class TensorView : public AnyView {
  public:
    TensorView(const pybind11::handle& object, const char* name, int ndim, int device = kHost)
        : AnyView(object, name, ndim, device) {
        if (holds<T>()) return;
        const std::string kind = std::is_floating_point<T>::value ? "float"
                                 : std::is_unsigned<T>::value     ? "uint"
                                                                  : "int";
        throw pybind11::type_error(std::string(name) + " must be " + kind + std::to_string(8 * sizeof(T)));
    }
    T* data() const { return static_cast<T*>(address()); }
};

// The same of float or double, as data() says.
class RealView : public AnyView {
  public:
    RealView(const pybind11::handle& object, const char* name, int ndim, int device = kHost)
        : AnyView(object, name, ndim, device) {
        if (!holds<float>() && !holds<double>())
            throw pybind11::type_error(std::string(name) + " must be float32 or float64");
    }
    bool is_double() const { return holds<double>(); }
    const void* data() const { return address(); }
};

// Floats of one shape. None, where it is allowed, has a null pointer.
class Floats {
  public:
    Floats(const pybind11::object& tensor, const char* name, const std::vector<int64_t>& shape, int device,
           bool optional = false) {
        if (optional && tensor.is_none()) return;
        view_.emplace(tensor, name, static_cast<int>(shape.size()), device);
        if (view_->shape() != shape) {
            throw pybind11::value_error(std::string(name) + " must have shape " + shape_text(shape) + ", got " +
                                        shape_text(view_->shape()));
        }
    }
    float* data() const { return view_ ? view_->data() : nullptr; }

  private:
    std::optional<TensorView<float>> view_;
};

// The bytes that a CUDA op works in, which the caller brings.
class Workspace {
  public:
    Workspace(const pybind11::object& tensor, size_t bytes) : view_(tensor, "workspace", 1, kDevice) {
        require(static_cast<size_t>(view_.size(0)) >= bytes, "the workspace is too small");
    }
    void* data() const { return view_.data(); }

  private:
    TensorView<uint8_t> view_;
};

}  // namespace sdw
