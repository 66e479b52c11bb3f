// hexad._native: checks arguments, releases the GIL, calls. No arithmetic here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu_features.h"
#include "formats/pack.h"
#include "gguf_strings.h"
#include "probe.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using hexad::Program;

namespace {

template <class T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// sources: for each weight its bytes, uint8 [n], or (file, start, order): a file's descriptor, where in it they begin,
// and None or which of its rows each row is, int64 [rows].
void pack(Program& p, const nb::list& sources) {
  std::vector<hexad::Source> list;
  for (nb::handle source : sources) {
    if (nb::isinstance<nb::tuple>(source)) {
      const auto [file, start, order] =
          nb::cast<std::tuple<int, int64_t, std::optional<In<int64_t, 1>>>>(source, false);
      list.push_back({nullptr, 0, file, start, order ? order->data() : nullptr,
                      order ? static_cast<int64_t>(order->shape(0)) : 0});
    } else {
      const auto data = nb::cast<In<uint8_t, 1>>(source, false);
      list.push_back({data.data(), static_cast<int64_t>(data.shape(0)), -1, 0, nullptr, 0});
    }
  }
  nb::gil_scoped_release release;
  p.pack(list);
}

bool forward(Program& p, In<int32_t, 1> tokens, In<int32_t, 1> row_starts, In<int32_t, 1> starts,
             In<int32_t, 2> block_tables, In<int32_t, 1> sample_rows, int64_t optional_rows,
             double expected_seconds) {
  require(row_starts.shape(0) == starts.shape(0) + 1 && block_tables.shape(0) == starts.shape(0),
          "row_starts, starts and block_tables disagree about the number of sequences");
  const hexad::BatchView batch{tokens.data(),
                               static_cast<int64_t>(tokens.shape(0)),
                               row_starts.data(),
                               starts.data(),
                               static_cast<int64_t>(starts.shape(0)),
                               block_tables.data(),
                               static_cast<int64_t>(block_tables.shape(1)),
                               sample_rows.data(),
                               static_cast<int64_t>(sample_rows.shape(0)),
                               static_cast<int64_t>(tokens.shape(0)) - optional_rows,
                               expected_seconds};
  nb::gil_scoped_release release;
  return p.forward(batch);
}

void logits(Program& p, Out<float, 2> out) {
  require(static_cast<int64_t>(out.shape(1)) == p.vocab(), "the output is not as wide as the vocabulary");
  nb::gil_scoped_release release;
  p.logits(out.data(), static_cast<int64_t>(out.shape(0)));
}

void hidden(Program& p, Out<float, 2> out) {
  require(static_cast<int64_t>(out.shape(1)) == p.hidden_size(), "the output is not as wide as the model");
  nb::gil_scoped_release release;
  p.hidden(out.data(), static_cast<int64_t>(out.shape(0)));
}

hexad::Ragged<int32_t> ragged(In<int32_t, 1> tokens, In<int64_t, 1> starts, size_t rows) {
  require(starts.shape(0) == rows + 1, "the starts of a ragged array and the rows differ in number");
  return {tokens.data(), starts.data(), static_cast<int64_t>(tokens.shape(0))};
}

// An array of structs, which nb::ndarray does not know.
class Structs {
 public:
  Structs(nb::handle array, size_t bytes, const char* otherwise) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_ND)) throw nb::python_error();
    if (view_.ndim == 1 && view_.itemsize == static_cast<Py_ssize_t>(bytes)) return;
    PyBuffer_Release(&view_);
    throw std::invalid_argument(otherwise);
  }
  Structs(const Structs&) = delete;
  Structs& operator=(const Structs&) = delete;
  ~Structs() { PyBuffer_Release(&view_); }
  const void* data() const { return view_.buf; }
  size_t size() const { return static_cast<size_t>(view_.shape[0]); }

 private:
  Py_buffer view_;
};

