// A guarded LLaVA (onnx-community layout, any of the six modes) in OpenVINO's C++ API: token ids and pixels in, token ids out.
//
//   guarded_vlm FOLDER IMAGE_TOKEN END_TOKEN LOGITS TEXT_IDS [IDS PIXELS]
//
// FOLDER       the guarded folder
// IMAGE_TOKEN  the id that stands for a feature of the picture; END_TOKEN ends an answer
// LOGITS       a file to write: float32 [tokens, vocabulary], what each token was chosen from
// TEXT_IDS     a file: the prompt as text only, int64
// IDS, PIXELS  files: the prompt with its image tokens, int64, and the vision encoder's pixel_values, float32
//
// Tokenizing and preparing pictures is the app's business, and no different from that of an unguarded model.
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <numeric>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tensors = std::map<std::string, ov::Tensor>;

const std::string kSupervisor = "vlmguard.supervisor";    // input of the modes supervise and combined, and of align:
const std::string kPromptSupervisor = "vlmguard.prompt_supervisor";
const std::string kCoordinates = "vlmguard.coordinates";  // what a text-only pass gave as this output
const std::string kPast = "past_key_values.", kPresent = "present.";
constexpr float kNoSupervisor = -1e30F;  // the supervisor of the text-only pass: no gate opens
constexpr std::size_t kLongest = 64;

// One graph, compiled for the CPU in float32: in bfloat16 a gate near its threshold may decide otherwise.
class Graph {
 public:
  Graph(ov::Core& core, const std::string& path)
      : model_(core.compile_model(path, "CPU", ov::hint::inference_precision(ov::element::f32))),
        request_(model_.create_infer_request()) {}

  // All outputs by name, copied: the next call reuses the request's memory, and a cache goes from one call into the next.
  Tensors Run(const Tensors& inputs) {
    for (const auto& [name, tensor] : inputs) request_.set_tensor(name, tensor);
    request_.infer();
    Tensors outputs;
    for (const auto& port : model_.outputs()) {
      const ov::Tensor given = request_.get_tensor(port);
      ov::Tensor copy(given.get_element_type(), given.get_shape());
      given.copy_to(copy);
      for (const auto& name : port.get_names()) outputs[name] = copy;
    }
    return outputs;
  }

  const ov::CompiledModel& model() const { return model_; }

 private:
  ov::CompiledModel model_;
  ov::InferRequest request_;
};

template <typename T>
std::vector<T> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<T> values(bytes.size() / sizeof(T));
  std::copy_n(bytes.data(), values.size() * sizeof(T), reinterpret_cast<char*>(values.data()));
  return values;
}

template <typename T>
ov::Tensor ToTensor(const std::vector<T>& values, const ov::Shape& shape) {
  ov::Tensor tensor(ov::element::from<T>(), shape);
  if (tensor.get_size() != values.size()) throw std::runtime_error("a file does not hold as many numbers as the model takes");
  std::copy(values.begin(), values.end(), tensor.data<T>());
  return tensor;
}

// What a call of the decoder leaves for the next one: the KV cache, and the supervisor where the mode has one.
Tensors EmptyState(const ov::CompiledModel& decoder) {
  Tensors state;
  for (const auto& port : decoder.inputs()) {
    const std::string name = port.get_any_name();
    const ov::PartialShape shape = port.get_partial_shape();
    if (name.rfind(kPast, 0) == 0) {  // [batch, heads, tokens so far, head size]
      const ov::Shape empty{1, static_cast<std::size_t>(shape[1].get_length()), 0, static_cast<std::size_t>(shape[3].get_length())};
      state[name] = ov::Tensor(ov::element::f32, empty);
    } else if (name == kSupervisor || name == kPromptSupervisor) {  // [batch, guarded layers, rank]
      const ov::Shape one{1, static_cast<std::size_t>(shape[1].get_length()), static_cast<std::size_t>(shape[2].get_length())};
      state[name] = ov::Tensor(ov::element::f32, one);
      std::fill_n(state[name].data<float>(), state[name].get_size(), kNoSupervisor);
    }
  }
  return state;
}

class GuardedVlm {
 public:
  GuardedVlm(const std::string& folder, std::int64_t image_token)
      : vision_(core_, folder + "/onnx/vision_encoder.onnx"),
        embeddings_(core_, folder + "/onnx/embed_tokens.onnx"),
        decoder_(core_, folder + "/onnx/decoder_model_merged.onnx"),
        image_token_(image_token) {}

