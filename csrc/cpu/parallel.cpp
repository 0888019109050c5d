#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace mudsc {
namespace {

struct Job {
    void (*fn)(void*, int64_t, int);
    void* ctx;
    int64_t n_tasks;
    void (*waiting)(void*);
    std::atomic<int64_t> next{0};

    void work(int worker) {
        for (int64_t task = next.fetch_add(1); task < n_tasks; task = next.fetch_add(1)) fn(ctx, task, worker);
    }
};

thread_local bool inside_task = false;

class Pool {
  public:
    // Returns false when another thread is using the pool.
    bool run(int threads, Job& job) {
        std::unique_lock<std::mutex> user(user_mutex_, std::try_to_lock);
        if (!user.owns_lock()) return false;
        const int helpers = threads - 1;
        while (static_cast<int>(workers_.size()) < helpers) {
            const int index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index] { serve(index); });
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
            running_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        inside_task = true;
        job.work(0);
        inside_task = false;
        std::unique_lock<std::mutex> lock(mutex_);
        const auto finished = [this] { return running_ == 0; };
        if (job.waiting == nullptr) done_.wait(lock, finished);
        while (!done_.wait_for(lock, kLook, finished)) {
            lock.unlock();  // for the others to finish meanwhile
            job.waiting(job.ctx);
            lock.lock();
        }
        job_ = nullptr;
        return true;
    }

  private:
    static constexpr std::chrono::milliseconds kLook{10};

    void serve(int index) {
        inside_task = true;
        uint64_t seen = 0;
        for (;;) {
            Job* job = nullptr;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen && index < wanted_; });
                seen = generation_;
                job = job_;
            }
            job->work(index + 1);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex user_mutex_;  // held by the thread whose job is running
    std::mutex mutex_;       // guards everything below
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

// The pool is never destroyed: its threads sleep until the process ends. After a fork the child has none of them, so
// it starts a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& instance() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    return *pool.load();
}

}  // namespace

void parallel_for(int threads, int64_t n_tasks, void (*fn)(void*, int64_t, int), void* ctx, void (*waiting)(void*)) {
    if (n_tasks <= 0) return;
    Job job{fn, ctx, n_tasks, waiting};
    if (threads > n_tasks) threads = static_cast<int>(n_tasks);
    if (threads > 1 && !inside_task && instance().run(threads, job)) return;
    job.work(0);
}

}  // namespace mudsc
