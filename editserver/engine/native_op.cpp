// The CPU's side of editserver::edit and editserver::edit_stream, for the common case: edits that need nothing but the rows of
// their own channels. editserver/engine/native.py builds it and says by layer what is due; kernel_plan.py has the layout of Job.
//
// What it finds here it hands to the compiled kernel; everything else goes back through the dispatcher to Python.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

enum Due : int64_t { NOTHING, EDIT, ASK };

struct Job {
  int64_t due;
  int64_t ran;        // set to 1 where the edit was done here
  int64_t rows;       // the tensors must have as many, at least
  int64_t width;      // of a row
  int64_t type;       // at::ScalarType
  int64_t* arguments; // of the kernel; the first two are the addresses of hidden and residual
};

using Kernel = int64_t (*)(int64_t*);

Job* jobs = nullptr;
int64_t n_jobs = 0;
Kernel kernel = nullptr;

bool fits(const at::Tensor& stream, const Job& job) {
  return stream.scalar_type() == static_cast<at::ScalarType>(job.type) && stream.dim() >= 2 &&
      stream.size(-1) == job.width && stream.numel() >= job.rows * job.width && stream.is_contiguous();
}

// Whether nothing is left to do at this layer.
bool done(const at::Tensor& hidden, const at::Tensor* residual, int64_t layer) {
  if (jobs == nullptr || layer < 0 || layer >= n_jobs) {
    return false;
  }
  Job& job = jobs[layer];
  if (job.due == NOTHING) {
    return true;
  }
  if (job.due != EDIT || !fits(hidden, job) ||
      (residual != nullptr && (!fits(*residual, job) || residual->numel() != hidden.numel()))) {
    return false;
  }
  job.arguments[0] = reinterpret_cast<int64_t>(hidden.mutable_data_ptr());
  job.arguments[1] = residual == nullptr ? 0 : reinterpret_cast<int64_t>(residual->mutable_data_ptr());
  kernel(job.arguments);
  job.ran = 1;
  return true;
}

void edit(const at::Tensor& hidden, const at::Tensor& residual, int64_t layer) {
  if (!done(hidden, &residual, layer)) {
    static const auto python = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("editserver::edit_in_python", "")
                                   .typed<void(const at::Tensor&, const at::Tensor&, int64_t)>();
    python.call(hidden, residual, layer);
  }
}

void edit_stream(const at::Tensor& hidden, int64_t layer) {
  if (!done(hidden, nullptr, layer)) {
    static const auto python = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("editserver::edit_stream_in_python", "")
                                   .typed<void(const at::Tensor&, int64_t)>();
    python.call(hidden, layer);
  }
}

} // namespace

// No tensor is touched by what is due before this is called. n = 0: everything goes to Python.
extern "C" void editserver_jobs(int64_t table, int64_t n, int64_t entry) {
  jobs = reinterpret_cast<Job*>(table);
  n_jobs = n;
  kernel = reinterpret_cast<Kernel>(entry);
}

TORCH_LIBRARY_IMPL(editserver, CPU, m) {
  m.impl("edit", &edit);
  m.impl("edit_stream", &edit_stream);
}
