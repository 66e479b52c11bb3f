#include "gguf_strings.h"

#include <bit>
#include <cstring>

namespace nb = nanobind;

namespace hexad {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF's lengths are read as they lie");

// A cursor over the strings in a Python object's bytes.
class Strings {
 public:
  Strings(nb::handle buffer, int64_t start) : position_(start) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~Strings() { PyBuffer_Release(&view_); }
  Strings(const Strings&) = delete;
  Strings& operator=(const Strings&) = delete;

  int64_t position() const { return position_; }
  const char* text() const { return text_; }
  Py_ssize_t size() const { return size_; }

  // Moves to the next string; false where there is no whole one.
  bool next() {
    if (position_ < 0 || position_ > view_.len - 8) return false;
    const char* const data = static_cast<const char*>(view_.buf);
    uint64_t size;
    std::memcpy(&size, data + position_, 8);
    if (size > static_cast<uint64_t>(view_.len - 8 - position_)) return false;
    text_ = data + position_ + 8;
    size_ = static_cast<Py_ssize_t>(size);
    position_ += 8 + size_;
    return true;
  }

 private:
  Py_buffer view_;
  int64_t position_;
  const char* text_ = nullptr;
  Py_ssize_t size_ = 0;
};

}  // namespace

int64_t end_of_strings(nb::handle buffer, int64_t start, int64_t count) {
  Strings strings(buffer, start);
  for (int64_t i = 0; i < count; ++i)
    if (!strings.next()) return -1;
  return strings.position();
}

nb::list strings(nb::handle buffer, int64_t start, int64_t count) {
  Strings strings(buffer, start);
  nb::list items;
  for (int64_t i = 0; i < count && strings.next(); ++i) {
    PyObject* const text = PyUnicode_DecodeUTF8(strings.text(), strings.size(), nullptr);
    if (text == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw nb::python_error();
      PyErr_Clear();
      break;
    }
    items.append(nb::steal(text));
  }
  return items;
}

}  // namespace hexad
