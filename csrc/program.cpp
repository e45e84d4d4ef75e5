#include "program.h"

#include <algorithm>
#include <chrono>
#include <new>

#include "arena.h"
#include "code_steps.h"
#include "conv_step.h"
#include "dispatch.h"
#include "pool_steps.h"

namespace lowbit {
namespace {

// A step is worth sharing, with a barrier behind it, from so many multiply-accumulates on.
constexpr int64_t kSharedWork = int64_t{1} << 18;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// The memory of one image.
struct Program::Arena {
  explicit Arena(int64_t bytes) {
    memory.cut(piece(codes, std::max<int64_t>(bytes, 1)));
    std::fill_n(codes, std::max<int64_t>(bytes, 1), int8_t{0});
  }

  Scratch memory;
  int8_t* codes;
  std::atomic<bool> not_finite{false};
};

// Arenas for as long as a run lasts; the program keeps them for the next one.
class Program::Lease {
 public:
  Lease(const Program& program, size_t count) : program_(program) {
    {
      const std::lock_guard<std::mutex> lock(program.mutex_);
      while (arenas_.size() < count && !program.free_.empty()) {
        arenas_.push_back(std::move(program.free_.back()));
        program.free_.pop_back();
      }
    }
    while (arenas_.size() < count) arenas_.push_back(std::make_unique<Arena>(program.arena_bytes_));
  }
  ~Lease() {
    try {
      const std::lock_guard<std::mutex> lock(program_.mutex_);
      for (auto& arena : arenas_) program_.free_.push_back(std::move(arena));
    } catch (const std::bad_alloc&) {  // the next run makes its own
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Arena& operator[](int i) const { return *arenas_[static_cast<size_t>(i)]; }

 private:
  const Program& program_;
  std::vector<std::unique_ptr<Arena>> arenas_;
};

Program::Program(std::vector<CodeValue> values, std::vector<Step> steps)
    : kernel_(lowbit::kernel()), values_(std::move(values)), steps_(std::move(steps)) {
  check_program(values_, steps_);
  plan();
}

Program::~Program() = default;

void Program::plan() {
  arena_bytes_ = plan_arena(values_, steps_, maps_);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    const auto value = [&](int v) { return values_[static_cast<size_t>(v)]; };
    const auto map = [&](int v) { return maps_[static_cast<size_t>(v)]; };
    const bool made = step.to >= 0, added = step.residual >= 0;
    if (step.op == StepOp::quantize)
      inputs_ = std::max(inputs_, step.port + 1);
    else if (!made)
      outputs_ = std::max(outputs_, step.port + 1);
    if (step.op == StepOp::conv) {
      executors_.push_back(make_conv(
          kernel_,
          {step, value(step.from[0]), map(step.from[0]),
           made ? &values_[static_cast<size_t>(step.to)] : nullptr, made ? map(step.to) : CodeMap{},
           added ? &values_[static_cast<size_t>(step.residual)] : nullptr,
           added ? map(step.residual) : CodeMap{}}));
    } else {
      StepPlan p{step, {}, {}, {}, {}};
      for (int v : step.from) p.from.push_back(value(v)), p.from_maps.push_back(map(v));
      if (made) p.to = value(step.to), p.to_map = map(step.to);
      const bool pool = step.op == StepOp::max_pool || step.op == StepOp::avg_pool ||
                        step.op == StepOp::adaptive_avg_pool;
      executors_.push_back(pool ? make_pool(kernel_, p) : make_code_step(kernel_, p));
    }
    const int64_t work = executors_.back()->work();
    shared_.push_back(work >= kSharedWork);
    work_ += work;
  }
}

void Program::run_steps(const Frame& frame, int thread, int team, double* seconds) const {
  if (thread == 0) frame.not_finite->store(false, std::memory_order_relaxed);
  for (size_t s = 0; s < executors_.size(); ++s) {
    const bool shared = team > 1 && shared_[s];
    // Steps in a row that are not shared are the first thread's: nothing waits for them.
    if (team > 1 && (s == 0 || shared || shared_[s - 1])) team_barrier(team);
    if (!shared && thread > 0) continue;
    const double start = seconds ? now() : 0;
    executors_[s]->run(frame, thread, shared ? team : 1);
    if (seconds && thread == 0) seconds[s] += now() - start;
  }
  team_barrier(team);
}

void Program::run(const FloatImages* inputs, const FloatImages* outputs, int64_t batch, int threads,
                  double* seconds) const {
  if (batch == 0) return;
  threads = worthwhile_threads(threads, work_ * batch);
  const Lease arenas(*this, static_cast<size_t>(threads));
  parallel(threads, [&](int thread, int team) {
    const auto frame = [&](int arena, int64_t image) {
      return Frame{arenas[arena].codes, &arenas[arena].not_finite, inputs, outputs, image};
    };
    // Whole images for each thread: its caches keep the codes. What remains they share.
    const int64_t whole = batch / team * team;
    const Range mine = part(whole, thread, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      run_steps(frame(thread, i), 0, 1, thread == 0 ? seconds : nullptr);
    if (whole < batch) team_barrier(team);
    for (int64_t i = whole; i < batch; ++i) run_steps(frame(0, i), thread, team, seconds);
  });
}

}  // namespace lowbit
