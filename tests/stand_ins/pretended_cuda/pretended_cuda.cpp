// A pretended CUDA device, for rehearsals on CPUs: genuine torch tensors of device cuda:0 whose memory is the host's.
//
// What: every aten kernel that torch has under the dispatch key CUDA is replaced by one boxed function. It refuses a
// mix of devices as torch does (CPU numbers of 0 dimensions and CPU indices into a cuda tensor are allowed) and a
// generator of the other device, runs the CPU's kernel on the same memory, and gives results of device cuda:0. The
// device guard and the CUDA hooks are replaced too: generators have a stream of their own and a state of 16 bytes.
// Why: a line that forgets a device, or draws from the wrong generator, fails on a GPU alone; here it fails in CI.
// Limits: no kernels of CUDA, so nothing of their speed, memory, rounding, missing types or asynchronous errors; no
// streams, no pinned memory, one device. Operators that take a storage are those below.
// For torch 2.14.1 of requirements/dev.txt, built for CUDA: it lists the names of the kernels to replace.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::Storage;
using c10::Stream;

static const Device CUDA0(DeviceType::CUDA, 0);
static const Device HOST(DeviceType::CPU);

// ---- memory

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr host = c10::GetCPUAllocator()->allocate(bytes);
    void* data = host.get();
    auto deleter = host.get_deleter();
    return c10::DataPtr(data, host.release_context(), deleter, CUDA0);
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
static Memory memory;

static Tensor with_storage(Storage storage, const Tensor& like, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

static Storage storage_over(c10::DataPtr data, size_t bytes, c10::Allocator* allocator) {
  return Storage(Storage::use_byte_size_t(), bytes, std::move(data), allocator, /*resizable=*/true);
}

// The same memory as a tensor of the CPU, which does not own it.
static Tensor on_host(const Tensor& tensor) {
  const Storage& storage = tensor.storage();
  c10::DataPtr data(storage.mutable_data(), HOST);
  auto alias = storage_over(std::move(data), storage.nbytes(), c10::GetCPUAllocator());
  return with_storage(std::move(alias), tensor, DispatchKey::CPU);
}

// The memory of a storage of the CPU, which it keeps alive, as one of cuda:0.
static Storage on_cuda(const Storage& storage) {
  auto drop = [](void* owner) { delete static_cast<Storage*>(owner); };
  c10::DataPtr data(const_cast<void*>(storage.data()), new Storage(storage), drop, CUDA0);
  return storage_over(std::move(data), storage.nbytes(), &memory);
}

// ---- random numbers

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;  // of the CPU, whose kernels draw from it
  uint64_t seed_ = 67280421310721;  // torch.initial_seed() of a generator that has no other

  explicit Generator(at::Generator of_cpu)
      : c10::GeneratorImpl(CUDA0, c10::DispatchKeySet(DispatchKey::CUDA)), inner(std::move(of_cpu)) {}

  void set_current_seed(uint64_t seed) override {
    inner.set_current_seed(seed ^ 0x5DEECE66Dull);  // other numbers than the CPU's of this seed
    seed_ = seed;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_ = inner.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }

  // The states of the CPU's generators, by a token that stands for each in the 16 bytes that CUDA's states have. They
  // are known in this process; a token from elsewhere is taken for a seed.
  static std::map<int64_t, Tensor>& states() {
    static std::map<int64_t, Tensor> known;
    return known;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.dtype() == at::kByte && state.numel() == 16, "RNG state is wrong size");
    int64_t token;
    memcpy(&token, state.data(), sizeof token);
    auto found = states().find(token);
    if (found != states().end()) {
      inner.set_state(found->second);
    } else {
      inner.set_current_seed(static_cast<uint64_t>(token));
    }
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    Tensor state = inner.get_state();
    const auto* bytes = state.data_ptr<uint8_t>();
    uint64_t token = 1469598103934665603ull;  // FNV-1a
    for (int64_t i = 0; i < state.numel(); ++i) token = (token ^ bytes[i]) * 1099511628211ull;
    states()[static_cast<int64_t>(token)] = state.clone();
    Tensor given = at::zeros({16}, at::kByte);
    memcpy(given.data_ptr(), &token, sizeof token);
    return given.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* made = new Generator(inner.clone());
    made->seed_ = seed_;
    return made;
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override {
    return c10::intrusive_ptr<c10::GeneratorImpl>::reclaim(clone_impl());
  }
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& state) override {
    inner = static_cast<Generator*>(state.get())->inner;
  }
};

static at::Generator new_generator() {
  return at::make_generator<Generator>(at::detail::createCPUGenerator(12345));
}

static at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

