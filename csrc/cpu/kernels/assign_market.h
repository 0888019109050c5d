// The state of one problem while it is solved: the matrix, a price v_j for each column, who owns which column, and the
// list of each row's best columns. Row i values column j at s_ij - v_j; prices only rise.
#pragma once

#include "cpu/kernels/assign_lists.h"
#include "cpu/kernels/assign_memory.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr double kNarrowest = 1e30;  // prices beyond it might overflow float32

struct Choice {
    double first, second;  // the two largest reduced values of a row
    int column;            // of the first
    double s;              // its matrix entry
};

// Prices are float64 whatever the matrix holds, so a float32 matrix is solved exactly too. Its rows are scanned in
// float32 with a bound on the rounding, as long as that bound is small enough to be useful.
template <class T>
class Market {
  public:
    void carve(Carver& memory, int n);
    // Begins a problem: s[i * stride + j], and [n] prices to start from or null. Everything is free.
    void begin(const T* s, int64_t stride, int threads, Poll poll, const double* start);

    // Lists of all rows; not_finite when the matrix holds NaN or an infinity, if `checked`.
    Status make_all_lists(bool priced, bool checked);
    void remake_list(int i);
    int rows_without_a_column_of_their_own() const;
    Choice best_of(int i);
    void choose_among_equals(int i, Choice* c) const;
    bool raise(int j, double by);
    void take(int i, int j, double s);
    void release_all();
    void price_columns();
    double largest_range() const;
    double row_dual(int i) const;

    int size() const { return n_; }
    const T* row(int i) const { return s_ + i * stride_; }
    const Entry<T>* list(int i) const { return lists_ + static_cast<int64_t>(i) * plan_.room; }
    const RowState& state(int i) const { return state_[i]; }
    double price(int j) const { return v_[j]; }
    const double* prices() const { return v_; }
    double largest_price() const { return v_largest_; }
    int owner(int j) const { return owner_[j]; }
    int column_of(int i) const { return column_of_[i]; }
    double taken(int i) const { return taken_[i]; }
    bool wide() const { return wide_; }
    bool stopped() const { return poll_(); }
    const ListScratch& scratch() const { return scratch_; }
    int open_count() const { return open_count_; }
    int open_column(int k) const { return open_[k]; }

    // Rows that own no column, kept by those who displace them.
    int32_t* free = nullptr;
    int free_count = 0;

  private:
    Entry<T>* mutable_list(int i) { return lists_ + static_cast<int64_t>(i) * plan_.room; }
    static uint32_t turn(int i) { return static_cast<uint32_t>(i) * 40503u; }
    template <bool priced, bool checked>
    void fill_list(int i, const ListScratch& scratch, bool* finite);
    bool choose(int i, Choice* c) const;

    const T* s_ = nullptr;
    int64_t stride_ = 0;
    int n_ = 0, threads_ = 1;
    Poll poll_;
    ListPlan plan_{};
    bool wide_ = false;                  // rows are scanned in float64
    int64_t remakes_ = 0, blurred_ = 0;  // lists made anew; those that float32 could not make
    double v_largest_ = 0;               // bounds |v|
    double* v_ = nullptr;                // [column, padded]
    T* v_rounded_ = nullptr;             // [column, padded]
    Entry<T>* lists_ = nullptr;          // [row, room]
    RowState* state_ = nullptr;          // [row]
    int32_t* owner_ = nullptr;           // [column] row, or -1
    int32_t* column_of_ = nullptr;       // [row] column, or -1
    double* taken_ = nullptr;            // [row] the entry taken
    int32_t* open_ = nullptr;            // columns that nobody owns
    int32_t* open_at_ = nullptr;         // [column] place among them
    int open_count_ = 0;
    ListScratch scratch_{};
    Buffer<char> helper_memory_;
};

template <class T>
void Market<T>::carve(Carver& memory, int n) {
    n_ = n;
    plan_ = list_plan(n);
#ifdef MUDSC_ASSIGN_STATS
    if (tune_room) plan_ = ListPlan{tune_least, tune_room, tune_wide != 0};
#endif
    memory.take(&scratch_.columns, n + kRun);
    memory.take(&scratch_.r, n);
    memory.take(&scratch_.copy, n);
    memory.take(&v_, padded(n));
    memory.take(&v_rounded_, padded(n));
    memory.take(&state_, n);
    memory.take(&owner_, n);
    memory.take(&column_of_, n);
    memory.take(&taken_, n);
    memory.take(&free, n);
    memory.take(&open_, n);
    memory.take(&open_at_, n);
    memory.take(&lists_, static_cast<int64_t>(n) * plan_.room);
}

