// One assignment problem: maximise the sum of s[i, column of i]. Works on the dual: column prices v only rise, row i
// values column j at s_ij - v_j.
//   1. Lists of every row's best columns at the starting prices.
//   2. Row reduction: free rows bid for their best column up to what their second best is worth, and displace its
//   owner.
//   3. Shortest augmenting paths for the rows still free, on the lists; a row is read in full only when the path
//   reaches
//      its threshold.
//   4. Row duals as exact maxima, and the duality gap that proves the result.
// Prices and path lengths are float64 whatever the matrix holds, so a float32 matrix is solved exactly too. Rows of a
// float32 matrix are scanned in float32 with a bound on the rounding, as long as that bound is small enough to be
// useful.
#pragma once

#include <new>

#include "cpu/kernels/assign_heap.h"
#include "cpu/kernels/assign_lists.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

#ifdef MUDSC_ASSIGN_STATS
static int64_t stat_steps, stat_rebuilds, stat_dense, stat_paths, stat_pops, stat_entries, stat_free0, stat_duals;
#define MUDSC_STAT(x) (x)
#else
#define MUDSC_STAT(x) ((void)0)
#endif

constexpr double kFar = INFINITY;

struct Choice {
    double first, second;  // the two largest reduced values of a row
    int column;            // of the first
    double s;              // its matrix entry
};

struct Outcome {
    double taken = 0;  // sum of the entries taken
    double size = 0;   // sum of their magnitudes
    double duals = 0;  // sum of the magnitudes of all duals
    double gap = 0;    // sum(u) + sum(v) - taken, added up row by row so that large duals do not hide it
};

template <class T>
class Solver {
  public:
    // Scratch for problems of size n, reused from one to the next.
    bool allocate(int n, int threads);
    // Solves s[i * stride + j]. start: [n] column duals or null. Results: indices, u, v: [n] and *outcome.
    // not_converged: the duals left the range of float64.
    Status solve(const T* s, int64_t stride, const double* start, Poll poll, int64_t* indices, double* u, double* v,
                 Outcome* outcome);

  private:
    const T* row(int i) const { return s_ + i * stride_; }
    Entry<T>* list(int i) const { return lists_ + static_cast<int64_t>(i) * plan_.room; }
    static uint32_t turn(int i) { return static_cast<uint32_t>(i) * 40503u; }

    void reset(const double* start);
    Status make_all_lists(bool priced);
    void remake_list(int i);
    bool choose(int i, Choice* c) const;
    void choose_among_equals(int i, Choice* c) const;
    Choice best_of(int i);
    bool raise(int j, double by);
    void take(int i, int j, double s);
    Status reduce_rows(int passes, int64_t budget);
    Status augment(int source);
    Status augment_on_lists(int source, bool* given_up);
    Status augment_in_full(int source);
    void relax(int i, int j, double s, double length);
    void expand(int i);
    void expand_in_full(int i);
    void read_on(int i);
    void finish_path(int source);
    void forget_path();
    bool too_slow() const;
    double row_dual(int i);
    void widen();

    const T* s_ = nullptr;
    int64_t stride_ = 0;
    int n_ = 0, threads_ = 1;
    Poll poll_;
    ListPlan plan_{};
    bool wide_ = sizeof(T) == 8;  // scan in float64
    double v_largest_ = 0;

    Buffer<char> memory_;
    Buffer<char> helper_memory_;
    ListScratch scratch_{};
    double* v_ = nullptr;          // [column, padded]
    T* v32_ = nullptr;             // [column, padded] the same, rounded
    Entry<T>* lists_ = nullptr;    // [row, room]
    int32_t* count_ = nullptr;     // [row]
    double* threshold_ = nullptr;  // [row]