void sample(Program& p, nb::handle structs, In<int32_t, 1> history, In<int64_t, 1> history_starts,
            In<int32_t, 1> bias_ids, In<float, 1> bias_values, In<int64_t, 1> bias_starts,
            In<int32_t, 1> ask_ids, In<int64_t, 1> ask_starts, In<uint32_t, 2> masks, Out<int32_t, 1> tokens,
            Out<float, 1> mirostat_mu, Out<float, 1> logprobs, Out<int32_t, 1> ranks, Out<int32_t, 2> top_ids,
            Out<float, 2> top_logprobs, Out<float, 1> ask_logprobs, Out<int32_t, 1> ask_ranks) {
  const Structs rows(structs, sizeof(hexad::SampleRow),
                     "a sample row has another size than the native struct");
  const size_t n = rows.size();
  require(tokens.shape(0) == n && mirostat_mu.shape(0) == n && logprobs.shape(0) == n &&
              ranks.shape(0) == n && top_ids.shape(0) == n && top_logprobs.shape(0) == n,
          "sampling parameters and output differ in length");
  require(top_ids.shape(1) == top_logprobs.shape(1) && bias_values.shape(0) == bias_ids.shape(0) &&
              ask_logprobs.shape(0) == ask_ids.shape(0) && ask_ranks.shape(0) == ask_ids.shape(0),
          "arrays that belong together differ in length");
  std::vector<hexad::SampleRow> params(n);
  std::memcpy(static_cast<void*>(params.data()), rows.data(), n * sizeof(hexad::SampleRow));
  const hexad::SampleBatch wanted{params.data(),
                                  static_cast<int64_t>(n),
                                  ragged(history, history_starts, n),
                                  ragged(bias_ids, bias_starts, n),
                                  bias_values.data(),
                                  ragged(ask_ids, ask_starts, n),
                                  masks.data(),
                                  static_cast<int64_t>(masks.shape(0)),
                                  static_cast<int64_t>(masks.shape(1))};
  const hexad::SampleOutput output{tokens.data(),
                                   mirostat_mu.data(),
                                   logprobs.data(),
                                   ranks.data(),
                                   top_ids.data(),
                                   top_logprobs.data(),
                                   static_cast<int64_t>(top_ids.shape(1)),
                                   ask_logprobs.data(),
                                   ask_ranks.data()};
  nb::gil_scoped_release release;
  p.sample(wanted, output);
}

void copy_blocks(Program& p, In<int64_t, 2> pairs) {
  require(pairs.shape(1) == 2, "copies are pairs of blocks");
  nb::gil_scoped_release release;
  p.copy_blocks(pairs.data(), static_cast<int64_t>(pairs.shape(0)));
}

hexad::KvDtype kv_dtype_of(const std::string& name) {
  if (name == "f32") return hexad::KvDtype::kF32;
  if (name == "f16") return hexad::KvDtype::kF16;
  if (name == "q8") return hexad::KvDtype::kQ8;
  throw std::invalid_argument("no type of KV cache is named '" + name + "'");
}

