// The CPU's side of editserver::edit and editserver::edit_stream, for the common case: edits that need nothing but the rows of
// their own channels. editserver/engine/native.py builds it and says by layer what is due; kernel_plan.py has the layout of Job.
//
// What it finds here it hands to the compiled kernel, on as many of PyTorch's own threads as have enough to do: tokens know
// nothing of each other, so who edits them changes no bit. Everything else goes back through the dispatcher to Python.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace {

enum Due : int64_t { NOTHING, EDIT, ASK };

struct Job {
  int64_t due;
  int64_t ran;        // set to how many threads took part where the edit was done here
  int64_t rows;       // the tensors must have as many, at least
  int64_t width;      // of a row
  int64_t type;       // at::ScalarType
  int64_t* arguments; // of the kernel; the first two are the addresses of hidden and residual
  int64_t share;      // tokens that are worth a thread
};

// Where things stand among the arguments, and how they change from token to token.
struct Layout {
  int64_t size;       // how many arguments there are
  int64_t n;          // the place of the number of planned tokens
  int64_t tokens;     // of the length of arrays by token
  int64_t scratch;    // of the address of a row's room, which no two threads share
  int64_t delta;      // likewise
  int64_t strides[1]; // [size]: bytes from one token to the next, where the argument is the address of an array by token
};

using Kernel = int64_t (*)(int64_t*);

Job* jobs = nullptr;
int64_t n_jobs = 0;
Kernel kernel = nullptr;
const Layout* layout = nullptr;

// Edits planned tokens first to stop - 1.
void edit_some(const Job& job, int64_t first, int64_t stop) {
  if (stop - first == job.arguments[layout->n]) {
    kernel(job.arguments);
    return;
  }
  thread_local std::vector<int64_t> arguments;
  thread_local std::vector<float> room;
  arguments.assign(job.arguments, job.arguments + layout->size);
  room.resize(2 * job.width);
  for (int64_t i = 0; i < layout->size; ++i) {
    arguments[i] += first * layout->strides[i];
  }
  arguments[layout->n] = stop - first;
  arguments[layout->tokens] -= first;
  arguments[layout->scratch] = reinterpret_cast<int64_t>(room.data());
  arguments[layout->delta] = reinterpret_cast<int64_t>(room.data() + job.width);
  kernel(arguments.data());
}

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
  std::atomic<int64_t> shares{0};
  at::parallel_for(0, job.arguments[layout->n], job.share, [&](int64_t first, int64_t stop) {
    edit_some(job, first, stop);
    ++shares;
  });
  job.ran = std::max<int64_t>(shares, 1);
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
extern "C" void editserver_jobs(int64_t table, int64_t n, int64_t entry, int64_t arguments) {
  layout = reinterpret_cast<const Layout*>(arguments);
  jobs = reinterpret_cast<Job*>(table);
  n_jobs = n;
  kernel = reinterpret_cast<Kernel>(entry);
}

TORCH_LIBRARY_IMPL(editserver, CPU, m) {
  m.impl("edit", &edit);
  m.impl("edit_stream", &edit_stream);
}
