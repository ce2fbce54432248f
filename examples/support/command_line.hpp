// SPDX-License-Identifier: Apache-2.0
//
// Settings of an example program. A value comes from the command line, else from the environment, else from a default.

#ifndef RUNTIME_BRIDGE_EXAMPLES_COMMAND_LINE_HPP
#define RUNTIME_BRIDGE_EXAMPLES_COMMAND_LINE_HPP

#include <getopt.h>

#include <charconv>
#include <cstdlib>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// A mistake in the arguments. what() is one sentence for the user.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// An option `--name VALUE`, or a switch `--name` if `value` is empty.
struct Setting {
  std::string name;
  std::string value;                        ///< the value's name in --help; empty for a switch
  std::string meaning;                      ///< one line for --help
  std::string fallback = {};                ///< if neither the command line nor the environment sets it
  std::vector<std::string> variables = {};  ///< environment variables; the first one that is not empty is used
};

/// Not thread-safe to construct: it calls getenv, so create it before the first thread.
class CommandLine {
 public:
  /// With --help, prints the help and exits. Throws UsageError for arguments that it does not know.
  CommandLine(int count, char** arguments, const std::string& about, const std::vector<Setting>& settings) {
    std::vector<option> options;
    for (const Setting& setting : settings) {
      values_[setting.name] = initial(setting);
      options.push_back({setting.name.c_str(), setting.value.empty() ? no_argument : required_argument, nullptr, 0});
    }
    options.push_back({"help", no_argument, nullptr, 'h'});
    options.push_back({});

    opterr = 0;  // getopt must not print errors: they are thrown
    for (int found = 0, index = 0; (found = getopt_long(count, arguments, ":", options.data(), &index)) != -1;) {
      if (found == 'h') {
        print_help(arguments[0], about, settings);
        std::exit(EXIT_SUCCESS);
      }
      if (found != 0) {
        const std::string argument = arguments[optind - 1];
        throw UsageError(found == ':' ? argument + " needs a value" : "unknown option " + argument + "; see --help");
      }
      const Setting& setting = settings[static_cast<std::size_t>(index)];
      values_[setting.name] = setting.value.empty() ? "yes" : optarg;
    }
    if (optind < count) throw UsageError("unexpected argument " + std::string(arguments[optind]) + "; see --help");
  }

  const std::string& operator[](const std::string& name) const { return values_.at(name); }

  bool has(const std::string& name) const { return !values_.at(name).empty(); }

  /// The value as a whole number from `least` to `most`. Throws UsageError if it is not one.
  int number(const std::string& name, int least, int most) const {
    const std::string& text = values_.at(name);
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size() || value < least || value > most)
      throw UsageError("--" + name + " must be a number from " + std::to_string(least) + " to " + std::to_string(most) +
                       ", not '" + text + "'");
    return value;
  }

 private:
  static std::string initial(const Setting& setting) {
    for (const std::string& variable : setting.variables)
      if (const char* value = std::getenv(variable.c_str()); value != nullptr && *value != '\0') return value;
    return setting.fallback;
  }

  static void print_help(std::string_view program, const std::string& about, const std::vector<Setting>& settings) {
    std::cout << "usage: " << program << " [OPTION]...\n\n" << about << "\n\n";
    for (const Setting& setting : settings) {
      std::cout << "  --" << setting.name << (setting.value.empty() ? "" : " ") << setting.value << "\n      "
                << setting.meaning;
      for (const std::string& variable : setting.variables)
        std::cout << (&variable == &setting.variables.front() ? "; else $" : ", $") << variable;
      if (!setting.fallback.empty()) std::cout << "; else " << setting.fallback;
      std::cout << '\n';
    }
    std::cout << "  --help\n      this text\n";
  }

  std::map<std::string, std::string> values_;
};

#endif