hexad::Epilogue epilogue_of(const std::string& name) {
  if (name == "store") return hexad::Epilogue::kStore;
  if (name == "add") return hexad::Epilogue::kAdd;
  if (name == "gated") return hexad::Epilogue::kGated;
  throw std::invalid_argument("no epilogue is named '" + name + "'");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The native CPU core: compiled programs and hardware probes.";

  // As Python's own functions on descriptors do: OSError with the descriptor for a file's name.
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const hexad::ReadError& e) {
      const nb::tuple args = nb::make_tuple(e.reason, e.what(), e.file);
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });

  m.def("isas", &hexad::supported_isas, "ISAs this build has and this machine supports, best first.");
  m.def(
      "isa", [] { return std::string(hexad::kernels_for("").isa); },
      "The ISA in use; HEXAD_ISA forces a lower one.");
  m.def(
      "layout_of",
      [](const std::string& stored) {
        const hexad::Stored& type = hexad::stored_of(stored);
        return std::make_tuple(type.layout_name, type.block_columns, type.packed_bytes);
      },
      "stored"_a, "A stored type's packed layout: its name, columns per block, bytes of 32 rows' block.");
  m.def(
      "probe_bandwidth",
      [](int threads) {
        nb::gil_scoped_release release;
        return hexad::probe_bandwidth(hexad::kernels_for(""), threads);
      },
      "threads"_a, "Bytes per second `threads` threads together read from memory.");
  m.def(
      "probe_int8",
      [](int threads) {
        nb::gil_scoped_release release;
        return hexad::probe_int8(hexad::kernels_for(""), threads);
      },
      "threads"_a, "int8 multiply-adds per second `threads` threads together reach.");

  m.def("trim_heap", &hexad::trim_heap, nb::call_guard<nb::gil_scoped_release>(),
        "Gives back to the system what malloc holds of memory that was freed.");
  m.def("end_of_strings", &hexad::end_of_strings, "buffer"_a, "start"_a, "count"_a,
        "Where this many of GGUF's strings end; -1 where they run past the end of the buffer.");
  m.def("strings", &hexad::strings, "buffer"_a, "start"_a, "count"_a,
        "These strings of GGUF's, or the first of them, up to one that is not UTF-8 or not whole.");

  nb::class_<Program>(m, "Program",
                      "A compiled graph with its packed weights and KV cache; see csrc/program.h.")
      .def(
          "__init__",
          [](Program* self, const std::string& isa, int threads, bool quantised, const std::string& kv_dtype,
             int64_t max_rows, int64_t max_seqs, int64_t kv_blocks, std::vector<std::vector<int>> cpus) {
            new (self) Program(hexad::Options{isa, threads, std::move(cpus), quantised, kv_dtype_of(kv_dtype),
                                              max_rows, max_seqs, kv_blocks});
          },
          nb::kw_only(), "isa"_a, "threads"_a, "quantised"_a, "kv_dtype"_a, "max_rows"_a, "max_seqs"_a,
          "kv_blocks"_a, "cpus"_a = std::vector<std::vector<int>>{})
      .def("add_weight", &Program::add_weight, "stored"_a, "rows"_a, "columns"_a)
      .def(
          "add_vector",
          [](Program& p, In<float, 1> values) {
            return p.add_vector(values.data(), static_cast<int64_t>(values.shape(0)));
          },
          "values"_a.noconvert())
      .def("add_buffer", &Program::add_buffer, "features"_a)
      .def(
          "add_rope",
          [](Program& p, In<float, 1> inv_freq, float magnitude) {
            return p.add_rope(inv_freq.data(), static_cast<int64_t>(inv_freq.shape(0)), magnitude);
          },
          "inv_freq"_a.noconvert(), "magnitude"_a)
      .def("set_cache", &Program::set_cache, "layers"_a, "kv_heads"_a, "head_dim"_a)
      .def("op_embed", &Program::op_embed, "weight"_a, "out"_a)
      .def("op_norm", &Program::op_norm, "x"_a, "weight"_a, "eps"_a, "heads"_a, "out"_a)
      .def(
          "op_linear",
          [](Program& p, int x, int norm, float eps, const std::vector<std::tuple<int, int>>& projections,
             const std::string& epilogue, int residual, int out) {
            std::vector<hexad::Projection> list;
            for (const auto& [weight, bias] : projections) list.push_back({weight, bias});
            p.op_linear(x, norm, eps, std::move(list), epilogue_of(epilogue), residual, out);
          },
          "x"_a, "norm"_a, "eps"_a, "projections"_a, "epilogue"_a, "residual"_a, "out"_a)
      .def("op_rope", &Program::op_rope, "x"_a, "rope"_a, "head_dim"_a, "out"_a)
      .def("op_gated", &Program::op_gated, "gate"_a, "up"_a, "out"_a)
      .def("op_add", &Program::op_add, "a"_a, "b"_a, "out"_a)
      .def("op_attention", &Program::op_attention, "q"_a, "q_column"_a, "k"_a, "k_column"_a, "v"_a,
           "v_column"_a, "rope"_a, "q_norm"_a, "k_norm"_a, "norm_eps"_a, "layer"_a, "heads"_a, "kv_heads"_a,
           "head_dim"_a, "scale"_a, "window"_a, "out"_a)
      .def("op_take_rows", &Program::op_take_rows, "x"_a, "out"_a)
      .def("op_logits", &Program::op_logits, "x"_a, "norm"_a, "eps"_a, "weight"_a)
      .def("seal", &Program::seal)
      .def("pack", &pack, "sources"_a)
      .def("prefault", &Program::prefault, nb::call_guard<nb::gil_scoped_release>())
      .def("forward", &forward, "tokens"_a.noconvert(), "row_starts"_a.noconvert(), "starts"_a.noconvert(),
           "block_tables"_a.noconvert(), "sample_rows"_a.noconvert(), "optional_rows"_a = 0,
           "expected_seconds"_a = 0.0)
      .def("logits", &logits, "out"_a.noconvert())
      .def("hidden", &hidden, "out"_a.noconvert())
      .def("sample", &sample, "rows"_a, "history"_a.noconvert(), "history_starts"_a.noconvert(),
           "bias_ids"_a.noconvert(), "bias_values"_a.noconvert(), "bias_starts"_a.noconvert(),
           "ask_ids"_a.noconvert(), "ask_starts"_a.noconvert(), "masks"_a.noconvert(), "tokens"_a.noconvert(),
           "mirostat_mu"_a.noconvert(), "logprobs"_a.noconvert(), "ranks"_a.noconvert(),
           "top_ids"_a.noconvert(), "top_logprobs"_a.noconvert(), "ask_logprobs"_a.noconvert(),
           "ask_ranks"_a.noconvert())
      .def("copy_blocks", &copy_blocks, "pairs"_a.noconvert())
      .def(
          "profile",
          [](Program& p) {
            std::vector<std::tuple<int64_t, int64_t, double, double>> times;
            for (const hexad::OpTime& t : p.profile())
              times.emplace_back(t.runs, t.barriers, t.seconds, t.waited);
            return times;
          },
          "Times every op from the first call on: (runs, barriers, seconds, seconds waited); see "
          "csrc/program.h.")
      .def_prop_ro("samples", &Program::samples)
      .def_prop_ro("vocab", &Program::vocab)
      .def_prop_ro("hidden_size", &Program::hidden_size)
      .def_prop_ro("weight_bytes", &Program::weight_bytes)
      .def_prop_ro("workspace_bytes", &Program::workspace_bytes)
      .def_prop_ro("isa", [](const Program& p) { return std::string(p.isa()); })
      .def_prop_ro("threads", &Program::threads);
}