    int32_t *owner_ = nullptr, *column_of_ = nullptr;  // of columns, of rows; -1: free
    double* taken_ = nullptr;                          // [row] the entry taken
    int32_t *free_ = nullptr, *next_free_ = nullptr;   // rows
    int free_count_ = 0;
    int32_t *open_ = nullptr, *open_at_ = nullptr;  // free columns, and where each stands among them
    int open_count_ = 0;

    // One search.
    double* length_ = nullptr;    // [column] kFar: not reached
    int32_t* from_ = nullptr;     // [column] the row it was reached from
    double* from_s_ = nullptr;    // [column] and the entry
    uint8_t* done_ = nullptr;     // [column]
    int32_t* touched_ = nullptr;  // columns reached
    int32_t* ready_ = nullptr;    // columns at the present length
    double* level_ = nullptr;     // [row] length at which it was reached + its dual
    int32_t* remade_ = nullptr;   // [row] the search in which its list was last made anew
    double* reach_ = nullptr;     // [column, padded] v - min(length, end): s - reach > level tells a shorter path
    double* key_ = nullptr;       // [column, padded] lengths of a search over full rows; infinite once done
    T* reach32_ = nullptr;        // [column, padded] the same, rounded
    Heap heap_;
    int touched_count_ = 0, ready_count_ = 0, search_ = 0;
    int pops_ = 0, reads_ = 0, given_up_ = 0;
    int64_t shortened_ = 0;
    double now_ = 0, end_ = 0, reach_end_ = 0, reach_largest_ = 0;
    int end_column_ = -1;
    bool reach_valid_ = false;
};

