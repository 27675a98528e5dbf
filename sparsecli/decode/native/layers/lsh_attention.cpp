// Attention among keys that hash alike: a token reads the rows of few keys and values, however many there are.
#include "layers/forward.h"

namespace sparsecli {

// Puts the key of a row into its buckets, from the cache, where it is as it will be read. While a token reads all keys
// none is hashed; the first row of a sequence in a pass makes up for earlier keys, all of them when the number of
// buckets has changed.
void Forward::hash_key(int64_t place, int64_t t, int64_t head, int64_t worker) {
    const Row& row = (*rows_)[size_t(t)];
    Sequence& text = *row.sequence;
    Hashed& hashed = text.hashed[size_t(place * shape_.heads + head)];
    const bool first = !t || (*rows_)[size_t(t - 1)].sequence != row.sequence;
    if (first) hashed.positions = std::min(hashed.positions, row.position);  // the text may have been cut
    if (text.newest < shape_.most_keys) return;
    const Axes& axes = model_.axes_of(place, text.newest);
    int64_t position = row.position;
    if (first) {
        position = hashed.buckets == axes.buckets ? hashed.positions : 0;
        hashed = {text.newest + 1, axes.buckets};
    }
    const HeadCache cache = head_cache(text.own, place, head);
    const int64_t width = shape_.head_width, bytes = sizes_.value_stride * type_bytes(shape_.cache_type);
    const int64_t stride = text.own.positions, rounds = shape_.hash_rounds;
    int32_t* buckets = text.buckets.data + (place * shape_.heads + head) * rounds * stride;
    float key[MAX_HEAD_WIDTH];
    for (; position <= row.position; ++position) {
        const float* scale = cache.key_scales ? cache.key_scales + position : nullptr;
        k_.widen((const char*)cache.keys + position * bytes, scale, shape_.cache_type, width, key);
        k_.hash(key, width, axes.data + head * width * axes.columns, axes.columns, axes.factors.data(),
                int64_t(axes.factors.size()), rounds, (float*)workers_[size_t(worker)].scratch.row(0),
                buckets + position, stride);
    }
}

// The keys that a row's head reads, in order; returns how many. Those that hash as it does come first, then the most
// recent ones. The row's own key is one of them; it counts for nothing unless it is alone, and is left out otherwise.
int64_t Forward::choose_keys(const Row& row, int64_t place, int64_t head, int32_t* chosen) const {
    const int64_t position = row.position, most = shape_.most_keys - 1;
    if (position == 0 || most == 0) {
        chosen[0] = int32_t(position);
        return 1;
    }
    int64_t found = 0, recent = 0;  // the first position of those that are all read
    if (position > most) {
        const int64_t stride = row.sequence->own.positions, rounds = shape_.hash_rounds;
        const int32_t* buckets = row.sequence->buckets.data + (place * shape_.heads + head) * rounds * stride;
        found = k_.find_alike(buckets, stride, rounds, position, chosen);
        if (found >= most) {
            std::memmove(chosen, chosen + found - most, size_t(most) * sizeof(int32_t));
            return most;
        }
        recent = position;
        for (int64_t others = most - found; others;) {
            --recent;
            if (found && chosen[found - 1] == recent)
                --found;
            else
                --others;
        }
    }
    for (int64_t other = recent; other < position; ++other) chosen[found++] = int32_t(other);
    return found;
}

void Forward::attend_alike(int64_t place, int64_t worker) {
    Worker& own = workers_[size_t(worker)];
    const int64_t width = shape_.head_width, filled = sizes_.value_stride;
    each(shape_.heads, worker, [&](int64_t t, int64_t begin, int64_t end) {
        const Row& row = (*rows_)[size_t(t)];
        for (int64_t head = begin; head < end; ++head) {
            float query[MAX_HEAD_WIDTH], mixed[MAX_HEAD_WIDTH];
            std::memcpy(query, q_.row(t) + head * width, size_t(width) * sizeof(float));
            std::fill(query + width, query + filled, 0.0f);
            const int64_t count = choose_keys(row, place, head, own.chosen.row(0));
            k_.attend_chosen(query, own.chosen.row(0), count, shape_.cache_type, width,
                             head_cache(row.sequence->own, place, head), filled, own.scores.row(0), mixed);
            deliver(mixed, t, head, shape_.output == NO_OUTPUT, worker);
        }
    });
}

}  // namespace sparsecli
