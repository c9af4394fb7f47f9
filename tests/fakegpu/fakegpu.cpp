// A pretend GPU: PyTorch's private device with the host's memory and the CPU's kernels, and an error where CUDA gives one
#include <torch/extension.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/autocast_mode.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/indices_native.h>
#include <ATen/ops/values_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_coalesced_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/Allocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <unordered_map>
#include <unordered_set>
#include <mutex>
#include <string>
#include <atomic>
#include <unistd.h>
namespace py = pybind11;
static constexpr auto DT = c10::DeviceType::PrivateUse1;
static thread_local int depth = 0;
static py::object* hook = nullptr;
static std::unordered_map<std::string,long> counts;
static long launches = 0;
struct Deep { Deep(){depth++;} ~Deep(){depth--;} };
static void tell(const std::string& kind, const std::string& what) {
  if (depth>0) return;
  py::gil_scoped_acquire g;
  if (hook) { Deep d; (*hook)(kind, what); }
}
static pid_t owner = 0; // as CUDA: a process forked from one that has used the device may not use it
static void mine() { if (!owner) owner = getpid(); TORCH_CHECK(owner==getpid(), "Cannot re-initialize the device in forked subprocess. Use the 'spawn' start method"); }
static std::atomic<long> now_{0}, peak_{0};
struct Alloc final : c10::Allocator {
  static void del(void* p){ if (p) { now_ -= ((size_t*)p)[-8]; free((char*)p-64); } }
  c10::DataPtr allocate(size_t n) override { void* p = nullptr; mine(); if (n) { if (posix_memalign(&p, 64, n+64)) throw std::bad_alloc(); p = (char*)p+64; ((size_t*)p)[-8] = n; long c = now_ += n; if (c>peak_) peak_ = c; } return {p, p, &del, c10::Device(DT,0)}; }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, size_t n) const final { memcpy(d,s,n); }
};
static Alloc alloc_;
REGISTER_ALLOCATOR(DT, &alloc_);
struct Pinned final : c10::Allocator { // host memory that a copy to the device need not wait for
  static std::mutex& lock() { static std::mutex m; return m; }
  static std::unordered_set<const void*>& all() { static std::unordered_set<const void*> s; return s; }
  static void del(void* p){ if (p) { std::lock_guard<std::mutex> l(lock()); all().erase(p); free(p); } }
  static bool has(const void* p) { std::lock_guard<std::mutex> l(lock()); return all().count(p)>0; }
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) { if (posix_memalign(&p, 64, n)) throw std::bad_alloc(); std::lock_guard<std::mutex> l(lock()); all().insert(p); }
    return {p, p, &del, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, size_t n) const final { memcpy(d,s,n); }
};
static Pinned pinned_;
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isPinnedPtr(const void* p) const override { return Pinned::has(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { static at::Generator g = at::detail::getDefaultCPUGenerator(); return g; }
};
static Hooks hooks_;
static bool registered = [](){ at::RegisterPrivateUse1HooksInterface(&hooks_); return true; }();
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = DT;
  Guard(){} Guard(c10::DeviceType){}
  c10::DeviceType type() const override { return DT; }
  c10::Device exchangeDevice(c10::Device) const override { return {DT,0}; }
  c10::Device getDevice() const override { return {DT,0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(DT,0)); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(DT,0)); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(DT,0)); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