  // The greedy answer, and the logits of each token, one row behind the other.
  std::vector<std::int64_t> Answer(const std::vector<std::int64_t>& text_ids, const std::vector<std::int64_t>& ids,
                                   const std::vector<float>& pixels, std::int64_t end_token, std::vector<float>& logits) {
    Tensors state = EmptyState(decoder_.model());
    const ov::Tensor silence = state.count(kPromptSupervisor) != 0 ? state[kPromptSupervisor] : ov::Tensor();
    for (const auto& guard : {kSupervisor, kPromptSupervisor}) {  // first the text alone, then the prompt with its picture
      if (state.count(guard) == 0) continue;
      Tensors text_state = state;
      state[guard] = Run(text_ids, {}, text_state).at(kCoordinates);
    }
    const std::vector<float> features = pixels.empty() ? std::vector<float>{} : Look(pixels);
    std::vector<std::int64_t> tokens;
    Tensors outputs = Run(ids, features, state);
    if (silence) state[kPromptSupervisor] = silence;  // align: no token of the answer is edited
    for (;;) {
      const ov::Tensor all = outputs.at("logits");  // [1, tokens, vocabulary]
      const std::size_t vocabulary = all.get_shape()[2];
      const float* end = all.data<float>() + all.get_size();
      logits.insert(logits.end(), end - vocabulary, end);
      tokens.push_back(std::max_element(end - vocabulary, end) - (end - vocabulary));
      if (tokens.back() == end_token || tokens.size() == kLongest) return tokens;
      outputs = Run({tokens.back()}, {}, state);
    }
  }

 private:
  std::vector<float> Look(const std::vector<float>& pixels) {
    const auto port = vision_.model().input();
    ov::PartialShape shape = port.get_partial_shape();
    shape[0] = 1;
    const ov::Tensor seen = vision_.Run({{port.get_any_name(), ToTensor(pixels, shape.to_shape())}}).begin()->second;
    return {seen.data<float>(), seen.data<float>() + seen.get_size()};
  }

  // The prompt, or one more token; `state` then holds what it added to the cache.
  Tensors Run(const std::vector<std::int64_t>& ids, const std::vector<float>& features, Tensors& state) {
    ov::Tensor embeds = embeddings_.Run({{"input_ids", ToTensor(ids, {1, ids.size()})}}).begin()->second;
    const std::size_t width = embeds.get_shape()[2];
    auto feature = features.begin();
    for (std::size_t at = 0; at < ids.size(); ++at) {
      if (ids[at] != image_token_) continue;
      if (features.end() - feature < static_cast<std::ptrdiff_t>(width)) throw std::runtime_error("more image tokens than features");
      std::copy_n(feature, width, embeds.data<float>() + at * width);
      feature += width;
    }
    if (feature != features.end()) throw std::runtime_error("more features than image tokens");
    const std::size_t past = state.at(kPast + "0.key").get_shape()[2], length = past + ids.size();
    std::vector<std::int64_t> positions(ids.size());
    std::iota(positions.begin(), positions.end(), past);
    Tensors inputs = state;
    inputs["inputs_embeds"] = embeds;
    inputs["attention_mask"] = ToTensor(std::vector<std::int64_t>(length, 1), {1, length});
    inputs["position_ids"] = ToTensor(positions, {1, ids.size()});
    Tensors outputs = decoder_.Run(inputs);
    for (auto& [name, tensor] : state) {
      if (name.rfind(kPast, 0) == 0) tensor = outputs.at(kPresent + name.substr(kPast.size()));
    }
    return outputs;
  }

  ov::Core core_;
  Graph vision_, embeddings_, decoder_;
  std::int64_t image_token_;
};

}  // namespace

int main(int count, char** words) try {
  if (count != 6 && count != 8) throw std::runtime_error("usage: guarded_vlm FOLDER IMAGE_TOKEN END_TOKEN LOGITS TEXT_IDS [IDS PIXELS]");
  const auto text_ids = ReadFile<std::int64_t>(words[5]);
  const auto ids = count == 8 ? ReadFile<std::int64_t>(words[6]) : text_ids;
  const auto pixels = count == 8 ? ReadFile<float>(words[7]) : std::vector<float>{};
  std::vector<float> logits;
  GuardedVlm vlm(words[1], std::stoll(words[2]));
  for (const auto token : vlm.Answer(text_ids, ids, pixels, std::stoll(words[3]), logits)) std::cout << token << ' ';
  std::cout << std::endl;
  std::ofstream(words[4], std::ios::binary).write(reinterpret_cast<const char*>(logits.data()), logits.size() * sizeof(float));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
