// Shortest augmenting paths: joins one more row to a column that nobody owns, over reduced costs u_i + v_j - s_ij, so
// that the matching stays the best for the rows it has. On the rows' lists first; a row is read on only when the search
// reaches the length at which its list may miss a column.
#pragma once

#include "cpu/kernels/assign_heap.h"
#include "cpu/kernels/assign_market.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

template <class T>
class Paths {
  public:
    void carve(Carver& memory, int n);
    void begin(int n);
    // not_converged: no path of finite length, because prices left the range of float64.
    Status augment(Market<T>& market, int source);

  private:
    Status augment_on_lists(int source, bool* given_up);
    Status augment_in_full(int source);
    void relax(int i, int j, double s, double length);
    void expand(int i);
    void expand_in_full(int i);
    void read_on(int i);
    void finish_path(int source);
    void forget_path();
    bool too_slow() const;

    Market<T>* m_ = nullptr;
    int n_ = 0;
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

template <class T>
void Paths<T>::carve(Carver& memory, int n) {
    memory.take(&length_, n);
    memory.take(&from_, padded(n));
    memory.take(&from_s_, n);
    memory.take(&done_, n);
    memory.take(&touched_, n);
    memory.take(&ready_, n);
    memory.take(&level_, n);
    memory.take(&remade_, n);
    memory.take(&reach_, padded(n));
    memory.take(&reach32_, sizeof(T) == 4 ? padded(n) : 0);
    memory.take(&key_, padded(n));
    heap_.carve(memory, 2 * static_cast<int64_t>(n));
}

template <class T>
void Paths<T>::begin(int n) {
    n_ = n;
    search_ = given_up_ = 0;
    for (int j = 0; j < n; ++j) {
        length_[j] = kFar;
        done_[j] = 0;
        remade_[j] = 0;
    }
    for (int j = n; j < padded(n); ++j) {
        key_[j] = reach_[j] = kFar;
        if (sizeof(T) == 4) reach32_[j] = static_cast<T>(kFar);
    }
}

// Row i reaches column j by a path of this length, below end_.
template <class T>
inline void Paths<T>::relax(int i, int j, double s, double length) {
    if (length < now_) length = now_;
    if (!(length < length_[j]) || done_[j] != 0) return;
    from_[j] = i;
    from_s_[j] = s;
    if (m_->owner(j) < 0) {
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
    if (m_->wide()) {
        reach_[j] = m_->price(j) - length;
    } else {
        reach32_[j] = static_cast<T>(m_->price(j) - length);
    }
}

template <class T>
void Paths<T>::expand(int i) {
    const Entry<T>* e = m_->list(i);
    const int count = m_->state(i).count;
    const double level = level_[i];
    for (int k = 0; k < count; ++k) {
        if (level - e[k].key >= end_) break;
        MUDSC_STAT(++stat_entries);
        const double s = static_cast<double>(e[k].s), length = level - (s - m_->price(e[k].column));
        if (length < end_) relax(i, e[k].column, s, length);
    }
    const double bound = level - m_->state(i).threshold;
    if (bound < end_) heap_.push(bound > now_ ? bound : now_, n_ + i);
}

template <class T>
void Paths<T>::expand_in_full(int i) {
    MUDSC_STAT(++stat_dense);
    const T* s = m_->row(i);
    const double level = level_[i];
    if (end_ == kFar) {
        for (int k = 0; k < m_->open_count(); ++k) {
            const int j = m_->open_column(k);
            const double entry = static_cast<double>(s[j]), length = level - (entry - m_->price(j));
            if (length < end_) relax(i, j, entry, length);
        }
    }
    if (!reach_valid_ || reach_end_ != end_) {
        reach_largest_ = m_->largest_price() + fabs(end_);
        for (int j = 0; j < n_; ++j) reach_[j] = m_->price(j) - (length_[j] < end_ ? length_[j] : end_);
        if (!m_->wide()) {
            for (int j = 0; j < n_; ++j) reach32_[j] = static_cast<T>(reach_[j]);
        }
        reach_valid_ = true;
        reach_end_ = end_;
    }
    int found;
    if (m_->wide()) {
        const double least = level - 0x1p-50 * (fabs(level) + reach_largest_);
        found = columns_above<true>(s, reach_, n_, least, 0, n_, m_->scratch().columns);
    } else {
        const double least = level - 0x1p-22 * (fabs(level) + reach_largest_) - 0x1p-140;
        found = columns_above<true>(s, reach32_, n_, static_cast<T>(least), 0, n_, m_->scratch().columns);
    }
    for (int k = 0; k < found; ++k) {
        const int j = m_->scratch().columns[k];
        const double entry = static_cast<double>(s[j]), length = level - (entry - m_->price(j));
        if (length < end_) relax(i, j, entry, length);
    }
}

// The path has come to where row i's list may miss columns: a new list at the present prices, or the whole row.
template <class T>
void Paths<T>::read_on(int i) {
    ++reads_;
    if (remade_[i] != search_ && reads_ * 4 < pops_ + 32) {
        remade_[i] = search_;
        m_->remake_list(i);
        expand(i);
    } else {
        expand_in_full(i);
    }
}

// Whether a search over full rows would have cost less so far: nanoseconds of either, measured roughly. It wins where
// paths are long and every row improves most columns, as in s_ij = i * j.
template <class T>
bool Paths<T>::too_slow() const {
    const int64_t n = n_;
    return reads_ * n / 8 + shortened_ * 8 > (pops_ + 64) * n / 2;
}

template <class T>
Status Paths<T>::augment_on_lists(int source, bool* given_up) {
    ++search_;
    heap_.clear();
    touched_count_ = ready_count_ = 0;
    pops_ = reads_ = 0;
    shortened_ = 0;
    now_ = 0;
    end_ = kFar;
    end_column_ = -1;
    reach_valid_ = false;
    level_[source] = m_->best_of(source).first;
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
            if (m_->stopped()) return Status::interrupted;
            if (too_slow()) {
                forget_path();
                *given_up = true;
                return Status::ok;
            }
        }
        const int i = m_->owner(j);
        level_[i] = length_[j] + (m_->taken(i) - m_->price(j));
        expand(i);
    }
    *given_up = false;
    if (end_column_ < 0) return Status::not_converged;
    finish_path(source);
    return Status::ok;
}