static at::Generator& inner_of(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// ---- the device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream only() { return Stream(Stream::DEFAULT, CUDA0); }

  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device exchangeDevice(Device) const override { return CUDA0; }
  Device getDevice() const override { return CUDA0; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only(); }
  Stream exchangeStream(Stream) const override { return only(); }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
static Guard guard;

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}

  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Device getDeviceFromPtr(void*) const override { return CUDA0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return new_generator(); }
};

// ---- the one kernel

// The call of one operator: its arguments on torch's stack, made ones of the CPU, and its results, made ones of cuda:0.
struct Call {
  struct Pair {
    Tensor given, alias;
  };
  const c10::FunctionSchema& schema;
  torch::jit::Stack* stack;
  std::vector<Pair> pairs;                        // cuda tensors, and the same memory as tensors of the CPU
  std::vector<std::pair<Tensor, size_t>> of_cpu;  // tensors of the CPU, and which arguments they are
  bool is_cuda = false;                           // a cuda tensor is among the arguments, or the device asked for

  // A tensor of the arguments, as one of the CPU.
  Tensor take(const Tensor& tensor, size_t argument) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) {
      is_cuda = true;
      for (auto& pair : pairs) {
        if (pair.given.is_same(tensor)) return pair.alias;
      }
      pairs.push_back({tensor, on_host(tensor)});
      return pairs.back().alias;
    }
    if (tensor.device().is_cpu()) of_cpu.push_back({tensor, argument});
    return tensor;
  }

  void take_argument(IValue& value, size_t argument) {
    static const auto optional_tensors = c10::ListType::create(c10::OptionalType::ofTensor());
    if (value.isTensor()) {
      value = take(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      c10::List<Tensor> taken;
      for (const Tensor& each : value.toTensorVector()) taken.push_back(take(each, argument));
      value = taken;
    } else if (value.isList() && value.type()->isSubtypeOf(*optional_tensors)) {
      c10::List<std::optional<Tensor>> taken;
      for (const IValue& each : value.toListRef()) {
        taken.push_back(each.isNone() ? std::optional<Tensor>() : take(each.toTensor(), argument));
      }
      value = taken;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      is_cuda = true;
      value = IValue(HOST);
    } else if (value.isStorage() && value.toStorage().device_type() == DeviceType::CUDA) {
      TORCH_CHECK(false, "the pretended device has no operator with a storage: ", schema.name());
    }
  }

  // Behind the tensors, which tell whether the operator is CUDA's.
  void take_generator(IValue& value) {
    if (value.isNone()) {
      value = IValue(inner_of(default_generator()));
      return;
    }
    const at::Generator generator = value.toGenerator();
    TORCH_CHECK(generator.device().is_cuda(),
                "Expected a 'cuda' device type for generator but found 'cpu' (", schema.name(), ")");
    TORCH_CHECK(is_cuda, "Expected a 'cpu' device type for generator but found 'cuda' (", schema.name(), ")");
    value = IValue(inner_of(generator));
  }

  void take_arguments() {
    const auto& arguments = schema.arguments();
    const auto begin = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) take_argument((*stack)[begin + i], i);
    for (size_t i = 0; i < arguments.size(); ++i) {
      IValue& value = (*stack)[begin + i];
      if (arguments[i].name() == "pin_memory" && value.isBool()) value = IValue(false);
      if (value.isGenerator() || (value.isNone() && arguments[i].name() == "generator")) take_generator(value);
    }
  }

  void refuse_a_mix() const {
    static const std::set<std::string> indexing{"aten::index", "aten::index_put", "aten::index_put_",
                                                "aten::_index_put_impl_", "aten::_unsafe_index",
                                                "aten::_unsafe_index_put"};
    const std::string& name = schema.name();
    if (!is_cuda) return;
    for (const auto& [tensor, argument] : of_cpu) {
      const std::string& what = schema.arguments()[argument].name();
      if (what == "indices" && indexing.count(name)) continue;
      if (tensor.dim() == 0 && name != "aten::cat" && name != "aten::stack") continue;
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                  "cpu! (", what, " of ", name, ", ", tensor.sizes(), " of ", tensor.dtype(), ")");
    }
  }

  bool has_generator() const {
    for (const auto& argument : schema.arguments()) {
      if (argument.name() == "generator") return true;
    }
    return false;
  }

  // A result, as a tensor of cuda:0; what was given is given back.
  Tensor give(const Tensor& tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& pair : pairs) {
      if (pair.alias.is_same(tensor)) return pair.given;
    }
    for (const auto& each : of_cpu) {
      if (each.first.is_same(tensor)) return tensor;
    }
    for (const auto& pair : pairs) {  // a view
      const void* data = tensor.has_storage() ? tensor.storage().data() : nullptr;
      if (data != nullptr && data == pair.alias.storage().data()) {
        return with_storage(pair.given.storage(), tensor, DispatchKey::CUDA);
      }
    }
    return with_storage(on_cuda(tensor.storage()), tensor, DispatchKey::CUDA);
  }

  void give_results() {
    const auto count = schema.returns().size();
    for (size_t i = stack->size() - count; i < stack->size(); ++i) {
      IValue& value = (*stack)[i];
      if (value.isTensor()) {
        value = give(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<Tensor> given;
        for (const Tensor& each : value.toTensorVector()) given.push_back(give(each));
        value = given;
      }
    }
    for (auto& [given, alias] : pairs) {  // what the operator has resized
      auto* tensor = given.unsafeGetTensorImpl();
      const bool moved = alias.storage().data() != given.storage().data();
      if (moved) tensor->set_storage_keep_dtype(on_cuda(alias.storage()));
      if (moved || alias.sizes() != given.sizes() || alias.strides() != given.strides()) {
        tensor->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }
};

static void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const c10::DispatchKeySet cpu(DispatchKey::CPU);
  Call call{op.schema(), stack};
  call.take_arguments();
  call.refuse_a_mix();
  if (op.hasTag(at::Tag::nondeterministic_seeded) && !call.has_generator()) {  // it draws from the default generator
    auto& mine = inner_of(default_generator());
    auto theirs = at::detail::getDefaultCPUGenerator();
    const Tensor kept = theirs.get_state();
    theirs.set_state(mine.get_state());
    op.redispatchBoxed(cpu, stack);
    mine.set_state(theirs.get_state());
    theirs.set_state(kept);
  } else {
    op.redispatchBoxed(cpu, stack);
  }
  call.give_results();
}

// ---- kernels of their own: those between devices, and those that take a storage

static Tensor as_cpu(const Tensor& tensor) {
  return tensor.is_cuda() ? on_host(tensor) : tensor;
}

static Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  as_cpu(self).copy_(as_cpu(source));
  return self;
}