static at::Tensor host(const at::Tensor& t) { // the same memory as a CPU tensor
  if (t.device().type()!=DT) return t;
  auto keep = t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep](void*){}, at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
}
static at::Tensor empty_mf(c10::IntArrayRef size, std::optional<at::ScalarType> dt, std::optional<at::Layout> l, std::optional<at::Device> d, std::optional<bool> pin, std::optional<at::MemoryFormat> mf) {
  return at::detail::empty_generic(size, &alloc_, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dt), mf);
}
static at::Tensor empty_st(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dt, std::optional<at::Layout> l, std::optional<at::Device> d, std::optional<bool> pin) {
  return at::detail::empty_strided_generic(size, stride, &alloc_, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dt));
}
static at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  mine();
  bool a = self.device().type()==DT, b = dst.device().type()==DT;
  if (a && !b) tell(non_blocking ? "D2H async" : "D2H", std::to_string(self.numel()*self.element_size())+" B");
  bool soon = non_blocking && !a && Pinned::has(self.storage().data()); // from other memory the host waits, as on CUDA
  if (!a && b) tell(soon ? "H2D async" : "H2D", std::to_string(self.numel()*self.element_size())+" B");
  Deep d;
  if (self.numel()) host(dst).copy_(host(self));
  return dst;
}
static at::Tensor copy_from_resize(const at::Tensor& self, const at::Tensor& dst) {
  Deep d;
  if (dst.sizes()!=self.sizes()) dst.resize_(self.sizes());
  if (self.numel()) host(dst).copy_(host(self));
  return dst;
}
static at::Scalar local_scalar(const at::Tensor& self) { tell("item", ""); Deep d; return at::_local_scalar_dense(host(self)); }
static at::Tensor view_(const at::Tensor& s, c10::IntArrayRef z) { return at::native::view(s, z); }
static at::Tensor as_strided_(const at::Tensor& s, c10::IntArrayRef z, c10::IntArrayRef st, std::optional<int64_t> o) { return at::native::as_strided_tensorimpl(s, z, st, o); }
static at::Tensor unfold_(const at::Tensor& s, int64_t d, int64_t z, int64_t st) { return at::native::unfold(s, d, z, st); }
static at::Tensor reshape_alias_(const at::Tensor& s, c10::IntArrayRef z, c10::IntArrayRef st) { return at::native::_reshape_alias(s, z, st); }
static at::Tensor& set_storage(at::Tensor& r, at::Storage s, int64_t o, c10::IntArrayRef z, c10::IntArrayRef st) { return at::native::set_storage_cpu_(r, s, o, z, st); }
static at::Tensor& set_src(at::Tensor& r, at::Storage s) { int64_t n = s.nbytes()/r.element_size(); return at::native::set_storage_cpu_(r, s, 0, {n}, {}); }
static const at::Tensor& resize__(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> mf) {
  auto* impl = self.unsafeGetTensorImpl();
  int64_t n = 1; for (auto z: size) n *= z;
  size_t need = (n + self.storage_offset())*self.element_size();
  if (self.storage().nbytes()<need) {
    auto p = alloc_.allocate(need);
    if (self.storage().nbytes()) memcpy(p.get(), self.storage().data(), self.storage().nbytes());
    self.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(p));
    self.storage().unsafeGetStorageImpl()->set_nbytes(need);
  }
  impl->set_sizes_contiguous(size);
  if (mf.has_value() && *mf!=at::MemoryFormat::Preserve && *mf!=at::MemoryFormat::Contiguous) impl->empty_tensor_restride(*mf);
  return self;
}
static at::Tensor dev(const at::Tensor& t) { if (!t.defined()) return t; Deep d; auto r = empty_st(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {}); if (t.numel()) host(r).copy_(t); return r; }
static void same(const char* op, std::initializer_list<at::Tensor> ts) { for (auto& t: ts) if (t.defined() && t.dim()>0) TORCH_CHECK(t.device().type()==DT, op, ": Expected all tensors to be on the same device, but found at least two devices, fakegpu and cpu!"); }
static at::Tensor conv(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, c10::IntArrayRef s, c10::IntArrayRef p, c10::IntArrayRef d, bool t, c10::IntArrayRef op, int64_t g) {
  launches++;
  if (depth==0) { same("convolution", {x, w}); if (b) same("convolution", {*b}); }
  Deep dd; at::AutoDispatchBelowADInplaceOrView guard;
  return dev(at::convolution(host(x), host(w), b && b->defined() ? std::optional<at::Tensor>(host(*b)) : std::nullopt, s, p, d, t, op, g));
}
static std::tuple<at::Tensor,at::Tensor,at::Tensor> conv_back(const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, c10::IntArrayRef s, c10::IntArrayRef p, c10::IntArrayRef d, bool t, c10::IntArrayRef op, int64_t gr, std::array<bool,3> m) {
  launches += 2;
  if (depth==0) same("convolution_backward", {g, x, w});
  Deep dd; at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<int64_t> bs = {w.size(0)};
  auto r = at::convolution_backward(host(g), host(x), host(w), m[2] ? at::OptionalIntArrayRef(bs) : at::OptionalIntArrayRef(), s, p, d, t, op, gr, m);
  return {dev(std::get<0>(r)), dev(std::get<1>(r)), dev(std::get<2>(r))};
}
static const std::unordered_map<std::string,int> waits = {{"aten::nonzero",1},{"aten::masked_select",1},{"aten::_unique2",1},{"aten::unique_dim",1},{"aten::unique_consecutive",1},
  {"aten::unique_dim_consecutive",1},{"aten::_unique",1},{"aten::bincount",1},{"aten::equal",1},{"aten::repeat_interleave",1},{"aten::_coalesce",1},{"aten::count_nonzero",1}};
