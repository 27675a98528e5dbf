#include "layers/head.h"

namespace sparsecli {

Head::Head(Workspace& space) {
    const int64_t width = space.model.merged_width();
    space.reads(width);
    space.for_tokens(normed_, width, true);
    space.for_workers(own_normed_, width, true);
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
    const Linear& head = pass.model.head;
    const int64_t vocabulary = pass.shape.vocabulary;
    const auto logits_of = [&](Range rows) {
        pass.linear(head.weight, values(head.bias), rows, x, count(), out, vocabulary);
    };
    if (!pass.model.exact_head.data) return logits_of(pass.mine(vocabulary, LANES));
    const Range lanes = pass.mine(HEAD_LANES, 1);
    for (int64_t lane = lanes.begin; lane < lanes.end; ++lane) {
        const Range rows = share(vocabulary, LANES, lane, HEAD_LANES);
        logits_of(rows);
        rescore(pass, x, rows, out);
    }
}

// Computes the largest logits of a part of the vocabulary again, with weights that were rounded less.
void Head::rescore(Pass& pass, const Activations& x, Range rows, float* out) {
    const int64_t vocabulary = pass.shape.vocabulary;
    for (int64_t i = 0; i < count(); ++i) {
        float* logits = out + i * vocabulary;
        int64_t best[CANDIDATES], found = 0;
        for (int64_t r = rows.begin; r < rows.end; ++r) {
            if (found == CANDIDATES && !(logits[r] > logits[best[found - 1]])) continue;
            int64_t at = found < CANDIDATES ? found++ : found - 1;
            for (; at > 0 && logits[r] > logits[best[at - 1]]; --at) best[at] = best[at - 1];
            best[at] = r;
        }
        for (int64_t j = 0; j < found; ++j)
            pass.linear(pass.model.exact_head, values(pass.model.head.bias), {best[j], best[j] + 1}, Pass::row_of(x, i),
                        1, logits, vocabulary);
    }
}

}  // namespace sparsecli
