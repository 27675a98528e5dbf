#include "layers/head.h"

namespace sparsecli {

namespace {

int64_t candidates_of_lane(const sparsecli_shape& shape) {
    return (shape.head_candidates + HEAD_LANES - 1) / HEAD_LANES;
}

// The tokens of a lane with the largest logits, `most` of them; of equal ones the first. Returns how many there are.
int64_t likeliest(const float* logits, int64_t vocabulary, int64_t lane, int64_t most, int32_t* found) {
    const auto better = [&](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    int64_t count = 0;  // of a heap whose top is the worst
    for (int64_t first = lane * LANES; first < vocabulary; first += HEAD_LANES * LANES) {
        const int64_t width = std::min(LANES, vocabulary - first);
        if (count == most) {
            const float least = logits[found[0]];
            int above = 0;
            for (int64_t i = 0; i < width; ++i) above += logits[first + i] > least;
            if (!above) continue;
        }
        for (int64_t token = first; token < first + width; ++token) {
            if (count == most) {
                if (!(logits[token] > logits[found[0]])) continue;
                std::pop_heap(found, found + count--, better);
            }
            found[count++] = int32_t(token);
            std::push_heap(found, found + count, better);
        }
    }
    return count;
}

}  // namespace

Head::Head(Workspace& space) {
    const int64_t width = space.model.merged_width();
    space.reads(width);
    space.for_tokens(normed_, width, true);
    space.for_workers(own_normed_, width, true);
    space.for_workers(own_candidates_, candidates_of_lane(space.shape), false);
}

void Head::begin(const std::vector<Token>& tokens) {
    asking_.clear();
    for (size_t t = 0; t < tokens.size(); ++t)
        if (tokens[t].logits) asking_.push_back(int64_t(t));
}

// Logits (M, vocabulary) lie one row after the other from those of the first token on.
void Head::run(Pass& pass) {
    if (!count()) return;
    const bool single = count() == 1;
    const sparsecli_shape& s = pass.shape;
    const Norm& norm = pass.model.norm;
    const Range rows = single ? Range{0, 1} : pass.mine(count(), 1);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        float* out = single ? own_normed_.row(pass.worker) : normed_.row(i);
        pass.ops.normalize(merged(pass, asking_[size_t(i)], out), values(norm.weight), values(norm.bias),
                           pass.model.merged_width(), s.rms, s.epsilon, out);
    }
    const Activations x = single ? pass.quantized(own_normed_) : pass.readable(normed_, count());
    float* out = pass.token(asking_[0]).logits;
    if (s.head_modules)
        multiplicative(pass, x, out);
    else
        dense(pass, x, out);
    if (s.logit_scale != 1 || s.logit_softcap) scale_and_cap(pass, out);
    pass.mark(HEAD);
}

void Head::scale_and_cap(Pass& pass, float* out) const {
    pass.barrier(HEAD);
    const float scale = float(pass.shape.logit_scale), limit = float(pass.shape.logit_softcap);
    const Range range = pass.mine(count() * pass.shape.vocabulary, LANES);
    for (int64_t i = range.begin; i < range.end; ++i) out[i] *= scale;
    if (limit) pass.ops.soft_cap(out + range.begin, range.end - range.begin, limit);
}

// What the last norm reads of a token: its stream, or both of them merged in `out`.
const float* Head::merged(const Pass& pass, int64_t t, float* out) const {
    const int64_t d = pass.shape.d_model;
    const float *a = pass.residual(t), *b = pass.read_stream(t);
    if (pass.shape.streams == 1) return a;
    for (int64_t i = 0; i < d; ++i) {
        out[i] = pass.shape.concatenate ? a[i] : (a[i] + b[i]) / 2;
        if (pass.shape.concatenate) out[d + i] = b[i];
    }
    return out;
}

void Head::multiplicative(Pass& pass, const Activations& x, float* out) {
    const Linear& head = pass.model.head;
    const Range panels = pass.mine((head.E.rows + PANEL - 1) / PANEL, 1);
    for (int64_t i = 0; i < count(); ++i)
        pass.multiply(head, x.values + i * x.stride, 0, pass.shape.head_modules, panels,
                      out + i * pass.shape.vocabulary);
}

void Head::dense(Pass& pass, const Activations& x, float* out) {
    const int64_t vocabulary = pass.shape.vocabulary;
    pass.linear(pass.model.head.weight, values(pass.model.head.bias), pass.mine(vocabulary, LANES), x, count(), out,
                vocabulary);
    if (!pass.shape.head_candidates) return;
    pass.barrier(HEAD);
    const Range lanes = pass.mine(count() * HEAD_LANES, 1);
    for (int64_t i = lanes.begin; i < lanes.end; ++i)
        rescore(pass, Pass::row_of(x, i / HEAD_LANES), i % HEAD_LANES, out + i / HEAD_LANES * vocabulary);
}

// Computes the largest logits of a lane again, with weights that were rounded less. Which ones depends on no thread.
void Head::rescore(Pass& pass, const Activations& x, int64_t lane, float* logits) {
    const Matrix& exact = pass.model.exact_head;
    int32_t* rows = own_candidates_.row(pass.worker);
    const int64_t count = likeliest(logits, pass.shape.vocabulary, lane, candidates_of_lane(pass.shape), rows);
    std::sort(rows, rows + count);  // they are read in this order
    const float* bias = values(pass.model.head.bias);
    if (!exact.by_rows) {
        for (int64_t i = 0; i < count; ++i)
            pass.linear(exact, bias, {rows[i], rows[i] + 1}, x, 1, logits, pass.shape.vocabulary);
        return;
    }
    pass.ops.gguf_row_dots(exact, rows, count, x, logits);
    for (int64_t i = 0; i < count && bias; ++i) logits[rows[i]] += bias[rows[i]];
}

}  // namespace sparsecli
