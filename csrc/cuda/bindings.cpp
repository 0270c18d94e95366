// The door between Python and the CUDA ops: as csrc/bindings.cpp, with tensors on the device, a workspace that the
// caller allocates and the stream as an integer. One bind_<op> function an op.
#include "bindings.h"

#include "../dlpack.h"

namespace sdw {
namespace {

// Where the tensors lie, as DLPack counts devices; under emulation that is the host.
#ifdef SDW_EMULATE_CUDA
constexpr int kDevice = 1;
#else
constexpr int kDevice = 2;
#endif

}  // namespace

void bind_cuda(pybind11::module_&) { static_cast<void>(kDevice); }

}  // namespace sdw
