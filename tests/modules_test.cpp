// SPDX-License-Identifier: Apache-2.0
//
// Bridges that are passed between the modules of a program: a program that exports nothing, two linked libraries with
// hidden symbols, and a plugin that is loaded with RTLD_LOCAL and shares no symbols.

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <semaphore>
#include <string>

#include "support.hpp"

#define LIBRARY(name)                                                  \
  extern "C" {                                                         \
  int name##_call(const RuntimeBridge*);                               \
  int name##_run(const RuntimeBridge*);                                \
  int name##_join(const RuntimeBridge*);                               \
  int name##_wait(const RuntimeBridge*);                               \
  int name##_park(const RuntimeBridge*);                               \
  int name##_shut(const RuntimeBridge*);                               \
  int name##_call_through(const RuntimeBridge*, const RuntimeBridge*); \
  int name##_make(const RuntimeBridge**);                              \
  int name##_destroy();                                                \
  int name##_destroy_other(RuntimeBridge*);                            \
  }
LIBRARY(library_a)
LIBRARY(library_b)

namespace {

constexpr int dead = -BridgeError::WorkerDead, lost = -BridgeError::ResponseLost, timed_out = -BridgeError::TimedOut,
              deadlock = -BridgeError::WouldDeadlock;

/// The functions of a module.
struct Module {
  using OnBridge = int(const RuntimeBridge*);

  OnBridge *call, *run, *join, *wait, *park, *shut;
  int (*call_through)(const RuntimeBridge*, const RuntimeBridge*);
  int (*make)(const RuntimeBridge**);
  int (*destroy)();
  int (*destroy_other)(RuntimeBridge*);
};

#define FUNCTIONS(name)                                                                                            \
  {                                                                                                                \
    name##_call, name##_run, name##_join, name##_wait, name##_park, name##_shut, name##_call_through, name##_make, \
        name##_destroy, name##_destroy_other                                                                       \
  }
const Module library_a FUNCTIONS(library_a), library_b FUNCTIONS(library_b);

class Plugin {
 public:
  Plugin() : handle_(dlopen(PLUGIN_MODULE, RTLD_NOW | RTLD_LOCAL)) {
    find(functions_.call, "call");
    find(functions_.run, "run");
    find(functions_.join, "join");
    find(functions_.wait, "wait");
    find(functions_.park, "park");
    find(functions_.shut, "shut");
    find(functions_.call_through, "call_through");
    find(functions_.make, "make");
    find(functions_.destroy, "destroy");
    find(functions_.destroy_other, "destroy_other");
  }
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;
  ~Plugin() { dlclose(handle_); }

  const Module& functions() const { return functions_; }

 private:
  template <class Signature>
  void find(Signature*& function, const char* name) {
    function = reinterpret_cast<Signature*>(dlsym(handle_, ("plugin_" + std::string(name)).c_str()));
  }

  void* handle_;
  Module functions_{};
};

/// Does everything that a module can do with another module's bridge.
int uses(const RuntimeBridge& bridge, const Module& module) {
  if (module.call(&bridge) != 5) return 1;
  if (module.run(&bridge) != 6) return 2;
  if (module.join(&bridge) != 6) return 3;
  if (module.wait(&bridge) != timed_out) return 4;
  int on_worker = 0;
  const auto inside = [&](Module::OnBridge* function) {
    return bridge.block_on([&] { return function(&bridge); }).value_or(-99);
  };
  if ((on_worker = inside(module.call)) != deadlock) return 5;
  if ((on_worker = inside(module.join)) != deadlock) return 6;
  if (in_child_process([&] { return module.call(&bridge) == dead ? 0 : 1; }) != 0) return 7;
  return 0;
}

/// The program or the module destroys a bridge while a task of the module is in flight.
int ends_under(const Module& module, bool by_module) {
  auto bridge = std::make_unique<RuntimeBridge>();
  int result = 0;
  jthread caller([&, b = bridge.get()] { result = module.park(b); });
  await_calls(*bridge, 1);
  if (by_module) {
    module.destroy_other(bridge.release());
  } else {
    bridge.reset();
  }
  caller.join();
  return result;
}

}  // namespace

