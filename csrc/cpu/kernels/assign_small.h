// Assignment of few units: a row is read in less time than a list of its best columns takes to keep, so every step
// reads a whole row.
//   1. Rounds of bids (assign_small_start.h): most rows find a column.
//   2. Shortest augmenting paths over whole rows for the rest, in float64. What counts is how long one step waits for
//      the next: the nearest column, the row that owns it and that row's entries form one chain.
//   3. Row duals as exact maxima, and the duality gap that proves the result.
#pragma once

#include "cpu/kernels/assign_small_start.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// A row that a path search has come to: through its column, or as the source.
struct Reached {
    double level;  // length of the path + its dual
    int32_t row, column;
};

#ifdef __AVX512F__
constexpr int kColumnsInRegisters = 64;
#else
constexpr int kColumnsInRegisters = 0;
#endif

template <class T>
class SmallSolver {
  public:
    void carve(Carver& memory, int n);
    // As Solver::solve.
    Status solve(const T* s, int64_t stride, bool trusted, const double* start, int64_t* indices, double* u, double* v,
                 Outcome* outcome);

  private:
    Status begin(bool trusted, const double* start);
    bool augment(int source);
    bool search(int source);
    bool search_in_registers(int source);
    bool come_to(int j, double length);
    void finish_path();
    void take(int i, int j);
    template <bool first>
    Vec<double> shorten_keys(const T* s, double level);

    SmallState<T> m_;
    double* key_ = nullptr;       // [column, padded] lengths, infinite where a column is done
    double* length_ = nullptr;    // [column] the length at which it was done
    double* tight_ = nullptr;     // [column] the reduced value of the entry taken
    Reached* reached_ = nullptr;  // [n + 1] in this order
    const T** row_of_ = nullptr;  // [column] its entries
    int done_ = 0, end_ = 0;      // columns done; the open column that a search ends at
    double end_length_ = 0;
};

template <class T>
void SmallSolver<T>::carve(Carver& memory, int n) {
    m_.carve(memory, n);
    memory.take(&key_, padded(n));
    memory.take(&length_, n);
    memory.take(&tight_, n);
    memory.take(&reached_, n + 1);
    memory.take(&row_of_, n);
}

template <class T>
inline void SmallSolver<T>::take(int i, int j) {
    m_.take(i, j);
    row_of_[j] = m_.row(i);
}

