// A network, or a segment of one, that stays in codes: its steps prepared once, its memory planned.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "step.h"

namespace lowbit {

// Throws std::invalid_argument, which names the step, where a step does not fit its values.
void check_program(const std::vector<CodeValue>& values, const std::vector<Step>& steps);

class Program {
 public:
  // Weights are read where they are, for as long as the program lives. Throws as check_program, and
  // std::bad_alloc.
  Program(std::vector<CodeValue> values, std::vector<Step> steps);
  ~Program();

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  const std::vector<Step>& steps() const { return steps_; }
  int64_t arena_bytes() const { return arena_bytes_; }  // of one image

  // All inputs and outputs have `batch` images. `seconds`: null, or [steps] to which the time of
  // each is added, of the first thread.
  void run(const FloatImages* inputs, const FloatImages* outputs, int64_t batch, int threads,
           double* seconds = nullptr) const;

 private:
  struct Arena;
  class Lease;

  void plan();
  void run_steps(const Frame& frame, int thread, int team, double* seconds) const;

  const Kernel& kernel_;
  const std::vector<CodeValue> values_;
  const std::vector<Step> steps_;
  std::vector<CodeMap> maps_;  // of the values
  std::vector<std::unique_ptr<Executor>> executors_;
  std::vector<bool> shared_;  // by all threads, where they have one image
  int64_t inputs_ = 0, outputs_ = 0, arena_bytes_ = 0, work_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Arena>> free_;
};

}  // namespace lowbit
