// The decoder of cpu/decode.h for Python. Part of `chargpt._native`.

#include "../cpu/decode.h"

#include <pybind11/stl.h>

#include "common.h"

namespace chargpt::bindings {
namespace {

// A dict of Python's with the model: numbers, texts, and tensors (contiguous, float32, on the CPU), some of them None.
class Fields {
 public:
  Fields(const py::dict& fields, std::vector<Tensor>* kept) : fields_(fields), kept_(kept) {}

  template <class T>
  T get(const char* name) const {
    return fields_[name].cast<T>();
  }
  const float* tensor(const char* name) const { return tensor(fields_[name]); }
  const float* tensor(const py::handle& value) const {
    if (value.is_none()) return nullptr;
    kept_->push_back(value.cast<Tensor>());
    return kept_->back().const_data_ptr<float>();
  }
  cpu::Gain gain(const char* name) const {
    const auto pair = fields_[name].cast<py::tuple>();
    return {tensor(pair[0]), tensor(pair[1])};
  }
  cpu::Linear linear(const char* name, cpu::Precision precision) const {
    const auto pair = fields_[name].cast<py::tuple>();
    const Tensor weight = pair[0].cast<Tensor>();
    const std::optional<Tensor> bias = pair[1].cast<std::optional<Tensor>>();
    return {weight.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr, weight.size(0),
            weight.size(1), precision};
  }

 private:
  const py::dict& fields_;
  std::vector<Tensor>* kept_;
};

class PyDecoder {
 public:
  PyDecoder(const py::dict& given, int64_t slots, int threads) {
    const Fields fields(given, &kept_);
    const auto precision = static_cast<cpu::Precision>(fields.get<int>("precision"));
    cpu::DecodeModel model{.precision = precision,
                           .V = fields.get<int64_t>("V"),
                           .block_size = fields.get<int64_t>("block_size"),
                           .C = fields.get<int64_t>("C"),
                           .H = fields.get<int64_t>("H"),
                           .H_kv = fields.get<int64_t>("H_kv"),
                           .D = fields.get<int64_t>("D"),
                           .hidden = fields.get<int64_t>("hidden"),
                           .norm = static_cast<cpu::Norm>(fields.get<int>("norm")),
                           .activation = static_cast<cpu::Activation>(fields.get<int>("activation")),
                           .qk_norm = fields.get<bool>("qk_norm"),
                           .softcap = fields.get<float>("softcap"),
                           .token_embedding = fields.tensor("token_embedding"),
                           .bigram_embedding = fields.tensor("bigram_embedding"),
                           .bigram_rows = fields.get<int64_t>("bigram_rows"),
                           .position_embedding = fields.tensor("position_embedding"),
                           .cos = fields.tensor("cos"),
                           .sin = fields.tensor("sin"),
                           .layers = {},
                           .last_norm = fields.gain("norm_gain"),
                           .head = fields.linear("head", precision)};
    for (const auto& item : given["layers"].cast<py::list>()) {
      const auto part = item.cast<py::dict>();
      const Fields layer(part, &kept_);
      cpu::DecodeLayer made{.attention_norm = layer.gain("attention_norm"),
                            .mlp_norm = layer.gain("mlp_norm"),
                            .qkv = layer.linear("qkv", precision),
                            .projection = layer.linear("projection", precision),
                            .expand = {},
                            .contract = {},
                            .value_embedding = layer.tensor("value_embedding")};
      if (model.activation != cpu::Activation::kNone) {
        made.expand = layer.linear("expand", precision);
        made.contract = layer.linear("contract", precision);
      }
      model.layers.push_back(std::move(made));
    }
    const py::gil_scoped_release nogil;
    decoder_ = std::make_unique<cpu::Decoder>(std::move(model), slots, threads);
  }

  bool apart(int threads) const { return cpu::apart(static_cast<int64_t>(decoder_->running().size()), threads); }
  std::vector<int64_t> running() const { return decoder_->running(); }

