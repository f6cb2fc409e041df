// Clusters over OS threads, and the C interface to launcher.py.
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "cluster.h"

namespace flash_sim {

namespace {

// Stacks, shared memory and shadow memory are kept between launches.
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

void give_back_cluster(std::unique_ptr<Cluster> cluster) {
  const std::lock_guard<std::mutex> lock(g_idle_mutex);
  g_idle.push_back(std::move(cluster));
}

// Clusters start in order, so that all before the first failing one have run: its error doesn't
// depend on timing.
struct Progress {
  std::atomic<i32> next{0};
  std::atomic<bool> failed{false};
  std::atomic<bool> waited_for_earlier{false};
  std::mutex mutex;
  i32 failed_block = 0;
  std::string error;
};

void work(const Launch& launch, Progress& progress) {
  std::unique_ptr<Cluster> cluster = take_cluster();
  const auto run_one = [&](i32 block) {
    try {
      return cluster->run(launch, block) ? std::string() : cluster->error();
    } catch (const std::exception& exception) {
      return std::string(launch.kernel_name) + ": " + exception.what();
    }
  };
  while (!progress.failed) {
    const i32 block = progress.next.fetch_add(launch.cluster_size);
    if (block >= launch.grid) {
      break;
    }
    std::string error = run_one(block);
    if (cluster->waited_for_earlier_launches()) {
      progress.waited_for_earlier = true;
    }
    if (!error.empty()) {
      const std::lock_guard<std::mutex> lock(progress.mutex);
      if (progress.error.empty() || block < progress.failed_block) {
        progress.failed_block = block;
        progress.error = std::move(error);
      }
      progress.failed = true;
    }
  }
  give_back_cluster(std::move(cluster));
}

std::string run(const Launch& launch) {
  Progress progress;
  std::vector<std::thread> helpers;
  for (i32 i = 1; i < std::min(launch.num_workers, launch.grid / launch.cluster_size); ++i) {
    try {
      helpers.emplace_back([&] { work(launch, progress); });
    } catch (const std::system_error&) {
      break;  // fewer, then
    }
  }
  work(launch, progress);
  for (std::thread& helper : helpers) {
    helper.join();
  }
  if (progress.error.empty() && launch.programmatic != 0 && !progress.waited_for_earlier) {
    return std::string(launch.kernel_name) +
           ": no thread of a programmatic launch called griddepcontrol_wait(), so it may end "
           "before " +
           "the launch that it follows";
  }
  return progress.error;
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
