#include "metal/tuning.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <sstream>

#include "core/error.h"
#include "metal/build_facts.h"
#include "metal/cache_folder.h"
#include "metal/plan_tiles.h"
#include "metal/switches.h"

namespace umfa::metal {
namespace {

constexpr const char* first_line = "umfa tuning 1\n";

std::string file() {
    const std::string folder = cache_folder();
    return folder.empty() ? folder : folder + "/tuning.txt";
}

std::string key_of(const std::string& device) {
    return "key umfa " + kernels_text() + "; " + one_line(device) + "; " + one_line(system_text()) +
           "\n";
}

bool is_sound(const Tuning& values) {
    return values.worthwhile_flop >= 1e5 && values.worthwhile_flop <= 1e12 &&
           values.decode_threadgroups_per_core >= 1 && values.decode_threadgroups_per_core <= 16 &&
           std::all_of(values.tiles.begin(), values.tiles.end(), is_tile_choice);
}

Tuned tuned_of(const std::string& text) {
    Tuned tuned;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        const size_t space = line.find(' ');
        if (space == line.npos) continue;
        const std::string word = line.substr(0, space), rest = line.substr(space + 1);
        if (word == "worthwhile_flop") tuned.values.worthwhile_flop = std::atof(rest.c_str());
        if (word == "decode_threadgroups_per_core")
            tuned.values.decode_threadgroups_per_core = std::atoll(rest.c_str());
        if (word == "tiles") tuned.values.tiles.push_back(rest);
        if (word == "when") tuned.when = rest;
        if (word == "device") tuned.device = rest;
        if (word == "system") tuned.system = rest;
        if (word == "measured") tuned.measured.push_back(rest);
    }
    return tuned;
}

Tuned defaults(std::string ignored) {
    Tuned tuned;
    tuned.ignored = std::move(ignored);
    return tuned;
}

}  // namespace

Tuned read_tuning(const std::string& device) {
    if (!is_on(tuning_switch)) return defaults("UMFA_TUNE=0");
    const std::string path = file();
    if (path.empty() || access(path.c_str(), F_OK) != 0) return {};
    const std::optional<std::string> text = checked_content(path, first_line);
    if (!text) return defaults(path + " is damaged");
    if (text->rfind(first_line + key_of(device), 0) != 0)
        return defaults(path + " is of another GPU, macOS or umfa");
    Tuned tuned = tuned_of(*text);
    if (!is_sound(tuned.values)) return defaults(path + " has values that umfa does not know");
    tuned.kept = path;
    return tuned;
}

void keep_tuning(const std::string& device, Tuned& tuned) {
    tuned.when = time_text();
    tuned.device = one_line(device);
    tuned.system = one_line(system_text());
    std::ostringstream text;
    text.precision(17);
    text << first_line << key_of(device) << "when " << tuned.when << "\ndevice " << tuned.device
         << "\nsystem " << tuned.system << "\nworthwhile_flop " << tuned.values.worthwhile_flop
         << "\ndecode_threadgroups_per_core " << tuned.values.decode_threadgroups_per_core << "\n";
    for (const std::string& kernel : tuned.values.tiles) text << "tiles " << kernel << "\n";
    for (const std::string& line : tuned.measured) text << "measured " << one_line(line) << "\n";
    const std::string path = file();
    if (path.empty()) {
        tuned.ignored = "there is no HOME";
        return;
    }
    if (make_folder(path.substr(0, path.rfind('/'))) && replace_checked(path, text.str()))
        tuned.kept = path;
    else
        tuned.ignored = error_text(path);
}

void check_tuning(const Tuning& values) {
    if (is_sound(values)) return;
    std::ostringstream got;
    got << values.worthwhile_flop << " FLOP, " << values.decode_threadgroups_per_core
        << " threadgroups";
    for (const std::string& kernel : values.tiles) got << ", " << one_line(kernel);
    fail(ErrorKind::value, "umfa.tune", "values are out of range", got.str(),
         "1e5 to 1e12 FLOP, 1 to 16 threadgroups, and tiles in forward_shapes.h");
}

}  // namespace umfa::metal
