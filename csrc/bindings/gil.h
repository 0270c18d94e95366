// Releases Python's global lock while a kernel runs.
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace sdw {

// As pybind11::gil_scoped_release, for a thread that Python may leave behind: a daemon thread that asks for the lock
// when the interpreter ends is told to exit by an exception, which ends the process where it meets a destructor. Such
// a thread waits for the end of the process here, as it does inside Python itself from 3.14 on.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace sdw