template <class T>
Status Paths<T>::augment_in_full(int source) {
    const int n = n_;
    double* price = reach_;
    for (int j = 0; j < n; ++j) {
        price[j] = m_->price(j);
        key_[j] = kFar;
    }
    int i = source;
    level_[i] = 0;
    for (;;) {
        if ((++pops_ & 63) == 0 && m_->stopped()) return Status::interrupted;
        MUDSC_STAT(++stat_dense);
        const double least = shorten(m_->row(i), price, n, level_[i], i, key_, from_);
        if (!(least < kFar)) return Status::not_converged;
        const int j = position_of(least, key_);
        if (m_->owner(j) < 0) {
            end_ = least;
            end_column_ = j;
            break;
        }
        touched_[touched_count_++] = j;
        done_[j] = 1;
        length_[j] = least;
        key_[j] = price[j] = kFar;
        i = m_->owner(j);
        level_[i] = least + (m_->taken(i) - m_->price(j));
    }
    for (int j = end_column_;;) {
        from_s_[j] = static_cast<double>(m_->row(from_[j])[j]);
        if (from_[j] == source) break;
        j = m_->column_of(from_[j]);
    }
    finish_path(source);
    return Status::ok;
}

template <class T>
Status Paths<T>::augment(Market<T>& market, int source) {
    m_ = &market;
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
void Paths<T>::forget_path() {
    for (int k = 0; k < touched_count_; ++k) {
        length_[touched_[k]] = kFar;
        done_[touched_[k]] = 0;
    }
    touched_count_ = 0;
}

template <class T>
void Paths<T>::finish_path(int source) {
    for (int k = 0; k < touched_count_; ++k) {
        const int j = touched_[k];
        if (done_[j] != 0 && length_[j] < end_) m_->raise(j, end_ - length_[j]);
    }
    forget_path();
    for (int j = end_column_;;) {
        const int i = from_[j], before = m_->column_of(i);
        m_->take(i, j, from_s_[j]);
        if (i == source) break;
        j = before;
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