// Cuts pieces from one block of memory; with a null block it only counts.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class U>
    void take(U** pointer, int64_t count) {
        if (base_ != nullptr) *pointer = reinterpret_cast<U*>(base_ + used_);
        used_ += (count * static_cast<int64_t>(sizeof(U)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

template <class T>
bool Solver<T>::allocate(int n, int threads) {
    n_ = n;
    threads_ = threads;
    plan_ = list_plan(n);
    const int64_t pad = padded(n);
    for (int pass = 0; pass < 2; ++pass) {
        Carver c(pass == 0 ? nullptr : memory_.get());
        c.take(&scratch_.columns, n);
        c.take(&scratch_.r, n);
        c.take(&scratch_.copy, n);
        c.take(&v_, pad);
        c.take(&reach_, pad);
        c.take(&key_, pad);
        c.take(&v32_, sizeof(T) == 4 ? pad : 0);
        c.take(&reach32_, sizeof(T) == 4 ? pad : 0);
        c.take(&count_, n);
        c.take(&threshold_, n);
        c.take(&owner_, n);
        c.take(&column_of_, n);
        c.take(&taken_, n);
        c.take(&free_, n);
        c.take(&next_free_, n);
        c.take(&open_, n);
        c.take(&open_at_, n);
        c.take(&length_, pad);
        c.take(&from_, pad);
        c.take(&from_s_, n);
        c.take(&done_, n);
        c.take(&touched_, n);
        c.take(&ready_, n);
        c.take(&level_, n);
        c.take(&remade_, n);
        heap_.carve(c, 2 * static_cast<int64_t>(n));
        c.take(&lists_, static_cast<int64_t>(n) * plan_.room);
        if (pass == 0 && !memory_.allocate(c.used())) return false;
    }
    return true;
}

template <class T>
void Solver<T>::reset(const double* start) {
    const int n = n_;
    v_largest_ = 0;
    wide_ = sizeof(T) == 8;
    for (int j = 0; j < n; ++j) {
        v_[j] = start != nullptr ? start[j] : 0.0;
        const double size = fabs(v_[j]);
        v_largest_ = size > v_largest_ ? size : v_largest_;
        owner_[j] = column_of_[j] = -1;
        open_[j] = open_at_[j] = free_[j] = j;
        done_[j] = 0;
        remade_[j] = 0;
        length_[j] = kFar;
    }
    for (int j = n; j < padded(n); ++j) v_[j] = reach_[j] = key_[j] = kFar;
    if (!wide_) {
        for (int j = 0; j < padded(n); ++j) v32_[j] = static_cast<T>(v_[j]);
        for (int j = n; j < padded(n); ++j) reach32_[j] = static_cast<T>(kFar);
    }
    open_count_ = free_count_ = n;
    search_ = given_up_ = 0;
    if (v_largest_ > 1e30) widen();
}

// From here on float64 scans: float32 can no longer tell a row's best columns apart.
template <class T>
void Solver<T>::widen() {
    wide_ = true;
    reach_valid_ = false;
}

template <class T>
Status Solver<T>::make_all_lists(bool priced) {
    constexpr int rows_a_task = 32;
    const int64_t tasks = ceil_div(n_, rows_a_task);
    const int workers = n_ < 1024 ? 1 : static_cast<int>(min64(threads_, tasks));
    int stop = 0;
    const int64_t scratch_bytes = 3 * padded(n_) * 8;
    if (workers > 1 && !helper_memory_.allocate((workers - 1) * scratch_bytes)) return Status::no_memory;
    parallel_each(workers, tasks, [&](int64_t task, int worker) {
        if (__atomic_load_n(&stop, __ATOMIC_RELAXED) != 0) return;
        if (worker == 0 && poll_()) __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
        ListScratch scratch = scratch_;
        if (worker > 0) {
            Carver c(helper_memory_.get() + (worker - 1) * scratch_bytes);
            c.take(&scratch.columns, n_);
            c.take(&scratch.r, n_);
            c.take(&scratch.copy, n_);
        }
        T bad = 0;
        const int end = static_cast<int>(min64((task + 1) * rows_a_task, n_));
        for (int i = static_cast<int>(task * rows_a_task); i < end; ++i) {
            if (wide_) {
                double bad64 = 0;
                count_[i] = make_list<true>(row(i), priced ? v_ : nullptr, v_, v_largest_, n_, plan_, turn(i), scratch,
                                            list(i), &threshold_[i], &bad64);
                bad += static_cast<T>(bad64);
            } else {
                T bad32 = 0;
                count_[i] = make_list<true>(row(i), priced ? v32_ : nullptr, v_, v_largest_, n_, plan_, turn(i),
                                            scratch, list(i), &threshold_[i], &bad32);
                bad += bad32;
            }
            if (bad != 0 || isnan(bad)) {
                __atomic_store_n(&stop, 2, __ATOMIC_RELAXED);
                return;
            }
        }
    });
    return stop == 0 ? Status::ok : stop == 2 ? Status::not_finite : Status::interrupted;
}

template <class T>
void Solver<T>::remake_list(int i) {
    MUDSC_STAT(++stat_rebuilds);
    if (!wide_) {
        T bad = 0;
        count_[i] =
            make_list<false>(row(i), v32_, v_, v_largest_, n_, plan_, turn(i), scratch_, list(i), &threshold_[i], &bad);
        if (count_[i] < 2 || list(i)[1].key >= threshold_[i]) return;
        widen();
    }
    double bad = 0;
    count_[i] =
        make_list<false>(row(i), v_, v_, v_largest_, n_, plan_, turn(i), scratch_, list(i), &threshold_[i], &bad);
}

// The best two columns of row i from its list; false when the list cannot tell.
template <class T>
bool Solver<T>::choose(int i, Choice* c) const {
    const Entry<T>* e = list(i);
    const int count = count_[i];
    double first = -kFar, second = -kFar;
    int at = 0;
    for (int k = 0; k < count && e[k].key >= second; k += kBlock) {
        for (int q = k; q < k + kBlock; ++q) {
            const double r = static_cast<double>(e[q].s) - v_[e[q].column];
            const double low = r < first ? r : first;
            second = low > second ? low : second;
            at = r > first ? q : at;
            first = r > first ? r : first;
        }
    }
    *c = Choice{first, second, e[at].column, static_cast<double>(e[at].s)};
    return second >= threshold_[i];
}

// Where several columns are best, one that nobody owns; otherwise the last of them.
template <class T>
void Solver<T>::choose_among_equals(int i, Choice* c) const {
    const Entry<T>* e = list(i);
    for (int k = 0; k < count_[i] && e[k].key >= c->first; ++k) {
        if (static_cast<double>(e[k].s) - v_[e[k].column] != c->first) continue;
        c->column = e[k].column;
        c->s = static_cast<double>(e[k].s);
        if (owner_[c->column] < 0) return;
    }
}

template <class T>
Choice Solver<T>::best_of(int i) {
    Choice c;
    if (!choose(i, &c)) {
        remake_list(i);
        choose(i, &c);
    }
    return c;
}

// False when the price is too large for the step to change it.
template <class T>
bool Solver<T>::raise(int j, double by) {
    const double before = v_[j], after = before + by;
    v_[j] = after;
    if (!wide_) v32_[j] = static_cast<T>(after);
    const double size = fabs(after);
    v_largest_ = size > v_largest_ ? size : v_largest_;
    return after > before;
}

template <class T>
void Solver<T>::take(int i, int j, double s) {
    if (owner_[j] < 0) {
        const int last = open_[--open_count_];
        open_[open_at_[j]] = last;
        open_at_[last] = open_at_[j];
    }
    owner_[j] = i;
    column_of_[i] = j;
    taken_[i] = s;
}

template <class T>
Status Solver<T>::reduce_rows(int passes, int64_t budget) {
    for (int pass = 0; pass < passes && free_count_ > 0; ++pass) {
        int next = 0;
        int64_t steps = budget;
        for (int f = 0; f < free_count_; ++f) {
            int i = free_[f];
            if ((f & 63) == 0 && poll_()) return Status::interrupted;
            for (;;) {
                MUDSC_STAT(++stat_steps);
                Choice c = best_of(i);
                bool rises = c.second < c.first && n_ > 1 && raise(c.column, c.first - c.second);
                if (!rises && owner_[c.column] >= 0) choose_among_equals(i, &c);
                const int out = owner_[c.column];
                take(i, c.column, c.s);
                if (out < 0) break;
                column_of_[out] = -1;
                if (!rises || --steps < 0) {
                    next_free_[next++] = out;
                    break;
                }
                i = out;
            }
        }
        int32_t* swap = free_;
        free_ = next_free_;
        next_free_ = swap;
        free_count_ = next;
    }
    return Status::ok;
}

// Row i reaches column j by a path of this length, below end_.
template <class T>
inline void Solver<T>::relax(int i, int j, double s, double length) {
    if (length < now_) length = now_;
    if (!(length < length_[j]) || done_[j] != 0) return;
    from_[j] = i;
    from_s_[j] = s;
    if (owner_[j] < 0) {
        end_ = length;
        end_column_ = j;
        return;
    }
    if (length_[j] < kFar) {
        heap_.move_forward(length, j);
    } else {
        touched_[touched_count_++] = j;
        if (length == now_) {
            done_[j] = 1;
            ready_[ready_count_++] = j;
        } else {
            heap_.push(length, j);
        }
    }
    length_[j] = length;
    ++shortened_;
    if (!reach_valid_) return;
    if (wide_) {
        reach_[j] = v_[j] - length;
    } else {
        reach32_[j] = static_cast<T>(v_[j] - length);
    }
}

template <class T>
void Solver<T>::expand(int i) {
    const Entry<T>* e = list(i);
    const int count = count_[i];
    const double level = level_[i];
    for (int k = 0; k < count; ++k) {
        if (level - e[k].key >= end_) return;
        MUDSC_STAT(++stat_entries);
        const double s = static_cast<double>(e[k].s), length = level - (s - v_[e[k].column]);
        if (length < end_) relax(i, e[k].column, s, length);
    }
    const double bound = level - threshold_[i];
    if (bound < end_) heap_.push(bound > now_ ? bound : now_, n_ + i);
}

template <class T>
void Solver<T>::expand_in_full(int i) {
    MUDSC_STAT(++stat_dense);
    const T* s = row(i);
    const double level = level_[i];
    if (end_ == kFar) {
        for (int k = 0; k < open_count_; ++k) {
            const int j = open_[k];
            const double entry = static_cast<double>(s[j]), length = level - (entry - v_[j]);
            if (length < end_) relax(i, j, entry, length);
        }
    }
    if (!reach_valid_ || reach_end_ != end_) {
        reach_largest_ = v_largest_ + fabs(end_);
        for (int j = 0; j < n_; ++j) reach_[j] = v_[j] - (length_[j] < end_ ? length_[j] : end_);
        if (!wide_) {
            for (int j = 0; j < n_; ++j) reach32_[j] = static_cast<T>(reach_[j]);
        }
        reach_valid_ = true;
        reach_end_ = end_;
    }
    int found;
    if (wide_) {
        const double least = level - 0x1p-50 * (fabs(level) + reach_largest_);
        found = columns_above(s, reach_, n_, least, scratch_.columns);
    } else {
        const double least = level - 0x1p-22 * (fabs(level) + reach_largest_) - 0x1p-140;
        found = columns_above(s, reach32_, n_, static_cast<T>(least), scratch_.columns);
    }
    for (int k = 0; k < found; ++k) {
        const int j = scratch_.columns[k];
        const double entry = static_cast<double>(s[j]), length = level - (entry - v_[j]);
        if (length < end_) relax(i, j, entry, length);
    }
}

// The path has come to where row i's list may miss columns: a new list at the present prices, or the whole row.
template <class T>
void Solver<T>::read_on(int i) {
    ++reads_;
    if (remade_[i] != search_ && reads_ * 4 < pops_ + 32) {
        remade_[i] = search_;
        remake_list(i);
        expand(i);
    } else {
        expand_in_full(i);
    }
}

// Whether a search over full rows would have cost less so far: nanoseconds of either, measured roughly. It wins where
// paths are long and every row improves most columns, as in s_ij = i * j.
template <class T>
bool Solver<T>::too_slow() const {
    const int64_t n = n_;
    return reads_ * n / 8 + shortened_ * 8 > (pops_ + 64) * n / 2;
}

template <class T>
Status Solver<T>::augment_on_lists(int source, bool* given_up) {
    ++search_;
    heap_.clear();
    touched_count_ = ready_count_ = 0;
    pops_ = reads_ = 0;
    shortened_ = 0;
    now_ = 0;
    end_ = kFar;
    end_column_ = -1;
    reach_valid_ = false;
    level_[source] = best_of(source).first;
    expand(source);
    for (;;) {
        int j;
        if (ready_count_ > 0) {
            if (end_ <= now_) break;
            j = ready_[--ready_count_];
        } else {
            if (heap_.empty() || heap_.shortest() >= end_) break;
            const Waiting w = heap_.pop();
            now_ = w.length;
            if (w.id >= n_) {
                read_on(w.id - n_);
                continue;
            }
            j = w.id;
            done_[j] = 1;
        }
        MUDSC_STAT(++stat_pops);
        if ((++pops_ & 63) == 0) {
            if (poll_()) return Status::interrupted;
            if (too_slow()) {
                forget_path();
                *given_up = true;
                return Status::ok;
            }
        }
        const int i = owner_[j];
        level_[i] = length_[j] + (taken_[i] - v_[j]);
        expand(i);
    }
    *given_up = false;
    if (end_column_ < 0) return Status::not_converged;
    finish_path(source);
    return Status::ok;
}

template <class T>
Status Solver<T>::augment_in_full(int source) {
    const int n = n_;
    double* price = reach_;
    for (int j = 0; j < n; ++j) {
        price[j] = v_[j];
        key_[j] = kFar;
    }
    int i = source;
    level_[i] = 0;
    for (;;) {
        if ((++pops_ & 63) == 0 && poll_()) return Status::interrupted;
        MUDSC_STAT(++stat_dense);
        const double least = shorten(row(i), price, n, level_[i], i, key_, from_);
        if (!(least < kFar)) return Status::not_converged;
        const int j = position_of(least, key_);
        if (owner_[j] < 0) {
            end_ = least;
            end_column_ = j;
            break;
        }
        touched_[touched_count_++] = j;
        done_[j] = 1;
        length_[j] = least;
        key_[j] = price[j] = kFar;
        i = owner_[j];
        level_[i] = least + (taken_[i] - v_[j]);
    }
    for (int j = end_column_;;) {
        from_s_[j] = static_cast<double>(row(from_[j])[j]);
        if (from_[j] == source) break;
        j = column_of_[from_[j]];
    }
    finish_path(source);
    return Status::ok;
}

template <class T>
Status Solver<T>::augment(int source) {
    MUDSC_STAT(++stat_paths);
    touched_count_ = pops_ = 0;
    if (given_up_ < 4) {
        bool given_up = false;
        const Status status = augment_on_lists(source, &given_up);
        if (status != Status::ok || !given_up) return status;
        ++given_up_;
    }
    return augment_in_full(source);
}

template <class T>
void Solver<T>::forget_path() {
    for (int k = 0; k < touched_count_; ++k) {
        length_[touched_[k]] = kFar;
        done_[touched_[k]] = 0;
    }
    touched_count_ = 0;
}

template <class T>
void Solver<T>::finish_path(int source) {
    for (int k = 0; k < touched_count_; ++k) {
        const int j = touched_[k];
        if (done_[j] != 0 && length_[j] < end_) raise(j, end_ - length_[j]);
    }
    forget_path();
    for (int j = end_column_;;) {
        const int i = from_[j], before = column_of_[i];
        take(i, j, from_s_[j]);
        if (i == source) break;
        j = before;
    }
}

// The largest s_ij - v_j of row i, exactly.
template <class T>
double Solver<T>::row_dual(int i) {
    const Entry<T>* e = list(i);
    double best = taken_[i] - v_[column_of_[i]];
    for (int k = 0; k < count_[i] && e[k].key > best; ++k) {
        const double r = static_cast<double>(e[k].s) - v_[e[k].column];
        best = r > best ? r : best;
    }
    if (best >= threshold_[i]) return best;
    MUDSC_STAT(++stat_duals);
    double maxima[kRun], unused = 0;
    group_maxima<false>(row(i), v_, n_, maxima, &unused);
    for (int k = 0; k < kRun; ++k) best = maxima[k] > best ? maxima[k] : best;
    return best;
}

template <class T>
Status Solver<T>::solve(const T* s, int64_t stride, const double* start, Poll poll, int64_t* indices, double* u,
                        double* v, Outcome* outcome) {
    s_ = s;
    stride_ = stride;
    poll_ = poll;
    reset(start);
    Status status = make_all_lists(start != nullptr);
    if (status != Status::ok) return status;
    status = reduce_rows(6, 8 * static_cast<int64_t>(n_));
    if (status != Status::ok) return status;
    MUDSC_STAT(stat_free0 += free_count_);
    for (int f = 0; f < free_count_; ++f) {
        status = augment(free_[f]);
        if (status != Status::ok) return status;
    }
    *outcome = Outcome{};
    for (int i = 0; i < n_; ++i) {
        const int j = column_of_[i];
        indices[i] = j;
        v[i] = v_[i];
        u[i] = row_dual(i);
        outcome->gap += u[i] - (taken_[i] - v_[j]);
        outcome->taken += taken_[i];
        outcome->size += fabs(taken_[i]);
        outcome->duals += fabs(u[i]) + fabs(v[i]);
    }
    return Status::ok;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