  void begin(int64_t slot, std::vector<int32_t> window, uint64_t seed, uint32_t sample, int64_t keep,
             double temperature, int64_t top_k, double top_p, double min_p, const std::optional<Tensor>& bias) {
    const auto& model = decoder_->model();
    check_slot(slot);
    const int64_t size = static_cast<int64_t>(window.size());
    if (size < 1 || size > model.block_size) throw py::value_error("a window has 1 to block_size tokens");
    for (int32_t token : window) check(token);
    if (keep < 1 || keep > model.block_size) throw py::value_error("keep is 1 to block_size tokens");
    if (bias && !(bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == at::kFloat &&
                  bias->numel() == model.V)) {
      throw py::value_error("bias is a contiguous float32 tensor (V) on the CPU");
    }
    cpu::StreamOptions options{
        .draw = {.temperature = temperature, .top_k = top_k, .top_p = top_p, .min_p = min_p},
        .bias = {},
        .seed = seed,
        .sample = sample,
        .keep = keep,
    };
    if (bias) options.bias.assign(bias->const_data_ptr<float>(), bias->const_data_ptr<float>() + model.V);
    decoder_->begin(slot, std::move(window), std::move(options));
  }

  void end(int64_t slot) {
    check_slot(slot);
    decoder_->end(slot);
  }

  Tensor read(int threads) {
    check_state(threads);
    const int64_t V = decoder_->model().V, streams = static_cast<int64_t>(decoder_->running().size());
    const Tensor logits = at::empty({streams, V}, at::TensorOptions().dtype(at::kFloat));
    const py::gil_scoped_release nogil;
    decoder_->read(threads);
    for (int64_t i = 0; i < streams; ++i) {
      std::copy_n(decoder_->logits() + i * cpu::padded(V), V, logits.data_ptr<float>() + i * V);
    }
    return logits;
  }

  void append(const std::vector<int32_t>& tokens) {
    if (tokens.size() != decoder_->running().size()) throw py::value_error("one token for each stream");
    for (int32_t token : tokens) check(token);
    for (size_t i = 0; i < tokens.size(); ++i) decoder_->append(decoder_->running()[i], tokens[i]);
  }

  std::optional<std::tuple<Tensor, Tensor, std::optional<Tensor>>> generate(int64_t count, int threads, bool with_logits) {
    check_state(threads);
    if (count < 0) throw py::value_error("count is at least 0");
    const int64_t V = decoder_->model().V, streams = static_cast<int64_t>(decoder_->running().size());
    const Tensor out = at::empty({count, streams}, at::TensorOptions().dtype(at::kLong));
    const Tensor logprobs = at::empty({count, streams}, at::TensorOptions().dtype(at::kFloat));
    std::optional<Tensor> logits;
    if (with_logits) logits = at::empty({count, streams, V}, at::TensorOptions().dtype(at::kFloat));
    {
      const py::gil_scoped_release nogil;
      if (!decoder_->generate(count, threads, out.data_ptr<int64_t>(), logprobs.data_ptr<float>(),
                              logits ? logits->data_ptr<float>() : nullptr)) {
        return std::nullopt;
      }
    }
    return std::tuple(out, logprobs, logits);
  }

 private:
  void check(int32_t token) const {
    if (token < 0 || token >= decoder_->model().V) throw py::value_error("a token outside the vocabulary");
  }
  void check_slot(int64_t slot) const {
    if (slot < 0 || slot >= decoder_->slots()) throw py::value_error("a slot that is not there");
  }
  void check_state(int threads) const {
    if (threads < 1 || threads > decoder_->most_threads()) throw py::value_error("more threads than it was made for");
    if (decoder_->running().empty()) throw py::value_error("no stream runs: begin one first");
    for (int64_t slot : decoder_->running()) {
      if (!decoder_->has_unread(slot)) throw py::value_error("nothing to read: append first");
    }
  }

  std::vector<Tensor> kept_;
  std::unique_ptr<cpu::Decoder> decoder_;
};

}  // namespace

void define_decode(py::module_& m) {
  py::class_<PyDecoder>(m, "Decoder", "A Transformer that reads and writes token by token; see chargpt/generation/native.py.")
      .def(py::init<const py::dict&, int64_t, int>(), py::arg("model"), py::arg("slots"), py::arg("most_threads"))
      .def("apart", &PyDecoder::apart, py::arg("threads"))
      .def("running", &PyDecoder::running)
      .def("begin", &PyDecoder::begin, py::arg("slot"), py::arg("window"), py::arg("seed"), py::arg("sample"),
           py::arg("keep"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("bias"))
      .def("end", &PyDecoder::end, py::arg("slot"))
      .def("read", &PyDecoder::read, py::arg("threads"))
      .def("append", &PyDecoder::append, py::arg("tokens"))
      .def("generate", &PyDecoder::generate, py::arg("count"), py::arg("threads"), py::arg("with_logits"));
}

}  // namespace chargpt::bindings
