// Clusters over OS threads, and the C interface to launcher.py.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "additions.h"
#include "cluster.h"

namespace flash_sim {

namespace {

// Stacks, shared memory and shadow memory are kept between launches, of as many clusters as run at
// once on OS threads.
std::mutex g_idle_mutex;
std::vector<std::unique_ptr<Cluster>> g_idle;

std::unique_ptr<Cluster> take_cluster() {
  const std::lock_guard<std::mutex> lock(g_idle_mutex);
  if (g_idle.empty()) {
    return std::make_unique<Cluster>();
  }
  std::unique_ptr<Cluster> cluster = std::move(g_idle.back());
  g_idle.pop_back();
  return cluster;
}

void give_back_cluster(std::unique_ptr<Cluster> cluster, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(g_idle_mutex);
  if (static_cast<i32>(g_idle.size()) < launch.num_workers) {
    g_idle.push_back(std::move(cluster));
  }
}

// The clusters of a launch, and whose turn it is on an OS thread that has none. They start in
// order, so that all before the first failing one have run: its error doesn't depend on timing. One
// whose threads all wait for others is put aside until the memory that they look at has changed.
class Schedule {
 public:
  explicit Schedule(const Launch& launch) : launch_(launch) {}

  // Runs clusters until there is nothing left for this OS thread.
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!failed_) {
      std::unique_ptr<Cluster> cluster = take_parked();
      const bool parked = cluster != nullptr;
      i32 block = parked ? cluster->first_block() : next_;
      if (!parked && may_start()) {
        next_ += launch_.cluster_size;
      } else if (!parked && running_ == 0 && !parked_.empty()) {
        fail(parked_.front()->first_block(), deadlock());
        break;
      } else if (!parked && parked_.empty() && next_ >= launch_.grid) {
        break;
      } else if (!parked) {
        changed_.wait_for(lock, std::chrono::milliseconds(1));
        continue;
      }
      ++running_;
      lock.unlock();
      if (!parked) {
        cluster = take_cluster();
      }
      std::string error;
      const Cluster::State state = run(*cluster, parked, block, error);
      lock.lock();
      --running_;
      waited_for_earlier_ |= cluster->waited_for_earlier_launches();
      if (state == Cluster::State::kFailed) {
        fail(block, std::move(error));
      }
      if (state == Cluster::State::kParked) {
        parked_.push_back(std::move(cluster));
      } else {
        give_back_cluster(std::move(cluster), launch_);
      }
      changed_.notify_all();
    }
  }

  // Once all have worked.
  std::string error() const {
    if (!failed_ && launch_.programmatic != 0 && !waited_for_earlier_) {
      return std::string(launch_.kernel_name) +
             ": no thread of a programmatic launch called griddepcontrol_wait(), so it may end "
             "before the launch that it follows";
    }
    return error_;
  }

 private:
  std::unique_ptr<Cluster> take_parked() {
    const auto found = std::find_if(parked_.begin(), parked_.end(),
                                    [](const auto& cluster) { return cluster->can_resume(); });
    if (found == parked_.end()) {
      return nullptr;
    }
    std::unique_ptr<Cluster> cluster = std::move(*found);
    parked_.erase(found);
    return cluster;
  }

  bool may_start() const {
    const i32 resident = (running_ + static_cast<i32>(parked_.size())) * launch_.cluster_size;
    const bool room = resident == 0 || resident + launch_.cluster_size <= launch_.resident_ctas;
    return next_ < launch_.grid && room;
  }

  Cluster::State run(Cluster& cluster, bool parked, i32 block, std::string& error) const {
    try {
      const Cluster::State state = parked ? cluster.resume() : cluster.run(launch_, block);
      error = cluster.error();
      return state;
    } catch (const std::exception& exception) {
      error = std::string(launch_.kernel_name) + ": " + exception.what();
      return Cluster::State::kFailed;
    }
  }

  void fail(i32 block, std::string&& error) {
    if (!failed_ || block < failed_block_) {
      failed_block_ = block;
      error_ = std::move(error);
    }
    failed_ = true;
  }

  std::string deadlock() const {
    std::string text = std::string(launch_.kernel_name) +
                       ": deadlock: all CTAs that have started wait for each other";
    if (next_ < launch_.grid) {
      text += ", and " + std::to_string(launch_.grid - next_) + " that have not find no room (" +
              std::to_string(launch_.resident_ctas) + " at a time)";
    }
    for (const auto& cluster : parked_) {
      text += "\n CTA " + std::to_string(cluster->first_block()) + "\n" + cluster->waiting_list();
    }
    return text;
  }

  const Launch& launch_;
  std::mutex mutex_;
  std::condition_variable changed_;
  i32 next_ = 0;
  i32 running_ = 0;
  std::deque<std::unique_ptr<Cluster>> parked_;
  bool waited_for_earlier_ = false;
  bool failed_ = false;
  i32 failed_block_ = 0;
  std::string error_;
};

std::string run(Launch launch) {
  Additions additions;
  launch.additions = launch.ordered_adds != 0 ? &additions : nullptr;
  Schedule schedule(launch);
  std::vector<std::thread> helpers;
  for (i32 i = 1; i < std::min(launch.num_workers, launch.grid / launch.cluster_size); ++i) {
    try {
      helpers.emplace_back([&] { schedule.work(); });
    } catch (const std::system_error&) {
      break;  // fewer, then
    }
  }
  schedule.work();
  for (std::thread& helper : helpers) {
    helper.join();
  }
  return schedule.error();
}

}  // namespace

// Runs a grid. Returns the bytes of the error's text, of which as many as fit are in `message`; 0
// means success.
extern "C" __attribute__((visibility("default"))) u64 flash_sim_launch(const Launch* launch,
                                                                       char* message,
                                                                       u64 message_bytes) {
  std::string error;
  try {
    error = run(*launch);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  strncpy(message, error.c_str(), message_bytes - 1);
  message[message_bytes - 1] = '\0';
  return error.size();
}

}  // namespace flash_sim