TEST_CASE("modules: libraries with hidden symbols", "[child]") {
  const RuntimeBridge bridge;
  for (const Module& module : {library_a, library_b}) {
    CHECK(uses(bridge, module) == 0);
    CHECK(ends_under(module, false) == lost);
    CHECK(ends_under(module, true) == lost);
    const RuntimeBridge* other = nullptr;
    module.make(&other);
    CHECK(uses(*other, library_a) == 0);
    CHECK(uses(*other, library_b) == 0);
    module.destroy();
  }
}

TEST_CASE("modules: a ring through bridges of two libraries whose symbols the linker unites") {
  const RuntimeBridge *a = nullptr, *b = nullptr;
  library_a.make(&a);
  library_b.make(&b);
  const auto ring = a->block_on([&] { return library_a.call_through(b, a); });
  CHECK(ring == deadlock);
  library_a.destroy();
  library_b.destroy();
}

TEST_CASE("modules: a plugin that shares no symbols with the program", "[child]") {
  const Plugin plugin;
  const RuntimeBridge bridge;
  CHECK(uses(bridge, plugin.functions()) == 0);
  CHECK(ends_under(plugin.functions(), false) == lost);
  CHECK(ends_under(plugin.functions(), true) == lost);
  const RuntimeBridge* other = nullptr;
  plugin.functions().make(&other);
  CHECK(uses(*other, plugin.functions()) == 0);
  CHECK(uses(*other, library_a) == 0);
  CHECK(other->block_on([] { return 7; }) == 7);
  plugin.functions().destroy();
}

TEST_CASE("modules: a plugin finds rings of the program's bridges") {
  const Plugin plugin;
  const RuntimeBridge a, b;
  const auto ring = a.block_on([&] { return plugin.functions().call_through(&b, &a); });
  CHECK(ring == deadlock);
}

TEST_CASE("modules: a plugin shuts a bridge down in a task of that bridge") {
  const Plugin plugin;
  const RuntimeBridge bridge;
  CHECK(bridge.block_on([&] { return plugin.functions().shut(&bridge); }) == 0);
  CHECK(plugin.functions().shut(&bridge) == 1);
  CHECK(plugin.functions().call(&bridge) == dead);
}

TEST_CASE("modules: a program that forked before it loads the plugin", "[child]") {
  CHECK(in_child_process([] {
          const Plugin plugin;
          const RuntimeBridge bridge;
          return uses(bridge, plugin.functions());
        }) == 0);
}

TEST_CASE("modules: a plugin makes the first call on a lazy bridge", "[child]") {
  const Plugin plugin;
  const RuntimeBridge bridge(lazy());
  CHECK(plugin.functions().run(&bridge) == 6);
  CHECK(uses(bridge, plugin.functions()) == 0);
}

// Race: the plugin and the program call each other's bridges. Each looks for rings under its own lock.
TEST_CASE("modules: the program and a plugin call each other's bridges", "[race]") {
  const Plugin plugin;
  const RuntimeBridge bridge;
  const RuntimeBridge* other = nullptr;
  plugin.functions().make(&other);
  std::atomic<int> wrong{0};
  {
    std::vector<jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        for (int round = 0; round < 200; ++round) {
          const int value = i == 0   ? plugin.functions().call_through(&bridge, other)
                            : i == 1 ? library_a.call_through(&bridge, other)
                            : i == 2 ? plugin.functions().run(&bridge)
                                     : library_a.run(other);
          if (value != (i < 2 ? 5 : 6)) ++wrong;
        }
      });
    }
  }
  CHECK(wrong == 0);
  plugin.functions().destroy();
}