static Tensor& set_(Tensor& self, const Storage& storage, at::IntArrayRef size, at::IntArrayRef stride,
                    int64_t offset) {
  TORCH_CHECK(storage.device_type() == DeviceType::CUDA, "set_: memory of another device");
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

static Tensor& set_part(Tensor& self, Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides(sizes.size(), 1);
  if (stride.empty()) {
    for (int i = static_cast<int>(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * sizes[i + 1];
  } else {
    strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  }
  return set_(self, storage, sizes, strides, offset.guard_int(__FILE__, __LINE__));
}

static Tensor& set_whole(Tensor& self, Storage storage) {
  return set_(self, storage, {static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize())}, {1}, 0);
}

static Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_(self, source.storage(), source.sizes(), source.strides(), source.storage_offset());
}

static void record_stream(Tensor&, Stream) {}

// ---- for Python

static torch::Library& library_of(const char* space) {
  static std::vector<std::unique_ptr<torch::Library>> kept;  // their kernels go with them
  kept.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, space, std::make_optional(DispatchKey::CUDA),
                                                  __FILE__, __LINE__));
  return *kept.back();
}

// Before torch's Python is imported, which makes its own hooks; true where ours are taken.
static bool hooks() {
  auto make = [](at::CUDAHooksArgs args) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<Hooks>(args);
  };
  at::CUDAHooksRegistry()->Register("CUDAHooks", make, c10::REGISTRY_PREFERRED);
  return at::detail::getCUDAHooks().getNumGPUs() == 1;
}

// Takes the names, without "aten::", of the kernels to replace.
static void install(const std::vector<std::string>& names) {
  c10::impl::device_guard_impl_registry[static_cast<int>(DeviceType::CUDA)].store(&guard);
  c10::SetAllocator(DeviceType::CUDA, &memory, 255);
  const std::set<std::string> apart{"copy_", "set_.source_Storage_storage_offset", "set_.source_Storage",
                                    "set_.source_Tensor", "record_stream", "is_pinned", "_pin_memory"};
  auto& aten = library_of("aten");
  for (const auto& name : names) {
    if (!apart.count(name)) aten.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
  }
  aten.impl("copy_", &copy_);
  aten.impl("set_.source_Storage_storage_offset", &set_part);
  aten.impl("set_.source_Storage", &set_whole);
  aten.impl("set_.source_Tensor", &set_tensor);
  aten.impl("record_stream", &record_stream);
  library_of("_").fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

PYBIND11_MODULE(pretended_cuda_device, module) {
  module.def("hooks", &hooks);
  module.def("install", &install);
  module.def("default_generator", [] { return default_generator(); });
}