static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = op.schema().name();
  launches++; mine();
  if (depth==0) {
    counts[name + (op.schema().overload_name().empty() ? "" : "."+op.schema().overload_name())]++;
    auto n = op.schema().arguments().size();
    auto args = torch::jit::last(*stack, n);
    bool gpu = false, cpu = false, cpu0 = false, mask = false;
    bool index = name=="aten::index" || name=="aten::index_put_" || name=="aten::_index_put_impl_" || name=="aten::index_put" || name=="aten::_unsafe_index";
    auto look = [&](const at::Tensor& t, bool free) {
      if (!t.defined()) return;
      if (t.device().type()==DT) { gpu = true; if (free && (t.scalar_type()==at::kBool || t.scalar_type()==at::kByte)) mask = true; }
      else if (t.dim()==0) { if (!t.unsafeGetTensorImpl()->is_wrapped_number()) cpu0 = true; }
      else if (!free) cpu = true;
    };
    for (size_t i=0; i<n; i++) {
      bool free = index && i==1;
      if (args[i].isTensor()) look(args[i].toTensor(), free);
      else if (args[i].isTensorList()) for (at::Tensor t: args[i].toTensorList()) look(t, free);
      else if (args[i].isOptionalTensorList()) for (std::optional<at::Tensor> t: args[i].toOptionalTensorList()) if (t) look(*t, free);
    }
    TORCH_CHECK(!(gpu && cpu), name, ": Expected all tensors to be on the same device, but found at least two devices, fakegpu and cpu!");
    if (gpu && cpu0) tell("0-dim on cpu", name);
    if (mask && name!="aten::index") tell("wait", name+" by mask"); // `index` asks for nonzero, which tells
    if (waits.count(name)) tell("wait", name);
  }
  Deep d;
  at::native::cpu_fallback(op, stack);
}
// Sparse tensors: the two products of `coalesce` and of matrices, on the host
static at::Tensor sp_host(const at::Tensor& t) { return at::_sparse_coo_tensor_unsafe(host(t._indices()), host(t._values()), t.sizes(), {}, t.is_coalesced()); }
static at::Tensor sp_dev(const at::Tensor& t) { return at::_sparse_coo_tensor_unsafe(dev(t._indices()), dev(t._values()), t.sizes(), {}, t.is_coalesced()); }
static at::Tensor sp_coalesce(const at::Tensor& t) { launches++; tell("wait", "aten::_coalesce"); Deep d; return sp_dev(at::_coalesce(sp_host(t))); }
static at::Tensor sp_mm(const at::Tensor& a, const at::Tensor& b) { launches++; tell("wait", "aten::_sparse_sparse_mm"); Deep d; return sp_dev(at::_sparse_sparse_matmul(sp_host(a), sp_host(b))); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", TORCH_FN(at::native::new_with_dims_and_tensor_sparse_symint));
  m.impl("_indices", TORCH_FN(at::native::_indices_sparse)); m.impl("_values", TORCH_FN(at::native::_values_sparse));
  m.impl("indices", TORCH_FN(at::native::indices_sparse)); m.impl("values", TORCH_FN(at::native::values_sparse));
  m.impl("_nnz", TORCH_FN(at::native::_nnz_sparse)); m.impl("is_coalesced", TORCH_FN(at::native::is_coalesced_sparse));
  m.impl("_coalesced_", TORCH_FN(at::native::_coalesced_sparse_)); m.impl("sparse_dim", TORCH_FN(at::native::sparse_dim_sparse));
  m.impl("dense_dim", TORCH_FN(at::native::dense_dim_sparse)); m.impl("_coalesce", &sp_coalesce); m.impl("_sparse_sparse_matmul", &sp_mm);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_mf); m.impl("empty_strided", &empty_st);
  m.impl("_copy_from", &copy_from); m.impl("_copy_from_and_resize", &copy_from_resize); m.impl("_local_scalar_dense", &local_scalar);
  m.impl("view", &view_); m.impl("as_strided", &as_strided_); m.impl("unfold", &unfold_); m.impl("_reshape_alias", &reshape_alias_);
  m.impl("set_.source_Storage_storage_offset", &set_storage); m.impl("set_.source_Storage", &set_src); m.impl("resize_", &resize__);
  m.impl("convolution_overrideable", &conv); m.impl("convolution_backward_overrideable", &conv_back);
}
using namespace at::autocast;
using at::Tensor; using at::ScalarType; using at::IntArrayRef; using at::Scalar;
#if __has_include(<ATen/core/Dimname.h>) // Named tensors, which PyTorch 2.11 has and 2.15 does not
using at::DimnameList;
#endif
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define F32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define F32_OPT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(F32)
  AT_FORALL_FP32_SET_OPT_DTYPE(F32_OPT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_hook", [](py::object f){ delete hook; hook = f.is_none() ? nullptr : new py::object(f); });
  m.def("counts", [](){ return counts; });
  m.def("launches", [](){ return launches; });
  m.def("memory", [](){ return std::make_pair(now_.load(), peak_.load()); });
  m.def("reset_peak", [](){ peak_ = now_.load(); });
  m.def("reset", [](){ counts.clear(); launches = 0; });
}