// One step of the search: through a row column j is at level - (s_j - price_j). Lowers `key` where that is shorter and
// returns the smallest key in all lanes.
template <class T>
template <bool first>
inline Vec<double> SmallSolver<T>::shorten_keys(const T* s, double level) {
    constexpr int lanes = Vec<double>::lanes;
    const Vec<double> at = Vec<double>::all(level);
    Vec<double> least[2] = {Vec<double>::all(kFar), Vec<double>::all(kFar)};
    const auto step = [&](Vec<double> x, int j, int k) {
        Vec<double> length = at - (x - Vec<double>::load(m_.price + j));
        if (!first) length = vmin(length, Vec<double>::load(key_ + j));
        length.store(key_ + j);
        least[k] = vmin(length, least[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= m_.n; j += 2 * lanes) {
        step(Vec<double>::load(s + j), j, 0);
        step(Vec<double>::load(s + j + lanes), j + lanes, 1);
    }
    for (; j < m_.n; j += lanes) step(Vec<double>::load_some(s + j, m_.n - j), j, 0);
    return lowest_in_all(vmin(least[0], least[1]));
}

// One shortest augmenting path from a free row; false when there is none of finite length.
template <class T>
bool SmallSolver<T>::augment(int source) {
    MUDSC_STAT(++stat_paths);
    done_ = 0;
    reached_[0] = Reached{0.0, source, -1};
    const bool found = m_.n <= kColumnsInRegisters ? search_in_registers(source) : search(source);
    if (found) finish_path();
    return found;
}

// The search is at the column with the smallest key: it goes on through the row that owns it, or ends if none does.
template <class T>
inline bool SmallSolver<T>::come_to(int j, double length) {
    MUDSC_STAT(++stat_dense);
    if (m_.is_open(j)) {
        end_ = j;
        end_length_ = length;
        return false;
    }
    reached_[++done_] = Reached{length + tight_[j], m_.owner[j], j};
    length_[j] = length;
    return length < kFar;
}

template <class T>
bool SmallSolver<T>::search(int source) {
    constexpr int lanes = Vec<double>::lanes;
    for (int j = 0; j < padded(m_.n); j += lanes) Vec<double>::load(m_.v + j).store(m_.price + j);
    Vec<double> least = shorten_keys<true>(m_.row(source), 0.0);
    for (;;) {
        const int j = m_.open_among([&](int at) { return at_most(key_ + at, least); });
        if (!come_to(j, least.first())) return m_.is_open(j) && end_length_ < kFar;
        put_at(key_ + j / lanes * lanes, j % lanes, kFar);
        put_at(m_.price + j / lanes * lanes, j % lanes, kFar);
        least = shorten_keys<false>(row_of_[j], reached_[done_].level);
    }
}

// The same where all keys fit registers.
template <class T>
bool SmallSolver<T>::search_in_registers(int source) {
#ifdef __AVX512F__
    Vec<double> key[8];
    for (Vec<double>& x : key) x = Vec<double>::all(kFar);
    uint64_t left = ~uint64_t{0} >> (64 - m_.n);  // columns not done
    const uint64_t open = m_.open[0];
    const T* s = m_.row(source);
    double level = 0;
    for (;;) {
        const Vec<double> at = Vec<double>::all(level);
        for (int k = 0; k < 8; ++k) {
            const Vec<double> x = load_where(left >> (8 * k), s + 8 * k);
            key[k] = lower_where(left >> (8 * k), at - (x - Vec<double>::load(m_.v + 8 * k)), key[k]);
        }
        const Vec<double> a = vmin(vmin(key[0], key[1]), vmin(key[2], key[3]));
        const Vec<double> least = lowest_in_all(vmin(a, vmin(vmin(key[4], key[5]), vmin(key[6], key[7]))));
        const uint64_t lowest = at_most(key, least), ends = lowest & open;
        const int j = __builtin_ctzll(ends != 0 ? ends : lowest);
        if (!come_to(j, least.first())) return m_.is_open(j) && end_length_ < kFar;
        left &= ~(uint64_t{1} << j);
        s = row_of_[j];
        level = reached_[done_].level;
    }
#else
    return search(source);
#endif
}

// Prices rise along the path that was found, and its columns change hands. Which row a column was reached from is not
// kept: it is the one that gives the column's length again.
template <class T>
void SmallSolver<T>::finish_path() {
    double at = end_length_;
    for (int j = end_, k = done_; k >= 0; --k) {
        const Reached& r = reached_[k];
        if (r.level - (m_.entry(r.row, j) - m_.v[j]) != at) continue;
        take(r.row, j);
        j = r.column;
        at = k == 0 ? 0 : length_[j];
    }
    tight_[end_] = m_.entry(m_.owner[end_], end_) - m_.v[end_];
    for (int k = 1; k <= done_; ++k) {
        const int j = reached_[k].column;
        m_.v[j] += end_length_ - length_[j];
        tight_[j] = m_.entry(m_.owner[j], j) - m_.v[j];
    }
}

// Rows on their columns, as far as bidding goes.
template <class T>
Status SmallSolver<T>::begin(bool trusted, const double* start) {
    if (start != nullptr) return SmallStart<T, double>(m_).from_prices(trusted, start);
    const Status status = SmallStart<T, T>(m_).from_nothing(trusted);
    const bool wider = sizeof(T) < 8 && status == Status::not_converged;
    return wider ? SmallStart<T, double>(m_).from_nothing(trusted) : status;
}

template <class T>
Status SmallSolver<T>::solve(const T* s, int64_t stride, bool trusted, const double* start, int64_t* indices, double* u,
                             double* v, Outcome* outcome) {
    const int n = m_.n;
    m_.s = s;
    m_.stride = stride;
    for (int j = n; j < padded(n); ++j) m_.v[j] = key_[j] = kFar;
    const Status status = begin(trusted, start);
    if (status != Status::ok) return status;
    for (int j = 0; j < n; ++j) {
        if (m_.is_open(j)) continue;
        row_of_[j] = m_.row(m_.owner[j]);
        tight_[j] = m_.entry(m_.owner[j], j) - m_.v[j];
    }
    MUDSC_STAT(stat_free0 += m_.free_count);
    for (int f = 0; f < m_.free_count; ++f) {
        if (!augment(m_.free[f])) return Status::not_converged;
    }
    *outcome = Outcome{};
    for (int j = 0; j < n; ++j) indices[m_.owner[j]] = j;
    for (int i = 0; i < n; ++i) {
        const int64_t j = indices[i];
        v[i] = m_.v[i];
        u[i] = largest_reduced(m_, i, m_.v);
        outcome->add(m_.entry(i, static_cast<int>(j)), u[i], v[i], m_.v[j]);
    }
    return Status::ok;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