template <class T>
void Market<T>::begin(const T* s, int64_t stride, int threads, Poll poll, const double* start) {
    s_ = s;
    stride_ = stride;
    threads_ = threads;
    poll_ = poll;
    remakes_ = blurred_ = 0;
    wide_ = sizeof(T) == 8;
    v_largest_ = 0;
    for (int j = 0; j < n_; ++j) v_[j] = start != nullptr ? start[j] : 0.0;
    for (int j = n_; j < padded(n_); ++j) v_[j] = kFar;
    for (int j = 0; j < padded(n_); ++j) v_rounded_[j] = static_cast<T>(v_[j]);
    if (start != nullptr) {
        for (int j = 0; j < n_; ++j) v_largest_ = fabs(v_[j]) > v_largest_ ? fabs(v_[j]) : v_largest_;
        wide_ = wide_ || v_largest_ > kNarrowest;
    }
    release_all();
}

template <class T>
void Market<T>::release_all() {
    for (int j = 0; j < n_; ++j) {
        owner_[j] = column_of_[j] = -1;
        open_[j] = open_at_[j] = free[j] = j;
    }
    open_count_ = free_count = n_;
}

template <class T>
Status Market<T>::make_all_lists(bool priced, bool checked) {
    constexpr int rows_a_task = 32;
    const int64_t tasks = ceil_div(n_, rows_a_task);
    const int workers = n_ < 1024 ? 1 : static_cast<int>(min64(threads_, tasks));
    int stop = 0;
    const int64_t scratch_bytes = 3 * 8 * static_cast<int64_t>(padded(n_) + kRun);
    if (workers > 1 && !helper_memory_.allocate((workers - 1) * scratch_bytes)) return Status::no_memory;
    parallel_each(workers, tasks, [&](int64_t task, int worker) {
        if (__atomic_load_n(&stop, __ATOMIC_RELAXED) != 0) return;
        if (worker == 0 && poll_()) __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
        ListScratch scratch = scratch_;
        if (worker > 0) {
            Carver c(helper_memory_.get() + (worker - 1) * scratch_bytes);
            c.take(&scratch.columns, n_ + kRun);
            c.take(&scratch.r, n_);
            c.take(&scratch.copy, n_);
        }
        const int end = static_cast<int>(min64((task + 1) * rows_a_task, n_));
        for (int i = static_cast<int>(task * rows_a_task); i < end; ++i) {
            bool finite = true;
            if (checked) {
                priced ? fill_list<true, true>(i, scratch, &finite) : fill_list<false, true>(i, scratch, &finite);
            } else {
                priced ? fill_list<true, false>(i, scratch, &finite) : fill_list<false, false>(i, scratch, &finite);
            }
            if (!finite) {
                __atomic_store_n(&stop, 2, __ATOMIC_RELAXED);
                return;
            }
        }
    });
    return stop == 0 ? Status::ok : stop == 2 ? Status::not_finite : Status::interrupted;
}

template <class T>
template <bool priced, bool checked>
inline void Market<T>::fill_list(int i, const ListScratch& scratch, bool* finite) {
    if (wide_) {
        make_list<priced, checked>(row(i), v_, v_, v_largest_, n_, plan_, turn(i), scratch, mutable_list(i), &state_[i],
                                   finite);
    } else {
        make_list<priced, checked>(row(i), v_rounded_, v_, v_largest_, n_, plan_, turn(i), scratch, mutable_list(i),
                                   &state_[i], finite);
    }
}

// Rows whose best columns are all wanted by rows before them, as long as all lists are new and nothing is taken.
template <class T>
int Market<T>::rows_without_a_column_of_their_own() const {
    uint8_t* wanted = reinterpret_cast<uint8_t*>(scratch_.r);
    memset(wanted, 0, static_cast<size_t>(n_));
    int without = 0;
    for (int i = 0; i < n_; ++i) {
        const Entry<T>* e = list(i);
        int k = 0;
        while (k < state_[i].count && e[k].key >= e[0].key && wanted[e[k].column] != 0) ++k;
        const bool found = k < state_[i].count && e[k].key >= e[0].key;
        if (found) wanted[e[k].column] = 1;
        without += found ? 0 : 1;
    }
    return without;
}

// A new list at the present prices. Where float32 cannot tell a row's best columns apart, by exact ties mostly, this
// row is read in float64; where that is common, all are.
template <class T>
void Market<T>::remake_list(int i) {
    MUDSC_STAT(++stat_rebuilds);
    bool unused = true;
    ++remakes_;
    if (!wide_) {
        fill_list<true, false>(i, scratch_, &unused);
        if (state_[i].count < 2 || list(i)[1].key >= state_[i].threshold) return;
        const bool stays = ++blurred_ * 2 > remakes_ + 64;
        wide_ = true;
        fill_list<true, false>(i, scratch_, &unused);
        wide_ = stays;
        return;
    }
    fill_list<true, false>(i, scratch_, &unused);
}

// The best two columns of row i from its list; false when the list cannot tell.
template <class T>
bool Market<T>::choose(int i, Choice* c) const {
    const Entry<T>* e = list(i);
    const int count = state_[i].count;
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
    return second >= state_[i].threshold;
}

// Where several columns are best, one that nobody owns; otherwise the last of them.
template <class T>
void Market<T>::choose_among_equals(int i, Choice* c) const {
    const Entry<T>* e = list(i);
    for (int k = 0; k < state_[i].count && e[k].key >= c->first; ++k) {
        if (static_cast<double>(e[k].s) - v_[e[k].column] != c->first) continue;
        c->column = e[k].column;
        c->s = static_cast<double>(e[k].s);
        if (owner_[c->column] < 0) return;
    }
}

template <class T>
Choice Market<T>::best_of(int i) {
    Choice c;
    if (!choose(i, &c)) {
        remake_list(i);
        choose(i, &c);
    }
    return c;
}

// False when the price is too large for the step to change it.
template <class T>
bool Market<T>::raise(int j, double by) {
    const double before = v_[j], after = before + by;
    v_[j] = after;
    if (!wide_) v_rounded_[j] = static_cast<T>(after);
    const double size = fabs(after);
    if (size > v_largest_) {
        v_largest_ = size;
        wide_ = wide_ || size > kNarrowest;
    }
    return after > before;
}

template <class T>
void Market<T>::take(int i, int j, double s) {
    if (owner_[j] < 0) {
        const int last = open_[--open_count_];
        open_[open_at_[j]] = last;
        open_at_[last] = open_at_[j];
    }
    owner_[j] = i;
    column_of_[i] = j;
    taken_[i] = s;
}

// Every column at its largest entry. Left unfinished when stopped, as the next step will see.
template <class T>
void Market<T>::price_columns() {
    for (int j = 0; j < n_; ++j) v_[j] = static_cast<double>(row(0)[j]);
    for (int i = 1; i < n_; ++i) {
        if (i % 64 == 0 && stopped()) return;
        const T* s = row(i);
        for (int j = 0; j < n_; ++j) {
            const double x = static_cast<double>(s[j]);
            v_[j] = x > v_[j] ? x : v_[j];
        }
    }
    v_largest_ = 0;
    for (int j = 0; j < n_; ++j) raise(j, 0.0);
}

template <class T>
double Market<T>::largest_range() const {
    double range = 0;
    for (int i = 0; i < n_; ++i) {
        if (i % 64 == 63 && stopped()) return range;
        const T* s = row(i);
        double low = kFar, high = -kFar;
        for (int j = 0; j < n_; ++j) {
            const double x = static_cast<double>(s[j]);
            low = x < low ? x : low;
            high = x > high ? x : high;
        }
        range = high - low > range ? high - low : range;
    }
    return range;
}

// The largest s_ij - v_j of row i, exactly.
template <class T>
double Market<T>::row_dual(int i) const {
    const Entry<T>* e = list(i);
    double best = taken_[i] - v_[column_of_[i]];
    for (int k = 0; k < state_[i].count && e[k].key > best; ++k) {
        const double r = static_cast<double>(e[k].s) - v_[e[k].column];
        best = r > best ? r : best;
    }
    if (best >= state_[i].threshold) return best;
    MUDSC_STAT(++stat_duals);
    double maxima[kRun];
    bool unused = true;
    group_maxima<true, false>(row(i), v_, n_, maxima, &unused);
    for (int k = 0; k < kRun; ++k) best = maxima[k] > best ? maxima[k] : best;
    return best;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
